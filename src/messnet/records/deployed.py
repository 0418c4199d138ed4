"""The record of a deployment: the user's model and the fastest instances, in each precision, side by side. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from messnet.records.codec import LEFT_OUT, Stored
from messnet.records.measurements import Measurement
from messnet.records.names import Precision

WORTH_PERCENT = 5
"""By how much faster early exits have to be than the model in its fastest precision, to be shipped."""


@dataclass(frozen=True, kw_only=True)
class DeployedRow:
    """One network in one runtime and precision, on every validation image, one at a time."""

    runtime: str
    """"onnxruntime", "torch"."""
    precision: Precision
    megabytes: float
    """What its files hold, millions of bytes."""
    is_model: bool
    """The user's whole model, not an instance with early exits."""
    row: Measurement

    @property
    def mean_ms(self) -> float:
        """Milliseconds an image takes on average: early stops count with their share."""
        return float(np.mean(self.row.latency_ms))


@dataclass(frozen=True, kw_only=True)
class Deployed(Stored, what="a record of a deployment", made_by="deploy"):
    """All rows, measured in turns; the model in the first precision, which others are compared with, comes first."""

    device: str
    """In words: processor, threads, runtime."""
    threads: int
    max_drop_pp: float
    """What was asked: percentage points of mIoU that may be lost against the first row."""
    rows: list[DeployedRow]
    missing: list[str]
    """A sentence for each precision that no instance was found in."""
    ships: int | None = field(default=None, metadata=LEFT_OUT)
    """The row of the network that the bundle holds; None: ``chosen``, and in a file it was not recorded yet."""

    @property
    def model(self) -> DeployedRow:
        return self.rows[0]

    @property
    def best(self) -> DeployedRow:
        """The network that ships."""
        return self.rows[self.chosen if self.ships is None else self.ships]

    @property
    def chosen(self) -> int:
        """The fastest that loses no more than was asked, in the runtime that ships. Instances that are less than
        ``WORTH_PERCENT`` faster than the model are not worth what they lose."""
        kept = self.model.row.judged_miou - self.max_drop_pp / 100
        milliseconds = {
            place: row.mean_ms * (1 if row.is_model else 1 + WORTH_PERCENT / 100)
            for place, row in enumerate(self.rows)
            if row.runtime == self.model.runtime and (not row.is_model or row.row.judged_miou >= kept)
        }
        return min(milliseconds, key=milliseconds.__getitem__)
