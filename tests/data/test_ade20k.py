"""Small files in the format of ADEChallengeData2016."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from messnet.data.ade20k import ADE20K_CLASSES, open_ade20k
from messnet.errors import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """ADEChallengeData2016 in ``root``; the second image is grey, as some are."""
    base = tmp_path / "ADEChallengeData2016"
    for split, short in (("training", "train"), ("validation", "val")):
        for folder in ("images", "annotations"):
            (base / folder / split).mkdir(parents=True)
        for k in (1, 2):
            rng = np.random.default_rng(k)
            picture = Image.fromarray(rng.integers(0, 256, (16, 24, 3)).astype(np.uint8))
            picture = picture.convert("L") if k == 2 else picture
            picture.save(base / "images" / split / f"ADE_{short}_{k:08d}.jpg")
            ids = rng.permutation(np.arange(384) % 151).reshape(16, 24).astype(np.uint8)
            Image.fromarray(ids).save(base / "annotations" / split / f"ADE_{short}_{k:08d}.png")
    return tmp_path


@pytest.mark.parametrize(("split", "folder"), [("train", "training"), ("val", "validation"), ("training", "training")])
def test_zero_is_void_and_the_rest_one_less(root: Path, split: str, folder: str) -> None:
    dataset = open_ade20k(root, split)
    assert len(dataset) == 2
    for k in range(2):
        sample = dataset[k]
        ids = np.array(Image.open(root / "ADEChallengeData2016/annotations" / folder / f"{sample.name}.png"))
        picture = Image.open(root / "ADEChallengeData2016/images" / folder / f"{sample.name}.jpg").convert("RGB")
        assert np.array_equal(sample.image, np.array(picture))
        assert (ids == 0).any()
        assert (sample.mask[ids == 0] == 255).all()
        assert np.array_equal(sample.mask[ids > 0], ids[ids > 0] - 1)
    assert len(open_ade20k(root / "ADEChallengeData2016", split)) == 2


def test_names_and_colours(root: Path) -> None:
    assert len(set(ADE20K_CLASSES)) == len(ADE20K_CLASSES) == 150
    # Some lines of the benchmark's objectInfo150.txt, which counts from 1.
    lines = {1: "wall", 13: "person", 21: "car", 45: "chest of drawers", 80: "hovel", 99: "bottle", 131: "screen"}
    lines |= {137: "traffic light", 150: "flag"}
    assert {k: ADE20K_CLASSES[k - 1] for k in lines} == lines
    assert len(np.unique(open_ade20k(root, "val").palette, axis=0)) == 150


def test_what_is_missing(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no annotations in .*nowhere .* from ADEChallengeData2016\.zip"):
        open_ade20k(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match=r"no folder .*images/test"):
        open_ade20k(root, "test")
    annotation = root / "ADEChallengeData2016/annotations/training/ADE_train_00000002.png"
    Image.fromarray(np.full((16, 24), 151, np.uint8)).save(annotation)
    with pytest.raises(DataError, match=r"has the ids 151: expected 0 for void and 1 to 150"):
        open_ade20k(root, "train")[1]
    annotation.unlink()
    with pytest.raises(DataError, match=r"no mask for ADE_train_00000002: expected .*ADE_train_00000002\.png"):
        open_ade20k(root, "train")
