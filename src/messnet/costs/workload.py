"""Workload and memory of anything that runs, counted without computing it: on copies that live on the meta device.

Multiply-accumulates in two conventions. "conv": matmul-like operators only (convolutions, linear layers, attention).
"paper": plus 2 per BatchNorm element and 1 per element that a global average pool reads, which is what the posters'
"GFLOPs" turn out to be (138.63 / 163.86 / 8.78 at 512x512, truncated to two decimals). All else (activations, max-pool,
interpolation, bias, the exit policy's comparisons) counts nothing in either.

Memory is the storages that are alive: views and in-place operators take none, the weights and an operator's own
workspace are not in it.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

__all__ = [
    "Count",
    "Meter",
    "Workload",
    "copy_module",
    "count_module",
    "count_nodes",
    "dtype_of",
    "metering",
    "shadow",
]

_Module = TypeVar("_Module", bound=nn.Module)


class Workload(NamedTuple):
    """Multiply-accumulates in both conventions."""

    macs: float
    macs_paper: float


@dataclass(frozen=True, kw_only=True)
class Count:
    """What one part does."""

    workload: Workload
    operators: dict[str, float]
    """Multiply-accumulates by operator, the "conv" convention."""
    uncounted: dict[str, int]
    """Operators that count nothing in it, with the number of calls: all that read a tensor and compute or move data."""
    memory_bytes: int
    """Largest sum of storages alive at a time, those that were alive before included."""


class Meter(TorchDispatchMode):
    """Made by ``metering``; counts what runs in its parts."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: dict[Hashable, Count] = {}
        self.macs = _counter()
        self._alive = WeakIdKeyDictionary()
        self._peak = 0
        self._calls: Counter[Any] = Counter()

    @contextmanager
    def part(self, name: Hashable) -> Iterator[None]:
        """What runs in the block becomes ``counts[name]``."""
        before, self._peak, self._calls = _flops(self.macs), sum(self._alive.values()), Counter()
        yield
        # One counter for all parts, read before and after: it follows the modules that are running, and a part may end
        # inside one.
        flops = {operator: flops - before.get(operator, 0) for operator, flops in _flops(self.macs).items()}
        macs = {op.__name__: value / 2 for op, value in flops.items() if value and op not in _PAPER_ONLY}
        self.counts[name] = Count(
            workload=_workload(flops),
            operators=macs,
            uncounted={op.__name__: n for op, n in self._calls.items() if op.__name__ not in macs},
            memory_bytes=self._peak,
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read = {id(tensor.untyped_storage()) for tensor in _tensors((args, kwargs))}
        made = {storage for tensor in _tensors(result) if id(storage := tensor.untyped_storage()) not in read}
        for storage in made:
            self._alive[storage] = storage.nbytes()
        self._peak = max(self._peak, sum(self._alive.values()))
        if read and (made or func._schema.is_mutable):
            self._calls[func.overloadpacket] += 1
        return result


@contextmanager
def metering() -> Iterator[Meter]:
    """Counts what runs inside, part by part: ``with metering() as meter: with meter.part("stem"): ...``

    A tensor that is made outside takes no memory, so inputs are to be made inside.
    """
    meter = Meter()
    with meter, meter.macs:
        yield meter


def count_module(module: nn.Module, *input_shapes: tuple[int, ...]) -> Workload:
    """Workload of one forward pass of ``module`` in eval mode, inputs of these shapes and of its own dtype."""
    with torch.no_grad(), _counter() as counter:
        shadow(module)(*(torch.empty(shape, dtype=dtype_of(module), device="meta") for shape in input_shapes))
    return _workload(_flops(counter))


def count_nodes(graph_module: fx.GraphModule, input_shape: tuple[int, ...]) -> dict[str, tuple[Workload, Any]]:
    """Runs the graph without computing it: the workload and the output of every node, by node name.

    Tensors come back on the meta device: shape and dtype, no values.
    """
    nodes: dict[str, tuple[Workload, Any]] = {}

    class Interpreter(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            with _counter() as counter:
                result = super().run_node(n)
            nodes[n.name] = (_workload(_flops(counter)), result)
            return result

    with torch.no_grad():
        Interpreter(shadow(graph_module)).run(torch.empty(input_shape, dtype=dtype_of(graph_module), device="meta"))
    return nodes


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype that a module computes in: that of its first floating-point tensor."""
    tensors = (*module.parameters(), *module.buffers())
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.get_default_dtype())


def shadow(module: _Module) -> _Module:
    """A copy without storage, in eval mode."""
    return copy_module(module, lambda tensor: torch.empty_like(tensor, device="meta"))


def copy_module(module: _Module, convert: Callable[[Tensor], Tensor]) -> _Module:
    """A copy in eval mode, without gradients, whose parameters and buffers are ``convert(tensor)``. They are converted
    as they are copied: none exists twice beside the original."""
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        converted = convert(tensor.detach())
        memo[id(tensor)] = (
            nn.Parameter(converted, requires_grad=False) if isinstance(tensor, nn.Parameter) else converted
        )
    return copy.deepcopy(module, memo).eval()


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _flops(counter: FlopCounterMode) -> dict[Any, int]:
    """By operator; a multiply-accumulate is two operations."""
    return dict(counter.get_flop_counts().get("Global", {}))


def _workload(flops: dict[Any, int]) -> Workload:
    extra = sum(value for operator, value in flops.items() if operator in _PAPER_ONLY)
    total = sum(flops.values())
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
