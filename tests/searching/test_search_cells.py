"""Bounds by cells and the sieve of thresholds against the enumeration of the same choices of exits."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from test_search_objectives import larger

from messnet.searching import Grid, Objective, pareto_front, search
from messnet.searching.exact import bounds as bounds_module
from messnet.searching.exact import cells as cells_module
from messnet.searching.exact import engine as engine_module
from messnet.searching.exact.problem import Problem, cost_rows


def engine_at(seed: int, drop: float) -> Any:
    """An engine for the least workload, aimed at the best static model or one early exit, and all its choices."""
    tables, costs = larger(seed)
    problem = Problem(tables, cost_rows(Objective(), [costs], tables), Grid(num_image_thresholds=12))
    least = tables.miou(np.full(len(tables.image_names), tables.final)) - drop
    engine = engine_module.Engine(
        problem, engine_module.Region("cost", least), max_exits=2, time_limit=None, progress=False
    )
    engine.run()
    engine.sets = cells_module.classes_of(problem.arrays)
    engine.aim((-np.inf, np.inf))
    index = problem.arrays.exit_index
    exits = np.array([one[::-1] for one in combinations(range(len(index)), 3) if len(set(index[list(one)])) == 3])
    engine.fill(exits)
    return engine, exits


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("drop", [0.005, 0.06])
def test_the_sieve_loses_no_news(seed: int, drop: float) -> None:
    engine, exits = engine_at(70_000 + seed, drop)
    sieved_of_all = all_of_all = 0
    for one in exits:
        sieved, tried = engine._triple(one[None])
        full = engine_module.try_choice(engine.problem, tuple(one[::-1].tolist()), *engine._gate())
        size = int(full.size[0])
        assert int(sieved.size[0]) == size
        np.testing.assert_array_equal(sieved.cost[:size], full.cost[:size])
        np.testing.assert_array_equal(sieved.miou[:size], full.miou[:size])
        np.testing.assert_array_equal(sieved.key[:size], full.key[:size])
        levels = [engine.problem.num_declared[position] for position in one[1:]]
        sieved_of_all, all_of_all = sieved_of_all + tried, all_of_all + levels[0] * levels[1]
    assert sieved_of_all < all_of_all / 2


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tau", [-0.05, -0.002])
def test_no_instance_is_above_the_bound_of_its_cells(seed: int, tau: float) -> None:
    engine, exits = engine_at(80_000 + seed, 0.02)
    arrays, base = engine.arrays, engine.tangent.miou
    bounds = np.full((exits.max() + 1,) * 3, 9, np.float32)
    for last in np.unique(exits[:, 0]).tolist():
        middles = np.unique(exits[exits[:, 0] == last, 1])
        cells_module.bound_choices(arrays, engine.sets, engine.form, last, middles, tau, -8.0, True, bounds[last])
    slacks = []
    for last, middle, first in exits.tolist():
        bound = bounds[last, middle, first]
        found = engine_module.try_choice(engine.problem, (first, middle, last), np.inf, base + tau)
        size = int(found.size[0])
        if size:
            best = float((found.miou[:size] - base - engine.slope * found.cost[:size]).max())
            slacks.append(bound - best)
    assert slacks
    assert min(slacks) >= -engine_module.MARGIN
    assert np.median(slacks) < 0.1


@pytest.mark.parametrize("seed", range(20))
def test_no_instance_is_above_its_tangent_by_more_than_the_remainder(seed: int) -> None:
    """Drawn I, U of classes with labels within the ends of l and u, the corners among them."""
    draw = np.random.default_rng(seed)
    classes, width = 11, 16
    labelled, iou = draw.uniform(100, 1000, classes), draw.uniform(0.1, 0.9, classes)
    union = labelled * draw.uniform(1, 1.5, classes)
    ends = np.sort(union * draw.uniform(0.5, 2, (2, classes)), axis=0).clip(labelled)
    share = np.where(
        draw.random((4000, classes)) < 0.5, draw.integers(0, 2, (4000, classes)), draw.random((4000, classes))
    )
    unions = ends[0] + share * (ends[1] - ends[0])
    inside = labelled * draw.uniform(0, 1, (4000, classes)) ** draw.uniform(0.1, 3, (4000, 1))
    more, less = (inside - iou * unions) / union, unions / union - 1
    p = inside / unions - iou
    span, floors = np.zeros(6 * width, np.float32), np.ones((2, width), np.float32)
    floors[:, :classes] = iou, labelled / union
    for row, values in enumerate((more.max(0), less.max(0), more.min(0), less.min(0))):
        span[row * width : row * width + classes] = values
    for tau in np.quantile(p.mean(1), [0.0, 0.5, 0.95]):
        news = p.mean(1) >= tau
        bound = bounds_module.remainder(span, floors, classes, np.float32(tau), np.float32(-9))
        assert bound >= (p - more).mean(1)[news].max() - bounds_module.MARGIN
    one_point = np.concatenate([more[0], less[0], more[0], less[0]]).reshape(4, classes)
    span[:] = 0
    for row, values in enumerate(one_point):
        span[row * width : row * width + classes] = values
    exact = bounds_module.remainder(span, floors, classes, np.float32(p[0].mean()), np.float32(-9))
    assert exact == pytest.approx((p - more)[0].mean(), abs=1e-5)


def test_a_front_stopped_early_says_from_where_it_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    tables, costs = larger(90_000)
    grid = Grid(num_image_thresholds=12)
    exact = pareto_front(tables, costs, grid=grid)
    assert (exact.gap_miou, exact.exact_from) == (0, -1)
    original, calls = engine_module.Engine.settle, iter(range(100))

    def settle(self: Any, *arguments: Any) -> Any:
        if next(calls) == 17:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(engine_module.Engine, "settle", settle)
    stopped = pareto_front(tables, costs, grid=grid)
    assert stopped.stopped == "interrupted"
    assert f"exact at mIoU >= {stopped.exact_from:.4f}" in stopped.certificate
    assert exact.points[0].miou < stopped.exact_from < exact.points[-1].miou
    sure = [(point.cost, point.miou) for point in stopped.points if point.miou > stopped.exact_from]
    assert sure == [(point.cost, point.miou) for point in exact.points if point.miou > stopped.exact_from]
    for point in exact.points:
        here = max(one.miou for one in stopped.points if one.cost <= point.cost)
        assert here >= point.miou - stopped.gap_miou


@pytest.mark.parametrize("seed", range(4))
def test_a_front_to_a_precision_is_within_it(seed: int) -> None:
    tables, costs = larger(91_000 + seed)
    grid = Grid(num_image_thresholds=12)
    exact, close = pareto_front(tables, costs, grid=grid), pareto_front(tables, costs, grid=grid, precision=0.004)
    assert close.gap_miou == 0.004
    assert close.certificate.startswith("no instance of the declared grid")
    assert "by more than 0.4 pp" in close.certificate
    assert close.num_evaluated < exact.num_evaluated
    for point in exact.points:
        here = max((one.miou for one in close.points if one.cost <= point.cost), default=-1.0)
        assert here >= point.miou - 0.004


def test_incumbents_get_better_and_end_with_the_answer() -> None:
    tables, costs = larger(90_001)
    result = search(tables, costs, max_drop_pp=2, grid=Grid(num_image_thresholds=12))
    spent = [one.cost for one in result.incumbents]
    assert spent == sorted(spent, reverse=True)
    assert (result.incumbents[-1].cost, result.incumbents[-1].miou) == (
        result.instance.selected_on["macs"],
        result.instance.selected_on["miou"],
    )
    assert 0 <= result.incumbents[0].seconds <= result.incumbents[-1].seconds
