"""Running instances side by side on the same images: real stops, measured milliseconds, and pictures of all exits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from messnet.deployment.session import Result, Session
from messnet.records.iou import confusion_matrix, counts_of, mean_iou
from messnet.records.measurements import Gallery

WARM_UP_IMAGES = 3


@dataclass
class Running:
    """What one session did, image by image."""

    exit_taken: list[int] = field(default_factory=list)
    image_confidence: list[float] = field(default_factory=list)
    latency_ms: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    """Share of wrong pixels per image; NaN without a labelled pixel."""
    confusion: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    """(K, K): pixels of all images by (label, prediction)."""

    def add(self, result: Result, confusion: NDArray[np.int64]) -> None:
        self.exit_taken.append(result.exit_index)
        self.image_confidence.append(result.image_confidence)
        self.latency_ms.append(result.latency_ms)
        labelled = int(confusion.sum())
        self.errors.append(1 - float(np.trace(confusion)) / labelled if labelled else float("nan"))
        self.confusion = self.confusion + confusion if self.confusion.size else confusion

    def miou(self) -> float:
        return mean_iou(*counts_of(self.confusion))


def run_side_by_side(
    sessions: Sequence[Session], samples: Iterable[tuple[NDArray[np.uint8], NDArray[np.uint8]]], num_classes: int
) -> list[Running]:
    """Runs every session on every (image (H, W, 3), mask (H, W)), both uint8.

    Image by image, the sessions in turn and each image beginning with another one, so that a busy machine or a warm
    cache favours none. The first images are run once before, unmeasured.
    """
    runnings = [Running() for _ in sessions]
    for v, (image, mask) in enumerate(tqdm(samples, desc="measure", unit="img", mininterval=2, dynamic_ncols=True)):
        if v < WARM_UP_IMAGES:
            for session in sessions:
                session.predict([image])
        for turn in range(len(sessions)):
            s = (v + turn) % len(sessions)  # whoever comes first finds the caches cold
            result = sessions[s].predict([image])[0]
            runnings[s].add(result, confusion_matrix(result.labels, mask, num_classes))
    return runnings


def make_gallery(
    session: Session,
    samples: Sequence[tuple[str, NDArray[np.uint8], NDArray[np.uint8]]],
    exit_taken: Sequence[int],
    worst: Sequence[str] = (),
) -> Gallery:
    """Each (name, image, mask), all of one size, through every exit of the session's instance; ``worst`` are the names
    of those that it gets most wrong."""
    results = [list(session.anytime(image)) for _, image, _ in samples]
    maps = [[result.confidence_maps() for result in row] for row in results]
    assert session.palette is not None
    return Gallery(
        image_names=tuple(name for name, _, _ in samples),
        class_names=session.class_names,
        exits=tuple(choice.exit for choice in session.instance.exits),
        palette=session.palette,
        images=np.stack([image for _, image, _ in samples]),
        masks=np.stack([mask for _, _, mask in samples]),
        predictions=np.stack([[result.labels for result in row] for row in results]),
        confidence=np.stack([[before for before, _ in row] for row in maps]).astype(np.float16),
        refined=np.stack([[after for _, after in row] for row in maps]).astype(np.float16),
        image_confidence=np.array([[result.image_confidence for result in row] for row in results], np.float32),
        exit_taken=np.array(exit_taken, np.int64),
        worst=tuple(worst),
    )
