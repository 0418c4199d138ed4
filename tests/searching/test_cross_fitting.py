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
from messnet.searching.cross_fitting import LEVELS, Folds, folds_of, search_tightened
from messnet.searching.grid import Grid
from messnet.searching.objective import Limit, Objective
from messnet.searching.optima import search_for

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
    judged = Folds(tables=tables, costs=costs, grid=GRID, num_folds=num_folds, seed=seed)
    fitted = [judged.judge(objective) for objective in objectives]
    which = folds_of(tables.group_ids(), num_folds, seed).tolist()
    folds = [[v for v in range(60) if which[v] == fold] for fold in range(num_folds)]
    final = [tables.final] * 60
    for one, objective in zip(fitted, objectives, strict=True):
        routing, spent = literal(tables, costs, objective, folds)
        assert one.miou == pytest.approx(float(exact_miou(tables, routing)), abs=1e-12)
        assert one.cost == pytest.approx(float(sum(map(Fraction, spent)) / 60))
        assert one.baseline_miou == pytest.approx(float(exact_miou(tables, final)), abs=1e-12)
        assert one.macs == pytest.approx(one.cost)
        assert sum(place.share for place in one.exit_shares) == pytest.approx(1)
        drops, means, shares = [], [], []
        for group in dict.fromkeys(tables.groups):
            left = [v for v in range(60) if tables.groups[v] != group]
            some = tables.subset(np.array(left))
            drops.append(
                float(exact_miou(some, [tables.final] * len(left)) - exact_miou(some, [routing[v] for v in left]))
            )
            means.append(np.mean([spent[v] for v in left]))
            first = one.exit_shares[0].exit_index
            shares.append(np.mean([tables.exits[routing[v]].exit_index == first for v in left]))
        n = len(drops)
        for error, figures in (
            (one.drop_error, drops),
            (one.cost_error, means),
            (one.macs_error, means),
            (one.exit_shares[0].error, shares),
        ):
            assert error == pytest.approx(np.sqrt((n - 1) ** 2 / n * np.var(figures, ddof=1)), abs=1e-12)
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
    found = search_tightened(Folds(tables=tables, costs=costs, grid=GRID, seed=seed), Objective(max_drop_pp=drop))
    expected = found.instance.expected
    assert expected is not None
    assert expected.drop_pp <= drop + 1e-9
    folds = Folds(tables=tables, costs=costs, grid=GRID, seed=seed)
    tried = [Objective(max_drop_pp=drop - level.pp) for level in LEVELS]
    fitted = [folds.judge(one) for one in tried]
    kept = [one.drop_pp <= drop + 1e-9 for one in fitted]
    # The laxest limit that is kept together with the next tighter one; the tightest has none.
    twice = [this and then for this, then in zip(kept, [*kept[1:], True], strict=True)]
    place = twice.index(True) if True in twice else None
    assert found.tightened is not None
    if place is not None and fitted[place].cost < costs.total("macs"):
        assert found.tightened.searched is not None
        assert found.tightened.searched.max_drop_pp == tried[place].max_drop_pp
        assert expected == fitted[place]
    else:
        assert found.tightened.searched is None
        assert expected.drop_pp == pytest.approx(0)
        assert [choice.head for choice in found.instance.exits] == ["final"]
    figures = found.selection
    routing, spent = simulate(tables, costs, found.instance, "macs")
    assert figures.miou == pytest.approx(float(exact_miou(tables, routing)), abs=1e-12)
    assert figures.cost == pytest.approx(np.mean(spent))


@pytest.mark.parametrize("ratio", [0.4, 0.7])
def test_a_largest_cost_is_kept_where_images_were_not_seen(ratio: float) -> None:
    tables, costs = grouped(98_000)
    found = search_tightened(
        Folds(tables=tables, costs=costs, grid=GRID), Objective(maximise="miou", max_cost_ratio=ratio)
    )
    assert found.instance.expected is not None
    assert found.instance.expected.cost <= ratio * costs.total("macs")
    # What is answered is the most accurate on all images at the tightened cost.
    assert found.tightened is not None
    searched = found.tightened.searched
    assert searched is not None
    assert searched.max_cost_ratio is not None
    assert searched.max_cost_ratio <= ratio
    assert found.selection.miou == search_for(tables, costs, searched, grid=GRID).selection.miou


def test_further_limits_and_floors_are_kept_too() -> None:
    tables, costs = grouped(98_501)
    asked = Objective(max_drop_pp=8, min_class_iou=(("a", 0.75),))
    # As it stands the floor is broken on images not seen: a tighter one holds it.
    assert Folds(tables=tables, costs=costs, grid=GRID).judge(asked).ious[0].value < 0.75
    found = search_tightened(Folds(tables=tables, costs=costs, grid=GRID), asked)
    assert found.tightened is not None
    assert found.tightened.searched is not None
    assert found.tightened.searched.min_class_iou[0][1] > 0.75
    assert found.tightened.expected.ious[0].value >= 0.75
    tables, costs = grouped(98_500)
    limit = Limit.parse("macs.p95<=0.77x")
    found = search_tightened(
        Folds(tables=tables, costs=costs, grid=GRID), Objective(max_drop_pp=20, limits_on=(limit,))
    )
    assert found.instance.expected is not None
    assert [one.value <= 0.77 for one in found.instance.expected.costs] == [True]


def test_what_cannot_be_kept_is_said_with_the_nearest() -> None:
    tables, costs = grouped(97_500)
    with pytest.raises(InfeasibleError, match=r"no instance has mIoU >= 99.00 %: the most accurate instance has mIoU"):
        search_tightened(Folds(tables=tables, costs=costs, grid=GRID), Objective(min_miou=0.99))  # on no images at all
    model = search_tightened(Folds(tables=tables, costs=costs, grid=GRID), Objective(max_drop_pp=0))
    if model.tightened is not None and model.tightened.searched is None:
        assert model.certificate.startswith("your model itself")
        expected = model.tightened.expected
        assert ("; the nearest: " in model.certificate) == (expected.cost != expected.baseline_cost)


def test_a_time_limit_gives_a_usable_answer() -> None:
    tables, costs = grouped(97_600)
    found = search_tightened(Folds(tables=tables, costs=costs, grid=Grid(), time_limit=0.0), Objective(max_drop_pp=8))
    assert found.instance.exits[-1].exit_index <= tables.exits[-1].exit_index
    assert found.instance.expected is not None


def test_one_group_is_refused() -> None:
    tables, costs = grouped(97_000)
    one_group = replace(tables, groups=("x",) * 60)
    with pytest.raises(RecipeError, match="two groups of images, got 5 and 1"):
        search_tightened(Folds(tables=one_group, costs=costs, grid=GRID), Objective(max_drop_pp=1))
