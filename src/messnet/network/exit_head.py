"""Exit heads: from a tapped feature map to logits (docs/method.md#exit-heads)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from messnet.network.head_space import MIN_CHANNELS, HeadConfig

BlockKind = Literal["bottleneck", "inverted_residual", "residual"]

# Of the context at 1/2 and 1/4 of the exit's resolution.
_CONTEXT_CHANNELS = 96
# DeepLabV3's own width and rates: 256 channels, 12/24/36 at output stride 8.
_MAX_ASPP_CHANNELS = 256
_ASPP_RATES_AT_STRIDE_8 = (12, 24, 36)


def build_head(
    config: HeadConfig,
    *,
    channels: int,
    num_classes: int,
    dilation: int,
    output_stride: int,
    block: BlockKind,
    seed: int,
) -> nn.Sequential:
    """The head of ``config`` for a feature map (N, ``channels``, h, w): logits (N, ``num_classes``, h, w).

    ``dilation`` and ``output_stride`` are the backbone's at the exit point. The initial weights depend on ``seed`` and
    on nothing else. With rapid dilation the blocks have 2, 4, 8, ... times the backbone's dilation and an FCN head that
    of the last block; without it all have the backbone's. The rates of a DeepLabV3 head follow the output stride.
    """
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed: that would reset the random numbers of the accelerator too
        torch.default_generator.manual_seed(seed)
        layers: list[nn.Module] = []
        if config.channel_reduction > 1:
            reduced = max(channels // config.channel_reduction, MIN_CHANNELS)
            layers.append(_conv_bn(channels, reduced, 1, act=True))
            channels = reduced
        for _ in range(config.extra_blocks):
            dilation *= 2 if config.rapid_dilation else 1
            layers.append(_block(block, channels, dilation))
        if config.context:
            layers.append(Context(channels, config.context, block))
            channels = _CONTEXT_CHANNELS
        match config.segmentation_head:
            case "fcn" if config.context:
                layers.append(_light_fcn(channels, num_classes))
            case "fcn":
                layers.append(_fcn(channels, num_classes, dilation))
            case "deeplabv3":
                layers.append(_deeplabv3(channels, num_classes, output_stride))
        return nn.Sequential(*layers)


class ResidualBlock(nn.Module):
    """``layers`` beside a skip connection, with a ReLU behind their sum or without: (N, C, h, w) to the same shape."""

    def __init__(self, *layers: nn.Module, relu: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.layers(x)
        return y.relu() if self.relu else y


def _block(kind: BlockKind, channels: int, dilation: int) -> ResidualBlock:
    """ResNet's bottleneck, MobileNetV2's inverted residual (expansion 6), or ResNet's plain block; stride 1."""
    if kind == "residual":
        layers = [_conv_bn(channels, channels, 3, dilation=dilation, act=act) for act in (True, False)]
        return ResidualBlock(*layers, relu=True)
    is_inverted = kind == "inverted_residual"
    inner = 6 * channels if is_inverted else max(channels // 4, MIN_CHANNELS)
    return ResidualBlock(
        _conv_bn(channels, inner, 1, act=True),
        _conv_bn(inner, inner, 3, dilation=dilation, groups=inner if is_inverted else 1, act=True),
        _conv_bn(inner, channels, 1, act=False),
        relu=not is_inverted,  # its output is a linear bottleneck
    )


class Context(nn.Module):
    """Sight for a shallow exit: (N, ``channels``, h, w) to (N, 96, h, w), any height and width.

    The features are projected, and ``num_blocks`` of the backbone's own kind of block run at 1/2 and then at 1/4 of the
    exit's resolution; both results, and the mean of the last over the whole image, are added to the projection. Ours,
    made of what others have shown: a path of context at low resolution with a pooled global term (BiSeNet, Yu et al.,
    ECCV 2018), depthwise blocks at low resolution beside one shallow path (Fast-SCNN, Poudel et al., BMVC 2019), a
    light head on both (LR-ASPP, Howard et al., ICCV 2019).
    """

    def __init__(self, channels: int, num_blocks: int, block: BlockKind) -> None:
        super().__init__()
        self.project = _conv_bn(channels, _CONTEXT_CHANNELS, 1, act=True)
        self.at_half = nn.Sequential(*(_block(block, _CONTEXT_CHANNELS, 1) for _ in range(num_blocks)))
        self.at_quarter = nn.Sequential(*(_block(block, _CONTEXT_CHANNELS, 1) for _ in range(num_blocks)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(x)
        half: Tensor = self.at_half(_halved(x))
        quarter: Tensor = self.at_quarter(_halved(half))
        quarter = quarter + quarter.mean((2, 3), keepdim=True)
        for y in (half, quarter):
            x = x + F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)
        return x


def _halved(x: Tensor) -> Tensor:
    """Average pooling by 2, an odd last row or column repeated: (N, C, h, w) to (N, C, ceil(h / 2), ceil(w / 2))."""
    return F.avg_pool2d(F.pad(x, (0, 1, 0, 1), mode="replicate"), 2)


def _light_fcn(channels: int, num_classes: int) -> nn.Module:
    """An FCN head behind context, which has seen more than a dense 3x3 would: that one is depthwise."""
    return nn.Sequential(
        *_conv_bn(channels, channels, 3, groups=channels, act=True),
        nn.Dropout(0.1),
        nn.Conv2d(channels, num_classes, 1),
    )


def _fcn(channels: int, num_classes: int, dilation: int) -> nn.Module:
    inner = max(channels // 4, MIN_CHANNELS)
    return nn.Sequential(
        *_conv_bn(channels, inner, 3, dilation=dilation, act=True), nn.Dropout(0.1), nn.Conv2d(inner, num_classes, 1)
    )


def _deeplabv3(channels: int, num_classes: int, output_stride: int) -> nn.Module:
    from torchvision.models.segmentation.deeplabv3 import ASPP  # seconds: it brings torch's compiler

    inner = min(max(channels // 4, MIN_CHANNELS), _MAX_ASPP_CHANNELS)
    # In input pixels the same at every stride.
    rates: Sequence[int] = [max(1, rate * 8 // output_stride) for rate in _ASPP_RATES_AT_STRIDE_8]
    return nn.Sequential(ASPP(channels, rates, inner), nn.Conv2d(inner, num_classes, 1))


def _conv_bn(channels: int, out: int, kernel: int, *, dilation: int = 1, groups: int = 1, act: bool) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    layers = [
        nn.Conv2d(channels, out, kernel, padding=padding, dilation=dilation, groups=groups, bias=False),
        nn.BatchNorm2d(out),
    ]
    return nn.Sequential(*layers, nn.ReLU()) if act else nn.Sequential(*layers)
