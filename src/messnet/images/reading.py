"""From an opened image file to pixels; the same in training and deployment, and without torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

__all__ = ["rgb_of"]


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
