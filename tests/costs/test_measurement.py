"""The check of the additive model, against sessions whose latency is known."""

from __future__ import annotations

from typing import Any

import pytest
from numpy.typing import NDArray

from messnet.costs.latency import LatencyOptions
from messnet.deployment.measurement import check_additivity, measure_heads, measure_session
from messnet.deployment.session import Session
from messnet.deployment.torch_runner import TorchRunner
from messnet.network.multi_exit import MultiExitNet
from messnet.policy.policy import Policy
from messnet.profiling import profile
from messnet.records.costs import CostTable
from messnet.records.instance import Exit, ExitChoice, Instance

OPTIONS = LatencyOptions(repeats=1, threads=1)
SIZE = (64, 80)


@pytest.fixture(scope="module")
def costs(small_net: MultiExitNet) -> CostTable:
    return profile(small_net, SIZE, latency=OPTIONS)


def test_a_session_that_takes_what_its_parts_take(small_net: MultiExitNet, costs: CostTable) -> None:
    seen: list[tuple[Instance, int]] = []

    class Adding:
        """Part by part, and a tenth of it more."""

        def __init__(self, net: Any, instance: Instance, device: str) -> None:
            self.instance = instance

        def predict(self, images: list[NDArray[Any]]) -> list[Any]:
            self.latency_ms, segment = 0.0, 0
            assert images[0].shape == (*SIZE, 3)
            for choice in self.instance.exits:
                while segment <= choice.exit_index:
                    self.latency_ms += costs.segments[segment].latency_ms or 0
                    segment += 1
                self.latency_ms += costs.heads[choice.exit].latency_ms or 0
                if choice is not self.instance.exits[-1]:
                    self.latency_ms += costs.policies[choice.exit_index].latency_ms or 0
                if choice.image_threshold in (None, 0.0):
                    break
            self.latency_ms = 1.1 * (self.latency_ms + (costs.outputs[choice.exit_index].latency_ms or 0))
            seen.append((self.instance, choice.exit_index))
            return [self]

    found = check_additivity(small_net, costs, OPTIONS, num_instances=40, open_session=Adding)
    assert found["num_instances"] == 40
    assert found["median_error"] == pytest.approx(0.1 / 1.1, rel=1e-3)
    assert found["worst_error"] == pytest.approx(0.1 / 1.1, rel=1e-3)
    assert {stop for _, stop in seen} == {0, 1, 2, 3}
    assert {len(instance.exits) for instance, _ in seen} == {1, 2, 3, 4}
    assert {choice.exit for instance, _ in seen for choice in instance.exits} == set(costs.heads)
    indices = [[choice.exit_index for choice in instance.exits] for instance, _ in seen]
    assert all(row == sorted(set(row)) for row in indices)


def test_sessions_stop_where_they_are_told(small_net: MultiExitNet, costs: CostTable) -> None:
    stops = []

    class Watched(Session):
        def predict(self, images: Any) -> Any:
            results = super().predict(images)
            told = next(choice for choice in self.instance.exits if choice.image_threshold in (None, 0.0))
            stops.append((results[0].exit_index, told.exit_index))
            return results

    found = check_additivity(
        small_net,
        costs,
        OPTIONS,
        num_instances=10,
        open_session=lambda net, one, device: Watched(net, one, device=device),
    )
    assert all(stopped == told for stopped, told in stops)
    assert len(set(stops)) > 1
    assert 0 <= found["median_error"] <= found["worst_error"]


def test_a_session_is_measured_step_by_step(small_net: MultiExitNet, costs: CostTable) -> None:
    now = [0.0]

    class Timed(TorchRunner):
        """Segments take 10 ms, a head 3, a decision 1, labels 2."""

        def advance(self, live: Any, exit: Exit, **how: Any) -> Any:
            now[0] += (10 + 3 * how["logits"] + (how["pixel_threshold"] is not None)) / 1000
            return super().advance(live, exit, **how)

        def labels(self, *given: Any) -> Any:
            now[0] += 0.002
            return super().labels(*given)

    head = small_net.exits[0].head
    choices = (*(ExitChoice(exit_index=e, head=head) for e in (0, 2)), ExitChoice(exit_index=3, head="final"))
    session = Session(Timed(small_net, Policy()), Instance(name="any", setting="anytime", exits=choices))
    table = measure_session(session, costs, OPTIONS, clock=lambda: now[0])
    for name in ("latency_ms", "latency_p95_ms"):
        column = table.column(name, [choice.exit for choice in choices])  # type: ignore[arg-type]
        assert column.segments.tolist() == pytest.approx([10, 0, 10, 13], abs=1e-3)
        assert column.heads.tolist() == pytest.approx([3, 3, 0], abs=1e-3)
        assert column.policies.tolist() == pytest.approx([1, 1, 0], abs=1e-3)
        assert column.leaving().tolist() == pytest.approx([16, 30, 43], abs=1e-3)
    assert table.conditions == {**session.runner.conditions, "batch": 1}
    assert [part.macs for part in table.segments] == [part.macs for part in costs.segments]
    assert set(table.heads) == {choice.exit for choice in choices}


def test_every_head_is_measured_in_a_runtime_of_graphs(small_net: MultiExitNet, costs: CostTable) -> None:
    """By a clock that only the parts move: segments take 10 ms, a decision 1, labels 2, each head its own time."""
    now, asked = [0.0], []
    takes = {exit: 3.0 + number for number, exit in enumerate(small_net.exits)}

    class Timed(TorchRunner):
        def advance(self, live: Any, exit: Exit, **how: Any) -> Any:
            now[0] += (10 + takes[exit] * how["logits"] + (how["pixel_threshold"] is not None)) / 1000
            return super().advance(live, exit, **how)

        def labels(self, *given: Any) -> Any:
            now[0] += 0.002
            return super().labels(*given)

    def runner(net: MultiExitNet, instance: Instance, size: tuple[int, int], **how: Any) -> TorchRunner:
        asked.append((size, how))
        return Timed(net, Policy.parse(instance.policy))

    table = measure_heads(
        small_net,
        costs,
        OPTIONS,
        runtime="onnxruntime",
        policy="entropy+native",
        make_runner=runner,
        clock=lambda: now[0],
    )
    assert set(asked[0][1].items()) == {("runtime", "onnxruntime"), ("precision", "f32"), ("threads", 1)}
    assert asked[0][0] == SIZE
    final = small_net.exits[-1]
    assert len(small_net.exits) > len(small_net.exit_points)  # several heads at an exit point
    assert {exit: part.latency_ms for exit, part in table.heads.items()} == pytest.approx(
        {exit: 0.0 if exit == final else ms for exit, ms in takes.items()}, abs=1e-6
    )
    segments = [part.latency_ms for part in table.segments]
    assert segments == pytest.approx([10.0] * (len(segments) - 1) + [10 + takes[final]])
    assert [part.latency_ms for part in table.policies] == pytest.approx([1.0] * len(table.policies))
    assert [part.latency_ms for part in table.outputs] == pytest.approx([2.0] * len(table.outputs))
    assert [part.macs for part in table.heads.values()] == [costs.heads[exit].macs for exit in table.heads]
