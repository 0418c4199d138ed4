"""Is a limit kept on images that nobody has seen? Old procedure, tightened limit and simple alternatives, by splits.

    python benchmarks/bench_promise.py FOLDER --group '(.*)_' [--splits 50] [--exits 2] [--json PATH]

FOLDER holds tables.npz and profile.json of a run; --group finds the group of an image (drive, patient, scene) in its
name, by the first group of a regular expression; without it every image is a group. Each split deals the groups into
two halves: the whole procedure sees the one, the other judges it. Procedures, for each limit on the mIoU drop:

half       today's default: searched on half of the images it sees (the other half would report)
asked      searched on all images it sees, with the limit as asked
margin     the same with a limit that is 1 pp tighter
tightened  searching.cross_fitting.tighten: five folds by group

For each: the drop on the judging half (mean), the share of splits in which it is above the limit, work relative to the
model's. "covered" is the share of splits in which the judged drop is within two standard errors of the expected one;
the judging half has an error of its own, so that less than 95 % is no fault yet. Ends with one line per figure: name
value unit goal ok|short.
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
from messnet.searching import Grid, Objective, cost_of, pareto_front, route
from messnet.searching.cross_fitting import procedure, tighten

LIMITS_PP, MARGIN_PP, SLACK_PP = (0.1, 0.5, 1.0, 2.0), 1.0, 0.05


def grouped(tables: ExitTables, pattern: str | None) -> ExitTables:
    if pattern is None:
        return tables
    matches = [re.match(pattern, name) for name in tables.image_names]
    return replace(tables, groups=tuple(match[1] if match else "" for match in matches))


def judge(instance: Instance, tables: ExitTables, costs: CostTable) -> tuple[float, float]:
    """Drop of mIoU (pp) and work relative to the model's, on tables."""
    final = tables.miou(np.full(len(tables.image_names), tables.final))
    drop = 100 * (final - tables.miou(route(tables, instance)))
    return drop, float(cost_of(tables, costs, instance).mean()) / costs.total("macs")


def one_split(
    seen: ExitTables, judging: ExitTables, costs: CostTable, grid: Grid, seed: int
) -> dict[str, tuple[float, float]]:
    """Drop and work by procedure and limit; of the tightened one also what was expected."""
    fronts = {
        "half": pareto_front(seen.subset(seen.halves(seed)[0]), costs, grid=grid),
        "asked": pareto_front(seen, costs, grid=grid),
    }
    done = {}
    for limit in LIMITS_PP:
        asked = Objective(max_drop_pp=limit)
        for name, front in fronts.items():
            done[f"{name}/{limit:g}"] = judge(procedure(front, asked).instance, judging, costs)
        tighter = procedure(fronts["asked"], Objective(max_drop_pp=limit - MARGIN_PP))
        done[f"margin/{limit:g}"] = judge(tighter.instance, judging, costs)
        found = tighten(seen, costs, asked, grid=grid, seed=seed)
        done[f"tightened/{limit:g}"] = judge(found.result.instance, judging, costs)
        done[f"expected/{limit:g}"] = found.expected.drop_pp, 100 * found.expected.miou_error
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--group", help="regular expression on image names; its first group is the image's group")
    parser.add_argument("--splits", type=int, default=50)
    parser.add_argument("--exits", type=int, default=2, help="exits of an instance")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    tables = grouped(ExitTables.from_bytes((options.folder / "tables.npz").read_bytes()), options.group)
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
        for name in ("half", "asked", "margin", "tightened"):
            drops, work = np.array([row[f"{name}/{limit:g}"] for row in rows]).T
            goal = limit + SLACK_PP if name == "tightened" else None
            figures += [
                (f"{name}/{limit:g}pp/drop", float(drops.mean()), "pp", goal),
                (f"{name}/{limit:g}pp/over", float((drops > limit).mean()), "share", None),
                (f"{name}/{limit:g}pp/less_work", float((1 / work).mean()), "x", None),
            ]
        expected, errors = np.array([row[f"expected/{limit:g}"] for row in rows]).T
        drops = np.array([row[f"tightened/{limit:g}"][0] for row in rows])
        covered = np.abs(drops - expected) <= 2 * errors + 1e-9
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
