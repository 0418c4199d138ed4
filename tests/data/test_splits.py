"""Training and validation images beside each other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from helpers.images import smooth_image
from messnet.data import SegmentationSample
from messnet.data.checks import DatasetReport, check_dataset
from messnet.data.splits import compare_splits

MASK = np.arange(40 * 48, dtype=np.uint8).reshape(40, 48) % 2


class Listed(list[SegmentationSample]):
    class_names = ("a", "b")
    palette = np.zeros((2, 3), np.uint8)


def report(**images: tuple[np.ndarray, str]) -> DatasetReport:
    """Of images by name, each with its group."""
    samples = [
        SegmentationSample(name=name, image=image, mask=MASK, group=group) for name, (image, group) in images.items()
    ]
    return check_dataset(Listed(samples))


def picture(seed: int) -> np.ndarray:
    return smooth_image(40, 48, seed)


def test_groups_in_both_splits_are_said() -> None:
    train = report(a=(picture(0), "rome"), b=(picture(1), "oslo"), c=(picture(2), ""))
    val = report(d=(picture(3), "oslo"), e=(picture(4), "oslo"), f=(picture(5), ""), g=(picture(6), "bern"))
    both = compare_splits(train, val)
    assert both.shared_groups == ("oslo",)
    assert val.groups == {"oslo": 2, "bern": 1}
    assert "groups: 2, of 1 to 2 images" in val.to_text()
    (note,) = [note for note in both.notes if note.startswith("groups in both splits")]
    assert "oslo, 2 of 4 validation images" in note
    assert both.proposed_pattern is None  # groups are given
    only = report(d=(picture(3), "bern"))
    assert compare_splits(train, only).shared_groups == ()


def test_images_that_are_nearly_the_same() -> None:
    base, other = picture(0), picture(1)
    nearly = np.clip(base.astype(int) + np.random.default_rng(0).integers(-6, 7, base.shape), 0, 255).astype(np.uint8)
    train = report(a=(base, ""), b=(picture(7), ""))
    val = report(copy=(base, ""), close=(nearly, ""), x=(other, ""), y=(other[:, ::-1].copy(), ""))
    both = compare_splits(train, val)
    assert both.shared == (("a", "copy"),)
    assert both.near_shared == (("a", "close"),)  # the copy is named as such
    assert both.near_val == (("copy", "close"),)
    groups = dict(both.near_groups)
    assert groups["a"] == groups["copy"] == groups["close"]
    assert len(set(groups.values())) == 4
    text = " ".join(both.notes)
    assert "1 of 4 validation images are nearly the same as training images: a = close" in text
    assert "2 of 4 validation images are nearly the same as another one of them, such as copy = close" in text


def test_splits_that_have_nothing_in_common_need_no_word() -> None:
    train, val = report(a=(picture(0), ""), b=(picture(1), "")), report(c=(picture(2), ""), d=(picture(3), ""))
    assert compare_splits(train, val).notes == ()
    empty = replace(val, images=(), num_images=0)
    assert compare_splits(train, empty).notes == ()
