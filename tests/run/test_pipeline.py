"""A run: what it leaves, what it does not do twice, what it refuses, and that a kill loses nothing."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import scipy.stats
import torch
import yaml

from helpers.files import snapshot
from messnet.cli import main
from messnet.data import IGNORE_INDEX
from messnet.data.scenes import CLASS_NAMES
from messnet.errors import DataError, ModelError, RecipeError, RunError
from messnet.network.zoo import mobilenetv2_fcn
from messnet.records.measurements import Gallery, Measurements
from messnet.records.run_directory import RunDirectory
from messnet.run.opening import adopt_pretrained, open_run
from messnet.run.stages import STAGES, expect_seeing, forecast, run_stage
from messnet.searching.cross_fitting import Folds
from messnet.searching.findings import Findings
from messnet.searching.grid import cost_of, route
from messnet.searching.objective import Objective

ARTEFACTS = {
    "exits.json",
    "front.json",
    "gallery.npz",
    "logs/distill.csv",
    "logs/pretrain.csv",
    "measurements.json",
    "profile.json",
    "report.html",
    "run.json",
    "stage1.safetensors",
    "stage1_heads.safetensors",
    "stage2.safetensors",
    "tables.npz",
}
# Dies with the second checkpoint half written.
DYING = """
import os, signal, sys
replace, written = os.replace, 0
def dying(source, target):
    global written
    written += str(target).endswith(".checkpoint")
    if written == 2:
        os.truncate(source, 1000)
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = dying
from messnet.cli import main
main(sys.argv[1:])
"""


@pytest.fixture
def copied_run(tiny_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_run, tmp_path / "run")


def test_the_time_of_trainings_is_told_before_they_begin(tiny_recipe: Path, tmp_path: Path) -> None:
    run = open_run(tiny_recipe, ["--distill.iterations", "3000"], out=tmp_path / "run")
    run_stage(run, "profile")
    before = {name: tensor.clone() for name, tensor in run.initial().state_dict().items()}
    time = r"about \d+ (s|min|h)( \d+ (s|min))?"
    line = rf"training takes {time}: stage 1 \(pretrain\) {time}, stage 2 \(distill\) {time} \(on this machine: cpu, .*"
    assert re.fullmatch(line, forecast(run))
    after = run.initial().state_dict()  # training begins as it would have
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert snapshot(tmp_path / "run").keys() == {"exits.json", "profile.json", "run.json"}
    run.checkpoint("pretrain").save({"iteration": 10})  # under way: its bar says how long
    assert re.fullmatch(rf"stage 2 \(distill\) {time} \(on this machine: .*", forecast(run))


def test_what_a_run_leaves(tiny_run: Path) -> None:
    names = {f"instances/{name}.json" for name in ("max-miou", "drop-0.1pp", "drop-1pp")}
    assert set(snapshot(tiny_run)) == ARTEFACTS | names  # no checkpoint, no temporary file
    record = json.loads((tiny_run / "run.json").read_text())
    assert list(record["stages"]) == [name for name in STAGES if name != "deploy"]  # the recipe deploys nothing
    assert all(entry["seconds"] >= 0 and entry["torch"] for entry in record["stages"].values())


def test_a_finished_run_does_nothing_again(tiny_run: Path, tiny_recipe: Path) -> None:
    before = snapshot(tiny_run)
    for run in (open_run(tiny_run), open_run(tiny_recipe, out=tiny_run)):
        assert not any(run_stage(run, stage) for stage in STAGES)
    assert snapshot(tiny_run) == before


def test_computing_elsewhere_is_the_same_run(copied_run: Path) -> None:
    run = open_run(copied_run, ["--compute.num_workers", "3"])
    assert not any(run_stage(run, stage) for stage in STAGES)


def test_other_search_options_search_again_without_training(copied_run: Path) -> None:
    before = snapshot(copied_run)
    run = open_run(copied_run, ["--search.max_drops_pp", "2.5", "--search.seed", "1"])
    assert [stage for stage in STAGES if run_stage(run, stage)] == ["search", "report"]
    after = snapshot(copied_run)
    kept = ("exits.json", "profile.json", "stage1.safetensors", "stage2.safetensors", "tables.npz")
    assert all(after[name] == before[name] for name in kept)
    assert "drop-2.5pp" in RunDirectory(copied_run).instance_names()
    names = [row.instance.name for row in Measurements.from_json((copied_run / "measurements.json").read_text()).rows]
    # All images select, whatever the seed of the folds: what was found before is shown too.
    assert names == ["baseline", "max-miou", "drop-2.5pp", "drop-0.1pp", "drop-1pp"]
    assert open_run(copied_run).recipe.search.max_drops_pp == (2.5,)  # the run remembers


def test_other_thresholds_tabulate_again_without_training(copied_run: Path) -> None:
    run = open_run(copied_run, ["--evaluate.pixel_thresholds", "0.25", "0.75"])
    assert [stage for stage in STAGES if run_stage(run, stage)] == ["evaluate", "search", "report"]
    assert run.tables().pixel_thresholds.tolist() == [0.25, 0.75]


def test_a_run_from_before_an_option_existed_goes_on(copied_run: Path) -> None:
    def forget(known: RunDirectory) -> None:  # as a messnet without distill.filter_kl would have left it
        recipe = known.record().recipe
        del recipe["distill"]["filter_kl"]
        known.update_recipe(recipe, {name: STAGES[name].fingerprint(recipe) for name in known.record().stages})

    forget(RunDirectory(copied_run))
    run = open_run(copied_run)
    assert run.recipe.distill.filter_kl is False
    assert not any(run_stage(run, stage) for stage in STAGES)
    forget(RunDirectory(copied_run))
    with pytest.raises(RunError, match=r"distill\.filter_kl was False and is True"):
        open_run(copied_run, ["--distill.filter_kl", "true"])


def test_other_formats_are_written_again_without_training(copied_run: Path) -> None:
    run = open_run(copied_run)
    newer = [
        replace(stage, formats={**stage.formats, "costs": 99}) for stage in STAGES.values() if "costs" in stage.formats
    ]
    assert [stage.name for stage in newer] == ["profile", "search", "deploy", "report"]
    assert [stage.name for stage in newer if stage.is_done(run)] == ["deploy"]  # nothing to deploy
    assert all(stage.is_done(run) for stage in STAGES.values())


@pytest.mark.parametrize(
    ("override", "named"),
    [
        (["--data.scenes.seed", "9"], "with another recipe: data.scenes.seed was 0 and is 9; keep the old values"),
        (["--model.width", "0.5"], "model.width was 0.25 and is 0.5"),
        (["--heads.extra_blocks", "1"], "heads.extra_blocks"),
        (["--pretrain.iterations", "46"], "pretrain.iterations was 45 and is 46"),
        (["--distill.augment.hflip", "0"], "distill.augment.hflip"),
        # Of an option that is younger than runs its default, of many the first five, in the order of the stages.
        (
            [
                "--distill.seed=1",
                "--pretrain.optimizer=adamw",
                "--model.width=0.5",
                "--pretrain.seed=2",
                "--heads.extra_blocks=1",
                "--data.scenes.size=32,40",
                "--distill.alpha=0.25",
            ],
            "recipe: data.scenes.size was [64, 80] and is [32, 40], model.width was 0.25 and is 0.5, "
            "pretrain.optimizer was sgd and is adamw, pretrain.seed was 0 and is 2, "
            "heads.extra_blocks was [0] and is [1], and 2 more; keep",
        ),
    ],
)
def test_another_recipe_is_refused(tiny_run: Path, tiny_recipe: Path, override: list[str], named: str) -> None:
    before = snapshot(tiny_run)
    for target, out in ((tiny_recipe, tiny_run), (tiny_run, None)):
        with pytest.raises(RunError, match=r"choose another directory with --out") as error:
            open_run(target, override, out=out)
        assert named in str(error.value)
    assert snapshot(tiny_run) == before


def test_another_recipe_is_welcome_before_anything_is_made(tiny_recipe: Path, tmp_path: Path) -> None:
    open_run(tiny_recipe, out=tmp_path / "run")
    run = open_run(tiny_recipe, ["--model.width", "0.5"], out=tmp_path / "run")
    assert run.recipe.model.width == open_run(tmp_path / "run").recipe.model.width == 0.5


def test_nothing_is_made_for_a_bad_recipe(tiny_recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(RecipeError):
        open_run(tiny_recipe, ["--model.depht", "1"], out=out)
    with pytest.raises(DataError):
        open_run(tiny_recipe, ["--data.source", "folder"], out=out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("stage", "missing"),
    [("pretrain", "profile"), ("distill", "profile|pretrain"), ("search", "evaluate"), ("report", "search")],
)
def test_a_stage_out_of_turn_names_the_verb(tiny_recipe: Path, tmp_path: Path, stage: str, missing: str) -> None:
    with pytest.raises(RunError, match=rf"make it with `messnet ({missing}) "):
        run_stage(open_run(tiny_recipe, out=tmp_path / "run"), stage)
    assert set(snapshot(tmp_path / "run")) == {"run.json"}


def test_stage_1_starts_from_the_users_weights(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = mobilenetv2_fcn(len(CLASS_NAMES), width=0.25, depth=0.5).state_dict()
    path = tmp_path / "own.pth"
    torch.save({"model": state | {"aux_classifier.weight": torch.ones(1)}}, path)
    still = ["--pretrain.learning_rate", "0", "--pretrain.iterations", "1"]  # only statistics change
    run = open_run(tiny_recipe, ["--model.weights", str(path), *still], out=tmp_path / "run")
    assert run_stage(run, "profile")
    assert run_stage(run, "pretrain")
    started = safetensors.torch.load_file(tmp_path / "run" / "stage1.safetensors")
    assert started.keys() == state.keys()
    learnt = [name for name in state if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert len(learnt) > 20
    assert all(torch.equal(started[name], state[name]) for name in learnt)
    assert capsys.readouterr().err.count("1 tensors of aux_classifier left out") == 1


def test_weights_that_do_not_fit_are_refused_before_anything_is_made(tiny_recipe: Path, tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.ones(1)}, tmp_path / "other.pth")
    for name, message in (("other.pth", "does not fit the model: missing "), ("none.pth", "no weights .*none.pth")):
        run = open_run(tiny_recipe, ["--model.weights", str(tmp_path / name)], out=tmp_path / "run")
        with pytest.raises(ModelError, match=message):
            run_stage(run, "profile")
    assert set(snapshot(tmp_path / "run")) == {"run.json"}


def test_all_images_select_and_what_to_expect_is_cross_fitted(tiny_run: Path) -> None:
    run = open_run(tiny_run)
    tables, costs = run.tables(), run.costs()
    measurements = Measurements.from_json((tiny_run / "measurements.json").read_text())
    assert measurements.image_names == list(tables.image_names)
    folds = Folds(tables=tables, costs=costs, grid=run.recipe.search.grid)
    findings = Findings.from_json((tiny_run / "front.json").read_bytes())
    assert findings.protocol == "cross_fitted"
    for name, objective in (
        ("max-miou", Objective(maximise="miou", max_cost_ratio=1.0)),
        ("drop-0.1pp", Objective(max_drop_pp=0.1)),
        ("drop-1pp", Objective(minimise="macs", max_drop_pp=1.0)),
    ):
        instance = RunDirectory(tiny_run).read_instance(name)
        assert instance.selected_on["images"] == 16
        assert instance.selected_on["miou"] == pytest.approx(tables.miou(route(tables, instance)), abs=1e-9)
        expected, tightened = instance.expected, folds.tighten(objective)
        assert expected is not None
        if [choice.head for choice in instance.exits] != ["final"]:
            assert expected == tightened.expected
        assert expected.drop_pp <= (objective.max_drop_pp or 100) + 1e-9
        assert expected.cost <= costs.total("macs")
        (row,) = [row for row in measurements.rows if row.instance.name == name]
        assert (row.judged_miou, row.judged_macs) == (expected.miou, expected.macs)


def test_two_halves_on_request(tiny_run: Path, tmp_path: Path) -> None:
    """One half selects, the report shows the other, as before."""
    shutil.copytree(tiny_run, tmp_path / "run")
    run = open_run(tmp_path / "run", ["--search.protocol", "two_halves"])
    assert run_stage(run, "search")
    assert run_stage(run, "report")
    tiny_run = tmp_path / "run"
    tables, costs = run.tables(), run.costs()
    measurements = Measurements.from_json((tiny_run / "measurements.json").read_text())
    reported = [tables.image_names.index(name) for name in measurements.image_names]
    selected = sorted(set(range(16)) - set(reported))
    assert len(reported) == len(selected) == measurements.num_selection_images == 8
    half = tables.subset(np.array(selected))
    for name in ("max-miou", "drop-0.1pp", "drop-1pp"):
        instance = RunDirectory(tiny_run).read_instance(name)
        assert instance.selected_on["images"] == 8
        assert instance.selected_on["miou"] == pytest.approx(half.miou(route(half, instance)), abs=1e-9)
        assert instance.selected_on["macs"] == pytest.approx(cost_of(half, costs, instance).mean())
        final = half.miou(np.full(8, half.final))
        assert instance.selected_on["baseline_miou"] == pytest.approx(final, abs=1e-9)
        drop = {"max-miou": 0.0, "drop-0.1pp": 0.1, "drop-1pp": 1.0}[name]
        assert instance.selected_on["miou"] >= final - drop / 100 - 1e-9
        assert instance.selected_on["macs"] <= instance.selected_on["baseline_macs"]


def test_what_ran_is_what_the_tables_say(tiny_run: Path) -> None:
    tables = open_run(tiny_run).tables()
    measurements = Measurements.from_json((tiny_run / "measurements.json").read_text())
    reported = tables.subset(np.array([tables.image_names.index(name) for name in measurements.image_names]))
    assert [row.instance.name for row in measurements.rows] == ["baseline", "max-miou", "drop-0.1pp", "drop-1pp"]
    for row in measurements.rows:
        routing = route(reported, row.instance)
        assert row.miou == row.miou_from_tables == reported.miou(routing)
        assert row.exit_taken == [reported.exits[p].exit_index for p in routing]
        assert min(row.latency_ms) > 0
        # one figure per exit taken: the sum of the parts on the way
        assert len(row.predicted_ms) == len(row.latency_ms)
        assert len(set(zip(row.exit_taken, row.predicted_ms, strict=True))) == len(set(row.exit_taken))
        assert min(row.predicted_ms) > 0
    assert measurements.difficulty == reported.difficulty.tolist()
    correct = reported.intersection[:, -1].sum(1) / reported.labelled.sum(1)
    np.testing.assert_allclose(measurements.final_exit_error, 1 - correct)


def test_the_gallery_shows_reported_images(tiny_run: Path) -> None:
    gallery = Gallery.from_bytes((tiny_run / "gallery.npz").read_bytes())
    measurements = Measurements.from_json((tiny_run / "measurements.json").read_text())
    assert set(gallery.image_names) <= set(measurements.image_names)
    shown = max(measurements.rows[1:], key=lambda row: scipy.stats.entropy([share for _, share in row.exit_shares()]))
    assert gallery.exits == tuple(choice.exit for choice in shown.instance.exits)


def test_stage_2_does_not_begin_after_a_final_exit_of_one_class(
    tiny_run: Path, tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_run(tiny_recipe, ["--distill.iterations", "40"], out=tmp_path)
    adopt_pretrained(run, tiny_run)
    expect_seeing(run)  # it has learnt enough
    weights = safetensors.torch.load_file(tmp_path / "stage1.safetensors")
    *_, bias = (name for name, tensor in weights.items() if tensor.shape == (len(CLASS_NAMES),))
    weights |= {name: torch.zeros_like(weights[name]) for name in (bias, bias.replace("bias", "weight"))}
    weights[bias][2] = 1
    safetensors.torch.save_file(weights, tmp_path / "stage1.safetensors")
    with pytest.raises(SystemExit) as end:
        main(["run", str(tmp_path)])
    assert end.value.code == 2
    masks = np.stack([run.dataset("val")[v].mask for v in range(16)])
    miou = (masks == 2).sum() / (masks != IGNORE_INDEX).sum() / len({*masks[masks != IGNORE_INDEX].tolist()})
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"takes every pixel of the validation images for {CLASS_NAMES[2]!r} ({100 * miou:.1f} % mIoU)" in said
    assert f"`messnet distill {tmp_path}` goes on all the same" in said
    run.checkpoint("distill").path.touch()  # as it leaves when it has begun
    expect_seeing(run)


def test_killed_while_training_it_goes_on_from_the_checkpoint(
    tiny_run: Path, tiny_recipe: Path, tmp_path: Path
) -> None:
    recipe, out = yaml.safe_load(tiny_recipe.read_text()), tmp_path / "run"
    for stage, artefact in (("pretrain", "stage1.safetensors"), ("distill", "stage2.safetensors")):
        run_stage(open_run(tiny_recipe, out=out), "profile")
        command = [sys.executable, "-c", DYING, stage, str(tiny_recipe), "--out", str(out)]
        died = subprocess.run(command, capture_output=True, text=True)
        assert died.returncode == -signal.SIGKILL, died.stderr
        run = open_run(tiny_recipe, out=out)
        assert run.checkpoint(stage).load()["iteration"] == recipe[stage]["checkpoint_every"]
        assert not (out / artefact).exists()
        with pytest.raises(RunError, match=f"{stage}.learning_rate"):  # not even now with other options
            open_run(tiny_recipe, [f"--{stage}.learning_rate", "1"], out=out)

        assert run_stage(run, stage)
        assert (out / artefact).read_bytes() == (tiny_run / artefact).read_bytes()
        assert not run.checkpoint(stage).path.exists()


def test_two_processes_do_not_work_in_one_run(copied_run: Path) -> None:
    code = f"""
from pathlib import Path
from messnet.run.opening import open_run
with open_run(Path({str(copied_run)!r})).alone():
    print("inside", flush=True)
    input()
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "inside\n"
        run = open_run(copied_run)
        with pytest.raises(RunError, match=re.escape(f"another process is at work in {copied_run}: wait")):
            run_stage(run, "report", again=True)
        assert not run_stage(run, "report")  # done: nothing to keep from it
        other.kill()
    with run.alone(), open_run(copied_run).alone():  # what was killed holds it no more; blocks lie in each other
        pass
