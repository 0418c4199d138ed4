"""Small exit and cost tables, and what instances do on them, one image at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import combinations, product
from typing import get_args

import numpy as np

from messnet.records.costs import CostTable, PartCost
from messnet.records.exit_tables import ExitTables
from messnet.records.instance import Exit, ExitChoice, Instance
from messnet.records.names import CostName
from messnet.searching.grid import Grid

COST_NAMES: tuple[CostName, ...] = get_args(CostName)
COMPLETE = Grid(num_image_thresholds=1000)


def tiny(seed: int, num_exit_points: int = 3) -> tuple[ExitTables, CostTable]:
    """Tables so small and coarse that equal costs, equal mIoUs, absent classes and colliding exit sets abound."""
    draw = np.random.default_rng(seed)
    heads = [int(draw.integers(1, 3)) for _ in range(num_exit_points)]
    exits = [Exit(i, f"head{j}") for i, num in enumerate(heads) for j in range(num)] + [Exit(num_exit_points, "final")]
    num_images, num_classes, num_thresholds = int(draw.integers(2, 5)), int(draw.integers(2, 4)), 2
    labels = draw.integers(0, num_classes, (num_images, 6))
    if seed % 3 == 0:
        labels[labels == 0] = 1  # a class that only predictions have
    shape = (num_images, len(exits), 6)
    predictions = np.where(draw.random(shape) < 0.6, labels[:, None], draw.integers(0, num_classes, shape))
    one_hot = np.eye(num_classes, dtype=np.int32)
    tables = ExitTables(
        image_names=tuple(str(v) for v in range(num_images)),
        difficulty=np.full(num_images, np.nan),
        class_names=tuple(str(k) for k in range(num_classes)),
        exits=tuple(exits),
        intersection=(one_hot[predictions] * (predictions == labels[:, None])[..., None]).sum(2, dtype=np.int32),
        predicted=one_hot[predictions].sum(2, dtype=np.int32),
        labelled=one_hot[labels].sum(1, dtype=np.int32),
        policies=("top1+none", "entropy+native"),
        pixel_thresholds=np.array([0.5, 0.9]),
        image_confidence=(draw.integers(0, 5, (num_images, len(exits), 2, num_thresholds)) / 4).astype(np.float32),
    )

    def part() -> PartCost:
        macs, parameters, memory, latency, p95 = (int(n) for n in draw.integers(0, 4, 5))
        return PartCost(
            macs=macs,
            macs_paper=2 * macs + 1,
            parameters=parameters,
            memory_bytes=memory,
            latency_ms=latency / 4,
            latency_p95_ms=p95 / 4,
        )

    costs = CostTable(
        model="tiny",
        input_size=(2, 3),
        segments=tuple(part() for _ in range(num_exit_points + 1)),
        heads={e: part() for e in exits},
        policies=tuple(part() for _ in range(num_exit_points)),
        outputs=tuple(part() for _ in range(num_exit_points + 1)),
    )
    return tables, costs


def all_instances(tables: ExitTables, setting: str, policy: int = 0) -> Iterator[Instance]:
    """Every instance of up to three exits; image thresholds are the observed values themselves."""

    def choices(position: int) -> Iterator[ExitChoice]:
        e = tables.exits[position]
        for t, pixel_threshold in enumerate(tables.pixel_thresholds):
            for value in np.unique(tables.image_confidence[:, position, policy, t]):
                yield ExitChoice(
                    exit_index=e.exit_index,
                    head=e.head,
                    pixel_threshold=float(pixel_threshold),
                    image_threshold=float(value),
                )

    for size in (1,) if setting == "budgeted" else (1, 2, 3):
        for positions in combinations(range(len(tables.exits)), size):
            exits = [tables.exits[p] for p in positions]
            if len({e.exit_index for e in exits}) < size:
                continue
            last = ExitChoice(exit_index=exits[-1].exit_index, head=exits[-1].head)
            for early in product(*(choices(p) for p in positions[:-1])):
                yield Instance(
                    name="brute", setting="input_dependent", exits=(*early, last), policy=tables.policies[policy]
                )


def simulate(tables: ExitTables, costs: CostTable, instance: Instance, name: CostName) -> tuple[list[int], list[float]]:
    """Where each image leaves and what it costs, one image and one exit at a time."""
    policy = tables.policies.index(instance.policy)
    routing, spent = [], []
    for v in range(len(tables.image_names)):
        parts, segment = [], 0
        for choice in instance.exits:
            while segment <= choice.exit_index:
                parts.append(costs.segments[segment])
                segment += 1
            parts.append(costs.heads[choice.exit])
            position = tables.exits.index(choice.exit)
            if choice is instance.exits[-1]:
                break
            parts.append(costs.policies[choice.exit_index])
            t = list(tables.pixel_thresholds).index(choice.pixel_threshold)
            if float(tables.image_confidence[v, position, policy, t]) >= (choice.image_threshold or 0):
                break
        parts.append(costs.outputs[choice.exit_index])
        routing.append(position)
        spent.append(sum(getattr(part, name) for part in parts))
    if name in ("parameters", "memory_bytes"):
        last = instance.exits[-1]
        kept = [*costs.segments[: last.exit_index + 1]]
        for choice in instance.exits:
            kept += [costs.heads[choice.exit], costs.outputs[choice.exit_index]]
            kept += [costs.policies[choice.exit_index]] if choice is not last else []
        values = [getattr(part, name) for part in kept]
        spent = [float(sum(values) if name == "parameters" else max(values))] * len(routing)
    return routing, spent


def exact_miou(tables: ExitTables, routing: list[int]) -> Fraction:
    ious = []
    for k in range(len(tables.class_names)):
        intersection = sum(int(tables.intersection[v, p, k]) for v, p in enumerate(routing))
        predicted = sum(int(tables.predicted[v, p, k]) for v, p in enumerate(routing))
        union = predicted + int(tables.labelled[:, k].sum()) - intersection
        if union:
            ious.append(Fraction(intersection, union))
    return sum(ious, Fraction()) / len(ious)


def larger(seed: int) -> tuple[ExitTables, CostTable]:
    """Tables on which bounds rule most choices out: many images, exits that get better."""
    draw = np.random.default_rng(seed)
    tables, costs = tiny(seed, num_exit_points=3)
    num, size = 60, 300
    labels = draw.integers(0, 3, (num, size))
    skill = np.linspace(0.6, 0.95, len(tables.exits))[None, :, None] - draw.beta(1, 4, (num, 1, 1)) * 0.5
    shape = (num, len(tables.exits), size)
    predictions = np.where(draw.random(shape) < skill, labels[:, None], draw.integers(0, 3, shape))
    one_hot = np.eye(3, dtype=np.int32)
    right = predictions == labels[:, None]
    confidence = np.repeat(right.mean(2)[:, :, None, None], 2, axis=3) + draw.normal(0, 0.03, (*shape[:2], 1, 2))
    return replace(
        tables,
        image_names=tuple(map(str, range(num))),
        difficulty=np.full(num, np.nan),
        class_names=("a", "b", "c"),
        intersection=(one_hot[predictions] * right[..., None]).sum(2, dtype=np.int32),
        predicted=one_hot[predictions].sum(2, dtype=np.int32),
        labelled=one_hot[labels].sum(1, dtype=np.int32),
        policies=("top1+none",),
        image_confidence=confidence.astype(np.float32),
    ), replace(costs, segments=tuple(replace(part, macs=10 + part.macs) for part in costs.segments))
