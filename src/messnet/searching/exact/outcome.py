"""What a search is asked, what it answers, and how it goes about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from messnet.errors import RecipeError
from messnet.searching.answers import FrontPoint, Incumbent, Proof


class Region(NamedTuple):
    """What is looked for: the whole front, or the instance of least cost or largest mIoU within limits."""

    goal: Literal["front", "cost", "miou"]
    least_miou: float = -1.0
    max_cost: float = np.inf
    precision: float = 0.0
    """mIoU: of three exits only what is above a front by more is sure to be found."""


@dataclass(frozen=True, kw_only=True)
class Control:
    """When a search stops before it is done, and whether it shows how far it is."""

    time_limit: float | None = None
    """Seconds, >= 0."""
    should_stop: Callable[[], bool] | None = None
    """Called every now and then; once it says True the search stops."""
    progress: bool = False

    def __post_init__(self) -> None:
        if self.time_limit is not None and not self.time_limit >= 0:
            raise RecipeError(f"a search takes at least 0 seconds, its time limit cannot be {self.time_limit:g}")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a search found, and what it proved."""

    front: tuple[FrontPoint, ...]
    """The best of everything that was evaluated, by ascending cost."""
    static: tuple[FrontPoint, ...]
    """The front of instances of one exit."""
    best: tuple[FrontPoint, ...]
    """Of a search for one objective: the best instance within the limits of every choice of exits that was evaluated,
    best first; at most ``Tuning.num_best``."""
    proof: Proof
    incumbents: tuple[Incumbent, ...]
    """Of a search for one objective: the best so far over time."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Sizes that change how long a search takes, never what it finds."""

    num_best: int = 4
    """Instances that ``Outcome.best`` holds."""
    num_exact: int = 20_000
    """Candidates up to which it pays to know how promising each is, not only whether it is ruled out."""
    num_seeds: int = 256
    """Choices evaluated before any is bounded."""
    per_batch: int = 8
    """Candidates that a worker evaluates between two looks at the clock."""
    bend: float = 3e-3
    """mIoU by which the front within a strip may be off a line: a strip has one tangent and one price."""
    rise: float = 13.0
    """Bends: the largest mIoU less the least within a strip, with which remainders grow."""


class StoppedError(Exception):
    """The caller wants the search to stop."""


class OutOfTimeError(StoppedError):
    """Time is up."""
