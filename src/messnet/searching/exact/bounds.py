"""Bounds of all choices of three exits, compiled by numba when first called; ``engine`` says why they hold, ``kernels``
what V, H, K, a column of thresholds and its bins are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np

__all__ = ["MARGIN", "bound_triples", "compiled", "remainder", "spread"]

STRESSES = np.array([0.0, 0.25, 1.0, 4.0], np.float32)  # on the mIoU to be reached: s of ``engine``

F = TypeVar("F", bound=Callable[..., Any])
MARGIN = 2e-5  # mIoU; more than the float32 sums of a bound lose


def compiled(fastmath: bool = False) -> Callable[[F], F]:
    decorate: Any = numba.njit(cache=True, nogil=True, fastmath=fastmath, error_model="numpy")
    return cast(Callable[[F], F], decorate)


@compiled(fastmath=True)
def spread(mine: Any, theirs: Any, out: Any) -> None:
    """Adds to (4 K,) how far up and how far down any set of images that leaves at an exit (V, 2 K), not at ``theirs``,
    can move it."""
    width = mine.shape[1]
    for v in range(mine.shape[0]):
        for k in range(width):
            gain = mine[v, k] - theirs[v, k]
            out[k] += max(gain, np.float32(0))
            out[width + k] += min(gain, np.float32(0))


@compiled(fastmath=True)
def _best_prefix(arrays: Any, h: int, gain: Any) -> Any:
    """The most that the images leaving at exit h can gain, over all its thresholds; 0 for no image."""
    best = np.float32(0)
    for column in range(arrays.first_column[h], arrays.first_column[h + 1]):
        order, bins, total = arrays.order[column], arrays.bins[column], np.float32(0)
        v = len(order) - 1
        for level in range(arrays.levels[column], 0, -1):
            while v >= 0 and bins[order[v]] >= level:
                total += gain[order[v]]
                v -= 1
            best = max(best, total)
    return best


@compiled(fastmath=True)
def remainder(span: Any, floors: Any, num_classes: int, tau: Any, few: Any) -> Any:
    """What the linear form can be short of the mIoU of any instance whose mIoU is at least ``tau`` above the tangent's:
    see ``engine``. If less than ``few``, something less than ``few``. ``span`` (6 K,) are the upper, then the lower
    ends of its l and u, and room; ``floors`` the tangent's."""
    classes, best = floors.shape[1], np.float32(1e9)
    for k in range(classes):
        span[4 * classes + k] = np.float32(1) / max(np.float32(1) + span[3 * classes + k], floors[1, k])
        span[5 * classes + k] = np.float32(1) / max(np.float32(1) + span[classes + k], floors[1, k])
    for stress in STRESSES:
        total, more = np.float32(0), np.float32(1) + stress
        for k in range(classes):
            most, least = span[k], span[2 * classes + k]
            narrow, wide = more * span[4 * classes + k] - np.float32(1), more * span[5 * classes + k] - np.float32(1)
            corner = max(max(most * narrow, most * wide), max(least * narrow, least * wide))
            total += min(corner, more * (np.float32(1) - floors[0, k]) - least)
        best = min(best, total / np.float32(num_classes) - stress * tau)
        if best < few:
            break
    return best


@compiled(fastmath=True)
def bound_triples(
    arrays: Any,
    last: int,
    num: int,
    x: Any,
    offset: Any,
    floors: Any,
    prices: Any,
    tau: float,
    target: float,
    bound: Any,
) -> int:
    """Bounds every pair of early exits before ``last``; the number of pairs left.

    ``x`` (H, V, 2 K) is l and u of each image at each exit against the tangent, ``offset`` (2 K,) those of ``last`` in
    all, ``floors`` the tangent's; ``prices`` (4, H) what the parts cost all images, in mIoU.
    ``bound[middle, first]`` >= ``target`` marks what to bound, and becomes the largest l - price + remainder with every
    image free to leave at the first exit, or -9 if below ``target``: crude, but it takes a microsecond.
    """
    num_images, width = arrays.counts.shape[1], x.shape[2]
    moves = np.zeros((num, 2 * width), np.float32)
    for h in range(num):
        spread(x[h], x[last], moves[h])
    score = np.zeros((num + 1, num_images), np.float32)
    for h in range(num + 1):
        for v in range(num_images):
            total = np.float32(0)
            for k in range(width // 2):
                total += x[h if h < num else last, v, k]
            score[h, v] = total / arrays.num_classes
    share = 1 / num_images
    worse, best_pair = np.zeros((num, num_images), np.float32), np.zeros(num, np.float32)
    gain, mine = np.zeros(num_images, np.float32), np.zeros(num_images, np.float32)
    end = np.float32(share * (prices[0, last] + prices[1, last] + prices[3, last]))
    for h in range(num):
        entry = np.float32(share * (prices[1, h] + prices[2, h]))
        out = np.float32(share * (prices[0, h] + prices[3, h]))
        total = np.float32(0)
        for v in range(num_images):
            here, there = score[h, v] - entry - out, score[num, v] - entry - end
            worse[h, v] = min(here, there)
            gain[v] = here - there
            total += there
        best_pair[h] = total + _best_prefix(arrays, h, gain)
    left = 0
    span = np.zeros(3 * width, np.float32)
    for first in range(num):
        out = np.float32(share * (prices[0, first] + prices[3, first]))
        entry = np.float32(prices[1, first] + prices[2, first])
        for v in range(num_images):
            mine[v] = score[first, v] - out
        for middle in range(num):
            if arrays.exit_index[middle] <= arrays.exit_index[first] or bound[middle, first] < target:
                continue
            base = best_pair[middle] - entry
            free, theirs = np.float32(0), worse[middle]
            for v in range(num_images):
                free += max(np.float32(0), mine[v] - theirs[v])
            for k in range(width):
                span[k] = offset[k] + moves[first, k] + moves[middle, k]
                span[width + k] = offset[k] + moves[first, width + k] + moves[middle, width + k]
            value = base + free
            value += remainder(span, floors, arrays.num_classes, tau, target - value)
            bound[middle, first] = value if value >= target else -9
            left += value >= target
    return left
