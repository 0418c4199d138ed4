"""Measurements and gallery: what is written is read back, anything else is a RunError."""

from __future__ import annotations

import io
import json
from dataclasses import fields

import numpy as np
import pytest

from messnet.errors import RunError
from messnet.records.instance import Exit, ExitChoice, Instance
from messnet.records.measurements import Gallery, Measurement, Measurements


@pytest.fixture
def measurements() -> Measurements:
    exits = (
        ExitChoice(exit_index=1, head="fcn", pixel_threshold=0.9, image_threshold=0.75),
        ExitChoice(exit_index=3, head="final"),
    )
    instance = Instance(name="cheapest", setting="input_dependent", exits=exits, selected_on={"miou": 0.71})
    row = Measurement(
        instance=instance,
        miou=0.7,
        miou_from_tables=0.7,
        macs=1e9,
        macs_paper=1.1e9,
        exit_taken=[1, 3, 1, 1],
        image_confidence=[0.8, 0.1, 0.9, 0.77],
        latency_ms=[4.0, 9.0, 4.1, 4.2],
    )
    return Measurements(
        device="a machine",
        input_size=(64, 96),
        image_names=["a", "b", "c", "ü"],
        difficulty=[0.1, 0.9, 0.2, 0.3],
        final_exit_error=[0.1, 0.2, 0.1, 0.1],
        num_selection_images=5,
        rows=[row],
        skipped=["nothing at 0.1 pp"],
    )


@pytest.fixture
def gallery() -> Gallery:
    rng = np.random.default_rng(0)
    return Gallery(
        image_names=("a", "b"),
        class_names=("sky", "road"),
        exits=(Exit(0, "fcn"), Exit(2, "final")),
        palette=np.array([[0, 0, 0], [255, 0, 0]], np.uint8),
        images=rng.integers(0, 256, (2, 6, 8, 3), dtype=np.uint8),
        masks=rng.integers(0, 2, (2, 6, 8), dtype=np.uint8),
        predictions=rng.integers(0, 2, (2, 2, 6, 8), dtype=np.uint8),
        confidence=rng.uniform(0, 1, (2, 2, 6, 8)).astype(np.float16),
        refined=rng.uniform(0, 1, (2, 2, 6, 8)).astype(np.float16),
        image_confidence=np.array([[0.5, np.nan], [0.25, np.nan]], np.float32),
        exit_taken=np.array([0, 2]),
    )


def test_measurements_round_trip(measurements: Measurements) -> None:
    assert Measurements.from_json(measurements.to_json()) == measurements


def test_difficulty_that_is_not_recorded(measurements: Measurements) -> None:
    measurements.difficulty[1] = None
    assert json.loads(measurements.to_json())["difficulty"] == [0.1, None, 0.2, 0.3]
    assert Measurements.from_json(measurements.to_json()) == measurements


def test_exit_shares_are_shares_of_images(measurements: Measurements) -> None:
    assert measurements.rows[0].exit_shares() == [(Exit(1, "fcn"), 0.75), (Exit(3, "final"), 0.25)]


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", '{"schema_version": 1}', '{"schema_version": 9}', "\x00"])
def test_other_text_is_not_measurements(text: str) -> None:
    with pytest.raises(RunError):
        Measurements.from_json(text)


def test_measurements_with_an_unknown_key_are_refused(measurements: Measurements) -> None:
    record = json.loads(measurements.to_json()) | {"surprise": 1}
    with pytest.raises(RunError, match="surprise"):
        Measurements.from_json(json.dumps(record))


def test_gallery_round_trip(gallery: Gallery) -> None:
    again = Gallery.from_bytes(gallery.to_bytes())
    for field in fields(Gallery):
        before, after = getattr(gallery, field.name), getattr(again, field.name)
        np.testing.assert_array_equal(after, before)
        if isinstance(before, np.ndarray):
            assert after.dtype == before.dtype
    assert isinstance(again.exits[0], Exit)


def _npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a zip file",
        _npz(a=np.zeros(3)),
        _npz(meta=np.array('{"schema_version": 9}')),
        _npz(meta=np.array('{"schema_version": 1}')),
        _npz(meta=np.array("{}")),
        _npz(meta=np.array("[]")),
    ],
)
def test_other_bytes_are_not_a_gallery(data: bytes) -> None:
    with pytest.raises(RunError):
        Gallery.from_bytes(data)


def test_a_truncated_gallery_is_a_run_error(gallery: Gallery) -> None:
    data = gallery.to_bytes()
    for end in (10, len(data) // 2, len(data) - 5):
        with pytest.raises(RunError):
            Gallery.from_bytes(data[:end])


def test_a_damaged_gallery_is_a_run_error(gallery: Gallery) -> None:
    data = bytearray(gallery.to_bytes())
    position = data.index(b"confidence.npy") + 60
    data[position : position + 8] = b"\xff" * 8
    with pytest.raises(RunError):
        Gallery.from_bytes(bytes(data))


def test_files_of_before_that_tell_no_uncertainty_open(measurements: Measurements) -> None:
    record = json.loads(measurements.to_json())
    del record["chance_miou"], record["rows"][0]["miou_change_error"]
    assert Measurements.from_json(json.dumps(record)) == measurements
