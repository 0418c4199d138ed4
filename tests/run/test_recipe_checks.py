"""What a run will refuse is said before it begins, by ``check-data`` and by ``run``, with a way out that works."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from messnet.cli import main
from messnet.data.checks import DatasetReport, check_dataset
from messnet.data.sources import open_dataset
from messnet.errors import DataError, RecipeError
from messnet.run.checks import expect_sound, proposed_crop, recipe_notes, recipe_problems
from messnet.run.recipe import Recipe, load_recipe, recipe_from_record

SIZE = (32, 48)
VOID = np.full(SIZE, 255, np.uint8)


def save(root: Path, split: str, masks: list[np.ndarray]) -> None:
    for k, mask in enumerate(masks):
        picture = np.random.default_rng(hash((split, k)) % 2**32).integers(0, 256, (*mask.shape, 3), np.uint8)
        for kind, pixels in (("images", picture), ("masks", mask)):
            (root / split / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / split / kind / f"{split[0]}{k}_x.png")


def mask(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2, size, np.uint8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    save(tmp_path / "data", "train", [mask(k) for k in range(4)])
    save(tmp_path / "data", "val", [mask(10 + k) for k in range(4)])
    return tmp_path / "data"


def recipe_file(root: Path) -> Path:
    path = root.parent / "recipe.yaml"
    path.write_text(f"data: {{source: folder, root: '{root}', class_names: [a, b]}}\n")
    return path


def expect(recipe: Recipe) -> None:
    expect_sound(recipe, open_dataset(recipe.data, "train"), open_dataset(recipe.data, "val"))


def problems(root: Path, *overrides: str) -> tuple[str, ...]:
    recipe = load_recipe(recipe_file(root), overrides)
    return recipe_problems(recipe, *(check_dataset(open_dataset(recipe.data, split)) for split in ("train", "val")))


def test_a_sound_data_set_has_none(root: Path) -> None:
    assert problems(root) == ()
    expect(load_recipe(recipe_file(root)))
    expect(Recipe())  # generated scenes


def test_class_weights_of_another_number(root: Path) -> None:
    found = problems(root, "--pretrain.class_weights", "1,2,3", "--distill.class_weights", "1,2")
    assert found == (
        "pretrain.class_weights has 3 values for 2 classes (a, b): give one for each, or pretrain.class_weights: auto",
    )
    assert problems(root, "--pretrain.class_weights", "auto") == ()
    scenes = load_recipe(recipe_file(root), ["--data.source", "scenes", "--data.class_names", "[]"])
    weighted = replace(scenes, distill=replace(scenes.distill, class_weights=(1.0, 2.0)))
    with pytest.raises(DataError, match=r"distill\.class_weights has 2 values for"):
        expect(replace(weighted, data=Recipe().data))


def test_no_training_of_heads_at_all(root: Path) -> None:
    none = ["--distill.plain_heads", "stage1", "--distill.iterations", "0"]
    (found,) = problems(root, "--pretrain.scheme", "baseline", *none)
    assert "distill.iterations: 0 keeps the heads that stage 1 trained, and pretrain.scheme: baseline trains" in found
    assert problems(root, "--pretrain.scheme", "end_to_end", *none) == ()
    assert problems(root, "--pretrain.scheme", "baseline", *none[:2]) == ()
    with pytest.raises(DataError, match=r"pretrain\.iterations: 0 trains none: let stage 2 train"):
        expect(load_recipe(recipe_file(root), ["--model.weights", "own.pt", "--pretrain.iterations", "0", *none]))


def test_images_of_several_sizes_need_a_crop(root: Path) -> None:
    save(root, "train", [mask(k, (64 + 8 * k, 100)) for k in range(4)])
    found = problems(root)
    assert len(found) == 2  # both trainings
    assert "training images are of 4 sizes (64x100, 72x100, 80x100, ...), and a batch needs one" in found[0]
    assert "pretrain.augment.crop: [64, 96] (height, width)" in found[0]
    crops = ("--pretrain.augment.crop", "[64, 96]", "--distill.augment.crop", "[64, 96]")
    assert problems(root, *crops) == ()  # the way out
    save(root, "val", [mask(0, (20, 20))])
    assert problems(root, *crops) == ()  # validation takes one image at a time


def test_crops_that_are_proposed(root: Path) -> None:
    report = check_dataset(open_dataset(load_recipe(recipe_file(root)).data, "train"))
    for sizes, crop in (
        ({"480x640": 3, "100x100": 1}, (480, 640)),
        ({"3000x4000": 1, "3024x4032": 2}, (768, 768)),
        ({"10x20": 1, "12x20": 1}, (32, 32)),
    ):
        assert proposed_crop(replace(report, sizes=sizes)) == crop


def test_a_validation_split_of_one_image(root: Path) -> None:
    for k in (1, 2, 3):
        for kind in ("images", "masks"):
            (root / "val" / kind / f"v{k}_x.png").unlink()
    (found,) = problems(root)
    assert "the validation split has 1 image" in found
    assert "2 images at least" in found
    save(root, "val", [mask(10), mask(11)])
    assert problems(root) == ()


def test_validation_images_without_labels(root: Path) -> None:
    save(root, "val", [mask(0), VOID, VOID, VOID])
    (found,) = problems(root)
    assert "of the validation images that a run " in found
    assert "(2 of 4) every pixel is void" in found
    save(root, "val", [VOID] * 4)
    assert problems(root) == ("every pixel of the validation split is void: nothing can be measured on it",)
    save(root, "train", [VOID] * 4)
    assert "every pixel of the training split is void" in problems(root)[0]


def test_validation_images_of_one_group(root: Path) -> None:
    (found,) = problems(root, "--data.group", "^(.)")
    assert "images of one group (v)" in found
    assert "2 groups at least" in found
    assert problems(root, "--data.group", "^(..)") == ()


def test_augmentation_of_the_second_stage_is_looked_at_first(root: Path) -> None:
    with pytest.raises(RecipeError, match="hflip lies in"):
        problems(root, "--distill.augment.hflip", "2")


def test_both_commands_say_it(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = [str(recipe_file(root)), "--pretrain.class_weights", "1,2,3", "--distill.class_weights", "1"]
    with pytest.raises(SystemExit) as end:
        main(["check-data", *tokens])
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert "a run would stop: pretrain.class_weights has 3 values for 2 classes" in out
    assert "the data set has 2 problems, listed above" in err
    with pytest.raises(SystemExit) as end:
        main(["run", *tokens, "--out", str(root.parent / "run")])
    assert end.value.code == 2
    error = capsys.readouterr().err.replace("\r", "\n").splitlines()[-1]
    assert error.startswith("messnet: pretrain.class_weights has 3 values for 2 classes")
    assert error.endswith("(and 1 more: `messnet check-data`)")
    assert not (root.parent / "run").exists()
    main(["check-data", tokens[0]])


def test_a_trained_model_is_advised_to_be_kept_first() -> None:
    record, none = {"model": {"weights": "own.pth"}}, DatasetReport(num_images=0)
    (note,) = recipe_notes(recipe_from_record(record), none)
    assert "try pretrain.iterations: 0 first" in note
    assert recipe_notes(recipe_from_record({**record, "pretrain": {"iterations": 0}}), none) == ()
    assert recipe_notes(recipe_from_record({}), none) == ()


def test_both_commands_say_that_a_crop_is_mostly_padding(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(recipe_file(root))
    main(["check-data", recipe, "--pretrain.augment.crop", "64,96", "--distill.augment.crop", "64,96"])
    note = "note: crops of 64x96 (pretrain.augment.crop and distill.augment.crop) are larger than most training images"
    said = capsys.readouterr().out
    assert note in said
    # A crop of twice the sides holds (s / 2)^2 of an image scaled by s, on average over s from 0.5 to 2.
    assert f"{1 - (2**3 - 0.5**3) / 3 / 4 / 1.5:.0%} of what is trained on is padding" in said
    assert "try [32, 32] or less" in said
    expect(load_recipe(Path(recipe), ["--distill.augment.crop", "64,96"]))
    assert "note: crops of 64x96 (distill.augment.crop) are larger" in capsys.readouterr().err
    expect(load_recipe(Path(recipe), ["--distill.augment.crop", "32,48"]))  # padded where an image is scaled down
    scenes = {"data": {"source": "scenes"}, "pretrain": {"augment": {"crop": [400, 400]}}}
    assert "note:" not in capsys.readouterr().err
    expect(recipe_from_record(scenes))
    assert "note: crops of 400x400 (pretrain.augment.crop) are larger" in capsys.readouterr().err
