"""Workload and memory of anything that runs, counted without computing it: on copies that live on the meta device.

Multiply-accumulates in two conventions. "conv": matmul-like operators only (convolutions, linear layers, attention),
whatever a device makes of them: attention is one fused operator on a processor and two products elsewhere.
"paper": plus 2 per BatchNorm element and 1 per element that a global average pool reads, which is what the paper's
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
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from messnet.errors import ModelError

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
        self._calls: Counter[OpOverloadPacket] = Counter()

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

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        result: object = func(*args, **(kwargs or {}))
        read = {id(tensor.untyped_storage()) for tensor in _tensors((args, kwargs))}
        made = {storage for tensor in _tensors(result) if id(storage := tensor.untyped_storage()) not in read}
        # A result in a storage that was read is a view or an operation in place, and takes no memory of its own. The
        # dictionary holds storages weakly: one that nobody refers to any more drops out of the sum by itself.
        for storage in made:
            self._alive[storage] = storage.nbytes()
        self._peak = max(self._peak, sum(self._alive.values()))
        # What reads nothing makes constants, and what neither makes nor changes a storage is a view: neither is work.
        if read and (made or func._schema.is_mutable):
            self._calls[func.overloadpacket] += 1
        return result


@contextmanager
def metering() -> Iterator[Meter]:
    """Counts what runs inside, part by part: ``with metering() as meter: with meter.part("stem"): ...``

    A tensor that is made outside takes no memory, so inputs are to be made inside.
    """
    meter = Meter()
    with _without_fused_layers(), meter, meter.macs:
        yield meter


def count_module(module: nn.Module, *input_shapes: tuple[int, ...]) -> Workload:
    """Workload of one forward pass of ``module`` in eval mode, inputs of these shapes and of its own dtype."""
    with torch.no_grad(), torch.device("meta"), _counter() as counter:
        shadow(module)(*(torch.empty(shape, dtype=dtype_of(module), device="meta") for shape in input_shapes))
    return _workload(_flops(counter))


def count_nodes(graph_module: fx.GraphModule, input_shape: tuple[int, ...]) -> dict[str, tuple[Workload, object]]:
    """Runs the graph without computing it: the workload and the output of every node, by node name.

    Tensors come back on the meta device: shape and dtype, no values. A graph with modules that cannot be copied,
    or that do not run on the meta device, is run for real, once. Raises what the graph raises.
    """
    try:
        with torch.device("meta"):
            return _run_nodes(shadow(graph_module), input_shape, "meta")
    except Exception as error:
        if "meta tensor" in str(error):  # it asks for values
            raise
    with in_eval_mode(graph_module):
        return _run_nodes(graph_module, input_shape, device_of(graph_module))


def _run_nodes(
    graph_module: fx.GraphModule, input_shape: tuple[int, ...], device: torch.device | str
) -> dict[str, tuple[Workload, object]]:
    nodes: dict[str, tuple[Workload, object]] = {}

    class Interpreter(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            with _counter() as counter:
                result: object = super().run_node(n)
            empty = tree_map_only(Tensor, lambda tensor: torch.empty_like(tensor, device="meta"), result)
            nodes[n.name] = (_workload(_flops(counter)), empty)
            return result

    with torch.no_grad(), _without_fused_layers():
        Interpreter(graph_module).run(torch.zeros(input_shape, dtype=dtype_of(graph_module), device=device))
    return nodes


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and in its own again afterwards."""
    modes = [(one, one.training) for one in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for one, training in modes:
            one.training = training


@contextmanager
def _without_fused_layers() -> Iterator[None]:
    """torch runs a whole transformer layer as one operator in eval mode, which tells nobody what it multiplies."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype that a module computes in: that of its first floating-point tensor."""
    tensors = (*module.parameters(), *module.buffers())
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.get_default_dtype())


def device_of(module: nn.Module) -> torch.device:
    """Where the first tensor of a module is; the processor if it has none."""
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def shadow(module: _Module) -> _Module:
    """A copy without storage, in eval mode."""
    return copy_module(module, lambda tensor: torch.empty_like(tensor, device="meta"))


def copy_module(module: _Module, convert: Callable[[Tensor], Tensor]) -> _Module:
    """A copy in eval mode, without gradients, whose tensors are ``convert(tensor)``: parameters, buffers, and what
    modules hold besides in attributes. They are converted as they are copied: none exists twice beside the original.

    Raises UncopyableError when a forward hook of the user's may write to the original, or Python cannot copy a part.
    """
    hooked = [name for name, part in module.named_modules() if users_hooks(part)]
    if unsafe := sorted({*hooked} - _nodes(module)):
        raise UncopyableError(f"{unsafe[0]} has a forward hook, which may keep what it sees in the original")
    # deepcopy takes what it finds in its memo for copied already: each tensor's converted copy is put there beforehand,
    # so that the weights are never copied first and converted afterwards.
    memo: dict[int, object] = {}
    for tensor in (*module.parameters(), *module.buffers(), *_held_tensors(module)):
        converted = convert(tensor.detach())
        memo[id(tensor)] = (
            nn.Parameter(converted, requires_grad=False) if isinstance(tensor, nn.Parameter) else converted
        )
    try:
        copied = copy.deepcopy(module, memo).eval()
    except Exception as error:  # Python raises many kinds
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise UncopyableError(f"{type(module).__name__} cannot be copied ({reason})") from error
    for name in hooked:  # the copy's hooks would write to the original, and nothing in a graph reads what they keep
        part = copied.get_submodule(name)
        for hooks in (part._forward_pre_hooks, part._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in users_hooks(part)]:
                del hooks[key]
    return copied


def _nodes(module: nn.Module) -> set[str]:
    """The names of modules that are nodes of a graph: what they give reaches others as the graph shows, in no other
    way."""
    return {
        f"{name}.{node.target}".lstrip(".")
        for name, part in module.named_modules()
        if isinstance(part, fx.GraphModule)
        for node in part.graph.nodes
        if node.op == "call_module"
    }


class UncopyableError(ModelError):
    """A module that has to run as it is."""


def users_hooks(module: nn.Module) -> list[object]:
    """The forward hooks of a module that are not torch's own. Those, such as weight_norm's, touch weights alone."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return [hook for hook in hooks if not str(getattr(hook, "__module__", type(hook).__module__)).startswith("torch.")]


def _held_tensors(module: nn.Module) -> list[Tensor]:
    """What modules hold in attributes, also in lists and dicts, that is neither parameter nor buffer: a kernel, a
    weight that weight_norm has worked out, a feature map that was kept."""
    own = {"_parameters", "_buffers", "_modules"}
    held = ({name: value for name, value in part.__dict__.items() if name not in own} for part in module.modules())
    return [tensor for values in held for tensor in _tensors(values)]


def _tensors(values: object) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _flops(counter: FlopCounterMode) -> dict[OpOverloadPacket, int]:
    """By operator; a multiply-accumulate is two operations."""
    return dict(counter.get_flop_counts().get("Global", {}))


def _workload(flops: dict[OpOverloadPacket, int]) -> Workload:
    extra = sum(value for operator, value in flops.items() if operator in _PAPER_ONLY)
    total = sum(flops.values())
    return Workload(macs=(total - extra) / 2, macs_paper=total / 2)


_aten = torch.ops.aten
# The formulas below give multiply-accumulates by the shapes of an operator's arguments.
_BATCH_NORMS = (  # which of these a BatchNorm becomes depends on the torch version
    _aten.native_batch_norm,
    _aten._native_batch_norm_legit,
    _aten._native_batch_norm_legit_no_training,
    _aten.cudnn_batch_norm,
)
_PAPER_ONLY: dict[OpOverloadPacket, Callable[..., int]] = {
    # Two an element, the paper's figure, though normalisation folds into one.
    **dict.fromkeys(_BATCH_NORMS, lambda x, *_: 2 * math.prod(x)),
    **dict.fromkeys((_aten._adaptive_avg_pool2d, _aten.mean), lambda x, *_: math.prod(x)),
}
_ATTENTION = (
    _aten._scaled_dot_product_flash_attention_for_cpu,
    _aten._scaled_dot_product_fused_attention_overrideable,
)
# What multiplies matrices and has no formula of torch's own.
_UNKNOWN_TO_TORCH: dict[OpOverloadPacket, Callable[..., int]] = {
    # (..., L, E), (..., S, E), (..., S, V): the products query x key and weights x value.
    **dict.fromkeys(_ATTENTION, lambda q, k, v, *_: math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])),
    **dict.fromkeys((_aten.mv, _aten.dot, _aten.vdot), lambda one, *_: math.prod(one)),
    _aten.addmv: lambda bias, matrix, *_: math.prod(matrix),
    # A bias, (..., L, M), (..., M, N).
    **dict.fromkeys((_aten.addbmm, _aten._addmm_activation), lambda bias, a, b, *_: math.prod(a) * b[-1]),
    # (T, B, I) with the weights (4H, I) and (4H, H) of an LSTM.
    _aten.mkldnn_rnn_layer: lambda x, wx, wh, *_: x[0] * x[1] * (math.prod(wx) + math.prod(wh)),
    # nn.Bilinear: (B, I, 1 ...), (1, O, I, J), (B, J): two products for each of the weights.
    _aten._trilinear: lambda x, weight, *_: 2 * x[0] * math.prod(weight),
    # (..., P, M), (..., R, M).
    **dict.fromkeys((_aten._cdist_forward, _aten._euclidean_dist), lambda a, b, *_: math.prod(a) * b[-2]),
}


def _counter() -> FlopCounterMode:
    # The paper's extra operators are counted along always, and subtracted for the "conv" convention by ``_workload``.
    formulas = {op: _operations(macs) for op, macs in (_PAPER_ONLY | _UNKNOWN_TO_TORCH).items()}
    if hasattr(torch.ops.torchvision, "deform_conv2d"):  # where torchvision is loaded
        # (N, C, H, W), (O, C/g, k, k): a convolution that is told where to look.
        formulas[torch.ops.torchvision.deform_conv2d] = lambda x, weight, *_, out_shape, **__: (
            2 * math.prod(out_shape) * math.prod(weight[1:])
        )
    return FlopCounterMode(display=False, custom_mapping=formulas)


def _operations(macs: Callable[..., int]) -> Callable[..., int]:
    """A formula as torch's counter takes it: two operations for each multiply-accumulate."""
    return lambda *shapes, **_: 2 * macs(*shapes)
