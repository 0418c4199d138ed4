"""From an image file to pixels; the same in training and deployment, and without torch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from messnet.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")

# Pillow warns of what is accepted, or refused in words, further on.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# An image whose brightest value is below this is next to black on any screen.
_DIM = 32


def read_image(path: Path) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB, as ``rgb_of``. Raises DataError for a file that is no whole image, and for one of more
    pixels than ``large_images`` allows.
    """
    # Pillow, since OpenCV returns a truncated JPEG partly grey without a word.
    try:
        with Image.open(path) as file:
            return rgb_of(file)
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise DataError(
            f"cannot read {path}: it has more than {limit / 1e6:.0f} million pixels, which a small file made to fill "
            f"the memory has too; cut it into parts, or for a file of your own give `predict` --large-images and tiles"
        ) from error
    except FileNotFoundError as error:
        raise DataError(f"there is no image {path}: expected the name of a file") from error
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder: expected an image; name the files in it") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(unreadable(path, error)) from error


def unreadable(path: Path, error: Exception) -> str:
    """The line that tells of a file at which a decoder stopped with ``error``."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"cannot read {path} ({reason}): it is damaged or no image; copy it again or remove it"


def rgb_of(file: Image.Image) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB, upright as the file's EXIF orientation says; 16-bit grey is scaled to 8 bits.

    Raises ValueError for 32-bit pixels, whose range nobody knows.
    """
    ImageOps.exif_transpose(file, in_place=True)
    if file.mode.startswith("I;16"):  # Pillow would clip it: all but the darkest pixels white
        grey = (np.asarray(file).astype(np.uint32) + 128) // 257
        return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
    if file.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits, expected 8 or 16")
    return np.array(file if file.mode == "RGB" else file.convert("RGB"))


def list_images(folder: Path) -> list[Path]:
    """The image files of a folder by name, hidden ones left out. Raises DataError when there is none."""
    found = [
        file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
    ]
    if not found:
        raise DataError(f"folder {folder} holds no image; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    return sorted(found)


def dimness(brightest: int) -> str | None:
    """A remark on images (uint8) whose largest value is ``brightest``; None where that is as usual.

    Data of 10 or 12 bits in files of 16 come out so: the file does not tell that its values end at 4095.
    """
    if brightest >= _DIM:
        return None
    return (
        f"next to black, no value above {brightest} of 255: 10 or 12 bits in a 16-bit file? Multiply the values so "
        f"that they fill the 16 bits"
    )


@contextmanager
def large_images() -> Iterator[None]:
    """Within the block images may have any number of pixels: for files whose origin is known. Pillow refuses more than
    179 million, since a small file can claim to be huge."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit
