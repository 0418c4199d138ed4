"""Graphs in eight bits: what they compute, what they are checked for, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import compose, numpy_helper

from helpers.images import smooth_image
from helpers.light import REPOSITORY
from messnet.cli import main
from messnet.deployment.bundle import open_bundle
from messnet.deployment.graph_file import expect_self_contained, leading_to
from messnet.deployment.graph_runner import OUTPUT, GraphRunner, load_graph
from messnet.deployment.loading import load
from messnet.deployment.quantising import EightBits, check_quantised, quantise
from messnet.deployment.session import Session
from messnet.errors import ModelError, RecipeError, RunError
from messnet.images.preprocessing import normalise
from messnet.records.run_directory import RunDirectory

BUNDLE = open_bundle(REPOSITORY / "examples/scenes_mobilenetv2.mess")
IMAGES = [smooth_image(96, 128, seed=seed) for seed in range(6)]
THRESHOLD = np.array([0.9], np.float32)


@pytest.fixture(scope="module")
def graphs() -> dict[str, bytes]:
    """Those of an example, whose default operators are imported twice, as messnet a1570d3 wrote them."""
    found = {}
    for name, file in BUNDLE.manifest.runtimes["onnx"].files.items():
        model = onnx.load_from_string(BUNDLE.read(file))
        del model.opset_import[1:]
        found[name] = model.SerializeToString()
    return found


@pytest.fixture(scope="module")
def int8(graphs: dict[str, bytes]) -> dict[str, bytes]:
    return quantise(graphs, IMAGES[:4])


def session_of(graphs: dict[str, bytes], precision: Any) -> Session:
    manifest = BUNDLE.manifest
    strides = [point.output_stride for point in manifest.network.exit_points]
    runner = GraphRunner(
        graphs, manifest.instance.exits, strides, runtime="onnxruntime", precision=precision, threads=1
    )
    return Session(runner, manifest.instance, class_names=manifest.class_names)


def run_graph(data: bytes, runtime: str, image: NDArray[np.uint8], output: str) -> NDArray[np.float32]:
    return load_graph(data, runtime, "f32", 1).run(
        {"live0": normalise(image[None]), "pixel_threshold": THRESHOLD}, [output]
    )[0]


def test_what_is_in_eight_bits_and_what_is_not(graphs: dict[str, bytes], int8: dict[str, bytes]) -> None:
    assert int8.keys() == graphs.keys()
    assert int8[OUTPUT] == graphs[OUTPUT]
    assert sum(map(len, int8.values())) < 0.5 * sum(map(len, graphs.values()))
    for name in ("stage0", "stage1", "stage2"):
        assert expect_self_contained(int8[name], name) == expect_self_contained(graphs[name], name)
        model = onnx.load_from_string(int8[name])
        made_by = {output: node for node in model.graph.node for output in node.output}
        constants = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
        convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
        in_float = [k for k, node in enumerate(convolutions) if node.input[1] not in made_by]
        # The stem, which is a convolution and a depth-wise one, and what gives the logits.
        logits = next(k for k, node in enumerate(convolutions) if node.output[0] == "logits")
        assert in_float == ([0, 1, logits] if name == "stage0" else [logits])
        for k, node in enumerate(convolutions):
            if k not in in_float:
                values, scales = (constants[read] for read in made_by[node.input[1]].input[:2])
                assert values.dtype == np.int8
                assert scales.shape == values.shape[:1]  # one for each channel
        for node in model.graph.node:
            if node.op_type in ("GreaterOrEqual", "ArgMax", "ReduceMax", "AveragePool"):  # the policy's
                assert not any(made_by[read].op_type == "DequantizeLinear" for read in node.input if read in made_by)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_both_runtimes_compute_what_eight_bits_give(
    graphs: dict[str, bytes], int8: dict[str, bytes], runtime: str
) -> None:
    """One step of 1/255 of the range at each layer adds up to a few percent of it."""
    before, after = (run_graph(one["stage0"], runtime, IMAGES[5], "logits") for one in (graphs, int8))
    error = np.abs(before - after)
    assert 0 < error.mean() < 0.03 * np.ptp(before)
    assert (before.argmax(1) == after.argmax(1)).mean() > 0.95


def test_where_a_network_is_cut_changes_next_to_nothing(graphs: dict[str, bytes], int8: dict[str, bytes]) -> None:
    """Tables of all exits foretell what any instance does: both stages as one graph, quantised as a whole, give what
    they give one after the other, but for ties that the last digit of a range decides."""
    ports = expect_self_contained(graphs["stage0"], "stage0").outputs
    cut = [port for port in ports if port.startswith("next")]
    first = onnx.load_from_string(leading_to(graphs["stage0"], cut))
    first = compose.add_prefix(first, "net/", rename_inputs=False)
    second = compose.add_prefix(onnx.load_from_string(graphs["stage1"]), "net/b/", rename_outputs=False)
    pairs = [(f"net/{port}", f"net/b/live{k}") for k, port in enumerate(cut)]
    whole = compose.merge_models(first, second, io_map=pairs, outputs=["logits"])
    del whole.opset_import[1:]
    joined = quantise({"stage0": leading_to(whole.SerializeToString(), ["logits"]), OUTPUT: b""}, IMAGES[:4])["stage0"]
    stages = [load_graph(int8[name], "onnxruntime", "f32", 1) for name in ("stage0", "stage1")]
    for image in IMAGES[4:]:
        live = stages[0].run({"live0": normalise(image[None])}, cut)
        found = stages[1].run({f"live{k}": one for k, one in enumerate(live)}, ["logits"])[0]
        expected = run_graph(joined, "onnxruntime", image, "logits")
        assert (np.abs(found - expected) < 1e-3 * np.ptp(expected)).mean() > 0.9
        assert (found.argmax(1) == expected.argmax(1)).mean() > 0.995


def test_what_is_lost_is_counted(graphs: dict[str, bytes], int8: dict[str, bytes]) -> None:
    expected, session = session_of(graphs, "f32"), session_of(int8, "int8")
    last = f"exit{session.instance.exits[-1].exit_index}"
    # Where labels are those of the float network, its last exit has 100 %, and int8 loses what it lacks of that.
    truths, found_labels = ([[*one.anytime(image)][-1].labels for image in IMAGES] for one in (expected, session))
    bits = EightBits(calibration=(), samples=[*zip(IMAGES, truths, strict=True)], max_loss_pp=100)
    found = check_quantised(expected, session, bits)
    assert (found["labelled"], found["images"], found[f"miou_{last}_float"]) == (1, 6, 1)
    ious = []
    for k in range(len(BUNDLE.manifest.class_names)):
        both = [(truth == k, labels == k) for truth, labels in zip(truths, found_labels, strict=True)]
        union = sum((a | b).sum() for a, b in both)
        ious += [sum((a & b).sum() for a, b in both) / union] if union else []
    assert found[f"miou_{last}"] == pytest.approx(np.mean(ious))
    assert found["loss_pp"] >= 100 * (1 - found[f"miou_{last}"]) - 1e-9
    unlabelled = replace(bits, samples=[(image, None) for image in IMAGES])
    found = check_quantised(expected, session, unlabelled)
    assert found["loss_pp"] == pytest.approx(100 * (1 - found["equal_pixels"]))
    with pytest.raises(ModelError, match=r"^int8 loses .* pp \(share of pixels that changed, 6 images\), more than"):
        check_quantised(expected, session, replace(unlabelled, max_loss_pp=1e-9))


def test_no_images_to_calibrate_on(graphs: dict[str, bytes]) -> None:
    with pytest.raises(RecipeError, match="int8 needs images"):
        quantise(graphs, [])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--precision", "int8"], "torch has no precision 'int8'"),
        (["--runtime", "onnxruntime", "--precision", "int8"], "int8 needs images to calibrate on"),
        (["--static", "96", "128"], "--static is for graphs: leave it out, or add --runtime onnxruntime"),
    ],
)
def test_what_an_export_cannot_do(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(BUNDLE.path), "--out", "none.mess", *arguments])
    assert stopped.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert words in said[0]


def test_int8_where_there_is_none(tiny_run: Path) -> None:
    with pytest.raises(
        RunError, match=r"holds no graphs for onnxruntime in int8; .* --runtime onnxruntime --precision int8"
    ):
        load(BUNDLE.path, precision="int8")
    with pytest.raises(RunError, match="has no graphs in int8, which training images calibrate: make a bundle of"):
        load(tiny_run, runtime="openvino", precision="int8", instance="max-miou")
    found = replace(RunDirectory(tiny_run).read_instance("max-miou"), precision="int8")
    with pytest.raises(RunError, match="has no graphs in int8"):
        load(tiny_run, instance=found)  # its thresholds are those of another network
    assert load(tiny_run, instance=found, precision="f32").precision == "f32"
    with pytest.raises(RecipeError, match="torch has no precision 'int8'"):
        load(tiny_run, precision="int8", runtime="torch")
