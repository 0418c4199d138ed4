"""A bound on cost alone: what every instance of a choice of three exits costs at least, whatever its thresholds."""

from __future__ import annotations

import numpy as np

from messnet.records.arrays import FloatArray
from messnet.searching.exact.arrays import WHOLE_MAX, WHOLE_SUM, WORST, Arrays


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
