"""The recipe's section ``augment``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from messnet.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class AugmentOptions:
    """How training images are varied; the defaults are torchvision's segmentation reference."""

    crop: tuple[int, int] | None = None
    """(height, width) in pixels of what the network sees. None: the image's own size, then all must be of one size."""
    scale_min: float = 0.5
    scale_max: float = 2.0
    """The image is resized by a factor in [scale_min, scale_max], uniform."""
    hflip: float = 0.5
    """Probability of a left-right flip."""
    color_jitter: float = 0.0
    """Strength in [0, 1] of random brightness, contrast and saturation; 0 is off. No hue: it alone takes 70 % of the
    time."""

    def __post_init__(self) -> None:
        if not 0 < self.scale_min <= self.scale_max:
            raise RecipeError(f"expected 0 < scale_min <= scale_max, got {self.scale_min} and {self.scale_max}")
        if self.crop is not None and min(self.crop) < 1:
            raise RecipeError(f"crop is (height, width) of at least 1 pixel, not {self.crop}")
        for name, value in (("hflip", self.hflip), ("color_jitter", self.color_jitter)):
            if not 0 <= value <= 1:
                raise RecipeError(f"{name} lies in [0, 1], not {value}")


def padding_share(options: AugmentOptions, size: tuple[int, int]) -> float:
    """Share of the pixels of an augmented image of ``size`` (height, width) that lie outside of it, on average; [0, 1].
    They are void: training computes them and learns nothing from them."""
    scales = np.linspace(options.scale_min, options.scale_max, 100)
    # A side that is longer than the crop fills it.
    filled = [np.minimum(1, scales * side / cropped) for side, cropped in zip(size, options.crop or size, strict=True)]
    return float(1 - np.mean(filled[0] * filled[1]))
