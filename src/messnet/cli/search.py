"""``messnet search``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

from cyclopts import Parameter, Token

from messnet.cli.app import (
    AsJson,
    Out,
    Overrides,
    Target,
    app,
    examples,
    expect_picture,
    open_target,
    plain_name,
    quieten,
    save_figure,
)
from messnet.errors import MessError, RecipeError
from messnet.records.files import write_atomically
from messnet.records.names import Setting
from messnet.records.selection import CostUnit
from messnet.searching.objective import (
    AnytimeGoal,
    AnytimeObjective,
    AnytimeTerms,
    Guarantee,
    Limit,
    Objective,
    Terms,
)

if TYPE_CHECKING:
    from messnet.records.instance import Instance
    from messnet.records.run_directory import RunDirectory
    from messnet.run.choosing import Alternative
    from messnet.searching.answers import SearchSetting
    from messnet.searching.options import SearchOptions

Points = Sequence[tuple[float, float]]
"""Cost and mIoU of the points of a front."""


def _limits(_: type, tokens: Sequence[Token]) -> tuple[Limit, ...]:
    return tuple(Limit.parse(token.value) for token in tokens)


def _floors(_: type, tokens: Sequence[Token]) -> tuple[tuple[str, float], ...]:
    return tuple(_floor(token.value) for token in tokens)


def _guarantee(_: type, tokens: Sequence[Token]) -> Guarantee:
    try:
        epsilon, delta = (float(token.value) for token in tokens)
    except ValueError:
        given = " ".join(token.value for token in tokens)
        raise MessError(f"cannot read --guarantee {given}: expected EPSILON DELTA, such as 0.01 0.1") from None
    return Guarantee(epsilon=epsilon, delta=delta)


def _floor(text: str) -> tuple[str, float]:
    name, _, value = text.rpartition("=")
    try:
        return name.strip(), float(value)
    except ValueError:
        raise MessError(f"cannot read the class floor {text!r}: expected such as car=0.6") from None


# The records are the options. Only where an option is spelled otherwise than its field is the field repeated.
_SPELLED = {"limits_on": "--limit", "min_class_iou": "--class-floor", "goal": "--anytime"}
_TEXTS = Parameter(n_tokens=1, accepts_keys=False, consume_multiple=False, show_default=False)


@dataclass(frozen=True, kw_only=True)
class _ObjectiveOptions(Objective):
    limits_on: Annotated[
        tuple[Limit, ...], _TEXTS, Parameter(name=_SPELLED["limits_on"], converter=_limits, metavar="COST<=NUMBER")
    ] = ()
    min_class_iou: Annotated[
        tuple[tuple[str, float], ...],
        _TEXTS,
        Parameter(name=_SPELLED["min_class_iou"], converter=_floors, metavar="CLASS=IOU"),
    ] = ()


@dataclass(frozen=True, kw_only=True)
class _AnytimeOptions(AnytimeTerms):
    goal: Annotated[AnytimeGoal, Parameter(name=_SPELLED["goal"])] = "area"


_OBJECTIVE, _ANYTIME = _ObjectiveOptions(), _AnytimeOptions()


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
    name: str | None = None,
    setting: Setting = "input_dependent",
    objective: Annotated[_ObjectiveOptions, Parameter(name="*")] = _OBJECTIVE,
    anytime: Annotated[_AnytimeOptions, Parameter(name="*")] = _ANYTIME,
    guarantee: Annotated[
        Guarantee | None,
        Parameter(converter=_guarantee, n_tokens=2, accepts_keys=False, metavar="EPSILON DELTA"),
    ] = None,
    costs: list[Path] | None = None,
    time_limit: float | None = None,
    plot: Path | None = None,
    front: Path | None = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Choose exits, heads and thresholds; nothing is trained again.

    Without --name the recipe's instances are searched: the most accurate one at no more work than the model's, and the
    cheapest one at each drop that is allowed. With --name one instance is searched for the objective given, and kept
    beside the others in RUN/instances.

    Limits are tightened until they hold on images that the instance was not chosen on (search.protocol of the recipe:
    cross_fitted). With --guarantee one half of the images selects, with the limits as they are, and image thresholds
    then rise until the other half certifies the promise. A loss is the drop of an image's share of correct pixels
    against the final exit.

    Args:
        name: Search for an objective of your own; this is the name of its instance.
        setting: How the instance uses its exits. budgeted: it has but one; input_dependent: it takes the first that is
            confident; anytime: it runs all in turn.
        guarantee: Certify on the other half of the images that the expected loss is at most EPSILON. The certificate is
            wrong with probability at most DELTA.
        costs: Tables of `profile --measure`. Several are of several devices, of which the worst counts; or, where one
            is in int8 or half precision, of several precisions, of which the best is taken. By default the run's
            profile.json, which knows no latency.
        time_limit: Seconds after which the search answers, as at Ctrl-C, with the best so far and its proved gap.
        plot: Draw the front into this file, such as front.png.
        front: Write the front of this objective into this file, as JSON; goes with --name.
    """
    # cyclopts gives the default record itself where no option was named, so to differ from it is to ask for something.
    own = objective != _OBJECTIVE or anytime != _ANYTIME or setting != "input_dependent"
    if name is None and (own or any(value is not None for value in (guarantee, costs, time_limit, front))):
        raise MessError("an objective of your own needs a name for its instance: add --name NAME")
    asked = _asked(setting, objective, anytime, guarantee)
    if name is not None:
        plain_name(name)
    # A place that cannot be written to is refused now, not after the search.
    for path in filter(None, (plot, front)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if plot is not None:
        expect_picture(plot)
    from messnet.searching import words

    fronts: Mapping[str, Points]
    if name is None:
        opened = open_target(target, overrides, out)
        from messnet.run.stages import run_stage

        run_stage(opened, "search", again=True)
        from messnet.searching.findings import Findings

        found = Findings.from_json(opened.directory.front.read())
        files = [opened.directory.instance(name) for name in found.names]
        instances = [file.read() for file in files if file.exists]
        fronts, unit = {**found.fronts}, CostUnit("macs")
        told = {one.name: words.found(one) for one in found.found if one.is_found}
        texts = ["\n".join(words.with_findings(one, told.get(one.name, []))) for one in instances]
        texts += [words.finding(one) for one in found.found if not one.is_found]
        judged = [(one.expected.macs, one.expected.miou) for one in found.judged]
        fronts |= {"expected on new images": judged} if judged else {}
    else:
        from messnet.run.choosing import best_of, search_precisions, search_run

        # A run as it stands is read, not opened: a search needs its tables and no network, and so no torch.
        if target.is_dir() and not overrides:
            directory, options = _recorded(target)
        else:
            opened = open_target(target, overrides, out)
            directory, options = opened.directory, opened.recipe.search
        searched: SearchSetting = "budgeted" if setting == "budgeted" else "input_dependent"
        alternatives: Sequence[Alternative] = ()
        if isinstance(asked, Objective) and guarantee is None and _are_of_precisions(directory, costs or ()):
            alternatives = search_precisions(
                directory, options, asked, costs or (), name=name, setting=searched, time_limit=time_limit
            )
            result = best_of(alternatives)
        else:
            result = search_run(
                directory,
                options,
                asked,
                name=name,
                setting=searched,
                costs=costs or (),
                guarantee=guarantee,
                time_limit=time_limit,
            )
        instances, unit = [result.instance], result.selection.unit
        texts = [str(result), *(_alternative(one, unit) for one in alternatives)]
        found_fronts = {one.name: one.result.front for one in alternatives if one.result} or {setting: result.front}
        fronts = {key: [(point.cost, point.miou) for point in points] for key, points in found_fronts.items()}
        if front is not None:
            points = [
                {"cost": p.cost, "miou": p.miou, "exits": asdict(p.instance)["exits"]}
                | ({"in": key} if alternatives else {})
                for key, row in found_fronts.items()
                for p in row
            ]
            write_atomically(front, json.dumps({"cost": words.axis(unit), "points": points}, indent=1) + "\n")
    if plot is not None:
        _draw(plot, fronts, instances, unit)
    # The records' own JSON, as their files have it, in one list.
    if as_json:
        print(json.dumps([json.loads(instance.to_json()) for instance in instances], indent=1))
        return
    for text in texts:
        print(text)


def _are_of_precisions(directory: RunDirectory, costs: Sequence[Path]) -> bool:
    """Whether ``costs`` are several, of which one was not measured in f32: then they are no several devices."""
    dtypes = {directory.costs(path).conditions.get("dtype", "float32") for path in costs}
    return len(costs) > 1 and dtypes != {"float32"}


def _alternative(one: Alternative, unit: CostUnit) -> str:
    """A line on a precision: the model in it, and the best instance."""
    from messnet.searching import words

    miou, cost, megabytes = one.model
    text = f"{one.name}: model {miou:.2%} at {words.amount(unit, cost)}, {megabytes:.2f} MB; "
    if one.result is None:
        return f"{text}no instance: {one.why_none}"
    found = one.result.selection
    return f"{text}instance {found.miou:.2%} at {words.amount(unit, found.cost)}, {one.megabytes:.2f} MB"


def _recorded(path: Path) -> tuple[RunDirectory, SearchOptions]:
    """A run, and what its recipe asks of a search: read without the network and so without torch."""
    from messnet.records.codec import MismatchError, from_plain
    from messnet.records.run_directory import RunDirectory
    from messnet.searching.options import SearchOptions

    quieten()
    directory = RunDirectory(path)
    try:
        return directory, from_plain(directory.record().recipe.get("search", {}), SearchOptions)
    except MismatchError as error:
        raise RecipeError(f"the recorded recipe of {path}: search.{error}") from error


def _asked(
    setting: Setting, objective: Objective, anytime: AnytimeTerms, guarantee: Guarantee | None
) -> Objective | AnytimeObjective:
    """The objective of the setting. Raises MessError for an option that belongs to another setting."""
    # Refused, not ignored: who gives an option expects that it does something.
    foreign = [name for name, value in _given(anytime).items()]
    if setting == "anytime":
        shared = {field.name for field in fields(Terms)}
        foreign = [name for name in _given(objective) if name not in shared]
        foreign += ["guarantee"] if guarantee is not None else []
    if foreign:
        option = _SPELLED.get(foreign[0], f"--{foreign[0].replace('_', '-')}")
        raise MessError(f"{option} has no meaning with --setting {setting}; leave it out")
    if setting != "anytime":
        return objective
    terms = {field.name: getattr(objective, field.name) for field in fields(Terms)}
    return AnytimeObjective(**asdict(anytime), **terms)


def _given(record: Objective | AnytimeTerms) -> dict[str, object]:
    """The fields that are not at their defaults."""
    values = {field.name: (getattr(record, field.name), field.default) for field in fields(record)}
    return {name: value for name, (value, default) in values.items() if value != default}


def _draw(path: Path, fronts: Mapping[str, Points], instances: list[Instance], unit: CostUnit) -> None:
    """mIoU against cost: the fronts as steps, the instances as named points."""
    from matplotlib.figure import Figure

    from messnet.records.selection import Selection
    from messnet.searching import words

    scale, label = words.scaled_axis(unit)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(label)
    axes.set_ylabel("mIoU, %")
    for setting, points in fronts.items():
        if points:
            costs, mious = zip(*sorted(points), strict=True)
            x, y = [cost / scale for cost in costs], [100 * miou for miou in mious]
            axes.step(
                x,
                y,
                where="post",
                lw=1.4,
                marker=".",
                ms=4,
                label=f"{setting}, front on the selection images" if setting in get_args(Setting) else setting,
            )
    for instance in instances:
        selection = Selection.from_figures(instance.selected_on)
        # An instance found for another device's cost has no place on this axis.
        if selection is not None and selection.unit == unit:
            at = (selection.cost / scale, 100 * selection.miou)
            axes.plot(*at, "o", ms=7, color="black", zorder=4)
            axes.annotate(instance.name, at, (6, -12), textcoords="offset points")
    axes.grid(alpha=0.3)
    if any(fronts.values()):
        axes.legend(frameon=False, loc="lower right")
    save_figure(figure, path, dpi=150)
