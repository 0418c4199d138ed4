"""The linear form that bounds the mIoU of instances near a good one; ``engine`` says how."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from messnet.records.arrays import FloatArray
from messnet.searching.exact.problem import Problem

__all__ = ["NO_TANGENT", "Tangent", "tangent_at"]


class Tangent(NamedTuple):
    """The linear form at one instance. K is the number of classes rounded up to a multiple of 8, which is quicker; l
    and u are 0 for those that are none."""

    miou: float
    x: NDArray[np.float32]
    """(H, V, 2 K): l and u of every exit and image."""
    offsets: NDArray[np.float32]
    """(H, 2 K): of all images at every exit, u less 1."""
    scores: FloatArray
    """(H, V): the mean of l over the classes."""
    floors: NDArray[np.float32]
    """(2, K): r, as no instance's I / U - r is below -r or above 1 - r; the least 1 + u of any, that of the pixels with
    the label alone."""


NO_TANGENT = Tangent(
    0.0, np.zeros((0, 0, 0), np.float32), np.zeros((0, 0), np.float32), np.zeros((0, 0)), np.zeros((2, 0), np.float32)
)


def tangent_at(problem: Problem, key: int) -> Tangent:
    """The tangent at the instance with this key."""
    k, counts = problem.arrays.num_classes, problem.arrays.counts
    whole = problem.counts_of(key).astype(np.float64)
    union, iou = whole[k : 2 * k], whole[:k] / whole[k : 2 * k]
    width = -(-k // 8) * 8
    x, scores = np.zeros((*counts.shape[:2], 2, width), np.float32), np.empty(counts.shape[:2])
    offsets, floors = np.zeros((len(counts), 2, width), np.float32), np.ones((2, width), np.float32)
    for h, values in enumerate(counts):
        gains = (values[:, :k] - iou * values[:, k : 2 * k]) / union
        scores[h] = gains.mean(1)
        x[h, :, 0, :k], x[h, :, 1, :k] = gains, values[:, k : 2 * k] / union
        summed = values.sum(0, dtype=np.int64).astype(np.float64)
        offsets[h, :, :k] = (summed[:k] - iou * summed[k : 2 * k]) / union, summed[k : 2 * k] / union - 1
    labelled = problem.tables.labelled.sum(0, dtype=np.int64)
    floors[:, :k] = iou, labelled[labelled > 0] / union
    return Tangent(float(iou.mean()), x.reshape(*x.shape[:2], -1), offsets.reshape(len(counts), -1), scores, floors)
