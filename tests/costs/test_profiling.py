"""The cost table against the workload of the whole model and of what an exit runs."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from messnet.costs.latency import LatencyOptions
from messnet.costs.workload import count_module
from messnet.errors import ModelError, RunError
from messnet.network.head_space import HeadConfig
from messnet.network.multi_exit import MultiExitNet, convert
from messnet.network.zoo import mobilenetv2_fcn
from messnet.profiling import profile
from messnet.records.costs import CostTable
from messnet.records.instance import Exit

SIZE = (72, 96)


class UntilExit(nn.Module):
    def __init__(self, net: MultiExitNet, exit: Exit) -> None:
        super().__init__()
        self.net, self.exit = net, exit

    def forward(self, x: Tensor) -> Tensor:
        return self.net.run_until(x, *self.exit)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return mobilenetv2_fcn(5, width=0.25, depth=0.5)


@pytest.fixture(scope="module")
def net(model: nn.Module) -> MultiExitNet:
    net = convert(model, torch.zeros(1, 3, 64, 80), num_exits=4)
    net.add_head(0, HeadConfig(2, 1, True, "deeplabv3"))
    net.add_head(1, HeadConfig())
    return net


@pytest.fixture(scope="module")
def costs(net: MultiExitNet) -> CostTable:
    return profile(net, SIZE, model="tiny")


def test_the_whole_is_the_users_model(model: nn.Module, costs: CostTable) -> None:
    workload = count_module(model, (1, 3, *SIZE))
    assert costs.total_macs("conv") == workload.macs > 0
    assert costs.total_macs("paper") == workload.macs_paper > workload.macs
    parameters = sum(part.parameters for part in (*costs.segments, costs.heads[costs.final_exit]))
    assert parameters == sum(p.numel() for p in model.parameters())


def test_segments_and_head_are_what_an_exit_costs(net: MultiExitNet, costs: CostTable) -> None:
    assert tuple(costs.heads) == net.exits
    for exit in net.exits:
        workload = count_module(UntilExit(net, exit), (1, 3, *SIZE))
        for name in ("macs", "macs_paper"):
            column = costs.column(name, [exit])
            assert column.prefix(exit.exit_index) + column.heads[0] == getattr(workload, name)


def test_the_operators_are_the_users_models(model: nn.Module, costs: CostTable) -> None:
    assert costs.operators == {"convolution": costs.total_macs()}
    layers = Counter(type(module) for module in model.modules())
    assert sum(calls for name, calls in costs.uncounted.items() if "batch_norm" in name) == layers[nn.BatchNorm2d]
    assert costs.uncounted["hardtanh_"] == layers[nn.ReLU6]


def test_decisions_and_outputs_are_parts(net: MultiExitNet, costs: CostTable) -> None:
    assert len(costs.policies) == net.num_exits - 1
    assert len(costs.outputs) == net.num_exits
    assert {(part.macs, part.macs_paper, part.parameters) for part in (*costs.policies, *costs.outputs)} == {(0, 0, 0)}
    upsampled = 5 * SIZE[0] * SIZE[1] * 4
    assert all(part.memory_bytes > upsampled for part in costs.outputs)


def test_memory_is_at_least_what_enters_and_leaves(net: MultiExitNet, costs: CostTable) -> None:
    state, entering = None, 3 * SIZE[0] * SIZE[1]
    for segment, state in zip(costs.segments, net.eval().states(torch.zeros(1, 3, *SIZE)), strict=True):
        assert segment.memory_bytes >= 4 * (entering + state.features.numel())
        entering = state.features.numel()
    for part, double in zip(costs.segments, profile(net, SIZE, latency=options(batch=2)).segments, strict=True):
        assert (double.macs, double.macs_paper) == (part.macs, part.macs_paper)  # of one image
        assert double.memory_bytes == pytest.approx(2 * part.memory_bytes, rel=0.01)  # of the batch
    for part, half in zip(costs.segments, profile(net, SIZE, latency=options(dtype="bfloat16")).segments, strict=True):
        assert half.memory_bytes == pytest.approx(part.memory_bytes / 2, rel=0.01)


def options(**changes: Any) -> LatencyOptions:
    return LatencyOptions(**{"repeats": 1, "threads": 1, **changes})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_measured_parts(net: MultiExitNet, costs: CostTable, dtype: str) -> None:
    net.train()
    threads, before = torch.get_num_threads(), {name: tensor.clone() for name, tensor in net.state_dict().items()}
    strides = {name: tensor.stride() for name, tensor in net.state_dict().items()}
    measured = profile(net, SIZE, model="tiny", latency=options(dtype=dtype, repeats=2))
    assert torch.get_num_threads() == threads
    assert all(module.training for module in net.modules())
    for name, tensor in net.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert tensor.stride() == strides[name]
        assert torch.equal(tensor, before[name])

    assert {key: measured.conditions[key] for key in ("batch", "dtype", "threads")} == {
        "batch": 1,
        "dtype": dtype,
        "threads": 1,
    }
    assert measured.conditions["runtime"] == f"torch {torch.__version__} eager"
    for part in (*measured.segments, *measured.heads.values(), *measured.policies, *measured.outputs):
        assert part.latency_ms is not None
        assert part.latency_p95_ms is not None
        assert 0 < part.latency_ms <= part.latency_p95_ms
    assert tuple(measured.heads) == net.exits
    assert [part.macs for part in measured.segments] == [part.macs for part in costs.segments]
    assert CostTable.from_json(measured.to_json()) == measured


def test_nothing_is_measured_unless_asked_for(costs: CostTable) -> None:
    assert costs.conditions == costs.additivity == {}
    assert costs.segments[0].latency_ms is None
    with pytest.raises(RunError, match="no latency_ms"):
        costs.total("latency_ms")


def test_a_network_without_heads(model: nn.Module) -> None:
    bare = profile(convert(model, torch.zeros(1, 3, 64, 80), num_exits=3), SIZE, latency=options())
    assert list(bare.heads) == [Exit(2, "final")]
    assert [len(bare.segments), len(bare.policies), len(bare.outputs)] == [3, 2, 3]
    assert all(part.latency_ms for part in (*bare.policies, *bare.outputs))


def test_profiling_changes_nothing(net: MultiExitNet) -> None:
    net.train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    first = profile(net, SIZE)
    assert all(module.training for module in net.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert profile(net.eval(), SIZE) == first  # of one forward pass in eval mode, whatever the mode


def test_the_table_is_a_file(costs: CostTable) -> None:
    assert costs.model == "tiny"
    assert costs.input_size == SIZE
    assert CostTable.from_json(costs.to_json()) == costs


class Glancing(nn.Module):
    """Its way depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.classifier = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x))
        return self.classifier(x if x.isfinite().all() else x.nan_to_num())


def test_a_model_that_looks_at_values(model: nn.Module) -> None:
    net = convert(Glancing(), torch.zeros(1, 3, 64, 80), exit_points=["stem"])
    exit = net.add_head(0, HeadConfig())
    costs = profile(net, SIZE, latency=options())
    plane = SIZE[0] * SIZE[1] / 4
    assert [part.macs for part in costs.segments] == [plane * 9 * 3 * 8, plane * (9 * 8 * 8 + 8 * 5)]
    assert costs.heads[exit].macs == count_module(net.head(exit), (1, 8, SIZE[0] // 2, SIZE[1] // 2)).macs
    assert costs.segments[0].memory_bytes >= 4 * (3 * 4 + 8) * plane


def test_a_plain_model_is_converted(model: nn.Module) -> None:
    whole = profile(model, (64, 80), model="plain")
    assert len(whole.segments) == 6
    assert whole.total_macs() == pytest.approx(count_module(model, (1, 3, 64, 80)).macs)
    with pytest.raises(ModelError):
        profile(nn.Conv2d(3, 2, 1), (64, 80))
