"""The fast backward pass of dilated depthwise convolutions against torch's own in float64."""

import pytest
import torch
from torch import nn

from messnet.training.dilation import fast_dilation

CPU = torch.device("cpu")


def gradients(convolution: nn.Conv2d, x: torch.Tensor, *, fast: bool) -> tuple[torch.Tensor, list[torch.Tensor], str]:
    x = x.clone().to(memory_format=torch.channels_last).requires_grad_()
    with fast_dilation(CPU if fast else torch.device("meta")):
        y = convolution(x)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    return y.detach(), list(torch.autograd.grad((y * weights).sum(), [x, convolution.weight])), type(y.grad_fn).__name__


@pytest.mark.parametrize(
    ("kernel", "dilation", "size"), [(3, 2, (7, 10)), (3, 4, (9, 6)), (5, 3, (12, 12)), (3, 6, (4, 5))]
)
def test_gradients_are_those_of_torch(kernel: int, dilation: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(6, 6, kernel, padding=dilation * (kernel // 2), dilation=dilation, groups=6, bias=False)
    x = torch.randn(3, 6, *size)
    plain, _, _ = gradients(convolution, x, fast=False)
    y, fast, kind = gradients(convolution, x, fast=True)
    assert kind == "_DepthwiseBackward"
    assert torch.equal(y, plain)  # the forward pass to the bit
    _, exact, _ = gradients(convolution.double(), x.double(), fast=False)
    for ours, expected in zip(fast, exact, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "other",
    [
        {"dilation": 1, "padding": 1},
        {"stride": 2},
        {"padding": 0},
        {"bias": True},
        {"groups": 3},
        {"dilation": (2, 1)},
        {"kernel_size": (3, 1), "padding": (2, 0)},
        {"padding": "same"},
        {"dtype": torch.float64},
    ],
)
def test_any_other_convolution_is_torchs_own(other: dict[str, object]) -> None:
    usual = {"kernel_size": 3, "dilation": 2, "padding": 2, "groups": 6, "bias": False, "dtype": torch.float32}
    convolution = nn.Conv2d(6, 6, **(usual | other))
    _, _, kind = gradients(convolution, torch.randn(2, 6, 8, 8, dtype=convolution.weight.dtype), fast=True)
    assert kind == "ConvolutionBackward0"


def test_autocast_keeps_its_own_kernels() -> None:
    convolution = nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=6, bias=False)
    with fast_dilation(CPU), torch.autocast("cpu", torch.bfloat16):
        y = convolution(torch.randn(2, 6, 8, 8))
    assert y.dtype == torch.bfloat16
    assert type(y.grad_fn).__name__ == "ConvolutionBackward0"
