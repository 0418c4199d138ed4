"""The exit of each frame, against sequences whose answer is known."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from messnet.apps.exit_control import ExitControl, change_rate, first_confident
from messnet.errors import RecipeError
from messnet.records.instance import ExitChoice

THRESHOLD = 0.8
TWO = (
    ExitChoice(exit_index=0, head="a", pixel_threshold=0.5, image_threshold=THRESHOLD),
    ExitChoice(exit_index=3, head="final"),
)
THREE = (TWO[0], ExitChoice(exit_index=1, head="b", pixel_threshold=0.5, image_threshold=0.6), TWO[1])


def taken(control: ExitControl, frames: np.ndarray, steps_ms: np.ndarray | None = None) -> list[int]:
    """Places of the exits that ``frames`` (F, E) of confidences take, each step taking ``steps_ms`` (F, E)."""
    places = []
    for f, confidences in enumerate(frames):
        elapsed = 0.0
        for place, confidence in enumerate(confidences):
            if steps_ms is not None:
                elapsed += steps_ms[f, place]
                control.measured(place, steps_ms[f, place])
            if control.stops(place, confidence, elapsed):
                places.append(place)
                break
    return places


def around_threshold(amplitude: float) -> np.ndarray:
    """40 frames whose confidence at the first exit is in turn above and below its threshold."""
    first = THRESHOLD + amplitude * np.where(np.arange(40) % 2, -1, 1)
    return np.stack([first, np.ones(40)], 1)


@pytest.mark.parametrize(("hysteresis", "changes"), [(0, 39), (0.2, 39), (0.3, 1)])
def test_a_swing_within_the_margin_changes_nothing(hysteresis: float, changes: int) -> None:
    # 0.05 above the threshold of 0.8 is a share of 0.25 of what lies above it.
    places = taken(ExitControl(TWO, hysteresis=hysteresis), around_threshold(0.05))
    assert sum(a != b for a, b in pairwise(places)) == changes
    assert change_rate(places) == changes / 39
    assert places[1:3] == [1, 1 if hysteresis > 0.25 else 0]


def test_deeper_at_once_and_back_when_more_than_sure() -> None:
    first = [0.9, 0.799, 0.81, 0.8399, 0.8401, 0.8, 0.9]
    frames = np.stack([first, np.ones(7)], 1)
    assert taken(ExitControl(TWO, hysteresis=0.2), frames) == [0, 1, 1, 1, 0, 0, 0]
    assert [first_confident(TWO, row) for row in frames] == [0, 1, 0, 0, 0, 0, 0]


def test_never_earlier_than_the_instance_and_no_less_steady() -> None:
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.normal(0, 0.03, (300, 3)), 0)
    frames = 0.5 + np.abs((walk + 0.3) % 1 - 0.5)  # between 0.5 and 1
    plain = [first_confident(THREE, row) for row in frames]
    assert taken(ExitControl(THREE), frames) == plain
    assert set(plain) == {0, 1, 2}
    for hysteresis in (0.05, 0.2, 0.5):
        steady = taken(ExitControl(THREE, hysteresis=hysteresis), frames)
        assert all(a >= b for a, b in zip(steady, plain, strict=True))
        assert change_rate(steady) < change_rate(plain)


def test_exits_without_thresholds_run_to_the_end() -> None:
    choices = [ExitChoice(exit_index=i, head="a") for i in range(3)]
    assert taken(ExitControl(choices, hysteresis=0.5), np.ones((4, 3))) == [2, 2, 2, 2]
    assert first_confident(choices, [1, 1, 1]) == 2


@pytest.mark.parametrize(("budget_ms", "place"), [(9, 0), (29, 0), (31, 1), (59, 1), (61, 2)])
def test_the_deepest_exit_that_fits(budget_ms: float, place: int) -> None:
    steps = np.tile([10.0, 20.0, 30.0], (50, 1))
    control = ExitControl(THREE, frame_budget_ms=budget_ms)
    for step, ms in enumerate(steps[0]):
        control.measured(step, ms)
    assert taken(control, np.zeros((50, 3)), steps) == [place] * 50


def test_a_step_takes_what_95_of_100_took() -> None:
    times = np.random.default_rng(1).gamma(2, 10, 137)
    control = ExitControl(TWO)
    assert control.step_ms(1) == 0
    for number, ms in enumerate(times, 1):
        control.measured(1, ms)
        last = times[max(0, number - 100) : number]
        assert control.step_ms(1) == np.percentile(last, 95, method="inverted_cdf")


def test_a_budget_on_the_brink_does_not_flicker() -> None:
    first = np.where(np.arange(60) % 2, 9.0, 11.0)  # the second exit, 20 ms, fits into 30 ms every other time
    steps = np.stack([first, np.full(60, 20.0)], 1)
    rates = {}
    for hysteresis in (0.0, 0.1):
        control = ExitControl(TWO, frame_budget_ms=30, hysteresis=hysteresis)
        control.measured(1, 20.0)
        rates[hysteresis] = change_rate(taken(control, np.zeros((60, 2)), steps))
    assert rates == {0.0: 1.0, 0.1: 0.0}


def test_a_step_that_became_fast_is_found_out() -> None:
    control = ExitControl(TWO, frame_budget_ms=30)
    control.measured(1, 100.0)
    steps = np.tile([10.0, 15.0], (150, 1))
    assert taken(control, np.zeros((150, 2)), steps) == [0] * 100 + [1] * 50


def test_a_step_that_stays_slow_costs_one_frame_in_a_hundred() -> None:
    control = ExitControl(TWO, frame_budget_ms=30)
    control.measured(1, 100.0)
    steps = np.tile([10.0, 100.0], (404, 1))
    assert np.flatnonzero(taken(control, np.zeros((404, 2)), steps)).tolist() == [100, 201, 302, 403]


def test_a_late_first_exit_is_the_last() -> None:
    assert taken(ExitControl(TWO, frame_budget_ms=5), np.zeros((9, 2)), np.full((9, 2), 6.0)) == [0] * 9


@pytest.mark.parametrize(
    "options", [{"hysteresis": 1}, {"hysteresis": -0.1}, {"frame_budget_ms": 0}, {"frame_budget_ms": float("nan")}]
)
def test_values_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="not"):
        ExitControl(TWO, **options)


def test_rate_of_few_frames() -> None:
    assert (change_rate([]), change_rate([3]), change_rate([3, 3]), change_rate([3, 4])) == (0, 0, 0, 1)
