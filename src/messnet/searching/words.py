"""What a search was asked and what it answers, in English: the only module of the search that writes sentences for
users.

Records of ``answers`` and ``objective`` in, one line of text out. (Errors about input are written where they are
found.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import inf, isclose

from messnet.records.instance import Instance
from messnet.records.names import CostName, Statistic
from messnet.records.selection import AnytimeFigures, CostUnit, Expected, ReachedCost, ReachedIou, Selection
from messnet.searching.answers import (
    MOST_IMAGES,
    AnytimeProof,
    Comparison,
    FrontPoint,
    Infeasible,
    Promise,
    Proof,
    Relaxed,
    Retreat,
    SearchResult,
    Shortfall,
    Tightened,
)
from messnet.searching.findings import OneFinding
from messnet.searching.objective import AnytimeObjective, Limit, Objective

_UNITS: dict[CostName, tuple[float, str]] = {
    "macs": (1e9, "GMACs"),
    "macs_paper": (1e9, "GMACs in the paper's count"),
    "parameters": (1e6, "million parameters"),
    "memory_bytes": (2.0**20, "MiB"),
    "latency_ms": (1.0, "ms"),
    "latency_p95_ms": (1.0, "ms (95th percentile)"),
}


_QUANTITIES: dict[CostName, str] = {
    "macs": "work",
    "macs_paper": "work in the paper's count",
    "parameters": "size",
    "memory_bytes": "memory",
    "latency_ms": "latency",
    "latency_p95_ms": "latency",
}
CONFIDENT = 1.96
"""Standard errors within which a normal error stays in 19 draws of 20; they stand behind every ±."""
_STATISTICS: dict[Statistic, str] = {"mean": "mean", "worst": "largest", "p95": "95th percentile of"}


def with_words(result: SearchResult) -> SearchResult:
    """A finished result that says in words what was asked for, what was proved and how it compares."""
    asked = objective_text(result.tightened.asked if result.tightened else result.objective)
    proved = certificate(result)
    instance = replace(result.instance, objective=asked, certificate=proved)
    worded = replace(result, instance=instance, certificate=proved, verdict=verdict(result))
    return replace(worded, description="\n".join(_described(worded)))


# -- what was asked ------------------------------------------------------------------------------------------------


def objective_text(objective: Objective | AnytimeObjective) -> str:
    """Such as "cheapest in macs at <= 1 pp drop"."""
    goal, constraints = _anytime_text(objective) if isinstance(objective, AnytimeObjective) else _text(objective)
    return f"{goal} at {' and '.join(constraints)}" if constraints else goal


def _text(objective: Objective) -> tuple[str, list[str]]:
    which = f"{_statistic(objective.statistic)}{objective.cost_name}"
    constraints = _given(
        (objective.max_drop_pp, "<= {} pp drop"),
        (objective.min_miou, "mIoU >= {}"),
        (objective.max_cost, f"<= {{}} {which}"),
        (objective.max_cost_ratio, f"<= {{}}x the model's {which}"),
    )
    constraints += [_limit(limit) for limit in objective.limits_on]
    constraints += [f"IoU of {name} >= {floor:g}" for name, floor in objective.min_class_iou]
    return "most accurate" if objective.maximise else f"cheapest in {which}", constraints


def _anytime_text(objective: AnytimeObjective) -> tuple[str, list[str]]:
    goals = {
        "area": f"largest area under the curve up to {objective.horizon:g}x the model's {objective.cost}",
        "first_cost": f"cheapest first result in {objective.cost}",
        "overhead": f"least overhead in {objective.cost}",
        "miou": "most accurate last result",
    }
    constraints = _given(
        (objective.max_first_cost, f"first result <= {{}} {objective.cost}"),
        (objective.max_first_ratio, f"first result <= {{}}x the model's {objective.cost}"),
        (objective.min_first_miou, "first mIoU >= {}"),
        (objective.max_overhead, "overhead <= {}"),
        (objective.min_area, "area >= {}"),
        (objective.min_miou, "mIoU >= {}"),
        (objective.max_drop_pp, "<= {} pp drop"),
    )
    return goals[objective.goal], constraints


def _given(*constraints: tuple[float | None, str]) -> list[str]:
    return [text.format(f"{value:g}") for value, text in constraints if value is not None]


def _statistic(statistic: str) -> str:
    return "" if statistic == "mean" else f"{statistic} "


def _limit(limit: Limit) -> str:
    return f"{_statistic(limit.statistic)}{limit.cost} <= {limit.at_most:g}{'x the model' if limit.relative else ''}"


# -- what was proved -----------------------------------------------------------------------------------------------


def certificate(result: SearchResult) -> str:
    """What was proved of a result: its promise on images not seen, if it has one, and its optimality."""
    if isinstance(result.proof, AnytimeProof):
        one = result.proof
        return f"optimal: all {one.num_evaluated} choices of {one.min_exits} to {one.max_exits} exits were evaluated"
    proved = _proved(result.proof, result.tightened)
    return f"{_promise(result.promise)}; {proved}" if result.promise else proved


def finding(one: OneFinding) -> str:
    """What came of one objective of a recipe: how it compares and what was proved, or why there is nothing."""
    if one.infeasible is not None:
        return f"{one.name}: {infeasible(one.infeasible)}"
    if not one.is_found and one.tightened is not None:
        return f"{one.name}: {not_kept(one.tightened)}"
    return f"{one.name}: {'; '.join(found(one))}"


def found(one: OneFinding) -> list[str]:
    """How an instance of a recipe's objective compares, and what was proved of it."""
    compared = _against(one.comparison) if one.comparison else []
    return [*compared, *([_proved(one.proof, one.tightened)] if one.proof else [])]


def _proved(proved: Proof, tightened: Tightened | None) -> str:
    """A proof, beside the limits that it is of where they are not those asked for."""
    if tightened is None:
        return proof(proved)
    if tightened.searched is None:
        within = _within(tightened.asked)
        return (
            f"your model itself: no better instance with {within} on new images could be confirmed{_nearest(tightened)}"
        )
    if tightened.searched == tightened.asked:
        return proof(proved)
    return f"limits tightened to {_within(tightened.searched)}, so that they hold on new images; {proof(proved)}"


def _within(objective: Objective) -> str:
    return " and ".join(_text(objective)[1]) or "no limits"


def proof(proved: Proof) -> str:
    """What was proved over the declared grid; a front that is proved from some mIoU on says so."""
    grid = f"{_spaced(proved.num_declared)} combinations of exits, heads and thresholds"
    evaluated, gap = _spaced(proved.num_evaluated), f"{100 * (proved.gap_miou or 0):.2g} pp"
    # From the strongest statement to the weakest.
    done = f"{evaluated} were evaluated, bounds rule out the others"
    if proved.optimal:
        return f"optimal among {grid}: {done}"
    if not proved.stopped:
        return f"at most {gap} below the best mIoU at its cost among {grid}: {done}"
    why = f"stopped ({proved.stopped}) after {evaluated} of {grid}"
    if proved.gap_miou is None:
        return f"{why}: the best of those, the others may be better"
    known = f"at most {gap} below the best mIoU at its cost"
    if proved.exact_from is not None:
        how = f"to {100 * proved.precision:.2g} pp" if proved.precision else "exact"
        known = f"{how} where mIoU >= {proved.exact_from:.4f}, elsewhere {known}"
    if proved.gap_cost is not None:
        known = f"at most {100 * proved.gap_cost:.2g} % above the least cost; {known}"
    return f"{why}: {known}"


def not_kept(tightened: Tightened) -> str:
    """Why no limits hold on new images, and what came nearest."""
    within = _within(tightened.asked)
    return f"no instance with {within} on new images could be confirmed{_nearest(tightened)}; relax a constraint"


def _nearest(tightened: Tightened) -> str:
    return "" if _is_model(tightened.expected) else f"; the nearest: {expected(tightened.expected)}"


def _is_model(one: Expected | Selection) -> bool:
    """Whether figures are those of the user's model itself."""
    known = one.baseline_miou is not None and one.baseline_cost is not None
    return known and not _sign(one.miou, one.baseline_miou or 0.0) and not _sign(one.cost, one.baseline_cost or 0.0)


def _promise(promise: Promise) -> str:
    guarantee, steps = promise.guarantee, promise.num_steps
    # What is drawn: images, or groups of them that belong together.
    drawn, new, share = f"{promise.num_images} calibration images", "images", "the share of correct pixels"
    if promise.num_groups != promise.num_images:
        drawn, new = f"{promise.num_groups} groups of {drawn}", "groups"
        share = "a group's mean share of correct pixels"
    if promise.step == 0:
        text = "every image runs to the final exit and loses nothing against it"
        if steps:
            text += f": none of {steps} steps from there to the searched thresholds could be certified"
    else:
        text = (
            f"guaranteed: on new {new} {share} is at most {guarantee.epsilon:g} below the final exit's on average, "
            f"with probability >= {1 - guarantee.delta:g} over the draw of {drawn}, if these and new {new} are drawn "
            f"independently from one source (p-value {promise.p_value:.3g} at mean loss {promise.mean_loss:.3g}, step "
            f"{promise.step} of {steps} from the final exit to the searched thresholds)"
        )
    return f"{text}; {_shortfall(promise, promise.shortfall)}" if promise.shortfall else text


def _shortfall(promise: Promise, short: Shortfall) -> str:
    epsilon, num_drawn = promise.guarantee.epsilon, promise.num_groups
    one, images = ("image", "images") if num_drawn == promise.num_images else ("group of images", "groups of images")
    if short.least_images is None or num_drawn < short.least_images:
        takes = f"more than {MOST_IMAGES}" if short.least_images is None else f"at least {short.least_images}"
        return (
            f"{num_drawn} calibration {one if num_drawn == 1 else images} can certify no epsilon below "
            f"{short.least_epsilon:.3g}, even without any loss; {epsilon:g} takes {takes} {images}"
        )
    ahead = f"the steps that are left have mean losses up to {short.worst_loss:.3g}"
    if short.worst_loss >= epsilon:
        return f"{ahead}: more {images} would not certify the searched thresholds"
    needed = f"more than {MOST_IMAGES}" if short.images_needed is None else f"about {short.images_needed}"
    return f"{ahead}: to certify the searched thresholds takes {needed} {images} like these"


# -- how it compares -----------------------------------------------------------------------------------------------


def verdict(result: SearchResult) -> str:
    """How a result compares: with its rivals, with what it was before it retreated, or with the model."""
    if result.retreat is not None:
        return _retreat(result.retreat)
    if result.comparison is not None:
        return "; ".join(_against(result.comparison))
    return _anytime(result.selection)


def _against(comparison: Comparison) -> list[str]:
    """A sentence for the best network that has but one exit, and one for the best with one head at all exits."""
    best, static, uniform, unit = comparison.chosen, comparison.static, comparison.uniform, comparison.unit
    if static is None:
        told = ["no network with a single exit is within the limits"]
    elif len(best.instance.exits) == 1 and _same(best, static):
        more = "" if best.instance.setting == "budgeted" else ", and no better one with early exits was found"
        told = [f"the best network with a single exit{more}"]
    else:
        figures = _figure(static.miou, static.cost, unit)
        name = f"the best network with a single exit ({_exits(static.instance)}, {figures})"
        told = [_versus(best, static, unit, name)]
    if comparison.has_early_exits and uniform is None:
        told.append("no instance with the same head at all of these exits is within the limits")
    # An instance that has one head everywhere is its own rival.
    elif comparison.has_early_exits and uniform is not None and not _same(best, uniform):
        told.append(_versus(best, uniform, unit, f"the same head at all exits ({uniform.instance.exits[0].head})"))
    return told


def _same(best: FrontPoint, rival: FrontPoint) -> bool:
    return not _sign(best.miou, rival.miou) and not _sign(best.cost, rival.cost)


def _sign(value: float, other: float) -> int:
    """1, 0 or -1 for more, equal up to the rounding of sums, and less."""
    return 0 if isclose(value, other, rel_tol=1e-9, abs_tol=1e-12) else 1 if value > other else -1


def _versus(best: FrontPoint, rival: FrontPoint, unit: CostUnit, name: str) -> str:
    """Two points in a sentence: "better" and "worse" only where neither figure says otherwise."""
    miou, cost = _sign(best.miou, rival.miou), _sign(best.cost, rival.cost)
    if not miou and not cost:
        return f"no better than {name}"
    # More of both, or less of both: a matter of what is wanted.
    how = "against" if miou * cost > 0 else "better than" if miou > 0 or cost < 0 else "worse than"
    return f"{how} {name}: {_miou_change(best.miou, rival.miou)}, {_cost_change(best, rival, unit)}"


def _miou_change(miou: float, other: float) -> str:
    sign, change = _sign(miou, other), 100 * abs(miou - other)
    if not sign:
        return "the same mIoU"
    return f"{f'{change:.2f}' if change >= 0.005 else 'under 0.01'} pp {'more' if sign > 0 else 'less'} mIoU"


def _cost_change(best: FrontPoint, rival: FrontPoint, unit: CostUnit) -> str:
    sign, quantity = _sign(best.cost, rival.cost), _QUANTITIES[unit.name]
    if not sign:
        return f"the same {quantity}"
    change = 100 * abs(best.cost / rival.cost - 1) if rival.cost else inf
    if change == inf:  # there is no share of nothing
        return f"{amount(unit, best.cost)} more"
    share = f"{change:.1f} %" if change >= 0.05 else "under 0.1 %"
    return f"{share} {'more' if sign > 0 else 'less'} {quantity}"


def _retreat(retreat: Retreat) -> str:
    before, after, model = retreat.before, retreat.after, "unknown"
    if after.baseline_miou is not None and after.baseline_cost is not None:
        model = _figure(after.baseline_miou, after.baseline_cost, after.unit)
    return (
        f"thresholds raised to keep the guarantee: {_figure(after.miou, after.cost, after.unit)}, before "
        f"{_figure(before.miou, before.cost, before.unit)}, your model {model}"
        + ("" if retreat.still_met else "; no longer what was asked for")
    )


def _anytime(selection: Selection) -> str:
    """The first and the last result of an anytime instance."""
    figures, model, unit = selection.anytime, selection.baseline_cost, selection.unit
    if figures is None or not model:
        return ""
    return (
        f"first result {_figure(figures.first_miou, figures.first_cost, unit)} "
        f"({figures.first_cost / model:.2f}x the model's), last {_figure(selection.miou, selection.cost, unit)} "
        f"({selection.cost / model:.2f}x, {100 * figures.overhead:.1f} % more than the last exit alone); area under "
        f"the curve {figures.area:.4f}"
    )


# -- what cannot be had --------------------------------------------------------------------------------------------


def infeasible(why: Infeasible) -> str:
    """Why no instance meets an objective, and the nearest points."""
    if why.points and not why.further:
        asked = [] if why.least_miou is None else [f"mIoU >= {100 * why.least_miou:.2f} %"]
        limit, is_work = why.largest_cost, why.unit.name in ("macs", "macs_paper") and not why.unit.relative
        # Whoever asks for so little means another unit.
        if limit is not None and is_work and limit < why.points[0].cost / 1000:
            return (
                f"--max-cost {limit:g} is in multiply-accumulates per image; {next(_nearest_points(why))}; for a share "
                "of your model's work say --max-cost-ratio 0.5; for milliseconds add --cost latency_ms --costs FILE, "
                "the table of `messnet profile RUN --measure`"
            )
        asked += [] if limit is None else [f"<= {amount(why.unit, limit)}"]
        return f"no instance has {' and '.join(asked)}: {'; '.join(_nearest_points(why))}; relax a constraint"
    notes = []
    if why.points:
        notes.append(f"the most accurate within the further limits has {_point(why.points[-1], why.unit)}")
        notes.append(f"the cheapest has {_point(why.points[0], why.unit)}")
    notes += [_relaxed(one) for one in why.relaxed]
    reason = "; ".join(notes) or "several of these constraints cannot be met at once"
    return f"no instance is {objective_text(why.objective)}: {reason}; relax a constraint"


def _nearest_points(why: Infeasible) -> Iterator[str]:
    affordable = [point for point in why.points if why.largest_cost is None or point.cost <= why.largest_cost]
    accurate = [point for point in why.points if why.least_miou is None or point.miou >= why.least_miou]
    if affordable and why.largest_cost is not None:
        yield f"the best mIoU at that cost is {_point(affordable[-1], why.unit)}"
    if accurate and why.least_miou is not None:
        yield f"the least cost at that mIoU is {_point(accurate[0], why.unit)}"
    if not affordable:
        yield f"the cheapest instance has {_point(why.points[0], why.unit)}"
    if not accurate:
        yield f"the most accurate instance has {_point(why.points[-1], why.unit)}"


def _relaxed(one: Relaxed) -> str:
    if isinstance(one.without, Limit) and isinstance(one.best, FrontPoint):
        return f"without {_limit(one.without)} it takes {_point(one.best, one.unit)}"
    assert isinstance(one.without, tuple)
    assert isinstance(one.best, float)
    name, floor = one.without
    return f"without IoU of {name} >= {floor:g} the best of {name} on the front is {one.best:.4f}"


def anytime_infeasible(objective: AnytimeObjective, possible: tuple[AnytimeFigures, float] | None) -> str:
    """Why no anytime instance meets an objective; ``possible`` is the best of each figure and of the last mIoU."""
    if possible is None:
        return f"no anytime instance of at least {objective.min_exits} exits gets better from exit to exit"
    best, miou = possible
    return (
        f"no instance is {objective_text(objective)}; possible are: first result at {best.first_cost:.4g} "
        f"{objective.cost}, first mIoU {best.first_miou:.4f}, overhead {best.overhead:.3f}, area {best.area:.4f}, "
        f"last mIoU {miou:.4f}; relax a constraint"
    )


# -- figures -------------------------------------------------------------------------------------------------------


def describe(instance: Instance) -> list[str]:
    """An instance's objective, what to expect of it, its figures, then a line for each of its exits."""
    selection = Selection.from_figures(instance.selected_on)
    lines = [f"{instance.name}: {instance.objective}"]
    # Of the model itself there is nothing to expect: it loses nothing.
    if instance.expected is not None and not _is_model(instance.expected):
        lines.append(f"  expected on new images: {expected(instance.expected)}")
    if selection:
        lines.append(f"  on the {selection.num_images} images it was chosen on: {_figures(selection)}")
    for choice in instance.exits:
        rule = "all images" if len(instance.exits) == 1 else "all other images"
        if instance.setting == "anytime":
            rule = "gives a result"
        elif choice.image_threshold is not None:
            share = 100 * choice.image_threshold
            rule = f"images with >= {share:.1f} % of the pixels at confidence >= {choice.pixel_threshold:g}"
        lines.append(f"  exit {choice.exit_index}  {choice.head:28} {rule}")
    return lines


def _described(result: SearchResult) -> list[str]:
    """The instance of a result, how it compares and what was proved of it, then the next best."""
    # An anytime instance has no rivals: its verdict is its figures, which it has already.
    compared = [] if result.instance.setting == "anytime" else [result.verdict]
    nearby = [f"next best: {runner_up(one, result.selection.unit)}" for one in result.runners_up]
    return [*with_findings(result.instance, [*compared, result.certificate]), *nearby]


def with_findings(instance: Instance, told: Sequence[str]) -> list[str]:
    """An instance, and below it each clause of what is ``told`` of it."""
    clauses = "; ".join(filter(None, told)).split("; ")
    return [*describe(instance), *(f"  {clause}" for clause in clauses if clause)]


def expected(one: Expected) -> str:
    """Cross-fitted figures, with 1.96 standard errors."""
    change, margin = 100 * (one.miou - one.baseline_miou), 100 * CONFIDENT * one.drop_error
    spread = 100 * CONFIDENT * one.cost_error / one.cost if one.cost else 0.0
    text = (
        f"{100 * one.miou:.2f} % mIoU ({change:+.2f} ± {margin:.2f} pp against your model) at "
        f"{amount(one.unit, one.cost)} ± {spread:.0f} %{_times(one.cost, one.baseline_cost, one.unit)}"
    )
    return "; ".join([text, *map(_reached, one.costs), *map(_reached, one.ious)])


def _figures(selection: Selection) -> str:
    unit, cost, model = selection.unit, selection.cost, selection.baseline_cost
    text = _anytime(selection) or f"{_figure(selection.miou, cost, unit)}{_times(cost, model or 0.0, unit)}"
    if model and selection.baseline_miou is not None:
        its_own = f"; your model: {_figure(selection.baseline_miou, model, unit)}"
        text += ", as your model" if _is_model(selection) else its_own
    if selection.loss is not None:
        text += f"; {100 * selection.loss:.2f} % of an image's pixels lost against the final exit"
    return "; ".join([text, *(_reached(one) for one in selection.reached)])


def _times(cost: float, model: float, unit: CostUnit) -> str:
    """Such as ", 2.93x less work"; nothing where a cost is 0 or both are equal."""
    if not cost or not model or not _sign(cost, model):
        return ""
    ratio, more = (cost / model, "more") if cost > model else (model / cost, "less")
    return f", {ratio:.2f}x {more} {_QUANTITIES[unit.name]}"


def _reached(one: ReachedCost | ReachedIou) -> str:
    """Such as "95th percentile of latency 38.2 ms (at most 40 ms)" and "IoU of car 0.6123 (at least 0.6)"."""
    if isinstance(one, ReachedIou):
        return f"IoU of {one.class_name} {one.value:.4f} (at least {one.limit:g})"
    unit = CostUnit(one.cost, one.relative)
    of_images = "" if one.cost in ("parameters", "memory_bytes") else f"{_STATISTICS[one.statistic]} "
    what = f"{of_images}{_QUANTITIES[one.cost]} {amount(unit, one.value)}"
    if one.limit is None:
        return what
    return f"{what} (at most {f'{one.limit:.3g}x' if one.relative else amount(unit, one.limit)})"


def runner_up(point: FrontPoint, unit: CostUnit) -> str:
    """The exits and figures of a next best instance."""
    return f"{_exits(point.instance)}, {_figure(point.miou, point.cost, unit)}"


def amount(unit: CostUnit, cost: float) -> str:
    """A cost with its unit."""
    if unit.relative:
        return f"{cost:.3g}x the model's {unit.name}"
    scale, text = _UNITS[unit.name]
    return f"{cost / scale:.4g} {text}"


def axis(unit: CostUnit) -> str:
    """What a front's costs are, for a file."""
    return f"{unit.name}, relative to the model, worst device" if unit.relative else unit.name


def scaled_axis(unit: CostUnit) -> tuple[float, str]:
    """What a drawing divides costs by, and the label of its axis."""
    if unit.relative or unit.name not in ("macs", "macs_paper"):
        return 1.0, axis(unit)
    return 1e9, f"GMACs{', paper' if unit.name == 'macs_paper' else ''} per image"


def _figure(miou: float, cost: float, unit: CostUnit) -> str:
    return f"{100 * miou:.2f} % mIoU at {amount(unit, cost)}"


def _point(point: FrontPoint, unit: CostUnit) -> str:
    return f"mIoU {100 * point.miou:.2f} % at {amount(unit, point.cost)} (exits {_exits(point.instance)})"


def _exits(instance: Instance) -> str:
    return " > ".join(f"{choice.exit_index}:{choice.head}" for choice in instance.exits)


def beginning(num_declared: int, *, compiles: bool) -> str:
    """What a search says before it begins."""
    if num_declared == 1:
        return "searching 1 instance: no heads are attached, the tables know the final exit alone"
    first = "; first numba compiles the search, once on this machine, which takes a minute or more" if compiles else ""
    return f"searching {_spaced(num_declared)} instances{first}"


def _spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")
