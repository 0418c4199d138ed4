"""What an instance saves where it runs: every runtime, against the original model in the same run and runtime.

    python benchmarks/bench_runtime.py RUN [--instance NAME | --half] [--sizes 360x480 512x512] [--batches 1 8]
        [--runtimes torch torch-compiled onnxruntime openvino openvino:bf16 openvino:f16] [--threads 2]
        [--images N] [--rounds 3] [--quick] [--json PATH]
    python benchmarks/bench_runtime.py BUNDLE --recipe RECIPE [--data-root FOLDER] ...
    python benchmarks/bench_runtime.py ... --int8 [--runtimes onnxruntime openvino]

RUN is a finished run whose data set is here; the images are its validation images, resized to each size. Of a BUNDLE
they are those of the recipe; what it leaves out of the original model, whatever lies behind its last exit, gets random
weights, for only the original's time is read. --half takes
thresholds of its own instead of an instance's, so that about half of the images leave at the first of its exits: what
early stops save when they happen. Original model and instance take turns of 16 images. Goals: 90 % of the workload
reduction arrives as latency; policy and routing take 3 % of the time; float32 decides as torch does, on every image.

--int8 has original and instance in f32 and int8 take turns instead, calibrated on training images, and where the
package nncf is installed the original as OpenVINO's own quantiser makes it: mIoU, milliseconds and what the exits gain
on top. Goals: the int8 instance is 1.6 times as fast as the one in f32 at <= 0.3 pp, 3.5 times as fast as the original
in f32 at <= 1 pp, and 90 % of the workload reduction arrives between the two in int8.

Ends with one line per figure: name value unit goal ok|short.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from tqdm import tqdm

from messnet.costs.latency import LatencyOptions, device_name
from messnet.costs.workload import copy_module
from messnet.data import SegmentationDataset
from messnet.deployment.bundle import is_bundle, open_bundle
from messnet.deployment.graph_runner import GraphRunner
from messnet.deployment.graphs import make_graphs
from messnet.deployment.measurement import measure_session
from messnet.deployment.quantising import quantise
from messnet.deployment.restoring import restore_bundle, restore_run
from messnet.deployment.runner import Runner
from messnet.deployment.session import Result, Session
from messnet.deployment.torch_runner import TorchRunner, size_multiple
from messnet.images.preprocessing import normalise
from messnet.network.blueprint import Blueprint
from messnet.network.multi_exit import MultiExitNet
from messnet.policy.labels import load_compiled
from messnet.policy.policy import Policy
from messnet.profiling import profile
from messnet.records.costs import CostTable
from messnet.records.instance import ExitChoice, Instance
from messnet.records.iou import mean_iou, pixel_counts
from messnet.run.opening import open_run
from messnet.run.run import Run

RUNTIMES = ["torch", "torch-compiled", "onnxruntime", "openvino", "openvino:bf16", "openvino:f16"]
WARM_UP = 3
PER_TURN = 16  # images


class Figure(NamedTuple):
    name: str
    value: float
    unit: str
    goal: float | None = None
    at_least: bool = True

    @property
    def ok(self) -> bool:
        return self.goal is None or bool(self.value >= self.goal if self.at_least else self.value <= self.goal)


class Graphs:
    """The graphs of the instances, made once for all runtimes."""

    def __init__(self, net: MultiExitNet, input_size: tuple[int, int]) -> None:
        self.net, self.size, self.multiple = net, input_size, size_multiple(net)
        self.made: dict[tuple[Any, ...], dict[str, bytes]] = {}

    def runner(self, instance: Instance, runtime: Any, precision: Any, threads: int) -> Runner:
        exits = tuple(choice.exit for choice in instance.exits)
        if exits not in self.made:
            self.made[exits] = make_graphs(self.net, exits, Policy.parse(instance.policy), self.size)
        strides = [point.output_stride for point in self.net.exit_points]
        return GraphRunner(
            self.made[exits],
            instance.exits,
            strides,
            runtime=runtime,
            precision=precision,
            threads=threads,
            size_multiple=self.multiple,
            policy=Policy.parse(instance.policy),
        )


def sessions(
    net: MultiExitNet, graphs: Graphs, instances: Sequence[Instance], runtime: str, threads: int
) -> list[Session]:
    name, _, precision = runtime.partition(":")
    found = []
    for instance in instances:
        if name.startswith("torch"):
            dtype = {"": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[precision]
            copied = copy_module(
                net, lambda tensor, dtype=dtype: tensor.to(dtype) if tensor.is_floating_point() else tensor
            )
            policy = Policy.parse(instance.policy)
            runner: Runner = TorchRunner(copied, policy, threads=threads, compiled=name == "torch-compiled")
        else:
            runner = graphs.runner(instance, name, precision or "f32", threads)
        found.append(Session(runner, instance))
    return found


def halved(net: MultiExitNet, instance: Instance, images: Sequence[np.ndarray]) -> Instance:
    """The instance's first exit, with the threshold that half of ``images`` reach, then the original model's."""
    first, final = instance.exits[0], net.exits[-1]
    if first.exit == final:
        raise SystemExit(f"the instance {instance.name} has no early exit: name another with --instance")
    pixel_threshold = first.pixel_threshold or 0.9
    probe = replace(first, pixel_threshold=pixel_threshold, image_threshold=None)
    session = Session(net, Instance(name="probe", setting="budgeted", exits=(probe,), policy=instance.policy))
    shares = [session.predict([image])[0].image_confidence for image in tqdm(images, desc="thresholds", mininterval=5)]
    last = ExitChoice(exit_index=final.exit_index, head=final.head)
    early = replace(first, pixel_threshold=pixel_threshold, image_threshold=float(np.median(shares)))
    return replace(instance, name="half", setting="input_dependent", exits=(early, last))


class Lap(NamedTuple):
    """One batch through a session: the median of the rounds."""

    results: list[Result]
    ms: float
    """As sessions count it, from the normalised images to the last labels."""
    cpu_ms: float
    """Of all the processor's threads, normalising included: other work on the machine hardly changes it."""


def in_turn(pair: Sequence[Session], images: Sequence[np.ndarray], batch: int, rounds: int) -> list[list[Lap]]:
    """Per session, per batch. The sessions take turns of some images, each turn and round beginning with another one,
    so that all meet the same machine. A turn begins with a batch that is not timed: what the other session has left in
    the caches is not what a deployed one finds there."""
    batches = [list(images[i : i + batch]) for i in range(0, len(images), batch)]
    results: list[list[list[Result]]] = [[[] for _ in batches] for _ in pair]
    laps: list[list[list[tuple[float, float]]]] = [[[] for _ in batches] for _ in pair]
    for session in pair:
        for warm in batches[:WARM_UP]:
            session.predict(warm, batch_size=batch)
    turns = np.array_split(np.arange(len(batches)), min(len(batches), -(-len(images) // PER_TURN)))
    for round in range(rounds):
        for t, members in enumerate(turns):
            for k in range(len(pair)):
                s = (t + k + round) % len(pair)
                pair[s].predict(batches[members[0]], batch_size=batch)
                for b in members:
                    start = time.process_time()
                    found = pair[s].predict(batches[b], batch_size=batch)
                    cpu_ms = (time.process_time() - start) * 1000
                    laps[s][b].append((max(result.latency_ms for result in found), cpu_ms))
                    # Of a batch's logits each result would keep all.
                    results[s][b] = [replace(result, logits=np.empty(0, np.float32)) for result in found]
    return [
        [Lap(found, *map(float, np.median(times, 0))) for found, times in zip(*rows, strict=True)]
        for rows in zip(results, laps, strict=True)
    ]


def policy_ms(session: Session, image: np.ndarray, repeats: int) -> dict[int, float]:
    """Median time of one decision at each exit that decides: with it less without it, in turn."""
    runner, found = session.runner, {}
    for position, choice in enumerate(session.instance.exits[:-1]):
        if choice.image_threshold is None:
            continue
        live: Any = runner.start(image[None])
        for before in session.instance.exits[:position]:
            live = runner.advance(live, before.exit, logits=False).live
        laps: dict[bool, list[float]] = {True: [], False: []}
        values = live.values
        for _ in range(repeats + 1):
            for decide in (True, False):
                start = time.perf_counter()
                threshold = choice.pixel_threshold if decide else None
                runner.advance(replace(live, values=values), choice.exit, pixel_threshold=threshold)
                laps[decide].append((time.perf_counter() - start) * 1000)
        found[choice.exit_index] = max(0.0, float(np.median(laps[True][1:]) - np.median(laps[False][1:])))
    return found


def measure(
    runtime: str,
    pair: Sequence[Session],
    images: Sequence[np.ndarray],
    batch: int,
    costs: CostTable,
    expected: Sequence[Result],
    where: str,
    rounds: int,
) -> list[Figure]:
    """Original model and instance over the images."""
    instance = pair[1].instance
    original, ours = in_turn(pair, images, batch, rounds)
    results = [result for lap in ours for result in lap.results]
    per_image = [sum(lap.ms for lap in taken) / len(images) for taken in (original, ours)]
    cpu = [sum(lap.cpu_ms for lap in taken) / len(images) for taken in (original, ours)]
    macs = dict(
        zip(
            [choice.exit_index for choice in instance.exits],
            costs.column("macs", [choice.exit for choice in instance.exits]).leaving(),
            strict=True,
        )
    )
    workload = costs.total_macs() / np.mean([macs[result.exit_index] for result in results])
    latency = per_image[0] / per_image[1]
    figures = [
        Figure(f"{where}_original_ms", per_image[0], "ms"),
        Figure(f"{where}_instance_ms", per_image[1], "ms"),
    ]
    for choice in instance.exits:
        left = [result for result in results if result.exit_index == choice.exit_index]
        figures.append(Figure(f"{where}_exit{choice.exit_index}_share", len(left) / len(results), "share"))
        if left and batch == 1:
            figures.append(
                Figure(f"{where}_exit{choice.exit_index}_ms", float(np.median([r.latency_ms for r in left])), "ms")
            )
    figures += [
        Figure(f"{where}_workload_reduction", workload, "x"),
        Figure(f"{where}_latency_reduction", latency, "x"),
        Figure(f"{where}_latency_over_workload", latency / workload, "ratio", 0.9),
        Figure(f"{where}_original_cpu_ms", cpu[0], "ms"),
        Figure(f"{where}_instance_cpu_ms", cpu[1], "ms"),
        Figure(f"{where}_cpu_over_workload", cpu[0] / cpu[1] / workload, "ratio"),
    ]
    if batch == 1:
        each = policy_ms(pair[1], images[0], 10 * rounds)
        reached = {e: np.mean([result.exit_index >= e for result in results]) for e in each}
        deciding = sum(each[e] * reached[e] for e in each)
        figures.append(Figure(f"{where}_policy_share", deciding / per_image[1], "share", 0.03, at_least=False))
    exits = np.mean([one.exit_index == other.exit_index for one, other in zip(results, expected, strict=True)])
    pixels = np.mean([(one.labels == other.labels).mean() for one, other in zip(results, expected, strict=True)])
    exact = ":" not in runtime
    figures.append(Figure(f"{where}_equal_exits", float(exits), "share", 1.0 if exact else None))
    figures.append(Figure(f"{where}_equal_pixels", float(pixels), "share", 0.999 if exact else None))
    return figures


def by_torch(net: MultiExitNet, instance: Instance, images: Sequence[np.ndarray]) -> list[Result]:
    """What every runtime is compared with: torch, float32, image by image."""
    session = Session(net, instance)
    found = (session.predict([image])[0] for image in tqdm(images, desc="reference", mininterval=5))
    return [replace(result, logits=np.empty(0, np.float32)) for result in found]


def parts(runtime: str, session: Session, costs: CostTable, repeats: int) -> list[Figure]:
    """At what rate the parts of the instance run, at the run's own image size: why less work is not as much less time.
    A last stage's head counts with its segments; output and decisions have no multiply-accumulates."""
    table = measure_session(session, costs, LatencyOptions(threads=session.runner.threads, repeats=repeats))
    figures, begin = [], 0
    for position, choice in enumerate(session.instance.exits):
        segments, begin = table.segments[begin : choice.exit_index + 1], choice.exit_index + 1
        head, last = table.heads[choice.exit], position == len(session.instance.exits) - 1
        macs = [sum(part.macs for part in segments) + (head.macs if last else 0), head.macs]
        times = [sum(part.latency_ms or 0.0 for part in segments), head.latency_ms or 0.0]
        for name, work, ms in zip(("segments", "head"), macs, times, strict=True):
            if ms:
                figures.append(Figure(f"{runtime}_part_{name}{choice.exit_index}", work / ms / 1e6, "GMAC/s"))
                figures.append(Figure(f"{runtime}_part_{name}{choice.exit_index}_ms", ms, "ms"))
        output_ms = table.outputs[choice.exit_index].latency_ms or 0.0
        figures.append(Figure(f"{runtime}_part_output{choice.exit_index}_ms", output_ms, "ms"))
    return figures


def throughput(runtime: str, pair: Sequence[Session], images: Sequence[np.ndarray]) -> list[Figure]:
    """Images per second at batch 32 and 1, of the instance and the original model, in turn."""
    some = list(images[:64])
    laps: dict[tuple[int, int], float] = {}
    for s, session in enumerate(pair):
        for batch in (1, 32):
            session.predict(some[:batch], batch_size=batch)
            start = time.perf_counter()
            session.predict(some, batch_size=batch)
            laps[s, batch] = len(some) / (time.perf_counter() - start)
    return [
        Figure(f"{runtime}_instance_batch32", laps[1, 32], "images/s"),
        Figure(f"{runtime}_instance_batch32_over_batch1", laps[1, 32] / laps[1, 1], "x"),
        Figure(f"{runtime}_instance_over_original_batch32", laps[1, 32] / laps[0, 32], "x"),
    ]


def eight_bits(
    found: Opened,
    calibration: Sequence[np.ndarray],
    runtime: str,
    samples: Sequence[tuple[np.ndarray, np.ndarray]],
    options: argparse.Namespace,
) -> list[Figure]:
    """Original and instance, each in f32 and int8, and where it is installed NNCF's int8 original, in turn."""
    net, instance, size = found.net, found.instance, samples[0][0].shape[:2]
    final = ExitChoice(exit_index=net.num_exits - 1, head="final")
    original = Instance(name="original", setting="budgeted", exits=(final,), policy=instance.policy)
    images, threads = [image for image, _ in samples], options.threads
    named = {}
    for one in (original, instance):
        exits = tuple(choice.exit for choice in one.exits)
        graphs = make_graphs(net, exits, Policy.parse(one.policy), found.blueprint.input_size)
        for precision, made in (("f32", graphs), ("int8", quantise(graphs, calibration))):
            strides = [point.output_stride for point in net.exit_points]
            kind: dict[str, Any] = {"runtime": runtime, "precision": precision, "threads": threads}
            kind |= {"size_multiple": size_multiple(net), "policy": Policy.parse(one.policy)}
            name = "original" if one is original else "instance"
            named[f"{name}_{precision}"] = Session(GraphRunner(made, one.exits, strides, **kind), one)
            if one is original and precision == "f32" and runtime == "openvino" and find_spec("nncf"):
                peer = GraphRunner(made, one.exits, strides, **kind)
                quantise_by_nncf(peer, calibration)
                named["original_nncf"] = Session(peer, one)
    laps = dict(zip(named, in_turn(list(named.values()), images, 1, options.rounds), strict=True))
    ms = {name: sum(lap.ms for lap in taken) / len(images) for name, taken in laps.items()}
    cpu = {name: sum(lap.cpu_ms for lap in taken) / len(images) for name, taken in laps.items()}
    results = {name: [result for lap in taken for result in lap.results] for name, taken in laps.items()}
    where, K = f"{runtime}_{size[0]}x{size[1]}", len(found.blueprint.class_names)
    miou = {
        name: mean_iou(*np.sum([pixel_counts(r.labels, m, K) for r, (_, m) in zip(rows, samples, strict=True)], 0))
        for name, rows in results.items()
    }
    column = found.costs.column("macs", [choice.exit for choice in instance.exits])
    macs = dict(zip([choice.exit_index for choice in instance.exits], column.leaving(), strict=True))
    work = {
        p: found.costs.total_macs() / np.mean([macs[r.exit_index] for r in results[f"instance_{p}"]])
        for p in ("f32", "int8")
    }
    figures = [Figure(f"{where}_{name}_ms", value, "ms") for name, value in ms.items()]
    figures += [Figure(f"{where}_{name}_cpu_ms", value, "ms") for name, value in cpu.items()]
    # What a bundle leaves out of the original has random weights: its mIoU says nothing.
    whole = not is_bundle(options.run)
    figures += [
        Figure(f"{where}_{name}_miou", 100 * value, "%") for name, value in miou.items() if whole or "instance" in name
    ]
    figures += [
        Figure(f"{where}_instance_int8_over_f32", ms["instance_f32"] / ms["instance_int8"], "x", 1.6),
        Figure(
            f"{where}_instance_int8_loss",
            100 * (miou["instance_f32"] - miou["instance_int8"]),
            "pp",
            0.3,
            at_least=False,
        ),
        Figure(f"{where}_instance_int8_over_original_f32", ms["original_f32"] / ms["instance_int8"], "x", 3.5),
        Figure(f"{where}_original_int8_over_f32", ms["original_f32"] / ms["original_int8"], "x"),
    ]
    if whole:
        loss = 100 * (miou["original_f32"] - miou["instance_int8"])
        figures.append(Figure(f"{where}_loss_to_original_f32", loss, "pp", 1.0, at_least=False))
    for precision in ("f32", "int8"):
        gain = ms[f"original_{precision}"] / ms[f"instance_{precision}"]
        cpu_gain = cpu[f"original_{precision}"] / cpu[f"instance_{precision}"]
        goal = 0.9 if precision == "int8" else None
        figures += [
            Figure(f"{where}_{precision}_workload_reduction", work[precision], "x"),
            Figure(f"{where}_{precision}_latency_reduction", gain, "x"),
            Figure(f"{where}_{precision}_latency_over_workload", gain / work[precision], "ratio", goal),
            Figure(f"{where}_{precision}_cpu_over_workload", cpu_gain / work[precision], "ratio"),
        ]
        deciding = policy_ms(named[f"instance_{precision}"], images[0], 10 * options.rounds)
        reached = {e: np.mean([r.exit_index >= e for r in results[f"instance_{precision}"]]) for e in deciding}
        share = sum(deciding[e] * reached[e] for e in deciding) / ms[f"instance_{precision}"]
        figures.append(Figure(f"{where}_{precision}_policy_share", share, "share", 0.03, at_least=False))
    if "original_nncf" in ms:
        figures.append(Figure(f"{where}_instance_int8_over_nncf", ms["original_nncf"] / ms["instance_int8"], "x"))
    same = [
        a.exit_index == b.exit_index for a, b in zip(results["instance_f32"], results["instance_int8"], strict=True)
    ]
    return [*figures, Figure(f"{where}_instance_equal_exits", float(np.mean(same)), "share")]


def quantise_by_nncf(runner: GraphRunner, calibration: Sequence[np.ndarray]) -> None:
    """Puts NNCF's int8 in the place of the one graph of a runner in OpenVINO, calibrated on the same images."""
    import nncf

    graph: Any = runner._stages[0]
    feeds = [{"live0": normalise(image[None]), "pixel_threshold": np.array([0.5], np.float32)} for image in calibration]
    policy = nncf.IgnoredScope(patterns=["policy/.*"], validate=False)
    graph._model = nncf.quantize(graph._model, nncf.Dataset(feeds), subset_size=len(feeds), ignored_scope=policy)
    graph._requests.clear()
    runner._stages[0].prepare(["logits"])


class Opened(NamedTuple):
    blueprint: Blueprint
    net: MultiExitNet
    """Whole, with the heads of the instance."""
    instance: Instance
    costs: CostTable
    val: SegmentationDataset
    run: Run


def opened(options: argparse.Namespace) -> Opened:
    if not is_bundle(options.run):
        run = open_run(options.run)
        return Opened(*restore_run(options.run, options.instance), run.costs(), run.dataset("val"), run)
    if options.recipe is None:
        raise SystemExit("a bundle has no images: name the recipe that has, --recipe RECIPE --data-root FOLDER")
    blueprint, part, instance = restore_bundle(open_bundle(options.run), options.instance)
    net, own = blueprint.build(tuple(choice.exit for choice in instance.exits)), part.tensors()
    for name, place in net.tensors().items():
        if name in own:
            place.copy_(own[name])
    root = () if options.data_root is None else ("--data.root", str(options.data_root))
    costs = profile(net, input_size=blueprint.input_size)
    with TemporaryDirectory() as folder:
        run = open_run(options.recipe, root, out=Path(folder, "run"))
        return Opened(blueprint, net, instance, costs, run.dataset("val"), run)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run, or a bundle")
    parser.add_argument("--recipe", type=Path, help="of a bundle: whose validation images are used")
    parser.add_argument("--data-root", type=Path, help="of that recipe")
    parser.add_argument("--instance", help="of the run; by default the cheapest within 1 pp")
    parser.add_argument(
        "--half", action="store_true", help="thresholds that half of the images reach at its first exit"
    )
    parser.add_argument("--sizes", nargs="+", default=["360x480", "512x512"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument(
        "--runtimes", nargs="+", choices=RUNTIMES, default=[r for r in RUNTIMES if r != "torch-compiled"]
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, help="of the validation images, at most")
    parser.add_argument("--rounds", type=int, default=3, help="over the images; the median counts")
    parser.add_argument("--quick", action="store_true", help="12 images, one round, the first size, batch 1")
    parser.add_argument("--int8", action="store_true", help="original and instance in f32 and int8 instead")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    load_compiled()  # as a session that has been warmed up decides
    cv2.setNumThreads(1)
    if options.quick:
        options.sizes, options.batches, options.rounds = options.sizes[:1], [1], 1
        options.images = options.images or 12
    found_here = opened(options)
    blueprint, net, instance, costs, val, run = found_here
    raw = [val[v].image for v in range(min(len(val), options.images or len(val)))]
    if options.half:
        height, width = (int(side) for side in options.sizes[0].split("x"))
        instance = halved(net, instance, [cv2.resize(image, (width, height)) for image in raw])
    final = ExitChoice(exit_index=net.num_exits - 1, head="final")
    original = Instance(name="original", setting="budgeted", exits=(final,), policy=instance.policy)
    graphs = Graphs(net, blueprint.input_size)
    device = device_name(torch.device("cpu"))
    print(f"{device}, {options.threads} threads; {blueprint.model}, {instance.name}, {len(raw)} images")
    figures: list[Figure] = []
    if options.int8:
        sizes = [(int(width), int(height)) for height, width in (size.split("x") for size in options.sizes)]
        for runtime in [name for name in options.runtimes if name in ("onnxruntime", "openvino")]:
            for size in sizes:
                calibration = [cv2.resize(image, size) for image in run.calibration()]
                masks = [cv2.resize(val[v].mask, size, interpolation=cv2.INTER_NEAREST) for v in range(len(raw))]
                samples = [(cv2.resize(image, size), mask) for image, mask in zip(raw, masks, strict=True)]
                found = eight_bits(found_here, calibration, runtime, samples, options)
                figures += found
                show(found)
        options.runtimes = []
    reference: dict[str, list[Result]] = {}
    for runtime in sorted(options.runtimes, key=lambda name: name.startswith("torch")):
        pair = sessions(net, graphs, [original, instance], runtime, options.threads)
        for size in options.sizes:
            height, width = (int(side) for side in size.split("x"))
            images = [cv2.resize(image, (width, height)) for image in raw]
            if size not in reference:
                reference[size] = by_torch(net, instance, images)
            for batch in options.batches:
                where = f"{runtime}_{size}_b{batch}"
                found = measure(runtime, pair, images, batch, costs, reference[size], where, options.rounds)
                figures += found
                show(found)
        if not options.quick:
            found = parts(runtime, pair[1], costs, 10 * options.rounds)
            found += throughput(runtime, pair, [cv2.resize(image, (480, 360)) for image in raw])
            figures += found
            show(found)
    print()
    show(figures)
    if options.json:
        write(options.json, options, instance, figures)


def show(figures: Sequence[Figure]) -> None:
    for figure in figures:
        goal = "-" if figure.goal is None else f"{figure.goal:g}"
        print(f"{figure.name} {figure.value:.6g} {figure.unit} {goal} {'ok' if figure.ok else 'short'}", flush=True)


def write(path: Path, options: argparse.Namespace, instance: Instance, figures: Sequence[Figure]) -> None:
    record: Mapping[str, Any] = {
        "device": device_name(torch.device("cpu")),
        "threads": options.threads,
        "run": str(options.run),
        "instance": json.loads(instance.to_json()),
        "figures": [{**figure._asdict(), "value": float(figure.value), "ok": figure.ok} for figure in figures],
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
