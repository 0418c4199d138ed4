"""What a search loses on images that it did not see, and a limit tightened until that is within what was asked for.

The best of billions of instances on fifty images is the one that flatters itself most there: found at a drop of at most
1 pp, it loses more on new images. Cross-fitting measures how much more. The images are dealt into folds, whole groups
at a time; for each fold the search runs on all other folds, and its instance is judged on this one. Every image is
judged exactly once, by an instance that was chosen without it, and the counts of all folds together give one mIoU and
one cost for the *procedure* "search with this limit" (Geisser, "The predictive sample reuse method", 1975). ``tighten``
walks from a very tight limit to the one asked for and keeps the last before the procedure's loss exceeds what was asked
for; the answer is then searched on all images with that limit. What the limit is tightened by is chosen on the same
figures, a handful of limits instead of billions of instances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from messnet.errors import RecipeError
from messnet.records.arrays import FloatArray, IntArray
from messnet.records.costs import CostTable
from messnet.records.exit_tables import ExitTables
from messnet.records.instance import ExitChoice, Instance
from messnet.records.iou import mean_iou
from messnet.records.selection import CostUnit
from messnet.searching.answers import FrontPoint, SearchResult
from messnet.searching.grid import Grid, cost_of, route
from messnet.searching.measure import CostMeasure, baseline_miou_of
from messnet.searching.objective import Objective
from messnet.searching.optima import Front, feasible, pareto_front, result_of

__all__ = ["STEPS_PP", "CrossFitted", "Tightened", "cross_fit", "error_of_drop", "folds_of", "procedure", "tighten"]

STEPS_PP = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0)
"""By how much an mIoU limit is tightened, percentage points."""


@dataclass(frozen=True, kw_only=True)
class CrossFitted:
    """What a search with one objective does to images that its instances were chosen without."""

    searched: Objective
    unit: CostUnit
    miou: float
    """In [0, 1], over all images, each at the exit where the instance chosen without it stops."""
    cost: float
    """Mean over all images."""
    baseline_miou: float
    """mIoU of the model that drops are counted against, on the same images."""
    baseline_cost: float
    miou_error: float
    """Standard error of baseline_miou - miou, by leaving out one group at a time (jackknife); NaN for one group."""

    @property
    def drop_pp(self) -> float:
        return 100 * (self.baseline_miou - self.miou)


@dataclass(frozen=True, kw_only=True)
class Tightened:
    """An instance for a limit that is meant for new images."""

    asked: Objective
    result: SearchResult
    """Of all images, with the limit of ``expected.searched``."""
    expected: CrossFitted
    """What to expect of it on new images."""


def folds_of(groups: IntArray, num_folds: int, seed: int = 0) -> IntArray:
    """(V,) the fold of each image, from 0; no group (V,) is in two.

    Groups are dealt out in random order, the large ones first, each to the fold that is smallest so far. There are
    never more folds than groups. Raises RecipeError for fewer than two folds or groups.
    """
    sizes = np.bincount(groups)
    if min(num_folds, len(sizes)) < 2:
        raise RecipeError(f"cross-fitting takes two folds and two groups of images, got {num_folds} and {len(sizes)}")
    # A random order, then large groups first: folds come out even, and another seed deals them otherwise.
    order = np.random.default_rng(seed).permutation(len(sizes))
    fold_of_group = np.zeros(len(sizes), np.int64)
    held = np.zeros(min(num_folds, len(sizes)), np.int64)
    for group in order[np.argsort(-sizes[order], kind="stable")]:
        fold_of_group[group] = held.argmin()
        held[fold_of_group[group]] += sizes[group]
    folds: IntArray = fold_of_group[groups]
    return folds


def procedure(front: Front, objective: Objective) -> FrontPoint:
    """The point of a front that an objective asks for; where none meets it, the nearest that is safe: the user's model
    itself where mIoU is limited, else the cheapest instance."""
    points = feasible(front, front.points, objective)
    if points:
        return points[0]
    return front.points[0] if objective.maximise else _model_itself(front)


def cross_fit(
    tables: ExitTables,
    costs: CostTable | Sequence[CostTable],
    objectives: Sequence[Objective],
    *,
    grid: Grid | None = None,
    num_folds: int = 5,
    seed: int = 0,
) -> list[CrossFitted]:
    """What searches with these objectives do to images not seen, one front per fold for all of them.

    The objectives are of one mean cost, without further limits and floors, which a front does not know. Groups are
    those of ``tables``. Raises RecipeError otherwise.
    """
    measure = CostMeasure.of(objectives[0], costs)
    for objective in objectives:
        if objective.cost_name != measure.name or objective.statistic != "mean":
            raise RecipeError("cross-fitting takes objectives of one mean cost")
        if objective.limits_on or objective.min_class_iou or objective.max_cost is not None:
            raise RecipeError("cross-fitting takes limits on mIoU and on the ratio of one cost only, so far")
    # Where each image leaves and what it costs, filled fold by fold: each image once.
    folds = folds_of(tables.group_ids(), num_folds, seed)
    num_images = len(tables.image_names)
    routing = np.zeros((len(objectives), num_images), np.int64)
    spent = np.zeros((len(objectives), len(measure.devices), num_images))
    for fold in range(int(folds.max()) + 1):
        kept_out = np.flatnonzero(folds == fold)
        # One front of the other folds answers every objective.
        front = pareto_front(
            tables.subset(np.flatnonzero(folds != fold)), measure.devices, cost=measure.name, grid=grid
        )
        judged = tables.subset(kept_out)
        for i, objective in enumerate(objectives):
            # Its thresholds meet images that it was not chosen on.
            instance = procedure(front, objective).instance
            routing[i, kept_out] = route(judged, instance)
            for d, table in enumerate(measure.devices):
                spent[i, d, kept_out] = cost_of(judged, table, instance, measure.name)
    # The counts of all folds together: one mIoU, as of one set of images.
    weights = np.array(measure.weights)
    return [
        CrossFitted(
            searched=objective,
            unit=measure.unit,
            miou=tables.miou(routing[i]),
            cost=float((weights * spent[i].mean(1)).max()),
            baseline_miou=baseline_miou_of(tables),
            baseline_cost=measure.baseline,
            miou_error=error_of_drop(tables, routing[i]),
        )
        for i, objective in enumerate(objectives)
    ]


def tighten(
    tables: ExitTables,
    costs: CostTable | Sequence[CostTable],
    objective: Objective,
    *,
    grid: Grid | None = None,
    num_folds: int = 5,
    seed: int = 0,
    name: str = "instance",
) -> Tightened:
    """The instance for ``max_drop_pp`` or ``min_miou``, meant for new images: searched on all images with the laxest of
    the limits tightened by ``STEPS_PP`` up to which the cross-fitted mIoU is within what was asked for.

    If not even the tightest keeps it, or what keeps it costs more than the user's model there, the answer is that
    model, which loses nothing by definition.
    """
    if objective.maximise or (objective.max_drop_pp is None and objective.min_miou is None):
        raise RecipeError("only a limit on mIoU is tightened: give max_drop_pp or min_miou, and a cost to minimise")
    # All limits are judged on the same folds, so that they differ by the limit alone.
    tried = [_tightened(objective, step) for step in STEPS_PP]
    fitted = cross_fit(tables, costs, tried, grid=grid, num_folds=num_folds, seed=seed)
    # From the tightest to the laxest, up to the first that fails: a lax limit that passes by luck is not taken.
    kept = None
    for one in reversed(fitted):
        if one.miou < objective.least_miou(one.baseline_miou):
            break
        kept = one
    # What is dearer than the model on images not seen is no gain, however cheap it was where it was chosen.
    if kept is not None and kept.cost > kept.baseline_cost:
        kept = None
    front = pareto_front(tables, costs, cost=objective.cost_name, grid=grid)
    point = procedure(front, kept.searched) if kept else _model_itself(front)
    if kept is None:
        kept = replace(fitted[-1], miou=fitted[-1].baseline_miou, cost=front.baseline_cost, miou_error=0.0)
    # The model itself is no answer to the tightened limit, but to the tightest that always has one: a drop of 0.
    own = (
        kept.searched if feasible(front, [point], kept.searched) else Objective(minimise=front.unit.name, max_drop_pp=0)
    )
    return Tightened(asked=objective, result=result_of(front, own, [point], front.proof, name), expected=kept)


def _tightened(objective: Objective, step: float) -> Objective:
    """The objective with its limits on mIoU tightened by ``step`` percentage points."""
    return replace(
        objective,
        max_drop_pp=None if objective.max_drop_pp is None else objective.max_drop_pp - step,
        min_miou=None if objective.min_miou is None else objective.min_miou + step / 100,
    )


def _model_itself(front: Front) -> FrontPoint:
    final = front.problem.tables.exits[-1]
    exits = (ExitChoice(exit_index=final.exit_index, head=final.head),)
    model = Instance(name="model", setting=front.setting, exits=exits, policy=front.problem.policy)
    return FrontPoint(miou=front.baseline_miou, cost=front.baseline_cost, instance=model)


def error_of_drop(tables: ExitTables, routing: IntArray) -> float:
    """Standard error of the mIoU of ``ExitTables.baseline`` less that of a routing (V,): mIoU is no mean over images,
    so groups are left out one at a time and the spread of what is left is scaled up (Efron and Stein, 1981)."""
    ids, images = tables.group_ids(), np.arange(len(tables.image_names))
    num_groups = int(ids.max()) + 1
    if num_groups < 2:
        return float("nan")

    def without_each(intersection: NDArray[np.int32], predicted: NDArray[np.int32]) -> FloatArray:
        """(G,) mIoU without each group, of counts (V, K)."""
        summed = []
        for counts in (intersection, predicted, tables.labelled):
            # All groups but one, for each of them.
            by_group = np.zeros((num_groups, counts.shape[1]), np.int64)
            np.add.at(by_group, ids, counts)
            summed.append(by_group.sum(0) - by_group)
        return np.array([mean_iou(*(one[g] for one in summed)) for g in range(num_groups)])

    routed = without_each(tables.intersection[images, routing], tables.predicted[images, routing])
    drops = without_each(*tables.baseline.swapaxes(0, 1)) - routed
    return float(np.sqrt((num_groups - 1) / num_groups * ((drops - drops.mean()) ** 2).sum()))
