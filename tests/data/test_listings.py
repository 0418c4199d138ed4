"""Names of files as people's systems and editors leave them."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from messnet.apps.predictions import image_files
from messnet.data.cityscapes import open_cityscapes
from messnet.data.folders import open_folder
from messnet.data.image_files import FileDataset
from messnet.data.listings import bare_name, list_files, read_names, read_text
from messnet.data.sources import DataOptions, open_dataset
from messnet.data.voc import open_voc
from messnet.errors import DataError

NAMES = ("ground", "thing")
WORD = "Straße_é"


def save(path: Path, *, is_mask: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if is_mask else "RGB", (6, 4)).save(path)


def listed(root: Path, names: list[str]) -> FileDataset[Path]:
    """A folder with images and masks of these names, and all.txt as somebody else wrote it."""
    for name in names:
        save(root / "images" / f"{name}.png")
        save(root / "masks" / f"{name}.png", is_mask=True)
    return open_folder(root, "all", class_names=NAMES)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_lists_in_any_encoding(tmp_path: Path, encoding: str, newline: str) -> None:
    text = newline.join([WORD, "plain", ""])
    (tmp_path / "all.txt").write_bytes(text.encode(encoding))
    dataset = listed(tmp_path, [WORD, "plain"])
    assert [sample.name for sample in (dataset[0], dataset[1])] == [WORD, "plain"]
    assert read_names(tmp_path / "all.txt") == [WORD, "plain"]


def test_a_list_for_voc_in_utf_16(tmp_path: Path) -> None:
    base = tmp_path / "VOC2012"
    save(base / "JPEGImages/one.jpg")
    save(base / "SegmentationClass/one.png", is_mask=True)
    (base / "ImageSets/Segmentation").mkdir(parents=True)
    (base / "ImageSets/Segmentation/train.txt").write_bytes("one\r\n".encode("utf-16"))
    assert open_voc(tmp_path, "train")[0].name == "one"


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_bytes(b"\x81\x8d\x8f")  # undefined in code page 1252, and no UTF-8
    with pytest.raises(DataError, match=r"cannot read .*all\.txt .*: expected a text file; save it as UTF-8"):
        read_text(tmp_path / "all.txt")


@pytest.mark.parametrize("line", ["a", "a.png", "a.JPG", "images/a.png", "images\\a.png", "  a  "])
def test_lists_may_hold_suffixes_and_paths(tmp_path: Path, line: str) -> None:
    (tmp_path / "all.txt").write_text(line)
    assert listed(tmp_path, ["a", "b"])[0].name == "a"


def test_points_in_names_are_no_suffixes() -> None:
    assert bare_name("scan.2021.05", (".png",)) == "scan.2021.05"
    assert bare_name("scan.2021.png", (".png",)) == "scan.2021"


@pytest.mark.parametrize(("image_form", "mask_form", "list_form"), [("NFC", "NFD", "NFC"), ("NFD", "NFC", "NFD")])
def test_accents_match_in_both_forms(tmp_path: Path, image_form: str, mask_form: str, list_form: str) -> None:
    image, mask, line = (unicodedata.normalize(form, "été") for form in (image_form, mask_form, list_form))
    assert image != mask
    save(tmp_path / "images" / f"{image}.png")
    save(tmp_path / "masks" / f"{mask}.png", is_mask=True)
    (tmp_path / "all.txt").write_text(line, encoding="utf-8")
    assert open_folder(tmp_path, "all", class_names=NAMES)[0].name == unicodedata.normalize("NFC", "été")


def test_a_name_in_both_forms_is_ambiguous(tmp_path: Path) -> None:
    for form in ("NFC", "NFD"):
        save(tmp_path / "train/images" / f"{unicodedata.normalize(form, 'été')}.png")
    save(tmp_path / "train/masks/x.png", is_mask=True)
    if len(list((tmp_path / "train/images").iterdir())) < 2:
        pytest.skip("this file system takes both forms for one name")
    with pytest.raises(DataError, match="twice, with accents written in two ways: keep one"):
        open_folder(tmp_path, "train", class_names=NAMES)


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        save(tmp_path / "train" / folder / "a.png", is_mask=folder == "masks")
        for hidden in ("._a.png", ".b.png"):
            (tmp_path / "train" / folder / hidden).write_bytes(b"\x00\x05\x16\x07 Mac OS X")
    assert len(open_folder(tmp_path, "train", class_names=NAMES)) == 1
    assert list(list_files(tmp_path / "train/images")) == ["a.png"]


def test_hidden_files_are_no_images_in_cityscapes(tmp_path: Path) -> None:
    for folder, end in (("leftImg8bit", "_leftImg8bit.png"), ("gtFine", "_gtFine_labelIds.png")):
        save(tmp_path / folder / "train/bonn" / f"bonn_0{end}", is_mask=folder == "gtFine")
        (tmp_path / folder / "train/bonn" / f"._bonn_0{end}").write_bytes(b"Mac OS X")
    assert len(open_cityscapes(tmp_path, "train")) == 1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("road",),
            r"'road' is the only class.*class_names: \[background, road\].* mask_values: \[0, 255\]",
        ),
        (("a", "b", "a"), "a is the name of more than one class: give each class a name of its own"),
        (("a", 0), "class names are words, not 0: put them in quotes"),
    ],
)
def test_class_names_that_cannot_be(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    mask = np.array([[0, 255]] * 2, np.uint8)
    for folder, pixels in (("images", np.zeros((2, 2, 3), np.uint8)), ("masks", mask)):
        (tmp_path / "train" / folder).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "train" / folder / "x.png")
    with pytest.raises(DataError, match=message):
        open_dataset(DataOptions(source="folder", root=tmp_path, class_names=names), "train")


def test_the_way_out_of_one_class(tmp_path: Path) -> None:
    """What the message of a single class advises reads 0 and 255 as the two classes."""
    mask = np.array([[0, 255, 255]] * 2, np.uint8)
    for folder, pixels in (("images", np.zeros((2, 3, 3), np.uint8)), ("masks", mask)):
        (tmp_path / "train" / folder).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "train" / folder / "x.png")
    options = DataOptions(source="folder", root=tmp_path, class_names=("background", "road"), mask_values=(0, 255))
    np.testing.assert_array_equal(open_dataset(options, "train")[0].mask, mask // 255)


def test_a_users_own_data_set_needs_two_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one_class_module.py").write_text(
        "from types import SimpleNamespace\ndef make(split):\n    return SimpleNamespace(class_names=('only',))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DataError, match="'only' is the only class"):
        open_dataset(DataOptions(source="one_class_module:make"), "train")


def test_hidden_files_are_no_images_to_predict(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "._a.png").write_bytes(b"Mac OS X")
    assert image_files([tmp_path]) == [tmp_path / "a.png"]
