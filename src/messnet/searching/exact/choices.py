"""Choices of three exits: which may be news, and every instance of one choice."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from messnet.records.arrays import FloatArray, IntArray
from messnet.searching.exact import kernels
from messnet.searching.exact.bounds import MARGIN
from messnet.searching.exact.cheapest import cheapest, least_cost
from messnet.searching.exact.problem import Arrays, Found, Problem

__all__ = ["Choices", "nothing", "try_choice", "wanted"]

CAPACITY = 1 << 16  # points of a front


class Choices(NamedTuple):
    """Choices of three exits that may be news, and their lines against one tangent."""

    exits: IntArray
    """(n, 3): last, middle, first."""
    bounds: FloatArray
    """(n, prices): largest l - mu cost + remainder."""
    base: float
    """The tangent's mIoU."""
    prices: list[float]
    """mu, mIoU per unit of the objective's cost."""
    costs: tuple[float, float] = (-np.inf, np.inf)
    """The bounds hold for instances that cost more than the one, at most the other."""

    def gaps(self, steps: FloatArray, has_best: bool) -> tuple[float, float]:
        """What the lines leave open above ``steps`` (n, 2), of mIoU and cost: the cost relative to the first step's, if
        that is the cheapest instance's (``has_best``), else infinite; and the mIoU."""
        if not len(self.exits) or not len(steps):
            return 0.0, 0.0
        prices, gap_cost = np.array(self.prices), np.inf
        gap_miou = max(
            float((self.base + self.bounds + prices * cost).min(1).max() - miou) + MARGIN for miou, cost in steps
        )
        if has_best and (prices > 0).any():
            least_miou, cost = steps[0]
            saved = (self.base + self.bounds + prices * cost - least_miou)[:, prices > 0] / prices[prices > 0]
            gap_cost = float((saved.min(1) + MARGIN / prices.max()).max() / cost)
        return max(gap_cost, 0.0), max(gap_miou, 0.0)


def wanted(arrays: Arrays, last: int, num: int, max_cost: float, known: Choices | None) -> NDArray[np.bool_]:
    """(middle, first) before ``last``: in order, not ruled out by what all their instances cost, and known."""
    index = arrays.exit_index[:num]
    marked: NDArray[np.bool_] = index[:, None] > index[None, :]
    levels = np.diff(arrays.first_column)[:num] > 0
    marked &= levels[:, None] & levels[None, :]
    for m in np.flatnonzero(arrays.limits < np.inf):
        marked &= cheapest(arrays, int(m), last, num) <= arrays.limits[m]
    if max_cost < np.inf:
        marked &= least_cost(arrays, last, num) <= max_cost
    if known is not None:
        among = np.zeros_like(marked)
        here = known.exits[known.exits[:, 0] == last]
        among[here[:, 1], here[:, 2]] = True
        marked &= among
    return marked


def nothing() -> Found:
    return Found(np.zeros(CAPACITY), np.zeros(CAPACITY), np.zeros(CAPACITY, np.int64), np.zeros(1, np.int64))


def try_choice(problem: Problem, positions: tuple[int, ...], max_cost: float, least_miou: float) -> Found:
    """The front of one choice of exits, positions shallow to deep, within the limits."""
    found, limits = nothing(), (max_cost, least_miou)
    if len(positions) == 1:
        kernels.try_single(problem.arrays, positions[0], found)
    elif len(positions) == 2:
        kernels.try_pair(problem.arrays, positions[1], positions[0], (0, 1), *limits, found)
    else:
        fine = np.zeros((len(problem.arrays.bins), 1 + int(problem.arrays.levels.max(initial=0))), np.int64)
        line, steps = np.array([0.0, -1e9]), np.array([[-1e9, max_cost]])  # no cell and no line rules anything out
        exits, scores = positions[::-1], np.zeros((0, 0))
        need = np.zeros((int(np.diff(problem.arrays.first_column).max()), 1, 1), np.float32)
        kernels.try_triple(problem.arrays, fine, exits, *limits, need, scores, line, steps, found)
    return found
