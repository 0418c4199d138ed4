"""Does the promise hold? ``search --guarantee`` on the tables of a real run, over 1,000 random draws for each epsilon.

    python benchmarks/bench_guarantee.py RUN [RUN ...] --cache FOLDER [--data-root FOLDER] [--draws 1000] [--json PATH]

The tables are those of bench_policies.py (FOLDER/*.npz; made if they are not there), policy top1+native. Two designs:

population  The run's images are the population, so that a step's expected loss is known exactly: its mean over them. 20
            random halves select an instance and its path; for each, calibration images are drawn independently, with
            replacement, from the whole population. That is the setting of the theorem: the share of draws whose
            certified step has an expected loss above epsilon must be <= delta.
thirds      What a user has: every draw deals the images into selection, calibration and held-out thirds. The mean loss
            of the held-out third is itself a draw, so it can exceed epsilon where the expected loss does not.

To be fast a design searches 20 times (thirds: 20 selections x 50 deals of the rest), two exits, 16 image thresholds.
Baselines on the same path and draws: "hb", certified by the Hoeffding-Bentkus bound, and the naive choice, the boldest
step whose mean loss on the calibration images is <= epsilon. The searched instance is the cheapest of the front, so
that the path leads through all losses: a promise that the boldest step keeps shows nothing. One line per figure:
``name value unit goal ok|short``.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from bench_policies import tabulate
from numpy.typing import NDArray
from scipy.special import rel_entr
from scipy.stats import binom

from messnet.records.costs import CostTable
from messnet.records.exit_tables import ExitTables
from messnet.searching.grid import Grid, cost_of, route
from messnet.searching.guarantee import certified_step, images_needed, loss_of, no_dearer, retreat_path
from messnet.searching.measure import CostMeasure
from messnet.searching.objective import Guarantee, Objective
from messnet.searching.optima import pareto_front

EPSILONS, DELTA, SELECTIONS = (0.005, 0.01, 0.02, 0.05, 0.1), 0.1, 20
Figure = tuple[str, float, str, str, float | None]


class Selection(NamedTuple):
    rest: NDArray
    """Positions of the images not selected on."""
    losses: NDArray
    """(steps, V) of every image at each step of the path, the final exit first, the searched instance last."""
    work: NDArray
    """(steps, V) workload, relative to the whole model."""


def path_of(tables: ExitTables, costs: CostTable, selection: NDArray) -> tuple[NDArray, NDArray]:
    """``losses`` and ``work`` of a Selection."""
    chosen = tables.subset(selection)
    front = pareto_front(chosen, costs, grid=Grid(policy="top1+native", max_exits=2, num_image_thresholds=16))
    best = front.points[0].instance
    path = no_dearer(retreat_path(best, chosen), CostMeasure.of(Objective(), costs), chosen)
    losses = np.array([loss_of(tables, route(tables, step)) for step in path])
    return losses, np.array([cost_of(tables, costs, step) for step in path]) / costs.total("macs")


def naive_step(losses: NDArray, epsilon: float) -> int:
    return int(np.flatnonzero(losses.mean(1) <= epsilon)[-1])


def hoeffding_bentkus_step(losses: NDArray, epsilon: float) -> int:
    """The boldest step of losses (steps, n) that the bound of Bates et al., 2021, theorem 7, certifies at DELTA."""
    num_images, total = losses.shape[1], losses.sum(1)
    mean = np.minimum(total / num_images, epsilon)
    hoeffding = np.exp(-num_images * (rel_entr(mean, epsilon) + rel_entr(1 - mean, 1 - epsilon)))
    values = np.minimum(hoeffding, np.e * binom.cdf(np.ceil(total), num_images, epsilon))
    return int(np.append(values[1:] > DELTA, True).argmax())  # the final exit needs no test


def select(tables: ExitTables, costs: CostTable, share: int) -> list[Selection]:
    """SELECTIONS times: a random 1 / ``share`` of the images to select on, the rest, the path."""
    selections = []
    for seed in range(SELECTIONS):
        order = np.random.default_rng(seed).permutation(len(tables.image_names))
        chosen, rest = np.split(order, [len(order) // share])
        selections.append(Selection(rest, *path_of(tables, costs, np.sort(chosen))))
    return selections


def simulate(selections: list[Selection], epsilon: float, draws: int, num_calibration: int | None) -> dict[str, float]:
    """Means over the draws; ``num_calibration`` None: the design of thirds."""
    guarantee, draw, rows = Guarantee(epsilon=epsilon, delta=DELTA), np.random.default_rng(SELECTIONS), []
    for rest, losses, work in selections:
        num_images = losses.shape[1]
        for _ in range(draws // len(selections)):
            if num_calibration:
                calibration, judged = draw.integers(0, num_images, num_calibration), np.arange(num_images)
            else:
                calibration, judged = np.array_split(draw.permutation(rest), 2)
            safe, _ = certified_step(losses[:, calibration], guarantee)
            naive, bounded = (step(losses[:, calibration], epsilon) for step in (naive_step, hoeffding_bentkus_step))
            risk, cost = losses[:, judged].mean(1), work[:, judged].mean(1)
            steps = {"": safe, "hb_": bounded, "naive_": naive, "searched_": -1}
            rows.append([risk[step] > epsilon for step in steps.values()])
            rows[-1] += [risk[step] for step in steps.values()]
            rows[-1] += [1 - cost[step] for step in steps.values()]
            rows[-1] += [safe == 0, bounded == 0]
    names = [f"{who}{what}" for what in ("violated", "loss", "work_saved") for who in steps] + [
        "fell_back",
        "hb_fell_back",
    ]
    return dict(zip(names, np.array(rows, float).mean(0).tolist(), strict=True))


def figures_of(run: str, tables: ExitTables, costs: CostTable, draws: int) -> list[Figure]:
    figures: list[Figure] = []
    designs: list[tuple[str, int | None]] = [("thirds", None), *((f"population_n{n}", n) for n in (100, 300, 1000))]
    halves, thirds = select(tables, costs, 2), select(tables, costs, 3)
    for design, num_calibration in designs:
        count = num_calibration or len(tables.image_names) // 3
        print(f"# {run}, {design}: {count} calibration images")
        for epsilon in EPSILONS:
            start = time.perf_counter()
            means = simulate(halves if num_calibration else thirds, epsilon, draws, num_calibration)
            where = f"{run}/{design}/epsilon_{epsilon:g}"
            # Of thirds the held-out mean is noisy: only the exact risk is held to the promise.
            goal = DELTA if num_calibration else None
            figures.append((f"{where}/violated", means["violated"], "share", "<=", goal))
            figures += [(f"{where}/{name}", means[name], "share", "", None) for name in means if name != "violated"]
            print(
                f"epsilon {epsilon:<5g} violated {means['violated']:6.1%} (hb {means['hb_violated']:.1%}, naive "
                f"{means['naive_violated']:.1%})   loss {means['loss']:.4f} (hb {means['hb_loss']:.4f}, naive "
                f"{means['naive_loss']:.4f}, searched {means['searched_loss']:.4f})   work saved "
                f"{means['work_saved']:6.1%} (hb {means['hb_work_saved']:.1%}, naive {means['naive_work_saved']:.1%}, "
                f"searched {means['searched_work_saved']:.1%})   final exit {means['fell_back']:.1%} (hb "
                f"{means['hb_fell_back']:.1%})   {time.perf_counter() - start:.1f} s",
                flush=True,
            )
    for epsilon in EPSILONS:
        guarantee = Guarantee(epsilon=epsilon, delta=DELTA)
        for part in (0, 0.5, 0.8):
            needed = images_needed(np.full(1, part * epsilon), guarantee)
            name = f"images_needed/epsilon_{epsilon:g}/loss_{part:g}_epsilon"
            figures.append((name, float("inf") if needed is None else needed, "images", "", None))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--cache", type=Path, required=True, help="folder of the tables")
    parser.add_argument("--data-root", help="where the images of a run on files are now")
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    figures: dict[str, Figure] = {}
    for run in options.runs:
        tables, costs = tabulate(run, options.cache, options.data_root)
        figures |= {figure[0]: figure for figure in figures_of(run.name, tables, costs, options.draws)}
    rows = []
    for name, value, unit, sense, goal in figures.values():
        verdict = "ok" if goal is None or value <= goal else "short"
        print(f"{name} {value:.4g} {unit} {'-' if goal is None else f'{sense}{goal:g}'} {verdict}")
        rows.append({"name": name, "value": value, "unit": unit, "goal": goal, "verdict": verdict})
    if options.json:
        device = f"{platform.machine()} 1 thread, NumPy {np.__version__}"
        options.json.write_text(json.dumps({"device": device, "figures": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
