"""ADE20K, the 150 classes of the scene parsing benchmark, as downloaded: ADEChallengeData2016.zip with
images/{training,validation}/NAME.jpg and annotations/{training,validation}/NAME.png, where 0 is void and k is class
k - 1."""

from __future__ import annotations

from pathlib import Path

from messnet.data import IGNORE_INDEX
from messnet.data.image_files import FileDataset, MaskReader
from messnet.data.listings import expect_files, find_root, list_files
from messnet.errors import DataError
from messnet.images.colours import default_palette

# The first name of each line of objectInfo150.txt; those that occur twice (screen) are told apart.
ADE20K_CLASSES = tuple(
    """
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door, table,
mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair, seat,
fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers, counter,
sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow,
screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop,
stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck, tower,
chandelier, awning, streetlight, booth, television, airplane, dirt track, apparel, pole, land, bannister, escalator,
ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything, swimming pool,
stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name, microwave,
pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan,
fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag
""".replace("\n", " ").strip().split(", ")
)  # fmt: skip
SPLITS = {"train": "training", "val": "validation"}


def open_ade20k(root: Path, split: str) -> FileDataset[Path]:
    """One split: "train" or "val" (or "training", "validation"). The palette is this package's: of the benchmark's
    own colours two are the same. Raises DataError when files are missing."""
    base = find_root(
        root,
        ("", "ADEChallengeData2016"),
        "annotations",
        download="ADEChallengeData2016/annotations and images, from ADEChallengeData2016.zip",
    )
    name = SPLITS.get(split, split)
    folders = base / "images" / name, base / "annotations" / name
    images = {file: path for file, path in list_files(folders[0]).items() if path.suffix == ".jpg"}
    if not images:
        raise DataError(f"no *.jpg in {folders[0]}: unpack ADEChallengeData2016.zip again")
    masks = expect_files("mask", [f"{path.stem}.png" for path in images.values()], folders[1])
    # 0 is "other objects", which the benchmark does not score.
    classes = {0: IGNORE_INDEX} | {k + 1: k for k in range(len(ADE20K_CLASSES))}
    return FileDataset(
        list(zip(images.values(), masks, strict=True)),
        MaskReader(classes, "0 for void and 1 to 150, as in ADEChallengeData2016"),
        class_names=ADE20K_CLASSES,
        palette=default_palette(len(ADE20K_CLASSES)),
    )
