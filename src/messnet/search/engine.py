"""Exact search over tables: one enumeration gives the accuracy-cost front, the front answers every question.

An instance of early exits a < b and last exit c sends out the image sets A at a, B \\ A at b, the rest at c. Summed
pixel counts are linear in these sets, so all pairs (A, B) of two heads are evaluated by matrix products. Before that,
sets B of similar size are bounded together: images in all of them leave at b, images in none reach c, and the others
count as whichever is better for each class. A group whose bound does not beat the front at its least cost is done.

Instances are taken in the order of ties: fewer exits first, then the shallower last exit, then the shallower middle,
then the shallower first. So an instance enters the front only when it is strictly better than all before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from messnet.errors import InfeasibleError, RecipeError
from messnet.instance import ExitChoice, Instance
from messnet.search.space import ExitSets, Grid, Objective, exit_sets
from messnet.tables import CostColumn, CostName, CostTable, ExitTables, FloatArray, IntArray

__all__ = ["Front", "FrontPoint", "SearchResult", "SearchSetting", "choose", "pareto_front", "search"]

SearchSetting = Literal["budgeted", "input_dependent"]

GROUP_SIZE = 32  # exit sets bounded together: fewer bound tighter, more cost less
CHUNK_ROWS = 1024  # first-exit sets at a time, so that their results stay in the cache
DECIMALS = 12  # at which mIoU is compared: beyond, float sums of equal ratios differ


@dataclass(frozen=True, kw_only=True)
class FrontPoint:
    """One optimum: no instance of the grid has a larger mIoU at this cost or less."""

    miou: float
    """In [0, 1], over the selection images."""
    cost: float
    """Mean over the selection images, in the unit of the cost."""
    instance: Instance


@dataclass(frozen=True, kw_only=True)
class Front:
    """The accuracy-cost Pareto front of a declared grid: ``points`` by ascending cost, hence ascending mIoU."""

    points: tuple[FrontPoint, ...]
    static: tuple[FrontPoint, ...]
    """The front of the budgeted setting: static truncated models."""
    setting: SearchSetting
    cost_name: CostName
    baseline_miou: float
    """mIoU of the final exit on the same images."""
    baseline_cost: float
    """Cost of the user's whole model."""
    num_images: int
    num_declared: int
    """Instances of the grid, duplicates counted."""
    num_distinct: int
    """Instances that route the images differently."""
    num_evaluated: int
    """Instances whose mIoU was computed; all others were bounded."""

    @property
    def certificate(self) -> str:
        return (
            f"optimal over the declared grid of {_spaced(self.num_declared)} instances "
            f"({_spaced(self.num_distinct)} distinct): {_spaced(self.num_evaluated)} were evaluated, "
            f"all others were bounded"
        )


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search answers."""

    instance: Instance
    front: list[FrontPoint]
    """The whole front, by ascending cost."""
    certificate: str
    """What was proved, in words."""
    runners_up: list[FrontPoint]
    """The next best points of the front that meet the constraints."""
    verdict: str
    """Does the instance beat the best static truncated model under the same constraints, and by how much."""


def search(
    tables: ExitTables,
    costs: CostTable,
    *,
    setting: SearchSetting = "input_dependent",
    minimise: CostName | None = None,
    maximise: Literal["miou"] | None = None,
    cost: CostName = "macs",
    max_drop_pp: float | None = None,
    min_miou: float | None = None,
    max_cost: float | None = None,
    max_cost_ratio: float | None = None,
    grid: Grid | None = None,
    name: str = "instance",
    progress: bool = False,
) -> SearchResult:
    """The best instance for one objective, see Objective for its keywords and Grid for what is tried.

    For several objectives of one cost call ``pareto_front`` once and ``choose`` for each. Raises InfeasibleError, with
    the nearest feasible points, when no instance meets the constraints.
    """
    objective = Objective(
        minimise=minimise,
        maximise=maximise,
        cost=cost,
        max_drop_pp=max_drop_pp,
        min_miou=min_miou,
        max_cost=max_cost,
        max_cost_ratio=max_cost_ratio,
    )
    front = pareto_front(tables, costs, setting=setting, cost=objective.cost_name, grid=grid, progress=progress)
    return choose(front, objective, name=name)


def choose(front: Front, objective: Objective, *, name: str = "instance") -> SearchResult:
    """The point of ``front`` that ``objective`` asks for. Raises InfeasibleError when there is none."""
    if objective.cost_name != front.cost_name:
        raise RecipeError(f"the front is over {front.cost_name}, the objective asks for {objective.cost_name}")
    feasible = _feasible(front, front.points, objective)
    if not feasible:
        raise InfeasibleError(_nearest(front, objective))
    best, *others = feasible
    instance = replace(
        best.instance,
        name=name,
        objective=str(objective),
        selected_on={
            "miou": best.miou,
            front.cost_name: best.cost,
            "images": front.num_images,
            "baseline_miou": front.baseline_miou,
            f"baseline_{front.cost_name}": front.baseline_cost,
        },
        certificate=front.certificate,
    )
    return SearchResult(
        instance=instance,
        front=list(front.points),
        certificate=front.certificate,
        runners_up=others[:3],
        verdict=_verdict(front, objective, best),
    )


def pareto_front(
    tables: ExitTables,
    costs: CostTable,
    *,
    setting: SearchSetting = "input_dependent",
    cost: CostName = "macs",
    grid: Grid | None = None,
    progress: bool = False,
) -> Front:
    """The exact front of mIoU against one cost over everything ``grid`` declares."""
    if setting not in ("budgeted", "input_dependent"):
        raise RecipeError(f"cannot search the setting {setting!r}: expected 'budgeted' or 'input_dependent'")
    grid = grid or Grid()
    if not tables.labelled.any():
        raise RecipeError("the selection images have no labelled pixel: nothing to select on")
    max_exits = 1 if setting == "budgeted" else grid.max_exits
    sets = [exit_sets(tables, position, grid) for position in range(tables.final)] if max_exits > 1 else []

    enumeration = _Enumeration(tables, costs.column(cost, tables.exits), sets)
    final = enumeration.try_single_exits()[-1]
    static = enumeration.best.entries
    if max_exits > 1:
        enumeration.try_pairs()
    if max_exits > 2:
        enumeration.try_triples(progress)

    def points(entries: Sequence[_Entry], setting: SearchSetting) -> tuple[FrontPoint, ...]:
        policy = grid.policy_of(tables)
        return tuple(_point(entry, tables, sets, setting, policy) for entry in entries)

    return Front(
        points=points(enumeration.best.entries, setting),
        static=points(static, "budgeted"),
        setting=setting,
        cost_name=cost,
        baseline_miou=final.miou,
        baseline_cost=final.cost,
        num_images=len(tables.image_names),
        num_declared=_num_instances(tables, [one.num_declared for one in sets], max_exits),
        num_distinct=_num_instances(tables, [len(one.masks) for one in sets], max_exits),
        num_evaluated=enumeration.num_evaluated,
    )


class _Entry(NamedTuple):
    """An instance while enumerating: positions in ``tables.exits`` and, for all but the last, the exit set's index."""

    cost: float
    miou: float
    positions: tuple[int, ...]
    sets: tuple[int, ...]


class _Best:
    """The front so far: entries by ascending cost, each with a larger mIoU than the one before."""

    def __init__(self) -> None:
        self.entries: tuple[_Entry, ...] = ()
        self._costs = np.zeros(0)
        self._mious = np.array([-np.inf])

    def miou_at(self, cost: FloatArray) -> FloatArray:
        """The best mIoU so far at each cost or less, -inf where there is none. Only what exceeds it can enter."""
        best: FloatArray = self._mious[np.searchsorted(self._costs, cost, side="right")]
        return best

    def add(self, entry: _Entry) -> None:
        if entry.miou <= self.miou_at(np.array(entry.cost)):
            return
        kept = [old for old in self.entries if old.cost < entry.cost or old.miou > entry.miou]
        self.entries = tuple(sorted([*kept, entry], key=lambda one: one.cost))
        self._costs = np.array([one.cost for one in self.entries])
        self._mious = np.array([-np.inf, *(one.miou for one in self.entries)])


class _Enumeration:
    """All instances of the grid against the front so far.

    V images, K classes that occur in the labels, C = 2 K + the other classes, R sets of all early exits in a row.
    Counts are float64: sums of pixels are exact in it, and its matrix products fast.
    """

    def __init__(self, tables: ExitTables, column: CostColumn, sets: list[ExitSets]) -> None:
        self.exits, self.sets, self.num_images = tables.exits, sets, len(tables.image_names)
        self.best, self.num_evaluated = _Best(), 0
        self.column, self.prefix = column, np.array([column.prefix(e.exit_index) for e in tables.exits])

        occurs = tables.labelled.any(0)
        self.num_classes = int(occurs.sum())
        union = tables.predicted.astype(np.int64) + tables.labelled[:, None] - tables.intersection
        # (H, V, C): intersections, unions, then unions of classes without labels, which can only add an IoU of 0.
        counts = np.concatenate([tables.intersection[..., occurs], union[..., occurs], union[..., ~occurs]], axis=2)
        self.counts: FloatArray = counts.transpose(1, 0, 2).astype(np.float64)

        # One row per exit set: ordered by exit, so that those shallower than an exit come first.
        sizes = [len(one.masks) for one in sets]
        self.row_position = np.repeat(np.arange(len(sets)), sizes)
        self.row_set = np.concatenate([np.arange(size) for size in sizes]) if sizes else np.zeros(0, np.int64)
        leaves = np.concatenate([one.masks for one in sets]).astype(np.float64) if sets else np.zeros((0, 0))
        self.stays: FloatArray = 1 - leaves
        self.row_counts: FloatArray = np.concatenate(
            [one.masks.astype(np.float64) @ counts for one, counts in zip(sets, self.counts, strict=False)]
            or [np.zeros((0, 0))]
        )
        self.num_left: FloatArray = leaves.sum(1)

    def try_single_exits(self) -> list[_Entry]:
        mious, costs = self._miou(self.counts.sum(1)), self._costs([np.arange(len(self.exits))], [])
        entries = [_Entry(float(costs[p]), float(mious[p]), (p,), ()) for p in range(len(self.exits))]
        self.num_evaluated += len(entries)
        for entry in entries:
            self.best.add(entry)
        return entries

    def try_pairs(self) -> None:
        """One early exit, then the last."""
        for last in range(len(self.exits)):
            rows = self._num_rows_before(last)
            mious = self._miou(self.row_counts[:rows] + self.stays[:rows] @ self.counts[last])
            costs = self._costs([self.row_position[:rows], last], [self.num_left[:rows]])
            self.num_evaluated += rows
            for row in _undominated(costs, mious):
                where = (int(self.row_position[row]), last)
                self.best.add(_Entry(float(costs[row]), float(mious[row]), where, (int(self.row_set[row]),)))

    def try_triples(self, progress: bool) -> None:
        """Two early exits, then the last."""
        pairs = [
            (middle, last)
            for last in range(len(self.exits))
            for middle in range(len(self.sets))
            if self._num_rows_before(middle) and self.exits[middle].exit_index < self.exits[last].exit_index
        ]
        for middle, last in tqdm(pairs, desc="search", unit="pair", disable=not progress):
            for start in range(0, self._num_rows_before(middle), CHUNK_ROWS):
                stop = min(start + CHUNK_ROWS, self._num_rows_before(middle))
                self._try_chunk(np.arange(start, stop), middle, last)

    def _try_chunk(self, rows: IntArray, middle: int, last: int) -> None:
        """The first-exit sets ``rows`` with every set of ``middle``."""
        masks = self.sets[middle].masks
        groups = range(0, len(masks), GROUP_SIZE)
        base = self.row_counts[rows] + self.stays[rows] @ self.counts[last]
        promising = self._bound_groups(rows, base, middle, last)
        found: list[tuple[FloatArray, FloatArray, IntArray, IntArray]] = []
        gain = self.counts[middle] - self.counts[last]
        for g, start in enumerate(groups):
            kept = np.flatnonzero(promising[:, g])
            if not len(kept):
                continue
            group = masks[start : start + GROUP_SIZE].T.astype(np.float64)
            stays = self.stays[rows[kept]]
            weights = gain[:, :, None] * group[:, None, :]
            counts = (stays @ weights.reshape(len(gain), -1)).reshape(len(kept), *weights.shape[1:])
            counts += base[kept, :, None]
            costs = self._triple_costs(rows[kept], middle, last, stays @ group)
            self.num_evaluated += costs.size
            mious = self._miou(counts)
            i, j = np.nonzero(mious > self.best.miou_at(costs))
            found.append((costs[i, j], mious[i, j], rows[kept[i]], j + start))
        if not found:
            return
        costs, mious, first, second = (np.concatenate(parts) for parts in zip(*found, strict=True))
        order = np.lexsort((second, first))  # ties: the shallower first exit
        costs, mious, first, second = costs[order], mious[order], first[order], second[order]
        for k in _undominated(costs, mious):
            where = (int(self.row_position[first[k]]), middle, last)
            chosen = (int(self.row_set[first[k]]), int(second[k]))
            self.best.add(_Entry(float(costs[k]), float(mious[k]), where, chosen))

    def _bound_groups(self, rows: IntArray, base: FloatArray, middle: int, last: int) -> NDArray[np.bool_]:
        """(R, G): can any of a group's sets, after the first-exit set of the row, beat the front?"""
        masks, k = self.sets[middle].masks, self.num_classes
        starts = np.arange(0, len(masks), GROUP_SIZE)
        inner, outer = np.logical_and.reduceat(masks, starts), np.logical_or.reduceat(masks, starts)
        surely, maybe = inner[:, :, None], (outer & ~inner)[:, :, None]
        gain = (self.counts[middle] - self.counts[last])[None, :, : 2 * k]
        best = np.concatenate([np.maximum(gain[..., :k], 0), np.minimum(gain[..., k:], 0)], axis=2)
        weights = (surely * gain + maybe * best).transpose(1, 0, 2)
        stays = self.stays[rows]
        counts = (stays @ weights.reshape(len(weights), -1)).reshape(len(rows), len(starts), 2 * k)
        counts += base[:, None, : 2 * k]
        bound = np.minimum(counts[..., :k] / counts[..., k:], 1).sum(2) / k
        # An output can be dearer than the way on: the more leave, the cheaper or the dearer.
        least_cost = np.minimum(
            self._triple_costs(rows, middle, last, stays @ outer.T),
            self._triple_costs(rows, middle, last, stays @ inner.T),
        )
        promising: NDArray[np.bool_] = bound + 10.0**-DECIMALS > self.best.miou_at(least_cost)
        return promising

    def _num_rows_before(self, position: int) -> int:
        """Exit sets of all exits shallower than this one."""
        shallower = sum(e.exit_index < self.exits[position].exit_index for e in self.exits)
        return int(np.searchsorted(self.row_position, shallower))

    def _triple_costs(self, rows: IntArray, middle: int, last: int, left_at_middle: FloatArray) -> FloatArray:
        """(R, S) from how many images (R, S) leave at the middle exit."""
        left = self.num_left[rows, None]
        return self._costs([self.row_position[rows, None], middle, last], [left, left + left_at_middle])

    def _costs(self, positions: Sequence[IntArray | int], num_left: Sequence[FloatArray]) -> FloatArray:
        """Mean cost per image when ``num_left[j]`` images in all have left at the first j + 1 exits, all at the last:
        what ``CostColumn.leaving`` says of each image, for many instances at once."""
        column, num_images = self.column, self.num_images
        deciding = positions[:-1]
        if not column.per_image:
            parts = [self.prefix[positions[-1]], *(column.policies[p] for p in deciding)]
            parts += [values[p] for p in positions for values in (column.heads, column.outputs)]
            whole = reduce(np.add if column.combine == "sum" else np.maximum, parts)
            return np.broadcast_to(whole, np.broadcast_shapes(whole.shape, *(left.shape for left in num_left)))
        total: Any = 0.0
        before: Any = 0.0
        left: Any = 0
        for j, (here, left_here) in enumerate(zip(positions, [*num_left, num_images], strict=True)):
            stage = self.prefix[here] - before + column.heads[here]
            stage = stage + column.policies[here] if j < len(deciding) else stage
            total = total + (num_images - left) * stage + (left_here - left) * column.outputs[here]
            before, left = self.prefix[here], left_here
        costs: FloatArray = total / num_images
        return costs

    def _miou(self, counts: FloatArray) -> FloatArray:
        """(n, ...) mIoU of summed counts (n, C, ...)."""
        k = self.num_classes
        num_predicted_only = (counts[:, 2 * k :] > 0).sum(1)
        miou: FloatArray = (counts[:, :k] / counts[:, k : 2 * k]).sum(1) / (k + num_predicted_only)
        return np.round(miou, DECIMALS)


def _undominated(costs: FloatArray, mious: FloatArray) -> IntArray:
    """Positions of the Pareto front of (n,) costs and mIoUs, by ascending cost; of equal ones the first."""
    order = np.lexsort((-mious, costs))
    best_before = np.maximum.accumulate(np.concatenate([[-np.inf], mious[order]]))[:-1]
    front: IntArray = order[mious[order] > best_before]
    return front


def _point(
    entry: _Entry, tables: ExitTables, sets: Sequence[ExitSets], setting: SearchSetting, policy: str
) -> FrontPoint:
    exits = [ExitChoice(exit_index=e.exit_index, head=e.head) for e in (tables.exits[p] for p in entry.positions)]
    for i, chosen in enumerate(entry.sets):
        pixel, image = sets[entry.positions[i]].thresholds[chosen]
        exits[i] = replace(exits[i], pixel_threshold=float(pixel), image_threshold=float(image))
    instance = Instance(name="front", setting=setting, exits=tuple(exits), policy=policy)
    return FrontPoint(miou=entry.miou, cost=entry.cost, instance=instance)


def _num_instances(tables: ExitTables, num_sets: Sequence[int], max_exits: int) -> int:
    """Instances of up to ``max_exits`` exits when early exit p has ``num_sets[p]`` exit sets."""
    indices = [e.exit_index for e in tables.exits]
    ways = [1] * len(indices)  # to reach each exit by exactly so many early exits
    total = len(indices)
    for _ in range(max_exits - 1):
        ways = [sum(ways[p] * num_sets[p] for p in range(len(num_sets)) if indices[p] < index) for index in indices]
        total += sum(ways)
    return total


def _feasible(front: Front, points: Iterable[FrontPoint], objective: Objective) -> list[FrontPoint]:
    """The points that meet the constraints, best first."""
    least_miou, largest_cost = objective.limits(front.baseline_miou, front.baseline_cost)
    feasible = [p for p in points if p.miou >= round(least_miou, DECIMALS) and p.cost <= largest_cost]
    return feasible[::-1] if objective.maximise else feasible


def _nearest(front: Front, objective: Objective) -> str:
    """Why nothing is feasible, in one line."""
    least_miou, largest_cost = objective.limits(front.baseline_miou, front.baseline_cost)
    affordable = [p for p in front.points if p.cost <= largest_cost]
    accurate = [p for p in front.points if p.miou >= round(least_miou, DECIMALS)]
    nearest = [
        f"the best mIoU at that cost is {_words(affordable[-1], front)}" if affordable else "",
        f"the least cost at that mIoU is {_words(accurate[0], front)}" if accurate else "",
    ]
    if not affordable:
        nearest.append(f"the cheapest instance has {_words(front.points[0], front)}")
    if not accurate:
        nearest.append(f"the most accurate instance has {_words(front.points[-1], front)}")
    limits = [f"mIoU >= {least_miou:.4f}"] * (least_miou > -np.inf)
    limits += [f"{front.cost_name} <= {largest_cost:.4g}"] * (largest_cost < np.inf)
    return f"no instance has {' and '.join(limits)}: {'; '.join(filter(None, nearest))}; relax a constraint"


def _verdict(front: Front, objective: Objective, best: FrontPoint) -> str:
    static = _feasible(front, front.static, objective)
    if not static:
        return "no static truncated model meets the constraints, this instance does"
    rival = static[0]
    if (best.miou, best.cost) == (rival.miou, rival.cost):
        return f"no better than the best static truncated model: {_words(best, front)} both"
    more = f"{100 * (best.cost / rival.cost - 1):+.1f} %" if rival.cost else f"{best.cost:+.4g}"
    return (
        f"beats the best static truncated model: {100 * (best.miou - rival.miou):+.2f} pp mIoU, "
        f"{more} {front.cost_name}; {_words(best, front)} against {_words(rival, front)}"
    )


def _words(point: FrontPoint, front: Front) -> str:
    exits = " > ".join(f"{choice.exit_index}:{choice.head}" for choice in point.instance.exits)
    return f"mIoU {point.miou:.4f} at {point.cost:.4g} {front.cost_name} (exits {exits})"


def _spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")
