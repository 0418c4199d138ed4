"""Labels and confidence as pictures, and pictures as PNG; NumPy and Pillow only."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from messnet.images.colours import colour_table

# How much of a class's colour lies over the image.
_STRENGTH = 0.55
# Rows that are blended at once, so that float32 copies stay in the cache.
_ROWS = 64


def overlay(image: NDArray[np.uint8], labels: NDArray[np.uint8], palette: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The image (H, W, 3) with its classes (H, W) laid over it in the colours of ``palette`` (K, 3), void in black."""
    colours = colour_table(palette) * np.float32(_STRENGTH)
    grey = np.arange(256, dtype=np.float32) * np.float32(1 - _STRENGTH)
    blended = np.empty(image.shape, np.uint8)
    for start in range(0, len(image), _ROWS):
        part = slice(start, start + _ROWS)
        blend = grey.take(image[part])
        blend += colours.take(labels[part], 0)
        blended[part] = np.rint(blend, out=blend)
    return blended


def coloured(
    labels: NDArray[np.uint8], palette: NDArray[np.uint8], other: tuple[int, int, int] = (128, 128, 128)
) -> NDArray[np.uint8]:
    """Labels (H, W) in the colours of ``palette`` (K, 3) -> (H, W, 3); what is no class in the colour ``other``."""
    picture: NDArray[np.uint8] = colour_table(palette, other).take(labels, 0)
    return picture


def legend(
    size: tuple[int, int],
    class_names: Sequence[str],
    palette: NDArray[np.uint8],
    labels: NDArray[np.uint8] | None = None,
    *,
    wanted: bool | None = True,
) -> NDArray[np.uint8]:
    """A strip (h, width, 3) to go below a picture of ``size`` (height, width): each class's colour in ``palette``
    (K, 3) and its name, in as many rows as they take; of ``labels`` (H, W) only the classes that occur. h is even, as
    videos ask for, and 0 where the strip is not ``wanted``, or, with None, would be higher than half the picture."""
    height, width = size
    shown = range(len(class_names)) if labels is None else np.unique(labels[labels < len(class_names)]).tolist()
    letters = max(12, width // 48)  # of the letters, in pixels: readable when a large picture is shown small
    font, draw = ImageFont.load_default(letters), ImageDraw.Draw(Image.new("RGB", (1, 1)))
    line, places, x, y = 2 * (3 * letters // 4), [], 0, 0
    for k in shown:
        length = round(draw.textlength(class_names[k], font)) + 2 * letters
        if x and x + length > width:
            x, y = 0, y + line
        places.append((x, y, k))
        x += length
    high = y + line + 2 * (letters // 4)
    if wanted is None:
        wanted = 2 * high <= height  # a small picture would be mostly legend
    if not wanted:
        return np.empty((0, width, 3), np.uint8)
    strip = Image.new("RGB", (width, high), "white")
    draw = ImageDraw.Draw(strip)
    for x, y, k in places:
        left, middle = x + letters // 3, y + line // 2 + letters // 4
        box = (left, middle - letters // 3, left + 2 * (letters // 3), middle + letters // 3)
        draw.rectangle(box, tuple(palette[k].tolist()), outline="grey")
        draw.text((left + letters, middle), class_names[k], "black", font, anchor="lm")
    return np.array(strip)


def mask(labels: NDArray[np.uint8], palette: NDArray[np.uint8]) -> Image.Image:
    """Class indices (H, W) as a picture whose palette (K, 3) colours them: as PNG, programs read the indices."""
    picture = Image.fromarray(labels)
    picture.putpalette(palette.flatten().tolist())
    return picture


def confidence_as_grey(confidence: NDArray[np.float32]) -> Image.Image:
    """A confidence map (H, W) in [0, 1] as grey values 0..255, a few rows at a time: for an image of 8000 x 8000 pixels
    each copy in float32 would be 256 MB."""
    grey = np.empty(confidence.shape, np.uint8)
    for start in range(0, len(confidence), _ROWS):
        part = slice(start, start + _ROWS)
        grey[part] = np.rint(confidence[part] * np.float32(255))
    return Image.fromarray(grey)


def as_png(picture: Image.Image, *, compress_level: int = 6) -> bytes:
    """The bytes of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=compress_level)
    return buffer.getvalue()
