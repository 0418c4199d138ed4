"""Outlines from labelme, CVAT and COCO: masks that scikit-image and OpenCV draw alike, and errors of one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from skimage.draw import polygon2mask

from messnet.cli import main
from messnet.data.polygons import fill, open_polygons
from messnet.data.sources import DataOptions, open_dataset
from messnet.errors import DataError
from messnet.run.recipe import load_recipe

SIZE = (60, 80)
NAMES = ("background", "road", "car")
ROAD = [3.2, 20.7, 70.1, 14.4, 77.9, 55.3, 30.6, 30.2, 8.8, 50.5]
CAR = [20.0, 10.0, 45.0, 10.0, 45.0, 42.0, 20.0, 42.0]


def stars(count: int) -> list[list[float]]:
    """Polygons with re-entrant corners, some of them partly outside."""
    draw = np.random.default_rng(0)
    found = []
    for _ in range(count):
        corners = np.sort(draw.uniform(0, 2 * np.pi, draw.integers(3, 12)))
        radius = draw.uniform(2, 40, len(corners))
        centre = draw.uniform(-5, 85, 2)
        found.append((centre + np.stack([np.cos(corners), np.sin(corners)], 1) * radius[:, None]).ravel().tolist())
    return found


@pytest.mark.parametrize("ring", [ROAD, CAR, *stars(30)])
def test_polygons_are_filled_as_others_fill_them(ring: list[float]) -> None:
    ours = fill([ring], SIZE)
    # Theirs are coordinates of centres.
    corners = np.array(ring).reshape(-1, 2) - 0.5
    np.testing.assert_array_equal(ours, polygon2mask(SIZE, corners[:, ::-1]))
    theirs = cv2.fillPoly(np.zeros(SIZE, np.uint8), [np.round(corners * 256).astype(np.int32)], 1, shift=8)
    # OpenCV takes in the pixels that the outline touches.
    outline = cv2.polylines(np.zeros(SIZE, np.uint8), [np.round(corners * 256).astype(np.int32)], True, 1, 3, shift=8)
    assert not (ours.astype(np.uint8) != theirs)[outline == 0].any()


def expected() -> NDArray[np.uint8]:
    """The car on the road."""
    mask = np.zeros(SIZE, np.uint8)
    for label, ring in ((1, ROAD), (2, CAR)):
        mask[polygon2mask(SIZE, np.array(ring).reshape(-1, 2)[:, ::-1] - 0.5)] = label
    return mask


def pairs(ring: list[float]) -> list[list[float]]:
    return np.array(ring).reshape(-1, 2).tolist()


def labelme(root: Path, car: str = "car") -> None:
    shapes = [
        {"label": "road", "points": pairs(ROAD), "shape_type": "polygon", "group_id": None, "flags": {}},
        {"label": car, "points": [[20.0, 10.0], [45.0, 42.0]], "shape_type": "rectangle"},
    ]
    record = {"imagePath": "..\\photos\\a.png", "imageHeight": SIZE[0], "imageWidth": SIZE[1], "shapes": shapes}
    (root / "train").mkdir(exist_ok=True)
    (root / "train" / "a.json").write_text(json.dumps(record))


def cvat(root: Path, car: str = "car") -> None:
    points = ";".join(f"{x},{y}" for x, y in pairs(ROAD))
    (root / "train.xml").write_text(
        f'<?xml version="1.0"?><annotations><version>1.1</version><image id="0" name="a.png" width="80" height="60">'
        f'<box label="{car}" xtl="20" ytl="10" xbr="45" ybr="42" z_order="1"/>'
        f'<polygon label="road" points="{points}" z_order="0" occluded="0"/></image></annotations>'
    )


def cvat_masks(root: Path, car: str = "car") -> None:
    """CVAT's brush: rows of runs within a box."""
    road = expected() == 1
    top, left, bottom, right = 12, 2, 58, 79
    box = road[top:bottom, left:right].ravel()
    ends = np.flatnonzero(np.diff(np.concatenate([[0], box, [not box[-1]]])))
    runs = ", ".join(map(str, np.diff(np.concatenate([[0], ends])).tolist()))
    (root / "train").mkdir(exist_ok=True)
    (root / "train" / "annotations.xml").write_text(
        f'<annotations><image id="0" name="a.png" width="80" height="60"><mask label="road" rle="{runs}" left="{left}" '
        f'top="{top}" width="{right - left}" height="{bottom - top}" z_order="0"/>'
        f'<polygon label="{car}" points="20,10;45,10;45,42;20,42" z_order="1"/></image></annotations>'
    )


def coco(root: Path, car: str = "car") -> None:
    runs = [len(list(run)) for run in np.split(expected().T.ravel() == 2, changes((expected() == 2).T.ravel()))]
    annotations = [
        {"id": 1, "image_id": 7, "category_id": 40, "segmentation": [ROAD], "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 12, "segmentation": {"size": list(SIZE), "counts": runs}, "iscrowd": 0},
    ]
    record = {
        "images": [{"id": 7, "file_name": "a.png", "height": SIZE[0], "width": SIZE[1]}],
        "categories": [{"id": 40, "name": "road"}, {"id": 12, "name": car}],
        "annotations": annotations,
    }
    (root / "train").mkdir(exist_ok=True)
    (root / "train" / "_annotations.coco.json").write_text(json.dumps(record))


def changes(row: NDArray[np.bool_]) -> NDArray[np.int64]:
    return np.flatnonzero(row[1:] != row[:-1]) + 1


Write = Callable[..., None]
FORMATS = pytest.mark.parametrize("write", [labelme, cvat, cvat_masks, coco])


def with_image(root: Path, size: tuple[int, int] = SIZE) -> Path:
    (root / "images").mkdir(exist_ok=True)
    Image.new("RGB", size[::-1]).save(root / "images" / "a.png")
    return root


@FORMATS
def test_the_mask_is_what_was_drawn(tmp_path: Path, write: Write) -> None:
    write(with_image(tmp_path))
    options = DataOptions(source="polygons", root=tmp_path, class_names=NAMES)
    (sample,) = list(open_dataset(options, "train"))
    assert sample.name == "a"
    np.testing.assert_array_equal(sample.mask, expected())


@FORMATS
def test_without_a_background_the_rest_is_void(tmp_path: Path, write: Write) -> None:
    write(with_image(tmp_path), car="__ignore__")
    mask = open_polygons(tmp_path, "train", class_names=("car", "road"))[0].mask
    np.testing.assert_array_equal(mask, np.where(expected() == 1, 1, 255))


@FORMATS
def test_an_unknown_label_is_told(tmp_path: Path, write: Write) -> None:
    write(with_image(tmp_path), car="lorry")
    with pytest.raises(DataError, match=r"^lorry in the annotations of train .* is none of data.class_names") as told:
        open_polygons(tmp_path, "train", class_names=NAMES)
    assert "\n" not in str(told.value)


@FORMATS
def test_an_image_of_another_size_or_none_is_told(tmp_path: Path, write: Write) -> None:
    write(with_image(tmp_path, (30, 40)))
    with pytest.raises(DataError, match=r"a.png: it was annotated at 80 x 60 pixels and has 40 x 30"):
        open_polygons(tmp_path, "train", class_names=NAMES)[0]
    (tmp_path / "images" / "a.png").unlink()
    with pytest.raises(DataError, match=r"no image .*a.png for .*: expected it in"):
        open_polygons(tmp_path, "train", class_names=NAMES)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("train.xml", "<annotations><image", "cannot read"),
        ("train.json", '{"images": []}', "cannot read"),
        ("train.json", '{"images": [], "categories": [], "annotations": []}', "names no image"),
        ("train.xml", "<annotations><track label='a'/></annotations>", "CVAT for video"),
        ("val.xml", "<annotations/>", "no annotations of train .* expected SPLIT"),
        (
            "train.xml",
            "<annotations><image name='a.png' width='80' height='60'><polyline label='road' points='1,2;3,4'/></image>"
            "</annotations>",
            "holds a polyline, labelled 'road'",
        ),
        (
            "train.xml",
            "<annotations><image name='a.png' width='80' height='60'><polygon label='road' points='1,2;nan,4;5,6'/>"
            "</image></annotations>",
            "hold a corner that is no point",
        ),
    ],
)
def test_damaged_annotations_are_told_in_a_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (with_image(tmp_path) / name).write_text(text)
    with pytest.raises(DataError, match=message) as told:
        open_polygons(tmp_path, "train", class_names=NAMES)
    assert "\n" not in str(told.value)


def test_the_commands_take_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coco(with_image(tmp_path))
    (tmp_path / "val").mkdir()
    Image.new("RGB", SIZE[::-1], "red").save(tmp_path / "val" / "b.png")
    text = (tmp_path / "train" / "_annotations.coco.json").read_text().replace("a.png", "b.png")
    (tmp_path / "val" / "annotations.json").write_text(text)
    main(["check-data", str(tmp_path), "--data.source", "polygons", "--data.class_names", *NAMES])
    said = capsys.readouterr().out
    share = (expected() == 1).mean()
    assert f"{share:.2%}" in said
    assert "annotations, drawn on reading" in said
    main(["init", str(tmp_path), "--out", str(tmp_path / "recipe.yaml")])
    data = load_recipe(tmp_path / "recipe.yaml").data
    assert (data.source, data.class_names) == ("polygons", NAMES)
    np.testing.assert_array_equal(open_dataset(data, "val")[0].mask, expected())
