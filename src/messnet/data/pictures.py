"""A data set at a glance: what its classes make up, and a few images with their labels laid over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from messnet.data import SegmentationDataset, SegmentationSample
from messnet.data.checks import DatasetReport
from messnet.errors import DataError
from messnet.images.axes import LIGHT, style
from messnet.images.drawing import overlay

MAX_CLASSES = 40
"""The most frequent ones are drawn."""
MAX_NAME = 28
"""Letters of a name, its last."""


def typical_samples(dataset: SegmentationDataset, count: int) -> list[SegmentationSample]:
    """``count`` readable samples, evenly spread over the data set."""
    # Three times as many are tried, as some may be damaged.
    samples = []
    for index in np.linspace(0, len(dataset) - 1, min(3 * count, len(dataset))).round().astype(int).tolist():
        try:
            samples.append(dataset[index])
        except DataError:
            continue
    step = max(1, len(samples) // count)
    return samples[::step][:count]


def draw_dataset(
    reports: Mapping[str, DatasetReport], samples: Sequence[tuple[str, SegmentationSample]], palette: NDArray[np.uint8]
) -> Figure:
    """Left the share of pixels of each class by split, right the samples (split, sample) with their labels."""
    names = _drawn_classes(reports)
    splits = list(dict.fromkeys(split for split, _ in samples))
    columns = max([1, *(sum(split == one for one, _ in samples) for split in splits)])
    height = max(2.3 * max(1, len(splits)), 1 + 0.26 * len(names))
    figure = Figure(figsize=(5 + 2.7 * columns, height), layout=ConstrainedLayoutEngine(wspace=0.01, hspace=0.01))
    halves = figure.add_gridspec(1, 2, width_ratios=(5, 2.7 * columns))
    _draw_shares(figure.add_subplot(halves[0, 0]), reports, names, palette)
    grid = halves[0, 1].subgridspec(max(1, len(splits)), columns)
    for row, split in enumerate(splits):
        for column, sample in enumerate(one for name, one in samples if name == split):
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(overlay(sample.image, sample.mask, palette))
            axes.set_title(f"{split}: {sample.name[-MAX_NAME:]}", fontsize=8, color=LIGHT.muted)
            axes.axis("off")
    return figure


def _drawn_classes(reports: Mapping[str, DatasetReport]) -> list[tuple[int, str]]:
    """(class index, name), at most MAX_CLASSES, in the order of the classes."""
    whole = [report for report in reports.values() if report.class_share]
    names = list(whole[0].class_share) if whole else []
    share = np.sum([list(report.class_share.values()) for report in whole], axis=0)
    kept = sorted(np.argsort(-share, kind="stable")[:MAX_CLASSES].tolist()) if names else []
    return [(k, names[k]) for k in kept if share[k] or len(names) <= MAX_CLASSES]


def _draw_shares(
    axes: Axes, reports: Mapping[str, DatasetReport], names: list[tuple[int, str]], palette: NDArray[np.uint8]
) -> None:
    splits = [(split, report) for split, report in reports.items() if report.class_share]
    bar = 0.8 / max(1, len(splits))
    places = np.arange(len(names))
    for i, (split, report) in enumerate(splits):
        shares = [100 * report.class_share[name] for _, name in names]
        colours = [tuple(palette[k] / 255) for k, _ in names]
        axes.barh(
            places + (i - (len(splits) - 1) / 2) * bar,
            shares,
            0.9 * bar,
            color=colours,
            edgecolor=LIGHT.ink,
            linewidth=0.4,
            alpha=1 if i == 0 else 0.55,
            label=f"{split}: {report.num_images} images, void {report.void_share:.1%}",
        )
    axes.set_yticks(places, [name for _, name in names], fontsize=9)
    axes.invert_yaxis()
    # Logarithmic, as shares differ by factors of a thousand; linear below 0.1 %, for a class may have no pixel at all.
    axes.set_xscale("symlog", linthresh=0.1)
    axes.set_xlim(0, 100)
    axes.set_xticks([0, 0.1, 1, 10, 100], ["0", "0.1", "1", "10", "100"])
    axes.set_xlabel("share of the labelled pixels, %")
    style(axes, LIGHT)
    axes.grid(visible=False, axis="y")
    if splits:
        axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), handlelength=1)
