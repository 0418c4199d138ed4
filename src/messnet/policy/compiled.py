"""The exit policy of one exit in one pass over its logits, on the processor: which share of its pixels is confident?

On maps of 64 x 64 a tensor operator is mostly overhead, and the policy is forty of them. This takes a fraction of their
time and gives the same counts: it bounds how far its confidence may lie from that of the tensor operators, which differ
in the rounding of exp and of sums, and says where a threshold lies within that bound. ``reference`` asks them there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Labels = NDArray[np.int32]
Places = NDArray[np.int64]
Bits = NDArray[np.uint8]
"""0 and 1: counts of them are sums, and LLVM adds bytes in vectors."""
Kernel = TypeVar("Kernel", bound=Callable[..., object])

_ROUNDING = 2.0**-24  # of float32, relative


def _compiled(*, contract: bool = False) -> Callable[[Kernel], Kernel]:
    """Decorates an inner loop; numba reads no annotation, they are for people. ``contract`` multiplies and adds in one
    instruction, which rounds once instead of twice: only confidences may, as their tolerance allows for it."""
    fastmath = {"contract"} if contract else False
    return cast(Callable[[Kernel], Kernel], numba.njit(cache=True, nogil=True, fastmath=fastmath, error_model="numpy"))


def confident_share(
    logits: NDArray[np.float32], thresholds: NDArray[np.float32], *, entropy: bool, refine: bool
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Share of pixels whose confidence reaches each threshold: logits (N, K, h, w), in any layout, contiguous
    thresholds (T,) -> shares (N, T), and whether they are certain (N,).

    Confidence is top1 or, with ``entropy``, 1 - H(p) / log K. With ``refine`` the majority of 5 x 5 pixels decides near
    label boundaries, the native form. Shares are certain where no confidence is NaN or so close to a threshold that
    the rounding of exponentials and sums could matter.
    """
    shares = np.empty((len(logits), len(thresholds)), np.float32)
    certain = np.empty(len(logits), np.bool_)
    # With rows first, tensors of either memory format are strided alike: compiled once for both.
    rows = logits.transpose(2, 1, 3, 0)
    _count_images(rows, thresholds, entropy, refine, _tolerance(logits.shape[1], entropy), shares, certain)
    return shares, certain


@cache
def _tolerance(num_classes: int, entropy: bool) -> np.float32:
    """How far two float32 computations of one confidence can differ: of top1 relative, of the entropy absolute.

    K exponentials, each off by at most 4 roundings, add up with K - 1 more; two ways to do so. H is log S - P / S of
    two such sums, both at most log K, where the error of log S is as large as the relative one of S.
    """
    if entropy:
        return np.float32(2 * _ROUNDING * (2 * num_classes + 20 + (num_classes + 8) / math.log(num_classes)))
    return np.float32(2 * _ROUNDING * (num_classes + 8))


@_compiled(contract=True)
def _exp(x: np.float32) -> np.float32:
    """exp of a float32 <= 0 as 2^n 2^r; 0 below -87. LLVM makes vectors of it, not of the library's.

    A minimax polynomial for 2^r, |r| <= 1/2, with a relative error of 1.6 roundings.
    """
    power = x * np.float32(1.44269504)  # log2(e): exp(x) = 2^(x log2(e)) = 2^n 2^r
    n = np.floor(power + np.float32(0.5))
    r = power - n
    n = n if n >= np.float32(-127) else np.float32(-127)  # NaN too: the power of 2 is 0 and the product NaN
    # Horner's scheme: each step multiplies by r and adds the next lower coefficient.
    p = np.float32(0.00132647) * r + np.float32(0.00967151)
    p = p * r + np.float32(0.05550734)
    p = p * r + np.float32(0.24022242)
    p = p * r + np.float32(0.69314698)
    p = p * r + np.float32(1)
    scale = np.int32((n + np.float32(127)) * np.float32(1 << 23)).view(np.float32)  # 2^n, by its bits
    return np.float32(0) if x < np.float32(-87) else p * scale


@_compiled()
def _take_larger(a: Floats, b: Floats, k: int, other: int, best: Floats, which: Labels, turn: int) -> None:
    """Where class ``k`` with values ``a`` (w,) or class ``other`` with ``b`` is above the best so far, it becomes best
    and label: from row ``turn`` of ``best`` and ``which`` (2, w) into the other row."""
    # Two classes at a time and from one array into the other: in place, LLVM stores under a mask, which is slow.
    this, that = np.int32(k), np.int32(other)
    old_best, new_best, old_which, new_which = best[turn], best[1 - turn], which[turn], which[1 - turn]
    for x in range(len(a)):
        better = a[x] > old_best[x]
        most = a[x] if better else old_best[x]
        label = this if better else old_which[x]
        better = b[x] > most
        new_best[x] = b[x] if better else most
        new_which[x] = that if better else label


@_compiled(contract=True)
def _confidence_row(logits: Floats, entropy: bool, values: Floats, confidence: Floats, labels: Labels) -> None:
    """Confidence and label of one row of pixels: logits (K, w) of any strides; ``values`` (K, w) is scratch."""
    num_classes, width = logits.shape
    best, which = np.empty((2, width), np.float32), np.empty((2, width), np.int32)
    total, weighted = np.zeros(width, np.float32), np.zeros(width, np.float32)
    for k in range(num_classes):
        for x in range(width):
            values[k, x] = logits[k, x]
    for x in range(width):
        best[0, x] = values[0, x]
        which[0, x] = 0
    turn = 0
    for k in range(1, num_classes, 2):
        other = min(k + 1, num_classes - 1)
        _take_larger(values[k], values[other], k, other, best, which, turn)
        turn = 1 - turn
    top, labels[:] = best[turn], which[turn]
    if not entropy:
        for k in range(0, num_classes - 1, 2):
            a, b = values[k], values[k + 1]
            for x in range(width):
                total[x] += _exp(a[x] - top[x]) + _exp(b[x] - top[x])
        if num_classes % 2:
            a = values[num_classes - 1]
            for x in range(width):
                total[x] += _exp(a[x] - top[x])
        for x in range(width):
            confidence[x] = np.float32(1) / total[x]
        return
    for k in range(num_classes):
        for x in range(width):
            distance = values[k, x] - top[x]
            term = _exp(distance)
            total[x] += term
            weighted[x] += term * distance
    for x in range(width):
        entropy_of_pixel = math.log(total[x]) - weighted[x] / total[x]
        confidence[x] = 1 - entropy_of_pixel / math.log(num_classes)


@_compiled()
def _near_boundaries(labels: Labels, near: Bits) -> None:
    """``thicken(label_boundary(labels), 1)``: labels (h, w) -> near (h, w)."""
    height, width = labels.shape
    # With a frame of one pixel, so that the border needs no case of its own.
    boundary = np.zeros((height + 2, width + 2), np.uint8)
    for y in range(height):
        for x in range(width - 1):
            if labels[y, x] != labels[y, x + 1]:
                boundary[y + 1, x + 1] = 1
                boundary[y + 1, x + 2] = 1
    for y in range(height - 1):
        for x in range(width):
            if labels[y, x] != labels[y + 1, x]:
                boundary[y + 1, x + 1] = 1
                boundary[y + 2, x + 1] = 1
    for y in range(height):
        # A square of 3 x 3 is a column of three, then a row of three of those.
        rows = np.zeros(width + 2, np.uint8)
        for x in range(width + 2):
            rows[x] = boundary[y, x] | boundary[y + 1, x] | boundary[y + 2, x]
        for x in range(width):
            near[y, x] = rows[x] | rows[x + 1] | rows[x + 2]


@_compiled()
def _majority_count(confident: Bits, near: Bits) -> int:
    """How many pixels (h, w) are confident; of those ``near`` boundaries, the ones whose 5 x 5 window mostly is."""
    height, width = confident.shape
    count = 0
    column = np.empty(width + 4, np.uint8)
    for y in range(height):
        a, b = max(y - 2, 0), max(y - 1, 0)
        c, d = min(y + 1, height - 1), min(y + 2, height - 1)
        for x in range(width):
            column[x + 2] = confident[a, x] + confident[b, x] + confident[y, x] + confident[c, x] + confident[d, x]
        # Beyond the border the nearest pixel repeats, as in the rows a to d above.
        column[0] = column[1] = column[2]
        column[width + 2] = column[width + 3] = column[width + 1]
        for x in range(width):
            window = column[x] + column[x + 1] + column[x + 2] + column[x + 3] + column[x + 4]
            chosen = np.uint8(window > 12) if near[y, x] else confident[y, x]
            count += int(chosen)
    return count


@_compiled()
def _count_images(
    logits: Floats,
    thresholds: Floats,
    entropy: bool,
    refine: bool,
    tolerance: np.float32,
    shares: Floats,
    certain: NDArray[np.bool_],
) -> None:
    """Fills ``shares`` (N, T) and ``certain`` (N,) from logits (h, K, w, N)."""
    height, num_classes, width, num_images = logits.shape
    confidence, labels = np.empty((height, width), np.float32), np.empty((height, width), np.int32)
    confident, near = np.empty((height, width), np.uint8), np.zeros((height, width), np.uint8)
    values = np.empty((num_classes, width), np.float32)
    for n in range(num_images):
        for y in range(height):
            _confidence_row(logits[y, :, :, n], entropy, values, confidence[y], labels[y])
        if refine:
            _near_boundaries(labels, near)
        doubtful = 0
        for t in range(len(thresholds)):
            threshold = thresholds[t]
            for y in range(height):
                for x in range(width):
                    value = confidence[y, x]
                    margin = tolerance if entropy else tolerance * value
                    confident[y, x] = value >= threshold
                    doubtful += not abs(value - threshold) > margin  # NaN is doubtful too
            # Divided in float64, as the tensor operators do it.
            shares[n, t] = _majority_count(confident, near) / (height * width)
        certain[n] = doubtful == 0


@_compiled()
def _stretch_row(row: Floats, left: Places, right: Places, across: Floats, out: Floats) -> None:
    """A row of logits (K, w) at full width: (K, W)."""
    for k in range(len(row)):
        for x in range(len(left)):
            weight = across[x]
            out[k, x] = row[k, left[x]] * (np.float32(1) - weight) + row[k, right[x]] * weight


@_compiled()
def fill_rows(
    logits: Floats,
    above: Places,
    below: Places,
    down: Floats,
    left: Places,
    right: Places,
    across: Floats,
    labels: NDArray[np.uint8],
) -> None:
    """As ``labels._fill_rows``, which tells what the arguments are; a row at a time and a tenth of its time."""
    num_classes, height, width = len(logits), len(above), len(left)
    # The two source rows that an output row lies between, at full width.
    held = np.empty((2, num_classes, width), np.float32)
    upper, lower, first, second = held[0], held[1], -1, -1
    best, which = np.empty((2, width), np.float32), np.empty((2, width), np.int32)
    a, b = np.empty(width, np.float32), np.empty(width, np.float32)
    for y in range(height):
        if above[y] != first:
            upper, lower = lower, upper
            if above[y] != second:
                _stretch_row(logits[:, above[y]], left, right, across, upper)
            first, second = above[y], below[y]
            _stretch_row(logits[:, second], left, right, across, lower)
        weight, rest = down[y], np.float32(1) - down[y]
        for x in range(width):
            best[0, x] = upper[0, x] * rest + lower[0, x] * weight
            which[0, x] = 0
        turn = 0
        for k in range(1, num_classes, 2):
            other = min(k + 1, num_classes - 1)
            for x in range(width):
                a[x] = upper[k, x] * rest + lower[k, x] * weight
                b[x] = upper[other, x] * rest + lower[other, x] * weight
            _take_larger(a, b, k, other, best, which, turn)
            turn = 1 - turn
        found = which[turn]
        for x in range(width):
            labels[y, x] = found[x]
