"""Tables of one precision and costs of another are never put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helpers.tables import tiny
from messnet.errors import RecipeError, RunError
from messnet.records.costs import CostTable, PartCost
from messnet.records.exit_tables import ExitTables
from messnet.records.names import Setting
from messnet.records.run_directory import RunDirectory
from messnet.run.choosing import search_precisions, search_run
from messnet.searching.objective import Objective
from messnet.searching.optima import search
from messnet.searching.options import SearchOptions

FAST = Objective(minimise="latency_ms", max_drop_pp=50)


def measured(costs: CostTable, dtype: str, runtime: str = "onnxruntime 1.32.0") -> CostTable:
    return replace(costs, conditions={"runtime": runtime, "dtype": dtype})


@pytest.mark.parametrize("setting", ["budgeted", "input_dependent"])
def test_a_search_refuses_times_of_another_precision(setting: Setting) -> None:
    tables, costs = tiny(0)
    int8 = replace(tables, precision="int8")
    for one, dtype in ((tables, "int8"), (int8, "float32"), (int8, "bfloat16")):
        with pytest.raises(RunError, match=f"the cost table is of one in {dtype}: make both in the same precision"):
            search(one, measured(costs, dtype), setting=setting, minimise="latency_ms", max_drop_pp=50)
    # Work is the same in all of them, and a table that nothing was measured for says no precision.
    assert search(int8, measured(costs, "float32"), minimise="macs", max_drop_pp=50).instance
    assert search(int8, replace(costs, conditions={}), minimise="latency_ms", max_drop_pp=50).instance


@pytest.fixture
def run(tmp_path: Path) -> tuple[RunDirectory, ExitTables, CostTable]:
    tables, costs = tiny(0)
    tables = replace(tables, origin="weights")
    directory = RunDirectory(tmp_path)
    directory.tables.write(tables)
    return directory, tables, costs


def written(directory: RunDirectory, costs: Mapping[str, CostTable]) -> list[Path]:
    for name, table in costs.items():
        directory.measured(name).write(table)
    return [directory.measured(name).path for name in costs]


def test_the_tables_follow_the_costs(run: tuple[RunDirectory, ExitTables, CostTable]) -> None:
    directory, tables, costs = run
    # In int8 these tables are wrong everywhere.
    wrong = np.zeros_like(tables.intersection)
    int8 = replace(tables, precision="int8", origin="weights onnxruntime int8", intersection=wrong)
    directory.deployed_tables("onnxruntime", "int8").write(int8)
    files = written(directory, {"f32": measured(costs, "float32"), "int8": measured(costs, "int8")})
    best = Objective(maximise="miou", cost="latency_ms", max_cost_ratio=1)
    found = [search_run(directory, SearchOptions(), best, name=file.stem, costs=[file]).instance for file in files]
    assert [instance.precision for instance in found] == ["f32", "int8"]
    assert [instance.selected_on["miou"] == 0 for instance in found] == [False, True]
    assert directory.read_instance("int8") == found[1]


def test_tables_that_are_missing_or_of_other_weights(run: tuple[RunDirectory, ExitTables, CostTable]) -> None:
    directory, tables, costs = run
    (file,) = written(directory, {"int8": measured(costs, "int8", "openvino 2026.4.1")})
    again = f"`messnet evaluate {directory.path} --runtime openvino --precision int8`"
    with pytest.raises(RunError, match=r"has no tables-openvino-int8.npz yet; make it with") as refused:
        search_run(directory, SearchOptions(), FAST, name="fast", costs=[file])
    assert again in str(refused.value)
    other = replace(tables, precision="int8", origin="others openvino int8")
    directory.deployed_tables("openvino", "int8").write(other)
    with pytest.raises(RunError, match="in int8 are of other weights or another recipe than its own") as refused:
        search_run(directory, SearchOptions(), FAST, name="fast", costs=[file])
    assert again in str(refused.value)


def faster(costs: CostTable, dtype: str) -> CostTable:
    """Half the time for everything."""

    def half(part: PartCost) -> PartCost:
        return replace(part, latency_ms=(part.latency_ms or 0) / 2)

    parts = {name: tuple(map(half, getattr(costs, name))) for name in ("segments", "policies", "outputs")}
    heads = {exit: half(part) for exit, part in costs.heads.items()}
    return replace(measured(costs, dtype), heads=heads, **parts)


@pytest.mark.parametrize("loses", [False, True])
def test_the_precision_is_a_choice(run: tuple[RunDirectory, ExitTables, CostTable], loses: bool) -> None:
    """int8 at half the time and the same counts wins with the same instance, its drop counted from the float model;
    where it is wrong everywhere, no instance in int8 keeps the drop, and the best is the one in f32."""
    directory, tables, costs = run
    intersection = tables.intersection.copy()
    if loses:
        intersection[:] = 0
    int8 = replace(tables, precision="int8", origin="weights onnxruntime int8", intersection=intersection)
    directory.deployed_tables("onnxruntime", "int8").write(int8)
    files = written(directory, {"f32": measured(costs, "float32"), "int8": faster(costs, "int8")})
    objective = Objective(minimise="latency_ms", max_drop_pp=5)
    alone = search_run(directory, SearchOptions(), objective, name="alone", costs=files[:1])
    found = search_precisions(directory, SearchOptions(), objective, files, name="best")
    assert [one.name for one in found] == ["onnxruntime f32", "onnxruntime int8"]
    assert found[1].model[1] == pytest.approx(found[0].model[1] / 2)
    assert found[1].model[2] == pytest.approx(found[0].model[2] / 4)  # a byte a weight
    best = directory.read_instance("best")
    assert best.precision == ("f32" if loses else "int8")
    assert best.exits == alone.instance.exits
    assert (found[1].result is None) == loses
    if not loses:
        assert best.selected_on["latency_ms"] == pytest.approx(alone.instance.selected_on["latency_ms"] / 2)


def test_precisions_of_several_devices(run: tuple[RunDirectory, ExitTables, CostTable]) -> None:
    directory, _, costs = run
    other = replace(costs, conditions={"runtime": "openvino", "dtype": "int8", "device": "another"})
    files = written(directory, {"f32": measured(costs, "float32"), "int8": other})
    with pytest.raises(RecipeError, match="are compared on one device"):
        search_precisions(directory, SearchOptions(), FAST, files, name="best")
    with pytest.raises(RunError, match="the cost tables are of onnxruntime f32 and openvino int8"):
        search_run(directory, SearchOptions(), FAST, name="best", costs=files)
