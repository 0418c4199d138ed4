"""Latency on the device at hand: warm, synchronised, repeated; median and 95th percentile."""

from __future__ import annotations

import copy
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, fx
from tqdm import trange

from messnet.costs.processor import keep_freed_memory, processor_name
from messnet.errors import RecipeError

DType = Literal["float32", "bfloat16", "float16", "int8"]

WARM_UP_ROUNDS = 2
MIN_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class LatencyOptions:
    """On what, and how carefully, latency is measured."""

    device: str = "cpu"
    """As ``torch_device`` takes it."""
    dtype: DType = "float32"
    batch: int = 1
    """Images at a time."""
    threads: int | None = None
    """Of the processor; None: as many as torch is set to."""
    repeats: int = 50
    """Rounds at most."""
    max_seconds: float = 120.0
    """For all rounds; a slow network still gets 3."""
    tolerance: float = 0.0
    """Rounds end sooner when the median time of one is known to this share of it, with 95 % confidence; 0: never."""

    def __post_init__(self) -> None:
        torch_device(self.device)
        if self.dtype not in get_args(DType):
            raise RecipeError(f"unknown dtype {self.dtype!r}: expected one of {', '.join(get_args(DType))}")
        if self.batch < 1 or self.repeats < 1 or (self.threads is not None and self.threads < 1):
            raise RecipeError(
                f"batch, threads and repeats must be at least 1, got {self.batch}, {self.threads}, {self.repeats}"
            )

    @property
    def conditions(self) -> dict[str, str | int]:
        """What a latency must be told with."""
        return {
            "device": device_name(torch.device(self.device)),
            "runtime": f"torch {torch.__version__} eager",
            "batch": self.batch,
            "dtype": self.dtype,
            "threads": self.threads or torch.get_num_threads(),
        }

    @property
    def name(self) -> str:
        """For the table's file: "cpu-2threads-float32-b1"."""
        conditions = self.conditions
        on_cpu = torch.device(self.device).type == "cpu"
        device = f"cpu-{conditions['threads']}threads" if on_cpu else str(conditions["device"]).lower()
        device = re.sub(r"[^a-z0-9]+", "-", device).strip("-")
        return f"{device}-{self.dtype}-b{self.batch}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """Raises RecipeError for int8, which only runtimes of graphs compute in."""
        if self.dtype == "int8":
            raise RecipeError("torch has no precision 'int8': measure it with --runtime onnxruntime or openvino")
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def convert(self, tensor: Tensor) -> Tensor:
        """On the device, in the dtype, channels last, as sessions run; what is converted already is not copied."""
        dtype = self.torch_dtype if tensor.is_floating_point() else tensor.dtype
        layout = torch.channels_last if tensor.dim() == 4 else torch.preserve_format
        return tensor.to(self.device, dtype, memory_format=layout)


class Stopwatch:
    """Laps by name, in milliseconds. ``clock`` tells seconds."""

    def __init__(self, device: torch.device | str, clock: Callable[[], float] = time.perf_counter) -> None:
        keep_freed_memory()  # as sessions run
        self._now = clock
        self.laps: defaultdict[Hashable, list[float]] = defaultdict(list)
        self._device = torch.device(device)

    @contextmanager
    def lap(self, name: Hashable) -> Iterator[None]:
        """Times the block, from an idle device until the device is idle again."""
        # An accelerator is given work and computes it later: without the first wait the block would be charged for what
        # came before it, without the second it would seem to take no time.
        self._synchronise()
        start = self._now()
        yield
        self._synchronise()
        self.laps[name].append((self._now() - start) * 1000)

    def repeat(self, once: Callable[[], object], options: LatencyOptions, *, desc: str) -> None:
        """Calls ``once``, which laps: warm, ``options.repeats`` times or as often as ``max_seconds`` allow."""
        for _ in range(WARM_UP_ROUNDS):
            start = self._now()
            once()
            seconds = self._now() - start
            if seconds > options.max_seconds / 10:
                break  # long enough to be warm
        self.laps.clear()
        # The last round of warming up says how long one takes.
        affordable, rounds = max(MIN_ROUNDS, int(options.max_seconds / max(seconds, 1e-9))), list[float]()
        for _ in trange(min(options.repeats, affordable), desc=desc, unit="round", mininterval=2, dynamic_ncols=True):
            start = self._now()
            once()
            rounds.append(self._now() - start)
            if median_spread(rounds) <= options.tolerance:
                break

    def median(self, name: Hashable) -> float:
        return float(np.median(self.laps[name]))

    def p95(self, name: Hashable) -> float:
        return float(np.percentile(self.laps[name], 95))

    def _synchronise(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)


def median_spread(values: Sequence[float]) -> float:
    """Half the width of the 95 % confidence interval of the median, relative to it; infinite for fewer than 6 values.

    The interval lies between two order statistics: how many of n values fall below the median is binomial(n, 1/2),
    about normal with standard deviation sqrt(n) / 2 (Conover, Practical Nonparametric Statistics, section 3.2).
    """
    n = len(values)
    # Ranks from 1: the interval goes from the low-th smallest value to the low-th largest.
    low = math.floor((n - 1.96 * math.sqrt(n)) / 2)
    if n < 6 or low < 1:
        return math.inf
    ordered = sorted(values)
    return (ordered[n - low] - ordered[low - 1]) / (2 * float(np.median(ordered)))


def node_latencies(graph_module: fx.GraphModule, example_input: Tensor, *, repeats: int = 20) -> dict[str, float]:
    """Median milliseconds of every node of a traced network in eval mode, by node name, where ``example_input`` is.

    The network is run as sessions run it, on a copy.
    """
    watch = Stopwatch(example_input.device)

    class Interpreter(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            with watch.lap(n.name):
                result: object = super().run_node(n)
            return result

    options = LatencyOptions(device=str(example_input.device), repeats=repeats)
    for layout in (torch.channels_last, torch.contiguous_format):
        timed = copy.deepcopy(graph_module).eval().to(memory_format=layout)
        run = partial(Interpreter(timed).run, example_input.to(memory_format=layout))
        try:
            with torch.inference_mode():
                watch.repeat(run, options, desc="measure nodes")
            break
        except RuntimeError:  # code with views takes its own layout alone, and runs in that
            if layout is torch.contiguous_format:
                raise
    return {name: watch.median(name) for name in watch.laps if isinstance(name, str)}


@contextmanager
def num_threads(threads: int | None) -> Iterator[None]:
    """Lets torch use so many threads within the block; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def torch_device(name: str) -> torch.device:
    """The device of a name as torch has it, such as "cpu" or "cuda:1"; "auto" is CUDA where there is any, else the
    processor. "mps" and "xpu" are taken where torch has them, though nothing here was tried on them.

    Raises RecipeError where there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"no device is called {name!r}: expected auto, cpu, cuda, mps or xpu") from error
    here = torch.accelerator.current_accelerator(check_available=True)
    if device.type != "cpu" and (here is None or here.type != device.type):
        raise RecipeError(f"device {name} was asked for, but torch sees no {device.type} device; use cpu")
    return device


def device_name(device: torch.device) -> str:
    """The processor's or accelerator's own name."""
    if device.type == "cpu":
        return processor_name()
    name_of = getattr(getattr(torch, device.type), "get_device_name", None)
    return str(name_of(device)) if name_of else f"{processor_name()} ({device.type})"
