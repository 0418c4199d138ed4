"""Labelled images: what a data set is, and the built-in ones."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from messnet.images.preprocessing import resize, resize_map

__all__ = ["IGNORE_INDEX", "SegmentationDataset", "SegmentationSample"]

IGNORE_INDEX = 255
"""The label of pixels that count nowhere, in every mask that this package hands out."""


@dataclass(frozen=True, kw_only=True)
class SegmentationSample:
    """One labelled image. ``image`` (H, W, 3) uint8 RGB; ``mask`` (H, W) uint8 class indices or IGNORE_INDEX;
    ``difficulty`` in [0, 1], NaN where unknown; ``group`` names what the image has in common with others (a drive, a
    patient, a scene, a video), "" where it stands for itself."""

    name: str
    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    difficulty: float = field(default=float("nan"))
    group: str = ""

    def resized(self, shorter: int) -> SegmentationSample:
        """With ``shorter`` pixels on the shorter side, as sessions see an image: ``messnet.images.preprocessing``."""
        image = resize(self.image, shorter)
        return replace(self, image=image, mask=resize_map(self.mask, (image.shape[0], image.shape[1])))


class SegmentationDataset(Protocol):
    """One split of labelled images; also what a user's ``module:function`` returns."""

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def palette(self) -> NDArray[np.uint8]:
        """(K, 3) RGB."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> SegmentationSample: ...


@dataclass(frozen=True)
class Wrapped:
    """What stays as it is where only the samples of a data set change."""

    dataset: SegmentationDataset

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.dataset.class_names

    @property
    def palette(self) -> NDArray[np.uint8]:
        return self.dataset.palette

    def __len__(self) -> int:
        return len(self.dataset)
