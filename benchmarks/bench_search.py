"""Exact search at paper size: time, certificate and memory, against Optuna on the same objective in the same run.

    python benchmarks/bench_search.py [--size small|paper] [--run RUN] [--optuna 10000] [--json PATH]

Tables are generated, or those of a finished run. Optuna (TPE and NSGA-II) evaluates the same objective: exits, heads
and thresholds by their position in the grid, mean cost plus a penalty for the mIoU that is missing. Seconds against
Optuna leave out the preparation of the tables, which both need. Wall and CPU seconds are both told: their ratio tells
a busy machine from a slow search. Ends with one line per figure: name value unit goal ok|short.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from messnet.errors import MessError
from messnet.records.costs import CostTable, PartCost
from messnet.records.exit_tables import ExitTables
from messnet.records.instance import Exit
from messnet.searching.answers import SearchResult
from messnet.searching.exact import Problem
from messnet.searching.grid import Grid, columns_of
from messnet.searching.measure import CostMeasure
from messnet.searching.objective import Objective
from messnet.searching.optima import pareto_front, search_for


class Size(NamedTuple):
    images: int
    classes: int
    early_exits: int
    heads: int
    image_thresholds: int


SIZES = {"small": Size(80, 8, 4, 6, 16), "paper": Size(724, 21, 5, 56, 64)}
PIXEL_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.96, 0.98, 0.99)


def make_tables(size: Size, seed: int = 0) -> tuple[ExitTables, CostTable]:
    """Tables of a network whose deeper exits and larger heads see better, and whose confidence knows it roughly.

    Most of what an exit gets wrong it shares: with all exits (the image's difficulty and each class's), with the heads
    of its exit point, and only a little is its own. Missed pixels go to the background or to classes of the image.
    """
    draw = np.random.default_rng(seed)
    exits = [Exit(i, f"head{j:02d}") for i in range(size.early_exits) for j in range(size.heads)]
    exits.append(Exit(size.early_exits, "final"))
    point = np.array([e.exit_index for e in exits])
    capacity = np.array([j / size.heads for _ in range(size.early_exits) for j in range(size.heads)] + [1.0])
    depth = (point + 1) / (size.early_exits + 1)
    num, shape = len(exits), (size.images, len(exits), size.classes)

    def shared(spread: float, *last: int) -> Any:
        """The same for all heads of an exit point."""
        return draw.normal(0, spread, (size.images, size.early_exits + 1, *last))[:, point]

    share = draw.dirichlet(np.r_[6.0, 0.12 * draw.uniform(0.5, 2, size.classes - 1)], size.images)
    labelled = (share * 250_000).astype(np.int64)
    labelled[labelled < 800] = 0
    error = 0.45 * np.exp(-2.2 * depth) + 0.06 - 0.03 * capacity * (1 - depth) + draw.normal(0, 0.003, num)
    difficulty = draw.beta(2, 3, size.images)
    hard_class = np.r_[0.35, draw.uniform(0.6, 1.6, size.classes - 1)]
    hard = 0.25 + 1.9 * difficulty[:, None, None] ** 1.5 * (1.8 - 0.8 * depth[:, None])
    luck = (
        draw.normal(0, 0.35, (size.images, 1, size.classes)) + shared(0.12, size.classes) + draw.normal(0, 0.06, shape)
    )
    missed_share = np.clip(error[:, None] * hard * hard_class * np.exp(luck), 0.002, 0.97)
    missed = (missed_share * labelled[:, None]).astype(np.int64)
    intersection = labelled[:, None] - missed
    towards = np.log(share + 0.01 * draw.dirichlet(0.2 * np.ones(size.classes), size.images) + 1e-9)[:, None]
    towards = np.exp(towards + shared(0.15, size.classes) + draw.normal(0, 0.08, shape))
    towards[..., 0] *= 0.5
    predicted = intersection + (missed.sum(2, keepdims=True) * towards / towards.sum(2, keepdims=True)).astype(np.int64)

    right = intersection.sum(2) / labelled.sum(1)[:, None]
    thresholds = np.array(PIXEL_THRESHOLDS)
    level = 0.8 * np.log(right / (1 - right))[:, :, None] - 0.56 * np.log(thresholds / (1 - thresholds))
    level += shared(0.25, 1) + draw.normal(0, 0.1, (*right.shape, 1)) + draw.normal(0, 0.05, level.shape)
    tables = ExitTables(
        image_names=tuple(f"{v:04d}" for v in range(size.images)),
        difficulty=difficulty,
        class_names=tuple(f"class{k}" for k in range(size.classes)),
        exits=tuple(exits),
        intersection=intersection.astype(np.int32),
        predicted=predicted.astype(np.int32),
        labelled=labelled.astype(np.int32),
        policies=("top1+native",),
        pixel_thresholds=thresholds,
        image_confidence=((1 / (1 + np.exp(-level)))[:, :, None] * 2**18).round().astype(np.float32)
        / np.float32(2**18),
    )
    return tables, _costs(size, exits, capacity, draw)


def _costs(size: Size, exits: list[Exit], capacity: Any, draw: np.random.Generator) -> CostTable:
    def part(macs: float) -> PartCost:
        return PartCost(macs=int(macs), macs_paper=int(1.01 * macs), parameters=int(macs) // 1000, memory_bytes=0)

    heads = (0.3 + 5 * capacity**1.5 + draw.uniform(0, 0.3, len(exits))) * 1e9
    heads[-1] = 1e10
    return CostTable(
        model="generated",
        input_size=(512, 512),
        segments=tuple(part(m) for m in draw.integers(18_000_000_000, 25_000_000_000, size.early_exits + 1)),
        heads={e: part(m) for e, m in zip(exits, heads, strict=True)},
        policies=tuple(part(2e7) for _ in range(size.early_exits)),
        outputs=tuple(part(6e7) for _ in range(size.early_exits + 1)),
    )


def timed(words: str, work: Callable[[], Any]) -> tuple[Any, float, float]:
    """The result, wall seconds, CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{words}: {wall:.1f} s, {cpu:.1f} CPU s: {result.certificate}", flush=True)
    return result, wall, cpu


def optuna_best(
    tables: ExitTables, costs: CostTable, grid: Grid, least_miou: float, sampler: str, trials: int
) -> tuple[float, float]:
    """Least mean cost that meets the mIoU, and the seconds until it was found; tables are prepared before."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    num_images = len(tables.image_names)
    points = sorted({e.exit_index for e in tables.exits})
    at = [[p for p, e in enumerate(tables.exits) if e.exit_index == i] for i in points]
    part = costs.column("macs", tables.exits)
    prefix = np.cumsum(part.segments)[part.exit_indices]
    head, decision, output = part.heads, part.policies, part.outputs
    all_columns = [columns_of(tables, position, grid)[0] for position in range(tables.final)]
    union = tables.predicted + tables.labelled[:, None] - tables.intersection
    best = [np.inf, np.inf]

    def objective(trial: Any) -> float:
        chosen = sorted({trial.suggest_int(f"point{j}", 0, len(points) - 1) for j in range(3)})
        positions = [at[i][trial.suggest_int(f"head{i}", 0, len(at[i]) - 1) if len(at[i]) > 1 else 0] for i in chosen]
        routing = np.full(num_images, positions[-1])
        free, paid, cost = np.ones(num_images, bool), 0.0, 0.0
        for i, position in zip(chosen[:-1], positions[:-1], strict=True):
            columns = all_columns[position]
            column = columns[trial.suggest_int(f"pixel{i}", 0, len(columns) - 1)]
            share = trial.suggest_float(f"image{i}", 0, 1)
            leaves = free & (column.bins >= 1 + round(share * (len(column.image_thresholds) - 1)))
            paid += head[position] + decision[position]
            cost += leaves.sum() * (prefix[position] + paid + output[position])
            routing[leaves], free = position, free & ~leaves
        last = positions[-1]
        cost = (cost + free.sum() * (prefix[last] + paid + head[last] + output[last])) / num_images
        images = np.arange(num_images)
        both = union[images, routing].sum(0, dtype=np.int64)
        miou = (tables.intersection[images, routing].sum(0, dtype=np.int64)[both > 0] / both[both > 0]).mean()
        if miou >= least_miou and cost < best[0]:
            best[:] = cost, time.perf_counter() - start
        return cost / prefix[tables.final] + 20 * max(0.0, least_miou - miou)

    samplers = {"tpe": optuna.samplers.TPESampler, "nsga2": optuna.samplers.NSGAIISampler}
    study = optuna.create_study(sampler=samplers[sampler](seed=0))
    start = time.perf_counter()
    study.optimize(objective, n_trials=trials)
    return best[0], best[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="paper")
    parser.add_argument("--run", type=Path, help="tables.npz and profile.json of a finished run, not generated ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drop", type=float, default=1.0, help="allowed mIoU drop, percentage points")
    parser.add_argument("--optuna", type=int, default=10_000, help="evaluations of each sampler; 0: none")
    parser.add_argument("--samplers", nargs="+", choices=("tpe", "nsga2"), default=("tpe", "nsga2"))
    parser.add_argument("--time-limit", type=float, default=60.0, help="of the search for one objective, seconds")
    parser.add_argument("--front", type=float, default=300.0, help="of the search for the front, seconds; 0: no front")
    parser.add_argument("--precision", type=float, default=0.2, help="of the front, pp of mIoU; 0: exact")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()

    size = SIZES[options.size]
    if options.run:
        tables = ExitTables.from_bytes((options.run / "tables.npz").read_bytes())
        costs = CostTable.from_json((options.run / "profile.json").read_text())
    else:
        tables, costs = make_tables(size, options.seed)
    grid, objective = Grid(num_image_thresholds=size.image_thresholds), Objective(max_drop_pp=options.drop)
    few = tables.subset(np.arange(min(12, len(tables.image_names))))
    _, compile_s, _ = timed(
        "compiled or loaded", lambda: search_for(few, costs, objective, grid=Grid(num_image_thresholds=2))
    )

    def ask(max_exits: int, limit: float | None) -> SearchResult:
        own = Grid(num_image_thresholds=size.image_thresholds, max_exits=max_exits)
        return search_for(tables, costs, objective, grid=own, time_limit=limit)

    two, two_s, two_cpu = timed("two exits", lambda: ask(2, None))
    three, three_s, three_cpu = timed("three exits", lambda: ask(3, options.time_limit))
    print(three.verdict)
    gap = float("inf") if three.gap_cost is None else three.gap_cost
    figures: list[tuple[str, float, str, float | None, bool]] = [
        ("compile_s", compile_s, "s", None, True),
        ("two_exits_s", two_s, "s", 60.0, two_s <= 60 and two.gap_cost == 0),
        ("two_exits_cpu_s", two_cpu, "s", None, True),
        ("three_exits_s", three_s, "s", 60.0, three_s <= 66),
        ("three_exits_cpu_s", three_cpu, "s", None, True),
        ("three_exits_gap", 100 * gap, "%", 1.0, gap <= 0.01),
    ]
    if options.front:
        front, front_s, front_cpu = timed(
            "front",
            lambda: pareto_front(tables, costs, grid=grid, time_limit=options.front, precision=options.precision / 100),
        )
        exact_drop = 100 * (front.baseline_miou - max(front.proof.exact_from, front.points[0].miou))
        figures += [
            ("front_s", front_s, "s", 300.0, front_s <= 330),
            ("front_cpu_s", front_cpu, "s", None, True),
            (
                "front_gap",
                100 * front.proof.gap_miou,
                "pp",
                options.precision,
                100 * front.proof.gap_miou <= options.precision,
            ),
            ("front_exact_up_to_a_drop_of", exact_drop, "pp", None, True),
        ]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    figures.append(("peak_memory", memory, "GiB", 4.0, memory < 4))
    begun = time.perf_counter()
    Problem(tables, CostMeasure.of(objective, costs), objective, grid)
    preparation_s = time.perf_counter() - begun
    figures.append(("preparation_s", preparation_s, "s", None, True))
    ours = three.instance.selected_on
    least_miou = ours["baseline_miou"] - options.drop / 100
    short = [search_for(tables, costs, objective, grid=grid, time_limit=2.0) for _ in range(9 if options.optuna else 0)]
    starts = [[(one.seconds, one.cost) for one in result.incumbents] for result in short]

    def as_good_after(cost: float) -> float:
        """Seconds, the median of the searches of two seconds, or what the one took that proved the optimum."""
        each = [next((seconds for seconds, found in start if found <= cost), np.inf) for start in starts]
        median = float(np.median(each))
        proved = next(one.seconds for one in three.incumbents if one.cost <= cost)
        return median if np.isfinite(median) else proved

    for sampler in options.samplers if options.optuna else ():
        theirs, seconds = optuna_best(tables, costs, grid, least_miou, sampler, options.optuna)
        print(f"{sampler}: {theirs:.6g} after {seconds:.1f} s, ours {ours['macs']:.6g}", flush=True)
        ratio = theirs / ours["macs"]
        figures.append((f"{sampler}_cost_over_ours", ratio, "x", 1.0, ratio >= 1 - 1e-12))
        own_s = as_good_after(max(theirs, ours["macs"]))
        figures += [
            (f"{sampler}_s", seconds, "s", None, True),
            (f"{sampler}_as_good_after", own_s, "s", None, True),
            (f"{sampler}_time_over_ours", seconds / own_s, "x", 100.0, seconds / own_s >= 100),
        ]
    for name, value, unit, goal, reached_goal in figures:
        print(f"{name} {value:.6g} {unit} {'-' if goal is None else f'{goal:g}'} {'ok' if reached_goal else 'short'}")
    if options.json:
        keys = ("name", "value", "unit", "goal", "ok")
        record = [dict(zip(keys, (*figure[:4], bool(figure[4])), strict=True)) for figure in figures]
        options.json.write_text(json.dumps({"size": size._asdict(), "figures": record}, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except MessError as error:
        raise SystemExit(str(error)) from None
