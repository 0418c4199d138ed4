"""Measuring: what is recorded and put back. How long anything takes is never asserted."""

from __future__ import annotations

import time

import pytest
import torch
from torch import fx, nn

from messnet.costs.latency import LatencyOptions, Stopwatch, node_latencies, num_threads
from messnet.errors import RecipeError

QUICK = LatencyOptions(repeats=5, max_seconds=1)


def test_laps_are_summarised() -> None:
    watch = Stopwatch("cpu")
    watch.laps["a"] = [float(ms) for ms in range(1, 102)]
    assert watch.median("a") == 51
    assert watch.p95("a") == 96
    with watch.lap("b"):
        time.sleep(0.01)
    assert watch.median("b") >= 10


def test_rounds_are_warm_and_bounded() -> None:
    now = 0.0

    def once(seconds: float) -> None:
        nonlocal now
        with watch.lap("lap"):
            now += seconds
        calls.append(seconds)

    calls: list[float] = []
    watch = Stopwatch("cpu", clock=lambda: now)
    watch.repeat(lambda: once(0.001), QUICK, desc="test")
    assert watch.laps["lap"] == pytest.approx([1.0] * 5)
    assert len(calls) == 7  # two to warm up
    watch.repeat(lambda: once(0.02), LatencyOptions(max_seconds=0.001), desc="test")
    assert len(watch.laps["lap"]) == 3  # of those before none is left
    assert len(calls) == 7 + 1 + 3


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with num_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    with num_threads(None):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before


def test_conditions_and_name() -> None:
    options = LatencyOptions(threads=3, dtype="bfloat16", batch=4)
    assert options.name == "cpu-3threads-bfloat16-b4"
    assert options.conditions["threads"] == 3
    assert options.conditions["device"]
    assert LatencyOptions().conditions["threads"] == torch.get_num_threads()


def test_conversion() -> None:
    options = LatencyOptions(dtype="bfloat16")
    converted = options.convert(torch.zeros(2, 3, 4, 5))
    assert converted.dtype == torch.bfloat16
    assert converted.is_contiguous(memory_format=torch.channels_last)
    assert options.convert(torch.zeros((), dtype=torch.int64)).dtype == torch.int64
    done = LatencyOptions().convert(torch.zeros(2, 3, 4, 5))
    assert LatencyOptions().convert(done).data_ptr() == done.data_ptr()


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"dtype": "int4"}, "expected one of float32, bfloat16, float16, int8"),
        ({"batch": 0}, "at least 1"),
        ({"threads": 0}, "at least 1"),
        pytest.param(
            {"device": "cuda"}, "use cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
        ),
    ],
    ids=str,
)
def test_what_cannot_be_measured(option: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        LatencyOptions(**option)  # type: ignore[arg-type]


def test_every_node_is_timed() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU()).train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    traced = fx.symbolic_trace(module)
    latency_ms = node_latencies(traced, torch.rand(2, 3, 8, 8), repeats=2)
    assert list(latency_ms) == [node.name for node in traced.graph.nodes]
    assert all(ms > 0 for ms in latency_ms.values())
    assert all(m.training for m in module.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_torch_computes_nothing_in_int8() -> None:
    with pytest.raises(RecipeError, match="torch has no precision 'int8': measure it with --runtime onnxruntime"):
        LatencyOptions(dtype="int8").convert(torch.zeros(1))
