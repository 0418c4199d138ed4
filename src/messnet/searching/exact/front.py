"""The whole front over three exits: strips of cost, the dearest first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from messnet.records.arrays import FloatArray, IntArray
from messnet.searching.exact.cheapest import least_cost
from messnet.searching.exact.choices import Choices, wanted
from messnet.searching.exact.outcome import OutOfTimeError

if TYPE_CHECKING:
    from messnet.searching.exact.engine import Engine

__all__ = ["sweep"]

BEND = 3e-3  # mIoU; of the front within a strip, which has one tangent and one price
SPAN = 13  # bends; the largest mIoU less the least of a strip, with which the remainder grows


def sweep(engine: Engine, lasts: Sequence[int]) -> tuple[float, float]:
    """Evaluates or rules out every choice of three exits; the gaps (cost, mIoU) that are left.

    Each strip's instances are news if they are above the front at their cost; a front that rises later makes no news of
    what was none.
    """
    edges, high = [-np.inf, np.inf], np.inf
    left: Choices | None = None
    engine.exact_from = np.inf
    try:
        engine.try_fully(_cheaper_than_all(engine, lasts))
        _climb(engine, lasts)
        edges = [] if engine.stopped else _edges(engine, BEND)
        for low, high in _strips(engine, edges):
            left = None
            left = engine.settle(engine.bound(lasts, (low, high)), lasts)
            if engine.stopped:
                break
            engine.exact_from = _miou_at(engine, low)
    except (OutOfTimeError, KeyboardInterrupt) as stop:
        engine.stopped = "time limit" if isinstance(stop, OutOfTimeError) else "interrupted"
    if not engine.stopped:
        engine.exact_from = -1.0
        return (np.inf, engine.precision) if engine.precision else (0.0, 0.0)
    below = engine.exact_from - _miou_at(engine, -np.inf)
    if left is not None and edges and high == edges[1]:  # the last strip
        below = min(below, engine.gaps(left)[1])
    return np.inf, below + engine.precision


def _climb(engine: Engine, lasts: Sequence[int]) -> None:
    """Raises the front by the choices of exits that are on it: the higher it is, the fewer choices are left of all."""
    seeds: IntArray = np.zeros((0, 3), np.int64)
    for low, high in _strips(engine, _edges(engine, 2 * BEND)):
        engine.aim((low, high))
        engine.try_all(seeds)
        engine.settle(engine.bound(lasts, (low, high), _of_exits_on_the_front(engine, lasts)), lasts)
        if engine.stopped:
            break
        seeds = _choices_between(engine, low, high)


def _strips(engine: Engine, edges: Sequence[float]) -> Iterator[tuple[float, float]]:
    """Costs (above, up to) between ascending edges, the dearest first, where anything can be news."""
    for low, high in zip(edges[-2::-1], edges[:0:-1], strict=True):
        if len(engine.steps_within((low, high))):
            yield low, high


def _edges(engine: Engine, bend: float) -> list[float]:
    """Ascending costs between the strips: within each the steps are within ``bend`` (mIoU) of a line."""
    size = int(engine.found.size[0])
    if not (size and engine.priced):
        return [-np.inf, np.inf]
    costs, mious = engine.found.cost[:size], engine.found.miou[:size]
    edges, start = [-np.inf], 0  # from the cheapest on: what is left over is at the dear end, where strips take least
    while start < size - 1:
        stop = start + 1
        while (
            stop < size - 1
            and mious[stop] - mious[start] <= SPAN * bend
            and _bend(mious[start : stop + 1], costs[start + 1 : stop + 2]) <= bend
        ):
            stop += 1
        edges.append(float(costs[stop]))
        start = stop
    return [*edges, np.inf]


def _bend(mious: FloatArray, costs: FloatArray) -> float:
    """How far steps are from the line through the first and the last one, mIoU."""
    slope = (mious[-1] - mious[0]) / (costs[-1] - costs[0])
    return float(np.ptp(mious - slope * costs))


def _miou_at(engine: Engine, cost: float) -> float:
    """Of the front; at a smaller cost than it begins at, its smallest."""
    size = int(engine.found.size[0])
    if not size:
        return -1.0
    return float(engine.found.miou[max(0, int(np.searchsorted(engine.found.cost[:size], cost, side="right")) - 1)])


def _choices_between(engine: Engine, low: float, high: float) -> IntArray:
    """(n, 3) choices of three exits on the front, of a cost between two."""
    size = int(engine.found.size[0])
    costs = engine.found.cost[:size]
    positions = {
        engine.problem.positions_of(int(key)) for key in engine.found.key[:size][(costs > low) & (costs <= high)]
    }
    return np.array(sorted(one[::-1] for one in positions if len(one) == 3), np.int64).reshape(-1, 3)


def _of_exits_on_the_front(engine: Engine, lasts: Sequence[int]) -> Choices:
    """The choices of three exits that instances on the front stop at."""
    problem, index = engine.problem, engine.arrays.exit_index
    keys = engine.found.key[: int(engine.found.size[0])].tolist()
    on_it = np.array(sorted({position for key in keys for position in problem.positions_of(key)}), np.int64)
    exits = [np.zeros((0, 3), np.int64)]
    for last in sorted(set(on_it.tolist()) & set(lasts)):
        before = on_it[on_it < problem.num_before(last)]
        middle, first = np.nonzero(index[before][:, None] > index[before])
        exits.append(np.stack([np.full(len(middle), last), before[middle], before[first]], axis=1))
    chosen = np.concatenate(exits)
    return Choices(chosen, np.full((len(chosen), 1), np.inf), -1.0, [0.0])


def _cheaper_than_all(engine: Engine, lasts: Sequence[int]) -> IntArray:
    """(n, 3) choices that may cost less than every point of the front, where no line can rule them out."""
    exits = [np.zeros((0, 3), np.int64)]
    cheapest = engine.found.cost[: engine.found.size[0]].min(initial=np.inf)
    for last in lasts:
        num = engine.problem.num_before(last)
        cheaper = least_cost(engine.arrays, last, num) < cheapest
        middle, first = np.nonzero(wanted(engine.arrays, last, num, np.inf, None) & cheaper)
        exits.append(np.stack([np.full(len(middle), last), middle, first], axis=1))
    return np.concatenate(exits)
