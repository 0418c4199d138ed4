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


def fast_dilation(device: torch.device) -> AbstractContextManager[object]:
    """While it lasts, depthwise convolutions that are dilated, keep the size and run in float32 on a CPU have the fast
    backward pass; their forward pass is the same to the bit. Elsewhere it does nothing."""
    return _FastDilation() if device.type == "cpu" else nullcontext()


class _FastDilation(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        # nn.Conv2d passes everything by position; a call with keywords is somebody else's, and is left as it is.
        if func is torch.conv2d and not kwargs and (dilation := _slow_dilation(*args)):  # type: ignore[arg-type]
            return _Depthwise.apply(*args[:2], dilation)
        return func(*args, **(kwargs or {}))


def _slow_dilation(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: object = 1,
    padding: object = 0,
    dilation: object = 1,
    groups: int = 1,
) -> int:
    """The dilation of a convolution that has a slow backward pass and a fast one, 0 of others. The arguments are as
    ``nn.Conv2d`` gives them, pairs; the kernel is odd and square, the dilation the same in both directions."""
    kernel = weight.shape[-1]
    if not (isinstance(dilation, tuple) and dilation[0] == dilation[1] > 1):
        return 0
    is_slow = (
        groups == x.shape[1] == len(weight)
        and bias is None
        and stride == (1, 1)
        and weight.shape[-2] == kernel
        and kernel % 2 == 1
        and padding == (dilation[0] * (kernel // 2),) * 2
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        # Autocast would run the forward pass in bfloat16, and the backward pass would then meet two dtypes.
        and not torch.is_autocast_enabled("cpu")
    )
    return int(dilation[0]) if is_slow else 0


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
        # dx[p] = sum_q w[q] dy[p - q * dilation]: a convolution again, with the kernel turned round. It is dilated too,
        # but it is a forward pass, and that has a fast dilated kernel.
        if ctx.needs_input_grad[0]:
            of_x = F.conv2d(grad, weight.flip(2, 3), None, 1, dilation * radius, dilation, groups)
        # dw[q] = sum_p dy[p] x[p + q * dilation]: only pixels that are a multiple of the dilation apart meet. Each of
        # the dilation^2 interleaved images so sees an undilated convolution, and dw is the sum over them, as over a
        # batch.
        if ctx.needs_input_grad[1]:
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
