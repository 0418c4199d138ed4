"""Break-even in closed form, against the mean over images counted one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from messnet.costs.break_even import break_even, verdict
from messnet.errors import RecipeError, RunError
from messnet.records.costs import CostTable, PartCost
from messnet.records.instance import Exit
from messnet.records.names import CostName


def part(macs: float, latency_ms: float | None = None) -> PartCost:
    return PartCost(
        macs=macs, macs_paper=macs, parameters=0, memory_bytes=0, latency_ms=latency_ms, latency_p95_ms=latency_ms
    )


@pytest.fixture
def costs() -> CostTable:
    """A model of 100 in workload, of 100 ms. By workload an exit pays everywhere, in time at exit 0 only."""
    return CostTable(
        model="toy",
        input_size=(4, 6),
        segments=(part(20, 30), part(30, 40), part(40, 20)),
        heads={
            Exit(0, "dear"): part(50, 50),
            Exit(0, "cheap"): part(4, 5),
            Exit(1, "cheap"): part(8, 16),
            Exit(2, "final"): part(10, 8),
        },
        policies=(part(0, 1), part(0, 8)),
        outputs=(part(0, 4), part(0, 10), part(0, 2)),
    )


@pytest.mark.parametrize("name", ["macs", "latency_ms"])
@pytest.mark.parametrize("exit", [Exit(0, "dear"), Exit(0, "cheap"), Exit(1, "cheap")], ids=str)
def test_the_share_breaks_even(costs: CostTable, exit: Exit, name: CostName) -> None:
    def of(one: PartCost) -> float:
        return float(getattr(one, name))

    backbone = sum(of(segment) for segment in costs.segments[: exit.exit_index + 1])
    step = of(costs.heads[exit]) + of(costs.policies[exit.exit_index])
    leaves = backbone + step + of(costs.outputs[exit.exit_index])
    model = sum(map(of, costs.segments)) + of(costs.heads[Exit(2, "final")]) + of(costs.outputs[2])
    assert model == 100
    found = break_even(costs, exit, name)
    assert found.share * leaves + (1 - found.share) * (model + step) == pytest.approx(model)
    assert found.saving == pytest.approx(1 - leaves / model)
    assert found.surcharge == pytest.approx(step / model)
    assert found.cut == pytest.approx((leaves - of(costs.policies[exit.exit_index])) / model)
    assert found.pays == (found.saving > 0)  # if all leave


def test_an_exit_behind_which_nothing_is_left(costs: CostTable) -> None:
    costs = replace(
        costs, segments=(*costs.segments[:2], part(0, 0)), heads={**costs.heads, Exit(2, "final"): part(0, 0)}
    )
    found = break_even(costs, Exit(1, "cheap"))
    assert found.share == float("inf")
    assert not found.pays
    assert "exit 1 (cheap): the model cut here costs 1.16x; an image that leaves loses 16%" in verdict(costs)[1]


def test_words(costs: CostTable) -> None:
    assert verdict(costs) == [
        "exit 0 (cheap): the model cut here costs 0.24x; an image that leaves saves 76%, one that goes on pays 4.0% "
        "more: pays once 5.0% of the images leave",
        "exit 1 (cheap): the model cut here costs 0.58x; an image that leaves saves 42%, one that goes on pays 8.0% "
        "more: pays once 16.0% of the images leave",
        "an early exit can save at most 76% in workload, if every image left at exit 0; the model cut there, which "
        "decides nothing, saves 76%",
    ]
    words = verdict(costs, "latency_ms")
    assert words[0].startswith("exit 0 (cheap): the model cut here costs 0.39x; an image that leaves saves 60%")
    assert words[1].endswith("loses 4%, one that goes on pays 24.0% more: never pays on this device")
    assert words[2].startswith("an early exit can save at most 60% on this device")
    assert words[2].endswith("saves 61%")
    assert words[3:] == [
        "workload says otherwise of exit 0: cut here 0.24x, not 0.39x",
        "workload says otherwise of exit 1: cut here 0.58x, not 0.96x, and an early exit pays",
    ]


def test_nothing_pays(costs: CostTable) -> None:
    slow = replace(costs, policies=(part(0, 90), part(0, 90)))
    assert "no early exit ever pays on this device" in verdict(slow, "latency_ms")[2]
    as_counted = replace(costs, segments=(part(20, 20), part(30, 30), part(40, 40)), policies=(part(0, 0),) * 2)
    assert "workload agrees" in verdict(replace(as_counted, outputs=(part(0, 0),) * 3), "latency_ms")[-1]
    bare = replace(costs, heads={Exit(2, "final"): part(10, 8)})
    assert verdict(bare) == ["no early exit has a head, so nothing can be saved"]


def test_what_has_no_verdict(costs: CostTable) -> None:
    with pytest.raises(RecipeError, match="no image pays memory_bytes: expected one of macs, "):
        verdict(costs, "memory_bytes")
    unmeasured = replace(costs, outputs=tuple(part(0) for _ in costs.outputs))
    with pytest.raises(RunError, match="--measure"):
        verdict(unmeasured, "latency_ms")
