"""Images that belong together: what a recipe says of it, and what names and pixels show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from messnet.data import SegmentationDataset
from messnet.data.cityscapes import open_cityscapes
from messnet.data.groups import near_duplicates, proposed_pattern, thumbnail, with_groups
from messnet.data.image_files import read_image
from messnet.data.listings import visible
from messnet.data.sources import DataOptions, open_dataset
from messnet.errors import DataError

SHARED = Path(__file__).parents[3] / "shared"
NAMES = ("7_001", "7_002", "12_001", "12_105")


def folder(root: Path, names: tuple[str, ...] = NAMES) -> Path:
    for kind in ("images", "masks"):
        (root / "val" / kind).mkdir(parents=True)
        for name in names:
            Image.new("RGB" if kind == "images" else "L", (4, 4)).save(root / "val" / kind / f"{name}.png")
    return root


def groups_of(dataset: SegmentationDataset) -> list[str]:
    return [dataset[v].group for v in range(len(dataset))]


def opened(root: Path, rule: str | None) -> SegmentationDataset:
    return open_dataset(DataOptions(source="folder", root=root, class_names=("a", "b"), group=rule), "val")


@pytest.mark.parametrize(
    ("rule", "groups"),
    [
        (None, ["", "", "", ""]),
        ("^([^_]+)_", ["12", "12", "7", "7"]),
        (r"\d+", ["12", "12", "7", "7"]),  # without parentheses all that it matches
        (r"^(\d).*(\d)$", ["1_1", "1_5", "7_1", "7_2"]),
        ("^(7)|.*", ["12_001", "12_105", "7", "7"]),
        ("folder:2", ["val"] * 4),
    ],
)
def test_rules(tmp_path: Path, rule: str | None, groups: list[str]) -> None:
    assert groups_of(opened(folder(tmp_path), rule)) == groups


@pytest.mark.parametrize("delimiter", [",", ";", "\t", " ", ", "])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "cp1252"])
def test_a_file_of_two_columns(tmp_path: Path, delimiter: str, encoding: str) -> None:
    rows = [("name", "group"), *((f"images/{name}.png", f"Zoë{k // 2}") for k, name in enumerate(NAMES))]
    (tmp_path / "groups.csv").write_bytes("\r\n".join(delimiter.join(row) for row in rows).encode(encoding))
    assert groups_of(opened(folder(tmp_path), "groups.csv")) == ["Zoë1", "Zoë1", "Zoë0", "Zoë0"]


def test_the_folder_that_holds_an_image(tmp_path: Path) -> None:
    for kind, end in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
        for city in ("bonn", "ulm"):
            (tmp_path / kind / "val" / city).mkdir(parents=True)
            picture = Image.new("RGB" if kind == "leftImg8bit" else "L", (4, 4))
            picture.save(tmp_path / kind / "val" / city / f"{city}_0_{end}.png")
    dataset = with_groups(open_cityscapes(tmp_path, "val"), "folder", tmp_path)
    assert groups_of(dataset) == ["bonn", "ulm"]


def test_a_data_set_that_is_not_in_files() -> None:
    dataset = open_dataset(DataOptions(group=r"^(.*)\d$"), "val")
    assert dataset[11].name.startswith(dataset[11].group)
    assert dataset.class_names == open_dataset(DataOptions(), "val").class_names
    with pytest.raises(DataError, match=r"data\.group 'nothing' finds no group of"):
        open_dataset(DataOptions(group="nothing"), "val")[0]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("^(7)_", r"data\.group '\^\(7\)_' finds no group of 12_001, 12_105: every image needs one; widen it"),
        ("(", r"data\.group '\(' is no regular expression .*; expected one, such as .*, or 'folder', or a file"),
        ("no.csv", r"no file no\.csv of groups: expected two columns"),
        ("short.csv", r"short\.csv has the line '7_002': expected two columns"),
        ("part.csv", r"data\.group 'part\.csv' finds no group of 12_001, 12_105"),
    ],
)
def test_rules_that_cannot_be(tmp_path: Path, rule: str, message: str) -> None:
    (tmp_path / "short.csv").write_text("7_001,a\n7_002\n")
    (tmp_path / "part.csv").write_text("7_001,a\n7_002,a\n")
    with pytest.raises(DataError, match=message):
        opened(folder(tmp_path), rule)


def noise(seed: int) -> np.ndarray:
    """A picture (64, 96, 3) with structure at the scale of a thumbnail's pixel."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((96, 64), Image.Resampling.BICUBIC))


def test_near_duplicates_and_chains_of_them() -> None:
    scene, other = noise(0), noise(1)
    brighter = (scene * 0.8 + 30).astype(np.uint8)
    blank = np.full_like(scene, 90)
    steps = [(scene * (1 - k / 12) + other * (k / 12)).astype(np.uint8) for k in range(13)]  # a slow dissolve
    labels = near_duplicates([thumbnail(image) for image in (scene, noise(2), brighter, blank, blank + 1)])
    assert labels[0] == labels[2]
    assert len(set(labels)) == 4  # blank ones are like nothing
    assert len(set(near_duplicates([thumbnail(image) for image in steps]))) == 1
    assert len(set(near_duplicates([thumbnail(steps[0]), thumbnail(steps[-1])]))) == 2
    assert near_duplicates([]).tolist() == []


def test_a_pattern_needs_names_and_pixels_that_agree() -> None:
    scenes = {name: noise(k) for k, name in enumerate(["rome", "oslo", "bern", "riga", "kyiv"])}
    rng = np.random.default_rng(0)
    names = [f"{name}_{k:03d}" for name in scenes for k in range(6)]
    images = [
        (0.6 * scenes[name.split("_")[0]] + 0.4 * noise(100 + k)).astype(np.uint8) for k, name in enumerate(names)
    ]
    thumbnails = [thumbnail(image) for image in images]
    assert proposed_pattern(names, thumbnails) == "^([^_]+)_"
    shuffled = [names[v] for v in rng.permutation(len(names))]
    assert proposed_pattern(shuffled, thumbnails) is None  # names without a meaning
    assert proposed_pattern([f"IMG_{k}" for k in range(30)], thumbnails) is None  # one group
    assert proposed_pattern([f"{k}" for k in range(30)], thumbnails) is None
    joined = [name.replace("_", "") for name in names]
    assert proposed_pattern(joined, thumbnails) == r"^(.*?)[_\-. ]*\d+$"
    assert proposed_pattern(["a"], thumbnails[:1]) is None


@pytest.mark.parametrize(
    ("name", "num_groups"),
    [("idd_lite/val", 31), pytest.param("camvid/train", 3, id="camvid")],
)
def test_real_names(name: str, num_groups: int) -> None:
    """IDD-Lite's drives and CamVid's recordings: the first part of the name."""
    if not (SHARED / name).is_dir():
        pytest.skip(f"needs ../shared/{name}")
    files = visible((SHARED / name / "images").iterdir())
    names = [path.stem for path in files]
    pattern = proposed_pattern(names, [thumbnail(read_image(path)) for path in files])
    assert pattern == "^([^_]+)_"
    assert len({stem.split("_")[0] for stem in names}) == num_groups
