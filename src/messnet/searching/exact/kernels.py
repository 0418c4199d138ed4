"""The search's inner loops, compiled by numba when first called; ``engine`` says what they are for.

V images, H exits (rows of the tables, the final one last), C = 2 K + X count columns: intersections and unions of the
K classes that have labels, then unions of the X others, which can only add an IoU of 0. A column of thresholds is one
early exit at one pixel threshold; ``bins[column, v]`` says how many of its image thresholds image v reaches, so that
the images leaving at level i are those with bins >= i: nested sets.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from messnet.searching.exact.bounds import MARGIN, compiled
from messnet.searching.exact.problem import MEAN, P95, WHOLE_SUM, WORST

__all__ = ["mean_iou_of", "merge", "try_pair", "try_pairs_before", "try_single", "try_triple"]

QUICK = np.float32(2e-6)  # more than float32 loses of an mIoU


@compiled()
def mean_iou_of(counts: Any, num_classes: int, floors: Any) -> float:
    """mIoU of summed counts (C,) to 12 decimals, or -1 where a class is below its floor."""
    total, num = 0.0, num_classes
    for k in range(num_classes):
        iou = counts[k] / counts[num_classes + k]
        if iou < floors[k]:
            return -1.0
        total += iou
    for k in range(2 * num_classes, len(counts)):
        if counts[k] > 0:
            num += 1
    return float(np.rint(total / num * 1e12) / 1e12)


@compiled(fastmath=True)
def _quick_miou(counts: Any, num_classes: int) -> Any:
    total, num = np.float32(0), num_classes
    for k in range(num_classes):
        total += np.float32(counts[k]) / np.float32(counts[num_classes + k])
    for k in range(2 * num_classes, len(counts)):
        if counts[k] > 0:
            num += 1
    return total / np.float32(num)


@compiled()
def _leaving(arrays: Any, m: int, positions: Any, out: Any) -> None:
    """Cost m of an image that leaves at each of an instance's exits, as CostColumn.leaving says it."""
    parts, last = arrays.parts[m], len(positions) - 1
    if arrays.kinds[m] >= WHOLE_SUM:
        whole = parts[0, positions[last]]
        for e in range(last + 1):
            for part in range(1, 4):
                if part == 2 and e == last:
                    continue
                more = parts[part, positions[e]]
                whole = whole + more if arrays.kinds[m] == WHOLE_SUM else max(whole, more)
        for e in range(last + 1):
            out[e] = whole
        return
    paid = 0.0
    for e in range(last + 1):
        p = positions[e]
        paid += parts[1, p] + (parts[2, p] if e < last else 0.0)
        out[e] = parts[0, p] + paid + parts[3, p]


@compiled()
def _statistic(kind: int, leaving: Any, num_left: Any) -> float:
    """The mean, the largest, or the least cost that 95 % of the images do not exceed, where num_left[e] images leave at
    exit e."""
    num_images = 0
    total = 0.0
    worst = -np.inf
    for e in range(len(leaving)):
        num_images += num_left[e]
        total += num_left[e] * leaving[e]
        if num_left[e] > 0:
            worst = max(worst, leaving[e])
    if kind == WORST:
        return worst
    if kind == P95:
        best = worst
        for e in range(len(leaving)):
            cheaper = 0
            for other in range(len(leaving)):
                if leaving[other] <= leaving[e]:
                    cheaper += num_left[other]
            if 20 * cheaper >= 19 * num_images:
                best = min(best, leaving[e])
        return best
    return total / num_images


@compiled()
def _objective(arrays: Any, leaving: Any, num_left: Any) -> float:
    """The objective's cost from leaving costs (m, exits), infinite where a limit is exceeded."""
    worst = -np.inf
    for m in range(len(leaving)):
        value = _statistic(arrays.kinds[m], leaving[m], num_left)
        if value > arrays.limits[m]:
            return np.inf
        if arrays.weights[m] > 0:
            worst = max(worst, arrays.weights[m] * value)
    return worst


@compiled()
def _place(found: Any, cost: float) -> int:
    """How many points cost at most this."""
    low, high = 0, found.size[0]
    while low < high:
        middle = (low + high) // 2
        if found.cost[middle] <= cost:
            low = middle + 1
        else:
            high = middle
    return low


@compiled()
def _insert(found: Any, cost: float, miou: float, key: int) -> None:
    place, size = _place(found, cost), found.size[0]
    if place > 0:
        before = place - 1
        if found.miou[before] > miou:
            return
        if found.miou[before] == miou and (found.cost[before] < cost or found.key[before] < key):
            return
        if found.cost[before] == cost:
            place = before
    stop = place
    while stop < size and found.miou[stop] <= miou:
        stop += 1
    shift = 1 - (stop - place)
    if size + shift > len(found.cost):
        raise MemoryError
    if shift > 0:
        for i in range(size - 1, stop - 1, -1):
            found.cost[i + 1], found.miou[i + 1], found.key[i + 1] = found.cost[i], found.miou[i], found.key[i]
    elif shift < 0:
        for i in range(stop, size):
            found.cost[i + shift], found.miou[i + shift] = found.cost[i], found.miou[i]
            found.key[i + shift] = found.key[i]
    found.cost[place], found.miou[place], found.key[place] = cost, miou, key
    found.size[0] = size + shift


@compiled()
def _try(arrays: Any, counts: Any, cost: float, key: int, least_miou: float, found: Any) -> None:
    """Enters one instance, cost <= its limits, if it is as good as the front."""
    if cost == np.inf:
        return
    place = _place(found, cost)
    least = max(least_miou, found.miou[place - 1]) if place > 0 else least_miou
    if _quick_miou(counts, arrays.num_classes) < least - QUICK:
        return
    miou = mean_iou_of(counts, arrays.num_classes, arrays.floors)
    if miou >= least_miou and miou >= 0:
        _insert(found, cost, miou, key)


@compiled()
def _add_all(counts: Any, out: Any) -> None:
    """Adds counts (V, C) of all images to ``out`` (C,)."""
    for v in range(counts.shape[0]):
        for k in range(counts.shape[1]):
            out[k] += counts[v, k]


@compiled()
def _key(arrays: Any, first: int, middle: int, last: int, row: int, second_row: int) -> Any:
    """Orders instances as ties are resolved: fewer exits, then the shallower last, middle, first, then small sets."""
    num_exits = 1 + (first >= 0) + (middle >= 0)
    base = len(arrays.exit_index) + 1
    key = ((num_exits * base + last) * base + middle + 1) * base + first + 1
    return (key * arrays.rows_per_exit + row) * arrays.rows_per_exit + second_row


@compiled()
def merge(found: Any, others: Any) -> None:
    """Enters all of ``others``."""
    for i in range(others.size[0]):
        _insert(found, others.cost[i], others.miou[i], others.key[i])


@compiled()
def try_single(arrays: Any, position: int, found: Any) -> None:
    """All images leave at one exit."""
    leaving = np.zeros((len(arrays.kinds), 1))
    positions, num_left = np.zeros(1, np.int64), np.zeros(1, np.int64)
    positions[0], num_left[0] = position, arrays.counts.shape[1]
    for m in range(len(leaving)):
        _leaving(arrays, m, positions, leaving[m])
    summed = np.zeros(arrays.counts.shape[2], arrays.counts.dtype)
    _add_all(arrays.counts[position], summed)
    cost = _objective(arrays, leaving, num_left)
    if cost < np.inf:
        _try(arrays, summed, cost, _key(arrays, -1, -1, position, 0, 0), -1.0, found)


@compiled()
def try_pairs_before(
    arrays: Any,
    last: int,
    firsts: Any,
    part: Any,
    max_cost: float,
    least_miou: float,
    cheapest: bool,
    scratch: Any,
    found: Any,
) -> Any:
    """The early exits ``firsts`` (n,) before ``last``, at each of their pixel thresholds or at a ``part`` (start, step)
    of them. Returns the number of instances, (n, 2) the best of each early exit within the limits, the ``cheapest`` or
    the most accurate one: its cost and mIoU, infinite if there is none; and its key."""
    best, keys = np.zeros((len(firsts), 2)), np.zeros(len(firsts), np.int64)
    tried = 0
    for n in range(len(firsts)):
        scratch.size[0] = 0
        tried += try_pair(arrays, last, firsts[n], part, np.inf, -1.0, scratch)
        merge(found, scratch)
        best[n, 0] = best[n, 1] = np.inf
        for i in range(scratch.size[0]):
            point = i if cheapest else scratch.size[0] - 1 - i
            if scratch.miou[point] >= least_miou and scratch.cost[point] <= max_cost:
                best[n, 0], best[n, 1] = scratch.cost[point], scratch.miou[point]
                keys[n] = scratch.key[point]
                break
    return tried, best, keys


@compiled()
def try_pair(arrays: Any, last: int, first: int, part: Any, max_cost: float, least_miou: float, found: Any) -> int:
    """Every image threshold of early exit ``first`` before exit ``last``, at the pixel thresholds of a ``part`` (start,
    step); returns the number of instances."""
    num_images, width = arrays.counts.shape[1:]
    here, there = arrays.counts[first], arrays.counts[last]
    gain = np.zeros((num_images, width), arrays.counts.dtype)
    for v in range(num_images):
        for k in range(width):
            gain[v, k] = here[v, k] - there[v, k]
    everything, summed = np.zeros(width, arrays.counts.dtype), np.zeros(width, arrays.counts.dtype)
    _add_all(arrays.counts[last], everything)
    positions, num_left = np.zeros(2, np.int64), np.zeros(2, np.int64)
    positions[0], positions[1] = first, last
    leaving = np.zeros((len(arrays.kinds), 2))
    for m in range(len(leaving)):
        _leaving(arrays, m, positions, leaving[m])
    tried = 0
    for column in range(arrays.first_column[first] + part[0], arrays.first_column[first + 1], part[1]):
        order, bins = arrays.order[column], arrays.bins[column]
        for k in range(width):
            summed[k] = everything[k]
        v = num_images - 1
        row = (column - arrays.first_column[first]) * (num_images + 1)
        for level in range(arrays.levels[column], 0, -1):
            while v >= 0 and bins[order[v]] >= level:
                more = gain[order[v]]
                for k in range(width):
                    summed[k] += more[k]
                v -= 1
            tried += 1
            num_left[0], num_left[1] = num_images - 1 - v, v + 1
            cost = _objective(arrays, leaving, num_left)
            if cost <= max_cost:
                key = _key(arrays, first, -1, last, row + num_images - level, 0)
                _try(arrays, summed, cost, key, least_miou, found)
    return tried


@compiled()
def try_triple(
    arrays: Any,
    fine: Any,
    exits: Any,
    max_cost: float,
    least_miou: float,
    need: Any,
    scores: Any,
    line: Any,
    steps: Any,
    found: Any,
) -> int:
    """Every pair of thresholds of a choice (last, middle, first); the number of instances whose mIoU was computed.

    What cannot be news is ruled out by the tangent's mean of l, ``scores`` (H, V), and the remainder that each cell
    ``need``s at each column of the first exit (see ``cells``, of which ``fine`` are the classes): l - slope cost is at
    least the target of ``line``, a pair, and l at least the first of the first of ``steps`` (n, 2) whose second the
    cost does not exceed.
    """
    num_images, width = arrays.counts.shape[1:]
    last, middle, first = exits
    positions = np.zeros(3, np.int64)
    positions[0], positions[1], positions[2] = first, middle, last
    leaving = np.zeros((len(arrays.kinds), 3))
    for m in range(len(leaving)):
        _leaving(arrays, m, positions, leaving[m])
    price = _price(arrays, leaving)
    early = np.zeros(width, arrays.counts.dtype)
    _add_all(arrays.counts[first], early)
    own = np.zeros((3, num_images))
    if len(scores):
        for e in range(3):
            own[e] = scores[positions[e]]
    columns = (arrays.first_column[middle], arrays.first_column[middle + 1])
    most = 0
    for other in range(columns[0], columns[1]):
        most = max(most, arrays.levels[other])
    ends = np.zeros((2, need.shape[1]), np.int64)
    tried = 0
    for column in range(arrays.first_column[first], arrays.first_column[first + 1]):
        row = (column - arrays.first_column[first]) * (num_images + 1)
        here = need[column - arrays.first_column[first]]
        if here.max() <= -8:
            continue
        keep = np.zeros((arrays.levels[column] + 1, most + 1), np.bool_)
        for other in range(columns[0], columns[1]):
            if not _ends(arrays, fine, column, other, here, ends):
                continue
            kept = _sift(arrays, fine, column, other, own, here, ends, price, line, steps, keep)
            if kept > 0:
                second = (other - columns[0]) * (num_images + 1)
                where = (column, other, row, second)
                tried += kept
                _try_columns(arrays, positions, where, leaving, early, max_cost, least_miou, keep, found)
    return tried


@compiled()
def _ends(arrays: Any, fine: Any, column: int, other: int, need: Any, ends: Any) -> bool:
    """``ends[:, r]``: the least and the largest level of the other column that may be news beside class r of the first
    one; False if there is none."""
    some = False
    ends[0] = 1
    ends[1] = 0
    known = -1
    for level in range(1, arrays.levels[column] + 1):
        r = fine[column, level]
        if r == known:
            continue
        known = r
        for j in range(1, arrays.levels[other] + 1):
            if need[r, fine[other, j]] > -8:
                if ends[1, r] == 0:
                    ends[0, r] = j
                ends[1, r] = j
                some = True
    return some


@compiled()
def _price(arrays: Any, leaving: Any) -> Any:
    """(3,) what an image adds to the objective's cost at each exit, or, on several devices, on one of them; zeros where
    it is no mean."""
    price = np.zeros(3)
    for m in range(len(leaving)):
        if arrays.kinds[m] == MEAN and arrays.weights[m] > 0:
            for e in range(3):
                price[e] = leaving[m, e] * arrays.weights[m] / arrays.counts.shape[1] * (1 - 1e-9)
            return price
    return price


@compiled()
def _sift(
    arrays: Any,
    fine: Any,
    column: int,
    other: int,
    scores: Any,
    need: Any,
    ends: Any,
    price: Any,
    line: Any,
    steps: Any,
    keep: Any,
) -> int:
    """Marks in ``keep`` (levels + 1, levels + 1) the pairs of levels that may be news: cost and linear form are sums of
    one number per image and exit. The number of pairs."""
    order, bins, other_bins = arrays.order[column], arrays.bins[column], arrays.bins[other]
    num_images, levels = len(order), arrays.levels[other]
    gain, reaching = np.zeros(levels + 1), np.zeros(levels + 1)
    whole, kept, v, saved = 0.0, 0, 0, price[1] - price[2]
    for image in range(num_images):
        whole += scores[0, image]
    keep[:] = False
    for level in range(1, arrays.levels[column] + 1):
        while v < num_images and bins[order[v]] < level:
            image = order[v]
            whole += scores[2, image] - scores[0, image]
            gain[other_bins[image]] += scores[1, image] - scores[2, image]
            reaching[other_bins[image]] += 1
            v += 1
        r = fine[column, level]
        low, high = ends[0, r], ends[1, r]
        if low > high:
            continue
        total, left = whole, 0.0
        for j in range(high + 1, levels + 1):
            total += gain[j]
            left += reaching[j]
        for j in range(high, low - 1, -1):
            total += gain[j]
            left += reaching[j]
            short = need[r, fine[other, j]]
            cost = (num_images - v) * price[0] + v * price[2] + left * saved
            if short < -8 or total - line[0] * cost < line[1] - short - MARGIN:
                continue
            step = 0
            while step < len(steps) and steps[step, 1] < cost:
                step += 1
            if step < len(steps) and total >= steps[step, 0] - short - MARGIN:
                keep[level, j] = True
                kept += 1
    return kept


@compiled()
def _try_columns(
    arrays: Any,
    positions: Any,
    where: Any,
    leaving: Any,
    early: Any,
    max_cost: float,
    least_miou: float,
    keep: Any,
    found: Any,
) -> None:
    """One column of thresholds at each of both early exits: as fewer images leave at the first, the others are added to
    the bin where the middle exit sends them; running over the bins then gives every level of the middle exit. Only
    levels to ``keep`` are evaluated."""
    first, middle, last = positions[0], positions[1], positions[2]
    column, other, row, second = where
    num_images, width = arrays.counts.shape[1:]
    at_first, at_middle, at_last = arrays.counts[first], arrays.counts[middle], arrays.counts[last]
    order, bins, other_bins = arrays.order[column], arrays.bins[column], arrays.bins[other]
    levels = arrays.levels[other]
    gain = np.zeros((levels + 1, width), arrays.counts.dtype)  # of leaving in the middle, by bin
    reaching = np.zeros(levels + 1, np.int64)
    base, summed = np.zeros(width, arrays.counts.dtype), np.zeros(width, arrays.counts.dtype)
    for k in range(width):
        base[k] = early[k]
    num_left = np.zeros(3, np.int64)
    v = 0
    for level in range(1, arrays.levels[column] + 1):
        while v < num_images and bins[order[v]] < level:
            image = order[v]
            a, b, c, into = at_first[image], at_middle[image], at_last[image], gain[other_bins[image]]
            for k in range(width):
                base[k] += c[k] - a[k]
                into[k] += b[k] - c[k]
            reaching[other_bins[image]] += 1
            v += 1
        lowest = 1
        while lowest <= levels and not keep[level, lowest]:
            lowest += 1
        if lowest > levels:
            continue
        for k in range(width):
            summed[k] = base[k]
        left = 0
        for j in range(levels, lowest - 1, -1):
            more = gain[j]
            if reaching[j] > 0:
                left += reaching[j]
                for k in range(width):
                    summed[k] += more[k]
            if not keep[level, j]:
                continue
            num_left[0], num_left[1], num_left[2] = num_images - v, left, v - left
            cost = _objective(arrays, leaving, num_left)
            if cost <= max_cost:
                key = _key(arrays, first, middle, last, row + num_images - level, second + num_images - j)
                _try(arrays, summed, cost, key, least_miou, found)
