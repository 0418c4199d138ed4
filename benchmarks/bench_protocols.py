"""Time of a recipe's whole search by both protocols, two halves and cross-fitted, in turns in one run.

    python benchmarks/bench_protocols.py RUN [--size paper|small] [--rounds 3] [--time-limit 480] [--json PATH]

RUN is a finished run, such as that of ``make demo``, searched in turns ``--rounds`` times; the generated tables of
``bench_search.py`` are searched once by each protocol, with the time limit. Kernels are compiled beforehand. Wall and
processor seconds are both told: on a busy machine the first says little. For each search: its instances with what is
expected of them on new images, and what was proved. Ends with one line per figure: name value unit goal ok|short.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np
from bench_search import SIZES, make_tables

from messnet.errors import MessError
from messnet.records.costs import CostTable
from messnet.records.exit_tables import ExitTables
from messnet.run.choosing import search_all
from messnet.searching.grid import Grid
from messnet.searching.options import Protocol, SearchOptions
from messnet.searching.words import proof

PROTOCOLS: tuple[Protocol, Protocol] = ("two_halves", "cross_fitted")


def timed(tables: ExitTables, costs: CostTable, options: SearchOptions) -> tuple[float, float]:
    """Wall and processor seconds of the search stage; prints what it found."""
    wall, cpu = time.perf_counter(), time.process_time()
    findings, instances = search_all(tables, costs, options)
    seconds = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{options.protocol}: {seconds[0]:.1f} s, {seconds[1]:.1f} CPU s; a front of {len(findings.judged)} points")
    expected = {one.name: one.expected for one in instances}
    for one in findings.found:
        judged = expected.get(one.name)
        error = judged and 1.96 * 100 * judged.drop_error
        says = (
            f"{-judged.drop_pp:+.2f} ± {error:.2f} pp at {judged.cost / judged.baseline_cost:.3f}x, " if judged else ""
        )
        print(f"  {one.name}: {says}{proof(one.proof) if one.proof else 'the model itself'}", flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of a finished run")
    parser.add_argument("--size", choices=SIZES, default="paper")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--time-limit", type=float, default=SearchOptions.time_limit)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    tables = ExitTables.from_bytes((options.run / "tables.npz").read_bytes())
    costs = CostTable.from_json((options.run / "profile.json").read_text())
    compiling = make_tables(SIZES["small"])
    search_all(*compiling, SearchOptions(grid=Grid(num_image_thresholds=8)))
    searches = [SearchOptions(protocol=protocol) for protocol in PROTOCOLS]
    rows = [[timed(tables, costs, one) for one in searches] for _ in range(options.rounds)]
    wall, cpu = np.median(rows, axis=0).T
    figures: list[tuple[str, float, str, float | None]] = [
        ("run/two_halves", wall[0], "s", None),
        ("run/two_halves/cpu", cpu[0], "CPU s", None),
        ("run/cross_fitted", wall[1], "s", None),
        ("run/cross_fitted/cpu", cpu[1], "CPU s", None),
        ("run/cpu_ratio", cpu[1] / cpu[0], "x", 2.0),
    ]
    generated = make_tables(SIZES[options.size])
    for protocol in PROTOCOLS:
        seconds, spent = timed(*generated, SearchOptions(protocol=protocol, time_limit=options.time_limit))
        figures += [
            (f"{options.size}/{protocol}", seconds, "s", 600.0),
            (f"{options.size}/{protocol}/cpu", spent, "CPU s", None),
        ]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    figures.append(("peak", peak, "GiB", None))
    records = []
    for name, value, unit, goal in figures:
        verdict = "ok" if goal is None or value <= goal else "short"
        print(f"{name} {value:.4g} {unit} {'-' if goal is None else f'<={goal:g}'} {verdict}")
        records.append({"name": name, "value": float(value), "unit": unit, "goal": goal, "ok": verdict == "ok"})
    if options.json:
        options.json.write_text(json.dumps({"folder": options.run.name, "figures": records}, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except MessError as error:
        raise SystemExit(str(error)) from None
