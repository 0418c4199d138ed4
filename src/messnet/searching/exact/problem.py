"""Tables, costs and grid as the arrays that the search runs over, checked; and back from a key to an instance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from messnet.errors import RecipeError, RunError
from messnet.records.arrays import FloatArray, IntArray
from messnet.records.costs import CostColumn, CostTable
from messnet.records.exit_tables import ExitTables
from messnet.records.instance import ExitChoice, Instance, Setting
from messnet.searching.space import Column, Grid, Limit, Objective, columns_of

__all__ = ["Arrays", "CostRow", "Found", "Problem", "checked", "cost_rows"]

DECIMALS = 12  # at which mIoU is compared: beyond, float sums of equal ratios differ
MEAN, WORST, P95, WHOLE_SUM, WHOLE_MAX = range(5)
KINDS = {"mean": MEAN, "worst": WORST, "p95": P95}


class Arrays(NamedTuple):
    """A search's input. Costs are rows m: one cost of one device, as a mean, worst or p95 over images."""

    counts: NDArray[np.int32] | NDArray[np.int64]
    """(H, V, C)"""
    num_classes: int
    """K"""
    bins: NDArray[np.int32]
    """(columns, V)"""
    order: NDArray[np.int32]
    """(columns, V): images by ascending bin."""
    levels: NDArray[np.int64]
    """(columns,)"""
    first_column: NDArray[np.int64]
    """(H,): columns of early exit h are first_column[h] to first_column[h + 1]."""
    exit_index: NDArray[np.int64]
    """(H,)"""
    rows_per_exit: int
    """More than (column, level) pairs of any exit: the base of keys."""
    parts: NDArray[np.float64]
    """(m, 4, H): backbone up to the exit, head, decision, output."""
    kinds: NDArray[np.int64]
    """(m,): MEAN to WHOLE_MAX."""
    weights: NDArray[np.float64]
    """(m,): the objective is the largest weighted cost; 0 where a cost is only constrained."""
    limits: NDArray[np.float64]
    """(m,)"""
    floors: NDArray[np.float64]
    """(K,): least IoU of each class; -inf where there is none."""


class Found(NamedTuple):
    """A front under construction: ``size[0]`` points by ascending cost, each with a larger mIoU than the one before."""

    cost: NDArray[np.float64]
    miou: NDArray[np.float64]
    key: NDArray[np.int64]
    """The instance; of equal points the smallest key stays."""
    size: NDArray[np.int64]


class CostRow(NamedTuple):
    """One cost of one device: what it weighs in the objective (0: nothing) and its limit."""

    column: CostColumn
    statistic: Literal["mean", "worst", "p95"]
    weight: float
    limit: float


def cost_rows(objective: Objective, costs: Sequence[CostTable], tables: ExitTables) -> list[CostRow]:
    """The objective's cost on every device, then the limits. On several devices the objective's is relative to the
    user's whole model on that device, so that the largest is the least good one."""
    rows, name = [], objective.cost_name
    for table in costs:
        baseline = table.total(name)
        if len(costs) > 1 and baseline <= 0:
            raise RecipeError(f"the user's model costs no {name} on one device: nothing to be relative to")
        weight = 1 / baseline if len(costs) > 1 else 1.0
        absolute = objective.max_cost if len(costs) > 1 and objective.max_cost is not None else np.inf
        rows.append(CostRow(checked(table, tables, name), objective.statistic, weight, absolute))
    for limit in objective.limits_on:
        for table in costs:
            at_most = limit.at_most * table.total(limit.cost) if limit.relative else limit.at_most
            rows.append(CostRow(checked(table, tables, limit.cost), limit.statistic, 0.0, at_most))
    return rows


def checked(table: CostTable, tables: ExitTables, name: Limit | str) -> CostColumn:
    """One cost of the tables' exits. Raises RunError for an exit that the cost table lacks and a cost that is none."""
    column = table.column(name, tables.exits)  # type: ignore[arg-type]
    for values in (column.segments, column.heads, column.policies, column.outputs):
        if not (values >= 0).all():
            bad = values[~(values >= 0)][0]
            raise RunError(f"the cost table holds {name} = {bad:g}: costs are finite and >= 0; measure it again")
    return column


class Problem:
    """What is searched: ``arrays`` for the kernels, and what turns their keys into instances."""

    def __init__(self, tables: ExitTables, rows: Sequence[CostRow], grid: Grid, *, floors: FloatArray | None = None):
        _check(tables, grid)
        self.tables, self.policy = tables, grid.policy_of(tables)
        self.columns: list[list[Column]] = []
        self.num_declared: list[int] = []
        for position in range(tables.final):
            columns, declared = columns_of(tables, position, grid)
            self.columns.append(columns)
            self.num_declared.append(declared)
        occurs = tables.labelled.any(0)
        bins = [column.bins for columns in self.columns for column in columns]
        num_images = len(tables.image_names)
        stacked = np.array(bins, np.int32).reshape(len(bins), num_images)
        self.arrays = Arrays(
            counts=_counts(tables),
            num_classes=int(occurs.sum()),
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
            floors=np.full(int(occurs.sum()), -np.inf) if floors is None else floors,
        )
        if 4 * (len(tables.exits) + 1) ** 3 * self.arrays.rows_per_exit**2 >= 2**63:
            raise RecipeError("the grid has more instances than can be numbered: lower num_image_thresholds")

    def num_before(self, position: int) -> int:
        """Exits shallower than this one; they come first."""
        return int((self.arrays.exit_index < self.arrays.exit_index[position]).sum())

    def declared(self, max_exits: int) -> int:
        """Instances of up to ``max_exits`` exits, duplicates counted."""
        indices = self.arrays.exit_index.tolist()
        ways = [1] * len(indices)  # to reach each exit by exactly so many early exits
        total = len(indices)
        for _ in range(max_exits - 1):
            ways = [
                sum(ways[p] * self.num_declared[p] for p in range(len(self.num_declared)) if indices[p] < index)
                for index in indices
            ]
            total += sum(ways)
        return total

    def positions_of(self, key: int) -> tuple[int, ...]:
        """Positions in ``tables.exits`` of the instance with this key."""
        return self._decode(key)[0]

    def instance_of(self, key: int, *, setting: Setting, name: str = "front") -> Instance:
        positions, rows = self._decode(key)
        exits = [ExitChoice(exit_index=e.exit_index, head=e.head) for e in (self.tables.exits[p] for p in positions)]
        for i, row in enumerate(rows):
            column = self.columns[positions[i]][row // (self.num_images + 1)]
            level = self.num_images - row % (self.num_images + 1)
            exits[i] = ExitChoice(
                exit_index=exits[i].exit_index,
                head=exits[i].head,
                pixel_threshold=column.pixel_threshold,
                image_threshold=float(column.image_thresholds[level - 1]),
            )
        return Instance(name=name, setting=setting, exits=tuple(exits), policy=self.policy)

    @property
    def key_of_final(self) -> int:
        """Of the instance that is the user's model."""
        base = len(self.tables.exits) + 1
        return (base + self.tables.final) * base**2 * self.arrays.rows_per_exit**2

    def counts_of(self, key: int) -> IntArray:
        """(C,) summed counts of the instance with this key."""
        positions, rows = self._decode(key)
        routing = np.full(self.num_images, positions[-1])
        for position, row in reversed(list(zip(positions[:-1], rows, strict=True))):
            column = self.columns[position][row // (self.num_images + 1)]
            routing[column.bins >= self.num_images - row % (self.num_images + 1)] = position
        summed: IntArray = self.arrays.counts[routing, np.arange(self.num_images)].sum(0, dtype=np.int64)
        return summed

    @property
    def num_images(self) -> int:
        return len(self.tables.image_names)

    def _decode(self, key: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
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
    policy = tables.policies.index(grid.policy_of(tables))
    broken = np.argwhere(~np.isfinite(tables.image_confidence[:, : tables.final, policy]))
    if len(broken):
        image, position, _ = broken[0]
        raise RunError(
            f"the exit tables hold an image confidence that is no number: image {tables.image_names[image]}, exit "
            f"{tables.exits[position].exit_index} ({tables.exits[position].head}); make them again with `evaluate`"
        )


def _counts(tables: ExitTables) -> NDArray[np.int32] | NDArray[np.int64]:
    """(H, V, C), see ``kernels``; int32 where no sum can exceed it."""
    occurs = tables.labelled.any(0)
    union = tables.predicted + tables.labelled[:, None] - tables.intersection
    parts = (tables.intersection[..., occurs], union[..., occurs], union[..., ~occurs])
    counts = np.concatenate(parts, axis=2).transpose(1, 0, 2)
    largest = int(counts.max(initial=0)) * counts.shape[1]
    return np.ascontiguousarray(counts, np.int32) if largest < 2**31 else np.ascontiguousarray(counts, np.int64)


def _parts(column: CostColumn) -> FloatArray:
    """(4, H)"""
    prefix = np.array([column.prefix(int(index)) for index in column.exit_indices])
    return np.array([prefix, column.heads, column.policies, column.outputs], np.float64)


def _kind(row: CostRow) -> int:
    if not row.column.per_image:
        return WHOLE_SUM if row.column.combine == "sum" else WHOLE_MAX
    return KINDS[row.statistic]
