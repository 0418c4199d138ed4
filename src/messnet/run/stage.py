"""One record for each stage, which says all there is to know of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

from messnet.images.preprocessing import IMAGENET
from messnet.records.codec import to_plain
from messnet.records.run_directory import RunDirectory, RunFile
from messnet.run.recipe import DeployOptions, Recipe, recipe_to_record
from messnet.run.run import Run


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the paper, from artefacts to an artefact."""

    name: str
    """Its verb has the same."""
    do: Callable[[Run], None]
    sections: tuple[str, ...]
    """The sections of the recipe that the artefact depends on."""
    without: frozenset[str] = frozenset()
    """Options of these sections that change nothing here, as "data.group"."""
    artefact: Callable[[RunDirectory], RunFile]
    """The file without which the stage is not done."""
    formats: Mapping[str, int | None] = field(default_factory=dict)
    """Versions of the files that it reads and writes: where they were others, it is done again."""
    is_training: bool = False
    """Takes hours: another recipe is refused once it has begun. All else is just done again."""
    is_wanted: Callable[[Recipe], bool] = lambda recipe: True
    """Whether a recipe asks for it; where it does not, there is nothing to do."""
    is_repeatable: bool = False
    """Done again whenever its verb is called."""

    def inputs(self, record: Mapping[str, object]) -> dict[str, dict[str, object]]:
        """The part of a recipe's ``record`` that the artefact depends on.

        Options that came after the first runs are left out where they are not given: fingerprints are then those of
        the runs from before.
        """
        sections = {name: dict(cast("Mapping[str, object]", record.get(name, {}))) for name in self.sections}
        for option, default in LATER_OPTIONS.items():
            section, _, key = option.partition(".")
            if section in sections and (option in self.without or sections[section].get(key, default) == default):
                sections[section].pop(key, None)
        return {name: section for name, section in sections.items() if section or name not in LATER_SECTIONS}

    def fingerprint(self, record: Mapping[str, object]) -> str:
        """A name for what the artefact is made from: ``inputs`` and the formats."""
        parts: dict[str, object] = {**self.inputs(record)}
        # Trainings read and write nothing but safetensors: no format, as in the first runs.
        if self.formats:
            parts["formats"] = list(self.formats.values())
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def made_from(self, run: Run) -> str:
        return self.fingerprint(recipe_to_record(run.recipe))

    def is_done(self, run: Run) -> bool:
        if not self.is_wanted(run.recipe):
            return True
        is_same = run.directory.fingerprint(self.name) == self.made_from(run)
        return is_same and self.artefact(run.directory).exists

    def ensure(self, run: Run, *, again: bool = False) -> bool:
        """Does the stage unless it is done; ``again`` repeats it where that is cheap. Tells whether it did."""
        if self.is_done(run) and not (again and self.is_repeatable and self.is_wanted(run.recipe)):
            return False
        self.record(run, self.do)
        return True

    def record(self, run: Run, do: Callable[[Run], None]) -> None:
        """Notes that the stage is done when ``do`` has done it."""
        with run.alone(), run.directory.finishing(self.name, self.made_from(run)):
            do(run)

    def follow(self, run: Run) -> None:
        """``ensure`` for every process but the first of those that train together: nothing is recorded."""
        if not self.is_done(run):
            self.do(run)


LATER_SECTIONS = ("deploy",)
"""Left out where all of their options are."""
LATER_OPTIONS: Mapping[str, object] = {
    "data.group": None,
    "data.resize": None,
    "model.normalisation": to_plain(IMAGENET),
    "pretrain.optimizer": "sgd",
    "pretrain.ema": None,
    "pretrain.patience": None,
    "distill.optimizer": "sgd",
    "distill.ema": None,
    "distill.plain_heads": "new",
    **{f"deploy.{name}": value for name, value in cast("Mapping[str, object]", to_plain(DeployOptions())).items()},
}
"""With their defaults."""
