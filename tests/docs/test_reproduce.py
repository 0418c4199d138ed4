"""benchmarks/reproduce.py: the parts that choose; its trainings are the pipeline's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from helpers.files import module_of
from messnet.records.costs import CostTable
from messnet.records.exit_tables import ExitTables
from messnet.records.instance import FINAL_HEAD
from messnet.run.opening import open_run
from messnet.run.recipe import load_recipe
from messnet.searching.grid import cost_of, route
from messnet.searching.optima import pareto_front

PATH = Path(__file__).parents[2] / "benchmarks" / "reproduce.py"


@pytest.fixture(scope="module")
def reproduce() -> ModuleType:
    return module_of(PATH)


@pytest.fixture(scope="module")
def tables(tiny_run: Path) -> tuple[ExitTables, CostTable]:
    run = open_run(tiny_run)
    return run.tables(), run.costs()


def test_uniform_tables_have_one_head_everywhere(reproduce: ModuleType, tables: tuple[ExitTables, CostTable]) -> None:
    whole, _ = tables
    alike = list(reproduce.uniform(whole))
    assert len(alike) == 2  # fcn and deeplabv3
    for one in alike:
        heads = {exit.head for exit in one.exits[:-1]}
        assert len(heads) == 1
        assert one.exits[-1].head == FINAL_HEAD
        assert [exit.exit_index for exit in one.exits] == [0, 1, 2, 3]
        for h, exit in enumerate(one.exits):
            before = whole.exits.index(exit)
            routes = [np.full(len(whole.image_names), at) for at in (h, before)]
            assert one.miou(routes[0]) == whole.miou(routes[1])
            assert np.array_equal(one.image_confidence[:, h], whole.image_confidence[:, before])


def test_pick_is_the_best_of_all_points(reproduce: ModuleType, tables: tuple[ExitTables, CostTable]) -> None:
    whole, costs = tables
    points = pareto_front(whole, costs).points
    macs = costs.total("macs")
    mious = sorted(point.miou for point in points)
    for drop in (0.0, 0.5, 2.0):
        instance, met = reproduce.pick(points, drop, mious[-1], macs)
        assert met
        assert whole.miou(route(whole, instance)) >= mious[-1] - drop / 100 - 1e-11
        cheaper = [point for point in points if point.cost < cost_of(whole, costs, instance).mean() * (1 - 1e-9)]
        assert all(point.miou < mious[-1] - drop / 100 for point in cheaper)

    instance, met = reproduce.pick(points, None, 1.0, 0.5 * macs)
    assert met
    assert cost_of(whole, costs, instance).mean() <= 0.5 * macs * (1 + 1e-9)
    within = max(point.miou for point in points if point.cost <= 0.5 * macs)  # rounded to 12 digits
    assert whole.miou(route(whole, instance)) == pytest.approx(within, abs=1e-11)

    instance, met = reproduce.pick(points, 0.1, 1.0, macs)  # nobody has an mIoU of 99.9 %
    assert not met
    assert whole.miou(route(whole, instance)) == pytest.approx(mious[-1], abs=1e-11)


def test_a_rate_of_the_baselines_is_theirs_alone(reproduce: ModuleType, tmp_path: Path) -> None:
    recipe = PATH.parents[1] / "configs" / "tables_scenes_cpu.yaml"
    own = reproduce.Experiment(recipe=recipe, folder=tmp_path, seeds=[0], baseline_rate=0.2)
    rates = {name: own.opened(name, 0).recipe.pretrain.learning_rate for name in reproduce.VARIANTS}
    assert rates == {name: 0.2 if name.startswith("baseline") else 0.1 for name in rates}
    same = reproduce.Experiment(recipe=recipe, folder=tmp_path, seeds=[0])
    assert same.opened("baseline", 0).directory.path != own.opened("baseline", 0).directory.path


def test_the_smaller_network_differs_in_nothing_else(reproduce: ModuleType, tmp_path: Path) -> None:
    experiment = reproduce.Experiment(
        recipe=PATH.parents[1] / "configs/tables_scenes_cpu.yaml", folder=tmp_path, seeds=[0]
    )
    whole = experiment.opened("baseline", 0)
    for smaller, model in {"0.35": {"width": 0.35}, "drn50_layer3_fcn": {"name": "drn50_layer3_fcn"}}.items():
        run = experiment.opened("baseline", 0, smaller)
        assert run.directory.path == tmp_path / f"baseline-{smaller}-0"
        assert run.recipe == replace(whole.recipe, model=replace(whole.recipe.model, **model))


@pytest.mark.parametrize(("scheme", "loss", "filtered"), [("exit_aware", "pfd", "true"), ("end_to_end", "ce", "false")])
def test_a_recipe_is_a_variant_of_itself(
    reproduce: ModuleType, tmp_path: Path, scheme: str, loss: str, filtered: str
) -> None:
    path = PATH.parents[1] / "configs" / "tables_scenes_cpu.yaml"
    overrides = ["--pretrain.scheme", scheme, "--distill.loss", loss, "--distill.filter_kl", filtered]
    recipe = load_recipe(path, overrides)
    experiment = reproduce.Experiment(recipe=path, folder=tmp_path, seeds=[0])  # without the overrides
    assert experiment.opened(reproduce.variant_of_recipe(recipe), 0).recipe == recipe
