"""The file that a training stage resumes from."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from messnet.errors import RunError
from messnet.records.files import write_atomically, writing


@dataclass(frozen=True)
class Checkpoint:
    """The file that a training stage resumes from, and beside it one with the best state."""

    path: Path
    made_from: str = field(default="", kw_only=True)
    """Fingerprint of the recipe, where a state of another one must not be taken for this one's."""
    seconds: float = field(default=120.0, kw_only=True)
    """The most that a kill of a training may lose, up to the iteration under way, however rare its checkpoints are."""

    def load(self) -> dict[str, object] | None:
        """The last state saved, None if there is none. Raises RunError when it cannot be read."""
        if not self.path.exists():
            return None
        try:
            # A run directory may come from a stranger: weights_only lets the file hold tensors and plain values, no
            # code. A state saved on an accelerator has to open where there is none, so everything is read to the CPU.
            state: dict[str, object] = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            raise RunError(
                f"{self.path} cannot be read (damaged, or no checkpoint); delete it to start the stage again"
            ) from error
        # States from before there were fingerprints have none, and are taken on trust.
        if state.pop("made_from", self.made_from) != self.made_from:
            raise RunError(
                f"{self.path} was made from another recipe (other options, data or weights); delete it to start anew "
                f"with this one"
            )
        return state

    def save(self, state: Mapping[str, object]) -> None:
        """Replaces the last state. Raises RunError when the disk is full or read-only; the last state is whole then."""
        buffer = io.BytesIO()
        torch.save({**state, **({"made_from": self.made_from} if self.made_from else {})}, buffer)
        with writing(self.path):
            write_atomically(self.path, buffer.getvalue())

    @property
    def best(self) -> Checkpoint:
        """Beside the last state: the best one."""
        return Checkpoint(self.path.with_suffix(".best"))

    def expect_writable(self) -> None:
        """Raises RunError when no state could be saved here: before hours are spent, not after."""
        # A file of its own, for an attempt at the state's own path could destroy the state that is to be resumed.
        probe = self.path.with_name(f".{self.path.name}.probe")
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"probe")
            probe.unlink()

    def discard(self) -> None:
        for path in (self.path, self.best.path):
            path.unlink(missing_ok=True)
