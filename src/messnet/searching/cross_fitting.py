"""What a search loses on images that it did not see, and limits tightened until that is within what was asked for:
cross-fitting, step by step in docs/method.md#limits-that-hold-on-new-images."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from messnet.errors import InfeasibleError, RecipeError
from messnet.records.arrays import FloatArray, IntArray
from messnet.records.costs import CostTable
from messnet.records.exit_tables import ExitTables
from messnet.records.instance import Instance, whole_model
from messnet.records.iou import class_iou
from messnet.records.measurements import known
from messnet.records.selection import Expected, ExpectedShare, ReachedCost, ReachedIou, Selection
from messnet.searching import words
from messnet.searching.answers import FrontPoint, Proof, SearchResult, SearchSetting, Tightened
from messnet.searching.exact import Control
from messnet.searching.grid import Grid
from messnet.searching.measure import CostMeasure, Routed, baseline_miou_of, meets, reached_of
from messnet.searching.objective import Objective
from messnet.searching.optima import Front, feasible, front_within, search_for

FOLD_PRECISION = 0.001
"""mIoU by which the front of a fold may be below the best: it stands for a search, nothing of it is deployed."""


@dataclass(frozen=True)
class Level:
    """How much tighter limits are than those asked for."""

    pp: float = 0.0
    """Percentage points of mIoU and of the IoU of a class."""
    factor: float = 1.0
    """Of a cost."""


_PP = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0)
_FACTORS = (1.0, 0.99, 0.98, 0.96, 0.94, 0.92, 0.9, 0.85, 0.8, 0.75, 0.65, 0.5)

FURTHER_LEVELS = tuple(Level(pp, factor) for pp, factor in zip(_PP, _FACTORS, strict=True))
"""What is tried of further limits and floors, from as asked for to very tight: each takes fronts of its own."""

LEVELS = tuple(Level(step / 10, round(float(np.interp(step / 10, _PP, _FACTORS)), 4)) for step in range(61))
"""What is tried of mIoU and of the objective's own cost, which a front at hand answers: steps of 0.1 pp."""


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
    return front.points[0] if objective.maximise and front.points else model_itself(front)


def model_itself(front: Front) -> FrontPoint:
    """The final exit alone, as a point of the front."""
    final = front.problem.tables.exits[-1]
    model = replace(whole_model(final), name="model", setting=front.setting, policy=front.problem.policy)
    routed = Routed.through(front.problem.tables, model)
    return FrontPoint(miou=routed.miou, cost=front.baseline_cost, instance=model)


@dataclass(kw_only=True)
class Folds:
    """The searches on all folds but one, each done once for all objectives that the same front answers: those that
    differ by their limits on mIoU and on their own cost alone."""

    tables: ExitTables
    costs: CostTable | Sequence[CostTable]
    setting: SearchSetting = "input_dependent"
    grid: Grid | None = None
    num_folds: int = 5
    seed: int = 0
    time_limit: float | None = None
    """Seconds, from now on, for all fronts and what comes after them: the fronts of one objective take half of what is
    left, evenly, and then are the best so far."""
    precision: float = FOLD_PRECISION
    progress: bool = False
    _fronts: dict[Objective, list[Front]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        Control(time_limit=self.time_limit)  # refuses one below 0 in the user's own figure
        self.deadline = math.inf if self.time_limit is None else time.monotonic() + self.time_limit
        self.folds = folds_of(self.tables.group_ids(), self.num_folds, self.seed)
        kept_out = [np.flatnonzero(self.folds == fold) for fold in range(int(self.folds.max()) + 1)]
        self.kept_out: list[IntArray] = kept_out

    def fronts(self, objective: Objective) -> list[Front]:
        """For each fold the front of the images of all others, within the objective's further limits and floors."""
        measure = CostMeasure.of(objective, self.costs)
        # What ``feasible`` looks up on a front is no part of what makes the front.
        asked = replace(objective, minimise=measure.name, maximise=None, max_drop_pp=None, min_miou=None)
        asked = replace(asked, max_cost_ratio=None, max_cost=objective.max_cost if measure.unit.relative else None)
        if asked not in self._fronts:
            # Half of what is left, so that however many further limits are tightened there is time for what follows.
            left = self.time_left
            each = None if left is None else left / (2 * len(self.kept_out))
            control = Control(time_limit=each, progress=self.progress)
            self._fronts[asked] = [
                front_within(
                    self.tables.subset(np.flatnonzero(self.folds != fold)),
                    measure,
                    asked,
                    setting=self.setting,
                    grid=self.grid,
                    control=control,
                    precision=self.precision,
                )
                for fold in range(len(self.kept_out))
            ]
        return self._fronts[asked]

    @property
    def time_left(self) -> float | None:
        """Seconds until the time limit, >= 0; None: as long as it takes."""
        return None if self.time_limit is None else max(0.0, self.deadline - time.monotonic())

    def search_all(self, objective: Objective, name: str) -> SearchResult:
        """``search_for`` on the images of all folds, in the time that is left."""
        return search_for(
            self.tables,
            self.costs,
            objective,
            setting=self.setting,
            grid=self.grid,
            name=name,
            time_limit=self.time_left,
            progress=self.progress,
        )

    def routed(self, objective: Objective) -> Routed:
        """Every image through the instance that a search with this objective chooses without the image's fold."""
        chosen = [procedure(front, objective).instance for front in self.fronts(objective)]
        # Thresholds meet images that they were not chosen on.
        return Routed(self.tables, *zip(self.kept_out, chosen, strict=True))

    def judge(self, objective: Objective) -> Expected:
        """What to expect of a search with this objective on new images."""
        return self.expect(objective, self.routed(objective))

    def expect(self, objective: Objective, routed: Routed) -> Expected:
        """The figures of images that are routed so: counts of all folds together, as of one set of images."""
        tables, measure = self.tables, CostMeasure.of(objective, self.costs)
        reached = reached_of(objective, measure, routed)
        taken = np.array([exit.exit_index for exit in tables.exits])[routed.routing]
        weights = zip(measure.weights, measure.devices, strict=True)
        weighted = [weight * routed.costs(table, measure.name) for weight, table in weights]
        macs = routed.costs(measure.devices[0], "macs")
        return Expected(
            num_images=len(tables.image_names),
            num_groups=int(tables.group_ids().max()) + 1,
            num_folds=len(self.kept_out),
            unit=measure.unit,
            miou=routed.miou,
            baseline_miou=baseline_miou_of(tables),
            drop_error=error_of_drop(tables, routed.routing),
            cost=measure.measure(routed),
            cost_error=_error_of_mean(tables, max(weighted, key=lambda spent: float(spent.mean()))),
            baseline_cost=measure.baseline,
            macs=float(macs.mean()),
            macs_paper=float(routed.costs(measure.devices[0], "macs_paper").mean()),
            macs_error=_error_of_mean(tables, macs),
            exit_shares=tuple(
                ExpectedShare(int(index), float((taken == index).mean()), _error_of_mean(tables, taken == index))
                for index in np.unique(taken)
            ),
            class_iou=tuple(known(class_iou(*tables.counts(routed.routing)))),
            costs=tuple(one for one in reached if isinstance(one, ReachedCost)),
            ious=tuple(one for one in reached if isinstance(one, ReachedIou)),
        )

    def tighten(self, objective: Objective) -> Tightened:
        """The laxest limits of ``LEVELS`` with which what was asked for holds on images not seen, and with the next
        tighter ones too: a single one of so many may hold by luck.

        mIoU and the objective's own cost are tightened together. Each further limit and floor has a level of its own,
        which rises while the limit is broken. Other rules were measured too: they break limits, or give work away
        (docs/method.md#limits-that-hold-on-new-images).
        """
        own = replace(objective, limits_on=(), min_class_iou=())
        further, floors = [0] * len(objective.limits_on), [0] * len(objective.min_class_iou)
        nearest: Expected | None = None
        while max([*further, *floors], default=0) < len(FURTHER_LEVELS):
            searched = _further_tightened(objective, further, floors)
            kept: tuple[Objective, Routed] | None = None
            failed: Routed | None = None
            for level in LEVELS:
                tried = _tightened(searched, level)
                routed = self.routed(tried)
                if not self.holds(own, routed):
                    kept, failed = None, routed
                elif kept is not None:
                    break  # two in a row: the laxer one is it
                else:
                    kept = tried, routed
            if failed is not None:
                nearest = self.expect(objective, failed)
            if kept is None:
                break
            broken = [not self.holds(replace(own, limits_on=(limit,)), kept[1]) for limit in objective.limits_on]
            missed = [not self.holds(replace(own, min_class_iou=(pair,)), kept[1]) for pair in objective.min_class_iou]
            expected = self.expect(objective, kept[1])
            if not any([*broken, *missed]):
                if self._is_worth_it(objective, expected):
                    return Tightened(asked=objective, searched=kept[0], expected=expected)
                return Tightened(asked=objective, searched=None, expected=nearest or expected)
            # Where the folds have nothing left but the model itself, tighter limits change nothing.
            if (kept[1].routing == self.tables.final).all():
                break
            nearest = expected
            further = [level + is_broken for level, is_broken in zip(further, broken, strict=True)]
            floors = [level + is_missed for level, is_missed in zip(floors, missed, strict=True)]
        return Tightened(asked=objective, searched=None, expected=nearest or self.judge(objective))

    def holds(self, objective: Objective, routed: Routed) -> bool:
        """Whether images that are routed so are within every constraint of an objective."""
        return meets(objective, CostMeasure.of(objective, self.costs), routed)

    def _is_worth_it(self, asked: Objective, expected: Expected) -> bool:
        """Whether it is better on images not seen than the user's model itself, where that does what was asked for."""
        model = self.through_model(asked)
        if not self.holds(asked, model):
            return True
        if asked.maximise:
            return expected.miou > model.miou
        return expected.cost < expected.baseline_cost

    def model(self, objective: Objective) -> Instance:
        """The user's model as an instance."""
        return model_itself(self.fronts(objective)[0]).instance

    def through_model(self, objective: Objective) -> Routed:
        """Every image through the user's model."""
        return Routed.through(self.tables, self.model(objective))


def answer(folds: Folds, tightened: Tightened, found: SearchResult | None, name: str) -> SearchResult:
    """The instance for limits on new images: what was ``found`` on all images with the tightened limits or, where that
    is nothing, the user's model, which loses nothing by definition. Raises InfeasibleError where that does not do what
    was asked for either."""
    asked = tightened.asked
    if found is not None and tightened.searched is not None:
        instance = replace(found.instance, name=name, expected=tightened.expected)
        return words.with_words(replace(found, instance=instance, tightened=tightened))
    measure, routed = CostMeasure.of(asked, folds.costs), folds.through_model(asked)
    if not folds.holds(asked, routed):
        raise InfeasibleError(words.not_kept(tightened))
    selection = Selection(
        num_images=len(folds.tables.image_names),
        unit=measure.unit,
        miou=routed.miou,
        cost=measure.measure(routed),
        baseline_miou=baseline_miou_of(folds.tables),
        baseline_cost=measure.baseline,
        reached=reached_of(asked, measure, routed),
    )
    instance = replace(
        folds.model(asked), name=name, selected_on=selection.to_figures(), expected=folds.expect(asked, routed)
    )
    result = SearchResult(
        instance=instance,
        objective=asked,
        selection=selection,
        front=[],
        runners_up=[],
        proof=Proof(num_declared=1, num_evaluated=1),
        tightened=replace(tightened, searched=None),
    )
    return words.with_words(result)


def search_tightened(folds: Folds, objective: Objective, *, name: str = "instance") -> SearchResult:
    """The instance for one objective whose limits are to hold on new images: ``search_for`` on all images with the
    limits that ``Folds.tighten`` finds.

    Raises InfeasibleError, with the nearest, when no limits hold there and the user's model does not do either.
    """
    tightened = folds.tighten(objective)
    found = None
    if tightened.searched is not None:
        with suppress(InfeasibleError):  # tighter than anything on all images: the model is left
            found = folds.search_all(tightened.searched, name)
    elif not folds.holds(objective, folds.through_model(objective)):
        folds.search_all(objective, name)  # where nothing is so on any images, that is the reason to give
    return answer(folds, tightened, found, name)


def _tightened(objective: Objective, level: Level) -> Objective:
    """The objective with its limits on mIoU and on its own cost tightened."""
    terms = objective.max_drop_pp, objective.min_miou, objective.max_cost, objective.max_cost_ratio
    drop, miou, cost, ratio = terms
    return replace(
        objective,
        max_drop_pp=None if drop is None else drop - level.pp,
        min_miou=None if miou is None else miou + level.pp / 100,
        max_cost=None if cost is None else cost * level.factor,
        max_cost_ratio=None if ratio is None else ratio * level.factor,
    )


def _further_tightened(objective: Objective, further: Sequence[int], floors: Sequence[int]) -> Objective:
    """The objective with its further limits and its floors tightened, each by a level of its own."""
    limits, classes = objective.limits_on, objective.min_class_iou
    return replace(
        objective,
        limits_on=tuple(
            replace(one, at_most=one.at_most * FURTHER_LEVELS[level].factor)
            for one, level in zip(limits, further, strict=True)
        ),
        min_class_iou=tuple(
            (name, min(1.0, floor + FURTHER_LEVELS[level].pp / 100))
            for (name, floor), level in zip(classes, floors, strict=True)
        ),
    )


def error_of_drop(tables: ExitTables, routing: IntArray) -> float:
    """Standard error of the mIoU of ``ExitTables.baseline`` less that of a routing (V,), over the draw of groups of
    images; NaN where there is one group."""
    images = np.arange(len(tables.image_names))

    def without_each(intersection: NDArray[np.int32], predicted: NDArray[np.int32]) -> FloatArray:
        """(G,) mIoU without each group, of counts (V, K)."""
        iou = class_iou(*(_sums_without_each(tables, one) for one in (intersection, predicted, tables.labelled)))
        occurs = np.isfinite(iou)
        with np.errstate(invalid="ignore"):  # 0 / 0: NaN where no class is left
            return np.asarray(np.where(occurs, iou, 0).sum(1) / occurs.sum(1))

    routed = without_each(tables.intersection[images, routing], tables.predicted[images, routing])
    return _jackknife(without_each(*tables.baseline.swapaxes(0, 1)) - routed)


def _error_of_mean(tables: ExitTables, values: FloatArray | NDArray[np.bool_]) -> float:
    """Standard error of the mean of values (V,) over the draw of groups of images."""
    sums, sizes = (np.bincount(tables.group_ids(), weights=weights) for weights in (values, None))
    return _jackknife((sums.sum() - sums) / np.maximum(sizes.sum() - sizes, 1))


def _sums_without_each(tables: ExitTables, counts: NDArray[np.int32]) -> IntArray:
    """(G, K) sums of counts (V, K) over all images but those of each group."""
    ids = tables.group_ids()
    by_group = np.zeros((int(ids.max()) + 1, counts.shape[1]), np.int64)
    np.add.at(by_group, ids, counts)
    others: IntArray = by_group.sum(0) - by_group
    return others


def _jackknife(without_each: FloatArray) -> float:
    """The standard error of a figure from what it is (G,) without each group: mIoU is no mean over images, so groups
    are left out one at a time and the spread of what is left is scaled up (Efron and Stein, 1981)."""
    num_groups = len(without_each)
    if num_groups < 2:
        return float("nan")
    return float(np.sqrt((num_groups - 1) / num_groups * ((without_each - without_each.mean()) ** 2).sum()))
