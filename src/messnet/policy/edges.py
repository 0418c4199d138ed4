"""Tensor operators of the exit policy: where labels change, and what a pixel's window says.

All take maps whose last two dimensions are (H, W), on any device, each map on its own: what stands beside it in the
batch changes nothing. ``canny_edges`` is OpenCV's; the sums over windows cost the same for any radius.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MEDIAN_CHUNK = 1 << 22
"""Window elements that ``window_median`` sorts at once: 16 MiB of float32."""


def label_boundary(labels: Tensor) -> Tensor:
    """Pixels with a 4-neighbour of another label: both sides of every boundary, two pixels thick.

    ``labels`` integer (..., H, W) -> bool of the same shape. Labels are compared for equality only, so the result does
    not depend on the numbering of the classes. The image border is no boundary. Equals
    ``skimage.segmentation.find_boundaries(mode="thick")``.
    """
    across = labels[..., :, 1:] != labels[..., :, :-1]
    down = labels[..., 1:, :] != labels[..., :-1, :]
    return F.pad(across, (0, 1)) | F.pad(across, (1, 0)) | F.pad(down, (0, 0, 0, 1)) | F.pad(down, (0, 0, 1, 0))


def canny_edges(labels: Tensor) -> Tensor:
    """Canny's edges of the label map, the paper's literal ``cannyEdge(y)``: lines one pixel thin.

    ``labels`` integer (N, H, W) in 0..255 -> bool (N, H, W), on the input's device. OpenCV computes it on the CPU,
    image by image: a round trip from any other device, and it does not export. It takes labels for grey values, so an
    edge may move by a pixel when classes are renumbered; ``label_boundary`` has neither drawback.
    """
    # Thresholds of 0 keep the step between any two labels, however close their ids: the same edges as labels scaled to
    # the full range with low thresholds. The usual 100 and 200 would lose neighbours such as 3 and 4.
    maps = labels.to("cpu", torch.uint8).numpy()
    edges = np.stack([cv2.Canny(labels_of_image, 0, 0) for labels_of_image in maps])
    return torch.from_numpy(edges).to(labels.device) > 0


def thicken(mask: Tensor, radius: int) -> Tensor:
    """Dilation by a square of side ``2 * radius + 1``. ``mask`` bool (..., H, W) -> bool; nothing beyond the border."""
    # A pixel is set where its window counts anything: the sum costs the same for any radius, max_pool2d does not.
    return _window_sum(F.pad(mask.float(), [radius] * 4), radius) > 0


def window_majority(mask: Tensor, radius: int) -> Tensor:
    """Where more than half of the ``(2 * radius + 1)^2`` window is set. ``mask`` bool (..., H, W) -> bool; 3 or 4
    dimensions.

    Beyond the border the nearest pixel repeats, so every window has an odd number of elements, and

        ``window_majority(c >= th, radius) == (window_median(c, radius) >= th)``

    exactly, ties included, for every c and th: the median of an odd number of values reaches th where more than half of
    them do.
    """
    return _window_sum(_extend(mask.float(), radius), radius) > (2 * radius + 1) ** 2 // 2


def window_median(confidence: Tensor, radius: int, where: Tensor | None = None) -> Tensor:
    """The median over the ``(2 * radius + 1)^2`` window; beyond the border the nearest pixel repeats.

    ``confidence`` float (N, H, W) -> the same shape and dtype. With ``where``, bool (N, H, W), it is computed there
    only and ``confidence`` kept elsewhere. Sorts every window: for pictures and as the reference of
    ``window_majority``, not for decisions. Equals ``scipy.ndimage.median_filter(mode="nearest")``.
    """
    side = 2 * radius + 1
    windows = _extend(confidence, radius).unfold(1, side, 1).unfold(2, side, 1)  # (N, H, W, side, side), a view
    # The windows are a view, and a chunk of them is copied at a time: all at once are 25 maps and more.
    pixels = (torch.ones_like(confidence, dtype=torch.bool) if where is None else where).nonzero()
    median = confidence.clone()
    for chunk in torch.split(pixels, max(1, MEDIAN_CHUNK // side**2)):
        index = chunk.unbind(1)
        median[index] = windows[index].flatten(1).median(1).values
    return median


def _extend(maps: Tensor, radius: int) -> Tensor:
    """(..., H, W) -> (..., H + 2 radius, W + 2 radius), the border repeated. 3 or 4 dimensions, floating point."""
    return F.pad(maps, [radius] * 4, mode="replicate")


def _window_sum(counts: Tensor, radius: int) -> Tensor:
    """(..., H + 2 radius, W + 2 radius) -> (..., H, W): the sum over each window.

    Exact for 0/1 values: float32 holds every integer below 2^24, and a running sum of window rows stays below
    ``(H + 2 radius) * (2 * radius + 1)``.
    """
    side = 2 * radius + 1
    running = F.pad(counts.cumsum(-1), (1, 0))
    rows = running[..., side:] - running[..., :-side]
    running = F.pad(rows.cumsum(-2), (0, 0, 1, 0))
    return running[..., side:, :] - running[..., :-side, :]
