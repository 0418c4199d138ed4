"""Groups of images that belong together: the rule ``data.group``, and what names and pixels show of them.

A rule is one of three: a regular expression that is searched for in an image's name, "folder" for the folder that
holds the image, or a file of two columns, name and group.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath, PurePosixPath

import cv2
import numpy as np
from numpy.typing import NDArray

from messnet.data import SegmentationDataset, SegmentationSample, Wrapped
from messnet.data.image_files import FileDataset
from messnet.data.listings import bare_name, composed, read_text, some
from messnet.errors import DataError
from messnet.images.reading import IMAGE_SUFFIXES

_FOLDER = re.compile(r"folder(?::([1-9]))?")
_FILE_SUFFIXES = (".csv", ".tsv", ".txt")
_THUMBNAIL = 16
"""Height and width of the small grey pictures that are compared."""
ALIKE = 0.98
"""Two images are near-duplicates from this correlation of their small grey pictures on. Among the 1403 images of
IDD-Lite no two of different drives reach it, of CamVid's consecutive frames a third do."""
MAX_COMPARED = 20_000
"""Images beyond this number are not compared with each other: the time grows with the square."""
_MIN_EVIDENCE = 5.0
"""Standard deviations above chance at which a pattern of names is taken for groups."""

Rule = Callable[[str, PurePath], str | None]
"""An image's name and its path (the name itself where there is no file) to its group, None where it has none."""


@dataclass(frozen=True)
class Grouped(Wrapped):
    """A data set whose samples get their groups from their names."""

    rule: Rule
    text: str

    def __getitem__(self, index: int) -> SegmentationSample:
        sample = self.dataset[index]
        group = self.rule(sample.name, PurePosixPath(sample.name))
        return replace(sample, group=_expect_groups([sample.name], [group], self.text)[0])


def with_groups(dataset: SegmentationDataset, text: str, root: Path | None) -> SegmentationDataset:
    """The data set with the group of each sample as the rule ``text`` says; a file of groups lies in ``root`` or in the
    working folder.

    Raises DataError when the rule cannot be read, and when an image has no group: at once for a data set in files, for
    another one when the image is asked for.
    """
    rule = _parse(text, root)
    if not isinstance(dataset, FileDataset):
        return Grouped(dataset, rule, text)
    # Names of files are known without reading them, so that a rule that does not fit is refused at once.
    names = dataset.names
    groups = [rule(name, path) for name, path in zip(names, dataset.image_paths, strict=True)]
    dataset.groups = _expect_groups(names, groups, text)
    return dataset


def _parse(text: str, root: Path | None) -> Rule:
    if found := _FOLDER.fullmatch(text):
        level = int(found.group(1) or 1)  # 1 is the folder of the image, 2 the one above
        return lambda name, path: path.parts[-1 - level] if len(path.parts) > level else None
    if text.lower().endswith(_FILE_SUFFIXES):
        inside = Path(text) if root is None else root / text
        groups = _read_groups(inside if inside.is_file() else Path(text))
        return lambda name, path: groups.get(name)
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise DataError(
            f"data.group {text!r} is no regular expression ({error}); expected one, such as '^([^_]+)_', or 'folder', "
            "or a file of two columns, name and group (.csv, .tsv, .txt)"
        ) from error

    def search(name: str, path: PurePath) -> str | None:
        match = pattern.search(name)
        if match is None:
            return None
        parts = [part for part in match.groups() if part is not None]
        return "_".join(parts) if parts else match.group()

    return search


def _read_groups(path: Path) -> dict[str, str]:
    """Groups by the names of images, from lines of a name and a group between which stands a comma, a semicolon, a tab
    or a space."""
    if not path.is_file():
        raise DataError(f"no file {path} of groups: expected two columns, name and group, in data.root or here")
    lines = [line for line in read_text(path).splitlines() if line.strip()]
    # Spreadsheets of many countries write semicolons, and their names may hold commas: tab and semicolon come first.
    delimiter = next((mark for mark in "\t;," if lines and mark in lines[0]), " ")
    rows = list(csv.reader(lines, delimiter=delimiter, skipinitialspace=True))
    if wrong := [line for line, row in zip(lines, rows, strict=True) if len(row) < 2 or not row[1].strip()]:
        raise DataError(f"{path} has the line {wrong[0]!r}: expected two columns, the name of an image and its group")
    return {bare_name(composed(row[0].strip()), IMAGE_SUFFIXES): row[1].strip() for row in rows}


def _expect_groups(names: Sequence[str], groups: Sequence[str | None], text: str) -> tuple[str, ...]:
    if missing := [name for name, group in zip(names, groups, strict=True) if not group]:
        raise DataError(
            f"data.group {text!r} finds no group of {some(missing)}: every image needs one; widen it ('...|.*' takes "
            "the whole name where nothing else fits), or leave data.group out"
        )
    return tuple(group or "" for group in groups)


def thumbnail(image: NDArray[np.uint8]) -> bytes:
    """A small grey picture of ``image`` (H, W, 3) uint8 RGB, by which near-duplicates are found."""
    # Down to 16 x 16 by area before turning grey: thousands of times fewer pixels to convert.
    small = cv2.resize(image, (_THUMBNAIL, _THUMBNAIL), interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).tobytes()


def _correlations(thumbnails: Sequence[bytes]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """(V, 256) rows whose products are correlations, and (V,) which images have any contrast: a blank picture is like
    every other blank one and tells nothing."""
    pixels = np.frombuffer(b"".join(thumbnails), np.uint8).reshape(len(thumbnails), -1).astype(np.float32)
    pixels -= pixels.mean(1, keepdims=True)
    norms = np.linalg.norm(pixels, axis=1, keepdims=True)
    # A standard deviation of two grey levels.
    return pixels / np.maximum(norms, 1e-6), norms[:, 0] > 2 * _THUMBNAIL


def near_duplicates(thumbnails: Sequence[bytes]) -> NDArray[np.int64]:
    """(V,) the number of each image's group of near-duplicates, from 0: images that are alike, or are so through others
    in between, such as the frames of a slow video. Images beyond MAX_COMPARED are groups of their own."""
    labels = np.arange(len(thumbnails))
    if thumbnails:
        rows, has_contrast = _correlations(thumbnails[:MAX_COMPARED])
        rows[~has_contrast] = 0
        compared = labels[: len(rows)]  # a view: what it is given, labels have
        for start in range(0, len(rows), 1024):
            # A block at a time: all products of 20 000 images would take 1.6 GB.
            alike = rows[start : start + 1024] @ rows.T > ALIKE
            for v in range(len(alike)):
                joined = np.unique(compared[alike[v]])
                if len(joined) > 1:  # groups that this image connects become one
                    compared[np.isin(compared, joined)] = joined[0]
    # The labels left are not consecutive: their ranks are.
    return np.asarray(np.unique(labels, return_inverse=True)[1], np.int64)


def proposed_pattern(names: Sequence[str], thumbnails: Sequence[bytes]) -> str | None:
    """A regular expression for ``data.group`` that names suggest and pixels support; None where there is none.

    Candidates are the beginnings of names up to their first or second separator, and names without the number at their
    end. A candidate is supported when the image that an image resembles most is of the same group far more often
    than by chance: five standard deviations of as many independent draws. Of the supported ones the first is taken,
    which makes the largest groups: whole ones are the safe side.
    """
    names, thumbnails = names[:MAX_COMPARED], thumbnails[:MAX_COMPARED]
    if len(names) < 2:
        return None
    nearest = _nearest(thumbnails)  # position of the image that each one resembles most
    candidates = []
    for mark, sign in (("_", "_"), ("-", "-"), (".", r"\."), (" ", " ")):
        other = f"[^{mark}]"
        candidates += [f"^({other}+){sign}", f"^({other}+{sign}{other}+){sign}"]
    for pattern in (*candidates, r"^(.*?)[_\-. ]*\d+$"):
        matches = [re.search(pattern, name) for name in names]
        if not all(match and match.group(1) for match in matches):
            continue
        groups = np.array([match.group(1) for match in matches if match])
        sizes = np.array([*Counter(groups.tolist()).values()])
        # One group of all, or each image its own, separates nothing.
        if len(sizes) < 2 or sizes.max() < 2:
            continue
        # Two different images drawn at random are of one group with probability sum n_g (n_g - 1) / (n (n - 1)).
        num = len(groups)
        chance = float((sizes * (sizes - 1)).sum()) / (num * (num - 1))
        # The share of images whose nearest is of their group has at most the standard deviation of n such draws.
        same = float((groups[nearest] == groups).mean())
        if same - chance > _MIN_EVIDENCE * np.sqrt(chance * (1 - chance) / num):
            return pattern
    return None


def _nearest(thumbnails: Sequence[bytes]) -> NDArray[np.int64]:
    """(V,) the position of the image that each image resembles most, never itself."""
    rows, _ = _correlations(thumbnails)
    nearest = np.empty(len(rows), np.int64)
    for start in range(0, len(rows), 1024):
        products = rows[start : start + 1024] @ rows.T
        # Every image resembles itself most.
        products[np.arange(len(products)), np.arange(start, start + len(products))] = -np.inf
        nearest[start : start + 1024] = products.argmax(1)
    return nearest
