"""A promise on images not seen: the thresholds of a searched instance retreat until their risk is certified.

The images of the selection half choose the instance and, with it, a path of instances from the final exit (safest: it
loses nothing) to the searched thresholds (riskiest). The images of the other half, all of them, certify: each step is
the test of "its expected loss exceeds epsilon", in the order of the path, up to the first that is not rejected. This is
fixed-sequence testing: the path is fixed before a calibration image is looked at, so a wrong certificate needs the
rejection of the path's first wrong step, and that has probability <= delta. However long the path, the steps before
cost nothing (Angelopoulos et al., "Learn then Test", 2021, section 2.4; for early exits Jazbec et al., "Fast yet Safe:
Early-Exiting with Risk Control", 2024).

The certificate stands in for a report: the mean loss of the certified step on the calibration images flatters, since
they helped to choose the step. Each certificate holds for itself, not for the best of several.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from messnet.errors import RecipeError
from messnet.instance import ExitChoice, Instance
from messnet.search.results import DECIMALS, SearchResult
from messnet.search.space import Objective, confidence_at, cost_of, image_threshold, route
from messnet.tables import CostTable, ExitTables, FloatArray, IntArray

__all__ = ["Guarantee", "certified_step", "certify", "images_needed", "loss_of", "p_value", "retreat_path"]


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """With probability >= 1 - delta over the draw of the calibration images, the expected loss is <= epsilon."""

    epsilon: float
    """Largest expected loss per image, see ``loss_of``; in (0, 1)."""
    delta: float
    """Largest probability that the promise is wrong; in (0, 1)."""
    num_steps: int = 100
    """Steps of the path, >= 1; those that route alike count once."""

    def __post_init__(self) -> None:
        if not (0 < self.epsilon < 1 and 0 < self.delta < 1):
            raise RecipeError(
                f"a guarantee takes epsilon and delta, both between 0 and 1, such as 0.01 0.1; "
                f"got {self.epsilon:g} {self.delta:g}"
            )
        if self.num_steps < 1:
            raise RecipeError(f"num_steps is {self.num_steps}, expected at least 1")


def certify(
    result: SearchResult,
    objective: Objective,
    guarantee: Guarantee,
    *,
    selection: ExitTables,
    calibration: ExitTables,
    costs: CostTable,
) -> SearchResult:
    """``result`` with the boldest instance of its path that the calibration images certify, at worst the final exit.

    ``selection`` are the tables that ``result`` was searched on. The new certificate says in words what is promised
    and, where the path was not walked to its end, how many images would do. Raises RecipeError for a budgeted
    instance, which has no thresholds, and for calibration images that are none or were selected on.
    """
    if result.instance.setting != "input_dependent":
        raise RecipeError("a guarantee moves image thresholds, a budgeted instance has none: search input_dependent")
    num_images, shared = len(calibration.image_names), {*selection.image_names} & {*calibration.image_names}
    if not num_images or shared:
        raise RecipeError(
            f"a guarantee calibrates on images that were not selected on: got {num_images}, {len(shared)} of them were"
        )

    path = retreat_path(result.instance, selection, guarantee.num_steps)
    losses = np.array([loss_of(calibration, route(calibration, step)) for step in path])
    certified, p = certified_step(losses, guarantee)
    retreats = certified + 1 < len(path)

    certificate = _certificate(guarantee, losses[certified], p, certified, len(path) - 1)
    if retreats:
        certificate += f"; {_shortfall(guarantee, num_images, float(losses[certified + 1 :].mean(1).max()))}"
    measured = result.instance.selected_on | _measure(path[certified], objective, selection, costs)
    instance = replace(path[certified], selected_on=measured, certificate=f"{certificate}; {result.certificate}")
    verdict = _verdict(result.instance, instance, objective) if retreats else result.verdict
    return replace(result, instance=instance, certificate=instance.certificate, verdict=verdict)


def certified_step(losses: FloatArray, guarantee: Guarantee) -> tuple[int, float]:
    """The boldest step of a path that the losses (steps, n) of n calibration images certify, and its p-value.

    Fixed-sequence testing: up to the first step that is not rejected. The first step, the final exit, loses nothing and
    needs no test.
    """
    certified, p = 0, 0.0
    for step, row in enumerate(losses[1:], start=1):
        tested = p_value(row, guarantee.epsilon)
        if tested > guarantee.delta:
            break
        certified, p = step, tested
    return certified, p


def loss_of(tables: ExitTables, routing: IntArray) -> FloatArray:
    """(V,) loss in [0, 1] of each image under a routing (V,) of positions in ``tables.exits``.

    The drop of the share of correct pixels against the final exit (method.md section 9), 0 where an image gains. An
    image without labelled pixels loses nothing.
    """
    images = np.arange(len(tables.image_names))
    correct, correct_finally = (
        tables.intersection[images, exits].sum(1, dtype=np.int64) for exits in (routing, tables.final)
    )
    lost = np.maximum(correct_finally - correct, 0)
    loss: FloatArray = lost / np.maximum(tables.labelled.sum(1, dtype=np.int64), 1)
    return loss


def p_value(losses: FloatArray, epsilon: float) -> float:
    """Hoeffding-Bentkus p-value of "the expected loss exceeds epsilon" from the losses (n,) in [0, 1] of n >= 1 images.

    Valid at every n: the smaller of two bounds on the probability of so small a mean, exp(-n KL(mean, epsilon)) and
    e P(Binomial(n, epsilon) <= ceil(n mean)) (Bates et al., "Distribution-Free, Risk-Controlling Prediction Sets",
    2021, theorem 7; "Learn then Test", proposition 4). Without any loss it is (1 - epsilon)^n.
    """
    num_images, total = len(losses), math.fsum(losses)
    hoeffding = math.exp(-num_images * _divergence(min(total / num_images, epsilon), epsilon))
    bentkus = math.e * _binomial_cdf(math.ceil(total), num_images, epsilon)
    return min(1.0, hoeffding, bentkus)


def images_needed(mean_loss: float, guarantee: Guarantee) -> int:
    """The calibration images that would certify a step of this mean loss, which must be below epsilon.

    By the Hoeffding bound alone, so somewhat fewer may do; exact for a mean loss of 0: 1 - delta^(1/n) is the smallest
    epsilon that n images can certify.
    """
    return math.ceil(-math.log(guarantee.delta) / _divergence(mean_loss, guarantee.epsilon))


def retreat_path(instance: Instance, selection: ExitTables, num_steps: int = 100) -> list[Instance]:
    """From the final exit alone to ``instance``, ever bolder; it depends on the selection images only.

    At step k of ``num_steps`` each early exit keeps the k / ``num_steps`` most confident of the selection images that
    reach its searched image threshold; one that keeps none is left out. The final exit takes the rest. If the instance
    cuts the model, its last exit is an early exit that all images may leave at, until the end of the path cuts.
    """
    last = selection.exits[selection.final]
    final = ExitChoice(exit_index=last.exit_index, head=last.head)
    early = [_with_thresholds(choice, instance, selection) for choice in instance.exits if choice.exit != last]
    path = [replace(instance, exits=(final,))]
    for k in range(1, num_steps):
        kept = [_keep(choice, instance.policy, selection, k, num_steps) for choice in early]
        step = replace(instance, exits=(*(choice for choice in kept if choice), final))
        if step != path[-1]:
            path.append(step)
    return path if path[-1] == instance else [*path, instance]


def _with_thresholds(choice: ExitChoice, instance: Instance, selection: ExitTables) -> ExitChoice:
    """The exit where an instance cuts decides nothing: here it may, at the pixel threshold that ranks its losses best.

    That is the one with the least loss summed over how many images leave, the most confident first.
    """
    if choice.image_threshold is not None:
        return choice
    position = selection.exits.index(choice.exit)
    losses = loss_of(selection, np.full(len(selection.image_names), position))
    confidence = selection.image_confidence[:, position, selection.policies.index(instance.policy)]
    ranked = losses[np.argsort(-confidence, axis=0, kind="stable")]  # (V, T)
    best = int(ranked.cumsum(0).sum(0).argmin())
    return replace(choice, pixel_threshold=float(selection.pixel_thresholds[best]), image_threshold=0.0)


def _keep(choice: ExitChoice, policy: str, selection: ExitTables, k: int, num_steps: int) -> ExitChoice | None:
    """``choice`` with the image threshold that the k / num_steps most confident of its selection images reach."""
    assert choice.image_threshold is not None
    observed = np.sort(confidence_at(selection, choice, policy))
    num_kept = int((observed >= np.float64(choice.image_threshold)).sum()) * k // num_steps
    return replace(choice, image_threshold=image_threshold(observed, observed[-num_kept])) if num_kept else None


def _measure(instance: Instance, objective: Objective, selection: ExitTables, costs: CostTable) -> dict[str, float]:
    """What the retreated instance does to the selection images, under the search's own keys."""
    routing = route(selection, instance)
    return {
        "miou": round(selection.miou(routing), DECIMALS),
        objective.cost_name: float(cost_of(selection, costs, instance, objective.cost_name).mean()),
        "loss": float(loss_of(selection, routing).mean()),
    }


def _certificate(guarantee: Guarantee, losses: FloatArray, p: float, position: int, num_steps: int) -> str:
    """The promise in words."""
    if position == 0:
        nothing = "every image runs to the final exit and loses nothing against it"
        why = f": none of {num_steps} steps from there to the searched thresholds could be certified"
        return nothing + (why if num_steps else "")
    return (
        f"an image's expected loss of correct pixels against the final exit is <= {guarantee.epsilon:g} with "
        f"probability >= {1 - guarantee.delta:g} over the draw of {len(losses)} calibration images, if these and new "
        f"images are drawn independently from one source: p-value {p:.3g} at mean loss {losses.mean():.3g}, step "
        f"{position} of {num_steps} from the final exit to the searched thresholds, tested in this order"
    )


def _shortfall(guarantee: Guarantee, num_images: int, loss_ahead: float) -> str:
    """Why the path was not walked to its end; ``loss_ahead`` is the largest mean loss of a step not certified."""
    least = images_needed(0.0, guarantee)
    if num_images < least:
        possible = 1 - guarantee.delta ** (1 / num_images)
        return (
            f"{num_images} calibration images can certify no epsilon below {possible:.3g}, even without any loss; "
            f"{guarantee.epsilon:g} takes at least {least}"
        )
    ahead = f"the steps ahead have mean losses up to {loss_ahead:.3g}"
    if loss_ahead < guarantee.epsilon:
        return f"{ahead}: about {images_needed(loss_ahead, guarantee)} images would certify the searched thresholds"
    return f"{ahead}: more images would not certify the searched thresholds"


def _verdict(searched: Instance, retreated: Instance, objective: Objective) -> str:
    """What the retreat cost, and whether the objective still holds, on the selection images."""
    cost, before, after = objective.cost_name, searched.selected_on, retreated.selected_on
    least_miou, largest_cost = objective.limits(after["baseline_miou"], after[f"baseline_{cost}"])
    holds = after["miou"] >= round(least_miou, DECIMALS) and after[cost] <= largest_cost
    return (
        f"retreated from mIoU {before['miou']:.4f} at {before[cost]:.4g} {cost} to mIoU {after['miou']:.4f} at "
        f"{after[cost]:.4g} {cost} (the model itself: {after['baseline_miou']:.4f} at "
        f"{after[f'baseline_{cost}']:.4g})" + ("" if holds else ": no longer what was asked for")
    )


def _divergence(a: float, b: float) -> float:
    """Kullback-Leibler divergence of coin a from coin b, in nats; a in [0, 1], b in (0, 1)."""
    return sum(p * math.log(p / q) for p, q in ((a, b), (1 - a, 1 - b)) if p)


def _binomial_cdf(k: int, n: int, probability: float) -> float:
    """P(Binomial(n, probability) <= k), the sum of its terms; probability in (0, 1), 0 <= k <= n."""
    i = np.arange(1, k + 1)
    odds = math.log(probability) - math.log1p(-probability)
    log_terms = n * math.log1p(-probability) + np.concatenate([[0.0], np.cumsum(np.log((n + 1 - i) / i) + odds)])
    return min(1.0, math.fsum(np.exp(log_terms)))
