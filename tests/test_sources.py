"""Which data set a recipe means."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from messnet.data.folders import FolderDataset
from messnet.data.scenes import Scenes, ScenesOptions
from messnet.data.sources import DataOptions, open_dataset
from messnet.errors import DataError

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
    assert isinstance(train, FolderDataset)
    assert (train[0].image[0, 0, 0], val[0].image[0, 0, 0]) == (10, 20)
    assert val[0].mask[0].tolist() == [0, 1, 2, 255, 255, 1]
    with pytest.raises(DataError, match="no split 'train'"):
        open_dataset(DataOptions(source="folder", root=tmp_path, class_names=("a",)), "train")


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
        (DataOptions(source="folders"), "no data source 'folders': expected 'scenes', 'folder' or 'module:function'"),
        (DataOptions(source="folder", class_names=("a",)), "needs data.root"),
        (DataOptions(source="folder", root=Path("somewhere")), "and data.class_names"),
        (DataOptions(source="folder", root=Path("no/such"), class_names=("a",)), "no folder no/such"),
    ],
)
def test_what_is_no_data_set(options: DataOptions, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_dataset(options, "train")
