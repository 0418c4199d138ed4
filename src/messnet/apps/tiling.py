"""A large image as overlapping tiles, each of which stops at its own exit.

Along each side of length L tiles of length t lie evenly, n = ceil((L - o) / (t - o)) of them, so that neighbours share
at least the overlap o. Each pixel takes its label and its confidence from the tile whose centre is nearest: a tile owns
what lies between the middles of its overlaps, and these pieces cover the image exactly once. Within the image every
pixel so has at least o / 2 of context on every side. Nothing is blended: two tiles that left at different exits have
logits of different heads, whose mean means nothing.

Memory: the image, its labels and its confidence (8 bytes per pixel), and one batch of tiles in the network.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from messnet.deployment.session import Session
from messnet.errors import DataError, RecipeError


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One tile: where it lies, which part of the result is its own, and what became of it. Pixels, ends exclusive."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    own_rows: tuple[int, int]
    own_columns: tuple[int, int]
    exit_index: int
    image_confidence: float


@dataclass(frozen=True, kw_only=True, eq=False)
class TiledResult:
    """The prediction for one image (H, W) in tiles."""

    labels: NDArray[np.uint8]
    """(H, W) class indices."""
    confidence_map: NDArray[np.float32]
    """(H, W) in [0, 1], after edge refinement."""
    tiles: tuple[Tile, ...]
    """Row by row."""
    exit_map: NDArray[np.int64]
    """(rows, columns) of tiles: the exit that each took."""
    latency_ms: float
    """The time for the whole image: cutting, running all tiles, stitching."""

    @property
    def exit_index(self) -> int:
        """The deepest exit that a tile took."""
        return int(self.exit_map.max())

    @property
    def exits(self) -> dict[int, int]:
        """How many tiles left at each exit, shallow to deep."""
        return dict(sorted(Counter(self.exit_map.ravel().tolist()).items()))

    @property
    def image_confidence(self) -> float:
        """c_img in [0, 1] of the tiles, weighted by the area that each owns."""
        areas = [(t.own_rows[1] - t.own_rows[0]) * (t.own_columns[1] - t.own_columns[0]) for t in self.tiles]
        shares = [tile.image_confidence * area for tile, area in zip(self.tiles, areas, strict=True)]
        return sum(shares) / sum(areas)


def predict_tiled(
    session: Session,
    image: NDArray[np.uint8],
    *,
    tile: tuple[int, int] | None = None,
    overlap: int | None = None,
    batch_size: int = 1,
) -> TiledResult:
    """Runs an image (H, W, 3) uint8 RGB of any size in tiles, ``batch_size`` at a time.

    ``tile`` is (height, width) in pixels; None: the size that the network was made for. A side of the image shorter
    than that is one tile, uncut. ``overlap`` is the least that neighbours share, in pixels, [0, tile); None: an eighth
    of the tile's shorter side. An image that one tile covers gives what ``session.predict`` gives.
    Raises RecipeError for sizes out of range, DataError for something else than an image.
    """
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8 or not image.size:
        raise DataError(f"an image is (H, W, 3) uint8 RGB, not {image.shape} {image.dtype}: convert it")
    if batch_size < 1:
        raise RecipeError(f"a batch holds at least 1 tile, not {batch_size}")
    if session.labels != "input":
        raise RecipeError("tiles are joined pixel by pixel: leave them out, or labels at the logits' resolution")
    if session.resize is not None:
        raise RecipeError(
            f"this network sees whole images, resized to {session.resize} pixels on the shorter side: leave tiles out"
        )
    if tile is None:
        tile = session.input_size
    if tile is None:
        raise RecipeError("this network does not say what size it was made for: give the tile's height and width")
    start = time.perf_counter()
    height, width = image.shape[:2]
    if overlap is None:
        overlap = min(tile) // 8
    rows, columns = cut(height, tile[0], overlap), cut(width, tile[1], overlap)
    places = [(row, column) for row in rows for column in columns]
    labels = np.empty((height, width), np.uint8)
    confidence = np.empty((height, width), np.float32)
    tiles: list[Tile] = []
    for first in range(0, len(places), batch_size):
        batch = places[first : first + batch_size]
        pieces = [image[slice(*row[0]), slice(*column[0])] for row, column in batch]
        results = session.predict(pieces, batch_size=batch_size)
        for (row, column), result in zip(batch, results, strict=True):
            here = slice(*row[1]), slice(*column[1])
            # What a tile owns, counted from its own corner.
            within = tuple(slice(own[0] - whole[0], own[1] - whole[0]) for whole, own in (row, column))
            labels[here] = result.labels[within]
            confidence[here] = result.confidence_map[within]
            tiles.append(
                Tile(
                    rows=row[0],
                    columns=column[0],
                    own_rows=row[1],
                    own_columns=column[1],
                    exit_index=result.exit_index,
                    image_confidence=result.image_confidence,
                )
            )
    return TiledResult(
        labels=labels,
        confidence_map=confidence,
        tiles=tuple(tiles),
        exit_map=np.array([t.exit_index for t in tiles]).reshape(len(rows), len(columns)),
        latency_ms=(time.perf_counter() - start) * 1000,
    )


def cut(length: int, tile: int, overlap: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Tiles along a side of ``length`` pixels: (begin, end) of each and of the part that it owns, ends exclusive.

    All are min(tile, length) long; neighbours share at least ``overlap``, 0 <= overlap < tile; otherwise
    RecipeError is raised.
    """
    if tile < 1 or not 0 <= overlap < tile:
        raise RecipeError(f"expected a tile of at least 1 pixel and 0 <= overlap < tile, got {tile} and {overlap}")
    tile = min(tile, length)
    number = 1 if tile == length else math.ceil((length - overlap) / (tile - overlap))
    # The first begins at 0 and the last ends at the length; what n tiles hold too much is spread over the overlaps.
    begins = [i * (length - tile) // max(1, number - 1) for i in range(number)]
    # One tile ends at a + t and the next begins at b: the border is the middle of what both hold.
    borders = [0, *((a + tile + b) // 2 for a, b in pairwise(begins)), length]
    return [((a, a + tile), (borders[i], borders[i + 1])) for i, a in enumerate(begins)]
