"""Cross-fitted figures against a literal implementation: fold by fold, image by image, with searches of their own."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from helpers.tables import exact_miou, larger, simulate
from messnet.errors import InfeasibleError, RecipeError
from messnet.records.costs import CostTable
from messnet.records.exit_tables import ExitTables
from messnet.records.instance import ExitChoice, Instance
from messnet.searching import Grid, Limit, Objective, search_for
from messnet.searching.cross_fitting import STEPS_PP, cross_fit, folds_of, tighten

GRID = Grid(num_image_thresholds=5, max_exits=2)
OBJECTIVES = [Objective(max_drop_pp=drop) for drop in (0.5, 2.0, 8.0)]


def grouped(seed: int) -> tuple[ExitTables, CostTable]:
    """60 images in groups of 1 to 9; a letter stands for a drive."""
    tables, costs = larger(seed)
    draw = np.random.default_rng(seed)
    labels = np.repeat(np.arange(40), draw.integers(1, 10, 40))[:60]
    return replace(tables, groups=tuple(f"drive{label}" for label in labels)), costs


def literal(
    tables: ExitTables, costs: CostTable, objective: Objective, folds: list[list[int]]
) -> tuple[list[int], list[float]]:
    """Where each image leaves and what it costs, by the instance searched on the images of all other folds."""
    routing, spent = [-1] * len(tables.image_names), [-1.0] * len(tables.image_names)
    for fold in folds:
        others = [v for v in range(len(tables.image_names)) if v not in fold]
        try:
            instance = search_for(tables.subset(np.array(others)), costs, objective, grid=GRID).instance
        except InfeasibleError:
            final = ExitChoice(exit_index=tables.exits[-1].exit_index, head="final")
            instance = Instance(name="model", setting="budgeted", exits=(final,), policy=tables.policies[0])
        taken, paid = simulate(tables.subset(np.array(fold)), costs, instance, "macs")
        for v, position, cost in zip(fold, taken, paid, strict=True):
            assert routing[v] == -1  # judged once
            routing[v], spent[v] = position, cost
    return routing, spent


@pytest.mark.parametrize("seed", range(5))
def test_figures_equal_a_literal_implementation(seed: int) -> None:
    tables, costs = grouped(95_000 + seed)
    num_folds = 2 + seed
    objectives = [*OBJECTIVES, Objective(max_drop_pp=-30.0)]  # the last: no instance, so the model itself
    fitted = cross_fit(tables, costs, objectives, grid=GRID, num_folds=num_folds, seed=seed)
    which = folds_of(tables.group_ids(), num_folds, seed).tolist()
    folds = [[v for v in range(60) if which[v] == fold] for fold in range(num_folds)]
    final = [tables.final] * 60
    for one, objective in zip(fitted, objectives, strict=True):
        routing, spent = literal(tables, costs, objective, folds)
        assert one.miou == pytest.approx(float(exact_miou(tables, routing)), abs=1e-12)
        assert one.cost == pytest.approx(float(sum(map(Fraction, spent)) / 60))
        assert one.baseline_miou == pytest.approx(float(exact_miou(tables, final)), abs=1e-12)
        drops = []
        for group in dict.fromkeys(tables.groups):
            left = [v for v in range(60) if tables.groups[v] != group]
            some = tables.subset(np.array(left))
            drops.append(
                float(exact_miou(some, [tables.final] * len(left)) - exact_miou(some, [routing[v] for v in left]))
            )
        n = len(drops)
        assert one.miou_error == pytest.approx(np.sqrt((n - 1) ** 2 / n * np.var(drops, ddof=1)), abs=1e-12)
    assert fitted[-1].drop_pp == pytest.approx(0, abs=1e-9)
    assert fitted[-1].cost == costs.total("macs")


@pytest.mark.parametrize("seed", range(20))
def test_folds_keep_groups_whole_and_are_even(seed: int) -> None:
    draw = np.random.default_rng(seed)
    groups = np.repeat(np.arange(30), draw.integers(1, 12, 30))
    groups = draw.permutation(groups)
    num_folds = int(draw.integers(2, 8))
    folds = folds_of(groups, num_folds, seed)
    assert all(len(set(folds[groups == group])) == 1 for group in range(30))
    sizes = np.bincount(folds, minlength=num_folds)
    assert len(sizes) == num_folds
    assert np.ptp(sizes) <= np.bincount(groups).max()
    assert len(set(folds_of(np.array([0, 0, 1, 2]), 9))) == 3  # no more folds than groups


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("drop", [0.5, 3.0])
def test_a_tightened_limit_is_kept_where_images_were_not_seen(seed: int, drop: float) -> None:
    tables, costs = grouped(96_000 + seed)
    asked = Objective(max_drop_pp=drop)
    found = tighten(tables, costs, asked, grid=GRID, seed=seed)
    assert found.expected.drop_pp <= drop + 1e-9
    tried = [replace(asked, max_drop_pp=drop - step) for step in STEPS_PP]
    fitted = cross_fit(tables, costs, tried, grid=GRID, seed=seed)
    kept = [one.drop_pp <= drop + 1e-9 for one in fitted]
    # The laxest limit from which on all tighter ones are kept too.
    place = next((i for i in range(len(kept)) if all(kept[i:])), None)
    if place is not None and fitted[place].cost <= costs.total("macs"):
        assert found.expected == fitted[place]
    else:
        assert found.expected.drop_pp == pytest.approx(0)
        assert [choice.head for choice in found.result.instance.exits] == ["final"]
    figures = found.result.selection
    routing, spent = simulate(tables, costs, found.result.instance, "macs")
    assert figures.miou == pytest.approx(float(exact_miou(tables, routing)), abs=1e-12)
    assert figures.cost == pytest.approx(np.mean(spent))


def test_what_cannot_be_cross_fitted_is_refused() -> None:
    tables, costs = grouped(97_000)
    one_group = replace(tables, groups=("x",) * 60)
    for objective, given, words in (
        (Objective(maximise="miou", max_cost_ratio=0.5), tables, "only a limit on mIoU is tightened"),
        (Objective(), tables, "only a limit on mIoU is tightened"),
        (Objective(max_drop_pp=1, limits_on=(Limit.parse("macs<=1x"),)), tables, "ratio of one cost only"),
        (Objective(max_drop_pp=1, statistic="p95"), tables, "one mean cost"),
        (Objective(max_drop_pp=1), one_group, "two groups of images, got 5 and 1"),
    ):
        with pytest.raises(RecipeError, match=words):
            tighten(given, costs, objective, grid=GRID)
