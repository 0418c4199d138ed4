"""What ``messnet init`` writes for images in folders, and that it is a recipe that works."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.images import smooth_image
from messnet.cli import main
from messnet.data.checks import check_dataset
from messnet.data.sources import open_dataset
from messnet.errors import DataError
from messnet.records.exit_tables import ExitTables
from messnet.run.checks import recipe_problems
from messnet.run.proposal import propose_recipe, split_images
from messnet.run.recipe import Recipe, load_recipe

SIZE = (64, 80)


def folder(
    root: Path,
    values: list[object],
    *,
    splits: tuple[str, str] = ("train", "val"),
    count: int = 6,
    size: tuple[int, int] = SIZE,
) -> Path:
    """Images of two views each, with masks whose pixels take ``values``: indices or RGB colours."""
    table = np.array(values, np.uint8)
    for split in splits:
        for k in range(count):
            rng = np.random.default_rng([k, split == splits[0]])
            image = smooth_image(*size, seed=int(rng.integers(1 << 30)))
            mask = table[rng.integers(0, len(table), size)]
            for kind, pixels in (("images", image), ("masks", mask)):
                (root / split / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(root / split / kind / f"{split[0]}{k}.png")
    return root


def proposed(root: Path) -> Recipe:
    """The recipe, read back; a run would take it."""
    path = root.parent / "proposed.yaml"
    path.write_text(propose_recipe(root))
    recipe = load_recipe(path)
    reports = [check_dataset(open_dataset(recipe.data, split)) for split in ("train", "val")]
    assert [report.problems for report in reports] == [(), ()]
    assert recipe_problems(recipe, *reports) == ()
    return recipe


def test_photographs_are_resized(tmp_path: Path) -> None:
    data = proposed(folder(tmp_path / "data", [0, 1], count=2, size=(1104, 1200))).data
    assert data.resize == 720
    assert open_dataset(data, "val")[0].mask.shape == (720, 782)


@pytest.mark.parametrize(
    ("values", "names", "mask_values"),
    [
        ([0, 1, 2], ("class_0", "class_1", "class_2"), (0, 1, 2)),
        ([0, 1, 255], ("class_0", "class_1"), (0, 1)),  # 255 is void
        ([0, 255], ("background", "foreground"), (0, 255)),
        ([1, 2, 3], ("class_1", "class_2", "class_3"), (1, 2, 3)),
        ([7, 9, 40], ("class_7", "class_9", "class_40"), (7, 9, 40)),
        ([(0, 0, 0), (128, 0, 0)], ("colour_0x000000", "colour_0x800000"), (0, 0x800000)),
    ],
)
def test_classes_from_the_values_of_masks(
    tmp_path: Path, values: list[object], names: tuple[str, ...], mask_values: tuple[int, ...]
) -> None:
    recipe = proposed(folder(tmp_path / "data", values))
    assert (recipe.data.class_names, recipe.data.mask_values) == (names, mask_values)
    mask = open_dataset(recipe.data, "train")[0].mask
    assert set(np.unique(mask)) <= {*range(len(names)), 255}


def test_names_in_a_file_of_the_users(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", [0, 1, 255])
    (root / "classes.txt").write_bytes("no\r\ntraffic light: red\r\n".encode("utf-16"))
    assert proposed(root).data.class_names == ("no", "traffic light: red")
    (root / "classes.txt").write_text("of another number\n")
    assert proposed(root).data.class_names == ("class_0", "class_1")


COLOURS = [(0, 0, 0), (128, 128, 128), (128, 64, 128)]
ASSIGNED = (("road", "sky"), (0x804080, 0x808080), 0)


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        # A list of names: no colour is paired by its place, and black is void where the list has void.
        ("classes.txt", "sky\nroad\nvoid\n", (("colour_0x804080", "colour_0x808080"), (0x804080, 0x808080), 0)),
        ("classes.txt", "sky\nroad\n", (("colour_0x804080", "colour_0x808080"), (0x804080, 0x808080), 0)),
        ("classes.txt", "sky 128 128 128\nroad 128 64 128\nvoid 0 0 0\n", ASSIGNED),
        ("classes.txt", "128, 128, 128, sky\n128, 64, 128, road\n0, 0, 0, Unlabelled\n", ASSIGNED),
        ("classes.txt", "sky #808080\nroad 0x804080\nignore #000000\nabsent 7 7 7\n", ASSIGNED),
        (
            "labelmap.txt",
            "# label:color_rgb:parts:actions\nvoid:0,0,0::\nsky:128,128,128::\nroad:128,64,128::\n",
            ASSIGNED,
        ),
    ],
)
def test_names_of_colours(
    tmp_path: Path, file: str, text: str, expected: tuple[tuple[str, ...], tuple[int, ...], int]
) -> None:
    root = folder(tmp_path / "data", COLOURS)
    (root / file).write_text(text)
    data = proposed(root).data
    assert (data.class_names, data.mask_values, data.void_index) == expected
    assert ("from your list" in propose_recipe(root)) == (expected == ASSIGNED)


def test_a_name_that_means_void(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", [0, 1, 2])
    (root / "classes.txt").write_text("sky\nroad\nvoid\n")
    data = proposed(root).data
    assert (data.class_names, data.mask_values, data.void_index) == (("sky", "road"), (0, 1), 2)


@pytest.mark.parametrize("splits", [("training", "validation"), ("train", "test"), ("train", "valid")])
def test_splits_of_other_names(tmp_path: Path, splits: tuple[str, str]) -> None:
    data = proposed(folder(tmp_path / "it's #1", [0, 1], splits=splits)).data
    assert (data.train_split, data.val_split) == splits


def test_weights_crop_and_notes(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", [0] * 99 + [1])
    recipe = proposed(root)
    assert recipe.pretrain.class_weights == recipe.distill.class_weights == "auto"
    assert recipe.pretrain.augment.crop == (64, 64)
    Image.fromarray(smooth_image(200, 300)).save(root / "train/images/t0.png")
    Image.fromarray(np.zeros((200, 300), np.uint8)).save(root / "train/masks/t0.png")
    assert "images are of 2 sizes, most are 64x80" in propose_recipe(root)
    even = proposed(folder(tmp_path / "even", [0, 1]))
    assert even.pretrain.class_weights is None


def test_groups_are_proposed_where_they_can_be_used(tmp_path: Path) -> None:
    root = tmp_path / "data"
    scenes = {f"walk{k}": smooth_image(*SIZE, seed=k) for k in range(8)}
    for k, (name, image) in enumerate(scenes.items()):
        for view in range(4):
            split = "train" if k < 4 else "val"
            noise = np.random.default_rng([k, view]).normal(0, 20, image.shape)
            for kind, pixels in (("images", image + noise), ("masks", np.full(SIZE, view % 2))):
                (root / split / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / split / kind / f"{name}_{view}.png")
    text = propose_recipe(root)
    assert "  group: '^([^_]+)_' # 4 groups among the validation images" in text
    assert {sample.group for sample in open_dataset(proposed(root).data, "val")} == {f"walk{k}" for k in range(4, 8)}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0], "the masks hold nothing but 0: a network learns to tell 2 classes or more apart"),
        ([(k, k // 2, 7) for k in range(256)], "the masks hold 256 different values: soft edges, JPEG"),
    ],
)
def test_masks_that_are_no_classes(tmp_path: Path, values: list[object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        propose_recipe(folder(tmp_path / "data", values))


def test_a_split_is_made_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twelve scenes of three nearly equal images each: none is in both lists."""
    root = tmp_path / "data"
    for kind in ("images", "labels"):
        (root / kind).mkdir(parents=True)
    for k in range(36):
        image = smooth_image(*SIZE, seed=k // 3) // 2 + k % 3
        Image.fromarray(image).save(root / f"images/{k:03}.png")
        Image.fromarray(np.full(SIZE, k % 2, np.uint8)).save(root / f"labels/{k:03}_mask.png")
    with pytest.raises(DataError, match=r"no split train .* labels/ \(36 files\): .* --split 0.2` writes such lists"):
        propose_recipe(root)
    with pytest.raises(SystemExit):
        main(["check-data", str(root)])
    assert f"`messnet init {root} --split 0.2` writes such lists" in capsys.readouterr().err
    Image.fromarray(smooth_image(*SIZE, seed=99)).save(root / "images/bare.png")
    split = ["init", str(root), "--split", "0.25", "--out", str(tmp_path / "mine.yaml")]
    good = (root / "labels/003_mask.png").read_bytes()
    (root / "labels/003_mask.png").write_bytes(good[:40])
    with pytest.raises(SystemExit):
        main(split)
    assert not list(root.glob("*.txt"))  # once it is mended, the same call does
    (root / "labels/003_mask.png").write_bytes(good)
    main(split)
    out = capsys.readouterr().out
    assert "split: 27 images in" in out
    names = {split: (root / f"{split}.txt").read_text().split() for split in ("train", "val")}
    names["train"].remove("bare")
    train, val = ([int(name) // 3 for name in one] for one in names.values())
    assert (len(train), len(val), {*train} & {*val}) == (27, 9, set())
    main(["check-data", str(root)])
    told = "train: 1 image without a mask is left out: bare"
    assert "mine.yaml with 2 notes on the images; read it" in out
    assert told in (tmp_path / "mine.yaml").read_text()
    assert told.removeprefix("train: ") in capsys.readouterr().out
    with pytest.raises(DataError, match="has the split train, val already: leave --split out"):
        split_images(root, 0.2)
    with pytest.raises(DataError, match="--split 2 is no share of the images"):
        split_images(root, 2)


def test_folders_that_are_not_there(tmp_path: Path) -> None:
    folder(tmp_path / "data", [0, 1], splits=("train", "rest"))
    own = r"which holds rest/images/ \(6 files\), rest/masks/ .*: expected val/images .*; move about a fifth"
    with pytest.raises(DataError, match=f"no split val or valid or validation or test in .*, {own}"):
        propose_recipe(tmp_path / "data")
    (tmp_path / "data/train").rename(tmp_path / "data/Pictures")
    with pytest.raises(
        DataError, match=r"no split train .* Pictures/images/ .*; name the folders so; .* --split 0.2` then"
    ):
        propose_recipe(tmp_path / "data")


def test_the_command_writes_what_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """init, check-data and run, as a user types them."""
    root, recipe = folder(tmp_path / "data", [0, 1, 255], count=8), tmp_path / "mine.yaml"
    main(["init", str(root), "--out", str(recipe)])
    assert f"`messnet run {recipe}`" in capsys.readouterr().out
    main(["check-data", str(recipe)])
    short = ["--pretrain.iterations", "2", "--distill.iterations", "2", "--model.width", "0.25"]
    main(["run", str(recipe), "--out", str(tmp_path / "run"), *short, "--compute.num_workers", "0"])
    assert len(ExitTables.from_bytes((tmp_path / "run/tables.npz").read_bytes()).image_names) == 8
    with pytest.raises(SystemExit):
        main(["init", str(root), "--out", str(recipe)])
    assert f"{recipe} exists already: name another file with --out" in " ".join(capsys.readouterr().err.split())
