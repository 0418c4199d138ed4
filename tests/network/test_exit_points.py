"""choose_exit_points against brute force over all increasing assignments."""

import random
from itertools import accumulate, combinations

import pytest

from messnet.errors import ModelError
from messnet.network.exit_points import choose_exit_points


def brute_force(costs: list[int], num_exits: int) -> list[int]:
    total = costs[-1]

    def distance(cuts: tuple[int, ...]) -> int:
        return sum((num_exits * costs[cut] - i * total) ** 2 for i, cut in enumerate(cuts, 1))

    return list(min(combinations(range(len(costs) - 1), num_exits - 1), key=distance))


@pytest.mark.parametrize("seed", range(200))
def test_equals_brute_force(seed: int) -> None:
    draw = random.Random(seed)
    # Few distinct block costs and some huge ones: ties and colliding targets.
    blocks = [draw.choice([1, 1, 2, 3, 5, 40]) for _ in range(draw.randint(2, 11))]
    costs = list(accumulate(blocks))
    num_exits = draw.randint(1, len(costs))
    assert choose_exit_points(costs, num_exits) == brute_force(costs, num_exits)


def test_colliding_targets_move_apart() -> None:
    assert choose_exit_points([1, 2, 3, 100], 4) == [0, 1, 2]


def test_equal_blocks_are_hit_exactly() -> None:
    assert choose_exit_points([0.5 * i for i in range(1, 13)], 6) == [1, 3, 5, 7, 9]


def test_ties_go_to_the_shallower() -> None:
    assert choose_exit_points([1, 3, 4], 2) == [0]


def test_one_exit_needs_no_cut() -> None:
    assert choose_exit_points([5.0], 1) == []


@pytest.mark.parametrize("num_exits", [0, 4])
def test_too_few_cuts(num_exits: int) -> None:
    with pytest.raises(ModelError, match="ask for 1 to 3 exits"):
        choose_exit_points([1, 2, 3], num_exits)
