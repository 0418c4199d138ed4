"""The search against a brute force written literally: every threshold pair, every image, exact fractions."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from helpers.tables import COMPLETE, COST_NAMES, all_instances, exact_miou, simulate, tiny
from messnet.errors import InfeasibleError, RecipeError, RunError
from messnet.records.costs import CostTable
from messnet.records.exit_tables import ExitTables
from messnet.records.instance import ExitChoice, Instance
from messnet.records.names import CostName
from messnet.searching.grid import Grid, columns_of, cost_of, route
from messnet.searching.objective import Objective
from messnet.searching.optima import Front, choose, pareto_front, search, search_for


def brute_force(
    tables: ExitTables, costs: CostTable, setting: str, name: CostName, policy: int = 0
) -> list[tuple[Fraction, Fraction, int]]:
    """The front as (cost, mIoU, least number of exits), by ascending cost."""
    tried = []
    for instance in all_instances(tables, setting, policy):
        routing, spent = simulate(tables, costs, instance, name)
        cost = Fraction(sum(spent)) / len(spent)
        tried.append((cost, -exact_miou(tables, routing), len(instance.exits)))
    front: list[tuple[Fraction, Fraction, int]] = []
    for cost, negative, num_exits in sorted(tried):
        if not front or -negative > front[-1][1]:
            front.append((cost, -negative, num_exits))
    return front


def assert_equal_front(front: Front, expected: list[tuple[Fraction, Fraction, int]]) -> None:
    assert [len(p.instance.exits) for p in front.points] == [num for _, _, num in expected]
    np.testing.assert_allclose([p.cost for p in front.points], [float(c) for c, _, _ in expected], rtol=1e-13)
    np.testing.assert_allclose([p.miou for p in front.points], [float(m) for _, m, _ in expected], atol=2e-12)


@pytest.mark.parametrize("seed", range(100))
def test_front_and_objectives_equal_brute_force(seed: int) -> None:
    tables, costs = tiny(seed)
    for setting in ("budgeted", "input_dependent"):
        name: CostName = COST_NAMES[seed % len(COST_NAMES)]
        policy = seed // len(COST_NAMES) % 2
        grid = Grid(num_image_thresholds=1000, policy=tables.policies[policy])
        expected = brute_force(tables, costs, setting, name, policy)
        front = pareto_front(tables, costs, setting=setting, cost=name, grid=grid)
        assert_equal_front(front, expected)
        for point in front.points:
            routing, spent = simulate(tables, costs, point.instance, name)
            assert route(tables, point.instance).tolist() == routing
            np.testing.assert_allclose(cost_of(tables, costs, point.instance, name), spent)
            assert point.cost == pytest.approx(np.mean(spent))
            assert point.miou == pytest.approx(tables.miou(route(tables, point.instance)), abs=1e-12)

        baseline = exact_miou(tables, [tables.final] * len(tables.image_names))
        accurate = [one for one in expected if one[1] >= baseline - Fraction(5, 100)]
        result = choose(front, Objective(minimise=name, max_drop_pp=5))
        assert result.instance.selected_on[name] == pytest.approx(float(accurate[0][0]))
        assert result.instance.selected_on["miou"] == pytest.approx(float(accurate[0][1]))
        middle = float(expected[len(expected) // 2][0])
        result = choose(front, Objective(maximise="miou", cost=name, max_cost=middle))
        assert result.instance.selected_on["miou"] == pytest.approx(float(expected[len(expected) // 2][1]))


@pytest.mark.parametrize("seed", range(30))
def test_fewer_exits_and_declared_counts(seed: int) -> None:
    tables, costs = tiny(2000 + seed)
    counts = [0, 0, 0]
    for instance in all_instances(tables, "input_dependent"):
        counts[len(instance.exits) - 1] += 1
    for max_exits in (1, 2, 3):
        front = pareto_front(tables, costs, grid=Grid(num_image_thresholds=1000, max_exits=max_exits))
        assert front.proof.num_declared == sum(counts[:max_exits])
        assert front.proof.num_evaluated <= front.proof.num_declared
        assert all(len(p.instance.exits) <= max_exits for p in front.points)


def test_a_coarse_grid_is_a_part_of_the_complete_one() -> None:
    tables, costs = tiny(7)
    coarse = pareto_front(tables, costs, grid=Grid(num_image_thresholds=2, pixel_thresholds=(0.9,)))
    complete = pareto_front(tables, costs, grid=COMPLETE)
    assert coarse.proof.num_declared < complete.proof.num_declared
    for point in coarse.points:
        assert any(one.cost <= point.cost and one.miou >= point.miou for one in complete.points)
        assert all(choice.pixel_threshold in (None, 0.9) for choice in point.instance.exits)


def test_search_tells_what_it_did(capsys: pytest.CaptureFixture[str]) -> None:
    tables, costs = tiny(3)
    search_for(tables, costs, Objective(max_drop_pp=1.0), grid=COMPLETE)  # compiles where nothing is compiled yet
    result = search(tables, costs, minimise="macs", max_drop_pp=1.0, name="cheap", grid=COMPLETE)
    assert result.instance.name == "cheap"
    assert result.instance.objective == "cheapest in macs at <= 1 pp drop"
    assert set(result.instance.selected_on) == {"miou", "macs", "images", "baseline_miou", "baseline_macs"}
    assert result.instance.selected_on["baseline_macs"] == costs.total_macs()
    assert result.certificate == result.instance.certificate
    assert result.certificate.startswith("optimal among ")
    assert "the best network with a single exit" in result.verdict
    assert result.gap_cost == result.gap_miou == 0
    assert capsys.readouterr().err == f"searching {result.proof.num_declared:,} instances\n".replace(",", " ")
    chosen = [[choice.exit for choice in point.instance.exits] for point in result.runners_up]
    assert len(chosen) > 1
    assert [choice.exit for choice in result.instance.exits] not in chosen
    assert all(chosen[i] not in chosen[:i] for i in range(len(chosen)))
    costs_of_all = [result.instance.selected_on["macs"], *(point.cost for point in result.runners_up)]
    assert costs_of_all == sorted(costs_of_all)
    for point in result.runners_up:
        assert point.miou == pytest.approx(tables.miou(route(tables, point.instance)), abs=1e-12)
        assert point.cost == pytest.approx(cost_of(tables, costs, point.instance).mean())
    assert Instance.from_json(result.instance.to_json()) == result.instance


def test_verdict_compares_with_the_best_static_model() -> None:
    tables, costs = tiny(5)
    static = search(tables, costs, setting="budgeted", minimise="macs", max_drop_pp=0, grid=COMPLETE)
    assert static.verdict.startswith("the best network with a single exit")
    for seed in range(20):
        tables, costs = tiny(seed)
        front = pareto_front(tables, costs, grid=COMPLETE)
        result = choose(front, Objective(max_drop_pp=0))
        rival = search(tables, costs, setting="budgeted", max_drop_pp=0)
        cheaper = result.instance.selected_on["macs"] < rival.instance.selected_on["macs"]
        accurate = result.instance.selected_on["miou"] >= rival.instance.selected_on["miou"]
        first = result.verdict.split(";")[0]
        assert not cheaper or first.startswith("better than") == accurate
        assert not cheaper or accurate or (first.startswith("against") and " less mIoU, " in first)


def test_latency_asks_for_a_measured_table() -> None:
    tables, costs = tiny(1)
    costs = replace(costs, segments=tuple(replace(part, latency_ms=None) for part in costs.segments))
    with pytest.raises(RunError, match="messnet profile RUN --measure"):
        search(tables, costs, minimise="latency_ms")
    assert search(tables, costs, minimise="latency_p95_ms").instance.selected_on["latency_p95_ms"] >= 0


def test_infeasible_names_the_nearest_points() -> None:
    tables, costs = tiny(1)
    best, cheapest = pareto_front(tables, costs).points[-1], pareto_front(tables, costs).points[0]
    with pytest.raises(InfeasibleError, match=f"most accurate instance has mIoU {100 * best.miou:.2f} %") as caught:
        search(tables, costs, min_miou=1.01)
    assert "\n" not in str(caught.value)
    with pytest.raises(InfeasibleError, match=f"cheapest instance has mIoU {100 * cheapest.miou:.2f} %"):
        search(tables, costs, maximise="miou", max_cost=-1)
    with pytest.raises(InfeasibleError, match=r"best mIoU at that cost .*; the least cost at that mIoU"):
        search(tables, costs, min_miou=best.miou - 1e-9, max_cost=best.cost - 0.01)


@pytest.mark.parametrize("seed", range(10))
def test_thresholds_lie_between_observed_values(seed: int) -> None:
    tables, costs = tiny(seed)
    for point in pareto_front(tables, costs, grid=COMPLETE).points:
        for choice in point.instance.exits[:-1]:
            assert choice.pixel_threshold is not None
            t = list(tables.pixel_thresholds).index(choice.pixel_threshold)
            observed = tables.image_confidence[:, tables.exits.index(choice.exit), 0, t]
            assert choice.image_threshold not in observed.tolist()
            assert choice.image_threshold == float(np.float32(choice.image_threshold))  # survives a cast


def test_neighbouring_float32_confidences_are_told_apart() -> None:
    tables, _ = tiny(0)
    close = np.float32(0.5) + np.arange(len(tables.image_names), dtype=np.float32) * np.spacing(np.float32(0.5))
    tables.image_confidence[...] = close[:, None, None, None]
    for position in range(tables.final):
        columns, num_declared = columns_of(tables, position, COMPLETE)
        assert num_declared == len(close) * len(tables.pixel_thresholds)
        assert len(columns) == 1  # both pixel thresholds route alike
        assert len(columns[0].image_thresholds) == len(close) - 1
        for level, threshold in enumerate(columns[0].image_thresholds, 1):
            np.testing.assert_array_equal(close >= np.float32(threshold), columns[0].bins >= level)
            np.testing.assert_array_equal(close.astype(np.float64) >= threshold, columns[0].bins >= level)


def test_bad_options_are_refused() -> None:
    tables, costs = tiny(1)
    with pytest.raises(RecipeError, match="not both"):
        search(tables, costs, minimise="macs", maximise="miou")
    with pytest.raises(RecipeError, match="1 to 3"):
        Grid(max_exits=4)
    with pytest.raises(RecipeError, match="at least 1"):
        Grid(num_image_thresholds=0)
    with pytest.raises(RecipeError, match=r"expected one of top1\+none, entropy\+native"):
        pareto_front(tables, costs, grid=Grid(policy="psychic"))
    with pytest.raises(RecipeError, match=r"no pixel threshold 0\.7"):
        pareto_front(tables, costs, grid=Grid(pixel_thresholds=(0.7,)))
    with pytest.raises(RecipeError, match="expected 'budgeted' or 'input_dependent'"):
        pareto_front(tables, costs, setting="anytime")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="unknown cost 'joules'"):
        Objective(minimise="joules")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="search for this objective"):
        choose(pareto_front(tables, costs), Objective(statistic="p95"))
    with pytest.raises(RecipeError, match="the objective asks for parameters"):
        choose(pareto_front(tables, costs), Objective(minimise="parameters"))
    with pytest.raises(RunError, match="another head space"):
        route(tables, Instance(name="x", setting="budgeted", exits=(ExitChoice(exit_index=9, head="y"),)))
