"""Several runs side by side: one table, one page, from what their reports have left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, TypedDict

from rich.table import Table
from rich.text import Text

from messnet.errors import RunError
from messnet.records.deployed import Deployed
from messnet.records.measurements import Measurement, Measurements
from messnet.records.run_directory import RunDirectory
from messnet.report.classes import ClassTable, class_table
from messnet.report.deployed import RUNTIMES
from messnet.report.figures import as_svg, draw_front
from messnet.report.page import headline_row, margin_pp, median_ms, opening, page_of
from messnet.report.wording import change, fold, significant

COLUMNS = ("run", "your model", "the instance", "work", "ms in PyTorch", "deployed")


class Compared(NamedTuple):
    """A run, by what its report measured."""

    name: str
    measurements: Measurements
    deployed: Deployed | None


class Figures(TypedDict):
    """The figures of a run, as JSON. mIoU in [0, 1], milliseconds: the median in PyTorch, the mean where deployed."""

    run: str
    sentence: str
    model_miou: float
    model_macs: float
    model_ms: float
    instance: str
    miou: float
    miou_change: float
    miou_margin: float | None
    macs: float
    ms: float
    deployed: str | None
    deployed_model_ms: float | None
    deployed_ms: float | None
    deployed_miou: float | None


def read_compared(paths: Sequence[Path]) -> list[Compared]:
    """The runs at ``paths``, called by what tells their paths apart. Raises RunError for one without a report."""
    named = [path.resolve() for path in paths]
    if len({*named}) < len(named):
        raise RunError(f"a run is compared with others: {', '.join(map(str, paths))} names one twice")
    names = [path.name for path in named] if len({path.name for path in named}) == len(named) else [*map(str, paths)]
    found = []
    for name, path in zip(names, paths, strict=True):
        directory = RunDirectory(path)
        found.append(Compared(name, directory.measurements.read(), directory.read_deployed()))
    return found


def figures(run: Compared) -> Figures:
    model, row = run.measurements.rows[0], headline_row(run.measurements)
    best, margin = run.deployed and run.deployed.best, margin_pp(row, run.measurements)
    return {
        "run": run.name,
        "sentence": opening(run.measurements, run.deployed),
        "model_miou": model.judged_miou,
        "model_macs": model.judged_macs,
        "model_ms": median_ms(model),
        "instance": row.instance.name,
        "miou": row.judged_miou,
        "miou_change": row.judged_miou - run.measurements.miou_to_keep,
        "miou_margin": margin / 100 if margin is not None and row.judged_error is not None else None,
        "macs": row.judged_macs,
        "ms": median_ms(row),
        "deployed": f"{best.runtime} {best.precision}" if best else None,
        "deployed_model_ms": run.deployed.model.mean_ms if run.deployed else None,
        "deployed_ms": best.mean_ms if best else None,
        "deployed_miou": best.row.judged_miou if best else None,
    }


def comparison_rows(runs: Sequence[Compared]) -> list[list[str]]:
    """``COLUMNS`` of each run, in words."""
    rows = []
    for run in runs:
        one, row = figures(run), headline_row(run.measurements)
        changed = ""
        if row is not run.measurements.rows[0]:
            changed = change(100 * one["miou_change"], 100 * one["miou_margin"] if one["miou_margin"] else None)
        deployed = ""
        if run.deployed and one["deployed_ms"] and one["deployed_model_ms"] and one["deployed_miou"] is not None:
            best = run.deployed.best
            deployed = (
                f"{significant(one['deployed_model_ms'])} -> {significant(one['deployed_ms'])} ms, "
                f"{fold(one['deployed_model_ms'] / one['deployed_ms'], 'faster', 'slower')}, "
                f"{100 * one['deployed_miou']:.2f} % ({RUNTIMES[best.runtime]} {best.precision})"
            )
        rows.append(
            [
                run.name,
                f"{100 * one['model_miou']:.2f} %, {significant(one['model_macs'] / 1e9, 4)} GMACs",
                f"{one['instance']}: {100 * one['miou']:.2f} %{f', {changed}' if changed else ''}",
                fold(one["model_macs"] / one["macs"], "less", "more") if changed else "",
                f"{significant(one['model_ms'])} -> {significant(one['ms'])}",
                deployed,
            ]
        )
    return rows


def comparison_notes(runs: Sequence[Compared]) -> Iterator[str]:
    """Why figures of different runs may not be comparable, and what the instance of each row is."""
    yield (
        "The instance: of those that lose at most 1 pp on new images the one of least work, else the most accurate; "
        "changes are against the run's own model"
    )
    if any(a.measurements.image_names != b.measurements.image_names for a, b in pairwise(runs)):
        yield "The runs were measured on different images: mIoU of one says nothing of the other"
    if len({(run.measurements.device, tuple(run.measurements.input_size)) for run in runs}) > 1:
        yield "The devices, threads or sizes of images are different: compare ratios, not milliseconds"
    else:
        yield "Milliseconds were measured at different times, each run beside its own model: compare ratios first"


def comparison_classes(runs: Sequence[Compared]) -> ClassTable | None:
    """IoU by class of each run's model and instance, against the first run's model; None for unlike classes."""
    if len({tuple(run.measurements.class_names) for run in runs}) > 1:
        return None
    columns: dict[str, Sequence[float | None]] = {}
    for run in runs:
        row = headline_row(run.measurements)
        columns[f"{run.name}: model"] = run.measurements.rows[0].class_iou()
        if row is not run.measurements.rows[0]:
            columns[f"{run.name}: {row.instance.name}"] = row.class_iou()
    return class_table(columns, runs[0].measurements.class_names)


def comparison_table(runs: Sequence[Compared]) -> Table:
    """``comparison_rows`` for a terminal."""
    table = Table(title=f"{len(runs)} runs", title_justify="left", caption_justify="left")
    table.caption = Text("\n".join(comparison_notes(runs)))
    for name in COLUMNS:
        table.add_column(Text(name), overflow="fold")
    for row in comparison_rows(runs):
        table.add_row(*map(Text, row))
    return table


def render_comparison(runs: Sequence[Compared]) -> str:
    """One HTML page without outside assets."""

    def points(rows: Sequence[Measurement]) -> list[tuple[float, float]]:
        return [(row.judged_macs, row.judged_miou) for row in rows]

    drawn = draw_front({run.name: points(run.measurements.rows) for run in runs}, [], images="model and instances")
    return page_of(
        "comparison.html.jinja",
        title=" and ".join(run.name for run in runs),
        columns=COLUMNS,
        rows=comparison_rows(runs),
        sentences=[(run.name, opening(run.measurements, run.deployed)) for run in runs],
        notes=[*comparison_notes(runs)],
        classes=comparison_classes(runs),
        missed=[],
        confusions=[],
        front=as_svg(drawn, "front", "mIoU against GMACs per image of every run's model and instances"),
    )
