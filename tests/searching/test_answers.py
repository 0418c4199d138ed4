"""The records of a search: figures to a file and back, files of before, and one list of fields."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import get_type_hints

import pytest

from helpers.tables import COMPLETE, tiny
from messnet.errors import RecipeError
from messnet.records.instance import Instance
from messnet.records.selection import AnytimeFigures, CostUnit, Selection
from messnet.searching import AnytimeObjective, Limit, Objective, choose, pareto_front, search, search_for, words

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
    assert "50.00 % mIoU at 0.7x the model's macs" in words.describe(several)[0]
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
