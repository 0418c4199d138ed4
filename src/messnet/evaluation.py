"""One pass over a labelled split -> ExitTables: what every head of every exit does to every image."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from messnet.costs.processor import keep_freed_memory
from messnet.data import SegmentationDataset, SegmentationSample
from messnet.errors import ModelError, RunError
from messnet.images.preprocessing import normalise
from messnet.network.multi_exit import MultiExitNet, labels_at
from messnet.policy.options import EvaluationOptions
from messnet.policy.policy import Policy
from messnet.policy.reference import image_confidence
from messnet.records.arrays import IntArray
from messnet.records.codec import from_plain, to_plain
from messnet.records.exit_tables import ExitTables
from messnet.records.instance import Exit
from messnet.records.iou import counts_of, pixel_counts
from messnet.records.shard import WHOLE, Shard
from messnet.training.checkpoint import Checkpoint

LogitsOf = Callable[[NDArray[np.uint8]], Iterable[tuple[Exit, Tensor]]]
"""An image (H, W, 3) uint8 RGB -> the logits (1, K, h, w) float32 of every exit, as what is deployed computes them."""

# The arrays that have a row for each image.
_ARRAYS = ("intersection", "predicted", "labelled", "image_confidence", "difficulty")


def evaluate(
    net: MultiExitNet,
    dataset: SegmentationDataset,
    options: EvaluationOptions,
    device: torch.device | str = "cpu",
    *,
    part: Shard = WHOLE,
    origin: str = "",
    logits_of: LogitsOf | None = None,
    checkpoint: Checkpoint | None = None,
    checkpoint_seconds: float = 10.0,
) -> ExitTables:
    """Runs every exit of ``net`` on every image of ``dataset`` (docs/method.md#validation-tables).

    One image at a time, in its own size and in float32, as a deployed instance runs it: its decisions can then be read
    from the tables exactly. ``part`` i of n takes every n-th image from the i-th on: shards that
    ``merge_shards`` joins. ``origin`` says what the tables are made from. ``logits_of`` stands in for the network where
    another runtime or precision is deployed. With ``checkpoint`` the work goes on after
    the last image that was saved there, if that was of the same origin, part and device; the caller discards it.
    Raises DataError for the first image that cannot be read, ModelError for logits that are not finite.
    """
    keep_freed_memory()
    # The layout that a Session runs in: another one rounds otherwise.
    net = net.eval().to(device, memory_format=net.memory_format)  # type: ignore[call-overload]
    positions, marked = _positions(part, len(dataset)), _marked(origin, part)
    # Devices round differently, so the rows of one table are not made half here, half there.
    key = f"{marked} on {torch.device(device).type}"
    tables = _resumed(checkpoint, key) or _empty(net, dataset, options, marked, num_images=len(positions))
    names, groups, saved = list(tables.image_names), list(tables.groups), time.perf_counter()
    todo = range(len(names), len(positions))
    for v in tqdm(todo, desc="evaluate", unit="img", mininterval=2, dynamic_ncols=True, disable=not todo):
        sample = dataset[int(positions[v])]
        _evaluate_image(net, sample, tables, v, options, device, logits_of)
        names.append(sample.name)
        groups.append(sample.group)
        # By the clock and not by the image: to save takes longer the more images there are, and images differ in size.
        if checkpoint and time.perf_counter() - saved >= checkpoint_seconds:
            _save(checkpoint, key, replace(tables, image_names=tuple(names), groups=tuple(groups)))
            saved = time.perf_counter()
    return replace(tables, image_names=tuple(names), groups=tuple(groups) if any(groups) else ())


def merge_shards(shards: Mapping[Shard, ExitTables], origin: str) -> ExitTables:
    """The tables of the whole split from those of its parts, equal to the tables of one pass. ``origin`` is what
    each must have been made from.

    Raises RunError when a part is missing or of another origin.
    """
    counts = sorted({shard.count for shard in shards})
    if len(counts) != 1:
        found = f"of a split into {' and '.join(map(str, counts))} parts: delete those not meant" if counts else "none"
        raise RunError(
            f"expected the shards of one split, found {found}; `messnet evaluate RUN --shard I/N` makes them"
        )
    parts = [Shard(i + 1, counts[0]) for i in range(counts[0])]
    missing = [part.words for part in parts if part not in shards]
    if missing:
        raise RunError(f"shards {', '.join(missing)} are missing: make each with `messnet evaluate RUN --shard I/N`")
    for part in parts:
        if shards[part].origin != _marked(origin, part):
            raise RunError(
                f"shard {part.words} was made from another recipe or other weights than this run has: "
                f"delete it and make it again with --shard"
            )
    ordered = [shards[part] for part in parts]
    names = [name for tables in ordered for name in tables.image_names]
    # The parts' rows stand one part after the other; sorting their positions in the split puts every image back.
    order = np.argsort(np.concatenate([_positions(part, len(names)) for part in parts]))
    labels = [label for tables in ordered for label in tables.groups or [""] * len(tables.image_names)]
    groups = tuple(labels[i] for i in order) if any(labels) else ()
    arrays = {name: np.concatenate([getattr(tables, name) for tables in ordered])[order] for name in _ARRAYS}
    return replace(
        ordered[0],
        image_names=tuple(names[i] for i in order),
        groups=groups,
        origin=origin,
        **arrays,  # type: ignore[arg-type]  # mypy takes them for every field
    )


def _positions(part: Shard, num_images: int) -> IntArray:
    """Every n-th image: parts take about the same time, whatever the order of the images."""
    return np.arange(part.index - 1, num_images, part.count)


def _marked(origin: str, part: Shard) -> str:
    return origin if part.count == 1 else f"{origin} {part.words}"


def _evaluate_image(
    net: MultiExitNet,
    sample: SegmentationSample,
    tables: ExitTables,
    row: int,
    options: EvaluationOptions,
    device: torch.device | str,
    logits_of: LogitsOf | None,
) -> None:
    """Fills one row of the tables' arrays."""
    tables.difficulty[row] = sample.difficulty
    label = torch.tensor(sample.mask, device=device)  # copies: cached masks are read-only
    thresholds = torch.tensor(options.pixel_thresholds, dtype=torch.float32, device=device)
    size = (sample.image.shape[0], sample.image.shape[1])
    with torch.inference_mode():
        found = _by_network(net, sample.image, device) if logits_of is None else logits_of(sample.image)
        for exit, logits in found:
            h = net.exits.index(exit)
            # An argmax or a maximum over NaN would give a plausible label or confidence: stop before one is written.
            _expect_finite(logits, exit, sample.name)
            stride = net.exit_points[exit.exit_index].output_stride
            for p, policy in enumerate(options.policies):
                shares = image_confidence(logits, stride, size, thresholds, Policy.parse(policy))
                tables.image_confidence[row, h, p] = shares[0].cpu()
            counts = _count(labels_at(logits, size)[0], label, net.num_classes)
            tables.intersection[row, h], tables.predicted[row, h], tables.labelled[row] = counts


def _by_network(
    net: MultiExitNet, image: NDArray[np.uint8], device: torch.device | str
) -> Iterator[tuple[Exit, Tensor]]:
    x = torch.from_numpy(normalise(image, net.normalisation))[None].to(device, memory_format=net.memory_format)
    states = list(net.states(x))
    for exit in net.exits:
        yield exit, net.logits(exit, states[exit.exit_index])


def _count(prediction: Tensor, label: Tensor, num_classes: int) -> tuple[IntArray, IntArray, IntArray]:
    """``pixel_counts`` of uint8 (H, W). On an accelerator only the counts leave it."""
    if prediction.device.type == "cpu":
        return pixel_counts(prediction.numpy(), label.numpy(), num_classes)
    side = num_classes + 1
    # One number for each (label, prediction), as in pixel_counts: IGNORE_INDEX is clamped to the row that is left out.
    joint = torch.bincount((label.long().clamp(max=num_classes) * side + prediction).flatten(), minlength=side * side)
    return counts_of(joint.cpu().numpy().reshape(side, side)[:-1, :-1])


def _expect_finite(logits: Tensor, exit: Exit, image_name: str) -> None:
    if not bool(torch.isfinite(logits).all()):
        raise ModelError(
            f"exit {exit.exit_index}, head {exit.head}, gives NaN or infinite logits on image {image_name!r}: its "
            f"training diverged; train it again, for example with a smaller learning_rate"
        )


def _empty(
    net: MultiExitNet, dataset: SegmentationDataset, options: EvaluationOptions, origin: str, *, num_images: int
) -> ExitTables:
    """Tables of no image yet, with room for all."""
    counts = (num_images, len(net.exits), net.num_classes)
    shares = (num_images, len(net.exits), len(options.policies), len(options.pixel_thresholds))
    return ExitTables(
        image_names=(),
        difficulty=np.full(num_images, np.nan),
        class_names=tuple(dataset.class_names),
        exits=net.exits,
        intersection=np.zeros(counts, np.int32),
        predicted=np.zeros(counts, np.int32),
        labelled=np.zeros((num_images, net.num_classes), np.int32),
        policies=options.policies,
        pixel_thresholds=np.array(options.pixel_thresholds, np.float64),
        image_confidence=np.zeros(shares, np.float32),
        origin=origin,
    )


def _save(checkpoint: Checkpoint, key: str, tables: ExitTables) -> None:
    arrays = {name: value for name, value in vars(tables).items() if isinstance(value, np.ndarray)}
    rest = {name: to_plain(value) for name, value in vars(tables).items() if name not in arrays}
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
    checkpoint.save({"key": key, "rest": rest, "arrays": tensors})


def _resumed(checkpoint: Checkpoint | None, key: str) -> ExitTables | None:
    """The tables as they were last saved; None where nothing was, or something else."""
    state = checkpoint.load() if checkpoint else None
    if state is None or state.get("key") != key or "rest" not in state:  # of before
        return None
    rest, tensors = cast("dict[str, object]", state["rest"]), cast("dict[str, Tensor]", state["arrays"])
    return from_plain({**rest, **{name: tensor.numpy() for name, tensor in tensors.items()}}, ExitTables)
