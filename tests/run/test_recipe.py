"""Recipes: all that is shipped can be read, all that is wrong is one line that names it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from messnet.errors import RecipeError
from messnet.run.recipe import Recipe, load_recipe, recipe_from_record, recipe_to_record

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
OVERRIDES = ["--data.root", "photos", "--model.width", "0.75", "--pretrain.augment.crop", "48", "64"]


def recipe_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def one_line(error: pytest.ExceptionInfo[RecipeError]) -> str:
    message = str(error.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 300
    return message


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_recipes_are_read(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe != Recipe()
    assert recipe_from_record(recipe_to_record(recipe)) == recipe
    record = recipe_to_record(recipe)  # a run compares the text: 300 is not 300.0
    assert json.dumps(recipe_to_record(recipe_from_record(record))) == json.dumps(record)


def test_there_are_recipes() -> None:
    assert {"demo", "camvid_mobilenetv2"} <= {path.stem for path in CONFIGS}


def test_what_the_file_says(tmp_path: Path) -> None:
    recipe = load_recipe(
        recipe_file(
            tmp_path,
            "data: {source: folder, root: some/where, class_names: [a, b c], void_index: 11}\n"
            "heads: {rapid_dilation: [true], segmentation_head: [fcn]}\n"
            "pretrain: {iterations: 7, schedule: modulo, class_weights: [0.5, 2], augment: {crop: [48, 64]}}\n"
            "search: {grid: {max_exits: 2}}\n",
        )
    )
    assert (recipe.data.source, recipe.data.root, recipe.data.void_index) == ("folder", Path("some/where"), 11)
    assert recipe.data.class_names == ("a", "b c")
    assert recipe.heads.rapid_dilation == (True,)
    assert recipe.heads.segmentation_head == ("fcn",)
    assert recipe.heads.channel_reduction == (1, 2, 4, 8)  # not said: the default
    assert (recipe.pretrain.iterations, recipe.pretrain.schedule) == (7, "modulo")
    assert recipe.pretrain.class_weights == (0.5, 2.0)
    assert recipe.pretrain.augment.crop == (48, 64)
    assert recipe.search.grid.max_exits == 2
    assert recipe.distill == Recipe().distill


def test_text_is_taken_as_it_is_written(tmp_path: Path) -> None:
    text = (
        "data: {source: folder, class_names: [NO, on, 0x10, 1.0, ~x], mask_values: [0x10, 1_000, 7, 8, 9]}\n"
        "model: {weights: None, width: 5e-1}\n"
        "pretrain: {learning_rate: 1e-3}\n"
    )
    recipe = load_recipe(recipe_file(tmp_path, text), ["--data.train_split", "012", "--distill.learning-rate=1e-4"])
    assert recipe.data.class_names == ("NO", "on", "0x10", "1.0", "~x")
    assert recipe.data.mask_values == (16, 1000, 7, 8, 9)
    assert recipe.data.train_split == "012"
    assert recipe.model.weights is None
    assert (recipe.model.width, recipe.pretrain.learning_rate, recipe.distill.learning_rate) == (0.5, 1e-3, 1e-4)


@pytest.mark.parametrize(
    ("words", "weights"), [(["auto"], "auto"), (["null"], None), (["1", "2.5"], (1.0, 2.5)), (["[3, 4]"], (3.0, 4.0))]
)
def test_a_list_a_word_or_nothing(tmp_path: Path, words: list[str], weights: object) -> None:
    path = recipe_file(tmp_path, "pretrain: {class_weights: [9, 9, 9]}\n")
    assert load_recipe(path, ["--pretrain.class_weights", *words]).pretrain.class_weights == weights


def test_of_two_equal_options_the_last_wins(tmp_path: Path) -> None:
    recipe = load_recipe(
        recipe_file(tmp_path, ""), ["--pretrain.seed", "1", "--model.width", "0.5", "--pretrain.seed", "2"]
    )
    assert (recipe.pretrain.seed, recipe.model.width) == (2, 0.5)


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert load_recipe(recipe_file(tmp_path, "")) == Recipe()


def test_overrides_win(tmp_path: Path) -> None:
    path = recipe_file(
        tmp_path,
        "model: {width: 0.5, num_exits: 5}\npretrain: {augment: {crop: [8, 8]}}\nsearch: {max_drops_pp: [1, 2, 3]}\n",
    )
    recipe = load_recipe(path, [*OVERRIDES, "--search.max_drops_pp", "5", "--data.cache", "false"])
    assert recipe.data.root == Path("photos")
    assert recipe.data.cache is False
    assert (recipe.model.width, recipe.model.num_exits) == (0.75, 5)
    assert recipe.pretrain.augment.crop == (48, 64)
    assert recipe.search.max_drops_pp == (5.0,)


@pytest.mark.parametrize("values", [["true"], ["false"], ["false", "true"]], ids=str)
def test_booleans_are_words(tmp_path: Path, values: list[str]) -> None:
    path = recipe_file(tmp_path, "data: {cache: false}\nheads: {rapid_dilation: [false, true]}\n")
    recipe = load_recipe(path, ["--heads.rapid_dilation", *values, "--data.cache", "true", "--model.width", "0.5"])
    assert recipe.heads.rapid_dilation == tuple(value == "true" for value in values)
    assert recipe.data.cache is True
    assert recipe.model.width == 0.5


@pytest.mark.parametrize("overrides", [[], OVERRIDES, ["--model.weights", "w.safetensors"]], ids=len)
def test_a_record_reads_back(tmp_path: Path, overrides: list[str]) -> None:
    recipe = load_recipe(recipe_file(tmp_path, "pretrain: {class_weights: [1, 2.5]}\n"), overrides)
    record = recipe_to_record(recipe)
    assert recipe_from_record(record) == recipe
    assert recipe_to_record(recipe_from_record(record)) == record
    changed = recipe_from_record(record, ["--distill.iterations", "3"])
    assert changed.distill.iterations == 3
    assert changed.pretrain == recipe.pretrain


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pretrain: {iteration: 5}", ["pretrain", "iteration", "iterations"]),  # did you mean
        ("pretrane: {iterations: 5}", ["pretrane"]),
        ("data: {scenes: {colour: 1}}", ["scenes", "colour"]),
        ("pretrain: {iterations: many}", ["iterations", "many"]),
        ("pretrain: {iterations: 0}", ["pretrain.iterations: 0", "without model.weights", "untrained"]),
        ("distill: {iterations: 0}", ["distill.iterations: 0 trains no head", "plain_heads: stage1"]),
        ("distill: {plain_heads: old}", ["distill.plain_heads", "expected 'new' or 'stage1'", "'old'"]),
        ("pretrain: {iterations: [1, 2]}", ["iterations"]),
        ("distill: {loss: mse}", ["loss", "mse", "pfd"]),
        ("heads: {segmentation_head: [psp]}", ["segmentation", "psp", "deeplabv3"]),
        ("data: {scenes: {size: [64]}}", ["size"]),
        ("pretrain: 5", ["pretrain", "5"]),
        ("pretrain: [1]", ["pretrain"]),
        ("- pretrain", ["sections", "list"]),
        ("just words", ["sections", "str"]),
        ("pretrain: {iterations: 5", ["not YAML"]),
        ("model: {num_exits: 1}", ["num_exits", "at least 2"]),
        ("pretrain: {batch_size: 1}", ["batch_size", "at least 2"]),
        ("evaluate: {policies: [top9+native]}", ["top9+native", "top1+native"]),
        ("search: {grid: {max_exits: 9}}", ["max_exits", "9"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe_file(tmp_path, text))
    message = one_line(error)
    assert not [word for word in [*words, "recipe.yaml"] if word not in message], message


def test_wrong_overrides_are_named(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "")
    for overrides, word in (
        (["--pretrain.iteration", "5"], "--pretrain.iteration"),
        (["--pretrain.iterations", "many"], "many"),
        (["--pretrain.iteration", "5"], "did you mean --pretrain.iterations?"),
        (["--pretrain.iterations", "many"], "--pretrain.iterations: expected a whole number"),
        (["--pretrain.iterations"], "--pretrain.iterations"),
        (["--pretrain.iterations", "5", "6"], "takes one value"),
        (["--data.scenes.size", "5"], "--data.scenes.size: expected a list of length 2, got [5]"),
        (["stray"], "stray"),
        (["--distill.loss", "mse"], "mse"),
    ):
        with pytest.raises(RecipeError) as error:
            load_recipe(path, overrides)
        assert word in one_line(error)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no recipe .*missing\.yaml.*configs/") as error:
        load_recipe(tmp_path / "missing.yaml")
    one_line(error)


def test_a_picture_is_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff\xfe")
    with pytest.raises(RecipeError, match=r"recipe\.yaml is not YAML") as error:
        load_recipe(path)
    one_line(error)


def test_a_record_of_another_version() -> None:
    record = recipe_to_record(Recipe())
    record["pretrain"]["momentums"] = 0.9
    with pytest.raises(RecipeError, match=r"the recorded recipe: pretrain: unknown key .momentums.") as error:
        recipe_from_record(record)
    one_line(error)


@pytest.mark.parametrize(
    "words", [["3", "4"], ["3,4"], ["3,", "4"], ["[3, 4]"], ["[3,", "4]"], ["[3,4]"]], ids=" ".join
)
def test_lists_are_written_by_one_rule(tmp_path: Path, words: list[str]) -> None:
    path = recipe_file(tmp_path, "data: {source: folder}\n")
    options = ("pretrain.augment.crop", "distill.class_weights", "data.mask_values", "data.class_names")
    recipe = load_recipe(path, [token for option in options for token in (f"--{option}", *words)])
    assert recipe.pretrain.augment.crop == recipe.distill.class_weights == recipe.data.mask_values == (3, 4)
    assert recipe.data.class_names == ("3", "4")


def test_names_with_spaces_and_commas(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "data: {source: folder}\n")
    names = ("traffic light", "sink, basin")
    assert load_recipe(path, ["--data.class_names", '[traffic light, "sink, basin"]']).data.class_names == names
    assert load_recipe(path, ["--data.class_names", "traffic light", "no"]).data.class_names == ("traffic light", "no")


@pytest.mark.parametrize("colour", ["0x800000", '"0x800000"', "'#800000'", "8388608"])
def test_colours_as_messages_write_them(tmp_path: Path, colour: str) -> None:
    path = recipe_file(tmp_path, f"data: {{mask_values: [{colour}, 1], void_index: {colour}}}\n")
    assert load_recipe(path).data.mask_values == (0x800000, 1)
    assert load_recipe(path).data.void_index == 0x800000
    word = colour.strip("\"'")
    data = load_recipe(path, ["--data.mask_values", word, "0x80", "--data.void_index", word]).data
    assert (data.mask_values, data.void_index) == ((0x800000, 0x80), 0x800000)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("data: &a\n  source: scenes\n  again: *a\n", "aliases that hold themselves or stand for more than 100,000"),
        (
            "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1]\n"
            + "".join(f"a{i}: &a{i} [{', '.join(8 * [f'*a{i - 1}'])}]\n" for i in range(1, 12)),
            "aliases that hold themselves or stand for more than 100,000",
        ),
        ("data: " + "[" * 20_000 + "]" * 20_000, "is nested deeper than a recipe is"),
    ],
    ids=["circular", "eight to the twelfth", "deep"],
)
def test_yaml_that_grows_is_refused_at_once(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "grows.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=problem):
        load_recipe(path)


def test_an_alias_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "alias.yaml"
    path.write_text(
        "pretrain: {augment: &crop {crop: [32, 40]}, iterations: 7}\ndistill: {augment: *crop, iterations: 3}\n"
    )
    recipe = load_recipe(path)
    assert recipe.pretrain.augment == recipe.distill.augment
    assert recipe.distill.augment.crop == (32, 40)
