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
from messnet.records.files import expect_schema, reading, write_atomically
from messnet.records.instance import Exit

__all__ = ["CostColumn", "CostTable", "ExitTables", "PartCost", "class_iou", "mean_iou"]

COSTS_SCHEMA_VERSION = 2
SCHEMA_VERSION = 1
Convention = Literal["conv", "paper"]
CostName = Literal["macs", "macs_paper", "parameters", "memory_bytes", "latency_ms", "latency_p95_ms"]

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
    """Cost of one part (a segment, a head, a policy step, an output) at the table's input size."""

    macs: float
    """Multiply-accumulates of matmul-like operators, one image."""
    macs_paper: float
    """The posters' convention: ``macs`` plus 2 per BatchNorm element and 1 per global-pooling input element."""
    parameters: int
    memory_bytes: int
    """Largest sum of the activations alive while the part runs on one batch: its inputs and all that later parts need
    included, parameters and operators' own workspace not."""
    latency_ms: float | None = None
    """Of one batch, median; None where nothing was measured."""
    latency_p95_ms: float | None = None
    """Its 95th percentile. The sum over parts is at least as slow as the 95th percentile of the whole, unless parts are
    slow together: a conservative figure."""


class CostColumn(NamedTuple):
    """One cost as arrays: of the N segments, and of the H exits asked for, in their order."""

    segments: FloatArray
    """(N,)"""
    exit_indices: IntArray
    """(H,)"""
    heads: FloatArray
    """(H,)"""
    policies: FloatArray
    """(H,): deciding at the exit; 0 at the final one, which decides nothing."""
    outputs: FloatArray
    """(H,): from the exit's logits to labels at input resolution."""
    combine: Literal["sum", "max"]
    """How parts make a whole."""
    per_image: bool
    """Whether only the parts that an image goes through count, or all that an instance has."""

    def prefix(self, exit_index: int) -> float:
        """Cost of the backbone up to and including segment ``exit_index``, without any head."""
        return self.whole(self.segments[: exit_index + 1])

    def whole(self, parts: FloatArray) -> float:
        return float(parts.sum() if self.combine == "sum" else parts.max())

    def leaving(self) -> FloatArray:
        """(H,) cost of an image that leaves at each exit, where those asked for are an instance's, shallow to deep.

        It pays the segments up to there, the head of every exit on the way, the decision of every exit on the way but
        the last of the instance, and one output. A cost that belongs to the instance is the same at each.
        """
        policies = np.append(self.policies[:-1], 0.0)
        if not self.per_image:
            backbone = self.segments[: self.exit_indices[-1] + 1]
            return np.full(len(self.heads), self.whole(np.concatenate([backbone, self.heads, policies, self.outputs])))
        reached: FloatArray = np.cumsum(self.segments)[self.exit_indices] + np.cumsum(self.heads + policies)
        return reached + self.outputs


@dataclass(frozen=True, kw_only=True)
class CostTable:
    """Costs of the overprovisioned network's parts on one device, complete in itself.

    ``segments[k]`` is the backbone between exit points k-1 and k; ``heads`` holds every head of every exit point, the
    user's own as ``Exit(N - 1, "final")``. ``provenance`` says how and with what it was made.
    """

    model: str
    input_size: tuple[int, int]
    """(height, width) in pixels."""
    segments: tuple[PartCost, ...]
    """(N,)"""
    heads: dict[Exit, PartCost]
    policies: tuple[PartCost, ...]
    """(N - 1,): the exit policy's decision at each early exit point."""
    outputs: tuple[PartCost, ...]
    """(N,): upsampling to the input and argmax, which only the exit taken pays."""
    operators: dict[str, float] = field(default_factory=dict)
    """Multiply-accumulates of the user's own model by operator."""
    uncounted: dict[str, int] = field(default_factory=dict)
    """Operators of the user's own model that ``macs`` leaves out, with the number of calls."""
    conditions: dict[str, str | int] = field(default_factory=dict)
    """What latency was measured on: device, runtime, batch, dtype, threads. Empty where nothing was measured."""
    additivity: dict[str, float] = field(default_factory=dict)
    """How far the sum of the parts is off the latency of whole instances: ``median_error`` and ``worst_error``,
    relative, over ``num_instances``. Empty where that was not checked."""
    provenance: dict[str, str] = field(default_factory=dict)

    @property
    def final_exit(self) -> Exit:
        return max(self.heads)

    def total(self, name: CostName) -> float:
        """Cost of the user's own model: all segments, the final head and its output."""
        return float(self.column(name, [self.final_exit]).leaving()[0])

    def total_macs(self, convention: Convention = "conv") -> float:
        """Multiply-accumulates of the user's own model."""
        return self.total("macs" if convention == "conv" else "macs_paper")

    def column(self, name: CostName, exits: Sequence[Exit]) -> CostColumn:
        """One cost of all segments and of ``exits``. Raises RunError when the table has no such exit, or holds no
        latency."""
        missing = [exit for exit in exits if exit not in self.heads]
        if missing:
            raise RunError(f"the cost table has no exit {missing[0]}: it was made for another head space")
        nothing = PartCost(macs=0, macs_paper=0, parameters=0, memory_bytes=0, latency_ms=0, latency_p95_ms=0)
        indices = [exit.exit_index for exit in exits]
        policies = (*self.policies, nothing)

        def values(parts: Sequence[PartCost]) -> FloatArray:
            found = [getattr(part, name) for part in parts]
            if None in found:
                raise RunError(f"the cost table has no {name}: measure it with `messnet profile RUN --measure`")
            # In steps of 1 ns (2^-20 ms) sums are exact, as those of integers are: equal costs stay equal.
            return np.round(np.array(found, np.float64) * 2**20) / 2**20

        return CostColumn(
            segments=values(self.segments),
            exit_indices=np.array(indices, np.int64),
            heads=values([self.heads[exit] for exit in exits]),
            policies=values([policies[i] for i in indices]),
            outputs=values([self.outputs[i] for i in indices]),
            combine="max" if name == "memory_bytes" else "sum",
            per_image=name not in ("parameters", "memory_bytes"),
        )

    def to_json(self, path: str | Path | None = None) -> str:
        """The table as JSON, written to ``path`` too if one is given."""
        record = asdict(self) | {"schema_version": COSTS_SCHEMA_VERSION}
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
            expect_schema(record, COSTS_SCHEMA_VERSION, "cost table")
            record["input_size"] = tuple(record["input_size"])
            for name in ("segments", "policies", "outputs"):
                record[name] = tuple(PartCost(**part) for part in record[name])
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
    """P names, as ``Policy.name`` gives them, such as "top1+native"."""
    pixel_thresholds: FloatArray
    """(T,) ascending."""
    image_confidence: NDArray[np.float32]
    """(V, H, P, T): c_img of the exit under the policy at the pixel threshold, all pixels counted. A policy without
    pixel threshold repeats its value over T."""
    origin: str = ""
    """What the tables were made from, weights, recipe and part of the split; empty where nobody said."""

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
            origin=self.origin,
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
            "origin": self.origin,
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
            tables = cls(
                image_names=tuple(meta["image_names"]),
                class_names=tuple(meta["class_names"]),
                exits=tuple(Exit(index, head) for index, head in meta["exits"]),
                policies=tuple(meta["policies"]),
                origin=str(meta.get("origin", "")),
                **{name: arrays[name] for name in arrays.files if name != "meta"},
            )
            tables._expect_finite()
            return tables

    def _expect_finite(self) -> None:
        broken = np.argwhere(~np.isfinite(self.image_confidence))
        if len(broken):
            v, h = broken[0, :2]
            raise RunError(
                f"exit tables with NaN or infinite confidences, first at exit {self.exits[h].exit_index}, head "
                f"{self.exits[h].head}, image {self.image_names[v]!r}; make them again with `messnet evaluate`"
            )
