"""The arrays that the inner loops run over.

Letters that all of ``exact`` uses: V images; H exits (one head at one exit point each, the final exit last); K classes
that have labels; X classes that are only predicted, which can add nothing but an IoU of 0; C = 2 K + X.

A *column* is one early exit at one pixel threshold. The image thresholds that are tried there are numbered from 1, the
lowest, which are its *levels*; ``bins[column, v]`` is the highest level that image v reaches. The images that leave at
level i are those with bins >= i, so that the sets of a column are nested: the higher the level, the smaller the set.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from messnet.records.arrays import FloatArray, IntArray

Counts = NDArray[np.int32] | NDArray[np.int64]
Float32 = NDArray[np.float32]
Real = float | np.float32

MEAN, WORST, P95, WHOLE_SUM, WHOLE_MAX = range(5)
"""How a row of costs is counted: a statistic over images, or a sum or maximum over all parts of the instance."""

RULED_OUT = np.float32(-9)
"""Stands for a bound that is not reached: mIoU and its differences are within [-1, 1], remainders little wider."""

CAPACITY = 1 << 16
"""Points of a front."""


class Arrays(NamedTuple):
    """A search's input. Costs are M rows: one cost of one device, as a mean, worst or p95 over images."""

    counts: Counts
    """(H, V, C) pixels: intersections of the K classes, unions of the K classes, unions of the X others."""
    num_classes: int
    """K"""
    bins: NDArray[np.int32]
    """(columns, V): the highest level that each image reaches."""
    order: NDArray[np.int32]
    """(columns, V): images by ascending bin."""
    levels: IntArray
    """(columns,): the number of levels."""
    first_column: IntArray
    """(H,): columns of early exit h are first_column[h] to first_column[h + 1]."""
    exit_index: IntArray
    """(H,): the exit point."""
    rows_per_exit: int
    """More than (column, level) pairs of any exit: the base of keys."""
    parts: FloatArray
    """(M, 4, H): backbone up to the exit, head, decision, output."""
    kinds: IntArray
    """(M,): MEAN to WHOLE_MAX."""
    weights: FloatArray
    """(M,): the objective is the largest weighted cost; 0 where a cost is only limited."""
    limits: FloatArray
    """(M,): the largest cost allowed; infinite where it is not limited."""
    floors: FloatArray
    """(K,): least IoU of each class; -inf where there is none."""


class Frontier(NamedTuple):
    """A Pareto front under construction, in buffers of fixed size: ``size[0]`` points by ascending cost, each with a
    larger mIoU than the one before."""

    cost: FloatArray
    """(CAPACITY,): the objective's cost."""
    miou: FloatArray
    """(CAPACITY,)"""
    key: IntArray
    """(CAPACITY,): numbers that stand for instances, see ``enumeration.key_of``; of equal points the smallest stays."""
    size: IntArray
    """(1,)"""

    @classmethod
    def empty(cls) -> Frontier:
        return cls(np.zeros(CAPACITY), np.zeros(CAPACITY), np.zeros(CAPACITY, np.int64), np.zeros(1, np.int64))
