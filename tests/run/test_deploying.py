"""A recipe with ``deploy.precisions`` ends in graphs, measured beside the model."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helpers.files import snapshot
from messnet.cli import main
from messnet.deployment.loading import load
from messnet.errors import RecipeError
from messnet.records.deployed import Deployed, DeployedRow
from messnet.records.measurements import Measurement
from messnet.records.run_directory import RunDirectory
from messnet.report.deployed import deployed_headline, deployed_markdown
from messnet.run.opening import open_run
from messnet.run.recipe import DeployOptions
from messnet.run.stages import STAGES, run_stage

ASKED = ["--deploy.precisions", "f32", "int8", "--deploy.max_drop_pp", "50", "--deploy.threads", "1"]


# Dies with the bundle written and not yet in its place.
DYING = """
import os, signal, sys
replace = os.replace
def dying(source, target):
    if str(target).endswith("deployed.mess"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = dying
from messnet.cli import main
main(sys.argv[1:])
"""
KEPT = ("costs/deployed-onnxruntime-f32.json", "costs/deployed-onnxruntime-int8.json", "tables-onnxruntime-int8.npz")


@pytest.fixture(scope="module")
def deployed_run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed on its way; what the killed process has left is not made again."""
    path = shutil.copytree(tiny_run, tmp_path_factory.mktemp("deployed") / "run")
    (path / "deployed.json").write_text("{}")  # as if it had been done before
    died = subprocess.run([sys.executable, "-c", DYING, "run", str(path), *ASKED], capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert not (path / "deployed.json").exists(), "a record of an instance that is gone"
    assert not STAGES["deploy"].is_done(open_run(path))
    left = snapshot(path)
    main(["run", str(path), *ASKED])
    assert all(snapshot(path)[file] == left[file] for file in KEPT)
    assert not [file for file in snapshot(path) if Path(file).name.startswith(".") or file.endswith(".checkpoint")]
    return path


def test_rows_are_what_the_tables_foretell(deployed_run: Path) -> None:
    directory = RunDirectory(deployed_run)
    found, tables = directory.deployed.read(), directory.tables.read()
    kinds = [(row.is_model, row.runtime, row.precision) for row in found.rows]
    assert kinds[:2] == [(True, "onnxruntime", "f32"), (True, "onnxruntime", "int8")]
    assert kinds[-1] == (True, "torch", "f32")
    assert set(kinds[2:-1]) == {(False, "onnxruntime", "f32"), (False, "onnxruntime", "int8")}
    final = tables.miou(np.full(len(tables.image_names), tables.final))
    # Graphs add in another order than torch: a pixel may be of another class.
    assert found.rows[0].row.miou == pytest.approx(final, abs=2e-3)
    assert found.rows[-1].row.miou == pytest.approx(final, abs=1e-9)
    for row in found.rows:
        assert row.row.miou == pytest.approx(row.row.miou_from_tables, abs=5e-3)
        assert len(row.row.latency_ms) == len(tables.image_names)
    int8, f32 = found.rows[1].megabytes, found.rows[0].megabytes
    assert int8 < f32


def test_the_fastest_is_a_bundle_that_runs(deployed_run: Path) -> None:
    directory = RunDirectory(deployed_run)
    session, val = load(directory.bundle), open_run(deployed_run).dataset("val")
    chosen = directory.read_instance("deployed")
    assert session.runtime == "onnxruntime"
    assert (session.instance.exits, session.precision) == (chosen.exits, chosen.precision)
    row = directory.deployed.read().best
    assert row.row.instance.exits == chosen.exits
    taken = [session.predict([val[v].image])[0].exit_index for v in range(len(val))]
    assert taken == row.row.exit_taken


def test_it_is_done_once_and_again_when_more_is_asked(deployed_run: Path) -> None:
    run = open_run(deployed_run)
    assert not any(run_stage(run, stage) for stage in STAGES)
    other = open_run(deployed_run, ["--deploy.max_drop_pp", "40"])
    assert [stage for stage in STAGES if not STAGES[stage].is_done(other)] == ["deploy", "report"]
    open_run(deployed_run, ["--deploy.max_drop_pp", "50"])


def test_the_report_tells_of_it(deployed_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentence = deployed_headline(RunDirectory(deployed_run).deployed.read())
    page = (deployed_run / "report.html").read_text()
    assert "Runtimes and precisions" in page
    assert "ONNX Runtime int8" in page
    capsys.readouterr()
    main(["run", str(deployed_run)])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"report: already done {sentence}." in shown  # what opens the output
    main(["run", str(deployed_run), "--json"])
    assert len(json.loads(capsys.readouterr().out)["deployed"]["rows"]) == 5


def _row(ms: list[float], miou: float, *, is_model: bool, like: Measurement) -> DeployedRow:
    row = replace(like, latency_ms=ms, miou=miou, instance=replace(like.instance, expected=None))
    precision = "f32" if is_model else "int8"
    return DeployedRow(runtime="onnxruntime", precision=precision, megabytes=1.0, is_model=is_model, row=row)


def test_the_sentence_counts_early_stops_with_their_share(tiny_run: Path) -> None:
    like = RunDirectory(tiny_run).measurements.read().rows[0]
    like = replace(like, miou_change_error=None)
    rows = [_row([20.0, 20.0], 0.7, is_model=True, like=like), _row([2.0, 8.0], 0.69, is_model=False, like=like)]
    found = Deployed(device="here", threads=2, max_drop_pp=1.0, rows=rows, missing=[])
    assert deployed_headline(found) == (
        "Your model needs 20.0 ms an image. With early exits and int8 it needs 5.00 ms, 4.0x faster, at 1.0 pp less "
        "mIoU; ONNX Runtime, 2 threads"
    )
    assert "4.00x faster" in deployed_markdown(found)
    eighths = replace(rows[0], precision="int8", row=replace(rows[0].row, latency_ms=[5.0, 5.4], miou=0.695))
    assert deployed_headline(replace(found, rows=[rows[0], eighths, rows[1]])) == (
        "Your model needs 20.0 ms an image, in int8 5.20 ms, 3.8x faster, at 0.5 pp less mIoU. Early exits would make "
        "that less than 5 % faster, so it ships without them; ONNX Runtime, 2 threads"
    )
    slow = replace(eighths, row=replace(eighths.row, latency_ms=[5.3, 5.3]))
    assert "early exits and int8" in deployed_headline(replace(found, rows=[rows[0], slow, rows[1]]))
    too_much = replace(eighths, row=replace(eighths.row, miou=0.68))
    assert "early exits and int8" in deployed_headline(replace(found, rows=[rows[0], too_much, rows[1]]))
    slower = replace(rows[1], row=replace(rows[1].row, latency_ms=[30.0, 30.0]))
    assert deployed_headline(replace(found, rows=[rows[0], slower])) == (
        "Your model needs 20.0 ms an image. Early exits would make that less than 5 % faster, so it ships without "
        "them; ONNX Runtime, 2 threads"
    )
    alone = replace(found, rows=rows[:1])
    assert deployed_headline(alone) == (
        "Your model needs 20.0 ms an image. No early exits lose at most 1 pp; ONNX Runtime, 2 threads"
    )


def test_what_cannot_be_deployed_is_refused_at_once(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ({"precisions": ("bf16",)}, {"precisions": ("f32", "f32")}, {"threads": 0}):
        with pytest.raises(RecipeError):
            DeployOptions(**wrong)  # type: ignore[arg-type]
    with pytest.raises(SystemExit) as stopped:
        main(["deploy", str(tiny_run)])
    assert stopped.value.code == 2
    assert "add --deploy.precisions f32 int8" in capsys.readouterr().err
