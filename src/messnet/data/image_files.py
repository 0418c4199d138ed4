"""Labelled images in files: what all formats have in common.

A format lists pairs of an image and its label and says what the values of a label file mean; reading and its errors
are here, so that ``check-data`` can say for every format alike what is wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from messnet.data import IGNORE_INDEX, SegmentationSample
from messnet.data.listings import composed, some
from messnet.errors import DataError
from messnet.images import reading

ProblemKind = Literal["unreadable file", "mask of another size", "mask of another format", "unknown ids"]
Label = TypeVar("Label")


class SampleError(DataError):
    """One labelled image is not in order. ``kind`` lets a report count alike ones; ``values`` are the ids in the mask
    that are no class."""

    def __init__(self, message: str, *, kind: ProblemKind, values: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.kind = kind
        self.values = tuple(values)


class FileDataset(Generic[Label]):
    """One split of labelled images in files, a ``SegmentationDataset``. Opening reads no image.

    ``pairs``: image files and what ``read_label`` makes a mask (H, W) uint8 of; it is given (H, W) of the image.
    ``palette``: (K, 3) RGB. ``cache`` keeps decoded samples in memory (read-only arrays), in each worker its own.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Path, Label]],
        read_label: Callable[[Label, tuple[int, int]], NDArray[np.uint8]],
        *,
        class_names: Sequence[str],
        palette: NDArray[np.uint8],
        cache: bool = False,
    ) -> None:
        self.class_names = expect_class_names(class_names)
        self.palette = np.asarray(palette, np.uint8)
        num_classes = len(self.class_names)
        if self.palette.shape != (num_classes, 3):
            raise DataError(
                f"palette of shape {self.palette.shape}: expected one RGB colour for each of {num_classes} classes"
            )
        self._pairs = tuple(pairs)
        self._read_label = read_label
        self._cache: dict[int, SegmentationSample] | None = {} if cache else None
        self.groups: tuple[str, ...] = ()
        """The group of each image, in order; empty where none is known."""
        self.left_out: tuple[str, ...] = ()
        """Names of images that are not in this split because they have no mask."""
        self.resize: int | None = None
        """Pixels of the shorter side that images and masks are brought to; None: as they are."""

    def __len__(self) -> int:
        return len(self._pairs)

    @property
    def image_paths(self) -> tuple[Path, ...]:
        return tuple(path for path, _ in self._pairs)

    @property
    def names(self) -> tuple[str, ...]:
        """The names that samples have, known without reading them."""
        return tuple(composed(path.stem) for path, _ in self._pairs)

    def __getitem__(self, index: int) -> SegmentationSample:
        """Raises SampleError for a file that cannot be read, a mask of another size, or ids that are no class."""
        index = range(len(self))[index]
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        path, label = self._pairs[index]
        image = read_image(path)
        try:
            mask = self._read_label(label, (image.shape[0], image.shape[1]))
        except SampleError as error:
            if not isinstance(label, Path):  # annotations have no file of their own that the message would name
                raise SampleError(f"{path}: {error}", kind=error.kind, values=error.values) from error
            # Said first, whatever else is wrong: a mask that was resized with smooth edges has foreign ids, too.
            _expect_size(path, image, label, _size_of(label))
            raise
        _expect_size(path, image, label, (mask.shape[0], mask.shape[1]))
        group = self.groups[index] if self.groups else ""
        sample = SegmentationSample(name=composed(path.stem), image=image, mask=mask, group=group)
        if self.resize is not None:
            sample = sample.resized(self.resize)
        if self._cache is not None:
            # Whoever changed a kept array would change it for every later epoch.
            sample.image.flags.writeable = sample.mask.flags.writeable = False
            self._cache[index] = sample
        return sample

    def header(self, index: int) -> FileHeader:
        """Size and form of an image and its label, from the beginnings of their files: no pixel is read but those of
        16 bits."""
        path, label = self._pairs[index]
        size, image_format, brightest = None, "", None
        try:
            with Image.open(path) as file:
                height, width = file.height, file.width
                # Orientations from 5 on lie on their side.
                size = (width, height) if file.getexif().get(ORIENTATION, 1) >= 5 else (height, width)
                image_format = _mode_name(file.mode)
                if file.mode.startswith("I;16"):
                    brightest = int(np.asarray(file).max(initial=0))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            pass  # reading the sample says why
        return FileHeader(size, image_format, _label_format(label), brightest)


def _expect_size(path: Path, image: NDArray[np.uint8], label: object, size: tuple[int, int] | None) -> None:
    """Raises SampleError where the mask ``label``, (height, width) ``size``, is not as large as its image."""
    if size is not None and size != image.shape[:2]:
        raise SampleError(
            f"{label} is {size[1]} x {size[0]} pixels but {path} is {image.shape[1]} x {image.shape[0]} "
            "(width x height): a mask has the size of its image",
            kind="mask of another size",
        )


def _size_of(mask: Path) -> tuple[int, int] | None:
    """(height, width), from the beginning of the file; None where it cannot be read."""
    try:
        with Image.open(mask) as file:
            return file.height, file.width
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


@dataclass(frozen=True)
class FileHeader:
    """Size and form of one image and its label, from the beginnings of their files."""

    size: tuple[int, int] | None
    """(height, width) of the upright image; None where it cannot be read."""
    image_format: str
    """How pixels are stored, in words; empty where they cannot be read."""
    label_format: str
    """How the label is stored, in words."""
    brightest: int | None
    """The largest value of an image of 16 bits, None of others."""


ORIENTATION = 0x0112
"""EXIF's tag for how an image is to be turned."""
IMAGE_MODES = {
    "1": "1 bit",
    "L": "grey",
    "LA": "grey with transparency",
    "P": "palette",
    "RGB": "RGB",
    "RGBA": "RGB with transparency",
    "CMYK": "CMYK",
    "I;16": "16-bit grey",
}
LABEL_MODES = {
    "L": "8-bit indices",
    "P": "palette PNG: the indices count, the colours are for the eye",
    "RGB": "RGB colours",
    "RGBA": "RGB colours with transparency",
    "1": "1 bit",
    "I;16": "16 bits",
    "I": "16 or 32 bits",
}


def _mode_name(mode: str) -> str:
    return IMAGE_MODES["I;16"] if mode.startswith("I;16") else IMAGE_MODES.get(mode, mode)


def _label_format(label: object) -> str:
    if not isinstance(label, Path):
        return "annotations, drawn on reading"
    if label.suffix == ".mat":
        return "MATLAB"
    try:
        with Image.open(label) as file:
            return LABEL_MODES.get(file.mode, file.mode)
    except (OSError, SyntaxError, ValueError):
        return "unreadable"


@dataclass(frozen=True)
class MaskReader:
    """Reads mask files whose values mean ``classes``: value -> class index or IGNORE_INDEX; any other is an error.

    Values up to 255 are looked for in one 8-bit channel, indices where it is a palette PNG; with any larger, all are
    colours 0xRRGGBB and the mask an RGB picture. ``expected`` ends the sentence "expected ..." of that error.
    """

    classes: Mapping[int, int]
    expected: str
    _table: NDArray[np.int16] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        table = np.full(256, -1, np.int16)
        if not self.is_colour:
            for value, label in self.classes.items():
                table[value] = label
        object.__setattr__(self, "_table", table)  # the class is frozen

    @property
    def is_colour(self) -> bool:
        return max(self.classes) > 255

    def __call__(self, path: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
        """(H, W) class indices or IGNORE_INDEX."""
        values = read_colours(path) if self.is_colour else read_indices(path)
        return self.to_classes(values, str(path))

    def to_classes(self, values: NDArray[np.uint8] | NDArray[np.int32], where: str) -> NDArray[np.uint8]:
        if values.dtype == np.uint8:
            # A histogram finds the values that occur in a tenth of the time that sorting all pixels takes.
            found = np.flatnonzero(Image.fromarray(values).histogram())
            labels = self._table[found]
        else:
            found, places = np.unique(values, return_inverse=True)
            labels = np.array([self.classes.get(int(value), -1) for value in found], np.int16)
        if (labels < 0).any():
            wrong = found[labels < 0].tolist()
            shown = [mask_value(value, is_colour=self.is_colour) for value in wrong]
            raise SampleError(
                f"{where} has the {'colours' if self.is_colour else 'ids'} {some(shown)}: expected {self.expected}",
                kind="unknown ids",
                values=wrong,
            )
        if values.dtype == np.uint8:
            # No -1 is looked up any more, which uint8 would turn into 255, void.
            return self._table.astype(np.uint8)[values]
        return labels.astype(np.uint8)[places].reshape(values.shape)


def mask_value(value: int, *, is_colour: bool) -> str:
    """A value of a mask as recipes and messages say it."""
    return f"0x{value:06x}" if is_colour else str(value)


def expect_class_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names of a data set's classes, 2 to 255 different ones. Raises DataError that says what to do otherwise."""
    names = tuple(names)
    if len(names) == 1:
        # With one class every pixel is right whatever the network says: 100 % mIoU, and nothing learnt.
        raise DataError(
            f"{names[0]!r} is the only class, and a network learns to tell classes apart: name what is around it too, "
            f"such as class_names: [background, {names[0]}], and for black and white masks say mask_values: [0, 255]"
        )
    if not 2 <= len(names) <= IGNORE_INDEX:
        raise DataError(f"expected 2 to {IGNORE_INDEX} class names, got {len(names)}")
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise DataError(f"class names are words, not {some(wrong)}: put them in quotes")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{some(twice)} is the name of more than one class: give each class a name of its own")
    return names


def read_image(path: Path) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB, as ``images.reading.read_image``. Raises SampleError for a file that is no whole image."""
    try:
        return reading.read_image(path)
    except DataError as error:
        raise SampleError(str(error), kind="unreadable file") from error


def unreadable(path: Path, error: Exception) -> SampleError:
    return SampleError(reading.unreadable(path, error), kind="unreadable file")


def read_indices(path: Path) -> NDArray[np.uint8]:
    """(H, W) as in the file."""
    try:
        with Image.open(path) as file:
            mode = file.mode
            mask = np.array(file)
    except (OSError, SyntaxError, ValueError) as error:
        raise unreadable(path, error) from error
    if mode in ("L", "P"):
        return mask
    if mode in ("RGB", "RGBA"):
        colours = [f"0x{colour:06x}" for colour in np.unique(_packed(mask)).tolist()]
        raise SampleError(
            f"{path} has {mode} channels ({len(colours)} colours: {some(colours)}): expected one 8-bit channel of "
            "class indices; convert its values to indices, or list the colour of each class as mask_values",
            kind="mask of another format",
        )
    bands = "16 or 32 bits" if mode.startswith(("I", "F")) else "1 bit" if mode == "1" else f"{mode} channels"
    raise SampleError(
        f"{path} has {bands}: expected one 8-bit channel of class indices; convert its values to indices",
        kind="mask of another format",
    )


def read_colours(path: Path) -> NDArray[np.int32]:
    """(H, W) of 0xRRGGBB."""
    try:
        with Image.open(path) as file:
            mode = file.mode
            colours = np.array(file.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise unreadable(path, error) from error
    if mode not in ("RGB", "RGBA", "P"):
        raise SampleError(
            f"{path} has the format {mode}: expected RGB, for mask_values are colours 0xRRGGBB",
            kind="mask of another format",
        )
    return _packed(colours)


def _packed(colours: NDArray[np.uint8]) -> NDArray[np.int32]:
    red, green, blue = np.moveaxis(colours[..., :3].astype(np.int32), -1, 0)
    return np.asarray((red << 16) | (green << 8) | blue)
