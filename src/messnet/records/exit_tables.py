"""Tables of what every exit predicted on every image of a labelled split."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from messnet.errors import RunError
from messnet.records.arrays import FloatArray, IntArray
from messnet.records.codec import Stored
from messnet.records.groups import group_ids, halves
from messnet.records.instance import Exit
from messnet.records.iou import mean_iou
from messnet.records.names import Precision


@dataclass(frozen=True, kw_only=True, eq=False)
class ExitTables(Stored, what="exit tables", made_by="evaluate"):
    """Pixel counts and confidences of every exit on every image of a labelled split (docs/method.md#validation-tables).

    V images, H exits (every head of every exit point, the final one last), K classes, P policies, T thresholds.
    Counts are pixels at input resolution, ignored pixels in none of them. With them the mIoU of any routing is exact.
    """

    image_names: tuple[str, ...]
    difficulty: FloatArray
    """(V,) in [0, 1], NaN where the data set records none."""
    class_names: tuple[str, ...]
    exits: tuple[Exit, ...]
    """H exits, ordered by exit_index."""
    intersection: NDArray[np.int32]
    """(V, H, K)"""
    predicted: NDArray[np.int32]
    """(V, H, K)"""
    labelled: NDArray[np.int32]
    """(V, K)"""
    policies: tuple[str, ...]
    """P names, as ``Policy.name`` gives them, such as "top1+native"."""
    pixel_thresholds: FloatArray
    """(T,) ascending."""
    image_confidence: NDArray[np.float32]
    """(V, H, P, T): c_img of the exit under the policy at the pixel threshold, all pixels counted. A policy without
    pixel threshold repeats its value over T."""
    origin: str = ""
    """Names all that the tables were made from: weights, recipe and part of the split; empty where nobody said."""
    precision: Precision = "f32"
    """What the network computed in: what they foretell runs in it, and is searched with costs in it."""
    groups: tuple[str, ...] = ()
    """(V,) the group of each image, images that belong together; "" is a group of its own. Empty: all are."""
    delivered: NDArray[np.int32] | None = None
    """(V, 2, K): intersection and predicted pixels of the user's model as it was delivered, before it was trained any
    further; None where no weights were given, and in files of before."""

    def __repr__(self) -> str:
        num_images, num_places = len(self.image_names), len({exit.exit_index for exit in self.exits})
        miou = f"; final exit {100 * self.miou(np.full(num_images, self.final)):.2f} % mIoU" if num_images else ""
        return (
            f"<ExitTables of {num_images} images and {len(self.class_names)} classes: {num_places} exits, "
            f"{len(self.exits)} heads{miou}>"
        )

    @property
    def final(self) -> int:
        """Position of the final exit in ``exits``."""
        return len(self.exits) - 1

    def subset(self, images: IntArray) -> ExitTables:
        """The same tables for some images (V', positions)."""
        return replace(
            self,
            image_names=tuple(self.image_names[int(v)] for v in images),
            difficulty=self.difficulty[images],
            intersection=self.intersection[images],
            predicted=self.predicted[images],
            labelled=self.labelled[images],
            image_confidence=self.image_confidence[images],
            groups=tuple(self.groups[int(v)] for v in images) if self.groups else (),
            delivered=None if self.delivered is None else self.delivered[images],
        )

    @property
    def baseline(self) -> NDArray[np.int32]:
        """(V, 2, K): intersection and predicted pixels of the model that accuracy is counted against: the user's as it
        was delivered, or, where no weights were given, the final exit."""
        if self.delivered is not None:
            return self.delivered
        # Without weights of the user's there is no model but the one that stage 1 made.
        return np.stack((self.intersection[:, self.final], self.predicted[:, self.final]), 1)

    def with_delivered(self, model: ExitTables) -> ExitTables:
        """The same tables beside those of the delivered model alone. Raises RunError when they are of other images."""
        if model.image_names != self.image_names or model.class_names != self.class_names:
            raise RunError(
                "the delivered model was evaluated on other images than the exits: the validation images have changed; "
                "put them back, or begin another run with --out"
            )
        return replace(self, delivered=model.baseline)

    def group_ids(self) -> IntArray:
        """(V,) the number of each image's group, from 0 in the order in which groups appear."""
        return group_ids(self.groups or [""] * len(self.image_names))

    def halves(self, seed: int = 0) -> tuple[IntArray, IntArray]:
        """Positions of two disjoint halves of the images, drawn with ``seed``: one to select on, one to report. Groups
        stay whole. Raises RunError when all images are of one group."""
        first, second = halves(self.group_ids(), seed)
        if self.groups and not len(second):
            raise RunError(
                f"all {len(first)} validation images are of one group ({self.groups[0]}), which cannot be split in one "
                "part to select on and one to report: change data.group, or validate on images of other groups too"
            )
        return first, second

    def counts(self, routing: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """Summed (intersection, predicted, labelled), each (K,), when image v leaves at ``exits[routing[v]]``."""
        images = np.arange(len(self.image_names))
        return (
            self.intersection[images, routing].sum(0, dtype=np.int64),  # int32 holds one image, not a data set
            self.predicted[images, routing].sum(0, dtype=np.int64),
            self.labelled.sum(0, dtype=np.int64),
        )

    def miou(self, routing: IntArray) -> float:
        """mIoU in [0, 1] of a routing (V,) of positions in ``exits``."""
        return mean_iou(*self.counts(routing))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        tables = super().from_bytes(data)
        # A comparison with NaN is false, so that an image would go on without a word.
        broken = np.argwhere(~np.isfinite(tables.image_confidence))
        if len(broken):
            v, h = broken[0, :2]
            raise RunError(
                f"exit tables with NaN or infinite confidences, first at exit {tables.exits[h].exit_index}, head "
                f"{tables.exits[h].head}, image {tables.image_names[v]!r}; make them again with `messnet evaluate`"
            )
        return tables
