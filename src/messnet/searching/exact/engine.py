"""Exact search over tables: enumeration up to two exits, branch and bound for three.

An instance of early exits a < b and last exit c sends the images of a set A out at a, those of B \\ A at b, the rest at
c. At one exit, head and pixel threshold the sets of all image thresholds are nested, so that running sums of pixel
counts over the images, the most confident first, give the mIoU at every threshold. All instances of one and two exits
are evaluated in this way, and all of one choice of three exits in little more: see ``kernels``.

Of three exits there are too many choices of heads (1.8 million at 5 early exits x 56 heads). Each is bounded:

- *Tangent.* With r_k, U0_k the IoU and union of class k in some good instance, R the mean of r_k, and, for any other,
  l_k = (I_k - r_k U_k) / U0_k and u_k = U_k / U0_k - 1:  I_k / U_k = r_k + l_k / (1 + u_k). The mean of l_k is
  linear in the pixel counts, so it is a sum over images of what each contributes at the exit it takes.
- *Remainder.* Let p_k = l_k / (1 + u_k). An instance with mIoU >= R + tau has mean p >= tau, so for any s >= 0
  mIoU - R = mean p <= mean l + mean((1 + s) p - l) - s tau. Where l_k and u_k lie within known ends, a class adds at
  most the largest of the four corners, nor more than (1 + s) (1 - r_k) less the lower end of l_k, as no IoU is above 1.
- *Price.* For any mu >= 0 the best of mean l - mu cost over all sets is an upper bound along a line in the plane of
  cost and mIoU. With g what an image contributes at an exit, less mu times what it costs to leave there, it is at most
  the best of (b, B, c) alone plus the best over A of the sum of g_a - min(g_b, g_c): both are running sums.

A choice whose line passes below everything that would be news is done; the others are evaluated in full, the most
promising first. Stopped early, the lines of the choices left are the proved gap.

Ties: of equal instances fewer exits, then the shallower last exit, the shallower middle, the shallower first, then the
pixel thresholds' order and the fewer images leaving early.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from messnet.errors import RecipeError
from messnet.records.arrays import FloatArray, IntArray
from messnet.searching.exact import kernels
from messnet.searching.exact.bounds import MARGIN, bound_triples
from messnet.searching.exact.cells import Form, Sets, bound_choices, classes_of, fill_ranges, form_at, try_choices
from messnet.searching.exact.choices import Choices, nothing, try_choice, wanted
from messnet.searching.exact.front import sweep
from messnet.searching.exact.outcome import Outcome, OutOfTimeError, Region
from messnet.searching.exact.problem import MEAN, Found, Problem
from messnet.searching.exact.tangent import NO_TANGENT, tangent_at

__all__ = ["Engine", "try_choice"]

MANY_LEFT = 20_000  # choices for which a bound at another price pays
NUM_SEEDS = 256  # choices evaluated before any is bounded
PER_BATCH = 8  # choices that a worker evaluates between two looks at the clock

Item = TypeVar("Item")
Result = TypeVar("Result")


class Engine:
    """One search. ``run`` once."""

    def __init__(
        self,
        problem: Problem,
        region: Region,
        *,
        max_exits: int,
        time_limit: float | None,
        progress: bool,
        precision: float = 0.0,
    ):
        if time_limit is not None and not time_limit >= 0:
            raise RecipeError(f"a search takes at least 0 seconds, its time limit cannot be {time_limit:g}")
        self.precision = precision  # mIoU; what is above a front by less need not be found
        self.problem, self.region, self.max_exits, self.progress = problem, region, max_exits, progress
        self.arrays = problem.arrays
        self.deadline = np.inf if time_limit is None else time.monotonic() + time_limit
        self.found, self.num_evaluated = nothing(), 0
        self.near: dict[tuple[int, ...], tuple[float, float, int]] = {}
        self.alone = {i: nothing() for i in np.unique(self.arrays.exit_index).tolist()}  # of an exit point's heads
        self.static = nothing()
        self.tangent, self.tangent_key, self.slope = NO_TANGENT, -1, 0.0
        self.form: Form | None = None
        self.filled = np.zeros((len(self.arrays.exit_index),) * 2, bool)  # (later, before)
        self.costs, self.exact_from = (-np.inf, np.inf), -1.0
        self.incumbents: list[tuple[float, float, float]] = []  # (time, mIoU, cost), of an objective
        self.stopped: Literal["", "time limit", "interrupted"] = ""
        self.workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        weighted = self.arrays.weights > 0
        self.priced = bool((self.arrays.kinds[weighted] == MEAN).all())
        # The mean over devices is at most the largest, and linear.
        self.parts = (self.arrays.parts * self.arrays.weights[:, None, None])[weighted].mean(0)

    @cached_property
    def sets(self) -> Sets:
        return classes_of(self.arrays)

    def run(self) -> Outcome:
        gaps = (0.0, 0.0)
        try:
            for position, index in enumerate(self.arrays.exit_index.tolist()):
                kernels.try_single(self.arrays, position, self.alone[index])
                self.num_evaluated += 1
            for front in self.alone.values():
                kernels.merge(self.static, front)
            self._learn(self.static, 0)
            if self.max_exits > 1:
                gaps = (np.inf, np.inf)
                self._pairs()
                gaps = (0.0, 0.0)
            if self.max_exits > 2:
                gaps = (np.inf, np.inf)
                gaps = self._triples()
        except OutOfTimeError:
            self.stopped = "time limit"
        except KeyboardInterrupt:
            self.stopped = "interrupted"
        return Outcome(
            front=self.found,
            near=sorted(self.near.values(), key=self._rank),
            num_evaluated=self.num_evaluated,
            stopped=self.stopped,
            gap_cost=gaps[0],
            gap_miou=gaps[1],
            exact_from=self.exact_from,
        )

    # -- one and two exits ---------------------------------------------------------------------------------------

    def _pairs(self) -> None:
        lasts = [p for p in range(len(self.arrays.exit_index)) if self.problem.num_before(p)]
        lasts.reverse()  # the final exit first: it is in most good instances
        most = int(np.diff(self.arrays.first_column).max(initial=1))
        # Good instances are known after one pixel threshold of the promising heads before the final exit.
        groups = [
            [(last, half, (part, most)) for part in range(most)] for last in lasts[:1] for half in self._halves(last)
        ]
        groups.append([(last, np.arange(self.problem.num_before(last)), (0, 1)) for last in lasts[1:]])
        for number, jobs in enumerate(groups):
            for found, (tried, best, keys) in self._each(self._pairs_before, jobs, "two exits"):
                self._learn(found, tried)
                for (cost, miou), key in zip(best, keys, strict=True):
                    if cost < np.inf:
                        self._remember(cost, miou, int(key))
            if number == 0 and self.max_exits > 2 and self.region.goal != "front":
                self._seed(lasts[:1], NUM_SEEDS // 8)  # good instances within the first second

    def _halves(self, last: int) -> tuple[IntArray, IntArray]:
        """The early exits before ``last`` that are on the front of their exit point, and the others."""
        before = np.arange(self.problem.num_before(last))
        good = [self.problem.positions_of(key)[0] for one in self.alone.values() for key in one.key[: one.size[0]]]
        marked = np.isin(before, good)
        return before[marked], before[~marked]

    def _pairs_before(
        self, job: tuple[int, IntArray, tuple[int, int]]
    ) -> tuple[Found, tuple[int, FloatArray, IntArray]]:
        (last, firsts, part), found, region = job, nothing(), self.region
        kernels.merge(found, self.static)
        limits = (region.max_cost, region.least_miou, region.goal != "miou")
        return found, kernels.try_pairs_before(self.arrays, last, firsts, part, *limits, nothing(), found)

    # -- three exits ---------------------------------------------------------------------------------------------

    def _triples(self) -> tuple[float, float]:
        """Evaluates or rules out every choice of three exits; the gaps (cost, mIoU) that are left."""
        lasts = [p for p in range(len(self.arrays.exit_index)) if self.arrays.exit_index[p] >= 2]
        lasts = [p for p in lasts if len(np.unique(self.arrays.exit_index[: self.problem.num_before(p)])) > 1]
        if self.region.goal == "front":
            return sweep(self, lasts)
        self._seed(lasts, NUM_SEEDS)
        choices = self.bound(lasts, (-np.inf, np.inf))
        left = self.settle(choices, lasts)
        return self.gaps(left) if self.stopped else (0.0, 0.0)

    def settle(self, choices: Choices, lasts: Sequence[int]) -> Choices:
        """Evaluates ``choices``, the most promising first, while they may be news; what is left when stopped."""
        done = np.zeros(len(choices.exits), bool)
        bar = tqdm(desc="three exits", unit="choice", disable=not self.progress, delay=1)
        try:
            while len(promising := self._promising(choices, done)):
                bar.total = len(promising) + int(done.sum())
                known = len(self.near)
                share, most = (64, 1) if self.region.goal != "front" else (4, 256)
                batch = promising[: max(self.workers * PER_BATCH, len(promising) // share)]
                size = min(most, -(-len(batch) // (2 * self.workers)))
                batch = batch[np.lexsort(choices.exits[batch].T[::-1])] if size > 1 else batch
                jobs = [batch[i : i + size] for i in range(0, len(batch), size)]
                self.fill(choices.exits[batch])
                each = self._each(self._triple, [choices.exits[job] for job in jobs], "")
                for job, (found, tried) in zip(jobs, each, strict=True):
                    done[job] = True
                    self._learn(found, tried)
                    bar.update(len(job))
                if not known and self.near:  # something feasible at last: now the bounds can have a price
                    choices = self.bound(lasts, choices.costs, choices._replace(exits=choices.exits[~done]))
                    done = np.zeros(len(choices.exits), bool)
        except (OutOfTimeError, KeyboardInterrupt) as stop:
            self.stopped = "time limit" if isinstance(stop, OutOfTimeError) else "interrupted"
        bar.close()
        return choices._replace(exits=choices.exits[~done], bounds=choices.bounds[~done])

    def _learn(self, found: Found, tried: int) -> None:
        self.num_evaluated += tried
        kernels.merge(self.found, found)
        self._note(found)
        best = None if self.region.goal == "front" else self._best()
        if best and (not self.incumbents or (best[1], best[0]) != self.incumbents[-1][1:]):
            self.incumbents.append((time.monotonic(), best[1], best[0]))

    def _seed(self, lasts: Sequence[int], num: int) -> None:
        """Evaluates the choices of the best two exits that share their last one: the better the best instance so far,
        the more the bounds settle."""
        if not self.near:
            return
        self.aim(self.costs)
        ranks: dict[int, list[int]] = {last: [] for last in lasts}  # early exits, the best first
        seeds: list[tuple[int, int, int]] = []
        for first, last in sorted((p for p in self.near if len(p) == 2), key=lambda p: self._rank(self.near[p])):
            for other in ranks.get(last, []):
                low, high = sorted((first, other))
                if self.arrays.exit_index[low] < self.arrays.exit_index[high]:
                    seeds.append((last, high, low))
            ranks.setdefault(last, []).append(first)
            if len(seeds) >= num:
                break
        self.try_all(np.array(seeds[:num], np.int64).reshape(-1, 3))

    def try_all(self, exits: IntArray) -> None:
        """Evaluates these choices (n, 3)."""
        self.fill(exits)
        for found, tried in self._each(self._triple, [exits[i : i + 1] for i in range(len(exits))], ""):
            self._learn(found, tried)

    def try_fully(self, exits: IntArray) -> None:
        """Evaluates every instance of these choices (n, 3)."""

        def every(one: IntArray) -> tuple[Found, int]:
            found = try_choice(self.problem, tuple(one[::-1].tolist()), *self._gate())
            return found, int(found.size[0])

        for found, tried in self._each(every, exits, ""):
            self._learn(found, tried)

    def _triple(self, exits: IntArray) -> tuple[Found, int]:
        """The news of some choices."""
        found, tangent = nothing(), self.tangent
        max_cost, least_miou = self._gate()
        if self.region.goal == "front":  # its least mIoU is another at each cost
            kernels.merge(found, self.found)
        steps = self.steps_within(self.costs) - np.array([tangent.miou, 0.0])
        target = float((steps[:, 0] - self.slope * steps[:, 1]).min(initial=np.inf)) - MARGIN
        limits = (float(steps[0, 0]), target, max_cost, least_miou)
        line = np.array([self.slope, target])
        tried = try_choices(self.arrays, self.sets, self.form, exits, *limits, tangent.scores, line, steps, found)
        return found, tried

    def _gate(self) -> tuple[float, float]:
        """Largest cost and least mIoU of what is worth evaluating."""
        best = self._best()
        if self.region.goal == "cost" and best:
            return min(best[0], self.region.max_cost), self.region.least_miou
        if self.region.goal == "miou" and best:
            return self.region.max_cost, max(best[1], self.region.least_miou)
        return self.region.max_cost, self.region.least_miou

    def _best(self) -> tuple[float, float, int] | None:
        """The objective's best so far (cost, mIoU, key), if anything meets its limits."""
        size = self.found.size[0]
        costs, mious = self.found.cost[:size], self.found.miou[:size]
        feasible = np.flatnonzero((costs <= self.region.max_cost) & (mious >= self.region.least_miou))
        if not len(feasible):
            return None
        i = feasible[-1 if self.region.goal == "miou" else 0]
        return float(costs[i]), float(mious[i]), int(self.found.key[i])

    def _steps(self) -> FloatArray:
        """(n, 2) of (mIoU, cost): an instance is news if, for one of them, it has at least that mIoU at that cost or
        less. Ascending."""
        max_cost, least_miou = self._gate()
        if self.region.goal != "front":
            return np.array([[least_miou, min(max_cost, self._largest_cost())]])
        if not (size := self.found.size[0]):
            return np.array([[least_miou, self._largest_cost()]])
        costs = np.append(self.found.cost[1:size], self._largest_cost())
        return np.stack([self.found.miou[:size], costs], axis=1)

    def _largest_cost(self) -> float:
        """No instance of three exits costs more."""
        if not self.priced:
            return 0.0
        weighted = self.arrays.weights > 0
        backbone, head, decision, output = (self.arrays.parts * self.arrays.weights[:, None, None])[weighted].max(0)
        return float((backbone + output).max() + 3 * (head + decision).max())

    def steps_within(self, costs: tuple[float, float]) -> FloatArray:
        """Those that instances between two costs, the larger one included, can take; they end at that cost."""
        steps = self._steps()
        if self.region.goal != "front":
            return steps
        starts = self.found.cost[: len(steps)]
        here = (starts < costs[1]) & (steps[:, 1] > costs[0])
        own: FloatArray = np.minimum(steps[here], [np.inf, costs[1]]) + np.array([self.precision, 0.0])
        return own

    def bound(self, lasts: Sequence[int], costs: tuple[float, float], known: Choices | None = None) -> Choices:
        """The choices that may be news between two costs, among those ``known`` if given."""
        prices = self.aim(costs)
        steps = self.steps_within(costs)
        choices = self._bound_at(lasts, prices[0], steps, known)
        for price in prices[1:]:
            if len(choices.exits) > MANY_LEFT:
                try:
                    choices = self._bound_at(lasts, price, steps, choices)
                except OutOfTimeError:
                    break  # the lines so far hold
        return self._divide(choices, steps)

    def aim(self, costs: tuple[float, float]) -> list[float]:
        """Looks for news between two costs from now on; the prices that suit."""
        self.costs = costs
        key, prices = self._tangent(self.steps_within(costs))
        self.move(key, prices[0])
        return prices

    def _divide(self, choices: Choices, steps: FloatArray) -> Choices:
        """Bounds by cells, at the first price."""
        target = self._target(choices, steps, 0)
        lines, places = {}, {}
        for last in np.unique(choices.exits[:, 0]).tolist():
            here = np.flatnonzero(choices.exits[:, 0] == last)
            lines[last] = np.full((self.problem.num_before(last),) * 2, np.float32(-9))
            places[last] = here, choices.exits[here, 1], choices.exits[here, 2]
            lines[last][places[last][1:]] = choices.bounds[here, 0]
        jobs = [
            (last, part)
            for last, line in lines.items()
            for part in np.array_split(np.flatnonzero((line > -9).any(1)), 8)
            if len(part)
        ]
        exact = self.region.goal != "front" or len(choices.exits) <= MANY_LEFT
        tau = float(steps[0, 0]) - choices.base

        def divide(job: tuple[int, IntArray]) -> None:
            bound_choices(self.arrays, self.sets, self.form, *job, tau, target, exact, lines[job[0]])

        try:
            self.fill(choices.exits)
            for _ in self._each(divide, jobs, "cells"):
                pass
        except OutOfTimeError:
            pass  # the lines so far hold
        bounds = choices.bounds.copy()
        for last, (here, *where) in places.items():
            bounds[here, 0] = lines[last][tuple(where)]
        left = bounds[:, 0] > -9
        return choices._replace(exits=choices.exits[left], bounds=bounds[left])

    def fill(self, exits: IntArray) -> None:
        """What the cells of these choices need to know of pairs of exits."""
        needed = np.zeros_like(self.filled)
        for later, before in (0, 1), (0, 2), (1, 2):
            needed[exits[:, later], exits[:, before]] = True
        needed &= ~self.filled

        def fill_one(later: int) -> None:
            fill_ranges(self.arrays, self.sets, self.form, later, np.flatnonzero(needed[later]))
            self.filled[later] |= needed[later]

        for _ in self._each(fill_one, np.flatnonzero(needed.any(1)).tolist(), "ranges"):
            pass

    def _target(self, choices: Choices, steps: FloatArray, number: int) -> float:
        """What a line must reach to be news, of the price of this number."""
        return float((steps[:, 0] - choices.base - choices.prices[number] * steps[:, 1]).min(initial=np.inf)) - MARGIN

    def _tangent(self, steps: FloatArray) -> tuple[int, list[float]]:
        """The key of a good instance near ``steps``, and prices by the slope of the front there."""
        size = int(self.found.size[0])
        if not size:
            return self.problem.key_of_final, [0.0]
        costs, mious = self.found.cost[:size], self.found.miou[:size]
        at = min(int(np.searchsorted(mious, steps[len(steps) // 2, 0])), size - 1)
        if not self.priced or steps[-1, 1] >= self._largest_cost():  # at no known cost
            return int(self.found.key[at]), [0.0]
        if self.region.goal == "front" and len(steps) > 2:
            slope = (steps[-1, 0] - steps[0, 0]) / (steps[-1, 1] - steps[0, 1])
            return int(self.found.key[at]), [float(slope)]
        low, high = (int(np.searchsorted(costs, factor * costs[at])) for factor in (0.95, 1.05))
        low, high = max(0, min(low, at - 1)), min(size - 1, max(high, at + 1))
        slope = (mious[high] - mious[low]) / (costs[high] - costs[low]) if costs[high] > costs[low] else 0.0
        return int(self.found.key[at]), [slope] if self.region.goal == "front" else [slope, 2 * slope, slope / 2]

    def _bound_at(self, lasts: Sequence[int], price: float, steps: FloatArray, known: Choices | None) -> Choices:
        """Lines at one more price, of all choices or of those ``known``."""
        tangent = self.tangent
        tau = float(steps[0, 0]) - tangent.miou
        choices = Choices(np.zeros((0, 3), np.int64), np.zeros((0, 1)), tangent.miou, [price], self.costs)
        target = self._target(choices, steps, 0)
        prices = price * self.parts

        def bound(last: int) -> tuple[IntArray, FloatArray]:
            num = self.problem.num_before(last)
            marked = wanted(self.arrays, last, num, self._gate()[0], known)
            if not marked.any():
                return np.zeros((0, 3), np.int64), np.zeros(0, np.float32)
            lines = np.where(marked, np.float32(9), np.float32(-9))
            against = (tangent.x, tangent.offsets[last], tangent.floors, prices)
            bound_triples(self.arrays, last, num, *against, tau, target, lines)
            middle, first = np.nonzero(marked & (lines > -9))
            return np.stack([np.full(len(middle), last), middle, first], axis=1), lines[middle, first]

        parts = list(self._each(bound, lasts, "bounds"))
        exits = np.concatenate([choices.exits, *(part[0] for part in parts)])
        lines = np.concatenate([np.zeros(0), *(part[1] for part in parts)]).astype(np.float64)[:, None]
        if known is None or known.base != tangent.miou:
            return choices._replace(exits=exits, bounds=lines)
        where = {tuple(one): i for i, one in enumerate(known.exits.tolist())}
        kept = [where[tuple(one)] for one in exits.tolist()]
        bounds, prices_known = np.hstack([known.bounds[kept], lines]), [*known.prices, price]
        return choices._replace(exits=exits, bounds=bounds, prices=prices_known)

    def move(self, key: int, price: float) -> None:
        """The tangent to the instance with this key, and its form at a price."""
        if key != self.tangent_key:
            self.tangent, self.tangent_key, self.form = tangent_at(self.problem, key), key, None
        if self.form is None or price != self.slope:
            self.form = form_at(self.arrays, self.sets, self.tangent, price * self.parts)
            self.slope = price
            self.filled[:] = False

    def _promising(self, choices: Choices, done: NDArray[np.bool_]) -> IntArray:
        """The choices that may still be news, the most promising first."""
        steps = self.steps_within(choices.costs)
        targets = [self._target(choices, steps, number) for number in range(len(choices.prices))]
        slack = (choices.bounds - np.array(targets)).min(1)
        slack[done] = -np.inf
        order: IntArray = np.argsort(-slack, kind="stable")[: int((slack >= 0).sum())]
        return order

    def gaps(self, left: Choices) -> tuple[float, float]:
        """What the lines of the choices that are ``left`` leave open: relative cost, mIoU."""
        return left.gaps(self.steps_within(left.costs), self.region.goal == "cost" and self._best() is not None)

    # -- both ----------------------------------------------------------------------------------------------------

    def _note(self, found: Found) -> None:
        """Remembers the best of every choice of exits among ``found``, for an objective."""
        if self.region.goal == "front":
            return
        for i in range(int(found.size[0])):
            cost, miou = float(found.cost[i]), float(found.miou[i])
            if cost <= self.region.max_cost and miou >= self.region.least_miou:
                self._remember(cost, miou, int(found.key[i]))

    def _remember(self, cost: float, miou: float, key: int) -> None:
        positions = self.problem.positions_of(key)
        old = self.near.get(positions)
        if old is None or self._rank((cost, miou, key)) < self._rank(old):
            self.near[positions] = (cost, miou, key)

    def _rank(self, point: tuple[float, float, int]) -> tuple[float, float, int]:
        """Best first."""
        cost, miou, key = point
        return (-miou, cost, key) if self.region.goal == "miou" else (cost, -miou, key)

    def _each(self, job: Callable[[Item], Result], items: Iterable[Item], words: str) -> Iterator[Result]:
        """``job`` of every item, on all cores, in the items' order. Raises OutOfTimeError when time is up."""
        pending = list(items)
        bar = tqdm(total=len(pending), desc=words, unit="exit", disable=not (self.progress and words), delay=1)
        with ThreadPoolExecutor(self.workers) as pool, bar:
            futures = [pool.submit(job, item) for item in pending]
            try:
                for future in futures:
                    if time.monotonic() > self.deadline:
                        raise OutOfTimeError
                    yield future.result()
                    bar.update()
            finally:
                for future in futures:
                    future.cancel()
