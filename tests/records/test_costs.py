"""Cost tables: round trips, bad files, and the cost rule in closed form, equal to the compiled one of the search."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from messnet.errors import RunError
from messnet.records.costs import CostTable, PartCost
from messnet.records.instance import Exit
from messnet.records.names import CostName
from messnet.searching.exact.arrays import Arrays
from messnet.searching.exact.enumeration import leaving_costs
from messnet.searching.exact.problem import MEAN, WHOLE_MAX, WHOLE_SUM


def make_costs() -> CostTable:
    def part(macs: int) -> PartCost:
        return PartCost(
            macs=macs,
            macs_paper=macs + 0.5,
            parameters=10 * macs,
            memory_bytes=100 * macs,
            latency_ms=macs / 4,
            latency_p95_ms=macs / 2,
        )

    return CostTable(
        model="toy",
        input_size=(4, 6),
        segments=(part(1), part(2), part(4)),
        heads={Exit(0, "a"): part(8), Exit(0, "b"): part(16), Exit(1, "a"): part(32), Exit(2, "final"): part(64)},
        policies=(part(128), part(256)),
        outputs=(part(512), part(1024), part(2048)),
        operators={"convolution": 7.0},
        uncounted={"relu": 3},
        conditions={"device": "an abacus", "batch": 1},
        additivity={"num_instances": 20, "median_error": 0.03, "worst_error": 0.1},
        provenance={"made": "by hand"},
    )


def test_cost_table_reads_its_own_json() -> None:
    costs = make_costs()
    assert CostTable.from_json(costs.to_json()) == costs


def test_the_users_model() -> None:
    costs = make_costs()
    assert costs.final_exit == Exit(2, "final")
    assert costs.total_macs() == costs.total("macs") == 1 + 2 + 4 + 64 + 2048
    assert costs.total_macs(convention="paper") == costs.total_macs() + 5 * 0.5
    assert costs.total("parameters") == 10 * (1 + 2 + 4 + 64 + 2048)
    assert costs.total("memory_bytes") == 100 * 2048


def test_the_columns_of_some_exits() -> None:
    column = make_costs().column("parameters", [Exit(1, "a"), Exit(0, "b"), Exit(2, "final")])
    assert column.prefix(1) == 30
    assert column.heads.tolist() == [320, 160, 640]
    assert column.policies.tolist() == [2560, 1280, 0]  # the final exit decides nothing
    assert column.outputs.tolist() == [10240, 5120, 20480]
    assert make_costs().column("memory_bytes", []).prefix(1) == 200
    with pytest.raises(RunError, match="another head space"):
        make_costs().column("macs", [Exit(1, "nothing")])
    early = replace(make_costs(), heads={Exit(2, "final"): make_costs().heads[Exit(2, "final")]})
    with pytest.raises(RunError, match=r"before the heads were attached: call messnet\.profile\(net, \.\.\.\) again"):
        early.column("macs", [Exit(0, "a")])


@pytest.mark.parametrize(("name", "unit"), [("macs", 1), ("latency_ms", 1 / 4), ("latency_p95_ms", 1 / 2)])
def test_an_image_pays_what_it_goes_through(name: CostName, unit: float) -> None:
    costs = make_costs()
    leaving = costs.column(name, [Exit(0, "b"), Exit(1, "a"), Exit(2, "final")]).leaving()
    first = 1 + 16 + 128
    second = first + 2 + 32 + 256
    assert leaving.tolist() == [unit * (first + 512), unit * (second + 1024), unit * (second + 4 + 64 + 2048)]
    cut = costs.column(name, [Exit(0, "b"), Exit(1, "a")]).leaving()  # its last exit decides nothing
    assert cut.tolist() == [unit * (first + 512), unit * (first + 2 + 32 + 1024)]


def test_memory_and_parameters_are_the_instances() -> None:
    costs, exits = make_costs(), [Exit(0, "b"), Exit(1, "a")]
    assert costs.column("parameters", exits).leaving().tolist() == [10 * (1 + 2 + 16 + 32 + 128 + 512 + 1024)] * 2
    assert costs.column("memory_bytes", exits).leaving().tolist() == [100 * 1024] * 2


def test_latency_that_was_not_measured() -> None:
    record = json.loads(make_costs().to_json())
    record["outputs"][0]["latency_ms"] = None
    costs = CostTable.from_json(json.dumps(record))
    assert costs.column("latency_ms", [Exit(1, "a")]).heads.tolist() == [8]
    with pytest.raises(RunError, match=r"no latency_ms: .*messnet profile RUN --measure"):
        costs.column("latency_ms", [Exit(0, "a")])


def test_equal_sums_of_latencies_are_equal() -> None:
    costs = make_costs()
    parts = [replace(part, latency_ms=ms) for part, ms in zip(costs.segments, (0.1, 0.2, 0.3), strict=True)]
    one = replace(costs, segments=tuple(parts)).column("latency_ms", [])
    other = replace(costs, segments=tuple(reversed(parts))).column("latency_ms", [])
    assert 0.1 + 0.2 + 0.3 != 0.3 + 0.2 + 0.1
    assert one.prefix(2) == other.prefix(2) == pytest.approx(0.6, abs=2e-6)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 1}', '{"schema_version": 99}', "null"])
def test_bad_cost_tables(text: str) -> None:
    with pytest.raises(RunError, match=r"messnet profile|make it again"):
        CostTable.from_json(text)


def test_cost_table_with_an_unknown_key() -> None:
    record = json.loads(make_costs().to_json()) | {"colour": "blue"}
    with pytest.raises(RunError, match="colour"):
        CostTable.from_json(json.dumps(record))


def test_an_exit_on_its_own_and_every_exit_shown() -> None:
    costs, exits = make_costs(), [Exit(0, "b"), Exit(1, "a"), Exit(2, "final")]
    column = costs.column("macs", exits)
    assert column.reached().tolist() == [1, 3, 7]
    assert column.alone().tolist() == [1 + 16 + 512, 3 + 32 + 1024, 7 + 64 + 2048]
    assert column.alone().tolist() == [costs.column("macs", [exit]).leaving()[0] for exit in exits]
    assert column.shown().tolist() == [1 + 16 + 512, 3 + 48 + 1536, 7 + 112 + 3584]  # no decision
    memory = costs.column("memory_bytes", exits)
    assert memory.alone().tolist() == [100 * 512, 100 * 1024, 100 * 2048]


@pytest.mark.parametrize("name", get_args(CostName))
@pytest.mark.parametrize("seed", range(3))
def test_the_searchs_compiled_form_is_the_same_rule(name: CostName, seed: int) -> None:
    draw = np.random.default_rng(seed)

    def part() -> PartCost:
        macs, memory = draw.integers(0, 1000, 2).tolist()
        return PartCost(
            macs=macs,
            macs_paper=2 * macs,
            parameters=macs,
            memory_bytes=memory,
            latency_ms=draw.random(),
            latency_p95_ms=draw.random(),
        )

    exits = [Exit(0, "a"), Exit(1, "a"), Exit(1, "b"), Exit(2, "a"), Exit(3, "final")]
    costs = replace(
        make_costs(),
        segments=tuple(part() for _ in range(4)),
        heads={exit: part() for exit in exits},
        policies=tuple(part() for _ in range(3)),
        outputs=tuple(part() for _ in range(4)),
    )
    column = costs.column(name, exits)
    parts = np.array([[column.reached(), column.heads, column.policies, column.outputs]])
    kind = MEAN if column.per_image else WHOLE_SUM if column.combine == "sum" else WHOLE_MAX
    for chosen in ([0], [4], [0, 2], [0, 1, 3], [1, 3, 4]):
        # Of the search's arrays the rule reads two. A type of the test's own would lie in numba's cache, where other
        # processes could not read it.
        arrays = Arrays(*[np.zeros(0)] * len(Arrays._fields))._replace(parts=parts, kinds=np.array([kind]))
        out = leaving_costs(arrays, np.array(chosen))
        assert out[0].tolist() == costs.column(name, [exits[p] for p in chosen]).leaving().tolist()
