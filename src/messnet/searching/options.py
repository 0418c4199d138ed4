"""What a recipe asks of the search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from messnet.errors import RecipeError
from messnet.searching.grid import Grid

Protocol = Literal["cross_fitted", "two_halves"]


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """What ``messnet run`` searches: the best accuracy at no more work than the model, and the least work for each
    drop; all input-dependent, one early cut included."""

    max_drops_pp: tuple[float, ...] = (0.1, 1.0)
    """mIoU that may be lost against the final exit, percentage points."""
    protocol: Protocol = "cross_fitted"
    """cross_fitted: all validation images select, limits are tightened until they hold on images not seen, and each
    image is judged by instances chosen without it. two_halves: one half selects with the limits as they are, the other
    half reports."""
    folds: int = 5
    """Parts of the validation images, groups whole, that are judged by what is searched on all others."""
    grid: Grid = Grid()
    time_limit: float | None = 480.0
    """Seconds for all searches of the recipe together, then the best so far with what is proved of it; null: as long as
    it takes. An instance of your own (`search --name`) has as many."""
    seed: int = 0
    """Deals the validation images into halves and folds."""

    def __post_init__(self) -> None:
        if self.time_limit is not None and not self.time_limit >= 0:
            raise RecipeError(f"search.time_limit must be at least 0 seconds, got {self.time_limit}")
        if self.folds < 2:
            raise RecipeError(f"search.folds must be at least 2, got {self.folds}")
