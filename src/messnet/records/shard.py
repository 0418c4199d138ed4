"""A share of work that several processes or machines divide."""

from __future__ import annotations

import re
from dataclasses import dataclass

from messnet.errors import RecipeError


@dataclass(frozen=True, order=True)
class Shard:
    """Part ``index`` = 1 .. ``count`` of some work. As words: "2/8"; in file names: "2of8"."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Raises RecipeError for anything but K/N with 1 <= K <= N."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise RecipeError(f"--shard is K/N with 1 <= K <= N, such as 2/8, got {text!r}")
        return cls(int(match[1]), int(match[2]))

    @property
    def words(self) -> str:
        return f"{self.index}/{self.count}"

    def __str__(self) -> str:
        return f"{self.index}of{self.count}"  # a slash would be a folder

    def divided(self, rank: int, world_size: int) -> Shard:
        """The part of this part that process ``rank`` = 0 .. ``world_size`` - 1 does."""
        return Shard((self.index - 1) * world_size + rank + 1, self.count * world_size)


WHOLE = Shard()
"""All of it."""
