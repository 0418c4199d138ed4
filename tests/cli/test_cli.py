"""The command: bad input is one line and exit code 2 and harms nothing; --json is JSON; --help shows how."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.files import snapshot
from helpers.images import smooth_image
from helpers.recipes import TINY_RECIPE
from messnet.cli import app, main
from messnet.deployment.loading import load
from messnet.records.costs import CostTable
from messnet.report.costs import cost_notes
from messnet.run.recipe import load_recipe, recipe_from_record

VERBS = [
    "check-data", "deploy", "distill", "evaluate", "export", "init", "predict", "pretrain", "profile", "recipe",
    "report", "run", "search", "serve",
]  # fmt: skip


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail; the one line that it says, but for progress bars."""

    def run(*tokens: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(token) for token in tokens])
        assert end.value.code == 2
        lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
        passing = re.compile(r"[\w ]+: +\d+%\||messnet: compiling|searching [\d ]+ instances")
        said = [line for line in lines if line.strip() and not passing.match(line)]
        assert len(said) == 1, lines
        assert said[0].startswith("messnet: ")
        return said[0]

    return run


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must succeed; its standard output."""

    def run(*tokens: object) -> str:
        capsys.readouterr()
        try:
            main([str(token) for token in tokens])
        except SystemExit as end:
            assert not end.code, "the command failed"  # noqa: PT017
        return capsys.readouterr().out

    return run


def strict_json(text: str) -> Any:
    """JSON as browsers read it: NaN is none."""
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder data set, 3 images a split, classes 0 to 2 and 255."""
    for split in ("train", "val"):
        for i in range(3):
            image, mask = (
                smooth_image(64, 80, i + 10 * (split == "val")),
                np.random.default_rng(i).choice([0, 1, 2, 255], (64, 80)),
            )
            for folder in ("images", "masks"):
                (tmp_path / "data" / split / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(tmp_path / "data" / split / "images" / f"{i}.jpg")
            Image.fromarray(mask.astype(np.uint8)).save(tmp_path / "data" / split / "masks" / f"{i}.png")
    return tmp_path / "data"


@pytest.fixture
def folder_recipe(tmp_path: Path, data: Path) -> Path:
    path = tmp_path / "folder.yaml"
    lines = TINY_RECIPE.strip().splitlines()
    path.write_text("\n".join([f"data: {{source: folder, root: {data}, class_names: [a, b, c]}}", *lines[1:]]))
    return path


def id_out_of_range(data: Path) -> None:
    Image.fromarray(np.full((64, 80), 7, np.uint8)).save(data / "val/masks/1.png")


def truncated_image(data: Path) -> None:
    content = (data / "train/images/1.jpg").read_bytes()
    (data / "train/images/1.jpg").write_bytes(content[: len(content) // 2])


def other_size(data: Path) -> None:
    Image.fromarray(np.zeros((60, 80), np.uint8)).save(data / "train/masks/1.png")


def no_folder(data: Path) -> None:
    shutil.rmtree(data)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (no_folder, ["no folder", "data"]),
        (id_out_of_range, ["val/masks/1.png", "ids 7", "0 to 2"]),
        (truncated_image, ["train/images/1.jpg", "damaged"]),
        (other_size, ["train/masks/1.png", "80 x 60", "80 x 64"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_bad_data(
    data: Path, folder_recipe: Path, tmp_path: Path, fails: Callable[..., str], spoil: Callable[..., None], words: Any
) -> None:
    spoil(data)
    before = snapshot(tmp_path)
    message = fails("run", folder_recipe, "--out", tmp_path / "run")
    assert not [word for word in words if word not in message], message
    assert snapshot(tmp_path) == before
    assert not (tmp_path / "run").exists()


def test_colours_of_a_recipe_are_shown_as_people_write_them(tmp_path: Path, says: Callable[..., str]) -> None:
    path, again = tmp_path / "a.yaml", tmp_path / "again.yaml"
    path.write_text("data: {source: folder, class_names: [a, b], mask_values: [0x804000, 0x80], void_index: 0}")
    again.write_text(shown := says("recipe", path))
    assert "void_index: 0x000000\n  mask_values:\n  - 0x804000\n  - 0x000080\n" in shown
    assert load_recipe(again) == load_recipe(path)
    assert strict_json(says("recipe", path, "--json"))["data"]["mask_values"] == [0x804000, 0x80]


def test_check_data(data: Path, folder_recipe: Path, fails: Callable[..., str], says: Callable[..., str]) -> None:
    before = snapshot(data)
    reports = strict_json(says("check-data", folder_recipe, "--json"))
    assert reports["in_both_splits"] == []
    assert {split: reports[split]["num_images"] for split in ("train", "val")} == {"train": 3, "val": 3}
    assert "no problems" in says("check-data", folder_recipe)
    assert snapshot(data) == before
    truncated_image(data)
    id_out_of_range(data)
    assert "2 problems" in fails("check-data", folder_recipe)
    assert "2 problems" in fails("check-data", folder_recipe, "--json")


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["--pretrain.iteration", "5"], ["--pretrain.iteration"]),
        (["--jsno"], ["--jsno"]),
        (["--model.width", "wide"], ["--model.width", "wide"]),
        (["--model.name", "no_such_model"], ["no_such_model", "mobilenetv2_fcn"]),
        (["--data.source", "nowhere"], ["nowhere", "scenes", "folder"]),
        (["--compute.device", "tpu"], ["compute.device", "tpu"]),
    ],
    ids=lambda value: value[0],
)
def test_a_bad_recipe(
    tiny_recipe: Path, tmp_path: Path, fails: Callable[..., str], tokens: list[str], words: list[str]
) -> None:
    message = fails("run", tiny_recipe, "--out", tmp_path / "run", *tokens)
    assert not [word for word in words if word not in message], message
    assert not [name for name in snapshot(tmp_path) if not name.endswith("run.json")]


def test_an_unknown_key_in_the_file(tmp_path: Path, fails: Callable[..., str]) -> None:
    (tmp_path / "bad.yaml").write_text("pretrain: {iteration: 5}\n")
    message = fails("run", tmp_path / "bad.yaml", "--out", tmp_path / "run")
    assert "bad.yaml" in message
    assert "iteration" in message
    assert "no recipe" in fails("run", tmp_path / "missing.yaml", "--out", tmp_path / "run")
    assert set(snapshot(tmp_path)) == {"bad.yaml"}


def test_a_run_directory_of_another_recipe(tiny_run: Path, tiny_recipe: Path, fails: Callable[..., str]) -> None:
    before = snapshot(tiny_run)
    for target in ([tiny_recipe, "--out", tiny_run], [tiny_run]):
        for verb in ("run", "pretrain", "search", "report"):
            assert "model.width" in fails(verb, *target, "--model.width", "0.5")
    assert snapshot(tiny_run) == before


def test_a_folder_that_is_no_run(tiny_recipe: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("precious")
    Image.fromarray(smooth_image(64, 80)).save(tmp_path / "photo.png")
    before = snapshot(tmp_path)
    assert "is no run directory" in fails("run", tiny_recipe, "--out", tmp_path / "thesis")
    assert "is no run directory" in fails("run", tmp_path / "thesis")
    assert "is no run directory" in fails("run", tiny_recipe, "--out", tmp_path / "thesis/chapter.txt")
    assert "is no run directory" in fails("predict", tmp_path / "thesis", tmp_path / "photo.png")
    assert snapshot(tmp_path) == before


def test_bad_input_of_predict(tiny_run: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    photo = tmp_path / "photo.png"
    Image.fromarray(smooth_image(64, 80)).save(photo)
    shutil.copy(photo, tmp_path / "photo.bmp")
    (tmp_path / "text.txt").write_text("words")
    (tmp_path / "empty").mkdir()
    before = snapshot(tmp_path)

    def predict(*tokens: object) -> str:
        return fails("predict", tiny_run, *tokens, "--out", tmp_path / "out")

    message = predict(photo, "--instance", "nope")
    assert not [name for name in ("nope", "drop-0.1pp", "drop-1pp", "max-miou") if name not in message]
    assert "missing.png" in predict(tmp_path / "missing.png")
    assert re.search(r"cannot read .*text\.txt \(", predict(tmp_path / "text.txt", "--instance", "drop-1pp"))
    assert "empty holds no image" in predict(tmp_path / "empty")
    assert "photo.bmp" in predict(photo, tmp_path / "photo.bmp")
    assert "no image given" in predict()
    assert "--instnce" in predict(photo, "--instnce", "nope")
    assert "gpu" in predict(photo, "--device", "gpu")
    assert snapshot(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_written(tiny_run: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    Image.fromarray(smooth_image(64, 64)).save(tmp_path / "photo.png")
    (tmp_path / "notes.txt").write_text("mine")
    message = fails("predict", tiny_run, tmp_path / "photo.png", "--out", tmp_path / "notes.txt")
    assert "notes.txt is a file: name a folder" in message
    below = tmp_path / "notes.txt" / "front.png"
    assert "name another place" in fails("search", tiny_run, "--plot", below)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert "at least 1 thread, not -1" in fails("predict", tiny_run, tmp_path / "photo.png", "--threads", "-1")


def test_what_is_no_command(fails: Callable[..., str], tiny_run: Path) -> None:
    assert "predict" in fails("predcit", tiny_run)  # did you mean
    assert "TARGET" in fails("run").upper()
    assert "--nme" in fails("search", tiny_run, "--nme", "x")


def test_bad_searches(tiny_run: Path, fails: Callable[..., str]) -> None:
    before = snapshot(tiny_run)
    message = fails("search", tiny_run, "--name", "perfect", "--min-miou", "0.99")
    assert "no instance has mIoU >= 99.00 %" in message
    assert "the most accurate instance has" in message
    message = fails("search", tiny_run, "--name", "better", "--max-drop-pp", "-50")
    assert re.search(r"the most accurate instance has [0-9.]+ %|has mIoU [0-9.]+ % at [0-9.e-]+ GMACs", message)
    assert message.count("GMACs") == 1  # said once
    assert "cannot be -1" in fails("search", tiny_run, "--name", "x", "--time-limit", "-1")
    assert "is no picture" in fails("search", tiny_run, "--plot", tiny_run / "front.txt")
    assert "add --name" in fails("search", tiny_run, "--max-drop-pp", "1")
    assert "plain file name" in fails("search", tiny_run, "--name", "../../outside")
    assert "not both" in fails("search", tiny_run, "--name", "x", "--minimise", "macs", "--maximise", "miou")
    assert "has no meaning" in fails("search", tiny_run, "--name", "x", "--max-first-ratio", "0.5")
    assert snapshot(tiny_run) == before


def test_reading_verbs_as_json(tiny_run: Path, says: Callable[..., str]) -> None:
    before = snapshot(tiny_run)
    measured = strict_json(says("run", tiny_run, "--json"))
    assert [row["instance"]["name"] for row in measured["rows"]] == ["baseline", "max-miou", "drop-0.1pp", "drop-1pp"]
    costs = strict_json(says("profile", tiny_run, "--json"))
    exits = strict_json(says("evaluate", tiny_run, "--json"))
    assert len(costs["heads"]) == len(exits) == 7
    assert exits[-1]["head"] == "final"
    whole = sum(part["macs"] for part in costs["segments"]) + costs["heads"][-1][2]["macs"]
    assert exits[-1]["macs"] == pytest.approx(whole)
    assert recipe_from_record(strict_json(says("recipe", tiny_run, "--json"))).model.width == 0.25
    assert snapshot(tiny_run) == before


MEASURE = ("--measure", "--repeats", "2", "--threads", "1")
"""Two rounds, whatever they are worth."""


def test_profile_of_a_model_by_name(tmp_path: Path, says: Callable[..., str]) -> None:
    model = ["mobilenetv2_fcn", "--input-size", "64", "80", "--num-classes", "5", "--model.num_exits", "3"]
    model += [
        "--model.width",
        "0.25",
        "--model.depth",
        "0.01",
        "--heads.channel_reduction",
        "1",
        "--heads.extra_blocks",
        "0",
    ]
    counted = says("profile", *model, "--out", tmp_path / "counted.json", "--plot", tmp_path / "cuts.png")
    assert "mobilenetv2_fcn at 64x80" in counted
    assert "GMACs each" in counted
    assert "an early exit can save at most" in counted
    with Image.open(tmp_path / "cuts.png") as drawing:
        assert drawing.size > (600, 400)
    table = strict_json((tmp_path / "counted.json").read_text())
    assert (len(table["segments"]), table["input_size"], table["conditions"]) == (3, [64, 80], {})

    measured = ["profile", *model, *MEASURE]
    words = " ".join(says(*measured).split())
    for expected in ("policy", "threads 1", "the sum of the parts is", "(median of 20)", "this device", "workload "):
        assert expected in words
    assert "off measured instances" in words
    two = says(*measured, "--batch", "2", "--json")
    conditions = strict_json(two)["conditions"]
    assert (conditions["dtype"], conditions["batch"], strict_json(two)["additivity"]) == ("float32", 2, {})
    assert any("was not checked" in note for note in cost_notes(CostTable.from_json(two)))
    few = strict_json(says("profile", *model[:-4], *MEASURE, "--dtype", "bfloat16", "--json"))
    assert len(few["heads"]) == 2 * 2 + 1  # of a model a plain and a light one for each exit, but for --thorough
    assert (few["conditions"]["dtype"], few["additivity"]["num_instances"]) == ("bfloat16", 20)
    assert set(snapshot(tmp_path)) == {"counted.json", "cuts.png"}


def test_measured_tables_of_a_run(
    tiny_run: Path, tmp_path: Path, says: Callable[..., str], fails: Callable[..., str]
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    before = snapshot(run)
    table = strict_json(says("profile", run, *MEASURE, "--json"))
    said = says("profile", run, *MEASURE, "--name", "mine")
    # It ends with the command that uses what was measured.
    assert shlex.split(said.splitlines()[-1].partition("messnet ")[2]) == [
        *["search", str(run), "--name", "fast", "--minimise", "latency_ms", "--max-drop-pp", "1"],
        *["--costs", str(run / "costs" / "mine.json")],
    ]
    assert set(snapshot(run)) - set(before) == {"costs/cpu-1threads-float32-b1.json", "costs/mine.json"}
    assert strict_json((run / "costs/cpu-1threads-float32-b1.json").read_text()) == table
    assert table["additivity"]["num_instances"] == 20
    assert len(table["heads"]) == 7
    assert "latency_ms" in fails("search", run, "--name", "fast", "--minimise", "latency_ms")
    objective = ["--maximise", "miou", "--cost", "latency_ms", "--max-cost-ratio", "1"]
    found = strict_json(says("search", run, "--name", "fast", *objective, "--costs", run / "costs/mine.json", "--json"))
    assert found[0]["selected_on"]["latency_ms"] <= found[0]["selected_on"]["baseline_latency_ms"]
    assert snapshot(run)["profile.json"] == before["profile.json"]


def test_a_run_measured_in_a_runtime_of_graphs(tiny_recipe: Path, tmp_path: Path, says: Callable[..., str]) -> None:
    """No training is asked for; and one head at one exit, as every one takes a second to write."""
    run = tmp_path / "run"
    how = ("--out", run, "--model.num_exits", "2", "--heads.segmentation_head", "fcn")
    table = strict_json(says("profile", tiny_recipe, *how, *MEASURE, "--runtime", "onnxruntime", "--json"))
    assert strict_json((run / "costs/onnxruntime-cpu-1threads-float32-b1.json").read_text()) == table
    assert len(table["heads"]) == 2
    assert all(part["latency_ms"] >= 0 for _, _, part in table["heads"])
    assert table["conditions"]["runtime"].startswith("onnxruntime ")


def test_exits_by_measured_latency(tiny_recipe: Path, tmp_path: Path, says: Callable[..., str]) -> None:
    says(
        "profile",
        tiny_recipe,
        "--out",
        tmp_path / "run",
        "--model.exit_cost",
        "latency",
        "--model.num_exits",
        "3",
        "--json",
    )
    assert len(strict_json((tmp_path / "run/exits.json").read_text())["exit_points"]) == 3
    recorded = strict_json(says("recipe", tmp_path / "run", "--json"))["model"]
    assert (recorded["exit_cost"], recorded["num_exits"]) == ("latency", 3)


def test_bad_profiles(tiny_run: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    before = snapshot(tiny_run)
    assert "--threads is for measuring: add --measure" in fails("profile", tiny_run, "--threads", "2")
    assert "--name is for measuring" in fails("profile", tiny_run, "--name", "x")
    assert "a run: torch, onnxruntime" in fails("profile", tiny_run, "--measure", "--runtime", "torch-compiled")
    assert "one image at a time" in fails("profile", tiny_run, "--measure", "--runtime", "openvino", "--batch", "2")
    assert "a run or a bundle" in fails("profile", "mobilenetv2_fcn", "--measure", "--runtime", "openvino")
    assert "plain file name" in fails("profile", tiny_run, "--measure", "--name", "../x")
    assert "--out FILE.json" in fails("profile", "mobilenetv2_fcn", "--measure", "--name", "x")
    assert "are for a model" in fails("profile", tiny_run, "--num-classes", "3")
    assert "no model 'mobilenet'" in fails("profile", "mobilenet")
    assert "no.such:model" in fails("profile", "no.such:model")
    assert "no recipe" in fails("profile", tmp_path / "run")
    assert "--model.wdth" in fails("profile", "mobilenetv2_fcn", "--model.wdth", "2")
    assert "at least 1" in fails("profile", tiny_run, "--measure", "--batch", "0")
    assert "is no picture" in fails("profile", tiny_run, "--plot", tmp_path / "cuts.text")
    message = fails("search", tiny_run, "--name", "x", "--costs", tmp_path / "missing.json")
    assert "missing.json" in message
    assert "--measure" in message
    if not torch.cuda.is_available():
        assert "use cpu" in fails("profile", tiny_run, "--measure", "--device", "cuda")
    assert snapshot(tiny_run) == before


def test_repeatable_verbs_as_json(tiny_run: Path, tmp_path: Path, says: Callable[..., str]) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    names = [instance["name"] for instance in strict_json(says("search", run, "--json"))]
    assert names == ["max-miou", "drop-0.1pp", "drop-1pp"]
    own = strict_json(says("search", run, "--name", "half", "--maximise", "miou", "--max-cost-ratio", "0.6", "--json"))
    assert [instance["name"] for instance in own] == ["half"]
    assert own[0]["selected_on"]["macs"] <= 0.6 * own[0]["selected_on"]["baseline_macs"]
    assert load(run, instance="half").instance.selected_on == own[0]["selected_on"]
    rows = strict_json(says("report", run, "--json"))["rows"]
    assert [row["instance"]["name"] for row in rows] == ["baseline", *names, "half"]
    assert strict_json((run / "front.json").read_text())["names"] == names


def test_predict_as_json(tiny_run: Path, tmp_path: Path, says: Callable[..., str]) -> None:
    Image.fromarray(smooth_image(64, 80)).save(tmp_path / "photo.png")
    records = strict_json(says("predict", tiny_run, tmp_path, "--out", tmp_path / "out", "--json"))
    assert records == strict_json((tmp_path / "out/predictions.json").read_text())["predictions"]
    assert "1 image in" in says("predict", tiny_run, tmp_path / "photo.png", "--out", tmp_path / "out")


def test_tables_for_people(tiny_run: Path, says: Callable[..., str]) -> None:
    assert "report: " in says("run", tiny_run)
    assert "whole model: " in says("profile", tiny_run)
    assert "mIoU %" in says("evaluate", tiny_run)
    assert "num_train: 24" in says("recipe", tiny_run, "--data.root", "unused")


def test_every_verb_is_known() -> None:
    assert sorted(name for name in app if not name.startswith("-")) == VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example(verb: str, says: Callable[..., str]) -> None:
    page = says(verb, "--help")
    assert f"Usage: messnet {verb}" in page
    assert f"messnet {verb} " in page.partition("Examples")[2]


def test_help_of_the_command_lists_the_verbs(says: Callable[..., str]) -> None:
    page = says("--help")
    assert not [verb for verb in VERBS if verb not in page]
    assert "messnet run configs/demo.yaml" in page


def test_a_word_before_loops_are_compiled() -> None:
    """Once, and only where numba does compile."""
    code = "import numba; from messnet.cli.app import quieten; quieten(); quieten(); "
    compiling = "[numba.njit(lambda x, k=k: x + k)(1) for k in (1, 2)]"
    told = [
        subprocess.run([sys.executable, "-c", code + rest], capture_output=True, text=True, check=True).stderr
        for rest in ("", compiling)
    ]
    assert told == ["", "messnet: compiling inner loops for this processor, once: up to a minute\n"]


@pytest.mark.parametrize("runtime", ["torch-compiled", "torch"])
def test_a_word_before_torch_compiles(runtime: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends before anything is compiled, at an image that it reads after it has loaded the network."""
    (tmp_path / "damaged.png").write_bytes(b"no image")
    bundle = Path(__file__).parents[2] / "examples" / "scenes_mobilenetv2.mess"
    with pytest.raises(SystemExit):
        main(["predict", str(bundle), str(tmp_path / "damaged.png"), "--runtime", runtime, "--out", str(tmp_path)])
    said = capsys.readouterr().err
    assert "damaged.png" in said
    told = "messnet: torch-compiled translates each part of the network when it first runs"
    assert said.startswith(told) == (runtime == "torch-compiled")
    assert said.count("torch-compiled") == (runtime == "torch-compiled")


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    """As `messnet recipe configs/demo.yaml | head -1` ends, when head does not wait."""
    (tmp_path / "recipe.yaml").write_text("")
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "messnet", "recipe", str(tmp_path / "recipe.yaml")]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")
