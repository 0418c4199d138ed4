"""Images and masks in folders.

Either ``root/SPLIT/images`` and ``root/SPLIT/masks``; or ``root/images`` and ``root/masks`` with ``root/SPLIT.txt``, a
list of names, one a line. Both folders may have the names of ``IMAGE_FOLDERS`` and ``MASK_FOLDERS``, in any case.
``images/NAME.jpg`` (or .jpeg, .png, .bmp, .webp, .tif, .tiff) belongs to ``masks/NAME.png``, or to ``NAME_mask.png``,
``NAME_label.png``, ``NAME_gt.png``, or to whatever ending all masks of the folder share. If all images share an ending,
as ``a_rgb.jpg`` does, a mask may be without it, ``a.png`` or ``a_mask.png``. Masks have one channel, 8 bits, class
indices; of a palette PNG the indices count, not the colours. Masks with other values, or RGB masks, are read with
``mask_values``.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from messnet.data import IGNORE_INDEX
from messnet.data.image_files import FileDataset, MaskReader, expect_class_names, mask_value, read_colours, read_indices
from messnet.data.listings import bare_name, composed, list_files, read_text, some, visible
from messnet.errors import DataError
from messnet.images.colours import default_palette
from messnet.images.reading import IMAGE_SUFFIXES

LAYOUT = "expected SPLIT/images and SPLIT/masks, or images, masks and SPLIT.txt"
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "photos", "frames")
MASK_FOLDERS = ("masks", "mask", "labels", "label", "annotations", "gt")
"""Names of folders, the first that is there."""
_MASK_ENDING = re.compile(r"[-_.](masks?|labels?|gt|ground_?truth|seg|segmentation|annotations?)$", re.IGNORECASE)
"""What tools add to an image's name to name its mask."""


def open_folder(
    root: str | Path,
    split: str,
    *,
    class_names: Sequence[str],
    void_index: int | None = None,
    mask_values: Sequence[int] = (),
    palette: NDArray[np.uint8] | None = None,
    cache: bool = False,
) -> FileDataset[Path]:
    """One split of labelled images in folders.

    Mask values 0 .. K-1 are classes, or ``mask_values``: the value of class 0, 1, ..., of RGB masks as 0xRRGGBB.
    ``void_index`` (if given) and 255 (unless a class, or colours) are ignored; any other is an error. ``palette``:
    (K, 3) RGB, of RGB masks by default their own. Raises DataError when the folders are not in order.
    """
    num_classes = len(expect_class_names(class_names))
    values = tuple(mask_values) or tuple(range(num_classes))
    # No byte holds such a value, so the masks cannot be of indices.
    is_colour = max(values) > IGNORE_INDEX
    shown = partial(mask_value, is_colour=is_colour)
    if len(set(values)) != num_classes or not all(0 <= value <= 0xFFFFFF for value in values):
        raise DataError(
            f"{len(values)} mask_values ({some(list(map(shown, values)))}) for {num_classes} class names: expected as "
            "many different ones, 0 to 255 or colours 0xRRGGBB"
        )
    if void_index is not None:
        limit = 0xFFFFFF if is_colour else IGNORE_INDEX
        if mask_values and (void_index in values or not 0 <= void_index <= limit):
            raise DataError(
                f"void_index is a mask value that is no class, 0 to {shown(limit)}, not {shown(void_index)}"
            )
        if not mask_values and not num_classes <= void_index <= limit:
            raise DataError(f"void_index is {num_classes} to {limit}, beyond the class indices, not {void_index}")
    if palette is None:
        colours = np.array([(value >> 16, value >> 8 & 255, value & 255) for value in values], np.uint8)
        palette = colours if is_colour else default_palette(num_classes)
    pairs, unlabelled = find_pairs(Path(root), split)
    reader = _reader(values, void_index, is_colour=is_colour)
    dataset = FileDataset(pairs, reader, class_names=class_names, palette=palette, cache=cache)
    dataset.left_out = unlabelled
    return dataset


def count_mask_values(masks: Sequence[Path]) -> Counter[int]:
    """Pixels per value that occurs in mask files: of RGB masks (by the first one) colours 0xRRGGBB, else indices.

    Raises SampleError for a mask that cannot be read, or is of another form than the first.
    """
    counts: Counter[int] = Counter()
    is_colour = False
    for k, path in enumerate(masks):
        if k == 0:  # the others must be of the same form: 1 would be class 1 here and nearly black there
            with Image.open(path) as file:
                is_colour = file.mode in ("RGB", "RGBA")
        values, pixels = np.unique(read_colours(path) if is_colour else read_indices(path), return_counts=True)
        counts.update(dict(zip(values.tolist(), pixels.tolist(), strict=True)))
    return counts


def _reader(values: Sequence[int], void_index: int | None, *, is_colour: bool) -> MaskReader:
    classes = {value: k for k, value in enumerate(values)}
    void = [] if void_index is None else [void_index]
    # Most public masks have 255 for void; here it may be a class only where the user says so.
    if not is_colour and IGNORE_INDEX not in (*classes, *void):
        void.append(IGNORE_INDEX)
    classes |= dict.fromkeys(void, IGNORE_INDEX)
    is_plain = tuple(values) == tuple(range(len(values)))
    shown = partial(mask_value, is_colour=is_colour)
    known = (
        f"0 to {len(values) - 1} for {len(values)} classes"
        if is_plain
        else f"mask_values {some(list(map(shown, values)))}"
    )
    words = " and ".join(map(shown, void)) or "none"
    return MaskReader(
        classes,
        f"{known}, and {words} for void; correct the mask, class_names or void_index, or say "
        "with mask_values which value is which class",
    )


def find_pairs(root: Path, split: str) -> tuple[list[tuple[Path, Path]], tuple[str, ...]]:
    """(image, mask) paths, by name, in the order of SPLIT.txt where there is one; and the names of the images that have
    no mask, which are left out. The split "" holds all images of ``root/images``."""
    listing = root / f"{split}.txt"
    if (root / split).is_dir():
        base = root / split
    elif listing.is_file():
        base = root
    elif not root.is_dir():
        raise DataError(f"no folder {root}: {LAYOUT} in it")
    else:
        flat = subfolder(root, IMAGE_FOLDERS) and subfolder(root, MASK_FOLDERS)
        advice = f"; `messnet init {root} --split 0.2` writes such lists" if flat else ""
        raise DataError(f"no split {split!r} in {root}, which holds {contents(root)}: {LAYOUT}{advice}")
    source, folder = subfolder(base, IMAGE_FOLDERS), subfolder(base, MASK_FOLDERS)
    if source is None or folder is None:
        missing = base / ("images" if source is None else "masks")
        raise DataError(f"no folder {missing}: {LAYOUT} in {root}; {base} holds {contents(base)}")

    images = _by_stem(source, IMAGE_SUFFIXES)
    masks = _by_stem(folder, (".png",), images)

    if base == root and split:
        # As it is first: a.jpg.png is an image whose name is a.jpg.
        lines = (composed(line.strip()) for line in read_text(listing).splitlines())
        names = [line if line in images else bare_name(line, IMAGE_SUFFIXES) for line in lines if line]
        if absent := [name for name in names if name not in images]:
            raise DataError(f"{listing} names {some(absent)}, not in {source}: list one file name a line")
    else:
        # Here a mask without an image is a lost image; with a list it may belong to another split.
        names = list(images)
        if lost := [name for name in masks if name not in images]:
            raise DataError(
                f"no image for {some([masks[name].name for name in lost])} in {folder}, and {source} holds "
                f"{some([path.name for path in images.values()]) or 'none'}: a mask has the name of its image, and any "
                "ending that all masks share; rename them, add the images, or remove the masks"
            )
    if not names:
        where = f"in {source}" if base != root else f"named in {listing}"
        raise DataError(f"no images {where}: expected files {', '.join(IMAGE_SUFFIXES)}")
    unlabelled = tuple(name for name in names if name not in masks)
    # Where most have none, the masks have other names, or lie elsewhere.
    if 2 * len(unlabelled) > len(names):
        raise DataError(
            f"no mask for {some(unlabelled)}: expected {folder / (unlabelled[0] + '.png')}; add the masks, or take "
            f"these names out of {listing if base == root and split else source}"
        )
    return [(images[name], masks[name]) for name in names if name in masks], unlabelled


def subfolder(base: Path, names: Sequence[str]) -> Path | None:
    """The folder in ``base`` that has the first of these names, in any case; None where there is none."""
    there = {path.name.casefold(): path for path in visible(base.iterdir()) if path.is_dir()}
    return next((there[name] for name in names if name in there), None)


def contents(folder: Path) -> str:
    """Which files a folder holds, for an error: "1 file, Labels/ (60 files), Photos/ (60 files)"."""
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    counts = Counter(name.parent for name in names if not any(part.startswith(".") for part in name.parts))
    files = {place: f"{count} file{'' if count == 1 else 's'}" for place, count in sorted(counts.items())}
    return some([f"{place}/ ({said})" if place.name else said for place, said in files.items()]) or "no files"


def _shared_endings(stems: Sequence[str]) -> list[str]:
    """The endings, from a separator on, that all names share; the longest first."""
    shared = os.path.commonprefix([stem[::-1] for stem in stems])[::-1]  # noqa: RUF071  these are no paths
    return [shared[match.start() :] for match in re.finditer("[-_.]", shared)]


def _by_stem(folder: Path, suffixes: Sequence[str], images: Collection[str] = ()) -> dict[str, Path]:
    """The files with one of these suffixes, in any case, by their names without it; sorted. Masks are found under the
    name of the one of ``images`` that they belong to."""
    split_names = [(*os.path.splitext(name), path) for name, path in list_files(folder).items()]
    files = [(stem, path) for stem, suffix, path in split_names if suffix.lower() in suffixes]
    shared_endings = _shared_endings([stem for stem, _ in files])
    # a_rgb.jpg may have the mask a_seg.png: images, too, may share an ending. Only the shortest, so that no two meet.
    ending = next(reversed(_shared_endings([*images])), "")
    without = {name.removesuffix(ending): name for name in images}
    found: dict[str, Path] = {}
    for stem, path in files:
        known = _MASK_ENDING.sub("", stem)
        bare = [stem, known, *map(stem.removesuffix, shared_endings)]
        stem = next((name for name in bare if name in images), without.get(known, stem))
        if stem in found:
            raise DataError(f"{found[stem]} and {path.name} share one name: keep one of them")
        found[stem] = path
    return found
