"""Which directory a recipe's run lives in, and what it refuses before hours are spent."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from messnet.errors import RunError
from messnet.network.blueprint import Blueprint
from messnet.records.codec import Plain
from messnet.records.run_directory import RunDirectory
from messnet.run.checks import expect_sound
from messnet.run.recipe import load_recipe, recipe_from_record, recipe_to_record
from messnet.run.run import Run
from messnet.run.stage import Stage
from messnet.run.stages import STAGES


def open_run(target: Path, overrides: Sequence[str] = (), *, out: Path | None = None) -> Run:
    """The run of a recipe file (in ``out``, by default runs/NAME) or of a run directory, which remembers its recipe.

    Raises RecipeError or DataError when the recipe is not in order, RunError when the directory belongs to another
    recipe: what a stage was made from cannot change once it has begun. Nothing is written in either case.
    """
    if target.is_dir():
        directory = RunDirectory(target)
        recipe = recipe_from_record(directory.record().recipe, overrides)
    else:
        recipe = load_recipe(target, overrides)
        directory = RunDirectory(out or Path("runs") / target.stem)
    # Recipes are compared as they are recorded: what a default is may change, what a run was made from may not.
    record = recipe_to_record(recipe)
    run = Run(recipe, directory)
    known = _known_recipe(directory) if directory.exists else None
    if known == record:
        return run
    if known is not None:
        _refuse_other_recipe(directory, known, record)
    if known is None or known["data"] != record["data"]:
        expect_sound(recipe, run.dataset("train"), run.dataset("val"))
    if known is None:
        directory.create(record)
    else:
        directory.update_recipe(record)
    return run


def _known_recipe(directory: RunDirectory) -> dict[str, Plain]:
    """The recipe of a run. Options that came after it have their defaults, and its stages stay done."""
    old = directory.record().recipe
    known = recipe_to_record(recipe_from_record(old))
    if known != old:
        done = [stage for stage in STAGES.values() if directory.fingerprint(stage.name) == stage.fingerprint(old)]
        directory.update_recipe(known, {stage.name: stage.fingerprint(known) for stage in done})
    return known


def _refuse_other_recipe(directory: RunDirectory, known: Mapping[str, object], record: Mapping[str, object]) -> None:
    # A training that has begun leaves a checkpoint, one that has ended a fingerprint; others may still change.
    begun = [
        stage
        for stage in STAGES.values()
        if stage.is_training
        and (directory.fingerprint(stage.name) is not None or directory.checkpoint(stage.name).exists())
    ]
    if not begun:
        return
    taken = f"`messnet distill RECIPE --out OTHER --pretrained {directory.path}` takes it over"
    is_shared = STAGES["pretrain"].inputs(known) == STAGES["pretrain"].inputs(record)
    another = f"choose another directory with --out{f' (stage 1 is the same: {taken})' if is_shared else ''}"
    advice = f"keep the old values, {another}, or delete {directory.path}"
    # The last one's sections hold those of the trainings before it.
    _expect_same(begun[-1], known, record, was=f"{directory.path} was made", advice=advice)


def _expect_same(
    stage: Stage, known: Mapping[str, object], record: Mapping[str, object], *, was: str, advice: str
) -> None:
    """Raises RunError that says where two recipes differ in what ``stage`` is made from."""
    old, new = dict(_flat(known)), dict(_flat(record))
    inputs = sorted({key for one in (known, record) for key, _ in _flat(stage.inputs(one))})
    # In the order of the stage's sections, so that the first difference is the one that matters most.
    ordered = [key for section in stage.sections for key in inputs if key.startswith(f"{section}.")]
    if differing := [key for key in ordered if old.get(key) != new.get(key)]:
        words = ", ".join(f"{key} was {_short(old.get(key))} and is {_short(new.get(key))}" for key in differing[:5])
        more = f", and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise RunError(f"{was} with another recipe: {words}{more}; {advice}")


def _short(value: object) -> str:
    return value if isinstance(value, str) else reprlib.repr(value)  # the first six of many class names


def _flat(record: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """(dotted name, value) of every value."""
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def adopt_pretrained(run: Run, source: Path) -> None:
    """Takes stage 1 over from another run whose data, model and pretrain sections are the same. Raises RunError when
    they are not, or it is not finished."""
    profiled, pretrained = STAGES["profile"], STAGES["pretrain"]
    if run.directory.fingerprint("pretrain") is not None:
        return
    if run.directory.checkpoint("pretrain").exists():
        raise RunError(f"{run.directory.path} has a stage 1 of its own under way: finish it, or choose another --out")
    other, record = RunDirectory(source), recipe_to_record(run.recipe)
    theirs = recipe_to_record(recipe_from_record(other.record().recipe))
    advice = "stage 1 is shared only where data, model and pretrain agree"
    _expect_same(pretrained, theirs, record, was=f"{source} was pretrained", advice=advice)
    weights = other.stage1.read()  # before anything is written: it may not be finished

    def copy_profile(run: Run) -> None:
        run.directory.profile.write(other.profile.read())
        run.directory.exits.write(other.exits.read())

    # Where the heads are the same too, so is the profile, to the bit even where latency placed the exits.
    if theirs["heads"] == record["heads"] and run.directory.fingerprint("profile") is None:
        profiled.record(run, copy_profile)
    profiled.ensure(run)
    if Blueprint.from_json(other.exits.read()) != run.blueprint():
        raise RunError(f"{source} was pretrained with other exit points than {run.directory.path} has (exits.json)")
    if other.delivered.exists:
        run.directory.delivered.write(other.delivered.read())
    if other.stage1_heads.exists:
        run.directory.stage1_heads.write(other.stage1_heads.read())
    pretrained.record(run, lambda run: run.directory.stage1.write(weights))
