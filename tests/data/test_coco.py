"""Small files in the format of COCO 2017, against pycocotools, torchvision's reference and closed forms."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from messnet.data.coco import COCO_CATEGORIES, CocoOptions, decode_rle, draw, open_coco
from messnet.data.voc import VOC_CLASSES
from messnet.errors import DataError

coco_mask = pytest.importorskip("pycocotools.mask")
SIZE = (40, 60)
PERSON, CAR, ZEBRA, TV = 1, 3, 24, 72
# pycocotools 2.0.11 hands its own arrays to numpy in the old way.
pycocotools_as_it_is = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def box(x: float, y: float, width: float, height: float) -> list[list[float]]:
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def plain_runs(region: np.ndarray) -> dict[str, Any]:
    """Uncompressed run lengths, as crowds have them."""
    values = np.concatenate([[0], region.T.ravel().astype(int), [-1]])
    changes = np.flatnonzero(np.diff(values))
    counts = np.diff(np.concatenate([[0], changes]))
    return {"size": list(region.shape), "counts": counts.tolist()}


def annotation(image: int, category: int, segmentation: Any, *, area: float = 2000, crowd: int = 0) -> dict[str, Any]:
    return {
        "image_id": image, "category_id": category, "segmentation": segmentation, "area": area, "iscrowd": crowd,
    }  # fmt: skip


CROWD = np.zeros(SIZE, bool)
CROWD[30:, :20] = True
ANNOTATIONS = [
    annotation(7, PERSON, box(5, 5, 20, 10), area=200),
    annotation(7, CAR, box(15, 10, 20, 15), area=900),
    annotation(7, ZEBRA, box(40, 0, 20, 40)),
    annotation(7, PERSON, plain_runs(CROWD), crowd=1),
    annotation(3, TV, [*box(0, 0, 30, 20), *box(40, 20, 20, 20)], area=1000.5),
    annotation(9, TV, box(0, 0, 30, 20), area=1000),
    annotation(12, PERSON, plain_runs(CROWD), area=1500, crowd=1),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "annotations").mkdir()
    images = [{"id": k, "file_name": f"{k:012d}.jpg", "height": SIZE[0], "width": SIZE[1]} for k in (7, 3, 9, 12, 20)]
    for split in ("train", "val"):
        (tmp_path / f"{split}2017").mkdir()
        for k, image in enumerate(images):
            picture = np.random.default_rng(k).integers(0, 256, (*SIZE, 3)).astype(np.uint8)
            Image.fromarray(picture).save(tmp_path / f"{split}2017" / image["file_name"])
        record = {"images": images, "annotations": ANNOTATIONS, "categories": []}
        (tmp_path / f"annotations/instances_{split}2017.json").write_text(json.dumps(record))
    return tmp_path


def test_the_mapping_is_by_name() -> None:
    names = {
        1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train", 9: "boat",
        16: "bird", 17: "cat", 18: "dog", 19: "horse", 20: "sheep", 21: "cow", 44: "bottle", 62: "chair", 63: "couch",
        64: "potted plant", 67: "dining table", 72: "tv",
    }  # fmt: skip
    other = {"airplane": "aeroplane", "motorcycle": "motorbike", "couch": "sofa", "tv": "tv/monitor"}
    assert [other.get(names[k], names[k]) for k in COCO_CATEGORIES] == list(VOC_CLASSES[1:])


def test_masks(root: Path) -> None:
    dataset = open_coco(root, "val", is_training=False)
    assert [dataset[k].name for k in range(len(dataset))] == [f"{k:012d}" for k in (3, 7, 9, 12, 20)]
    expected = np.zeros(SIZE, np.uint8)
    expected[5:15, 5:25] = VOC_CLASSES.index("person")
    expected[10:25, 15:35] = VOC_CLASSES.index("car")
    expected[10:15, 15:25] = 255  # both
    expected[30:, :20] = 255  # a crowd
    assert np.array_equal(dataset[1].mask, expected)
    expected = np.zeros(SIZE, np.uint8)
    expected[:20, :30] = expected[20:, 40:] = VOC_CLASSES.index("tv/monitor")
    assert np.array_equal(dataset[0].mask, expected)  # two polygons are one object
    assert not dataset[4].mask.any()
    assert np.array_equal(dataset[1].image, np.array(Image.open(root / "val2017/000000000007.jpg")))


def test_training_leaves_out_images_with_little_of_these_classes(root: Path) -> None:
    def names(options: CocoOptions) -> list[int]:
        dataset = open_coco(root, "train", options, is_training=True)
        return [int(dataset[k].name) for k in range(len(dataset))]

    assert names(CocoOptions()) == [3, 7]  # 9 has exactly 1000, 12 only a crowd, 20 nothing
    assert names(CocoOptions(crowd="label")) == [3, 7, 12]
    assert names(CocoOptions(min_pixels=0)) == [3, 7, 9]
    with pytest.raises(DataError, match=r"no image of .*instances_train2017\.json has more than 90000 pixels"):
        names(CocoOptions(min_pixels=90000))


@pycocotools_as_it_is
def test_crowds_as_labels_are_torchvisions_masks(root: Path) -> None:
    """references/segmentation/coco_utils.py: the largest category where one object is, 255 where several are."""
    dataset = open_coco(root, "train", CocoOptions(crowd="label"), is_training=True)
    for k, image in enumerate((3, 7, 12)):
        masks, categories = [], []
        for one in ANNOTATIONS:
            if one["image_id"] == image and one["category_id"] in COCO_CATEGORIES:
                encoded = coco_mask.frPyObjects(one["segmentation"], *SIZE)
                decoded = coco_mask.decode(encoded)
                masks.append(decoded.reshape(*SIZE, -1).any(2))
                categories.append(1 + COCO_CATEGORIES.index(one["category_id"]))
        stack = np.stack(masks)
        target = (stack * np.array(categories)[:, None, None]).max(0)
        target[stack.sum(0) > 1] = 255
        assert np.array_equal(dataset[k].mask, target)


@pycocotools_as_it_is
@pytest.mark.parametrize("seed", range(5))
def test_run_lengths_as_pycocotools_decodes_them(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 200, 2).tolist()
    if seed % 2:
        region = rng.random((height, width)) < 0.5
    else:  # long runs
        region = np.zeros((height, width), bool)
        region[height // 3 :, width // 4 : width // 2 + 1] = True
    encoded = coco_mask.encode(np.asfortranarray(region.astype(np.uint8)))
    assert np.array_equal(decode_rle(encoded["counts"], (height, width)), region)
    assert np.array_equal(decode_rle(encoded["counts"].decode(), (height, width)), region)
    assert np.array_equal(decode_rle(plain_runs(region)["counts"], (height, width)), region)


@pycocotools_as_it_is
def test_polygons_as_pycocotools_draws_them() -> None:
    rng = np.random.default_rng(0)
    angles = np.sort(rng.uniform(0, 2 * np.pi, 12))
    star = np.stack([30 + 25 * np.cos(angles), 20 + 17 * np.sin(angles)], 1) * rng.uniform(0.6, 1, (12, 1))
    polygon = star.ravel().tolist()
    expected = coco_mask.decode(coco_mask.frPyObjects([polygon], *SIZE))[..., 0]
    assert 100 < expected.sum() < 2000
    mask = draw(json.dumps([[4, [polygon]]]).encode(), SIZE)
    assert np.array_equal(mask, 4 * expected)
    assert not draw(json.dumps([[4, [[1, 1, 30, 30]]]]).encode(), SIZE).any()  # two corners have no inside


def test_a_crowd_never_hides_an_object() -> None:
    everywhere = plain_runs(np.ones(SIZE, bool))
    mask = draw(json.dumps([[15, box(5, 5, 20, 10)], [255, everywhere]]).encode(), SIZE)
    assert (mask[5:15, 5:25] == 15).all()
    assert (mask == 255).sum() == SIZE[0] * SIZE[1] - 200


def test_damaged_annotations(root: Path) -> None:
    wrong = annotation(7, PERSON, {"size": list(SIZE), "counts": [5, 9]}, crowd=0)
    other_size = annotation(3, PERSON, plain_runs(np.ones((4, 4), bool)))
    listing = root / "annotations/instances_val2017.json"
    record = json.loads(listing.read_text())
    listing.write_text(json.dumps(record | {"annotations": [wrong, other_size]}))
    dataset = open_coco(root, "val", is_training=False)
    with pytest.raises(DataError, match=r"000000000007\.jpg: run lengths .* sum to 14, expected 40 x 60 pixels"):
        dataset[1]
    with pytest.raises(DataError, match=r"000000000003\.jpg: an annotation is 4 x 4 pixels but its image 60 x 40"):
        dataset[0]
    whole = json.dumps(record)
    cut = [whole[: len(whole) * k // 7] for k in range(1, 7)]
    for text in ("{", "[]", '{"images": [{}]}', '{"images": []}', whole.replace("},", "}", 1), *cut):
        listing.write_text(text)
        with pytest.raises(DataError, match=r"cannot read .*instances_val2017\.json .* annotations_trainval2017\.zip"):
            open_coco(root, "val", is_training=False)


def test_what_is_missing(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        DataError, match=r"no annotations/instances_train2017\.json in .* annotations_trainval2017\.zip"
    ):
        open_coco(root / "val2017", "train", is_training=True)
    (root / "val2017/000000000007.jpg").unlink()
    with pytest.raises(DataError, match=r"no image for 000000000007: expected .*val2017/000000000007\.jpg"):
        open_coco(root, "val", is_training=False)
    (root / "images").mkdir()
    (root / "train2017").rename(root / "images/train2017")  # the other usual place
    assert len(open_coco(root, "train", is_training=True)) == 2
    (root / "images/train2017").rename(root / "images/elsewhere")
    with pytest.raises(DataError, match=r"no folder .*train2017: expected the images, from train2017\.zip"):
        open_coco(root, "train", is_training=True)
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    with pytest.raises(DataError, match=r"drawn with pycocotools: pip install 'messnet\[data\]'"):
        open_coco(root, "train", is_training=True)


def test_the_annotation_file_is_read_however_it_is_laid_out(root: Path) -> None:
    listing = root / "annotations/instances_val2017.json"
    plain = open_coco(root, "val", is_training=False)
    record = json.loads(listing.read_text())
    record = {"info": {"year": [2017]}, "licenses": [], **dict(reversed(record.items()))}
    for indent, separators in ((None, (",", ":")), (3, (" ,", "\t: "))):
        listing.write_text(f"\n {json.dumps(record, indent=indent, separators=separators)} \n")
        other = open_coco(root, "val", is_training=False)
        assert len(other) == len(plain)
        assert all(np.array_equal(a.mask, b.mask) for a, b in zip(other, plain, strict=True))
