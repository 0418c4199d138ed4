"""Checks of a recipe against its data before hours are spent: what ``run`` refuses, ``check-data`` tells."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from functools import partial

from tqdm import tqdm

from messnet.data import SegmentationDataset
from messnet.data.checks import DatasetReport, ImageFacts, check_dataset, left_out_note
from messnet.data.options import padding_share
from messnet.data.sources import SOURCES
from messnet.errors import DataError
from messnet.records.groups import group_ids, halves
from messnet.run.recipe import Recipe
from messnet.training.options import TrainOptions

LARGEST_CROP = 768
"""Pixels of a side of a crop that is proposed: what trains on common hardware."""
MUCH_PADDING = 0.3
"""Random scaling alone pads a seventh of crops that are as large as the images."""


def expect_sound(recipe: Recipe, train: SegmentationDataset, val: SegmentationDataset) -> None:
    """Reads every image of both splits of the recipe's data once. Generated scenes cannot be broken and are not read.

    Raises DataError for the first thing that a run would stop at.
    """
    from messnet.training.journal import say  # brings torch, which check-data does without

    data = recipe.data
    reports = []
    for split, dataset in (("train", train), ("val", val)):
        if data.source == "scenes" and (split == "train" or data.group is None):
            reports.append(_unread(dataset))
            continue
        if note := left_out_note(dataset):
            say(f"{split}: {note}")
        progress = partial(tqdm, desc=f"check {split}", unit="img")
        reports.append(check_dataset(dataset, num_threads=reading_threads(data.source), progress=progress))
    # A broken image first: what a recipe asks of the images can be judged once all of them can be read.
    found = (*reports[0].problems, *reports[1].problems)
    if found := found or recipe_problems(recipe, *reports):
        more = f" (and {len(found) - 1} more: `messnet check-data`)" if len(found) > 1 else ""
        raise DataError(f"{found[0]}{more}")
    for note in _padding_notes(recipe, reports[0]):
        say(f"note: {note}")


def reading_threads(source: str) -> int:
    """How many threads may read a data set: one made by the user may not be made for several."""
    return min(16, os.cpu_count() or 1) if source in SOURCES else 1


def _unread(scenes: SegmentationDataset) -> DatasetReport:
    """The report of generated scenes, which are of one size, labelled, and of all classes."""
    names = scenes.class_names
    height, width = scenes[0].mask.shape
    return DatasetReport(
        num_images=len(scenes),
        sizes={f"{height}x{width}": len(scenes)},
        class_share=dict.fromkeys(names, 1 / len(names)),
        class_images=dict.fromkeys(names, len(scenes)),
        images=tuple(ImageFacts(str(v), "", "", b"", True) for v in range(len(scenes))),
    )


def recipe_problems(recipe: Recipe, train: DatasetReport, val: DatasetReport) -> tuple[str, ...]:
    """Everything that a run by ``recipe`` would stop at though each image is in order: one line each, with the way out.

    The reports are of all images of both splits.
    """
    return (
        *(_training_problems(recipe.pretrain, train) if recipe.pretrain.iterations else ()),
        *_training_problems(recipe.distill, train),
        *_untrained_heads(recipe),
        *_validation_problems(recipe, val),
    )


def recipe_notes(recipe: Recipe, train: DatasetReport) -> tuple[str, ...]:
    """What would be better otherwise, though a run by ``recipe`` would go to its end: one line each."""
    notes = [*_padding_notes(recipe, train)]
    if recipe.model.weights and recipe.pretrain.iterations:
        notes.append(
            f"model.weights are of a trained model, and stage 1 trains it on for {recipe.pretrain.iterations} "
            "iterations: try pretrain.iterations: 0 first, which keeps it to the bit and trains heads only"
        )
    return tuple(notes)


def _padding_notes(recipe: Recipe, train: DatasetReport) -> Iterator[str]:
    """A line where crops are so much larger than the images that padding is a large part of what is trained on."""
    trained = [options for options in (recipe.pretrain, recipe.distill) if options.iterations]
    for augment in dict.fromkeys(options.augment for options in trained):
        sizes = {_size(size): count for size, count in train.sizes.items()}
        padded = sum(count * padding_share(augment, size) for size, count in sizes.items()) / max(
            1, sum(sizes.values())
        )
        if augment.crop is not None and padded > MUCH_PADDING:
            keys = " and ".join(f"{one.section}.augment.crop" for one in trained if one.augment == augment)
            yield (
                f"crops of {augment.crop[0]}x{augment.crop[1]} ({keys}) are larger than most training images, "
                f"{next(iter(train.sizes))} and scaled by {augment.scale_min:g} to {augment.scale_max:g}: {padded:.0%} "
                f"of what is trained on is padding, from which nothing is learnt; try {[*proposed_crop(train)]} or less"
            )


def _untrained_heads(recipe: Recipe) -> Iterator[str]:
    if not recipe.distill.iterations and not recipe.trains_heads_in_stage1:
        reason = "pretrain.scheme: baseline" if recipe.pretrain.iterations else "pretrain.iterations: 0"
        yield f"distill.iterations: 0 keeps the heads that stage 1 trained, and {reason} trains none: let stage 2 train"


def _training_problems(options: TrainOptions, train: DatasetReport) -> Iterator[str]:
    names, weights = list(train.class_share), options.class_weights
    if isinstance(weights, tuple) and len(weights) != len(names):
        yield (
            f"{options.section}.class_weights has {len(weights)} values for {len(names)} classes ({', '.join(names)}): "
            f"give one for each, or {options.section}.class_weights: auto"
        )
    if not any(train.class_share.values()) and train.sizes:
        yield "every pixel of the training split is void: there is nothing to learn from"
    if len(train.sizes) > 1 and options.augment.crop is None:
        height, width = proposed_crop(train)
        yield (
            f"training images are of {len(train.sizes)} sizes ({', '.join(list(train.sizes)[:3])}, ...), and a batch "
            f"needs one: say {options.section}.augment.crop: [{height}, {width}] (height, width), or resize the images"
        )


def proposed_crop(report: DatasetReport, largest: int = LARGEST_CROP) -> tuple[int, int]:
    """(height, width) that most images of a split can fill: medians in whole multiples of 32, at most ``largest``."""
    sides: tuple[list[int], list[int]] = ([], [])
    for size, count in report.sizes.items():
        for side, length in zip(sides, _size(size), strict=True):
            side += [length] * count
    height, width = (statistics.median(side or [largest]) for side in sides)
    return _whole(height, largest), _whole(width, largest)


def _size(words: str) -> tuple[int, int]:
    """(height, width) of a report's "HEIGHTxWIDTH"."""
    height, width = words.split("x")
    return int(height), int(width)


def _whole(length: float, largest: int) -> int:
    return max(32, min(largest, int(length)) // 32 * 32)


def _validation_problems(recipe: Recipe, val: DatasetReport) -> Iterator[str]:
    images = val.images
    if not images or val.problems:
        return  # said already
    if not any(image.is_labelled for image in images):
        yield "every pixel of the validation split is void: nothing can be measured on it"
        return
    # Both halves that a run makes need a group, and in it a labelled image.
    groups = group_ids([image.group for image in images])
    if len(images) < 2 or groups.max() < 1:
        held = "1 image" if len(images) < 2 else f"images of one group ({images[0].group})"
        yield (
            f"the validation split has {held}: a run selects on a part of them and reports on the rest, so it needs "
            f"{'2 images' if len(images) < 2 else '2 groups'} at least, and dozens for figures that mean something; "
            "move some from the training split"
        )
        return
    for half, use in zip(halves(groups, recipe.search.seed), ("selects", "reports"), strict=True):
        if not any(images[v].is_labelled for v in half):
            yield (
                f"of the validation images that a run {use} on ({len(half)} of {len(images)}) every pixel is void: "
                "label more of them, leave out those without a label, or draw other halves with search.seed"
            )
