"""Step 6 of the derivation: tighter bounds of a choice of three exits, by cells of its thresholds.

*Classes.* The sets of images that may leave at an exit, over all its thresholds, fall into classes by their size: 4
coarse ones, of which each is two of 8, of which each is two of 16 fine ones. Within a class an image leaves in no set,
in some, or in all. A *cell* is a class at the first exit together with one at the middle exit.

*Linear form.* Within a cell an image that leaves in all sets, or in none, has no choice; every other image is given the
exit with the largest g (step 4). The sum is an upper bound of G over the cell.

*Remainder.* Step 3 wants the ends of l and u over the cell. Let A be the images that leave at the first exit, B those
that reach the middle exit's threshold. Start with all images at the last exit. Move B from the last exit to the middle
one, then A from the middle exit to the first. That is wrong by D = A - B: those images came from the last exit, so add
the change from the last exit to the middle one for D.

What moving A or B as a whole changes is known: ``Form.ranges`` holds the most and the least over the sets of each
class. D lies within the images that some set of A's class has and some set of B's class lacks.

*Division.* A coarse cell whose bound reaches the target is divided into 4 cells, each of these into 4 fine ones.
``_divide`` returns the largest bound of all fine cells, and, as ``slack``, the remainder of each fine cell that is
left: step 7, ``enumeration.try_triple``, looks at their thresholds one by one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from messnet.records.arrays import FloatArray, IntArray
from messnet.searching.exact.arrays import RULED_OUT, Arrays, Float32, Frontier, Real
from messnet.searching.exact.bounds import remainder
from messnet.searching.exact.compiling import compiled
from messnet.searching.exact.enumeration import try_triple
from messnet.searching.exact.tangent import Tangent

Status = NDArray[np.int8]
COARSE, HALF, FINE = 4, 8, 16
AT_HALF, AT_FINE = COARSE, COARSE + HALF  # where their classes begin
CLASSES = COARSE + HALF + FINE
OUT, SOME, IN = 0, 1, 2  # an image leaves in no set of a class, in some, in all
BIG = np.float32(1e30)


class Sets(NamedTuple):
    """The classes of the sets of images that may leave, at every early exit."""

    status: Status
    """(H - 1, CLASSES, V): OUT, SOME or IN."""
    valid: NDArray[np.bool_]
    """(H - 1, CLASSES): the class has a set."""
    fine: NDArray[np.int64]
    """(columns, levels + 1): the fine class of the set at each level."""
    pairs: IntArray
    """(H,): the pair of exits p < q is at ``pairs[q] + p`` of ``Form.ranges``."""


class Form(NamedTuple):
    """A tangent's linear form at a price (steps 2 and 4)."""

    x: Float32
    """(H, V, 2 K), of the tangent."""
    offsets: Float32
    """(H, 2 K), of the tangent."""
    floors: Float32
    """(2, K), of the tangent."""
    here: Float32
    """(H, V + padding): what an image adds to mean l by leaving at an early exit, less the price of the backbone up to
    there and of the output."""
    end: Float32
    """(H, V + padding): the same of a last exit, less the price of its head too."""
    entry: Float32
    """(H,): the price of an early exit's head and decision, which each image that reaches it pays."""
    ranges: Float32
    """(pairs, AT_FINE, 4 K): the most and the least by which l and u change when a set of a class of p leaves at p
    instead of q."""


def classes_of(arrays: Arrays) -> Sets:
    """The classes of all early exits."""
    num, num_images = len(arrays.first_column) - 1, arrays.counts.shape[1]
    status, valid = np.zeros((num, CLASSES, num_images), np.int8), np.zeros((num, CLASSES), np.bool_)
    fine = np.zeros((len(arrays.bins), 1 + int(arrays.levels.max(initial=0))), np.int64)
    _classify(arrays, status, valid, fine)
    # The exits before q are those of shallower exit points: pairs are numbered q by q.
    before = np.searchsorted(arrays.exit_index, arrays.exit_index)
    return Sets(status, valid, fine, np.cumsum(np.r_[0, before[:-1]]))


@compiled()
def _classify(arrays: Arrays, status: Status, valid: NDArray[np.bool_], fine: IntArray) -> None:
    """Fills ``Sets``: fine classes from the sets of every level, the coarser ones from their two children."""
    num_images = arrays.counts.shape[1]
    for h in range(len(status)):
        # IN until a set lacks the image; ``some`` once a set has it.
        for c in range(FINE):
            status[h, AT_FINE + c] = IN
        some = np.zeros((FINE, num_images), np.bool_)
        for column in range(arrays.first_column[h], arrays.first_column[h + 1]):
            order, bins, v = arrays.order[column], arrays.bins[column], num_images - 1
            for level in range(arrays.levels[column], 0, -1):
                while v >= 0 and bins[order[v]] >= level:
                    v -= 1
                # The class of a set is its size: the share of images in it, in sixteenths.
                c = min(FINE - 1, (num_images - 1 - v) * FINE // num_images)
                # Sets shrink as levels rise: the highest level of a class in a column has the smallest set.
                highest = level == arrays.levels[column] or fine[column, level + 1] != c
                fine[column, level] = c
                valid[h, AT_FINE + c] = True
                for w in range(num_images):
                    leaves = bins[w] >= level
                    if highest and not leaves:
                        status[h, AT_FINE + c, w] = OUT
                    some[c, w] |= leaves
        # Lacked by some set and held by some other: undecided.
        for c in range(FINE):
            for w in range(num_images):
                if some[c, w] and status[h, AT_FINE + c, w] == OUT:
                    status[h, AT_FINE + c, w] = SOME
        # Coarser classes, from the fine ones up: what both children agree on, else undecided.
        for c in range(AT_FINE - 1, -1, -1):
            child = AT_FINE + 2 * (c - AT_HALF) if c >= AT_HALF else AT_HALF + 2 * c
            one, two = valid[h, child], valid[h, child + 1]
            valid[h, c] = one or two
            for w in range(num_images):
                a = status[h, child, w] if one else status[h, child + 1, w]
                b = status[h, child + 1, w] if two else a
                status[h, c, w] = a if a == b else SOME


def form_at(arrays: Arrays, sets: Sets, tangent: Tangent, prices: FloatArray) -> Form:
    """The linear form of a tangent; ``prices`` (4, H) are what the parts cost if all images pay them, in mIoU. Its
    ranges are yet to be filled, see ``fill_ranges``."""
    num_exits, num_images = arrays.counts.shape[:2]
    # Padded, so that the compiled loops over images run without a remainder.
    width = -(-num_images // 32) * 32
    # Costs are means over images: each carries its share of the price.
    share = 1 / num_images
    here, end = np.zeros((2, num_exits, width), np.float32)
    here[:, :num_images] = tangent.scores - share * (prices[0] + prices[3])[:, None]
    end[:, :num_images] = tangent.scores - share * (prices[0] + prices[1] + prices[3])[:, None]
    num_pairs = int(sets.pairs[-1]) + int(np.searchsorted(arrays.exit_index, arrays.exit_index[-1]))
    ranges = np.empty((num_pairs, AT_FINE, 2 * tangent.x.shape[2]), np.float32)
    entry = (share * (prices[1] + prices[2])).astype(np.float32)
    return Form(tangent.x, tangent.offsets, tangent.floors, here, end, entry, ranges)


@compiled(fastmath=True)
def fill_ranges(arrays: Arrays, sets: Sets, form: Form, later: int, before: IntArray) -> None:
    """Fills the ranges of the exits ``before`` (n,) the later one, by a running sum over each column."""
    width, x = form.x.shape[2], form.x
    total, gain = np.zeros(width, np.float32), np.empty((x.shape[1], width), np.float32)
    for p in before:
        for v in range(len(gain)):
            for k in range(width):
                # The change of l and u when an image leaves at p instead of the later exit.
                gain[v, k] = x[p, v, k] - x[later, v, k]
        out = form.ranges[sets.pairs[later] + p]
        out[:, :width] = -BIG
        out[:, width:] = BIG
        for column in range(arrays.first_column[p], arrays.first_column[p + 1]):
            order, bins = arrays.order[column], arrays.bins[column]
            total[:] = 0
            v = len(order) - 1
            for level in range(arrays.levels[column], 0, -1):
                # A running sum over the images of the set at this level.
                while v >= 0 and bins[order[v]] >= level:
                    more = gain[order[v]]
                    for k in range(width):
                        total[k] += more[k]
                    v -= 1
                # The most and the least over all sets of the class, of all columns.
                row = out[AT_HALF + sets.fine[column, level] // 2]
                for k in range(width):
                    row[k] = max(row[k], total[k])
                    row[width + k] = min(row[width + k], total[k])
        # A coarse class holds the sets of its two halves.
        for c in range(COARSE):
            _widen(out, c)


@compiled(fastmath=True)
def _widen(ends: Float32, c: int) -> None:
    """Fills row c, of a coarse class, of ends (AT_FINE, 4 K) with what holds for both of its halves."""
    one, two, row, width = ends[AT_HALF + 2 * c], ends[AT_HALF + 2 * c + 1], ends[c], ends.shape[1] // 2
    for k in range(width):
        row[k] = max(one[k], two[k])
        row[width + k] = min(one[width + k], two[width + k])


class _Workspace(NamedTuple):
    """What bounding a choice needs room for; the first three depend on the last two exits only."""

    later: Float32
    """(CLASSES, V + padding): the best that an image can be that does not leave at the first exit, by the class of the
    middle one."""
    change: Float32
    """(V, 4 K): the most and the least by which an image changes l and u by leaving at the middle exit, not the
    last."""
    whole: Float32
    """(AT_FINE, 4 K): the sum of ``change`` over the images that some set of a class lacks, which hold D = A - B."""
    extra: Float32
    """(4 K,): the change of D."""
    span: Float32
    """(6 K,), see ``remainder``."""
    slack: Float32
    """(FINE, FINE): the remainder of each fine cell that is not ruled out."""


@compiled()
def _workspace(arrays: Arrays, form: Form) -> _Workspace:
    width, num_images = 2 * form.x.shape[2], arrays.counts.shape[1]
    return _Workspace(
        np.zeros((CLASSES, form.here.shape[1]), np.float32),
        np.zeros((num_images, width), np.float32),
        np.zeros((AT_FINE, width), np.float32),
        np.zeros(width, np.float32),
        np.zeros(3 * width // 2, np.float32),
        np.zeros((FINE, FINE), np.float32),
    )


@compiled(fastmath=True)
def _remainder(
    arrays: Arrays,
    form: Form,
    last: int,
    parts: tuple[Float32, Float32, Float32],
    span: Float32,
    tau: Real,
    least: Real,
) -> np.float32:
    """Step 3 where l and u are those of all images at the last exit plus the changes of three ``parts`` (4 K,)."""
    offset, (one, two, three) = form.offsets[last], parts
    width = len(offset)
    for k in range(width):
        span[k] = offset[k] + one[k] + two[k] + three[k]
        span[width + k] = offset[k] + one[width + k] + two[width + k] + three[width + k]
    return remainder(span, form.floors, arrays.num_classes, tau, least)


@compiled(fastmath=True)
def _best_of(here: Float32, status: Status, later: Float32) -> np.float32:
    """The linear form's bound of a cell: each image at the first exit (``here``), or at its best exit after it
    (``later``), as its status lets it."""
    # OUT: later. IN: at the first exit. SOME: the better of the two.
    total = np.float32(0)
    for v in range(len(status)):
        total += max(later[v] if status[v] == OUT else here[v], here[v] if status[v] == IN else later[v])
    return total


@compiled(fastmath=True)
def _prepare(arrays: Arrays, sets: Sets, form: Form, last: int, middle: int, work: _Workspace) -> None:
    """Computes the part of the workspace that is the same for all first exits before the last two."""
    later, change, whole = work.later, work.change, work.whole
    num_images, width = arrays.counts.shape[1], form.x.shape[2]
    # Every image that does not leave at the first exit reaches the middle one and pays its entry.
    entry = form.entry[middle]
    for c in range(CLASSES):
        status, row = sets.status[middle, c], later[c]
        for v in range(num_images):
            here, there = form.here[middle, v], form.end[last, v]
            better = max(here, there)
            # IN: leaves at the middle exit. OUT: goes on to the last. SOME: the better of the two.
            row[v] = (here if status[v] == IN else there if status[v] == OUT else better) - entry
    # D lies in what B may lack: the sum over all such images bounds it for any A.
    whole[:] = 0
    for v in range(num_images):
        mine, theirs, out = form.x[middle, v], form.x[last, v], change[v]
        for k in range(width):
            out[k] = max(np.float32(0), mine[k] - theirs[k])
            out[width + k] = min(np.float32(0), mine[k] - theirs[k])
        for c in range(AT_HALF, AT_FINE):
            if sets.status[middle, c, v] != IN:
                row = whole[c]
                for k in range(len(out)):
                    row[k] += out[k]
    # A coarse class: the wider of its two halves.
    for c in range(COARSE):
        _widen(whole, c)


@compiled(fastmath=True)
def _sum_between(mine: Status, theirs: Status, change: Float32, extra: Float32) -> None:
    """Sums ``change`` (V, 4 K) over the images that some set of the one class has and some set of the other lacks."""
    # Positions first, without a branch, then the few rows that count.
    extra[:] = 0
    images, num = np.empty(len(mine), np.int32), 0
    for v in range(len(mine)):
        images[num] = v
        num += (mine[v] != OUT) & (theirs[v] != IN)
    for i in range(num):
        row = change[images[i]]
        for k in range(len(extra)):
            extra[k] += row[k]


@compiled(fastmath=True)
def _divide(
    arrays: Arrays,
    sets: Sets,
    form: Form,
    exits: tuple[int, int, int],
    work: _Workspace,
    target: Real,
    tau: Real,
    enough: Real,
) -> np.float32:
    """The largest bound of all fine cells of a choice (last, middle, first), RULED_OUT if all are below ``target``, or
    the first bound that is ``enough``. The workspace comes from ``_prepare``; its ``slack``, RULED_OUT everywhere
    before, becomes the remainder of each fine cell that is not ruled out."""
    later, change, whole, extra, span, slack = work
    last, middle, first = exits
    here, mine, theirs = form.here[first], sets.status[first], sets.status[middle]
    # Changes of l and u: A from the middle exit to the first; B from the last to the middle.
    a_moves, b_moves = form.ranges[sets.pairs[middle] + first], form.ranges[sets.pairs[last] + middle]
    values = np.empty((FINE, FINE), np.float32)
    # All images pay the first exit's head and decision.
    paid, best = form.entry[first] * np.float32(arrays.counts.shape[1]), RULED_OUT
    for r in range(COARSE):
        if not sets.valid[first, r]:
            continue
        for s in range(COARSE):
            if not sets.valid[middle, s]:
                continue
            # Coarse cell: bound of G, and the remainder with D taken as large as the middle exit's class lets it.
            value = _best_of(here, mine[r], later[s]) - paid
            parts = (a_moves[r], b_moves[s], whole[s])
            wide = _remainder(arrays, form, last, parts, span, tau, target - value)
            if value + wide < target:
                continue
            for i in range(AT_HALF + 2 * r, AT_HALF + 2 * r + 2):
                for j in range(AT_HALF + 2 * s, AT_HALF + 2 * s + 2):
                    if not (sets.valid[first, i] and sets.valid[middle, j]):
                        continue
                    # Half cell: a tighter bound of G with the coarse remainder,
                    value = _best_of(here, mine[i], later[j]) - paid
                    if value + wide < target:
                        continue
                    # then that of its four fine cells,
                    highest = np.float32(-BIG)
                    for a in range(2 * (i - AT_HALF), 2 * (i - AT_HALF) + 2):
                        for b in range(2 * (j - AT_HALF), 2 * (j - AT_HALF) + 2):
                            if sets.valid[first, AT_FINE + a] and sets.valid[middle, AT_FINE + b]:
                                values[a, b] = _best_of(here, mine[AT_FINE + a], later[AT_FINE + b]) - paid
                                highest = max(highest, values[a, b])
                    if highest + wide < target:
                        continue
                    # then the half cell's own remainder, with D by the middle exit's class,
                    missing = target - highest
                    parts = (a_moves[i], b_moves[j], whole[j])
                    short = _remainder(arrays, form, last, parts, span, tau, missing)
                    if short < missing:
                        continue
                    # and with the images that can be in D by the classes of both exits.
                    _sum_between(mine[i], theirs[j], change, extra)
                    parts = (a_moves[i], b_moves[j], extra)
                    short = min(short, _remainder(arrays, form, last, parts, span, tau, missing))
                    short = min(short, wide)
                    for a in range(2 * (i - AT_HALF), 2 * (i - AT_HALF) + 2):
                        for b in range(2 * (j - AT_HALF), 2 * (j - AT_HALF) + 2):
                            if sets.valid[first, AT_FINE + a] and sets.valid[middle, AT_FINE + b]:
                                value = values[a, b] + short
                                if value >= target:
                                    # A bound that reaches the target: the cell stays, with its remainder for step 7.
                                    slack[a, b] = short
                                    best = max(best, value)
                    # Not to be ruled out: how much better it may be was not asked.
                    if best >= enough:
                        return best
    return best


@compiled()
def bound_choices(
    arrays: Arrays,
    sets: Sets,
    form: Form,
    last: int,
    middles: IntArray,
    tau: Real,
    target: Real,
    exact: bool,
    bound: Float32,
) -> None:
    """Bounds the pairs of ``middles`` (n,) and the exits before each.

    ``bound[middle, first]`` >= ``target``, a bound already, marks what to bound. It becomes RULED_OUT if no instance of
    the choice can reach the target, else the largest bound of its cells if that is less. If not ``exact``, what can
    reach the target keeps its bound, at less expense.
    """
    work, low, high = _workspace(arrays, form), np.float32(target), np.float32(tau)
    enough = np.float32(1e9) if exact else np.float32(target)
    for middle in middles:
        prepared = False
        for first in range(bound.shape[1]):
            # Ruled out by a quicker bound.
            if bound[middle, first] < target:
                continue
            # Once for all first exits before this middle one.
            if not prepared:
                _prepare(arrays, sets, form, last, middle, work)
                prepared = True
            value = _divide(arrays, sets, form, (last, middle, first), work, low, high, enough)
            if value < target:
                bound[middle, first] = RULED_OUT
            elif exact:
                bound[middle, first] = min(bound[middle, first], value)


@compiled(fastmath=True)
def _narrow(
    arrays: Arrays, sets: Sets, form: Form, exits: tuple[int, int, int], work: _Workspace, target: Real, narrow: Float32
) -> bool:
    """Rules out more fine cells by looking at every set of the first exit instead of its classes.

    ``narrow`` (columns of the first exit, FINE, FINE) becomes what is left of the slack at each of its columns. Returns
    whether anything is left.
    """
    later, slack = work.later, work.slack
    _, _, first = exits
    num_images, some = arrays.counts.shape[1], False
    gain = np.empty(num_images, np.float32)
    narrow[:] = RULED_OUT
    for s in range(FINE):
        if slack[:, s].max() <= RULED_OUT + 1:
            continue
        # All images after the first exit, at their best there; ``gain``: what leaving at the first exit adds.
        row, total_later = later[AT_FINE + s], -form.entry[first] * np.float32(num_images)
        for v in range(num_images):
            gain[v] = form.here[first, v] - row[v]
            total_later += row[v]
        for column in range(arrays.first_column[first], arrays.first_column[first + 1]):
            order, bins, fine = arrays.order[column], arrays.bins[column], sets.fine[column]
            mine = narrow[column - arrays.first_column[first]]
            # A running sum: the images of the set at the first exit, all others at their best exit after it.
            total, v = total_later, num_images - 1
            for level in range(arrays.levels[column], 0, -1):
                while v >= 0 and bins[order[v]] >= level:
                    total += gain[order[v]]
                    v -= 1
                # Step 6 with the set itself at the first exit, classes at the middle one only.
                short = slack[fine[level], s]
                if total + short >= target:
                    mine[fine[level], s] = short
                    some = True
    return some


@compiled()
def evaluate_choices(
    arrays: Arrays,
    sets: Sets,
    form: Form,
    exits: IntArray,
    tau: Real,
    target: Real,
    max_cost: float,
    least_miou: float,
    scores: FloatArray,
    line: FloatArray,
    corners: FloatArray,
    front: Frontier,
) -> int:
    """Step 7: evaluates choices (n, 3) of last, middle, first, as far as their cells do not rule them out; those of the
    same last and middle exit are best one after another. Returns the number of instances whose mIoU was computed."""
    work = _workspace(arrays, form)
    narrow = np.zeros((np.diff(arrays.first_column).max(), FINE, FINE), np.float32)
    tried, low, enough = 0, np.float32(target), np.float32(1e9)
    for n in range(len(exits)):
        last, middle, first = exits[n]
        # The last two exits are the same as before: so is what depends on them alone.
        if n == 0 or exits[n - 1, 0] != last or exits[n - 1, 1] != middle:
            _prepare(arrays, sets, form, last, middle, work)
        # Which fine cells are left, then which of their columns, then their thresholds.
        work.slack[:] = RULED_OUT
        one = (last, middle, first)
        value = _divide(arrays, sets, form, one, work, low, np.float32(tau), enough)
        if value >= target and _narrow(arrays, sets, form, one, work, low, narrow):
            tried += try_triple(arrays, sets.fine, one, max_cost, least_miou, narrow, scores, line, corners, front)
    return tried
