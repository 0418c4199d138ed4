"""Files are whole or not there, and a run directory knows what it is."""

import json
import os
import time
from pathlib import Path

import pytest
import torch

from messnet.errors import RunError
from messnet.records.files import write_atomically
from messnet.records.run_directory import RunDirectory
from messnet.records.shard import Shard


class TornError(OSError):
    """No space left, or a kill that Python sees."""


def fail(*_: object) -> None:
    raise TornError


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.json"
    for data in ("first", b"second \xff", "Köln"):
        write_atomically(path, data)
        assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert files(tmp_path) == ["new/folder/a.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("old", [None, "old"])
def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, old: str | None
) -> None:
    path = tmp_path / "a.json"
    if old:
        path.write_text(old)
    monkeypatch.setattr(os, step, fail)
    with pytest.raises(TornError):
        write_atomically(path, "new")
    assert files(tmp_path) == (["a.json"] if old else [])
    assert not old or path.read_text() == old


def test_a_new_run_goes_to_a_new_or_empty_folder(tmp_path: Path) -> None:
    for folder in (tmp_path / "a" / "b", tmp_path / "empty"):
        if folder.name == "empty":
            folder.mkdir()
        run = RunDirectory(folder)
        assert not run.exists
        run.create({"seed": 1})
        assert run.exists
        assert run.record().recipe == {"seed": 1}
        assert files(folder) == ["run.json"]


@pytest.mark.parametrize("foreign", ["notes.txt", ".hidden", "folder/deep.txt"])
def test_a_foreign_folder_is_left_alone(tmp_path: Path, foreign: str) -> None:
    (tmp_path / foreign).parent.mkdir(exist_ok=True)
    (tmp_path / foreign).write_text("mine")
    with pytest.raises(RunError, match="is no run directory; choose another with --out"):
        RunDirectory(tmp_path).create({})
    assert files(tmp_path) == [foreign]
    with pytest.raises(RunError, match="is no run directory"):
        RunDirectory(tmp_path / foreign).create({})  # a file where the folder should be
    with pytest.raises(RunError, match=r"no run directory \(no run.json\)"):
        RunDirectory(tmp_path).record()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '"run"', "\x00\x00"])
def test_a_damaged_record_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RunError, match=r"run\.json: not a run.s record"):
        RunDirectory(tmp_path).record()


def test_another_schema_version_is_told(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"schema_version": 99}')
    with pytest.raises(RunError, match="schema version 99: this messnet reads 1"):
        RunDirectory(tmp_path).record()


def test_a_stage_is_finished_only_when_it_succeeds(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.create({"seed": 1})
    before = (run.path / "run.json").read_bytes()
    for error in (TornError, KeyboardInterrupt):
        with pytest.raises(error), run.finishing("pretrain", "abc"):
            raise error
        assert (run.path / "run.json").read_bytes() == before
    assert run.fingerprint("pretrain") is None

    began = time.process_time()
    with run.finishing("pretrain", "abc"):
        assert run.fingerprint("pretrain") is None  # not before the end
        while time.process_time() - began < 0.2:
            pass
        time.sleep(0.2)
    assert run.fingerprint("pretrain") == "abc"
    entry = json.loads((run.path / "run.json").read_text())["stages"]["pretrain"]
    assert entry["seconds"] >= 0.4  # of the clock
    assert 0.2 <= entry["cpu_seconds"] <= entry["seconds"] - 0.1  # not what was slept
    assert torch.__version__.startswith(entry["torch"])
    run.update_recipe({"seed": 2})
    assert run.record().recipe == {"seed": 2}
    assert run.fingerprint("pretrain") == "abc"


def test_an_artefact_that_is_missing_names_its_verb(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with pytest.raises(RunError, match=rf"has no tables.npz yet; make it with `messnet evaluate {tmp_path}`"):
        run.tables.read()
    with pytest.raises(RunError, match=rf"has no costs/cpu.json yet; make it with `messnet profile {tmp_path}`"):
        run.measured("cpu").read()
    run.stage1.write(b"\x00")
    assert (tmp_path / "stage1.safetensors").read_bytes() == run.stage1.read() == b"\x00"
    with pytest.raises(RunError, match=r"has no instance 'a'; it has none yet: make one with `messnet search"):
        run.read_instance("a")


def test_parts_are_found_by_their_share(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for shard in (Shard(2, 10), Shard(10, 10)):
        run.part_of_stage2(shard).write(b"")
    assert files(tmp_path) == ["stage2.10of10.safetensors", "stage2.2of10.safetensors"]
    assert set(run.parts_of_stage2()) == {Shard(2, 10), Shard(10, 10)}
    assert run.parts_of_tables() == {}
