"""Does the sum of the parts tell the latency of the whole? Profiles of five models, and random instances against them.

    python benchmarks/bench_cost_model.py [--size 512 512] [--models NAME ...] [--device cuda] [--out FOLDER]

Every segment, head (4 per exit point), policy step and output is measured by itself; then 20 random instances run as
sessions do, and the relative error of the predicted latency is taken. One line per figure: ``name value unit goal
ok|short``. With --out the cost tables are written there, and what ``messnet profile`` prints of them.
"""

from __future__ import annotations

import argparse
import io
from dataclasses import replace
from pathlib import Path

import torch
from bench_conversion import CLASSES, FAMILIES, TIMED
from rich.console import Console

import messnet
from messnet.deployment.measurement import check_additivity
from messnet.report.costs import cost_notes, cost_table

HEADS = messnet.HeadSpace(
    channel_reduction=(2, 8), extra_blocks=(0, 1), rapid_dilation=(True,), segmentation_head=("fcn",)
)
MAX_MEDIAN_ERROR = 0.1


def measure(name: str, size: tuple[int, int], latency: messnet.LatencyOptions) -> tuple[messnet.CostTable, Console]:
    torch.manual_seed(0)
    net = messnet.convert(FAMILIES[name]().eval(), torch.zeros(1, 3, *size), num_exits=6)
    for i, point in enumerate(net.exit_points[:-1]):
        for config in HEADS.configs(point.channels):
            net.add_head(i, config)
    assert net.num_classes == CLASSES
    costs = messnet.profile(net.eval(), size, model=name, latency=latency)
    costs = replace(costs, additivity=check_additivity(net, costs, latency))
    console = Console(record=True, width=110, file=io.StringIO())
    console.print(cost_table(costs, [(p.module, f"{p.channels} at 1/{p.output_stride}") for p in net.exit_points]))
    for note in (*net.notes, *cost_notes(costs)):
        console.print(note, markup=False, highlight=False)
    return costs, console


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--models", nargs="+", choices=tuple(FAMILIES), default=TIMED, metavar="NAME")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=60, help="at most, for the parts and for the instances each")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    latency = messnet.LatencyOptions(device=options.device, max_seconds=options.seconds)
    print(f"# {latency.conditions}; {options.size[0]}x{options.size[1]}", flush=True)
    for name in options.models:
        costs, console = measure(name, (options.size[0], options.size[1]), latency)
        error, total = costs.additivity["median_error"], costs.total("latency_ms")
        verdict = "ok" if error <= MAX_MEDIAN_ERROR else "short"
        print(f"{name}_workload {costs.total_macs() / 1e9:.4g} GMACs - ok")
        print(f"{name}_latency {total:.4g} ms - ok")
        print(f"{name}_additive_error_median {100 * error:.3g} % <={100 * MAX_MEDIAN_ERROR:g} {verdict}")
        print(f"{name}_additive_error_worst {100 * costs.additivity['worst_error']:.3g} % - ok", flush=True)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            costs.to_json(options.out / f"{name}.json")
            (options.out / f"{name}.txt").write_text(console.export_text())


if __name__ == "__main__":
    main()
