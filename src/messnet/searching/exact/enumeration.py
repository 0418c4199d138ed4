"""Step 1 of the derivation: instances are evaluated by running sums.

The images that leave at one exit at level i of a column include those that leave at level i + 1. Going down the levels
images are added one by one, and the pixel counts of the whole instance change by what each image moves from one exit to
another. So all levels of a column cost one pass over the images instead of one pass each.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from messnet.records.arrays import FloatArray, IntArray
from messnet.searching.exact.arrays import MEAN, P95, RULED_OUT, WHOLE_SUM, WORST, Arrays, Counts, Float32, Frontier
from messnet.searching.exact.bounds import MARGIN
from messnet.searching.exact.compiling import compiled


@compiled()
def mean_iou_of(counts: Counts, num_classes: int, floors: FloatArray) -> float:
    """mIoU of summed counts (C,) to 12 decimals, or -1 where a class is below its floor."""
    # In float64, class after class: equal counts give equal sums, whatever the instance.
    total, num = 0.0, num_classes
    for k in range(num_classes):
        iou = counts[k] / counts[num_classes + k]
        if iou < floors[k]:
            return -1.0
        total += iou
    # A class that is only predicted has an IoU of 0: it counts in the mean and adds nothing to the sum.
    for k in range(2 * num_classes, len(counts)):
        if counts[k] > 0:
            num += 1
    # Rounded, so that float sums of equal ratios in another order compare as equal.
    return float(np.rint(total / num * 1e12) / 1e12)


@compiled()
def leaving_costs(arrays: Arrays, positions: IntArray) -> FloatArray:
    """(M, exits) costs of an image that leaves at each exit of an instance: ``CostColumn.leaving`` for the loops."""
    last = len(positions) - 1
    out = np.empty((len(arrays.kinds), len(positions)))
    for m in range(len(out)):
        parts = arrays.parts[m]
        if arrays.kinds[m] >= WHOLE_SUM:
            # Parameters and memory are those of all that the instance keeps, whichever exit an image takes.
            whole = parts[0, positions[last]]
            for e in range(last + 1):
                for part in range(1, 4):
                    # The last exit decides nothing.
                    if part == 2 and e == last:
                        continue
                    more = parts[part, positions[e]]
                    whole = whole + more if arrays.kinds[m] == WHOLE_SUM else max(whole, more)
            out[m] = whole
        else:
            # Work and latency: the backbone up to the exit, every head on the way, every decision but the last exit's,
            # one output.
            paid = 0.0
            for e in range(last + 1):
                p = positions[e]
                paid += parts[1, p] + (parts[2, p] if e < last else 0.0)
                out[m, e] = parts[0, p] + paid + parts[3, p]
    return out


@compiled()
def _statistic(kind: int, leaving: FloatArray, num_left: IntArray) -> float:
    """The mean, the largest, or the least cost that 95 % of the images do not exceed, where num_left[e] images leave at
    exit e."""
    # Only as many costs as exits occur, so that no image needs to be looked at.
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
    # At most so many costs are candidates for the 95th percentile as there are exits.
    if kind == P95:
        best = worst
        for e in range(len(leaving)):
            cheaper = 0
            for other in range(len(leaving)):
                if leaving[other] <= leaving[e]:
                    cheaper += num_left[other]
            # At least 95 % of the images, in integers.
            if 20 * cheaper >= 19 * num_images:
                best = min(best, leaving[e])
        return best
    return total / num_images


@compiled()
def _objective(arrays: Arrays, leaving: FloatArray, num_left: IntArray) -> float:
    """The objective's cost from leaving costs (M, exits), infinite where a limit is exceeded."""
    # The largest weighted cost over the devices; costs without a weight are limited only.
    worst = -np.inf
    for m in range(len(leaving)):
        value = _statistic(arrays.kinds[m], leaving[m], num_left)
        if value > arrays.limits[m]:
            return np.inf
        if arrays.weights[m] > 0:
            worst = max(worst, arrays.weights[m] * value)
    return worst


@compiled()
def _place(front: Frontier, cost: float) -> int:
    """The number of points that cost at most this."""
    # Bisection: costs ascend.
    low, high = 0, front.size[0]
    while low < high:
        middle = (low + high) // 2
        if front.cost[middle] <= cost:
            low = middle + 1
        else:
            high = middle
    return low


@compiled()
def _insert(front: Frontier, cost: float, miou: float, key: int) -> None:
    """Enters a point unless one at most as dear is as accurate, and drops those that it dominates."""
    place, size = _place(front, cost), front.size[0]
    if place > 0:
        before = place - 1
        # Costs at most as much and is more accurate: the new point is dominated.
        if front.miou[before] > miou:
            return
        # Equal mIoU: the cheaper one stays, of equally cheap ones the smaller key.
        if front.miou[before] == miou and (front.cost[before] < cost or front.key[before] < key):
            return
        # Equal cost and less accurate, or a larger key: replaced.
        if front.cost[before] == cost:
            place = before
    # Points from ``place`` to ``stop`` cost at least as much and are no more accurate: dominated.
    stop = place
    while stop < size and front.miou[stop] <= miou:
        stop += 1
    shift = 1 - (stop - place)
    if size + shift > len(front.cost):
        raise MemoryError
    # One point is entered, ``stop - place`` are dropped: the others move up or down.
    if shift > 0:
        for i in range(size - 1, stop - 1, -1):
            front.cost[i + 1], front.miou[i + 1], front.key[i + 1] = front.cost[i], front.miou[i], front.key[i]
    elif shift < 0:
        for i in range(stop, size):
            front.cost[i + shift], front.miou[i + shift] = front.cost[i], front.miou[i]
            front.key[i + shift] = front.key[i]
    front.cost[place], front.miou[place], front.key[place] = cost, miou, key
    front.size[0] = size + shift


@compiled()
def _try(arrays: Arrays, counts: Counts, cost: float, key: int, least_miou: float, front: Frontier) -> None:
    """Enters one instance whose cost is within its limits, if the front has none that is better."""
    if cost == np.inf:
        return
    miou = mean_iou_of(counts, arrays.num_classes, arrays.floors)
    if miou >= least_miou and miou >= 0:
        _insert(front, cost, miou, key)


@compiled()
def _all_at(arrays: Arrays, position: int) -> Counts:
    """(C,) counts where all images leave at one exit."""
    summed: Counts = arrays.counts[position].sum(0).astype(arrays.counts.dtype)
    return summed


@compiled()
def key_of(arrays: Arrays, first: int, middle: int, last: int, row: int, second_row: int) -> int:
    """The number that stands for an instance; ``first`` and ``middle`` are -1 where it has no such exit.

    Keys order instances as ties are resolved: fewer exits, then the shallower last, the shallower middle, the shallower
    first exit, then the pixel thresholds' order and the fewer images leaving early.
    """
    # Digits in a mixed base, the first criterion of the order the highest digit; 0 stands for no exit.
    num_exits = 1 + (first >= 0) + (middle >= 0)
    base = len(arrays.exit_index) + 1
    key = ((num_exits * base + last) * base + middle + 1) * base + first + 1
    return (key * arrays.rows_per_exit + row) * arrays.rows_per_exit + second_row


@compiled()
def merge(front: Frontier, others: Frontier) -> None:
    """Enters all of ``others``."""
    for i in range(others.size[0]):
        _insert(front, others.cost[i], others.miou[i], others.key[i])


@compiled()
def try_single(arrays: Arrays, position: int, front: Frontier) -> None:
    """All images leave at one exit."""
    leaving = leaving_costs(arrays, np.array([position]))
    cost = _objective(arrays, leaving, np.array([arrays.counts.shape[1]]))
    if cost < np.inf:
        _try(arrays, _all_at(arrays, position), cost, key_of(arrays, -1, -1, position, 0, 0), -1.0, front)


@compiled()
def try_pairs_before(
    arrays: Arrays,
    last: int,
    firsts: IntArray,
    part: tuple[int, int],
    max_cost: float,
    least_miou: float,
    cheapest: bool,
    scratch: Frontier,
    front: Frontier,
) -> tuple[int, FloatArray, IntArray]:
    """Evaluates the early exits ``firsts`` (n,) before ``last``, at all pixel thresholds or a ``part`` (start, step) of
    them.

    Returns the number of instances; the best of each early exit within the limits, the ``cheapest`` or the most
    accurate one, as cost and mIoU (n, 2), infinite if there is none; and their keys (n,). ``scratch`` is workspace.
    """
    best, keys = np.zeros((len(firsts), 2)), np.zeros(len(firsts), np.int64)
    tried = 0
    for n in range(len(firsts)):
        # A front of its own for each pair, of which the best feasible point is remembered, then merged.
        scratch.size[0] = 0
        tried += try_pair(arrays, last, firsts[n], part, np.inf, -1.0, scratch)
        merge(front, scratch)
        best[n, 0] = best[n, 1] = np.inf
        # Ascending cost is ascending mIoU: the first feasible point from the one end or the other is the best.
        for i in range(scratch.size[0]):
            point = i if cheapest else scratch.size[0] - 1 - i
            if scratch.miou[point] >= least_miou and scratch.cost[point] <= max_cost:
                best[n, 0], best[n, 1] = scratch.cost[point], scratch.miou[point]
                keys[n] = scratch.key[point]
                break
    return tried, best, keys


@compiled()
def try_pair(
    arrays: Arrays, last: int, first: int, part: tuple[int, int], max_cost: float, least_miou: float, front: Frontier
) -> int:
    """Evaluates every image threshold of early exit ``first`` before exit ``last``, at the pixel thresholds of a
    ``part`` (start, step); returns the number of instances."""
    num_images, width = arrays.counts.shape[1:]
    # What an image adds to the counts by leaving at the first exit instead of the last.
    gain = arrays.counts[first] - arrays.counts[last]
    everything = _all_at(arrays, last)
    summed, num_left = np.empty_like(everything), np.zeros(2, np.int64)
    # Costs of leaving at the one and at the other; how many do changes with the level.
    leaving = leaving_costs(arrays, np.array([first, last]))
    tried = 0
    for column in range(arrays.first_column[first] + part[0], arrays.first_column[first + 1], part[1]):
        order, bins = arrays.order[column], arrays.bins[column]
        summed[:] = everything
        # Summed counts at level i: all images at the last exit, plus the gain of those with bins >= i.
        v = num_images - 1
        row = (column - arrays.first_column[first]) * (num_images + 1)
        for level in range(arrays.levels[column], 0, -1):
            while v >= 0 and bins[order[v]] >= level:
                more = gain[order[v]]
                for k in range(width):
                    summed[k] += more[k]
                v -= 1
            tried += 1
            # The images from v + 1 on, in ascending order of bins, leave at the first exit.
            num_left[0], num_left[1] = num_images - 1 - v, v + 1
            cost = _objective(arrays, leaving, num_left)
            if cost <= max_cost:
                key = key_of(arrays, first, -1, last, row + num_images - level, 0)
                _try(arrays, summed, cost, key, least_miou, front)
    return tried


@compiled()
def try_triple(
    arrays: Arrays,
    fine: IntArray,
    exits: tuple[int, int, int],
    max_cost: float,
    least_miou: float,
    slack: Float32,
    scores: FloatArray,
    line: FloatArray,
    corners: FloatArray,
    front: Frontier,
) -> int:
    """Evaluates every pair of thresholds of a choice (last, middle, first) that bounds do not rule out; returns the
    number of instances whose mIoU was computed.

    ``fine`` (columns, levels + 1) is the class of each level, ``slack`` (columns of the first exit, classes, classes)
    the remainder of step 3 within each cell, RULED_OUT where the cell is ruled out. With ``scores`` (H, V), the mean of
    l of each image at each exit, an instance is ruled out unless both hold:

    - mean l + slack - price cost >= target, ``line`` being (price, target);
    - mean l + slack >= the mIoU of some corner of the front at that cost or less, ``corners`` (n, 2) being (mIoU less
      the tangent's, cost), ascending.
    """
    num_images = arrays.counts.shape[1]
    last, middle, first = exits
    positions = np.array([first, middle, last])
    leaving = leaving_costs(arrays, positions)
    price = _price(arrays, leaving)
    # Counts with all images at the first exit: level 0, from which ``_try_columns`` goes up.
    early = _all_at(arrays, first)
    # Without scores nothing is ruled out: mean l is taken for 0, and line and corners are below it.
    own = np.zeros((3, num_images))
    if len(scores):
        for e in range(3):
            own[e] = scores[positions[e]]
    columns = (arrays.first_column[middle], arrays.first_column[middle + 1])
    # One mask for all columns of the middle exit.
    most = 0
    for other in range(columns[0], columns[1]):
        most = max(most, arrays.levels[other])
    tried = 0
    for column in range(arrays.first_column[first], arrays.first_column[first + 1]):
        row = (column - arrays.first_column[first]) * (num_images + 1)
        here = slack[column - arrays.first_column[first]]
        # No cell of this column of the first exit is left.
        if here.max() <= RULED_OUT + 1:
            continue
        keep = np.zeros((arrays.levels[column] + 1, most + 1), np.bool_)
        for other in range(columns[0], columns[1]):
            # Cells first, then single thresholds by the linear form, then the exact mIoU of what is left.
            kept = _sift(arrays, fine, column, other, own, here, price, line, corners, keep)
            if kept > 0:
                second = (other - columns[0]) * (num_images + 1)
                where = (column, other, row, second)
                tried += kept
                _try_columns(arrays, positions, where, leaving, early, max_cost, least_miou, keep, front)
    return tried


@compiled()
def _price(arrays: Arrays, leaving: FloatArray) -> FloatArray:
    """(3,) what one image adds to the objective's cost by leaving at each exit; zeros where the objective is no mean.

    On several devices it is that of one of them: the objective, the largest, is no less, so what is ruled out by it is
    ruled out.
    """
    price = np.zeros(3)
    for m in range(len(leaving)):
        if arrays.kinds[m] == MEAN and arrays.weights[m] > 0:
            for e in range(3):
                price[e] = leaving[m, e] * arrays.weights[m] / arrays.counts.shape[1] * (1 - 1e-9)  # float sums
            return price
    return price


@compiled()
def _sift(
    arrays: Arrays,
    fine: IntArray,
    column: int,
    other: int,
    scores: FloatArray,
    slack: Float32,
    price: FloatArray,
    line: FloatArray,
    corners: FloatArray,
    keep: NDArray[np.bool_],
) -> int:
    """Marks in ``keep`` (levels + 1, levels + 1) the pairs of levels that are not ruled out; returns their number.

    Cost and mean l of a pair are sums over images of one number each, so both are running sums: over the levels of the
    first exit here, over those of the middle exit in the inner loop.
    """
    order, bins, other_bins = arrays.order[column], arrays.bins[column], arrays.bins[other]
    num_images, levels = len(order), arrays.levels[other]
    # By bin of the middle exit: how mean l changes if the images in it leave there, and their number.
    gain, reaching = np.zeros(levels + 1), np.zeros(levels + 1)
    # Level 0: all images leave at the first exit.
    whole, kept, v, saved = scores[0].sum(), 0, 0, price[1] - price[2]
    keep[:] = False
    for level in range(1, arrays.levels[column] + 1):
        # Images below the level leave it: to the last exit for now, and into their bin of the middle exit.
        while v < num_images and bins[order[v]] < level:
            image = order[v]
            whole += scores[2, image] - scores[0, image]
            gain[other_bins[image]] += scores[1, image] - scores[2, image]
            reaching[other_bins[image]] += 1
            v += 1
        # ``whole``: mean l where the images below this level go to the last exit, all others leave at the first.
        r = fine[column, level]
        total, left = whole, 0.0
        for j in range(levels, 0, -1):
            total += gain[j]
            left += reaching[j]
            # The images below this level that reach level j of the middle exit move there.
            short = slack[r, fine[other, j]]
            cost = (num_images - v) * price[0] + v * price[2] + left * saved
            # Step 4: R + price cost + (mean l - price cost) + slack is below the target.
            if short <= RULED_OUT + 1 or total - line[0] * cost < line[1] - short - MARGIN:
                continue
            # Step 3: R + mean l + slack is below the front at this cost.
            corner = 0
            while corner < len(corners) and corners[corner, 1] < cost:
                corner += 1
            if corner < len(corners) and total >= corners[corner, 0] - short - MARGIN:
                keep[level, j] = True
                kept += 1
    return kept


@compiled()
def _try_columns(
    arrays: Arrays,
    positions: IntArray,
    where: tuple[int, int, int, int],
    leaving: FloatArray,
    early: Counts,
    max_cost: float,
    least_miou: float,
    keep: NDArray[np.bool_],
    front: Frontier,
) -> None:
    """Evaluates the pairs of levels to ``keep`` of one column at each of both early exits.

    As the level of the first exit rises, images no longer leave there: each goes to the last exit (``base``) and is
    entered in the bin that it reaches at the middle exit (``gain``). Adding up the bins from the highest down then
    gives every level of the middle exit.
    """
    first, middle, last = positions[0], positions[1], positions[2]
    column, other, row, second = where
    num_images, width = arrays.counts.shape[1:]
    at_first, at_middle, at_last = arrays.counts[first], arrays.counts[middle], arrays.counts[last]
    order, bins, other_bins = arrays.order[column], arrays.bins[column], arrays.bins[other]
    levels = arrays.levels[other]
    gain = np.zeros((levels + 1, width), arrays.counts.dtype)  # of leaving in the middle, by bin
    reaching = np.zeros(levels + 1, np.int64)
    # Level 0: all images leave at the first exit.
    base, summed = early.copy(), np.empty_like(early)
    num_left = np.zeros(3, np.int64)
    v = 0
    for level in range(1, arrays.levels[column] + 1):
        while v < num_images and bins[order[v]] < level:
            image = order[v]
            # From the first exit to the last (``base``); from there to the middle one if that lets it (``into``).
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
        summed[:] = base
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
                key = key_of(arrays, first, middle, last, row + num_images - level, second + num_images - j)
                _try(arrays, summed, cost, key, least_miou, front)
