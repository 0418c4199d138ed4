"""Splits that keep groups of images whole."""

from __future__ import annotations

import numpy as np
import pytest

from messnet.records.groups import group_ids, halves


def test_ids_in_order_of_appearance() -> None:
    assert group_ids(["b", "a", "b", "", "a", ""]).tolist() == [0, 1, 0, 2, 1, 3]
    assert group_ids([]).tolist() == []


@pytest.mark.parametrize("num_images", [1, 2, 5, 8, 101])
@pytest.mark.parametrize("seed", [0, 3])
def test_single_images_are_split_as_before_there_were_groups(num_images: int, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(num_images)
    middle = (num_images + 1) // 2
    first, second = halves(group_ids([""] * num_images), seed)
    np.testing.assert_array_equal(first, np.sort(order[:middle]))
    np.testing.assert_array_equal(second, np.sort(order[middle:]))


@pytest.mark.parametrize("seed", range(20))
def test_groups_stay_whole_and_halves_are_even(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 12, 100)
    first, second = halves(groups, seed)
    assert sorted([*first, *second]) == list(range(100))
    assert not set(groups[first]) & set(groups[second])
    assert len(first) >= 50 > len(first) - np.bincount(groups).max()  # one group less would not be half


def test_a_group_that_is_larger_than_half() -> None:
    for seed in range(8):
        first, second = halves(np.array([0] * 9 + [1]), seed)
        assert sorted([len(first), len(second)]) == [1, 9]


def test_one_group_cannot_be_split() -> None:
    assert [half.tolist() for half in halves(np.zeros(4, np.int64))] == [[0, 1, 2, 3], []]
