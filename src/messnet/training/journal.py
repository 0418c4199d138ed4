"""The figures of a training while it goes: losses and mIoU as CSV and to TensorBoard, validation images looked at."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from messnet.data import SegmentationDataset
from messnet.errors import RecipeError
from messnet.images.preprocessing import normalise
from messnet.network.multi_exit import MultiExitNet, upsample
from messnet.records.arrays import IntArray
from messnet.records.files import write_atomically, writing
from messnet.records.instance import Exit
from messnet.records.iou import mean_iou, pixel_counts
from messnet.training.options import LogKind

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@dataclass(frozen=True)
class Monitor:
    """The folder that a training writes its figures to, and the images that it is validated on."""

    folder: Path
    """Of the CSV files, NAME.csv, and of TensorBoard's, tensorboard/NAME."""
    val: SegmentationDataset
    name: str | None = None
    """By default the stage's."""


def say(line: str) -> None:
    """A line on stderr that leaves the progress bar whole."""
    tqdm.write(line, file=sys.stderr)


class Journal:
    """Rows of figures by iteration: NAME.csv and, on request, TensorBoard. Cells of what was not taken are empty.

    A row is on the disk before the checkpoint that follows it. Opened again at iteration ``done`` it drops what lies
    past that, so that training which was killed and goes on leaves each row once. Raises RunError when the file cannot
    be written, RecipeError when TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, name: str, columns: Sequence[str], *, kind: LogKind, done: int) -> None:
        self.columns = ["iteration", "learning_rate", *columns]
        self.path = folder / f"{name}.csv" if kind in ("csv", "both") else None
        self._board = (
            _open_tensorboard(folder / "tensorboard" / name, done) if kind in ("tensorboard", "both") else None
        )
        self.has_begun_before = self.path is not None and self.path.exists()
        if self.path is not None:
            with writing(self.path):
                write_atomically(self.path, self._text(self._kept(self.path, done), header=True))

    def write(self, row: Mapping[str, float]) -> None:
        if self.path is not None:
            with writing(self.path), open(self.path, "a") as file:
                file.write(self._text([row], header=False))
                # On the disk before the checkpoint that follows, which a power cut could otherwise outlive alone: the
                # training that goes on from it would never write this row again.
                file.flush()
                os.fsync(file.fileno())
        if self._board is not None:
            # TensorBoard puts what has a slash in its name into one group: "loss/exit0" beside "loss/exit1".
            for name in row.keys() - {"iteration"}:
                self._board.add_scalar(name.replace(".", "/"), row[name], int(row["iteration"]))

    def close(self) -> None:
        if self._board is not None:
            self._board.close()

    def _text(self, rows: Sequence[Mapping[str, object]], *, header: bool) -> str:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, self.columns, extrasaction="ignore", lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return buffer.getvalue()

    @staticmethod
    def _kept(path: Path, done: int) -> list[dict[str, str]]:
        """The whole rows up to ``done``; a kill may have torn the last line, which lies past it."""
        if not done or not path.exists():
            return []
        lines = path.read_text(errors="replace").splitlines(keepends=True)
        rows = csv.DictReader(line for line in lines if line.endswith("\n"))
        return [row for row in rows if (row.get("iteration") or "").isdigit() and int(row["iteration"]) <= done]


def _open_tensorboard(folder: Path, done: int) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RecipeError(
            "compute.log asks for TensorBoard, which is not installed: pip install 'messnet[log]', or log 'csv'"
        ) from error
    with writing(folder):
        # TensorBoard only appends: it has to be told from which step on the rows of a killed training do not count.
        return SummaryWriter(str(folder), purge_step=done + 1 if done else None)


class Validation:
    """The same few images, spread evenly over the split, looked at again and again."""

    def __init__(self, dataset: SegmentationDataset, num_images: int) -> None:
        indices = np.linspace(0, len(dataset) - 1, min(num_images, len(dataset))).round().astype(int)
        # Rounded positions may meet: dict.fromkeys drops repetitions and keeps the order.
        self.dataset, self.indices = dataset, [int(v) for v in dict.fromkeys(indices.tolist())]
        self._samples: list[tuple[Tensor, Tensor]] = []

    def look(self, net: MultiExitNet, exits: Sequence[Exit], device: torch.device) -> dict[Exit, ValidationResult]:
        """The mIoU of each exit on the images, one at a time in its own size; ``net`` is in eval mode."""
        # Read once and kept: it is a handful of images, looked at hundreds of times. Not read by __init__, for training
        # that is over already looks at none.
        if not self._samples:
            for sample in (self.dataset[v] for v in self.indices):
                image = torch.from_numpy(normalise(sample.image, net.normalisation))[None]
                self._samples.append((image, torch.tensor(sample.mask)[None]))
        counts = {exit: np.zeros((3, net.num_classes), np.int64) for exit in exits}
        with torch.no_grad():
            for image, label in self._samples:
                image = image.to(device)
                for i, state in enumerate(net.states(image)):
                    for exit in (exit for exit in exits if exit.exit_index == i):
                        logits = upsample(net.logits(exit, state).float(), label.shape[-2:])
                        prediction = logits.argmax(1).cpu().numpy()
                        counts[exit] += np.stack(pixel_counts(prediction, label.numpy(), net.num_classes))
        return {exit: _result(*count) for exit, count in counts.items()}


@dataclass(frozen=True)
class ValidationResult:
    miou: float
    """In [0, 1]; over the classes that occur in these few images."""
    only_class: int | None
    """The class that every labelled pixel was taken for, None if there are several."""


def _result(intersection: IntArray, predicted: IntArray, labelled: IntArray) -> ValidationResult:
    seen = np.flatnonzero(predicted)
    return ValidationResult(mean_iou(intersection, predicted, labelled), int(seen[0]) if len(seen) == 1 else None)
