"""The ONNX graphs of an instance: one for each of its exits, and one that turns logits into labels.

    stage i    live tensors of the cut before (the normalised images at first), pixel_threshold (1,)
               -> next live tensors, logits (N, K, h, w), confidence (N,): c_img at that pixel threshold
    output     logits, size (2,) -> labels (N, H, W) uint8: bilinear upsampling and argmax, as every exit ends

A stage holds the segments since the exit before, the head and the exit policy; a host that asks for some of the outputs
only has the rest left out by its runtime. Batch, height and width are free. Segments and heads come from
``torch.onnx.export``, policy and output from ``messnet.policy.graph``.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from messnet.costs.workload import copy_module
from messnet.deployment.graph_runner import OUTPUT, stage_name
from messnet.errors import ModelError, needing_extras
from messnet.network.backbone import Chain
from messnet.network.multi_exit import MultiExitNet
from messnet.network.zoo import other_precision
from messnet.policy.graph import IR_VERSION, OPSET, output_graph, policy_graph, serialised
from messnet.policy.policy import Policy
from messnet.records.instance import FINAL_HEAD, Exit
from messnet.records.names import LabelSize

_Activation = nn.Hardtanh | nn.ReLU | nn.LeakyReLU | nn.SiLU | nn.Hardswish
_BLOCK = 16  # channels, of processors with AVX-512; a multiple of what others have


MadeStages = dict[tuple[int, Exit, bool], bytes]
"""Graphs by the segment that they begin with, their exit, and whether it is the last one."""


def make_graphs(
    net: MultiExitNet,
    exits: Sequence[Exit],
    policy: Policy,
    input_size: tuple[int, int],
    *,
    static: bool = False,
    made: MadeStages | None = None,
    labels: LabelSize = "input",
) -> dict[str, bytes]:
    """The graphs by name, "stage0" ... and "output", of ``exits``, shallow to deep, of a network on the CPU. They
    compute in float32, as a copy of ``net`` does that is in another precision.

    ``input_size`` is that of the example which is traced; ``static`` graphs take one image of that size and no other,
    as some compilers for devices want it; ``labels`` at the size of the "logits" are their argmax alone. A stage
    takes seconds: those that ``made`` holds, of the same network, policy
    and size, are taken from there, and the others are added to it. Raises ModelError for a network that has no graphs
    of its own, a policy that cannot be a graph, or without the packages that write graphs.
    """
    onnx, compose = _packages()
    if not isinstance(net.backbone, Chain):
        raise ModelError(f"the network cannot be written as ONNX graphs: {'; '.join(net.notes)}")
    if other_precision(net):
        net = copy_module(net, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)
    # Two images, for the exporter takes a length of 1 for a constant.
    live: tuple[Any, ...] = (torch.zeros(1 if static else 2, 3, *input_size),)
    decide = onnx.load_from_string(policy_graph(policy, net.num_classes))
    graphs, start = {}, 0
    for position, exit in enumerate(exits):
        # Instances share stages: what a stage holds depends on where it begins, its exit, and whether any follows.
        key = (start, exit, position == len(exits) - 1)
        stage = _Stage(net, start, exit, last=key[2]).eval()
        with torch.no_grad():
            following = stage(*live)[:-1]
        given, live, start = live, following, exit.exit_index + 1
        if made is not None and key in made:
            graphs[stage_name(position)] = made[key]
            continue
        _expect_tensors(following, exit)
        try:
            part = _exported(stage, given, len(following), static)
        except Exception as error:
            root: BaseException = error  # the exporter wraps what happened in advice to its developers
            while root.__cause__ is not None:
                root = root.__cause__
            reason = (str(root).strip() or "no reason given").splitlines()[0].partition(". Failure message")[0]
            raise ModelError(
                f"exit {exit.exit_index} cannot be written as an ONNX graph "
                f"({type(root).__name__}: {reason}); its weights run with torch"
            ) from error
        _widen_thin_maps(part.graph)
        keep = [output.name for output in part.graph.output]
        whole = compose.merge_models(
            compose.add_prefix(part, "net/", rename_inputs=False, rename_outputs=False),
            compose.add_prefix(decide, "policy/", rename_inputs=False, rename_outputs=False),
            io_map=[("logits", "logits")],
            outputs=[*keep, "confidence"],
        )
        del whole.opset_import[1:]  # both parts' set, which is the same: twice, the checker and quantisers refuse it
        graphs[stage_name(position)] = serialised(whole)
        if made is not None:
            made[key] = graphs[stage_name(position)]
    return {**graphs, OUTPUT: output_graph(labels)}


class _Stage(nn.Module):
    """The segments ``start`` to that of an exit, and its head: live tensors -> (live tensors, logits); of the ``last``
    stage the logits only."""

    def __init__(self, net: MultiExitNet, start: int, exit: Exit, *, last: bool) -> None:
        super().__init__()
        assert isinstance(net.backbone, Chain)
        self.segments = nn.ModuleList(net.backbone.segments[start : exit.exit_index + 1])
        self.head, self.last = net.head(exit), last
        self.takes_all = exit.head == FINAL_HEAD

    def forward(self, *live: Tensor) -> tuple[Tensor, ...]:
        for segment in self.segments:
            live = segment(*live)
        logits = self.head(*live) if self.takes_all else self.head(live[0])
        return (logits,) if self.last else (*live, logits)


def _exported(stage: _Stage, live: tuple[Tensor, ...], num_next: int, static: bool) -> Any:
    free = torch.export.Dim.AUTO
    # What is (N, C, h, w) may have any size; of (N, L, C) the length is free.
    shapes = tuple({0: free, 2: free, 3: free} if one.dim() == 4 else {0: free, 1: free} for one in live)
    with _quiet(), _out_of_place(stage), torch.no_grad():
        program = torch.onnx.export(
            stage,
            live,
            dynamo=True,
            dynamic_shapes=None if static else (shapes,),
            opset_version=OPSET,
            input_names=[f"live{k}" for k in range(len(live))],
            output_names=[*(f"next{k}" for k in range(num_next)), "logits"],
            custom_translation_table=_translations(),
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    model.ir_version = IR_VERSION
    return model


@contextlib.contextmanager
def _out_of_place(stage: nn.Module) -> Iterator[None]:
    """Within, activations do not overwrite what a normalisation has made for them alone. The graph is the same, but
    torch's exporter takes a third of its time for operators in place."""
    calls: defaultdict[_Activation, list[bool]] = defaultdict(list)
    for part in stage.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            module = part.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(module, _Activation) and module.inplace:
                (source,) = node.all_input_nodes
                made = source.op == "call_module" and isinstance(part.get_submodule(str(source.target)), _BatchNorm)
                calls[module].append(made and len(source.users) == 1)
    changed = [module for module, alone in calls.items() if all(alone)]
    try:
        for module in changed:
            module.inplace = False
        yield
    finally:
        for module in changed:
            module.inplace = True


def _translations() -> dict[Callable[..., object], Callable[..., object]]:
    """Operators that torch's exporter writes for the size of the example alone."""
    pool = torch.ops.aten
    return {pool.adaptive_avg_pool2d.default: _pool_to_cells, pool._adaptive_avg_pool2d.default: _pool_to_cells}


def _pool_to_cells(x: Any, output_size: Sequence[int]) -> Any:
    """Adaptive average pooling (PSPNet's) of maps of any size as a product with one matrix per axis: row k of a matrix
    (cells, length) averages from floor(k * length / cells) to ceil((k + 1) * length / cells)."""
    from onnxscript import opset20

    op: Any = opset20  # its types are those of the tensors in a running graph
    matrices = []
    for axis, cells in zip((2, 3), output_size, strict=True):
        length = op.Shape(x, start=axis, end=axis + 1)
        first = np.arange(cells, dtype=np.int64)[:, None]
        start = op.Div(op.Mul(op.Constant(value=_constant(first)), length), op.Constant(value_ints=[cells]))
        above = op.Constant(value_ints=[cells - 1])
        end = op.Add(op.Mul(op.Constant(value=_constant(first + 1)), length), above)
        end = op.Div(end, op.Constant(value_ints=[cells]))
        zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
        position = op.Range(zero, op.Squeeze(length, op.Constant(value_ints=[0])), one)
        inside = op.Cast(op.And(op.GreaterOrEqual(position, start), op.Less(position, end)), to=1)
        matrices.append(op.Div(inside, op.Cast(op.Sub(end, start), to=1)))
    rows, columns = matrices
    return op.MatMul(rows, op.MatMul(x, op.Transpose(columns, perm=[1, 0])))


def _constant(values: NDArray[np.int64]) -> Any:
    from onnx import numpy_helper

    return numpy_helper.from_array(values)


def _widen_thin_maps(graph: Any) -> None:
    """Gives maps between two convolutions zero channels up to ``_BLOCK``; what comes of them is the same.

    ONNX Runtime computes in blocks of so many channels, and takes 3 to 10 times as long for a map of fewer.
    """
    from onnx import numpy_helper

    weights = {one.name: one for one in graph.initializer}
    outputs = {output.name for output in graph.output}
    users: dict[str, list[Any]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            users[name].append(node)
    for node in graph.node:
        made, following = node.output[0], users[node.output[0]]
        between = all(_is_plain_convolution(one, weights) for one in (node, *following)) and following
        if not between or made in outputs or (channels := weights[node.input[1]].dims[0]) >= _BLOCK:
            continue
        widened = [(name, 0) for name in node.input[1:]] + [(one.input[1], 1) for one in following]
        # Weights that another layer reads too keep their shape.
        if any(len(users[name]) > 1 for name, _ in widened):
            continue
        for name, axis in widened:
            values = numpy_helper.to_array(weights[name])
            margins = [(0, _BLOCK - channels if k == axis else 0) for k in range(values.ndim)]
            weights[name].CopyFrom(numpy_helper.from_array(np.pad(values, margins), name))


def _is_plain_convolution(node: Any, weights: Mapping[str, Any]) -> bool:
    groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
    return node.op_type == "Conv" and groups == 1 and all(name in weights for name in node.input[1:])


def _expect_tensors(following: Sequence[Any], exit: Exit) -> None:
    for value in following:
        if not isinstance(value, Tensor):
            raise ModelError(
                f"at exit {exit.exit_index} the network keeps a {type(value).__name__} for later, which is no tensor "
                f"that an ONNX graph could pass on: run it with torch"
            )


def _packages() -> tuple[Any, Any]:
    with needing_extras():
        import onnx
        import onnxscript  # noqa: F401  torch's exporter needs it
        from onnx import compose
    return onnx, compose


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's advice to developers."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
