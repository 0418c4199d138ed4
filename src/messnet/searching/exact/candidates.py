"""Choices of three exits, one head each, thresholds open: which of them bounds have not ruled out, what all of their
instances cost at least, and all instances of one choice."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from messnet.records.arrays import FloatArray, IntArray
from messnet.searching.exact import enumeration
from messnet.searching.exact.arrays import WHOLE_MAX, WHOLE_SUM, WORST, Arrays, Frontier
from messnet.searching.exact.bounds import MARGIN
from messnet.searching.exact.problem import Problem


class Candidates(NamedTuple):
    """The choices of three exits that may hold an instance better than what is known, and their bounds at one tangent
    and price: an instance of choice i has an mIoU of at most ``base + bounds[i] + price cost``."""

    exits: IntArray
    """(n, 3): last, middle, first."""
    bounds: FloatArray
    """(n,): the largest mean l - price cost, plus the remainder."""
    base: float
    """The tangent's mIoU, R."""
    price: float
    """mIoU per unit of the objective's cost."""
    costs: tuple[float, float] = (-np.inf, np.inf)
    """The bounds hold for instances that cost more than the one and at most the other."""

    def gaps(self, corners: FloatArray, has_best: bool) -> tuple[float, float]:
        """By how much an instance of a candidate may be better than ``corners`` (n, 2), of mIoU and cost: in cost,
        relative to the first corner's if that is the cheapest instance's (``has_best``), else infinite; and in mIoU."""
        if not len(self.exits) or not len(corners):
            return 0.0, 0.0
        # The highest of the candidates' lines at each corner's cost, less the corner's mIoU.
        highest, gap_cost = self.base + float(self.bounds.max()) + MARGIN, np.inf
        gap_miou = max(highest + self.price * cost - miou for miou, cost in corners.tolist())
        if has_best and self.price > 0:
            # A line with a price reaches the least mIoU at this much less cost, and not before.
            least_miou, cost = corners[0].tolist()
            gap_cost = (highest + self.price * cost - least_miou) / self.price / cost
        return max(gap_cost, 0.0), max(gap_miou, 0.0)


def candidate_mask(arrays: Arrays, last: int, num: int, max_cost: float, known: Candidates | None) -> NDArray[np.bool_]:
    """(middle, first) of the ``num`` exits before ``last``: those in order, not ruled out by what all their instances
    cost at least, and among those ``known`` if given."""
    # The middle exit lies deeper than the first, and each has a threshold to try.
    index = arrays.exit_index[:num]
    marked: NDArray[np.bool_] = index[:, None] > index[None, :]
    levels = np.diff(arrays.first_column)[:num] > 0
    marked &= levels[:, None] & levels[None, :]
    # A limit that every instance of the choice exceeds rules it out.
    for m in np.flatnonzero(arrays.limits < np.inf):
        marked &= least_cost_of_row(arrays, int(m), last, num) <= arrays.limits[m]
    if max_cost < np.inf:
        marked &= least_cost(arrays, last, num) <= max_cost
    # Only among those that earlier bounds left.
    if known is not None:
        among = np.zeros_like(marked)
        here = known.exits[known.exits[:, 0] == last]
        among[here[:, 1], here[:, 2]] = True
        marked &= among
    return marked


def least_cost(arrays: Arrays, last: int, num: int) -> FloatArray:
    """(middle, first) of the ``num`` exits before ``last``: no instance has a smaller objective's cost."""
    weighted = np.flatnonzero(arrays.weights > 0)
    costs = [arrays.weights[m] * least_cost_of_row(arrays, int(m), last, num) for m in weighted]
    # The objective is the largest weighted cost, so it is at least the largest of their bounds.
    least: FloatArray = np.maximum.reduce(costs)
    return least


def least_cost_of_row(arrays: Arrays, m: int, last: int, num: int) -> FloatArray:
    """(middle, first): no instance of the choice has a smaller cost in row m."""
    backbone, head, decision, output = arrays.parts[m]
    kind = arrays.kinds[m]
    paid = head[:num] + decision[:num]
    if kind in (WHOLE_SUM, WHOLE_MAX):
        # The cost of the whole instance does not depend on thresholds: this is it.
        join: np.ufunc = np.add if kind == WHOLE_SUM else np.maximum
        early = join(join(head[:num], decision[:num]), output[:num])
        own = join(join(backbone[last], head[last]), output[last])
        whole: FloatArray = join(join(early[:, None], early[None, :]), own)
        return whole
    # An image costs one of three sums, by the exit where it leaves.
    first = (backbone + output)[:num] + paid
    middle = first[:, None] + paid[None, :]
    end = paid[:, None] + paid[None, :] + backbone[last] + head[last] + output[last]
    # The images do not all leave at the first exit, so the costliest one pays at least the lesser of the other two.
    reached: FloatArray = np.minimum(middle, end)
    anywhere: FloatArray = np.minimum(reached, first[None, :])
    return reached if kind == WORST else anywhere


def evaluate_choice(problem: Problem, positions: tuple[int, ...], max_cost: float, least_miou: float) -> Frontier:
    """The front of all instances of one choice of one to three exits (positions shallow to deep) within the limits;
    nothing is ruled out by bounds."""
    front, limits = Frontier.empty(), (max_cost, least_miou)
    if len(positions) == 1:
        enumeration.try_single(problem.arrays, positions[0], front)
    elif len(positions) == 2:
        enumeration.try_pair(problem.arrays, positions[1], positions[0], (0, 1), *limits, front)
    else:
        # Everything that could rule an instance out is set to what rules out nothing.
        first, middle, last = positions
        # One class for all levels and a line and corner that everything is above: nothing is ruled out.
        fine = np.zeros((len(problem.arrays.bins), 1 + int(problem.arrays.levels.max(initial=0))), np.int64)
        slack = np.zeros((int(np.diff(problem.arrays.first_column).max()), 1, 1), np.float32)
        line, corners = np.array([0.0, -1e9]), np.array([[-1e9, max_cost]])
        scores, exits = np.zeros((0, 0)), (last, middle, first)
        enumeration.try_triple(problem.arrays, fine, exits, *limits, slack, scores, line, corners, front)
    return front
