"""From an image to what every network of this package takes; the same in training, evaluation and deployment."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from messnet.errors import DataError

__all__ = ["MEAN", "STD", "normalise"]

MEAN = (0.485, 0.456, 0.406)
"""ImageNet's mean per RGB channel, of values in [0, 1]: the pretrained backbones expect it."""
STD = (0.229, 0.224, 0.225)


def normalise(image: NDArray[Any]) -> Tensor:
    """uint8 RGB (H, W, 3) or (N, H, W, 3) to a new float32 tensor (3, H, W) or (N, 3, H, W): (x / 255 - MEAN) / STD."""
    if image.dtype != np.uint8 or image.ndim not in (3, 4) or image.shape[-1] != 3:
        raise DataError(f"an image is (H, W, 3) or (N, H, W, 3) uint8 RGB, not {image.shape} {image.dtype}: convert it")
    # Planes first, while they are bytes; copies, so read-only arrays are welcome.
    x = torch.tensor(np.ascontiguousarray(np.moveaxis(image, -1, -3))).float()
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (MEAN, STD))
    return x.sub_(mean).div_(std)
