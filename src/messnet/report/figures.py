"""The report's drawings and pictures: numbers in, figures out."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imsave
from numpy.typing import NDArray

from messnet.images import colours
from messnet.images.axes import LIGHT, Inks, style
from messnet.images.drawing import coloured

FRONT_COLOURS = ("#8b6cd0", "#2fa08e", "#d08a3c", "#4b86d3")
MAX_CUT_LABELS = 30


# Stand-ins, exchanged for the page's own colours so that one drawing serves light and dark.
PAGE = Inks("#010101", "#020202", "#030303", "#040404")


def exit_colour(exit_index: int, num_exits: int) -> str:
    """The exit's colour, shallow to deep, as "#rrggbb"."""
    return "#{:02x}{:02x}{:02x}".format(*colours.exit_colour(exit_index, num_exits))


def draw_front(
    fronts: Mapping[str, Sequence[tuple[float, float]]],
    rows: Sequence[tuple[float, float]],
    *,
    images: str = "selection half",
    judged: Sequence[tuple[float, float, float]] = (),
) -> Figure:
    """mIoU against GMACs: ``fronts`` by setting on the ``images`` that they were found on, what to expect of them on
    others (``judged``, with a margin of mIoU on either side), and the table's ``rows``, the baseline first, the others
    numbered.

    All hold (MACs per image, mIoU in [0, 1]).
    """
    figure, axes = _axes("GMACs per image", "mIoU, %")
    for number, (setting, front) in enumerate(fronts.items()):
        if front:
            # where="post": between two points of a front the cheaper one is the best that can be had.
            macs, miou = np.array(sorted(front)).T
            colour = FRONT_COLOURS[number % len(FRONT_COLOURS)]
            label = f"{setting}, {images}"
            axes.step(macs / 1e9, 100 * miou, where="post", color=colour, lw=1.4, label=label, zorder=2)
            axes.plot(macs / 1e9, 100 * miou, ".", color=colour, ms=3.5, zorder=2)
    if judged:
        macs, miou, margin = np.array(sorted(judged)).T
        axes.fill_between(macs / 1e9, 100 * (miou - margin), 100 * (miou + margin), color=PAGE.muted, alpha=0.15, lw=0)
        axes.plot(macs / 1e9, 100 * miou, "-", color=PAGE.muted, lw=1.6, label="expected on new images", zorder=3)
    named = ("baseline", "instances, expected") if judged else ("baseline, other half", "instances, other half")
    for number, row in enumerate(rows):
        marker = "o" if number else "D"
        name = named[number] if number < 2 else None
        at, fill = (row[0] / 1e9, 100 * row[1]), PAGE.ink if number else PAGE.paper
        axes.plot(*at, marker, ms=7, color=fill, mec=PAGE.ink, mew=1.2, label=name, ls="", zorder=4)
        axes.annotate(str(number or ""), at, (6, -11), textcoords="offset points", color=PAGE.ink, fontweight="bold")
    # Above the axes: points of other images may lie anywhere within.
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=8)
    return figure


def draw_depth(
    difficulty: NDArray[np.float64], taken: NDArray[np.int64], names: Mapping[int, str], num_exits: int, measure: str
) -> Figure:
    """Exit taken against difficulty: a point for each of V images, a bar at each exit's mean.

    ``difficulty`` (V,) and ``taken`` (V,), an exit_index; ``names`` by exit_index, shallow to deep; ``measure`` says
    what the difficulty is.
    """
    figure, axes = _axes(measure, "")
    jitter = np.random.default_rng(0).uniform(-0.26, 0.26, len(taken))  # spreads the points, means nothing
    for place, exit_index in enumerate(names):
        here = taken == exit_index
        colour = exit_colour(exit_index, num_exits)
        axes.plot(difficulty[here], place + jitter[here], "o", ms=4.5, color=colour, alpha=0.6, mec="none")
        mean = float(difficulty[here].mean()) if here.any() else float("nan")
        axes.plot([mean, mean], [place - 0.36, place + 0.36], color=PAGE.ink, lw=1.8)
    axes.set_yticks(range(len(names)), list(names.values()))
    axes.set_ylim(len(names) - 0.5, -0.5)
    return figure


def draw_heads(
    gmacs: NDArray[np.float64],
    miou: NDArray[np.float64],
    exit_indices: NDArray[np.int64],
    names: Mapping[int, str],
    num_exits: int,
) -> Figure:
    """mIoU of H heads against what reaching and running them costs, a colour per exit.

    ``gmacs``, ``miou`` in [0, 1] and ``exit_indices`` are (H,), the final head last; ``names`` by exit_index.
    """
    figure, axes = _axes("GMACs per image, backbone and head", "mIoU, %")
    for exit_index, name in names.items():
        here = exit_indices == exit_index
        marker, size = ("D", 7.0) if here[-1] else ("o", 5.5)
        colour = exit_colour(exit_index, num_exits)
        axes.plot(
            gmacs[here], 100 * miou[here], marker, ms=size, label=name, color=colour, alpha=0.75, mec="none", ls=""
        )
    axes.legend(frameon=False, loc="lower right")
    return figure


def draw_cumulative_cost(
    places: Sequence[str], cumulative: Sequence[float], chosen: Sequence[int], *, unit: str
) -> Figure:
    """Cumulative cost of a backbone over its C legal cuts and the exit points among them; 1200 x 700 pixels as PNG.

    ``places`` (C,) are module paths, ``cumulative`` (C,) costs in ``unit``, positive and ascending; the last is the
    whole backbone. ``chosen`` are the early exits' positions, shallow to deep. A dashed line is a target: i/N of the
    cost, for exit i - 1 of N.
    """
    num_exits, total = len(chosen) + 1, cumulative[-1]
    figure, axes = _axes("", f"cumulative cost, {unit}", LIGHT, size=(12, 7))
    figure.set_layout_engine("constrained", w_pad=0.15, h_pad=0.15)
    figure.set_facecolor(LIGHT.paper)
    axes.set_facecolor(LIGHT.paper)
    axes.grid(visible=False)
    title = f"Cost of the backbone over its {len(places)} legal cuts, {num_exits} exits; dashed: targets of equal cost"
    axes.set_title(title, loc="left", color=LIGHT.ink, fontsize=13, pad=14)
    targets = [i * total / num_exits for i in range(num_exits + 1)]
    axes.hlines(targets[1:-1], 0, len(places), color=LIGHT.muted, lw=0.7, ls=(0, (5, 5)))
    shares = axes.secondary_yaxis("right")
    shares.set_yticks(targets, [f"{100 * cost / total:.0f} %" for cost in targets])
    shares.set_ylabel("share of the backbone", color=LIGHT.muted)
    shares.tick_params(color=LIGHT.rule, labelcolor=LIGHT.muted)
    shares.spines["right"].set_color(LIGHT.rule)
    cost = np.array([0.0, *cumulative])  # from the input on
    _draw_segments(axes, cost, [0, *(cut + 1 for cut in chosen), len(places)])
    _label_cuts(axes, places, chosen)
    axes.set_xlim(-0.075 * len(places), 1.01 * len(places))
    axes.set_ylim(0, 1.1 * total)
    return figure


def _draw_segments(axes: Axes, cost: NDArray[np.float64], ends: Sequence[int]) -> None:
    """The curve ``cost`` over positions, coloured by segment; a named dot where a segment ends in an exit."""
    height = 0.0
    for exit_index, (start, end) in enumerate(pairwise(ends)):
        colour, x = exit_colour(exit_index, len(ends) - 1), np.arange(start, end + 1)
        axes.fill_between(x, cost[x], color=colour, alpha=0.13, lw=0)
        axes.plot(x, cost[x], color=colour, lw=2, marker="o", ms=min(4.5, 150 / len(cost)), mec="none")
        axes.plot(end, cost[end], "o", ms=11, color=colour, mec=LIGHT.paper, mew=2, zorder=4)
        name, width = ("end of the backbone", 0.2) if end == len(cost) - 1 else (f"exit {exit_index}", 0.065)
        # Up and to the left of a rising curve is room; names that would overlap are stacked there.
        near = end - start < width * len(cost)
        height = max(cost[end] + 0.035 * cost[-1], height + 0.045 * cost[-1] if near else 0.0)
        at = end - 0.012 * len(cost)
        if height > cost[end] + 0.04 * cost[-1]:
            axes.plot([at, end], [height, cost[end]], color=LIGHT.muted, lw=0.8)
        backing = {"facecolor": LIGHT.paper, "edgecolor": "none", "pad": 2}
        # A backing in the colour of the paper keeps the letters legible where they cross a curve.
        text = axes.text(at, height, name, ha="right", va="center", zorder=3, color=LIGHT.ink, bbox=backing)
        text.set(fontsize=11, fontweight="bold")


def _label_cuts(axes: Axes, places: Sequence[str], chosen: Sequence[int]) -> None:
    """Module paths below the axis: of the exits and, as far as there is room, of the other cuts."""
    paths = [place.split(".") for place in places]
    shared = next((i for i, parts in enumerate(zip(*paths, strict=False)) if len({*parts}) > 1), 0)
    names = [".".join(path[shared:]) for path in paths]
    names = [name if len(name) <= 28 else f"\N{HORIZONTAL ELLIPSIS}{name[-27:]}" for name in names]
    # So far apart that slanted labels do not touch; a cut too near to an exit's gives way to it.
    step = math.ceil(len(places) / MAX_CUT_LABELS)
    kept = {*chosen, len(places) - 1}
    others = {j for j in range(step - 1, len(places), step) if all(abs(j - k) >= step for k in kept)}
    labelled = sorted(kept | others)
    axes.set_xticks([0, *(j + 1 for j in labelled)], ["input", *(names[j] for j in labelled)], parse_math=False)
    for j, label in zip([-1, *labelled], axes.get_xticklabels(), strict=True):
        label.set(rotation=48, rotation_mode="anchor", ha="right", va="center", fontsize=9)
        if j in kept:
            label.set(color=LIGHT.ink, fontweight="bold")
    within = f", inside {'.'.join(paths[0][:shared])}" if shared else ""
    axes.set_xlabel(f"cut after module{within}", color=LIGHT.muted)


def _axes(x_label: str, y_label: str, inks: Inks = PAGE, size: tuple[float, float] = (5.1, 3.7)) -> tuple[Figure, Axes]:
    """Quiet axes; by default sized so that letters stay legible when a phone shrinks the drawing."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    style(axes, inks)
    return figure, axes


def as_svg(figure: Figure, name: str, alt: str) -> Markup:
    """A drawing as an <svg> element of the page: its colours follow the page, its letters are the page's."""
    legend = figure.axes[0].get_legend()
    for text in legend.get_texts() if legend else []:
        text.set_color(PAGE.ink)
        text.set_parse_math(False)
    buffer = io.StringIO()
    # The salt keeps the identifiers of two drawings apart and a drawing the same from run to run.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawing = buffer.getvalue()
    # The page frames the drawing itself: from matplotlib's file only the view box and what is inside are taken. Groups
    # lose their identifiers, for another drawing of the page has the same; those that are referred to keep theirs.
    box, body = re.search(r'viewBox="([^"]*)".*?>(.*)', drawing, re.DOTALL).groups()  # type: ignore[union-attr]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace("'DejaVu Sans'", "var(--sans)")
    for variable, stand_in in PAGE._asdict().items():
        body = body.replace(stand_in, f"var(--{variable})")
    return Markup(f'<svg class="drawing" role="img" aria-label="{escape(alt)}" viewBox="{box}">{body}')


def label_picture(labels: NDArray[np.uint8], palette: NDArray[np.uint8]) -> str:
    """Labels (H, W) in the colours of ``palette`` (K, 3), grey where ignored, as a data: address."""
    return data_uri(coloured(labels, palette))


def confidence_picture(confidence: NDArray[np.float16]) -> str:
    """A confidence map (H, W) in [0, 1] as a data: address."""
    shown = matplotlib.colormaps["viridis"](confidence.astype(np.float32))[..., :3]
    return data_uri((255 * shown).astype(np.uint8))


def confidence_colours(num_colours: int = 9) -> list[str]:
    """The colours of ``confidence_picture`` from 0 to 1, evenly spaced."""
    return [to_hex(matplotlib.colormaps["viridis"](step)) for step in np.linspace(0, 1, num_colours)]


def data_uri(picture: NDArray[np.uint8], kind: str = "png") -> str:
    """A picture (H, W, 3) as a data: address."""
    buffer = io.BytesIO()
    imsave(buffer, picture, format=kind, pil_kwargs={"quality": 88} if kind == "jpeg" else None)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
