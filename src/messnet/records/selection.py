"""What an instance does to the images that it was selected on, with units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, get_args

from messnet.records.names import CostName

__all__ = ["AnytimeFigures", "CostUnit", "Selection"]


class CostUnit(NamedTuple):
    """What a cost of a search is in."""

    name: CostName
    relative: bool = False
    """Whether it is relative to the user's whole model, on the device where that is most; else in the unit of the cost
    itself, on one device."""


@dataclass(frozen=True, kw_only=True)
class AnytimeFigures:
    """What belongs to the results of an anytime instance."""

    first_cost: float
    """Until the first result is there."""
    first_miou: float
    overhead: float
    """Cost of running all exits over running the last one alone, less 1."""
    area: float
    """Mean mIoU of the result at hand over costs from 0 to the objective's horizon."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The figures of an instance on the images that it was selected on. ``Instance.selected_on`` holds them flat."""

    num_images: int
    unit: CostUnit
    """Of all costs here."""
    miou: float
    """In [0, 1]; of an anytime instance, of its last result."""
    cost: float
    """Per image, by the statistic that was asked for; of an anytime instance, until the last result is there."""
    baseline_miou: float | None = None
    """mIoU of the user's whole model; None in files of before that do not say it."""
    baseline_cost: float | None = None
    """Its cost; 1 where costs are relative to it."""
    loss: float | None = None
    """With a guarantee: mean share of an image's pixels lost against the final exit."""
    anytime: AnytimeFigures | None = None

    def to_figures(self) -> dict[str, float]:
        """The flat form: {"miou": 0.6, "macs": 1e9, "images": 50, ...}; "relative": 1.0 marks relative costs."""
        name = self.unit.name
        figures = {"miou": self.miou, name: self.cost, "images": self.num_images}
        optional = {
            "baseline_miou": self.baseline_miou,
            f"baseline_{name}": self.baseline_cost,
            "loss": self.loss,
            # Said where the other figures leave a doubt, see ``from_figures``.
            "relative": float(self.unit.relative) if self.unit.relative or self.baseline_cost == 1 else None,
        }
        if self.anytime is not None:
            optional |= {
                f"first_{name}": self.anytime.first_cost,
                "first_miou": self.anytime.first_miou,
                "overhead": self.anytime.overhead,
                "area": self.anytime.area,
            }
        return figures | {key: value for key, value in optional.items() if value is not None}

    @classmethod
    def from_figures(cls, figures: Mapping[str, float]) -> Selection | None:
        """The record of a flat form, None where that holds no search's figures."""
        name: CostName | None = next((one for one in get_args(CostName) if one in figures), None)
        if name is None or "miou" not in figures:
            return None
        # Files of before do not say "relative": there only a model of relative costs has a cost of exactly 1.
        relative = bool(figures.get("relative", figures.get(f"baseline_{name}") == 1.0))
        anytime = None
        if "area" in figures:
            anytime = AnytimeFigures(
                first_cost=figures[f"first_{name}"],
                first_miou=figures["first_miou"],
                overhead=figures["overhead"],
                area=figures["area"],
            )
        return cls(
            num_images=int(figures.get("images", 0)),
            unit=CostUnit(name, relative),
            miou=figures["miou"],
            cost=figures[name],
            baseline_miou=figures.get("baseline_miou"),
            baseline_cost=figures.get(f"baseline_{name}"),
            loss=figures.get("loss"),
            anytime=anytime,
        )
