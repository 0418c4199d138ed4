"""The loop of both stages: resume, iterate, show, look, save."""

from __future__ import annotations

import math
import statistics
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import NotRequired, Protocol, TypedDict, cast

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from messnet.data import IGNORE_INDEX, SegmentationDataset
from messnet.data.transforms import TrainingStream, build_augmentation, stack_samples
from messnet.errors import DataError, MessError, RecipeError
from messnet.network.multi_exit import MultiExitNet
from messnet.records.instance import Exit
from messnet.training.average import WeightAverage
from messnet.training.checkpoint import Checkpoint
from messnet.training.journal import Journal, Monitor, Validation, ValidationResult, say
from messnet.training.losses import automatic_class_weights
from messnet.training.options import ComputeOptions, TrainOptions

# Iterations between two looks at the losses: each waits for the device.
SHOW_EVERY = 10
# Iterations that are timed before a training: one more, the first, prepares kernels and starts the loader.
TIMED = 3
# Images whose labels "auto" class weights are counted on: enough for shares, and minutes less on large data sets.
MAX_COUNTED = 2000


class Saved(TypedDict):
    """What a checkpoint holds of a stage."""

    stage: Mapping[str, object]
    """As ``Stage.state_dict`` gave it."""
    iteration: int
    best: NotRequired[float]
    """The score of the best state so far; early states lack it."""
    stale: NotRequired[int]
    """Looks at validation images since then; where there is a patience."""
    average: NotRequired[Mapping[str, Tensor]]
    """As ``WeightAverage.state_dict`` gave it, where there is one."""
    untold: NotRequired[list[tuple[int, str, Tensor]]]
    """Losses of exits, taken since the last record of figures; where there are any."""


class Stage(Protocol):
    """One training stage as the loop sees it: its steps, the figures that it shows and the state that it saves."""

    fabric: Fabric
    net: MultiExitNet
    num_parts: int
    """Processes that share each batch; 1 where each has all of it."""
    keeps_best: bool
    """True where one state can be the best of all; in stage 2 every head would have a best of its own."""
    ends_at_best: bool
    """True where the best state, not the last one, is what the stage ends with."""
    patience: int | None
    """Looks without a better state after which the stage ends; None: never."""

    @property
    def trained(self) -> nn.Module:
        """The part of the network that learns."""
        ...

    @property
    def columns(self) -> Sequence[str]:
        """Names of all figures: "loss." and "miou." before those of ``by_column``."""
        ...

    @property
    def shown_exits(self) -> Sequence[Exit]:
        """The exits to look at validation images with."""
        ...

    def step(self, iteration: int, learning_rate: float, images: Tensor, labels: Tensor) -> dict[Exit, Tensor]:
        """One iteration; the losses, on the device."""
        ...

    def expect_finite(self, iteration: int, losses: Mapping[Exit, float]) -> None:
        """Takes note of an iteration's losses. Raises MessError when there is nothing left to train."""
        ...

    def by_column(self, figures: Mapping[Exit, float]) -> dict[str, float]:
        """The figures of exits by what they are called in the columns."""
        ...

    def state_dict(self) -> Mapping[str, object]: ...

    def load_state_dict(self, state: Mapping[str, object]) -> None: ...


def train(
    name: str,
    stage: Stage,
    dataset: SegmentationDataset,
    options: TrainOptions,
    compute: ComputeOptions,
    checkpoint: Checkpoint,
    monitor: Monitor | None,
) -> None:
    """Goes on from ``checkpoint`` if it holds a state, and leaves it at the last one saved; a second file beside it
    keeps the best state that was validated, where the stage has one best state. The network then has the weights that
    the stage hands on: the last or the best ones, or their average.

    Raises RecipeError where validation is to decide and nothing is validated.
    """
    if not options.iterations:
        return
    if (stage.ends_at_best or stage.patience) and (monitor is None or compute.validate_every == 0):
        key = f"{name}.keep is 'best'" if stage.ends_at_best else f"{name}.patience is {stage.patience}"
        raise RecipeError(f"{key} but nothing is validated: set compute.validate_every, or leave it out")
    leads = stage.num_parts == 1 or stage.fabric.global_rank == 0
    if leads:
        checkpoint.expect_writable()
        _warn_of_emulation(stage.fabric.device, compute)
    average = WeightAverage(stage.trained, options.ema) if options.ema is not None else None
    done, best, stale = 0, -math.inf, 0
    # Of each exit that had a turn since the last record: one early exit has it in an iteration of stage 1. They stay on
    # the device until they are told, so that it need not be waited for in every iteration.
    latest: dict[Exit, Tensor] = {}
    if saved := cast(Saved | None, checkpoint.load()):
        _load(saved, stage, average)
        done, best, stale = int(saved["iteration"]), float(saved.get("best", -math.inf)), int(saved.get("stale", 0))
        latest = {Exit(i, head): loss.to(stage.fabric.device) for i, head, loss in saved.get("untold", [])}
    ends = _is_over(stage, stale)
    is_over = ends or done == options.iterations
    if leads:
        say(f"{name}: finished before, kept in {checkpoint.path}" if is_over else _plan_in_words(name, options))
    # Of processes that share each batch only the first writes: all have the same network.
    recorder = _Recorder(name, stage, options, compute, monitor if leads else None, average, done)
    if leads and done > 0 and not is_over:
        say(f"{name}: goes on after iteration {done} of {options.iterations}, from {checkpoint.path}")
    elif recorder.journal is not None and recorder.journal.has_begun_before and not done:
        say(f"{name}: an earlier start left no checkpoint ({checkpoint.path}): begins anew at iteration 0")
    batch, saved_at = options.batch_size, time.monotonic()
    with (
        closing(recorder),
        tqdm(
            total=options.iterations * batch,
            initial=done * batch,
            desc=name,
            unit="img",
            mininterval=2,
            dynamic_ncols=True,
            disable=not leads,
        ) as bar,
    ):
        for iteration, (images, labels) in _batches(dataset, options, compute, stage, done):
            if ends:
                break
            learning_rate = _learning_rate(options, iteration)
            latest |= stage.step(iteration, learning_rate, images, labels)
            if average is not None:
                average.update()
            bar.update(batch)
            # The last state too: a stage that is called again when it is over is not trained again.
            saves = iteration % options.checkpoint_every == 0 or iteration == options.iterations
            looks, improves = recorder.is_due(iteration), False
            if saves or looks or iteration % SHOW_EVERY == 0:
                shown, score = recorder.record(iteration, learning_rate, latest)
                latest = {}
                bar.set_postfix({"iteration": iteration} | {key: f"{value:.3f}" for key, value in shown.items()})
                improves, best = stage.keeps_best and score > best, max(best, score)
            if looks:
                stale = 0 if improves else stale + 1
                ends = _is_over(stage, stale)
                saves |= ends  # or the stage, called again, would go on
            # By the clock nothing but a state is saved: figures and heads that diverged depend on the iterations alone.
            saves |= time.monotonic() - saved_at >= checkpoint.seconds
            if leads and (saves or improves):
                state: Saved = {"stage": stage.state_dict(), "iteration": iteration, "best": best, "stale": stale}
                if average is not None:
                    state["average"] = average.state_dict()
                if latest:
                    state["untold"] = [(*exit, loss) for exit, loss in latest.items()]
                # The best one first: a kill between the two leaves a last state that is repeated from, never one whose
                # "best" speaks of weights that were not written.
                if improves:
                    checkpoint.best.save(state)
                if saves:
                    checkpoint.save(state)
                    saved_at = time.monotonic()
            if ends and leads:
                say(f"{name}: ended at iteration {iteration}, {stale} looks at validation images after the best one")
    if stage.ends_at_best and leads and (kept := cast(Saved | None, checkpoint.best.load())):
        _load(kept, stage, average)
    if average is not None:
        average.hand_over()


def training_seconds(
    stage: Stage, dataset: SegmentationDataset, options: TrainOptions, compute: ComputeOptions
) -> float:
    """How long the training will take on this machine, by the median of a few iterations. The stage's network is
    spoilt. Looks at validation images are not counted; they take a few per cent."""
    ends = []
    for iteration, (images, labels) in _batches(dataset, replace(options, iterations=TIMED + 1), compute, stage, 0):
        losses = stage.step(iteration, 0.0, images, labels)
        torch.stack([*losses.values()]).tolist()  # waits until the device has done it
        ends.append(time.perf_counter())
    return options.iterations * statistics.median(end - begin for begin, end in pairwise(ends))


def _load(saved: Saved, stage: Stage, average: WeightAverage | None) -> None:
    stage.load_state_dict(saved["stage"])
    if average is not None:
        average.load_state_dict(saved["average"])


def _is_over(stage: Stage, stale: int) -> bool:
    """Whether the stage's patience is at its end. Only the first of several processes looks at validation images."""
    if stage.patience is None:
        return False
    is_over = stale >= stage.patience
    return bool(stage.fabric.broadcast(is_over)) if stage.num_parts > 1 else is_over


def _warn_of_emulation(device: torch.device, compute: ComputeOptions) -> None:
    # Only torch's own private check says it: without the instructions oneDNN emulates bfloat16 element by element.
    if device.type == "cpu" and compute.precision == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        say(
            "compute.precision is bf16, which this processor has no instructions for: an iteration may take "
            "minutes; with --compute.precision f32 it does not"
        )


class _Recorder:
    """Takes the losses from the device, looks at validation images where that is due, writes both down, and warns."""

    def __init__(
        self,
        name: str,
        stage: Stage,
        options: TrainOptions,
        compute: ComputeOptions,
        monitor: Monitor | None,
        average: WeightAverage | None,
        done: int,
    ) -> None:
        self.stage, self.options, self.name, self.average = stage, options, name, average
        self.every = options.checkpoint_every if compute.validate_every is None else compute.validate_every
        self.validation = Validation(monitor.val, compute.validate_images) if monitor and self.every else None
        self.journal = None
        if monitor is not None and compute.log != "none":
            self.journal = Journal(monitor.folder, monitor.name or name, stage.columns, kind=compute.log, done=done)
        self.uniform: set[Exit] = set()
        self.has_warned = False

    def close(self) -> None:
        if self.journal is not None:
            self.journal.close()

    def is_due(self, iteration: int) -> bool:
        return iteration == self.options.iterations or (self.every > 0 and iteration % self.every == 0)

    def record(
        self, iteration: int, learning_rate: float, losses: Mapping[Exit, Tensor]
    ) -> tuple[dict[str, float], float]:
        """The losses in words, and how good the network is: the mean mIoU of its exits, -inf if none was looked at."""
        # One transfer for all: each waits until the device has caught up.
        values = torch.stack([*losses.values()]).tolist()
        told = dict(zip(losses, values, strict=True))
        self.stage.expect_finite(iteration, told)
        shown = self.stage.by_column(told)
        row = {f"loss.{key}": value for key, value in shown.items()}
        score = -math.inf
        if self.validation is not None and self.is_due(iteration):
            shown_weights = self.average.shown() if self.average else nullcontext()
            # What is not trained is in eval mode already.
            self.stage.trained.eval()
            with shown_weights, self.stage.fabric.autocast():
                results = self.validation.look(self.stage.net, self.stage.shown_exits, self.stage.fabric.device)
            self.stage.trained.train()
            # No class may occur in the few images, or a head may have diverged: NaN, which would compare with nothing.
            score = float(np.nan_to_num(np.mean([result.miou for result in results.values()]), nan=-math.inf))
            miou = self.stage.by_column({exit: result.miou for exit, result in results.items()})
            row |= {f"miou.{key}": value for key, value in miou.items()}
            self._warn(iteration, results)
        if self.journal is not None:
            self.journal.write({"iteration": iteration, "learning_rate": learning_rate, **row})
        return shown, score

    def _warn(self, iteration: int, results: Mapping[Exit, ValidationResult]) -> None:
        """Once, of exits that were blind at two looks in a row: at the very first one many are."""
        uniform = {exit for exit, result in results.items() if result.only_class is not None}
        lasting, self.uniform = sorted(uniform & self.uniform), uniform
        if lasting and not self.has_warned and self.validation is not None:
            self.has_warned = True
            exit = lasting[0]
            name = self.validation.dataset.class_names[results[exit].only_class or 0]
            others = f" (and {len(lasting) - 1} more)" if len(lasting) > 1 else ""
            say(
                f"{self.name}: at iteration {iteration} exit {exit.exit_index} ({exit.head}){others} still takes every "
                f"validation pixel for {name!r}: look at the masks (`messnet check-data`) and "
                f"at {self.name}.learning_rate"
            )


def _batches(
    dataset: SegmentationDataset, options: TrainOptions, compute: ComputeOptions, stage: Stage, done: int
) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """Iterations from ``done`` + 1 with their images and labels; of parts that share a batch, this process's."""
    fabric, parts, batch = stage.fabric, stage.num_parts, options.batch_size
    # Unequal shares would weigh images unequally in the mean over processes; a share of one image has no statistics for
    # a normalisation over globally pooled features.
    if batch % parts or batch // parts < 2:
        raise RecipeError(
            f"{options.section}.batch_size {batch} cannot be shared by {parts} processes: expected a multiple of "
            f"{parts} that leaves each 2 images or more"
        )
    augment = build_augmentation(options.augment, stage.net.normalisation)
    stream = TrainingStream(dataset, augment, iterations=options.iterations, batch_size=batch, seed=options.seed)
    rank = fabric.global_rank if parts > 1 else 0
    loader = DataLoader(
        stream,
        batch_size=batch // parts,
        collate_fn=stack_samples,
        # Every image depends on its position in the stream alone, so that to resume is to begin at a later position,
        # and to share a batch is to take every parts-th one.
        sampler=range(done * batch + rank, len(stream), parts),
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
        images = images.to(fabric.device, non_blocking=True)
        yield iteration, (images, labels.to(fabric.device, non_blocking=True))


def layout(net: MultiExitNet, device: torch.device) -> torch.memory_format:
    """The memory layout to train in: channels last where the model takes it and it is faster.

    On a CPU that is with depthwise convolutions, whose backward pass it makes several times as fast, and on an
    accelerator without them: there a step of MobileNetV2 takes a quarter less with channels first
    (benchmarks/results/training_gpu_202611.md).
    """
    if net.memory_format is torch.contiguous_format:
        return torch.contiguous_format
    # Depthwise is one filter a channel; a convolution of a single channel has one too and is dense.
    convolutions = (m for m in net.backbone.modules() if isinstance(m, nn.Conv2d))
    is_depthwise = any(m.groups == m.in_channels > 1 for m in convolutions)
    return torch.channels_last if is_depthwise is (device.type == "cpu") else torch.contiguous_format


def optimizer_of(
    parameters: Iterable[nn.Parameter] | Sequence[dict[str, object]], options: TrainOptions, *, fused: bool = False
) -> torch.optim.Optimizer:
    """The stage's optimiser, with its learning rate, momentum and weight decay.

    ``parameters`` may be groups, each with a "scale" by which ``set_learning_rate`` multiplies the rate. ``fused``
    updates all tensors in one pass over memory; it needs a gradient for each of them, so every parameter must have a
    part in every loss.
    """
    rate, decay = options.learning_rate, options.weight_decay
    match options.optimizer:
        case "sgd":
            return torch.optim.SGD(parameters, lr=rate, momentum=options.momentum, weight_decay=decay, fused=fused)
        case "adamw":
            betas = (options.momentum, 0.999)
            return torch.optim.AdamW(parameters, lr=rate, betas=betas, weight_decay=decay, fused=fused)


def _plan_in_words(name: str, options: TrainOptions) -> str:
    """The learning rate that is really meant, which another batch than 16 makes another than the recipe's."""
    scaled = f" ({options.section}.learning_rate {options.learning_rate:g} x batch {options.batch_size} / 16)"
    return (
        f"{name}: {options.iterations} iterations of {options.batch_size} images; the learning rate "
        f"{'of AdamW ' if options.optimizer == 'adamw' else ''}falls from "
        f"{_peak(options):g}{scaled if options.batch_size != 16 else ''} to 0"
    )


def _peak(options: TrainOptions) -> float:
    # The linear scaling rule (Goyal et al. 2017): the option is for a batch of 16.
    return options.learning_rate * options.batch_size / 16


def _learning_rate(options: TrainOptions, iteration: int) -> float:
    peak = _peak(options)
    # Iterations are counted from 1, so the first is at the peak and the last is above 0 still.
    poly: float = (1 - (iteration - 1) / options.iterations) ** 0.9
    return peak * poly * min(1.0, iteration / max(options.warmup, 1))


def class_weights(
    options: TrainOptions, dataset: SegmentationDataset, num_classes: int, device: torch.device
) -> Tensor | None:
    """(K,) weights of the classes, None where all weigh 1. Prints the ones it works out."""
    if options.class_weights is None:
        return None
    if options.class_weights == "auto":
        counted = np.linspace(0, len(dataset) - 1, min(len(dataset), MAX_COUNTED)).round().astype(int)
        pixels = np.zeros(num_classes, np.int64)
        for v in tqdm(counted.tolist(), desc="class weights", unit="img", mininterval=2, dynamic_ncols=True):
            mask = dataset[v].mask
            pixels += np.bincount(mask[mask != IGNORE_INDEX], minlength=num_classes)[:num_classes]
        weights = automatic_class_weights(pixels)
        words = ", ".join(f"{name} {w:.2f}" for name, w in zip(dataset.class_names, weights, strict=True))
        say(f"{options.section}.class_weights auto, from {len(counted)} images: {words}")
        return torch.tensor(weights, dtype=torch.float32, device=device)
    if len(options.class_weights) != num_classes:
        given = len(options.class_weights)
        raise RecipeError(f"{options.section}.class_weights has {given} values for {num_classes} classes")
    return torch.tensor(options.class_weights, device=device)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("scale", 1.0)


def every(labels: Tensor, stride: int) -> Tensor:
    """Labels at the centres of stride x stride cells, whole cells only."""
    # Bilinear interpolation to 1/stride takes its samples at the centres of the cells (align_corners=False), so the
    # labels are read there; for an even stride the centre lies between pixels, and the one after it is taken.
    height, width = (length // stride * stride for length in labels.shape[-2:])
    return labels[..., stride // 2 : height : stride, stride // 2 : width : stride]


def mix(seed: int, *parts: object) -> int:
    # A checksum and not hash(): Python salts that of a string anew in every process.
    return zlib.crc32("/".join(map(str, (seed, *parts))).encode())


def diverged(name: str, iteration: int, loss: float) -> MessError:
    return MessError(
        f"the loss of {name} is {loss} at iteration {iteration}: lower {name}.learning_rate and start again"
    )
