"""Images that were labelled with outlines, as the tools for that save them: labelme's JSON files, CVAT's XML ("CVAT for
images 1.1") and COCO's JSON with categories of one's own.

    SPLIT/a.jpg, SPLIT/a.json                                labelme: a file for each image, beside it
    SPLIT.xml, or SPLIT/annotations.xml                      CVAT: one file
    SPLIT.json, SPLIT/annotations.json, SPLIT/_annotations.coco.json, annotations/instances_SPLIT.json    COCO: one file

The images of the last two lie in SPLIT/, SPLIT/images/ or images/. A pixel belongs to the last outline that covers it,
in the order of the file (of CVAT by z_order); pixels under none are of the class called background, or void where there
is no such class.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias, cast
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from messnet.data import IGNORE_INDEX
from messnet.data.coco import decode_rle
from messnet.data.image_files import FileDataset, SampleError, expect_class_names
from messnet.data.listings import list_files, read_text, some
from messnet.errors import DataError
from messnet.images.colours import default_palette

BACKGROUND = ("background", "_background_")
VOID = ("void", "ignore", "__ignore__")
"""Labels that mean no class: the underscores are labelme's."""
LAYOUT = (
    "expected SPLIT/*.json of labelme, SPLIT.xml or SPLIT/annotations.xml of CVAT, or COCO's SPLIT.json, "
    "SPLIT/annotations.json, SPLIT/_annotations.coco.json or annotations/instances_SPLIT.json"
)
_CIRCLE = [2 * math.pi * k / 64 for k in range(64)]

Ring: TypeAlias = list[float]
"""x, y, x, y, ... in pixels from the left upper corner of the image, whose first pixel has its centre at 0.5, 0.5."""


class Shape(NamedTuple):
    """One region with its label. ``rings`` are polygons, all of which belong to it; ``runs`` lengths of runs of pixels
    off, on, off, ...: column by column over the whole image, or row by row over the ``box`` (left, top, width,
    height)."""

    label: str
    rings: list[Ring]
    runs: list[int] | str = ""
    box: tuple[int, int, int, int] | None = None


class Labelled(NamedTuple):
    """One image: its file, (height, width) as annotated, and its shapes from the lowest to the one on top."""

    path: Path
    size: tuple[int, int]
    shapes: list[Shape]


def open_polygons(root: Path, split: str, *, class_names: Sequence[str]) -> FileDataset[bytes]:
    """One split. Reads the annotations, and no image. Raises DataError when files are missing or damaged, or hold a
    label that is neither in ``class_names`` nor one of VOID."""
    names = expect_class_names(class_names)
    images = read_annotations(root, split)
    indices = {name: k for k, name in enumerate(names)}
    ground = next((indices[name] for name in BACKGROUND if name in indices), IGNORE_INDEX)
    indices = dict.fromkeys(VOID, IGNORE_INDEX) | dict.fromkeys(BACKGROUND, ground) | indices
    if unknown := [label for label in count_labels(images) if label not in indices]:
        raise DataError(
            f"{some(unknown)} in the annotations of {split} in {root} is none of data.class_names: add it there, or "
            f"rename it; {' and '.join(VOID)} are ignored"
        )
    pairs = []
    for image in images:
        if any(len(ring) % 2 or not all(map(math.isfinite, ring)) for shape in image.shapes for ring in shape.rings):
            raise DataError(f"the annotations of {image.path} hold a corner that is no point: export them again")
        shapes = [(indices[shape.label], *shape[1:]) for shape in image.shapes]
        # As JSON: thousands of nested lists would be copied page by page into every worker.
        pairs.append((image.path, json.dumps([image.size, ground, shapes], separators=(",", ":")).encode()))
    return FileDataset(pairs, draw, class_names=names, palette=default_palette(len(names)))


def count_labels(images: Sequence[Labelled]) -> Counter[str]:
    """Regions per label."""
    return Counter(shape.label for image in images for shape in image.shapes)


def has_polygons(root: Path, split: str) -> bool:
    return _find(root, split) is not None


def read_annotations(root: Path, split: str) -> list[Labelled]:
    """The images of a split with what was drawn on them. Raises DataError."""
    found = _find(root, split)
    if found is None:
        raise DataError(f"no annotations of {split} in {root}: {LAYOUT}")
    source, read = found
    try:
        images = list(read(source, [root / split, root / split / "images", root / "images", root]))
    except (OSError, ElementTree.ParseError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"cannot read {source} ({error!r}): export the annotations again") from error
    if not images:
        raise DataError(f"{source} names no image: export the annotations again")
    return images


_Reader: TypeAlias = Callable[[Path, list[Path]], Iterator[Labelled]]


def _find(root: Path, split: str) -> tuple[Path, _Reader] | None:
    for path in (root / f"{split}.xml", root / split / "annotations.xml"):
        if path.is_file():
            return path, _read_cvat
    inside = [root / split / name for name in ("annotations.json", "_annotations.coco.json")]
    for path in (root / f"{split}.json", *inside, root / "annotations" / f"instances_{split}.json"):
        if path.is_file():
            return path, _read_coco
    folder = root / split
    return (folder, _read_labelme) if folder.is_dir() and any(folder.glob("*.json")) else None


def _read_labelme(folder: Path, places: list[Path]) -> Iterator[Labelled]:
    for path in (file for name, file in list_files(folder).items() if name.endswith(".json")):
        record = json.loads(read_text(path))
        image = _image(record["imagePath"], [folder, *places], path)
        shapes = [Shape(shape["label"], [_labelme_ring(shape, path)]) for shape in record["shapes"]]
        yield Labelled(image, (int(record["imageHeight"]), int(record["imageWidth"])), shapes)


def _labelme_ring(shape: dict[str, object], path: Path) -> Ring:
    points = cast("list[list[float]]", shape["points"])
    match shape.get("shape_type", "polygon"):
        case "polygon":
            return [value for point in points for value in point]
        case "rectangle":
            return _box(*points[0], *points[1])
        case "circle":  # its centre, and a point on it
            (x, y), edge = points
            radius = math.dist((x, y), edge)
            return _ellipse(x, y, radius, radius)
        case kind:
            raise DataError(
                f"{path} holds a {kind}, labelled {shape['label']!r}: expected polygons, rectangles, circles"
            )


def _read_cvat(path: Path, places: list[Path]) -> Iterator[Labelled]:
    document = ElementTree.parse(path).getroot()
    if document.find("track") is not None:
        raise DataError(f"{path} is of CVAT for video: export it as 'CVAT for images 1.1'")
    for image in document.iter("image"):
        drawn = [one for one in image if one.get("label") is not None]
        drawn.sort(key=lambda one: int(one.get("z_order", 0)))  # stable: those of one level as in the file
        shapes = [_cvat_shape(one, path) for one in drawn if one.tag != "tag"]
        size = int(image.attrib["height"]), int(image.attrib["width"])
        yield Labelled(_image(image.attrib["name"], places, path), size, shapes)


def _cvat_shape(drawn: ElementTree.Element, path: Path) -> Shape:
    label, values = drawn.attrib["label"], drawn.attrib
    if float(values.get("rotation", 0)):
        raise DataError(f"{path} holds a {drawn.tag} that is rotated, labelled {label!r}: draw it as a polygon")

    def numbers(*names: str) -> list[float]:
        return [float(values[name]) for name in names]

    match drawn.tag:
        case "polygon":
            return Shape(label, [[float(value) for value in values["points"].replace(";", ",").split(",")]])
        case "box":
            return Shape(label, [_box(*numbers("xtl", "ytl", "xbr", "ybr"))])
        case "ellipse":
            return Shape(label, [_ellipse(*numbers("cx", "cy", "rx", "ry"))])
        case "mask":
            left, top, width, height = map(int, numbers("left", "top", "width", "height"))
            return Shape(label, [], [int(run) for run in values["rle"].split(",")], (left, top, width, height))
        case kind:
            raise DataError(f"{path} holds a {kind}, labelled {label!r}: expected polygons, boxes, ellipses and masks")


def _read_coco(path: Path, places: list[Path]) -> Iterator[Labelled]:
    record = json.loads(read_text(path))
    names = {category["id"]: str(category["name"]) for category in record["categories"]}
    shapes: dict[int, list[Shape]] = {image["id"]: [] for image in record["images"]}
    for annotation in record["annotations"]:
        # A crowd's region holds many objects and what is between them.
        label = VOID[0] if annotation.get("iscrowd") else names[annotation["category_id"]]
        region = annotation["segmentation"]
        shape = Shape(label, region) if isinstance(region, list) else Shape(label, [], region["counts"])
        shapes[annotation["image_id"]].append(shape)
    for image in record["images"]:
        size = int(image["height"]), int(image["width"])
        yield Labelled(_image(image["file_name"], places, path), size, shapes[image["id"]])


def _image(name: str, places: Sequence[Path], annotations: Path) -> Path:
    """The file of an image that annotations name, maybe by a path of another machine."""
    relative = name.replace("\\", "/")
    candidates = [folder / part for part in (relative, relative.rpartition("/")[2]) for folder in places]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise DataError(f"no image {name} for {annotations}: expected it in {' or '.join(map(str, places[:3]))}")
    return found


def _box(left: float, top: float, right: float, bottom: float) -> Ring:
    return [left, top, right, top, right, bottom, left, bottom]


def _ellipse(x: float, y: float, across: float, down: float) -> Ring:
    return [value for angle in _CIRCLE for value in (x + across * math.cos(angle), y + down * math.sin(angle))]


def draw(annotations: bytes, size: tuple[int, int]) -> NDArray[np.uint8]:
    """JSON of [size, class index of the ground, [[class index or IGNORE_INDEX, rings, runs, box], ...]] to a mask
    (H, W)."""
    annotated, ground, shapes = json.loads(annotations)
    if tuple(annotated) != size:
        raise SampleError(
            f"it was annotated at {annotated[1]} x {annotated[0]} pixels and has {size[1]} x {size[0]} (width x "
            "height): annotate and train on the same files",
            kind="mask of another size",
        )
    mask = np.full(size, ground, np.uint8)
    for label, rings, runs, box in shapes:
        if box:
            left, top, width, height = box
            part = mask[top : top + height, left : left + width]
            # Rows of the box are columns of the transposed picture, which run lengths go down.
            part[decode_rle(runs, (width, height)).T] = label
        else:
            mask[decode_rle(runs, size) if runs else fill(rings, size)] = label
    return mask


def fill(rings: Sequence[Ring], size: tuple[int, int]) -> NDArray[np.bool_]:
    """(H, W) of the pixels whose centres lie inside of any of the polygons, by the even-odd rule."""
    region = np.zeros(size, bool)
    for ring in rings:
        x, y = np.array(ring, np.float64).reshape(-1, 2).T
        to_x, to_y = np.roll(x, -1), np.roll(y, -1)
        # The rows whose middles an edge crosses: from its upper end on, its lower end left out, so that a corner counts
        # for one of its two edges.
        ends = np.clip(np.ceil(np.sort([y, to_y], 0) - 0.5), 0, size[0]).astype(np.int64)
        counts = ends[1] - ends[0]
        edge = np.repeat(np.arange(len(x)), counts)
        rows = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts) + ends[0, edge]
        if not len(rows):
            continue
        crossing = x[edge] + (rows + 0.5 - y[edge]) * ((to_x - x)[edge] / (to_y - y)[edge])
        columns = np.clip(np.ceil(crossing - 0.5), 0, size[1]).astype(np.int64)
        # From a crossing on, pixels of the row change from outside to inside and back: inside is where their number so
        # far is odd, which it stays when bytes overflow.
        top, bottom = rows.min(), rows.max() + 1
        crossings = np.zeros((bottom - top, size[1] + 1), np.uint8)
        np.add.at(crossings, (rows - top, columns), 1)
        region[top:bottom] |= np.cumsum(crossings[:, :-1], axis=1, dtype=np.uint8) % 2 == 1
    return region
