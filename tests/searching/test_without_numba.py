"""The search where numba is not installed: the same answers, and one line that says why it is slow."""

from __future__ import annotations

import subprocess
import sys

import pytest

from helpers.tables import larger
from messnet.searching.exact.compiling import COMPILED
from messnet.searching.grid import Grid
from messnet.searching.objective import Objective
from messnet.searching.optima import pareto_front, search_for

WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None  # as if it were not installed
from helpers.tables import larger
from messnet.searching.grid import Grid
from messnet.searching.objective import Objective
from messnet.searching.optima import pareto_front, search_for
tables, costs = larger(50_000)
for max_exits in (2, 3):
    grid = Grid(num_image_thresholds=4, max_exits=max_exits)
    result = search_for(tables, costs, Objective(max_drop_pp=2), grid=grid)
    print(result.instance.to_json().replace("\\n", ""), result.proof.optimal)
    print([(point.cost, point.miou) for point in pareto_front(tables, costs, grid=grid).points])
"""


def test_without_numba_the_answers_are_the_same() -> None:
    pytest.importorskip("numba")
    assert COMPILED
    command = [sys.executable, "-W", "error", "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{WITHOUT_NUMBA}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tables, costs = larger(50_000)
    lines = iter(done.stdout.splitlines())
    for max_exits in (2, 3):
        grid = Grid(num_image_thresholds=4, max_exits=max_exits)
        result = search_for(tables, costs, Objective(max_drop_pp=2), grid=grid)
        text, _, optimal = next(lines).rpartition(" ")
        assert optimal == "True"
        # How many instances were evaluated depends on the bounds' rounding.
        assert text.partition('"certificate"')[0] == result.instance.to_json().replace("\n", "").partition('"cert')[0]
        front = pareto_front(tables, costs, grid=grid)
        assert next(lines) == str([(point.cost, point.miou) for point in front.points])
    assert done.stderr.count("\n") == 1
    assert "numba is not installed" in done.stderr
    assert "pip install messnet[train]" in done.stderr
