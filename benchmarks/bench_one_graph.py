"""Is a whole instance as one ONNX graph with nested ``If`` faster than a graph per exit and a host that routes?

    python benchmarks/bench_one_graph.py RUN [--instance NAME] [--sizes 360x480 512x512]
        [--runtimes onnxruntime openvino] [--threads 2] [--images N] [--rounds 3] [--json PATH]

    images (1, 3, H, W) normalised -> logits (1, K, h, w), confidence (1,), exit (1,): where the image stopped, from 0

The graph is made of those of ``messnet.deployment.graphs``: each decision's else-branch holds the next stage with its
own weights, which ONNX Runtime would not prepare at the top of the graph. An ``If`` takes one decision, so the batch is
1. Both ways run in turn, image by image, from normalised images to labels. The goal is what would make it worth having.

Ends with one line per figure: name value unit goal ok|short.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import torch
from bench_runtime import Figure, Graphs, show
from numpy.typing import NDArray
from onnx import TensorProto, helper

from messnet.costs.latency import device_name
from messnet.deployment.graph_runner import load_graph, stage_name
from messnet.deployment.restoring import restore_run
from messnet.deployment.session import Session
from messnet.images.preprocessing import normalise
from messnet.policy.graph import IR_VERSION, OPSET
from messnet.policy.labels import upsampled_labels
from messnet.records.instance import ExitChoice
from messnet.run.opening import open_run

__all__ = ["one_graph"]

OUTPUTS = ("logits", "confidence", "exit")


def one_graph(graphs: Mapping[str, bytes], exits: Sequence[ExitChoice]) -> bytes:
    """``graphs`` as ``make_graphs`` gives them, of ``exits`` of which all but the last decide."""
    nodes, weights = _stage(graphs, exits, 0)
    shapes = {"logits": [1, "K", "h", "w"], "confidence": [1], "exit": [1]}
    kinds = {"logits": TensorProto.FLOAT, "confidence": TensorProto.FLOAT, "exit": TensorProto.INT64}
    outputs = [helper.make_tensor_value_info(f"0/{name}", kinds[name], shapes[name]) for name in OUTPUTS]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, "H", "W"])
    graph = helper.make_graph(nodes, "instance", [images], outputs, initializer=weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


def _stage(graphs: Mapping[str, bytes], exits: Sequence[ExitChoice], position: int) -> tuple[list[Any], list[Any]]:
    """Nodes and weights of a stage and, in the else-branch of its decision, of all after it; they give the
    ``OUTPUTS`` as "POSITION/logits" ..."""
    graph, choice = onnx.load_from_string(graphs[stage_name(position)]).graph, exits[position]
    last, here = position == len(exits) - 1, f"stage{position}/"
    given = {"live0": "images"} if position == 0 else {}
    given |= {f"live{k}": f"stage{position - 1}/next{k}" for k in range(len(graph.input)) if position}

    def named(name: str) -> str:
        return given.get(name, here + name) if name else name

    wanted = {one.name for one in graph.output if one.name != "confidence" or not last}
    wanted -= {one.name for one in graph.output if last and one.name.startswith("next")}
    nodes = _leading_to(wanted, graph.node)
    used = {name for node in nodes for name in node.input}
    weights = [one for one in graph.initializer if one.name in used]
    for node in nodes:
        node.name = ""
        node.input[:] = [named(name) for name in node.input]
        node.output[:] = [named(name) for name in node.output]
    for weight in weights:
        weight.name = here + weight.name
    number = helper.make_tensor(f"{here}position", TensorProto.INT64, [1], [position])
    if last:
        unsure = helper.make_tensor(f"{here}unsure", TensorProto.FLOAT, [1], [-1.0])
        found = [f"{here}logits", unsure.name, number.name]
        return [*nodes, *_passed_on(found, position)], [*weights, unsure, number]
    thresholds = [
        helper.make_tensor(f"{here}pixel_threshold", TensorProto.FLOAT, [1], [choice.pixel_threshold]),
        helper.make_tensor(f"{here}image_threshold", TensorProto.DOUBLE, [1], [choice.image_threshold]),
    ]
    decision = [
        helper.make_node("Cast", [f"{here}confidence"], [f"{here}share"], to=TensorProto.DOUBLE),
        helper.make_node("GreaterOrEqual", [f"{here}share", f"{here}image_threshold"], [f"{here}leaves"]),
        helper.make_node("Squeeze", [f"{here}leaves"], [f"{here}decision"]),
    ]
    leave = _branch(_passed_on([f"{here}logits", f"{here}confidence", number.name], f"{position}/leave"), [], "leave")
    following, own = _stage(graphs, exits, position + 1)
    go_on = _branch(following, own, "go_on")
    routed = [f"{position}/{name}" for name in OUTPUTS]
    branch = helper.make_node("If", [f"{here}decision"], routed, then_branch=leave, else_branch=go_on)
    return [*nodes, *decision, branch], [*weights, *thresholds, number]


def _leading_to(wanted: set[str], nodes: Sequence[Any]) -> list[Any]:
    needed, kept = {*wanted}, []
    for node in reversed(nodes):
        if needed & {*node.output}:
            needed |= {*node.input}
            kept.append(node)
    return kept[::-1]


def _passed_on(names: Sequence[str], prefix: object) -> list[Any]:
    """A branch may not return what comes from outside of it."""
    pairs = zip(names, OUTPUTS, strict=True)
    return [helper.make_node("Identity", [name], [f"{prefix}/{output}"]) for name, output in pairs]


def _branch(nodes: list[Any], weights: list[Any], name: str) -> Any:
    made = [node.output[0] for node in nodes if node.op_type == "Identity"][-len(OUTPUTS) :]
    if nodes[-1].op_type == "If":
        made = list(nodes[-1].output)
    outputs = [helper.make_empty_tensor_value_info(one) for one in made]
    return helper.make_graph(nodes, name, [], outputs, initializer=weights)


Way = Callable[[NDArray[np.uint8]], tuple[int, NDArray[np.uint8], float]]
"""An image (H, W, 3) -> position of the exit taken, labels (H, W), milliseconds from the normalised image to them."""


def staged(session: Session) -> Way:
    positions = {choice.exit_index: i for i, choice in enumerate(session.instance.exits)}

    def run(image: NDArray[np.uint8]) -> tuple[int, NDArray[np.uint8], float]:
        result = session.predict([image])[0]
        return positions[result.exit_index], result.labels, result.latency_ms

    return run


def whole(data: bytes, runtime: str, threads: int) -> Way:
    graph = load_graph(data, runtime, "f32", threads)

    def run(image: NDArray[np.uint8]) -> tuple[int, NDArray[np.uint8], float]:
        images = normalise(image[None])
        start = time.perf_counter()
        logits, taken = graph.run({"images": images}, ["0/logits", "0/exit"])
        labels = upsampled_labels(logits, (image.shape[0], image.shape[1]))[0]
        return int(taken[0]), labels, (time.perf_counter() - start) * 1000

    return run


def compare(ways: Sequence[Way], images: Sequence[NDArray[np.uint8]], rounds: int, where: str) -> list[Figure]:
    """The ways in turn, each image and round beginning with the other one."""
    laps, cpu = np.zeros((2, len(ways), len(images), rounds))
    taken = np.zeros((len(ways), len(images)), int)
    equal = []
    for way in ways:
        for image in images[:3]:
            way(image)
    for round in range(rounds):
        for i, image in enumerate(images):
            found = {}
            for turn in range(len(ways)):
                w = (turn + i + round) % len(ways)
                start = time.process_time()
                taken[w, i], found[w], laps[w, i, round] = ways[w](image)
                cpu[w, i, round] = (time.process_time() - start) * 1000
            equal.append((found[0] == found[1]).mean())
    times, of_cpu = np.median(laps, 2), np.median(cpu, 2)
    figures = []
    for position in sorted(set(taken[0].tolist())):
        own = taken[0] == position
        for name, row, busy in zip(("staged", "one_graph"), times, of_cpu, strict=True):
            figures.append(Figure(f"{where}_{name}_stop{position}_ms", float(np.median(row[own])), "ms"))
            figures.append(Figure(f"{where}_{name}_stop{position}_cpu_ms", float(np.median(busy[own])), "ms"))
    means, busy_means = times.mean(1), of_cpu.mean(1)
    return [
        *figures,
        Figure(f"{where}_staged_ms", float(means[0]), "ms"),
        Figure(f"{where}_one_graph_ms", float(means[1]), "ms"),
        Figure(f"{where}_staged_over_one_graph", float(means[0] / means[1]), "x", 1.05),
        Figure(f"{where}_staged_over_one_graph_cpu", float(busy_means[0] / busy_means[1]), "x", 1.05),
        Figure(f"{where}_equal_exits", float((taken[0] == taken[1]).mean()), "share", 1.0),
        Figure(f"{where}_equal_pixels", float(np.mean(equal)), "share", 0.999),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--instance", help="of the run; by default the cheapest within 1 pp")
    parser.add_argument("--sizes", nargs="+", default=["360x480", "512x512"])
    parser.add_argument("--runtimes", nargs="+", choices=["onnxruntime", "openvino"], default=["onnxruntime"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, help="of the validation images, at most")
    parser.add_argument("--rounds", type=int, default=3, help="over the images; the median counts")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cv2.setNumThreads(1)
    blueprint, net, instance = restore_run(options.run, options.instance)
    graphs = Graphs(net, blueprint.input_size)
    val = open_run(options.run).dataset("val")
    raw = [val[v].image for v in range(min(len(val), options.images or len(val)))]
    print(f"{device_name(torch.device('cpu'))}, {options.threads} threads; {blueprint.model}, {len(raw)} images")
    figures: list[Figure] = []
    for runtime in options.runtimes:
        session = Session(graphs.runner(instance, runtime, "f32", options.threads), instance)
        data = one_graph(graphs.made[tuple(choice.exit for choice in instance.exits)], instance.exits)
        ways = [staged(session), whole(data, runtime, options.threads)]
        for size in options.sizes:
            height, width = (int(side) for side in size.split("x"))
            images = [cv2.resize(image, (width, height)) for image in raw]
            figures += compare(ways, images, options.rounds, f"{runtime}_{size}")
    show(figures)
    if options.json:
        record: Mapping[str, Any] = {"figures": [{**figure._asdict(), "ok": figure.ok} for figure in figures]}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
