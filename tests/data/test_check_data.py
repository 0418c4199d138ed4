"""The verb ``check-data``: what it prints, what it writes, and when it fails."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.images import smooth_image
from messnet.cli import main

SHARED = Path(__file__).parents[3] / "shared"
NAMES = ["--data.class_names", "ground", "thing"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """train/ and val/, three images each, classes 0 and 1."""
    for k in range(6):
        split, rng = ("train", "val")[k % 2], np.random.default_rng(k)
        for kind, pixels in (("images", rng.integers(0, 256, (12, 16, 3))), ("masks", rng.integers(0, 2, (12, 16)))):
            path = tmp_path / "photos" / split / kind / f"p{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return tmp_path / "photos"


def check(capsys: pytest.CaptureFixture[str], *tokens: object) -> str:
    capsys.readouterr()
    main(["check-data", *map(str, tokens)])
    return capsys.readouterr().out


def fails(capsys: pytest.CaptureFixture[str], *tokens: object) -> tuple[str, str]:
    """What it printed, and the one line of its error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["check-data", *map(str, tokens)])
    assert end.value.code == 2
    out, err = capsys.readouterr()
    return out, err.replace("\r", "\n").splitlines()[-1]


def test_a_folder_is_enough(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = check(capsys, folder)
    assert text.count("3 images, height x width: 12x16 (3)") == 2
    assert "no class names given" in text
    assert "no pixel of" not in text
    assert check(capsys, folder, *NAMES).count("ground") == 2


def test_colours_of_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """RGB masks without a recipe: their colours, and masks of another size, not a problem for each mask."""
    for path in folder.glob("*/masks/*.png"):
        Image.fromarray(np.array([(128, 64, 128), (0, 0, 192)], np.uint8)[np.array(Image.open(path))]).save(path)
    text = check(capsys, folder)
    assert "colour_0x0000c0" in text
    assert "no class names given: the colours found are shown; `messnet init" in text
    Image.open(folder / "val/masks/p1.png").resize((8, 6)).save(folder / "val/masks/p1.png")
    out, error = fails(capsys, folder)
    assert "1 x mask of another size" in out
    assert error == "messnet: the data set has 1 problem, listed above"


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(check(capsys, folder, *NAMES, "--json"))
    assert record["in_both_splits"] == []
    counts = np.zeros(2)
    for path in (folder / "val/masks").iterdir():
        counts += np.bincount(np.array(Image.open(path)).ravel(), minlength=2)
    share = dict(zip(("ground", "thing"), counts / counts.sum(), strict=True))
    assert record["val"]["class_share"] == pytest.approx(share)
    assert record["train"]["label_formats"] == {"8-bit indices": 3}


def test_what_is_wrong_is_said_and_ends_with_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "train/images/p0.png").write_bytes((folder / "val/images/p1.png").read_bytes())
    (folder / "train/images/p2.png").write_bytes(b"no image")
    Image.fromarray(np.full((12, 16), 9, np.uint8)).save(folder / "val/masks/p3.png")
    out, error = fails(capsys, folder, *NAMES)
    assert "in both splits: p0 = p1; remove them from one" in out
    assert "1 x unreadable file: copy these files again or remove them" in out
    assert "images per id: 9 (1)" in out
    assert error == "messnet: the data set has 3 problems, listed above"
    record, error = fails(capsys, folder, *NAMES, "--json")
    assert json.loads(record)["in_both_splits"] == [["p0", "p1"]]


def test_one_split_is_missing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for mask in (folder / "val/masks").iterdir():
        mask.unlink()
    out, _ = fails(capsys, folder, *NAMES)
    assert re.search(r"no mask for p\d, p\d.*: expected", out)
    assert "3 images" in out  # the other split is looked at all the same
    _, error = fails(capsys, folder.parent, *NAMES)
    assert error.startswith("messnet: no split 'train' in")
    assert "no split 'val'" in error


def test_public_data_sets_by_option(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        (folder / split).rename(folder / "old")
        (folder / "old/images").rename(folder / split)
        (folder / "old/masks").rename(folder / f"{split}annot")
        (folder / "old").rmdir()
    text = check(capsys, folder, "--data.source", "camvid")
    assert "sky" in text
    assert "no pixel of pole, road, pavement, tree, sign symbol and 4 more" in text


def test_plot(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "new" / "glance.png"
    check(capsys, folder, *NAMES, "--plot", plot)
    picture = np.array(Image.open(plot).convert("RGB"))
    # The bars and overlays are in the colours of the classes.
    for colour in ((70, 130, 180), (222, 150, 90)):
        assert (np.abs(picture.astype(int) - colour).max(-1) <= 2).sum() > 500
    check(capsys, folder, "--plot", tmp_path / "unnamed.svg")  # 255 possible ids, and those two that are there
    assert (tmp_path / "unnamed.svg").read_text().count('id="ytick_') == 2
    _, error = fails(capsys, folder, *NAMES, "--plot", tmp_path / "x.gif")
    assert "--plot writes .png, .svg or .pdf, not 'x.gif'" in error


def test_groups_of_near_duplicates_are_written_and_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The way out that the note names works: the file that check-data writes is data.group."""
    for k in range(4):
        pixels = smooth_image(48, 64, seed=k // 2)
        Image.fromarray(np.clip(pixels + k, 0, 255).astype(np.uint8)).save(folder / "val/images" / f"frame{k}.png")
        Image.fromarray(np.full((48, 64), k % 2, np.uint8)).save(folder / "val/masks" / f"frame{k}.png")
    text = check(capsys, folder, *NAMES, "--groups", tmp_path / "groups.csv")
    assert "4 of 7 validation images are nearly the same as another one of them" in text
    rows = dict(line.split(",") for line in (tmp_path / "groups.csv").read_text().splitlines())
    assert len(rows) == 10
    assert rows["frame0"] == rows["frame1"] != rows["frame2"] == rows["frame3"]
    text = check(capsys, folder, *NAMES, "--data.group", tmp_path / "groups.csv")
    assert "groups: 5, of 1 to 2 images" in text
    assert "nearly the same as another" not in text
    record = json.loads(check(capsys, folder, *NAMES, "--json"))
    assert record["near_duplicates"]["in_val"] == [["frame0", "frame1"], ["frame2", "frame3"]]
    assert record["proposed_group"] is None
    _, error = fails(capsys, folder, "--groups", tmp_path / "groups.txt")
    assert "--groups writes .csv, not 'groups.txt'" in error


def test_names_in_both_splits_cannot_be_told_apart_in_a_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("images", "masks"):
        (folder / "val" / kind / "p1.png").rename(folder / "val" / kind / "p0.png")
    _, error = fails(capsys, folder, *NAMES, "--groups", tmp_path / "groups.csv")
    assert "both splits have images called p0: give each image a name of its own" in error


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("idd_lite", ["309 groups in train and 31 in val", "data.group: '^([^_]+)_' keeps each whole"]),
        ("camvid", ["3 groups in train and 1 in val", "0016E5 is in both splits", "cannot be split so"]),
    ],
)
def test_groups_of_public_data_are_proposed(name: str, lines: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip(f"needs ../shared/{name}")
    text = check(capsys, SHARED / name)
    assert not [line for line in lines if line not in text]


def test_sizes_of_readable_images_are_told_whatever_their_masks(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for k in (0, 2, 4):
        (folder / f"train/masks/p{k}.png").write_bytes(b"no image")
    upright = Image.fromarray(smooth_image(24, 16))
    upright.getexif()[0x0112] = 6  # on its side
    upright.save(folder / "train/images/p0.png", exif=upright.getexif())
    out, _ = fails(capsys, folder, *NAMES)
    assert "3 images, height x width: 12x16 (2), 16x24 (1)" in out
    assert "3 x unreadable file" in out


def test_images_that_are_not_rgb_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for k, mode in ((0, "L"), (2, "RGBA"), (4, "1")):
        path = folder / f"train/images/p{k}.png"
        Image.open(path).convert(mode).save(path)
    assert "images: grey (1), RGB with transparency (1), 1 bit (1); all are read as RGB" in check(
        capsys, folder, *NAMES
    )


def test_12_bits_in_16_are_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (3, 12, 16)).astype(np.uint16)
    values[:, 0, 0] = 4095
    for k, pixels in zip((0, 2, 4), values, strict=True):
        Image.fromarray(pixels).save(folder / f"train/images/p{k}.png")
    text = check(capsys, folder, *NAMES)
    assert "no value above 4095: 12-bit data, which is read as dark as 16 bits say, at most 15 of 255" in text
    assert "multiply it by 16" in text
    for k, pixels in zip((0, 2, 4), values, strict=True):  # the way out
        Image.fromarray(pixels * 16).save(folder / f"train/images/p{k}.png")
    assert "no value above" not in check(capsys, folder, *NAMES)
