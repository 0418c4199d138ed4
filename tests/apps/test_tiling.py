"""Tiles of a large image, against plain prediction and brute force."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest

from helpers.images import smooth_image
from messnet.apps.predictions import draw_exit_map
from messnet.apps.tiling import cut, predict_tiled
from messnet.deployment.session import Session
from messnet.errors import DataError, RecipeError
from messnet.images.colours import exit_colour
from messnet.network.multi_exit import MultiExitNet
from messnet.records.instance import ExitChoice, Instance
from messnet.report.figures import exit_colour as report_colour

TILE = (48, 64)
PIXEL_THRESHOLD = 0.9


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """Smooth on the left, noisy on the right; no multiple of any stride."""
    noise = np.random.default_rng(0).integers(0, 256, (131, 90, 3), np.uint8)
    return np.concatenate([smooth_image(131, 93), noise], 1)


@pytest.fixture(scope="module")
def session(small_net: MultiExitNet, image: np.ndarray) -> Session:
    """Leaves at the first exit where half of the tiles do."""
    head = next(exit.head for exit in small_net.exits if exit.exit_index == 0)

    def made(threshold: float) -> Session:
        first = ExitChoice(exit_index=0, head=head, pixel_threshold=PIXEL_THRESHOLD, image_threshold=threshold)
        instance = Instance(name="x", setting="input_dependent", exits=(first, ExitChoice(exit_index=3, head="final")))
        return Session(small_net, instance, input_size=TILE)

    tiles = predict_tiled(made(0.0), image).tiles
    return made(float(np.median([tile.image_confidence for tile in tiles])))


def test_pieces_cover_a_side_once_and_tiles_overlap() -> None:
    for length in range(1, 40):
        for tile in range(1, 20):
            for overlap in range(tile):
                places = cut(length, tile, overlap)
                covered = np.zeros(length, int)
                for (begin, end), (own_begin, own_end) in places:
                    assert end - begin == min(tile, length)
                    assert 0 <= begin <= own_begin < own_end <= end <= length
                    covered[own_begin:own_end] += 1
                assert (covered == 1).all()
                for (left, _), (right, _) in pairwise(places):
                    assert left[1] - right[0] >= overlap
                fewer = len(places) - 1  # tiles would not reach over the side
                assert fewer * (tile - overlap) + overlap < length or fewer == 0


@pytest.mark.parametrize("size", [(48, 64), (40, 64), (31, 33)])
def test_one_tile_is_plain_prediction(session: Session, image: np.ndarray, size: tuple[int, int]) -> None:
    part = image[: size[0], : size[1]]
    plain, tiled = session.predict([part])[0], predict_tiled(session, part, tile=TILE)
    np.testing.assert_array_equal(tiled.labels, plain.labels)
    np.testing.assert_array_equal(tiled.confidence_map, plain.confidence_map)
    assert (tiled.exit_index, tiled.image_confidence) == (plain.exit_index, plain.image_confidence)
    assert tiled.exit_map.shape == (1, 1)
    assert tiled.latency_ms > 0


@pytest.mark.parametrize(("tile", "overlap"), [((50, 70), 0), ((131, 60), None)])
def test_every_pixel_is_of_the_nearest_tile(
    session: Session, image: np.ndarray, tile: tuple[int, int], overlap: int | None
) -> None:
    result = predict_tiled(session, image, tile=tile, overlap=overlap)
    y, x = np.indices(image.shape[:2]) + 0.5
    best = np.full(image.shape[:2], np.inf)
    labels, confidence = np.zeros_like(result.labels), np.zeros_like(result.confidence_map)
    for one, exit_index in zip(result.tiles, result.exit_map.ravel(), strict=True):
        place = (slice(*one.rows), slice(*one.columns))
        plain = session.predict([image[place]])[0]
        assert (one.exit_index, one.image_confidence) == (plain.exit_index, plain.image_confidence)
        assert exit_index == plain.exit_index
        # Of centres on a grid the nearest is the nearest along each side.
        distance = np.abs(y - sum(one.rows) / 2) * 1000 + np.abs(x - sum(one.columns) / 2)
        nearer = np.zeros_like(best, bool)
        nearer[place] = distance[place] < best[place]
        best[nearer] = distance[nearer]
        labels[nearer] = plain.labels[nearer[place]]
        confidence[nearer] = plain.confidence_map[nearer[place]]
    # A border in the middle between two centres may fall to either.
    assert (result.labels == labels).mean() > 0.99
    assert (result.confidence_map == confidence).mean() > 0.98
    assert sum(result.exits.values()) == len(result.tiles) == result.exit_map.size


def test_tiles_leave_on_their_own_batched_or_not(session: Session, image: np.ndarray) -> None:
    one, many = predict_tiled(session, image), predict_tiled(session, image, batch_size=4)
    assert set(one.exits) == {0, 3}
    assert one.exit_index == 3
    assert {(t.rows[1] - t.rows[0], t.columns[1] - t.columns[0]) for t in one.tiles} == {TILE}
    np.testing.assert_array_equal(one.exit_map, many.exit_map)
    assert (one.labels == many.labels).mean() > 0.999
    areas = np.array([np.ptp(t.own_rows) * np.ptp(t.own_columns) for t in one.tiles])
    shares = np.array([t.image_confidence for t in one.tiles])
    assert one.image_confidence == pytest.approx((areas * shares).sum() / image[..., 0].size)


def test_the_picture_has_the_colours_of_the_exits(session: Session, image: np.ndarray) -> None:
    result = predict_tiled(session, image)
    white = np.full_like(image, 255)
    picture = draw_exit_map(white, result, [0, 3])
    assert picture.shape == image.shape
    for tile in result.tiles:
        colour = exit_colour([0, 3].index(tile.exit_index), 2)
        expected = 0.55 * 255 + 0.45 * np.array(colour)
        corner = picture[tile.own_rows[0] + 3, tile.own_columns[0] + 3]
        np.testing.assert_allclose(corner, expected, atol=2)
    assert draw_exit_map(white.repeat(10, 1), result, [0, 3]).shape == (round(131 / 1830 * 1600), 1600, 3)


def test_colours_are_the_reports() -> None:
    for number in (1, 2, 5):
        for place in range(number):
            report = [int(report_colour(place, number)[i : i + 2], 16) for i in (1, 3, 5)]
            assert exit_colour(place, number) == tuple(report)


def test_what_cannot_be_tiled(session: Session, image: np.ndarray) -> None:
    with pytest.raises(RecipeError, match="overlap < tile, got 48 and 48"):
        predict_tiled(session, image, overlap=48)
    with pytest.raises(RecipeError, match="at least 1 tile"):
        predict_tiled(session, image, batch_size=0)
    with pytest.raises(DataError, match=r"\(131, 183\) uint8: convert it"):
        predict_tiled(session, image[..., 0])
    with pytest.raises(RecipeError, match="height and width"):
        predict_tiled(Session(session.net, session.instance), image)


def test_memory_holds_no_scores_of_the_whole_image(session: Session) -> None:
    """Counted by Python's own tracing of NumPy's arrays: what is added to the image, bytes per pixel."""
    image = smooth_image(1200, 1200)
    predict_tiled(session, image[:200, :200], tile=(200, 200))  # what is compiled or loaded once
    tracemalloc.start()
    try:
        result = predict_tiled(session, image, tile=(200, 200), batch_size=2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    kept = result.labels.nbytes + result.confidence_map.nbytes
    assert kept == 5 * 1200 * 1200
    # Two tiles in the network: their pixels, scores and confidences in float32, an eighteenth of the image.
    assert kept <= peak < 1.5 * kept
