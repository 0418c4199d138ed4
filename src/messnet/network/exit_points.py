"""Where to put the exits: N exits at equal cost (docs/method.md#exit-points). Numbers in, indices out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from messnet.errors import ModelError

ExitCost = Literal["workload", "latency"]
"""The cost that the exits divide evenly."""


def choose_exit_points(cumulative_costs: Sequence[float], num_exits: int) -> list[int]:
    """The cuts of the ``num_exits - 1`` early exits, strictly increasing.

    ``cumulative_costs[j]`` is the cost of the backbone up to and including legal cut j, in any unit; the last entry is
    the whole backbone, where the final exit sits, and is never chosen. Early exit i = 1..N-1 aims at i/N of the total.
    Targets collide where blocks are expensive, so the cuts are assigned together: the strictly increasing assignment
    with the least total squared distance, the shallower one on ties. Raises ModelError when there are too few cuts.
    """
    num_early, num_cuts = num_exits - 1, len(cumulative_costs) - 1
    if num_early < 0 or num_cuts < num_early:
        raise ModelError(
            f"{num_exits} exits need {max(num_early, 0)} cuts before the end of the backbone, it has "
            f"{max(num_cuts, 0)}: ask for 1 to {max(num_cuts, 0) + 1} exits"
        )
    total = cumulative_costs[-1]
    # Scaled by N, so that integer costs give exact distances and ties are ties.
    distance = [
        [(num_exits * cost - i * total) ** 2 for cost in cumulative_costs[:num_cuts]] for i in range(1, num_exits)
    ]

    # rest[i][j]: least cost of targets i.. when they may use cuts j.. only.
    rest: list[list[float]] = [[float("inf")] * (num_cuts + 1) for _ in range(num_early)] + [[0.0] * (num_cuts + 1)]
    for i in reversed(range(num_early)):
        for j in reversed(range(num_cuts)):
            rest[i][j] = min(distance[i][j] + rest[i + 1][j + 1], rest[i][j + 1])

    cuts: list[int] = []
    for i in range(num_early):
        start = cuts[-1] + 1 if cuts else 0
        cuts.append(next(j for j in range(start, num_cuts) if distance[i][j] + rest[i + 1][j + 1] == rest[i][start]))
    return cuts
