"""Colours to draw classes in."""

from __future__ import annotations

import colorsys

import numpy as np
from numpy.typing import NDArray

__all__ = ["default_palette"]

# In the manner of CamVid and Cityscapes: calm, and well apart where classes are few.
COLOURS = (
    (70, 130, 180), (222, 150, 90), (148, 148, 158), (128, 64, 128), (244, 35, 232), (107, 142, 35), (250, 204, 60),
    (190, 153, 153), (0, 0, 142), (220, 20, 60), (0, 150, 136), (152, 251, 152), (102, 102, 156), (255, 120, 80),
    (0, 60, 100), (119, 11, 32), (160, 220, 240), (90, 70, 50), (200, 180, 230), (40, 90, 60),
)  # fmt: skip


def default_palette(num_classes: int) -> NDArray[np.uint8]:
    """(num_classes, 3) distinct RGB colours."""
    colours = list(COLOURS[:num_classes])
    for k in range(len(colours), num_classes):
        # Steps of the golden ratio never return to a hue.
        hue, saturation, value = (k * 0.618034) % 1, (0.75, 0.5, 0.9)[k % 3], (0.9, 0.65, 0.45)[k // 3 % 3]
        red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
        colours.append((round(255 * red), round(255 * green), round(255 * blue)))
    return np.array(colours, np.uint8).reshape(-1, 3)
