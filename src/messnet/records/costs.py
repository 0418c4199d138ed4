"""The costs of every part of a network on one device, and the one rule by which parts make up an instance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from messnet.errors import RunError
from messnet.records.arrays import FloatArray, IntArray
from messnet.records.codec import Stored
from messnet.records.files import write_atomically
from messnet.records.instance import Exit
from messnet.records.names import CostName

Convention = Literal["conv", "paper"]


@dataclass(frozen=True, kw_only=True)
class PartCost:
    """Cost of one part (a segment, a head, a policy step, an output) at the table's input size."""

    macs: float
    """Multiply-accumulates of matmul-like operators, one image."""
    macs_paper: float
    """The paper's convention: ``macs`` plus 2 per BatchNorm element and 1 per global-pooling input element."""
    parameters: int
    memory_bytes: int
    """Largest sum of the activations alive while the part runs on one batch: its inputs and all that later parts need
    included, parameters and operators' own workspace not."""
    latency_ms: float | None = None
    """Median over batches; None where nothing was measured."""
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

    def reached(self) -> FloatArray:
        """(H,) cost of the backbone up to each exit."""
        return np.array([self.prefix(int(index)) for index in self.exit_indices], np.float64)

    def alone(self) -> FloatArray:
        """(H,) cost of each exit as a network of its own, which decides nothing: backbone, head and output."""
        parts = (self.reached(), self.heads, self.outputs)
        whole: FloatArray = np.sum(parts, 0) if self.combine == "sum" else np.max(parts, 0)
        return whole

    def shown(self) -> FloatArray:
        """(H,) cost until each exit's labels are there, where those asked for are an instance's, shallow to deep, and
        every one shows its labels and decides nothing, as anytime instances do. Of costs that an image pays."""
        return self.reached() + np.cumsum(self.heads + self.outputs)

    def leaving(self) -> FloatArray:
        """(H,) cost of an image that leaves at each exit, where those asked for are an instance's, shallow to deep.

        It pays the segments up to there, the head of every exit on the way, the decision of every exit on the way but
        the last of the instance, and one output. A cost that belongs to the instance is the same at each.
        """
        # The instance's last exit decides nothing: whoever gets there leaves there.
        policies = np.append(self.policies[:-1], 0.0)
        if not self.per_image:
            # Parameters and memory are there whether an image passes or not.
            backbone = self.segments[: self.exit_indices[-1] + 1]
            return np.full(len(self.heads), self.whole(np.concatenate([backbone, self.heads, policies, self.outputs])))
        paid: FloatArray = self.reached() + np.cumsum(self.heads + policies) + self.outputs
        return paid


@dataclass(frozen=True, kw_only=True)
class CostTable(Stored, what="a cost table", made_by="profile", version=2):
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
    """The conditions of a latency: device, runtime, batch, dtype, threads. Empty where nothing was measured."""
    additivity: dict[str, float] = field(default_factory=dict)
    """How far the sum of the parts is off the latency of whole instances: ``median_error`` and ``worst_error``,
    relative, over ``num_instances``. Empty where that was not checked."""
    provenance: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        latency = f", {self.total('latency_ms'):.4g} ms" if self.conditions else ""
        height, width = self.input_size
        return (
            f"<CostTable of {self.model or 'a network'}, {height} x {width}: {len(self.segments)} exits, "
            f"{len(self.heads)} heads; the model {self.total_macs() / 1e9:.4g} GMACs{latency}>"
        )

    @property
    def final_exit(self) -> Exit:
        return max(self.heads)  # exits are ordered by exit_index first

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
            headless = all(exit == self.final_exit for exit in self.heads)
            when = "before the heads were attached" if headless else "for another head space"
            raise RunError(
                f"the cost table has no exit {missing[0].exit_index} with the head {missing[0].head}: it was "
                f"made {when}: call messnet.profile(net, ...) again after distill (of a run: `messnet profile RUN`)"
            )
        # The final exit decides nothing, so the table has no policy for it.
        nothing = PartCost(macs=0, macs_paper=0, parameters=0, memory_bytes=0, latency_ms=0, latency_p95_ms=0)
        indices = [exit.exit_index for exit in exits]
        policies = (*self.policies, nothing)

        def values(parts: Sequence[PartCost]) -> FloatArray:
            found = [getattr(part, name) for part in parts]
            if None in found:  # of a network that was counted and not measured
                raise RunError(
                    f"the cost table has no {name}: measure it with `messnet profile RUN --measure`, in Python with "
                    "messnet.profile(net, ..., latency=messnet.LatencyOptions())"
                )
            # In steps of 1 ns (2^-20 ms) sums are exact, as those of integers are: equal costs stay equal.
            return np.round(np.array(found, np.float64) * 2**20) / 2**20

        return CostColumn(
            segments=values(self.segments),
            exit_indices=np.array(indices, np.int64),
            heads=values([self.heads[exit] for exit in exits]),
            policies=values([policies[i] for i in indices]),
            outputs=values([self.outputs[i] for i in indices]),
            combine="max" if name == "memory_bytes" else "sum",  # parts run one after another and free what they used
            per_image=name not in ("parameters", "memory_bytes"),
        )

    def to_json(self, path: str | Path | None = None) -> str:
        """The table as JSON, written to ``path`` too if one is given."""
        text = super().to_json()
        if path is not None:
            write_atomically(Path(path), text)
        return text
