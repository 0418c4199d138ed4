"""Time of the exact search on generated tables, against plain enumeration's rate measured in the same run.

    python benchmarks/bench_search.py [--size small|medium|large] [--json PATH]

Ends with one line per figure: name value unit goal ok|short.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from messnet.instance import Exit
from messnet.search import Front, Grid, Objective, choose, cost_of, pareto_front, route
from messnet.tables import CostTable, ExitTables, PartCost, mean_iou


class Size(NamedTuple):
    images: int
    classes: int
    early_exits: int
    heads: int
    pixel_thresholds: int
    image_thresholds: int


SIZES = {
    "small": Size(50, 8, 3, 6, 4, 16),
    "medium": Size(80, 10, 4, 9, 7, 24),
    "large": Size(120, 12, 5, 12, 10, 32),
}


def make_tables(size: Size, seed: int = 0) -> tuple[ExitTables, CostTable]:
    """Tables of a network whose deeper exits and larger heads see better, and whose confidence knows it roughly.

    Image v has a difficulty, exit h a skill; the share of wrong pixels grows with one and falls with the other, so
    that easy images are as good early as late. The confidence follows the share of right pixels with noise.
    """
    draw = np.random.default_rng(seed)
    exits = [Exit(i, f"head{j}") for i in range(size.early_exits) for j in range(size.heads)]
    exits.append(Exit(size.early_exits, "final"))
    quality = np.array([j / size.heads for _ in range(size.early_exits) for j in range(size.heads)] + [1.0])
    depth = np.array([e.exit_index / size.early_exits for e in exits])
    skill = 0.45 + 0.4 * depth + 0.12 * quality + draw.normal(0, 0.01, len(exits))
    difficulty = draw.beta(2, 3, size.images)

    shape = (size.images, len(exits), size.classes)
    share = draw.dirichlet(0.3 * draw.uniform(0.3, 3, size.classes), size.images)
    labelled = (share * 250_000).astype(np.int32)
    class_skill = draw.normal(0, 0.03, (1, len(exits), size.classes)) - draw.uniform(0, 0.25, (1, 1, size.classes))
    common = draw.normal(0, 0.05, (size.images, 1, size.classes))  # what is hard in this image for every exit
    own = draw.normal(0, 0.03, shape)
    recall = np.clip(
        1.1 - difficulty[:, None, None] * (1.25 - skill[None, :, None]) * 1.6 + class_skill + common + own, 0.02, 0.99
    )
    intersection = (recall * labelled[:, None]).astype(np.int32)
    # What one class loses another one gains.
    missed = labelled[:, None] - intersection
    gains = draw.dirichlet(np.ones(size.classes), shape[:2])
    predicted = intersection + (missed.sum(2, keepdims=True) * gains).astype(np.int32)

    right = intersection.sum(2) / labelled.sum(1)[:, None]
    thresholds = np.linspace(0.3, 0.95, size.pixel_thresholds)
    level = 3 * (right + draw.normal(0, 0.05, right.shape) - 0.8)[:, :, None] - 4 * (thresholds - 0.6)
    confidence = 1 / (1 + np.exp(-2 * (level + draw.normal(0, 0.05, level.shape))))
    tables = ExitTables(
        image_names=tuple(f"{v:04d}" for v in range(size.images)),
        difficulty=difficulty,
        class_names=tuple(f"class{k}" for k in range(size.classes)),
        exits=tuple(exits),
        intersection=intersection,
        predicted=predicted.astype(np.int32),
        labelled=labelled,
        policies=("top1+native",),
        pixel_thresholds=thresholds,
        image_confidence=(confidence[:, :, None].astype(np.float32) * 2**18).round() / np.float32(2**18),
    )
    macs = draw.integers(15_000_000_000, 25_000_000_000, size.early_exits + 1)
    head_macs = [int((0.2 + 3 * q + draw.uniform(0, 0.3)) * 1e9) for q in quality]
    costs = CostTable(
        model="generated",
        input_size=(512, 512),
        segments=tuple(PartCost(macs=int(m), macs_paper=int(1.01 * m), parameters=int(m) // 4000) for m in macs),
        heads={
            e: PartCost(macs=m, macs_paper=int(1.01 * m), parameters=m // 1000)
            for e, m in zip(exits, head_macs, strict=True)
        },
    )
    return tables, costs


def plain_rate(front: Front, tables: ExitTables, costs: CostTable, seconds: float = 2.0) -> float:
    """Instances per second of the literal way: route the images, sum the counts, take the mIoU and the mean cost."""
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        instance = front.points[done % len(front.points)].instance
        mean_iou(*tables.counts(route(tables, instance)))
        cost_of(tables, costs, instance).mean()
        done += 1
    return done / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="medium")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()

    size = SIZES[options.size]
    tables, costs = make_tables(size, options.seed)
    print(size)
    start, cpu_start = time.perf_counter(), time.process_time()
    front = pareto_front(tables, costs, grid=Grid(num_image_thresholds=size.image_thresholds), progress=True)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    print(f"{front.certificate}\nfront of {len(front.points)} points, {len(front.static)} static")
    questions = [
        Objective(maximise="miou", max_cost_ratio=1),
        Objective(minimise="macs", max_drop_pp=0.1),
        Objective(minimise="macs", max_drop_pp=1),
    ]
    for objective in questions:
        print(f"{objective}: {choose(front, objective).verdict}")

    rate = plain_rate(front, tables, costs)
    figures = [
        ("search_s", seconds, "s", 60.0, seconds <= 60),
        ("search_cpu_s", cpu_seconds, "s", None, True),  # tells a busy machine from a slow search
        ("declared", front.num_declared, "instances", None, True),
        ("distinct", front.num_distinct, "instances", None, True),
        ("evaluated", front.num_evaluated, "instances", None, True),
        ("evaluated_share", front.num_evaluated / front.num_distinct, "ratio", None, True),
        ("plain_rate", rate, "instances/s", None, True),
        ("speedup_over_plain_distinct", front.num_distinct / seconds / rate, "x", 100.0, True),
    ]
    figures[-1] = (*figures[-1][:4], figures[-1][1] >= 100)
    for name, value, unit, goal, reached in figures:
        print(f"{name} {value:.6g} {unit} {'-' if goal is None else f'{goal:g}'} {'ok' if reached else 'short'}")
    if options.json:
        record = [dict(zip(("name", "value", "unit", "goal", "ok"), figure, strict=True)) for figure in figures]
        options.json.write_text(json.dumps({"size": size._asdict(), "figures": record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
