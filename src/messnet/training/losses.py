"""Losses of both training stages. Labels are (N, H, W) int64 with IGNORE_INDEX where no pixel counts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from messnet.data import IGNORE_INDEX
from messnet.errors import DataError
from messnet.training.options import DistillationLoss


def cross_entropy(
    logits: Tensor, labels: Tensor, class_weights: Tensor | None = None, *, normaliser: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy over the valid pixels, 0 without any: ``logits`` (N, K, H, W), ``class_weights`` (K,).

    ``CE(y, t) = -sum_p w[t_p] log softmax(y_p)[t_p] / sum_p w[t_p]``, w = 1 without class weights. ``normaliser``
    replaces the sum below, where the batch is a part of a larger one.
    """
    # Summed here and divided below, not reduction="mean": that gives NaN for a batch without a valid pixel.
    total = F.cross_entropy(logits.float(), labels, weight=class_weights, ignore_index=IGNORE_INDEX, reduction="sum")
    weight = pixel_weight(labels, class_weights) if normaliser is None else normaliser
    return total / weight.where(weight > 0, 1)


def pixel_weight(labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """The sum of the weights of all valid pixels: their number where all classes weigh 1."""
    valid = labels != IGNORE_INDEX
    # No choosing of labels[valid]: its size would have to be known, so the processor would wait for the device.
    return valid.sum() if class_weights is None else (class_weights[labels.where(valid, 0)] * valid).sum()


def automatic_class_weights(label_pixels: NDArray[np.int64]) -> NDArray[np.float64]:
    """(K,) weights of classes that have ``label_pixels`` (K,) pixels: ``w_k = c / log(1.02 + p_k)``, p_k the class's
    share, as in ENet (Paszke et al. 2016), with c such that the mean over all pixels, sum p_k w_k, is 1.

    A class without a pixel weighs as the rarest may. Raises DataError when no pixel is labelled.
    """
    if label_pixels.sum() == 0:
        raise DataError("class_weights 'auto' needs labelled pixels: every pixel of the training split is ignored")
    share = label_pixels / label_pixels.sum()
    weights = 1 / np.log(1.02 + share)  # 1.02 bounds the rarest class's weight: 1 / log(1.02) is about 50
    balanced: NDArray[np.float64] = weights / (share * weights).sum()
    return balanced


@dataclass(frozen=True)
class Teacher:
    """The soft target of one batch, from the final exit and the labels: computed once, used by every head."""

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
    deeper_logits: Tensor | None = None,
) -> Teacher:
    """Folds a distillation loss of the final exit y_N and the labels t into one target distribution.

    pfd (positive filtering distillation, the paper's):
        L_i = alpha * 1(argmax y_N = t) * CE(y_i, t) + (1 - alpha) * KL(y_N || y_i)
    kd (knowledge distillation):
        L_i = alpha * CE(y_i, t) + (1 - alpha) * KL(y_N || y_i)
    self_distillation (after Zhang et al., ICCV 2019; y_{i+1} is the next deeper exit):
        L_i = alpha * CE(y_i, t) + (1 - alpha) / 2 * (KL(y_N || y_i) + KL(y_{i+1} || y_i))
        and kd at the last early exit, whose next deeper exit is the final one (``deeper_logits`` None)
    ce (labels alone):
        L_i = CE(y_i, t)
    ``filter_kl`` filters the KL term of pfd too. Mean over the valid pixels, ignored ones in no term; with
    ``class_weights`` (K,) each pixel weighs as its label's class, in every term.

    Each term is linear in the student's log-probabilities, so the loss is one soft cross-entropy against
    ``alpha * 1(...) * onehot(t) + (1 - alpha) * y_N`` plus a constant: 280 heads share one target.
    ``teacher_logits`` and ``deeper_logits`` (N, K, H, W) at the labels' resolution. Deeper logits that are not finite,
    an exit's that diverged, are passed over for the final exit's.
    """
    valid = labels != IGNORE_INDEX
    num_classes = teacher_logits.shape[1]
    # one_hot refuses IGNORE_INDEX, which is no class: those pixels pass as class 0 and weigh nothing below.
    onehot = F.one_hot(labels.where(valid, 0), num_classes).movedim(-1, 1).float()
    log_teacher = F.log_softmax(teacher_logits.float(), dim=1)
    right = teacher_logits.argmax(1) == labels  # the positive filter, 1(argmax y_N = t)
    match loss:
        case "ce":
            label_weight, teacher_weight = valid.float(), torch.zeros_like(valid, dtype=torch.float)
        case "kd" | "self_distillation":
            label_weight, teacher_weight = alpha * valid.float(), (1 - alpha) * valid.float()
        case "pfd":
            label_weight = alpha * (valid & right).float()
            teacher_weight = (1 - alpha) * (valid & right if filter_kl else valid).float()
    if class_weights is not None:
        of_pixel = class_weights[labels.where(valid, 0)] * valid
        label_weight, teacher_weight = label_weight * of_pixel, teacher_weight * of_pixel
        normaliser = of_pixel.sum()
    else:
        normaliser = valid.sum().float()
    # KL(q || y) = sum_k q_k log q_k - sum_k q_k log y_k: the second sum is the soft cross-entropy that joins the
    # target, the first is minus q's entropy, which no student changes and which goes to the constant.
    distribution = log_teacher.exp()
    entropy = -(distribution * log_teacher).sum(1)
    if loss == "self_distillation" and deeper_logits is not None:
        log_deeper = F.log_softmax(deeper_logits.float(), dim=1)
        # Chosen on the device: an if would wait for it in every iteration.
        log_deeper = log_deeper.where(log_deeper.isfinite().all(), log_teacher)
        # Half of each KL: both parts of the sum above are linear in (q, q log q), so the teachers are averaged.
        distribution = (distribution + log_deeper.exp()) / 2
        entropy = (entropy - (log_deeper.exp() * log_deeper).sum(1)) / 2
    target = label_weight[:, None] * onehot + teacher_weight[:, None] * distribution
    normaliser = normaliser.where(normaliser > 0, 1)
    return Teacher(target, -(teacher_weight * entropy).sum() / normaliser, normaliser)


def distillation_loss(logits: Tensor, teacher: Teacher) -> Tensor:
    """The loss of one head; ``logits`` (N, K, H, W) at the teacher's resolution."""
    # With probabilities for labels cross_entropy sums -target * log softmax(logits), targets of any total: the soft
    # cross-entropy of ``teach``.
    total = F.cross_entropy(logits.float(), teacher.target, reduction="sum")
    return total / teacher.normaliser + teacher.constant
