"""What a run's search found, as it lies in front.json: records of numbers, which ``words`` turns into English."""

from __future__ import annotations

from dataclasses import dataclass, field

from messnet.records.codec import Stored
from messnet.records.selection import Expected
from messnet.searching.answers import Comparison, Infeasible, Proof, Tightened
from messnet.searching.objective import Objective
from messnet.searching.options import Protocol

Points = list[tuple[float, float]]
"""(MACs per image, mIoU in [0, 1])."""


@dataclass(frozen=True, kw_only=True)
class OneFinding:
    """What came of one objective of the recipe."""

    name: str
    objective: Objective
    """As the recipe asks for it; see ``tightened`` for what was searched."""
    proof: Proof | None = None
    """None where nothing was searched on all images: the answer is the user's model, or nothing."""
    comparison: Comparison | None = None
    tightened: Tightened | None = None
    """With the cross-fitted protocol."""
    is_found: bool = True
    """Whether there is an instance of this name."""
    infeasible: Infeasible | None = None
    """Why not, with the two-halves protocol."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A point of the cross-fitted front."""

    max_drop_pp: float
    """The limit that was searched with."""
    expected: Expected


@dataclass(frozen=True, kw_only=True)
class Findings(Stored, what="what a search found", made_by="search", version=None):
    """The results of the search stage."""

    fronts: dict[str, Points]
    """By setting: the best instances on the images that they were selected on."""
    names: list[str]
    """Names of the instances that were searched for, found or not."""
    protocol: Protocol = "two_halves"
    """Files of version 0.2 do not say it: it was the only one."""
    judged: list[Judged] = field(default_factory=list)
    """With the cross-fitted protocol: what to expect on new images of searches with ever laxer limits."""
    found: list[OneFinding] = field(default_factory=list)
    verdicts: list[str] = field(default_factory=list)
    """In files of version 0.2, instead of ``found``: a sentence for each instance."""
    skipped: list[str] = field(default_factory=list)
    """In files of version 0.2: why others were not found."""
