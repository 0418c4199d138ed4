"""Multiply-accumulates in closed form, operator by operator."""

import pytest
import torch
from torch import Tensor, fx, nn

from messnet.workload import Workload, count_module, count_nodes, output_shape

N, C, H, W = 3, 8, 10, 12
ELEMENTS = N * C * H * W


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return (tokens @ tokens.transpose(1, 2)).softmax(-1) @ tokens


class GlobalMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


@pytest.mark.parametrize(
    ("module", "macs"),
    [
        (nn.Conv2d(C, 16, 1), ELEMENTS * 16),
        (nn.Conv2d(C, 16, 3, padding=1, bias=False), ELEMENTS * 16 * 9),
        (nn.Conv2d(C, 16, 3, padding=4, dilation=4), ELEMENTS * 16 * 9),
        (nn.Conv2d(C, 16, (3, 5), stride=2), N * 16 * 4 * 4 * C * 15),
        (nn.Conv2d(C, 16, 3, padding=1, groups=4), ELEMENTS * 16 * 9 / 4),
        (nn.Conv2d(C, C, 3, padding=1, groups=C), ELEMENTS * 9),
        (nn.ConvTranspose2d(C, 16, 2, stride=2), ELEMENTS * 16 * 4),
        (nn.Linear(W, 5), N * C * H * W * 5),
        (Attention(), 2 * N * (H * W) ** 2 * C),
    ],
    ids=lambda value: repr(value) if isinstance(value, nn.Module) else "",
)
def test_matmul_like_operators_count_in_both_conventions(module: nn.Module, macs: float) -> None:
    assert count_module(module, (N, C, H, W)) == Workload(macs, macs)


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        (nn.BatchNorm2d(C), 2 * ELEMENTS),
        (nn.BatchNorm2d(C, affine=False), 2 * ELEMENTS),
        (nn.AdaptiveAvgPool2d(1), ELEMENTS),
        (GlobalMean(), ELEMENTS),
        *[(m, 0) for m in (nn.ReLU(), nn.MaxPool2d(2), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Softmax(1))],
    ],
    ids=lambda value: repr(value) if isinstance(value, nn.Module) else "",
)
def test_normalisation_and_global_pooling_count_in_the_papers_convention_only(module: nn.Module, extra: float) -> None:
    assert count_module(module, (N, C, H, W)) == Workload(0, extra)


def test_counting_leaves_the_module_as_it_is() -> None:
    module = nn.Sequential(nn.Conv2d(C, 4, 1), nn.BatchNorm2d(4), nn.Dropout()).train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    count_module(module, (N, C, H, W))
    assert output_shape(module, (N, C, H, W)) == (N, 4, H, W)
    assert all(m.training for m in module.modules())
    assert all(p.requires_grad and p.device.type == "cpu" for p in module.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_nodes_sum_to_the_module() -> None:
    module = nn.Sequential(
        nn.Conv2d(C, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 2, 1)
    )
    nodes = count_nodes(fx.symbolic_trace(module), (N, C, H, W))
    total = Workload(*(sum(values) for values in zip(*(workload for workload, _ in nodes.values()), strict=True)))
    assert total == count_module(module, (N, C, H, W)) != (0, 0)
    assert nodes["_0"][1].shape == (N, 4, H - 2, W - 2)
    assert nodes["_0"][1].is_meta
