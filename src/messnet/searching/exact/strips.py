"""The front of three exits, strip by strip of cost, the dearest first (part of step 8).

One tangent and one price bound well only near where they are taken. So the front so far is cut into strips of cost
within which it is nearly straight, and each strip has its own. Its candidates are the choices with a chance of being
above the front there; a front that rises later only rules more of them out, so a strip that is done stays done. Stopped
early, the front is exact at the costs, and hence the mIoUs, of the strips that are done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from messnet.records.arrays import FloatArray, IntArray
from messnet.searching.exact.candidates import Candidates, candidate_mask, least_cost
from messnet.searching.exact.outcome import StoppedError
from messnet.searching.exact.solver import Solver


class FrontSolver(Solver):
    """One search for the whole front. ``run`` once."""

    def _search_triples(self) -> tuple[float, float]:
        """Evaluates or rules out every choice of three exits; returns the gaps (cost, mIoU) that are left."""
        lasts = self.lasts_of_triples()
        # Until the strips are known, one strip is left that covers every cost.
        edges, high = [-np.inf, np.inf], np.inf
        left: Candidates | None = None
        self.exact_from = np.inf
        try:
            # No line rules out what costs less than every point of the front: that is evaluated without bounds.
            self.try_fully(self._cheaper_than_all(lasts))
            self._climb(lasts)
            # The strips of the front as it is now; it rises while they are worked off, the dearest first.
            edges = [] if self.stopped else self._edges(self.tuning.bend)
            for low, high in self._strips(edges):
                left = None
                left = self.evaluate(self.bound(lasts, (low, high)), lasts)
                if self.stopped:
                    break
                # This strip is done, and with it all that is dearer, hence more accurate.
                self.exact_from = self._miou_at(low)
        except (StoppedError, KeyboardInterrupt) as stop:
            self.note_stop(stop)
        if not self.stopped:
            self.exact_from = -1.0
            return (np.inf, self.region.precision) if self.region.precision else (0.0, 0.0)
        # Below the proved mIoU nothing is above the front by more than from its least mIoU up to there.
        below = self.exact_from - self._miou_at(-np.inf)
        if left is not None and edges and high == edges[1]:  # the last strip
            below = min(below, self.gaps(left)[1])
        return np.inf, below + self.region.precision

    def _climb(self, lasts: Sequence[int]) -> None:
        """Raises the front by choices of the exits that are on it: the higher it is, the fewer candidates there are."""
        seeds: IntArray = np.zeros((0, 3), np.int64)
        # Twice as wide strips, for a front that is still rough.
        for low, high in self._strips(self._edges(2 * self.tuning.bend)):
            self.choose_tangent((low, high))
            self.try_all(seeds)
            self.evaluate(self.bound(lasts, (low, high), self._of_exits_on_the_front(lasts)), lasts)
            if self.stopped:
                break
            # What is good in this strip is a good start in the next, cheaper one.
            seeds = self._choices_between(low, high)

    def _strips(self, edges: Sequence[float]) -> Iterator[tuple[float, float]]:
        """Strips (above, up to) of cost between ascending edges, the dearest first, where the front has a corner."""
        for low, high in zip(edges[-2::-1], edges[:0:-1], strict=True):
            if len(self.corners_within((low, high))):
                yield low, high

    def _edges(self, bend: float) -> list[float]:
        """Ascending costs between the strips: within each the front's points are within ``bend`` (mIoU) of a line."""
        size = int(self.front.size[0])
        if not (size and self.priced):
            return [-np.inf, np.inf]
        costs, mious = self.front.cost[:size], self.front.miou[:size]
        # From the cheapest point on: what is left over is at the dear end, where strips take least.
        edges, start = [-np.inf], 0
        while start < size - 1:
            stop = start + 1
            # A strip grows until the front within it bends or rises too much for one tangent and one price.
            while (
                stop < size - 1
                and mious[stop] - mious[start] <= self.tuning.rise * bend
                and _bend(mious[start : stop + 1], costs[start + 1 : stop + 2]) <= bend
            ):
                stop += 1
            edges.append(float(costs[stop]))
            start = stop
        return [*edges, np.inf]

    def _miou_at(self, cost: float) -> float:
        """The front's mIoU at a cost; at a smaller cost than it begins at, its smallest."""
        size = int(self.front.size[0])
        if not size:
            return -1.0
        return float(self.front.miou[max(0, int(np.searchsorted(self.front.cost[:size], cost, side="right")) - 1)])

    def _choices_between(self, low: float, high: float) -> IntArray:
        """(n, 3) choices of three exits on the front, of a cost between two."""
        size = int(self.front.size[0])
        costs = self.front.cost[:size]
        positions = {
            self.problem.positions_of(int(key)) for key in self.front.key[:size][(costs > low) & (costs <= high)]
        }
        return np.array(sorted(one[::-1] for one in positions if len(one) == 3), np.int64).reshape(-1, 3)

    def _of_exits_on_the_front(self, lasts: Sequence[int]) -> Candidates:
        """The choices of three exits among those that instances on the front have."""
        problem, index = self.problem, self.arrays.exit_index
        keys = self.front.key[: int(self.front.size[0])].tolist()
        on_it = np.array(sorted({position for key in keys for position in problem.positions_of(key)}), np.int64)
        exits = [np.zeros((0, 3), np.int64)]
        for last in sorted(set(on_it.tolist()) & set(lasts)):
            before = on_it[on_it < problem.num_before(last)]
            middle, first = np.nonzero(index[before][:, None] > index[before])
            exits.append(np.stack([np.full(len(middle), last), before[middle], before[first]], axis=1))
        chosen = np.concatenate(exits)
        return Candidates(chosen, np.full(len(chosen), np.inf), -1.0, 0.0)

    def _cheaper_than_all(self, lasts: Sequence[int]) -> IntArray:
        """(n, 3) choices with instances that may cost less than every point of the front."""
        exits = [np.zeros((0, 3), np.int64)]
        cheapest = self.front.cost[: self.front.size[0]].min(initial=np.inf)
        for last in lasts:
            num = self.problem.num_before(last)
            cheaper = least_cost(self.arrays, last, num) < cheapest
            middle, first = np.nonzero(candidate_mask(self.arrays, last, num, np.inf, None) & cheaper)
            exits.append(np.stack([np.full(len(middle), last), middle, first], axis=1))
        return np.concatenate(exits)


def _bend(mious: FloatArray, costs: FloatArray) -> float:
    """How far points of the front are from the line through the first and the last one, mIoU."""
    # The line through the ends; points may lie on both sides of it.
    slope = (mious[-1] - mious[0]) / (costs[-1] - costs[0])
    return float(np.ptp(mious - slope * costs))
