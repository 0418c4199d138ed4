"""Which exit a frame of a video takes: the instance's thresholds, steadied from frame to frame, within a time each.

Frame t runs the exits i = 0, 1, ... of the instance in turn. c_i is its image confidence there and th_i the exit's
image threshold, e the place of the exit that frame t - 1 took, h in [0, 1) the hysteresis. The frame stops at the first
exit where

    c_i >= th_i + h (1 - th_i) [i < e]                                     it may: it is confident       (1)
    s_i + q_(i+1) > B (1 - h [frame t - 1 was stopped by (2) at e <= i])   it must: the next does not fit  (2)

or at the last. [x] is 1 where x holds, else 0. So an image goes deeper at once when its confidence falls below the
threshold, but leaves earlier than the frame before it only when it is more than confident: the exits taken are never
earlier than the instance's own, only steadier. h = 0 is the instance's own rule.

B is the frame budget, s_i the time since the frame's start, q_i the 95th percentile of the last 100 times from exit
i - 1 to exit i, measured on this video, not looked up: the machine is shared with decoding and encoding. A step that
(2) withholds 100 times in a row is tried once more and measured anew, as the machine may have become faster.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from messnet.errors import RecipeError
from messnet.records.instance import ExitChoice

Reason = Literal["confident", "budget", "last"]
"""Why a frame stopped: eq. (1), eq. (2), or there was no further exit."""

WINDOW = 100


class ExitControl:
    """Equations (1) and (2) for a stream of frames.

    ``choices`` are the instance's exits, shallow to deep; one without an image threshold is passed unless the budget
    stops the frame there. ``frame_budget_ms`` is B > 0; None: no budget. Raises RecipeError for values out of range.
    """

    def __init__(
        self, choices: Sequence[ExitChoice], *, frame_budget_ms: float | None = None, hysteresis: float = 0.0
    ) -> None:
        if frame_budget_ms is not None and not 0 < frame_budget_ms < math.inf:
            raise RecipeError(f"the frame budget is a time above 0 ms, not {frame_budget_ms:g}")
        if not 0 <= hysteresis < 1:
            raise RecipeError(
                f"hysteresis lies in [0, 1), not {hysteresis:g}: it is a share of what is above a threshold"
            )
        # No confidence reaches infinity: an exit without a threshold is passed.
        self.thresholds = [math.inf if c.image_threshold is None else c.image_threshold for c in choices]
        self.budget_ms = math.inf if frame_budget_ms is None else frame_budget_ms
        self.hysteresis = hysteresis
        self._steps_ms: list[deque[float]] = [deque(maxlen=WINDOW) for _ in choices]
        self._withheld = [0] * len(choices)
        self._previous = 0
        self._stopped_by_budget = False

    def measured(self, place: int, step_ms: float) -> None:
        """Takes note that the step to the exit at ``place`` took ``step_ms``."""
        self._steps_ms[place].append(step_ms)

    def step_ms(self, place: int) -> float:
        """q: the 95th percentile of the step to the exit at ``place``; 0 while it was never measured."""
        # By the nearest rank, so that it is a time that was measured, from the first one on.
        times = sorted(self._steps_ms[place])
        return times[math.ceil(0.95 * len(times)) - 1] if times else 0.0

    def stops(self, place: int, confidence: float, elapsed_ms: float) -> Reason | None:
        """Whether the frame stops at the exit at ``place``, and why. Asked at the exits in turn until it does.

        ``confidence`` is c_i in [0, 1], ``elapsed_ms`` is s_i.
        """
        reason = self._reason(place, confidence, elapsed_ms)
        if reason is not None:
            self._previous, self._stopped_by_budget = place, reason == "budget"
        return reason

    def _reason(self, place: int, confidence: float, elapsed_ms: float) -> Reason | None:
        if place == len(self.thresholds) - 1:
            return "last"
        threshold = self.thresholds[place]
        # The bracket of (1). A share of what lies above an infinite threshold would be no number.
        margin = self.hysteresis * (1 - threshold) if place < self._previous and threshold < math.inf else 0.0
        if confidence >= threshold + margin:
            return "confident"
        # The bracket of (2): a deeper exit must fit with some time to spare before it is begun again.
        held = self._stopped_by_budget and self._previous <= place
        budget = self.budget_ms * (1 - self.hysteresis) if held else self.budget_ms
        if elapsed_ms + self.step_ms(place + 1) <= budget:
            self._withheld[place + 1] = 0
            return None
        self._withheld[place + 1] += 1
        # Without this, one slow spell would be remembered for ever: a step that is not taken is not measured.
        if self._withheld[place + 1] > WINDOW and elapsed_ms <= self.budget_ms:
            self._withheld[place + 1] = 0
            self._steps_ms[place + 1].clear()
            return None
        return "budget"


def first_confident(choices: Sequence[ExitChoice], confidences: Sequence[float]) -> int:
    """The place of the exit that the instance's own rule takes, c_i >= th_i, among the exits that ran: ``confidences``
    are theirs, in turn. The last of them when none was confident."""
    for place, (choice, confidence) in enumerate(zip(choices, confidences, strict=False)):
        if choice.image_threshold is not None and confidence >= choice.image_threshold:
            return place
    return len(confidences) - 1


def change_rate(exits: Sequence[int]) -> float:
    """The share of frames, in [0, 1], that took another exit than the frame before; 0 for less than two frames."""
    changes = sum(a != b for a, b in pairwise(exits))
    return changes / max(1, len(exits) - 1)
