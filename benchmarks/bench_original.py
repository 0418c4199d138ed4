"""What a run's network is worth beside the original one: the same model, trained alike without exits.

    messnet run RECIPE --out RUN
    messnet pretrain RECIPE --pretrain.scheme baseline --out ORIGINAL        # after `messnet profile`, likewise
    python benchmarks/bench_original.py RUN ORIGINAL

With ``--goes-on`` the original network's own head is trained further first, as stage 2 of RUN trains the exits': by
cross-entropy, on the frozen backbone, with the same options (kept beside ORIGINAL as gone_on.npz).

For each limit two answers: by the paper's protocol, selected and reported on the same images, and what to expect on new
images, by cross-fitting (docs/method.md). The first table counts against the original network, the second against the
run's own final exit; the best static cut stands beside both.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from bench_losses import Learner, train

from messnet import search
from messnet.costs.processor import keep_freed_memory
from messnet.errors import InfeasibleError
from messnet.evaluation import evaluate
from messnet.records.costs import CostTable
from messnet.records.exit_tables import ExitTables
from messnet.records.files import write_atomically
from messnet.run.choosing import search_all
from messnet.run.opening import open_run
from messnet.run.run import Run
from messnet.searching.options import SearchOptions
from messnet.training.options import DistillOptions

QUANTILE = 1.96
LIMITS = {"max-miou": {"maximise": "miou", "max_cost_ratio": 1.0}} | {
    f"drop-{drop:g}pp": {"minimise": "macs", "max_drop_pp": drop} for drop in (0.1, 1.0, 2.0)
}


def tables_of(original: Run, options: DistillOptions | None) -> ExitTables:
    """The tables of the network alone, made once and kept beside it; ``options``: how its head goes on first."""
    path = original.directory.path / ("final.npz" if options is None else "gone_on.npz")
    if not path.exists():
        net = original.pretrained()
        if options is not None:
            keep_freed_memory()
            net.to(memory_format=net.memory_format).requires_grad_(False)  # type: ignore[call-overload]
            head = net.head(net.exits[-1])
            train(net, original.dataset("train"), options, [Learner(net.exits[-1], head, options)])
        made = evaluate(net, original.dataset("val"), original.recipe.evaluate, original.device)
        write_atomically(path, made.to_bytes())
    return ExitTables.from_bytes(path.read_bytes())


def paper_row(tables: ExitTables, costs: CostTable, setting: str, limits: dict[str, object]) -> str:
    try:
        s = search(tables, costs, setting=setting, **limits).instance.selected_on  # type: ignore[arg-type]
    except InfeasibleError:
        return "none | "
    change, less = 100 * (s["miou"] - s["baseline_miou"]), s["baseline_macs"] / s["macs"]
    return f"{change:+.2f} pp | {less:.2f}x"


def rows(tables: ExitTables, costs: CostTable) -> Iterator[str]:
    options = SearchOptions(max_drops_pp=(0.1, 1.0, 2.0))
    tightened = {found.name: found.tightened for found in search_all(tables, costs, options)[0].found}
    yield "| | the paper's protocol | | best static cut | | on new images | |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for name, limits in LIMITS.items():
        one = tightened[name]
        honest = "none | "
        if one is not None and one.expected is not None:
            e = one.expected
            error = 100 * QUANTILE * e.drop_error
            honest = f"{100 * (e.miou - e.baseline_miou):+.2f} ± {error:.2f} pp | {e.baseline_cost / e.cost:.2f}x"
            honest += "" if one.searched is not None or name == "max-miou" else " (not kept: the model itself ships)"
        cells = [paper_row(tables, costs, setting, dict(limits)) for setting in ("input_dependent", "budgeted")]
        yield f"| {name} | {cells[0]} | {cells[1]} | {honest} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("original", type=Path)
    parser.add_argument("--goes-on", action="store_true", help="train the original's head as stage 2 did the exits'")
    given = parser.parse_args()
    run = open_run(given.run, ())
    if given.goes_on and not run.recipe.distill.iterations:
        parser.error(f"--goes-on: stage 2 of {given.run} trained nothing (distill.iterations 0): leave it out")
    original = tables_of(open_run(given.original, ()), run.recipe.distill if given.goes_on else None)
    tables, costs = run.tables(), run.costs()
    for name, one in (("original network", tables.with_delivered(original)), ("own final exit", tables)):
        counts = one.baseline.sum(0)
        union = counts[1] + one.labelled.sum(0) - counts[0]
        print(f"\nagainst the {name}, {100 * float(np.mean(counts[0] / union)):.2f} %:\n")
        print("\n".join(rows(one, costs)), flush=True)


if __name__ == "__main__":
    main()
