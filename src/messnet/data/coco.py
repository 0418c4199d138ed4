"""MS COCO 2017 with the 21 classes of PASCAL VOC, as downloaded: annotations/instances_{train,val}2017.json from
annotations_trainval2017.zip, and the images in train2017/ and val2017/ (or images/train2017/ ...).

As torchvision's references/segmentation/coco_utils.py does it: the twenty categories that VOC has too, every other
pixel is background, pixels of two objects are void, and training images with too little of these categories are left
out. Unlike there, crowd regions are void by default: inside of them nobody drew where the class is and where not.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

import msgspec
import numpy as np
from numpy.typing import NDArray

from messnet.data import IGNORE_INDEX
from messnet.data.image_files import FileDataset, SampleError
from messnet.data.listings import expect_files, find_root
from messnet.data.voc import VOC_CLASSES, voc_palette
from messnet.errors import DataError

COCO_CATEGORIES = (5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72)
"""COCO's category ids of VOC's classes 1 to 20."""


@dataclass(frozen=True, kw_only=True)
class CocoOptions:
    """How annotations become masks."""

    min_pixels: int = 1000
    """Training images need more than this area of VOC's categories, in pixels, as annotated; 0 keeps all that have
    any. Validation keeps every image."""
    crowd: Literal["ignore", "label"] = "ignore"
    """Regions that hold many objects: void, or their class as in torchvision's reference."""


class _RunLengths(TypedDict):
    """A region as lengths of runs of pixels, column by column."""

    size: tuple[int, int]
    """(height, width)"""
    counts: list[int] | str


class _Image(msgspec.Struct):
    id: int
    file_name: str


class _Annotation(msgspec.Struct):
    """One region of one image."""

    image_id: int
    category_id: int
    area: float
    segmentation: msgspec.Raw
    """Polygons or run lengths, as they stand in the file: decoded, COCO's take several times its size in memory."""
    iscrowd: int = 0


class _Listing(msgspec.Struct):
    """What is read of an annotation file; all else in it is skipped."""

    images: list[_Image]
    annotations: list[_Annotation]


def open_coco(root: Path, split: str, options: CocoOptions = CocoOptions(), *, is_training: bool) -> FileDataset[bytes]:
    """One split: "train" or "val". Reads the annotation file, which takes a while for train2017. Raises DataError when
    files are missing."""
    _expect_pycocotools()  # before minutes of reading
    listing = f"annotations/instances_{split}2017.json"
    base = find_root(
        root, ("", "coco", "COCO"), listing, download=f"it from annotations_trainval2017.zip beside {split}2017/"
    )
    try:
        found = msgspec.json.decode((base / listing).read_bytes(), type=_Listing)
    except (OSError, msgspec.MsgspecError) as error:
        raise DataError(f"cannot read {base / listing} ({error}): unpack annotations_trainval2017.zip again") from error
    regions: defaultdict[int, list[bytes]] = defaultdict(list)
    areas: defaultdict[int, float] = defaultdict(float)
    for one in found.annotations:
        if one.category_id not in COCO_CATEGORIES:
            continue
        label = 1 + COCO_CATEGORIES.index(one.category_id)
        # A crowd that is void teaches nothing, so its area must not keep an image in the training split.
        if one.iscrowd and options.crowd == "ignore":
            label = IGNORE_INDEX
        else:
            areas[one.image_id] += one.area
        # Kept as JSON: a hundred thousand nested lists would be copied page by page into every worker.
        regions[one.image_id].append(b"[%d,%b]" % (label, bytes(one.segmentation)))
    images = {image.id: image.file_name for image in found.images}
    # Sorted, as torchvision does it: the order in the file is of no meaning.
    ids = sorted(images)
    if is_training:
        ids = [key for key in ids if areas[key] > options.min_pixels]
    if not ids:
        raise DataError(f"no image of {base / listing} has more than {options.min_pixels} pixels of VOC's classes")
    folder = next((f for f in (base / f"{split}2017", base / "images" / f"{split}2017") if f.is_dir()), None)
    if folder is None:
        raise DataError(f"no folder {base / f'{split}2017'}: expected the images, from {split}2017.zip")
    paths = expect_files("image", [images[key] for key in ids], folder)
    labels = [b"[%b]" % b",".join(regions[key]) for key in ids]
    return FileDataset(list(zip(paths, labels, strict=True)), draw, class_names=VOC_CLASSES, palette=voc_palette())


def draw(annotations: bytes, size: tuple[int, int]) -> NDArray[np.uint8]:
    """JSON of [class index or IGNORE_INDEX, segmentation] pairs to a mask (H, W): 0 where there is none, IGNORE_INDEX
    where two are. A region to ignore never hides an object."""
    mask = np.zeros(size, np.uint8)
    objects = np.zeros(size, np.uint8)
    ignored = np.zeros(size, bool)
    for label, segmentation in json.loads(annotations):
        region = _region(segmentation, size)
        if label == IGNORE_INDEX:
            ignored |= region
        else:
            mask[region] = label
            # No more than 2, or the 256th region over one pixel would make the byte 0 again.
            np.minimum(objects + region, 2, out=objects)
    mask[(objects > 1) | (ignored & (objects == 0))] = IGNORE_INDEX
    return mask


def _region(segmentation: list[list[float]] | _RunLengths, size: tuple[int, int]) -> NDArray[np.bool_]:
    """(H, W) of a list of polygons [x, y, x, y, ...] or a run-length encoding."""
    if isinstance(segmentation, list):
        from pycocotools.mask import frPyObjects

        # What has less than three corners has no inside; frPyObjects would take four numbers for a box.
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
        encoded = frPyObjects(polygons, *size) if polygons else []
    else:
        encoded = [segmentation]
    region = np.zeros(size, bool)
    for part in encoded:
        if tuple(part["size"]) != size:
            raise SampleError(
                f"an annotation is {part['size'][1]} x {part['size'][0]} pixels but its image {size[1]} x {size[0]} "
                "(width x height): unpack images and annotations of the same year",
                kind="mask of another size",
            )
        region |= decode_rle(part["counts"], size)
    return region


def decode_rle(counts: Sequence[int] | str | bytes, size: tuple[int, int]) -> NDArray[np.bool_]:
    """COCO's run lengths to (H, W): pixels off, on, off, ... column by column, as numbers or in COCO's string."""
    if isinstance(counts, str | bytes):
        counts = _unpacked(counts.encode() if isinstance(counts, str) else counts)
    # pycocotools' own decode leaves memory as it finds it beyond runs that end too early.
    if sum(counts) != size[0] * size[1]:
        raise SampleError(
            f"run lengths of an annotation sum to {sum(counts)}, expected {size[0]} x {size[1]} pixels: it is damaged",
            kind="unreadable file",
        )
    is_on = np.arange(len(counts)) % 2 == 1
    # Runs go down the columns: rows of the transposed picture.
    return np.repeat(is_on, np.asarray(counts, np.int64)).reshape(size[::-1]).T


def _unpacked(text: bytes) -> list[int]:
    """pycocotools' rleFrString: five bits a character, from 48 on, low ones first, bit 5 for "more follows"; from the
    fourth run on the difference to the last but one, so a number may be negative: bit 4 of its last character."""
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = character - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:  # the sign, as in two's complement of as many bits as have come
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    return runs


def _expect_pycocotools() -> None:
    try:
        import pycocotools.mask  # noqa: F401
    except ImportError as error:
        raise DataError("COCO's polygons are drawn with pycocotools: pip install 'messnet[data]'") from error
