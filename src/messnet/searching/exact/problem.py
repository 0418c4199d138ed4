"""A search's tables, costs, constraints and grid as arrays, checked; and back from the number of an instance to it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from messnet.errors import RecipeError, RunError
from messnet.records.arrays import FloatArray, IntArray
from messnet.records.costs import CostColumn
from messnet.records.exit_tables import ExitTables
from messnet.records.instance import ExitChoice, Instance
from messnet.records.names import Setting, Statistic
from messnet.searching.answers import FrontPoint
from messnet.searching.exact.arrays import MEAN, P95, WHOLE_MAX, WHOLE_SUM, WORST, Arrays, Counts, Frontier
from messnet.searching.grid import Column, Grid, columns_of
from messnet.searching.measure import DECIMALS, CostMeasure, baseline_miou_of, checked_column
from messnet.searching.objective import Objective

_KINDS: dict[Statistic, int] = {"mean": MEAN, "worst": WORST, "p95": P95}


class _CostRow(NamedTuple):
    """One cost of one device: its weight in the objective (0: none) and its limit."""

    column: CostColumn
    statistic: Statistic
    weight: float
    limit: float


class Problem:
    """What is searched: tables, how cost is measured, the constraints of an objective on further costs and on classes,
    and the declared grid. Raises RecipeError and RunError for input that cannot be searched.

    ``arrays`` is for the inner loops, which know instances by a number, their key; the methods turn keys into
    instances.
    """

    def __init__(self, tables: ExitTables, measure: CostMeasure, objective: Objective, grid: Grid):
        # Input that no search can answer for is refused before anything is computed.
        _check(tables, grid)
        self.tables, self.measure, self.grid, self.policy = tables, measure, grid, grid.policy_of(tables)
        self.baseline_miou = baseline_miou_of(tables)
        self.columns: list[list[Column]] = []
        self.num_declared: list[int] = []
        for position in range(tables.final):
            columns, declared = columns_of(tables, position, grid)
            self.columns.append(columns)
            self.num_declared.append(declared)
        rows = _cost_rows(objective, measure, tables)
        # All columns of all early exits, one under another; ``first_column`` says whose they are.
        bins = [column.bins for columns in self.columns for column in columns]
        num_images = len(tables.image_names)
        stacked = np.array(bins, np.int32).reshape(len(bins), num_images)
        self.arrays = Arrays(
            counts=_counts(tables),
            num_classes=int(tables.labelled.any(0).sum()),
            bins=stacked,
            order=np.argsort(stacked, axis=1, kind="stable").astype(np.int32),
            levels=np.array([len(c.image_thresholds) for columns in self.columns for c in columns], np.int64),
            first_column=np.cumsum([0, *(len(columns) for columns in self.columns)]),
            exit_index=np.array([e.exit_index for e in tables.exits], np.int64),
            rows_per_exit=max((len(columns) for columns in self.columns), default=0) * (num_images + 1) + 1,
            parts=np.array([_parts(row.column) for row in rows]),
            kinds=np.array([_kind(row) for row in rows], np.int64),
            weights=np.array([row.weight for row in rows], np.float64),
            limits=np.array([row.limit for row in rows], np.float64),
            floors=_floors(objective, tables),
        )
        # Keys are 64-bit numbers: see ``enumeration.key_of``.
        if 4 * (len(tables.exits) + 1) ** 3 * self.arrays.rows_per_exit**2 >= 2**63:
            raise RecipeError("the grid has more instances than can be numbered: lower num_image_thresholds")

    @property
    def num_images(self) -> int:
        return len(self.tables.image_names)

    def limits(self, objective: Objective) -> tuple[float, float]:
        """What an objective over the same cost allows: the least mIoU, -inf for any, and the largest cost, in the
        measure's unit."""
        return round(objective.least_miou(self.baseline_miou), DECIMALS), self.measure.largest(objective)

    def num_before(self, position: int) -> int:
        """The number of exits at shallower exit points than that of ``position``; they come first in the tables."""
        return int((self.arrays.exit_index < self.arrays.exit_index[position]).sum())

    def declared(self, max_exits: int) -> int:
        """The number of instances of up to ``max_exits`` exits, duplicates counted."""
        indices = self.arrays.exit_index.tolist()
        ways = [1] * len(indices)  # to reach each exit by exactly so many early exits
        total = len(indices)
        # Ways with one early exit more: each exit is reached from all that lie before it.
        for _ in range(max_exits - 1):
            ways = [
                sum(ways[p] * self.num_declared[p] for p in range(len(self.num_declared)) if indices[p] < index)
                for index in indices
            ]
            total += sum(ways)
        return total

    def positions_of(self, key: int) -> tuple[int, ...]:
        """Positions in ``tables.exits`` of the exits of an instance, shallow to deep."""
        return self._decode(key)[0]

    def instance_of(self, key: int, setting: Setting) -> Instance:
        """The instance that a key stands for."""
        positions, rows = self._decode(key)
        exits = [ExitChoice(exit_index=e.exit_index, head=e.head) for e in (self.tables.exits[p] for p in positions)]
        # A row is column (V + 1) + (V - level): fewer images leaving early, smaller number.
        for i, row in enumerate(rows):
            column = self.columns[positions[i]][row // (self.num_images + 1)]
            level = self.num_images - row % (self.num_images + 1)
            exits[i] = ExitChoice(
                exit_index=exits[i].exit_index,
                head=exits[i].head,
                pixel_threshold=column.pixel_threshold,
                image_threshold=float(column.image_thresholds[level - 1]),
            )
        return Instance(name="front", setting=setting, exits=tuple(exits), policy=self.policy)

    def points_of(self, front: Frontier, setting: Setting) -> tuple[FrontPoint, ...]:
        """The points of a front under construction, as records."""
        return tuple(
            FrontPoint(
                miou=float(front.miou[i]),
                cost=float(front.cost[i]),
                instance=self.instance_of(int(front.key[i]), setting),
            )
            for i in range(int(front.size[0]))
        )

    @property
    def key_of_final(self) -> int:
        """The key of the instance that is the user's model."""
        base = len(self.tables.exits) + 1
        return (base + self.tables.final) * base**2 * self.arrays.rows_per_exit**2

    def counts_of(self, key: int) -> IntArray:
        """(C,) pixel counts of an instance, summed over the images."""
        positions, rows = self._decode(key)
        # The last exit for all, then the middle one, then the first, which goes before both.
        routing = np.full(self.num_images, positions[-1])
        for position, row in reversed(list(zip(positions[:-1], rows, strict=True))):
            column = self.columns[position][row // (self.num_images + 1)]
            routing[column.bins >= self.num_images - row % (self.num_images + 1)] = position
        summed: IntArray = self.arrays.counts[routing, np.arange(self.num_images)].sum(0, dtype=np.int64)
        return summed

    def _decode(self, key: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Exits, shallow to deep, and the (column, level) numbers of the early ones: ``enumeration.key_of`` undone."""
        # The digits of ``enumeration.key_of``, from the lowest up.
        key, second = divmod(int(key), self.arrays.rows_per_exit)
        key, row = divmod(key, self.arrays.rows_per_exit)
        base = len(self.tables.exits) + 1
        key, first = divmod(key, base)
        key, middle = divmod(key, base)
        last = key % base
        early = tuple(position - 1 for position in (first, middle) if position)
        return (*early, last), (row, second)[: len(early)]


def _check(tables: ExitTables, grid: Grid) -> None:
    if not tables.labelled.any():
        raise RecipeError("the selection images have no labelled pixel: nothing to select on")
    # Only what the search looks at: the early exits under the policy of the grid.
    policy = tables.policies.index(grid.policy_of(tables))
    broken = np.argwhere(~np.isfinite(tables.image_confidence[:, : tables.final, policy]))
    if len(broken):
        image, position, _ = broken[0]
        raise RunError(
            f"the exit tables hold an image confidence that is no number: image {tables.image_names[image]}, exit "
            f"{tables.exits[position].exit_index} ({tables.exits[position].head}); make them again with `evaluate`"
        )


def _cost_rows(objective: Objective, measure: CostMeasure, tables: ExitTables) -> list[_CostRow]:
    """The objective's cost on every device, then the further limits on every device."""
    rows, several = [], measure.unit.relative
    # On one device a largest cost is a bound of the objective itself, which the search exploits; see CostMeasure.
    absolute = objective.max_cost if several and objective.max_cost is not None else np.inf
    for table, weight in zip(measure.devices, measure.weights, strict=True):
        rows.append(_CostRow(checked_column(table, tables, measure.name), objective.statistic, weight, absolute))
    for limit in objective.limits_on:
        for table in measure.devices:
            at_most = limit.at_most * table.total(limit.cost) if limit.relative else limit.at_most
            rows.append(_CostRow(checked_column(table, tables, limit.cost), limit.statistic, 0.0, at_most))
    return rows


def _floors(objective: Objective, tables: ExitTables) -> FloatArray:
    """(K,) least IoU of the classes that have labels."""
    names = [tables.class_names[k] for k in np.flatnonzero(tables.labelled.any(0))]
    floors = np.full(len(names), -np.inf)
    for name, floor in objective.min_class_iou:
        if name not in tables.class_names:
            raise RecipeError(f"no class {name!r}: expected one of {', '.join(tables.class_names)}")
        if name not in names:
            raise RecipeError(f"class {name!r} is in no label of the selection images: it has no IoU to constrain")
        floors[names.index(name)] = max(floors[names.index(name)], floor)
    return floors


def _counts(tables: ExitTables) -> Counts:
    """(H, V, C), see ``Arrays.counts``; int32 where no sum can exceed it."""
    # Classes with labels first: their IoU can be above 0.
    occurs = tables.labelled.any(0)
    union = tables.predicted + tables.labelled[:, None] - tables.intersection
    parts = (tables.intersection[..., occurs], union[..., occurs], union[..., ~occurs])
    counts: NDArray[np.int64] = np.concatenate(parts, axis=2).transpose(1, 0, 2)
    # No sum over the images, each at any exit, can be larger.
    largest = int(counts.max(initial=0)) * counts.shape[1]
    return np.ascontiguousarray(counts, np.int32) if largest < 2**31 else np.ascontiguousarray(counts, np.int64)


def _parts(column: CostColumn) -> FloatArray:
    """(4, H): backbone up to the exit, head, decision, output."""
    return np.array([column.reached(), column.heads, column.policies, column.outputs], np.float64)


def _kind(row: _CostRow) -> int:
    if not row.column.per_image:
        return WHOLE_SUM if row.column.combine == "sum" else WHOLE_MAX
    return _KINDS[row.statistic]
