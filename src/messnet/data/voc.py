"""PASCAL VOC 2012, 21 classes, as downloaded, with the extra labels of the Semantic Boundaries Dataset (SBD).

VOCtrainval_11-May-2012.tar holds VOCdevkit/VOC2012: JPEGImages, SegmentationClass (palette PNGs, 255 at borders) and
the lists ImageSets/Segmentation/{train,val,trainval}.txt. SBD's benchmark.tgz holds benchmark_RELEASE/dataset/cls, a
MATLAB file an image. The split "trainaug" (10 582 images, Hariharan et al. 2011) is VOC's train with its own labels
and what SBD labels besides, without VOC's val.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from messnet.data import IGNORE_INDEX
from messnet.data.image_files import FileDataset, MaskReader, unreadable
from messnet.data.listings import expect_files, find_root, list_files, read_names
from messnet.errors import DataError

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv/monitor",
)  # fmt: skip
PLACES = ("", "VOC2012", "VOCdevkit/VOC2012", "VOCtrainval_11-May-2012/VOCdevkit/VOC2012")
SBD_PLACES = ("", "dataset", "benchmark_RELEASE/dataset")


@dataclass(frozen=True, kw_only=True)
class VocOptions:
    """Options of the split "trainaug", which has extra labels."""

    sbd: Path | None = None
    """benchmark_RELEASE, from SBD's benchmark.tgz (reading it needs scipy). None: it lies beside VOCdevkit, or
    VOC2012/SegmentationClassAug holds the labels as PNGs."""


def voc_palette(num_classes: int = 21) -> NDArray[np.uint8]:
    """(num_classes, 3) RGB, as the development kit makes them: the bits of the index, spread over the channels."""
    palette = np.zeros((num_classes, 3), np.uint8)
    for k in range(num_classes):
        for bit in range(8):
            for channel in range(3):
                palette[k, channel] |= (k >> (3 * bit + channel) & 1) << (7 - bit)
    return palette


def open_voc(root: Path, split: str, options: VocOptions = VocOptions()) -> FileDataset[Path]:
    """One split: "train", "val", "trainval" or "trainaug". ``root`` is VOCdevkit, VOC2012, or what holds them. Raises
    DataError when files are missing."""
    base = find_root(
        root, PLACES, "ImageSets/Segmentation", download="VOCdevkit/VOC2012, from VOCtrainval_11-May-2012.tar"
    )
    lists = base / "ImageSets" / "Segmentation"
    is_augmented = split == "trainaug"
    names = read_names(lists / f"{'train' if is_augmented else split}.txt")
    labels = expect_files("mask", [f"{name}.png" for name in names], base / "SegmentationClass")
    if is_augmented:
        held_out = {*read_names(lists / "val.txt"), *names}
        extra = {stem: path for stem, path in _extra_labels(root, base, options).items() if stem not in held_out}
        names += list(extra)
        labels += extra.values()
    images = expect_files("image", [f"{name}.jpg" for name in names], base / "JPEGImages")
    pairs = list(zip(images, labels, strict=True))
    return FileDataset(pairs, _read_label, class_names=VOC_CLASSES, palette=voc_palette())


def _extra_labels(root: Path, base: Path, options: VocOptions) -> dict[str, Path]:
    """Label files by the name of their image, sorted."""
    converted = base / "SegmentationClassAug"
    if options.sbd is None and converted.is_dir():
        return _by_stem(list_files(converted), ".png", converted)
    places = [options.sbd] if options.sbd else [root, root.parent, base.parent.parent]
    for place in places:
        for inside in SBD_PLACES:
            folder = place / inside / "cls"
            if folder.is_dir():
                _expect_scipy()
                return _by_stem(list_files(folder), ".mat", folder)
    raise DataError(
        f"the split trainaug needs SBD's labels: no cls/*.mat in {options.sbd or root} and no {converted}; expected "
        "benchmark_RELEASE/dataset/cls, from benchmark.tgz, in data.voc.sbd"
    )


def _by_stem(files: dict[str, Path], suffix: str, folder: Path) -> dict[str, Path]:
    found = {path.stem: path for path in files.values() if path.suffix == suffix}
    if not found:
        raise DataError(f"no *{suffix} in {folder}: unpack the archive again")
    return found


_reader = MaskReader(
    {k: k for k in range(len(VOC_CLASSES))} | {IGNORE_INDEX: IGNORE_INDEX}, "0 to 20, and 255 for void, as in VOC 2012"
)


def _read_label(path: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    return _read_mat(path) if path.suffix == ".mat" else _reader(path, size)


def _read_mat(path: Path) -> NDArray[np.uint8]:
    """(H, W) class indices of SBD's structure GTcls."""
    loadmat = _expect_scipy()
    try:
        mask = loadmat(path)["GTcls"][0]["Segmentation"][0]
        values = np.asarray(mask, np.uint8)
    except (OSError, ValueError, TypeError, KeyError, IndexError, NotImplementedError) as error:
        raise unreadable(path, error) from error
    return _reader.to_classes(values, str(path))


def _expect_scipy() -> Callable[[Path], Any]:
    """scipy.io.loadmat, which gives structures as arrays of records."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DataError("SBD's .mat files are read with scipy: pip install 'messnet[data]'") from error
    return loadmat  # type: ignore[no-any-return]
