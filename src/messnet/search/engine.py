"""Exact search over tables: enumeration up to two exits, branch and bound for three.

An instance of early exits a < b and last exit c sends the images of a set A out at a, those of B \\ A at b, the rest at
c. At one exit, head and pixel threshold the sets of all image thresholds are nested, so that running sums of pixel
counts over the images, the most confident first, give the mIoU at every threshold. All instances of one and two exits
are evaluated in this way, and all of one choice of three exits in little more: see ``kernels``.

Of three exits there are too many choices of heads (1.8 million at 5 early exits x 56 heads). Each is bounded:

- *Tangent.* With r_k, U0_k the IoU and union of class k in some good instance, R the mean of r_k, and, for any other,
  l_k = (I_k - r_k U_k) / U0_k and u_k = U_k / U0_k - 1:  I_k / U_k = r_k + l_k / (1 + u_k). The mean of l_k is
  linear in the pixel counts, so it is a sum over images of what each contributes at the exit it takes.
- *Remainder.* Let p_k = l_k / (1 + u_k). An instance with mIoU >= R + tau has mean p >= tau, so
  mIoU - R = mean l - mean p u <= mean l + (mean p+ - tau) max u+ + mean p+ max u-: only the upper ends of l and u and
  the lower ends of u matter, and those are known up to which images leave at b.
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
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from messnet.search import kernels
from messnet.search.bounds import MARGIN, bound_triples
from messnet.search.problem import MEAN, WHOLE_MAX, WHOLE_SUM, WORST, Found, Problem
from messnet.search.tangent import NO_TANGENT, tangent_at
from messnet.tables import FloatArray, IntArray

__all__ = ["Engine", "Outcome", "Region", "try_choice"]

CAPACITY = 1 << 16  # points of a front
NUM_TANGENTS = 8  # of a whole front
MANY_LEFT = 20_000  # choices for which a bound at another price pays
NUM_SEEDS = 256  # choices evaluated before any is bounded
PER_BATCH = 8  # choices that a worker evaluates between two looks at the clock

Item = TypeVar("Item")
Result = TypeVar("Result")


class Region(NamedTuple):
    """What is news: points of the front, or the best of one objective within its limits."""

    goal: Literal["front", "cost", "miou"]
    least_miou: float = -1.0
    max_cost: float = np.inf


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an engine found, and what it proved."""

    front: Found
    near: list[tuple[float, float, int]]
    """(cost, mIoU, key) of the best instance within the limits of every choice of exits that was evaluated."""
    num_evaluated: int
    stopped: Literal["", "time limit", "interrupted"]
    gap_cost: float
    """Relative: no instance within the limits costs less than (1 - gap) times the best one. 0: optimal."""
    gap_miou: float
    """No instance within the limits has a larger mIoU by more; over a front, at any cost. 0: optimal."""


class _Choices(NamedTuple):
    """Choices of three exits that are not done, and their lines against one tangent."""

    exits: IntArray
    """(n, 3): last, middle, first."""
    bounds: FloatArray
    """(n, prices): largest l - mu cost + remainder."""
    base: float
    """The tangent's mIoU."""
    prices: list[float]
    """mu, mIoU per unit of the objective's cost."""
    least: float
    """The bounds hold for instances of at least this mIoU, and are to settle those below ``most``."""
    most: float


class _OutOfTimeError(Exception):
    """Time is up."""


class Engine:
    """One search. ``run`` once."""

    def __init__(self, problem: Problem, region: Region, *, max_exits: int, time_limit: float | None, progress: bool):
        self.problem, self.region, self.max_exits, self.progress = problem, region, max_exits, progress
        self.arrays = problem.arrays
        self.deadline = np.inf if time_limit is None else time.monotonic() + time_limit
        self.found, self.num_evaluated = _nothing(), 0
        self.near: dict[tuple[int, ...], tuple[float, float, int]] = {}
        self.static = _nothing()
        self.tangent, self.tangent_key = NO_TANGENT, -1
        self.stopped: Literal["", "time limit", "interrupted"] = ""
        self.workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        weighted = self.arrays.weights > 0
        self.priced = bool((self.arrays.kinds[weighted] == MEAN).all())
        # The mean over devices is at most the largest, and linear.
        self.parts = (self.arrays.parts * self.arrays.weights[:, None, None])[weighted].mean(0)

    def run(self) -> Outcome:
        gaps = (0.0, 0.0)
        try:
            for position in range(len(self.arrays.exit_index)):
                kernels.try_single(self.arrays, position, self.found)
                self.num_evaluated += 1
            kernels.merge(self.static, self.found)
            self._note(self.found)
            if self.max_exits > 1:
                gaps = (np.inf, np.inf)
                self._pairs()
                gaps = (0.0, 0.0)
            if self.max_exits > 2:
                gaps = (np.inf, np.inf)
                gaps = self._triples()
        except _OutOfTimeError:
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
        )

    # -- one and two exits ---------------------------------------------------------------------------------------

    def _pairs(self) -> None:
        lasts = [p for p in range(len(self.arrays.exit_index)) if self.problem.num_before(p)]
        for found, (tried, best, keys) in self._each(self._pairs_before, lasts, "two exits"):
            kernels.merge(self.found, found)
            self.num_evaluated += tried
            for (cost, miou), key in zip(best, keys, strict=True):
                if cost < np.inf:
                    self._remember(cost, miou, int(key))

    def _pairs_before(self, last: int) -> tuple[Found, tuple[int, FloatArray, IntArray]]:
        found, region = _nothing(), self.region
        kernels.merge(found, self.static)
        limits = (region.max_cost, region.least_miou, region.goal != "miou")
        num = self.problem.num_before(last)
        return found, kernels.try_pairs_before(self.arrays, last, num, *limits, _nothing(), found)

    # -- three exits ---------------------------------------------------------------------------------------------

    def _triples(self) -> tuple[float, float]:
        """Evaluates or rules out every choice of three exits; the gaps (cost, mIoU) that are left."""
        lasts = [p for p in range(len(self.arrays.exit_index)) if self.arrays.exit_index[p] >= 2]
        lasts = [p for p in lasts if len(np.unique(self.arrays.exit_index[: self.problem.num_before(p)])) > 1]
        self._seed(lasts)
        groups: list[_Choices] = []
        for steps, most in self._strips():
            groups.append(self._bound(lasts, steps, most))
        if self.region.goal == "front":
            groups.append(self._cheaper_than_all(lasts))
        done: set[tuple[int, ...]] = set()
        bar = tqdm(desc="three exits", unit="choice", disable=not self.progress, delay=1)
        while True:
            promising = self._promising(groups, done)
            if not promising:
                bar.close()
                return 0.0, 0.0
            bar.total = len(promising) + len(done)
            known = len(self.near)
            batch = promising[: max(self.workers * PER_BATCH, len(promising) // 64)]
            try:
                for exits, found, tried in self._each(self._triple, batch, ""):
                    done.add(exits)
                    self.num_evaluated += tried
                    kernels.merge(self.found, found)
                    self._note(found)
                    bar.update()
                if not known and self.near:  # something feasible at last: now the bounds can have a price
                    groups = [self._bound(lasts, *next(self._strips()), groups[0])]
            except (_OutOfTimeError, KeyboardInterrupt) as stop:
                self.stopped = "time limit" if isinstance(stop, _OutOfTimeError) else "interrupted"
                bar.close()
                return self._gaps(groups, done)

    def _seed(self, lasts: Sequence[int]) -> None:
        """Evaluates the choices of the best two exits that share their last one: the better the best instance so far,
        the more the bounds settle."""
        if not self.near or self.region.goal == "front":
            return
        self._move_tangent(self._tangent(self._steps())[0])
        ranks: dict[int, list[int]] = {last: [] for last in lasts}  # early exits, the best first
        seeds: list[tuple[int, int, int]] = []
        for first, last in sorted((p for p in self.near if len(p) == 2), key=lambda p: self._rank(self.near[p])):
            for other in ranks.get(last, []):
                low, high = sorted((first, other))
                if self.arrays.exit_index[low] < self.arrays.exit_index[high]:
                    seeds.append((last, high, low))
            ranks.setdefault(last, []).append(first)
            if len(seeds) >= NUM_SEEDS:
                break
        for _, found, tried in self._each(self._triple, seeds[:NUM_SEEDS], ""):
            self.num_evaluated += tried
            kernels.merge(self.found, found)
            self._note(found)

    def _triple(self, exits: tuple[int, ...]) -> tuple[tuple[int, ...], Found, int]:
        found = _nothing()
        max_cost, least_miou = self._gate()
        tangent = self.tangent
        if self.region.goal == "front":  # its least mIoU is another at each cost
            kernels.merge(found, self.found)
            tangent = NO_TANGENT
        last, middle, first = exits
        tried = kernels.try_triple(self.arrays, last, middle, first, max_cost, least_miou, tangent, found)
        return exits, found, tried

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
        size = self.found.size[0]
        if not size:
            return np.array([[least_miou, self._largest_cost()]])
        costs = np.append(self.found.cost[1:size], self._largest_cost())
        return np.stack([self.found.miou[:size], costs], axis=1)

    def _largest_cost(self) -> float:
        """No instance of three exits costs more."""
        backbone, head, decision, output = self.parts
        return float((backbone + output).max() + 3 * (head + decision).max()) if self.priced else 0.0

    def _strips(self) -> Iterator[tuple[FloatArray, float]]:
        """Steps close to each other, for one tangent, and the least mIoU of those after them."""
        steps = self._steps()
        parts = [steps[-1:]]  # alone: its cost is far from the others
        if len(steps) > 1:
            parts = [*np.array_split(steps[:-1], min(len(steps) - 1, NUM_TANGENTS)), *parts]
        for part, after in zip(parts, [*parts[1:], None], strict=True):
            yield part, np.inf if after is None else float(after[0, 0])

    def _cheaper_than_all(self, lasts: Sequence[int]) -> _Choices:
        """Choices that may cost less than every point of the front, where no line can rule them out."""
        exits = [np.zeros((0, 3), np.int64)]
        for last in lasts:
            num = self.problem.num_before(last)
            least = self._least_cost(last, num)
            middle, first = np.nonzero(
                self._wanted(last, num, None) & (least < self.found.cost[: self.found.size[0]].min(initial=np.inf))
            )
            exits.append(np.stack([np.full(len(middle), last), middle, first], axis=1))
        found = np.concatenate(exits)
        return _Choices(found, np.full((len(found), 1), 9.0), 0.0, [0.0], -np.inf, np.inf)

    def _bound(self, lasts: Sequence[int], steps: FloatArray, most: float, known: _Choices | None = None) -> _Choices:
        """The choices that may be news to ``steps``, among those ``known`` if given."""
        key, prices = self._tangent(steps)
        choices = None if known is None else known._replace(bounds=np.zeros((len(known.exits), 0)), prices=[])
        for price in prices:
            if choices is None or not choices.prices:
                choices = self._bound_at(lasts, key, price, steps, most, choices)
            elif len(choices.exits) > MANY_LEFT:
                try:
                    choices = self._bound_at(lasts, key, price, steps, most, choices)
                except _OutOfTimeError:
                    break  # the lines so far hold
        assert choices is not None
        return choices

    def _tangent(self, steps: FloatArray) -> tuple[int, list[float]]:
        """The key of a good instance near ``steps``, and prices by the slope of the front there."""
        size = int(self.found.size[0])
        if not size:
            return self.problem.key_of_final, [0.0]
        costs, mious = self.found.cost[:size], self.found.miou[:size]
        at = min(int(np.searchsorted(mious, steps[len(steps) // 2, 0])), size - 1)
        if not self.priced or steps[-1, 1] >= self._largest_cost():  # at no known cost
            return int(self.found.key[at]), [0.0]
        low, high = (int(np.searchsorted(costs, factor * costs[at])) for factor in (0.95, 1.05))
        low, high = max(0, min(low, at - 1)), min(size - 1, max(high, at + 1))
        slope = (mious[high] - mious[low]) / (costs[high] - costs[low]) if costs[high] > costs[low] else 0.0
        return int(self.found.key[at]), [slope] if self.region.goal == "front" else [slope, 2 * slope, slope / 2]

    def _bound_at(
        self,
        lasts: Sequence[int],
        key: int,
        price: float,
        steps: FloatArray,
        most: float,
        known: _Choices | None,
    ) -> _Choices:
        """Lines at one more price, of all choices or of those ``known``."""
        self._move_tangent(key)
        tangent = self.tangent
        least = float(steps[0, 0])
        target = float((steps[:, 0] - tangent.miou - price * steps[:, 1]).min()) - MARGIN
        prices = price * self.parts

        def bound(last: int) -> tuple[IntArray, FloatArray]:
            num = self.problem.num_before(last)
            wanted = self._wanted(last, num, known)
            lines = np.where(wanted, np.float32(9), np.float32(-9))
            bound_triples(
                self.arrays, last, num, tangent.x, tangent.offsets[last], prices, least - tangent.miou, target, lines
            )
            middle, first = np.nonzero(wanted & (lines > -9))
            return np.stack([np.full(len(middle), last), middle, first], axis=1), lines[middle, first]

        parts = list(self._each(bound, lasts, "bounds"))
        exits = np.concatenate([np.zeros((0, 3), np.int64), *(part[0] for part in parts)])
        lines = np.concatenate([np.zeros(0), *(part[1] for part in parts)]).astype(np.float64)[:, None]
        if known is None:
            return _Choices(exits, lines, tangent.miou, [price], least, most)
        where = {tuple(one): i for i, one in enumerate(known.exits.tolist())}
        kept = [where[tuple(one)] for one in exits.tolist()]
        bounds, prices_known = np.hstack([known.bounds[kept], lines]), [*known.prices, price]
        return _Choices(exits, bounds, tangent.miou, prices_known, least, most)

    def _move_tangent(self, key: int) -> None:
        if key != self.tangent_key:
            self.tangent, self.tangent_key = tangent_at(self.problem, key), key

    def _wanted(self, last: int, num: int, known: _Choices | None) -> NDArray[np.bool_]:
        """(middle, first) before ``last``: in order, not ruled out by what all their instances cost, and known."""
        index = self.arrays.exit_index[:num]
        wanted: NDArray[np.bool_] = index[:, None] > index[None, :]
        levels = np.diff(self.arrays.first_column)[:num] > 0
        wanted &= levels[:, None] & levels[None, :]
        for m in np.flatnonzero(self.arrays.limits < np.inf):
            wanted &= self._cheapest(int(m), last, num) <= self.arrays.limits[m]
        max_cost, _ = self._gate()
        if max_cost < np.inf:
            wanted &= self._least_cost(last, num) <= max_cost
        if known is not None:
            among = np.zeros_like(wanted)
            here = known.exits[known.exits[:, 0] == last]
            among[here[:, 1], here[:, 2]] = True
            wanted &= among
        return wanted

    def _least_cost(self, last: int, num: int) -> FloatArray:
        """(middle, first): no instance of the choice has a smaller objective's cost."""
        weighted = np.flatnonzero(self.arrays.weights > 0)
        costs = [self.arrays.weights[m] * self._cheapest(int(m), last, num) for m in weighted]
        least: FloatArray = np.maximum.reduce(costs)
        return least

    def _cheapest(self, m: int, last: int, num: int) -> FloatArray:
        """(middle, first): no instance of the choice has a smaller cost m."""
        backbone, head, decision, output = self.arrays.parts[m]
        kind = self.arrays.kinds[m]
        paid = head[:num] + decision[:num]
        if kind in (WHOLE_SUM, WHOLE_MAX):
            join: Any = np.add if kind == WHOLE_SUM else np.maximum
            early = join(join(head[:num], decision[:num]), output[:num])
            own = join(join(backbone[last], head[last]), output[last])
            whole: FloatArray = join(join(early[:, None], early[None, :]), own)
            return whole
        first = (backbone + output)[:num] + paid
        middle = first[:, None] + paid[None, :]
        end = paid[:, None] + paid[None, :] + backbone[last] + head[last] + output[last]
        reached: FloatArray = np.minimum(middle, end)
        anywhere: FloatArray = np.minimum(reached, first[None, :])
        return reached if kind == WORST else anywhere  # some image reaches the middle exit

    def _promising(self, groups: Sequence[_Choices], done: set[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The choices that may still be news, the most promising first."""
        steps = self._steps()
        slacks: dict[tuple[int, ...], float] = {}
        for choices in groups:
            for exits, slack in zip(*self._slack(choices, steps), strict=True):
                one = tuple(exits.tolist())
                if one not in done:
                    slacks[one] = max(slack, slacks.get(one, -np.inf))
        return sorted(slacks, key=lambda one: (-slacks[one], one))

    def _slack(self, choices: _Choices, steps: FloatArray) -> tuple[IntArray, FloatArray]:
        """The choices whose lines pass above a step, and by how much mIoU."""
        here = self._own_steps(choices, steps)
        if not len(here):
            return choices.exits[:0], np.zeros(0)
        targets = [float((here[:, 0] - choices.base - price * here[:, 1]).min()) for price in choices.prices]
        slack = (choices.bounds - np.array(targets)).min(1)
        kept = slack >= -MARGIN
        return choices.exits[kept], slack[kept]

    def _own_steps(self, choices: _Choices, steps: FloatArray) -> FloatArray:
        """Those that these bounds speak of."""
        return steps[(steps[:, 0] >= choices.least) & (steps[:, 0] < choices.most)]

    def _gaps(self, groups: Sequence[_Choices], done: set[tuple[int, ...]]) -> tuple[float, float]:
        """What the lines of the choices that are not done leave open: relative cost, mIoU."""
        steps = self._steps()
        gap_cost = gap_miou = 0.0
        for choices in groups:
            left = np.array([tuple(one) not in done for one in choices.exits.tolist()], bool)
            here = self._own_steps(choices, steps)
            if not left.any() or not len(here):
                continue
            prices = np.array(choices.prices)
            lines = choices.base + choices.bounds[left][:, None] + prices * here[None, :, 1:]
            gap_miou = max(gap_miou, float((lines.min(2) - here[:, 0]).max()) + MARGIN)
            if self.region.goal == "cost" and self._best() and (prices > 0).any():
                saved = (lines - here[:, :1])[:, 0, prices > 0] / prices[prices > 0]
                gap_cost = max(gap_cost, float((saved.min(1) + MARGIN / prices.max()).max() / here[0, 1]))
            else:
                gap_cost = np.inf
        return max(gap_cost, 0.0), max(gap_miou, 0.0)

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
        """``job`` of every item, on all cores, in the items' order. Raises _OutOfTimeError when time is up."""
        pending = list(items)
        bar = tqdm(total=len(pending), desc=words, unit="exit", disable=not (self.progress and words), delay=1)
        with ThreadPoolExecutor(self.workers) as pool, bar:
            futures = [pool.submit(job, item) for item in pending]
            try:
                for future in futures:
                    if time.monotonic() > self.deadline:
                        raise _OutOfTimeError
                    yield future.result()
                    bar.update()
            finally:
                for future in futures:
                    future.cancel()


def _nothing() -> Found:
    return Found(np.zeros(CAPACITY), np.zeros(CAPACITY), np.zeros(CAPACITY, np.int64), np.zeros(1, np.int64))


def try_choice(problem: Problem, positions: tuple[int, ...], max_cost: float, least_miou: float) -> Found:
    """The front of one choice of exits, positions shallow to deep, within the limits."""
    found, limits = _nothing(), (max_cost, least_miou)
    if len(positions) == 1:
        kernels.try_single(problem.arrays, positions[0], found)
    elif len(positions) == 2:
        kernels.try_pair(problem.arrays, positions[1], positions[0], *limits, found)
    else:
        kernels.try_triple(problem.arrays, positions[2], positions[1], positions[0], *limits, NO_TANGENT, found)
    return found
