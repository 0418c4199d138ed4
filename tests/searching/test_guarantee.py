"""The promise: p-values against SciPy and closed forms, the path against the search, validity by simulation."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import rel_entr
from scipy.stats import binom

from messnet.cli import main
from messnet.errors import RecipeError
from messnet.records.costs import CostTable, PartCost
from messnet.records.exit_tables import ExitTables
from messnet.records.instance import Exit, ExitChoice, Instance
from messnet.records.selection import CostUnit, Selection
from messnet.searching.answers import SearchResult
from messnet.searching.grid import Grid, cost_of, route
from messnet.searching.guarantee import certified_step, certify, images_needed, loss_of, p_value, retreat_path
from messnet.searching.objective import Guarantee, Limit, Objective
from messnet.searching.optima import choose, pareto_front, search_for

NUM_PIXELS = 200
BOLD = Objective(minimise="macs", max_drop_pp=12)


@cache
def population(harsh: bool = False, num_images: int = 4000) -> tuple[ExitTables, CostTable]:
    """Images whose difficulty costs accuracy at early exits, and which confidence follows with noise.

    Where it is ``harsh`` an early exit gets an image right or wholly wrong: the losses that bounds are tight for.
    """
    draw = np.random.default_rng(0)
    exits = (Exit(0, "a"), Exit(1, "a"), Exit(1, "b"), Exit(2, "final"))
    difficulty = draw.random(num_images)
    right = 0.95 - np.multiply.outer(difficulty**2, [0.5, 0.35, 0.3, 0.1])
    if harsh:
        right = np.where(draw.random(right.shape) < right + np.array([0, 0, 0, 1]), 1.0, 0.0)
    labelled = draw.multinomial(NUM_PIXELS, [0.7, 0.3], num_images).astype(np.int32)
    labelled[:20] = 0  # images without labelled pixels
    intersection = draw.binomial(labelled[:, None], right[..., None]).astype(np.int32)
    wrong = labelled[:, None] - intersection
    noisy = difficulty[:, None, None, None] + draw.normal(0, 0.15, (num_images, len(exits), 1, 2))
    tables = ExitTables(
        image_names=tuple(map(str, range(num_images))),
        difficulty=difficulty,
        class_names=("ground", "sky"),
        exits=exits,
        intersection=intersection,
        predicted=intersection + wrong[..., ::-1],
        labelled=labelled,
        policies=("top1+native",),
        pixel_thresholds=np.array([0.5, 0.9]),
        image_confidence=np.clip(1 - noisy * [0.5, 0.9], 0, 1).astype(np.float32),
    )
    part = PartCost(macs=100, macs_paper=100, parameters=10, memory_bytes=10)
    small = PartCost(macs=3, macs_paper=3, parameters=1, memory_bytes=1)
    costs = CostTable(
        model="made up",
        input_size=(10, 20),
        segments=(part,) * 3,
        heads=dict.fromkeys(exits, small),
        policies=(small,) * 2,
        outputs=(small,) * 3,
    )
    return tables, costs


def split(seed: int, num_calibration: int = 80, harsh: bool = False) -> tuple[ExitTables, ExitTables, NDArray]:
    """Tables of 60 images to select on, tables to calibrate on, and the images that the latter are drawn from."""
    tables, _ = population(harsh)
    order = np.random.default_rng(seed).permutation(len(tables.image_names))
    rest = order[60:]
    return tables.subset(order[:60]), tables.subset(rest[:num_calibration]), rest


def mean_cost(instance: Instance, tables: ExitTables) -> float:
    """MACs; the final exit alone costs 3 segments, a head, and 3 for its output: 306."""
    return float(cost_of(tables, population()[1], instance).mean())


def searched(selection: ExitTables, objective: Objective = BOLD, **grid: int) -> SearchResult:
    front = pareto_front(selection, population()[1], grid=Grid(**({"num_image_thresholds": 6, "max_exits": 2} | grid)))
    return choose(front, objective, name="safe")


def certified(seed: int, epsilon: float, delta: float, num_calibration: int = 80) -> tuple[SearchResult, int, int]:
    """The result with its step on the path, and the path's length."""
    selection, calibration, _ = split(seed, num_calibration=num_calibration)
    before = searched(selection)
    after = certify(
        before,
        Guarantee(epsilon=epsilon, delta=delta),
        selection=selection,
        calibration=calibration,
        costs=population()[1],
    )
    path = [step.exits for step in retreat_path(before.instance, selection) if mean_cost(step, selection) <= 306]
    return after, path.index(after.instance.exits), len(path) - 1


def promise(epsilon: float, delta: float = 0.1) -> Guarantee:
    return Guarantee(epsilon=epsilon, delta=delta)


def test_a_group_is_one_draw() -> None:
    """Drives of one frame each, filmed three times over: as many draws as drives, not frames."""
    selection, calibration, _ = split(3)
    before, costs = searched(selection), population()[1]
    asked = promise(0.08)
    alone = certify(before, asked, selection=selection, calibration=calibration, costs=costs)
    thrice = calibration.subset(np.repeat(np.arange(80), 3))
    names = tuple(f"{name}_{frame}" for frame, name in enumerate(thrice.image_names))
    drives = replace(thrice, image_names=names, groups=thrice.image_names)
    grouped = certify(before, asked, selection=selection, calibration=drives, costs=costs)
    assert alone.promise is not None
    assert grouped.promise is not None
    assert grouped.instance.exits == alone.instance.exits
    assert grouped.promise.p_value == pytest.approx(alone.promise.p_value)
    assert (grouped.promise.num_images, grouped.promise.num_groups) == (240, 80)
    assert "80 groups of 240 calibration images, if these and new groups are drawn" in grouped.certificate
    # Taken for draws of their own the frames would promise more.
    frames = certify(before, asked, selection=selection, calibration=replace(drives, groups=()), costs=costs)
    assert frames.promise is not None
    assert frames.promise.step > grouped.promise.step


@pytest.mark.parametrize("num_images", [1, 2, 7, 50, 333])
def test_p_values_by_the_gamblers_hand(num_images: int) -> None:
    """Image by image as Bates et al. write it, in Python, the means and variances by NumPy from scratch."""
    draw = np.random.default_rng(num_images)
    for epsilon, delta in ((0.001, 0.5), (0.01, 0.1), (0.1, 0.01), (0.5, 0.1), (0.97, 0.1)):
        for losses in (np.zeros(num_images), draw.beta(0.1, 2, num_images), draw.random(num_images) < epsilon / 2):
            capital = richest = 1.0
            means: list[float] = []
            variance = 0.25
            for i, loss in enumerate(losses.astype(float)):
                bet = min(1.0, math.sqrt(2 * math.log(1 / delta) / (num_images * variance)))
                capital *= 1 - bet * (loss - epsilon)
                richest = max(richest, capital)
                means.append(np.mean([0.5, *losses[: i + 1]]))
                variance = np.mean([0.25, *(losses[: i + 1] - means) ** 2])
            assert p_value(losses.astype(float), promise(epsilon, delta)) == pytest.approx(1 / richest, rel=1e-9)


def test_p_values_in_closed_form() -> None:
    for loss in (0, 0.3, 1):  # one image: all is staked
        assert p_value(np.array([loss]), promise(0.4)) == pytest.approx(min(1, 1 / (1.4 - loss)), rel=1e-12)
    second = math.sqrt(2 * math.log(10) / 2 / ((0.25 + (0.2 - 0.35) ** 2) / 2))
    assert second > 1
    assert p_value(np.array([0.2, 0.1]), promise(0.4)) == pytest.approx(1 / (1.2 * 1.3), rel=1e-12)
    bets = np.array(_bets_without_loss(40, 40))  # they grow up to 1
    assert bets[0] == math.sqrt(2 * math.log(10) / 40 / 0.25) < 1 == bets[-1]
    expected = 1 / np.prod(1 + 0.05 * bets)
    assert p_value(np.zeros(40), promise(0.05)) == pytest.approx(expected, rel=1e-12)
    assert p_value(np.ones(10), promise(0.3)) == 1
    assert p_value(np.full(10, 0.3), promise(0.3)) == 1
    largest = np.prod(1 + 0.2 * np.array(_bets_without_loss(20, 100)))  # on the way, not at the end, counts
    assert p_value(np.repeat([0.0, 1.0], [20, 80]), promise(0.2)) == pytest.approx(1 / largest, rel=1e-12)


def _bets_without_loss(seen: int, num_images: int) -> list[float]:
    variances = [sum(0.25 / j**2 for j in range(1, i + 2)) / (i + 1) for i in range(seen)]
    return [min(1, math.sqrt(2 * math.log(10) / num_images / v)) for v in variances]


@pytest.mark.parametrize("epsilon", [0.02, 0.1, 0.4])
@pytest.mark.parametrize("delta", [0.05, 0.1, 0.5])
def test_a_p_value_is_valid_exactly(epsilon: float, delta: float) -> None:
    """P(p <= u) <= u for every u, over all 2^11 sequences of losses of 0 and 1 whose expectation is just epsilon, and
    over all 3^7 of losses of 0, 2 epsilon and 1."""
    for values, chances, n in (
        ([0, 1], [1 - epsilon, epsilon], 11),
        ([0, 2 * epsilon, 1], [0.5 - epsilon / 4, 0.5 - epsilon / 4, epsilon / 2], 7),
    ):
        chances = np.array(chances) / np.sum(chances)
        index = np.array(list(product(range(len(values)), repeat=n)))
        expected = float(chances @ values)
        found = np.array([p_value(np.array(values, float)[row], promise(expected, delta)) for row in index])
        order = np.argsort(found)
        mass = chances[index].prod(1)[order].cumsum()
        last_of_equals = np.append(np.diff(found[order]) > 0, True)
        assert (mass <= found[order] * (1 + 1e-9))[last_of_equals].all()


@pytest.mark.parametrize("num_images", [40, 300])
@pytest.mark.parametrize("epsilon", [0.02, 0.1, 0.4])
def test_a_p_value_is_valid(num_images: int, epsilon: float) -> None:
    """The same, drawn, for more images: losses that spread widely, hardly, and hardly but for rare losses of 1."""
    draw, num_draws = np.random.default_rng(0), 1000
    for spread in (1, 50):
        a, b = spread * epsilon, spread * (1 - epsilon)
        values = np.array([p_value(draw.beta(a, b, num_images), promise(epsilon)) for _ in range(num_draws)])
        for u in (0.01, 0.05, 0.1, 0.3):
            assert (values <= u).sum() <= binom.ppf(0.9999, num_draws, u)
    rare = np.where(draw.random((num_draws, num_images)) < epsilon / 3, 1, epsilon * 2 / 3 / (1 - epsilon / 3))
    values = np.array([p_value(row, promise(epsilon)) for row in rare])
    assert (values <= 0.1).sum() <= binom.ppf(0.9999, num_draws, 0.1)


def test_it_certifies_more_than_hoeffding_and_bentkus_where_losses_are_small() -> None:
    draw, guarantee = np.random.default_rng(0), promise(0.05)
    won = lost = 0
    for _ in range(200):
        losses = draw.beta(0.5, 0.5 / 0.02 - 0.5, 100)
        ours, theirs = p_value(losses, guarantee) <= 0.1, _hoeffding_bentkus(losses, 0.05) <= 0.1
        won, lost = won + (ours and not theirs), lost + (theirs and not ours)
    assert won > 100
    assert lost == 0


def _hoeffding_bentkus(losses: NDArray, epsilon: float) -> float:
    num_images, mean = len(losses), min(losses.mean(), epsilon)
    hoeffding = np.exp(-num_images * (rel_entr(mean, epsilon) + rel_entr(1 - mean, 1 - epsilon)))
    return float(min(1, hoeffding, np.e * binom.cdf(np.ceil(losses.sum()), num_images, epsilon)))


def test_p_values_fall_with_epsilon() -> None:
    losses = np.random.default_rng(0).beta(0.2, 3, 60)
    values = [p_value(losses, promise(epsilon)) for epsilon in np.linspace(0.01, 0.99, 50)]
    assert all(a >= b for a, b in pairwise(values))
    assert values[0] == 1
    assert values[-1] < 1e-6


@pytest.mark.parametrize(("epsilon", "delta"), [(0.01, 0.1), (0.05, 0.05), (0.3, 0.001)])
def test_images_needed(epsilon: float, delta: float) -> None:
    guarantee = promise(epsilon, delta)
    least = images_needed(np.zeros(1), guarantee)
    assert least is not None
    assert p_value(np.zeros(least), guarantee) <= delta < p_value(np.zeros(least - 1), guarantee)
    all_staked = -math.log(delta) / math.log1p(epsilon)
    assert all_staked <= least <= 1.05 * all_staked + 1
    losses = np.array([0, 0.2, 1]) * epsilon  # mean 0.4 epsilon
    more = images_needed(losses, guarantee)
    assert more is not None
    assert more > least
    assert p_value(np.resize(losses, more), guarantee) <= delta < p_value(np.resize(losses, more - 1), guarantee)
    assert images_needed(np.full(3, epsilon * 0.9999999), guarantee) is None


def test_the_certified_step_stops_at_the_first_that_is_not_rejected() -> None:
    guarantee, draw = Guarantee(epsilon=0.1, delta=0.1), np.random.default_rng(0)
    means = [0.0, 0.001, 0.02, 0.2, 0.001]  # the last would pass, but is never tested
    losses = np.array([draw.beta(1, 1 / m - 1, 200) if m else np.zeros(200) for m in means])
    step, p = certified_step(losses, guarantee)
    assert (step, p) == (2, p_value(losses[2], guarantee))
    assert p_value(losses[4], guarantee) < 0.1 < p_value(losses[3], guarantee)
    assert certified_step(losses[:, :20], guarantee) == (0, 0.0)  # 1.1^-20 > 0.1


def test_losses_equal_those_of_images() -> None:
    """From masks whose counts the tables hold."""
    draw = np.random.default_rng(3)
    labels = draw.integers(-1, 3, (6, 40))  # -1: ignored
    labels[2] = -1
    predictions = draw.integers(0, 3, (6, 3, 40))
    right = (predictions == labels[:, None])[..., None] & (labels[:, None, :, None] == np.arange(3))
    tables = replace(
        population()[0],
        image_names=tuple("abcdef"),
        exits=(Exit(0, "x"), Exit(1, "x"), Exit(2, "final")),
        intersection=right.sum(2, dtype=np.int32),
        labelled=(labels[..., None] == np.arange(3)).sum(1, dtype=np.int32),
    )
    routing = np.array([0, 1, 0, 2, 1, 0])
    for v, loss in enumerate(loss_of(tables, routing)):
        known = labels[v] >= 0
        if not known.any():
            assert loss == 0
            continue
        final, taken = ((predictions[v, p] == labels[v])[known].mean() for p in (2, routing[v]))
        assert loss == pytest.approx(max(0, final - taken))
    assert (loss_of(tables, np.full(6, 2)) == 0).all()


def by_hand(tables: ExitTables, instance: Instance) -> Iterator[int]:
    for v in range(len(tables.image_names)):
        for choice in instance.exits:
            position = tables.exits.index(choice.exit)
            if choice is instance.exits[-1]:
                break
            t = tables.pixel_thresholds.tolist().index(choice.pixel_threshold)
            if float(tables.image_confidence[v, position, 0, t]) >= choice.image_threshold:
                break
        yield position


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("max_exits", [1, 2, 3])
def test_the_path_leads_from_the_final_exit_to_the_searched_instance(seed: int, max_exits: int) -> None:
    selection, calibration, _ = split(seed)
    front = pareto_front(selection, population()[1], grid=Grid(num_image_thresholds=5, max_exits=max_exits))
    point = front.points[seed * len(front.points) // 6].instance
    path = retreat_path(point, selection, 20)
    assert [choice.exit for choice in path[0].exits] == [Exit(2, "final")]
    assert path[-1] == point
    assert len(path) <= 21
    assert len({step.exits for step in path}) == len(path)
    leaving: dict[Exit, NDArray] = {}
    for step in path:
        assert route(calibration, step).tolist() == list(by_hand(calibration, step))
        assert {choice.exit for choice in step.exits} <= {choice.exit for choice in point.exits} | {Exit(2, "final")}
        for choice in step.exits[:-1]:  # whoever may leave, may later on
            position = selection.exits.index(choice.exit)
            t = selection.pixel_thresholds.tolist().index(choice.pixel_threshold)
            may = selection.image_confidence[:, position, 0, t] >= np.float64(choice.image_threshold)
            assert (may >= leaving.get(choice.exit, may & False)).all()
            leaving[choice.exit] = may
    if point.exits[-1].exit == Exit(2, "final"):
        assert path[-2:] != [point] or len(point.exits) == 1
    assert retreat_path(path[0], selection) == [path[0]]


def test_of_a_cut_the_path_makes_an_early_exit() -> None:
    """At the pixel threshold whose order of the images loses least; the other one is turned upside down."""
    selection, _, _ = split(0)
    selection.image_confidence[:, 0, 0, 1] = 1 - selection.image_confidence[:, 0, 0, 0]
    cut = Instance(name="cut", setting="input_dependent", exits=(ExitChoice(exit_index=0, head="a"),))
    path = retreat_path(cut, selection, 10)
    assert path[-1] == cut
    for k, step in enumerate(path[1:-1], start=1):
        assert [choice.pixel_threshold for choice in step.exits] == [0.5, None]
        assert (route(selection, step) == 0).sum() == 6 * k


@pytest.mark.parametrize("harsh", [False, True])
def test_a_wrong_certificate_is_as_rare_as_promised(harsh: bool) -> None:
    """Over random splits the share whose certified instance has a true risk above epsilon is at most delta; of the
    naive choice, the boldest step with a mean loss <= epsilon on the calibration images, it is not."""
    (tables, costs), epsilon, delta, num_splits = population(harsh), 0.05, 0.2, 200
    wrong = naively_wrong = retreated = 0
    risks = []

    def risk(instance: Instance, images: NDArray) -> float:
        return float(loss_of(tables, route(tables, instance))[images].mean())

    for seed in range(num_splits):
        selection, calibration, rest = split(seed, harsh=harsh)
        before = searched(selection)
        after = certify(
            before,
            Guarantee(epsilon=epsilon, delta=delta, num_steps=40),
            selection=selection,
            calibration=calibration,
            costs=costs,
        ).instance
        path = retreat_path(before.instance, selection, 40)
        naive = [step for step in path if loss_of(calibration, route(calibration, step)).mean() <= epsilon][-1]
        risks.append(risk(after, rest))
        wrong += risks[-1] > epsilon
        naively_wrong += risk(naive, rest) > epsilon
        retreated += path[0].exits != after.exits != path[-1].exits
    assert wrong <= binom.ppf(0.999, num_splits, delta)
    assert naively_wrong > binom.ppf(0.999, num_splits, delta)
    assert retreated > num_splits / 2  # it is no empty promise
    assert np.mean(risks) > epsilon / 5


@pytest.mark.parametrize("seed", range(4))
def test_a_laxer_promise_retreats_less(seed: int) -> None:
    steps = np.array([[certified(seed, e, d)[1] for d in (0.001, 0.05, 0.5)] for e in (0.02, 0.06, 0.1, 0.5)])
    assert (np.diff(steps, axis=0) >= 0).all()
    assert (np.diff(steps, axis=1) >= 0).all()
    assert steps[0, 0] == 0
    assert steps[-1, -1] == certified(seed, 0.5, 0.5)[2]


def test_what_is_certified_is_told() -> None:
    selection, calibration, _ = split(1)
    result, step, length = certified(1, 0.06, 0.1)
    instance, (_, costs) = result.instance, population()
    assert 0 < step < length
    losses = loss_of(calibration, route(calibration, instance))
    p = p_value(np.random.default_rng(0).permutation(losses), Guarantee(epsilon=0.06, delta=0.1))
    assert p <= 0.1
    for words in (
        "the share of correct pixels is at most 0.06 below the final exit's on average, with probability >= 0.9",
        "the draw of 80 calibration images",
        f"p-value {p:.3g} at mean loss {losses.mean():.3g}, step {step} of {length}",
        "drawn independently from one source",
        "the steps that are left have mean losses up to",
        "optimal among",
    ):
        assert words in instance.certificate
    assert result.certificate == instance.certificate
    assert instance.selected_on["miou"] == pytest.approx(selection.miou(route(selection, instance)), abs=1e-12)
    assert instance.selected_on["macs"] == cost_of(selection, costs, instance).mean()
    assert instance.selected_on["loss"] == loss_of(selection, route(selection, instance)).mean()
    assert result.verdict.startswith("thresholds raised to keep the guarantee: ")
    assert (instance.name, instance.objective) == ("safe", "cheapest in macs at <= 12 pp drop")
    assert Instance.from_json(instance.to_json()) == instance


def test_a_certified_step_costs_no_more_than_the_model() -> None:
    """Where heads are dear, the first steps of the path, at which few images leave, cost more than the final exit."""
    (_, costs), (selection, calibration, _) = population(), split(1)
    dear, useless = (
        replace(costs, heads=costs.heads | {Exit(0, "a"): replace(costs.heads[Exit(0, "a")], macs=macs)})
        for macs in (60, 300)
    )
    exits = (
        ExitChoice(exit_index=0, head="a", pixel_threshold=0.5, image_threshold=0.6),
        ExitChoice(exit_index=2, head="final"),
    )
    before = searched(selection)
    before = replace(before, instance=replace(before.instance, exits=exits))
    path = retreat_path(before.instance, selection)
    means = [cost_of(selection, dear, step).mean() for step in path]
    assert means[1] > means[0] > means[-1]
    given = {"selection": selection, "calibration": calibration}
    after = certify(before, Guarantee(epsilon=0.05, delta=0.1), **given, costs=dear).instance
    assert cost_of(selection, dear, after).mean() <= means[0]
    bold = certify(before, Guarantee(epsilon=0.5, delta=0.1), **given, costs=dear)
    assert bold.instance.exits == exits
    assert f"step {sum(mean <= means[0] for mean in means) - 1} of" in bold.certificate
    asked = certify(before, Guarantee(epsilon=0.5, delta=0.1), **given, costs=useless)
    assert asked.instance.exits == exits  # the searched thresholds themselves stay
    assert "step 1 of 1 from" in asked.certificate


def test_over_two_devices_costs_are_relative_before_and_after_the_retreat() -> None:
    """One device ten times slower, whose backbone is dear and whose heads are cheap: the largest ratio counts."""
    (_, costs), (selection, calibration, _) = population(), split(1)
    slow = replace(
        costs,
        segments=tuple(replace(part, macs=1000) for part in costs.segments),
        heads={exit: replace(part, macs=12 + 9 * exit.exit_index) for exit, part in costs.heads.items()},
    )
    devices = [costs, slow]

    def ratio(instance: Instance) -> float:
        taken = list(by_hand(selection, instance))
        ratios = []
        for table in devices:
            spent = []
            for position in taken:
                leaves = selection.exits[position].exit_index
                passed = [choice for choice in instance.exits if choice.exit_index <= leaves]
                cost = sum(part.macs for part in table.segments[: leaves + 1]) + table.outputs[leaves].macs
                cost += sum(table.heads[choice.exit].macs for choice in passed)
                cost += sum(table.policies[c.exit_index].macs for c in passed if c is not instance.exits[-1])
                spent.append(cost)
            final = selection.exits[-1]
            whole = sum(part.macs for part in table.segments) + table.heads[final].macs + table.outputs[-1].macs
            ratios.append(np.mean(spent) / whole)
        return float(max(ratios))

    objective = Objective(minimise="macs", max_drop_pp=12, max_cost_ratio=0.9)
    before = search_for(selection, devices, objective, grid=Grid(num_image_thresholds=6, max_exits=2), name="safe")
    assert before.selection.cost == pytest.approx(ratio(before.instance))
    after = certify(
        before,
        Guarantee(epsilon=0.06, delta=0.1),
        selection=selection,
        calibration=calibration,
        costs=devices,
    )
    assert after.retreat is not None
    assert after.retreat.before == before.selection
    assert after.selection.unit == before.selection.unit == CostUnit("macs", relative=True)
    assert after.selection.cost == pytest.approx(ratio(after.instance))
    assert before.selection.cost < after.selection.cost <= 1 == after.selection.baseline_cost
    assert after.retreat.still_met == (after.selection.cost <= 0.9)
    assert after.verdict.count("x the model's macs") == 3
    assert "GMACs" not in after.verdict
    assert Selection.from_figures(after.instance.selected_on) == after.selection


def test_a_retreat_is_held_to_every_constraint() -> None:
    """The final exit keeps the parameters of the whole model, which the searched instance does not."""
    (_, costs), (selection, calibration, _) = population(), split(1)
    objective = Objective(max_drop_pp=40, limits_on=(Limit(cost="parameters", at_most=25),))
    before = search_for(selection, costs, objective, grid=Grid(num_image_thresholds=6, max_exits=2))
    tables = {"selection": selection, "calibration": calibration, "costs": costs}
    after = certify(before, Guarantee(epsilon=0.001, delta=0.001), **tables)
    assert [choice.exit for choice in after.instance.exits] == [Exit(2, "final")]
    assert after.verdict.endswith("no longer what was asked for")


def test_too_few_images_fall_back_to_the_final_exit() -> None:
    result, step, _ = certified(2, 0.01, 0.1, num_calibration=30)
    assert step == 0
    assert [choice.exit for choice in result.instance.exits] == [Exit(2, "final")]
    assert result.instance.selected_on["loss"] == 0
    assert "runs to the final exit and loses nothing" in result.certificate
    least = float(re.findall(r"30 calibration images can certify no epsilon below (0\.\d+)", result.certificate)[0])
    assert p_value(np.zeros(30), promise(least + 0.001)) <= 0.1 < p_value(np.zeros(30), promise(least - 0.001))
    needed = images_needed(np.zeros(1), promise(0.01))
    assert re.search(rf"0\.01 takes at least {needed} images\b", result.certificate)


def test_a_retreat_that_breaks_the_objective_says_so() -> None:
    selection, calibration, _ = split(3)
    cheap, (_, costs) = Objective(maximise="miou", max_cost_ratio=0.5), population()
    tables = {"selection": selection, "calibration": calibration, "costs": costs}
    result = certify(searched(selection, cheap), Guarantee(epsilon=0.001, delta=0.001), **tables)
    assert result.verdict.endswith("no longer what was asked for")
    before = searched(selection)
    after = certify(before, Guarantee(epsilon=0.9, delta=0.5), **tables)
    assert after.verdict == before.verdict
    assert after.instance.exits == before.instance.exits


def test_bad_guarantees_are_refused() -> None:
    for epsilon, delta in ((0, 0.1), (1, 0.1), (0.1, 0), (0.1, 1.5), (math.nan, 0.1), (0.1, math.nan)):
        with pytest.raises(RecipeError, match="both between 0 and 1"):
            Guarantee(epsilon=epsilon, delta=delta)
    with pytest.raises(RecipeError, match="at least 1"):
        Guarantee(epsilon=0.1, delta=0.1, num_steps=0)
    selection, calibration, _ = split(0)
    guarantee, costs = Guarantee(epsilon=0.1, delta=0.1), population()[1]
    for bad in (selection, calibration.subset(np.arange(0))):
        with pytest.raises(RecipeError, match="not selected on"):
            certify(searched(selection), guarantee, selection=selection, calibration=bad, costs=costs)
    static = choose(pareto_front(selection, costs, setting="budgeted"), BOLD)
    with pytest.raises(RecipeError, match="search input_dependent"):
        certify(static, guarantee, selection=selection, calibration=calibration, costs=costs)


def test_the_command(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")

    def search(*tokens: str) -> str:
        main(["search", str(run), "--name", "safe", "--maximise", "miou", "--max-cost-ratio", "0.6", *tokens])
        return capsys.readouterr().out

    written = run / "instances" / "safe.json"
    assert "at least 238" in search("--guarantee", "0.01", "0.1")
    assert [choice.head for choice in Instance.from_json(written.read_text()).exits] == ["final"]
    (lax,) = json.loads(search("--guarantee", "0.9", "0.5", "--json"))
    assert (
        "at most 0.9 below the final exit's on average, with probability >= 0.5 over the draw of 8 calibration images"
        in lax["certificate"]
    )
    assert Instance.from_json(written.read_text()).certificate == lax["certificate"]
    assert "calibration" not in search()

    written.unlink()
    for tokens, words in (
        (["--name", "safe", "--guarantee", "1.5", "0.1"], "both between 0 and 1"),
        (["--name", "safe", "--guarantee", "0.1"], "--guarantee"),
        (["--name", "safe", "--guarantee", "0.1", "0.1", "--setting", "budgeted"], "search input_dependent"),
        (["--guarantee", "0.1", "0.1"], "add --name"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["search", str(run), *tokens])
        assert end.value.code == 2
        assert words in capsys.readouterr().err
    assert not written.exists()
