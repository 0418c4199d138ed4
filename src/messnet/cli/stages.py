"""One verb per stage, and ``run``, which does them all."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from messnet.cli.app import (
    AsJson,
    Out,
    Overrides,
    Target,
    app,
    examples,
    open_target,
    print_deployed,
    print_table,
    quieten,
    recipe_of,
    say,
    show,
)
from messnet.errors import RecipeError, RunError
from messnet.records.files import write_atomically
from messnet.records.shard import Shard

if TYPE_CHECKING:
    from messnet.records.run_directory import RunDirectory
    from messnet.run.run import Run


@app.command(
    help_epilogue=examples(
        "run configs/demo.yaml",
        "run configs/camvid_mobilenetv2.yaml --data.root ../shared/camvid --out runs/camvid",
        "run runs/camvid",
    )
)
def run(target: Target, *overrides: Overrides, out: Out = None, as_json: AsJson = False) -> None:
    """Do all stages, or those that are left of a run that was stopped: profile, pretrain, distill, evaluate, search,
    deploy (where the recipe has deploy.precisions) and report."""
    opened = open_target(target, overrides, out)
    from messnet.run.stages import STAGES, expect_seeing, forecast, run_stage

    with opened.alone():
        for stage in (name for name, one in STAGES.items() if one.is_wanted(opened.recipe)):
            # Once the model is converted, and before hours go into it.
            if stage == "pretrain" and (line := forecast(opened)):
                print(f"messnet: {line}", file=sys.stderr)
            if stage == "distill":
                expect_seeing(opened)
            say(stage, run_stage(opened, stage), as_json)
    print_table(opened.directory, as_json)


@app.command(
    help_epilogue=examples(
        "pretrain runs/demo", "pretrain configs/demo.yaml --pretrain.iterations 2000 --out runs/longer"
    )
)
def pretrain(target: Target, *overrides: Overrides, out: Out = None) -> None:
    """Stage 1: train the backbone and the final head, by default with the early exits in turn.

    Under torchrun, or with --compute.devices, the processes share every batch.
    """
    _train_stage("pretrain", _open_together(target, overrides, out))


@app.command(
    help_epilogue=examples(
        "distill runs/demo",
        "distill runs/demo --shard 2/8",
        "distill runs/demo --merge",
        "distill configs/other_loss.yaml --pretrained runs/demo",
    )
)
def distill(
    target: Target,
    *overrides: Overrides,
    out: Out = None,
    shard: str | None = None,
    merge: Annotated[bool, Parameter(negative="")] = False,
    pretrained: Path | None = None,
) -> None:
    """Stage 2: train every head of the space on the frozen backbone, by default by positive filtering distillation.

    Under torchrun, or with --compute.devices, the processes divide the heads.

    Args:
        shard: Train this part of the heads, K/N, into RUN/stage2.KofN.safetensors.
        merge: Put the parts that shards left together.
        pretrained: Take stage 1 from this run; data, model and pretrain sections must agree.
    """
    if merge and (shard or pretrained):
        raise RecipeError("--merge puts together what is there: give it without --shard and --pretrained")
    part = Shard.parse(shard) if shard else None  # a slip in it is told before the run is opened
    opened = _open_together(target, overrides, out, pretrained)
    from messnet.run.stages import distill_stage, merge_stage

    if merge:
        merge_stage(opened)
        print("distill: merged")
    elif part is not None:
        distill_stage(opened, part)
        print(f"distill: shard {shard} done; when all are, `messnet distill {opened.directory.path} --merge`")
    else:
        _train_stage("distill", opened)


def _open_together(target: Path, overrides: Sequence[str], out: Path | None, pretrained: Path | None = None) -> Run:
    """``open_target``; of processes that train together the first goes first, for it may write the run directory."""
    quieten()
    compute = recipe_of(target, overrides).compute
    with compute.launch().rank_zero_first() if compute.is_parallel else nullcontext():
        opened = open_target(target, overrides, out)
        if pretrained is not None:
            from messnet.run.opening import adopt_pretrained

            adopt_pretrained(opened, pretrained)
    return opened


def _train_stage(stage: str, opened: Run) -> None:
    from messnet.run.stages import STAGES

    # The first process does what a stage does besides training (records, checks, the file of weights); the others only
    # take their share of the iterations, and must take part in all of them or everyone waits for ever.
    if opened.recipe.compute.is_parallel and opened.recipe.compute.launch().global_rank > 0:
        STAGES[stage].follow(opened)
    else:
        say(stage, STAGES[stage].ensure(opened), False)


@app.command(help_epilogue=examples("deploy runs/demo", "deploy runs/camvid --deploy.precisions f32 int8"))
def deploy(target: Target, *overrides: Overrides, out: Out = None, as_json: AsJson = False) -> None:
    """Find the fastest instance in each precision of a runtime (deploy.precisions), measure all of them beside the
    model, and write the fastest as a bundle: RUN/deployed.mess."""
    opened = open_target(target, overrides, out)
    from messnet.run.stages import run_stage

    if not opened.recipe.deploy.precisions:
        raise RecipeError("the recipe names no precision to deploy in: add --deploy.precisions f32 int8")
    run_stage(opened, "deploy", again=True)
    print_deployed(opened.directory, as_json)


@app.command(
    help_epilogue=examples(
        "report runs/demo", "report runs/demo --markdown table.md", "report runs/demo runs/camvid --out comparison.html"
    )
)
def report(
    target: Target,
    *overrides: Overrides,
    out: Annotated[Path | None, Parameter(help="Run directory of a recipe, or the page that compares runs.")] = None,
    markdown: Annotated[Path | None, Parameter(help="Write the table as Markdown too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the chosen instances on the reported images and write RUN/report.html. Where torch is not installed the
    page is drawn from what was measured before. Of two or more runs: compare their reports in a table and on one page,
    by default comparison.html; nothing is measured again."""
    others = [Path(word) for word in takewhile(lambda word: not word.startswith("--"), overrides)]
    if others:
        if len(others) < len(overrides) or markdown is not None:
            raise RecipeError("runs are compared as they are: recipe values and --markdown are for a report of one")
        _compare([target, *others], out or Path("comparison.html"), as_json)
        return
    directory = _drawn_again(target) if not overrides and out is None and find_spec("torch") is None else None
    if directory is None:
        opened = open_target(target, overrides, out)
        from messnet.run.stages import run_stage

        run_stage(opened, "report", again=True)
        directory = opened.directory
    if markdown is not None:
        from messnet.report.page import measurements_markdown, not_in_table
        from messnet.searching.findings import Findings

        measurements = directory.measurements.read()
        missing = not_in_table(measurements, Findings.from_json(directory.front.read()))
        write_atomically(markdown, measurements_markdown(measurements, missing, directory.read_deployed()))
    print_table(directory, as_json)


def _drawn_again(run: Path) -> RunDirectory | None:
    """A run whose page is drawn from what its report has measured; None where there is no run. Raises RunError where
    nothing was measured yet."""
    from messnet.records.run_directory import RunDirectory

    directory = RunDirectory(run)
    if not directory.exists:
        return None
    if not directory.measurements.exists:
        raise RunError(
            f"nothing was measured in {run} yet, and measuring needs torch, which is not installed: "
            f"pip install 'messnet[train]'"
        )
    print(f"messnet: torch is not installed: the page shows what {run} has measured before", file=sys.stderr)
    from messnet.report.page import read_inputs, render_report

    directory.report.write(render_report(read_inputs(directory)))
    return directory


def _compare(paths: Sequence[Path], page: Path, as_json: bool) -> None:
    from messnet.report.classes import class_terminal_table
    from messnet.report.comparison import (
        comparison_classes,
        comparison_table,
        figures,
        read_compared,
        render_comparison,
    )

    if page.is_dir():
        raise RecipeError(f"--out {page} is a folder: name the page, such as comparison.html")
    runs = read_compared(paths)
    write_atomically(page, render_comparison(runs))
    if as_json:
        print(json.dumps([figures(run) for run in runs], indent=1))
        return
    show(comparison_table(runs), class_terminal_table(comparison_classes(runs)))
    print(f"comparison: {page}")
