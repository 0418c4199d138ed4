"""Data sets that are objects of the user's own: anything with a length that gives images and masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from messnet.data import IGNORE_INDEX, SegmentationSample
from messnet.data.image_files import expect_class_names
from messnet.errors import DataError
from messnet.images.colours import default_palette
from messnet.images.inputs import as_image

Pair: TypeAlias = "SegmentationSample | Mapping[str, object] | Sequence[object]"
"""An image (``ImageLike``) and its mask (H, W) of integers, a class index or IGNORE_INDEX each: as (image, mask), under
"image" and "mask", or as a SegmentationSample."""


class PairSource(Protocol):
    """A list of pairs, a torch Dataset, or anything else with a length and places."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Pair: ...


@dataclass(frozen=True)
class ObjectDataset:
    """A user's object as a ``SegmentationDataset``: every image and mask is checked as it is read."""

    data: PairSource
    class_names: tuple[str, ...]
    palette: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> SegmentationSample:
        """Raises DataError for what is no image with a mask of its size."""
        index = range(len(self))[index]
        given = self.data[index]
        sample = given if isinstance(given, SegmentationSample) else None
        image: object
        mask: object
        match given:
            case SegmentationSample(image=image, mask=mask) | {"image": image, "mask": mask} | [image, mask]:
                pass
            case _:
                raise DataError(
                    f"item {index} of the data set is a {type(given).__name__}: expected (image, mask), or 'image' and "
                    "'mask' in a dictionary"
                )
        try:
            pixels, labels = as_image(image), self._labels(mask)  # type: ignore[arg-type]  # it says what is no image
        except DataError as error:
            raise DataError(f"item {index} of the data set: {error}") from error
        if labels.shape != pixels.shape[:2]:
            raise DataError(
                f"item {index} of the data set has an image of {pixels.shape[:2]} and a mask of {labels.shape} "
                "(height, width): a mask has the size of its image"
            )
        whole = sample or SegmentationSample(name=str(index), image=pixels, mask=labels)
        return replace(whole, image=pixels, mask=labels)

    def _labels(self, mask: object) -> NDArray[np.uint8]:
        values = np.asarray(mask)  # Pillow's pictures and tensors on the processor too
        if values.ndim != 2 or values.dtype.kind not in "iu":
            raise DataError(f"a mask is (H, W) of integers, not {values.shape} {values.dtype}")
        count = len(self.class_names)
        if (wrong := values[((values < 0) | (values >= count)) & (values != IGNORE_INDEX)]).size:
            raise DataError(f"a mask holds {wrong[0]}: expected 0 to {count - 1}, or {IGNORE_INDEX} to ignore a pixel")
        return values.astype(np.uint8)


def as_dataset(data: PairSource, num_classes: int) -> ObjectDataset:
    """``data`` with checks, as training and evaluation take it. Its ``class_names`` and ``palette`` (K, 3) RGB are
    taken where it has them. Raises DataError for what has no items, or names another number of classes."""
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        batches = getattr(data, "dataset", None) is not None
        raise DataError(
            f"a data set has a length and items data[i], each (image, mask); a {type(data).__name__} has not: "
            + ("give its .dataset, messnet makes batches itself" if batches else "give a list or a torch Dataset")
        )
    if len(data) == 0:
        raise DataError("the data set is empty: expected one image at least")
    names = expect_class_names(getattr(data, "class_names", None) or [f"class {k}" for k in range(num_classes)])
    if len(names) != num_classes:
        raise DataError(f"the data set names {len(names)} classes, and the network tells {num_classes} apart")
    palette = getattr(data, "palette", None)
    return ObjectDataset(
        data, names, default_palette(num_classes) if palette is None else np.asarray(palette, np.uint8)
    )
