"""What runs an instance: one narrow interface over torch, ONNX Runtime and OpenVINO.

A ``Runner`` goes from exit to exit. What is alive between two exits is a ``Live``, opaque to its user; logits and live
tensors have the images of the batch in their first dimension. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from messnet.records.instance import Exit
from messnet.records.names import Precision, RuntimeName


@dataclass
class Live:
    """What is alive behind the segments that have run. Whoever goes on from it uses it up."""

    values: tuple[Any, ...]
    """Tensors in the runtime's own form."""
    size: tuple[int, int]
    """(H, W) of the images."""
    depth: int = 0
    """How many segments of a network, or stages of graphs, have run."""
    states: Iterator[tuple[int, Any]] | None = None
    """Where a network that cannot be resumed waits: its exit points and their states, one after the other."""

    def take(self) -> tuple[Any, ...]:
        """The values, no longer held here: memory for what comes after them."""
        values, self.values = self.values, ()
        return values


class Step(NamedTuple):
    """What one exit gives."""

    live: Live | None
    """To go on from, where that was asked for."""
    logits: Any
    """(N, K, h, w) in the runtime's own form, which ``Runner.array`` reads; None where not asked for."""
    confidence: NDArray[np.float32] | None
    """(N,) c_img at the pixel threshold that was asked for."""


@runtime_checkable
class Runner(Protocol):
    """Runs images, a batch of one size, from exit to exit of a network."""

    runtime: RuntimeName
    precision: Precision
    device: str
    """As torch names it: "cpu", "cuda", "cuda:1"."""

    @property
    def threads(self) -> int:
        """How many threads of the processor it takes."""
        ...

    @property
    def conditions(self) -> dict[str, str | int]:
        """Device, runtime, dtype and threads, as a cost table names them."""
        ...

    def expect(self, exit: Exit) -> None:
        """Raises ModelError when there is no such exit."""
        ...

    def output_stride(self, exit: Exit) -> int:
        """Input pixels per pixel of the logits."""
        ...

    def size_multiple(self) -> int:
        """What height and width of the images must be multiples of; 1 for most networks."""
        ...

    def start(self, images: NDArray[np.uint8]) -> Live:
        """Images (N, H, W, 3) RGB, normalised, on the device."""
        ...

    def advance(
        self, live: Live, exit: Exit, *, pixel_threshold: float | None = None, logits: bool = True, keep: bool = True
    ) -> Step:
        """Runs the segments up to an exit; its head for ``logits``; its policy where there is a ``pixel_threshold``;
        no other head. ``keep`` to go on afterwards."""
        ...

    def select(self, live: Live, rows: NDArray[np.bool_]) -> Live | None:
        """The images of ``rows`` (N,) alone; None where images cannot be taken out of the batch."""
        ...

    def array(self, logits: Any, row: int) -> NDArray[np.float32]:
        """(1, K, h, w): the logits of one image of the batch."""
        ...

    def finite(self, logits: Any) -> NDArray[np.bool_]:
        """(N,): whether all logits of an image are finite."""
        ...

    def labels(self, logits: Any, rows: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.uint8]:
        """(n, H, W) at input ``size``, of the n images of ``rows`` (N,)."""
        ...

    def synchronise(self) -> None:
        """Waits until the device is idle."""
        ...
