"""Images to what graphs take, on one thread and without torch.

torch's threads wait for work by spinning, and would take the processors from the runtime that begins just then.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from messnet.images.preprocessing import normalise

__all__ = ["normalised_planes"]


def normalised_planes(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(N, H, W, 3) uint8 RGB -> (N, 3, H, W) float32: ``preprocessing.normalise``, bit for bit."""
    planes = np.empty((len(images), 3, *images.shape[1:3]), np.float32)
    _look_up(images, _table(), planes)
    return planes


@cache
def _table() -> NDArray[np.float32]:
    """(3, 256): what becomes of each value of each channel."""
    values = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, 2)
    table: NDArray[np.float32] = normalise(values).numpy()[:, 0]
    return table


def _look_up_all(images: Any, table: Any, planes: Any) -> None:
    for n in range(planes.shape[0]):
        for y in range(planes.shape[2]):
            for c in range(3):
                for x in range(planes.shape[3]):
                    planes[n, c, y, x] = table[c, images[n, y, x, c]]


_look_up: Any = numba.njit(cache=True, nogil=True)(_look_up_all)
