"""Stage 1, ``pretrain``: the backbone and the final head learn with none, one or all of the early exits active."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TypedDict, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from messnet.data import SegmentationDataset
from messnet.errors import RecipeError
from messnet.network.head_space import plain_head_config
from messnet.network.multi_exit import MultiExitNet, upsample
from messnet.records.instance import FINAL_HEAD, Exit
from messnet.training.checkpoint import Checkpoint
from messnet.training.cuda_graphs import Recorder
from messnet.training.dilation import fast_dilation
from messnet.training.journal import Monitor
from messnet.training.loop import (
    class_weights,
    diverged,
    every,
    layout,
    mix,
    optimizer_of,
    set_learning_rate,
    train,
    training_seconds,
)
from messnet.training.losses import cross_entropy, pixel_weight
from messnet.training.options import ComputeOptions, PretrainOptions, Schedule


def active_exits(schedule: Schedule, iteration: int, num_early: int) -> tuple[int, ...]:
    """Indices (from 0) of the early exits whose loss counts in ``iteration`` = 1, 2, ...

    In the paper's numbering from 1: i = 1 + (j mod (N-1)) alone, or every i with j mod i = 0.
    """
    match schedule:
        case "alternating":
            return (iteration % num_early,) if num_early else ()
        case "modulo":
            return tuple(i for i in range(num_early) if iteration % (i + 1) == 0)


def pretrain(
    net: MultiExitNet,
    dataset: SegmentationDataset,
    options: PretrainOptions,
    compute: ComputeOptions,
    checkpoint: Checkpoint,
    monitor: Monitor | None = None,
) -> None:
    """Stage 1: ``L = CE(y_N) + sum_i a_i(j) CE(y_i)`` in iteration j (docs/method.md#training). Changes ``net``.

    ``options.scheme`` says what a_i(j) is: "exit_aware", that of the schedule (``active_exits``); "baseline", 0, so
    that the backbone never sees an early exit; "end_to_end", 1. Every early exit of the scheme gets a plain FCN head,
    which stays with ``net``. Goes on from ``checkpoint`` if it holds a state. Where several processes train together
    (compute.devices, torchrun), each takes its share of every batch; gradients are averaged, normalisation statistics
    are each process's own. Raises MessError when the loss is not finite.
    """
    fabric = compute.launch()
    weights = class_weights(options, dataset, net.num_classes, fabric.device)
    stage = _prepared(net, options, compute, fabric, weights)
    train("pretrain", stage, dataset, options, compute, checkpoint, monitor)


def pretrain_seconds(
    net: MultiExitNet, dataset: SegmentationDataset, options: PretrainOptions, compute: ComputeOptions
) -> float:
    """How long ``pretrain`` will take on this machine, by a few iterations of it, which spoil ``net``."""
    stage = _prepared(net, options, compute, compute.launch(), None)
    return training_seconds(stage, dataset, options, compute)


def _prepared(
    net: MultiExitNet, options: PretrainOptions, compute: ComputeOptions, fabric: Fabric, weights: Tensor | None
) -> _Pretraining:
    net.drop_heads()
    early = range(0 if options.scheme == "baseline" else net.num_exits - 1)
    plain = [net.add_head(i, plain_head_config(), seed=options.seed) for i in early]
    return _Pretraining(net, plain, options, fabric, weights, Recorder(compute.records(fabric)))


class _State(TypedDict):
    net: Mapping[str, Tensor]
    optimizer: dict[str, object]


class _Pretraining:
    """One optimiser for the backbone, the final head and the plain heads."""

    keeps_best = True

    def __init__(
        self,
        net: MultiExitNet,
        plain: Sequence[Exit],
        options: PretrainOptions,
        fabric: Fabric,
        class_weights: Tensor | None,
        recorder: Recorder,
    ) -> None:
        self.options, self.fabric, self.net, self.class_weights = options, fabric, net, class_weights
        self.recorder = recorder
        self.num_parts, self.trained = fabric.world_size, net
        self.ends_at_best, self.patience = options.keep == "best", options.patience
        self.layout = layout(net, fabric.device)
        module = _ExitAware(net, plain).train().to(memory_format=self.layout)
        self.module, self.optimizer = fabric.setup(module, optimizer_of(_groups(net, options), options))
        self.shown_exits = (*plain, net.exits[-1])
        self.columns = [f"{figure}.{_name(exit)}" for figure in ("loss", "miou") for exit in self.shown_exits]

    def step(self, iteration: int, learning_rate: float, images: Tensor, labels: Tensor) -> dict[Exit, Tensor]:
        set_learning_rate(self.optimizer, learning_rate)
        # Dropout that depends on the iteration alone, so that a resumed training draws what it would have drawn; but
        # each process another, or all shares of a batch would drop the same features.
        rank = (self.fabric.global_rank,) if self.num_parts > 1 else ()
        torch.manual_seed(mix(self.options.seed, "pretrain", iteration, *rank))
        active = self._active(iteration)
        images = images.contiguous(memory_format=self.layout)
        labels = every(labels, self.options.loss_stride)
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.recorder(active, partial(self._descend, active), self.module, images, labels)
        self.optimizer.step()
        shown = losses.clone()  # of a recording, whose next replay would overwrite them
        if self.num_parts > 1:
            shown = _mean_over_processes(self.fabric, shown)
        return dict(zip([self.shown_exits[i] for i in (*active, -1)], shown, strict=True))

    def _descend(self, active: Sequence[int], images: Tensor, labels: Tensor) -> Tensor:
        """The losses of the active exits and of the final one, with the gradients of their sum left behind."""
        normaliser = self._normaliser(labels)
        with fast_dilation(images.device):
            outputs = self.module(images, active, labels.shape[-2:])
        losses = torch.stack(
            [cross_entropy(logits, labels, self.class_weights, normaliser=normaliser) for logits in outputs]
        )
        self.fabric.backward(losses.sum())
        return losses.detach()

    def _active(self, iteration: int) -> tuple[int, ...]:
        num_early = len(self.shown_exits) - 1
        match self.options.scheme:
            case "exit_aware":
                return active_exits(self.options.schedule, iteration, num_early)
            case "baseline" | "end_to_end":  # a baseline has no early exit
                return tuple(range(num_early))

    def _normaliser(self, labels: Tensor) -> Tensor | None:
        """The divisor of the loss of a shared batch, None where the batch is not shared.

        It is the weight of the pixels of all shares over the number of shares, because averaging the gradients divides
        by that number once more.
        """
        if self.num_parts == 1:
            return None
        return _mean_over_processes(self.fabric, pixel_weight(labels, self.class_weights).float())

    def expect_finite(self, iteration: int, losses: Mapping[Exit, float]) -> None:
        for loss in losses.values():
            if not math.isfinite(loss):
                raise diverged("pretrain", iteration, loss)

    def by_column(self, figures: Mapping[Exit, float]) -> dict[str, float]:
        return {_name(exit): figure for exit, figure in figures.items()}

    def state_dict(self) -> _State:
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        saved = cast(_State, state)
        self.net.load_state_dict(saved["net"])
        self.optimizer.load_state_dict(saved["optimizer"])


def _groups(net: MultiExitNet, options: PretrainOptions) -> list[dict[str, object]]:
    """The parameters, those of the heads with the scale of their learning rate."""
    if options.head_learning_rate is None:
        return [{"params": list(net.parameters())}]
    heads = [parameter for exit in net.exits for parameter in net.head(exit).parameters()]
    if not list(net.head(net.exits[-1]).parameters()):
        raise RecipeError(
            "pretrain.head_learning_rate needs a final head with parameters of its own, and in this model it has none: "
            "leave the option out"
        )
    # By identity, for == of two tensors compares their elements.
    known = {id(parameter) for parameter in heads}
    backbone = [parameter for parameter in net.parameters() if id(parameter) not in known]
    return [{"params": backbone}, {"params": heads, "scale": options.head_learning_rate / options.learning_rate}]


class _ExitAware(nn.Module):
    """The forward pass of stage 1, in one call so that a data-parallel wrapper sees it."""

    def __init__(self, net: MultiExitNet, plain: Sequence[Exit]) -> None:
        super().__init__()
        self.net = net
        self.plain = tuple(plain)

    def forward(self, images: Tensor, active: Sequence[int], size: Sequence[int]) -> list[Tensor]:
        """Logits (N, K, *size) of the active early exits, then of the final one."""
        exits = {i: self.plain[i] for i in active} | {self.net.num_exits - 1: self.net.exits[-1]}
        # states is lazy: an exit's head runs before the next segment does, and the features of exits that have no turn
        # are never held.
        states = enumerate(self.net.states(images))
        logits = [self.net.logits(exits[i], state) for i, state in states if i in exits]
        return [upsample(y, size) for y in logits]


def _mean_over_processes(fabric: Fabric, tensor: Tensor) -> Tensor:
    mean = fabric.all_reduce(tensor, reduce_op="mean")  # of a collection it makes a collection, hence the assertion
    assert isinstance(mean, Tensor)
    return mean


def _name(exit: Exit) -> str:
    return FINAL_HEAD if exit.head == FINAL_HEAD else f"exit{exit.exit_index}"
