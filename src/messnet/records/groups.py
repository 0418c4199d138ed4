"""Images that belong together: of one drive, patient, scene or video.

Such images resemble each other, so an instance that is chosen on some of them is flattered by the others. Every split
of images that messnet makes therefore keeps groups whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from messnet.records.arrays import IntArray


def group_ids(labels: Sequence[str]) -> IntArray:
    """(V,) the number of each image's group, counted from 0 in the order in which groups appear.

    ``labels`` name the group of each of V images; an image labelled "" is a group of its own.
    """
    numbers: dict[str | int, int] = {}
    # A number is no label: images without one get a key that nobody else has.
    keys = (label or v for v, label in enumerate(labels))
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)


def halves(groups: IntArray, seed: int = 0) -> tuple[IntArray, IntArray]:
    """Positions of two disjoint halves of V images, each sorted, drawn with ``seed``; no group is in both.

    ``groups``: (V,) as ``group_ids`` gives them. Groups are taken in random order until they hold half of the images,
    so the first half is the larger one; where every image is a group of its own it has (V + 1) // 2. Of a single group
    the second half is empty.
    """
    sizes = np.bincount(groups)
    order = np.random.default_rng(seed).permutation(len(sizes))
    # The shortest run of groups that holds at least half of the images, but never all groups where there are several.
    enough = int(np.searchsorted(2 * np.cumsum(sizes[order]), len(groups))) + 1
    is_first = np.isin(groups, order[: max(1, min(enough, len(sizes) - 1))])
    return np.flatnonzero(is_first), np.flatnonzero(~is_first)
