"""Which data set a recipe means."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from messnet.data.coco import CocoOptions
from messnet.data.image_files import FileDataset
from messnet.data.scenes import Scenes, ScenesOptions
from messnet.data.sources import DataOptions, open_dataset
from messnet.errors import DataError, RecipeError
from messnet.run.recipe import load_recipe

OWN = """
from messnet.data.scenes import Scenes, ScenesOptions

def scenes(split):
    return Scenes(split, ScenesOptions(size=(64, 64), num_train=3, num_val=0))

def broken(split):
    return split.no_such_attribute
"""


def test_scenes() -> None:
    options = DataOptions(scenes=ScenesOptions(size=(64, 72), num_train=3, num_val=2, seed=5))
    train, val = open_dataset(options, "train"), open_dataset(options, "val")
    assert isinstance(train, Scenes)
    assert (len(train), len(val)) == (3, 2)
    np.testing.assert_array_equal(val[1].image, Scenes("val", options.scenes)[1].image)
    assert (train[0].image != val[0].image).any()


def test_folders_with_splits_of_other_names(tmp_path: Path) -> None:
    for split, shade in (("learn", 10), ("check", 20)):
        for folder, image in (
            ("images", Image.new("RGB", (6, 4), (shade,) * 3)),
            ("masks", Image.fromarray(np.array([[0, 1, 2, 3, 255, 1]] * 4, np.uint8))),
        ):
            (tmp_path / split / folder).mkdir(parents=True)
            image.save(tmp_path / split / folder / "one.png")
    options = DataOptions(
        source="folder",
        root=tmp_path,
        class_names=("a", "b", "c"),
        void_index=3,
        train_split="learn",
        val_split="check",
    )
    train, val = open_dataset(options, "train"), open_dataset(options, "val")
    assert isinstance(train, FileDataset)
    assert (train[0].image[0, 0, 0], val[0].image[0, 0, 0]) == (10, 20)
    assert val[0].mask[0].tolist() == [0, 1, 2, 255, 255, 1]
    with pytest.raises(DataError, match="no split 'train'"):
        open_dataset(DataOptions(source="folder", root=tmp_path, class_names=("a", "b")), "train")


def test_a_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_scenes.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    assert len(open_dataset(DataOptions(source="own_scenes:scenes"), "train")) == 3
    with pytest.raises(DataError, match=r"val split of data source 'own_scenes:scenes' holds no image"):
        open_dataset(DataOptions(source="own_scenes:scenes"), "val")
    with pytest.raises(AttributeError, match="no_such_attribute"):  # the user's bug keeps its traceback
        open_dataset(DataOptions(source="own_scenes:broken"), "train")
    for missing in ("own_scenes:missing", "no_such_module_here:scenes"):
        with pytest.raises(DataError, match=f"data set '{missing}' not found .*; expected 'module:function'"):
            open_dataset(DataOptions(source=missing), "train")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (DataOptions(source="folder", class_names=("a",)), "needs data.root"),
        (DataOptions(source="folder", root=Path("somewhere")), "and data.class_names"),
        (DataOptions(source="voc"), r"'voc' needs data\.root: the folder VOCdevkit, from VOCtrainval_11-May-2012\.tar"),
        (DataOptions(source="coco"), r"'coco' needs data\.root: a folder with annotations/"),
        (DataOptions(source="voc", root=Path("no/such")), r"no ImageSets/Segmentation in no/such \(no such folder\)"),
        (DataOptions(source="ade20k", root=Path(), void_index=0), r"data\.void_index is for the source 'folder'"),
        (
            DataOptions(source="camvid", root=Path(), class_names=("a",)),
            r"data\.class_names is for the source 'folder'",
        ),
        (DataOptions(source="folder", root=Path("no/such"), class_names=("a", "b")), "no folder no/such"),
    ],
)
def test_what_is_no_data_set(options: DataOptions, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_dataset(options, "train")


def test_a_source_that_there_is_not_is_told_with_the_recipe() -> None:
    with pytest.raises(RecipeError, match=r"no data source 'folders': expected 'scenes', 'folder', .* or 'module:func"):
        DataOptions(source="folders")


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def test_public_data_sets_by_name(tmp_path: Path) -> None:
    """One image each, class 1 everywhere: the recipe's name leads to the right reader with its classes."""
    image, ones = np.zeros((8, 8, 3)), np.ones((8, 8))
    for split, long in (("train", "training"), ("val", "validation")):
        save(tmp_path / f"camvid/{split}/x.png", image)
        save(tmp_path / f"camvid/{split}annot/x.png", ones)
        save(tmp_path / "voc/JPEGImages/x.jpg", image)
        save(tmp_path / "voc/SegmentationClass/x.png", ones)
        (tmp_path / "voc/ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"voc/ImageSets/Segmentation/{split}.txt").write_text("x\n")
        save(tmp_path / f"cityscapes/leftImg8bit/{split}/bonn/x_leftImg8bit.png", image)
        save(tmp_path / f"cityscapes/gtFine/{split}/bonn/x_gtFine_labelIds.png", 8 * ones)
        save(tmp_path / f"ade20k/images/{long}/x.jpg", image)
        save(tmp_path / f"ade20k/annotations/{long}/x.png", 2 * ones)
    expected = {"camvid": (11, "building"), "voc": (21, "aeroplane"), "cityscapes": (19, "sidewalk")}
    for source, (num_classes, name) in (expected | {"ade20k": (150, "building")}).items():
        options = DataOptions(source=source, root=tmp_path / source)
        for split in ("train", "val"):
            dataset = open_dataset(options, split)
            assert len(dataset) == 1
            assert (len(dataset.class_names), dataset.class_names[1]) == (num_classes, name)
            assert dataset.palette.shape == (num_classes, 3)
            assert (dataset[0].mask == 1).all()


def test_only_coco_needs_to_know_what_is_trained_on(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    square = [[0, 0, 8, 0, 8, 8, 0, 8]]
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        save(tmp_path / f"{split}2017/x.jpg", np.zeros((8, 8, 3)))
        record = {
            "images": [{"id": 1, "file_name": "x.jpg"}],
            "annotations": [{"image_id": 1, "category_id": 5, "segmentation": square, "area": 64}],
        }
        (tmp_path / f"annotations/instances_{split}2017.json").write_text(json.dumps(record))
    options = DataOptions(source="coco", root=tmp_path)
    assert (open_dataset(options, "val")[0].mask == 1).all()
    with pytest.raises(DataError, match="more than 1000 pixels"):
        open_dataset(options, "train")
    few = DataOptions(source="coco", root=tmp_path, coco=CocoOptions(min_pixels=10))
    assert len(open_dataset(few, "train")) == 1


def test_sbd_is_asked_for_in_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "voc.yaml"
    path.write_text("data: {source: voc, train_split: trainaug, voc: {sbd: somewhere}, root: VOCdevkit}\n")
    data = load_recipe(path).data
    assert (data.source, data.train_split, data.voc.sbd) == ("voc", "trainaug", Path("somewhere"))
    path.write_text("data: {source: folder, class_names: [a, b], mask_values: [0x000000, 0x800000]}\n")
    assert load_recipe(path).data.mask_values == (0, 0x800000)
    assert load_recipe(path, ["--data.mask_values", "0", "255"]).data.mask_values == (0, 255)
