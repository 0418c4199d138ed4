"""Is a limit kept on images that nobody has seen? Old procedure, tightened limits and simple alternatives, by splits.

    python benchmarks/bench_promise.py FOLDER [--group '(.*)_'] [--splits 50] [--heads N] [--exits 3]
        [--procedures NAME ...] [--json PATH]

FOLDER holds tables.npz and profile.json of a run; --group finds the group of an image (drive, patient, scene) in its
name, by the first group of a regular expression; without it the tables' own groups count. --heads leaves the first N
heads of each exit point. Each split deals the groups into two halves: the whole procedure sees the one, the other
judges it. Procedures, for each limit on the mIoU drop:

half        the two-halves protocol: searched on half of the images it sees (the other half would report)
asked       searched on all images it sees, with the limit as asked
one_head    the same with one head at each exit point, the best of its own on these images
margin      the same as asked, with a limit that is 1 pp tighter

The others search on all images it sees too, with the laxest limit of a list whose expected drop is within what was
asked. They differ in what they expect, in the list, and the last two in what is within:

tightened   cross-fitted in five folds, a list in steps of 0.1 pp, of which the next tighter limit has to hold as well:
            searching.cross_fitting, what messnet does
coarse      five folds and a list in steps of 0.25 pp and more, as for all that follow
folds_3     3 folds, folds_10 10, folds_20 20
one_head_5  five folds, with one head at each exit point as above
repeated    the mean of three deals into five folds (Burman 1989)
fine_5      five folds and a list in steps of 0.1 pp; fine_10 in 10, fine_repeated with three deals
optimism    the drop on the images searched on, plus its mean optimism in 10 bootstrap samples of groups (Efron 1983)
out_of_bag  each sample's search judged on the groups that are not in the sample, counts of all samples together
steady      five folds: the laxest up to which, from the tightest on, all expected drops are within what was asked
one_error   five folds: the expected drop and one standard error are within it (Breiman et al. 1984)

For each: the drop on the judging half (mean), the share of splits in which it is above the limit, work relative to the
model's. "covered" is the share of splits in which the judged drop is within 1.96 standard errors of the expected one,
those of both halves together. Ends with one line per figure: name value unit goal ok|short.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from messnet.errors import MessError
from messnet.records.arrays import IntArray
from messnet.records.costs import CostTable
from messnet.records.exit_tables import ExitTables
from messnet.records.groups import halves
from messnet.records.instance import Instance
from messnet.searching.cross_fitting import (
    FOLD_PRECISION,
    FURTHER_LEVELS,
    LEVELS,
    Folds,
    error_of_drop,
    model_itself,
    procedure,
)
from messnet.searching.grid import Grid, cost_of, route
from messnet.searching.measure import baseline_miou_of
from messnet.searching.objective import Objective
from messnet.searching.optima import Front, pareto_front

LIMITS_PP, MARGIN_PP, SLACK_PP = (0.1, 0.5, 1.0, 2.0), 1.0, 0.05
SEARCHED = ("half", "asked", "one_head", "margin")
FITTED = ("coarse", "folds_3", "folds_10", "folds_20", "repeated", "optimism", "out_of_bag", "one_head_5")
FINE = ("fine_5", "fine_10", "fine_repeated")
PROCEDURES = (*SEARCHED, *FITTED, *FINE, "steady", "one_error", "tightened")
NUM_SAMPLES, NUM_DEALS = 10, 3


def grouped(tables: ExitTables, pattern: str | None) -> ExitTables:
    if pattern is None:
        return tables
    matches = [re.match(pattern, name) for name in tables.image_names]
    return replace(tables, groups=tuple(match[1] if match else "" for match in matches))


def with_exits(tables: ExitTables, kept: list[int]) -> ExitTables:
    """The tables of some exits, by their positions."""
    return replace(
        tables,
        exits=tuple(tables.exits[position] for position in kept),
        intersection=tables.intersection[:, kept],
        predicted=tables.predicted[:, kept],
        image_confidence=tables.image_confidence[:, kept],
    )


def by_exit_point(tables: ExitTables) -> list[list[int]]:
    """The positions of each exit point's heads."""
    points: dict[int, list[int]] = {}
    for position, exit in enumerate(tables.exits):
        points.setdefault(exit.exit_index, []).append(position)
    return list(points.values())


def best_heads(tables: ExitTables) -> list[int]:
    """The position of each exit point's most accurate head."""
    images = len(tables.image_names)
    return [max(heads, key=lambda one: tables.miou(np.full(images, one))) for heads in by_exit_point(tables)]


def judge(instance: Instance, tables: ExitTables, costs: CostTable) -> tuple[float, float, float]:
    """Drop of mIoU (pp), work relative to the model's, and the drop's standard error, on tables."""
    routing = route(tables, instance)
    drop = 100 * (tables.miou(np.full(len(routing), tables.final)) - tables.miou(routing))
    work = float(cost_of(tables, costs, instance).mean()) / costs.total("macs")
    return drop, work, 100 * error_of_drop(tables, routing)


@dataclass
class Bootstrap:
    """Searches on samples of groups, drawn with replacement, and what they lose elsewhere."""

    tables: ExitTables
    front: Front
    """Of all images."""
    costs: CostTable
    grid: Grid
    seed: int

    @cached_property
    def samples(self) -> list[IntArray]:
        """The groups that are drawn."""
        draw, num_groups = np.random.default_rng(self.seed), int(self.tables.group_ids().max()) + 1
        return [draw.integers(num_groups, size=num_groups) for _ in range(NUM_SAMPLES)]

    @cached_property
    def left_out(self) -> list[IntArray]:
        """The images that are in none of a sample's groups."""
        return [np.flatnonzero(~np.isin(self.tables.group_ids(), drawn)) for drawn in self.samples]

    @cached_property
    def fronts(self) -> list[Front]:
        ids, fronts = self.tables.group_ids(), []
        for drawn in self.samples:
            images = np.concatenate([np.flatnonzero(ids == group) for group in drawn])
            fronts.append(
                pareto_front(self.tables.subset(images), self.costs, grid=self.grid, precision=FOLD_PRECISION)
            )
        return fronts

    def optimism(self, objective: Objective) -> float:
        """Drop (pp) on all images, corrected by how much better each sample's search is on its sample than on all."""
        gains = []
        for front in self.fronts:
            instance = procedure(front, objective).instance
            gains.append(drop_of(self.tables, instance) - drop_of(front.problem.tables, instance))
        return drop_of(self.tables, procedure(self.front, objective).instance) + float(np.mean(gains))

    def out_of_bag(self, objective: Objective) -> float:
        """Drop (pp) on the images that are not in each sample, all together."""
        images = np.concatenate(self.left_out)
        chosen = [procedure(front, objective).instance for front in self.fronts]
        others = zip(self.left_out, chosen, strict=True)
        routing = np.concatenate([route(self.tables.subset(some), instance) for some, instance in others])
        some = self.tables.subset(images)
        return 100 * (some.miou(np.full(len(images), some.final)) - some.miou(routing))


def drop_of(tables: ExitTables, instance: Instance) -> float:
    """Drop of mIoU against the final exit, percentage points."""
    return 100 * (tables.miou(np.full(len(tables.image_names), tables.final)) - tables.miou(route(tables, instance)))


def laxest(kept: Sequence[bool], tried: Sequence[Objective]) -> Objective | None:
    return next((one for one, is_kept in zip(tried, kept, strict=True) if is_kept), None)


def one_split(
    seen: ExitTables, judging: ExitTables, costs: CostTable, grid: Grid, seed: int, procedures: Sequence[str]
) -> dict[str, tuple[float, float, float]]:
    """Drop, work and error by procedure and limit; of the tightened one also what was expected."""
    few = with_exits(seen, best_heads(seen))
    all_heads, one_head = pareto_front(seen, costs, grid=grid), pareto_front(few, costs, grid=grid)
    half = pareto_front(seen.subset(seen.halves(seed)[0]), costs, grid=grid)
    folds = {
        number: Folds(tables=seen, costs=costs, grid=grid, num_folds=number, seed=seed) for number in (3, 5, 10, 20)
    }
    of_few = Folds(tables=few, costs=costs, grid=grid, seed=seed)
    deals = [folds[5]] + [
        Folds(tables=seen, costs=costs, grid=grid, seed=1000 * deal + seed) for deal in range(1, NUM_DEALS)
    ]
    samples = Bootstrap(seen, all_heads, costs, grid, seed)

    def fitted(some: Folds) -> Callable[[Objective], float]:
        return lambda one: 100 * (baseline_miou_of(seen) - some.routed(one).miou)

    def repeated(one: Objective) -> float:
        return float(np.mean([fitted(some)(one) for some in deals]))

    expects: dict[str, Callable[[Objective], float]] = {
        **{f"folds_{number}": fitted(folds[number]) for number in (3, 10, 20)},
        "coarse": fitted(folds[5]),
        "fine_5": fitted(folds[5]),
        "fine_10": fitted(folds[10]),
        "one_head_5": fitted(of_few),
        "repeated": repeated,
        "fine_repeated": repeated,
        "optimism": samples.optimism,
        "out_of_bag": samples.out_of_bag,
    }
    done = {}
    for limit in LIMITS_PP:
        asked = Objective(max_drop_pp=limit)
        tried = [Objective(max_drop_pp=limit - level.pp) for level in FURTHER_LEVELS]
        expected = [folds[5].judge(one) for one in tried]
        kept = [one.drop_pp <= limit + 1e-9 for one in expected]
        chosen: dict[str, Objective | None] = {
            "half": asked,
            "asked": asked,
            "one_head": asked,
            "margin": Objective(max_drop_pp=limit - MARGIN_PP),
            "steady": laxest([all(kept[place:]) for place in range(len(kept))], tried),
            "one_error": laxest([one.drop_pp + 100 * one.drop_error <= limit + 1e-9 for one in expected], tried),
        }
        for name in procedures:
            if name not in expects:
                continue
            expect = expects[name]
            some = [Objective(max_drop_pp=limit - level.pp) for level in LEVELS] if name in FINE else tried
            chosen[name] = next((one for one in some if expect(one) <= limit + 1e-9), None)
        found = folds[5].tighten(asked)
        chosen["tightened"] = found.searched
        for name in procedures:
            searched = chosen[name]
            front = {"half": half, "one_head": one_head, "one_head_5": one_head}.get(name, all_heads)
            point = procedure(front, searched) if searched else model_itself(front)
            done[f"{name}/{limit:g}"] = judge(point.instance, judging, costs)
        own = found.expected if found.searched else folds[5].expect(asked, folds[5].through_model(asked))
        done[f"expected/{limit:g}"] = own.drop_pp, own.cost / own.baseline_cost, 100 * own.drop_error
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--group", help="regular expression on image names; its first group is the image's group")
    parser.add_argument("--splits", type=int, default=50)
    parser.add_argument("--heads", type=int, help="heads at each exit point, by default all")
    parser.add_argument("--procedures", nargs="+", choices=PROCEDURES, default=PROCEDURES, help="by default all")
    parser.add_argument("--exits", type=int, default=3, help="exits of an instance")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    tables = grouped(ExitTables.from_bytes((options.folder / "tables.npz").read_bytes()), options.group)
    tables = with_exits(tables, sorted(one for heads in by_exit_point(tables) for one in heads[: options.heads]))
    costs = CostTable.from_json((options.folder / "profile.json").read_text())
    procedures = [*(one for one in options.procedures if one != "tightened"), "tightened"]
    ids, grid = tables.group_ids(), Grid(max_exits=options.exits)
    print(f"{len(tables.image_names)} images of {ids.max() + 1} groups, {len(tables.exits)} exits", flush=True)

    def split(seed: int) -> tuple[IntArray, IntArray]:
        return halves(ids, 1000 + seed)

    rows = []
    for seed in range(options.splits):
        first, second = split(seed)
        rows.append(one_split(tables.subset(first), tables.subset(second), costs, grid, seed, procedures))
    figures: list[tuple[str, float, str, float | None]] = []
    for limit in LIMITS_PP:
        for name in procedures:
            drops, work, errors = np.array([row[f"{name}/{limit:g}"] for row in rows]).T
            goal = limit + SLACK_PP if name == "tightened" else None
            figures += [
                (f"{name}/{limit:g}pp/drop", float(drops.mean()), "pp", goal),
                (f"{name}/{limit:g}pp/over", float((drops > limit).mean()), "share", None),
                (f"{name}/{limit:g}pp/less_work", float((1 / work).mean()), "x", None),
            ]
        expected, _, own_errors = np.array([row[f"expected/{limit:g}"] for row in rows]).T
        covered = np.abs(drops - expected) <= 1.96 * np.hypot(own_errors, errors) + 1e-9
        figures.append((f"tightened/{limit:g}pp/covered", float(covered.mean()), "share", None))
    records = []
    for name, value, unit, goal in figures:
        verdict = "ok" if goal is None or value <= goal else "short"
        print(f"{name} {value:.4g} {unit} {'-' if goal is None else f'<={goal:g}'} {verdict}")
        records.append({"name": name, "value": value, "unit": unit, "goal": goal, "ok": verdict == "ok"})
    if options.json:
        options.json.write_text(json.dumps({"folder": options.folder.name, "figures": records}, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except MessError as error:
        raise SystemExit(str(error)) from None
