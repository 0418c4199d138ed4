"""The files that ``predict`` writes, against what the session says."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.images import smooth_image
from messnet.apps.predictions import PredictOptions, predict_files
from messnet.cli import main
from messnet.costs.processor import free_memory
from messnet.deployment.loading import load
from messnet.deployment.session import Result, Session
from messnet.errors import DataError, RecipeError
from messnet.images.drawing import overlay
from messnet.images.reading import large_images, read_image
from messnet.network.multi_exit import MultiExitNet
from messnet.records.instance import ExitChoice, Instance

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
    session = load(tiny_run, instance="max-miou")
    records = predict_files(session, [photos], out, PredictOptions(legend=False)).records
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
    with pytest.raises(DataError, match=r"cannot read .*image\.jpg \(.*copy it again or remove it"):
        read_image(tmp_path / "image.jpg")


@pytest.fixture(scope="module")
def session(small_net: MultiExitNet) -> Session:
    exits = tuple(ExitChoice(exit_index=e.exit_index, head=e.head) for e in (small_net.exits[0], small_net.exits[-1]))
    palette = np.random.default_rng(0).integers(0, 256, (5, 3), np.uint8)
    return Session(small_net, Instance(name="x", setting="anytime", exits=exits), palette=palette, input_size=(48, 64))


def many(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    folder.mkdir()
    for i, size in enumerate(sizes):
        Image.fromarray(smooth_image(*size, i)).save(folder / f"{i}.png")
    return folder


def test_damaged_images_among_many_are_told_and_the_others_done(session: Session, tmp_path: Path) -> None:
    folder = many(tmp_path / "in", [(64, 80)] * 3)
    (folder / "0.png").write_text("words")
    (folder / "1b.png").write_bytes((folder / "1.png").read_bytes()[:3000])
    done = predict_files(session, [folder], tmp_path / "out")
    assert [Path(record["image"]).name for record in done.records] == ["1.png", "2.png"]
    for name, line in zip(("0.png", "1b.png"), done.failed, strict=True):
        assert line.startswith(f"cannot read {folder / name} (")
    summary = json.loads((tmp_path / "out/predictions.json").read_text())
    assert (summary["predictions"], summary["failed"]) == (done.records, done.failed)
    for name in ("1.png", "2.png"):
        (folder / name).write_text("words")
    with pytest.raises(DataError, match=r"cannot read .*0\.png .*\(and 3 other images likewise\)"):
        predict_files(session, [folder], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_damaged_images_through_the_command(
    tiny_run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "aa.png").write_text("words")
    with pytest.raises(SystemExit) as end:
        main(["predict", str(tiny_run), str(photos), "--out", str(tmp_path / "out"), "--tile-overlap", "9"])
    said = capsys.readouterr()
    told = [line for line in said.err.splitlines() if line.startswith("messnet: ")]
    lines = [line for line in told if "compiling" not in line]
    assert "drop-1pp, taken by default, was chosen on 16 images, too few" in lines.pop(0)
    assert end.value.code == 2
    assert len(lines) == 2
    assert f"cannot read {photos / 'aa.png'} (" in lines[0]
    assert "1 of 3 images were left out" in lines[1]
    assert "2 images in" in said.out
    record = json.loads((tmp_path / "out/predictions.json").read_text())["predictions"][0]
    assert (record["tiles"][0]["rows"], len(record["tiles"])) == ([0, 61], 2)  # 61 x 83, made for 64 x 80
    assert (tmp_path / "out" / record["exits"]).is_file()


class Watched(Session):
    """Tells how many images come at a time, and is interrupted at a call."""

    def __init__(self, session: Session, interrupted_at: int | None = None) -> None:
        super().__init__(session.runner, session.instance, palette=session.palette, class_names=session.class_names)
        self.sizes: list[int] = []
        self.interrupted_at = interrupted_at

    def predict(self, images: Sequence[np.ndarray], *, batch_size: int = 1) -> list[Result]:
        self.sizes.append(len(images))
        if len(self.sizes) == self.interrupted_at:
            raise KeyboardInterrupt
        return super().predict(images, batch_size=batch_size)


def test_batches_of_one_size_give_the_same(session: Session, tmp_path: Path) -> None:
    folder = many(tmp_path / "in", [(64, 80), (64, 80), (64, 80), (48, 80), (64, 80)])
    one = predict_files(session, [folder], tmp_path / "one").records
    watched = Watched(session)
    records = predict_files(watched, [folder], tmp_path / "two", PredictOptions(batch_size=2)).records
    assert watched.sizes == [2, 1, 1, 1]
    for a, b in zip(one, records, strict=True):
        assert (a["image"], a["exit_index"]) == (b["image"], b["exit_index"])
        same = np.array(Image.open(tmp_path / "one" / a["mask"])) == np.array(Image.open(tmp_path / "two" / b["mask"]))
        assert same.mean() > 0.999


def test_a_deadline_keeps_the_best_so_far(session: Session, tmp_path: Path) -> None:
    folder = many(tmp_path / "in", [(64, 80)])
    exits = [choice.exit_index for choice in session.instance.exits]
    for deadline_ms, expected in ((1e-6, exits[0]), (1e6, exits[-1])):
        options = PredictOptions(deadline_ms=deadline_ms)
        assert predict_files(session, [folder], tmp_path / "out", options).records[0]["exit_index"] == expected


def test_an_interrupt_keeps_what_is_done(session: Session, tmp_path: Path) -> None:
    folder = many(tmp_path / "in", [(64, 80)] * 3)
    with pytest.raises(KeyboardInterrupt):
        predict_files(Watched(session, interrupted_at=3), [folder], tmp_path / "out")
    assert len(json.loads((tmp_path / "out/predictions.json").read_text())["predictions"]) == 2


def test_options_that_make_no_sense() -> None:
    late = {"deadline_ms": 5}
    for options in ({"batch_size": 0}, {"deadline_ms": 0}, late | {"batch_size": 2}, late | {"tile": (8, 8)}):
        with pytest.raises(RecipeError):
            PredictOptions(**options)


def test_a_decompression_bomb_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (200, 200)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"cannot read .*bomb\.png: it has more than .* --large-images"):
        read_image(tmp_path / "bomb.png")
    with large_images():
        assert read_image(tmp_path / "bomb.png").shape == (200, 200, 3)
    with pytest.raises(DataError, match=r"bomb\.png"):
        read_image(tmp_path / "bomb.png")


def test_files_of_ones_own_may_be_large(tmp_path: Path, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = many(tmp_path / "images", [(64, 80)])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="--large-images"):
        predict_files(session, [folder], tmp_path / "out")
    options = PredictOptions(large_images=True, tile=(48, 64))
    assert len(predict_files(session, [folder], tmp_path / "out", options).records) == 1


def test_overlays_have_a_legend_where_it_takes_at_most_half_their_height(tmp_path: Path, session: Session) -> None:
    sizes = {"0.png": (20, 80), "1.png": (240, 320)}
    folder, overlays = many(tmp_path / "images", [*sizes.values()]), {}
    for wanted in (None, False, True):
        out = tmp_path / str(wanted)
        predict_files(session, [folder], out, PredictOptions(legend=wanted))
        overlays[wanted] = [np.array(Image.open(out / "overlays" / name)) for name in sizes]
    for i, (height, width) in enumerate(sizes.values()):
        plain, named = overlays[False][i], overlays[True][i]
        assert plain.shape == (height, width, 3)
        assert named.shape[1] == width
        np.testing.assert_array_equal(named[:height], plain)
        fits = i == 1
        assert (len(named) <= 1.5 * height) == fits, "two images that tell the rule"
        np.testing.assert_array_equal(overlays[None][i], named if fits else plain)


def test_what_is_not_wanted_is_not_written(tmp_path: Path, session: Session) -> None:
    folder = many(tmp_path / "images", [(64, 80)] * 2)
    options = PredictOptions(overlays=False, confidence=False)
    (record, _) = predict_files(session, [folder], tmp_path / "out", options).records
    assert {"overlay", "confidence"}.isdisjoint(record)
    written = {file.relative_to(tmp_path / "out").as_posix() for file in (tmp_path / "out").rglob("*.*")}
    assert written == {"masks/0.png", "masks/1.png", "predictions.json"}


def test_twelve_bits_in_a_file_of_sixteen_are_told(tmp_path: Path, session: Session) -> None:
    grey = np.random.default_rng(0).integers(0, 4096, (64, 80)).astype(np.uint16)
    (tmp_path / "images").mkdir()
    Image.fromarray(grey).save(tmp_path / "images/dark.png")
    Image.fromarray(grey * 16).save(tmp_path / "images/full.png")
    done = predict_files(session, [tmp_path / "images"], tmp_path / "out")
    assert len(done.records) == 2
    (note,) = done.notes
    assert re.search(r"dark\.png is next to black, no value above 16 of 255: 10 or 12 bits in a 16-bit file\?", note)


def test_records_are_in_the_order_of_the_files(tmp_path: Path, session: Session) -> None:
    folder = many(tmp_path / "images", [(200, 240), (20, 24)] * 5)
    done = predict_files(session, [folder], tmp_path / "out")
    assert [Path(record["image"]).stem for record in done.records] == [str(i) for i in range(10)]
    assert all((tmp_path / "out" / record[kind]).is_file() for record in done.records for kind in ("mask", "overlay"))


def test_a_disk_that_is_full_ends_the_command(tmp_path: Path, session: Session) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/masks").write_text("no folder")
    with pytest.raises(OSError, match="masks"):
        predict_files(session, [many(tmp_path / "images", [(64, 80)] * 8)], tmp_path / "out")


def test_large_images_are_scaled_and_told_of_once(tiny_run: Path, tmp_path: Path) -> None:
    session = load(tiny_run, full_size=False)  # 64 x 80
    folder = many(tmp_path / "images", [(64, 80), (192, 240), (256, 320)])
    done = predict_files(session, [folder], tmp_path / "out", PredictOptions(legend=False))
    assert done.notes == [
        "1.png has 240 x 192 pixels, the network learned on 80 x 64: larger images are scaled to that first, "
        "--full-size computes them as they are"
    ]
    for record, size in zip(done.records, [(80, 64), (240, 192), (320, 256)], strict=True):
        for kind in ("mask", "overlay", "confidence"):
            with Image.open(tmp_path / "out" / record[kind]) as picture:  # type: ignore[literal-required]
                assert picture.size == size
    again = predict_files(session, [folder / "0.png"], tmp_path / "out")
    assert again.notes == [f"{tmp_path / 'out'}/ also holds the files of 2 images of an earlier call"]


def test_an_image_that_would_fill_the_memory_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    session, folder = load(tiny_run), many(tmp_path / "images", [(16, 16), (128, 160), (16, 16)])
    # An image of 64 x 80 pixels would fill what is free: one of 16 x 16 has room, one of 128 x 160 has not.
    assert session.workload is not None
    free = free_memory()
    assert free is not None
    hungry = replace(session.workload.segments[0], memory_bytes=free)
    session.workload = replace(session.workload, segments=(hungry, *session.workload.segments[1:]))
    for batch_size in (1, 3):
        done = predict_files(session, [folder], tmp_path / f"out{batch_size}", PredictOptions(batch_size=batch_size))
        assert [Path(record["image"]).name for record in done.records] == ["0.png", "2.png"]
        (line,) = done.failed
        assert re.search(r"1\.png: 160 x 128 pixels would take about \d+ GB of memory, .* --tile", line)
