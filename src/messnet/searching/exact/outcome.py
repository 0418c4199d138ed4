"""What an engine is asked for, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from messnet.searching.exact.problem import Found

__all__ = ["OutOfTimeError", "Outcome", "Region"]


class Region(NamedTuple):
    """What is news: points of the front, or the best of one objective within its limits."""

    goal: Literal["front", "cost", "miou"]
    least_miou: float = -1.0
    max_cost: float = np.inf


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an engine found, and what it proved."""

    front: Found
    near: list[tuple[float, float, int]]
    """(cost, mIoU, key) of the best instance within the limits of every choice of exits that was evaluated."""
    num_evaluated: int
    stopped: Literal["", "time limit", "interrupted"]
    gap_cost: float
    """Relative: no instance within the limits costs less than (1 - gap) times the best one. 0: optimal."""
    gap_miou: float
    """No instance within the limits has a larger mIoU by more; over a front, at any cost. 0: optimal."""
    exact_from: float = -1.0
    """A front is exact at this mIoU and above."""


class OutOfTimeError(Exception):
    """Time is up."""
