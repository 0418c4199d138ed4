"""IoU class by class, and which classes are taken for which: the part of a report that a mean hides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from rich.table import Table
from rich.text import Text

from messnet.records.arrays import IntArray
from messnet.records.iou import counts_of
from messnet.records.measurements import Measurements
from messnet.report.wording import markdown_table

MOST_CLASSES = 40
"""More are no picture on a page; measurements.json has them all."""
LOST_PP = 5.0
"""Percentage points of IoU from which on a class is said to suffer."""
MOST_NAMED = 12
"""Names in a sentence."""


class _Cell(NamedTuple):
    iou: str
    """In per cent; empty for a class that neither labels nor predictions have."""
    change: str
    """Against the first column, in percentage points; empty in that column."""
    suffers: bool


class ClassTable(NamedTuple):
    """IoU of every class: a column for the delivered model where there was one, the baseline and each instance."""

    columns: list[str]
    rows: list[tuple[str, list[_Cell]]]
    """Class names with a cell for each column; the classes that lose most anywhere first."""


class Confusion(NamedTuple):
    """What the pixels of each class were taken for, by one row of the end-to-end table."""

    name: str
    class_names: list[str]
    shares: list[list[float]]
    """By label and prediction, in [0, 1] of the label's pixels."""


def class_table(columns: dict[str, Sequence[float | None]], class_names: Sequence[str]) -> ClassTable | None:
    """From the IoU of each class, in [0, 1] or None, by column, the model to compare with first. None without
    any figure, as in files of before."""
    filled = {name: ious for name, ious in columns.items() if ious}
    if not filled or not class_names:
        return None
    values = np.array([[np.nan if iou is None else iou for iou in ious] for ious in filled.values()], np.float64)
    changes = 100 * (values - values[0])
    # A class that one column alone has not seen has no change there.
    order = np.argsort(np.nan_to_num(changes).min(0), kind="stable")
    rows = []
    for k in order.tolist():
        cells = [
            _Cell(
                iou="" if np.isnan(value) else f"{100 * value:.1f}",
                change="" if column == 0 or np.isnan(change) else f"{change:+.1f}",
                suffers=bool(change <= -LOST_PP),
            )
            for column, (value, change) in enumerate(zip(values[:, k], changes[:, k], strict=True))
        ]
        rows.append((class_names[k], cells))
    return ClassTable(list(filled), rows)


def class_terminal_table(table: ClassTable | None) -> Table | None:
    """``class_table`` for a terminal."""
    if table is None:
        return None
    change = ", and its change in pp" if len(table.columns) > 1 else ""
    shown = Table(title=f"IoU by class, %{change}", title_justify="left")
    shown.add_column("class", max_width=24, overflow="fold")
    for name in table.columns:
        shown.add_column(Text(name), justify="right")
    for class_name, cells in table.rows:
        texts = [Text(f"{cell.iou} {cell.change}".strip(), style="bold" if cell.suffers else "") for cell in cells]
        shown.add_row(Text(class_name), *texts)
    return shown


def class_markdown(table: ClassTable) -> str:
    """``class_table`` as Markdown."""
    rows = ([name, *(f"{cell.iou} {cell.change}".strip() for cell in cells)] for name, cells in table.rows)
    return markdown_table(["IoU by class, %", *table.columns], rows)


def missed_classes(counts: Mapping[str, tuple[IntArray, IntArray, IntArray]], class_names: Sequence[str]) -> list[str]:
    """Sentences about classes whose IoU is 0 or undefined, for each of the networks whose ``counts`` are given:
    (intersection, predicted, labelled) pixels by class, each (K,). Networks that miss the same share a sentence."""
    missing: dict[str, list[str]] = {}
    for name, (right, predicted, labelled) in counts.items():
        kinds = {
            "never predicted": (labelled > 0) & (predicted == 0),
            "predicted, but never where it is": (right == 0) & (labelled > 0) & (predicted > 0),
            "absent in these masks": (labelled == 0) & (predicted == 0),
            "absent in these masks, yet predicted, which counts as 0 %": (labelled == 0) & (predicted > 0),
        }
        told = [
            f"{kind}: {_first_of([class_names[k] for k in np.flatnonzero(which).tolist()])}"
            for kind, which in kinds.items()
            if which.any()
        ]
        if told:
            missing.setdefault("; ".join(told), []).append(name)
    return [f"{_first_of(names)}: {text}" for text, names in missing.items()]


def missed_by_rows(measurements: Measurements) -> list[str]:
    """``missed_classes`` of the baseline and each instance; none in files of before."""
    counts: dict[str, tuple[IntArray, IntArray, IntArray]] = {}
    for row in measurements.rows:
        if row.confusion and measurements.class_names:
            confusion = np.array(row.confusion, np.int64)
            # The confusion is of what ships, the table of IoU of instances that were chosen without the image: a class
            # that has an IoU there is not called missed below it.
            found = [k for k, iou in enumerate(row.class_iou()) if iou]
            confusion[found, found] += 1
            counts[row.instance.name] = counts_of(confusion)
    return missed_classes(counts, measurements.class_names)


def _first_of(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def confusions(measurements: Measurements) -> list[Confusion]:
    """Of the baseline and each instance; none for so many classes that nobody could read it."""
    if not 0 < len(measurements.class_names) <= MOST_CLASSES:
        return []
    pixels = {row.instance.name: np.array(row.confusion, np.float64) for row in measurements.rows if row.confusion}
    return [
        Confusion(name, measurements.class_names, (one / np.maximum(one.sum(1, keepdims=True), 1)).tolist())
        for name, one in pixels.items()
    ]
