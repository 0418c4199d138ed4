"""A promise on images not seen (docs/method.md#guarantee): the thresholds of a searched instance retreat until their
risk is certified.

Why a long path costs nothing: it is fixed before a calibration image is looked at and tested in its order, so a wrong
certificate needs the rejection of its first wrong step, and that has probability <= delta (fixed-sequence testing:
"Learn then Test", section 2.4). The certificate stands in for a report: the mean loss of the certified step on the
calibration images flatters, since they helped to choose the step. Each certificate holds for itself, not for the best
of several.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from messnet.errors import RecipeError
from messnet.records.arrays import FloatArray, IntArray
from messnet.records.costs import CostTable
from messnet.records.exit_tables import ExitTables
from messnet.records.instance import ExitChoice, Instance
from messnet.searching import words
from messnet.searching.answers import MOST_IMAGES, Promise, Retreat, SearchResult, Shortfall
from messnet.searching.grid import confidence_at, image_thresholds, route
from messnet.searching.measure import CostMeasure, Routed, meets, reached_of
from messnet.searching.objective import Guarantee, Objective


def certify(
    result: SearchResult,
    guarantee: Guarantee,
    *,
    selection: ExitTables,
    calibration: ExitTables,
    costs: CostTable | Sequence[CostTable],
) -> SearchResult:
    """``result`` with the boldest instance of its path that the calibration images certify, at worst the final exit.

    ``selection`` and ``costs`` are the tables that ``result`` was searched on; by them, too, steps that cost more than
    the final exit alone are left out. The result's ``promise`` says what is certified and, where the path was not
    walked to its end, how many images would do. Raises RecipeError for a budgeted instance, which has no thresholds,
    and for calibration images that are none or were selected on.
    """
    objective = result.objective
    if result.instance.setting != "input_dependent" or not isinstance(objective, Objective):
        raise RecipeError("a guarantee moves image thresholds, a budgeted instance has none: search input_dependent")
    # An image that chose the instance cannot testify for it.
    num_images, shared = len(calibration.image_names), {*selection.image_names} & {*calibration.image_names}
    if not num_images or shared:
        raise RecipeError(
            f"a guarantee calibrates on images that were not selected on: got {num_images}, {len(shared)} of them were"
        )

    measure = CostMeasure.of(objective, costs)
    # The path is fixed by the selection images alone: the test below may then go along it for free.
    path = no_dearer(retreat_path(result.instance, selection, guarantee.num_steps), measure, selection)
    losses = np.array([_by_group(calibration, loss_of(calibration, route(calibration, step))) for step in path])
    # p_value bets on one group after the other: a trend in the order of the files is no loss of their source.
    losses = losses[:, np.random.default_rng(0).permutation(losses.shape[1])]
    step, p = certified_step(losses, guarantee)
    certified, retreats = path[step], step + 1 < len(path)

    routed = Routed.through(selection, certified)
    # Measured as the search measured it: the same cost, statistic, devices and unit.
    after = replace(
        result.selection,
        miou=routed.miou,
        cost=measure.measure(routed),
        loss=float(_by_group(selection, loss_of(selection, routed.routing)).mean()),
        reached=reached_of(objective, measure, routed),
    )
    retreat = None
    if retreats:
        still_met = meets(objective, measure, routed)
        retreat = Retreat(before=result.selection, after=after, still_met=still_met)
    promise = Promise(
        guarantee=guarantee,
        num_images=num_images,
        num_groups=losses.shape[1],
        p_value=p,
        mean_loss=float(losses[step].mean()),
        step=step,
        num_steps=len(path) - 1,
        shortfall=_shortfall(guarantee, losses[step + 1 :]) if retreats else None,
    )
    certified = replace(certified, selected_on=after.to_figures())
    return words.with_words(replace(result, instance=certified, selection=after, promise=promise, retreat=retreat))


def certified_step(losses: FloatArray, guarantee: Guarantee) -> tuple[int, float]:
    """The boldest step of a path that the losses (steps, n) of n calibration images certify, and its p-value.

    Fixed-sequence testing: up to the first step that is not rejected. The first step, the final exit, loses nothing and
    needs no test.
    """
    certified, p = 0, 0.0
    # Testing stops at the first step that is not rejected; later ones are never looked at.
    for step, row in enumerate(losses[1:], start=1):
        tested = p_value(row, guarantee)
        if tested > guarantee.delta:
            break
        certified, p = step, tested
    return certified, p


def loss_of(tables: ExitTables, routing: IntArray) -> FloatArray:
    """(V,) loss in [0, 1] of each image under a routing (V,) of positions in ``tables.exits``.

    The loss is the drop of the share of correct pixels against the final exit (docs/method.md#guarantee). It is 0
    where an image gains, and for an image without labelled pixels.
    """
    images = np.arange(len(tables.image_names))
    correct, correct_finally = (
        tables.intersection[images, exits].sum(1, dtype=np.int64) for exits in (routing, tables.final)
    )
    lost = np.maximum(correct_finally - correct, 0)
    loss: FloatArray = lost / np.maximum(tables.labelled.sum(1, dtype=np.int64), 1)
    return loss


def _by_group(tables: ExitTables, losses: FloatArray) -> FloatArray:
    """(G,) mean loss of the images (V,) of each group.

    Images of one drive or patient are no independent draws: groups are what new ones are like, so a group's mean loss
    is what is tested. Where every image is a group of its own nothing changes.
    """
    ids = tables.group_ids()
    means: FloatArray = np.bincount(ids, weights=losses) / np.bincount(ids)
    return means


def p_value(losses: FloatArray, guarantee: Guarantee) -> float:
    """p-value of "the expected loss exceeds epsilon" from the losses (n,) in [0, 1] of n >= 1 images, in random order.

    By betting against it. A capital of 1 is multiplied by ``1 + bet_i (epsilon - loss_i)`` image after image; if the
    expected loss is epsilon or more, no such bets make it grow on average, and the chance that it ever reaches 1 / u is
    at most u, at every n (Ville's inequality). So p is 1 over the largest capital on the way. Each bet looks at the
    images before it only,

        bet_i = min(1, sqrt(2 log(1 / delta) / (n variance_(i-1))))

    and is high where losses spread little, as drops of accuracy do; bounds by Hoeffding and Bentkus take the spread for
    as large as the mean allows. delta sets the bets, p is valid for any (Waudby-Smith and Ramdas, "Estimating means of
    bounded random variables by betting", 2024; these bets: Bates et al., "Distribution-Free, Risk-Controlling
    Prediction Sets", 2021).
    """
    num_images = len(losses)
    # The bets look at the images before only: estimates run behind by one image.
    seen = np.arange(2, num_images + 2)  # and one image made up, of loss 1/2 and variance 1/4
    mean = (0.5 + losses.cumsum()) / seen
    variance = (0.25 + ((losses - mean) ** 2).cumsum()) / seen
    before = np.concatenate([[0.25], variance[:-1]])
    bets = np.minimum(1, np.sqrt(-2 * math.log(guarantee.delta) / (num_images * before)))
    # Ville: the largest capital on the way counts, in logarithms against overflow.
    capital = np.log1p(bets * (guarantee.epsilon - losses)).cumsum().max()
    return math.exp(-max(0.0, float(capital)))


def images_needed(losses: FloatArray, guarantee: Guarantee) -> int | None:
    """The calibration images, with losses like these (n,) over and over, that would certify a step; exact for no loss.

    None where more than ``MOST_IMAGES`` would not do.
    """

    def certify_it(num_images: int) -> bool:
        return p_value(np.resize(losses, num_images), guarantee) <= guarantee.delta

    # Doubling, then bisection: certifying is taken for monotone in the number of images.
    enough = 1
    while not certify_it(enough):
        if enough >= MOST_IMAGES:
            return None
        enough *= 2
    return bisect_left(range(enough), True, lo=enough // 2 + 1, key=certify_it)


def retreat_path(instance: Instance, selection: ExitTables, num_steps: int = 100) -> list[Instance]:
    """From the final exit alone to ``instance``, ever bolder; it depends on the selection images only.

    At step k of ``num_steps`` each early exit keeps the k / ``num_steps`` most confident of the selection images that
    reach its searched image threshold; one that keeps none is left out. The final exit takes the rest. If the instance
    cuts the model, its last exit is an early exit that all images may leave at, until the end of the path cuts.
    """
    last = selection.exits[selection.final]
    final = ExitChoice(exit_index=last.exit_index, head=last.head)
    # The exit at which the instance cuts decides on the path, so it needs thresholds there.
    early = [_with_thresholds(choice, instance, selection) for choice in instance.exits if choice.exit != last]
    path = [replace(instance, exits=(final,))]
    for k in range(1, num_steps):
        # Every exit keeps k / num_steps of the images that it keeps at the end: each step is bolder than the last.
        kept = [_keep(choice, instance.policy, selection, k, num_steps) for choice in early]
        step = replace(instance, exits=(*(choice for choice in kept if choice), final))
        if step != path[-1]:
            path.append(step)
    return path if path[-1] == instance else [*path, instance]


def no_dearer(path: list[Instance], measure: CostMeasure, selection: ExitTables) -> list[Instance]:
    """The path without the steps whose mean cost is above that of the final exit alone: where few images leave, their
    heads cost more than they save. The searched instance stays: it is what was asked for."""
    means = [measure.measure(Routed.through(selection, step), "mean") for step in path]
    return [step for step, mean in zip(path, means, strict=True) if mean <= means[0] or step is path[-1]]


def _with_thresholds(choice: ExitChoice, instance: Instance, selection: ExitTables) -> ExitChoice:
    """The exit where an instance cuts decides nothing: here it may, at the pixel threshold that ranks its losses best.

    That is the one with the least loss summed over how many images leave, the most confident first.
    """
    if choice.image_threshold is not None:
        return choice
    position = selection.exits.index(choice.exit)
    losses = loss_of(selection, np.full(len(selection.image_names), position))
    confidence = selection.image_confidence[:, position, selection.policies.index(instance.policy)]
    # Losses in the order in which images would leave, for each pixel threshold.
    ranked = losses[np.argsort(-confidence, axis=0, kind="stable")]  # (V, T)
    best = int(ranked.cumsum(0).sum(0).argmin())
    return replace(choice, pixel_threshold=float(selection.pixel_thresholds[best]), image_threshold=0.0)


def _keep(choice: ExitChoice, policy: str, selection: ExitTables, k: int, num_steps: int) -> ExitChoice | None:
    """``choice`` with the image threshold that the k / num_steps most confident of its selection images reach; None: it
    keeps none."""
    assert choice.image_threshold is not None
    observed = np.sort(confidence_at(selection, choice, policy))
    num_kept = int((observed >= np.float64(choice.image_threshold)).sum()) * k // num_steps
    if not num_kept:
        return None
    # Just below the least confident image that is kept, and above the next one.
    (threshold,) = image_thresholds(observed, observed[[-num_kept]])
    return replace(choice, image_threshold=float(threshold))


def _shortfall(guarantee: Guarantee, ahead: FloatArray) -> Shortfall:
    """Why the path was not walked to its end; ``ahead`` are the losses (steps, n) of the steps not certified."""
    # The step with the largest loss decides how many images the whole path would take.
    worst = ahead[ahead.mean(1).argmax()]
    hopeless = worst.mean() >= guarantee.epsilon
    return Shortfall(
        least_images=images_needed(np.zeros(1), guarantee),
        least_epsilon=_least_epsilon(ahead.shape[1], guarantee),
        worst_loss=float(worst.mean()),
        images_needed=None if hopeless else images_needed(worst, guarantee),
    )


def _least_epsilon(num_images: int, guarantee: Guarantee) -> float:
    """The smallest epsilon, to 6 decimals, that so many images without any loss certify; at most 1."""
    # Whoever is certified for an epsilon is so for a larger one: bisection over the six decimals.
    millionths, none = range(1, 1_000_000), np.zeros(num_images)
    place = bisect_left(
        millionths,
        True,
        key=lambda m: p_value(none, replace(guarantee, epsilon=m / 1e6)) <= guarantee.delta,
    )
    return (place + 1) / 1e6
