"""What the heads of stage 2 learn from: many losses beside each other, on one frozen backbone and the same images.

    python benchmarks/bench_losses.py RUN [--exits 1 3 5] [--iterations 300] [--rows ce pfd ...] [--crop 144 208]

RUN has finished stage 1 with early exits; its weights stay as they are. Each row of the table trains copies of the
plain heads as stage 1 left them, with the options of RUN's stage 2 but for what the row names. Where the teacher has
"gone on", it is the final head after as many iterations of cross-entropy on the same frozen backbone. mIoU % on all
validation images.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from messnet.costs.processor import keep_freed_memory
from messnet.data import IGNORE_INDEX, SegmentationDataset
from messnet.data.transforms import TrainingStream, build_augmentation, stack_samples
from messnet.images.preprocessing import normalise
from messnet.network.head_space import plain_head_config
from messnet.network.multi_exit import MultiExitNet, labels_at, upsample
from messnet.records.instance import Exit
from messnet.records.iou import mean_iou, pixel_counts
from messnet.run.opening import open_run
from messnet.training.average import WeightAverage
from messnet.training.loop import _learning_rate, class_weights, every, mix, optimizer_of, set_learning_rate
from messnet.training.options import DistillOptions


@dataclass(frozen=True)
class Row:
    """``alpha`` x the labels' cross-entropy + (1 - alpha) x a KL divergence, per pixel."""

    alpha: float = 1.0
    filters_labels: bool = False
    """Only where the teacher is right, as in positive filtering distillation."""
    filters_kl: bool = False
    reverse: bool = False
    """KL(exit || final), which asks an exit to be sure of one answer; not KL(final || exit)."""
    temperature: float = 1.0
    """Both distributions are softened by it, and the KL weighs its square (Hinton et al. 2015)."""
    goes_on: bool = False
    """The teacher is the final head that has gone on."""
    rate: float = 1.0
    ema: float | None = None
    is_new: bool = False
    """The head begins anew."""


PFD, KD = Row(0.5, filters_labels=True), Row(0.5)
ROWS = {
    "ce": Row(),
    "ce, rate x 0.4": Row(rate=0.4),
    "ce, rate x 2.5": Row(rate=2.5),
    "ce, rate x 5": Row(rate=5),
    "normalisation statistics alone": Row(rate=0),
    "ce, ema 0.99": Row(ema=0.99),
    "ce, new heads, rate x 5": Row(rate=5, is_new=True),
    "kd": KD,
    "kd, KL(exit || final)": replace(KD, reverse=True),
    "pfd": PFD,
    "pfd, alpha 0.25": replace(PFD, alpha=0.25),
    "pfd, alpha 0.75": replace(PFD, alpha=0.75),
    "pfd, alpha 1": replace(PFD, alpha=1.0),
    "pfd, KL filtered too": replace(PFD, filters_kl=True),
    "pfd, KL(exit || final)": replace(PFD, reverse=True),
    "pfd, temperature 2": replace(PFD, temperature=2.0),
    "pfd, temperature 4": replace(PFD, temperature=4.0),
    "kd, teacher gone on": replace(KD, goes_on=True),
    "pfd, teacher gone on": replace(PFD, goes_on=True),
    "pfd, teacher gone on, alpha 0.25": replace(PFD, goes_on=True, alpha=0.25),
    "pfd, teacher gone on, alpha 0.75": replace(PFD, goes_on=True, alpha=0.75),
    "pfd, teacher gone on, KL(exit || final)": replace(PFD, goes_on=True, reverse=True),
}


class Learner:
    """One head, its optimiser and its average. ``row``: what it learns from, by default the labels."""

    def __init__(self, exit: Exit, head: nn.Module, options: DistillOptions, row: Row = Row()) -> None:
        self.row, self.exit, self.head, self.options = row, exit, head.train().requires_grad_(True), options
        self.optimizer = optimizer_of(head.parameters(), options)
        self.average = WeightAverage(head, row.ema) if row.ema is not None else None

    def step(
        self, iteration: int, inputs: list[Tensor], labels: Tensor, weights: Tensor | None, teacher: Tensor | None
    ) -> None:
        torch.manual_seed(mix(self.options.seed, *self.exit, iteration))
        loss_of(self.row, upsample(self.head(*inputs), labels.shape[-2:]), labels, weights, teacher).backward()
        set_learning_rate(self.optimizer, self.row.rate * _learning_rate(self.options, iteration))
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update()


def loss_of(row: Row, logits: Tensor, labels: Tensor, weights: Tensor | None, teacher: Tensor | None) -> Tensor:
    """Mean over the labelled pixels, each with the weight of its class; ``logits`` and ``teacher`` (N, K, H, W),
    ``labels`` (N, H, W), ``weights`` (K,). Labels alone need no teacher."""
    valid = labels != IGNORE_INDEX
    weight = valid.float() if weights is None else weights[labels.where(valid, 0)] * valid
    loss = row.alpha * F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")
    if teacher is None:
        return (loss * weight).sum() / weight.sum().clamp(min=1)
    right = weight * (teacher.argmax(1) == labels)
    labels_count, kl_count = (right if on else weight for on in (row.filters_labels, row.filters_kl))
    loss = loss * labels_count
    if row.alpha < 1:
        own, taught = (F.log_softmax(y / row.temperature, 1) for y in (logits, teacher))
        of, to = (own, taught) if row.reverse else (taught, own)
        kl = (of.exp() * (of - to)).sum(1)
        loss = loss + (1 - row.alpha) * row.temperature**2 * kl * kl_count
    return loss.sum() / weight.sum().clamp(min=1)


def batches(net: MultiExitNet, data: SegmentationDataset, options: DistillOptions) -> Iterator[tuple[Tensor, Tensor]]:
    augment, batch = build_augmentation(options.augment, net.normalisation), options.batch_size
    stream = TrainingStream(data, augment, iterations=options.iterations, batch_size=batch, seed=options.seed)
    loader = DataLoader(stream, batch, collate_fn=stack_samples)
    for images, labels in tqdm(loader, mininterval=30, dynamic_ncols=True):
        yield images.contiguous(memory_format=net.memory_format), every(labels, options.loss_stride)


def train(
    net: MultiExitNet,
    data: SegmentationDataset,
    options: DistillOptions,
    learners: list[Learner],
    *teachers: nn.Module,
) -> None:
    """All ``learners`` on the same batches; ``teachers``: the final head, then the one that has gone on, or none."""
    weights = class_weights(options, data, net.num_classes, torch.device("cpu"))
    for iteration, (images, labels) in enumerate(batches(net, data, options), start=1):
        with torch.no_grad():
            states = [[state.features, *state.kept] for state in net.states(images)]
            taught = [upsample(head(*states[-1]), labels.shape[-2:]) for head in teachers]
        for one in learners:
            early = one.exit.exit_index < net.num_exits - 1
            inputs = states[one.exit.exit_index]
            teacher = taught[one.row.goes_on] if taught else None
            one.step(iteration, inputs[:1] if early else inputs, labels, weights, teacher)
    for one in learners:
        if one.average is not None:
            one.average.hand_over()
        one.head.eval()


def score(net: MultiExitNet, data: SegmentationDataset, heads: list[tuple[int, nn.Module]]) -> list[float]:
    """mIoU of each (exit index, head) over all images of ``data``."""
    counts = np.zeros((len(heads), 3, net.num_classes), np.int64)
    for v in tqdm(range(len(data)), mininterval=30, dynamic_ncols=True):
        sample = data[v]
        image = torch.from_numpy(normalise(sample.image, net.normalisation))[None]
        with torch.inference_mode():
            states = list(net.states(image.contiguous(memory_format=net.memory_format)))
            for h, (i, head) in enumerate(heads):
                kept = states[i].kept if i == net.num_exits - 1 else ()
                found = labels_at(head(states[i].features, *kept), sample.mask.shape)[0].numpy()
                counts[h] += np.stack(pixel_counts(found, sample.mask, net.num_classes))
    return [mean_iou(*one) for one in counts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--exits", type=int, nargs="+", help="early exits, by default all")
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS], metavar="ROW")
    parser.add_argument("--crop", type=int, nargs=2, help="height and width of the training images")
    parser.add_argument("--color-jitter", type=float, help="of the training images")
    given = parser.parse_args()
    keep_freed_memory()
    run = open_run(given.run, ())
    options = replace(run.recipe.distill, iterations=given.iterations)
    augment = {"crop": given.crop, "color_jitter": given.color_jitter}
    augment = {name: value for name, value in augment.items() if value is not None}
    options = replace(options, augment=replace(options.augment, **augment))
    net, data, val = run.pretrained(with_heads=True), run.dataset("train"), run.dataset("val")
    net.to(memory_format=net.memory_format).requires_grad_(False)  # type: ignore[call-overload]
    final, plain = net.exits[-1], plain_head_config()
    points = given.exits or [*range(net.num_exits - 1)]
    if wrong := {*points} - {*range(net.num_exits - 1)}:
        parser.error(f"--exits: {given.run} has the early exits 0 to {net.num_exits - 2}, and no {min(wrong)}")
    # The final head goes on first, alone.
    own = net.head(final)
    better = Learner(final, copy.deepcopy(own), options)
    train(net, data, options, [better])
    exits = [Exit(i, plain.name) for i in points]
    begun = [net.head(exit) for exit in exits]
    new = [net.head(net.add_head(i, plain, seed=options.seed)) for i in points]
    table = {
        name: [
            Learner(exit, copy.deepcopy(head), options, ROWS[name])
            for exit, head in zip(exits, new if ROWS[name].is_new else begun, strict=True)
        ]
        for name in given.rows
    }
    train(net, data, options, [one for row in table.values() for one in row], own, better.head)
    rows = {"as stage 1 left them": [*zip(points, begun, strict=True)]}
    rows |= {name: [(one.exit.exit_index, one.head) for one in row] for name, row in table.items()}
    finals = [(final.exit_index, own), (final.exit_index, better.head)]
    found = score(net, val, [head for row in rows.values() for head in row] + finals)
    print(f"\n{given.iterations} iterations; final exit {100 * found[-2]:.2f} %, gone on {100 * found[-1]:.2f} %\n")
    print(f"| | {' | '.join(f'exit {i}' for i in points)} |\n| --- |{' ---: |' * len(points)}")
    for k, name in enumerate(rows):
        mious = found[k * len(points) : (k + 1) * len(points)]
        print(f"| {name} | {' | '.join(f'{100 * miou:.2f}' for miou in mious)} |")


if __name__ == "__main__":
    main()
