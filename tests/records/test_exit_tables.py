"""Cost and exit tables: round trips, bad files, and mIoU in closed form."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest

from messnet.errors import RunError
from messnet.records.exit_tables import ExitTables
from messnet.records.instance import Exit
from messnet.records.iou import class_iou, mean_iou


def make_tables(num_images: int = 5) -> ExitTables:
    draw = np.random.default_rng(0)
    num_classes, exits = 3, (Exit(0, "a"), Exit(0, "b"), Exit(1, "final"))
    predicted = draw.integers(5, 9, (num_images, len(exits), num_classes)).astype(np.int32)
    return ExitTables(
        image_names=tuple(f"image{v}" for v in range(num_images)),
        difficulty=np.array([np.nan] + [0.5] * (num_images - 1)),
        class_names=("sky", "road", "tree"),
        exits=exits,
        intersection=predicted - draw.integers(0, 5, predicted.shape).astype(np.int32),
        predicted=predicted,
        labelled=np.full((num_images, num_classes), 9, np.int32),
        policies=("top1+native",),
        pixel_thresholds=np.array([0.5, 0.9]),
        image_confidence=draw.random((num_images, len(exits), 1, 2)).astype(np.float32),
    )


def test_mean_iou_in_closed_form() -> None:
    # Two overlapping squares of 4 pixels sharing 2, a class missed whole, a class that occurs nowhere.
    iou = class_iou(np.array([2, 0, 0]), np.array([4, 0, 0]), np.array([4, 5, 0]))
    np.testing.assert_array_equal(iou, [2 / 6, 0, np.nan])
    assert mean_iou(np.array([2, 0, 0]), np.array([4, 0, 0]), np.array([4, 5, 0])) == (2 / 6 + 0) / 2
    assert np.isnan(mean_iou(np.zeros(3), np.zeros(3), np.zeros(3)))


def test_counts_of_a_routing() -> None:
    tables = make_tables()
    routing = np.array([0, 2, 1, 1, 2])
    intersection, predicted, labelled = tables.counts(routing)
    for k in range(3):
        assert intersection[k] == sum(tables.intersection[v, p, k] for v, p in enumerate(routing))
        assert predicted[k] == sum(tables.predicted[v, p, k] for v, p in enumerate(routing))
        assert labelled[k] == 9 * 5
    ious = intersection / (predicted + labelled - intersection)
    assert tables.miou(routing) == pytest.approx(ious.mean(), abs=1e-15)


def test_sums_exceed_32_bits() -> None:
    tables = make_tables()
    huge = np.full_like(tables.intersection, 2**31 - 1)
    tables = ExitTables(**{**vars(tables), "intersection": huge, "predicted": huge, "labelled": huge[:, 0]})
    assert tables.miou(np.zeros(5, np.int64)) == 1.0


@pytest.mark.parametrize("num_images", [1, 2, 5, 8])
def test_halves_are_disjoint_and_cover(num_images: int) -> None:
    tables = make_tables(num_images)
    first, second = tables.halves(seed=3)
    assert sorted([*first, *second]) == list(range(num_images))
    assert len(first) - len(second) in (0, 1)
    np.testing.assert_array_equal(tables.halves(seed=3)[0], first)
    half = tables.subset(first)
    assert half.image_names == tuple(tables.image_names[v] for v in first)
    np.testing.assert_array_equal(half.image_confidence, tables.image_confidence[first])
    assert half.miou(np.zeros(len(first), np.int64)) >= 0


def test_groups_are_kept_and_stay_whole() -> None:
    tables = replace(make_tables(6), groups=("a", "b", "a", "", "b", "a"))
    again = ExitTables.from_bytes(tables.to_bytes())
    assert again.groups == tables.groups
    assert again.group_ids().tolist() == [0, 1, 0, 2, 1, 0]
    for seed in range(5):
        first, second = again.halves(seed)
        labels = [{again.groups[v] for v in half} for half in (first, second)]
        assert not labels[0] & labels[1]
        assert again.subset(first).groups == tuple(again.groups[v] for v in first)
    with pytest.raises(RunError, match=r"all 6 validation images are of one group \(a\), which cannot be split"):
        replace(tables, groups=("a",) * 6).halves()


def test_tables_without_groups_are_those_of_before() -> None:
    """Files without the key open: each image is a group of its own."""
    with np.load(io.BytesIO(make_tables().to_bytes())) as file:
        arrays = dict(file)
    meta = json.loads(str(arrays.pop("meta")))
    del meta["groups"]
    buffer = io.BytesIO()
    np.savez(buffer, meta=np.array(json.dumps(meta)), **arrays)
    tables = ExitTables.from_bytes(buffer.getvalue())
    assert tables.groups == ()
    assert tables.group_ids().tolist() == [0, 1, 2, 3, 4]


def test_exit_tables_read_their_own_bytes() -> None:
    tables = make_tables()
    again = ExitTables.from_bytes(tables.to_bytes())
    for name, value in vars(tables).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(again, name), value)
            assert getattr(again, name).dtype == value.dtype
        else:
            assert getattr(again, name) == value


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_bad_exit_tables(keep: int) -> None:
    with pytest.raises(RunError, match="messnet evaluate"):
        ExitTables.from_bytes(make_tables().to_bytes()[:keep])
