"""The stages as Python calls on a network and data sets of the user's own: no recipe, no run directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from messnet import evaluation
from messnet.data import SegmentationDataset
from messnet.data.objects import PairSource, as_dataset
from messnet.errors import RecipeError
from messnet.network.head_space import HeadSpace
from messnet.network.multi_exit import MultiExitNet, expect_converted
from messnet.policy.options import EvaluationOptions
from messnet.records.codec import to_plain
from messnet.records.exit_tables import ExitTables
from messnet.records.instance import Exit
from messnet.training import stage1, stage2
from messnet.training.checkpoint import Checkpoint
from messnet.training.journal import Monitor, say
from messnet.training.options import ComputeOptions, DistillOptions, PretrainOptions, TrainOptions

_HERE = ComputeOptions(num_workers=0)
"""Images are loaded in this process: what a notebook defines cannot be sent to another one on every system."""


def pretrain(
    net: MultiExitNet,
    data: PairSource,
    options: PretrainOptions = PretrainOptions(),
    *,
    val: PairSource | None = None,
    folder: str | Path | None = None,
    compute: ComputeOptions = _HERE,
) -> None:
    """Stage 1: trains the backbone and the final head of ``net``, in place, by default with the early exits in turn.

    ``data`` is anything with a length whose items are (image, mask): image (H, W, 3) uint8 RGB, mask (H, W) of class
    indices or 255 for void. ``val``, of the same kind, is looked at now and then. ``folder`` takes the curves
    (logs/pretrain.csv) and a checkpoint: the same call goes on from there where it was stopped, and trains nothing
    where it had finished. Images are loaded in this process unless ``compute`` says otherwise.

    Raises DataError for what is no image with a mask of its size, MessError when the loss is not finite, RunError for a
    folder whose checkpoint was made with other options, other data or another model.
    """
    with _training("pretrain", net, data, val, folder, [options]) as given:
        stage1.pretrain(net, given.data, options, compute, given.checkpoint, given.monitor)


def distill(
    net: MultiExitNet,
    data: PairSource,
    heads: HeadSpace = HeadSpace(),
    options: DistillOptions = DistillOptions(),
    *,
    val: PairSource | None = None,
    folder: str | Path | None = None,
    compute: ComputeOptions = _HERE,
) -> dict[Exit, int]:
    """Stage 2: attaches every head of the space ``heads`` at every early exit point of ``net``, instead of those
    that it had, and trains them, in place, on the frozen backbone. The rest as for ``pretrain``.

    The answer names the heads whose loss was no longer finite, with the iteration; they are left out.
    """
    expect_converted(net)
    if not isinstance(heads, HeadSpace):
        raise RecipeError(f"heads must be a messnet.HeadSpace(extra_blocks=(0, 1), ...), got a {type(heads).__name__}")
    # Heads belong to the very backbone that they were trained on.
    backbone = hashlib.sha256()
    for tensor in net.model_state_dict().values():
        backbone.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    with _training("distill", net, data, val, folder, [options, heads], backbone.hexdigest()) as given:
        return stage2.distill(net, given.data, heads, options, compute, given.checkpoint, given.monitor)


def evaluate(
    net: MultiExitNet, data: PairSource, options: EvaluationOptions = EvaluationOptions(), *, device: str = "cpu"
) -> ExitTables:
    """Runs every head of every exit of ``net`` on every image of ``data``: all that ``messnet.search`` needs beside the
    costs. ``data`` as for ``pretrain``; images run one at a time, in their own sizes, on ``device``.

    Raises DataError for what is no image with a mask of its size, ModelError for logits that are not finite.
    """
    expect_converted(net)
    if len(net.exits) == 1:
        say("evaluate: no heads are attached (messnet.distill attaches them): this is the final exit alone")
    return evaluation.evaluate(net, as_dataset(data, net.num_classes), options, device)


class _Given(NamedTuple):
    data: SegmentationDataset
    checkpoint: Checkpoint
    monitor: Monitor | None


@contextmanager
def _training(
    name: str,
    net: MultiExitNet,
    data: PairSource,
    val: PairSource | None,
    folder: str | Path | None,
    options: Sequence[TrainOptions | HeadSpace],
    backbone: str = "",
) -> Iterator[_Given]:
    """What a stage takes, made of what the user gave. Afterwards ``net`` is in eval mode, and its parameters need
    gradients or none as before: stage 2 freezes the backbone."""
    expect_converted(net)
    # The user's objects are checked item by item, as they are read: nobody has looked at them before.
    dataset = as_dataset(data, net.num_classes)
    # A state of other options, data or another model must not be gone on from.
    shapes = {name: list(tensor.shape) for name, tensor in net.model_state_dict().items()}
    cuts = [point.node for point in net.exit_points]
    given = [to_plain(one) for one in (*options, net.normalisation)]
    facts = json.dumps([given, len(dataset), cuts, shapes, backbone])
    made_from = hashlib.sha256(facts.encode()).hexdigest()[:16]
    frozen = [parameter for parameter in net.parameters() if not parameter.requires_grad]
    with nullcontext(folder) if folder is not None else TemporaryDirectory() as where:
        checkpoint = Checkpoint(Path(where) / f"{name}.checkpoint", made_from=made_from)
        monitor = Monitor(Path(where) / "logs", as_dataset(val, net.num_classes)) if val is not None else None
        yield _Given(dataset, checkpoint, monitor)
    net.requires_grad_(True).eval()
    for parameter in frozen:
        parameter.requires_grad_(False)
