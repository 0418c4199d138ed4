"""Step 8 of the derivation: the order in which choices are evaluated, bounded and ruled out.

A search for one objective keeps the best instance so far, the incumbent. A choice of three exits is a *candidate* while
its bounds allow an instance that is better. To start with, all instances of one and two exits are evaluated and a
number of promising choices of three; all other choices are bounded, and the candidates evaluated, the most promising
first, until none is left: the incumbent is then optimal. A search for the front does the same for strips of cost, see
``strips``, with every corner of the front as an incumbent of its own.

A *corner* of the front is a pair of mIoU and cost: an instance improves on what is known if, for some corner, it has at
least that mIoU at that cost or less. One objective has one corner.

Stopped early, what the bounds of the remaining candidates allow is the proved gap.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from messnet.records.arrays import FloatArray, IntArray
from messnet.searching.answers import FrontPoint, Incumbent, Proof, SearchSetting, Stopped
from messnet.searching.exact import enumeration
from messnet.searching.exact.arrays import MEAN, RULED_OUT, Frontier
from messnet.searching.exact.bounds import MARGIN, bound_triples
from messnet.searching.exact.candidates import Candidates, candidate_mask, evaluate_choice
from messnet.searching.exact.cells import (
    Form,
    Sets,
    bound_choices,
    classes_of,
    evaluate_choices,
    fill_ranges,
    form_at,
)
from messnet.searching.exact.compiling import loops_running
from messnet.searching.exact.outcome import Control, Outcome, OutOfTimeError, Region, StoppedError, Tuning
from messnet.searching.exact.problem import Problem
from messnet.searching.exact.tangent import NO_TANGENT, tangent_at

Item = TypeVar("Item")
Result = TypeVar("Result")


class Solver:
    """One search for an objective; ``strips.FrontSolver`` searches for a front. ``run`` once."""

    def __init__(self, problem: Problem, region: Region, setting: SearchSetting, control: Control, tuning: Tuning):
        self.problem, self.region, self.setting, self.control, self.tuning = problem, region, setting, control, tuning
        self.max_exits = 1 if setting == "budgeted" else problem.grid.max_exits
        self.asked_to_stop = False
        self.arrays = problem.arrays
        self.begun = time.monotonic()
        self.deadline = np.inf if control.time_limit is None else self.begun + control.time_limit
        self.front, self.num_evaluated = Frontier.empty(), 0
        self.static = Frontier.empty()  # of all instances of one exit
        # Of an objective: (cost, mIoU, key) of the best instance within the limits of each choice of exits.
        self.best_of_choice: dict[tuple[int, ...], tuple[float, float, int]] = {}
        self.incumbents: list[Incumbent] = []
        # The tangent in use, the instance that it is at, and its linear form at a price.
        self.tangent, self.tangent_key, self.price = NO_TANGENT, -1, 0.0
        self.form: Form | None = None
        self.filled = np.zeros((len(self.arrays.exit_index),) * 2, bool)  # (later, before): ranges of the form
        self.interval = (-np.inf, np.inf)  # of cost, in which the search is looking
        self.exact_from = np.inf  # what a front says of itself, see Proof
        self.stopped: Stopped = ""
        self.workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        weighted = self.arrays.weights > 0
        # Lines have a price only where the objective is a mean: else cost is no sum over images.
        self.priced = bool((self.arrays.kinds[weighted] == MEAN).all())
        # On several devices the objective is the largest cost. The mean over the devices is linear and no larger.
        self.parts = (self.arrays.parts * self.arrays.weights[:, None, None])[weighted].mean(0)

    @cached_property
    def sets(self) -> Sets:
        return classes_of(self.arrays)

    def run(self) -> Outcome:
        """Searches until the answer is proved or it is time to stop."""
        gaps = (0.0, 0.0)
        try:
            for position in range(len(self.arrays.exit_index)):
                enumeration.try_single(self.arrays, position, self.static)
            self._learn(self.static, len(self.arrays.exit_index))
            # Until all instances of so many exits are evaluated or ruled out nothing is proved.
            if self.max_exits > 1:
                gaps = (np.inf, np.inf)
                self._evaluate_pairs()
                gaps = self._search_triples() if self.max_exits > 2 else (0.0, 0.0)
        except (StoppedError, KeyboardInterrupt) as stop:
            self.note_stop(stop)
        return self._outcome(*gaps)

    def note_stop(self, stop: BaseException) -> None:
        """Remembers why the search stops."""
        self.stopped = "time limit" if isinstance(stop, OutOfTimeError) else "interrupted"

    def _outcome(self, gap_cost: float, gap_miou: float) -> Outcome:
        problem, setting = self.problem, self.setting
        ranked = sorted(self.best_of_choice.values(), key=self._rank)[: self.tuning.num_best]
        proof = Proof(
            num_declared=problem.declared(self.max_exits),
            num_evaluated=self.num_evaluated,
            stopped=self.stopped,
            gap_miou=gap_miou if gap_miou < np.inf else None,
            gap_cost=gap_cost if self.region.goal == "cost" and gap_cost < np.inf else None,
            exact_from=(self.exact_from if self.exact_from < np.inf else None) if gap_miou else -1.0,
            precision=self.region.precision,
        )
        return Outcome(
            front=problem.points_of(self.front, setting),
            static=problem.points_of(self.static, "budgeted"),
            best=tuple(
                FrontPoint(miou=miou, cost=cost, instance=problem.instance_of(key, setting))
                for cost, miou, key in ranked
            ),
            proof=proof,
            incumbents=tuple(self.incumbents),
        )

    # -- one and two exits ---------------------------------------------------------------------------------------

    def _evaluate_pairs(self) -> None:
        """Evaluates all instances of two exits."""
        # Pairs with the final exit come first, one pixel threshold at a time, the others whole.
        lasts = [p for p in range(len(self.arrays.exit_index)) if self.problem.num_before(p)]
        lasts.reverse()  # the final exit first: it is in most good instances
        most = int(np.diff(self.arrays.first_column).max(initial=1))
        # Good instances are known after one pixel threshold of the heads before the final exit.
        groups = [
            [
                (last, np.arange(self.problem.num_before(last)), (part, most))
                for last in lasts[:1]
                for part in range(most)
            ],
            [(last, np.arange(self.problem.num_before(last)), (0, 1)) for last in lasts[1:]],
        ]
        for number, jobs in enumerate(groups):
            for front, (tried, best, keys) in self._each(self._pairs_before, jobs, "two exits"):
                self._learn(front, tried)
                # The best feasible instance of each pair of exits: seeds and runners-up.
                for (cost, miou), key in zip(best, keys, strict=True):
                    if cost < np.inf:
                        self._remember(cost, miou, int(key))
            if number == 0 and self.max_exits > 2 and self.region.goal != "front":
                self._seed(lasts[:1], self.tuning.num_seeds // 8)  # good instances within the first second

    def _pairs_before(
        self, job: tuple[int, IntArray, tuple[int, int]]
    ) -> tuple[Frontier, tuple[int, FloatArray, IntArray]]:
        (last, firsts, part), front, region = job, Frontier.empty(), self.region
        # To begin with the static front spares entering what one exit alone does better.
        enumeration.merge(front, self.static)
        limits = (region.max_cost, region.least_miou, region.goal != "miou")
        return front, enumeration.try_pairs_before(self.arrays, last, firsts, part, *limits, Frontier.empty(), front)

    # -- three exits ---------------------------------------------------------------------------------------------

    def _search_triples(self) -> tuple[float, float]:
        """Evaluates or rules out every choice of three exits; returns the gaps (cost, mIoU) that are left."""
        lasts = self.lasts_of_triples()
        self._seed(lasts, self.tuning.num_seeds)
        left = self.evaluate(self.bound(lasts, (-np.inf, np.inf)), lasts)
        return self.gaps(left) if self.stopped else (0.0, 0.0)

    def lasts_of_triples(self) -> list[int]:
        """The exits that have early exits at two exit points or more before them."""
        index = self.arrays.exit_index
        return [p for p in range(len(index)) if len(np.unique(index[: self.problem.num_before(p)])) > 1]

    def evaluate(self, candidates: Candidates, lasts: Sequence[int]) -> Candidates:
        """Evaluates candidates, the most promising first, until bounds rule the others out; returns those that are left
        when stopped."""
        done = np.zeros(len(candidates.exits), bool)
        bar = tqdm(desc="three exits", unit="choice", disable=not self.control.progress, delay=1)
        try:
            while len(order := self._order(candidates, done)):
                bar.total = len(order) + int(done.sum())
                feasible_before = bool(self.best_of_choice)
                # The front moves little by little and shares work between choices: larger batches.
                share, most = (64, 1) if self.region.goal != "front" else (4, 256)
                batch = order[: max(self.workers * self.tuning.per_batch, len(order) // share)]
                size = min(most, -(-len(batch) // (2 * self.workers)))
                batch = batch[np.lexsort(candidates.exits[batch].T[::-1])] if size > 1 else batch
                jobs = [batch[i : i + size] for i in range(0, len(batch), size)]
                self.fill(candidates.exits[batch])
                each = self._each(self._evaluate, [candidates.exits[job] for job in jobs], "")
                for job, (front, tried) in zip(jobs, each, strict=True):
                    done[job] = True
                    self._learn(front, tried)
                    bar.update(len(job))
                if not feasible_before and self.best_of_choice:  # an incumbent at last: now lines can have a price
                    left = candidates._replace(exits=candidates.exits[~done])
                    candidates = self.bound(lasts, candidates.costs, left)
                    done = np.zeros(len(candidates.exits), bool)
        except (StoppedError, KeyboardInterrupt) as stop:
            self.note_stop(stop)
        bar.close()
        return candidates._replace(exits=candidates.exits[~done], bounds=candidates.bounds[~done])

    def _learn(self, front: Frontier, tried: int) -> None:
        """Enters what was evaluated."""
        self.num_evaluated += tried
        enumeration.merge(self.front, front)
        self._note(front)
        best = None if self.region.goal == "front" else self._best()
        if best and (not self.incumbents or (best[1], best[0]) != self.incumbents[-1][1:]):
            self.incumbents.append(Incumbent(time.monotonic() - self.begun, best[1], best[0]))

    def _seed(self, lasts: Sequence[int], num: int) -> None:
        """Evaluates choices that join two good instances of two exits with the same last exit: the better the
        incumbent, the more choices bounds rule out."""
        if not self.best_of_choice:
            return
        self.choose_tangent(self.interval)
        ranks: dict[int, list[int]] = {last: [] for last in lasts}  # early exits, the best first
        seeds: list[tuple[int, int, int]] = []
        for first, last in self._good_pairs():
            # Two early exits that each do well before the same last exit, in order.
            for other in ranks.get(last, []):
                low, high = sorted((first, other))
                if self.arrays.exit_index[low] < self.arrays.exit_index[high]:
                    seeds.append((last, high, low))
            ranks.setdefault(last, []).append(first)
            if len(seeds) >= num:
                break
        self.try_all(np.array(seeds[:num], np.int64).reshape(-1, 3))

    def _good_pairs(self) -> list[tuple[int, int]]:
        """(early, last) exits of the feasible instances of two exits, best first."""
        pairs = [one for one in self.best_of_choice.items() if len(one[0]) == 2]
        return [(exits[0], exits[1]) for exits, point in sorted(pairs, key=lambda one: self._rank(one[1]))]

    def try_all(self, exits: IntArray) -> None:
        """Evaluates choices (n, 3), as far as bounds do not rule their thresholds out."""
        self.fill(exits)
        for front, tried in self._each(self._evaluate, [exits[i : i + 1] for i in range(len(exits))], ""):
            self._learn(front, tried)

    def try_fully(self, exits: IntArray) -> None:
        """Evaluates every instance of choices (n, 3)."""

        def every(one: IntArray) -> tuple[Frontier, int]:
            front = evaluate_choice(self.problem, tuple(one[::-1].tolist()), *self._limits())
            return front, int(front.size[0])

        for front, tried in self._each(every, exits, ""):
            self._learn(front, tried)

    def _evaluate(self, exits: IntArray) -> tuple[Frontier, int]:
        """The front of what improves on the corners among choices (n, 3), and the number of instances evaluated."""
        assert self.form is not None
        front, tangent = Frontier.empty(), self.tangent
        max_cost, least_miou = self._limits()
        if self.region.goal == "front":  # what is no better than the front at its cost is not entered
            enumeration.merge(front, self.front)
        # Relative to the tangent: mIoU - R.
        corners = self.corners_within(self.interval) - np.array([tangent.miou, 0.0])
        # An instance that improves on corner (m, c) has mIoU >= m and cost <= c, so mIoU - price cost >= m - price c.
        target = float((corners[:, 0] - self.price * corners[:, 1]).min(initial=np.inf)) - MARGIN
        limits = (float(corners[0, 0]), target, max_cost, least_miou)
        line = np.array([self.price, target])
        tried = evaluate_choices(
            self.arrays, self.sets, self.form, exits, *limits, tangent.scores, line, corners, front
        )
        return front, tried

    def _limits(self) -> tuple[float, float]:
        """Largest cost and least mIoU of what can improve on the incumbent."""
        best = self._best()
        if self.region.goal == "cost" and best:
            return min(best[0], self.region.max_cost), self.region.least_miou
        if self.region.goal == "miou" and best:
            return self.region.max_cost, max(best[1], self.region.least_miou)
        return self.region.max_cost, self.region.least_miou

    def _best(self) -> tuple[float, float, int] | None:
        """The incumbent (cost, mIoU, key), if anything meets the limits."""
        size = self.front.size[0]
        costs, mious = self.front.cost[:size], self.front.miou[:size]
        feasible = np.flatnonzero((costs <= self.region.max_cost) & (mious >= self.region.least_miou))
        if not len(feasible):
            return None
        # A front ascends in both: of what is feasible the first point is the cheapest, the last the most accurate.
        i = feasible[-1 if self.region.goal == "miou" else 0]
        return float(costs[i]), float(mious[i]), int(self.front.key[i])

    def _corners(self) -> FloatArray:
        """(n, 2) corners, (mIoU, cost) ascending: an instance improves on what is known if, for one of them, it has at
        least that mIoU at that cost or less."""
        max_cost, least_miou = self._limits()
        if self.region.goal != "front":
            return np.array([[least_miou, min(max_cost, self._largest_cost())]])
        if not (size := self.front.size[0]):
            return np.array([[least_miou, self._largest_cost()]])
        # To improve on the front between two of its points takes the mIoU of the first at less than the second's cost.
        costs = np.append(self.front.cost[1:size], self._largest_cost())
        return np.stack([self.front.miou[:size], costs], axis=1)

    def _largest_cost(self) -> float:
        """No instance of three exits costs more."""
        # No cost takes part in bounds then.
        if not self.priced:
            return 0.0
        # The backbone to the deepest exit, and three of the dearest heads and decisions.
        weighted = self.arrays.weights > 0
        backbone, head, decision, output = (self.arrays.parts * self.arrays.weights[:, None, None])[weighted].max(0)
        return float((backbone + output).max() + 3 * (head + decision).max())

    def corners_within(self, costs: tuple[float, float]) -> FloatArray:
        """The corners that instances between two costs, the larger one included, can improve on; none costs more."""
        corners = self._corners()
        if self.region.goal != "front":
            return corners
        # A corner reaches from its point's cost to the next one's: those that the interval meets.
        starts = self.front.cost[: len(corners)]
        here = (starts < costs[1]) & (corners[:, 1] > costs[0])
        # With a precision only what is above the front by more is looked for.
        own: FloatArray = np.minimum(corners[here], [np.inf, costs[1]]) + np.array([self.region.precision, 0.0])
        return own

    def bound(self, lasts: Sequence[int], costs: tuple[float, float], known: Candidates | None = None) -> Candidates:
        """The candidates between two costs, among those ``known`` if given: steps 2 to 6."""
        self.choose_tangent(costs)
        corners = self.corners_within(costs)
        return self._tighten(self._bound_quickly(lasts, corners, known), corners)

    def choose_tangent(self, costs: tuple[float, float]) -> None:
        """Sets the tangent, the price and the linear form for a search between two costs."""
        self.interval = costs
        key, price = self._reference(self.corners_within(costs))
        if key != self.tangent_key:
            self.tangent, self.tangent_key, self.form = tangent_at(self.problem, key), key, None
        if self.form is None or price != self.price:
            self.form, self.price = form_at(self.arrays, self.sets, self.tangent, price * self.parts), price
            self.filled[:] = False

    def _tighten(self, candidates: Candidates, corners: FloatArray) -> Candidates:
        """Step 6: bounds by cells."""
        form = self.form
        assert form is not None
        # A matrix of bounds for each last exit, worked off in parallel by rows.
        target = self._target(candidates, corners)
        lines, places = {}, {}
        for last in np.unique(candidates.exits[:, 0]).tolist():
            here = np.flatnonzero(candidates.exits[:, 0] == last)
            lines[last] = np.full((self.problem.num_before(last),) * 2, RULED_OUT)
            places[last] = here, candidates.exits[here, 1], candidates.exits[here, 2]
            lines[last][places[last][1:]] = candidates.bounds[here]
        jobs = [
            (last, part)
            for last, line in lines.items()
            for part in np.array_split(np.flatnonzero((line > RULED_OUT).any(1)), 8)
            if len(part)
        ]
        # Where many are left the front needs to know only which, not how promising they are.
        exact = self.region.goal != "front" or len(candidates.exits) <= self.tuning.num_exact
        tau = float(corners[0, 0]) - candidates.base

        def divide(job: tuple[int, IntArray]) -> None:
            bound_choices(self.arrays, self.sets, form, *job, tau, target, exact, lines[job[0]])

        try:
            self.fill(candidates.exits)
            for _ in self._each(divide, jobs, "cells"):
                pass
        except StoppedError:
            pass  # the lines so far hold
        bounds = candidates.bounds.copy()
        for last, (here, *where) in places.items():
            bounds[here] = lines[last][tuple(where)]
        left = bounds > RULED_OUT
        return candidates._replace(exits=candidates.exits[left], bounds=bounds[left])

    def fill(self, exits: IntArray) -> None:
        """Fills the ranges of the form that the cells of choices (n, 3) ask for."""
        form = self.form
        assert form is not None
        # The three pairs of a choice (last, middle, first): each once, and not those filled before.
        needed = np.zeros_like(self.filled)
        for later, before in (0, 1), (0, 2), (1, 2):
            needed[exits[:, later], exits[:, before]] = True
        needed &= ~self.filled

        def fill_one(later: int) -> None:
            fill_ranges(self.arrays, self.sets, form, later, np.flatnonzero(needed[later]))
            self.filled[later] |= needed[later]

        for _ in self._each(fill_one, np.flatnonzero(needed.any(1)).tolist(), "ranges"):
            pass

    def _target(self, candidates: Candidates, corners: FloatArray) -> float:
        """What a bound must reach: an instance that improves on corner (m, c) has mIoU - price cost >= m - price c."""
        reached = corners[:, 0] - candidates.base - candidates.price * corners[:, 1]
        return float(reached.min(initial=np.inf)) - MARGIN

    def _reference(self, corners: FloatArray) -> tuple[int, float]:
        """The key of an instance on the front near the corners, for the tangent, and the front's slope there as price:
        any price gives valid bounds, that one gives the lowest lines."""
        size = int(self.front.size[0])
        if not size:
            return self.problem.key_of_final, 0.0
        costs, mious = self.front.cost[:size], self.front.miou[:size]
        # The point of the front that is just accurate enough for the middle corner.
        at = min(int(np.searchsorted(mious, corners[len(corners) // 2, 0])), size - 1)
        if not self.priced or corners[-1, 1] >= self._largest_cost():  # cost is not bounded here
            return int(self.front.key[at]), 0.0
        # Within a strip the chord of its corners.
        if self.region.goal == "front" and len(corners) > 2:
            slope = (corners[-1, 0] - corners[0, 0]) / (corners[-1, 1] - corners[0, 1])
            return int(self.front.key[at]), float(slope)
        # Else the slope between the points 5 % cheaper and 5 % dearer.
        low, high = (int(np.searchsorted(costs, factor * costs[at])) for factor in (0.95, 1.05))
        low, high = max(0, min(low, at - 1)), min(size - 1, max(high, at + 1))
        slope = (mious[high] - mious[low]) / (costs[high] - costs[low]) if costs[high] > costs[low] else 0.0
        return int(self.front.key[at]), float(slope)

    def _bound_quickly(self, lasts: Sequence[int], corners: FloatArray, known: Candidates | None) -> Candidates:
        """Steps 3 to 5, of all choices or of those ``known``."""
        tangent = self.tangent
        # What improves has at least the least mIoU of all corners: tau of step 3.
        tau = float(corners[0, 0]) - tangent.miou
        none = Candidates(np.zeros((0, 3), np.int64), np.zeros(0), tangent.miou, self.price, self.interval)
        target = self._target(none, corners)
        prices = self.price * self.parts

        def bound(last: int) -> tuple[IntArray, FloatArray]:
            num = self.problem.num_before(last)
            marked = candidate_mask(self.arrays, last, num, self._limits()[0], known)
            if not marked.any():
                return np.zeros((0, 3), np.int64), np.zeros(0, np.float32)
            # 9 is above every bound: "not bounded yet".
            lines = np.where(marked, np.float32(9), RULED_OUT)
            against = (tangent.x, tangent.offsets[last], tangent.floors, prices)
            bound_triples(self.arrays, last, num, *against, tau, target, lines)
            middle, first = np.nonzero(marked & (lines > RULED_OUT))
            return np.stack([np.full(len(middle), last), middle, first], axis=1), lines[middle, first]

        parts = list(self._each(bound, lasts, "bounds"))
        exits = np.concatenate([none.exits, *(part[0] for part in parts)])
        return none._replace(exits=exits, bounds=np.concatenate([none.bounds, *(part[1] for part in parts)]))

    def _order(self, candidates: Candidates, done: NDArray[np.bool_]) -> IntArray:
        """Positions of the candidates that bounds do not rule out by now, the most promising first."""
        corners = self.corners_within(candidates.costs)
        # How far each candidate's line is above what it must reach.
        slack = candidates.bounds - self._target(candidates, corners)
        slack[done] = -np.inf
        order: IntArray = np.argsort(-slack, kind="stable")[: int((slack >= 0).sum())]
        return order

    def gaps(self, left: Candidates) -> tuple[float, float]:
        """The gaps (relative cost, mIoU) that candidates which are ``left`` leave open."""
        return left.gaps(self.corners_within(left.costs), self.region.goal == "cost" and self._best() is not None)

    # -- both ----------------------------------------------------------------------------------------------------

    def _note(self, front: Frontier) -> None:
        """Remembers what is within the limits of an objective."""
        if self.region.goal == "front":
            return
        for i in range(int(front.size[0])):
            cost, miou = float(front.cost[i]), float(front.miou[i])
            if cost <= self.region.max_cost and miou >= self.region.least_miou:
                self._remember(cost, miou, int(front.key[i]))

    def _remember(self, cost: float, miou: float, key: int) -> None:
        """Keeps the best instance of each choice of exits."""
        positions = self.problem.positions_of(key)
        old = self.best_of_choice.get(positions)
        if old is None or self._rank((cost, miou, key)) < self._rank(old):
            self.best_of_choice[positions] = (cost, miou, key)

    def _rank(self, point: tuple[float, float, int]) -> tuple[float, float, int]:
        """Sorts the best first."""
        cost, miou, key = point
        return (-miou, cost, key) if self.region.goal == "miou" else (cost, -miou, key)

    def _each(self, job: Callable[[Item], Result], items: Iterable[Item], words: str) -> Iterator[Result]:
        """Runs ``job`` on every item, on all cores, in the items' order. Raises StoppedError when it is time to
        stop."""
        pending = list(items)
        bar = tqdm(total=len(pending), desc=words, unit="exit", disable=not (self.control.progress and words), delay=1)
        with ThreadPoolExecutor(self.workers) as pool, bar:
            futures = [pool.submit(_run_loop, job, item) for item in pending]
            try:
                for future in futures:
                    self._look_up()
                    yield future.result()
                    bar.update()
            finally:
                for future in futures:
                    future.cancel()

    def _look_up(self) -> None:
        """Raises OutOfTimeError when time is up, StoppedError when the caller wants to stop, or once wanted."""
        if time.monotonic() > self.deadline:
            raise OutOfTimeError
        if self.control.should_stop is not None and not self.asked_to_stop:
            self.asked_to_stop = self.control.should_stop()
        if self.asked_to_stop:
            raise StoppedError


def _run_loop(job: Callable[[Item], Result], item: Item) -> Result:
    """Runs an inner loop on a thread of its own."""
    with loops_running():
        return job(item)
