"""Pixel counts per class, from which every mIoU of this project is summed."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pixel_counts"]


def pixel_counts(prediction: Tensor, label: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """(intersection, predicted, labelled) pixel counts per class and image, each (N, K) int64.

    ``prediction`` and ``label`` are integer (N, H, W) on the same device; a label outside [0, K) is ignored: it counts
    in none of the three. Predictions lie in [0, K).
    """
    num_images = label.shape[0]
    label = label.reshape(num_images, -1).long()
    prediction = prediction.reshape(num_images, -1).long()
    ignored = num_classes
    label = torch.where((label >= 0) & (label < num_classes), label, ignored)
    image = torch.arange(num_images, device=label.device)[:, None]
    side = num_classes + 1
    joint = torch.bincount(((image * side + label) * side + prediction).flatten(), minlength=num_images * side * side)
    matrix = joint.view(num_images, side, side)[:, :num_classes, :num_classes]
    return matrix.diagonal(dim1=1, dim2=2), matrix.sum(1), matrix.sum(2)
