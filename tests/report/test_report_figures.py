"""The report's drawings: the numbers in them, their colours, and that names neither overlap nor leave the sheet."""

from __future__ import annotations

import base64
import io
import re
from itertools import combinations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread

from messnet.network.exit_points import choose_exit_points
from messnet.report.figures import (
    MAX_CUT_LABELS,
    PAGE,
    as_svg,
    confidence_colours,
    confidence_picture,
    data_uri,
    draw_cumulative_cost,
    draw_depth,
    draw_front,
    draw_heads,
    exit_colour,
    label_picture,
)

BLOCKS = ("attention", "layer_norm_2", "mlp")
BACKBONES = {
    # places, the cost of each step, exits
    "shallow": ([f"layer{i}.{j}" for i in range(4) for j in range(2)], [1, 1, 2, 2, 3, 3, 5, 5], 3),
    "mobilenet": ([f"backbone.{i}" for i in range(18)], [0.07, 0.04, *14 * [0.2], 1.4, 1.4], 6),
    "deep": ([f"encoder.block.{i}.{kind}" for i in range(20) for kind in BLOCKS], 60 * [1.5], 8),
    "cheap until its end": ([f"backbone.layer{i}.conv" for i in range(40)], [*37 * [0.1], 20, 20, 20], 6),
    "cheap after its start": ([f"backbone.layer{i}.conv" for i in range(60)], [*10 * [5], *50 * [0.2]], 12),
}


def pixels(uri: str) -> np.ndarray:
    """(H, W, 3) uint8 of a data: address."""
    kind, code = re.fullmatch(r"data:image/(\w+);base64,(.*)", uri).groups()
    picture = imread(io.BytesIO(base64.b64decode(code)), format=kind)[..., :3]
    return picture if picture.dtype == np.uint8 else (255 * picture).round().astype(np.uint8)


def points(figure: Figure, label: str) -> np.ndarray:
    """(n, 2) data of the line of that name."""
    (line,) = [line for line in figure.axes[0].lines if line.get_label() == label]
    return line.get_xydata()


def cumulative_cost(name: str) -> tuple[Figure, np.ndarray, list[int]]:
    places, steps, num_exits = BACKBONES[name]
    cumulative = np.cumsum(steps)
    chosen = choose_exit_points(cumulative.tolist(), num_exits)
    return draw_cumulative_cost(places, cumulative.tolist(), chosen, unit="GMACs"), cumulative, chosen


def test_exit_colours_differ_and_depend_on_the_place_alone() -> None:
    colours = [exit_colour(i, 6) for i in range(6)]
    assert len(set(colours)) == 6
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in colours)
    assert (exit_colour(0, 2), exit_colour(1, 2)) == (colours[0], colours[-1])
    assert exit_colour(0, 1) == colours[0]


def test_front_shows_the_numbers() -> None:
    figure = draw_front({"budgeted": [(3e9, 0.7), (1e9, 0.5)], "empty": []}, [(4e9, 0.75), (2e9, 0.6)])
    np.testing.assert_allclose(points(figure, "budgeted, selection half"), [[1, 50], [3, 70]])
    np.testing.assert_allclose(points(figure, "baseline, other half"), [[4, 75]])
    np.testing.assert_allclose(points(figure, "instances, other half"), [[2, 60]])
    assert [text.get_text() for text in figure.axes[0].texts] == ["", "1"]
    fronts, rows = {"budgeted": [(1e9, 0.5)]}, [(4e9, 0.75), (2e9, 0.6)]
    figure = draw_front(fronts, rows, images="all images", judged=[(3e9, 0.6, 0.02), (2e9, 0.55, 0.01)])
    np.testing.assert_allclose(points(figure, "expected on new images"), [[2, 55], [3, 60]])
    np.testing.assert_allclose(points(figure, "budgeted, all images"), [[1, 50]])
    (band,) = figure.axes[0].collections
    assert band.get_paths()[0].get_extents().get_points().round(9).tolist() == [[2, 54], [3, 62]]


def test_depth_has_a_point_per_image_and_a_bar_at_each_mean() -> None:
    difficulty, taken = np.array([0.1, 0.3, 0.9]), np.array([0, 0, 4])
    axes = draw_depth(difficulty, taken, {0: "exit 0", 2: "exit 2", 4: "final exit"}, 5, "difficulty").axes[0]
    dots, bars = axes.lines[::2], axes.lines[1::2]
    assert [line.get_xdata().tolist() for line in dots] == [[0.1, 0.3], [], [0.9]]
    for place, line in enumerate(dots):
        assert np.abs(line.get_ydata() - place).max(initial=0) < 0.5
        assert line.get_color() == exit_colour(2 * place, 5)
    np.testing.assert_allclose([line.get_xdata()[0] for line in bars], [0.2, np.nan, 0.9])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["exit 0", "exit 2", "final exit"]


def test_heads_are_drawn_by_exit() -> None:
    gmacs, miou = np.array([1.0, 2.0, 5.0]), np.array([0.3, 0.4, 0.6])
    figure = draw_heads(gmacs, miou, np.array([0, 0, 3]), {0: "exit 0", 3: "final exit"}, 4)
    np.testing.assert_allclose(points(figure, "exit 0"), [[1, 30], [2, 40]])
    np.testing.assert_allclose(points(figure, "final exit"), [[5, 60]])
    assert [line.get_marker() for line in figure.axes[0].lines] == ["o", "D"]


def test_svg_takes_the_colours_of_the_page() -> None:
    drawings = [
        str(as_svg(draw_heads(np.ones(1), np.ones(1), np.zeros(1), {0: "a$_$<"}, 1), name, 'an "odd" <name>'))
        for name in ("one", "two", "one")
    ]
    assert drawings[0] == drawings[2]
    assert drawings[0].startswith('<svg class="drawing" role="img" aria-label="an &#34;odd&#34; &lt;name&gt;"')
    assert not any(colour in drawings[0] for colour in PAGE)
    assert {name for name in PAGE._fields if f"var(--{name})" in drawings[0]} >= {"ink", "muted", "rule"}
    assert "a$_$&lt;" in drawings[0]
    ids = [set(re.findall(r' id="(\w+)"', drawing)) for drawing in drawings]
    assert ids[0]
    assert not ids[0] & ids[1]


def test_pictures_are_exact() -> None:
    labels, palette = (
        np.array([[0, 1], [2, 255]], np.uint8),
        np.array([[10, 20, 30], [40, 50, 60], [7, 8, 9]], np.uint8),
    )
    expected = np.array([[palette[0], palette[1]], [palette[2], [128, 128, 128]]])
    assert (pixels(label_picture(labels, palette)) == expected).all()
    photo = np.full((16, 24, 3), 90, np.uint8)
    assert np.abs(pixels(data_uri(photo, "jpeg")).astype(int) - 90).max() <= 2
    shown = pixels(confidence_picture(np.linspace(0, 1, 9, dtype=np.float16)[None]))[0]
    for colour, pixel in zip(confidence_colours(9), shown, strict=True):
        named = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert np.abs(np.array(named) - pixel).max() <= 1  # one is rounded, the other cut off


@pytest.mark.parametrize("name", BACKBONES)
def test_cumulative_cost_shows_cuts_targets_and_exits(name: str) -> None:
    figure, cumulative, chosen = cumulative_cost(name)
    axes, num_exits = figure.axes[0], len(chosen) + 1
    curves = [line.get_xydata() for line in axes.lines if line.get_linewidth() == 2 and len(line.get_xdata()) > 1]
    curve = np.concatenate([curves[0], *(part[1:] for part in curves[1:])])
    np.testing.assert_allclose(curve, np.stack([np.arange(len(cumulative) + 1), [0, *cumulative]], 1))
    ends = [*chosen, len(cumulative) - 1]
    assert [part[-1, 0] for part in curves] == [end + 1 for end in ends]
    dots = [line for line in axes.lines if line.get_markersize() > 10]
    np.testing.assert_allclose([dot.get_xydata()[0] for dot in dots], [(end + 1, cumulative[end]) for end in ends])
    assert [to_hex(dot.get_color()) for dot in dots] == [exit_colour(i, num_exits) for i in range(num_exits)]
    (dashed,) = [lines for lines in axes.collections if lines.get_linestyle()[0][1]]
    targets = [i * cumulative[-1] / num_exits for i in range(1, num_exits)]
    np.testing.assert_allclose([segment[0, 1] for segment in dashed.get_segments()], targets)
    assert axes.get_ylabel() == "cumulative cost, GMACs"


@pytest.mark.parametrize("name", BACKBONES)
def test_cumulative_cost_is_legible(name: str) -> None:
    figure, _, chosen = cumulative_cost(name)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    assert canvas.get_width_height() == (1200, 700)
    names = [text for text in figure.axes[0].texts if text.get_text()]
    assert [text.get_text() for text in names] == [*(f"exit {i}" for i in range(len(chosen))), "end of the backbone"]
    boxes = [text.get_window_extent() for text in names]
    assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    everything = figure.get_tightbbox()  # inches
    assert min(everything.x0, everything.y0, 12 - everything.x1, 7 - everything.y1) > 0


@pytest.mark.parametrize("name", BACKBONES)
def test_cumulative_cost_names_the_exits_places_and_as_many_cuts_as_there_is_room_for(name: str) -> None:
    figure, cumulative, chosen = cumulative_cost(name)
    axes, places = figure.axes[0], BACKBONES[name][0]
    labelled = {round(x): label.get_text() for x, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)}
    assert labelled.pop(0) == "input"
    assert {chosen_cut + 1 for chosen_cut in chosen} | {len(places)} <= labelled.keys()
    assert all(places[position - 1].endswith(text) for position, text in labelled.items())
    assert len(labelled) == len(places) if len(places) <= MAX_CUT_LABELS else len(labelled) <= 1.5 * MAX_CUT_LABELS
    bold = {
        round(x) for x, t in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True) if t.get_weight() == "bold"
    }
    assert bold == {end + 1 for end in (*chosen, len(cumulative) - 1)}


def test_what_all_cuts_share_is_named_once() -> None:
    labels = {
        ("a.b.x", "a.b.y.z"): (["x", "y.z"], "cut after module, inside a.b"),
        ("stem", "stem.conv"): (["stem", "stem.conv"], "cut after module"),
        ("conv1", "_" + 40 * "l"): (["conv1", "\u2026" + 27 * "l"], "cut after module"),
    }
    for places, expected in labels.items():
        axes = draw_cumulative_cost(places, [1.0, 3.0], [0], unit="ms").axes[0]
        assert ([label.get_text() for label in axes.get_xticklabels()[1:]], axes.get_xlabel()) == expected
