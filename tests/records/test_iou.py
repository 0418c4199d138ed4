"""Pixel counts against counting one class and pixel at a time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from messnet.records.iou import chance_miou, confusion_matrix, mean_iou, pixel_counts


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.int32])
@pytest.mark.parametrize("num_classes", [1, 2, 21])
def test_equal_to_counting(dtype: type, num_classes: int) -> None:
    draw = np.random.default_rng(num_classes)
    label = draw.integers(0, num_classes, (7, 5))
    label[draw.random(label.shape) < 0.2] = 255
    label[0] = num_classes  # ignored too: not one of the classes
    prediction = draw.integers(0, num_classes, label.shape)
    counts = pixel_counts(prediction.astype(dtype), label.astype(dtype), num_classes)
    valid = label < num_classes
    matrix = confusion_matrix(prediction.astype(dtype), label.astype(dtype), num_classes)
    for k, j in itertools.product(range(num_classes), repeat=2):
        assert matrix[k, j] == ((label == k) & (prediction == j)).sum()
    for k in range(num_classes):
        assert counts[0][k] == (valid & (prediction == k) & (label == k)).sum()
        assert counts[1][k] == (valid & (prediction == k)).sum()
        assert counts[2][k] == (valid & (label == k)).sum()
    assert all(one.shape == (num_classes,) and one.dtype == np.int64 for one in counts)


def test_negative_labels_are_ignored() -> None:
    counts = pixel_counts(np.zeros((2, 2), int), np.array([[-1, 0], [-100, 1]]), 2)
    assert [one.tolist() for one in counts] == [[1, 0], [2, 0], [1, 1]]


def test_all_ignored_counts_nothing() -> None:
    label = np.full((3, 3), 255, np.uint8)
    assert not any(one.any() for one in pixel_counts(np.zeros_like(label), label, 4))


def test_the_highest_class_beside_uint8_labels() -> None:
    label = np.full((2, 2), 254, np.uint8)
    intersection, predicted, labelled = pixel_counts(label, label, 255)
    assert intersection[254] == predicted[254] == labelled[254] == 4


@pytest.mark.parametrize(
    "pixels", [[500_000, 500_000], [900_000, 100_000], [400_000, 0, 300_000, 300_000], [70_000] * 9]
)
def test_chance_is_what_guesses_reach(pixels: list[int]) -> None:
    """Against guesses that are made: one class everywhere, and classes drawn as often as they occur."""
    draw = np.random.default_rng(0)
    label = np.repeat(np.arange(len(pixels)), pixels)
    guesses = np.full_like(label, int(np.argmax(pixels))), draw.permutation(label)
    reached = max(mean_iou(*pixel_counts(guess, label, len(pixels))) for guess in guesses)
    assert chance_miou(np.array(pixels)) == pytest.approx(reached, abs=2e-3)


def test_without_labels_there_is_no_chance() -> None:
    assert np.isnan(chance_miou(np.zeros(3, np.int64)))
