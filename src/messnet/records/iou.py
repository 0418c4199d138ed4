"""Pixel counts and intersection over union, from which every mIoU of this project is summed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from messnet.records.arrays import FloatArray, IntArray

_Counts = NDArray[np.int32] | NDArray[np.int64]


def pixel_counts(
    prediction: NDArray[np.integer], label: NDArray[np.integer], num_classes: int
) -> tuple[IntArray, IntArray, IntArray]:
    """(intersection, predicted, labelled) pixel counts per class, each (K,), of integer arrays of one shape.

    A label outside [0, K) is ignored: it counts in none of the three. Predictions lie in [0, K).
    """
    return counts_of(confusion_matrix(prediction, label, num_classes))


def confusion_matrix(
    prediction: NDArray[np.integer], label: NDArray[np.integer], num_classes: int
) -> NDArray[np.int64]:
    """Pixels by (label, prediction), (K, K), of integer arrays of one shape; a label outside [0, K) is ignored."""
    side = num_classes + 1
    # Ignored pixels go to a row of their own, which is cut off below.
    known = np.where((label >= 0) & (label < num_classes), label, num_classes).astype(np.intp)
    joint = np.bincount((known * side + prediction).ravel(), minlength=side * side)
    return joint.reshape(side, side)[:-1, :-1].astype(np.int64)


def counts_of(confusion: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """``pixel_counts`` from the number of pixels by (label, prediction), (K, K)."""
    return confusion.diagonal(), confusion.sum(0), confusion.sum(1)


def class_iou(intersection: _Counts, predicted: _Counts, labelled: _Counts) -> FloatArray:
    """Intersection over union per class from summed pixel counts, each (..., K). NaN where a class is in neither the
    labels nor the predictions."""
    union = (np.asarray(predicted, np.int64) + labelled - intersection).astype(np.float64)
    iou: FloatArray = np.divide(intersection, union, out=np.full(union.shape, np.nan), where=union > 0)
    return iou


def mean_iou(intersection: _Counts, predicted: _Counts, labelled: _Counts) -> float:
    """mIoU in [0, 1] of summed pixel counts, each (K,): the mean over the classes that occur in labels or predictions
    (docs/method.md#validation-tables). NaN if none occurs."""
    iou = class_iou(intersection, predicted, labelled)
    return float(np.nanmean(iou)) if np.isfinite(iou).any() else float("nan")


def chance_miou(labelled: _Counts) -> float:
    """mIoU in [0, 1] that takes no look at the images, given the labelled pixels of each class (K,): the better of
    calling every pixel the most frequent class and of drawing each pixel's class by the classes' frequencies. NaN if no
    pixel is labelled."""
    occurring = labelled[labelled > 0]
    if not len(occurring):
        return float("nan")
    share = occurring / occurring.sum(dtype=np.int64)
    # One class everywhere: its IoU is its share, all others have 0.
    constant = share.max() / len(share)
    # Drawn: both labels and predictions are a class on p, both at once on p^2, so the union is 2 p - p^2.
    drawn = (share / (2 - share)).mean()
    return float(max(constant, drawn))
