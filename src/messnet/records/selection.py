"""What an instance does to the images that it was selected on, and what to expect on new ones, with units."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast, get_args

from messnet.records.names import CostName, Statistic

_LIMIT, _IOU = "limit:", "iou:"


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
class ReachedCost:
    """One cost of an instance by the statistic that the search was asked about."""

    cost: CostName
    statistic: Statistic
    relative: bool
    """Whether ``value`` and ``limit`` are in costs of the user's whole model, else in the unit of the cost."""
    value: float
    """With several devices: on the device where it is largest."""
    limit: float | None
    """The value must not exceed it; None: it was minimised without a limit."""

    @property
    def key(self) -> str:
        """Its name in a flat form, such as "latency_ms.p95" or "macs.worst.relative"."""
        return f"{self.cost}.{self.statistic}{'.relative' if self.relative else ''}"


@dataclass(frozen=True, kw_only=True)
class ReachedIou:
    """The IoU of one class that the search was given a floor for."""

    class_name: str
    value: float
    """In [0, 1]."""
    limit: float
    """The value must be at least this."""

    @property
    def key(self) -> str:
        """Its name in a flat form, such as "iou:car"."""
        return f"{_IOU}{self.class_name}"


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
    reached: tuple[ReachedCost | ReachedIou, ...] = ()
    """What the search was asked about beyond mIoU and one mean cost, each quantity once."""

    def to_figures(self) -> dict[str, float]:
        """The flat form: {"miou": 0.6, "macs": 1e9, "images": 50, ...}; "relative": 1.0 marks relative costs.

        What was reached is beside its limit: {"latency_ms.p95": 38.0, "limit:latency_ms.p95": 40.0, "iou:car": 0.61}.
        """
        name = self.unit.name
        figures = {"miou": self.miou, name: self.cost, "images": self.num_images}
        optional = {
            "baseline_miou": self.baseline_miou,
            f"baseline_{name}": self.baseline_cost,
            "loss": self.loss,  # its being there says that the instance is certified
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
        for one in self.reached:
            optional |= {one.key: one.value, f"{_LIMIT}{one.key}": one.limit}
        return figures | {key: value for key, value in optional.items() if value is not None}

    @classmethod
    def from_figures(cls, figures: Mapping[str, float]) -> Selection | None:
        """The record of a flat form, None where that holds no search's figures."""
        # One cost stands alone; all others have a prefix or a statistic behind a dot.
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
            reached=tuple(_reached(figures)),
        )


class ExpectedShare(NamedTuple):
    """How many images to expect at an exit, with a standard error; shares in [0, 1]."""

    exit_index: int
    share: float
    error: float | None
    """None where it is not known."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What to expect of a search on new images, cross-fitted: each image is judged by the instance that the same search
    chooses without the image's fold (docs/method.md#limits-that-hold-on-new-images). Errors are standard errors over
    the draw of groups of images."""

    num_images: int
    num_groups: int
    num_folds: int
    unit: CostUnit
    """Of ``cost``, ``cost_error`` and ``baseline_cost``."""
    miou: float
    """In [0, 1], over all images."""
    baseline_miou: float
    """mIoU of the final exit on the same images."""
    drop_error: float
    """Of ``baseline_miou - miou``."""
    cost: float
    """Over all images, by the statistic that was asked for."""
    cost_error: float
    """Of the mean cost."""
    baseline_cost: float
    macs: float
    """Multiply-accumulates per image, mean over the images."""
    macs_paper: float
    """The same in the paper's convention."""
    macs_error: float
    exit_shares: tuple[ExpectedShare, ...]
    """By exit_index; instances of several folds may have exits that the one of all images lacks."""
    class_iou: tuple[float | None, ...]
    """Of each class in [0, 1], None of one that neither labels nor predictions have."""
    costs: tuple[ReachedCost, ...] = ()
    """What the search was asked about beyond mIoU and one mean cost."""
    ious: tuple[ReachedIou, ...] = ()

    @property
    def drop_pp(self) -> float:
        """mIoU lost against the final exit, percentage points."""
        return 100 * (self.baseline_miou - self.miou)


def _reached(figures: Mapping[str, float]) -> Iterator[ReachedCost | ReachedIou]:
    """The constraints of a flat form, in the order in which it holds them."""
    for key, value in figures.items():
        # A floor always has its limit; a cost that was minimised has none.
        limit = figures.get(f"{_LIMIT}{key}")
        if key.startswith(_IOU) and limit is not None:
            yield ReachedIou(class_name=key.removeprefix(_IOU), value=value, limit=limit)
            continue
        cost, *rest = key.split(".")
        if cost in get_args(CostName) and rest and rest[0] in get_args(Statistic):
            relative, statistic = rest[1:] == ["relative"], cast(Statistic, rest[0])
            yield ReachedCost(
                cost=cast(CostName, cost), statistic=statistic, relative=relative, value=value, limit=limit
            )
