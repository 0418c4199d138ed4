"""The report: tables, words and one self-contained page, from artefacts alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import NamedTuple, TypedDict, cast

import jinja2
import numpy as np
import yaml
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from rich.table import Table
from rich.text import Text

from messnet.errors import RunError
from messnet.records.costs import CostTable
from messnet.records.deployed import Deployed
from messnet.records.exit_tables import ExitTables
from messnet.records.instance import ExitChoice
from messnet.records.iou import class_iou, mean_iou
from messnet.records.measurements import Gallery, Measurement, Measurements, known
from messnet.records.run_directory import RunDirectory
from messnet.report.classes import ClassTable, class_markdown, class_table, confusions, missed_by_rows, missed_classes
from messnet.report.deployed import deployed_headline, deployed_markdown, deployed_notes, side_by_side
from messnet.report.figures import as_svg, draw_depth, draw_front, draw_heads, exit_colour
from messnet.report.gallery import class_legend, confidence_pictures, difficulty_of, exit_name, strips_of, worst_of
from messnet.report.wording import accuracy, change, duration, fold, markdown_table, significant, spoken, verdict
from messnet.searching import words
from messnet.searching.findings import Findings
from messnet.searching.words import CONFIDENT

COLUMNS = ("instance", "mIoU %", "GMACs", "ms: median [p95]", "images per exit")
HEADLINE_DROP_PP = 1.0
STAGE_1_ADVICE = (
    "keep it as it came with pretrain.iterations: 0, which trains heads only, or lower pretrain.learning_rate"
)
MIOU_TOLERANCE = 1e-9  # both are means of quotients of integer counts: equal counts give equal values


@dataclass(frozen=True, kw_only=True)
class ReportInputs:
    """All that a page is made of."""

    title: str
    measurements: Measurements
    gallery: Gallery | None
    """None where no instance was found."""
    tables: ExitTables
    """All validation images; the page shows the reported ones."""
    costs: CostTable
    findings: Findings
    """What the search found."""
    deployed: Deployed | None = None
    """None where the recipe deploys nothing."""
    recipe_yaml: str
    provenance: dict[str, dict[str, str]]
    """By stage: seconds, versions, devices, in words."""


def read_inputs(directory: RunDirectory) -> ReportInputs:
    """All that a run's page is made of, as its stages have left it. Raises RunError that names the verb which makes
    what is not there."""
    record, gallery = directory.record(), directory.gallery
    recipe = {name: dict(cast("Mapping[str, object]", section)) for name, section in record.recipe.items()}
    return ReportInputs(
        title=f"{recipe['model']['name']} on {recipe['data']['source']}",
        measurements=directory.measurements.read(),
        gallery=gallery.read() if gallery.exists else None,
        tables=directory.tables.read(),
        costs=directory.costs(),
        findings=Findings.from_json(directory.front.read()),
        deployed=directory.read_deployed(),
        recipe_yaml=yaml.safe_dump(recipe, sort_keys=False),
        provenance={
            stage: {key: str(value) for key, value in entry.items() if key != "fingerprint"}
            for stage, entry in record.stages.items()
        },
    )


class ExitRow(TypedDict):
    """The figures of an exit as a static model."""

    exit_index: int
    head: str
    miou: float
    """[0, 1]"""
    macs: float
    """Per image."""
    iou: dict[str, float | None]
    """By class, in [0, 1]; None of a class that neither labels nor predictions have."""


class _ExitShare(NamedTuple):
    exit_index: int
    name: str
    share: float
    margin: str
    """Behind the share, where it is known."""


class _Line(NamedTuple):
    """One row of the end-to-end table, in words; the changes are empty for the baseline."""

    title: str
    name: str
    miou: str
    miou_change: str
    gmacs: str
    work: str
    gmacs_paper: str
    latency: str
    latency_p95: str
    predicted: str
    speed: str
    exits: list[_ExitShare]
    choices: list[tuple[str, ExitChoice]]
    """The exits of the instance that ships, with their names."""
    mark: int = 0
    """Its number in the picture of the front; 0 for the models that instances are compared with."""


def not_in_table(measurements: Measurements, findings: Findings) -> list[str]:
    """A sentence for each instance that was asked for and has no row."""
    if measurements.skipped:
        return measurements.skipped
    why = "it was chosen on other images or heads than this run selects on now; search again"
    missing = [spoken(words.finding(one)) for one in findings.found if not one.is_found]
    return [*findings.skipped, *missing, *(f"{name}: {why}" for name in measurements.left_out)]


def terminal_table(measurements: Measurements, missing: Sequence[str] = ()) -> Table:
    """The end-to-end table for a terminal of 100 columns; ``missing`` as ``not_in_table`` gives it."""
    table = Table(title=Text(headline(measurements)), caption_justify="left")
    notes = [f"not in the table: {sentence}" for sentence in missing]
    notes += [f"warning: {sentence}" for sentence in _cautions(measurements)]
    if _is_cross_fitted(measurements):
        notes.append(
            "mIoU, work and exits are of images judged by instances chosen without them; latency is what ships"
        )
    notes += ["±: 1.96 standard errors over the draw of the reported images"] if _has_margins(measurements) else []
    table.caption = Text("\n".join(notes)) or None
    for column in COLUMNS:
        is_text = column in (COLUMNS[0], COLUMNS[-1])
        table.add_column(Text(column), justify="left" if is_text else "right", overflow="fold")
    table.columns[0].max_width = 26
    for line in _lines(measurements):
        table.add_row(*(Text("\n".join(filter(None, cell))) for cell in _cells(line)))
    return table


def measurements_markdown(
    measurements: Measurements, missing: Sequence[str] = (), deployed: Deployed | None = None
) -> str:
    """The end-to-end table as Markdown, with where it was measured; ``missing`` as ``not_in_table`` gives it."""
    rows = ([", ".join(filter(None, cell)) for cell in _cells(line)] for line in _lines(measurements))
    table = markdown_table(COLUMNS, rows)
    notes = [f"- not in the table: {sentence}" for sentence in missing]
    notes += [f"- warning: {sentence}" for sentence in _warnings(measurements)]
    paragraphs = [f"{opening(measurements, deployed)}.", _where(measurements), table, "\n".join(notes)]
    if deployed is not None:
        paragraphs.append(deployed_markdown(deployed))
    if classes := class_table(class_columns(measurements), measurements.class_names):
        paragraphs += [class_markdown(classes), *missed_by_rows(measurements)]
    return "\n\n".join(filter(None, paragraphs)) + "\n"


def _cells(line: _Line) -> list[list[str]]:
    """The cells of a row, each the parts that a plain table puts one below or behind the other."""
    shares = [f"{place.name}: {100 * place.share:.0f}{place.margin} %" for place in line.exits]
    latency = [f"{line.latency} [{line.latency_p95}]" if line.latency else "", line.speed, line.predicted]
    # Warnings and the table by class go by the name.
    named = "" if line.title.startswith(line.name) else line.name
    return [[named, line.title], [line.miou, line.miou_change], [line.gmacs, line.work], latency, shares]


def exit_rows(tables: ExitTables, costs: CostTable) -> list[ExitRow]:
    """The figures of every exit as a static model."""
    macs = costs.column("macs", tables.exits).alone()
    rows: list[ExitRow] = []
    for h, exit in enumerate(tables.exits):
        counts = tables.counts(np.full(len(tables.image_names), h))
        rows.append(
            {
                "exit_index": exit.exit_index,
                "head": exit.head,
                "miou": mean_iou(*counts),
                "macs": float(macs[h]),
                "iou": dict(zip(tables.class_names, known(class_iou(*counts)), strict=True)),
            }
        )
    return rows


def exit_classes(tables: ExitTables, rows: Sequence[ExitRow]) -> ClassTable | None:
    """IoU by class of the delivered model where there was one, the final exit, and the best head of each early exit."""
    columns: dict[str, Sequence[float | None]] = {}
    if tables.delivered is not None:
        intersection, predicted = tables.delivered.sum(0, dtype=np.int64)
        columns["delivered"] = known(class_iou(intersection, predicted, tables.labelled.sum(0, dtype=np.int64)))
    columns["final exit"] = [*rows[-1]["iou"].values()]
    for exit_index in range(rows[-1]["exit_index"]):
        here = [row for row in rows if row["exit_index"] == exit_index]
        if here:
            columns[f"exit {exit_index}"] = [*max(here, key=lambda row: row["miou"])["iou"].values()]
    return class_table(columns, tables.class_names)


def missed_by_final_exit(tables: ExitTables) -> list[str]:
    """``missed_classes`` of the final exit on all images."""
    counts = tables.counts(np.full(len(tables.image_names), tables.final))
    return missed_classes({"final exit": counts}, tables.class_names)


def exits_table(tables: ExitTables, costs: CostTable) -> Table:
    """``exit_rows`` for a terminal."""
    table = Table(title=f"every exit on {len(tables.image_names)} validation images", title_justify="left")
    for name in ("exit", "head", "mIoU %", "GMACs"):
        table.add_column(name, justify="left" if name == "head" else "right")
    for row in exit_rows(tables, costs):
        table.add_row(str(row["exit_index"]), row["head"], f"{100 * row['miou']:.2f}", f"{row['macs'] / 1e9:.4f}")
    return table


def headline(measurements: Measurements) -> str:
    """The gain in words, of the cheapest row that lost at most 1 pp; honest where there is none, where the network has
    learnt too little to compare anything, and where the images are too few to tell mIoU apart."""
    row, baseline = headline_row(measurements), _baseline(measurements)
    if _is_spoilt(measurements):
        return (
            f"Stage 1 made your model worse: {100 * measurements.miou_to_keep:.1f} % mIoU as delivered, "
            f"{100 * baseline.miou:.1f} % after it; {STAGE_1_ADVICE}"
        )
    if row is baseline:
        return "No instance met what was asked: only the baseline was measured"
    work, speed = baseline.macs / row.judged_macs, median_ms(baseline) / median_ms(row)
    if _is_near_chance(measurements):
        return (
            f"Too little was learnt to compare exits: the final exit's mIoU of {100 * baseline.miou:.1f} % is near "
            f"chance ({100 * (measurements.chance_miou or 0):.1f} %)"
        )
    change_pp, within_pp = 100 * (row.judged_miou - measurements.miou_to_keep), margin_pp(row, measurements)
    # Below 5 % a change is within a measurement's noise.
    is_more = change_pp >= 0.05 and (within_pp is None or change_pp > within_pp)
    is_gain = max(work, speed) >= 1.05 or is_more
    workload = "about as much" if 0.95 < work < 1.05 else fold(work, "less", "more", digits=1)
    tempo = "no faster" if 0.95 < speed < 1.05 else fold(speed, "faster", "slower", digits=1)
    but = "but " if work >= 1.05 and speed < 1.05 else ""
    gained = "" if is_gain else "Nothing gained: "
    return f"{gained}{workload} work at {accuracy(change_pp, within_pp)}; {but}{tempo} on this machine"


def opening(measurements: Measurements, deployed: Deployed | None) -> str:
    """The sentence to remember: what was gained where the model is deployed, else in torch."""
    if deployed is None or _is_spoilt(measurements) or _is_near_chance(measurements):
        return headline(measurements)
    return deployed_headline(deployed)


def _is_spoilt(measurements: Measurements) -> bool:
    """Whether stage 1 made the delivered model worse, by more than what other images could make of it."""
    baseline = _baseline(measurements)
    within_pp = margin_pp(baseline, measurements) or 0.0
    return 100 * (measurements.miou_to_keep - baseline.miou) > max(within_pp, 0.05)


def _is_near_chance(measurements: Measurements) -> bool:
    """Whether the final exit does hardly better than a guess: by less than half of chance, and by less than 5 pp."""
    chance = measurements.chance_miou
    return chance is not None and _baseline(measurements).miou < min(1.5 * chance, chance + 0.05)


def _has_margins(measurements: Measurements) -> bool:
    return any(row.judged_error is not None for row in measurements.rows[1:])


def _is_cross_fitted(measurements: Measurements) -> bool:
    return any(row.instance.expected is not None for row in measurements.rows)


def margin_pp(row: Measurement, measurements: Measurements) -> float | None:
    """How far, in percentage points, a row's change of mIoU may lie from what more images would show: 1.96 standard
    errors. Infinite where one image or group is all there is, None where a file of before does not say."""
    if row.judged_error is not None:
        return CONFIDENT * 100 * row.judged_error
    return None if measurements.chance_miou is None else math.inf


def _baseline(measurements: Measurements) -> Measurement:
    if not measurements.rows:
        raise RunError(
            "measurements without a row: the baseline is expected first; measure again with `messnet report`"
        )
    return measurements.rows[0]


def headline_row(measurements: Measurements) -> Measurement:
    baseline, *others = _baseline(measurements), *measurements.rows[1:]
    # Where nothing stays within the drop, the most accurate row: its loss is named, not hidden behind a cheaper one.
    kept = [row for row in others if row.judged_miou >= measurements.miou_to_keep - HEADLINE_DROP_PP / 100]
    if kept:
        return min(kept, key=lambda row: row.judged_macs)
    return max(others, key=lambda row: row.judged_miou, default=baseline)


def _lines(measurements: Measurements) -> list[_Line]:
    lines = [_line(measurements, mark) for mark in range(len(measurements.rows))]
    delivered = measurements.delivered
    if delivered is None or delivered.is_kept:
        return lines
    # It is the baseline's network with other weights: nothing but its mIoU is its own.
    model = lines[0]._replace(
        title="the model as delivered",
        name="",
        miou=f"{100 * delivered.miou:.2f}",
        miou_change="",
        latency="",
        latency_p95="",
        predicted="",
        exits=[],
        choices=[],
    )
    return [model, *lines]


def _line(measurements: Measurements, mark: int) -> _Line:
    row, baseline = measurements.rows[mark], _baseline(measurements)
    changed = change(100 * (row.judged_miou - measurements.miou_to_keep), margin_pp(row, measurements))
    if row is baseline:
        # Stage 1 may have changed it, but what a delivered model costs it costs too.
        work, speed = "", ""
        changed = "" if measurements.delivered is None or measurements.delivered.is_kept else changed
    else:
        work = fold(baseline.macs / row.judged_macs, "less", "more")
        speed = fold(median_ms(baseline) / median_ms(row), "faster", "slower")
    # The baseline is the final exit.
    last, final = baseline.instance.exits[-1].exit_index, exit_name(baseline.instance.exits[-1].exit)
    return _Line(
        title=_title(row, measurements),
        name=row.instance.name,
        miou=f"{100 * row.judged_miou:.2f}",
        miou_change=changed,
        gmacs=_gmacs(row),
        work=work,
        gmacs_paper=significant(row.judged_macs_paper / 1e9, 4),
        latency=significant(median_ms(row)),
        latency_p95=significant(float(np.percentile(row.latency_ms, 95))),
        predicted=f"{significant(float(np.median(row.predicted_ms)))} predicted" if row.predicted_ms else "",
        speed=speed,
        exits=[
            _ExitShare(
                exit_index=place.exit_index,
                name=final if place.exit_index == last else f"exit {place.exit_index}",
                share=place.share,
                margin="" if place.error is None else f" ± {100 * CONFIDENT * place.error:.0f}",
            )
            for place in row.judged_shares()
        ],
        choices=[(exit_name(choice.exit), choice) for choice in row.instance.exits],
        mark=mark,
    )


def _gmacs(row: Measurement) -> str:
    """Work, with 1.96 standard errors where they are known."""
    text = significant(row.judged_macs / 1e9, 4)
    if row.instance.expected is None:
        return text
    decimals = len(text.partition(".")[2])
    return f"{text} ± {CONFIDENT * row.instance.expected.macs_error / 1e9:.{decimals}f}"


def _title(row: Measurement, measurements: Measurements) -> str:
    if row is not measurements.rows[0]:
        return spoken(row.instance.objective) or row.instance.name
    if measurements.delivered is None:
        return "baseline"
    return "baseline: the model as delivered" if measurements.delivered.is_kept else "baseline: after stage 1"


def class_columns(measurements: Measurements) -> dict[str, Sequence[float | None]]:
    """IoU of each class by row of the table, the model that changes are counted against first."""
    columns: dict[str, Sequence[float | None]] = {}
    if measurements.delivered is not None and not measurements.delivered.is_kept:
        columns["delivered"] = measurements.delivered.class_iou
    return columns | {row.instance.name: row.class_iou() for row in measurements.rows}


def _warnings(measurements: Measurements) -> list[str]:
    doubts = [f"{row.instance.name}: {text}" for row in measurements.rows for text in _doubts(row, measurements)]
    return [*_cautions(measurements), *doubts]


def _cautions(measurements: Measurements) -> Iterator[str]:
    """What makes a gain look larger than it is."""
    if any(_outdoes(row, measurements) for row in measurements.rows):
        yield (
            "the final exit has learnt too little, for exits before it are more accurate: train longer "
            "(pretrain.iterations); until then every comparison with it flatters"
        )
    last = _baseline(measurements).instance.exits[-1].exit_index
    for row in measurements.rows:
        most = max(row.judged_shares(), key=lambda place: place.share)
        if most.share > 0.995 and most.exit_index < last:
            yield (
                f"{row.instance.name}: every image stops at exit {most.exit_index}: this is a shorter network, not "
                "one that chooses"
            )


def _outdoes(row: Measurement, measurements: Measurements) -> bool:
    """Whether less work is clearly more accurate than the final exit, which routing alone does not do."""
    baseline, within_pp = _baseline(measurements), margin_pp(row, measurements) or 0.0
    gained_pp = 100 * (row.judged_miou - baseline.miou)
    return gained_pp > max(1.0, within_pp) and row.judged_macs < baseline.judged_macs


def _doubts(row: Measurement, measurements: Measurements) -> Iterator[str]:
    """Why the figures of a row may not be what they seem."""
    instance = row.instance
    if abs(row.miou - row.miou_from_tables) > MIOU_TOLERANCE:
        yield (
            f"the running instance has mIoU {row.miou:.6f}, the tables say {row.miou_from_tables:.6f}; equal they "
            "would be on the same device with the same number of threads"
        )
    if "loss" in instance.selected_on:
        yield (
            "the images of this table calibrated its thresholds, so it may look better here than it is; its "
            f"certificate holds: {instance.certificate}"
        )
    elif instance.expected is None and row is not measurements.rows[0] and _is_cross_fitted(measurements):
        yield "it was chosen on images of this table and is not cross-fitted, so it may look better here than it is"


def _where(measurements: Measurements) -> str:
    height, width = measurements.input_size
    selected, reported = measurements.num_selection_images, len(measurements.image_names)
    text = f"Measured on {measurements.device}, {height} x {width} pixels, one image at a time. "
    expected = next((row.instance.expected for row in measurements.rows if row.instance.expected is not None), None)
    if expected is None:
        text += f"Selected on one half of the validation images ({selected}), reported on the other ({reported})."
    else:
        groups = "" if expected.num_groups == expected.num_images else f" in {expected.num_groups} groups"
        text += (
            f"mIoU, work and exits are what to expect on new images: the {expected.num_images} validation "
            f"images{groups} were divided into {expected.num_folds} parts, and the images of each part are judged by "
            "instances that were searched on the other parts. Latency is that of the instance which ships, searched on "
            "all parts."
        )
    if _has_margins(measurements):
        text += (
            " ± is 1.96 standard errors, 95 % confidence: how far other images of this kind would move the figure, or "
            "below an mIoU its change."
        )
    return text


def median_ms(row: Measurement) -> float:
    return float(np.median(row.latency_ms))


def render_report(inputs: ReportInputs) -> str:
    """One HTML page without outside assets."""
    measurements = inputs.measurements
    baseline, row = _baseline(measurements), headline_row(measurements)
    silent = inputs.deployed is not None or row is baseline or _is_near_chance(measurements) or _is_spoilt(measurements)
    num_exits = len(inputs.costs.segments)
    return page_of(
        "report.html.jinja",
        inputs=inputs,
        headline=opening(measurements, inputs.deployed),
        headline_row="" if silent else _title(row, measurements),
        headline_kept=row.judged_miou >= measurements.miou_to_keep - HEADLINE_DROP_PP / 100,
        where=_where(measurements),
        lines=_lines(measurements),
        not_in_table=not_in_table(measurements, inputs.findings),
        deployed_rows=side_by_side(inputs.deployed) if inputs.deployed else [],
        deployed_notes=[*deployed_notes(inputs.deployed)] if inputs.deployed else [],
        warnings=_warnings(measurements),
        colours=[exit_colour(index, num_exits) for index in range(num_exits)],
        front=as_svg(
            front_figure(measurements, inputs.findings),
            "front",
            f"mIoU against GMACs per image: the search's fronts on {_searched_on(inputs.findings)}, what to expect on "
            "others, the table's rows",
        ),
        verdicts=[
            (one.name, verdict(one), spoken(words.finding(one))) for one in inputs.findings.found if one.is_found
        ],
        strips=strips_of(inputs.gallery, measurements) if inputs.gallery else [],
        worst=worst_of(inputs.gallery) if inputs.gallery else [],
        legend=class_legend(inputs.gallery) if inputs.gallery else [],
        confidence=confidence_pictures(inputs.gallery, measurements) if inputs.gallery else None,
        depth=_depth_figure(measurements, inputs.costs),
        heads=_heads_figure(inputs),
        classes=class_table(class_columns(measurements), measurements.class_names),
        missed=missed_by_rows(measurements),
        confusions=confusions(measurements),
        stages={name: _stage_facts(facts) for name, facts in inputs.provenance.items()},
    )


def _stage_facts(facts: Mapping[str, object]) -> list[str]:
    """What is recorded of a stage, in words."""
    times = {"seconds": "took {}", "cpu_seconds": "{} of processor time"}
    told = [text.format(duration(float(str(facts[key])))) for key, text in times.items() if key in facts]
    return [*told, *(f"{key} {value}" for key, value in facts.items() if key not in times)]


def page_of(template: str, **values: object) -> str:
    """A template of this package, filled in."""
    folder = resources.files("messnet.report")
    # Names come from data sets and recipes: autoescape keeps markup in them from becoming the page's, and
    # StrictUndefined makes a name that the template has and the code has not an error instead of a gap.
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8")),
    )
    environment.filters["typeset"] = _typeset
    return environment.get_template(template).render(values)


def _typeset(text: str) -> Markup:
    """Typographic signs for the page; plain ones stay in the terminal and in Markdown."""
    # A minus only before a digit and after no letter or hyphen: "drop-1pp" and "2026-11-01" keep theirs.
    text = re.sub(r"(?<![\w-])-(?=\d)", "\N{MINUS SIGN}", text)
    text = re.sub(r"(?<=\d)( ?)x\b", "\\1\N{MULTIPLICATION SIGN}", text)
    text = re.sub(r"(?<=\d) (?=pp\b|ms\b|%|±)|(?<=±) (?=\d)", "\N{NO-BREAK SPACE}", text)
    return escape(text.replace("<=", "\N{LESS-THAN OR EQUAL TO}"))


def front_figure(measurements: Measurements, findings: Findings) -> Figure:
    """mIoU against work: the search's fronts, what to expect on new images, and the rows of the table."""
    judged = [(one.expected.macs, one.expected.miou, CONFIDENT * one.expected.drop_error) for one in findings.judged]
    rows = [(row.judged_macs, row.judged_miou) for row in measurements.rows]
    return draw_front(findings.fronts, rows, images=_searched_on(findings), judged=judged)


def _searched_on(findings: Findings) -> str:
    return "all images" if findings.protocol == "cross_fitted" else "selection half"


class _DepthFigure(NamedTuple):
    figure: Markup
    instance: str
    measure: str
    """The measure of difficulty, in words."""
    groups: list[tuple[str, int, float]]
    """For each exit its name, the number of images that left there, and their mean difficulty."""
    sentence: str


def _depth_figure(measurements: Measurements, costs: CostTable) -> _DepthFigure | None:
    """Exit taken against difficulty, for the instance whose images spread most. None without an early exit."""
    rows = [row for row in measurements.rows[1:] if row.instance.setting == "input_dependent"]
    row = max(rows, key=Measurement.spread, default=None)
    if row is None or len(row.instance.exits) < 2:
        return None
    difficulty, measure = difficulty_of(measurements)
    known = np.isfinite(difficulty)
    difficulty, taken = difficulty[known], np.array(row.exit_taken)[known]
    names = {choice.exit_index: exit_name(choice.exit) for choice in row.instance.exits}
    by_exit = [(name, difficulty[taken == exit_index]) for exit_index, name in names.items()]
    figure = draw_depth(difficulty, taken, names, len(costs.segments), measure)
    alt = f"exit taken against {measure}, one point per image, a bar at each exit's mean"
    return _DepthFigure(
        figure=as_svg(figure, "depth", alt),
        instance=spoken(row.instance.objective) or row.instance.name,
        measure=measure,
        groups=[(name, len(here), float(here.mean()) if len(here) else float("nan")) for name, here in by_exit],
        sentence=_correlation_in_words(rank_correlation(difficulty, taken), len(taken)),
    )


def rank_correlation(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation in [-1, 1], ties averaged; NaN where a or b is constant or empty."""

    def centred_ranks(values: ArrayLike) -> NDArray[np.float64]:
        # A tied value's rank is the mean of the places that it takes: the end of its run minus half the run's length
        # (the same offset for all, which centring removes).
        _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
        return np.asarray((np.cumsum(counts) - counts / 2)[inverse] - len(inverse) / 2)

    x, y = centred_ranks(a), centred_ranks(b)
    norm = math.sqrt(float((x**2).sum() * (y**2).sum()))
    return float((x * y).sum()) / norm if norm > 0 else float("nan")


def _correlation_in_words(correlation: float, num_images: int) -> str:
    if math.isnan(correlation):
        return f"No rank correlation over {num_images} images: all left at one exit, or are equally hard."
    chance = 1.96 / math.sqrt(num_images - 1)  # two-sided 5 %, normal approximation
    reading = "harder images leave later" if correlation > 0 else "harder images leave earlier, against the intent"
    if abs(correlation) < chance:
        reading = "no relation that could be told from chance"
    return (
        f"Spearman's rank correlation {correlation:+.2f} over {num_images} images: {reading} "
        f"(unrelated ranks stay within {min(chance, 1):.2f} of zero in 19 draws of 20)."
    )


class _HeadsFigure(NamedTuple):
    figure: Markup
    best: list[tuple[str, int, str, str, str]]
    """For each exit its name, the number of heads, the best one, that one's mIoU in per cent and its GMACs."""
    num_exits: int
    """Heads of all exits together."""


def _heads_figure(inputs: ReportInputs) -> _HeadsFigure:
    """mIoU of every exit on the reported images against its cost: backbone up to it and its head."""
    tables = _reported(inputs.tables, inputs.measurements.image_names)
    gmacs = inputs.costs.column("macs", tables.exits).alone() / 1e9
    num_images = len(tables.image_names)
    miou = np.array([tables.miou(np.full(num_images, h)) for h in range(len(tables.exits))])
    exit_indices = np.array([place.exit_index for place in tables.exits])
    names = {place.exit_index: exit_name(place) for place in tables.exits}
    best = []
    for exit_index, name in names.items():
        here = np.flatnonzero(exit_indices == exit_index)
        # A head without an mIoU (no class occurs) is the last choice, not the first, as NaN would make it.
        top = max(here, key=lambda h: np.nan_to_num(miou[h], nan=-1.0))
        best.append((name, len(here), tables.exits[top].head, f"{100 * miou[top]:.2f}", significant(gmacs[top], 4)))
    figure = draw_heads(gmacs, miou, exit_indices, names, len(inputs.costs.segments))
    alt = "mIoU of every exit head on the reported images against its GMACs, one colour per exit"
    return _HeadsFigure(as_svg(figure, "heads", alt), best, len(tables.exits))


def _reported(tables: ExitTables, image_names: Sequence[str]) -> ExitTables:
    position = {name: v for v, name in enumerate(tables.image_names)}
    missing = [name for name in image_names if name not in position]
    if missing:
        raise RunError(
            f"exit tables lack {len(missing)} measured images ({missing[0]!r}); run `messnet evaluate` again"
        )
    return tables.subset(np.array([position[name] for name in image_names], np.int64))
