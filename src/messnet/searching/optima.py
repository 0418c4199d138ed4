"""The search: a front of mIoU against cost, or the best instance for one objective, beside its rivals."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from tqdm import tqdm

from messnet.errors import InfeasibleError, RecipeError
from messnet.records.costs import CostTable
from messnet.records.exit_tables import ExitTables
from messnet.records.instance import Exit
from messnet.records.iou import class_iou
from messnet.records.names import CostName, Setting, Statistic
from messnet.records.selection import CostUnit, ReachedCost, ReachedIou, Selection
from messnet.searching import words
from messnet.searching.answers import (
    Comparison,
    FrontPoint,
    Infeasible,
    Proof,
    Relaxed,
    SearchResult,
    SearchSetting,
)
from messnet.searching.anytime import search_anytime
from messnet.searching.exact import Control, Outcome, Problem, Region, loops_to_compile, solve
from messnet.searching.grid import Grid, route
from messnet.searching.measure import CostMeasure, Routed, reached_of
from messnet.searching.objective import AnytimeObjective, Limit, Objective

SECONDS_TO_EXPLAIN = 20.0
"""How long an infeasible search looks for the nearest points."""


@dataclass(frozen=True, kw_only=True)
class Front:
    """The accuracy-cost Pareto front of a declared grid: ``points`` by ascending cost, hence ascending mIoU. Of each
    point: no instance of the grid has a larger mIoU at its cost or less, as far as ``proof`` says."""

    points: tuple[FrontPoint, ...]
    static: tuple[FrontPoint, ...]
    """The front of the budgeted setting: static truncated models."""
    setting: SearchSetting
    proof: Proof
    problem: Problem = field(repr=False, compare=False)

    @classmethod
    def of(cls, problem: Problem, outcome: Outcome, setting: SearchSetting) -> Front:
        return cls(points=outcome.front, static=outcome.static, setting=setting, proof=outcome.proof, problem=problem)

    @property
    def unit(self) -> CostUnit:
        """Of the points' costs."""
        return self.problem.measure.unit

    @property
    def baseline_miou(self) -> float:
        """mIoU of the model that drops are counted against, on the same images."""
        return self.problem.baseline_miou

    @property
    def baseline_cost(self) -> float:
        """Cost of the user's whole model; 1 where costs are relative to it."""
        return self.problem.measure.baseline

    @property
    def certificate(self) -> str:
        """What was proved, in words."""
        return words.proof(self.proof)


def search(
    tables: ExitTables,
    costs: CostTable | Sequence[CostTable],
    *,
    setting: Setting = "input_dependent",
    minimise: CostName | None = None,
    maximise: Literal["miou"] | None = None,
    cost: CostName = "macs",
    statistic: Statistic = "mean",
    max_drop_pp: float | None = None,
    min_miou: float | None = None,
    max_cost: float | None = None,
    max_cost_ratio: float | None = None,
    limits: Sequence[Limit | str] = (),
    min_class_iou: dict[str, float] | None = None,
    anytime: AnytimeObjective | None = None,
    grid: Grid | None = None,
    name: str = "instance",
    time_limit: float | None = None,
    progress: bool = True,
) -> SearchResult:
    """The best instance for one objective: ``search_for`` with the fields of an Objective as keywords.

    ``limits`` are as Limit or its text ("latency_ms.p95<=40"). ``setting="anytime"`` takes its objective from
    ``anytime``. For several objectives of one cost call ``pareto_front`` once and ``choose`` for each.
    """
    # Its objective comes as a record, and knows neither limits on further costs nor time limits.
    if setting == "anytime":
        return search_for(tables, costs, anytime or AnytimeObjective(), grid=grid, name=name)
    objective = Objective(
        minimise=minimise,
        maximise=maximise,
        cost=cost,
        statistic=statistic,
        max_drop_pp=max_drop_pp,
        min_miou=min_miou,
        max_cost=max_cost,
        max_cost_ratio=max_cost_ratio,
        limits_on=tuple(Limit.parse(one) if isinstance(one, str) else one for one in limits),
        min_class_iou=tuple((min_class_iou or {}).items()),
    )
    return search_for(
        tables, costs, objective, setting=setting, grid=grid, name=name, time_limit=time_limit, progress=progress
    )


def search_for(
    tables: ExitTables,
    costs: CostTable | Sequence[CostTable],
    objective: Objective | AnytimeObjective,
    *,
    setting: SearchSetting = "input_dependent",
    grid: Grid | None = None,
    name: str = "instance",
    time_limit: float | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: bool = False,
) -> SearchResult:
    """The best instance for an objective over everything that ``grid`` declares.

    Several cost tables: the least bad over these devices, each relative to the user's model on it (see CostMeasure).
    After ``time_limit`` seconds, at Ctrl-C, or when ``should_stop``, called every now and then, says so, the best so
    far is returned with its proved gap. An AnytimeObjective takes one cost table and is not stopped. Raises
    InfeasibleError, with the nearest feasible points, when no instance meets the constraints; RecipeError and RunError
    for tables and objectives that do not fit.
    """
    grid = grid or Grid()
    if isinstance(objective, AnytimeObjective):
        return search_anytime(tables, costs, objective, grid=grid, name=name)
    measure = CostMeasure.of(objective, costs)
    # The region is what the solver exploits; further limits and floors are the problem's own.
    problem = Problem(tables, measure, objective, grid)
    region = _region(problem, objective)
    control = Control(time_limit=time_limit, should_stop=should_stop, progress=progress)
    if progress:
        most = 1 if setting == "budgeted" else problem.grid.max_exits
        tqdm.write(words.beginning(problem.declared(most), compiles=loops_to_compile()), file=sys.stderr)
    outcome = solve(problem, region, setting=setting, control=control)
    # Nothing within the constraints: what would be, if one of them were relaxed.
    if not outcome.best:
        raise InfeasibleError(words.infeasible(_infeasible(problem, objective, setting)))
    front = Front.of(problem, outcome, setting)
    reached = reached_of(objective, measure, Routed.through(tables, outcome.best[0].instance))
    result = _result_of(front, objective, outcome.best, outcome.proof, name, reached)
    return replace(result, incumbents=outcome.incumbents)


def pareto_front(
    tables: ExitTables,
    costs: CostTable | Sequence[CostTable],
    *,
    setting: SearchSetting = "input_dependent",
    cost: CostName = "macs",
    grid: Grid | None = None,
    time_limit: float | None = None,
    precision: float = 0.0,
    should_stop: Callable[[], bool] | None = None,
    progress: bool = False,
) -> Front:
    """The front of mIoU against one mean cost over everything that ``grid`` declares: exact, or, stopped as
    ``search_for`` is, with its proved gap. With a ``precision`` (mIoU) of three exits only what is above the front by
    more is sure to be found: faster, and the gap is proved to be no larger."""
    objective = Objective(minimise=cost)
    control = Control(time_limit=time_limit, should_stop=should_stop, progress=progress)
    return front_within(
        tables,
        CostMeasure.of(objective, costs),
        objective,
        setting=setting,
        grid=grid,
        control=control,
        precision=precision,
    )


def choose(front: Front, objective: Objective, *, name: str = "instance") -> SearchResult:
    """The point of ``front`` that ``objective`` asks for. Raises InfeasibleError when there is none."""
    if objective.cost_name != front.unit.name:
        raise RecipeError(f"the front is over {front.unit.name}, the objective asks for {objective.cost_name}")
    # Points hold nothing but what is on the axes: any other constraint would have to be searched for.
    if objective.limits_on or objective.min_class_iou or objective.statistic != "mean":
        raise RecipeError("a front knows its own mean cost and mIoU only: search for this objective instead")
    if objective.max_cost is not None and front.unit.relative:
        raise RecipeError("a front over several devices knows relative costs only: search for this objective instead")
    points = feasible(front, front.points, objective)
    if not points:
        # The front itself holds the nearest points: nothing needs to be searched again.
        raise InfeasibleError(words.infeasible(nearest_on(front, objective)))
    return _result_of(front, objective, points, front.proof, name)


def nearest_on(
    front: Front, objective: Objective, *, further: bool = False, relaxed: Sequence[Relaxed] = ()
) -> Infeasible:
    """Why no point of a front is what an objective asks for; ``further`` and ``relaxed`` as Infeasible has them."""
    points, (least_miou, largest_cost) = front.points, front.problem.limits(objective)
    affordable = [point for point in points if point.cost <= largest_cost]
    accurate = [point for point in points if point.miou >= least_miou]
    # Each point once, by ascending cost.
    named = [*points[:1], *affordable[-1:], *accurate[:1], *points[-1:]]
    return Infeasible(
        objective=objective,
        unit=front.unit,
        least_miou=least_miou if least_miou > -np.inf else None,
        largest_cost=largest_cost if largest_cost < np.inf else None,
        points=[point for point in points if any(point is one for one in named)],
        further=further,
        relaxed=relaxed,
    )


def front_within(
    tables: ExitTables,
    measure: CostMeasure,
    objective: Objective,
    *,
    setting: SearchSetting,
    grid: Grid | None,
    control: Control,
    precision: float = 0.0,
) -> Front:
    """The front of everything within the objective's further limits and floors, over its own cost."""
    problem = Problem(tables, measure, objective, grid or Grid())
    outcome = solve(problem, Region("front", precision=precision), setting=setting, control=control)
    return Front.of(problem, outcome, setting)


def _region(problem: Problem, objective: Objective) -> Region:
    least_miou, largest_cost = problem.limits(objective)
    return Region(objective.goal, max(-1.0, least_miou), largest_cost)


def feasible(front: Front, points: Sequence[FrontPoint], objective: Objective) -> list[FrontPoint]:
    """The points (by ascending cost) that meet the constraints, best first."""
    least_miou, largest_cost = front.problem.limits(objective)
    met = [p for p in points if p.miou >= least_miou and p.cost <= largest_cost]
    return met[::-1] if objective.maximise else met


def _result_of(
    front: Front,
    objective: Objective,
    best: Sequence[FrontPoint],
    proof: Proof,
    name: str,
    reached: tuple[ReachedCost | ReachedIou, ...] = (),
) -> SearchResult:
    """The best of some points, best first; the next ones are its runners-up. ``reached``: see ``Selection``."""
    chosen = best[0]
    selection = Selection(
        num_images=front.problem.num_images,
        unit=front.unit,
        miou=chosen.miou,
        cost=chosen.cost,
        baseline_miou=front.baseline_miou,
        baseline_cost=front.baseline_cost,
        reached=reached,
    )
    result = SearchResult(
        instance=replace(chosen.instance, name=name, selected_on=selection.to_figures()),
        objective=objective,
        selection=selection,
        front=list(front.points),
        runners_up=list(best[1:4]),
        proof=proof,
        comparison=_compare(front, objective, chosen),
    )
    return words.with_words(result)


def _compare(front: Front, objective: Objective, chosen: FrontPoint) -> Comparison:
    """The rivals under the same constraints: the best static truncated model, and the best instance with one head at
    all exits of the chosen one but the final, its thresholds free."""
    tables = front.problem.tables
    final = tables.exits[tables.final]
    indices = [choice.exit_index for choice in chosen.instance.exits if choice.exit != final]
    static = feasible(front, front.static, objective)
    rivals: list[FrontPoint] = []
    # Only heads that all of its early exit points have can be uniform.
    heads = {exit.head for exit in tables.exits if indices and exit.exit_index == indices[0]}
    for head in sorted(heads):
        # The final exit has one head, its own.
        exits = [Exit(index, head) for index in indices]
        if not all(one in tables.exits for one in exits):
            continue
        exits += [final] if len(indices) < len(chosen.instance.exits) else []
        # Its thresholds are free: all of them are evaluated.
        region = _region(front.problem, objective)
        positions = [tables.exits.index(one) for one in exits]
        rivals += solve(front.problem, region, setting=front.setting, choice=positions).best[:1]

    def rank(point: FrontPoint) -> tuple[float, float]:
        return (-point.miou, point.cost) if objective.maximise else (point.cost, -point.miou)

    return Comparison(
        chosen=chosen,
        unit=front.unit,
        static=static[0] if static else None,
        has_early_exits=bool(indices),
        uniform=min(rivals, key=rank, default=None),
    )


def _infeasible(problem: Problem, objective: Objective, setting: SearchSetting) -> Infeasible:
    """The nearest feasible points in each constraint: what is possible when the others hold."""
    tables, measure = problem.tables, problem.measure

    def front_under(other: Objective) -> Front:
        own = CostMeasure.of(other, measure.devices)
        control = Control(time_limit=SECONDS_TO_EXPLAIN)
        return front_within(tables, own, other, setting=setting, grid=problem.grid, control=control)

    least_miou, _ = problem.limits(objective)
    front = front_under(objective)
    relaxed: list[Relaxed] = []
    # Without one limit: the least of its cost that all other constraints take.
    for limit in objective.limits_on:
        others = tuple(one for one in objective.limits_on if one is not limit)
        # The objective's own cost no longer counts: the limit's takes its place.
        one = replace(objective, minimise=limit.cost, maximise=None, statistic=limit.statistic, limits_on=others)
        without = front_under(replace(one, max_cost=None, max_cost_ratio=None))
        reached = [point for point in without.points if point.miou >= least_miou]
        relaxed += [Relaxed(limit, point, without.unit) for point in reached[:1]]
    # Without one floor: the best IoU of that class on the front of what is left.
    for name, floor in objective.min_class_iou:
        floors = tuple(one for one in objective.min_class_iou if one[0] != name)
        without = front_under(replace(objective, min_class_iou=floors))
        k = tables.class_names.index(name)
        ious = [float(class_iou(*tables.counts(route(tables, one.instance)))[k]) for one in without.points]
        relaxed += [Relaxed((name, floor), max(ious), without.unit)] if ious else []
    further = bool(objective.limits_on or objective.min_class_iou or measure.unit.relative)
    return nearest_on(front, objective, further=further, relaxed=relaxed)
