"""From an image to what every network of this package takes; the same in training, evaluation and deployment."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from messnet.errors import DataError

MEAN = (0.485, 0.456, 0.406)
"""ImageNet's mean per RGB channel, of values in [0, 1]: the pretrained backbones expect it."""
STD = (0.229, 0.224, 0.225)

# Per channel, for pixel values in [0, 255]; float32 throughout, as graphs and networks compute.
_SCALED_MEAN, _SCALED_STD = (np.array(values, np.float32).reshape(3, 1, 1) * np.float32(255) for values in (MEAN, STD))


_Map = TypeVar("_Map", NDArray[np.uint8], NDArray[np.float32])


def resized_size(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    """(height, width) of an image of ``size`` whose shorter side becomes ``shorter`` pixels, as torchvision's Resize
    has it: the longer one is rounded down."""
    least = min(size)
    height, width = (length * shorter // least for length in size)
    return height, width


def resize(image: NDArray[np.uint8], shorter: int) -> NDArray[np.uint8]:
    """An image (H, W, 3) uint8 RGB with its shorter side at ``shorter`` pixels, bilinear and antialiased; the image
    itself where it is so already."""
    height, width = resized_size((image.shape[0], image.shape[1]), shorter)
    if (height, width) == image.shape[:2]:
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def resize_map(values: _Map, size: tuple[int, int]) -> _Map:
    """Labels (H, W) uint8, or confidence (H, W) float32, at another ``size`` (height, width): every pixel takes the
    value at its centre, so that no labels are mixed."""
    if values.shape == size:
        return values
    return np.asarray(Image.fromarray(values).resize(size[::-1], Image.Resampling.NEAREST))


def normalise(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 RGB (H, W, 3) or (N, H, W, 3) to a new float32 array (3, H, W) or (N, 3, H, W): (x / 255 - MEAN) / STD.

    It runs on one thread: torch's threads wait for work by spinning, and would take the processors from a runtime that
    begins just then. Raises DataError for anything else than such an image.
    """
    if image.dtype != np.uint8 or image.ndim not in (3, 4) or image.shape[-1] != 3:
        raise DataError(f"an image is (H, W, 3) or (N, H, W, 3) uint8 RGB, not {image.shape} {image.dtype}: convert it")
    # Planes first, while they are bytes.
    planes: NDArray[np.float32] = np.ascontiguousarray(np.moveaxis(image, -1, -3)).astype(np.float32)
    planes -= _SCALED_MEAN
    planes /= _SCALED_STD
    return planes
