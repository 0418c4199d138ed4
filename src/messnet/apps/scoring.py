"""What is deployed on labelled images: mIoU, IoU by class, what is taken for what, exits and milliseconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from messnet.deployment.session import Session
from messnet.deployment.side_by_side import run_side_by_side
from messnet.records.iou import class_iou, counts_of
from messnet.records.measurements import known


@dataclass(frozen=True, kw_only=True)
class Score:
    """One instance on labelled images, one image at a time, every stop a real one. K classes."""

    instance: str
    runtime: str
    precision: str
    num_images: int
    miou: float | None
    """In [0, 1], over the classes that occur in labels or predictions; None where no pixel is labelled."""
    iou: dict[str, float | None]
    """By class, in [0, 1]; None of a class that neither labels nor predictions have."""
    confusion: list[list[int]]
    """Pixels by (label, prediction), K x K."""
    exits: dict[int, int]
    """Images by the exit_index where they stopped."""
    latency_ms: float
    """Median over the images, from the normalised image on the device to labels at input resolution."""
    latency_p95_ms: float


def score_sessions(
    sessions: Sequence[Session], samples: Iterable[tuple[NDArray[np.uint8], NDArray[np.uint8]]]
) -> list[Score]:
    """Runs every session on every (image (H, W, 3), mask (H, W)), both uint8; mask values past the classes count
    nowhere. The sessions have the same classes."""
    class_names = sessions[0].class_names
    scores = []
    for session, running in zip(sessions, run_side_by_side(sessions, samples, len(class_names)), strict=True):
        iou = known(class_iou(*counts_of(running.confusion)))
        occurring = [value for value in iou if value is not None]
        scores.append(
            Score(
                instance=session.instance.name,
                runtime=session.runtime,
                precision=session.precision,
                num_images=len(running.exit_taken),
                miou=float(np.mean(occurring)) if occurring else None,
                iou=dict(zip(class_names, iou, strict=True)),
                confusion=running.confusion.tolist(),
                exits=dict(sorted(Counter(running.exit_taken).items())),
                latency_ms=float(np.median(running.latency_ms)),
                latency_p95_ms=float(np.percentile(running.latency_ms, 95)),
            )
        )
    return scores
