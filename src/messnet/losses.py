"""Losses of both training stages. Labels are (N, H, W) int64 with IGNORE_INDEX where no pixel counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from messnet.data import IGNORE_INDEX

__all__ = ["DistillationLoss", "Teacher", "cross_entropy", "distillation_loss", "teach"]

DistillationLoss = Literal["pfd", "kd", "ce"]


def cross_entropy(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Mean cross-entropy over the valid pixels, 0 without any: ``logits`` (N, K, H, W), ``class_weights`` (K,)."""
    total = F.cross_entropy(logits.float(), labels, weight=class_weights, ignore_index=IGNORE_INDEX, reduction="sum")
    valid = labels != IGNORE_INDEX
    weight = valid.sum() if class_weights is None else class_weights[labels[valid]].sum()
    return total / weight.where(weight > 0, 1)


@dataclass(frozen=True)
class Teacher:
    """What the final exit and the labels teach on one batch: computed once, used by every head."""

    target: Tensor
    """(N, K, H, W): the weight of each class's log-probability in the loss; 0 where ignored."""
    constant: Tensor
    """The part of the loss that no head can change (minus the teacher's entropy), so that a perfect student has 0."""
    normaliser: Tensor
    """Sum of the pixel weights: the number of valid pixels where all classes weigh 1."""


def teach(
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    loss: DistillationLoss = "pfd",
    alpha: float = 0.5,
    filter_kl: bool = False,
    class_weights: Tensor | None = None,
) -> Teacher:
    """Folds a distillation loss of the final exit y_N and the labels t into one target distribution.

    pfd (positive filtering distillation, poster 2):
        L_i = alpha * 1(argmax y_N = t) * CE(y_i, t) + (1 - alpha) * KL(y_N || y_i)
    kd:  the same without the filter;  ce: CE(y_i, t) alone. ``filter_kl`` filters the KL term of pfd too.
    Mean over the valid pixels, ignored ones in neither term; with ``class_weights`` (K,) each pixel weighs as its
    label's class, in both terms.

    Each term is linear in the student's log-probabilities, so the loss is one soft cross-entropy against
    ``alpha * 1(...) * onehot(t) + (1 - alpha) * y_N`` plus a constant: 280 heads share one target.
    ``teacher_logits`` (N, K, H, W) at the labels' resolution.
    """
    valid = labels != IGNORE_INDEX
    num_classes = teacher_logits.shape[1]
    onehot = F.one_hot(labels.where(valid, 0), num_classes).movedim(-1, 1).float()
    log_teacher = F.log_softmax(teacher_logits.float(), dim=1)
    right = teacher_logits.argmax(1) == labels
    match loss:
        case "ce":
            label_weight, teacher_weight = valid.float(), torch.zeros_like(valid, dtype=torch.float)
        case "kd":
            label_weight, teacher_weight = alpha * valid.float(), (1 - alpha) * valid.float()
        case "pfd":
            label_weight = alpha * (valid & right).float()
            teacher_weight = (1 - alpha) * (valid & right if filter_kl else valid).float()
    if class_weights is not None:
        pixel_weight = class_weights[labels.where(valid, 0)] * valid
        label_weight, teacher_weight = label_weight * pixel_weight, teacher_weight * pixel_weight
        normaliser = pixel_weight.sum()
    else:
        normaliser = valid.sum().float()
    target = label_weight[:, None] * onehot + teacher_weight[:, None] * log_teacher.exp()
    normaliser = normaliser.where(normaliser > 0, 1)
    entropy = -(log_teacher.exp() * log_teacher).sum(1)
    return Teacher(target, -(teacher_weight * entropy).sum() / normaliser, normaliser)


def distillation_loss(logits: Tensor, teacher: Teacher) -> Tensor:
    """The loss of one head; ``logits`` (N, K, H, W) at the teacher's resolution."""
    total = F.cross_entropy(logits.float(), teacher.target, reduction="sum")
    return total / teacher.normaliser + teacher.constant
