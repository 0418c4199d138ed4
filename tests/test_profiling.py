"""The cost table against the workload of the whole model and of what an exit runs."""

import pytest
import torch
from torch import Tensor, nn

from messnet.instance import Exit
from messnet.network.exit_head import HeadConfig
from messnet.network.multi_exit import MultiExitNet, convert
from messnet.network.zoo import mobilenetv2_fcn
from messnet.profiling import profile
from messnet.tables import CostTable
from messnet.workload import count_module

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
