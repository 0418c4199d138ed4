"""What a search reads: the cost of every part (CostTable) and what every exit did to every image (ExitTables).

Both are plain files, read without torch: a cost table is JSON, exit tables are one .npz.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from messnet.errors import RunError
from messnet.files import expect_schema, reading, write_atomically
from messnet.instance import Exit

__all__ = ["CostColumn", "CostTable", "ExitTables", "PartCost", "class_iou", "mean_iou"]

SCHEMA_VERSION = 1
Convention = Literal["conv", "paper"]
CostName = Literal["macs", "macs_paper", "parameters"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


def class_iou(intersection: NDArray[Any], predicted: NDArray[Any], labelled: NDArray[Any]) -> FloatArray:
    """Intersection over union per class from summed pixel counts, each (..., K). NaN where a class is in neither the
    labels nor the predictions."""
    union = (np.asarray(predicted, np.int64) + labelled - intersection).astype(np.float64)
    iou: FloatArray = np.divide(intersection, union, out=np.full(union.shape, np.nan), where=union > 0)
    return iou


def mean_iou(intersection: NDArray[Any], predicted: NDArray[Any], labelled: NDArray[Any]) -> float:
    """mIoU in [0, 1] of summed pixel counts, each (K,): the mean over the classes that occur in labels or predictions
    (method.md section 8). NaN if none occurs."""
    iou = class_iou(intersection, predicted, labelled)
    return float(np.nanmean(iou)) if np.isfinite(iou).any() else float("nan")


@dataclass(frozen=True, kw_only=True)
class PartCost:
    """Cost of one part (a segment or a head) for one image of the table's input size."""

    macs: float
    """Multiply-accumulates of matmul-like operators."""
    macs_paper: float
    """The posters' convention: ``macs`` plus 2 per BatchNorm element and 1 per global-pooling input element."""
    parameters: int


class CostColumn(NamedTuple):
    """One cost as arrays. ``segments`` (N,): backbone segment k. ``heads`` (H,): aligned with the exits asked for.
    Reaching exit e costs ``segments[: e.exit_index + 1].sum()`` plus the head of every exit evaluated on the way."""

    segments: FloatArray
    heads: FloatArray

    def prefix(self, exit_index: int) -> float:
        """Cost of the backbone up to and including segment ``exit_index``, without any head."""
        return float(self.segments[: exit_index + 1].sum())


@dataclass(frozen=True, kw_only=True)
class CostTable:
    """Costs of the overprovisioned network's parts, one image.

    ``segments[k]`` is the backbone between exit points k-1 and k; ``heads`` holds every head of every exit point, the
    user's own as ``Exit(N - 1, "final")``. ``provenance`` says how and with what it was made.
    """

    model: str
    input_size: tuple[int, int]
    """(height, width) in pixels."""
    segments: tuple[PartCost, ...]
    heads: dict[Exit, PartCost]
    provenance: dict[str, str] = field(default_factory=dict)

    @property
    def final_exit(self) -> Exit:
        return max(self.heads)

    def total_macs(self, convention: Convention = "conv") -> float:
        """Multiply-accumulates of the user's own model: all segments and the final head."""
        column = self.column("macs" if convention == "conv" else "macs_paper", [self.final_exit])
        return float(column.segments.sum() + column.heads.sum())

    def column(self, name: CostName, exits: Sequence[Exit]) -> CostColumn:
        """One cost of all segments and of the heads of ``exits``, in their order."""
        missing = [exit for exit in exits if exit not in self.heads]
        if missing:
            raise RunError(f"the cost table has no exit {missing[0]}: it was made for another head space")
        return CostColumn(
            np.array([getattr(part, name) for part in self.segments], np.float64),
            np.array([getattr(self.heads[exit], name) for exit in exits], np.float64),
        )

    def to_json(self, path: str | Path | None = None) -> str:
        """The table as JSON, written to ``path`` too if one is given."""
        record = asdict(self) | {"schema_version": SCHEMA_VERSION}
        record["heads"] = [[*exit, asdict(part)] for exit, part in self.heads.items()]
        text = json.dumps(record, indent=1) + "\n"
        if path is not None:
            write_atomically(Path(path), text)
        return text

    @classmethod
    def from_json(cls, text: str) -> CostTable:
        """Raises RunError when ``text`` is not a cost table of this schema version."""
        with reading("a cost table", made_by="profile"):
            record: dict[str, Any] = json.loads(text)
            expect_schema(record, SCHEMA_VERSION, "cost table")
            record["input_size"] = tuple(record["input_size"])
            record["segments"] = tuple(PartCost(**part) for part in record["segments"])
            record["heads"] = {Exit(index, head): PartCost(**part) for index, head, part in record["heads"]}
            return cls(**record)


@dataclass(frozen=True, kw_only=True, eq=False)
class ExitTables:
    """What every exit predicted on every image of a labelled split (method.md section 8).

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
    """P names, "<confidence>+<edge refinement>", such as "top1+native"."""
    pixel_thresholds: FloatArray
    """(T,) ascending."""
    image_confidence: NDArray[np.float32]
    """(V, H, P, T): c_img of the exit under the policy at the pixel threshold, all pixels counted."""

    @property
    def final(self) -> int:
        """Position of the final exit in ``exits``."""
        return len(self.exits) - 1

    def subset(self, images: IntArray) -> ExitTables:
        """The same tables for some images (V', positions)."""
        return ExitTables(
            image_names=tuple(self.image_names[int(v)] for v in images),
            difficulty=self.difficulty[images],
            class_names=self.class_names,
            exits=self.exits,
            intersection=self.intersection[images],
            predicted=self.predicted[images],
            labelled=self.labelled[images],
            policies=self.policies,
            pixel_thresholds=self.pixel_thresholds,
            image_confidence=self.image_confidence[images],
        )

    def halves(self, seed: int = 0) -> tuple[IntArray, IntArray]:
        """Positions of two disjoint halves of the images, drawn with ``seed``: one to select on, one to report."""
        order = np.random.default_rng(seed).permutation(len(self.image_names))
        middle = (len(order) + 1) // 2
        return np.sort(order[:middle]), np.sort(order[middle:])

    def counts(self, routing: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """Summed (intersection, predicted, labelled), each (K,), when image v leaves at ``exits[routing[v]]``."""
        images = np.arange(len(self.image_names))
        return (
            self.intersection[images, routing].sum(0, dtype=np.int64),
            self.predicted[images, routing].sum(0, dtype=np.int64),
            self.labelled.sum(0, dtype=np.int64),
        )

    def miou(self, routing: IntArray) -> float:
        """mIoU in [0, 1] of a routing (V,) of positions in ``exits``."""
        return mean_iou(*self.counts(routing))

    def to_bytes(self) -> bytes:
        buffer = io.BytesIO()
        meta = {
            "schema_version": SCHEMA_VERSION,
            "image_names": self.image_names,
            "class_names": self.class_names,
            "exits": self.exits,
            "policies": self.policies,
        }
        np.savez_compressed(
            buffer,
            meta=np.array(json.dumps(meta)),
            difficulty=self.difficulty,
            intersection=self.intersection,
            predicted=self.predicted,
            labelled=self.labelled,
            pixel_thresholds=self.pixel_thresholds,
            image_confidence=self.image_confidence,
        )
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> ExitTables:
        """Raises RunError when ``data`` is not exit tables of this schema version."""
        with reading("exit tables", made_by="evaluate"), np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            meta: dict[str, Any] = json.loads(str(arrays["meta"]))
            expect_schema(meta, SCHEMA_VERSION, "exit tables")
            return cls(
                image_names=tuple(meta["image_names"]),
                class_names=tuple(meta["class_names"]),
                exits=tuple(Exit(index, head) for index, head in meta["exits"]),
                policies=tuple(meta["policies"]),
                **{name: arrays[name] for name in arrays.files if name != "meta"},
            )
