"""``messnet check-data`` and ``messnet recipe``: what goes into a run."""

from __future__ import annotations

import json

from messnet.cli.app import AsJson, Overrides, Target, app, examples, recipe_of
from messnet.errors import MessError

__all__ = ["check_data", "recipe"]


@app.command(
    name="check-data",
    help_epilogue=examples("check-data configs/camvid_mobilenetv2.yaml --data.root ../shared/camvid"),
)
def check_data(target: Target, *overrides: Overrides, as_json: AsJson = False) -> None:
    """Read every image and mask of a recipe's data set and say what is in them and what is wrong."""
    from functools import partial

    from tqdm import tqdm

    from messnet.data.checks import check_dataset
    from messnet.data.sources import open_dataset

    recipe = recipe_of(target, overrides)
    reports = {}
    for split in ("train", "val"):
        dataset = open_dataset(recipe.data, split)
        reports[split] = check_dataset(dataset, progress=partial(tqdm, desc=f"check {split}", unit="img"))
    if as_json:
        print(json.dumps({split: found.to_record() for split, found in reports.items()}, indent=1))
    else:
        for split, found in reports.items():
            print(f"{split}\n{found.to_text()}\n")
    problems = sum(len(found.problems) for found in reports.values())
    if problems:
        raise MessError(f"the data set has {problems} problems, listed above")


@app.command(help_epilogue=examples("recipe configs/demo.yaml", "recipe runs/demo --json"))
def recipe(target: Target, *overrides: Overrides, as_json: AsJson = False) -> None:
    """Print a recipe with every key it has, defaults and overrides included."""
    from messnet.config import recipe_to_record

    record = recipe_to_record(recipe_of(target, overrides))
    if as_json:
        print(json.dumps(record, indent=1))
        return
    import yaml

    print(yaml.safe_dump(record, sort_keys=False), end="")
