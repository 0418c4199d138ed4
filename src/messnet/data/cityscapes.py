"""Cityscapes, 19 classes of 34, as downloaded: leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip, unpacked in
one folder: leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png and gtFine/SPLIT/CITY/NAME_gtFine_labelIds.png, or
NAME_gtFine_labelTrainIds.png as cityscapesScripts makes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from messnet.data import IGNORE_INDEX
from messnet.data.image_files import FileDataset, MaskReader
from messnet.data.listings import find_root, some, visible
from messnet.errors import DataError

# Name, id in labelIds, colour; the train ids are the positions (cityscapesScripts, helpers/labels.py).
LABELS = (
    ("road", 7, (128, 64, 128)), ("sidewalk", 8, (244, 35, 232)), ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)), ("fence", 13, (190, 153, 153)), ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)), ("traffic sign", 20, (220, 220, 0)), ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)), ("sky", 23, (70, 130, 180)), ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)), ("car", 26, (0, 0, 142)), ("truck", 27, (0, 0, 70)), ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)), ("motorcycle", 32, (0, 0, 230)), ("bicycle", 33, (119, 11, 32)),
)  # fmt: skip
CITYSCAPES_CLASSES = tuple(name for name, _, _ in LABELS)
NUM_IDS = 34
"""All other ids below are void, as is the licence plate's: -1, 255 in 8 bits."""
IMAGE, IDS, TRAIN_IDS = "_leftImg8bit.png", "_gtFine_labelIds.png", "_gtFine_labelTrainIds.png"


def open_cityscapes(root: Path, split: str) -> FileDataset[Path]:
    """One split ("train", "val"). Raises DataError when files are missing."""
    base = find_root(
        root,
        ("", "cityscapes", "Cityscapes"),
        "leftImg8bit",
        download="leftImg8bit and gtFine, from leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip",
    )
    folder = base / "leftImg8bit" / split
    images = _by_name(folder, IMAGE)
    if not images:
        raise DataError(f"no images {folder}/CITY/NAME{IMAGE}: expected them from leftImg8bit_trainvaltest.zip")
    labels = base / "gtFine" / split
    # The archive holds labelIds. Whoever has only train ids made them with cityscapesScripts and removed the others.
    # The 15 ids that the benchmark leaves out are void, not errors; the dictionary on the right wins over this one.
    classes = dict.fromkeys((*range(NUM_IDS), 255), IGNORE_INDEX) | {ids: k for k, (_, ids, _) in enumerate(LABELS)}
    suffix, reader = IDS, MaskReader(classes, "0 to 33, the ids of Cityscapes")
    masks = _by_name(labels, IDS)
    if not masks and (masks := _by_name(labels, TRAIN_IDS)):
        classes = {k: k for k in range(len(LABELS))} | {255: IGNORE_INDEX}
        suffix, reader = TRAIN_IDS, MaskReader(classes, "0 to 18, and 255 for void")
    if missing := [name for name in images if name not in masks]:
        raise DataError(
            f"no mask for {some(missing)}: expected {labels}/{images[missing[0]].parent.name}/{missing[0]}{suffix}, "
            "from gtFine_trainvaltest.zip"
        )
    return FileDataset(
        [(path, masks[name]) for name, path in images.items()],
        reader,
        class_names=CITYSCAPES_CLASSES,
        palette=np.array([colour for _, _, colour in LABELS], np.uint8),
    )


def _by_name(folder: Path, suffix: str) -> dict[str, Path]:
    """The files of all cities, sorted."""
    return {path.name.removesuffix(suffix): path for path in visible(folder.glob(f"*/*{suffix}"))}
