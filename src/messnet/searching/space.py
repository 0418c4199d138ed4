"""What a search ranges over and is asked for: the grid of thresholds, the objective, and an instance on the tables."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast, get_args

import numpy as np
from numpy.typing import NDArray

from messnet.errors import RecipeError, RunError
from messnet.records.arrays import FloatArray, IntArray
from messnet.records.costs import CostName, CostTable
from messnet.records.exit_tables import ExitTables
from messnet.records.instance import ExitChoice, Instance

__all__ = [
    "Column",
    "Grid",
    "Limit",
    "Objective",
    "Statistic",
    "columns_of",
    "confidence_at",
    "cost_of",
    "image_thresholds",
    "route",
]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The declared grid: which exits and thresholds a search tries. "Never exits here" is no threshold but a state of
    its own: the exit is left out of the instance."""

    max_exits: int = 3
    """Exits of an instance, the last one included; 1 to 3."""
    policy: str | None = None
    """One of ``tables.policies``; None: the first."""
    pixel_thresholds: tuple[float, ...] | None = None
    """Some of ``tables.pixel_thresholds``; None: all."""
    num_image_thresholds: int = 64
    """Image thresholds per exit and pixel threshold, >= 1: quantiles of the image confidences on the selection images.
    With at least as many as there are distinct values the grid is complete: no other threshold routes otherwise."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_exits <= 3:
            raise RecipeError(f"max_exits is {self.max_exits}: this search proves optima of 1 to 3 exits")
        if self.num_image_thresholds < 1:
            raise RecipeError(f"num_image_thresholds is {self.num_image_thresholds}, expected at least 1")

    def policy_of(self, tables: ExitTables) -> str:
        policy = self.policy or tables.policies[0]
        return tables.policies[_policy_index(tables, policy)]

    def pixel_thresholds_of(self, tables: ExitTables) -> list[int]:
        """Positions in ``tables.pixel_thresholds``."""
        if self.pixel_thresholds is None:
            return list(range(len(tables.pixel_thresholds)))
        return [_pixel_threshold_index(tables, value) for value in self.pixel_thresholds]


Statistic = Literal["mean", "worst", "p95"]


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A cost that must not be exceeded, on every device asked for."""

    cost: CostName
    at_most: float
    """In the unit of the cost, or relative to the user's whole model."""
    statistic: Statistic = "mean"
    """Over the images: their mean, the costliest one's (the deepest exit taken), or the least cost that 95 % of them do
    not exceed. Parameters and memory belong to the instance and are the same for all."""
    relative: bool = False

    def __post_init__(self) -> None:
        if self.cost not in get_args(CostName):
            raise RecipeError(f"unknown cost {self.cost!r}: expected one of {', '.join(get_args(CostName))}")
        if self.statistic not in get_args(Statistic):
            raise RecipeError(f"unknown statistic {self.statistic!r}: expected {', '.join(get_args(Statistic))}")
        if not self.at_most >= 0:
            raise RecipeError(f"{self.cost} cannot be at most {self.at_most:g}: costs are >= 0")

    @classmethod
    def parse(cls, text: str) -> Limit:
        """Of words such as "parameters<=3e6", "latency_ms.p95<=40" or "macs<=0.5x" (half of the user's model's)."""
        match = re.fullmatch(r"\s*(\w+)(?:\.(\w+))?\s*<=\s*([0-9.eE+-]+)\s*(x?)\s*", text)
        try:
            if match is None:
                raise ValueError
            value = float(match[3])
        except ValueError:
            raise RecipeError(
                f"cannot read the limit {text!r}: expected such as parameters<=3e6, latency_ms.p95<=40 or macs<=0.5x"
            ) from None
        return cls(
            cost=cast(CostName, match[1]),
            at_most=value,
            statistic=cast(Statistic, match[2] or "mean"),
            relative=bool(match[4]),
        )

    def __str__(self) -> str:
        which = "" if self.statistic == "mean" else f"{self.statistic} "
        return f"{which}{self.cost} <= {self.at_most:g}{'x the model' if self.relative else ''}"


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a search is asked for: the least cost, or the best mIoU, subject to every constraint that is not None."""

    minimise: CostName | None = None
    maximise: Literal["miou"] | None = None
    """Give one of the two; neither: minimise macs."""
    cost: CostName = "macs"
    """The cost that is constrained when mIoU is maximised; ignored otherwise."""
    statistic: Statistic = "mean"
    """Of the cost that is minimised or constrained, see Limit."""
    max_drop_pp: float | None = None
    """Largest mIoU drop against the final exit on the same images, percentage points."""
    min_miou: float | None = None
    """In [0, 1]."""
    max_cost: float | None = None
    """Per image, in the unit of the cost."""
    max_cost_ratio: float | None = None
    """Relative to the user's whole model."""
    limits_on: tuple[Limit, ...] = ()
    """Further costs, any mix."""
    min_class_iou: tuple[tuple[str, float], ...] = ()
    """(class name, least IoU in [0, 1])."""

    def __post_init__(self) -> None:
        if self.minimise and self.maximise:
            raise RecipeError("give minimise or maximise, not both; bound the other with a constraint")
        if self.cost_name not in get_args(CostName):
            raise RecipeError(f"unknown cost {self.cost_name!r}: expected one of {', '.join(get_args(CostName))}")
        if self.maximise not in (None, "miou"):
            raise RecipeError(f"cannot maximise {self.maximise!r}: only 'miou'")
        if self.statistic not in get_args(Statistic):
            raise RecipeError(f"unknown statistic {self.statistic!r}: expected {', '.join(get_args(Statistic))}")
        for value, name in (
            (self.min_miou, "min_miou"),
            (self.max_drop_pp, "max_drop_pp"),
            (self.max_cost, "max_cost"),
        ):
            if value is not None and math.isnan(value):
                raise RecipeError(f"{name} is not a number")
        for name, floor in self.min_class_iou:
            if not 0 <= floor <= 1:
                raise RecipeError(f"the IoU of {name} cannot be at least {floor:g}: an IoU is in [0, 1]")

    @property
    def cost_name(self) -> CostName:
        return self.cost if self.maximise else self.minimise or "macs"

    @property
    def goal(self) -> Literal["cost", "miou"]:
        return "miou" if self.maximise else "cost"

    def limits(self, baseline_miou: float, baseline_cost: float) -> tuple[float, float]:
        """(least mIoU, largest cost) that the constraints allow; infinite where nothing is constrained."""
        mious = [-np.inf]
        if self.min_miou is not None:
            mious.append(self.min_miou)
        if self.max_drop_pp is not None:
            mious.append(baseline_miou - self.max_drop_pp / 100)
        costs = [np.inf]
        if self.max_cost is not None:
            costs.append(self.max_cost)
        if self.max_cost_ratio is not None:
            costs.append(self.max_cost_ratio * baseline_cost)
        return max(mious), min(costs)

    def __str__(self) -> str:
        which = "" if self.statistic == "mean" else f"{self.statistic} "
        constraints = [
            (self.max_drop_pp, "<= {} pp drop"),
            (self.min_miou, "mIoU >= {}"),
            (self.max_cost, f"<= {{}} {which}{self.cost_name}"),
            (self.max_cost_ratio, f"<= {{}}x the model's {which}{self.cost_name}"),
        ]
        words = [text.format(f"{value:g}") for value, text in constraints if value is not None]
        words += [str(limit) for limit in self.limits_on]
        words += [f"IoU of {name} >= {floor:g}" for name, floor in self.min_class_iou]
        goal = "most accurate" if self.maximise else f"cheapest in {which}{self.cost_name}"
        return f"{goal} at {' and '.join(words)}" if words else goal


class Column(NamedTuple):
    """The nested sets of images that can leave at one exit, at one pixel threshold."""

    pixel_threshold: float
    image_thresholds: FloatArray
    """(levels,) ascending: the images that reach one leave."""
    bins: NDArray[np.int32]
    """(V,): how many of them each image reaches."""


def columns_of(tables: ExitTables, position: int, grid: Grid) -> tuple[list[Column], int]:
    """All that the grid tries at ``tables.exits[position]``, and the number of its threshold pairs.

    Of pixel thresholds that route alike the first is kept. The set of all images is dropped: the model is then cut here
    and the same instance without later exits costs no more.
    """
    policy = _policy_index(tables, grid.policy_of(tables))
    columns: list[Column] = []
    known: set[bytes] = set()
    num_declared = 0
    for t in grid.pixel_thresholds_of(tables):
        confidence = tables.image_confidence[:, position, policy, t]
        observed = np.unique(confidence)
        chosen = observed
        if grid.num_image_thresholds < len(observed):
            ranks = np.linspace(0, len(confidence) - 1, grid.num_image_thresholds).round().astype(int)
            chosen = np.unique(np.sort(confidence)[ranks])
        num_declared += len(chosen)
        chosen = chosen[chosen > observed[0]]
        bins = np.searchsorted(chosen, confidence, side="right").astype(np.int32)
        if len(chosen) and bins.tobytes() not in known:
            known.add(bins.tobytes())
            columns.append(Column(float(tables.pixel_thresholds[t]), image_thresholds(observed, chosen), bins))
    return columns, num_declared


def image_thresholds(observed: NDArray[np.float32], values: NDArray[np.float32]) -> FloatArray:
    """The image thresholds that the confidences ``values``, of those ``observed`` (ascending), just reach.

    Midway to the next smaller one, if there is one: far from the images it must tell apart, on either side.
    """
    positions = np.searchsorted(observed, values)
    before = observed[np.maximum(positions - 1, 0)]
    # Kept in float32, the tables' type, so that no later cast moves it onto an observed value.
    middle = ((before.astype(np.float64) + values) / 2).astype(np.float32)
    thresholds: FloatArray = np.where((positions > 0) & (middle > before), middle, values).astype(np.float64)
    return thresholds


def confidence_at(tables: ExitTables, choice: ExitChoice, policy: str) -> NDArray[np.float32]:
    """(V,) image confidence at an exit that decides, at its pixel threshold."""
    assert choice.pixel_threshold is not None
    threshold = _pixel_threshold_index(tables, choice.pixel_threshold)
    return tables.image_confidence[:, tables.exits.index(choice.exit), _policy_index(tables, policy), threshold]


def route(tables: ExitTables, instance: Instance) -> IntArray:
    """(V,) positions in ``tables.exits`` where the images leave: the first exit of the instance whose image confidence
    reaches its image threshold, else its last exit."""
    positions = _positions(tables, instance)
    routing = np.full(len(tables.image_names), positions[-1], np.int64)
    for choice, position in reversed(list(zip(instance.exits[:-1], positions[:-1], strict=True))):
        if choice.pixel_threshold is not None and choice.image_threshold is not None:
            confidence = confidence_at(tables, choice, instance.policy)
            # In float64, as ``should_exit`` compares: a Python float would be rounded to the table's float32.
            routing[confidence >= np.float64(choice.image_threshold)] = position
    return routing


def cost_of(tables: ExitTables, costs: CostTable, instance: Instance, name: CostName = "macs") -> FloatArray:
    """(V,) cost of every image, see ``CostColumn.leaving``. Parameters and memory are those of everything the instance
    keeps, whichever exit the image takes."""
    positions = _positions(tables, instance)
    leaving = costs.column(name, [choice.exit for choice in instance.exits]).leaving()
    return np.array(leaving[[positions.index(int(position)) for position in route(tables, instance)]], np.float64)


def _positions(tables: ExitTables, instance: Instance) -> list[int]:
    missing = [choice.exit for choice in instance.exits if choice.exit not in tables.exits]
    if missing:
        raise RunError(f"the exit tables have no {missing[0]}: the instance was made for another head space")
    return [tables.exits.index(choice.exit) for choice in instance.exits]


def _policy_index(tables: ExitTables, policy: str) -> int:
    if policy not in tables.policies:
        raise RecipeError(f"the exit tables have no policy {policy!r}: expected one of {', '.join(tables.policies)}")
    return tables.policies.index(policy)


def _pixel_threshold_index(tables: ExitTables, value: float) -> int:
    matches = np.flatnonzero(np.isclose(tables.pixel_thresholds, value, rtol=0, atol=1e-9))
    if not len(matches):
        known = ", ".join(f"{threshold:g}" for threshold in tables.pixel_thresholds)
        raise RecipeError(f"the exit tables have no pixel threshold {value:g}: expected one of {known}")
    return int(matches[0])
