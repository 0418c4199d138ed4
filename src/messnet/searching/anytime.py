"""Search in the anytime setting: a set of exits that all run, each with a result at hand when it is reached.

Here an image's thresholds decide nothing, so an instance is a choice of exits with one head each. Its results must get
better from exit to exit, for one that is no better than the one before is of no use. All choices are evaluated: 56
heads at three of six exit points are two million, and each is a handful of sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from messnet.errors import InfeasibleError, RecipeError
from messnet.records.arrays import FloatArray, IntArray
from messnet.records.costs import CostName, CostTable
from messnet.records.exit_tables import ExitTables
from messnet.records.instance import ExitChoice, Instance
from messnet.records.iou import mean_iou
from messnet.searching.exact.problem import checked

__all__ = ["AnytimeObjective", "AnytimePoint", "AnytimeResult", "Figures", "figures_of", "search_anytime"]

AnytimeGoal = Literal["area", "first_cost", "overhead", "miou"]


@dataclass(frozen=True, kw_only=True)
class AnytimeObjective:
    """What an anytime search is asked for, subject to every constraint that is not None."""

    goal: AnytimeGoal = "area"
    """The largest area under the accuracy-cost curve; the cheapest first result; the least overhead; the best
    last mIoU."""
    cost: CostName = "macs"
    """A cost that images pay: workload or latency."""
    horizon: float = 1.5
    """Where the area ends, in costs of the user's whole model; > 0."""
    max_first_cost: float | None = None
    """Cost of the first result, in the unit of the cost."""
    max_first_ratio: float | None = None
    """The same, relative to the user's whole model."""
    min_first_miou: float | None = None
    max_overhead: float | None = None
    """Cost of running all exits relative to the last one alone, less 1."""
    min_area: float | None = None
    min_miou: float | None = None
    """Of the last result, in [0, 1]."""
    max_drop_pp: float | None = None
    """Of the last result against the final exit."""
    min_exits: int = 2
    """Exits of an instance, the last one included."""

    def __post_init__(self) -> None:
        if self.goal not in get_args(AnytimeGoal):
            raise RecipeError(f"unknown anytime goal {self.goal!r}: expected one of {', '.join(get_args(AnytimeGoal))}")
        if self.cost not in ("macs", "macs_paper", "latency_ms", "latency_p95_ms"):
            raise RecipeError(
                f"an anytime result does not come after so many {self.cost}: expected workload or latency"
            )
        if not 0 < self.horizon < math.inf:
            raise RecipeError(f"the horizon is {self.horizon:g} costs of the model: expected more than 0")
        if self.min_exits < 1:
            raise RecipeError(f"min_exits is {self.min_exits}, expected at least 1")

    def __str__(self) -> str:
        goals = {
            "area": f"largest area under the curve up to {self.horizon:g}x the model's {self.cost}",
            "first_cost": f"cheapest first result in {self.cost}",
            "overhead": f"least overhead in {self.cost}",
            "miou": "most accurate last result",
        }
        constraints = [
            (self.max_first_cost, "first result <= {} " + self.cost),
            (self.max_first_ratio, "first result <= {}x the model's " + self.cost),
            (self.min_first_miou, "first mIoU >= {}"),
            (self.max_overhead, "overhead <= {}"),
            (self.min_area, "area >= {}"),
            (self.min_miou, "mIoU >= {}"),
            (self.max_drop_pp, "<= {} pp drop"),
        ]
        words = [text.format(f"{value:g}") for value, text in constraints if value is not None]
        return f"{goals[self.goal]} at {' and '.join(words)}" if words else goals[self.goal]


class Figures(NamedTuple):
    """What n anytime instances do, each (n,)."""

    first_cost: FloatArray
    """Until the first result is there."""
    total_cost: FloatArray
    """Until the last result is there: all segments, heads and outputs on the way."""
    overhead: FloatArray
    """Of the total over running the last exit alone, relative."""
    area: FloatArray
    """Mean mIoU of the result at hand over costs from 0 to the horizon; 0 before the first."""
    first_miou: FloatArray
    miou: FloatArray
    """Of the last result."""

    def take(self, rows: NDArray[Any]) -> Figures:
        return Figures(*(values[rows] for values in self))


class AnytimePoint(NamedTuple):
    miou: float
    cost: float
    """In all."""
    instance: Instance


class AnytimeResult(NamedTuple):
    best: list[AnytimePoint]
    """The best choice and the next ones, best first."""
    verdict: str


def figures_of(mious: FloatArray, reached: FloatArray, extra: FloatArray, horizon: float) -> Figures:
    """Of the chosen exits (n, exits), shallow to deep: their mIoU, the backbone's cost up to each, and head and output
    of each; ``horizon`` in the same unit."""
    times = reached + np.cumsum(extra, axis=1)
    ends = np.minimum(np.concatenate([times, np.full((len(times), 1), horizon)], axis=1), horizon)
    alone = reached[:, -1] + extra[:, -1]
    ratio = np.divide(times[:, -1], alone, out=np.ones(len(times)), where=alone > 0)
    area = (mious * np.diff(ends, axis=1)).sum(1) / horizon
    return Figures(times[:, 0], times[:, -1], ratio - 1, area, mious[:, 0], mious[:, -1])


def search_anytime(
    tables: ExitTables, costs: CostTable, objective: AnytimeObjective, *, max_exits: int, policy: str, num: int = 4
) -> AnytimeResult:
    """The best ``num`` choices of up to ``max_exits`` exits. Raises InfeasibleError when none meets the constraints."""
    column = checked(costs, tables, objective.cost)
    reached = np.array([column.prefix(int(index)) for index in column.exit_indices])
    extra = column.heads + column.outputs
    mious = np.array([_miou(tables, position) for position in range(len(tables.exits))])
    model = costs.total(objective.cost)
    if model <= 0:
        raise RecipeError(f"the user's model costs no {objective.cost}: nothing to measure anytime results by")

    best: list[tuple[tuple[float, ...], tuple[int, ...], Figures]] = []
    possible: list[Figures] = []
    num_choices = 0
    for positions in _choices(tables, objective.min_exits, max_exits):
        num_choices += len(positions)
        positions = positions[(np.diff(mious[positions], axis=1) > 0).all(1)]
        figures = figures_of(mious[positions], reached[positions], extra[positions], objective.horizon * model)
        if len(positions):
            possible.append(figures)
        met = np.flatnonzero(_meets(objective, figures, float(mious[-1]), model))
        ranks = _ranks(objective, figures.take(met))
        for i in np.lexsort(ranks[::-1])[:num]:
            one = tuple(positions[met[i]].tolist())
            best.append((tuple(float(rank[i]) for rank in ranks), one, figures.take(met[[i]])))
    if not best:
        raise InfeasibleError(_nearest(objective, possible))
    best = sorted(best, key=lambda one: one[:2])[:num]
    certificate = f"optimal: all {num_choices} choices of {objective.min_exits} to {max_exits} exits were evaluated"
    points = [
        AnytimePoint(
            float(figures.miou[0]),
            float(figures.total_cost[0]),
            _instance(tables, positions, figures, objective, policy, certificate),
        )
        for _, positions, figures in best
    ]
    return AnytimeResult(points, _verdict(best[0][2], model, float(mious[-1])))


def _choices(tables: ExitTables, min_exits: int, max_exits: int) -> Iterator[IntArray]:
    """(n, exits) positions in ``tables.exits``, one array for every set of exit points."""
    at: dict[int, list[int]] = {}
    for position, exit in enumerate(tables.exits):
        at.setdefault(exit.exit_index, []).append(position)
    for size in range(min_exits, max_exits + 1):
        for indices in combinations(sorted(at), size):
            yield np.stack(np.meshgrid(*(at[index] for index in indices), indexing="ij"), axis=-1).reshape(-1, size)


def _miou(tables: ExitTables, position: int) -> float:
    return mean_iou(*tables.counts(np.full(len(tables.image_names), position)))


def _meets(objective: AnytimeObjective, figures: Figures, baseline_miou: float, model: float) -> NDArray[np.bool_]:
    upper = [
        (figures.first_cost, objective.max_first_cost),
        (figures.first_cost, None if objective.max_first_ratio is None else objective.max_first_ratio * model),
        (figures.overhead, objective.max_overhead),
    ]
    lower = [
        (figures.first_miou, objective.min_first_miou),
        (figures.area, objective.min_area),
        (figures.miou, objective.min_miou),
        (figures.miou, None if objective.max_drop_pp is None else baseline_miou - objective.max_drop_pp / 100),
    ]
    met = np.ones(len(figures.miou), bool)
    for values, bound in upper:
        met &= True if bound is None else values <= bound
    for values, bound in lower:
        met &= True if bound is None else values >= bound - 1e-12  # float sums of equal ratios differ
    return met


def _ranks(objective: AnytimeObjective, figures: Figures) -> list[FloatArray]:
    """Best first; of equal ones the larger area, then the cheaper."""
    goal = {
        "area": -figures.area,
        "first_cost": figures.first_cost,
        "overhead": figures.overhead,
        "miou": -figures.miou,
    }[objective.goal]
    return [goal.round(12), (-figures.area).round(12), figures.total_cost]


def _instance(
    tables: ExitTables,
    positions: tuple[int, ...],
    figures: Figures,
    objective: AnytimeObjective,
    policy: str,
    certificate: str,
) -> Instance:
    exits = [tables.exits[position] for position in positions]
    return Instance(
        name="anytime",
        setting="anytime",
        exits=tuple(ExitChoice(exit_index=e.exit_index, head=e.head) for e in exits),
        policy=policy,
        objective=str(objective),
        selected_on={
            "miou": float(figures.miou[0]),
            objective.cost: float(figures.total_cost[0]),
            f"first_{objective.cost}": float(figures.first_cost[0]),
            "first_miou": float(figures.first_miou[0]),
            "overhead": float(figures.overhead[0]),
            "area": float(figures.area[0]),
            "images": len(tables.image_names),
        },
        certificate=certificate,
    )


def _verdict(figures: Figures, model: float, baseline_miou: float) -> str:
    return (
        f"first result (mIoU {figures.first_miou[0]:.4f}) at {figures.first_cost[0] / model:.2f}x the model, last "
        f"(mIoU {figures.miou[0]:.4f}, the model's {baseline_miou:.4f}) at {figures.total_cost[0] / model:.2f}x, "
        f"{figures.overhead[0]:.1%} more than the last exit alone; area {figures.area[0]:.4f}"
    )


def _nearest(objective: AnytimeObjective, possible: list[Figures]) -> str:
    if not possible:
        return f"no anytime instance of at least {objective.min_exits} exits gets better from exit to exit"
    first = min(one.first_cost.min() for one in possible)
    overhead = min(one.overhead.min() for one in possible)
    first_miou, area, miou = (
        max(getattr(one, key).max() for one in possible) for key in ("first_miou", "area", "miou")
    )
    return (
        f"no instance is {objective}; possible are: first result at {first:.4g} {objective.cost}, first mIoU "
        f"{first_miou:.4f}, overhead {overhead:.3f}, area {area:.4f}, last mIoU {miou:.4f}; relax a constraint"
    )
