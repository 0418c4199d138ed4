"""What a data set holds and what is wrong with it, from reading every sample once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from messnet.data import IGNORE_INDEX, SegmentationDataset, SegmentationSample
from messnet.errors import DataError

__all__ = ["DatasetReport", "check_dataset"]


@dataclass(frozen=True, kw_only=True)
class DatasetReport:
    """One split. Shares are of pixels, in [0, 1], over the samples without a problem."""

    num_images: int
    """All of them, with or without a problem."""
    sizes: dict[str, int]
    """Images per size "HEIGHTxWIDTH", the most frequent first."""
    class_share: dict[str, float]
    """Of the labelled pixels; sums to 1 unless there are none."""
    void_share: float
    """Of all pixels."""
    unlabelled: tuple[str, ...]
    """Names of images that are void everywhere."""
    problems: tuple[str, ...]
    """One line each; such samples count nowhere else."""

    @property
    def is_usable(self) -> bool:
        return not self.problems and self.num_images > 0

    def to_record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"unlabelled": list(self.unlabelled), "problems": list(self.problems)}

    def to_text(self) -> str:
        sizes = ", ".join(f"{size} ({count})" for size, count in list(self.sizes.items())[:5])
        more = f" and {len(self.sizes) - 5} more sizes" if len(self.sizes) > 5 else ""
        width = max(map(len, (*self.class_share, "void")))
        lines = [f"{self.num_images} images, height x width: {sizes or 'none readable'}{more}"]
        for name, share in self.class_share.items():
            absent = "" if share else "  in no image"
            lines.append(f"  {name:<{width}} {share:7.2%}  {'#' * round(40 * share)}{absent}".rstrip())
        lines.append(f"  {'void':<{width}} {self.void_share:7.2%}  of all pixels")
        if self.unlabelled:
            more = " ..." if len(self.unlabelled) > 5 else ""
            lines.append(f"{len(self.unlabelled)} images without any label: {', '.join(self.unlabelled[:5])}{more}")
        lines.append(f"{len(self.problems)} problems" if self.problems else "no problems")
        lines += [f"  {problem}" for problem in self.problems]
        return "\n".join(lines)


def check_dataset(
    dataset: SegmentationDataset, *, progress: Callable[[Iterable[int]], Iterable[int]] = iter
) -> DatasetReport:
    """Read every sample; a DataError becomes a line of the report. ``progress`` wraps the indices, as tqdm does."""
    num_classes = len(dataset.class_names)
    sizes: Counter[str] = Counter()
    pixels = np.zeros(IGNORE_INDEX + 1, np.int64)
    unlabelled: list[str] = []
    problems: list[str] = []
    if np.shape(dataset.palette) != (num_classes, 3):
        problems.append(f"palette of shape {np.shape(dataset.palette)}: expected ({num_classes}, 3)")
    for index in progress(range(len(dataset))):
        try:
            sample = dataset[index]
            _expect_sound(sample, num_classes)
        except DataError as error:
            problems.append(str(error))
            continue
        counts = np.bincount(sample.mask.ravel(), minlength=len(pixels))
        pixels += counts
        sizes[f"{sample.mask.shape[0]}x{sample.mask.shape[1]}"] += 1
        if counts[IGNORE_INDEX] == sample.mask.size:
            unlabelled.append(sample.name)

    labelled = pixels[:num_classes]
    shares = labelled / max(1, labelled.sum())
    return DatasetReport(
        num_images=len(dataset),
        sizes=dict(sizes.most_common()),
        class_share=dict(zip(dataset.class_names, shares.tolist(), strict=True)),
        void_share=float(pixels[IGNORE_INDEX] / max(1, pixels.sum())),
        unlabelled=tuple(unlabelled),
        problems=tuple(problems),
    )


def _expect_sound(sample: SegmentationSample, num_classes: int) -> None:
    """Raises DataError where a sample is not what SegmentationSample promises: a user's data set may do anything."""
    image, mask = np.asarray(sample.image), np.asarray(sample.mask)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise DataError(f"{sample.name}: expected an image (H, W, 3) uint8, got {image.shape} {image.dtype}")
    if mask.dtype != np.uint8 or mask.shape != image.shape[:2]:
        raise DataError(f"{sample.name}: expected a mask {image.shape[:2]} uint8, got {mask.shape} {mask.dtype}")
    wrong = np.unique(mask[(mask >= num_classes) & (mask != IGNORE_INDEX)]).tolist()
    if wrong:
        raise DataError(f"{sample.name}: expected labels 0 to {num_classes - 1} or {IGNORE_INDEX}, got {wrong[:5]}")
