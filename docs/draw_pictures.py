"""The pictures of these pages, from a finished run: ``python docs/draw_pictures.py runs/demo``."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from messnet.images.axes import LIGHT, style
from messnet.images.drawing import coloured
from messnet.records.instance import FINAL_HEAD
from messnet.records.measurements import Gallery, Measurements
from messnet.report.figures import draw_depth
from messnet.report.page import front_figure
from messnet.searching.findings import Findings

PICTURES = Path(__file__).parent / "pictures"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run whose images may be shown")
    run = parser.parse_args().run
    PICTURES.mkdir(exist_ok=True)
    gallery = Gallery.from_bytes((run / "gallery.npz").read_bytes())
    measurements = Measurements.from_json((run / "measurements.json").read_text())
    save(draw_exits(gallery), "exits.png")
    save(draw_confidence(gallery), "confidence.png")
    save_drawing(front_figure(measurements, Findings.from_json((run / "front.json").read_text())), "front.png")
    row = max(measurements.rows[1:], key=lambda row: row.spread())
    choices = row.instance.exits
    names = {c.exit_index: "final exit" if c.head == FINAL_HEAD else f"exit {c.exit_index}" for c in choices}
    difficulty, taken = np.array(measurements.difficulty), np.array(row.exit_taken)
    save_drawing(
        draw_depth(difficulty, taken, names, choices[-1].exit_index + 1, "difficulty of the generated scene"),
        "depth.png",
    )


def draw_exits(gallery: Gallery) -> Figure:
    """A row for each exit taken, by the first image that left there: photograph, what each exit says, labels; the exit
    taken is framed."""
    num_exits = gallery.predictions.shape[1]
    shown = np.unique(gallery.exit_taken, return_index=True)[1]
    figure = Figure(figsize=(1.9 * (num_exits + 2), 1.75 * len(shown)))
    for g, axes in zip(shown, figure.subplots(len(shown), num_exits + 2, squeeze=False), strict=True):
        show(axes[0], gallery.images[g], "image")
        for e, (index, head) in enumerate(gallery.exits):
            name = "final exit" if head == FINAL_HEAD else f"exit {index}"
            decides = f", {gallery.image_confidence[g, e]:.0%} sure" if head != FINAL_HEAD else ""
            show(axes[e + 1], coloured(gallery.predictions[g, e], gallery.palette), name + decides)
            if index == gallery.exit_taken[g]:
                axes[e + 1].spines[:].set(visible=True, linewidth=3, color="#d1495b")
        show(axes[-1], coloured(gallery.masks[g], gallery.palette), "labels")
    figure.tight_layout(pad=0.4)
    return figure


def draw_confidence(gallery: Gallery) -> Figure:
    """The first early exit on the first image: prediction, confidence before and after edge refinement."""
    figure = Figure(figsize=(9.6, 2.1), layout="constrained")
    axes = figure.subplots(1, 4)
    show(axes[0], gallery.images[0], "image")
    show(
        axes[1],
        coloured(gallery.predictions[0, 0], gallery.palette),
        f"prediction at exit {gallery.exits[0].exit_index}",
    )
    for axis, values, title in (
        (axes[2], gallery.confidence, "confidence"),
        (axes[3], gallery.refined, "edges refined"),
    ):
        picture = axis.imshow(values[0, 0].astype(float), vmin=0.3, vmax=1, cmap="viridis")
        axis.set_title(title, fontsize=9)
        axis.set_axis_off()
    figure.colorbar(picture, ax=axes, fraction=0.012, pad=0.01)
    return figure


def show(axis: Axes, picture: np.ndarray, title: str) -> None:
    axis.imshow(picture)
    axis.set_title(title, fontsize=9)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def save_drawing(figure: Figure, name: str) -> None:
    """A drawing of the report, whose colours stand in for the page's own until there is a page."""
    for axis in figure.axes:
        style(axis, LIGHT)
    save(figure, name)


def save(figure: Figure, name: str) -> None:
    figure.savefig(PICTURES / name, dpi=110, bbox_inches="tight")
    print(PICTURES / name)


if __name__ == "__main__":
    main()
