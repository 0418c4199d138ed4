"""Objectives under any mix of constraints against a brute force over all instances of random small tables."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from helpers.tables import COMPLETE, COST_NAMES, all_instances, exact_miou, larger, simulate, tiny
from messnet.errors import InfeasibleError, MessError, RecipeError, RunError
from messnet.records.costs import CostTable
from messnet.records.exit_tables import ExitTables
from messnet.records.instance import Instance
from messnet.records.names import CostName
from messnet.searching.grid import Grid, cost_of, route
from messnet.searching.objective import AnytimeObjective, Limit, Objective
from messnet.searching.optima import pareto_front, search, search_for


def statistic_of(spent: list[float], statistic: str) -> Fraction:
    """The mean, the largest, or the least value that at least 95 % do not exceed."""
    if statistic == "mean":
        return sum((Fraction(value) for value in spent), Fraction()) / len(spent)
    if statistic == "worst":
        return Fraction(max(spent))
    return Fraction(min(value for value in spent if sum(s <= value for s in spent) >= 0.95 * len(spent)))


class BruteForce:
    """All instances of a table with what each does, literally."""

    def __init__(self, tables: ExitTables, costs: CostTable, setting: str, names: set[CostName]) -> None:
        self.tables, mious, ious = tables, {}, {}
        self.rows: list[tuple[Instance, dict[CostName, list[float]], Fraction, list[float]]] = []
        for instance in all_instances(tables, setting):
            spent = {}
            for name in names:
                routing, spent[name] = simulate(tables, costs, instance, name)
            key = tuple(routing)
            if key not in mious:
                mious[key] = exact_miou(tables, routing)
                intersection, predicted, labelled = tables.counts(np.array(routing))
                ious[key] = (intersection / np.maximum(predicted + labelled - intersection, 1)).tolist()
            self.rows.append((instance, spent, mious[key], ious[key]))

    def best(
        self, asked: dict[str, Any], name: CostName, baseline: tuple[Fraction, Fraction]
    ) -> tuple[Any, ...] | None:
        """(objective, the other figure, number of exits, positions from the last to the first)."""
        found = []
        for instance, spent, miou, ious in self.rows:
            cost = statistic_of(spent[name], asked.get("statistic", "mean"))
            met = [
                miou >= asked.get("min_miou", 0),
                "max_drop_pp" not in asked or miou >= baseline[0] - Fraction(asked["max_drop_pp"]) / 100,
                cost <= asked.get("max_cost", np.inf),
                "max_cost_ratio" not in asked or cost <= Fraction(asked["max_cost_ratio"]) * baseline[1],
                *(statistic_of(spent[one.cost], one.statistic) <= one.at_most for one in asked.get("limits", [])),
                *(ious[int(k)] >= floor for k, floor in asked.get("min_class_iou", {}).items()),
            ]
            if all(met):
                positions = tuple(self.tables.exits.index(choice.exit) for choice in instance.exits[::-1])
                rank = (-miou, cost) if "maximise" in asked else (cost, -miou)
                found.append((*rank, len(positions), positions))
        return min(found, default=None)


def questions(seed: int, tables: ExitTables) -> Iterator[dict[str, Any]]:
    """Random objectives: about half have a solution."""
    draw = np.random.default_rng(seed)
    occurs = [name for name, count in zip(tables.class_names, tables.labelled.sum(0), strict=True) if count]
    for goal in ("cost", "miou"):
        name = COST_NAMES[draw.integers(len(COST_NAMES))]
        asked: dict[str, Any] = {"minimise": name} if goal == "cost" else {"maximise": "miou", "cost": name}
        if draw.random() < 0.5:
            asked["statistic"] = ("mean", "worst", "p95")[draw.integers(3)]
        if draw.random() < (0.8 if goal == "cost" else 0.2):
            asked |= {"max_drop_pp": int(draw.integers(0, 12))} if draw.random() < 0.5 else {"min_miou": 0.375}
        if draw.random() < (0.2 if goal == "cost" else 0.8):
            asked |= {"max_cost": int(draw.integers(1, 14))} if draw.random() < 0.5 else {"max_cost_ratio": 0.75}
        asked["limits"] = [
            Limit(cost=COST_NAMES[draw.integers(6)], at_most=int(draw.integers(2, 25)), statistic=one)
            for one in ("mean", "worst", "p95")
            if draw.random() < 0.3
        ]
        if draw.random() < 0.3:
            asked["min_class_iou"] = {occurs[draw.integers(len(occurs))]: 0.4}
        yield asked


@pytest.mark.parametrize("seed", range(100))
def test_objectives_equal_brute_force(seed: int) -> None:
    for number, setting in enumerate(("budgeted", "input_dependent")):
        tables, costs = tiny(10_000 + 2 * seed + number)
        asks = list(questions(seed, tables))
        names = {ask.get("minimise", ask.get("cost")) for ask in asks} | {x.cost for ask in asks for x in ask["limits"]}
        brute = BruteForce(tables, costs, setting, names)
        miou = exact_miou(tables, [tables.final] * len(tables.image_names))
        for ask in asks:
            name = ask.get("minimise", ask.get("cost"))
            expected = brute.best(ask, name, (miou, Fraction(costs.total(name))))
            if expected is None:
                with pytest.raises(InfeasibleError, match="no instance") as caught:
                    search(tables, costs, setting=setting, grid=COMPLETE, **ask)  # type: ignore[arg-type]
                assert "\n" not in str(caught.value)
                continue
            result = search(tables, costs, setting=setting, grid=COMPLETE, **ask)  # type: ignore[arg-type]
            found = result.instance
            figures = [found.selected_on[name], -found.selected_on["miou"]]
            assert figures[:: -1 if "maximise" in ask else 1] == pytest.approx(
                [float(x) for x in expected[:2]], abs=2e-12
            )
            assert tuple(tables.exits.index(choice.exit) for choice in found.exits[::-1]) == expected[3]
            assert -figures[1] == pytest.approx(tables.miou(route(tables, found)), abs=2e-12)
            spent = cost_of(tables, costs, found, name).tolist()
            assert figures[0] == pytest.approx(float(statistic_of(spent, ask.get("statistic", "mean"))))
            assert result.certificate.startswith("optimal among")


@pytest.mark.parametrize("seed", range(15))
def test_several_devices_take_the_least_bad(seed: int) -> None:
    tables, costs = tiny(20_000 + seed)
    other = replace(tiny(20_000 + seed)[1], segments=tiny(30_000 + seed)[1].segments[:1] * len(costs.segments))
    devices = [costs, other]
    if min(one.total("macs") for one in devices) == 0:
        with pytest.raises(RecipeError, match="nothing to be relative to"):
            search(tables, devices, minimise="macs")
        return
    result = search(tables, devices, minimise="macs", max_drop_pp=4, grid=COMPLETE)
    baseline = exact_miou(tables, [tables.final] * len(tables.image_names))
    ratios = []
    for instance in all_instances(tables, "input_dependent"):
        runs = [simulate(tables, one, instance, "macs") for one in devices]
        if exact_miou(tables, runs[0][0]) >= baseline - Fraction(4, 100):
            ratios.append(
                max(np.mean(spent) / one.total("macs") for (_, spent), one in zip(runs, devices, strict=True))
            )
    assert result.instance.selected_on["macs"] == pytest.approx(min(ratios))


@pytest.mark.parametrize("goal", ["area", "first_cost", "overhead", "miou"])
@pytest.mark.parametrize("seed", range(12))
def test_anytime_equals_brute_force(goal: Any, seed: int) -> None:
    tables, costs = tiny(40_000 + seed)
    model = costs.total("macs")
    objective = AnytimeObjective(goal=goal, max_drop_pp=20, max_overhead=1.5 if seed % 2 else None)
    single = [float(exact_miou(tables, [p] * len(tables.image_names))) for p in range(len(tables.exits))]
    values = []
    for size in (2, 3):
        for positions in itertools.combinations(range(len(tables.exits)), size):
            exits = [tables.exits[p] for p in positions]
            mious = [single[p] for p in positions]
            if len({e.exit_index for e in exits}) < size or sorted(set(mious)) != mious:
                continue
            times = []
            for j, e in enumerate(exits):
                passed = sum(part.macs for part in costs.segments[: e.exit_index + 1])
                times.append(
                    passed + sum(costs.heads[o].macs + costs.outputs[o.exit_index].macs for o in exits[: j + 1])
                )
            last = exits[-1]
            alone = sum(p.macs for p in costs.segments[: last.exit_index + 1])
            alone += costs.heads[last].macs + costs.outputs[last.exit_index].macs
            overhead = times[-1] / alone - 1 if alone else 0.0
            area = 0.0  # by hand: what is at hand at each unit step, costs are integers
            for step in np.arange(0, 1.5 * model, 0.5):
                at_hand = [m for m, time in zip(mious, times, strict=True) if time <= step]
                area += 0.5 * (at_hand[-1] if at_hand else 0)
            if mious[-1] >= single[-1] - 0.2 and (not seed % 2 or overhead <= 1.5):
                value = {"area": -area / (1.5 * model) if model else 0, "first_cost": times[0], "overhead": overhead}
                values.append(value.get(goal, -mious[-1]))
    if model == 0:
        with pytest.raises(RecipeError, match="nothing to measure"):
            search(tables, costs, setting="anytime", anytime=objective)
    elif not values:
        with pytest.raises(InfeasibleError):
            search(tables, costs, setting="anytime", anytime=objective)
    else:
        found = search(tables, costs, setting="anytime", anytime=objective).instance
        key = {"first_cost": "first_macs"}.get(goal, goal)
        value = found.selected_on[key] * (-1 if goal in ("area", "miou") else 1)
        assert value == pytest.approx(min(values))
        assert found.setting == "anytime"
        assert all(choice.pixel_threshold is None for choice in found.exits)


@pytest.mark.parametrize("seed", range(8))
def test_bounds_rule_out_and_stay_right(seed: int) -> None:
    """The search for one objective, mostly bounds, finds what the enumerated front says."""
    tables, costs = larger(50_000 + seed)
    grid = Grid(num_image_thresholds=12)
    front = pareto_front(tables, costs, grid=grid)
    for drop in (0.5, 2.0, 6.0):
        allowed = front.baseline_miou - drop / 100
        cheapest = min(point.cost for point in front.points if point.miou >= allowed)
        result = search(tables, costs, max_drop_pp=drop, grid=grid)
        assert result.instance.selected_on["macs"] == cheapest
    best = max(point.miou for point in front.points if point.cost <= 0.8 * front.baseline_cost)
    result = search(tables, costs, maximise="miou", max_cost_ratio=0.8, grid=grid)
    assert result.instance.selected_on["miou"] == best


def test_stopped_early_it_tells_the_gap() -> None:
    tables, costs = larger(60_000)
    stopped = search(tables, costs, max_drop_pp=2, time_limit=0, grid=Grid(num_image_thresholds=12))
    assert stopped.certificate.startswith("stopped (time limit)")
    assert stopped.gap_cost is None
    exact = search(tables, costs, max_drop_pp=2, grid=Grid(num_image_thresholds=12))
    assert exact.gap_cost == 0
    assert stopped.instance.selected_on["macs"] >= exact.instance.selected_on["macs"]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
def test_stopped_by_its_caller_it_keeps_the_best_and_its_gap(share: float) -> None:
    tables, costs = larger(60_001)
    grid, looks = Grid(num_image_thresholds=12), itertools.count()
    objective = Objective(max_drop_pp=2)

    def count() -> bool:
        next(looks)
        return False

    exact = search_for(tables, costs, objective, grid=grid, should_stop=count)
    last = int(share * next(looks))
    looks = itertools.count()
    result = search_for(tables, costs, objective, grid=grid, should_stop=lambda: next(looks) >= last)
    cost, best = result.instance.selected_on["macs"], exact.instance.selected_on["macs"]
    assert "stopped (interrupted)" in result.certificate
    assert best <= cost
    if result.gap_cost is not None:
        assert result.gap_cost > 0
        assert (1 - result.gap_cost) * cost <= best


def test_infeasible_names_what_each_constraint_takes() -> None:
    tables, costs = tiny(1)
    with pytest.raises(InfeasibleError, match=r"without parameters <= 0 it takes") as caught:
        search(tables, costs, limits=["parameters<=0"], min_miou=0.0)
    assert "\n" not in str(caught.value)
    with pytest.raises(InfeasibleError, match="the best of 1 on the front is"):
        search(tables, costs, min_class_iou={"1": 1.0})


def test_bad_input_is_one_clear_line() -> None:
    tables, costs = tiny(1)
    cases: list[tuple[type[MessError], str, Any]] = [
        (RecipeError, "cannot read the limit 'macs=3'", lambda: search(tables, costs, limits=["macs=3"])),
        (RecipeError, "unknown cost 'joules'", lambda: search(tables, costs, limits=["joules<=3"])),
        (RecipeError, "unknown statistic 'p50'", lambda: search(tables, costs, limits=["macs.p50<=3"])),
        (RecipeError, "costs are >= 0", lambda: Limit(cost="macs", at_most=-1)),
        (RecipeError, "no class 'cat': expected one of", lambda: search(tables, costs, min_class_iou={"cat": 0.5})),
        (RecipeError, "an IoU is in", lambda: search(tables, costs, min_class_iou={"1": 1.5})),
        (RecipeError, "no cost table", lambda: search(tables, [])),
        (RecipeError, "unknown anytime goal", lambda: AnytimeObjective(goal="fun")),  # type: ignore[arg-type]
        (RecipeError, "workload or latency", lambda: AnytimeObjective(cost="parameters")),
        (RecipeError, "one cost table", lambda: search(tables, [costs, costs], setting="anytime")),
    ]
    lacking = replace(costs, heads={e: part for e, part in costs.heads.items() if e != tables.exits[0]})
    cases.append((RunError, "made for another head space", lambda: search(tables, lacking)))
    negative = replace(costs, segments=tuple(replace(part, macs=-1) for part in costs.segments))
    cases.append((RunError, "costs are finite and >= 0", lambda: search(tables, negative)))
    missing = replace(costs, segments=tuple(replace(part, latency_ms=float("nan")) for part in costs.segments))
    cases.append((RunError, "costs are finite and >= 0", lambda: search(tables, missing, minimise="latency_ms")))
    confidence = tables.image_confidence.copy()
    confidence[1, 0, 0, 0] = np.nan
    broken = replace(tables, image_confidence=confidence)
    cases.append((RunError, "confidence that is no number: image 1, exit 0", lambda: search(broken, costs)))
    unlabelled = replace(tables, labelled=np.zeros_like(tables.labelled))
    cases.append((RecipeError, "no labelled pixel", lambda: search(unlabelled, costs)))
    for kind, words, call in cases:
        with pytest.raises(kind, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
