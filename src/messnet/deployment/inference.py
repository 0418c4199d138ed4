"""Running a MESS instance in its three settings. An exit that is taken is the last thing that runs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from messnet.errors import ModelError
from messnet.exit_policy import Policy, image_confidence, refined_confidence_map, should_exit
from messnet.instance import ExitChoice, Instance
from messnet.network.multi_exit import MultiExitNet, upsample
from messnet.preprocessing import normalise
from messnet.workload import dtype_of

__all__ = ["Result", "Session"]

# For the image confidence of an instance that has no threshold of its own.
_PIXEL_THRESHOLD = 0.9


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """The prediction for one image (H, W)."""

    labels: NDArray[np.uint8]
    """(H, W) class indices."""
    exit_index: int
    """Where the image stopped, from 0, shallow to deep."""
    latency_ms: float
    """From the normalised image on the device to the labels, everything before this exit included."""
    logits: Tensor
    """(1, K, h, w) at the exit's own resolution."""
    output_stride: int
    policy: Policy
    pixel_threshold: float

    @property
    def image_confidence(self) -> float:
        """c_img in [0, 1] at the exit taken, at its pixel threshold; an exit that decides nothing has none, there it
        is the threshold of the last exit that does."""
        size = (self.labels.shape[0], self.labels.shape[1])
        shares = image_confidence(self.logits, self.output_stride, size, [self.pixel_threshold], self.policy)
        return float(shares[0, 0])

    @property
    def confidence_map(self) -> NDArray[np.float32]:
        """(H, W) float32 in [0, 1], after edge refinement; computed when asked for, so that it costs no latency."""
        return self.confidence_maps()[1]

    def confidence_maps(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The confidence map before and after edge refinement, each (H, W) float32 in [0, 1]."""
        size = (self.labels.shape[0], self.labels.shape[1])
        before, after = refined_confidence_map(self.logits, self.output_stride, size, self.policy)
        return _to_input(before, size), _to_input(after, size)


class Session:
    """A multi-exit network with an instance, ready to run.

    The instance's setting is what ``predict`` does: a budgeted instance has one exit, an anytime instance runs all its
    exits and returns the last, an input-dependent instance stops at the first that is confident. ``anytime`` and
    ``budgeted`` run the same exits in the other settings.
    """

    def __init__(
        self,
        net: MultiExitNet,
        instance: Instance,
        *,
        class_names: Sequence[str] = (),
        palette: NDArray[np.uint8] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if not instance.exits:
            raise ModelError("the instance has no exits")
        for choice in instance.exits:
            net.head(choice.exit)  # raises for one that the network does not have
        self.device = torch.device(device)
        self.net = net.eval().to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.instance = instance
        self.policy = Policy.parse(instance.policy)
        thresholds = [choice.pixel_threshold for choice in instance.exits if choice.pixel_threshold is not None]
        self._pixel_threshold = thresholds[-1] if thresholds else _PIXEL_THRESHOLD
        self.class_names = tuple(class_names)
        self.palette = palette

    def predict(self, images: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> list[Result]:
        """Runs each image, (H, W, 3) uint8 RGB of any size, until it may stop. One image at a time.

        Raises DataError when something else than an image comes.
        """
        return [next(self._results(image, self.instance.exits)) for image in images]

    def anytime(self, image: NDArray[np.uint8], *, deadline_ms: float | None = None) -> Iterator[Result]:
        """Ever better results for one image, one per exit of the instance.

        The work for a result is done when it is asked for. No exit is begun once ``deadline_ms`` have passed; the first
        result comes in any case.
        """
        start = time.perf_counter()
        for result in self._results(image, self.instance.exits, every=True):
            yield result
            if deadline_ms is not None and (time.perf_counter() - start) * 1000 >= deadline_ms:
                return

    def budgeted(self, image: NDArray[np.uint8], *, exit_index: int | None = None) -> Result:
        """The one exit at ``exit_index`` (default: the instance's last); no other head runs, nothing past it runs.

        Raises ModelError when the instance has no such exit.
        """
        choices = {choice.exit_index: choice for choice in self.instance.exits}
        if exit_index is None:
            exit_index = self.instance.exits[-1].exit_index
        if exit_index not in choices:
            raise ModelError(f"the instance has no exit {exit_index}; it has {', '.join(map(str, choices))}")
        return next(self._results(image, [choices[exit_index]]))

    def _results(
        self, image: NDArray[np.uint8], choices: Sequence[ExitChoice], *, every: bool = False
    ) -> Iterator[Result]:
        """The result of the exit where the image stops, then those of the exits after it; or of ``every`` exit.

        Segments and heads run as results are asked for. An exit that is passed costs its head and its confidence, but
        no labels at input resolution.
        """
        x = normalise(image)[None].to(self.device, dtype_of(self.net), memory_format=torch.channels_last)
        size = (image.shape[0], image.shape[1])
        self._synchronise()
        spent, start = 0.0, time.perf_counter()
        states = enumerate(self.net.states(x))
        del x  # the first segment's: memory for the later ones
        for choice in choices:
            with torch.inference_mode():
                state = next(state for i, state in states if i == choice.exit_index)
                logits = self.net.logits(choice.exit, state)
                stride = self.net.exit_points[choice.exit_index].output_stride
                stops = every or choice is choices[-1] or self._is_confident(logits, stride, size, choice)
                labels = upsample(logits, size).max(1).indices[0].to(torch.uint8).cpu().numpy() if stops else None
            self._synchronise()
            spent += time.perf_counter() - start
            if labels is not None:
                yield Result(
                    labels=labels,
                    exit_index=choice.exit_index,
                    latency_ms=spent * 1000,
                    logits=logits,
                    output_stride=stride,
                    policy=self.policy,
                    pixel_threshold=self._pixel_threshold if choice.pixel_threshold is None else choice.pixel_threshold,
                )
            start = time.perf_counter()

    def _is_confident(self, logits: Tensor, stride: int, size: tuple[int, int], choice: ExitChoice) -> bool:
        if choice.pixel_threshold is None or choice.image_threshold is None:
            return False
        confidence = image_confidence(logits, stride, size, [choice.pixel_threshold], self.policy)
        return bool(should_exit(confidence[:, 0], choice.image_threshold))

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _to_input(confidence: Tensor, size: tuple[int, int]) -> NDArray[np.float32]:
    full: Any = F.interpolate(confidence[None], size=size, mode="nearest")[0, 0].cpu().numpy()
    return full  # type: ignore[no-any-return]
