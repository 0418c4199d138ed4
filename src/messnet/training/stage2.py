"""Stage 2, ``distill``: backbone and final head frozen, every head learns from the final exit, independently."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NotRequired, TypedDict, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor

from messnet.data import SegmentationDataset
from messnet.errors import RecipeError, RunError
from messnet.network.head_space import HeadConfig, HeadSpace, plain_head_config
from messnet.network.multi_exit import MultiExitNet, upsample
from messnet.records.instance import Exit
from messnet.training.checkpoint import Checkpoint
from messnet.training.cuda_graphs import Recorder
from messnet.training.dilation import fast_dilation
from messnet.training.journal import Monitor, say
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
from messnet.training.losses import Teacher, distillation_loss, teach
from messnet.training.options import ComputeOptions, DistillOptions


def space_exits(net: MultiExitNet, space: HeadSpace) -> tuple[Exit, ...]:
    """Every head of the space at every early exit point: what the overprovisioned network is made of."""
    points = enumerate(net.exit_points[:-1])
    return tuple(Exit(i, config.name) for i, point in points for config in space.configs(point.channels))


def distill(
    net: MultiExitNet,
    dataset: SegmentationDataset,
    space: HeadSpace,
    options: DistillOptions,
    compute: ComputeOptions,
    checkpoint: Checkpoint,
    monitor: Monitor | None = None,
    *,
    exits: Sequence[Exit] | None = None,
) -> dict[Exit, int]:
    """Stage 2: attaches every head of ``space`` at every exit point, or ``exits`` of them, and trains them on the
    frozen backbone, each on its own (docs/method.md#training; the losses: ``messnet.training.losses.teach``). Changes
    ``net`` in place; backbone, final head and their statistics stay as they are. ``options.plain_heads`` "stage1":
    plain heads begin as ``net`` has them; without iterations they stay so.

    The weights of a head are the same to the bit whichever heads are trained beside it, here or elsewhere (same kind of
    device, same number of threads). "self_distillation" keeps that too: the next deeper exit that teaches exit i is the
    plain head there (1, 0, no, fcn), trained by the same rule. Where it is not among ``exits`` it is trained along and
    dropped, N - 2 heads at most.

    A head whose loss is no longer finite is stopped, told on stderr, and dropped; the answer says which and in which
    iteration it was found. Goes on from ``checkpoint`` if it holds a state.

    Raises MessError when all heads diverge, RecipeError where heads would have no training at all.
    """
    fabric = compute.launch()
    weights = class_weights(options, dataset, net.num_classes, fabric.device)
    wanted = space_exits(net, space) if exits is None else tuple(exits)
    begun = {exit: net.head(exit).state_dict() for exit in net.exits[:-1]} if options.plain_heads == "stage1" else {}
    _attach(net, wanted, options)
    for exit in begun.keys() & {*net.exits}:
        net.head(exit).load_state_dict(begun[exit])
    if not options.iterations:
        _expect_trained(wanted, begun)
        return {}
    stage = _Distillation(net, wanted, options, fabric, weights, Recorder(compute.records(fabric)))
    train("distill", stage, dataset, options, compute, checkpoint, monitor)
    stage.stop_broken_heads()
    net.drop_heads(keep=[exit for exit in wanted if exit not in stage.stopped])
    return {exit: iteration for exit, iteration in stage.stopped.items() if exit in wanted}


def distill_seconds(
    net: MultiExitNet, dataset: SegmentationDataset, space: HeadSpace, options: DistillOptions, compute: ComputeOptions
) -> float:
    """How long ``distill`` will take on this machine, by a few iterations of it, which spoil ``net``."""
    wanted = space_exits(net, space)
    _attach(net, wanted, options)
    fabric = compute.launch()
    stage = _Distillation(net, wanted, options, fabric, None, Recorder(compute.records(fabric)))
    return training_seconds(stage, dataset, options, compute)


def _attach(net: MultiExitNet, wanted: Sequence[Exit], options: DistillOptions) -> None:
    """The heads to be trained, and those that teach them, in place of all that ``net`` has."""
    teachers = _teachers(net, wanted) if options.loss == "self_distillation" else ()
    net.drop_heads()
    # Seeded by the recipe and its own name, a head begins with the same weights in whichever shard it is trained.
    for exit in (*wanted, *(exit for exit in teachers if exit not in wanted)):
        net.add_head(exit.exit_index, HeadConfig.parse(exit.head), seed=options.seed)


def _teachers(net: MultiExitNet, wanted: Sequence[Exit]) -> tuple[Exit, ...]:
    """The plain heads that teach the exits before them, from the shallowest of ``wanted`` on."""
    shallowest = min((exit.exit_index for exit in wanted), default=net.num_exits)
    return tuple(Exit(i, plain_head_config().name) for i in range(shallowest + 1, net.num_exits - 1))


def _expect_trained(wanted: Sequence[Exit], begun: Mapping[Exit, object]) -> None:
    if untrained := [exit for exit in wanted if exit not in begun]:
        raise RecipeError(
            f"distill.iterations: 0 leaves {len(untrained)} heads as they are drawn, such as {untrained[0].head} at "
            f"exit {untrained[0].exit_index}: only plain heads ({plain_head_config().name}) come trained from stage 1"
        )


class _State(TypedDict):
    """A saved state as it is read: tuples come back as lists. The optional keys are younger than the others."""

    heads: Mapping[str, Tensor]
    exits: NotRequired[list[tuple[int, str]]]
    stopped: NotRequired[list[tuple[int, str, int]]]
    optimizers: list[dict[str, object]]


class _Distillation:
    """An optimiser for each head. One backbone pass and one teacher serve all; a head's graph and its gradients are
    freed before the next head runs."""

    num_parts = 1
    keeps_best = ends_at_best = False
    patience: int | None = None

    def __init__(
        self,
        net: MultiExitNet,
        wanted: Sequence[Exit],
        options: DistillOptions,
        fabric: Fabric,
        class_weights: Tensor | None,
        recorder: Recorder,
    ) -> None:
        self.options, self.fabric, self.class_weights = options, fabric, class_weights
        self.recorder = recorder
        self.layout = layout(net, fabric.device)
        self.net = net.eval().to(fabric.device, memory_format=self.layout)  # type: ignore[call-overload]
        # eval() above keeps the backbone's normalisation statistics; without requires_grad no graph is built through
        # it.
        net.requires_grad_(False)
        net.heads.train().requires_grad_(True)
        self.wanted = frozenset(wanted)
        self.trained = net.heads
        self.optimizers = {
            exit: optimizer_of(net.head(exit).parameters(), options, fused=True) for exit in net.exits[:-1]
        }
        self.points = sorted({exit.exit_index for exit in self.optimizers})
        shown_points = sorted({exit.exit_index for exit in self.wanted})
        self.columns = [f"{figure}.exit{i}" for figure in ("loss", "miou") for i in shown_points]
        self.stopped: dict[Exit, int] = {}
        self._iteration = 0

    @property
    def shown_exits(self) -> Sequence[Exit]:
        return [exit for exit in self.optimizers if exit in self.wanted]

    def step(self, iteration: int, learning_rate: float, images: Tensor, labels: Tensor) -> dict[Exit, Tensor]:
        self._iteration = iteration
        images = images.contiguous(memory_format=self.layout)
        labels = every(labels, self.options.loss_stride)
        observed, final, teacher = self.recorder("backbone", self._observe, self.net.backbone, images, labels)
        features = {**observed}  # of a recording, which keeps its own
        losses: dict[Exit, Tensor] = {}
        for i in reversed(self.points):  # a deeper exit teaches the one before it
            deeper = None
            for exit in [exit for exit in self.optimizers if exit.exit_index == i]:
                loss, logits = self._train_head(exit, iteration, learning_rate, features[i], teacher)
                losses[exit] = loss
                # Of the heads at a point the plain one teaches, as it was before its own step of this iteration.
                if self.options.loss == "self_distillation" and exit.head == plain_head_config().name:
                    deeper = logits
            del features[i]  # from the deepest on, so the memory of a step shrinks as it goes
            if self.options.loss == "self_distillation" and i != self.points[0]:
                teacher = self._teach(final, labels, deeper)
        return losses

    def _observe(self, images: Tensor, labels: Tensor) -> tuple[dict[int, Tensor], Tensor, Teacher]:
        """The features at every exit point that has a head, the final logits (N, K, *size of the labels) and what they
        teach, the last early exit under self-distillation too; for labels alone nothing past the deepest head runs, and
        the logits are zeros."""
        size = labels.shape[-2:]
        features: dict[int, Tensor] = {}
        stops_at = self.points[-1] if self.options.loss == "ce" and self.points else None
        with torch.no_grad(), self.fabric.autocast():
            for i, state in enumerate(self.net.states(images)):
                features[i] = state.features
                if i == stops_at:
                    break
            if stops_at is None:
                final = self.net.logits(self.net.exits[-1], state)
            else:
                final = images.new_zeros(len(images), self.net.num_classes, *size)
        # Losses are taken in float32: under autocast the logits are bfloat16, whose 8 bits round log-probabilities
        # away. Features of points without a head are let go here.
        logits = upsample(final.float(), size)
        return {i: features[i] for i in self.points}, logits, self._teach(logits, labels, None)

    def _teach(self, final: Tensor, labels: Tensor, deeper: Tensor | None) -> Teacher:
        return teach(
            final,
            labels,
            loss=self.options.loss,
            alpha=self.options.alpha,
            filter_kl=self.options.filter_kl,
            class_weights=self.class_weights,
            deeper_logits=deeper,
        )

    def _train_head(
        self, exit: Exit, iteration: int, learning_rate: float, features: Tensor, teacher: Teacher
    ) -> tuple[Tensor, Tensor]:
        """One step of one head; its loss, and its logits before the step."""
        optimizer = self.optimizers[exit]
        # Seeded for each head: its dropout must not depend on the heads that are trained beside it.
        torch.manual_seed(mix(self.options.seed, *exit, iteration))
        given = (features, teacher.target, teacher.constant, teacher.normaliser)
        loss, logits = self.recorder(exit, partial(self._descend, exit), self.net.head(exit), *given)
        set_learning_rate(optimizer, learning_rate)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.clone(), logits  # of a recording, whose next replay would overwrite the loss

    def _descend(
        self, exit: Exit, features: Tensor, target: Tensor, constant: Tensor, normaliser: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss of a head and its logits, with the gradients left behind."""
        with self.fabric.autocast(), fast_dilation(features.device):
            logits: Tensor = self.net.head(exit)(features)
        logits = upsample(logits.float(), target.shape[-2:])
        loss = distillation_loss(logits, Teacher(target, constant, normaliser))
        loss.backward()
        return loss.detach(), logits.detach()

    def expect_finite(self, iteration: int, losses: Mapping[Exit, float]) -> None:
        """Heads whose loss is not finite are stopped."""
        broken = {exit: loss for exit, loss in losses.items() if not math.isfinite(loss)}
        if broken:
            self._stop(broken)

    def stop_broken_heads(self) -> None:
        """After the last step, whose loss says nothing of what it made."""
        heads = {exit: self.net.head(exit).state_dict().values() for exit in self.optimizers}
        broken = [exit for exit, tensors in heads.items() if not all(bool(t.isfinite().all()) for t in tensors)]
        if broken:
            self._stop(dict.fromkeys(broken, math.nan))

    def _stop(self, broken: Mapping[Exit, float]) -> None:
        if all(exit in broken for exit in self.shown_exits):
            raise diverged("distill", self._iteration, next(iter(broken.values())))
        words = ", ".join(f"exit {exit.exit_index} ({exit.head})" for exit in sorted(broken))
        say(
            f"distill: stopped at iteration {self._iteration} and left out, for their loss is not finite: {words}; a "
            f"lower distill.learning_rate may save them"
        )
        for exit in broken:
            self.stopped[exit] = self._iteration
            del self.optimizers[exit]
        self.net.drop_heads(keep=[*self.optimizers])

    def by_column(self, figures: Mapping[Exit, float]) -> dict[str, float]:
        """The mean over the heads of each exit point, those that teach alone left out."""
        shown, points = self.shown_exits, dict[int, list[float]]()
        for exit in sorted(exit for exit in figures if exit in shown):
            points.setdefault(exit.exit_index, []).append(figures[exit])
        return {f"exit{i}": sum(found) / len(found) for i, found in points.items()}

    def state_dict(self) -> dict[str, object]:
        return {
            "heads": self.net.heads.state_dict(),
            "exits": [list(exit) for exit in self.optimizers],
            "stopped": [[*exit, iteration] for exit, iteration in self.stopped.items()],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers.values()],
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        values = cast(_State, state)
        stopped = {Exit(i, head): iteration for i, head, iteration in values.get("stopped", ())}
        saved = [Exit(i, head) for i, head in values.get("exits", self.optimizers)]
        if {*saved, *stopped} != {*self.optimizers}:
            raise RunError(
                "the checkpoint of stage 2 holds other heads than are to be trained: delete it to train these anew"
            )
        self.stopped = stopped
        self.optimizers = {exit: self.optimizers[exit] for exit in saved}
        self.net.drop_heads(keep=saved)
        self.net.heads.load_state_dict(values["heads"])
        for optimizer, one in zip(self.optimizers.values(), values["optimizers"], strict=True):
            optimizer.load_state_dict(one)
