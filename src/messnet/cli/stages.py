"""One verb per stage, and ``run``, which does them all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from messnet.cli.app import AsJson, Out, Overrides, Target, app, do_stage, examples, open_target, print_table, say

__all__ = ["distill", "evaluate", "pretrain", "report", "run"]


@app.command(
    help_epilogue=examples(
        "run configs/demo.yaml",
        "run configs/camvid_mobilenetv2.yaml --data.root ../shared/camvid --out runs/camvid",
        "run runs/camvid",
    )
)
def run(target: Target, *overrides: Overrides, out: Out = None, as_json: AsJson = False) -> None:
    """Do all of it, from where it stopped: profile, pretrain, distill, evaluate, search, report."""
    opened = open_target(target, overrides, out)
    from messnet.pipeline import STAGES, run_stage

    for stage in STAGES:
        say(stage, run_stage(opened, stage), as_json)
    print_table(opened.directory.path, as_json)


@app.command(
    help_epilogue=examples(
        "pretrain runs/demo", "pretrain configs/demo.yaml --pretrain.iterations 2000 --out runs/longer"
    )
)
def pretrain(target: Target, *overrides: Overrides, out: Out = None) -> None:
    """Stage 1: exit-aware pre-training of the backbone and the final head."""
    do_stage("pretrain", target, overrides, out)


@app.command(help_epilogue=examples("distill runs/demo"))
def distill(target: Target, *overrides: Overrides, out: Out = None) -> None:
    """Stage 2: train every head of the space on the frozen backbone, by positive filtering distillation."""
    do_stage("distill", target, overrides, out)


@app.command(help_epilogue=examples("evaluate runs/demo", "evaluate runs/demo --json"))
def evaluate(target: Target, *overrides: Overrides, out: Out = None, as_json: AsJson = False) -> None:
    """Tabulate what every exit does to every validation image, and print each exit's mIoU."""
    opened = do_stage("evaluate", target, overrides, out, quiet=as_json)
    from messnet.report import exit_rows, exits_table

    tables, costs = opened.tables(), opened.costs()
    if as_json:
        print(json.dumps(exit_rows(tables, costs), indent=1))
    else:
        Console().print(exits_table(tables, costs))


@app.command(help_epilogue=examples("report runs/demo", "report runs/demo --markdown table.md"))
def report(
    target: Target,
    *overrides: Overrides,
    out: Out = None,
    markdown: Annotated[Path | None, Parameter(help="Write the table as Markdown too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the chosen instances on the reported half of the images and write RUN/report.html."""
    opened = open_target(target, overrides, out)
    from messnet.pipeline import run_stage

    run_stage(opened, "report", again=True)
    if markdown is not None:
        from messnet.files import write_atomically
        from messnet.measurements import Measurements
        from messnet.report import measurements_markdown

        measurements = Measurements.from_json((opened.directory.path / "measurements.json").read_text())
        write_atomically(markdown, measurements_markdown(measurements))
    print_table(opened.directory.path, as_json)
