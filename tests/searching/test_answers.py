"""The records of a search: figures to a file and back, files of before, and one list of fields."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from typing import get_type_hints

import numpy as np
import pytest

from helpers.tables import COMPLETE, larger, simulate, tiny
from messnet.errors import InfeasibleError, RecipeError
from messnet.records.instance import ExitChoice, Instance
from messnet.records.iou import mean_iou
from messnet.records.selection import AnytimeFigures, CostUnit, ReachedCost, ReachedIou, Selection
from messnet.searching import words
from messnet.searching.answers import Comparison, FrontPoint
from messnet.searching.grid import Grid
from messnet.searching.objective import AnytimeObjective, Limit, Objective
from messnet.searching.optima import choose, pareto_front, search, search_for

OLD = """{
  "schema_version": 1, "name": "x", "setting": "input_dependent",
  "exits": [{"exit_index": 2, "head": "final", "pixel_threshold": null, "image_threshold": null}],
  "policy": "top1+native", "objective": "cheapest in macs",
  "selected_on": {"miou": 0.5, "macs": %s, "images": 10, "baseline_miou": 0.6, "baseline_macs": %s},
  "certificate": "optimal"
}"""


def test_instances_of_before_say_what_their_costs_are() -> None:
    one = Selection.from_figures(Instance.from_json(OLD % (2e9, 4e9)).selected_on)
    assert one == Selection(
        num_images=10, unit=CostUnit("macs"), miou=0.5, cost=2e9, baseline_miou=0.6, baseline_cost=4e9
    )
    several = Instance.from_json(OLD % (0.7, 1.0))  # several devices: relative to the model
    assert Selection.from_figures(several.selected_on) == Selection(
        num_images=10, unit=CostUnit("macs", relative=True), miou=0.5, cost=0.7, baseline_miou=0.6, baseline_cost=1.0
    )
    assert "50.00 % mIoU at 0.7x the model's macs" in words.describe(several)[1]
    assert Selection.from_figures({"miou": 0.71}) is None


@pytest.mark.parametrize("relative", [False, True])
def test_figures_survive_a_file(relative: bool) -> None:
    selection = Selection(
        num_images=3,
        unit=CostUnit("latency_ms", relative),
        miou=0.25,
        cost=0.5,
        baseline_miou=0.5,
        baseline_cost=1.0,
        loss=0.125,
        anytime=AnytimeFigures(first_cost=0.25, first_miou=0.125, overhead=0.5, area=0.0625),
    )
    instance = Instance(name="x", setting="anytime", exits=(), selected_on=selection.to_figures())
    assert Selection.from_figures(Instance.from_json(instance.to_json()).selected_on) == selection


def test_a_device_whose_model_costs_one_unit_is_not_taken_for_several() -> None:
    selection = Selection(
        num_images=3, unit=CostUnit("latency_ms"), miou=0.5, cost=0.5, baseline_miou=0.5, baseline_cost=1.0
    )
    again = Selection.from_figures(selection.to_figures())
    assert again == selection
    assert words.amount(again.unit, again.cost) == "0.5 ms"


def test_the_function_takes_the_fields_of_the_record() -> None:
    """``search`` repeats the fields of Objective for its users; two are spelled with fewer brackets."""
    parameters = dict(inspect.signature(search).parameters)
    spelled = {"limits_on": "limits"}
    for field in fields(Objective):
        parameter = parameters.pop(spelled.get(field.name, field.name))
        if field.name not in ("limits_on", "min_class_iou"):
            assert parameter.default == field.default
            assert get_type_hints(search)[field.name] == field.type
    assert not set(parameters) & {field.name for field in fields(AnytimeObjective)}


@pytest.mark.parametrize(
    ("objective", "text"),
    [
        (Objective(), "cheapest in macs"),
        (Objective(maximise="miou", cost="latency_ms", statistic="p95", max_cost=40.0),
         "most accurate at <= 40 p95 latency_ms"),
        (Objective(max_drop_pp=1.5, limits_on=(Limit.parse("parameters<=3e6"), Limit.parse("macs.worst<=0.5x"))),
         "cheapest in macs at <= 1.5 pp drop and parameters <= 3e+06 and worst macs <= 0.5x the model"),
        (Objective(min_miou=0.4, max_cost_ratio=0.5, min_class_iou=(("car", 0.6),)),
         "cheapest in macs at mIoU >= 0.4 and <= 0.5x the model's macs and IoU of car >= 0.6"),
        (AnytimeObjective(max_first_ratio=0.4), "largest area under the curve up to 1.5x the model's macs at first "
         "result <= 0.4x the model's macs"),
    ],
)  # fmt: skip
def test_objectives_in_words(objective: Objective | AnytimeObjective, text: str) -> None:
    assert words.objective_text(objective) == text


def test_a_largest_cost_in_units_is_not_looked_up_on_a_relative_front() -> None:
    tables, costs = tiny(4)
    front = pareto_front(tables, [costs, costs], grid=COMPLETE)
    with pytest.raises(RecipeError, match="relative costs only"):
        choose(front, Objective(max_cost=3))
    found = search_for(tables, [costs, costs], Objective(maximise="miou", max_cost=costs.total("macs")), grid=COMPLETE)
    assert found.selection.unit.relative
    assert found.selection.cost <= 1


@pytest.mark.parametrize(
    ("miou", "cost", "said"),
    [
        (0.51, 0.5e9, "better than R: 1.00 pp more mIoU, 50.0 % less work"),
        (0.51, 1.0e9, "better than R: 1.00 pp more mIoU, the same work"),
        (0.51, 1.5e9, "against R: 1.00 pp more mIoU, 50.0 % more work"),
        (0.50, 0.5e9, "better than R: the same mIoU, 50.0 % less work"),
        (0.50, 1.0e9, "no better than R"),
        (0.50, 1.5e9, "worse than R: the same mIoU, 50.0 % more work"),
        (0.4714, 0.69e9, "against R: 2.86 pp less mIoU, 31.0 % less work"),
        (0.49, 1.0e9, "worse than R: 1.00 pp less mIoU, the same work"),
        (0.49, 1.5e9, "worse than R: 1.00 pp less mIoU, 50.0 % more work"),
        (0.50001, 0.9999e9, "better than R: under 0.01 pp more mIoU, under 0.1 % less work"),
    ],
)
def test_rivals_in_words_for_every_sign_of_the_differences(miou: float, cost: float, said: str) -> None:
    tables, costs = tiny(3)
    result = search(tables, costs, max_drop_pp=1.0, grid=COMPLETE)
    exits = (ExitChoice(exit_index=0, head="a"), ExitChoice(exit_index=1, head="final"))
    instance = Instance(name="x", setting="input_dependent", exits=exits)
    rival = FrontPoint(miou=0.5, cost=1e9, instance=instance)
    comparison = Comparison(
        chosen=FrontPoint(miou=miou, cost=cost, instance=instance),
        unit=CostUnit("macs"),
        static=rival,
        has_early_exits=True,
        uniform=rival,
    )
    single, *alike = words.verdict(replace(result, comparison=comparison)).split("; ")
    name = "the best network with a single exit (0:a > 1:final, 50.00 % mIoU at 1 GMACs)"
    assert single == said.replace("R", name)
    # One head at all exits that is no better is what the instance has.
    assert alike == ([] if "no better" in said else [said.replace("R", "the same head at all exits (a)")])


def test_a_rival_that_costs_nothing_is_no_share() -> None:
    tables, costs = tiny(3)
    result = search(tables, costs, max_drop_pp=1.0, grid=COMPLETE)
    free, dear = (FrontPoint(miou=0.5, cost=cost, instance=result.instance) for cost in (0.0, 3e6))
    comparison = Comparison(chosen=dear, unit=CostUnit("parameters"), static=free, has_early_exits=False, uniform=None)
    verdict = words.verdict(replace(result, comparison=comparison))
    assert verdict.startswith("worse than the best network with a single exit (")
    assert verdict.endswith("): the same mIoU, 3 million parameters more")


def test_records_are_printed_in_a_line_with_their_main_figures() -> None:
    tables, costs = larger(99_000)
    result = search(tables, costs, max_drop_pp=2.0, name="half", grid=Grid(num_image_thresholds=4, max_exits=2))
    final = mean_iou(tables.intersection[:, -1].sum(0), tables.predicted[:, -1].sum(0), tables.labelled.sum(0))
    num_images, num_classes = tables.labelled.shape
    assert repr(tables).startswith(f"<ExitTables of {num_images} images and {num_classes} classes: ")
    assert repr(tables).endswith(f"; final exit {100 * final:.2f} % mIoU>")
    assert f"; the model {costs.total_macs() / 1e9:.4g} GMACs" in repr(costs)
    measured = replace(costs, conditions={"device": "cpu"})
    assert repr(measured).endswith(f" GMACs, {costs.total('latency_ms'):.4g} ms>")
    miou = f"{100 * result.selection.miou:.2f} % mIoU"
    assert repr(result.instance) == (
        "<Instance half, input_dependent: exits "
        f"{' > '.join(f'{choice.exit_index}:{choice.head}' for choice in result.instance.exits)}; {miou}>"
    )
    assert repr(result).startswith("<SearchResult half: ")
    assert all("\n" not in repr(one) and len(repr(one)) < 250 for one in (tables, costs, result, result.instance))
    told = str(result).splitlines()
    assert told[: 2 + len(result.instance.exits)] == words.describe(result.instance)
    assert sum(line.startswith("next best: ") for line in told) == len(result.runners_up)


@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_search_tells_what_was_reached_of_every_limit_and_floor(num_devices: int) -> None:
    """Each figure against one summed image by image, through a file and back, and in words."""
    told = 0
    for seed in range(12):
        tables, costs = tiny(seed)
        limits = (Limit.parse("latency_ms.p95<=1.5x"), Limit.parse("parameters<=9"), Limit.parse("parameters<=30"))
        objective = Objective(statistic="worst", limits_on=limits, min_class_iou=(("1", 0.05),))
        try:
            result = search_for(tables, [costs] * num_devices, objective, grid=COMPLETE)
        except InfeasibleError:
            continue
        again = Selection.from_figures(Instance.from_json(result.instance.to_json()).selected_on)
        assert again == result.selection
        routing, latency = simulate(tables, costs, result.instance, "latency_ms")
        _, size = simulate(tables, costs, result.instance, "parameters")
        _, work = simulate(tables, costs, result.instance, "macs")
        intersection, predicted, labelled = (values[1] for values in tables.counts(np.array(routing)))
        relative = num_devices > 1
        assert list(again.reached) == [
            ReachedCost(
                cost="macs",
                statistic="worst",
                relative=relative,
                value=pytest.approx(max(work) / (costs.total("macs") if relative else 1)),
                limit=None,
            ),
            # Of at most four images the least that 95 % do not exceed is the largest.
            ReachedCost(
                cost="latency_ms",
                statistic="p95",
                relative=True,
                value=pytest.approx(max(latency) / costs.total("latency_ms")),
                limit=1.5,
            ),
            ReachedCost(cost="parameters", statistic="mean", relative=False, value=size[0], limit=9),
            ReachedIou(
                class_name="1", value=pytest.approx(intersection / (predicted + labelled - intersection)), limit=0.05
            ),
        ]
        line = words.describe(result.instance)[1]
        assert "; 95th percentile of latency " in line
        assert "x the model's latency_ms (at most 1.5x)" in line
        assert "(at least 0.05)" in line
        told += 1
    assert told > 3


def test_limits_of_one_device_are_told_in_their_units() -> None:
    reached = (
        ReachedCost(cost="latency_ms", statistic="p95", relative=False, value=38.21, limit=40.0),
        ReachedIou(class_name="car: red.mean", value=0.6123, limit=0.6),
    )
    selection = Selection(num_images=3, unit=CostUnit("macs"), miou=0.5, cost=1e9, reached=reached)
    figures = selection.to_figures()
    assert (figures["latency_ms.p95"], figures["limit:latency_ms.p95"]) == (38.21, 40.0)
    assert Selection.from_figures(figures) == selection
    instance = Instance(name="x", setting="budgeted", exits=(), selected_on=figures)
    assert words.describe(instance)[1].endswith(
        "; 95th percentile of latency 38.21 ms (at most 40 ms); IoU of car: red.mean 0.6123 (at least 0.6)"
    )


@pytest.mark.parametrize(
    ("cost", "said"),
    [(0.5e9, "0.5 GMACs, 2.00x less work"), (1e9, "1 GMACs"), (1.5e9, "1.5 GMACs, 1.50x more work"), (0.0, "0 GMACs")],
)  # fmt: skip
def test_an_instance_beside_the_model_in_words(cost: float, said: str) -> None:
    selection = Selection(
        num_images=3, unit=CostUnit("macs"), miou=0.5, cost=cost, baseline_miou=0.6, baseline_cost=1e9
    )
    instance = Instance(name="x", setting="budgeted", exits=(), selected_on=selection.to_figures())
    assert words.describe(instance)[1].endswith(f": 50.00 % mIoU at {said}; your model: 60.00 % mIoU at 1 GMACs")
