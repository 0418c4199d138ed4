"""The files that ``predict`` writes, against what the session says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import smooth_image
from PIL import Image

from messnet.deployment.loading import load
from messnet.deployment.predictions import overlay, predict_files, read_image
from messnet.errors import DataError

SIZES = {"b": (64, 80), "a": (61, 83)}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed, (name, size) in enumerate(SIZES.items()):
        Image.fromarray(smooth_image(*size, seed)).save(folder / f"{name}.png")
    (folder / "notes.txt").write_text("not an image, in a folder: left alone")
    return folder


def test_files_hold_what_the_session_says(tiny_run: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    records = predict_files(tiny_run, [photos], out, instance="max-miou", device="cpu")
    session = load(tiny_run, instance="max-miou")
    summary = json.loads((out / "predictions.json").read_text())
    assert summary["predictions"] == records
    assert summary["instance"] == "max-miou"
    assert summary["class_names"] == list(session.class_names)
    assert [Path(record["image"]).name for record in records] == ["a.png", "b.png"]
    for record in records:
        image = np.array(Image.open(record["image"]))
        result = session.predict([image])[0]
        assert (record["exit_index"], record["image_confidence"]) == (result.exit_index, result.image_confidence)
        assert record["latency_ms"] > 0
        with Image.open(out / record["mask"]) as mask:
            assert mask.mode == "P"
            np.testing.assert_array_equal(np.array(mask), result.labels)
            coloured = np.array(mask.convert("RGB"))
        np.testing.assert_array_equal(coloured, session.palette[result.labels])
        blend = 0.45 * image + 0.55 * coloured
        np.testing.assert_allclose(np.array(Image.open(out / record["overlay"])), blend, atol=1)
        confidence = np.array(Image.open(out / record["confidence"]))
        assert confidence.dtype == np.uint8
        np.testing.assert_allclose(confidence / 255, result.confidence_map, atol=0.51 / 255)
    written = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    folders = ("masks", "overlays", "confidence")
    assert written == {"predictions.json"} | {f"{folder}/{name}.png" for folder in folders for name in SIZES}


def test_overlay_is_a_blend() -> None:
    image = np.full((2, 2, 3), 100, np.uint8)
    palette = np.array([[0, 0, 0], [200, 100, 0]], np.uint8)
    blended = overlay(image, np.array([[0, 1], [1, 0]], np.uint8), palette)
    assert blended.dtype == np.uint8
    assert blended[0, 0].tolist() == [45, 45, 45]
    assert blended[0, 1].tolist() == [155, 100, 45]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_every_image_is_read_as_rgb(tmp_path: Path, mode: str) -> None:
    Image.fromarray(smooth_image(20, 30)).convert(mode).save(tmp_path / "image.png")
    image = read_image(tmp_path / "image.png")
    assert (image.shape, image.dtype) == ((20, 30, 3), np.uint8)
    np.testing.assert_array_equal(image, np.array(Image.open(tmp_path / "image.png").convert("RGB")))


def test_half_an_image_is_refused(tmp_path: Path) -> None:
    Image.fromarray(smooth_image(64, 80)).save(tmp_path / "image.jpg")
    data = (tmp_path / "image.jpg").read_bytes()
    (tmp_path / "image.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"image\.jpg cannot be read as an image \(.*; replace it"):
        read_image(tmp_path / "image.jpg")
