"""Small files in the format of PASCAL VOC 2012 and of SBD, against an independent reading of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image
from torchvision.datasets import VOCSegmentation

from messnet.data.voc import VOC_CLASSES, VocOptions, open_voc, voc_palette
from messnet.errors import DataError

SIZE = (20, 30)
TRAIN, VAL = ["2007_000001", "2007_000002"], ["2008_000003"]
SBD_TRAIN, SBD_VAL = ["2007_000002", "2009_000004"], ["2008_000003", "2010_000005"]


def labels(seed: int, num_values: int = 21) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, num_values, SIZE).astype(np.uint8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """VOCdevkit with five images, three of them labelled, and SBD beside it."""
    base = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (base / folder).mkdir(parents=True)
    names = sorted({*TRAIN, *VAL, *SBD_TRAIN, *SBD_VAL})
    for k, name in enumerate(names):
        picture = np.random.default_rng(100 + k).integers(0, 256, (*SIZE, 3)).astype(np.uint8)
        Image.fromarray(picture).save(base / "JPEGImages" / f"{name}.jpg")
    for name in (*TRAIN, *VAL):
        mask = labels(int(name[-1]))
        mask[0] = 255
        picture = Image.fromarray(mask)
        picture.putpalette(voc_palette(256).ravel().tolist())
        picture.save(base / "SegmentationClass" / f"{name}.png")
    for split, listed in (("train", TRAIN), ("val", VAL), ("trainval", TRAIN + VAL)):
        (base / "ImageSets/Segmentation" / f"{split}.txt").write_text("\n".join(listed) + "\n")
    sbd = tmp_path / "benchmark_RELEASE" / "dataset"
    (sbd / "cls").mkdir(parents=True)
    for split, listed in (("train", SBD_TRAIN), ("val", SBD_VAL)):
        (sbd / f"{split}.txt").write_text("\n".join(listed) + "\n")
        for name in listed:
            content = {"Segmentation": labels(10 + int(name[-1])), "CategoriesPresent": np.array([[1]], np.uint8)}
            scipy.io.savemat(sbd / "cls" / f"{name}.mat", {"GTcls": content})
    return tmp_path / "VOCdevkit"


def test_the_palette_is_the_development_kits() -> None:
    # The first ten colours as printed in the VOC 2012 documentation.
    printed = [
        (0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128), (128, 128, 128),
        (64, 0, 0), (192, 0, 0),
    ]  # fmt: skip
    assert voc_palette()[:10].tolist() == [list(colour) for colour in printed]
    assert voc_palette()[20].tolist() == [0, 64, 128]
    assert voc_palette(256)[255].tolist() == [224, 224, 192]
    assert len(VOC_CLASSES) == 21


@pytest.mark.parametrize("split", ["train", "val", "trainval"])
def test_as_torchvision_reads_it(root: Path, split: str) -> None:
    expected = VOCSegmentation(str(root.parent), year="2012", image_set=split)
    dataset = open_voc(root, split)
    assert len(dataset) == len(expected)
    for sample, (picture, mask) in zip((dataset[k] for k in range(len(dataset))), expected, strict=True):
        assert np.array_equal(sample.image, np.array(picture))
        assert np.array_equal(sample.mask, np.array(mask))
        assert (sample.mask[0] == 255).all()
    assert dataset.header(0).label_format.startswith("palette PNG")


def test_the_root_may_be_the_folder_above_or_below(root: Path) -> None:
    for place in (root.parent, root, root / "VOC2012"):
        assert len(open_voc(place, "train")) == 2


def test_trainaug_is_what_either_labels_but_never_val(root: Path) -> None:
    dataset = open_voc(root, "trainaug")
    samples = {sample.name: sample for sample in (dataset[k] for k in range(len(dataset)))}
    assert list(samples) == ["2007_000001", "2007_000002", "2009_000004", "2010_000005"]
    assert set(samples) == ({*TRAIN} | {*SBD_TRAIN, *SBD_VAL}) - {*VAL}
    # An image of VOC's own train split has VOC's labels, with void borders; the others have SBD's.
    assert (samples["2007_000002"].mask[0] == 255).all()
    for name in ("2009_000004", "2010_000005"):
        assert np.array_equal(samples[name].mask, labels(10 + int(name[-1])))
    assert [dataset.header(k).label_format[:7] for k in range(4)] == ["palette", "palette", "MATLAB", "MATLAB"]


def test_sbd_elsewhere(root: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "deep" / "below"
    elsewhere.mkdir(parents=True)
    (tmp_path / "benchmark_RELEASE").rename(elsewhere / "benchmark_RELEASE")
    with pytest.raises(DataError, match=r"trainaug needs SBD's labels: .* from benchmark\.tgz, in data\.voc\.sbd"):
        open_voc(root, "trainaug")
    for place in (elsewhere, elsewhere / "benchmark_RELEASE", elsewhere / "benchmark_RELEASE" / "dataset"):
        assert len(open_voc(root, "trainaug", VocOptions(sbd=place))) == 4


def test_converted_labels(root: Path) -> None:
    folder = root / "VOC2012" / "SegmentationClassAug"
    folder.mkdir()
    for name in (*TRAIN, *VAL, "2009_000004"):
        Image.fromarray(labels(7)).save(folder / f"{name}.png")
    dataset = open_voc(root, "trainaug")
    assert [dataset[k].name for k in range(len(dataset))] == [*TRAIN, "2009_000004"]
    assert np.array_equal(dataset[2].mask, labels(7))


def test_what_is_missing(root: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no ImageSets/Segmentation in .*nowhere \(no such folder\): .*11-May-2012\.tar"
    ):
        open_voc(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match=r"no split 'test': .*; there are train, trainval, val"):
        open_voc(root, "test")
    (root / "VOC2012/SegmentationClass/2007_000001.png").unlink()
    with pytest.raises(
        DataError, match=r"no mask for 2007_000001: expected .*SegmentationClass/2007_000001\.png; unpack"
    ):
        open_voc(root, "train")
    (root / "VOC2012/JPEGImages/2008_000003.jpg").unlink()
    with pytest.raises(DataError, match=r"no image for 2008_000003: expected .*JPEGImages/2008_000003\.jpg"):
        open_voc(root, "val")


def test_damaged_labels(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "benchmark_RELEASE/dataset/cls/2009_000004.mat"
    file.write_bytes(file.read_bytes()[:150])
    with pytest.raises(DataError, match=r"cannot read .*2009_000004\.mat"):
        open_voc(root, "trainaug")[2]
    scipy.io.savemat(file, {"GTcls": {"Segmentation": labels(1) + np.uint8(20)}})
    with pytest.raises(DataError, match=r"2009_000004\.mat has the ids 21, 22, .*: expected 0 to 20, and 255 for void"):
        open_voc(root, "trainaug")[2]


def test_scipy_is_named_where_it_is_missing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "scipy.io", None)
    with pytest.raises(DataError, match=r"read with scipy: pip install 'messnet\[data\]'"):
        open_voc(root, "trainaug")
    assert len(open_voc(root, "train")) == 2
