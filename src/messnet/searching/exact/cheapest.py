"""What all instances of a choice of three exits cost at least."""

from __future__ import annotations

from typing import Any

import numpy as np

from messnet.records.arrays import FloatArray
from messnet.searching.exact.problem import WHOLE_MAX, WHOLE_SUM, WORST, Arrays

__all__ = ["cheapest", "least_cost"]


def least_cost(arrays: Arrays, last: int, num: int) -> FloatArray:
    """(middle, first) of the ``num`` exits before ``last``: no instance has a smaller objective's cost."""
    weighted = np.flatnonzero(arrays.weights > 0)
    costs = [arrays.weights[m] * cheapest(arrays, int(m), last, num) for m in weighted]
    least: FloatArray = np.maximum.reduce(costs)
    return least


def cheapest(arrays: Arrays, m: int, last: int, num: int) -> FloatArray:
    """(middle, first): no instance of the choice has a smaller cost m."""
    backbone, head, decision, output = arrays.parts[m]
    kind = arrays.kinds[m]
    paid = head[:num] + decision[:num]
    if kind in (WHOLE_SUM, WHOLE_MAX):
        join: Any = np.add if kind == WHOLE_SUM else np.maximum
        early = join(join(head[:num], decision[:num]), output[:num])
        own = join(join(backbone[last], head[last]), output[last])
        whole: FloatArray = join(join(early[:, None], early[None, :]), own)
        return whole
    first = (backbone + output)[:num] + paid
    middle = first[:, None] + paid[None, :]
    end = paid[:, None] + paid[None, :] + backbone[last] + head[last] + output[last]
    reached: FloatArray = np.minimum(middle, end)
    anywhere: FloatArray = np.minimum(reached, first[None, :])
    return reached if kind == WORST else anywhere  # some image reaches the middle exit
