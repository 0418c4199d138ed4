"""Both training stages on one loop (method.md section 6).

Stage 1, ``pretrain``: the backbone and the final head learn with one early exit active at a time.
Stage 2, ``distill``: both frozen, every head of the overprovisioned network learns from the final exit, independently.

Iteration j draws its images, augmentation and dropout from (seed, j) alone, so that training resumed from a checkpoint
goes on exactly as it would have.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from messnet.data import SegmentationDataset
from messnet.data.transforms import AugmentOptions, TrainingStream, build_augmentation
from messnet.errors import DataError, MessError, RecipeError
from messnet.instance import FINAL_HEAD, Exit
from messnet.losses import DistillationLoss, cross_entropy, distillation_loss, teach
from messnet.network.exit_head import HeadSpace, plain_head_config
from messnet.network.multi_exit import MultiExitNet
from messnet.runs import Checkpoint

__all__ = ["ComputeOptions", "DistillOptions", "PretrainOptions", "TrainOptions", "active_exits", "distill", "pretrain"]

Schedule = Literal["alternating", "modulo"]


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """Where and how to compute; changes no result that is compared, so a run may go on with others."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto" (an accelerator if there is one), "cpu" or "cuda"."""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    """"auto": bf16 autocast on an accelerator, float32 on a CPU, where depthwise backward passes are slower in bf16."""
    num_workers: int = 1
    """Processes that load and augment images; 0: the training process itself."""

    def fabric(self) -> Fabric:
        accelerator = "cuda" if self.device == "auto" and torch.cuda.is_available() else self.device
        accelerator = "cpu" if accelerator == "auto" else accelerator
        if accelerator == "cuda" and not torch.cuda.is_available():
            raise RecipeError("compute.device is 'cuda' but torch sees no CUDA device; use 'auto' or 'cpu'")
        if accelerator not in ("cpu", "cuda"):
            raise RecipeError(f"compute.device must be 'auto', 'cpu' or 'cuda', got {self.device!r}")
        automatic: Literal["32-true", "bf16-mixed"] = "bf16-mixed" if accelerator == "cuda" else "32-true"
        return Fabric(
            accelerator=accelerator, devices=1, precision=automatic if self.precision == "auto" else self.precision
        )


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What both stages share; defaults from torchvision's segmentation reference."""

    section: ClassVar[str] = "training"

    iterations: int = 10_000
    batch_size: int = 16
    """At least 2: normalisation over a globally pooled feature needs two values."""
    learning_rate: float = 0.01
    """For a batch of 16, scaled in proportion to the batch; falls to 0 by the poly 0.9 rule."""
    warmup: int = 0
    """First iterations over which the learning rate rises from 0."""
    momentum: float = 0.9
    weight_decay: float = 1e-4
    augment: AugmentOptions = AugmentOptions()
    loss_stride: int = 1
    """The loss is taken at every n-th pixel in both directions; 1: all of them. Saves time where heads are light."""
    class_weights: tuple[float, ...] | None = None
    """Weight of each class in the loss; None: all 1."""
    checkpoint_every: int = 200
    """Iterations between two checkpoints: the most that a kill can lose."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("iterations", 1), ("batch_size", 2), ("loss_stride", 1), ("checkpoint_every", 1)):
            if getattr(self, name) < least:
                raise RecipeError(f"{self.section}.{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(TrainOptions):
    """Stage 1, exit-aware pre-training."""

    section = "pretrain"

    schedule: Schedule = "alternating"
    """"alternating" (poster 1): one early exit is active per iteration, in turn. "modulo" (poster 2): exit i is active
    when i divides the iteration."""


@dataclass(frozen=True, kw_only=True)
class DistillOptions(TrainOptions):
    """Stage 2, frozen-backbone distillation."""

    section = "distill"

    loss: DistillationLoss = "pfd"
    """"pfd": positive filtering distillation; "kd": unfiltered; "ce": labels alone."""
    alpha: float = 0.5
    """Weight of the labels against the final exit's distribution, [0, 1]."""
    filter_kl: bool = False
    """Filter the KL term too: only pixels that the final exit gets right pass."""


def active_exits(schedule: Schedule, iteration: int, num_early: int) -> tuple[int, ...]:
    """Indices (from 0) of the early exits whose loss counts in ``iteration`` = 1, 2, ...

    In the posters' numbering from 1: i = 1 + (j mod (N-1)) alone, or every i with j mod i = 0.
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
) -> None:
    """Stage 1: ``L = CE(y_N) + sum_i a_i(j) CE(y_i)`` (posters; method.md section 6). Changes ``net`` in place.

    Every exit point gets a plain FCN head for the time of the stage. Goes on from ``checkpoint`` if it holds a state.
    Raises MessError when the loss is not finite.
    """
    net.drop_heads()
    plain = [net.add_head(i, plain_head_config(), seed=options.seed) for i in range(net.num_exits - 1)]
    _train("pretrain", _Pretraining(net, plain, options, compute.fabric()), dataset, options, compute, checkpoint)
    net.drop_heads()


def distill(
    net: MultiExitNet,
    dataset: SegmentationDataset,
    space: HeadSpace,
    options: DistillOptions,
    compute: ComputeOptions,
    checkpoint: Checkpoint,
) -> None:
    """Stage 2: attaches every head of ``space`` at every exit point and trains them on the frozen backbone, each on
    its own. Changes ``net`` in place; backbone, final head and their statistics stay as they are.

    Goes on from ``checkpoint`` if it holds a state. Raises MessError when a loss is not finite.
    """
    net.drop_heads()
    for i, point in enumerate(net.exit_points[:-1]):
        for config in space.configs(point.channels):
            net.add_head(i, config, seed=options.seed)
    _train("distill", _Distillation(net, options, compute.fabric()), dataset, options, compute, checkpoint)


class _Stage(Protocol):
    fabric: Fabric

    def step(self, iteration: int, learning_rate: float, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """One iteration; the losses to show."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class _Pretraining:
    """One optimiser for the backbone, the final head and the plain heads."""

    def __init__(self, net: MultiExitNet, plain: Sequence[Exit], options: PretrainOptions, fabric: Fabric) -> None:
        self.options, self.fabric, self.net = options, fabric, net
        module = _ExitAware(net, plain).train().to(memory_format=torch.channels_last)
        self.module, self.optimizer = fabric.setup(module, _sgd(module, options))
        self.num_early = len(plain)
        self.class_weights = _class_weights(options, net.num_classes, fabric.device)

    def step(self, iteration: int, learning_rate: float, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        _set_learning_rate(self.optimizer, learning_rate)
        torch.manual_seed(_mix(self.options.seed, "pretrain", iteration))
        active = active_exits(self.options.schedule, iteration, self.num_early)
        size = [length // self.options.loss_stride for length in labels.shape[-2:]]
        labels = _every(labels, self.options.loss_stride)
        losses = [cross_entropy(logits, labels, self.class_weights) for logits in self.module(images, active, size)]
        self.optimizer.zero_grad(set_to_none=True)
        self.fabric.backward(torch.stack(losses).sum())
        self.optimizer.step()
        names = [*(f"exit{i}" for i in active), FINAL_HEAD]
        return {name: loss.detach() for name, loss in zip(names, losses, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])


class _ExitAware(nn.Module):
    """The forward pass of stage 1, in one call so that a data-parallel wrapper sees it."""

    def __init__(self, net: MultiExitNet, plain: Sequence[Exit]) -> None:
        super().__init__()
        self.net = net
        self.plain = tuple(plain)

    def forward(self, images: Tensor, active: Sequence[int], size: Sequence[int]) -> list[Tensor]:
        """Logits (N, K, *size) of the active early exits, then of the final one."""
        exits = {i: self.plain[i] for i in active} | {self.net.num_exits - 1: self.net.exits[-1]}
        states = enumerate(self.net.states(images))
        logits = [self.net.logits(exits[i], state) for i, state in states if i in exits]
        return [F.interpolate(y, size=tuple(size), mode="bilinear", align_corners=False) for y in logits]


class _Distillation:
    """An optimiser for each head. One backbone pass and one teacher serve all; a head's graph is freed before the next
    head runs."""

    def __init__(self, net: MultiExitNet, options: DistillOptions, fabric: Fabric) -> None:
        self.options, self.fabric = options, fabric
        self.net = net.eval().to(fabric.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        net.requires_grad_(False)
        net.heads.train().requires_grad_(True)
        self.exits = net.exits[:-1]
        self.class_weights = _class_weights(options, net.num_classes, fabric.device)
        self.optimizers = {exit: _sgd(net.head(exit), options) for exit in self.exits}

    def step(self, iteration: int, learning_rate: float, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        options = self.options
        size = [length // options.loss_stride for length in labels.shape[-2:]]
        with torch.no_grad(), self.fabric.autocast():
            states = list(self.net.states(images))
            final = self.net.logits(self.net.exits[-1], states[-1])
        final = F.interpolate(final.float(), size=tuple(size), mode="bilinear", align_corners=False)
        labels = _every(labels, options.loss_stride)
        teacher = teach(
            final,
            labels,
            loss=options.loss,
            alpha=options.alpha,
            filter_kl=options.filter_kl,
            class_weights=self.class_weights,
        )
        losses: dict[int, list[Tensor]] = {}
        for exit, optimizer in self.optimizers.items():
            # dropout of a head must not depend on the heads beside it
            torch.manual_seed(_mix(options.seed, *exit, iteration))
            with self.fabric.autocast():
                logits = self.net.logits(exit, states[exit.exit_index])
            logits = F.interpolate(logits.float(), size=tuple(size), mode="bilinear", align_corners=False)
            loss = distillation_loss(logits, teacher)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            _set_learning_rate(optimizer, learning_rate)
            optimizer.step()
            losses.setdefault(exit.exit_index, []).append(loss.detach())
        return {f"exit{i}": torch.stack(values).mean() for i, values in losses.items()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "heads": self.net.heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers.values()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.net.heads.load_state_dict(state["heads"])
        for optimizer, saved in zip(self.optimizers.values(), state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def _train(
    name: str,
    stage: _Stage,
    dataset: SegmentationDataset,
    options: TrainOptions,
    compute: ComputeOptions,
    checkpoint: Checkpoint,
) -> None:
    """The loop of both stages: resume, iterate, show, save."""
    done = 0
    if saved := checkpoint.load():
        stage.load_state_dict(saved["stage"])
        done = int(saved["iteration"])
    with tqdm(total=options.iterations, initial=done, desc=name, unit="it", mininterval=2, dynamic_ncols=True) as bar:
        for iteration, (images, labels) in _batches(dataset, options, compute, stage.fabric, done):
            losses = stage.step(iteration, _learning_rate(options, iteration), images, labels)
            bar.update()
            saves = iteration % options.checkpoint_every == 0
            if saves or iteration % 10 == 0 or iteration == options.iterations:
                bar.set_postfix({key: f"{_finite(name, iteration, loss):.3f}" for key, loss in losses.items()})
            if saves:
                checkpoint.save({"stage": stage.state_dict(), "iteration": iteration})


def _batches(
    dataset: SegmentationDataset, options: TrainOptions, compute: ComputeOptions, fabric: Fabric, done: int
) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    stream = TrainingStream(
        dataset,
        build_augmentation(options.augment),
        iterations=options.iterations,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    loader = DataLoader(
        stream,
        batch_size=options.batch_size,
        sampler=range(done * options.batch_size, len(stream)),
        num_workers=compute.num_workers,
        pin_memory=fabric.device.type == "cuda",
    )
    batches = enumerate(loader, start=done + 1)
    while True:
        try:
            iteration, (images, labels) = next(batches)
        except StopIteration:
            return
        except DataError as error:  # a worker's traceback is wrapped around the one line that matters
            raise DataError(str(error).strip().splitlines()[-1].partition("DataError: ")[2] or str(error)) from None
        images = images.to(fabric.device, non_blocking=True).to(memory_format=torch.channels_last)
        yield iteration, (images, labels.to(fabric.device, non_blocking=True))


def _sgd(module: nn.Module, options: TrainOptions) -> torch.optim.SGD:
    return torch.optim.SGD(
        module.parameters(), lr=options.learning_rate, momentum=options.momentum, weight_decay=options.weight_decay
    )


def _learning_rate(options: TrainOptions, iteration: int) -> float:
    peak = options.learning_rate * options.batch_size / 16
    poly: float = (1 - (iteration - 1) / options.iterations) ** 0.9
    return peak * poly * min(1.0, iteration / max(options.warmup, 1))


def _class_weights(options: TrainOptions, num_classes: int, device: torch.device) -> Tensor | None:
    if options.class_weights is None:
        return None
    if len(options.class_weights) != num_classes:
        given = len(options.class_weights)
        raise RecipeError(f"{options.section}.class_weights has {given} values for {num_classes} classes")
    return torch.tensor(options.class_weights, device=device)


def _set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def _every(labels: Tensor, stride: int) -> Tensor:
    """Labels at the centres of stride x stride cells, whole cells only."""
    height, width = (length // stride * stride for length in labels.shape[-2:])
    return labels[..., stride // 2 : height : stride, stride // 2 : width : stride]


def _mix(seed: int, *parts: object) -> int:
    return zlib.crc32("/".join(map(str, (seed, *parts))).encode())


def _finite(name: str, iteration: int, loss: Tensor) -> float:
    value = float(loss)
    if value != value or abs(value) == float("inf"):
        raise MessError(
            f"the loss of {name} is {value} at iteration {iteration}: lower {name}.learning_rate and start again"
        )
    return value
