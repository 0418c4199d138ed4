"""Which data set a recipe means."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from messnet.data import SegmentationDataset
from messnet.data.folders import FolderDataset
from messnet.data.scenes import Scenes, ScenesOptions
from messnet.errors import DataError

__all__ = ["DataOptions", "open_dataset"]


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The labelled images of a run."""

    source: str = "scenes"
    """"scenes" (generated, needs no files), "folder", or the user's own "module:function", which is called with
    "train" and "val" and returns a SegmentationDataset."""
    root: Path | None = None
    """For "folder": holds SPLIT/images and SPLIT/masks, or images, masks and SPLIT.txt."""
    class_names: tuple[str, ...] = ()
    """For "folder": the name of class 0, 1, ..."""
    void_index: int | None = None
    """For "folder": the mask value to ignore, beside 255."""
    train_split: str = "train"
    val_split: str = "val"
    cache: bool = True
    """For "folder": keep decoded images in memory."""
    scenes: ScenesOptions = ScenesOptions()
    """For "scenes"."""


def open_dataset(options: DataOptions, split: Literal["train", "val"]) -> SegmentationDataset:
    """Raises DataError when the data set does not exist or is not in order."""
    dataset: SegmentationDataset
    if options.source == "scenes":
        dataset = Scenes(split, options.scenes)
    elif options.source == "folder":
        if options.root is None or not options.class_names:
            raise DataError("data.source 'folder' needs data.root (a folder) and data.class_names (a list)")
        dataset = FolderDataset(
            options.root,
            options.train_split if split == "train" else options.val_split,
            class_names=options.class_names,
            void_index=options.void_index,
            cache=options.cache,
        )
    elif ":" in options.source:
        module, _, function = options.source.partition(":")
        try:
            make = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise DataError(f"data set {options.source!r} not found ({error}); expected 'module:function'") from error
        dataset = make(split)
    else:
        raise DataError(f"no data source {options.source!r}: expected 'scenes', 'folder' or 'module:function'")
    if len(dataset) == 0:
        raise DataError(f"the {split} split of data source {options.source!r} holds no image")
    return dataset
