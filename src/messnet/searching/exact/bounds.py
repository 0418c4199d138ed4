"""Steps 3 to 5 of the derivation: how far an mIoU can be above the tangent, and quick bounds of all choices.

*Step 3, remainder.* Put p_k = l_k / (1 + u_k), so that an instance's mIoU is R + mean p. If its mIoU is at least R +
tau, then mean p - tau >= 0, and for any stress s >= 0

    mean p  <=  mean p + s (mean p - tau)  =  mean l + mean((1 + s) p - l) - s tau.

So mean((1 + s) p - l) - s tau bounds what the tangent falls short of. For a class, (1 + s) p - l =
l ((1 + s) / (1 + u) - 1) is linear in l and, for fixed l, monotone in u: where l and u lie within known ends it is at
most the largest of its values at the four corners. It is also at most (1 + s) (1 - r_k) less the lower end of l, since
no IoU is above 1. ``remainder`` takes the lesser of the two for each class, sums, and takes the least over some s.

*Step 4, price.* For any price mu >= 0, in mIoU per unit of cost, mean l - mu cost is a sum over images of
g = (contribution to mean l) - mu (what leaving there costs). With G the largest of these sums over all thresholds,

    mIoU  <=  R + mu cost + G + remainder:

a line in the plane of cost and mIoU, under which all instances of the choice lie. The choice is ruled out if the line
is below everything that would improve on what is known.

*Step 5, quick bounds.* Let A be the images that reach the first exit's threshold, B those that reach the middle exit's.
G is at most the best B without the first exit, plus the most that the images of A can gain:

    sum over A of g_a + over B - A of g_b + over the rest of g_c
        <=  max over B (sum over B of g_b + over the rest of g_c)  +  sum over A of (g_a - min(g_b, g_c)).

``bound_triples`` takes a running sum for the first term and, for the second, all images with a positive difference:
loose, but it takes a microsecond a choice. ``cells`` bounds what is left more tightly.
"""

from __future__ import annotations

import numpy as np

from messnet.records.arrays import FloatArray
from messnet.searching.exact.arrays import RULED_OUT, Arrays, Float32, Real
from messnet.searching.exact.compiling import compiled

STRESSES = np.array([0.0, 0.25, 1.0, 4.0], np.float32)
"""The values of s that are tried."""
MARGIN = 2e-5
"""mIoU; more than the float32 sums of a bound lose. It is given away wherever a bound is compared."""


@compiled(fastmath=True)
def spread(mine: Float32, theirs: Float32, out: Float32) -> None:
    """Adds to ``out`` (4 K,) the most and the least by which any set of images changes l and u by leaving at one exit,
    ``mine`` (V, 2 K), instead of another, ``theirs`` (V, 2 K)."""
    width = mine.shape[1]
    for v in range(mine.shape[0]):
        for k in range(width):
            # A set that takes all images with a gain, or all with a loss, is at the ends.
            gain = mine[v, k] - theirs[v, k]
            out[k] += max(gain, np.float32(0))
            out[width + k] += min(gain, np.float32(0))


@compiled(fastmath=True)
def _best_gain(arrays: Arrays, h: int, gain: Float32) -> np.float32:
    """The largest sum of ``gain`` (V,) over the images that leave at exit h, over all its thresholds; 0 for no
    image."""
    best = np.float32(0)
    for column in range(arrays.first_column[h], arrays.first_column[h + 1]):
        # A running sum over the levels, the smallest set first; no image at all gains 0.
        order, bins, total = arrays.order[column], arrays.bins[column], np.float32(0)
        v = len(order) - 1
        for level in range(arrays.levels[column], 0, -1):
            while v >= 0 and bins[order[v]] >= level:
                total += gain[order[v]]
                v -= 1
            best = max(best, total)
    return best


@compiled(fastmath=True)
def remainder(span: Float32, floors: Float32, num_classes: int, tau: Real, negligible: Real) -> np.float32:
    """Step 3: an upper bound of mean p - mean l for all instances whose mIoU is at least ``tau`` above the tangent's.

    ``span`` (6 K,) holds the upper ends of l and u, then their lower ends, then workspace; ``floors`` (2, K) are the
    tangent's. A bound below ``negligible`` rules out whatever is asked about, so the first one found is returned.
    """
    classes, best = floors.shape[1], np.float32(1e9)
    # 1 / (1 + u) at the lower and the upper end of u; 1 + u is at least the share of the labelled pixels.
    for k in range(classes):
        span[4 * classes + k] = np.float32(1) / max(np.float32(1) + span[3 * classes + k], floors[1, k])
        span[5 * classes + k] = np.float32(1) / max(np.float32(1) + span[classes + k], floors[1, k])
    # Any s >= 0 gives a valid bound: the least of a few is kept.
    for stress in STRESSES:
        total, more = np.float32(0), np.float32(1) + stress
        for k in range(classes):
            most, least = span[k], span[2 * classes + k]
            narrow, wide = more * span[4 * classes + k] - np.float32(1), more * span[5 * classes + k] - np.float32(1)
            # (1 + s) p - l = l ((1 + s) / (1 + u) - 1) at the four corners of the ends of l and u
            corner = max(max(most * narrow, most * wide), max(least * narrow, least * wide))
            # and (1 + s) p - l <= (1 + s) (1 - r) - l, as p <= 1 - r.
            total += min(corner, more * (np.float32(1) - floors[0, k]) - least)
        best = min(best, total / np.float32(num_classes) - stress * tau)
        if best < negligible:
            break
    return best


@compiled(fastmath=True)
def bound_triples(
    arrays: Arrays,
    last: int,
    num: int,
    x: Float32,
    offset: Float32,
    floors: Float32,
    prices: FloatArray,
    tau: float,
    target: float,
    bound: Float32,
) -> int:
    """Step 5: bounds every pair of the ``num`` early exits before ``last``; returns the number of pairs left.

    ``x`` (H, V, 2 K), ``offset`` (2 K,) of ``last`` and ``floors`` are the tangent's; ``prices`` (4, H) what the parts
    cost if all images pay them, in mIoU. ``bound[middle, first]`` >= ``target`` marks what to bound; it becomes
    G + remainder, or RULED_OUT if that is below ``target``.
    """
    num_images, width = arrays.counts.shape[1], x.shape[2]
    # The most and the least that leaving at an early exit can change l and u (step 3).
    moves = np.zeros((num, 2 * width), np.float32)
    for h in range(num):
        spread(x[h], x[last], moves[h])
    # The mean of l over the classes: what an image contributes at each exit, before any price.
    score = np.zeros((num + 1, num_images), np.float32)
    for h in range(num + 1):
        for v in range(num_images):
            total = np.float32(0)
            for k in range(width // 2):
                total += x[h if h < num else last, v, k]
            score[h, v] = total / arrays.num_classes
    # Of the middle exit with the last one: min(g_b, g_c) of each image, and the best B.
    share = 1 / num_images
    worse, best_pair = np.zeros((num, num_images), np.float32), np.zeros(num, np.float32)
    gain, mine = np.zeros(num_images, np.float32), np.zeros(num_images, np.float32)
    # Price of the last exit: backbone, head, output. An early one: backbone and output, for those who leave,
    end = np.float32(share * (prices[0, last] + prices[1, last] + prices[3, last]))
    for h in range(num):
        # and head and decision, for all who reach it.
        entry = np.float32(share * (prices[1, h] + prices[2, h]))
        out = np.float32(share * (prices[0, h] + prices[3, h]))
        total = np.float32(0)
        for v in range(num_images):
            here, there = score[h, v] - entry - out, score[num, v] - entry - end
            # Both orders of g_b and g_c: A takes an image from wherever B sends it.
            worse[h, v] = min(here, there)
            gain[v] = here - there
            total += there
        # All images at the last exit, plus the best gain of a set that leaves at h: the best B.
        best_pair[h] = total + _best_gain(arrays, h, gain)
    # The first exit before each of the middle ones.
    left = 0
    span = np.zeros(3 * width, np.float32)
    for first in range(num):
        out = np.float32(share * (prices[0, first] + prices[3, first]))
        # All images reach the first exit and pay its head and decision.
        entry = np.float32(prices[1, first] + prices[2, first])
        for v in range(num_images):
            mine[v] = score[first, v] - out
        for middle in range(num):
            # Exits of one exit point are no instance; and what is ruled out already stays so.
            if arrays.exit_index[middle] <= arrays.exit_index[first] or bound[middle, first] < target:
                continue
            base = best_pair[middle] - entry
            # What A gains at most: every image free to leave at the first exit.
            free, theirs = np.float32(0), worse[middle]
            for v in range(num_images):
                free += max(np.float32(0), mine[v] - theirs[v])
            # Ends of l and u: all at the last exit, plus the most and the least that each early exit moves them.
            for k in range(width):
                span[k] = offset[k] + moves[first, k] + moves[middle, k]
                span[width + k] = offset[k] + moves[first, width + k] + moves[middle, width + k]
            # G <= (best B) + (what A gains at most); the remainder of any A and B.
            value = base + free
            value += remainder(span, floors, arrays.num_classes, tau, target - value)
            bound[middle, first] = value if value >= target else RULED_OUT
            left += value >= target
    return left
