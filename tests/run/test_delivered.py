"""A model that comes trained: evaluated as it was delivered, kept to the bit, and what limits are counted against."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from messnet.cli import main
from messnet.data import IGNORE_INDEX
from messnet.images.preprocessing import normalise
from messnet.network.zoo import mobilenetv2_fcn
from messnet.records.exit_tables import ExitTables
from messnet.records.measurements import Measurements
from messnet.records.run_directory import RunDirectory
from messnet.run.opening import adopt_pretrained, open_run
from messnet.run.run import Run
from messnet.run.stages import run_stage

KEPT = ["--pretrain.iterations", "0"]
SPOILT = ["--pretrain.iterations", "3", "--pretrain.learning_rate", "5", "--compute.validate_every", "0"]


@pytest.fixture(scope="module")
def trained(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of a model that someone has trained."""
    return shutil.copy(tiny_run / "stage1.safetensors", tmp_path_factory.mktemp("weights") / "own.safetensors")


def _pretrained(recipe: Path, out: Path, weights: Path, options: list[str]) -> Run:
    run = open_run(recipe, ["--model.weights", str(weights), *options], out=out)
    run_stage(run, "profile")
    run_stage(run, "pretrain")
    return run


def _miou(weights: Path, run: Run) -> float:
    """Of the plain model on all validation images, by sets of pixels."""
    model, val = mobilenetv2_fcn(8, width=0.25, depth=0.5).eval(), run.dataset("val")
    model.load_state_dict(safetensors.torch.load_file(weights))
    labels, masks = [], []
    for sample in (val[v] for v in range(len(val))):
        with torch.no_grad():
            logits = model(torch.from_numpy(normalise(sample.image))[None])
        logits = logits["out"] if isinstance(logits, dict) else logits
        size = sample.mask.shape
        labels.append(torch.nn.functional.interpolate(logits, size=size, mode="bilinear").argmax(1)[0].numpy())
        masks.append(sample.mask)
    label, mask = np.stack(labels), np.stack(masks)
    label = label[mask != IGNORE_INDEX]
    mask = mask[mask != IGNORE_INDEX]
    return float(np.mean([((label == k) & (mask == k)).sum() / ((label == k) | (mask == k)).sum() for k in range(8)]))


def test_no_iterations_keep_the_delivered_network_to_the_bit(
    tiny_recipe: Path, tiny_run: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _pretrained(tiny_recipe, tmp_path / "run", trained, KEPT)
    kept, delivered = (safetensors.torch.load_file(path) for path in (tmp_path / "run/stage1.safetensors", trained))
    assert kept.keys() == delivered.keys()
    assert all(torch.equal(kept[name], delivered[name]) for name in kept)
    tables, whole = run.directory.delivered.read(), RunDirectory(tiny_run).tables.read()
    np.testing.assert_array_equal(tables.intersection[:, 0], whole.intersection[:, whole.final])
    miou = tables.miou(np.zeros(16, np.int64))
    assert miou == pytest.approx(_miou(trained, run), abs=1e-6)
    said = capsys.readouterr().err
    assert f"kept as delivered, {100 * miou:.2f} % mIoU on the validation images; compare with" in said


def test_plain_heads_begin_anew_where_stage_1_trained_none(
    tiny_recipe: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipes of ``messnet init`` ask for those of stage 1, and a model may yet be kept as it came."""
    heads = {}
    for plain in ("new", "stage1"):
        run = _pretrained(tiny_recipe, tmp_path / plain, trained, [*KEPT, "--distill.plain_heads", plain])
        run_stage(run, "distill")
        heads[plain] = safetensors.torch.load_file(tmp_path / plain / "stage2.safetensors")
        told = "stage 1 trained no heads, so the plain ones begin anew" in capsys.readouterr().err
        assert told == (plain == "stage1")
    assert heads["new"].keys() == heads["stage1"].keys()
    assert all(torch.equal(heads["new"][name], heads["stage1"][name]) for name in heads["new"])


def test_a_stage_1_that_makes_the_model_worse_is_told_at_once(
    tiny_recipe: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _pretrained(tiny_recipe, tmp_path / "run", trained, SPOILT)
    before, after = (_miou(path, run) for path in (trained, tmp_path / "run/stage1.safetensors"))
    assert before > after + 0.01
    told = capsys.readouterr().err
    assert f"{100 * before:.2f} % mIoU as delivered, {100 * after:.2f} % after stage 1: worse than it came" in told
    assert "pretrain.iterations: 0" in told
    # Another run that takes this stage 1 over knows what was delivered too.
    other = open_run(tiny_recipe, ["--model.weights", str(trained), *SPOILT], out=tmp_path / "other")
    adopt_pretrained(other, run.directory.path)
    assert other.directory.delivered.path.read_bytes() == run.directory.delivered.path.read_bytes()


def test_the_report_has_the_delivered_model_and_the_users_own_instances(tiny_run: Path, tmp_path: Path) -> None:
    """A finished run whose tables say that a better model was delivered, and two searches of the user's own."""
    path = shutil.copytree(tiny_run, tmp_path / "run")
    directory = RunDirectory(path)
    tables = directory.tables.read()
    perfect = np.stack((tables.labelled, tables.labelled), 1)
    directory.tables.write(replace(tables, delivered=perfect))
    main(["search", str(path), "--name", "own", "--maximise", "miou", "--max-cost-ratio", "0.9"])
    stranger = replace(directory.read_instance("own"), name="stranger", selected_on={"miou": 0.5})
    directory.instance("stranger").write(stranger)
    main(["report", str(path), "--markdown", str(tmp_path / "table.md")])

    measured = Measurements.from_json(directory.measurements.path.read_bytes())
    assert measured.delivered is not None
    assert measured.delivered.miou == 1
    assert set(measured.delivered.class_iou) <= {1.0, None}
    assert [row.instance.name for row in measured.rows] == ["baseline", "max-miou", "drop-0.1pp", "drop-1pp", "own"]
    assert (measured.left_out, measured.skipped) == (["stranger"], [])
    assert "- not in the table: stranger: it was chosen on other images" in (tmp_path / "table.md").read_text()
    reported = tables.subset(np.array([tables.image_names.index(name) for name in measured.image_names]))
    confusion = np.array(measured.rows[0].confusion)
    final = reported.final
    np.testing.assert_array_equal(confusion.diagonal(), reported.intersection[:, final].sum(0))
    np.testing.assert_array_equal(confusion.sum(0), reported.predicted[:, final].sum(0))
    np.testing.assert_array_equal(confusion.sum(1), reported.labelled.sum(0))
    text, page = (tmp_path / "table.md").read_text(), directory.report.path.read_text()
    assert text.startswith("Stage 1 made your model worse: 100.0 % mIoU as delivered, ")
    assert "| the model as delivered | 100.00 |" in text
    assert "the model as delivered" in page
    assert "what own takes each class for" in page


def test_searches_count_drops_from_the_delivered_model(tiny_run: Path, tmp_path: Path) -> None:
    """Delivered worse than the final exit by 3 points, the limit is that much laxer: and no instance is below it."""
    path = shutil.copytree(tiny_run, tmp_path / "run")
    directory = RunDirectory(path)
    tables = directory.tables.read()
    selection = tables.subset(tables.halves(0)[0])
    final = selection.miou(np.full(len(selection.image_names), selection.final))
    coarse = int(np.argmin([selection.miou(np.full(len(selection.image_names), h)) for h in range(len(tables.exits))]))
    delivered = np.stack((tables.intersection[:, coarse], tables.predicted[:, coarse]), 1)
    halves = ["--search.protocol", "two_halves"]
    main(["search", str(path), *halves, "--name", "strict", "--max-drop-pp", "0.1"])
    directory.tables.write(replace(tables, delivered=delivered))
    main(["search", str(path), *halves, "--name", "own", "--max-drop-pp", "0"])
    chosen = directory.read_instance("own").selected_on
    baseline = selection.miou(np.full(len(selection.image_names), coarse))
    assert baseline < final
    assert chosen["baseline_miou"] == pytest.approx(baseline, abs=1e-12)
    assert baseline - 1e-12 <= chosen["miou"]
    strict = directory.read_instance("strict").selected_on
    assert chosen["macs"] <= strict["macs"]


def test_tables_keep_what_was_delivered(tiny_run: Path) -> None:
    tables = RunDirectory(tiny_run).tables.read()
    whole = replace(tables, delivered=tables.baseline)
    again = ExitTables.from_bytes(whole.to_bytes())
    assert again.delivered is not None
    np.testing.assert_array_equal(again.delivered, tables.baseline)
    np.testing.assert_array_equal(again.subset(np.array([3, 1])).baseline, tables.baseline[[3, 1]])
