"""Which directory a recipe's run lives in, and which of its stages are done."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from tqdm import tqdm

from messnet.data import SegmentationDataset
from messnet.data.checks import check_dataset
from messnet.data.sources import SOURCES, DataOptions, open_dataset
from messnet.errors import DataError, RunError
from messnet.network.blueprint import Blueprint
from messnet.network.multi_exit import MultiExitNet
from messnet.records.costs import COST_TABLE, CostTable
from messnet.records.exit_tables import EXIT_TABLES, ExitTables
from messnet.records.run_directory import RunDirectory
from messnet.run.recipe import Recipe, load_recipe, recipe_from_record, recipe_to_record
from messnet.training import Monitor
from messnet.training.checkpoint import Checkpoint

__all__ = [
    "ARTEFACTS",
    "SECTIONS",
    "Run",
    "expect_same",
    "fingerprint",
    "open_run",
    "parts_fingerprint",
    "tables_origin",
]

# The sections of the recipe that a stage's artefact depends on.
SECTIONS = {
    "profile": ("data", "model", "heads"),
    "pretrain": ("data", "model", "pretrain"),
    "distill": ("data", "model", "pretrain", "heads", "distill"),
    "evaluate": ("data", "model", "pretrain", "heads", "distill", "evaluate"),
    "search": ("data", "model", "pretrain", "heads", "distill", "evaluate", "search"),
    "report": ("data", "model", "pretrain", "heads", "distill", "evaluate", "search"),
}
# A stage whose artefacts have another format today is done again; trainings have none but safetensors.
FORMATS = {"costs": COST_TABLE.version, "tables": EXIT_TABLES.version}
FORMATS_OF = {
    "profile": ("costs",),
    "evaluate": ("tables",),
    "search": ("costs", "tables"),
    "report": ("costs", "tables"),
}
# What costs hours is refused when its options change; the rest is just done again.
TRAINING = ("pretrain", "distill")
ARTEFACTS = {
    "profile": "exits.json",
    "pretrain": "stage1.safetensors",
    "distill": "stage2.safetensors",
    "evaluate": "tables.npz",
    "search": "front.json",
    "report": "report.html",
}


@dataclass(frozen=True)
class Run:
    """A recipe and the directory that its artefacts go to."""

    recipe: Recipe
    directory: RunDirectory

    @property
    def device(self) -> torch.device:
        return self.recipe.compute.fabric().device

    def dataset(self, split: Any) -> SegmentationDataset:
        return open_dataset(self.recipe.data, split)

    def blueprint(self) -> Blueprint:
        return Blueprint.from_json(self.directory.read("exits.json", made_by="profile"))

    def costs(self, path: Path | None = None) -> CostTable:
        """The table at ``path``, by default the run's own, which knows no latency."""
        if path is None:
            return CostTable.from_json(self.directory.read("profile.json", made_by="profile").decode())
        if not path.is_file():
            raise RunError(f"no cost table {path}; make one with `messnet profile {self.directory.path} --measure`")
        return CostTable.from_json(path.read_text(errors="replace"))

    def tables(self) -> ExitTables:
        return ExitTables.from_bytes(self.directory.read("tables.npz", made_by="evaluate"))

    def checkpoint(self, name: str) -> Checkpoint:
        return Checkpoint(self.directory.checkpoint(name))

    def monitor(self, name: str) -> Monitor:
        """Where training tells how it goes."""
        return Monitor(self.directory.path / "logs", self.dataset("val"), name)

    def pretrained(self) -> MultiExitNet:
        """The network after stage 1, without heads."""
        weights = self.directory.read("stage1.safetensors", made_by="pretrain")
        net = self.blueprint().build()
        net.load_model_state_dict(safetensors.torch.load(weights))
        return net


def open_run(target: Path, overrides: Sequence[str] = (), *, out: Path | None = None) -> Run:
    """The run of a recipe file (in ``out``, by default runs/NAME) or of a run directory, which remembers its recipe.

    Raises RecipeError or DataError when the recipe is not in order, RunError when the directory belongs to another
    recipe: what a stage was made from cannot change once it has begun. Nothing is written in either case.
    """
    if target.is_dir():
        directory = RunDirectory(target)
        recipe = recipe_from_record(directory.record()["recipe"], overrides)
    else:
        recipe = load_recipe(target, overrides)
        directory = RunDirectory(out or Path("runs") / target.stem)
    record = recipe_to_record(recipe)
    known = _known_recipe(directory) if directory.exists else None
    if known == record:
        return Run(recipe, directory)
    if known is not None:
        _refuse_other_recipe(directory, known, record)
    if known is None or known["data"] != record["data"]:
        _expect_sound_data(recipe.data)
    if known is None:
        directory.create(record)
    else:
        directory.update_recipe(record)
    return Run(recipe, directory)


def _known_recipe(directory: RunDirectory) -> dict[str, Any]:
    """The recipe of a run. Options that came after it have their defaults, and its stages stay done."""
    old = directory.record()["recipe"]
    known = recipe_to_record(recipe_from_record(old))
    if known != old:
        stages = [stage for stage in SECTIONS if directory.fingerprint(stage) == fingerprint(old, stage)]
        directory.update_recipe(known, {stage: fingerprint(known, stage) for stage in stages})
    return known


def fingerprint(record: dict[str, Any], stage: str) -> str:
    """Of the recipe's sections that a stage is made from, and of the formats that it reads and writes."""
    parts: dict[str, Any] = _made_from(record, stage)
    if formats := [FORMATS[name] for name in FORMATS_OF.get(stage, ())]:
        parts["formats"] = formats
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _made_from(record: dict[str, Any], stage: str) -> dict[str, dict[str, Any]]:
    """The sections of the recipe that a stage's artefact depends on.

    ``data.group`` splits nothing but validation images, so costs and trainings are the same with any. Where it is not
    given, it is left out: fingerprints are then those of runs from before it existed.
    """
    parts = {section: dict(record.get(section, {})) for section in SECTIONS[stage]}
    if stage in ("profile", *TRAINING) or parts["data"].get("group") is None:
        parts["data"].pop("group", None)
    return parts


def parts_fingerprint(run: Run) -> str:
    """What parts must have been made from to belong together: the recipe, and stage 1 to the bit."""
    stage1 = hashlib.sha256(run.directory.read("stage1.safetensors", made_by="pretrain")).hexdigest()[:16]
    return f"{fingerprint(recipe_to_record(run.recipe), 'distill')}-{stage1}"


def tables_origin(run: Run) -> str:
    """What tables are made from: the recipe, and the weights to the bit."""
    digest = hashlib.sha256(fingerprint(recipe_to_record(run.recipe), "evaluate").encode())
    for name, verb in (("stage1", "pretrain"), ("stage2", "distill")):
        digest.update(hashlib.sha256(run.directory.read(f"{name}.safetensors", made_by=verb)).digest())
    return digest.hexdigest()[:16]


def _refuse_other_recipe(directory: RunDirectory, known: dict[str, Any], record: dict[str, Any]) -> None:
    for stage in TRAINING:
        if directory.fingerprint(stage) is None and not directory.checkpoint(stage).exists():
            continue  # not begun: may still change
        advice = "choose another directory with --out, or delete it"
        expect_same(stage, known, record, was=f"{directory.path} was made", advice=advice)


def expect_same(stage: str, known: dict[str, Any], record: dict[str, Any], *, was: str, advice: str) -> None:
    """Raises RunError that names the first key where two recipes differ in what ``stage`` is made from."""
    known, record = _made_from(known, stage), _made_from(record, stage)
    for section in SECTIONS[stage]:
        old, new = _flat(known[section]), _flat(record[section])
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                raise RunError(
                    f"{was} with {section}.{key} = {old.get(key)}, this recipe says {new.get(key)}: {advice}"
                )


def _flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in record.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _expect_sound_data(options: DataOptions) -> None:
    """Reads every image once before hours are spent on them; generated ones cannot be broken."""
    train, val = open_dataset(options, "train"), open_dataset(options, "val")
    if options.source == "scenes":
        return
    for split, dataset in (("train", train), ("val", val)):
        threads = min(16, os.cpu_count() or 1) if options.source in SOURCES else 1
        progress = partial(tqdm, desc=f"check {split}", unit="img")
        report = check_dataset(dataset, num_threads=threads, progress=progress)
        if report.problems:
            more = f" (and {len(report.problems) - 1} more: `messnet check-data`)" if len(report.problems) > 1 else ""
            raise DataError(f"{report.problems[0]}{more}")
