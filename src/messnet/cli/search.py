"""``messnet search``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from cyclopts import Parameter

from messnet.cli.app import AsJson, Out, Overrides, Target, app, examples, open_target, plain_name
from messnet.errors import MessError
from messnet.records.files import write_atomically
from messnet.records.names import CostName, Setting

if TYPE_CHECKING:
    from messnet.records.instance import Instance
    from messnet.searching import AnytimeObjective, Objective

__all__ = ["search"]


@app.command(
    help_epilogue=examples(
        "search runs/demo",
        "search runs/demo --name half --maximise miou --max-cost-ratio 0.5",
        "search runs/demo --name fast --minimise latency_ms --max-drop-pp 1 --costs runs/demo/costs/NAME.json",
        "search runs/demo --name small --max-drop-pp 1 --limit parameters<=3e6 --class-floor car=0.6",
        "search runs/demo --name cut --setting budgeted --max-drop-pp 2",
        "search runs/demo --name soon --setting anytime --anytime area --max-first-ratio 0.4",
        "search runs/demo --name safe --max-drop-pp 1 --guarantee 0.05 0.1",
    )
)
def search(
    target: Target,
    *overrides: Overrides,
    name: Annotated[str | None, Parameter(help="Search once more, for this objective; the instance's name.")] = None,
    setting: Setting = "input_dependent",
    minimise: CostName | None = None,
    maximise: Literal["miou"] | None = None,
    cost: Annotated[
        CostName | None,
        Parameter(help="What is constrained when mIoU is maximised, or an anytime result's cost; macs."),
    ] = None,
    statistic: Annotated[
        Literal["mean", "worst", "p95"] | None, Parameter(help="Of that cost over the images; mean.")
    ] = None,
    max_drop_pp: float | None = None,
    min_miou: float | None = None,
    max_cost: float | None = None,
    max_cost_ratio: float | None = None,
    limit: Annotated[
        list[str] | None,
        Parameter(help="A further cost: parameters<=3e6, latency_ms.p95<=40, macs<=0.5x (the model's).", negative=()),
    ] = None,
    class_floor: Annotated[
        list[str] | None, Parameter(help="Least IoU of a class, such as car=0.6; may be repeated.", negative=())
    ] = None,
    anytime: Annotated[
        Literal["area", "first_cost", "overhead", "miou"] | None,
        Parameter(help="What --setting anytime looks for: largest area under the curve, cheapest first result, ..."),
    ] = None,
    max_first_ratio: Annotated[
        float | None, Parameter(help="Anytime: cost of the first result, relative to the model.")
    ] = None,
    max_overhead: Annotated[
        float | None, Parameter(help="Anytime: cost of all exits over the last alone, less 1.")
    ] = None,
    guarantee: Annotated[
        tuple[float, float] | None,
        Parameter(help="EPSILON DELTA: expected loss <= EPSILON, certified on the other images, wrong at most DELTA."),
    ] = None,
    costs: Annotated[
        list[Path] | None,
        Parameter(
            help="Tables of `profile --measure`; several: the least bad over all. By default the run's profile.json, "
            "without latency.",
            negative=(),
        ),
    ] = None,
    time_limit: Annotated[
        float | None, Parameter(help="Seconds; then, or at Ctrl-C, the best so far with its proved gap.")
    ] = None,
    plot: Annotated[Path | None, Parameter(help="Draw the front: FILE.png.")] = None,
    front: Annotated[Path | None, Parameter(help="Write the front of this objective: FILE.json; with --name.")] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Choose exits, heads and thresholds; nothing is trained again.

    Without --name: the recipe's instances (most accurate at <= 1x, cheapest at each allowed drop). With --name: one
    instance for the objective given, beside the others in RUN/instances. With --guarantee its image thresholds then
    retreat until the promise holds: the share of correct pixels that an image loses, expected, against the final exit.
    """
    own: dict[str, Any] = {"minimise": minimise, "maximise": maximise}
    own |= {"max_cost": max_cost, "max_cost_ratio": max_cost_ratio}
    own |= {"statistic": statistic, "limit": limit, "class_floor": class_floor, "guarantee": guarantee}
    only_anytime = {"anytime": anytime, "max_first_ratio": max_first_ratio, "max_overhead": max_overhead}
    shared = {"max_drop_pp": max_drop_pp, "min_miou": min_miou, "cost": cost}
    asked = [*own.values(), *only_anytime.values(), *shared.values(), costs, time_limit, front]
    if name is None and (any(value is not None for value in asked) or setting != "input_dependent"):
        raise MessError("an objective of your own needs a name for its instance: add --name NAME")
    _expect_belonging(setting, own, only_anytime)
    if name is not None:
        plain_name(name)
    for path in filter(None, (plot, front)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if plot is not None:
        _expect_picture(plot)
    opened = open_target(target, overrides, out)
    from messnet.run.choosing import search_run
    from messnet.run.stages import run_stage
    from messnet.searching import Guarantee

    if name is None:
        run_stage(opened, "search", again=True)
        found = opened.directory.front.read()
        files = [opened.directory.instance(name) for name in found.names]
        instances = [file.read() for file in files if file.exists]
        words, fronts, unit = found.verdicts + found.skipped, found.fronts, "macs"
    else:
        objective = _objective(setting, {**own, **shared}, {**only_anytime, **shared})
        promise = Guarantee(epsilon=guarantee[0], delta=guarantee[1]) if guarantee else None
        result = search_run(
            opened,
            objective,
            name=name,
            setting="budgeted" if setting == "budgeted" else "input_dependent",
            costs=costs or (),
            guarantee=promise,
            time_limit=time_limit,
        )
        instances, words = [result.instance], [result.verdict, result.certificate]
        words += [
            f"runner-up: {_exits(one.instance)}, {_point(one.miou, one.cost, result.instance.selected_on)}"
            for one in result.runners_up
        ]
        fronts, unit = {setting: [(point.cost, point.miou) for point in result.front]}, _unit(objective, costs)
        if front is not None:
            points = [{"cost": p.cost, "miou": p.miou, "exits": asdict(p.instance)["exits"]} for p in result.front]
            write_atomically(front, json.dumps({"cost": unit, "points": points}, indent=1) + "\n")
    if plot is not None:
        _draw(plot, fronts, instances, unit)
    if as_json:
        print(json.dumps([json.loads(instance.to_json()) for instance in instances], indent=1))
        return
    for instance in instances:
        _describe(instance)
    print("\n".join(words))


def _expect_belonging(setting: Setting, own: dict[str, Any], only_anytime: dict[str, Any]) -> None:
    foreign = own if setting == "anytime" else only_anytime
    given = [key for key, value in foreign.items() if value is not None]
    if given:
        option = given[0].replace("_", "-")
        raise MessError(f"--{option} has no meaning with --setting {setting}; leave it out")


def _objective(setting: Setting, own: dict[str, Any], anytime: dict[str, Any]) -> Objective | AnytimeObjective:
    from messnet.searching import AnytimeObjective, Limit, Objective

    if setting == "anytime":
        given = {key: value for key, value in anytime.items() if value is not None}
        return AnytimeObjective(goal=given.pop("anytime", "area"), **given)
    given = {key: value for key, value in own.items() if value is not None and key != "guarantee"}
    limits = tuple(Limit.parse(text) for text in given.pop("limit", []))
    floors = tuple(_floor(text) for text in given.pop("class_floor", []))
    return Objective(limits_on=limits, min_class_iou=floors, **given)


def _floor(text: str) -> tuple[str, float]:
    name, _, value = text.rpartition("=")
    try:
        return name.strip(), float(value)
    except ValueError:
        raise MessError(f"cannot read the class floor {text!r}: expected such as car=0.6") from None


def _unit(objective: Objective | AnytimeObjective, costs: list[Path] | None) -> str:
    name = getattr(objective, "cost_name", None) or objective.cost
    return f"{name}, relative to the model, worst device" if costs and len(costs) > 1 else str(name)


def _exits(instance: Instance) -> str:
    return " > ".join(f"{choice.exit_index}:{choice.head}" for choice in instance.exits)


def _describe(instance: Instance) -> None:
    print(f"{instance.name}: {instance.objective}; {_figures(instance.selected_on)}")
    for choice in instance.exits:
        rule = (
            f"stop if {choice.image_threshold:.1%} of the pixels have confidence >= {choice.pixel_threshold:g}"
            if choice.image_threshold is not None
            else ("a result" if instance.setting == "anytime" else "last")
        )
        print(f"  exit {choice.exit_index}  {choice.head:28} {rule}")


def _figures(measured: dict[str, float]) -> str:
    cost = _cost_of(measured)
    text = f"on {measured['images']:.0f} selection images {_point(measured['miou'], measured[cost], measured)}"
    if whole := measured.get(f"baseline_{cost}"):
        model = _point(measured["baseline_miou"], whole, measured)
        text += f", {whole / measured[cost]:.2f}x less than the model's {model}"
    if "area" in measured:
        first = _point(measured["first_miou"], measured[f"first_{cost}"], measured)
        text += f"; the first result {first}, overhead {measured['overhead']:.1%}, area {measured['area']:.4f}"
    if "loss" in measured:
        text += f"; {measured['loss']:.2%} of an image's pixels lost"
    return text


def _point(miou: float, cost: float, measured: dict[str, float]) -> str:
    from messnet.searching.words import amount

    name = _cost_of(measured)
    return f"{100 * miou:.2f} % mIoU at {amount(name, cost, measured.get(f'baseline_{name}', 0.0))}"


def _cost_of(measured: dict[str, float]) -> CostName:
    names: tuple[CostName, ...] = get_args(CostName)
    return next(name for name in names if name in measured)


def _expect_picture(path: Path) -> None:
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise MessError(f"--plot {path} is no picture: its name ends in one of {', '.join(sorted(kinds))}")


def _draw(path: Path, fronts: dict[str, list[tuple[float, float]]], instances: list[Instance], unit: str) -> None:
    """mIoU against cost: the fronts as steps, the instances as named points."""
    import io

    from matplotlib.figure import Figure

    scale, label = (
        (1e9, unit.replace("macs", "GMACs", 1).replace("_paper", ", paper") + " per image")
        if unit in ("macs", "macs_paper")
        else (1.0, unit)
    )
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(label)
    axes.set_ylabel("mIoU on the selection images, %")
    for setting, points in fronts.items():
        if points:
            costs, mious = zip(*sorted(points), strict=True)
            x, y = [cost / scale for cost in costs], [100 * miou for miou in mious]
            axes.step(x, y, where="post", lw=1.4, marker=".", ms=4, label=f"{setting}, front")
    for instance in instances:
        cost = instance.selected_on.get(unit.split(",")[0])
        if cost is not None:
            at = (cost / scale, 100 * instance.selected_on["miou"])
            axes.plot(*at, "o", ms=7, color="black", zorder=4)
            axes.annotate(instance.name, at, (6, -12), textcoords="offset points")
    axes.grid(alpha=0.3)
    if any(fronts.values()):
        axes.legend(frameon=False, loc="lower right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:].lower(), dpi=150)
    write_atomically(path, buffer.getvalue())
