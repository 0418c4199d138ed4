"""Is a limit kept on images that nobody has seen? Old procedure, tightened limits and simple alternatives, by splits.

    python benchmarks/bench_promise.py FOLDER [--group '(.*)_'] [--splits 50] [--heads N] [--exits 3] [--json PATH]

FOLDER holds tables.npz and profile.json of a run; --group finds the group of an image (drive, patient, scene) in its
name, by the first group of a regular expression; without it the tables' own groups count. --heads leaves the first N
heads of each exit point. Each split deals the groups into two halves: the whole procedure sees the one, the other
judges it. Procedures, for each limit on the mIoU drop:

half       the two-halves protocol: searched on half of the images it sees (the other half would report)
asked      searched on all images it sees, with the limit as asked
one_head   the same with one head at each exit point
margin     the same with a limit that is 1 pp tighter
one_error  cross-fitted: the laxest limit whose expected drop and its standard error are within what was asked
steady     cross-fitted: the laxest up to which, from the tightest on, all expected drops are within what was asked
tightened  searching.cross_fitting, what messnet does: the laxest limit whose expected drop is within what was asked

For each: the drop on the judging half (mean), the share of splits in which it is above the limit, work relative to the
model's. "covered" is the share of splits in which the judged drop is within 1.96 standard errors of the expected one,
those of both halves together. Ends with one line per figure: name value unit goal ok|short.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from messnet.errors import MessError
from messnet.records.arrays import IntArray
from messnet.records.costs import CostTable
from messnet.records.exit_tables import ExitTables
from messnet.records.groups import halves
from messnet.records.instance import Instance
from messnet.searching.cross_fitting import LEVELS, Folds, error_of_drop, model_itself, procedure
from messnet.searching.grid import Grid, cost_of, route
from messnet.searching.objective import Objective
from messnet.searching.optima import pareto_front

LIMITS_PP, MARGIN_PP, SLACK_PP = (0.1, 0.5, 1.0, 2.0), 1.0, 0.05
PROCEDURES = ("half", "asked", "one_head", "margin", "one_error", "steady", "tightened")


def grouped(tables: ExitTables, pattern: str | None) -> ExitTables:
    if pattern is None:
        return tables
    matches = [re.match(pattern, name) for name in tables.image_names]
    return replace(tables, groups=tuple(match[1] if match else "" for match in matches))


def with_heads(tables: ExitTables, num_heads: int | None) -> ExitTables:
    """The tables of the first heads of each exit point."""
    seen: dict[int, int] = {}
    kept = []
    for position, exit in enumerate(tables.exits):
        seen[exit.exit_index] = seen.get(exit.exit_index, 0) + 1
        if num_heads is None or seen[exit.exit_index] <= num_heads:
            kept.append(position)
    return replace(
        tables,
        exits=tuple(tables.exits[position] for position in kept),
        intersection=tables.intersection[:, kept],
        predicted=tables.predicted[:, kept],
        image_confidence=tables.image_confidence[:, kept],
    )


def judge(instance: Instance, tables: ExitTables, costs: CostTable) -> tuple[float, float, float]:
    """Drop of mIoU (pp), work relative to the model's, and the drop's standard error, on tables."""
    routing = route(tables, instance)
    drop = 100 * (tables.miou(np.full(len(routing), tables.final)) - tables.miou(routing))
    work = float(cost_of(tables, costs, instance).mean()) / costs.total("macs")
    return drop, work, 100 * error_of_drop(tables, routing)


def one_split(
    seen: ExitTables, judging: ExitTables, costs: CostTable, grid: Grid, seed: int
) -> dict[str, tuple[float, float, float]]:
    """Drop, work and error by procedure and limit; of the tightened one also what was expected."""
    fronts = {
        "half": pareto_front(seen.subset(seen.halves(seed)[0]), costs, grid=grid),
        "asked": pareto_front(seen, costs, grid=grid),
        "one_head": pareto_front(with_heads(seen, 1), costs, grid=grid),
    }
    folds = Folds(tables=seen, costs=costs, grid=grid, seed=seed)
    done = {}
    for limit in LIMITS_PP:
        asked = Objective(max_drop_pp=limit)
        for name, front in fronts.items():
            done[f"{name}/{limit:g}"] = judge(procedure(front, asked).instance, judging, costs)
        front = fronts["asked"]
        tighter = procedure(front, Objective(max_drop_pp=limit - MARGIN_PP))
        done[f"margin/{limit:g}"] = judge(tighter.instance, judging, costs)
        tried = [Objective(max_drop_pp=limit - level.pp) for level in LEVELS]
        expected = [folds.judge(one) for one in tried]
        with_error = [one.drop_pp + 100 * one.drop_error <= limit + 1e-9 for one in expected]
        kept = [one.drop_pp <= limit + 1e-9 for one in expected]
        steady = [all(kept[place:]) for place in range(len(kept))]
        for name, chosen in (("one_error", with_error), ("steady", steady)):
            place = chosen.index(True) if True in chosen else None
            point = model_itself(front) if place is None else procedure(front, tried[place])
            done[f"{name}/{limit:g}"] = judge(point.instance, judging, costs)
        found = folds.tighten(asked)
        point = procedure(front, found.searched) if found.searched else model_itself(front)
        done[f"tightened/{limit:g}"] = judge(point.instance, judging, costs)
        own = found.expected if found.searched else folds.expect(asked, folds.through_model(asked))
        done[f"expected/{limit:g}"] = own.drop_pp, own.cost / own.baseline_cost, 100 * own.drop_error
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--group", help="regular expression on image names; its first group is the image's group")
    parser.add_argument("--splits", type=int, default=50)
    parser.add_argument("--heads", type=int, help="heads at each exit point, by default all")
    parser.add_argument("--exits", type=int, default=3, help="exits of an instance")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    tables = grouped(ExitTables.from_bytes((options.folder / "tables.npz").read_bytes()), options.group)
    tables = with_heads(tables, options.heads)
    costs = CostTable.from_json((options.folder / "profile.json").read_text())
    ids, grid = tables.group_ids(), Grid(max_exits=options.exits)
    print(f"{len(tables.image_names)} images of {ids.max() + 1} groups, {len(tables.exits)} exits", flush=True)

    def split(seed: int) -> tuple[IntArray, IntArray]:
        return halves(ids, 1000 + seed)

    rows = []
    for seed in range(options.splits):
        first, second = split(seed)
        rows.append(one_split(tables.subset(first), tables.subset(second), costs, grid, seed))
    figures: list[tuple[str, float, str, float | None]] = []
    for limit in LIMITS_PP:
        for name in PROCEDURES:
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
