"""``data.group`` in a run: what it splits, and what stays as it was."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from messnet.cli import main
from messnet.records.exit_tables import ExitTables
from messnet.run.recipe import load_recipe, recipe_to_record
from messnet.run.stages import STAGES


def test_fingerprints_are_those_of_before_there_were_groups(tiny_recipe: Path) -> None:
    record = recipe_to_record(load_recipe(tiny_recipe))
    assert record["data"]["group"] is None
    before = record | {"data": {key: value for key, value in record["data"].items() if key != "group"}}
    grouped = record | {"data": record["data"] | {"group": "^(.)"}}
    for stage in STAGES.values():
        assert stage.fingerprint(record) == stage.fingerprint(before)
        is_same = stage.fingerprint(grouped) == stage.fingerprint(record)
        assert is_same == (stage.name in ("profile", "pretrain", "distill"))


def test_groups_come_after_training(tiny_run: Path, tmp_path: Path) -> None:
    """A finished run learns which images belong together: nothing is trained again, and groups stay whole."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    trained = {name: (run / name).stat().st_mtime_ns for name in ("stage1.safetensors", "stage2.safetensors")}
    main(["run", str(run), "--data.group", r"^(.*)\d$"])
    assert {name: (run / name).stat().st_mtime_ns for name in trained} == trained
    tables = ExitTables.from_bytes((run / "tables.npz").read_bytes())
    assert tables.groups == tuple(name[:-1] for name in tables.image_names)
    first, second = tables.halves()
    assert not {tables.groups[v] for v in first} & {tables.groups[v] for v in second}


def test_one_group_is_refused_before_training(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["run", str(tiny_recipe), "--out", str(tmp_path / "run"), "--data.group", "^(.)"])
    error = capsys.readouterr().err
    assert "the validation split has images of one group (v)" in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()
