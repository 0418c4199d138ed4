"""The run directory: its record, provenance and artefacts."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from messnet.errors import RunError
from messnet.records.files import reading, write_atomically

__all__ = ["RunDirectory"]

SCHEMA_VERSION = 1
RUN_FILE = "run.json"


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
            if (found := record["schema_version"]) != SCHEMA_VERSION:
                raise RunError(f"{file} of schema version {found}: this messnet reads {SCHEMA_VERSION}")
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

    def checkpoint(self, stage: str) -> Path:
        """Where a stage under way keeps the state it resumes from."""
        return self.path / f"{stage}.checkpoint"

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
