"""The front of three exits, strip by strip of cost, the dearest first (part of step 8).

One tangent and one price bound well only near where they are taken. So the front so far is cut into strips of cost
within which it is nearly straight, and each strip has its own. Its candidates are the choices with a chance of being
above the front there; a front that rises later only rules more of them out, so a strip that is done stays done. Stopped
early, the front is exact at the costs, and hence the mIoUs, of the strips that are done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from messnet.records.arrays import FloatArray, IntArray
from messnet.searching.exact.candidates import Candidates, candidate_mask
from messnet.searching.exact.least_cost import least_cost
from messnet.searching.exact.outcome import StoppedError

if TYPE_CHECKING:
    from messnet.searching.exact.solver import Solver

__all__ = ["sweep"]


def sweep(solver: Solver, lasts: Sequence[int]) -> tuple[float, float]:
    """Evaluates or rules out every choice of three exits before the last exits ``lasts``; returns the gaps (cost, mIoU)
    that are left."""
    edges, high = [-np.inf, np.inf], np.inf
    left: Candidates | None = None
    solver.exact_from = np.inf
    try:
        # No line rules out what costs less than every point of the front: that is evaluated without bounds.
        solver.try_fully(_cheaper_than_all(solver, lasts))
        _climb(solver, lasts)
        edges = [] if solver.stopped else _edges(solver, solver.tuning.bend)
        for low, high in _strips(solver, edges):
            left = None
            left = solver.evaluate(solver.bound(lasts, (low, high)), lasts)
            if solver.stopped:
                break
            solver.exact_from = _miou_at(solver, low)
    except (StoppedError, KeyboardInterrupt) as stop:
        solver.note_stop(stop)
    if not solver.stopped:
        solver.exact_from = -1.0
        return (np.inf, solver.precision) if solver.precision else (0.0, 0.0)
    # Below the proved mIoU nothing is above the front by more than from its least mIoU up to there.
    below = solver.exact_from - _miou_at(solver, -np.inf)
    if left is not None and edges and high == edges[1]:  # the last strip
        below = min(below, solver.gaps(left)[1])
    return np.inf, below + solver.precision


def _climb(solver: Solver, lasts: Sequence[int]) -> None:
    """Raises the front by choices of the exits that are on it: the higher it is, the fewer candidates there are."""
    seeds: IntArray = np.zeros((0, 3), np.int64)
    for low, high in _strips(solver, _edges(solver, 2 * solver.tuning.bend)):
        solver.choose_tangent((low, high))
        solver.try_all(seeds)
        solver.evaluate(solver.bound(lasts, (low, high), _of_exits_on_the_front(solver, lasts)), lasts)
        if solver.stopped:
            break
        seeds = _choices_between(solver, low, high)


def _strips(solver: Solver, edges: Sequence[float]) -> Iterator[tuple[float, float]]:
    """Strips (above, up to) of cost between ascending edges, the dearest first, where the front has a corner."""
    for low, high in zip(edges[-2::-1], edges[:0:-1], strict=True):
        if len(solver.corners_within((low, high))):
            yield low, high


def _edges(solver: Solver, bend: float) -> list[float]:
    """Ascending costs between the strips: within each the front's points are within ``bend`` (mIoU) of a line."""
    size = int(solver.front.size[0])
    if not (size and solver.priced):
        return [-np.inf, np.inf]
    costs, mious = solver.front.cost[:size], solver.front.miou[:size]
    edges, start = [-np.inf], 0  # from the cheapest on: what is left over is at the dear end, where strips take least
    while start < size - 1:
        stop = start + 1
        while (
            stop < size - 1
            and mious[stop] - mious[start] <= solver.tuning.rise * bend
            and _bend(mious[start : stop + 1], costs[start + 1 : stop + 2]) <= bend
        ):
            stop += 1
        edges.append(float(costs[stop]))
        start = stop
    return [*edges, np.inf]


def _bend(mious: FloatArray, costs: FloatArray) -> float:
    """How far points of the front are from the line through the first and the last one, mIoU."""
    slope = (mious[-1] - mious[0]) / (costs[-1] - costs[0])
    return float(np.ptp(mious - slope * costs))


def _miou_at(solver: Solver, cost: float) -> float:
    """The front's mIoU at a cost; at a smaller cost than it begins at, its smallest."""
    size = int(solver.front.size[0])
    if not size:
        return -1.0
    return float(solver.front.miou[max(0, int(np.searchsorted(solver.front.cost[:size], cost, side="right")) - 1)])


def _choices_between(solver: Solver, low: float, high: float) -> IntArray:
    """(n, 3) choices of three exits on the front, of a cost between two."""
    size = int(solver.front.size[0])
    costs = solver.front.cost[:size]
    positions = {
        solver.problem.positions_of(int(key)) for key in solver.front.key[:size][(costs > low) & (costs <= high)]
    }
    return np.array(sorted(one[::-1] for one in positions if len(one) == 3), np.int64).reshape(-1, 3)


def _of_exits_on_the_front(solver: Solver, lasts: Sequence[int]) -> Candidates:
    """The choices of three exits among those that instances on the front have."""
    problem, index = solver.problem, solver.arrays.exit_index
    keys = solver.front.key[: int(solver.front.size[0])].tolist()
    on_it = np.array(sorted({position for key in keys for position in problem.positions_of(key)}), np.int64)
    exits = [np.zeros((0, 3), np.int64)]
    for last in sorted(set(on_it.tolist()) & set(lasts)):
        before = on_it[on_it < problem.num_before(last)]
        middle, first = np.nonzero(index[before][:, None] > index[before])
        exits.append(np.stack([np.full(len(middle), last), before[middle], before[first]], axis=1))
    chosen = np.concatenate(exits)
    return Candidates(chosen, np.full((len(chosen), 1), np.inf), -1.0, [0.0])


def _cheaper_than_all(solver: Solver, lasts: Sequence[int]) -> IntArray:
    """(n, 3) choices with instances that may cost less than every point of the front."""
    exits = [np.zeros((0, 3), np.int64)]
    cheapest = solver.front.cost[: solver.front.size[0]].min(initial=np.inf)
    for last in lasts:
        num = solver.problem.num_before(last)
        cheaper = least_cost(solver.arrays, last, num) < cheapest
        middle, first = np.nonzero(candidate_mask(solver.arrays, last, num, np.inf, None) & cheaper)
        exits.append(np.stack([np.full(len(middle), last), middle, first], axis=1))
    return np.concatenate(exits)
