"""What a recipe asks of the search."""

from __future__ import annotations

from dataclasses import dataclass

from messnet.errors import RecipeError
from messnet.searching import Grid

__all__ = ["SearchOptions"]


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """What ``messnet run`` searches: the best accuracy at no more work than the model, and the least work for each
    drop; all input-dependent, one early cut included."""

    max_drops_pp: tuple[float, ...] = (0.1, 1.0)
    """mIoU that may be lost against the final exit, percentage points."""
    grid: Grid = Grid()
    time_limit: float | None = 300.0
    """Seconds for the front, and for each objective if the front was not proved by then; null: as long as it takes."""
    seed: int = 0
    """Which half of the validation images is selected on."""

    def __post_init__(self) -> None:
        if self.time_limit is not None and not self.time_limit >= 0:
            raise RecipeError(f"search.time_limit must be at least 0 seconds, got {self.time_limit}")
