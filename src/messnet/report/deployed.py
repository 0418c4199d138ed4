"""Runtimes and precisions side by side, and the one sentence to remember of a run that was deployed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from rich.table import Table
from rich.text import Text

from messnet.records.deployed import WORTH_PERCENT, Deployed, DeployedRow
from messnet.report.wording import accuracy, change, fold, markdown_table, significant
from messnet.searching.words import CONFIDENT

RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "torch": "PyTorch"}
COLUMNS = ("network", "runtime", "mIoU, %", "ms an image [p95]", "MB")


class SideRow(NamedTuple):
    """A row of the table, in words."""

    network: str
    runtime: str
    miou: str
    change: str
    """Of mIoU, against the first row."""
    ms: str
    speed: str
    megabytes: str
    is_best: bool


def deployed_headline(deployed: Deployed) -> str:
    """What the fastest network gains over the model, in the runtime of both, and what it costs."""
    model, best = deployed.model, deployed.best
    where = f"{RUNTIMES[model.runtime]}, {deployed.threads} thread{'s' * (deployed.threads > 1)}"
    gained = (
        f"{fold(model.mean_ms / best.mean_ms, 'faster', 'slower', digits=1)}, "
        f"at {accuracy(_change_pp(best, model), _margin_pp(best))}"
    )
    opening = f"Your model needs {_ms(model)} ms an image"
    if best.is_model:
        if any(not row.is_model for row in deployed.rows):
            without = f"Early exits would make that less than {WORTH_PERCENT} % faster, so it ships without them"
        else:
            without = f"No early exits lose at most {deployed.max_drop_pp:g} pp"
        if best is not model:
            opening += f", in {best.precision} {_ms(best)} ms, {gained}"
        return f"{opening}. {without}; {where}"
    means = "early exits and int8" if best.precision == "int8" != model.precision else "early exits"
    return f"{opening}. With {means} it needs {_ms(best)} ms, {gained}; {where}"


def side_by_side(deployed: Deployed) -> list[SideRow]:
    return [
        SideRow(
            network="your model" if one.is_model else f"early exits, at most {deployed.max_drop_pp:g} pp less mIoU",
            runtime=f"{RUNTIMES[one.runtime]} {one.precision}",
            miou=f"{100 * one.row.judged_miou:.2f}",
            # A margin of 0 is of a row that changed no image at all: nothing to tell.
            change="" if one is deployed.model else change(_change_pp(one, deployed.model), _margin_pp(one) or None),
            ms=f"{_ms(one)} [{significant(float(np.percentile(one.row.latency_ms, 95)))}]",
            speed="" if one is deployed.model else fold(deployed.model.mean_ms / one.mean_ms, "faster", "slower"),
            megabytes=f"{one.megabytes:.1f}",
            is_best=one is deployed.best is not deployed.model,
        )
        for one in deployed.rows
    ]


def deployed_notes(deployed: Deployed) -> Iterator[str]:
    """What the table's figures are of."""
    expected = next((one.row.instance.expected for one in deployed.rows if one.row.instance.expected), None)
    images = len(deployed.rows[0].row.exit_taken)
    yield f"Measured on {deployed.device}: {images} validation images, one at a time, the rows in turns"
    if expected is not None:
        yield (
            "mIoU of instances is cross-fitted, each image judged by instances that were chosen without it; "
            "± is 1.96 standard errors of the change"
        )
    yield from deployed.missing


def deployed_terminal_table(deployed: Deployed) -> Table:
    """``side_by_side`` for a terminal of 100 columns."""
    table = Table(title="runtimes and precisions", title_justify="left", caption_justify="left")
    table.caption = Text("\n".join(deployed_notes(deployed)))
    for name in COLUMNS:
        table.add_column(Text(name), justify="left" if name in COLUMNS[:2] else "right", max_width=30, overflow="fold")
    for row in side_by_side(deployed):
        table.add_row(*(Text(cell, style="bold" if row.is_best else "") for cell in _cells(row, "\n")))
    return table


def deployed_markdown(deployed: Deployed) -> str:
    """``side_by_side`` as Markdown."""
    table = markdown_table(COLUMNS, (_cells(row, ", ") for row in side_by_side(deployed)))
    return f"{table}\n\n" + "\n".join(f"- {note}" for note in deployed_notes(deployed))


def _cells(row: SideRow, between: str) -> list[str]:
    """A figure and its change are one cell."""
    miou, ms = (between.join(filter(None, pair)) for pair in ((row.miou, row.change), (row.ms, row.speed)))
    return [row.network, row.runtime, miou, ms, row.megabytes]


def _ms(row: DeployedRow) -> str:
    return significant(row.mean_ms)


def _change_pp(row: DeployedRow, model: DeployedRow) -> float:
    return 100 * (row.row.judged_miou - model.row.judged_miou)


def _margin_pp(row: DeployedRow) -> float | None:
    return None if row.row.judged_error is None else 100 * CONFIDENT * row.row.judged_error
