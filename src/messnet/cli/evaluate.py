"""``messnet evaluate``."""

from __future__ import annotations

import json
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from messnet.cli.app import AsJson, Out, Overrides, Target, app, do_stage, examples, open_target
from messnet.errors import RecipeError
from messnet.records.shard import Shard

__all__ = ["evaluate"]


@app.command(
    help_epilogue=examples(
        "evaluate runs/demo",
        "evaluate runs/demo --json",
        "evaluate runs/demo --shard 2/8",
        "evaluate runs/demo --merge",
    )
)
def evaluate(
    target: Target,
    *overrides: Overrides,
    out: Out = None,
    shard: Annotated[
        str | None, Parameter(help="Only this part of the images, K/N, into RUN/tables.KofN.npz.", show_default=False)
    ] = None,
    merge: Annotated[bool, Parameter(negative="", help="Put the parts that shards left together.")] = False,
    as_json: AsJson = False,
) -> None:
    """Tabulate what every exit does to every validation image, and print each exit's mIoU."""
    if merge and shard:
        raise RecipeError("--merge puts together what is there: give it without --shard")
    # A shard has rows of some images only, of which no mIoU is told: that is for the tables that --merge makes.
    if shard:
        part = Shard.parse(shard)
        opened = open_target(target, overrides, out)
        from messnet.run.stages import evaluate_stage

        evaluate_stage(opened, part)
        print(f"evaluate: shard {shard} done; when all are, `messnet evaluate {opened.directory.path} --merge`")
        return
    if merge:
        opened = open_target(target, overrides, out)
        from messnet.run.stages import merge_tables

        merge_tables(opened)
        if not as_json:
            print("evaluate: merged")
    else:
        opened = do_stage("evaluate", target, overrides, out, quiet=as_json)
    from messnet.report.page import exit_rows, exits_table

    tables, costs = opened.tables(), opened.costs()
    if as_json:
        print(json.dumps(exit_rows(tables, costs), indent=1))
    else:
        Console().print(exits_table(tables, costs))
