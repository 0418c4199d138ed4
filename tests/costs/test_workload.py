"""Multiply-accumulates in closed form, operator by operator; memory in closed form, tensor by tensor."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, fx, nn

from messnet.costs.workload import (
    UncopyableError,
    Workload,
    copy_module,
    count_module,
    count_nodes,
    metering,
    shadow,
)

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


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_memory_of_a_chain_of_convolutions(dtype: torch.dtype, size: int) -> None:
    channels = [3, 16, 4, 32, 8]
    chain = nn.Sequential(*(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(channels)))
    copied = shadow(chain.to(dtype))
    with torch.no_grad(), metering() as meter:
        x = meta(N, 3, H, W, dtype=dtype)
        with meter.part("chain"):
            y = copied(x)
        with meter.part("nothing"):
            pass
        del x
        with meter.part("sum"):
            y + y
    plane = N * H * W * size
    pairs = [a + b for a, b in pairwise(channels[1:])]  # in and out of a convolution
    assert meter.counts["chain"].memory_bytes == plane * (3 + max(pairs))  # the caller holds the input
    assert meter.counts["nothing"].memory_bytes == plane * (3 + 8)
    assert meter.counts["sum"].memory_bytes == plane * (8 + 8)


def test_views_and_in_place_operators_take_no_memory() -> None:
    with torch.no_grad(), metering() as meter:
        x = meta(N, C, H, W)
        with meter.part("free"):
            x.relu_().add_(1)
            y = x.flatten(1).view(N, C, H, W)[:, :2].transpose(2, 3)
        with meter.part("skip"):
            z = torch.cat([x, torch.relu(x)], 1)
    assert meter.counts["free"].memory_bytes == 4 * ELEMENTS
    assert meter.counts["skip"].memory_bytes == 4 * (ELEMENTS + ELEMENTS + 2 * ELEMENTS)
    assert meter.counts["free"].uncounted == {"relu_": 1, "add_": 1}
    assert meter.counts["skip"].uncounted == {"relu": 1, "cat": 1}
    assert y.shape == (N, 2, W, H)
    assert z.shape == (N, 2 * C, H, W)


def test_operators_of_a_part() -> None:
    conv, linear = nn.Conv2d(C, 4, 1).to("meta"), nn.Linear(W, 5, bias=False).to("meta")
    with torch.no_grad(), metering() as meter:
        x = meta(N, C, H, W)
        with meter.part("first"):
            y = conv(conv(x).repeat_interleave(2, 1))
        with meter.part("second"):
            torch.relu(linear(y.mean((2,), keepdim=True)))
    first, second = meter.counts["first"], meter.counts["second"]
    assert first.operators == {"convolution": 2 * ELEMENTS * 4}
    assert first.workload == Workload(2 * ELEMENTS * 4, 2 * ELEMENTS * 4)
    assert second.operators == {"mm": N * 4 * W * 5}
    assert second.workload == Workload(N * 4 * W * 5, N * 4 * W * 5 + N * 4 * H * W)
    assert second.uncounted == {"mean": 1, "relu": 1}


def test_a_module_computes_in_its_own_dtype() -> None:
    module = nn.Sequential(nn.Conv2d(C, 4, 3), nn.BatchNorm2d(4)).to(torch.bfloat16)
    assert count_module(module, (N, C, H, W)).macs == N * 8 * 10 * 4 * C * 9
    nodes = count_nodes(fx.symbolic_trace(module), (N, C, H, W))
    assert nodes["_1"][1].dtype == torch.bfloat16


def test_a_copy_shares_what_is_not_converted() -> None:
    module = nn.Sequential(nn.Conv2d(C, 4, 1), nn.BatchNorm2d(4)).train()
    copied = copy_module(module, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    assert not any(m.training for m in copied.modules())
    assert all(m.training for m in module.modules())
    assert copied[0].weight.dtype == torch.float64
    assert copied[1].num_batches_tracked.data_ptr() == module[1].num_batches_tracked.data_ptr()
    assert not any(p.requires_grad for p in copied.parameters())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in module.parameters())


LENGTH, WIDTH = 60, 8  # of tokens


class Queries(nn.Module):
    """Attention as PyTorch fuses it: one operator on a processor, products elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)


class Distances(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, x)


@pytest.mark.parametrize(
    ("module", "shape", "macs"),
    [
        (Queries(), (2, 3, LENGTH, WIDTH), 2 * 2 * 3 * LENGTH**2 * WIDTH),
        (nn.MultiheadAttention(WIDTH, 2, batch_first=True), (1, LENGTH, WIDTH), None),
        (nn.TransformerEncoderLayer(WIDTH, 2, batch_first=True), (1, LENGTH, WIDTH), None),
        (nn.LSTM(WIDTH, 5), (LENGTH, 2, WIDTH), LENGTH * 2 * 4 * 5 * (WIDTH + 5)),
        (nn.GRU(WIDTH, 5), (LENGTH, 2, WIDTH), LENGTH * 2 * 3 * 5 * (WIDTH + 5)),
        (Distances(), (2, LENGTH, WIDTH), 2 * LENGTH**2 * WIDTH),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_every_device_counts_alike(module: nn.Module, shape: tuple[int, ...], macs: float | None) -> None:
    """What a device makes of an operator does not change its work."""
    inputs = 3 if isinstance(module, nn.MultiheadAttention) else 1
    if isinstance(module, nn.MultiheadAttention):
        macs = 4 * LENGTH * WIDTH**2 + 2 * LENGTH**2 * WIDTH
    if isinstance(module, nn.TransformerEncoderLayer):
        hidden = module.linear1.out_features
        macs = 4 * LENGTH * WIDTH**2 + 2 * LENGTH**2 * WIDTH + 2 * LENGTH * WIDTH * hidden
    for device in ("cpu", "meta"):
        with torch.no_grad(), metering() as meter, meter.part("it"):
            module.eval().to_empty(device=device)(*[torch.zeros(shape, device=device)] * inputs)
        assert meter.counts["it"].workload.macs == macs, device


def test_a_copy_has_what_modules_hold_besides_parameters() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(C, C, 1)
            self.kernel, self.kept = torch.ones(C, 1, 1), {"low": [self.conv(torch.ones(1, C, 2, 2))]}

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) * self.kernel

    module = Holder()
    copied = copy_module(module, lambda tensor: tensor.double())
    assert copied.kernel.dtype == copied.kept["low"][0].dtype == torch.float64
    assert module.kernel.dtype == torch.float32
    assert count_module(module, (N, C, H, W)) == Workload(ELEMENTS * C, ELEMENTS * C)


def test_a_module_whose_hook_keeps_features_is_not_copied() -> None:
    kept: list[Tensor] = []
    module = nn.Sequential(nn.Conv2d(C, C, 1), nn.ReLU())
    module[0].register_forward_hook(lambda _, __, output: kept.append(output))
    with pytest.raises(UncopyableError, match="0 has a forward hook, which may keep what it sees in the original"):
        copy_module(module, lambda tensor: tensor)
    graph = fx.symbolic_trace(module)  # in a graph nothing can read what it keeps
    assert not copy_module(graph, lambda tensor: tensor).get_submodule("0")._forward_hooks
    assert count_nodes(graph, (N, C, H, W))["_0"][0].macs == ELEMENTS * C
    assert len(graph.get_submodule("0")._forward_hooks) == 1
