"""Search in the anytime setting: a set of exits that all run, each with a result at hand when it is reached.

Here thresholds decide nothing, so an instance is a choice of exits with one head each. Its results must get better from
exit to exit, since one that is no better than the one before is of no use. All choices are evaluated: 56 heads at three
of six exit points are two million, and each is a handful of sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from messnet.errors import InfeasibleError, RecipeError
from messnet.records.arrays import FloatArray, IntArray
from messnet.records.costs import CostTable
from messnet.records.exit_tables import ExitTables
from messnet.records.instance import ExitChoice, Instance
from messnet.records.selection import AnytimeFigures, CostUnit, Selection
from messnet.searching import words
from messnet.searching.answers import AnytimeProof, FrontPoint, SearchResult
from messnet.searching.grid import Grid
from messnet.searching.measure import baseline_miou_of, checked_column
from messnet.searching.objective import AnytimeObjective

NUM_BEST = 4
"""The answer and its runners-up."""


class Figures(NamedTuple):
    """What n anytime instances do, each (n,)."""

    first_cost: FloatArray
    """Until the first result is there."""
    total_cost: FloatArray
    """Until the last result is there: all segments, heads and outputs on the way."""
    overhead: FloatArray
    """Total cost over the cost of running the last exit alone, less 1."""
    area: FloatArray
    """Mean mIoU of the result at hand over costs from 0 to the horizon; 0 before the first."""
    first_miou: FloatArray
    miou: FloatArray
    """The last result's."""

    def take(self, rows: NDArray[np.intp] | list[int]) -> Figures:
        return Figures(*(values[rows] for values in self))


def figures_of(mious: FloatArray, reached: FloatArray, extra: FloatArray, horizon: float) -> Figures:
    """The figures of n instances from arrays (n, exits), exits shallow to deep: the mIoU of each exit, the backbone's
    cost up to it, and the cost of its head and output; ``horizon`` is in the same unit."""
    # A result is there when the backbone, all heads and all outputs up to it have run.
    times = reached + np.cumsum(extra, axis=1)
    # Each result is at hand until the next one is there, or the horizon.
    ends = np.minimum(np.concatenate([times, np.full((len(times), 1), horizon)], axis=1), horizon)
    last_only = reached[:, -1] + extra[:, -1]
    ratio = np.divide(times[:, -1], last_only, out=np.ones(len(times)), where=last_only > 0)
    area = (mious * np.diff(ends, axis=1)).sum(1) / horizon
    return Figures(times[:, 0], times[:, -1], ratio - 1, area, mious[:, 0], mious[:, -1])


def search_anytime(
    tables: ExitTables, costs: CostTable | Sequence[CostTable], objective: AnytimeObjective, *, grid: Grid, name: str
) -> SearchResult:
    """The best choice of up to ``grid.max_exits`` exits, and the next ones. Raises InfeasibleError when none meets the
    constraints, RecipeError for several cost tables."""
    devices = [costs] if isinstance(costs, CostTable) else list(costs)
    if len(devices) != 1:
        raise RecipeError(f"the anytime setting is searched for one device: give one cost table, got {len(devices)}")
    # Costs of the parts, which any choice of exits adds up.
    column = checked_column(devices[0], tables, objective.cost)
    reached = column.reached()
    extra = column.heads + column.outputs
    num_images = len(tables.image_names)
    mious = np.array([tables.miou(np.full(num_images, position)) for position in range(len(tables.exits))])
    model, baseline_miou = devices[0].total(objective.cost), baseline_miou_of(tables)
    if model <= 0:
        raise RecipeError(f"the user's model costs no {objective.cost}: nothing to measure anytime results by")

    best: list[tuple[tuple[float, ...], tuple[int, ...], Figures]] = []
    possible: list[Figures] = []
    num_choices = 0
    # All choices, one set of exit points after another, as arrays.
    for positions in _choices(tables, objective.min_exits, grid.max_exits):
        num_choices += len(positions)
        # Only those that get better from exit to exit.
        positions = positions[(np.diff(mious[positions], axis=1) > 0).all(1)]
        figures = figures_of(mious[positions], reached[positions], extra[positions], objective.horizon * model)
        if len(positions):
            possible.append(figures)
        # Constraints after the order of mIoU: what is possible without them is told if none is met.
        met = np.flatnonzero(_meets(objective, figures, baseline_miou, model))
        ranks = _ranks(objective, figures.take(met))
        # The best of this set of exit points; the best of all are among these.
        for i in np.lexsort(ranks[::-1])[:NUM_BEST]:
            one = tuple(positions[met[i]].tolist())
            best.append((tuple(float(rank[i]) for rank in ranks), one, figures.take(met[[i]])))
    if not best:
        raise InfeasibleError(words.anytime_infeasible(objective, _best_of_each(possible)))
    best = sorted(best, key=lambda one: one[:2])[:NUM_BEST]

    points, selections = [], []
    for _, chosen, figures in best:
        first_cost, total_cost, overhead, area, first_miou, miou = (float(values[0]) for values in figures)
        selection = Selection(
            num_images=num_images,
            unit=CostUnit(objective.cost),
            miou=miou,
            cost=total_cost,
            baseline_miou=baseline_miou,
            baseline_cost=model,
            anytime=AnytimeFigures(first_cost=first_cost, first_miou=first_miou, overhead=overhead, area=area),
        )
        selections.append(selection)
        exits = tuple(ExitChoice(exit_index=tables.exits[p].exit_index, head=tables.exits[p].head) for p in chosen)
        instance = Instance(
            name=name, setting="anytime", exits=exits, policy=grid.policy_of(tables), selected_on=selection.to_figures()
        )
        points.append(FrontPoint(miou=selection.miou, cost=selection.cost, instance=instance))
    result = SearchResult(
        instance=points[0].instance,
        objective=objective,
        selection=selections[0],
        front=[],
        runners_up=points[1:],
        proof=AnytimeProof(num_evaluated=num_choices, min_exits=objective.min_exits, max_exits=grid.max_exits),
    )
    return words.with_words(result)


def _choices(tables: ExitTables, min_exits: int, max_exits: int) -> Iterator[IntArray]:
    """(n, exits) positions in ``tables.exits``, one array for every set of exit points."""
    at: dict[int, list[int]] = {}
    for position, exit in enumerate(tables.exits):
        at.setdefault(exit.exit_index, []).append(position)
    for size in range(min_exits, max_exits + 1):
        for indices in combinations(sorted(at), size):
            yield np.stack(np.meshgrid(*(at[index] for index in indices), indexing="ij"), axis=-1).reshape(-1, size)


def _meets(objective: AnytimeObjective, figures: Figures, baseline_miou: float, model: float) -> NDArray[np.bool_]:
    upper = [
        (figures.first_cost, objective.max_first_cost),
        (figures.first_cost, None if objective.max_first_ratio is None else objective.max_first_ratio * model),
        (figures.overhead, objective.max_overhead),
    ]
    lower = [
        (figures.first_miou, objective.min_first_miou),
        (figures.area, objective.min_area),
        (figures.miou, objective.min_miou),
        (figures.miou, None if objective.max_drop_pp is None else baseline_miou - objective.max_drop_pp / 100),
    ]
    met = np.ones(len(figures.miou), bool)
    for values, bound in upper:
        met &= True if bound is None else values <= bound
    for values, bound in lower:
        met &= True if bound is None else values >= bound - 1e-12  # float sums of equal ratios differ
    return met


def _ranks(objective: AnytimeObjective, figures: Figures) -> list[FloatArray]:
    """Keys (n,) that sort the best first; of equal ones the larger area, then the cheaper."""
    goal = {
        "area": -figures.area,
        "first_cost": figures.first_cost,
        "overhead": figures.overhead,
        "miou": -figures.miou,
    }[objective.goal]
    return [goal.round(12), (-figures.area).round(12), figures.total_cost]


def _best_of_each(possible: list[Figures]) -> tuple[AnytimeFigures, float] | None:
    """The best of each figure and of the last mIoU, whatever the others are."""
    if not possible:
        return None
    every = Figures(*map(np.concatenate, zip(*possible, strict=True)))
    best = AnytimeFigures(
        first_cost=float(every.first_cost.min()),
        first_miou=float(every.first_miou.max()),
        overhead=float(every.overhead.min()),
        area=float(every.area.max()),
    )
    return best, float(every.miou.max())
