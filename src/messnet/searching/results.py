"""What is asked of a search and what it answers: the front, one objective's best instance, and how it compares."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from messnet.errors import InfeasibleError, RecipeError
from messnet.records.costs import CostName, CostTable
from messnet.records.exit_tables import ExitTables
from messnet.records.instance import Instance, Setting
from messnet.searching.anytime import AnytimeObjective, search_anytime
from messnet.searching.exact.outcome import Outcome, Region
from messnet.searching.exact.problem import DECIMALS, Found, Problem, cost_rows
from messnet.searching.space import Grid, Limit, Objective, Statistic, route
from messnet.searching.words import amount, certificate_of, difference, words

if TYPE_CHECKING:
    from messnet.searching.exact.engine import Engine

__all__ = [
    "Front",
    "FrontPoint",
    "Incumbent",
    "SearchResult",
    "SearchSetting",
    "choose",
    "pareto_front",
    "search",
    "search_for",
]

SearchSetting = Literal["budgeted", "input_dependent"]
SECONDS_TO_EXPLAIN = 20.0  # how long an infeasible search looks for the nearest points


@dataclass(frozen=True, kw_only=True)
class FrontPoint:
    """One optimum: no instance of the grid has a larger mIoU at this cost or less."""

    miou: float
    """In [0, 1], over the selection images."""
    cost: float
    """Of the selection images, in the unit of the cost; with several devices relative to the user's model."""
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
    """Cost of the user's whole model; 1 with several devices."""
    num_images: int
    num_declared: int
    """Instances of the grid, duplicates counted."""
    num_evaluated: int
    """Instances whose mIoU was computed; all others were bounded."""
    gap_miou: float = 0.0
    """No instance of the grid has a larger mIoU than the front at its cost by more than this. 0: the front is exact."""
    exact_from: float = -1.0
    """Stopped early, the front is proved at this mIoU and above, exact or to ``precision``; infinite: nowhere."""
    precision: float = 0.0
    """What was asked for, see ``pareto_front``."""
    stopped: str = ""
    """Why the search ended before that was 0: "time limit" or "interrupted"."""
    problem: Problem | None = field(default=None, repr=False, compare=False)

    @property
    def certificate(self) -> str:
        proved = (self.num_declared, self.num_evaluated, self.stopped)
        return certificate_of(*proved, gap_miou=self.gap_miou, exact_from=self.exact_from, precision=self.precision)


class Incumbent(NamedTuple):
    """A best instance so far, of a search for one objective."""

    seconds: float
    """Since the search began."""
    miou: float
    cost: float


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search answers."""

    instance: Instance
    front: list[FrontPoint]
    """By ascending cost: the whole front where ``pareto_front`` made it, else the best among all that was evaluated,
    which are all instances of up to two exits."""
    certificate: str
    """What was proved, in words."""
    runners_up: list[FrontPoint]
    """The next best of other exits and heads that meet the constraints, among all that was evaluated."""
    verdict: str
    """Does the instance beat the best static truncated model and uniform heads under the same constraints."""
    gap_cost: float | None = 0.0
    """Minimised: no instance costs less than (1 - gap) of this one. None: nothing is proved. 0: optimal."""
    gap_miou: float | None = 0.0
    """No instance within the limits has a larger mIoU by more than this. None: nothing is proved. 0: optimal."""
    incumbents: tuple[Incumbent, ...] = ()
    """The best so far over time, where the search was for this objective alone."""


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
    progress: bool = False,
) -> SearchResult:
    """The best instance for one objective, see Objective for its keywords and Grid for what is tried.

    ``limits`` are as Limit or its words ("latency_ms.p95<=40"). Several cost tables: the least bad over these devices,
    each relative to the user's model on it. ``setting="anytime"`` takes its objective from ``anytime``. ``time_limit``
    is in seconds; then, or at Ctrl-C, the best so far is returned with its proved gap. For several objectives of one
    cost call ``pareto_front`` once and ``choose`` for each. Raises InfeasibleError, with the nearest feasible points,
    when no instance meets the constraints.
    """
    if setting == "anytime":
        return _anytime(tables, costs, anytime or AnytimeObjective(), grid or Grid(), name)
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
    objective: Objective,
    *,
    setting: SearchSetting = "input_dependent",
    grid: Grid | None = None,
    name: str = "instance",
    time_limit: float | None = None,
    progress: bool = False,
) -> SearchResult:
    """As ``search``, for an Objective."""
    from messnet.searching.exact.engine import Engine

    begun, devices, grid = time.monotonic(), _devices(costs), grid or Grid()
    max_exits = _max_exits(setting, grid)
    problem = _problem(tables, devices, objective, grid)
    baseline_miou, baseline_cost = _baseline(tables, devices, objective)
    least_miou, max_cost = _limits(objective, baseline_miou, baseline_cost, devices)
    region = Region(objective.goal, max(-1.0, round(least_miou, DECIMALS)), max_cost)
    engine = Engine(problem, region, max_exits=max_exits, time_limit=time_limit, progress=progress)
    outcome = engine.run()
    front = _front_of(engine, outcome, setting, objective, (baseline_miou, baseline_cost))
    if not outcome.near:
        raise InfeasibleError(_explain(tables, devices, objective, setting, grid, baseline_miou, baseline_cost))
    gaps = outcome.gap_cost if objective.goal == "cost" else None
    proved = (front.num_declared, front.num_evaluated, outcome.stopped)
    certificate = certificate_of(*proved, gap_miou=outcome.gap_miou, gap_cost=gaps)
    near = [
        FrontPoint(miou=miou, cost=cost, instance=problem.instance_of(key, setting=setting))
        for cost, miou, key in outcome.near[:4]
    ]
    result = _answer(front, objective, near[0], near[1:], name, certificate)
    finite = [gap if gap < np.inf else None for gap in (outcome.gap_cost, outcome.gap_miou)]
    incumbents = tuple(Incumbent(now - begun, miou, cost) for now, miou, cost in engine.incumbents)
    return replace(result, gap_cost=finite[0], gap_miou=finite[1], incumbents=incumbents)


def choose(front: Front, objective: Objective, *, name: str = "instance") -> SearchResult:
    """The point of ``front`` that ``objective`` asks for. Raises InfeasibleError when there is none."""
    if objective.cost_name != front.cost_name:
        raise RecipeError(f"the front is over {front.cost_name}, the objective asks for {objective.cost_name}")
    if objective.limits_on or objective.min_class_iou or objective.statistic != "mean":
        raise RecipeError("a front knows its own mean cost and mIoU only: search for this objective instead")
    feasible = _feasible(front, front.points, objective)
    if not feasible:
        raise InfeasibleError(_nearest(front, objective))
    result = _answer(front, objective, feasible[0], feasible[1:4], name, front.certificate)
    gap = front.gap_miou if front.gap_miou < np.inf else None
    return replace(result, gap_cost=0.0 if gap == 0 else None, gap_miou=gap)


def pareto_front(
    tables: ExitTables,
    costs: CostTable | Sequence[CostTable],
    *,
    setting: SearchSetting = "input_dependent",
    cost: CostName = "macs",
    grid: Grid | None = None,
    time_limit: float | None = None,
    precision: float = 0.0,
    progress: bool = False,
) -> Front:
    """The front of mIoU against one mean cost over everything ``grid`` declares: exact, or, stopped by ``time_limit``
    (seconds) or Ctrl-C, with its proved gap. With a ``precision`` (mIoU) of three exits only what is above the front by
    more is sure to be found: faster, and the gap is proved to be no larger."""
    objective = Objective(minimise=cost)
    return _front(tables, _devices(costs), objective, setting, grid or Grid(), time_limit, progress, precision)


def _front(
    tables: ExitTables,
    devices: Sequence[CostTable],
    objective: Objective,
    setting: SearchSetting,
    grid: Grid,
    time_limit: float | None,
    progress: bool = False,
    precision: float = 0.0,
) -> Front:
    """Of everything within the objective's further limits and floors."""
    from messnet.searching.exact.engine import Engine

    max_exits = _max_exits(setting, grid)
    problem = _problem(tables, devices, objective, grid)
    how: dict[str, Any] = {"time_limit": time_limit, "progress": progress, "precision": precision}
    engine = Engine(problem, Region("front"), max_exits=max_exits, **how)
    outcome = engine.run()
    return _front_of(engine, outcome, setting, objective, _baseline(tables, devices, objective))


def _front_of(
    engine: Engine, outcome: Outcome, setting: SearchSetting, objective: Objective, baseline: tuple[float, float]
) -> Front:
    """What an engine found; ``baseline`` is the user's model's mIoU and cost."""
    problem = engine.problem
    return Front(
        points=_points(problem, outcome.front, setting),
        static=_points(problem, engine.static, "budgeted"),
        setting=setting,
        cost_name=objective.cost_name,
        baseline_miou=baseline[0],
        baseline_cost=baseline[1],
        num_images=problem.num_images,
        num_declared=problem.declared(engine.max_exits),
        num_evaluated=outcome.num_evaluated,
        gap_miou=outcome.gap_miou,
        exact_from=outcome.exact_from,
        precision=engine.precision,
        stopped=outcome.stopped,
        problem=problem,
    )


def _max_exits(setting: str, grid: Grid) -> int:
    if setting not in ("budgeted", "input_dependent"):
        raise RecipeError(
            f"cannot search the setting {setting!r} for mIoU against cost: expected 'budgeted' or 'input_dependent'"
        )
    return 1 if setting == "budgeted" else grid.max_exits


def _devices(costs: CostTable | Sequence[CostTable]) -> list[CostTable]:
    devices = [costs] if isinstance(costs, CostTable) else list(costs)
    if not devices:
        raise RecipeError("no cost table: expected at least one")
    return devices


def _problem(tables: ExitTables, devices: Sequence[CostTable], objective: Objective, grid: Grid) -> Problem:
    floors = np.full(int(tables.labelled.any(0).sum()), -np.inf)
    occurring: list[bool] = np.asarray(tables.labelled.any(0)).tolist()
    labelled = [name for name, occurs in zip(tables.class_names, occurring, strict=True) if occurs]
    for name, floor in objective.min_class_iou:
        if name not in tables.class_names:
            raise RecipeError(f"no class {name!r}: expected one of {', '.join(tables.class_names)}")
        if name not in labelled:
            raise RecipeError(f"class {name!r} is in no label of the selection images: it has no IoU to constrain")
        floors[labelled.index(name)] = max(floors[labelled.index(name)], floor)
    return Problem(tables, cost_rows(objective, devices, tables), grid, floors=floors)


def _baseline(tables: ExitTables, devices: Sequence[CostTable], objective: Objective) -> tuple[float, float]:
    """mIoU and cost of the user's model."""
    routing = np.full(len(tables.image_names), tables.final)
    cost = 1.0 if len(devices) > 1 else devices[0].total(objective.cost_name)
    return round(tables.miou(routing), DECIMALS), cost


def _limits(
    objective: Objective, baseline_miou: float, baseline_cost: float, devices: Sequence[CostTable]
) -> tuple[float, float]:
    """Least mIoU and largest objective's cost; with several devices ``max_cost`` is in the cost's unit on each."""
    here = replace(objective, max_cost=None) if len(devices) > 1 else objective
    return here.limits(baseline_miou, baseline_cost)


def _points(problem: Problem, found: Found, setting: Setting) -> tuple[FrontPoint, ...]:
    return tuple(
        FrontPoint(
            miou=float(found.miou[i]),
            cost=float(found.cost[i]),
            instance=problem.instance_of(int(found.key[i]), setting=setting),
        )
        for i in range(int(found.size[0]))
    )


def _answer(
    front: Front, objective: Objective, best: FrontPoint, others: list[FrontPoint], name: str, certificate: str
) -> SearchResult:
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
        certificate=certificate,
    )
    return SearchResult(
        instance=instance,
        front=list(front.points),
        certificate=certificate,
        runners_up=others,
        verdict=f"{_verdict(front, objective, best)}; {_against_uniform(front, objective, best)}",
    )


def _feasible(front: Front, points: Sequence[FrontPoint], objective: Objective) -> list[FrontPoint]:
    """The points that meet the constraints, best first."""
    least_miou, largest_cost = _limits_of(front, objective)
    feasible = [p for p in points if p.miou >= least_miou and p.cost <= largest_cost]
    return feasible[::-1] if objective.maximise else feasible


def _limits_of(front: Front, objective: Objective) -> tuple[float, float]:
    """Least mIoU and largest cost, as ``_limits``."""
    several = front.problem is not None and (front.problem.arrays.weights > 0).sum() > 1
    here = replace(objective, max_cost=None) if several else objective
    least_miou, largest_cost = here.limits(front.baseline_miou, front.baseline_cost)
    return max(-1.0, round(least_miou, DECIMALS)), largest_cost


def _nearest(front: Front, objective: Objective) -> str:
    """Why nothing is feasible, in one line."""
    least_miou, largest_cost = objective.limits(front.baseline_miou, front.baseline_cost)
    affordable = [p for p in front.points if p.cost <= largest_cost]
    accurate = [p for p in front.points if p.miou >= round(least_miou, DECIMALS)]
    nearest = [
        f"the best mIoU at that cost is {words(affordable[-1], front)}" if affordable and largest_cost < np.inf else "",
        f"the least cost at that mIoU is {words(accurate[0], front)}" if accurate and least_miou > -np.inf else "",
    ]
    if not affordable:
        nearest.append(f"the cheapest instance has {words(front.points[0], front)}")
    if not accurate:
        nearest.append(f"the most accurate instance has {words(front.points[-1], front)}")
    limits = [f"mIoU >= {100 * least_miou:.2f} %"] * (least_miou > -np.inf)
    limits += [f"<= {amount(front.cost_name, largest_cost, front.baseline_cost)}"] * (largest_cost < np.inf)
    return f"no instance has {' and '.join(limits)}: {'; '.join(filter(None, nearest))}; relax a constraint"


def _explain(
    tables: ExitTables,
    devices: Sequence[CostTable],
    objective: Objective,
    setting: SearchSetting,
    grid: Grid,
    baseline_miou: float,
    baseline_cost: float,
) -> str:
    """The nearest feasible points in each constraint: what is possible when the others hold."""

    def front_under(other: Objective) -> Front:
        return _front(tables, devices, other, setting, grid, SECONDS_TO_EXPLAIN)

    front = front_under(objective)
    further = bool(objective.limits_on or objective.min_class_iou)
    if front.points and not further and len(devices) == 1:
        return _nearest(front, objective)
    notes = []
    if front.points:
        notes.append(f"the most accurate within the further limits has {words(front.points[-1], front)}")
        notes.append(f"the cheapest has {words(front.points[0], front)}")
    least_miou, _ = _limits(objective, baseline_miou, baseline_cost, devices)
    for limit in objective.limits_on:
        others = tuple(one for one in objective.limits_on if one is not limit)
        one = replace(objective, minimise=limit.cost, maximise=None, statistic=limit.statistic, limits_on=others)
        relaxed = front_under(replace(one, max_cost=None, max_cost_ratio=None))
        reached = [point for point in relaxed.points if point.miou >= round(least_miou, DECIMALS)]
        if reached:
            notes.append(f"without {limit} it takes {words(reached[0], relaxed)}")
    for name, floor in objective.min_class_iou:
        floors = tuple(one for one in objective.min_class_iou if one[0] != name)
        relaxed = front_under(replace(objective, min_class_iou=floors))
        if relaxed.points and relaxed.problem:
            best = max(_class_iou(relaxed, point, name) for point in relaxed.points)
            notes.append(f"without IoU of {name} >= {floor:g} the best of {name} on the front is {best:.4f}")
    why = "; ".join(notes) or "several of these constraints cannot be met at once"
    return f"no instance is {objective}: {why}; relax a constraint"


def _class_iou(front: Front, point: FrontPoint, name: str) -> float:
    assert front.problem is not None
    tables = front.problem.tables
    intersection, predicted, labelled = tables.counts(route(tables, point.instance))
    k = tables.class_names.index(name)
    return float(intersection[k] / (predicted[k] + labelled[k] - intersection[k]))


def _verdict(front: Front, objective: Objective, best: FrontPoint) -> str:
    static = _feasible(front, front.static, objective)
    if not static:
        return "no static truncated model meets the constraints, this instance does"
    rival = static[0]
    if (best.miou, best.cost) == (rival.miou, rival.cost):
        return f"no better than the best static truncated model: {words(best, front)} both"
    return (
        f"beats the best static truncated model: {difference(front, best, rival)}; "
        f"{words(best, front)} against {words(rival, front)}"
    )


def _against_uniform(front: Front, objective: Objective, best: FrontPoint) -> str:
    """Against the best instance with one head config at all exits of ``best`` (the final exit keeps its own), its
    thresholds free, under the same constraints."""
    from messnet.searching.exact.choices import try_choice

    assert front.problem is not None
    tables, final = front.problem.tables, front.problem.tables.exits[-1]
    indices = [choice.exit_index for choice in best.instance.exits if choice.exit != final]
    if not indices:
        return "it has no early exit whose head could be uniform"
    heads = {e.head for e in tables.exits if e.exit_index == indices[0]}
    rivals: list[FrontPoint] = []
    for head in sorted(heads):
        exits = [(index, head) for index in indices]
        if not all(one in tables.exits for one in exits):
            continue
        exits += [tuple(final)] if len(indices) < len(best.instance.exits) else []  # type: ignore[list-item]
        positions = tuple(tables.exits.index(one) for one in exits)
        least_miou, max_cost = _limits_of(front, objective)
        found = try_choice(front.problem, positions, max_cost, least_miou)
        points = _points(front.problem, found, best.instance.setting)
        rivals += _feasible(front, points, objective)[:1]
    if not rivals:
        return "with one head at all of its exits no instance meets the constraints"
    rival = min(rivals, key=lambda one: (-one.miou, one.cost) if objective.maximise else (one.cost, -one.miou))
    head = rival.instance.exits[0].head
    if (best.miou, best.cost) == (rival.miou, rival.cost):
        return f"no better than uniform heads ({head})"
    return f"against uniform heads ({head}) {difference(front, best, rival)}"


def _anytime(
    tables: ExitTables,
    costs: CostTable | Sequence[CostTable],
    objective: AnytimeObjective,
    grid: Grid,
    name: str,
) -> SearchResult:
    devices = _devices(costs)
    if len(devices) > 1:
        raise RecipeError("the anytime setting is searched for one device: give one cost table")
    found = search_anytime(tables, devices[0], objective, max_exits=grid.max_exits, policy=grid.policy_of(tables))
    points = [FrontPoint(miou=one.miou, cost=one.cost, instance=replace(one.instance, name=name)) for one in found.best]
    return SearchResult(
        instance=points[0].instance,
        front=[],
        certificate=points[0].instance.certificate,
        runners_up=points[1:],
        verdict=found.verdict,
    )
