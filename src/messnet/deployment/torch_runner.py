"""Runs an instance with torch, eager or compiled. The only module of the deployment that imports torch when it is
loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from messnet.costs.latency import device_name, num_threads, torch_device
from messnet.costs.processor import keep_freed_memory
from messnet.costs.workload import dtype_of, shadow
from messnet.deployment.runner import Live, Runner, Step
from messnet.images.preprocessing import normalise
from messnet.network.backbone import Chain
from messnet.network.multi_exit import MultiExitNet, labels_at
from messnet.policy.policy import Policy
from messnet.policy.reference import image_confidence
from messnet.records.instance import FINAL_HEAD, Exit
from messnet.records.names import DTYPES, Precision, RuntimeName

# Networks that do not take every size, for their skip connections would not fit, take multiples of this.
_STRIDE = 32


class TorchRunner(Runner):
    """The network itself; any of its heads. Compiled, each part is translated when it first runs, which takes minutes,
    and once more when the size of the images changes."""

    def __init__(
        self,
        net: MultiExitNet,
        policy: Policy,
        *,
        device: str = "cpu",
        precision: Precision | None = None,
        threads: int | None = None,
        compiled: bool = False,
    ) -> None:
        keep_freed_memory()
        self._device, self.policy = torch_device(device), policy
        self.device = str(self._device)
        dtype = dtype_of(net) if precision is None else getattr(torch, DTYPES[precision])
        layout = {"memory_format": net.memory_format}
        self.net: MultiExitNet = net.eval().to(self._device, dtype, **layout)  # type: ignore[call-overload]
        self.runtime: RuntimeName = "torch-compiled" if compiled else "torch"
        self.precision: Precision = next(p for p in get_args(Precision) if str(dtype) == f"torch.{DTYPES[p]}")
        self._threads = threads
        self._multiple: int | None = None
        self._parts: dict[tuple[int, Exit], Callable[..., Any]] = {}

    @property
    def threads(self) -> int:
        return self._threads or torch.get_num_threads()

    @property
    def conditions(self) -> dict[str, str | int]:
        how = "compiled" if self.runtime == "torch-compiled" else "eager"
        return {
            "device": device_name(self._device),
            "runtime": f"torch {torch.__version__} {how}",
            "dtype": DTYPES[self.precision],
            "threads": self.threads,
        }

    def expect(self, exit: Exit) -> None:
        self.net.head(exit)

    def output_stride(self, exit: Exit) -> int:
        return self.net.exit_points[exit.exit_index].output_stride

    def size_multiple(self) -> int:
        if self._multiple is None:
            self._multiple = size_multiple(self.net)
        return self._multiple

    def start(self, images: NDArray[np.uint8]) -> Live:
        layout = self.net.memory_format
        x = torch.from_numpy(normalise(images, self.net.normalisation))
        x = x.to(self._device, dtype_of(self.net), memory_format=layout)
        size = (images.shape[1], images.shape[2])
        if isinstance(self.net.backbone, Chain):
            return Live((x,), size)
        return Live((), size, states=enumerate(self.net.states(x)))

    def advance(
        self, live: Live, exit: Exit, *, pixel_threshold: float | None = None, logits: bool = True, keep: bool = True
    ) -> Step:
        with torch.inference_mode(), num_threads(self._threads):
            if live.states is not None:
                state = next(state for i, state in live.states if i == exit.exit_index)
                found = self.net.logits(exit, state) if logits else None
                following = Live((), live.size, exit.exit_index + 1, live.states)
            else:
                part = self._part(live.depth, exit)
                values, found = part(logits, *live.take())
                following = Live(values, live.size, exit.exit_index + 1)
            confidence = None
            if pixel_threshold is not None and found is not None:
                stride = self.output_stride(exit)
                shares = image_confidence(found, stride, live.size, [pixel_threshold], self.policy)
                confidence = shares[:, 0].cpu().numpy()
        return Step(following if keep else None, found, confidence)

    def _part(self, depth: int, exit: Exit) -> Callable[..., Any]:
        """From the live values behind ``depth`` segments to those at ``exit``, and its logits where wanted."""
        if (depth, exit) not in self._parts:
            assert isinstance(self.net.backbone, Chain)
            segments, head = self.net.backbone.segments[depth : exit.exit_index + 1], self.net.head(exit)
            final = exit.head == FINAL_HEAD

            def run(logits: bool, *values: Any) -> tuple[tuple[Any, ...], Tensor | None]:
                for segment in segments:
                    values = segment(*values)
                if not logits:
                    return values, None
                return values, head(*values) if final else head(values[0])

            # One function for segments and head, so that the compiler sees both.
            self._parts[depth, exit] = torch.compile(run) if self.runtime == "torch-compiled" else run
        return self._parts[depth, exit]

    def select(self, live: Live, rows: NDArray[np.bool_]) -> Live | None:
        # A value that is no batch, one image after the other, cannot be divided.
        divisible = (isinstance(v, Tensor) and v.dim() > 0 and len(v) == len(rows) for v in live.values)
        if live.states is not None or not all(divisible):
            return None
        kept = torch.from_numpy(np.flatnonzero(rows)).to(self._device)
        with torch.inference_mode():
            values = tuple(self._in_layout(value.index_select(0, kept)) for value in live.take())
        return Live(values, live.size, live.depth)

    def _in_layout(self, tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=self.net.memory_format) if tensor.dim() == 4 else tensor

    def array(self, logits: Any, row: int) -> NDArray[np.float32]:
        one: NDArray[np.float32] = logits[row : row + 1].detach().float().cpu().numpy()
        return one

    def finite(self, logits: Any) -> NDArray[np.bool_]:
        # One number for each image crosses from the device. A sum is not finite where one of its terms is not, and no
        # sum of so many logits overflows in float32.
        sums = logits.detach().sum((1, 2, 3), dtype=torch.float32)
        finite: NDArray[np.bool_] = torch.isfinite(sums).cpu().numpy()
        return finite

    def labels(self, logits: Any, rows: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.uint8]:
        with torch.inference_mode(), num_threads(self._threads):
            some = logits if rows.all() else logits[torch.from_numpy(rows).to(self._device)]
            labels: NDArray[np.uint8] = labels_at(some, size).cpu().numpy()
        return labels

    def synchronise(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)


def size_multiple(net: MultiExitNet) -> int:
    """The least power of two, 32 at most, of which the network takes every multiple as height and width: 1 for most, 16
    for a U-Net that halves its maps four times. It is run without computing anything."""
    try:
        empty = shadow(net)
        for module in empty.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        _run_through(empty, 6 * _STRIDE, 8 * _STRIDE)
    except Exception:  # it looks at values: nothing can be told, and errors tell of themselves
        return 1
    multiple = 1
    while multiple < _STRIDE:
        try:
            # Odd multiples, so that what is taken is taken for this multiple and not for one of twice it.
            _run_through(empty, 6 * _STRIDE + 13 * multiple, 24 * _STRIDE - 19 * multiple)
            break
        except RuntimeError:
            multiple *= 2
    return multiple


def _run_through(net: MultiExitNet, height: int, width: int) -> None:
    with torch.no_grad():
        x = torch.zeros(1, 3, height, width, dtype=dtype_of(net), device="meta")
        *_, state = net.states(x)
        if net.backbone.final_head is not None:
            net.logits(net.exits[-1], state)
