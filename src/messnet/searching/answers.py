"""What searches answer, as records of numbers. ``words`` turns them into English, afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from messnet.records.instance import Instance
from messnet.records.selection import CostUnit, Expected, Selection
from messnet.searching.objective import AnytimeObjective, Guarantee, Limit, Objective

SearchSetting = Literal["budgeted", "input_dependent"]
Stopped = Literal["", "time limit", "interrupted"]
"""Why a search ended before it had proved its answer; empty: it did not."""


MOST_IMAGES = 1 << 20
"""How far the calibration images that a guarantee would need are counted."""


@dataclass(frozen=True, kw_only=True)
class FrontPoint:
    """One instance with its figures on the selection images."""

    miou: float
    """In [0, 1]."""
    cost: float
    """In the unit of the search that found it: see ``CostUnit``."""
    instance: Instance


class Incumbent(NamedTuple):
    """The best instance so far at some moment of a search for one objective."""

    seconds: float
    """Since the search began."""
    miou: float
    cost: float


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What a search proved of its answer over the declared grid."""

    num_declared: int
    """Instances of the grid, duplicates counted."""
    num_evaluated: int
    """Instances whose mIoU was computed; all others were bounded."""
    stopped: Stopped = ""
    gap_miou: float | None = 0.0
    """No instance of the grid has an mIoU (in [0, 1]) at the answer's cost that is larger by more. 0: optimal; None:
    nothing is proved."""
    gap_cost: float | None = None
    """Where cost was minimised: no instance within the limits costs less than (1 - gap) of the answer. None: nothing is
    proved of the cost."""
    exact_from: float | None = None
    """A front that was stopped is proved at this mIoU and above, exactly or to ``precision``; None: nowhere."""
    precision: float = 0.0
    """What was asked for: mIoU by which a front may be below the best."""

    @property
    def optimal(self) -> bool:
        return self.gap_miou == 0 and not self.gap_cost


@dataclass(frozen=True, kw_only=True)
class AnytimeProof:
    """An anytime search evaluates every choice of exits."""

    num_evaluated: int
    min_exits: int
    max_exits: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The best rivals of an instance under the same constraints."""

    chosen: FrontPoint
    unit: CostUnit
    static: FrontPoint | None
    """The best static truncated model; None: none meets the constraints."""
    has_early_exits: bool
    """Whether it has an exit before the final one, whose head could be the same everywhere."""
    uniform: FrontPoint | None
    """The best instance with one head at all exits of the chosen one (the final exit keeps its own), its thresholds
    free; None: none meets the constraints."""


@dataclass(frozen=True, kw_only=True)
class Shortfall:
    """Why a guarantee stopped before the searched thresholds."""

    least_images: int | None
    """Calibration images (groups, where images belong together) that would certify epsilon if none lost anything; None:
    more than MOST_IMAGES."""
    least_epsilon: float
    """The smallest epsilon that so many of them certify if none loses anything."""
    worst_loss: float
    """Largest mean loss of the steps that were not certified."""
    images_needed: int | None
    """So many of them with losses like these would certify that step; None: more than MOST_IMAGES, or none."""


@dataclass(frozen=True, kw_only=True)
class Promise:
    """What the calibration images certify of an instance on images not seen."""

    guarantee: Guarantee
    num_images: int
    """Calibration images."""
    num_groups: int
    """Groups of them, which are what is drawn; as many as images where none belong together."""
    p_value: float
    mean_loss: float
    """Of the calibration images at the certified step, the mean over groups."""
    step: int
    """Of ``num_steps`` from the final exit alone (0) to the searched thresholds."""
    num_steps: int
    shortfall: Shortfall | None
    """None: the searched thresholds are certified."""


@dataclass(frozen=True, kw_only=True)
class Retreat:
    """What it took to keep a promise, on the selection images."""

    before: Selection
    after: Selection
    still_met: bool
    """Whether the retreated instance still meets the objective's constraints."""


@dataclass(frozen=True, kw_only=True)
class Tightened:
    """How limits that are to hold on new images were tightened until they do, cross-fitted."""

    asked: Objective
    searched: Objective | None
    """With the laxest limits that hold; None: none do, and the answer is the user's model itself, or nothing."""
    expected: Expected
    """Of a search with ``searched``; without one: of what came nearest."""


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search answers."""

    instance: Instance
    objective: Objective | AnytimeObjective
    selection: Selection
    """The instance on the images that it was selected on."""
    front: list[FrontPoint]
    """By ascending cost: the whole front where ``pareto_front`` made it, else the best among all that was evaluated,
    which are all instances of up to two exits. Empty of an anytime search."""
    runners_up: list[FrontPoint]
    """The next best of other exits and heads that meet the constraints, among all that was evaluated."""
    proof: Proof | AnytimeProof
    comparison: Comparison | None = None
    """None of an anytime search."""
    promise: Promise | None = None
    """With a guarantee."""
    retreat: Retreat | None = None
    """With a guarantee that the searched thresholds do not keep."""
    incumbents: tuple[Incumbent, ...] = ()
    """The best so far over time, where the search was for this objective alone."""
    tightened: Tightened | None = None
    """Where the search was meant for new images: ``objective`` has the tightened limits then."""
    certificate: str = ""
    """What was proved, in words."""
    verdict: str = ""
    """How the instance compares with the best static truncated model and with uniform heads, in words."""

    description: str = ""
    """What `messnet search` prints: figures, exits, how they compare, what was proved."""

    def __repr__(self) -> str:
        return f"<SearchResult {self.description.partition(chr(10))[0] or self.instance.name}; print it for more>"

    def __str__(self) -> str:
        return self.description or repr(self)

    @property
    def gap_cost(self) -> float | None:
        """Minimised: no instance costs less than (1 - gap) of this one. None: nothing is proved. 0: optimal."""
        if isinstance(self.proof, AnytimeProof) or self.proof.optimal:
            return 0.0
        return self.proof.gap_cost

    @property
    def gap_miou(self) -> float | None:
        """No instance within the limits has a larger mIoU by more than this. None: nothing is proved. 0: optimal."""
        return 0.0 if isinstance(self.proof, AnytimeProof) else self.proof.gap_miou


class Relaxed(NamedTuple):
    """What becomes possible without one constraint."""

    without: Limit | tuple[str, float]
    """A limit, or the floor of a class (its name, its least IoU)."""
    best: FrontPoint | float
    """Without a limit: the instance that needs least of its cost. Without a floor: the largest IoU of the class."""
    unit: CostUnit


@dataclass(frozen=True, kw_only=True)
class Infeasible:
    """Why no instance meets an objective: the nearest points in each constraint."""

    objective: Objective
    unit: CostUnit
    least_miou: float | None
    """What the constraints ask for; None: any."""
    largest_cost: float | None
    """What they allow; None: any."""
    points: Sequence[FrontPoint]
    """Of the front within all further limits and floors, by ascending cost: the cheapest, the most accurate, and the
    nearest to each limit."""
    further: bool
    """Whether there are limits, floors or devices beyond mIoU and one cost."""
    relaxed: Sequence[Relaxed] = ()
