"""Which directory a recipe's run lives in, and what it refuses before hours are spent."""

from __future__ import annotations

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
    for stage in STAGES.values():
        if not stage.is_training:
            continue
        # A training that has begun leaves a checkpoint, one that has ended a fingerprint.
        if directory.fingerprint(stage.name) is None and not directory.checkpoint(stage.name).exists():
            continue  # not begun: may still change
        advice = "choose another directory with --out, or delete it"
        if STAGES["pretrain"].inputs(known) == STAGES["pretrain"].inputs(record):
            advice = (
                f"choose another directory with --out (stage 1 is the same: `messnet distill RECIPE --out OTHER "
                f"--pretrained {directory.path}` takes it over), or delete it"
            )
        _expect_same(stage, known, record, was=f"{directory.path} was made", advice=advice)


def _expect_same(
    stage: Stage, known: Mapping[str, object], record: Mapping[str, object], *, was: str, advice: str
) -> None:
    """Raises RunError that names the first key where two recipes differ in what ``stage`` is made from."""
    # In the order of the stage's sections, so that the first difference is the one that matters most.
    old, new = dict(_flat(stage.inputs(known))), dict(_flat(stage.inputs(record)))
    for section in stage.sections:
        for key in sorted(key for key in old.keys() | new.keys() if key.startswith(f"{section}.")):
            if old.get(key) != new.get(key):
                raise RunError(f"{was} with {key} = {old.get(key)}, this recipe says {new.get(key)}: {advice}")


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
