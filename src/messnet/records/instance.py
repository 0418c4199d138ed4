"""MESS instances: the records of a choice of exits, heads and thresholds. JSON in and out, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from messnet.records.codec import LEFT_OUT, Stored
from messnet.records.names import Precision, Setting
from messnet.records.selection import Expected

FINAL_HEAD = "final"


class Exit(NamedTuple):
    """An exit point with one head. ``exit_index`` counts from 0, shallow to deep; the final exit is the last and its
    head is called ``"final"``."""

    exit_index: int
    head: str


@dataclass(frozen=True, kw_only=True)
class ExitChoice:
    """One exit of an instance. The thresholds are ``None`` for an exit that decides nothing: the last one of an
    input-dependent instance, every one of a budgeted or anytime instance."""

    exit_index: int
    head: str
    pixel_threshold: float | None = None
    """A pixel counts as confident when its confidence is at least this; [0, 1]."""
    image_threshold: float | None = None
    """The image stops here when its share of confident pixels is at least this; [0, 1]."""

    @property
    def exit(self) -> Exit:
        return Exit(self.exit_index, self.head)


@dataclass(frozen=True, kw_only=True)
class Instance(Stored, what="an instance file", made_by="search", indent=2):
    """A network as it is deployed: a setting, the chosen exits with one head each, their thresholds.

    ``exits`` is ordered shallow to deep. ``policy`` names the confidence and the edge refinement
    (``"top1+native"``). ``objective`` says in words what the search was asked for, ``selected_on`` what it measured
    on the images it chose with (``miou`` in [0, 1], ``macs`` per image, ...), ``certificate`` what it proved.
    """

    name: str
    setting: Setting
    exits: tuple[ExitChoice, ...]
    policy: str = "top1+native"
    objective: str = ""
    selected_on: dict[str, float] = field(default_factory=dict)
    certificate: str = ""
    precision: Precision = "f32"
    """What its thresholds were found in, and what it runs in."""
    expected: Expected | None = field(default=None, metadata=LEFT_OUT)
    """What to expect on new images; None where it was not cross-fitted, and in files of version 0.2."""

    def __repr__(self) -> str:
        exits = " > ".join(f"{choice.exit_index}:{choice.head}" for choice in self.exits)
        miou = f"; {100 * self.selected_on['miou']:.2f} % mIoU" if "miou" in self.selected_on else ""
        return f"<Instance {self.name}, {self.setting}: exits {exits}{miou}>"


def whole_model(final: Exit) -> Instance:
    """The user's model as an instance, "baseline": its final exit alone."""
    # Without thresholds, for every image goes all the way.
    exits = (ExitChoice(exit_index=final.exit_index, head=final.head),)
    return Instance(name="baseline", setting="budgeted", exits=exits)
