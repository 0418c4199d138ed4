"""From logits to labels at the input's size, on the processor, without making the upsampled logits.

A map of 11 classes at 360 x 480 is 7.6 MB, which runtimes write, read and reduce in two or three passes. Here a few
rows of one class at a time stay in the cache. A compiled pass gives the same labels in a tenth of NumPy's time; it is
used once something has loaded it, for numba takes longer to import than a hundred images to label.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

_COMPILED = "messnet.policy.compiled"
# Rows of an output map that NumPy works on at once: 64 x 2048 float32 are half a megabyte.
_ROWS = 64

Sources = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]


@cache
def load_compiled() -> bool:
    """Loads the compiled passes of labels and confidence, about a second; False where numba is not installed.

    Worth it before a hundred images or more: results are the same.
    """
    if find_spec("numba") is None:
        return False
    import_module(_COMPILED)
    return True


def loaded_compiled() -> ModuleType | None:
    """The module of the compiled passes if it has been loaded."""
    return sys.modules.get(_COMPILED)


def upsampled_labels(logits: NDArray[np.float32], size: tuple[int, int], *, threads: int = 1) -> NDArray[np.uint8]:
    """argmax over the classes of the bilinearly upsampled logits (align_corners=False): (N, K, h, w), K <= 256 ->
    (N, H, W) uint8 at ``size``. Of equal logits the first class counts.

    As ``upsample(logits, size).argmax(1)`` but for rounding, which decides where two classes are equal to six digits.
    """
    height, width = size
    labels = np.empty((len(logits), height, width), np.uint8)
    above, below, down = _sources(logits.shape[2], height)
    columns = _sources(logits.shape[3], width)
    logits = np.ascontiguousarray(logits, np.float32)
    compiled = loaded_compiled()
    fill_rows = _fill_rows if compiled is None else compiled.fill_rows

    def fill(part: slice) -> None:
        for one, found in zip(logits, labels, strict=True):
            fill_rows(one, above[part], below[part], down[part], *columns, found[part])

    # A strip of rows for each thread: the first is this thread's own, which would only wait otherwise.
    first, *others = (slice(*ends) for ends in pairwise(np.linspace(0, height, threads + 1).astype(int).tolist()))
    running = [_pool(os.getpid()).submit(fill, part) for part in others]
    fill(first)
    for one in running:
        one.result()
    return labels


def first_largest(logits: NDArray[np.float32]) -> NDArray[np.uint8]:
    """argmax over the classes, the first of equals: (N, K, h, w), K <= 256 -> (N, h, w)."""
    best, labels = logits[:, 0].copy(), np.zeros((len(logits), *logits.shape[2:]), np.uint8)
    for k in range(1, logits.shape[1]):
        _take_larger(logits[:, k], k, best, labels)
    return labels


def _take_larger(value: NDArray[np.float32], k: int, best: NDArray[np.float32], labels: NDArray[np.uint8]) -> None:
    """Where class ``k`` is above the best before it, it becomes label and best. Labels ascend, so the larger of two is
    the later: several times faster than to assign under a mask."""
    np.maximum(labels, (value > best).view(np.uint8) * np.uint8(k), out=labels)
    np.maximum(best, value, out=best)


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """One for each process: threads do not survive a fork."""
    return ThreadPoolExecutor(os.cpu_count(), "labels")


def _sources(length: int, upsampled: int) -> Sources:
    """For each place along one axis: the two it lies between, and the weight of the second."""
    scale = np.float32(length / upsampled)
    # A pixel's centre lies half a pixel in, on both maps; before the first centre the first pixel repeats.
    place = np.maximum((np.arange(upsampled, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5), 0)
    first = np.minimum(place.astype(np.int64), length - 1)
    return first, np.minimum(first + 1, length - 1), (place - first).astype(np.float32)


def _fill_rows(
    logits: NDArray[np.float32],
    above: NDArray[np.int64],
    below: NDArray[np.int64],
    down: NDArray[np.float32],
    left: NDArray[np.int64],
    right: NDArray[np.int64],
    across: NDArray[np.float32],
    labels: NDArray[np.uint8],
) -> None:
    """Labels (R, W) of rows of one image, from its logits (K, h, w) and where the R rows and W columns lie among them.

    The same operations in the same order as in the compiled pass, so that both round alike.
    """
    wide = logits[:, :, left] * (np.float32(1) - across) + logits[:, :, right] * across  # (K, h, W)
    for start in range(0, len(above), _ROWS):
        part = slice(start, start + _ROWS)
        weight = down[part, None]
        rest, found = np.float32(1) - weight, labels[part]
        found[:] = 0
        best = np.empty(found.shape, np.float32)
        for k, one in enumerate(wide):
            value = one.take(above[part], 0)
            value *= rest
            value += one.take(below[part], 0) * weight
            if k == 0:
                best[:] = value
            else:
                _take_larger(value, k, best, found)
