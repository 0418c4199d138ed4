"""Which exit policy is meant, by name; plain data that every form of the policy reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

from messnet.errors import RecipeError

Confidence = Literal["top1", "entropy"]
Refinement = Literal["native", "paper", "none"]
# What version 0.1 could also make of a confidence map; benchmarks/bench_policies.py compares with them.
_FORMER = ("mean", "patches", "classes")


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How an exit's confidence is computed. Its thresholds belong to the exits of an instance."""

    confidence: Confidence = "top1"
    """Of a pixel. "top1": the largest softmax probability. "entropy": 1 - H(p) / log K."""
    refinement: Refinement = "native"
    """Near edges. "native": exact label boundaries at the logits' own resolution, windows of 5 x 5 feature pixels.
    "paper": Canny on the upsampled label map, windows of +-2 os_i input pixels. "none": no edge refinement."""

    @property
    def name(self) -> str:
        """The name in tables and instances, which ``parse`` reads: ``"top1+native"``, ``"entropy+paper"``."""
        return f"{self.confidence}+{self.refinement}"

    @classmethod
    def parse(cls, name: str) -> Policy:
        """The policy of a name such as ``"top1+native"``. Raises RecipeError, which lists the options."""
        kinds, forms = get_args(Confidence), get_args(Refinement)
        confidence, _, refinement = name.partition("+")
        if confidence in kinds and refinement in forms:
            return cls(confidence=cast(Confidence, confidence), refinement=cast(Refinement, refinement))
        if refinement.partition(":")[0] in _FORMER:
            raise RecipeError(
                f"the exit policy {name!r} was an experiment that did not pay, and is gone: evaluate and search "
                f"again with top1+native"
            )
        raise RecipeError(
            f"no exit policy is called {name!r}; it is {' or '.join(kinds)}, +, {', '.join(forms)}, such as top1+native"
        )
