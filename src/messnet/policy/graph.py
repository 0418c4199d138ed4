"""The exit policy, and labels from logits, as ONNX graphs of operators that every runtime has.

Written operator by operator, not exported: the graphs give the counts and the labels of ``reference`` and ``labels``,
and no exporter has to be installed to know what is in them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from messnet.errors import ModelError
from messnet.policy.policy import Policy
from messnet.records.names import LabelSize

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, ValueInfoProto

OPSET = 20
IR_VERSION = 10
# ONNX's numbers of dtypes, as in TensorProto: part of the format, so that onnx is imported only to build a graph.
_FLOAT, _UINT8, _INT64 = 1, 2, 7


def policy_graph(policy: Policy, num_classes: int) -> bytes:
    """logits (N, K, h, w), pixel_threshold (1,) -> confidence (N,) float32: ``image_confidence`` at one threshold.

    Raises ModelError for the "paper" form, whose Canny is no graph.
    """
    if policy.refinement == "paper":
        raise ModelError(
            f"the policy {policy.name} cannot be a graph, for its Canny edges are computed by OpenCV: search with a "
            f"policy such as {policy.confidence}+native, or run it with torch"
        )
    graph = _Graph()
    op = graph.op
    classes = graph.integers(1)
    largest = op("ReduceMax", "logits", classes, keepdims=1)
    shifted = op("Sub", "logits", largest)
    total = op("ReduceSum", op("Exp", shifted), classes, keepdims=1)
    if policy.confidence == "top1":
        confidence = op("Reciprocal", total)  # softmax of the largest logit, eq. (1)
    else:
        log_sum = op("Log", total)
        log_p = op("Sub", shifted, log_sum)
        negative_entropy = op("ReduceSum", op("Mul", op("Exp", log_p), log_p), classes, keepdims=1)
        relative = op("Div", negative_entropy, graph.number(math.log(num_classes)))
        confidence = op("Clip", op("Add", graph.number(1.0), relative), graph.scalar(0.0), graph.scalar(1.0))
    confident = graph.as_float(op("GreaterOrEqual", confidence, "pixel_threshold"))
    if policy.refinement == "native":
        labels = graph.as_float(op("ArgMax", "logits", axis=1, keepdims=1))
        near = [_near_edge(graph, labels, axis) for axis in (2, 3)]
        near_edge = op("Greater", op("Max", *near), graph.number(0.5))
        # More than half of 5 x 5 pixels, the border repeated: 13/25 or more. No rounding brings 12/25 to a half. By
        # columns, then rows: a third of the time of both at once.
        extended = op("Pad", confident, graph.integers(0, 0, 2, 2, 0, 0, 2, 2), mode="edge")
        share = op("AveragePool", op("AveragePool", extended, kernel_shape=[5, 1]), kernel_shape=[1, 5])
        majority = graph.as_float(op("Greater", share, graph.number(0.5)))
        confident = op("Where", near_edge, majority, confident)
    # Two whole numbers below 2^24: their float32 quotient is the float64 one, rounded.
    count = op("ReduceSum", confident, graph.integers(1, 2, 3), keepdims=0)
    pixels = op("ReduceProd", op("Shape", "logits", start=2), keepdims=0)
    op("Div", count, graph.as_float(pixels), output="confidence")
    inputs = [_value("logits", ["N", "K", "h", "w"]), _value("pixel_threshold", [1])]
    return graph.serialised("policy", inputs, [_value("confidence", ["N"])])


def output_graph(labels: LabelSize = "input") -> bytes:
    """logits (N, K, h, w), size (2,) int64 -> labels (N, H, W) uint8; at the size of the "logits", which then are the
    only input, (N, h, w).

    Bilinear upsampling is a product with one matrix per axis, the unit matrix upsampled along it: 4 times faster in
    ONNX Runtime than to resize all classes.
    """
    graph = _Graph()
    op = graph.op

    def matrix(axis: int) -> str:
        """(upsampled, length) of an axis."""
        length = op("Shape", "logits", start=axis, end=axis + 1)
        zeros = op("ConstantOfShape", op("Concat", length, length, axis=0))
        unit = op("Unsqueeze", op("EyeLike", zeros), graph.integers(0, 1))
        upsampled = op("Slice", "size", graph.integers(axis - 2), graph.integers(axis - 1))
        to = op("Concat", graph.integers(1, 1), upsampled, length, axis=0)
        resized = op("Resize", unit, "", "", to, mode="linear", coordinate_transformation_mode="half_pixel")
        return op("Squeeze", resized, graph.integers(0, 1))

    inputs, shape, scores = [_value("logits", ["N", "K", "h", "w"])], ["N", "h", "w"], "logits"
    if labels == "input":
        inputs, shape = [*inputs, _value("size", [2], _INT64)], ["N", "H", "W"]
        across = op("Transpose", matrix(3), perm=[1, 0])
        scores = op("MatMul", matrix(2), op("MatMul", "logits", across))
    op("Cast", op("ArgMax", scores, axis=1, keepdims=0), output="labels", to=_UINT8)
    return graph.serialised("output", inputs, [_value("labels", shape, _UINT8)])


def serialised(model: ModelProto) -> bytes:
    """A checked model as the bytes of its file, without what only its makers read."""
    import onnx

    del model.graph.value_info[:]  # shapes in between: a third of the file
    for node in model.graph.node:
        del node.metadata_props[:]  # where it stood in the source
        node.doc_string = ""
    data: bytes = model.SerializeToString()
    onnx.checker.check_model(data, full_check=True)
    return data


class _Graph:
    """Nodes in the order in which they are added; each is named after its operator and its place."""

    def __init__(self) -> None:
        self._nodes: list[NodeProto] = []

    def op(self, kind: str, *inputs: str, output: str = "", **attributes: object) -> str:
        """Adds an operator. Returns the name of its output."""
        from onnx import helper

        name = output or f"{kind}{len(self._nodes)}"
        node = helper.make_node(kind, inputs, [name], name=name)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in sorted(attributes.items()))
        self._nodes.append(node)
        return name

    def integers(self, *values: int) -> str:
        """A constant (n,) int64."""
        return self._constant(_INT64, [len(values)], values)

    def number(self, value: float) -> str:
        """A constant (1,) float32."""
        return self._constant(_FLOAT, [1], [value])

    def scalar(self, value: float) -> str:
        """A constant () float32."""
        return self._constant(_FLOAT, [], [value])

    def _constant(self, kind: int, shape: Sequence[int], values: Sequence[float]) -> str:
        from onnx import helper

        return self.op("Constant", value=helper.make_tensor("", kind, shape, values))

    def as_float(self, name: str) -> str:
        return self.op("Cast", name, to=_FLOAT)

    def serialised(self, name: str, inputs: Sequence[ValueInfoProto], outputs: Sequence[ValueInfoProto]) -> bytes:
        from onnx import helper

        graph = helper.make_graph(self._nodes, name, inputs, outputs)
        opset = [helper.make_opsetid("", OPSET)]
        return serialised(helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION))


def _near_edge(graph: _Graph, labels: str, axis: int) -> str:
    """Pixels within a 3 x 3 window of a pixel whose label changes along ``axis``, as 0 and 1: (N, 1, h, w).

    With the border repeated there are n + 1 steps between n pixels; a pixel is near those from the one before its
    own two to the one after.
    """
    op = graph.op
    before = [0] * 8
    before[axis] = before[axis + 4] = 1
    extended = op("Pad", labels, graph.integers(*before), mode="edge")
    upper = op("Slice", extended, graph.integers(1), graph.integers(2**31), graph.integers(axis))
    lower = op("Slice", extended, graph.integers(0), graph.integers(-1), graph.integers(axis))
    step = graph.as_float(op("Not", op("Equal", upper, lower)))
    kernel = [4, 3] if axis == 2 else [3, 4]
    return op("MaxPool", step, kernel_shape=kernel, pads=[1, 1, 1, 1])


def _value(name: str, shape: Sequence[str | int], kind: int = _FLOAT) -> ValueInfoProto:
    """The description of an input or output; ``kind`` is its dtype's number."""
    from onnx import helper

    return helper.make_tensor_value_info(name, kind, shape)
