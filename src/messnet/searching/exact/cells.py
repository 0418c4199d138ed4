"""Bounds of choices of three exits by cells of thresholds, compiled by numba when first called; ``kernels`` says what
V, H, K, a column of thresholds, its bins and levels are, ``engine`` what l, u and the remainder.

The sets of images that may leave at an exit, over all its thresholds, fall into classes by their size: 4 coarse ones,
of which each is two of 8, of which each is two of 16. Within a class an image leaves in all sets, in some or in none.
A cell is a class at the first exit and one at the middle one: where either is undecided about an image, the image takes
what is best for it, and the sum is an upper bound of l less the price. Cells that may hold news are divided.

The remainder wants the range of l and u over a cell. With A the set that leaves at a, B the one at b, D = A \\ B and
E = B \\ A, the sums are those of all images at c, and either of A moved from b to a, B from c to b and D from c to b,
or of A moved from c to a and E from c to b. What moving A or B as a whole does is known over the sets of each class; D
and E are within the images that some set of the one has and some set of the other lacks: few, where the one is small.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from messnet.records.arrays import FloatArray, IntArray
from messnet.searching.exact.bounds import compiled, remainder
from messnet.searching.exact.kernels import try_triple
from messnet.searching.exact.problem import Arrays

__all__ = ["FINE", "Form", "Sets", "bound_choices", "classes_of", "fill_ranges", "form_at", "try_choices"]

COARSE, HALF, FINE = 4, 8, 16
AT_HALF, AT_FINE = COARSE, COARSE + HALF  # where their classes begin
CLASSES = COARSE + HALF + FINE
OUT, SOME, IN = 0, 1, 2
BIG = np.float32(1e30)


class Sets(NamedTuple):
    """The classes of the sets of images that may leave, of a problem."""

    status: NDArray[np.int8]
    """(H - 1, CLASSES, V): whether the image leaves in no set of the class, in some, or in all (OUT, SOME, IN)."""
    valid: NDArray[np.bool_]
    """(H - 1, CLASSES): the class has a set."""
    fine: NDArray[np.int64]
    """(columns, levels + 1): the fine class of each level's set."""
    pairs: IntArray
    """(H,): the pair of exits p < q is at pairs[q] + p of the ranges."""


class Form(NamedTuple):
    """A tangent's linear form at a price."""

    x: NDArray[np.float32]
    """(H, V, 2 K): l and u, as the tangent's."""
    offsets: NDArray[np.float32]
    """(H, 2 K)"""
    floors: NDArray[np.float32]
    """(2, K)"""
    here: NDArray[np.float32]
    """(H, V + padding): the mean of l, less the price of the backbone and the output there."""
    end: NDArray[np.float32]
    """(H, V + padding): less that of the head too."""
    entry: NDArray[np.float32]
    """(H,): price of an early exit's head and decision, for each image that reaches it."""
    ranges: NDArray[np.float32]
    """(pairs, AT_FINE, 4 K): over the sets of a class of p, the largest and the least change of l and u when they leave
    at p, not at q."""


def classes_of(arrays: Arrays) -> Sets:
    num, num_images = len(arrays.first_column) - 1, arrays.counts.shape[1]
    status, valid = np.zeros((num, CLASSES, num_images), np.int8), np.zeros((num, CLASSES), np.bool_)
    fine = np.zeros((len(arrays.bins), 1 + int(arrays.levels.max(initial=0))), np.int64)
    _classify(arrays, status, valid, fine)
    before = np.searchsorted(arrays.exit_index, arrays.exit_index)
    return Sets(status, valid, fine, np.cumsum(np.r_[0, before[:-1]]))


@compiled()
def _classify(arrays: Any, status: Any, valid: Any, fine: Any) -> None:
    num_images = arrays.counts.shape[1]
    for h in range(len(status)):
        for c in range(FINE):
            status[h, AT_FINE + c] = IN
        some = np.zeros((FINE, num_images), np.bool_)
        for column in range(arrays.first_column[h], arrays.first_column[h + 1]):
            order, bins, v = arrays.order[column], arrays.bins[column], num_images - 1
            for level in range(arrays.levels[column], 0, -1):
                while v >= 0 and bins[order[v]] >= level:
                    v -= 1
                c = min(FINE - 1, (num_images - 1 - v) * FINE // num_images)
                highest = level == arrays.levels[column] or fine[column, level + 1] != c
                fine[column, level] = c
                valid[h, AT_FINE + c] = True
                for w in range(num_images):
                    leaves = bins[w] >= level
                    if highest and not leaves:
                        status[h, AT_FINE + c, w] = OUT
                    some[c, w] |= leaves
        for c in range(FINE):
            for w in range(num_images):
                if some[c, w] and status[h, AT_FINE + c, w] == OUT:
                    status[h, AT_FINE + c, w] = SOME
        for c in range(AT_FINE - 1, -1, -1):
            child = AT_FINE + 2 * (c - AT_HALF) if c >= AT_HALF else AT_HALF + 2 * c
            one, two = valid[h, child], valid[h, child + 1]
            valid[h, c] = one or two
            for w in range(num_images):
                a = status[h, child, w] if one else status[h, child + 1, w]
                b = status[h, child + 1, w] if two else a
                status[h, c, w] = a if a == b else SOME


def form_at(arrays: Arrays, sets: Sets, tangent: Any, prices: FloatArray) -> Form:
    """``prices`` (4, H): what the parts cost all images, in mIoU. The ranges are yet to be filled."""
    num_exits, num_images = arrays.counts.shape[:2]
    width = -(-num_images // 32) * 32
    share = 1 / num_images
    here, end = np.zeros((2, num_exits, width), np.float32)
    here[:, :num_images] = tangent.scores - share * (prices[0] + prices[3])[:, None]
    end[:, :num_images] = tangent.scores - share * (prices[0] + prices[1] + prices[3])[:, None]
    num_pairs = int(sets.pairs[-1]) + int(np.searchsorted(arrays.exit_index, arrays.exit_index[-1]))
    ranges = np.empty((num_pairs, AT_FINE, 2 * tangent.x.shape[2]), np.float32)
    entry = (share * (prices[1] + prices[2])).astype(np.float32)
    return Form(tangent.x, tangent.offsets, tangent.floors, here, end, entry, ranges)


@compiled(fastmath=True)
def fill_ranges(arrays: Any, sets: Any, form: Any, later: int, before: Any) -> None:
    """The ranges of the exits ``before`` the later one."""
    width, x = form.x.shape[2], form.x
    total, gain = np.zeros(width, np.float32), np.empty((x.shape[1], width), np.float32)
    for p in before:
        for v in range(len(gain)):
            for k in range(width):
                gain[v, k] = x[p, v, k] - x[later, v, k]
        out = form.ranges[sets.pairs[later] + p]
        out[:, :width] = -BIG
        out[:, width:] = BIG
        for column in range(arrays.first_column[p], arrays.first_column[p + 1]):
            order, bins = arrays.order[column], arrays.bins[column]
            total[:] = 0
            v = len(order) - 1
            for level in range(arrays.levels[column], 0, -1):
                while v >= 0 and bins[order[v]] >= level:
                    more = gain[order[v]]
                    for k in range(width):
                        total[k] += more[k]
                    v -= 1
                row = out[AT_HALF + sets.fine[column, level] // 2]
                for k in range(width):
                    row[k] = max(row[k], total[k])
                    row[width + k] = min(row[width + k], total[k])
        for c in range(COARSE):
            one, two, row = out[AT_HALF + 2 * c], out[AT_HALF + 2 * c + 1], out[c]
            for k in range(width):
                row[k] = max(one[k], two[k])
                row[width + k] = min(one[width + k], two[width + k])


@compiled(fastmath=True)
def _remainder(arrays: Any, form: Any, last: int, one: Any, two: Any, extra: Any, span: Any, tau: Any, few: Any) -> Any:
    """``remainder`` where l and u are those of all images at ``last`` and the sum of three changes (4 K,)."""
    offset = form.offsets[last]
    width = len(offset)
    for k in range(width):
        span[k] = offset[k] + one[k] + two[k] + extra[k]
        span[width + k] = offset[k] + one[width + k] + two[width + k] + extra[width + k]
    return remainder(span, form.floors, arrays.num_classes, tau, few)


@compiled(fastmath=True)
def _best_of(here: Any, status: Any, rest: Any) -> Any:
    """The best that a cell can be: of what may leave at the first exit, and the rest."""
    total = np.float32(0)
    for v in range(len(status)):
        total += max(rest[v] if status[v] == OUT else here[v], here[v] if status[v] == IN else rest[v])
    return total


@compiled(fastmath=True)
def _rest(arrays: Any, sets: Any, form: Any, last: int, middle: int, rest: Any, worth: Any, spare: Any) -> None:
    """What depends on the last two exits: ``rest`` (CLASSES, V + padding) the best of an image that does not leave at
    the first; ``worth`` (V, 4 K) what leaving at the middle one can add to l and u and take from them; ``spare``
    (2, AT_FINE, 4 K) that of all images that some set of a class lacks, and of those that some set has."""
    num_images, width = arrays.counts.shape[1], form.x.shape[2]
    entry = form.entry[middle]
    for c in range(CLASSES):
        status, row = sets.status[middle, c], rest[c]
        for v in range(num_images):
            here, there = form.here[middle, v], form.end[last, v]
            better = max(here, there)
            row[v] = (here if status[v] == IN else there if status[v] == OUT else better) - entry
    spare[:] = 0
    for v in range(num_images):
        mine, theirs, out = form.x[middle, v], form.x[last, v], worth[v]
        for k in range(width):
            out[k] = max(np.float32(0), mine[k] - theirs[k])
            out[width + k] = min(np.float32(0), mine[k] - theirs[k])
        for c in range(AT_HALF, AT_FINE):
            if sets.status[middle, c, v] != IN:
                row = spare[0, c]
                for k in range(len(out)):
                    row[k] += out[k]
            if sets.status[middle, c, v] != OUT:
                row = spare[1, c]
                for k in range(len(out)):
                    row[k] += out[k]
    for which in range(2):
        for c in range(COARSE):
            row, one, two = spare[which, c], spare[which, AT_HALF + 2 * c], spare[which, AT_HALF + 2 * c + 1]
            for k in range(width):
                row[k] = max(one[k], two[k])
                row[width + k] = min(one[width + k], two[width + k])


@compiled(fastmath=True)
def _spare(mine: Any, theirs: Any, worth: Any, extra: Any) -> None:
    """Sums ``worth`` over the images that some set of ``mine`` has and some set of ``theirs`` lacks."""
    extra[:] = 0
    images, num = np.empty(len(mine), np.int32), 0
    for v in range(len(mine)):
        images[num] = v
        num += (mine[v] != OUT) & (theirs[v] != IN)
    for i in range(num):
        row = worth[images[i]]
        for k in range(len(extra)):
            extra[k] += row[k]


@compiled(fastmath=True)
def _divide(
    arrays: Any,
    sets: Any,
    form: Any,
    exits: Any,
    rest: Any,
    worth: Any,
    spare: Any,
    target: Any,
    tau: Any,
    enough: Any,
    extra: Any,
    room: Any,
    need: Any,
) -> Any:
    """The largest bound of all cells of a choice (last, middle, first), -9 if all are below ``target``, or the first
    one that is ``enough``. ``need`` (FINE, FINE), -9 in all, becomes the remainder of each fine cell that may be
    news."""
    last, middle, first = exits
    here, mine, theirs = form.here[first], sets.status[first], sets.status[middle]
    both, later = form.ranges[sets.pairs[middle] + first], form.ranges[sets.pairs[last] + middle]
    over, none, span = form.ranges[sets.pairs[last] + first], extra[1], room
    values = np.empty((FINE, FINE), np.float32)
    paid, best = form.entry[first] * np.float32(arrays.counts.shape[1]), np.float32(-9)
    for r in range(COARSE):
        if not sets.valid[first, r]:
            continue
        for s in range(COARSE):
            if not sets.valid[middle, s]:
                continue
            value = _best_of(here, mine[r], rest[s]) - paid
            if r < s:
                wide = _remainder(arrays, form, last, both[r], later[s], spare[0, s], span, tau, target - value)
            else:
                wide = _remainder(arrays, form, last, over[r], none, spare[1, s], span, tau, target - value)
            if value + wide < target:
                continue
            for i in range(AT_HALF + 2 * r, AT_HALF + 2 * r + 2):
                for j in range(AT_HALF + 2 * s, AT_HALF + 2 * s + 2):
                    if not (sets.valid[first, i] and sets.valid[middle, j]):
                        continue
                    value = _best_of(here, mine[i], rest[j]) - paid
                    if value + wide < target:
                        continue
                    highest = np.float32(-BIG)
                    for a in range(2 * (i - AT_HALF), 2 * (i - AT_HALF) + 2):
                        for b in range(2 * (j - AT_HALF), 2 * (j - AT_HALF) + 2):
                            if sets.valid[first, AT_FINE + a] and sets.valid[middle, AT_FINE + b]:
                                values[a, b] = _best_of(here, mine[AT_FINE + a], rest[AT_FINE + b]) - paid
                                highest = max(highest, values[a, b])
                    if highest + wide < target:
                        continue
                    one, two = both[i] if i < j else over[i], later[j] if i < j else none
                    few = target - highest
                    short = _remainder(arrays, form, last, one, two, spare[0 if i < j else 1, j], span, tau, few)
                    if short < few:
                        continue
                    if i < j:
                        _spare(mine[i], theirs[j], worth, extra[0])
                    else:
                        _spare(theirs[j], mine[i], worth, extra[0])
                    short = min(short, _remainder(arrays, form, last, one, two, extra[0], span, tau, few))
                    short = min(short, wide)
                    for a in range(2 * (i - AT_HALF), 2 * (i - AT_HALF) + 2):
                        for b in range(2 * (j - AT_HALF), 2 * (j - AT_HALF) + 2):
                            if sets.valid[first, AT_FINE + a] and sets.valid[middle, AT_FINE + b]:
                                value = values[a, b] + short
                                if value >= target:
                                    need[a, b] = short
                                    best = max(best, value)
                    if best >= enough:
                        return best
    return best


@compiled()
def bound_choices(
    arrays: Any, sets: Any, form: Any, last: int, middles: Any, tau: float, target: float, exact: bool, bound: Any
) -> None:
    """Bounds pairs of ``middles`` and the exits before each. ``bound[middle, first]`` >= ``target``, a bound already,
    marks what to bound: it becomes the largest l - price + remainder over all thresholds, if that is less, or -9 if
    below ``target``. Not ``exact``: what is not below stays as it is, at less expense."""
    width, num_images = 2 * form.x.shape[2], arrays.counts.shape[1]
    rest, worth = np.zeros((CLASSES, form.here.shape[1]), np.float32), np.zeros((num_images, width), np.float32)
    spare, extra = np.zeros((2, AT_FINE, width), np.float32), np.zeros((2, width), np.float32)
    room, need = np.zeros(3 * width // 2, np.float32), np.zeros((FINE, FINE), np.float32)
    enough = np.float32(1e9) if exact else np.float32(target)
    for middle in middles:
        known = False
        for first in range(bound.shape[1]):
            if bound[middle, first] < target:
                continue
            if not known:
                _rest(arrays, sets, form, last, middle, rest, worth, spare)
                known = True
            exits = (last, middle, first)
            value = _divide(
                arrays,
                sets,
                form,
                exits,
                rest,
                worth,
                spare,
                np.float32(target),
                np.float32(tau),
                enough,
                extra,
                room,
                need,
            )
            if value < target:
                bound[middle, first] = -9
            elif exact:
                bound[middle, first] = min(bound[middle, first], value)


@compiled(fastmath=True)
def _narrow(arrays: Any, sets: Any, form: Any, exits: Any, rest: Any, target: Any, need: Any, narrow: Any) -> bool:
    """``narrow`` (columns of the first exit, FINE, FINE): what is left of ``need`` at each of its columns, of which
    every set is looked at now, not a class of them. Whether anything is."""
    _, _, first = exits
    num_images, some = arrays.counts.shape[1], False
    gain = np.empty(num_images, np.float32)
    narrow[:] = -9
    for s in range(FINE):
        if need[:, s].max() <= -8:
            continue
        row, whole = rest[AT_FINE + s], -form.entry[first] * np.float32(num_images)
        for v in range(num_images):
            gain[v] = form.here[first, v] - row[v]
            whole += row[v]
        for column in range(arrays.first_column[first], arrays.first_column[first + 1]):
            order, bins, fine = arrays.order[column], arrays.bins[column], sets.fine[column]
            mine = narrow[column - arrays.first_column[first]]
            total, v = whole, num_images - 1
            for level in range(arrays.levels[column], 0, -1):
                while v >= 0 and bins[order[v]] >= level:
                    total += gain[order[v]]
                    v -= 1
                short = need[fine[level], s]
                if total + short >= target:
                    mine[fine[level], s] = short
                    some = True
    return some


@compiled()
def try_choices(
    arrays: Any,
    sets: Any,
    form: Any,
    exits: Any,
    tau: float,
    target: float,
    max_cost: float,
    least_miou: float,
    scores: Any,
    line: Any,
    steps: Any,
    found: Any,
) -> int:
    """``try_triple`` for choices (n, 3) of last, middle, first, where their cells may hold news; those of the same last
    and middle exit are one after another."""
    width, num_images = 2 * form.x.shape[2], arrays.counts.shape[1]
    rest, worth = np.zeros((CLASSES, form.here.shape[1]), np.float32), np.zeros((num_images, width), np.float32)
    spare, extra = np.zeros((2, AT_FINE, width), np.float32), np.zeros((2, width), np.float32)
    room, need = np.zeros(3 * width // 2, np.float32), np.zeros((FINE, FINE), np.float32)
    narrow = np.zeros((np.diff(arrays.first_column).max(), FINE, FINE), np.float32)
    tried, low, enough = 0, np.float32(target), np.float32(1e9)
    for n in range(len(exits)):
        last, middle, first = exits[n]
        if n == 0 or exits[n - 1, 0] != last or exits[n - 1, 1] != middle:
            _rest(arrays, sets, form, last, middle, rest, worth, spare)
        need[:] = -9
        one = (last, middle, first)
        value = _divide(arrays, sets, form, one, rest, worth, spare, low, np.float32(tau), enough, extra, room, need)
        if value >= target and _narrow(arrays, sets, form, one, rest, low, need, narrow):
            tried += try_triple(arrays, sets.fine, one, max_cost, least_miou, narrow, scores, line, steps, found)
    return tried
