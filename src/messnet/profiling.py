"""Costs of every part of an overprovisioned network -> CostTable.

Parts are counted and timed where they run: a segment after the one before it, a head on the features that its segment
has just left. Heads are timed in passes of their own, for a pass of the segments through which dozens of heads went
would find its caches spoilt.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from messnet.costs.latency import LatencyOptions, Stopwatch, num_threads
from messnet.costs.workload import (
    Count,
    UncopyableError,
    copy_module,
    device_of,
    dtype_of,
    in_eval_mode,
    metering,
    shadow,
)
from messnet.errors import ModelError
from messnet.network.multi_exit import MultiExitNet, convert, labels_at
from messnet.policy.policy import Policy
from messnet.policy.reference import image_confidence, should_exit
from messnet.records.costs import CostTable, PartCost
from messnet.records.run_directory import provenance

_POLICY = Policy()
_PIXEL_THRESHOLD = 0.9


class _Part(NamedTuple):
    kind: Literal["segment", "head", "policy", "output"]
    exit_index: int
    head: str = ""


_Around = Callable[[_Part], AbstractContextManager[None]]


def profile(
    net: nn.Module, input_size: tuple[int, int] = (512, 512), *, model: str = "", latency: LatencyOptions | None = None
) -> CostTable:
    """Costs of every segment, head, policy step and output at ``input_size`` (height, width). A ``net`` that is no
    MultiExitNet is converted first, as ``messnet.convert(net, images)`` does: six segments and its own head.

    Workload (both conventions, see ``messnet.costs.workload``), parameters and memory are counted without computing
    anything; with ``latency`` every part is also timed as sessions run it, on a copy of ``net``. ``model`` is the name
    that the table carries.

    Raises ModelError for a size below 1 x 1, and for a model that cannot be converted.
    """
    if len(input_size) != 2 or min(input_size) < 1:
        raise ModelError(f"input_size is (height, width), at least 1 x 1 pixels, not {input_size}")
    if not isinstance(net, MultiExitNet):
        device = next((parameter.device for parameter in net.parameters()), torch.device("cpu"))
        net = convert(net, torch.zeros(1, 3, *input_size, dtype=dtype_of(net), device=device))
    batch = latency.batch if latency else 1
    counts = _count(net, (batch, 3, *input_size), latency.torch_dtype if latency else dtype_of(net))
    watch = _time(net, (batch, 3, *input_size), latency) if latency else None

    def cost(part: _Part, parameters: int = 0) -> PartCost:
        return PartCost(
            macs=counts[part].workload.macs / batch,
            macs_paper=counts[part].workload.macs_paper / batch,
            parameters=parameters,
            memory_bytes=counts[part].memory_bytes,
            latency_ms=watch.median(part) if watch else None,
            latency_p95_ms=watch.p95(part) if watch else None,
        )

    sizes, last = net.backbone.segment_parameters(), net.num_exits - 1
    # Operators are told of the user's own model alone: segments and final head, without what early exits add.
    own = [*(_Part("segment", k) for k in range(net.num_exits)), _Part("head", *net.exits[-1])]
    operators, uncounted = Counter[str](), Counter[str]()
    for part in own:
        operators.update({name: macs / batch for name, macs in counts[part].operators.items()})
        uncounted.update(counts[part].uncounted)
    return CostTable(
        model=model,
        input_size=input_size,
        segments=tuple(cost(_Part("segment", k), parameters) for k, parameters in enumerate(sizes)),
        heads={
            exit: cost(_Part("head", *exit), sum(parameter.numel() for parameter in net.head(exit).parameters()))
            for exit in net.exits
        },
        policies=tuple(cost(_Part("policy", k)) for k in range(last)),
        outputs=tuple(cost(_Part("output", k)) for k in range(net.num_exits)),
        operators=dict(operators),
        uncounted=dict(uncounted),
        conditions=latency.conditions if latency else {},
        provenance={
            "policy": _POLICY.name,
            **({"measured": time.strftime("%Y-%m-%d")} if latency else {}),
            **provenance(),
        },
    )


def _count(net: MultiExitNet, shape: tuple[int, ...], dtype: torch.dtype) -> dict[_Part, Count]:
    try:
        with torch.device("meta"):  # also what forward makes
            return _count_on(shadow(net).to(dtype), shape, "meta")
    except UncopyableError:
        with in_eval_mode(net):
            return _count_on(net, shape, device_of(net))
    # A model that looks at values (an if on a tensor, a .item()) cannot run without any: it has to compute them.
    except Exception:
        copied = copy_module(
            net, lambda tensor: tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
        )
        return _count_on(copied, shape, "cpu")


@contextmanager
def running_copy(net: MultiExitNet, options: LatencyOptions) -> Iterator[MultiExitNet]:
    """The copy of ``net`` that is measured as ``options`` say, so that ``net`` stays as it is. A network that cannot be
    copied is measured itself, if it is where and of the dtype that was asked for: ModelError otherwise."""
    try:
        yield copy_module(net, options.convert).to(memory_format=net.memory_format)
    except UncopyableError as error:
        wanted, device = options.torch_dtype, torch.device(options.device)
        if dtype_of(net) != wanted or device_of(net).type != device.type:
            raise ModelError(
                f"{error}: it can be measured as it is alone, on {device_of(net)} in {str(dtype_of(net))[6:]}"
            ) from error
        with in_eval_mode(net):
            yield net


def _count_on(net: MultiExitNet, shape: tuple[int, ...], device: torch.device | str) -> dict[_Part, Count]:
    with torch.no_grad(), metering() as meter:
        for run in (_run_model, _run_early_exits):
            run(net, lambda: torch.zeros(shape, dtype=dtype_of(net), device=device), shape[-2:], meter.part)
    return meter.counts  # type: ignore[return-value]


def _time(net: MultiExitNet, shape: tuple[int, ...], options: LatencyOptions) -> Stopwatch:
    watch = Stopwatch(options.device)
    # Random values, for zeros may be faster: accelerators clock by the power that they draw. Seeded, so that one
    # measurement is like another.
    x = options.convert(torch.rand(shape, generator=torch.Generator().manual_seed(0)))
    x = x.contiguous(memory_format=net.memory_format)
    with running_copy(net, options) as running, torch.inference_mode(), num_threads(options.threads):

        def once() -> None:
            # Both passes in every round, so that a drift of the clock reaches the model and the exits alike.
            for run in (_run_model, _run_early_exits):
                run(running, lambda: x, shape[-2:], watch.lap)

        watch.repeat(once, options, desc="measure")
    return watch


def _run_model(net: MultiExitNet, make_input: Callable[[], Tensor], size: tuple[int, ...], around: _Around) -> None:
    """The user's own model, from the input to labels at ``size``, each part inside ``around(part)``."""
    states, exit = net.states(make_input()), net.exits[-1]
    for k in range(net.num_exits):
        with around(_Part("segment", k)):
            state = next(states)
    with around(_Part("head", *exit)):
        logits = net.logits(exit, state)
    with around(_Part("output", exit.exit_index)):
        _label(logits, size)


def _run_early_exits(
    net: MultiExitNet, make_input: Callable[[], Tensor], size: tuple[int, ...], around: _Around
) -> None:
    """Every head of every early exit point, and there one decision and one output."""
    states = net.states(make_input())
    for k, point in enumerate(net.exit_points[:-1]):
        state = next(states)
        heads = [exit for exit in net.exits if exit.exit_index == k]
        for exit in heads:
            with around(_Part("head", *exit)):
                net.logits(exit, state)
        # A decision and an output cost the same whichever head gave the logits; without a head zeros of their shape do.
        blank = state.features.new_zeros(len(state.features), net.num_classes, *state.features.shape[-2:])
        logits = net.logits(heads[0], state) if heads else blank
        with around(_Part("policy", k)):
            shares = image_confidence(logits, point.output_stride, (size[0], size[1]), [_PIXEL_THRESHOLD], _POLICY)
            _to_host(should_exit(shares[:, 0], 0.5))
        with around(_Part("output", k)):
            _label(logits, size)


def _label(logits: Tensor, size: tuple[int, ...]) -> None:
    _to_host(labels_at(logits, (size[0], size[1])))


def _to_host(result: Tensor) -> None:
    # Labels and decisions end on the processor, as in a session: the transfer is a part of what they cost.
    if not result.is_meta:
        result.cpu()
