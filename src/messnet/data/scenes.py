"""Generated outdoor scenes: the data set that is always there. No files, no download, every image drawn on access.

Two pairs of classes look alike from close by and are told apart by their surroundings only: water is drawn like sky
(one lies in the ground, the other above it), a boat like a car (one floats, the other stands on a road). An early
exit sees little context and must get large regions of them wrong; a deep one can get them right. Every image has a
difficulty, drawn first, which drives contrast, noise, blur, texture, the number and size of the objects, and the water.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from messnet.data import IGNORE_INDEX, SegmentationSample
from messnet.errors import DataError

SKY, WATER, GROUND, ROAD, BUILDING, TREE, CAR, BOAT = range(8)
CLASS_NAMES = ("sky", "water", "ground", "road", "building", "tree", "car", "boat")
PALETTE = np.array([
    (135, 190, 235), (38, 92, 168), (190, 205, 120), (128, 116, 140),
    (224, 140, 96), (58, 130, 82), (214, 62, 80), (250, 206, 84),
], np.uint8)  # fmt: skip
MIN_SIZE = 64

# What one scene may look like: (sky and water, ground, foliage), RGB.
MOODS = np.array(
    [
        [(134, 190, 232), (158, 190, 102), (72, 132, 78)],  # summer noon
        [(118, 198, 208), (190, 186, 112), (92, 140, 70)],  # late summer
        [(236, 178, 150), (150, 150, 98), (84, 104, 76)],  # sunset
        [(164, 178, 214), (196, 158, 100), (182, 102, 58)],  # autumn
        [(178, 196, 214), (222, 222, 216), (84, 122, 112)],  # winter
        [(128, 140, 196), (112, 134, 116), (56, 86, 92)],  # dusk
    ],
    np.float32,
)
WALLS = np.array([(226, 196, 160), (206, 120, 92), (238, 230, 214), (180, 160, 170), (232, 184, 96)], np.float32)
ROOFS = np.array([(150, 70, 58), (92, 84, 96), (120, 92, 74)], np.float32)
PAINTS = np.array([(206, 52, 62), (246, 244, 240), (240, 186, 54), (52, 88, 150), (40, 52, 60)], np.float32)
ASPHALT = np.array((126, 122, 130), np.float32)

# Standard deviation of each class's brightness at difficulty 1 (0 to 255): soft clouds, coarse and fine grain.
# Sky and water share a row, and so do car and boat.
TEXTURE = np.array(
    [(22, 0, 2), (22, 0, 2), (8, 8, 9), (4, 4, 8), (0, 8, 5), (4, 16, 10), (0, 3, 3), (0, 3, 3)], np.float32
)

ANGLES = np.linspace(0, 2 * np.pi, 40, endpoint=False)[:, None]
CIRCLE = np.concatenate([np.cos(ANGLES), np.sin(ANGLES)], 1)

Points = NDArray[np.float64]
Colour = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class ScenesOptions:
    """The generated data set. Image i of a split depends on seed, split, i and size only."""

    size: tuple[int, int] = (128, 160)
    """(height, width) in pixels, each at least 64."""
    num_train: int = 1600
    num_val: int = 240
    seed: int = 0
    """At least 0."""


class Scenes:
    """One split of the generated scenes, a ``SegmentationDataset``."""

    class_names = CLASS_NAMES
    palette = PALETTE

    def __init__(self, split: Literal["train", "val"], options: ScenesOptions | None = None) -> None:
        options = options or ScenesOptions()
        if split not in ("train", "val"):
            raise DataError(f"split is 'train' or 'val', not {split!r}: the generated scenes have no other")
        if min(options.size) < MIN_SIZE:
            raise DataError(f"generated scenes are at least {MIN_SIZE} x {MIN_SIZE} pixels, not {options.size}")
        if options.seed < 0:
            raise DataError(f"the seed of the generated scenes is 0 or more, not {options.seed}")
        self.split = split
        self.options = options

    def __len__(self) -> int:
        return self.options.num_train if self.split == "train" else self.options.num_val

    def __getitem__(self, index: int) -> SegmentationSample:
        index = range(len(self))[index]
        # The split is part of the seed, as 0 or 1, so that no scene is in both.
        rng = np.random.default_rng([self.options.seed, self.split == "val", index])
        difficulty = float(rng.random())
        image, mask = _render(rng, difficulty, self.options.size)
        return SegmentationSample(name=f"{self.split}_{index:05d}", image=image, mask=mask, difficulty=difficulty)


class _Canvas:
    """Image and mask that are drawn together. Points are (x, y) in image heights, y downwards, before the tilt."""

    def __init__(self, size: tuple[int, int], tilt: float, background: Colour) -> None:
        height, width = size
        self.image = np.empty((height, width, 3), np.float32)
        self.image[:] = background
        self.mask = np.full(size, SKY, np.uint8)
        self.aspect = width / height
        self._centre = np.array((self.aspect / 2, 0.5))
        self._rotation = np.array([(np.cos(tilt), -np.sin(tilt)), (np.sin(tilt), np.cos(tilt))])

    def to_scene(self, pixels: Points) -> Points:
        return np.asarray((pixels / len(self.mask) - self._centre) @ self._rotation + self._centre)

    def _corners(self, points: Points) -> list[NDArray[np.int32]]:
        """Polygons in sixteenths of a pixel, as OpenCV takes them (shift=4)."""
        pixels = ((points - self._centre) @ self._rotation.T + self._centre) * (16 * len(self.mask))
        return list(pixels.astype(np.int32).reshape(-1, *points.shape[-2:]))

    def polygon(self, points: Points, colour: Colour, label: int | None = None) -> None:
        """Fill (M, 2) points, or several disjoint polygons (P, M, 2); without a label the mask stays."""
        corners = self._corners(points)
        cv2.fillPoly(self.image, corners, colour.tolist(), shift=4)
        if label is not None:
            cv2.fillPoly(self.mask, corners, label, shift=4)

    def outline(self, points: Points, width: float) -> None:
        """Make the outline void."""
        thickness = max(1, round(width * self.mask.shape[0]))
        cv2.polylines(self.mask, self._corners(points), True, IGNORE_INDEX, thickness, shift=4)

    def spots(self, rng: np.random.Generator, label: int, count: int, margin: float) -> Points:
        """Up to ``count`` random points (M, 2) where the mask is ``label``, also ``margin`` to the left and right."""
        found = np.flatnonzero(self.mask == label)
        if count == 0 or len(found) == 0:
            return np.empty((0, 2))
        # Twelve draws for each spot wanted, for many lie too close to the border of their region.
        rows, columns = np.divmod(rng.choice(found, 12 * count), self.mask.shape[1])
        reach = round(margin * self.mask.shape[0])
        sides = np.clip([columns - reach, columns + reach], 0, self.mask.shape[1] - 1)
        is_wide = (self.mask[rows, sides] == label).all(0)
        return self.to_scene(np.stack([columns, rows], 1)[is_wide][:count].astype(np.float64))


def _render(
    rng: np.random.Generator, difficulty: float, size: tuple[int, int]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Image (H, W, 3) RGB and mask (H, W)."""
    sky, ground, foliage = MOODS[rng.integers(len(MOODS))] + rng.normal(0, 6, (3, 1)).astype(np.float32)
    horizon = rng.uniform(0.16, 0.66)
    # The cube makes most tilts small; the sign stays.
    canvas = _Canvas(size, tilt=np.radians(14) * rng.uniform(-1, 1) ** 3, background=sky)
    _land(rng, canvas, horizon, difficulty, sky, ground)

    def count(most: int) -> int:
        return round(1 + difficulty * rng.uniform(0.4, 1) * most)

    draws: list[tuple[float, Callable[[], None]]] = []

    def add(draw: Callable[..., None], label: int, place: int, most: int, margin: float, **look: Colour) -> None:
        for x, foot in canvas.spots(rng, place, count(most), margin):
            # Perspective: 0 at the horizon, 1 at the lower edge, and what is near is large.
            near = np.clip((foot - horizon) / (1 - horizon), 0, 1)
            scale = (1.35 - 0.75 * difficulty) * (0.3 + 0.7 * near) * rng.uniform(0.8, 1.2)
            draws.append((foot, partial(draw, rng, canvas, x, foot, scale, label=label, **look)))

    add(_building, BUILDING, GROUND, 5, 0.05, glass=sky)
    add(_tree, TREE, GROUND, 9, 0.02, colour=foliage)
    add(_vehicle, CAR, ROAD, 4, 0.07, glass=sky)
    add(_vehicle, BOAT, WATER, 4, 0.07, glass=sky)
    for _, draw in sorted(draws, key=lambda item: item[0]):  # the nearest last
        draw()
    return _photograph(rng, canvas, difficulty), canvas.mask


def _land(
    rng: np.random.Generator, canvas: _Canvas, horizon: float, difficulty: float, sky: Colour, ground: Colour
) -> None:
    """Hills, ground, lakes and a road."""
    x = np.linspace(-0.5, canvas.aspect + 0.5, 32)
    for distance in (0.6, 0.3, 0.0):
        waves = sum(np.sin(x * f + rng.uniform(0, 6.3)) / f for f in rng.uniform(2, 9, 3))
        ridge = horizon - distance * 0.12 + waves * (0.02 + 0.12 * distance)
        hill = np.concatenate([np.stack([x, ridge], 1), [(x[-1], 2), (x[0], 2)]])
        canvas.polygon(hill, ground + (sky - ground) * distance, GROUND)

    depth = 1 - horizon
    # Where there is no water, nothing needs wide context: easy images seldom have any.
    for _ in range(int((rng.random(3) < 0.75 * difficulty).sum())):
        foot = horizon + depth * rng.uniform(0.3, 1)
        radii = np.array((rng.uniform(0.35, 0.75), depth * rng.uniform(0.16, 0.34))) * (1.2 - 0.5 * difficulty)
        # A lake that reached above the horizon would be sky that is labelled water.
        radii[1] = min(radii[1], foot - horizon - 0.06 * depth)
        shore = _blob(rng, (rng.uniform(0, canvas.aspect), foot), radii, 0.12)
        # The dark rim above the water is the bank, and stays ground.
        canvas.polygon(np.add(shore, (0, -0.006)), ground * 0.8)
        canvas.polygon(shore, sky, WATER)

    if rng.random() < 0.85:
        _road(rng, canvas, horizon)


def _road(rng: np.random.Generator, canvas: _Canvas, horizon: float) -> None:
    """Towards the horizon, or across."""
    t = np.linspace(0, 1, 24)
    if rng.random() < 0.5:
        start, end = rng.uniform(0.1, 0.9, 2) * canvas.aspect
        # Equal steps along the road grow towards the viewer, and so does its width.
        y = horizon + 0.01 + (1.2 - horizon) * t**1.5
        half = np.stack([0.012 + 0.3 * t**1.5, 0 * t], 1)
        centre = np.stack([start + (end - start) * t + rng.uniform(-0.5, 0.5) * t * (1 - t) * 2, y], 1)
    else:
        y = horizon + (1 - horizon) * rng.uniform(0.25, 0.85) + rng.uniform(-0.15, 0.15) * (t - 0.5)
        half = np.stack([0 * t, np.full_like(t, (1 - horizon) * rng.uniform(0.1, 0.18))], 1)
        centre = np.stack([-0.4 + (canvas.aspect + 0.8) * t, y], 1)
    asphalt = ASPHALT + np.float32(rng.normal(0, 10))
    canvas.polygon(np.concatenate([centre - half, (centre + half)[::-1]]), asphalt, ROAD)
    left, right = centre - 0.05 * half, centre + 0.05 * half
    # The middle line: every second step is a dash of four corners.
    dashes = np.stack([left[1:-1:2], left[2::2], right[2::2], right[1:-1:2]], 1)
    canvas.polygon(dashes, asphalt + 70)


def _blob(rng: np.random.Generator, centre: tuple[float, float], radii: Points | float, roughness: float) -> Points:
    """A closed wobbly curve, (40, 2)."""
    frequency = np.array((2, 3, 5))
    # Fast waves are low ones, as on any natural outline.
    height = rng.normal(0, roughness / frequency)
    waves = np.cos(frequency * ANGLES + rng.uniform(0, 6.3, 3)) @ height
    return np.asarray(centre + radii * (1 + waves[:, None]) * CIRCLE)


def _box(x: float, foot: float, width: float, height: float) -> Points:
    """A rectangle that stands on ``foot``, centred at ``x``."""
    left, right, top = x - width / 2, x + width / 2, foot - height
    return np.array([(left, foot), (left, top), (right, top), (right, foot)])


def _building(
    rng: np.random.Generator, canvas: _Canvas, x: float, foot: float, scale: float, *, label: int, glass: Colour
) -> None:
    floors, columns = rng.integers(1, 5), rng.integers(2, 5)
    storey = 0.13 * scale
    width, height = storey * columns * 1.05, storey * (floors + 0.25)
    wall = rng.choice(WALLS) + rng.normal(0, 8, 3).astype(np.float32)
    canvas.polygon(_box(x, foot, width, height), wall, label)
    canvas.polygon(_box(x + 0.45 * width, foot, 0.1 * width, height), wall * 0.86)  # the side in shade
    roof = _box(x, foot - height, width * 1.12, storey * rng.uniform(0.25, 0.9))
    roof[1:3, 0] += np.array((1, -1)) * width * rng.uniform(0, 0.5)
    canvas.polygon(roof, rng.choice(ROOFS), label)
    # The window of each floor and column, in storeys from the middle of the building's foot.
    row, column = np.divmod(np.arange(floors * columns), columns)
    corners = np.stack([column - (columns - 1) / 2, -row - 0.25], 1)[:, None] + _box(0, 0, 0.42, 0.58)
    panes = corners * storey + (x, foot)
    is_dark = rng.random(len(panes)) < 0.3
    canvas.polygon(panes[~is_dark], glass)
    canvas.polygon(panes[is_dark], wall * 0.55)


def _tree(
    rng: np.random.Generator, canvas: _Canvas, x: float, foot: float, scale: float, *, label: int, colour: Colour
) -> None:
    height = 0.4 * scale * rng.uniform(0.8, 1.3)
    colour = colour + rng.normal(0, 8, 3).astype(np.float32)
    trunk = _box(x, foot, 0.1 * height, 0.5 * height)
    canvas.polygon(trunk, np.array((104, 78, 62), np.float32), label)
    if rng.random() < 0.35:  # a fir
        tips = [
            (x, foot - 1.15 * height),
            (x + 0.3 * height, foot - 0.2 * height),
            (x - 0.3 * height, foot - 0.2 * height),
        ]
        crown = np.array(tips)
        light = (crown - crown[:1]) * (0.55, 0.8) + crown[:1] - (0.03 * height, 0)
    else:
        crown = _blob(rng, (x, foot - 0.68 * height), height * np.array((0.36, 0.38)), 0.12)
        light = (crown - crown.mean(0)) * 0.62 + crown.mean(0) - 0.09 * height
    canvas.polygon(crown, colour * 0.84, label)
    canvas.polygon(light, colour * 1.1)
    canvas.outline(crown, 0.006)  # nobody can say where foliage ends


def _vehicle(
    rng: np.random.Generator, canvas: _Canvas, x: float, foot: float, scale: float, *, label: int, glass: Colour
) -> None:
    """A car or a boat: the same drawing, whatever it rests on."""
    # A negative width mirrors the drawing.
    size = np.array((rng.choice((-1, 1)), 1)) * 0.34 * scale
    paint = rng.choice(PAINTS) + rng.normal(0, 6, 3).astype(np.float32)
    origin = np.array((x, foot))
    shadow = origin + size * (0.5, 0.07) * CIRCLE
    body = np.array([(-0.42, 0), (-0.5, -0.2), (-0.44, -0.25), (0.5, -0.25), (0.52, -0.16), (0.4, 0)])
    cabin = np.array([(-0.34, -0.24), (-0.24, -0.45), (0.12, -0.45), (0.28, -0.24)])
    window = np.array([(-0.02, -0.26), (-0.02, -0.41), (0.1, -0.41), (0.2, -0.26)])
    stripe = np.array([(-0.47, -0.13), (-0.48, -0.17), (0.51, -0.17), (0.49, -0.13)])
    canvas.polygon(shadow, np.array((52, 56, 66), np.float32), label)
    canvas.polygon(origin + size * cabin, paint * 0.8 + 40, label)
    canvas.polygon(origin + size * body, paint, label)
    canvas.polygon(origin + size * np.stack([window, window - (0.22, 0)]), glass)
    canvas.polygon(origin + size * stripe, paint * 0.7 + 70)


def _photograph(rng: np.random.Generator, canvas: _Canvas, difficulty: float) -> NDArray[np.uint8]:
    """Texture, light, lens and sensor, all growing with difficulty. (H, W, 3) uint8; makes the lens's rim void."""
    size = canvas.mask.shape
    grain = [_noise(rng, size, cells) for cells in ((5, 3), (28, 28), (72, 72))]
    amplitude = np.zeros((3, IGNORE_INDEX + 1), np.float32)
    amplitude[:, : len(TEXTURE)] = TEXTURE.T * (0.2 + 0.8 * difficulty)
    texture = sum(row[canvas.mask] * noise for row, noise in zip(amplitude, grain, strict=True))
    # Contrast is about the mean of each channel, so that hard images are flat but not dark.
    mean = cv2.mean(canvas.image)[:3]
    contrast = 1.05 - 0.6 * difficulty * rng.uniform(0.7, 1)
    light = contrast * (1 + 0.2 * difficulty * _noise(rng, size, (2, 2)))
    merged = cv2.merge([(canvas.image[..., c] + texture - mean[c]) * light + mean[c] for c in range(3)])
    # In pixels, for the size that the figures were chosen at, 128 rows.
    blur = (0.35 + 0.9 * difficulty * rng.uniform(0.5, 1)) * size[0] / 128
    image = cv2.GaussianBlur(cv2.convertScaleAbs(np.maximum(merged, 0)), (0, 0), blur)
    sigma = 1 + 11 * difficulty * rng.uniform(0.5, 1)
    static = rng.integers(0, 256, image.shape, np.uint8)  # uniform: ten times cheaper than normal, looks the same
    # Uniform bytes have mean 127.5 and standard deviation 256 / sqrt(12) = 74.
    image = cv2.addWeighted(image, 1, static, sigma / 74, -127.5 * sigma / 74)

    # The rim lies beyond |x|^p + |y|^p = 1, a rectangle with round corners; n pixels have their centres within +-1.
    power = rng.uniform(6, 14)
    y, x = (np.abs(np.linspace(1 / n - 1, 1 - 1 / n, n)) ** power for n in size)
    is_rim = y[:, None] + x > 1
    image[is_rim] = 18
    canvas.mask[is_rim] = IGNORE_INDEX
    return np.asarray(image, np.uint8)


def _noise(rng: np.random.Generator, size: tuple[int, int], cells: tuple[int, int]) -> NDArray[np.float32]:
    """Smooth noise (H, W) with about ``cells`` (down, across) bumps, mean 0, standard deviation about 1."""
    small = rng.standard_normal((cells[0] + 1, cells[1] + 1), np.float32)
    return np.asarray(cv2.resize(small, size[::-1], interpolation=cv2.INTER_CUBIC), np.float32)
