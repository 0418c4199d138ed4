"""ONNX files as a stranger may write them, by the package onnx; what is refused is refused before a runtime sees it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxsim
import openvino
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from helpers.images import smooth_image
from helpers.light import REPOSITORY
from helpers.peoples_models import MODELS
from messnet.deployment.bundle import open_bundle
from messnet.deployment.graph_file import expect_self_contained, leading_to
from messnet.deployment.graph_runner import GraphRunner, load_graph
from messnet.deployment.graphs import make_graphs
from messnet.deployment.restoring import graph_runner
from messnet.deployment.session import Session
from messnet.errors import RunError
from messnet.images.preprocessing import normalise
from messnet.network.head_space import HeadConfig
from messnet.network.multi_exit import MultiExitNet, convert
from messnet.network.zoo import mobilenetv2_fcn
from messnet.policy.graph import output_graph
from messnet.policy.policy import Policy
from messnet.records.instance import ExitChoice, Instance

BUNDLE = REPOSITORY / "examples/scenes_mobilenetv2.mess"
STAGES = ["stage0", "stage1", "stage2"]


def stage(name: str = "stage0") -> onnx.ModelProto:
    return onnx.load_from_string((BUNDLE / f"onnx/{name}.onnx").read_bytes())


def weights_of(model: onnx.ModelProto) -> TensorProto:
    return max(model.graph.initializer, key=lambda one: len(one.raw_data))


@pytest.mark.parametrize("name", [*STAGES, "output"])
def test_ports_are_those_that_the_package_reads(name: str) -> None:
    model, ports = stage(name), expect_self_contained((BUNDLE / f"onnx/{name}.onnx").read_bytes(), name)
    assert ports.inputs == tuple(one.name for one in model.graph.input)
    assert ports.outputs == tuple(one.name for one in model.graph.output)


def external(model: onnx.ModelProto, location: str) -> None:
    tensor = weights_of(model)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location


def external_constant(model: onnx.ModelProto) -> None:
    tensor = numpy_helper.from_array(np.zeros(3, np.float32), "hidden")
    tensor.data_location = TensorProto.EXTERNAL
    model.graph.node.insert(0, helper.make_node("Constant", [], ["hidden"], value=tensor))


def external_in_a_branch(model: onnx.ModelProto) -> None:
    tensor = numpy_helper.from_array(np.zeros(3, np.float32), "hidden")
    tensor.external_data.add().key = "location"
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [3])
    branch = helper.make_graph(
        [helper.make_node("Identity", ["hidden"], ["out"])], "b", [], [out], initializer=[tensor]
    )
    model.graph.node.insert(0, helper.make_node("If", ["c"], ["o"], then_branch=branch, else_branch=branch))


def sparse(model: onnx.ModelProto) -> None:
    values = numpy_helper.from_array(np.zeros(3, np.float32), "hidden")
    values.data_location = TensorProto.EXTERNAL
    places = numpy_helper.from_array(np.arange(3), "places")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [9]))


def not_finite(model: onnx.ModelProto) -> None:
    tensor = weights_of(model)
    values = numpy_helper.to_array(tensor).copy()
    values.flat[7] = np.nan
    tensor.raw_data = values.tobytes()


def infinite(model: onnx.ModelProto) -> None:
    tensor = weights_of(model)
    tensor.raw_data = np.full(tensor.dims, np.inf, np.float32).tobytes()


def foreign(model: onnx.ModelProto) -> None:
    model.graph.node.insert(0, helper.make_node("Load", ["live0"], ["x"], domain="com.example"))


def foreign_set(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def function(model: onnx.ModelProto) -> None:
    model.functions.append(helper.make_function("", "F", [], [], [], [helper.make_opsetid("", 20)]))


HOSTILE: list[tuple[Callable[[onnx.ModelProto], None], str]] = [
    (lambda model: external(model, "../../secret.bin"), "data lie outside of it"),
    (lambda model: external(model, "*/_ORT_MEM_ADDR_/*"), "data lie outside of it"),
    (external_constant, "data lie outside of it"),
    (external_in_a_branch, "data lie outside of it"),
    (sparse, "data lie outside of it"),
    (not_finite, "NaN or infinite weights"),
    (infinite, "NaN or infinite weights"),
    (foreign, "operators of 'com.example'"),
    (foreign_set, "operators of 'com.microsoft'"),
    (function, "defines no functions"),
    (lambda model: model.ClearField("graph"), "holds none"),
]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(("change", "words"), HOSTILE)
def test_what_no_bundle_holds_is_refused(change: Callable[[onnx.ModelProto], None], words: str, runtime: str) -> None:
    model = stage()
    change(model)
    with pytest.raises(RunError, match=words):
        load_graph(model.SerializeToString(), runtime, "f32", 1)


def test_an_infinite_constant_is_none_of_the_weights() -> None:
    model = stage()
    model.graph.initializer.append(numpy_helper.from_array(np.array(-np.inf, np.float32), "mask"))
    assert expect_self_contained(model.SerializeToString(), "it").inputs == ("live0", "pixel_threshold")


def test_half_a_file_and_noise_are_refused() -> None:
    data = (BUNDLE / "onnx/stage0.onnx").read_bytes()
    for wrong in (b"", data[:-1], data[: len(data) // 2], b"\xff" * 100, b"PK\3\4" + data, b"\x0b\x0c"):
        with pytest.raises(RunError, match="is no ONNX graph"):
            expect_self_contained(wrong, "it")


def test_no_noise_ends_in_anything_but_an_answer() -> None:
    draw = np.random.default_rng(0)
    data = np.frombuffer((BUNDLE / "onnx/output.onnx").read_bytes(), np.uint8)
    for _ in range(2000):
        noisy = data.copy()
        noisy[draw.integers(0, len(data), 4)] = draw.integers(0, 256, 4, dtype=np.uint8)
        with contextlib.suppress(RunError):
            expect_self_contained(noisy.tobytes(), "it")


@pytest.mark.parametrize(
    ("takes", "gives"),
    [
        (["live0", "pixel_threshold", "more"], ["next0", "logits", "confidence"]),
        (["live0", "pixel_threshold"], ["logits"]),
        (["live0", "pixel_threshold"], ["next1", "logits", "confidence"]),
        (["image", "pixel_threshold"], ["next0", "logits", "confidence"]),
    ],
)
def test_stages_with_other_ports_are_refused(takes: list[str], gives: list[str]) -> None:
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in (*takes, *gives)}
    nodes = [helper.make_node("Identity", [takes[0]], [name]) for name in gives]
    graph = helper.make_graph(nodes, "odd", [values[name] for name in takes], [values[name] for name in gives])
    data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    choice = ExitChoice(exit_index=0, head="final")
    with pytest.raises(RunError, match="stage0 is refused: it takes"):
        GraphRunner({"stage0": data}, [choice], [8], runtime="onnxruntime", threads=1)


@pytest.mark.parametrize("name", STAGES[:2])
@pytest.mark.parametrize("wanted", [["next0"], ["next0", "logits"]])
def test_a_part_is_a_whole_file_of_less(name: str, wanted: list[str]) -> None:
    data = (BUNDLE / f"onnx/{name}.onnx").read_bytes()
    part = onnx.load_from_string(leading_to(data, wanted))
    onnx.checker.check_model(part, full_check=True)
    assert [one.name for one in part.graph.output] == wanted
    made = {output for node in part.graph.node for output in node.output}
    held = {one.name for one in (*part.graph.initializer, *part.graph.input)}
    assert {one for node in part.graph.node for one in node.input if one} <= made | held
    assert "pixel_threshold" not in held
    kinds = {node.op_type for node in part.graph.node}
    assert "AveragePool" not in kinds  # which the decision has
    assert len(part.graph.node) < len(stage(name).graph.node)


def test_a_message_may_come_in_two_pieces() -> None:
    """Protobuf joins the pieces of one field; so must whoever looks at it before the runtime does."""
    model = stage()
    split, rest = onnx.ModelProto(), onnx.ModelProto()
    split.CopyFrom(model)
    rest.graph.initializer.append(weights_of(model))
    external(rest, "elsewhere")
    with pytest.raises(RunError, match="data lie outside"):
        expect_self_contained(split.SerializeToString() + rest.SerializeToString(), "it")
    joined = split.SerializeToString() + onnx.ModelProto(graph=onnx.GraphProto(name="x")).SerializeToString()
    part = onnx.load_from_string(leading_to(joined, ["next0"]))
    assert part.graph.name == "x"
    assert len(part.graph.node) > 10


@pytest.fixture(scope="module")
def net() -> MultiExitNet:
    """Small, as an export takes long for every layer."""
    torch.manual_seed(0)
    net = convert(mobilenetv2_fcn(5, width=0.25, depth=0.01), torch.zeros(1, 3, 64, 80), num_exits=2)
    net.add_head(0, HeadConfig())
    return net.eval()


class _Readings(CalibrationDataReader):
    def __init__(self) -> None:
        image = normalise(smooth_image(64, 80)[None])
        self._left = [{"live0": image, "pixel_threshold": np.array([0.5], np.float32)}]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self._left.pop() if self._left else None


def test_exported_graphs_are_what_others_tools_take(net: MultiExitNet, tmp_path: Path) -> None:
    """The full check of the package onnx, and ONNX Runtime's own quantiser, which refused two operator sets."""
    exits = (net.exits[0], net.exits[-1])
    for name, data in make_graphs(net, exits, Policy(), (64, 80)).items():
        model = onnx.load_from_string(data)
        onnx.checker.check_model(model, full_check=True)
        assert [(one.domain, one.version) for one in model.opset_import] == [("", 20)]
        assert expect_self_contained(data, name).outputs
        if name == "stage0":
            (tmp_path / "stage0.onnx").write_bytes(data)
    quant_pre_process(tmp_path / "stage0.onnx", tmp_path / "ready.onnx", skip_symbolic_shape=True)
    quantize_static(tmp_path / "ready.onnx", tmp_path / "int8.onnx", _Readings())
    assert (tmp_path / "int8.onnx").stat().st_size > 1000


def test_graphs_of_a_half_precision_network_compute_in_float32() -> None:
    torch.manual_seed(0)
    half = convert(MODELS["half"](2), torch.zeros(1, 3, 32, 48).half(), num_exits=2)
    instance = Instance(name="final", setting="budgeted", exits=(ExitChoice(exit_index=1, head="final"),))
    image = smooth_image(32, 48)
    session = Session(graph_runner(half, instance, (32, 48)), instance)
    logits = session.predict([image])[0].logits
    assert next(half.parameters()).dtype == torch.float16
    with torch.no_grad():
        expected = half.float().eval()(torch.from_numpy(normalise(image[None])))
    upsampled = F.interpolate(torch.from_numpy(logits), (32, 48), mode="bilinear")
    torch.testing.assert_close(upsampled, expected, rtol=1e-4, atol=1e-4)


def test_the_examples_hold_what_a_bundle_may() -> None:
    bundle = open_bundle(BUNDLE)
    for name, file in bundle.manifest.runtimes["onnx"].files.items():
        assert expect_self_contained(bundle.read(file), name)
    assert expect_self_contained(output_graph(), "output").inputs == ("logits", "size")


def test_graphs_of_a_fixed_shape(net: MultiExitNet, tmp_path: Path) -> None:
    """For one image of one size: every shape is a number, the labels are those of the free graphs, tools take them."""
    exits = (net.exits[-1],)
    free, fixed = (make_graphs(net, exits, Policy(), (64, 80), static=static)["stage0"] for static in (False, True))
    model = onnx.load_from_string(fixed)
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    ports = {one.name: [side.dim_value for side in one.type.tensor_type.shape.dim] for one in inferred.graph.input}
    assert ports == {"live0": [1, 3, 64, 80], "pixel_threshold": [1]}
    simple, ok = onnxsim.simplify(model)
    assert ok
    assert len(simple.graph.node) <= len(model.graph.node)
    (tmp_path / "fixed.onnx").write_bytes(fixed)
    converted = openvino.convert_model(tmp_path / "fixed.onnx")
    assert converted.input("live0").shape == [1, 3, 64, 80]
    feeds = {"live0": normalise(smooth_image(64, 80)[None]), "pixel_threshold": np.array([0.5], np.float32)}
    found = [
        load_graph(data, "onnxruntime", "f32", 1).run(feeds, ["logits", "confidence"])
        for data in (free, fixed, simple.SerializeToString())
    ]
    for one in found[1:]:
        np.testing.assert_allclose(one[0], found[0][0], atol=1e-4)
        assert one[1] == pytest.approx(found[0][1], abs=0.01)
