"""How the objective's cost of an instance is measured, on one device or several, and whether an objective is met."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from messnet.errors import RecipeError, RunError
from messnet.records.arrays import FloatArray, IntArray
from messnet.records.costs import CostColumn, CostTable
from messnet.records.exit_tables import ExitTables
from messnet.records.instance import Instance
from messnet.records.iou import class_iou, mean_iou
from messnet.records.names import DTYPES, CostName, Statistic
from messnet.records.selection import CostUnit, ReachedCost, ReachedIou
from messnet.searching.grid import cost_of, route
from messnet.searching.objective import Objective

DECIMALS = 12
"""Decimals at which mIoU is compared: beyond, float sums of equal ratios differ."""


class Routed:
    """What instances do to the V images of ``tables``: one instance to all, or to each fold the one chosen without it.

    ``parts`` are image positions and the instance that they run through; each image is in one of them.
    """

    def __init__(self, tables: ExitTables, *parts: tuple[IntArray, Instance]) -> None:
        self.tables = tables
        self.parts = [(images, tables.subset(images), instance) for images, instance in parts]
        self.routing: IntArray = np.full(len(tables.image_names), -1, np.int64)
        # Each image by the instance of its own part; -1 would be left where no part has it.
        for images, judged, instance in self.parts:
            self.routing[images] = route(judged, instance)

    @classmethod
    def through(cls, tables: ExitTables, instance: Instance) -> Routed:
        """All images through one instance."""
        return cls(tables, (np.arange(len(tables.image_names)), instance))

    @property
    def miou(self) -> float:
        """mIoU in [0, 1], as searches compare it: counts are summed over the images of all parts."""
        return round(self.tables.miou(self.routing), DECIMALS)

    def costs(self, table: CostTable, name: CostName) -> FloatArray:
        """(V,) cost of every image."""
        spent = np.zeros(len(self.tables.image_names))
        for images, judged, instance in self.parts:
            spent[images] = cost_of(judged, table, instance, name)
        return spent


@dataclass(frozen=True)
class CostMeasure:
    """One cost of an instance as one number.

    On one device it is in the unit of the cost. On several it is relative to the user's whole model on each device, and
    the largest over the devices counts: it says how much less work there is where there is least less.
    """

    name: CostName
    statistic: Statistic
    devices: tuple[CostTable, ...]

    def __post_init__(self) -> None:
        if not self.devices:
            raise RecipeError("no cost table: expected at least one")
        if self.unit.relative and min(table.total(self.name) for table in self.devices) <= 0:
            raise RecipeError(f"the user's model costs no {self.name} on one device: nothing to be relative to")

    @classmethod
    def of(cls, objective: Objective, costs: CostTable | Sequence[CostTable]) -> CostMeasure:
        devices = (costs,) if isinstance(costs, CostTable) else tuple(costs)
        return cls(objective.cost_name, objective.statistic, devices)

    @property
    def unit(self) -> CostUnit:
        return CostUnit(self.name, len(self.devices) > 1)

    @property
    def baseline(self) -> float:
        """Cost of the user's whole model."""
        return 1.0 if self.unit.relative else self.devices[0].total(self.name)

    @property
    def weights(self) -> list[float]:
        """By device: what its cost is multiplied with before the largest is taken."""
        return [1 / table.total(self.name) if self.unit.relative else 1.0 for table in self.devices]

    def largest(self, objective: Objective) -> float:
        """The largest cost that ``max_cost_ratio`` and, on one device, ``max_cost`` allow; infinite: any."""
        largest = [math.inf]
        if objective.max_cost is not None and not self.unit.relative:
            largest.append(objective.max_cost)
        if objective.max_cost_ratio is not None:
            largest.append(objective.max_cost_ratio * self.baseline)
        return min(largest)

    def measure(self, routed: Routed, statistic: Statistic | None = None) -> float:
        """The cost over all images."""
        kind = statistic or self.statistic
        # A statistic on each device first, then the largest of the weighted ones.
        spent = [statistic_of(routed.costs(table, self.name), kind) for table in self.devices]
        return max(weight * value for weight, value in zip(self.weights, spent, strict=True))


def statistic_of(values: FloatArray, statistic: Statistic) -> float:
    """A statistic of costs (V,): their mean, the largest, or the least that 95 % of them do not exceed."""
    if statistic == "mean":
        return float(values.mean())
    if statistic == "worst":
        return float(values.max())
    # The ceil(0.95 n)-th smallest, in integers.
    return float(np.sort(values)[-(-19 * len(values) // 20) - 1])


def baseline_miou_of(tables: ExitTables) -> float:
    """mIoU of the model that drops are counted against (``ExitTables.baseline``)."""
    intersection, predicted = tables.baseline.sum(0, dtype=np.int64)
    return round(mean_iou(intersection, predicted, tables.labelled.sum(0, dtype=np.int64)), DECIMALS)


def meets(objective: Objective, measure: CostMeasure, routed: Routed) -> bool:
    """Whether images that are routed so are within every constraint of an objective: written from the definitions,
    beside the search."""
    # Each constraint by its definition, devices one by one.
    if routed.miou < round(objective.least_miou(baseline_miou_of(routed.tables)), DECIMALS):
        return False
    if measure.measure(routed) > measure.largest(objective):
        return False
    for table in measure.devices:
        if objective.max_cost is not None:
            spent = routed.costs(table, objective.cost_name)
            if statistic_of(spent, objective.statistic) > objective.max_cost:
                return False
        for limit in objective.limits_on:
            at_most = limit.at_most * (table.total(limit.cost) if limit.relative else 1)
            if statistic_of(routed.costs(table, limit.cost), limit.statistic) > at_most:
                return False
    iou = dict(zip(routed.tables.class_names, class_iou(*routed.tables.counts(routed.routing)), strict=True))
    return all(iou[name] >= floor for name, floor in objective.min_class_iou)


def reached_of(objective: Objective, measure: CostMeasure, routed: Routed) -> tuple[ReachedCost | ReachedIou, ...]:
    """What becomes of each quantity that an objective is about, beyond mIoU and one mean cost, over all images. Of
    several limits on one quantity the tightest is kept."""
    costs: dict[tuple[CostName, Statistic, bool], float | None] = {}
    for quantity, limit in _asked_costs(objective, measure):
        known = costs.get(quantity)
        costs[quantity] = limit if known is None or limit is None else min(known, limit)
    floors: dict[str, float] = {}
    for class_name, floor in objective.min_class_iou:
        floors[class_name] = max(floor, floors.get(class_name, 0.0))

    reached: list[ReachedCost | ReachedIou] = []
    for (cost, statistic, relative), limit in costs.items():
        spent = []
        for table in measure.devices:
            # The statistic over the images on each device, in the limit's unit; then the largest device counts.
            value, model = statistic_of(routed.costs(table, cost), statistic), table.total(cost)
            spent.append(value / model if relative and model else value)
        reached.append(ReachedCost(cost=cost, statistic=statistic, relative=relative, value=max(spent), limit=limit))
    iou = class_iou(*routed.tables.counts(routed.routing))
    for class_name, floor in floors.items():
        value = float(iou[routed.tables.class_names.index(class_name)])
        reached.append(ReachedIou(class_name=class_name, value=value, limit=floor))
    return tuple(reached)


def _asked_costs(
    objective: Objective, measure: CostMeasure
) -> Iterator[tuple[tuple[CostName, Statistic, bool], float | None]]:
    """((cost, statistic, whether relative to the model), limit): the objective's own cost where its one figure does not
    tell all, then the further limits."""
    name, statistic, relative = objective.cost_name, objective.statistic, measure.unit.relative
    ratio, most = objective.max_cost_ratio, objective.max_cost
    # A mean on one device is told already, as the cost of the selection.
    if statistic != "mean":
        yield (name, statistic, relative), ratio if relative else most
        if ratio is not None and not relative:
            yield (name, statistic, True), ratio
    # Costs are relative on several devices, and a limit in their own unit is another figure.
    if most is not None and relative:
        yield (name, statistic, False), most
    for limit in objective.limits_on:
        yield (limit.cost, limit.statistic, limit.relative), limit.at_most


def checked_column(table: CostTable, tables: ExitTables, name: CostName) -> CostColumn:
    """One cost of the tables' exits. Raises RunError for an exit that the cost table lacks, for times in another
    precision than the tables are of, and for a cost below 0."""
    own = DTYPES[tables.precision]
    dtype = table.conditions.get("dtype", own)
    if name in ("latency_ms", "latency_p95_ms") and dtype != own:
        raise RunError(
            f"the exit tables are of a network in {own}, the cost table is of one in {dtype}: make both in the same "
            f"precision with `messnet evaluate` and `messnet profile --measure`"
        )
    column = table.column(name, tables.exits)
    # Bounds add costs up and assume that more parts never cost less.
    for values in (column.segments, column.heads, column.policies, column.outputs):
        if not (values >= 0).all():
            bad = values[~(values >= 0)][0]
            raise RunError(f"the cost table holds {name} = {bad:g}: costs are finite and >= 0; measure it again")
    return column
