"""From an image to what every network of this package takes; the same in training, evaluation and deployment."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from messnet.errors import DataError, RecipeError

MEAN = (0.485, 0.456, 0.406)
"""ImageNet's mean per RGB channel, of values in [0, 1]: the pretrained backbones expect it."""
STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """What pixels (R, G, B) in [0, 255] become before the network sees them: (x / 255 - mean) / std.

    The default is ImageNet's. A network that wants values in [-1, 1] has mean and std 0.5, one that wants [0, 1] has
    mean 0 and std 1, one that wants the bytes themselves mean 0 and std 1 / 255 = 0.00392156862745098.
    """

    mean: tuple[float, float, float] = MEAN
    """Per channel, in [0, 1]."""
    std: tuple[float, float, float] = STD
    """Per channel, in (0, 1]."""

    def __post_init__(self) -> None:
        if np.shape(self.mean) != (3,) or np.shape(self.std) != (3,):
            raise RecipeError(
                f"normalisation: mean {self.mean} and std {self.std} must be three values each, of R, G and B"
            )
        if not all(0 <= value <= 1 for value in self.mean) or not all(1e-6 <= value <= 1 for value in self.std):
            raise RecipeError(
                f"normalisation: mean {list(self.mean)} and std {list(self.std)} must be those of pixel values in "
                "[0, 1]: divide yours by 255 where they are of values in [0, 255]"
            )


IMAGENET = Normalisation()

LARGE = 2
"""An image of more than so many times the pixels that a network was trained on shows objects at sizes that the network
does not know."""

_Map = TypeVar("_Map", NDArray[np.uint8], NDArray[np.float32])


def resized_size(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    """(height, width) of an image of ``size`` whose shorter side becomes ``shorter`` pixels, as torchvision's Resize
    has it: the longer one is rounded down."""
    least = min(size)
    height, width = (length * shorter // least for length in size)
    return height, width


def trained_size(size: tuple[int, int], trained: tuple[int, int]) -> tuple[int, int]:
    """(height, width) at which a network sees an image of ``size`` that was trained on images of size ``trained``: an
    image of more than ``LARGE`` times their pixels is scaled down to as many as they have, in proportion."""
    if math.prod(size) <= LARGE * math.prod(trained):
        return size
    scale = math.sqrt(math.prod(trained) / math.prod(size))
    height, width = (max(1, round(scale * length)) for length in size)
    return height, width


def resize(image: NDArray[np.uint8], shorter: int) -> NDArray[np.uint8]:
    """An image (H, W, 3) uint8 RGB with its shorter side at ``shorter`` pixels, as ``resize_to`` makes it."""
    return resize_to(image, resized_size((image.shape[0], image.shape[1]), shorter))


def resize_to(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """An image (H, W, 3) uint8 RGB at another ``size`` (height, width), bilinear and antialiased; the image itself
    where it is so already."""
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


def resize_map(values: _Map, size: tuple[int, int]) -> _Map:
    """Labels (H, W) uint8, or confidence (H, W) float32, at another ``size`` (height, width): every pixel takes the
    value at its centre, so that no labels are mixed."""
    if values.shape == size:
        return values
    return np.asarray(Image.fromarray(values).resize(size[::-1], Image.Resampling.NEAREST))


def normalise(image: NDArray[np.uint8], normalisation: Normalisation = IMAGENET) -> NDArray[np.float32]:
    """uint8 RGB (H, W, 3) or (N, H, W, 3) to a new float32 array (3, H, W) or (N, 3, H, W): (x / 255 - mean) / std.

    It runs on one thread: torch's threads wait for work by spinning, and would take the processors from a runtime that
    begins just then. Raises DataError for anything else than such an image.
    """
    if image.dtype != np.uint8 or image.ndim not in (3, 4) or image.shape[-1] != 3:
        raise DataError(f"an image is (H, W, 3) or (N, H, W, 3) uint8 RGB, not {image.shape} {image.dtype}: convert it")
    # Planes first, while they are bytes.
    planes: NDArray[np.float32] = np.ascontiguousarray(np.moveaxis(image, -1, -3)).astype(np.float32)
    # For values in [0, 255]; float32 throughout, as graphs and networks compute.
    for step, values in ((np.subtract, normalisation.mean), (np.divide, normalisation.std)):
        step(planes, np.array(values, np.float32).reshape(3, 1, 1) * np.float32(255), out=planes)
    return planes
