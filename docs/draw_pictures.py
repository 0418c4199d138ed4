"""The pictures of these pages, from a finished run: ``python docs/draw_pictures.py runs/demo``."""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import json

import matplotlib.pyplot as plt
import numpy as np

from messnet.images.drawing import coloured
from messnet.records.instance import FINAL_HEAD
from messnet.records.measurements import Gallery, Measurements
from messnet.report.figures import draw_depth, draw_front

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
    fronts = json.loads((run / "front.json").read_text())["fronts"]
    save(draw_front(fronts, [(row.macs, row.miou) for row in measurements.rows]), "front.png")
    row = max(measurements.rows[1:], key=lambda row: row.spread())
    choices = row.instance.exits
    names = {c.exit_index: "final exit" if c.head == FINAL_HEAD else f"exit {c.exit_index}" for c in choices}
    difficulty, taken = np.array(measurements.difficulty), np.array(row.exit_taken)
    save(
        draw_depth(difficulty, taken, names, choices[-1].exit_index + 1, "difficulty of the generated scene"),
        "depth.png",
    )


def draw_exits(gallery: Gallery) -> plt.Figure:
    """An image per row: photograph, what each exit says, labels; the exit taken is framed."""
    num_images, num_exits = gallery.predictions.shape[:2]
    figure, rows = plt.subplots(
        num_images, num_exits + 2, figsize=(1.9 * (num_exits + 2), 1.75 * num_images), squeeze=False
    )
    for g, axes in enumerate(rows):
        show(axes[0], gallery.images[g], "image")
        for e, (index, head) in enumerate(gallery.exits):
            name = "final exit" if head == FINAL_HEAD else f"exit {index}"
            decides = f", {gallery.image_confidence[g, e]:.0%} sure" if head != FINAL_HEAD else ""
            show(axes[e + 1], coloured(gallery.predictions[g, e], gallery.palette), name + decides)
            if index == gallery.exit_taken[g]:
                for spine in axes[e + 1].spines.values():
                    spine.set(visible=True, linewidth=3, color="#d1495b")
        show(axes[-1], coloured(gallery.masks[g], gallery.palette), "labels")
    figure.tight_layout(pad=0.4)
    return figure


def draw_confidence(gallery: Gallery) -> plt.Figure:
    """The first early exit on the first image: prediction, confidence before and after edge refinement."""
    figure, axes = plt.subplots(1, 4, figsize=(9.6, 2.1), layout="constrained")
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


def show(axis: plt.Axes, picture: np.ndarray, title: str) -> None:
    axis.imshow(picture)
    axis.set_title(title, fontsize=9)
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set_visible(False)


def save(figure: plt.Figure, name: str) -> None:
    for axis in figure.axes:
        for line in (*axis.get_xgridlines(), *axis.get_ygridlines()):  # the page sets their colour by its style
            line.set_color("0.9")
    figure.savefig(PICTURES / name, dpi=110, bbox_inches="tight")
    plt.close(figure)
    print(PICTURES / name)


if __name__ == "__main__":
    main()
