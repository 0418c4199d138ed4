"""Which exit heads there are to choose from (docs/method.md#exit-heads); ``exit_head`` builds them.

The space is the paper's, with one part of our own: context, which lets a shallow exit see far at little cost.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Literal

from messnet.errors import RecipeError

SegmentationHead = Literal["fcn", "deeplabv3"]

MIN_CHANNELS = 8
"""Fewer channels than this carry too little for any head; reductions that would go below it coincide."""


@dataclass(frozen=True, order=True)
class HeadConfig:
    """One head of the space: the paper's (channel_reduction, extra_blocks, rapid_dilation, segmentation_head), and
    context."""

    channel_reduction: int = 1
    """r of the channel reduction module, C -> C/r; 1: no module."""
    extra_blocks: int = 0
    rapid_dilation: bool = False
    segmentation_head: SegmentationHead = "fcn"
    context: int = 0
    """Number of blocks at 1/2 and again at 1/4 of the exit's resolution, whose results and their global mean are added
    to the features; 0: none. Not of the paper."""

    def __post_init__(self) -> None:
        if self.channel_reduction < 1 or self.extra_blocks < 0 or self.context < 0:
            raise RecipeError(
                f"a head needs channel_reduction >= 1, extra_blocks >= 0 and context >= 0, got "
                f"{self.channel_reduction}, {self.extra_blocks} and {self.context}"
            )

    @property
    def name(self) -> str:
        """Short, unique and a legal module name: "crm4-blocks2-rdi-fcn", "crm1-blocks0-context3-fcn"."""
        dilation = "-rdi" if self.rapid_dilation else ""
        context = f"-context{self.context}" if self.context else ""
        return f"crm{self.channel_reduction}-blocks{self.extra_blocks}{dilation}{context}-{self.segmentation_head}"

    @classmethod
    def parse(cls, name: str) -> HeadConfig:
        """The inverse of ``name``. Raises RecipeError for anything else."""
        match = re.fullmatch(r"crm(\d+)-blocks(\d+)(-rdi)?(?:-context(\d+))?-(fcn|deeplabv3)", name)
        if match is None:
            raise RecipeError(f"no head {name!r}: expected a name such as 'crm4-blocks2-rdi-fcn'")
        reduction, blocks, rapid, context, head = match.groups()
        kind: SegmentationHead = "fcn" if head == "fcn" else "deeplabv3"
        return cls(int(reduction), int(blocks), rapid is not None, kind, int(context or 0))


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
    context: tuple[int, ...] = (0,)
    """Numbers of blocks at 1/2 and again at 1/4 of the exit's resolution; 0: none, as in the paper; 3 is a good one."""

    def configs(self, channels: int) -> tuple[HeadConfig, ...]:
        """The distinct heads for a feature map of ``channels``; configs that coincide are listed once.

        Raises RecipeError when a value set is empty or a value out of range.
        """
        parts = (self.context, self.channel_reduction, self.extra_blocks, self.rapid_dilation, self.segmentation_head)
        if not all(parts):
            raise RecipeError("the head space is empty: every one of its value sets needs at least one value")
        if min(self.channel_reduction) < 1 or min(self.extra_blocks) < 0 or min(self.context) < 0:
            raise RecipeError("the head space needs channel_reduction >= 1, extra_blocks >= 0 and context >= 0")
        distinct: dict[tuple[int, int, bool, str, int], HeadConfig] = {}
        for context, r, n, rapid, head in itertools.product(*parts):
            rapid = rapid and n > 0  # without a block there is no dilation to double
            width = channels if r == 1 else max(channels // r, MIN_CHANNELS)
            if r > 1 and width >= channels:
                continue  # would not reduce anything
            distinct.setdefault((width, n, rapid, head, context), HeadConfig(r, n, rapid, head, context))
        if not distinct:
            raise RecipeError(f"no head of the space fits {channels} channels; add channel_reduction 1")
        return tuple(distinct.values())


def plain_head_config() -> HeadConfig:
    """The plain FCN head that every exit point gets in stage 1."""
    return HeadConfig()
