"""Colours of classes and of exits, the same in masks, overlays, reports and videos."""

from __future__ import annotations

import colorsys

import numpy as np
from numpy.typing import NDArray

# In the manner of CamVid and Cityscapes: calm, and well apart where classes are few.
COLOURS = (
    (70, 130, 180), (222, 150, 90), (148, 148, 158), (128, 64, 128), (244, 35, 232), (107, 142, 35), (250, 204, 60),
    (190, 153, 153), (0, 0, 142), (220, 20, 60), (0, 150, 136), (152, 251, 152), (102, 102, 156), (255, 120, 80),
    (0, 60, 100), (119, 11, 32), (160, 220, 240), (90, 70, 50), (200, 180, 230), (40, 90, 60),
)  # fmt: skip


# Of mid lightness, from the shallowest exit to the deepest: legible on a light page and on a dark one.
_EXIT_COLOURS = np.array([(0x2F, 0xA0, 0x8E), (0x4B, 0x86, 0xD3), (0x8B, 0x6C, 0xD0), (0xCF, 0x5F, 0x8D)])


def exit_colour(place: int, num_exits: int) -> tuple[int, int, int]:
    """RGB of the exit at ``place`` among ``num_exits``, from 0, shallow to deep."""
    at = place / max(1, num_exits - 1) * (len(_EXIT_COLOURS) - 1)
    red, green, blue = (round(float(np.interp(at, range(len(_EXIT_COLOURS)), c))) for c in _EXIT_COLOURS.T)
    return red, green, blue


def colour_table(palette: NDArray[np.uint8], other: tuple[int, int, int] = (0, 0, 0)) -> NDArray[np.uint8]:
    """(256, 3): the colours of ``palette`` (K, 3), and ``other`` for each label that is no class, void among them."""
    table = np.full((256, 3), other, np.uint8)
    table[: len(palette)] = palette
    return table


def default_palette(num_classes: int) -> NDArray[np.uint8]:
    """(num_classes, 3) distinct RGB colours."""
    colours = list(COLOURS[:num_classes])
    for k in range(len(colours), num_classes):
        # Steps of the golden ratio never return to a hue.
        hue, saturation, value = (k * 0.618034) % 1, (0.75, 0.5, 0.9)[k % 3], (0.9, 0.65, 0.45)[k // 3 % 3]
        red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
        colours.append((round(255 * red), round(255 * green), round(255 * blue)))
    return np.array(colours, np.uint8).reshape(-1, 3)
