"""Stage 2's step against its limit, and its memory: one backbone pass, every head on it, one after the other.

    python benchmarks/bench_stage2.py [--models mobilenetv2_fcn drn50_fcn] [--heads 8] [--size 128 128] [--json PATH]

The head space is the paper's, 56 at each of five exit points; ``--heads`` of each point are taken, spread evenly (0:
all). The limit is one backbone forward plus each head's forward, loss and backward measured in isolation, on features
that are given. Training each head alone is its own backbone pass up to its exit, its forward, loss and backward, and
its optimiser's step. All in turns in one run; medians over the rounds. Memory is what tensors made during a step hold
at most, parameters, gradients and optimiser state aside, counted tensor by tensor.

Ends with one line per figure: name value unit goal ok|short.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from messnet.data import IGNORE_INDEX
from messnet.network.head_space import HeadConfig, HeadSpace
from messnet.network.multi_exit import MultiExitNet, convert
from messnet.network.zoo import build_model
from messnet.records.instance import Exit
from messnet.training.cuda_graphs import Recorder
from messnet.training.dilation import fast_dilation
from messnet.training.losses import distillation_loss, teach
from messnet.training.options import ComputeOptions, DistillOptions
from messnet.training.stage2 import _Distillation, space_exits

CLASSES = 21
Figure = tuple[str, float, str, float | None, bool]


def build(name: str, size: tuple[int, int], num_heads: int) -> tuple[MultiExitNet, list[Exit], int]:
    """The network with the sampled heads, these heads, and how many the whole space has."""
    torch.manual_seed(0)
    net = convert(build_model(name, CLASSES), torch.zeros(1, 3, *size), num_exits=6)
    space = space_exits(net, HeadSpace())
    chosen: list[Exit] = []
    for i in range(net.num_exits - 1):
        heads = [exit for exit in space if exit.exit_index == i]
        num = min(num_heads or len(heads), len(heads))
        chosen += [heads[k * len(heads) // num + len(heads) // (2 * num)] for k in range(num)]
    for exit in chosen:
        net.add_head(exit.exit_index, HeadConfig.parse(exit.head))
    return net, chosen, len(space)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """On one CPU thread: of processor time, which other programs on the machine do not stretch."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronise()
    start = clock()
    run()
    synchronise()
    return clock() - start


class Bench:
    """One model on one batch."""

    def __init__(self, net: MultiExitNet, exits: list[Exit], size: tuple[int, int], batch: int, device: Any) -> None:
        self.net, self.exits, self.size = net, exits, size
        self.fabric = ComputeOptions(device=device).fabric()
        where = self.fabric.device
        self.stage = _Distillation(net, exits, DistillOptions(), self.fabric, None, Recorder(False))
        images = torch.randn(batch, 3, *size, device=where).to(memory_format=self.stage.layout)
        labels = torch.randint(0, CLASSES, (batch, *size), device=where)
        labels[:, :4] = IGNORE_INDEX
        self.images, self.labels = images, labels
        with torch.no_grad(), self.fabric.autocast():
            states = list(net.states(images))
            final = net.logits(net.exits[-1], states[-1])
        self.features = {i: state.features for i, state in enumerate(states)}
        self.teacher = teach(F.interpolate(final.float(), size=size, mode="bilinear"), labels)

    def step(self) -> None:
        self.stage.step(1, 1e-4, self.images, self.labels)

    @torch.no_grad()
    def backbone(self) -> None:
        with self.fabric.autocast():
            *_, last = self.net.states(self.images)
            self.net.logits(self.net.exits[-1], last)

    @torch.no_grad()
    def backbone_until(self, exit_index: int) -> None:
        with self.fabric.autocast():
            self.net.backbone.run_until(self.images, exit_index)

    def head(self, exit: Exit) -> None:
        with self.fabric.autocast(), fast_dilation(self.images.device):
            logits = self.net.head(exit)(self.features[exit.exit_index])
        logits = F.interpolate(logits.float(), size=self.size, mode="bilinear", align_corners=False)
        distillation_loss(logits, self.teacher).backward()

    def round(self) -> dict[str, float]:
        """Seconds of a step, of its limit, and of the heads trained alone."""
        time_of = lambda run: seconds(run, self.fabric.device)  # noqa: E731
        step = time_of(self.step)
        backbone = time_of(self.backbone)
        until = {i: time_of(lambda i=i: self.backbone_until(i)) for i in self.stage.points}
        heads = optimiser = 0.0
        for exit in self.exits:
            heads += time_of(lambda exit=exit: self.head(exit))
            optimiser += time_of(self.stage.optimizers[exit].step)
            self.stage.optimizers[exit].zero_grad(set_to_none=True)
        step = (step + time_of(self.step)) / 2  # before and after: what drifts falls on both alike
        alone = heads + optimiser + sum(until[exit.exit_index] for exit in self.exits)
        return {"step": step, "limit": backbone + heads, "alone": alone, "backbone": backbone, "optimiser": optimiser}


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made while it is on and still alive: now, and at most. Gradients of parameters leave it."""

    def __init__(self, known: Iterator[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.sizes: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.sizes:
            return
        self.sizes[storage._cdata] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, key: int) -> None:
        self.live -= self.sizes.pop(key, 0)

    def forget(self, parameter: Tensor) -> None:
        """A gradient is no activation."""
        if parameter.grad is not None:
            key = parameter.grad.untyped_storage()._cdata
            self.live -= self.sizes.get(key, 0)
            self.sizes[key] = 0


@contextmanager
def labelled(stage: _Distillation, mode: LiveBytes) -> Iterator[dict[Exit, int]]:
    """The peak while each head trains."""
    peaks: dict[Exit, int] = {}
    train_head = stage._train_head

    def watched(exit: Exit, *rest: Any) -> Any:
        mode.peak = mode.live
        result = train_head(exit, *rest)
        peaks[exit] = mode.peak
        return result

    stage._train_head = watched  # type: ignore[method-assign]
    yield peaks
    del stage._train_head  # type: ignore[method-assign]


def peaks_of_step(bench: Bench) -> dict[Exit, int]:
    """Most bytes alive while each head trains; the momentum is there already."""
    bench.step()
    gc.collect()
    states = (value for o in bench.stage.optimizers.values() for state in o.state.values() for value in state.values())
    own = [*bench.net.parameters(), *bench.net.buffers(), *(v for v in states if isinstance(v, Tensor))]
    mode = LiveBytes(iter([*own, bench.images, bench.labels]))
    hooks = [p.register_post_accumulate_grad_hook(mode.forget) for p in bench.net.heads.parameters()]
    with mode, labelled(bench.stage, mode) as peaks:
        bench.step()
    for hook in hooks:
        hook.remove()
    return peaks


def measure(name: str, options: argparse.Namespace) -> list[Figure]:
    size = (options.size[0], options.size[1])
    net, exits, whole = build(name, size, options.heads)
    bench = Bench(net, exits, size, options.batch, options.device)
    bench.round()  # warm
    rounds = [bench.round() for _ in range(options.rounds)]
    median = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
    print(
        f"{name}: {len(exits)} of {whole} heads, batch {options.batch} of {size[0]}x{size[1]}, medians in s: ", end=""
    )
    print(", ".join(f"{key} {value:.3f}" for key, value in median.items()), flush=True)
    to_limit = statistics.median(r["step"] / r["limit"] for r in rounds)
    speedup = statistics.median(r["alone"] / r["step"] for r in rounds)
    of_limit = statistics.median(r["limit"] / r["step"] for r in rounds)
    peaks = peaks_of_step(bench)
    hungriest = max(peaks, key=lambda exit: peaks[exit])
    net.drop_heads(keep=[hungriest])
    gc.collect()
    alone = peaks_of_step(Bench(net, [hungriest], size, options.batch, options.device))[hungriest]
    memory = peaks[hungriest] / alone
    print(f"{name}: peak {peaks[hungriest] / 2**20:.1f} MiB among all, {alone / 2**20:.1f} MiB alone: {hungriest}")
    return [
        (f"{name}_step_to_limit", to_limit, "ratio", 1.10, to_limit <= 1.10),
        (f"{name}_speedup_over_each_alone", speedup, "x", None, True),
        (f"{name}_share_of_possible_speedup", of_limit, "ratio", 0.90, of_limit >= 0.90),
        (f"{name}_optimiser_share", median["optimiser"] / median["step"], "ratio", None, True),
        (f"{name}_peak_memory_to_one_head", memory, "ratio", 1.25, memory <= 1.25),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mobilenetv2_fcn", "drn50_fcn"])
    parser.add_argument("--heads", type=int, default=8, help="of each exit point's 56; 0: all")
    parser.add_argument("--size", type=int, nargs=2, default=(128, 128))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures = [figure for name in options.models for figure in measure(name, options)]
    for name, value, unit, goal, ok in figures:
        print(f"{name} {value:.4g} {unit} {'-' if goal is None else f'{goal:g}'} {'ok' if ok else 'short'}")
    if options.json:
        record = [dict(zip(("name", "value", "unit", "goal", "ok"), figure, strict=True)) for figure in figures]
        setting = {"heads": options.heads, "size": list(options.size), "batch": options.batch}
        options.json.write_text(json.dumps({**setting, "figures": record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
