"""``messnet search``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from messnet.cli.app import AsJson, Out, Overrides, Target, app, examples, open_target, plain_name
from messnet.errors import MessError
from messnet.tables import CostName

__all__ = ["search"]


@app.command(
    help_epilogue=examples(
        "search runs/demo",
        "search runs/demo --name half --maximise miou --max-cost-ratio 0.5",
        "search runs/demo --name fast --minimise latency_ms --max-drop-pp 1 --costs runs/demo/costs/NAME.json",
        "search runs/demo --name cut --setting budgeted --max-drop-pp 2",
        "search runs/demo --name safe --max-drop-pp 1 --guarantee 0.05 0.1",
    )
)
def search(
    target: Target,
    *overrides: Overrides,
    name: Annotated[str | None, Parameter(help="Search once more, for this objective; the instance's name.")] = None,
    setting: Literal["budgeted", "input_dependent"] = "input_dependent",
    minimise: CostName | None = None,
    maximise: Literal["miou"] | None = None,
    cost: Annotated[CostName | None, Parameter(help="What is constrained when mIoU is maximised; macs.")] = None,
    max_drop_pp: float | None = None,
    min_miou: float | None = None,
    max_cost: float | None = None,
    max_cost_ratio: float | None = None,
    guarantee: Annotated[
        tuple[float, float] | None,
        Parameter(help="EPSILON DELTA: expected loss <= EPSILON, certified on the other images, wrong at most DELTA."),
    ] = None,
    costs: Annotated[
        Path | None,
        Parameter(help="A table of `profile --measure`; by default the run's profile.json, without latency."),
    ] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Choose exits, heads and thresholds; nothing is trained again.

    Without --name: the recipe's instances (most accurate at <= 1x, cheapest at each allowed drop). With --name: one
    instance for the objective given, beside the others in RUN/instances. With --guarantee its image thresholds then
    retreat until the promise holds: the share of correct pixels that an image loses, expected, against the final exit.
    """
    asked = (minimise, maximise, cost, max_drop_pp, min_miou, max_cost, max_cost_ratio, guarantee, costs)
    if name is None and (any(value is not None for value in asked) or setting != "input_dependent"):
        raise MessError("an objective of your own needs a name for its instance: add --name NAME")
    if name is not None:
        plain_name(name)
    opened = open_target(target, overrides, out)
    from messnet.deployment.loading import INSTANCES, load_instance
    from messnet.pipeline import run_stage, search_run
    from messnet.search import Guarantee, Objective

    if name is None:
        run_stage(opened, "search", again=True)
        front = json.loads((opened.directory.path / "front.json").read_text())
        names = [n for n in front["names"] if (opened.directory.path / INSTANCES / f"{n}.json").exists()]
        instances = [load_instance(opened.directory.path, n) for n in names]
        words = front["verdicts"] + front["skipped"]
    else:
        objective = Objective(
            minimise=minimise,
            maximise=maximise,
            cost=cost or "macs",
            max_drop_pp=max_drop_pp,
            min_miou=min_miou,
            max_cost=max_cost,
            max_cost_ratio=max_cost_ratio,
        )
        promise = Guarantee(epsilon=guarantee[0], delta=guarantee[1]) if guarantee else None
        result = search_run(opened, objective, name=name, setting=setting, costs=costs, guarantee=promise)
        instances, words = [result.instance], [result.verdict, result.certificate]
    if as_json:
        print(json.dumps([json.loads(instance.to_json()) for instance in instances], indent=1))
        return
    for instance in instances:
        print(f"{instance.name}: {instance.objective}; on the selection images {_figures(instance.selected_on)}")
        for choice in instance.exits:
            rule = (
                f"stop if {choice.image_threshold:.1%} of the pixels have confidence >= {choice.pixel_threshold:g}"
                if choice.image_threshold is not None
                else "last"
            )
            print(f"  exit {choice.exit_index}  {choice.head:28} {rule}")
    print("\n".join(words))


def _figures(selected_on: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in selected_on.items())
