"""Bounds of all choices of three exits, compiled by numba when first called; ``engine`` says why they hold, ``kernels``
what V, H, K, a column of thresholds and its bins are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np

__all__ = ["MARGIN", "bound_triples", "compiled", "remainder", "spread", "sums_at"]

F = TypeVar("F", bound=Callable[..., Any])
MARGIN = 2e-5  # mIoU; more than the float32 sums of a bound lose


def compiled(fastmath: bool = False) -> Callable[[F], F]:
    decorate: Any = numba.njit(cache=True, nogil=True, fastmath=fastmath, error_model="numpy")
    return cast(Callable[[F], F], decorate)


@compiled(fastmath=True)
def spread(mine: Any, theirs: Any, low: Any, high: Any) -> None:
    """Adds to (2 K,) how far any set of images that leaves at an exit (V, 2 K), not at ``theirs``, can move it."""
    for v in range(mine.shape[0]):
        for k in range(mine.shape[1]):
            gain = mine[v, k] - theirs[v, k]
            low[k] += min(gain, np.float32(0))
            high[k] += max(gain, np.float32(0))


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
def remainder(offset: Any, low: Any, high: Any, num_classes: int, tau: Any) -> Any:
    """What the linear form can be short of the mIoU of any instance whose mIoU is at least ``tau`` above the tangent's:
    see ``engine``. ``offset`` + [``low``, ``high``] is the range of its l and u, (2 K,)."""
    gains, largest, least = np.float32(0), np.float32(0), np.float32(0)
    for k in range(num_classes):
        gains += max(np.float32(0), offset[k] + high[k])
        u = num_classes + k
        largest = max(largest, offset[u] + high[u])
        least = max(least, -(offset[u] + low[u]))
    if least > np.float32(0.9):
        return np.float32(1e9)
    gains = gains / num_classes / (np.float32(1) - least)
    return max(np.float32(0), gains - tau) * largest + gains * least


@compiled(fastmath=True)
def bound_triples(
    arrays: Any, last: int, num: int, x: Any, offset: Any, prices: Any, tau: float, target: float, bound: Any
) -> int:
    """Bounds every pair of early exits before ``last``; the number of pairs left.

    ``x`` (H, V, 2 K) is l and u of each image at each exit against the tangent, ``offset`` (2 K,) those of ``last`` in
    all; ``prices`` (4, H) what the parts cost all images, in mIoU. ``bound[middle, first]`` >= ``target`` marks what to
    bound, and becomes the largest l - price + remainder over all thresholds, or -9 if below ``target``.
    """
    num_images, classes = arrays.counts.shape[1], arrays.num_classes
    low, high = np.zeros((num, 2 * classes), np.float32), np.zeros((num, 2 * classes), np.float32)
    for h in range(num):
        spread(x[h], x[last], low[h], high[h])
    score = np.zeros((num + 1, num_images), np.float32)
    for h in range(num + 1):
        for v in range(num_images):
            total = np.float32(0)
            for k in range(classes):
                total += x[h if h < num else last, v, k]
            score[h, v] = total / classes
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
    sums = np.zeros((1, 2 * classes), np.float32)
    wide_low, wide_high = np.zeros(2 * classes, np.float32), np.zeros(2 * classes, np.float32)
    for first in range(num):
        out = np.float32(share * (prices[0, first] + prices[3, first]))
        entry = np.float32(prices[1, first] + prices[2, first])
        for v in range(num_images):
            mine[v] = score[first, v] - out
        known = False
        for middle in range(num):
            if arrays.exit_index[middle] <= arrays.exit_index[first] or bound[middle, first] < target:
                continue
            # Every image free to choose the first exit: crude, but it settles most pairs.
            base = best_pair[middle] - entry
            free, theirs = np.float32(0), worse[middle]
            for v in range(num_images):
                free += max(np.float32(0), mine[v] - theirs[v])
            for k in range(2 * classes):
                wide_low[k] = low[first, k] + low[middle, k]
                wide_high[k] = high[first, k] + high[middle, k]
            wide = remainder(offset, wide_low, wide_high, classes, tau)
            if base + free + wide < target:
                bound[middle, first] = -9
                continue
            if not known:
                sums = sums_at(arrays, x, first, last)
                known = True
            for v in range(num_images):
                gain[v] = mine[v] - theirs[v]
            value = _bound_pair(arrays, first, gain, base, wide, offset, sums, low[middle], high[middle], tau, target)
            bound[middle, first] = value if value >= target else -9
            left += value >= target
    return left


@compiled(fastmath=True)
def sums_at(arrays: Any, x: Any, first: int, last: int) -> Any:
    """(levels of all columns, 2 K): l and u gained when the images of each level leave at ``first``, not ``last``."""
    columns = range(arrays.first_column[first], arrays.first_column[first + 1])
    rows = 0
    for column in columns:
        rows += arrays.levels[column]
    sums = np.zeros((rows, x.shape[2]), np.float32)
    total = np.zeros(x.shape[2], np.float32)
    row = 0
    for column in columns:
        order, bins = arrays.order[column], arrays.bins[column]
        for k in range(len(total)):
            total[k] = 0
        v = len(order) - 1
        for level in range(arrays.levels[column], 0, -1):
            while v >= 0 and bins[order[v]] >= level:
                mine, theirs = x[first, order[v]], x[last, order[v]]
                for k in range(len(total)):
                    total[k] += mine[k] - theirs[k]
                v -= 1
            for k in range(len(total)):
                sums[row, k] = total[k]
            row += 1
    return sums


@compiled(fastmath=True)
def _bound_pair(
    arrays: Any,
    first: int,
    gain: Any,
    base: Any,
    wide: Any,
    offset: Any,
    sums: Any,
    low: Any,
    high: Any,
    tau: Any,
    target: Any,
) -> Any:
    """The bound over all thresholds of the first exit, its sets known, those of the middle one free."""
    best, row, classes = np.float32(-9), 0, arrays.num_classes
    moved = np.zeros(2 * classes, np.float32)
    for column in range(arrays.first_column[first], arrays.first_column[first + 1]):
        order, bins, total = arrays.order[column], arrays.bins[column], base
        v = len(order) - 1
        for level in range(arrays.levels[column], 0, -1):
            while v >= 0 and bins[order[v]] >= level:
                total += gain[order[v]]
                v -= 1
            if total + wide >= target and total + wide > best:
                for k in range(2 * classes):
                    moved[k] = offset[k] + sums[row, k]
                best = max(best, total + min(wide, remainder(moved, low, high, classes, tau)))
            row += 1
    return best
