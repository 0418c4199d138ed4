"""Workload: multiply-accumulates of anything that runs, counted without computing it.

Two conventions. "conv": matmul-like operators only (convolutions, linear layers, attention). "paper": plus 2 per
BatchNorm element and 1 per element that a global average pool reads, which is what the posters' "GFLOPs" turn out to
be (138.63 / 163.86 / 8.78 at 512x512, truncated to two decimals). All else (activations, max-pool, interpolation, bias,
the exit policy's comparisons) counts nothing in either.
"""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple, TypeVar

import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Workload", "count_module", "count_nodes", "output_shape"]

_Module = TypeVar("_Module", bound=nn.Module)


class Workload(NamedTuple):
    """Multiply-accumulates in both conventions."""

    macs: float
    macs_paper: float


def count_module(module: nn.Module, *input_shapes: tuple[int, ...]) -> Workload:
    """Workload of one forward pass of ``module`` in eval mode on float inputs of these shapes. Nothing is computed."""
    shadow = _shadow(module)
    with torch.no_grad(), _counter() as counter:
        shadow(*(torch.empty(shape, device="meta") for shape in input_shapes))
    return _workload(counter)


def output_shape(module: nn.Module, input_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of what ``module`` returns for an input of this shape, nothing computed."""
    with torch.no_grad():
        output = _shadow(module)(torch.empty(input_shape, device="meta"))
    return tuple(output.shape)


def count_nodes(graph_module: fx.GraphModule, input_shape: tuple[int, ...]) -> dict[str, tuple[Workload, Any]]:
    """Runs the graph without computing it: the workload and the output of every node, by node name.

    Tensors come back on the meta device: shape and dtype, no values.
    """
    nodes: dict[str, tuple[Workload, Any]] = {}

    class Counter(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            with _counter() as counter:
                result = super().run_node(n)
            nodes[n.name] = (_workload(counter), result)
            return result

    with torch.no_grad():
        Counter(_shadow(graph_module)).run(torch.empty(input_shape, device="meta"))
    return nodes


def _shadow(module: _Module) -> _Module:
    """A copy without storage, in eval mode. Tensors become meta tensors as they are copied: no weight is duplicated."""
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, memo).eval()


def _workload(counter: FlopCounterMode) -> Workload:
    # FlopCounterMode counts a multiply-accumulate as two operations.
    operators = counter.get_flop_counts().get("Global", {})
    extra = sum(flops for operator, flops in operators.items() if operator in _PAPER_ONLY)
    total = sum(operators.values())
    return Workload(macs=(total - extra) / 2, macs_paper=total / 2)


def _batch_norm(input_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * 2 * math.prod(input_shape)


def _global_pool(input_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * math.prod(input_shape)


_aten = torch.ops.aten
_PAPER_ONLY = {
    # which of these a BatchNorm or a pool becomes depends on the torch version
    _aten.native_batch_norm: _batch_norm,
    _aten._native_batch_norm_legit: _batch_norm,
    _aten._native_batch_norm_legit_no_training: _batch_norm,
    _aten.cudnn_batch_norm: _batch_norm,
    _aten._adaptive_avg_pool2d: _global_pool,
    _aten.mean: _global_pool,
}


def _counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=_PAPER_ONLY)
