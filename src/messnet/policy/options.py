"""The recipe's section ``evaluate``."""

from __future__ import annotations

from dataclasses import dataclass

from messnet.errors import RecipeError
from messnet.policy.policy import Policy


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Options of the evaluation: which figures are recorded of every image."""

    policies: tuple[str, ...] = ("top1+native",)
    """Confidence, "top1" or "entropy", + edge refinement, "native", "paper" or "none"; the first is deployed."""
    pixel_thresholds: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.96, 0.98, 0.99)
    """Grid of th_pix, ascending, in [0, 1]."""

    def __post_init__(self) -> None:
        if not self.policies or not self.pixel_thresholds:
            raise RecipeError("evaluate.policies and evaluate.pixel_thresholds need at least one value each")
        if list(self.pixel_thresholds) != sorted(set(self.pixel_thresholds)):
            raise RecipeError(f"evaluate.pixel_thresholds must ascend, got {self.pixel_thresholds}")
        for name in self.policies:
            Policy.parse(name)
