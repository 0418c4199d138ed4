"""Tables of one precision and costs of another are never put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helpers.tables import tiny
from messnet.errors import RunError
from messnet.records.costs import CostTable
from messnet.records.exit_tables import ExitTables
from messnet.records.names import Setting
from messnet.records.run_directory import RunDirectory
from messnet.run.choosing import search_run
from messnet.searching import Objective, search
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
