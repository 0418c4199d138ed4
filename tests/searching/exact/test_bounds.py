"""Bounds, cells and the sieve of thresholds against the enumeration of the same choices of exits."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from helpers.tables import COMPLETE, COST_NAMES, larger, tiny
from messnet.records.arrays import IntArray
from messnet.searching.exact import Control, Problem, Region, Tuning, cells, solve
from messnet.searching.exact.bounds import MARGIN, remainder
from messnet.searching.exact.candidates import evaluate_choice
from messnet.searching.exact.solver import Solver
from messnet.searching.grid import Grid
from messnet.searching.measure import CostMeasure
from messnet.searching.objective import Objective
from messnet.searching.optima import pareto_front, search

COARSE = Grid(num_image_thresholds=12, max_exits=2)


def solver_at(seed: int, drop: float) -> tuple[Solver, IntArray]:
    """A solver for the least workload after all instances of two exits, its tangent at the best one, and all choices of
    three exits (n, 3)."""
    tables, costs = larger(seed)
    objective = Objective()
    problem = Problem(tables, CostMeasure.of(objective, costs), objective, COARSE)
    least = tables.miou(np.full(len(tables.image_names), tables.final)) - drop
    solver = Solver(problem, Region("cost", least), "input_dependent", Control(), Tuning())
    solver.run()
    solver.choose_tangent((-np.inf, np.inf))
    index = problem.arrays.exit_index
    every = itertools.combinations(range(len(index)), 3)
    exits = np.array([one[::-1] for one in every if len(set(index[list(one)])) == 3])
    solver.fill(exits)
    return solver, exits


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("drop", [0.005, 0.06])
def test_the_sieve_loses_nothing_that_improves(seed: int, drop: float) -> None:
    solver, exits = solver_at(70_000 + seed, drop)
    sieved_of_all = all_of_all = 0
    for one in exits:
        sieved, tried = solver._evaluate(one[None])
        full = evaluate_choice(solver.problem, tuple(one[::-1].tolist()), *solver._limits())
        size = int(full.size[0])
        assert int(sieved.size[0]) == size
        np.testing.assert_array_equal(sieved.cost[:size], full.cost[:size])
        np.testing.assert_array_equal(sieved.miou[:size], full.miou[:size])
        np.testing.assert_array_equal(sieved.key[:size], full.key[:size])
        levels = [solver.problem.num_declared[position] for position in one[1:]]
        sieved_of_all, all_of_all = sieved_of_all + tried, all_of_all + levels[0] * levels[1]
    assert sieved_of_all < all_of_all / 2


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tau", [-0.05, -0.002])
def test_no_instance_is_above_the_bound_of_its_cells(seed: int, tau: float) -> None:
    solver, exits = solver_at(80_000 + seed, 0.02)
    arrays, base = solver.arrays, solver.tangent.miou
    bounds = np.full((exits.max() + 1,) * 3, 9, np.float32)
    for last in np.unique(exits[:, 0]).tolist():
        middles = np.unique(exits[exits[:, 0] == last, 1])
        cells.bound_choices(arrays, solver.sets, solver.form, last, middles, tau, -8.0, True, bounds[last])
    slacks = []
    for last, middle, first in exits.tolist():
        bound = bounds[last, middle, first]
        found = evaluate_choice(solver.problem, (first, middle, last), np.inf, base + tau)
        size = int(found.size[0])
        if size:
            best = float((found.miou[:size] - base - solver.price * found.cost[:size]).max())
            slacks.append(bound - best)
    assert slacks
    assert min(slacks) >= -MARGIN
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
        bound = remainder(span, floors, classes, np.float32(tau), np.float32(-9))
        assert bound >= (p - more).mean(1)[news].max() - MARGIN
    one_point = np.concatenate([more[0], less[0], more[0], less[0]]).reshape(4, classes)
    span[:] = 0
    for row, values in enumerate(one_point):
        span[row * width : row * width + classes] = values
    exact = remainder(span, floors, classes, np.float32(p[0].mean()), np.float32(-9))
    assert exact == pytest.approx((p - more)[0].mean(), abs=1e-5)


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_a_front_stopped_early_says_from_where_it_is_exact(share: float) -> None:
    tables, costs = larger(90_000)
    grid = Grid(num_image_thresholds=12)
    looks = itertools.count()
    exact = pareto_front(tables, costs, grid=grid, should_stop=lambda: next(looks) < 0)
    assert exact.proof.optimal
    last = int(share * next(looks))
    looks = itertools.count()
    stopped = pareto_front(tables, costs, grid=grid, should_stop=lambda: next(looks) >= last)
    proof = stopped.proof
    assert proof.stopped == "interrupted"
    if share == 0.9:
        assert exact.points[0].miou < proof.exact_from < exact.points[-1].miou
        assert f"exact where mIoU >= {proof.exact_from:.4f}" in stopped.certificate
    sure = [(point.cost, point.miou) for point in stopped.points if point.miou > proof.exact_from]
    assert sure == [(point.cost, point.miou) for point in exact.points if point.miou > proof.exact_from]
    for point in exact.points:
        here = max(one.miou for one in stopped.points if one.cost <= point.cost)
        assert here >= point.miou - proof.gap_miou


@pytest.mark.parametrize("seed", range(4))
def test_a_front_to_a_precision_is_within_it(seed: int) -> None:
    tables, costs = larger(91_000 + seed)
    grid = Grid(num_image_thresholds=12)
    exact, close = pareto_front(tables, costs, grid=grid), pareto_front(tables, costs, grid=grid, precision=0.004)
    assert close.proof.gap_miou == 0.004
    assert close.certificate.startswith("at most 0.4 pp below the best mIoU at its cost among")
    assert close.proof.num_evaluated < exact.proof.num_evaluated
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


@pytest.mark.parametrize("seed", range(20))
def test_tuning_does_not_change_the_front(seed: int) -> None:
    tables, costs = tiny(1000 + seed, num_exit_points=4)
    if seed >= 12:  # to leave early is dearer than to go on
        costs = replace(costs, outputs=tuple(replace(part, macs=10 * part.macs) for part in costs.outputs))
    objective = Objective(minimise=COST_NAMES[seed % len(COST_NAMES)] if seed < 12 else "macs")
    problem = Problem(tables, CostMeasure.of(objective, costs), objective, COMPLETE)
    found = solve(problem, Region("front"))
    assert found.proof.optimal
    for bend, per_batch in ((1.0, 1), (0.01, 2), (0.0, 100)):
        tuning = Tuning(bend=bend, per_batch=per_batch, num_exact=3 * per_batch)
        assert solve(problem, Region("front"), tuning=tuning).front == found.front
