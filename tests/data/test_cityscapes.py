"""Small files in the format of Cityscapes, against torchvision's reading and its table of ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import Cityscapes

from messnet.data.cityscapes import CITYSCAPES_CLASSES, open_cityscapes
from messnet.errors import DataError

NAMES = ("aachen_000000_000019", "aachen_000001_000019", "bochum_000000_000313")
TRAIN_IDS = {c.id: c.train_id for c in Cityscapes.classes if c.id >= 0} | {255: 255}  # -1 is 255 in 8 bits


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for k, name in enumerate(NAMES):
        rng, city = np.random.default_rng(k), name.split("_")[0]
        image = tmp_path / "leftImg8bit/train" / city / f"{name}_leftImg8bit.png"
        labels = tmp_path / "gtFine/train" / city / f"{name}_gtFine_labelIds.png"
        for path, pixels in (
            (image, rng.integers(0, 256, (12, 40, 3))),
            (labels, rng.choice([*range(34), 255], (12, 40))),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
        (labels.parent / f"{name}_gtFine_color.png").write_bytes(b"not to be read")
    return tmp_path


def test_as_torchvision_reads_it(root: Path) -> None:
    expected = Cityscapes(str(root), split="train", mode="fine", target_type="semantic")
    dataset = open_cityscapes(root, "train")
    assert [dataset[k].name for k in range(3)] == [f"{name}_leftImg8bit" for name in NAMES]
    by_name = {Path(path).stem: k for k, path in enumerate(expected.images)}
    for k in range(3):
        sample = dataset[k]
        picture, ids = expected[by_name[sample.name]]
        assert np.array_equal(sample.image, np.array(picture))
        assert np.array_equal(sample.mask, np.vectorize(TRAIN_IDS.get)(np.array(ids)))


def test_names_and_colours() -> None:
    official = sorted((c for c in Cityscapes.classes if 0 <= c.train_id < 255), key=lambda c: c.train_id)
    assert tuple(c.name for c in official) == CITYSCAPES_CLASSES


def test_palette(root: Path) -> None:
    official = sorted((c for c in Cityscapes.classes if 0 <= c.train_id < 255), key=lambda c: c.train_id)
    assert open_cityscapes(root, "train").palette.tolist() == [list(c.color) for c in official]


def test_train_ids_as_the_scripts_make_them(root: Path) -> None:
    ids = open_cityscapes(root, "train")
    expected = [ids[k].mask for k in range(3)]
    for path in sorted(root.glob("gtFine/train/*/*_labelIds.png")):
        mask = np.vectorize(TRAIN_IDS.get)(np.array(Image.open(path))).astype(np.uint8)
        Image.fromarray(mask).save(str(path).replace("labelIds", "labelTrainIds"))
        path.unlink()
    train_ids = open_cityscapes(root, "train")
    for k in range(3):
        assert np.array_equal(train_ids[k].mask, expected[k])


def test_what_is_missing(root: Path) -> None:
    with pytest.raises(DataError, match=r"no leftImg8bit in .*: expected .* gtFine_trainvaltest\.zip"):
        open_cityscapes(root / "gtFine", "train")
    with pytest.raises(
        DataError, match=r"no images .*/val/CITY/NAME_leftImg8bit\.png: .*leftImg8bit_trainvaltest\.zip"
    ):
        open_cityscapes(root, "val")
    label = root / "gtFine/train/bochum" / f"{NAMES[2]}_gtFine_labelIds.png"
    Image.fromarray(np.full((12, 40), 34, np.uint8)).save(label)
    with pytest.raises(DataError, match=r"has the ids 34: expected 0 to 33"):
        open_cityscapes(root, "train")[2]
    label.unlink()
    with pytest.raises(DataError, match=rf"no mask for {NAMES[2]}: expected .*bochum/{NAMES[2]}_gtFine_labelIds\.png"):
        open_cityscapes(root, "train")
