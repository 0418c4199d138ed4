"""The linear form that bounds the mIoU of instances near a good one; ``engine`` says how."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from messnet.search.problem import Problem
from messnet.tables import FloatArray

__all__ = ["NO_TANGENT", "Tangent", "tangent_at"]


class Tangent(NamedTuple):
    """The linear form at one instance."""

    miou: float
    x: NDArray[np.float32]
    """(H, V, 2 K): l and u of every exit and image."""
    offsets: NDArray[np.float32]
    """(H, 2 K): of all images at every exit, u less 1."""
    scores: FloatArray
    """(H, V): the mean of l over the classes."""


NO_TANGENT = Tangent(0.0, np.zeros((0, 0, 0), np.float32), np.zeros((0, 0), np.float32), np.zeros((0, 0)))


def tangent_at(problem: Problem, key: int) -> Tangent:
    """The tangent at the instance with this key."""
    k, counts = problem.arrays.num_classes, problem.arrays.counts
    whole = problem.counts_of(key).astype(np.float64)
    union, iou = whole[k : 2 * k], whole[:k] / whole[k : 2 * k]
    x, scores = np.empty((*counts.shape[:2], 2 * k), np.float32), np.empty(counts.shape[:2])
    for h, values in enumerate(counts):
        gains = (values[:, :k] - iou * values[:, k : 2 * k]) / union
        scores[h] = gains.mean(1)
        x[h, :, :k], x[h, :, k:] = gains, values[:, k : 2 * k] / union
    summed = counts.sum(1, dtype=np.int64).astype(np.float64)
    offsets = np.concatenate(
        [(summed[:, :k] - iou * summed[:, k : 2 * k]) / union, summed[:, k : 2 * k] / union - 1], 1
    )
    return Tangent(float(iou.mean()), x, offsets.astype(np.float32), scores)
