"""The run directory: which stages are done, of which recipe, and every file that they leave, by name and type.

Nothing else in messnet knows where a file of a run lies.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Generic, TypeVar

from messnet.errors import RunError
from messnet.records.codec import Stored
from messnet.records.costs import CostTable
from messnet.records.deployed import Deployed
from messnet.records.exit_tables import ExitTables
from messnet.records.files import write_atomically, writing
from messnet.records.instance import Instance
from messnet.records.measurements import Gallery, Measurements
from messnet.records.names import DTYPES, Precision, precision_of_dtype
from messnet.records.shard import Shard

RUN_FILE = "run.json"
DEFAULT_INSTANCE = "drop-1pp"
DEPLOYED = "deployed"
"""The instance that the deploy stage chooses."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class RunFile:
    """One file of a run."""

    run: Path
    name: str
    made_by: str
    """The verb that makes it."""
    options: str = field(default="", kw_only=True)
    """What the verb is given beyond the run."""

    @property
    def path(self) -> Path:
        return self.run / self.name

    @property
    def exists(self) -> bool:
        return self.path.is_file()

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Artefact(RunFile, Generic[_T]):
    """One file of a run, read and written as what it holds."""

    decode: Callable[[bytes], _T]
    encode: Callable[[_T], bytes | str]

    def read(self) -> _T:
        """Raises RunError that names the file and the verb which makes it when it is not there, or is damaged."""
        if not self.run.is_dir():
            raise RunError(f"there is no run {self.run}: expected a folder that `messnet run` made")
        if not self.exists:
            raise RunError(
                f"{self.run} has no {self.name} yet; make it with `messnet {self.made_by} {self.run}{self.options}`"
            )
        try:
            return self.decode(self.path.read_bytes())
        except RunError as error:
            raise RunError(f"{self.path}: {error}") from error

    def write(self, value: _T) -> None:
        """Whole or not at all. Raises RunError when the disk is full or read-only."""
        with writing(self.path):
            write_atomically(self.path, self.encode(value))


class Named(Generic[_T]):
    """A file that every run has under the same name: an attribute of RunDirectory, which is the Artefact of the run."""

    def __init__(
        self, name: str, made_by: str, decode: Callable[[bytes], _T], encode: Callable[[_T], bytes | str]
    ) -> None:
        self.name, self.made_by, self.decode, self.encode = name, made_by, decode, encode

    def __get__(self, run: RunDirectory, owner: type[RunDirectory]) -> Artefact[_T]:
        return Artefact(run.path, self.name, self.made_by, self.decode, self.encode)


@dataclass(frozen=True)
class RunRecord(Stored, what="a run's record", made_by="run"):
    """``run.json``: the recipe, and of each finished stage its fingerprint, times and provenance."""

    recipe: dict[str, object]
    stages: dict[str, dict[str, str | float]] = field(default_factory=dict)


@dataclass(frozen=True)
class RunDirectory:
    """A folder with the artefacts of one recipe: ``run.json`` says which stages are done, of which recipe, by whom."""

    path: Path

    # What each stage leaves. Weights are safetensors; who reads them has torch, this module has not.

    exits = Named("exits.json", "profile", bytes, bytes)
    """The network's Blueprint, as JSON."""
    profile = Named("profile.json", "profile", CostTable.from_json, CostTable.to_json)
    """The workload of every part."""
    delivered = Named("delivered.npz", "pretrain", ExitTables.from_bytes, ExitTables.to_bytes)
    """The tables of the user's model alone, as it was delivered: where the recipe gives its weights."""
    stage1 = Named("stage1.safetensors", "pretrain", bytes, bytes)
    stage1_heads = Named("stage1_heads.safetensors", "pretrain", bytes, bytes)
    """The plain heads that stage 1 trained with the backbone: where its scheme has early exits."""
    stage2 = Named("stage2.safetensors", "distill", bytes, bytes)
    tables = Named("tables.npz", "evaluate", ExitTables.from_bytes, ExitTables.to_bytes)
    front = Named("front.json", "search", bytes, bytes)
    """The search's Findings, as JSON."""
    measurements = Named("measurements.json", "report", Measurements.from_json, Measurements.to_json)
    gallery = Named("gallery.npz", "report", Gallery.from_bytes, Gallery.to_bytes)
    deployed = Named("deployed.json", "deploy", Deployed.from_json, Deployed.to_json)
    report = Named("report.html", "report", bytes.decode, str.encode)
    _record = Named(RUN_FILE, "run", RunRecord.from_json, RunRecord.to_json)

    def deployed_tables(self, runtime: str, precision: Precision) -> Artefact[ExitTables]:
        """Those of the network as a runtime computes it in a precision: "openvino", "int8"."""
        return self._tables(f"tables-{runtime}-{precision}.npz", f" --runtime {runtime} --precision {precision}")

    def tables_for(self, costs: Sequence[CostTable]) -> ExitTables:
        """The tables of the precision that ``costs`` were measured in; of a table that only counts, and in f32, which
        every runtime computes alike, the run's own.

        Raises RunError where costs are of several precisions, or the tables are missing or of other weights.
        """
        # A table that only counts has no conditions: it holds for the run's own tables, in float32.
        conditions = [{"runtime": "", "dtype": DTYPES["f32"], **table.conditions} for table in costs]
        measured = {(str(one["runtime"]).partition(" ")[0], str(one["dtype"])) for one in conditions}
        others = sorted(one for one in measured if one[1] != DTYPES["f32"])
        if not others:
            return self.tables.read()
        if len(measured) > 1:
            found = " and ".join(f"{runtime} {precision_of_dtype(dtype)}" for runtime, dtype in sorted(measured))
            raise RunError(
                f"the cost tables are of {found}, of which none foretells another: give this search one of them"
            )
        runtime, dtype = others[0]
        tables = self.deployed_tables(runtime, precision_of_dtype(dtype)).read()
        own = self.tables.read().origin if self.tables.exists else ""
        if own and tables.origin.split()[0] != own:  # behind it stand runtime and precision
            raise RunError(
                f"the tables of {self.path} in {tables.precision} are of other weights or another recipe than its own: "
                f"make them again with `messnet evaluate {self.path} --runtime {runtime} --precision "
                f"{tables.precision}`"
            )
        return tables

    def read_deployed(self) -> Deployed | None:
        """None where the recipe deploys nothing."""
        asked = self.record().recipe.get("deploy", {})
        if not isinstance(asked, dict) or not asked.get("precisions"):
            return None
        deployed, instance = self.deployed.read(), self.instance(DEPLOYED)
        if deployed.ships is not None or not instance.exists:
            return deployed
        # Older records do not say what shipped, and the rule was another one then; the instance of the bundle does.
        shipped = instance.read()
        places = [
            place
            for place, row in enumerate(deployed.rows)
            if (row.runtime, row.precision) == (deployed.model.runtime, shipped.precision)
            and row.is_model == (shipped.exits == deployed.model.row.instance.exits)
        ]
        return replace(deployed, ships=places[0]) if places else deployed

    @property
    def bundle(self) -> Path:
        """Of the instance that the deploy stage chooses."""
        return self.path / f"{DEPLOYED}.mess"

    @property
    def logs(self) -> Path:
        """Where trainings write their curves."""
        return self.path / "logs"

    def instance(self, name: str) -> Artefact[Instance]:
        return Artefact(self.path, f"instances/{name}.json", "search", Instance.from_json, Instance.to_json)

    def instance_names(self) -> list[str]:
        """The instances that searches have left."""
        return sorted(file.stem for file in self.path.glob("instances/*.json"))

    def read_instance(self, name: str | None = None) -> Instance:
        """The instance of that name; None: the cheapest within 1 pp, or the only one. Raises RunError that lists the
        instances there are."""
        known = self.instance_names()
        if name is None:
            # A run that searched for one instance of its own may lack the default one.
            name = known[0] if len(known) == 1 else DEFAULT_INSTANCE
        if name not in known:
            names = ", ".join(known) or f"none yet: make one with `messnet search {self.path}`"
            raise RunError(f"{self.path} has no instance {name!r}; it has {names}")
        return self.instance(name).read()

    def measured(self, name: str) -> Artefact[CostTable]:
        """The costs that were measured on some device."""
        return Artefact(self.path, f"costs/{name}.json", "profile", CostTable.from_json, CostTable.to_json)

    def all_measured(self) -> list[Artefact[CostTable]]:
        return [self.measured(file.stem) for file in sorted(self.path.glob("costs/*.json"))]

    def costs(self, path: Path | None = None) -> CostTable:
        """The table at ``path``, by default the run's own, which knows no latency."""
        if path is None:
            return self.profile.read()
        if not path.is_file():
            raise RunError(f"no cost table {path}; make one with `messnet profile {self.path} --measure`")
        return CostTable.from_json(path.read_bytes())

    def part_of_stage2(self, shard: Shard) -> Artefact[bytes]:
        return Artefact(self.path, f"stage2.{shard}.safetensors", "distill", bytes, bytes)

    def parts_of_stage2(self) -> dict[Shard, Artefact[bytes]]:
        return {shard: self.part_of_stage2(shard) for shard in self._shards("stage2.*of*.safetensors")}

    def part_of_tables(self, shard: Shard) -> Artefact[ExitTables]:
        return self._tables(f"tables.{shard}.npz")

    def parts_of_tables(self) -> dict[Shard, Artefact[ExitTables]]:
        return {shard: self.part_of_tables(shard) for shard in self._shards("tables.*of*.npz")}

    def checkpoint(self, stage: str) -> Path:
        """Where a stage under way keeps the state it resumes from."""
        return self.path / f"{stage}.checkpoint"

    def _tables(self, name: str, options: str = "") -> Artefact[ExitTables]:
        return Artefact(self.path, name, "evaluate", ExitTables.from_bytes, ExitTables.to_bytes, options=options)

    def _shards(self, pattern: str) -> list[Shard]:
        words = sorted(file.name.split(".")[1].replace("of", "/") for file in self.path.glob(pattern))
        return [Shard.parse(word) for word in words]

    # Which stages are done.

    @property
    def exists(self) -> bool:
        return (self.path / RUN_FILE).is_file()

    def create(self, recipe: Mapping[str, object]) -> None:
        """Starts a run in a new or empty folder. Raises RunError when the folder holds something else."""
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise RunError(f"{self.path} exists and is no run directory; choose another with --out, or empty it")
        self._record.write(RunRecord(dict(recipe)))

    def update_recipe(self, recipe: Mapping[str, object], fingerprints: Mapping[str, str] | None = None) -> None:
        """Another recipe from now on; ``fingerprints`` of the finished stages that it leaves finished."""
        stages = self.record().stages
        for stage, fingerprint in (fingerprints or {}).items():
            stages[stage]["fingerprint"] = fingerprint
        self._record.write(RunRecord(dict(recipe), stages))

    def record(self) -> RunRecord:
        """``run.json``. Raises RunError when the folder is no run of this schema version."""
        if not self.exists:
            raise RunError(f"{self.path} is no run directory (no {RUN_FILE}); start one with `messnet run RECIPE`")
        return self._record.read()

    def fingerprint(self, stage: str) -> str | None:
        """A name for all that the finished ``stage`` was made from, None if it is not finished."""
        entry = self.record().stages.get(stage)
        return str(entry["fingerprint"]) if entry else None

    @contextmanager
    def finishing(self, stage: str, fingerprint: str) -> Iterator[None]:
        """Records ``stage`` as finished, with its time, on the clock and of processors (this process and those that it
        waited for), and its provenance, when the block ends without an error."""
        # os.times counts children only once they have been waited for, such as the workers that load data.
        start, start_cpu = time.perf_counter(), sum(os.times()[:4])
        yield
        record = self.record()
        record.stages[stage] = {
            "fingerprint": fingerprint,
            "seconds": round(time.perf_counter() - start, 1),
            "cpu_seconds": round(sum(os.times()[:4]) - start_cpu, 1),
            "finished": time.strftime("%Y-%m-%d %H:%M:%S%z"),
            **provenance(),
        }
        self._record.write(record)


def provenance() -> dict[str, str]:
    """Versions and machine, as words."""
    versions = {}
    for name in ("messnet", "torch", "torchvision"):
        # A device that only runs graphs has no torch.
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {**versions, "python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
