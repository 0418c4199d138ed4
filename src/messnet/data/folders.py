"""Images and masks in folders.

Either ``root/SPLIT/images`` and ``root/SPLIT/masks``; or ``root/images`` and ``root/masks`` with ``root/SPLIT.txt``, a
list of names, one a line. ``images/NAME.jpg`` (or .jpeg, .png, .bmp, .webp, .tif, .tiff) belongs to
``masks/NAME.png``: one channel, 8 bits, class indices; of a palette PNG the indices count, not the colours.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from messnet.data import IGNORE_INDEX, SegmentationSample
from messnet.errors import DataError

__all__ = ["FolderDataset", "default_palette"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
LAYOUT = "expected SPLIT/images and SPLIT/masks, or images, masks and SPLIT.txt"

# In the manner of CamVid and Cityscapes: calm, and well apart where classes are few.
COLOURS = (
    (70, 130, 180), (222, 150, 90), (148, 148, 158), (128, 64, 128), (244, 35, 232), (107, 142, 35), (250, 204, 60),
    (190, 153, 153), (0, 0, 142), (220, 20, 60), (0, 150, 136), (152, 251, 152), (102, 102, 156), (255, 120, 80),
    (0, 60, 100), (119, 11, 32), (160, 220, 240), (90, 70, 50), (200, 180, 230), (40, 90, 60),
)  # fmt: skip


def default_palette(num_classes: int) -> NDArray[np.uint8]:
    """(num_classes, 3) distinct RGB colours."""
    colours = list(COLOURS[:num_classes])
    for k in range(len(colours), num_classes):
        # Steps of the golden ratio never return to a hue.
        hue, saturation, value = (k * 0.618034) % 1, (0.75, 0.5, 0.9)[k % 3], (0.9, 0.65, 0.45)[k // 3 % 3]
        red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
        colours.append((round(255 * red), round(255 * green), round(255 * blue)))
    return np.array(colours, np.uint8).reshape(-1, 3)


class FolderDataset:
    """One split of labelled images in folders, a ``SegmentationDataset``.

    Mask values 0 .. K-1 are classes; ``void_index`` (if given) and 255 are ignored; any other is an error. ``palette``:
    (K, 3) RGB. ``cache`` keeps decoded samples in memory (read-only arrays), in each worker its own.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        class_names: Sequence[str],
        void_index: int | None = None,
        palette: NDArray[np.uint8] | None = None,
        cache: bool = False,
    ) -> None:
        self.class_names = tuple(class_names)
        num_classes = len(self.class_names)
        if not 1 <= num_classes <= IGNORE_INDEX:
            raise DataError(f"expected 1 to {IGNORE_INDEX} class names, got {num_classes}")
        if void_index is not None and not num_classes <= void_index <= IGNORE_INDEX:
            raise DataError(
                f"void_index is {num_classes} to {IGNORE_INDEX}, beyond the class indices, not {void_index}"
            )
        self.palette = default_palette(num_classes) if palette is None else np.asarray(palette, np.uint8)
        if self.palette.shape != (num_classes, 3):
            raise DataError(
                f"palette of shape {self.palette.shape}: expected one RGB colour for each of {num_classes} classes"
            )
        self.void_index = void_index
        self._pairs = _find_pairs(Path(root), split)
        self._cache: dict[int, SegmentationSample] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> SegmentationSample:
        index = range(len(self))[index]
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        sample = self._read(*self._pairs[index])
        if self._cache is not None:
            sample.image.flags.writeable = sample.mask.flags.writeable = False
            self._cache[index] = sample
        return sample

    def _read(self, image_path: Path, mask_path: Path) -> SegmentationSample:
        image, mask = _read_image(image_path), _read_mask(mask_path)
        if image.shape[:2] != mask.shape:
            raise DataError(
                f"{mask_path} is {mask.shape[1]} x {mask.shape[0]} pixels but {image_path} is "
                f"{image.shape[1]} x {image.shape[0]} (width x height): a mask has the size of its image"
            )
        num_classes = len(self.class_names)
        found = np.flatnonzero(np.bincount(mask.ravel(), minlength=256))
        wrong = [int(label) for label in found if num_classes <= label and label not in (self.void_index, IGNORE_INDEX)]
        if wrong:
            void = "255" if self.void_index is None else f"{self.void_index} and 255"
            raise DataError(
                f"{mask_path} has the ids {_some(wrong)}: expected 0 to {num_classes - 1} for {num_classes} classes, "
                f"and {void} for void; correct the mask, class_names or void_index"
            )
        if self.void_index is not None:
            mask[mask == self.void_index] = IGNORE_INDEX
        return SegmentationSample(name=image_path.stem, image=image, mask=mask)


def _find_pairs(root: Path, split: str) -> list[tuple[Path, Path]]:
    """(image, mask) paths, by name; in the order of SPLIT.txt where there is one."""
    listing = root / f"{split}.txt"
    if (root / split).is_dir():
        base = root / split
    elif listing.is_file():
        base = root
    elif not root.is_dir():
        raise DataError(f"no folder {root}: {LAYOUT} in it")
    else:
        raise DataError(f"no split {split!r} in {root}: {LAYOUT}")
    for folder in (base / "images", base / "masks"):
        if not folder.is_dir():
            raise DataError(f"no folder {folder}: {LAYOUT} in {root}")

    masks = {path.stem: path for path in sorted((base / "masks").iterdir()) if path.suffix.lower() == ".png"}
    images: dict[str, Path] = {}
    for path in sorted((base / "images").iterdir()):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            if path.stem in images:
                raise DataError(f"{images[path.stem]} and {path.name} share one name: keep one of them")
            images[path.stem] = path

    if base == root:
        lines = (line.strip() for line in listing.read_text(encoding="utf-8").splitlines())
        names = [line for line in lines if line]
        if absent := [name for name in names if name not in images]:
            raise DataError(
                f"{listing} names {_some(absent)}, not in {base / 'images'}: list file names without suffix"
            )
    else:
        # Here a mask without an image is a lost image; with a list it may belong to another split.
        names = list(images)
        if lost := [name for name in masks if name not in images]:
            raise DataError(
                f"no image for {_some([masks[name].name for name in lost])} in {base / 'masks'}: add or remove"
            )
    if not names:
        where = f"in {base / 'images'}" if base != root else f"named in {listing}"
        raise DataError(f"no images {where}: expected files {', '.join(IMAGE_SUFFIXES)}")
    if unlabelled := [name for name in names if name not in masks]:
        raise DataError(f"no mask for {_some(unlabelled)}: expected {base / 'masks' / (unlabelled[0] + '.png')}")
    return [(images[name], masks[name]) for name in names]


def _read_image(path: Path) -> NDArray[np.uint8]:
    """(H, W, 3) RGB."""
    # Pillow, since OpenCV returns a truncated JPEG partly grey without a word.
    try:
        with Image.open(path) as file:
            return np.array(file.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise _unreadable(path, error) from error


def _read_mask(path: Path) -> NDArray[np.uint8]:
    """(H, W) as in the file."""
    try:
        with Image.open(path) as file:
            mode = file.mode
            mask = np.array(file)
    except (OSError, SyntaxError, ValueError) as error:
        raise _unreadable(path, error) from error
    if mode not in ("L", "P"):
        bands = "16 or 32 bits" if mode.startswith(("I", "F")) else "1 bit" if mode == "1" else f"{mode} channels"
        raise DataError(
            f"{path} has {bands}: expected one 8-bit channel of class indices; convert its values to indices"
        )
    return mask


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(f"cannot read {path} ({reason}): it is damaged or no image; copy it again or remove it")


def _some(items: Sequence[object]) -> str:
    """The first few of them, and how many more."""
    shown = ", ".join(map(str, items[:5]))
    return shown if len(items) <= 5 else f"{shown} and {len(items) - 5} more"
