"""The run directory: its record, provenance, artefacts and checkpoints."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from messnet.errors import RunError
from messnet.files import expect_schema, reading, write_atomically

__all__ = ["Checkpoint", "RunDirectory", "writing"]

SCHEMA_VERSION = 1
RUN_FILE = "run.json"


@dataclass(frozen=True)
class Checkpoint:
    """Where a training stage keeps the state it resumes from."""

    path: Path
    made_from: str = field(default="", kw_only=True)
    """Fingerprint of the recipe, where a state of another one must not be taken for this one's."""

    def load(self) -> dict[str, Any] | None:
        """The last state saved, None if there is none. Raises RunError when it cannot be read."""
        if not self.path.exists():
            return None
        import torch

        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            raise RunError(
                f"{self.path} cannot be read (damaged, or no checkpoint); delete it to start the stage again"
            ) from error
        if state.pop("made_from", self.made_from) != self.made_from:
            raise RunError(f"{self.path} was made from another recipe; delete it to start anew with this one")
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Replaces the last state. Raises RunError when the disk is full or read-only; the last state is whole then."""
        _save(self.path, state | ({"made_from": self.made_from} if self.made_from else {}))

    def save_best(self, state: dict[str, Any]) -> None:
        """Beside the last state: the best one."""
        _save(self.best.path, state)

    def load_best(self) -> dict[str, Any] | None:
        return self.best.load()

    @property
    def best(self) -> Checkpoint:
        return Checkpoint(self.path.with_suffix(".best"))

    def expect_writable(self) -> None:
        """Raises RunError when no state could be saved here: before hours are spent, not after."""
        probe = self.path.with_name(f".{self.path.name}.probe")
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"probe")
            probe.unlink()

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self.path.with_suffix(".best").unlink(missing_ok=True)


def _save(path: Path, state: dict[str, Any]) -> None:
    import io

    import torch

    buffer = io.BytesIO()
    torch.save(state, buffer)
    with writing(path):
        write_atomically(path, buffer.getvalue())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around the writing of what training makes: a disk that is full or read-only becomes a RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror or error}): free space or make the folder writable; what was "
            f"saved before is whole, and the same command goes on from there"
        ) from error


@dataclass(frozen=True)
class RunDirectory:
    """A folder with the artefacts of one recipe: ``run.json`` says which stages are done, of which recipe, by whom."""

    path: Path

    @property
    def exists(self) -> bool:
        return (self.path / RUN_FILE).is_file()

    def create(self, recipe: dict[str, Any]) -> None:
        """Starts a run in a new or empty folder. Raises RunError when the folder holds something else."""
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise RunError(f"{self.path} exists and is no run directory; choose another with --out, or empty it")
        self._write_record({"recipe": recipe, "stages": {}})

    def update_recipe(self, recipe: dict[str, Any], fingerprints: dict[str, str] | None = None) -> None:
        """Another recipe from now on; ``fingerprints`` of the finished stages that it leaves finished."""
        record = self.record()
        for stage, fingerprint in (fingerprints or {}).items():
            record["stages"][stage]["fingerprint"] = fingerprint
        self._write_record({**record, "recipe": recipe})

    def record(self) -> dict[str, Any]:
        """``run.json``. Raises RunError when the folder is no run of this schema version."""
        file = self.path / RUN_FILE
        if not file.is_file():
            raise RunError(f"{self.path} is no run directory (no {RUN_FILE}); start one with `messnet run RECIPE`")
        with reading(f"a run's record: {file}", made_by="run"):
            record: dict[str, Any] = json.loads(file.read_text())
            expect_schema(record, SCHEMA_VERSION, RUN_FILE)
            return {"recipe": dict(record["recipe"]), "stages": dict(record["stages"])}

    def fingerprint(self, stage: str) -> str | None:
        """What the finished ``stage`` was made from, None if it is not finished."""
        entry = self.record()["stages"].get(stage)
        return entry and str(entry["fingerprint"])

    @contextmanager
    def finishing(self, stage: str, fingerprint: str) -> Iterator[None]:
        """Records ``stage`` as finished, with its time, on the clock and of processors (this process and those that it
        waited for), and its provenance, when the block ends without an error."""
        start, start_cpu = time.perf_counter(), sum(os.times()[:4])
        yield
        record = self.record()
        record["stages"][stage] = {
            "fingerprint": fingerprint,
            "seconds": round(time.perf_counter() - start, 1),
            "cpu_seconds": round(sum(os.times()[:4]) - start_cpu, 1),
            "finished": time.strftime("%Y-%m-%d %H:%M:%S%z"),
            **provenance(),
        }
        self._write_record(record)

    def checkpoint(self, stage: str) -> Checkpoint:
        return Checkpoint(self.path / f"{stage}.checkpoint")

    def write(self, name: str, data: bytes | str) -> Path:
        write_atomically(self.path / name, data)
        return self.path / name

    def read(self, name: str, *, made_by: str) -> bytes:
        """An artefact. Raises RunError that names the verb which makes it when it is not there."""
        file = self.path / name
        if not file.is_file():
            raise RunError(f"{self.path} has no {name} yet; make it with `messnet {made_by} {self.path}`")
        return file.read_bytes()

    def _write_record(self, record: dict[str, Any]) -> None:
        text = json.dumps({"schema_version": SCHEMA_VERSION, **record}, indent=1)
        write_atomically(self.path / RUN_FILE, text + "\n")


def provenance() -> dict[str, str]:
    """Versions and machine, as words."""
    packages = {name: metadata.version(name) for name in ("messnet", "torch", "torchvision") if _installed(name)}
    return {**packages, "python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
