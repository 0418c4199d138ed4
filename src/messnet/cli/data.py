"""``messnet init``, ``messnet check-data`` and ``messnet recipe``: what goes into a run."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from messnet.cli.app import AsJson, Overrides, Target, app, examples, recipe_of, save_figure
from messnet.errors import DataError, MessError
from messnet.records.files import write_atomically

if TYPE_CHECKING:
    from messnet.data import SegmentationDataset
    from messnet.data.checks import DatasetReport
    from messnet.data.sources import DataOptions
    from messnet.run.recipe import Recipe

UNNAMED = tuple(str(k) for k in range(255))
"""Class names of a folder that none were given for; those that no mask has are left out of the report."""


@app.command(
    name="check-data",
    help_epilogue=examples(
        "check-data configs/camvid_mobilenetv2.yaml --data.root ../shared/camvid --plot camvid.png",
        "check-data photos/                                 # has train/ and val/, each with images/ and masks/",
        "check-data VOCdevkit --data.source voc --data.train_split trainaug --json",
    ),
)
def check_data(
    target: Path,
    *overrides: Overrides,
    plot: Path | None = None,
    groups: Path | None = None,
    as_json: AsJson = False,
) -> None:
    """Read every image and mask of a data set and say what is in them, what is wrong, and what to do about it. For a
    recipe also say what a run would refuse.

    Args:
        target: A recipe (YAML), a run's directory, or the folder of a data set, with --data.source.
        plot: Draw class shares and a few labelled images into this file, PNG, SVG or PDF.
        groups: Write which images are nearly the same into this file, a .csv for data.group.
    """
    from messnet.data.listings import some
    from messnet.data.splits import compare_splits
    from messnet.run.checks import recipe_notes, recipe_problems

    recipe, is_unnamed = _recipe_to_check(target, overrides)
    for option, path, suffixes in (("--plot", plot, (".png", ".svg", ".pdf")), ("--groups", groups, (".csv",))):
        if path is not None and path.suffix.lower() not in suffixes:
            allowed = ", ".join(suffixes[:-1]) + f" or {suffixes[-1]}" if suffixes[1:] else suffixes[0]
            raise MessError(f"{option} writes {allowed}, not {path.name!r}")
    reports, datasets = _check_splits(recipe.data)
    if not datasets:
        raise MessError("; ".join(dict.fromkeys(line for found in reports.values() for line in found.problems)))
    # Images that both splits have flatter every figure of the run: looked for whatever else is wrong.
    both = compare_splits(reports["train"], reports["val"])
    # A folder alone has no recipe yet that could be refused.
    refused = () if _is_folder(target) or len(datasets) < 2 else recipe_problems(recipe, *reports.values())
    notes = (*both.notes, *recipe_notes(recipe, reports["train"]))
    # Drawn and written before a problem ends the command: they are what one looks at to find it.
    if plot is not None:
        _plot(reports, datasets, plot)
    if groups is not None:
        _write_groups(both.near_groups, groups)
    if is_unnamed:
        reports = {split: _without_absent(found) for split, found in reports.items()}
    if as_json:
        record: dict[str, object] = {split: found.to_record() for split, found in reports.items()}
        record |= {
            "in_both_splits": both.shared,
            "groups_in_both_splits": both.shared_groups,
            "proposed_group": both.proposed_pattern,
            "near_duplicates": {"in_both_splits": both.near_shared, "in_val": both.near_val},
            "notes": notes,
            "recipe_problems": refused,
        }
        print(json.dumps(record, indent=1))
    else:
        for split, found in reports.items():
            print(f"{split}\n{found.to_text()}\n")
        if is_unnamed:
            kind = "colours" if max(recipe.data.mask_values, default=0) > len(UNNAMED) else "ids"
            print(
                f"no class names given: the {kind} found are shown; `messnet init {target}` writes a recipe with them"
            )
        for note in notes:
            print(f"note: {note}")
        if both.shared:
            pairs = [train if train == val else f"{train} = {val}" for train, val in both.shared]
            print(f"in both splits: {some(pairs)}; remove them from one, or accuracy is measured on training images")
        for problem in refused:
            print(f"a run would stop: {problem}")
    problems = sum(len(found.problems) for found in reports.values()) + len(both.shared) + len(refused)
    if problems:
        raise MessError(f"the data set has {problems} problem{'s' if problems > 1 else ''}, listed above")


def _is_folder(target: Path) -> bool:
    from messnet.records.run_directory import RunDirectory

    return target.is_dir() and not RunDirectory(target).exists


def _recipe_to_check(target: Path, overrides: Sequence[str]) -> tuple[Recipe, bool]:
    """The recipe, and whether class names were made up."""
    if not _is_folder(target):
        return recipe_of(target, overrides), False
    from messnet.run.recipe import recipe_from_record

    recipe = recipe_from_record({"data": {"source": "folder", "root": str(target)}}, overrides)
    data = recipe.data
    if data.source != "folder" or data.class_names:
        return recipe, False
    # How many classes there are is not known before the masks are read, so as many as ids of 8 bits are named by their
    # numbers, and the report leaves out those that no mask has.
    if not data.mask_values and (colours := _colours(data)):
        from messnet.data.image_files import mask_value

        shown = tuple(f"colour_{mask_value(value, is_colour=True)}" for value in colours)
        return replace(recipe, data=replace(data, class_names=shown, mask_values=colours)), True
    names = UNNAMED[: len(data.mask_values)] if data.mask_values else UNNAMED
    if not data.mask_values and data.void_index is not None and data.void_index < len(names):
        names = names[: data.void_index]  # ids are consecutive, so that void comes after them
    return replace(recipe, data=replace(data, class_names=names)), True


def _colours(data: DataOptions) -> tuple[int, ...]:
    """The colours of RGB masks but for void; none where masks are indices, or photographs."""
    from messnet.data.folders import count_mask_values, find_pairs

    found: set[int] = set()
    for split in (data.train_split, data.val_split):
        with suppress(DataError, OSError):  # the check says what is wrong
            for _, mask in find_pairs(data.root or Path(), split)[0]:
                with suppress(DataError, OSError):
                    found |= {*count_mask_values([mask])}
    values = tuple(sorted(found - {data.void_index}))
    return values if 2 <= len(values) <= len(UNNAMED) and values[-1] > len(UNNAMED) else ()


def _check_splits(options: DataOptions) -> tuple[dict[str, DatasetReport], dict[str, SegmentationDataset]]:
    """Reports of both splits, and those data sets that could be opened."""
    from tqdm import tqdm

    from messnet.data.checks import check_dataset, failed_report
    from messnet.data.sources import open_dataset
    from messnet.run.checks import reading_threads

    reports: dict[str, DatasetReport] = {}
    datasets: dict[str, SegmentationDataset] = {}
    splits: tuple[Literal["train", "val"], ...] = ("train", "val")
    for split in splits:
        try:
            # Every image is read once: a cache would hold the whole data set for nothing.
            dataset = open_dataset(replace(options, cache=False), split)
        # A split that cannot be opened is one more line of the report, and the other split is read all the same.
        except DataError as error:
            reports[split] = failed_report(error)
            continue
        progress = partial(tqdm, desc=f"check {split}", unit="img")
        datasets[split] = dataset
        reports[split] = check_dataset(dataset, progress=progress, num_threads=reading_threads(options.source))
    return reports, datasets


def _without_absent(report: DatasetReport) -> DatasetReport:
    seen = {name: share for name, share in report.class_share.items() if share}
    return replace(
        report,
        class_share=seen,
        class_images={name: report.class_images[name] for name in seen},
        notes=tuple(note for note in report.notes if not note.startswith("no pixel of")),
    )


def _write_groups(rows: Sequence[tuple[str, str]], path: Path) -> None:
    from messnet.data.listings import some

    groups: dict[str, str] = {}
    if twice := [name for name, group in rows if groups.setdefault(name, group) != group]:
        raise DataError(f"--groups: both splits have images called {some(twice)}: give each image a name of its own")
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(groups.items())
    write_atomically(path, text.getvalue())


def _plot(reports: Mapping[str, DatasetReport], datasets: Mapping[str, SegmentationDataset], path: Path) -> None:
    from messnet.data.pictures import draw_dataset, typical_samples

    each = 6 // len(datasets)
    samples = [(split, one) for split, dataset in datasets.items() for one in typical_samples(dataset, each)]
    figure = draw_dataset(reports, samples, next(iter(datasets.values())).palette)
    save_figure(figure, path, dpi=110)


@app.command(help_epilogue=examples("init photos/", "init photos/ --out photos.yaml", "init photos/ --split 0.2"))
def init(
    data: Annotated[
        Path, Parameter(help="A folder with train/ and val/: images/ and masks/ in each, lists, or outlines.")
    ],
    *,
    out: Annotated[Path, Parameter(help="Where the recipe goes.")] = Path("recipe.yaml"),
    split: Annotated[
        float | None,
        Parameter(help="First write train.txt and val.txt into the folder, with this share for validation."),
    ] = None,
) -> None:
    """Look at a folder of images and masks and write a commented recipe for it, with the classes, void, groups, sizes
    and class weights that were found."""
    if not data.is_dir():
        raise DataError(f"there is no folder {data}: name the one that holds images/ and masks/, or train/ and val/")
    from tqdm import tqdm

    from messnet.run.proposal import propose_recipe, split_images

    if out.exists():
        raise MessError(f"{out} exists already: name another file with --out, or delete it")
    progress = partial(tqdm, desc="look", unit="img")
    if split is not None:
        train, val = split_images(data, split, progress=progress)
        share = val / (train + val)
        why = (
            ""
            if abs(share - split) < 0.05
            else f" ({share:.0%}: there are few groups of them, and val has two or more)"
        )
    try:
        text = propose_recipe(data, progress=progress)
    except MessError:
        if split is not None:  # the same call, once the images are mended, divides them anew
            for name in ("train.txt", "val.txt"):
                (data / name).unlink()
        raise
    write_atomically(out, text)
    if split is not None:
        lists = f"{train} images in {data / 'train.txt'}, {val} in {data / 'val.txt'}"
        print(f"split: {lists}; alike ones share a list{why}")
    count = text.count("# note: ")
    notes = f" with {count} note{'s' * (count > 1)} on the images" if count else ""
    print(f"recipe: {out}{notes}; read it, name the classes, then `messnet check-data {out}` and `messnet run {out}`")


@app.command(help_epilogue=examples("recipe configs/demo.yaml", "recipe runs/demo --json"))
def recipe(target: Target, *overrides: Overrides, as_json: AsJson = False) -> None:
    """Print a recipe with every key it has, defaults and overrides included."""
    chosen = recipe_of(target, overrides)
    import yaml

    from messnet.data.image_files import mask_value
    from messnet.run.recipe import recipe_to_record

    data = chosen.data
    if max(data.mask_values, default=0) >= len(UNNAMED):  # colours, as a recipe is written with them
        yaml.SafeDumper.add_representer(
            _Colour,
            lambda dumper, value: dumper.represent_scalar("tag:yaml.org,2002:int", mask_value(value, is_colour=True)),
        )
        void = None if data.void_index is None else _Colour(data.void_index)
        chosen = replace(chosen, data=replace(data, mask_values=tuple(map(_Colour, data.mask_values)), void_index=void))
    record = recipe_to_record(chosen)
    print(json.dumps(record, indent=1) if as_json else yaml.safe_dump(record, sort_keys=False).rstrip())


class _Colour(int):
    """A mask value 0xRRGGBB."""
