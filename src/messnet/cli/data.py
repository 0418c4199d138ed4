"""``messnet check-data`` and ``messnet recipe``: what goes into a run."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from messnet.cli.app import AsJson, Overrides, app, examples, recipe_of
from messnet.errors import DataError, MessError

__all__ = ["check_data", "recipe"]

Data = Annotated[
    Path, Parameter(help="A recipe (YAML), a run's directory, or the folder of a data set, with --data.source.")
]
Target = Annotated[Path, Parameter(help="A recipe (YAML), or the directory of a run, which remembers its recipe.")]
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
    target: Data,
    *overrides: Overrides,
    plot: Annotated[Path | None, Parameter(help="Draw class shares and a few labelled images: PNG, SVG, PDF.")] = None,
    as_json: AsJson = False,
) -> None:
    """Read every image and mask of a data set and say what is in them, what is wrong, and what to do about it."""
    from messnet.data.checks import shared_images
    from messnet.data.listings import some

    options, is_unnamed = _data_options(target, overrides)
    if plot is not None and plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise MessError(f"--plot writes .png, .svg or .pdf, not {plot.name!r}")
    reports, datasets = _check_splits(options)
    if not datasets:
        raise MessError("; ".join(dict.fromkeys(line for found in reports.values() for line in found.problems)))
    shared = shared_images(reports["train"], reports["val"])
    if plot is not None:
        _plot(reports, datasets, plot)
    if is_unnamed:
        reports = {split: _without_absent(found) for split, found in reports.items()}
    if as_json:
        record: dict[str, Any] = {split: found.to_record() for split, found in reports.items()}
        print(json.dumps(record | {"in_both_splits": [list(pair) for pair in shared]}, indent=1))
    else:
        for split, found in reports.items():
            print(f"{split}\n{found.to_text()}\n")
        if is_unnamed:
            print("no class names given: the ids found are shown; name them with --data.class_names")
        if shared:
            pairs = [train if train == val else f"{train} = {val}" for train, val in shared]
            print(f"in both splits: {some(pairs)}; remove them from one, or accuracy is measured on training images")
    problems = sum(len(found.problems) for found in reports.values()) + len(shared)
    if problems:
        raise MessError(f"the data set has {problems} problem{'s' if problems > 1 else ''}, listed above")


def _data_options(target: Path, overrides: Sequence[str]) -> tuple[Any, bool]:
    """The data section, and whether class names were made up."""
    from dataclasses import replace

    from messnet.records.run_directory import RunDirectory

    if not target.is_dir() or RunDirectory(target).exists:
        return recipe_of(target, overrides).data, False
    from messnet.run.recipe import recipe_from_record

    data = recipe_from_record({"data": {"source": "folder", "root": str(target)}}, overrides).data
    if data.source != "folder" or data.class_names:
        return data, False
    names = UNNAMED[: len(data.mask_values)] if data.mask_values else UNNAMED
    if not data.mask_values and data.void_index is not None and data.void_index < len(names):
        names = names[: data.void_index]  # ids are consecutive, so that void comes after them
    return replace(data, class_names=names), True


def _check_splits(options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reports of both splits, and those data sets that could be opened."""
    from dataclasses import replace
    from functools import partial
    from typing import Literal, get_args

    from tqdm import tqdm

    from messnet.data.checks import check_dataset, failed_report
    from messnet.data.sources import SOURCES, open_dataset

    reports: dict[str, Any] = {}
    datasets: dict[str, Any] = {}
    for split in get_args(Literal["train", "val"]):
        try:
            dataset = open_dataset(replace(options, cache=False), split)
        except DataError as error:
            reports[split] = failed_report(error)
            continue
        # A data set of the user's own may not be made for threads.
        num_threads = min(16, os.cpu_count() or 1) if options.source in SOURCES else 1
        progress = partial(tqdm, desc=f"check {split}", unit="img")
        datasets[split] = dataset
        reports[split] = check_dataset(dataset, progress=progress, num_threads=num_threads)
    return reports, datasets


def _without_absent(report: Any) -> Any:
    from dataclasses import replace

    seen = {name: share for name, share in report.class_share.items() if share}
    return replace(
        report,
        class_share=seen,
        class_images={name: report.class_images[name] for name in seen},
        notes=tuple(note for note in report.notes if not note.startswith("no pixel of")),
    )


def _plot(reports: dict[str, Any], datasets: dict[str, Any], path: Path) -> None:
    import io

    from messnet.data.pictures import draw_dataset, typical_samples
    from messnet.records.files import write_atomically

    each = 6 // len(datasets)
    samples = [(split, one) for split, dataset in datasets.items() for one in typical_samples(dataset, each)]
    figure = draw_dataset(reports, samples, next(iter(datasets.values())).palette)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:].lower(), dpi=110)
    try:
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        raise MessError(f"cannot write the plot: {error}") from error


@app.command(help_epilogue=examples("recipe configs/demo.yaml", "recipe runs/demo --json"))
def recipe(target: Target, *overrides: Overrides, as_json: AsJson = False) -> None:
    """Print a recipe with every key it has, defaults and overrides included."""
    from messnet.run.recipe import recipe_to_record

    record = recipe_to_record(recipe_of(target, overrides))
    if as_json:
        print(json.dumps(record, indent=1))
        return
    import yaml

    print(yaml.safe_dump(record, sort_keys=False), end="")
