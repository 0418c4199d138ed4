"""Pixel counts against NumPy, one image, class and pixel at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from messnet.records.metrics import pixel_counts


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.int32])
@pytest.mark.parametrize("num_classes", [1, 2, 21])
def test_equal_to_counting(dtype: torch.dtype, num_classes: int) -> None:
    draw = np.random.default_rng(num_classes)
    label = draw.integers(0, num_classes, (3, 7, 5))
    label[draw.random(label.shape) < 0.2] = 255
    label[0, 0] = num_classes  # ignored too: not one of the classes
    prediction = draw.integers(0, num_classes, label.shape)
    counts = pixel_counts(torch.from_numpy(prediction).to(dtype), torch.from_numpy(label).to(dtype), num_classes)
    valid = label < num_classes
    for n in range(3):
        for k in range(num_classes):
            assert counts[0][n, k] == (valid & (prediction == k) & (label == k))[n].sum()
            assert counts[1][n, k] == (valid & (prediction == k))[n].sum()
            assert counts[2][n, k] == (valid & (label == k))[n].sum()
    assert all(one.shape == (3, num_classes) and one.dtype == torch.int64 for one in counts)


def test_negative_labels_are_ignored() -> None:
    counts = pixel_counts(torch.zeros(1, 2, 2, dtype=torch.long), torch.tensor([[[-1, 0], [-100, 1]]]), 2)
    assert [one.tolist() for one in counts] == [[[1, 0]], [[2, 0]], [[1, 1]]]


def test_all_ignored_counts_nothing() -> None:
    label = torch.full((2, 3, 3), 255, dtype=torch.uint8)
    assert not any(one.any() for one in pixel_counts(torch.zeros_like(label), label, 4))


def test_the_highest_class_beside_uint8_labels() -> None:
    label = torch.full((1, 2, 2), 254, dtype=torch.uint8)
    intersection, predicted, labelled = pixel_counts(label, label, 255)
    assert intersection[0, 254] == predicted[0, 254] == labelled[0, 254] == 4
