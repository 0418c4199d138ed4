"""Which exit policy is meant, by name; plain data that every form of the policy reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

from messnet.errors import RecipeError

__all__ = ["Confidence", "Policy", "Pooling", "Refinement"]

Confidence = Literal["top1", "entropy"]
Refinement = Literal["native", "paper", "none"]
Pooling = Literal["share", "mean", "patches", "classes"]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How an exit's confidence is computed. Its thresholds belong to the exits of an instance."""

    confidence: Confidence = "top1"
    """Of a pixel. "top1": the largest softmax probability. "entropy": 1 - H(p) / log K."""
    refinement: Refinement = "native"
    """Near edges. "native": exact label boundaries at the logits' own resolution, windows of 5 x 5 feature pixels.
    "paper": Canny on the upsampled label map, windows of +-2 os_i input pixels. "none": no edge refinement."""
    pooling: Pooling = "share"
    """From the map to the image. "share": the share of confident pixels, eq. (3). The others take no refinement and
    ignore the pixel threshold. "mean": mean over all pixels. "patches": of the means over all windows of about 50 input
    pixels, the one that 1 % of the windows are not above (after Kahl et al., "ValUES", 2024, and Jazbec et al., "Fast
    yet Safe", 2024, who slide windows of 50 pixels and take the same quantile). "classes": mean over the pixels
    predicted as one of ``classes``; over all pixels where there is none, for nothing then speaks for stopping: a
    shallow exit may have overlooked them."""
    classes: tuple[int, ...] = ()
    """Classes of interest, for "classes" only."""

    def __post_init__(self) -> None:
        if self.pooling != "share" and self.refinement != "none":
            raise RecipeError(f"{self.pooling!r} confidence takes no edge refinement: set refinement to 'none'")
        if (self.pooling == "classes") != bool(self.classes) or any(k < 0 for k in self.classes):
            raise RecipeError(f"pooling {self.pooling!r} does not go with classes of interest {self.classes}")

    @property
    def name(self) -> str:
        """The name in tables and instances, which ``parse`` reads: ``"top1+native"``, ``"entropy+mean"``,
        ``"top1+patches"``, ``"top1+classes:8+9"``."""
        if self.pooling == "share":
            return f"{self.confidence}+{self.refinement}"
        return f"{self.confidence}+{self.pooling}" + (":" + "+".join(map(str, self.classes)) if self.classes else "")

    @classmethod
    def parse(cls, name: str) -> Policy:
        """The policy of a name such as ``"top1+native"``. Raises RecipeError, which lists the options."""
        confidence, _, rest = name.partition("+")
        pooling, colon, classes = rest.partition(":")
        kinds, forms = get_args(Confidence), get_args(Refinement)
        ids = classes.split("+") if colon else []
        if confidence in kinds and all(k.isdecimal() for k in ids):
            kind = cast(Confidence, confidence)
            if rest in forms:
                return cls(confidence=kind, refinement=cast(Refinement, rest))
            if rest in ("mean", "patches") or (pooling == "classes" and ids):
                chosen = tuple(map(int, ids))
                return cls(confidence=kind, refinement="none", pooling=cast(Pooling, pooling), classes=chosen)
        options = f"{' or '.join(kinds)}, +, {', '.join((*forms, 'mean', 'patches'))} or classes:8+9 (class ids)"
        raise RecipeError(f"no exit policy is called {name!r}; it is {options}, such as top1+native")
