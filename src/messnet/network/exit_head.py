"""Exit heads: from a tapped feature map to logits, in the paper's full configuration space (method.md section 5)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from messnet.errors import RecipeError

__all__ = ["BlockKind", "HeadConfig", "HeadSpace", "build_head", "plain_head_config"]

BlockKind = Literal["bottleneck", "inverted_residual", "residual"]
SegmentationHead = Literal["fcn", "deeplabv3"]

# Fewer channels than this carry too little for any head; reductions that would go below it coincide.
_MIN_CHANNELS = 8
# DeepLabV3's own width and rates: 256 channels, 12/24/36 at output stride 8.
_MAX_ASPP_CHANNELS = 256
_ASPP_RATES_AT_STRIDE_8 = (12, 24, 36)


@dataclass(frozen=True, order=True)
class HeadConfig:
    """One head of the space: (channel_reduction, extra_blocks, rapid_dilation, segmentation_head)."""

    channel_reduction: int = 1
    """r of the channel reduction module, C -> C/r; 1: no module."""
    extra_blocks: int = 0
    rapid_dilation: bool = False
    segmentation_head: SegmentationHead = "fcn"

    def __post_init__(self) -> None:
        if self.channel_reduction < 1 or self.extra_blocks < 0:
            raise RecipeError(
                f"a head needs channel_reduction >= 1 and extra_blocks >= 0, got {self.channel_reduction} and "
                f"{self.extra_blocks}"
            )

    @property
    def name(self) -> str:
        """Short, unique and a legal module name: "crm4-blocks2-rdi-fcn"."""
        dilation = "-rdi" if self.rapid_dilation else ""
        return f"crm{self.channel_reduction}-blocks{self.extra_blocks}{dilation}-{self.segmentation_head}"

    @classmethod
    def parse(cls, name: str) -> HeadConfig:
        """The inverse of ``name``. Raises RecipeError for anything else."""
        match = re.fullmatch(r"crm(\d+)-blocks(\d+)(-rdi)?-(fcn|deeplabv3)", name)
        if match is None:
            raise RecipeError(f"no head {name!r}: expected a name such as 'crm4-blocks2-rdi-fcn'")
        reduction, blocks, rapid, head = match.groups()
        return cls(int(reduction), int(blocks), rapid is not None, "fcn" if head == "fcn" else "deeplabv3")


@dataclass(frozen=True, kw_only=True)
class HeadSpace:
    """The values each part of a head may take; the default is the paper's space, 56 heads per exit point."""

    channel_reduction: tuple[int, ...] = (1, 2, 4, 8)
    """r of the channel reduction module; 1: absent."""
    extra_blocks: tuple[int, ...] = (0, 1, 2, 3)
    """Number of residual blocks of the backbone's own kind."""
    rapid_dilation: tuple[bool, ...] = (False, True)
    """Whether the dilation doubles from block to block."""
    segmentation_head: tuple[SegmentationHead, ...] = ("fcn", "deeplabv3")

    def configs(self, channels: int) -> tuple[HeadConfig, ...]:
        """The distinct heads for a feature map of ``channels``; configs that coincide are listed once.

        Raises RecipeError when a value set is empty or a value out of range.
        """
        if not all((self.channel_reduction, self.extra_blocks, self.rapid_dilation, self.segmentation_head)):
            raise RecipeError("the head space is empty: every one of its value sets needs at least one value")
        if min(self.channel_reduction) < 1 or min(self.extra_blocks) < 0:
            raise RecipeError("the head space needs channel_reduction >= 1 and extra_blocks >= 0")
        distinct: dict[tuple[int, int, bool, str], HeadConfig] = {}
        for r, n, rapid, head in itertools.product(
            self.channel_reduction, self.extra_blocks, self.rapid_dilation, self.segmentation_head
        ):
            rapid = rapid and n > 0
            width = channels if r == 1 else max(channels // r, _MIN_CHANNELS)
            if r > 1 and width >= channels:
                continue  # would not reduce anything
            distinct.setdefault((width, n, rapid, head), HeadConfig(r, n, rapid, head))
        if not distinct:
            raise RecipeError(f"no head of the space fits {channels} channels; add channel_reduction 1")
        return tuple(distinct.values())


def plain_head_config() -> HeadConfig:
    """The plain FCN head that every exit point gets in stage 1."""
    return HeadConfig()


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
            reduced = max(channels // config.channel_reduction, _MIN_CHANNELS)
            layers.append(_conv_bn(channels, reduced, 1, act=True))
            channels = reduced
        for _ in range(config.extra_blocks):
            dilation *= 2 if config.rapid_dilation else 1
            layers.append(_BLOCKS[block](channels, dilation))
        match config.segmentation_head:
            case "fcn":
                layers.append(_fcn(channels, num_classes, dilation))
            case "deeplabv3":
                layers.append(_deeplabv3(channels, num_classes, output_stride))
        return nn.Sequential(*layers)


class Bottleneck(nn.Module):
    """ResNet's bottleneck, stride 1, (N, C, h, w) to the same shape."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        inner = max(channels // 4, _MIN_CHANNELS)
        self.layers = nn.Sequential(
            _conv_bn(channels, inner, 1, act=True),
            _conv_bn(inner, inner, 3, dilation=dilation, act=True),
            _conv_bn(inner, channels, 1, act=False),
        )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(x + self.layers(x))
        return y


class InvertedResidual(nn.Module):
    """MobileNetV2's inverted residual, expansion 6, stride 1, (N, C, h, w) to the same shape."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        inner = 6 * channels
        self.layers = nn.Sequential(
            _conv_bn(channels, inner, 1, act=True),
            _conv_bn(inner, inner, 3, dilation=dilation, groups=inner, act=True),
            _conv_bn(inner, channels, 1, act=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.layers(x)
        return y


class Residual(nn.Module):
    """ResNet's plain residual block, stride 1, (N, C, h, w) to the same shape."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _conv_bn(channels, channels, 3, dilation=dilation, act=True),
            _conv_bn(channels, channels, 3, dilation=dilation, act=False),
        )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(x + self.layers(x))
        return y


_BLOCKS: dict[BlockKind, Callable[[int, int], nn.Module]] = {
    "bottleneck": Bottleneck,
    "inverted_residual": InvertedResidual,
    "residual": Residual,
}


def _fcn(channels: int, num_classes: int, dilation: int) -> nn.Module:
    inner = max(channels // 4, _MIN_CHANNELS)
    return nn.Sequential(
        *_conv_bn(channels, inner, 3, dilation=dilation, act=True), nn.Dropout(0.1), nn.Conv2d(inner, num_classes, 1)
    )


def _deeplabv3(channels: int, num_classes: int, output_stride: int) -> nn.Module:
    from torchvision.models.segmentation.deeplabv3 import ASPP  # seconds: it brings torch's compiler

    inner = min(max(channels // 4, _MIN_CHANNELS), _MAX_ASPP_CHANNELS)
    rates: Sequence[int] = [max(1, rate * 8 // output_stride) for rate in _ASPP_RATES_AT_STRIDE_8]
    return nn.Sequential(ASPP(channels, rates, inner), nn.Conv2d(inner, num_classes, 1))


def _conv_bn(channels: int, out: int, kernel: int, *, dilation: int = 1, groups: int = 1, act: bool) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    layers = [
        nn.Conv2d(channels, out, kernel, padding=padding, dilation=dilation, groups=groups, bias=False),
        nn.BatchNorm2d(out),
    ]
    return nn.Sequential(*layers, nn.ReLU()) if act else nn.Sequential(*layers)
