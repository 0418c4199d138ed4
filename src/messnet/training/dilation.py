"""A fast backward pass of dilated depthwise convolutions on a CPU.

oneDNN's fast kernel knows no dilation: with it the two gradients take some eight times as long. Both can be had from
fast kernels, equal but for rounding; a step of MobileNetV2 at output stride 8 becomes about 1.15 times as fast.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["fast_dilation"]


def fast_dilation(device: torch.device) -> AbstractContextManager[object]:
    """While it lasts, depthwise convolutions that are dilated, keep the size and run in float32 on a CPU have the fast
    backward pass; their forward pass is the same to the bit. Elsewhere it does nothing."""
    return _FastDilation() if device.type == "cpu" else nullcontext()


class _FastDilation(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.conv2d and not kwargs and _is_slow(*args):
            return _Depthwise.apply(args[0], args[1], args[5][0])
        return func(*args, **(kwargs or {}))


def _is_slow(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> bool:
    """As ``nn.Conv2d`` gives them: pairs. Odd square kernel, one dilation for both directions."""
    kernel = weight.shape[-1]
    return (
        groups == x.shape[1] == len(weight)
        and bias is None
        and isinstance(dilation, tuple)
        and dilation[0] == dilation[1] > 1
        and tuple(stride) == (1, 1)
        and weight.shape[-2] == kernel
        and kernel % 2 == 1
        and tuple(padding) == (dilation[0] * (kernel // 2),) * 2
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
    )


class _Depthwise(torch.autograd.Function):
    """y[c] = x[c] * w[c], dilated: (N, C, H, W), (C, 1, k, k), dilation -> (N, C, H, W)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dilation: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dilation = dilation
        return F.conv2d(x, weight, None, 1, dilation * (weight.shape[-1] // 2), dilation, len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        dilation, radius, groups = ctx.dilation, weight.shape[-1] // 2, len(weight)
        grad = grad.contiguous(memory_format=torch.channels_last)
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:  # the forward pass of the kernel turned round
            of_x = F.conv2d(grad, weight.flip(2, 3), None, 1, dilation * radius, dilation, groups)
        if ctx.needs_input_grad[1]:  # each of the dilation^2 interleaved images sees an undilated convolution
            x, grad = _interleaved(x, dilation), _interleaved(grad, dilation)
            of_weight = torch.ops.aten.convolution_backward(
                grad, x, weight, None, (1, 1), (radius, radius), (1, 1), False, (0, 0), groups, (False, True, False)
            )[1]
        return of_x, of_weight, None


def _interleaved(x: Tensor, step: int) -> Tensor:
    """(N, C, H, W) to (step^2 * N, C, ceil(H / step), ceil(W / step)): every step-th pixel, from each start; zeros
    where a row or column ends early. Channels last."""
    batch, channels, height, width = x.shape
    rows, columns = -(-height // step), -(-width // step)
    x = x.permute(0, 2, 3, 1)
    parts = x.new_zeros(step, step, batch, rows, columns, channels)
    for i in range(step):
        for j in range(step):
            part = x[:, i::step, j::step]
            parts[i, j, :, : part.shape[1], : part.shape[2]] = part
    return parts.view(step**2 * batch, rows, columns, channels).permute(0, 3, 1, 2)
