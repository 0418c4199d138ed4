"""Intersection over union from pixel counts, from which every mIoU of this project is summed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from messnet.records.arrays import FloatArray

_Counts = NDArray[np.int32] | NDArray[np.int64]

__all__ = ["class_iou", "mean_iou"]


def class_iou(intersection: _Counts, predicted: _Counts, labelled: _Counts) -> FloatArray:
    """Intersection over union per class from summed pixel counts, each (..., K). NaN where a class is in neither the
    labels nor the predictions."""
    union = (np.asarray(predicted, np.int64) + labelled - intersection).astype(np.float64)
    iou: FloatArray = np.divide(intersection, union, out=np.full(union.shape, np.nan), where=union > 0)
    return iou


def mean_iou(intersection: _Counts, predicted: _Counts, labelled: _Counts) -> float:
    """mIoU in [0, 1] of summed pixel counts, each (K,): the mean over the classes that occur in labels or predictions
    (method.md section 8). NaN if none occurs."""
    iou = class_iou(intersection, predicted, labelled)
    return float(np.nanmean(iou)) if np.isfinite(iou).any() else float("nan")
