"""Step 2 of the derivation: a linear form that equals the mIoU at one instance and is close to it nearby.

Take some good instance, the *reference*, with IoU r_k and union U0_k of class k, and let R be the mean of r_k. For any
instance with intersections I_k and unions U_k put

    l_k = (I_k - r_k U_k) / U0_k    and    u_k = U_k / U0_k - 1.

Then I_k / U_k - r_k = (I_k - r_k U_k) / U_k = l_k / (1 + u_k) exactly, so that its mIoU is R + mean over k of l_k / (1
+ u_k). At the reference l_k = u_k = 0, and l_k is the tangent of the IoU there. Both are linear in the pixel counts:
each is a sum over images of what the image contributes at the exit that it takes. That is what ``Tangent`` holds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from messnet.records.arrays import FloatArray
from messnet.searching.exact.arrays import Float32
from messnet.searching.exact.problem import Problem


class Tangent(NamedTuple):
    """The linear form at one reference. K is the number of classes rounded up to a multiple of 8, which loops over
    faster; l and u are 0 for those that are none."""

    miou: float
    """R"""
    x: Float32
    """(H, V, 2 K): what each image contributes to l and u at each exit."""
    offsets: Float32
    """(H, 2 K): l and u where all images leave at one exit."""
    scores: FloatArray
    """(H, V): the contributions to l, averaged over the classes."""
    floors: Float32
    """(2, K): r_k; and the least 1 + u_k of any instance, since a union holds at least the pixels with the label."""


NO_TANGENT = Tangent(
    0.0, np.zeros((0, 0, 0), np.float32), np.zeros((0, 0), np.float32), np.zeros((0, 0)), np.zeros((2, 0), np.float32)
)


def tangent_at(problem: Problem, key: int) -> Tangent:
    """The tangent at the instance with this key."""
    k, counts = problem.arrays.num_classes, problem.arrays.counts
    whole = problem.counts_of(key).astype(np.float64)
    # The reference: U0_k, r_k.
    union, iou = whole[k : 2 * k], whole[:k] / whole[k : 2 * k]
    width = -(-k // 8) * 8
    x, scores = np.zeros((*counts.shape[:2], 2, width), np.float32), np.empty(counts.shape[:2])
    offsets, floors = np.zeros((len(counts), 2, width), np.float32), np.ones((2, width), np.float32)
    for h, values in enumerate(counts):
        gains = (values[:, :k] - iou * values[:, k : 2 * k]) / union  # l_k, image by image
        scores[h] = gains.mean(1)
        # Contributions to l_k, and to U_k / U0_k, which is u_k + 1.
        x[h, :, 0, :k], x[h, :, 1, :k] = gains, values[:, k : 2 * k] / union
        # All images at this exit: sums of the contributions, the 1 taken off.
        summed = values.sum(0, dtype=np.int64).astype(np.float64)
        offsets[h, :, :k] = (summed[:k] - iou * summed[k : 2 * k]) / union, summed[k : 2 * k] / union - 1
    # A union holds at least the labelled pixels of its class: 1 + u_k >= labelled / U0_k.
    labelled = problem.tables.labelled.sum(0, dtype=np.int64)
    floors[:, :k] = iou, labelled[labelled > 0] / union
    return Tangent(float(iou.mean()), x.reshape(*x.shape[:2], -1), offsets.reshape(len(counts), -1), scores, floors)
