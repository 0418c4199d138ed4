"""The report: its numbers against ones computed here, its page against the outside world."""

from __future__ import annotations

import html
import io
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import scipy.stats
from rich.console import Console

from helpers.reports import (
    CLASSES,
    GMACS,
    NUM_EXITS,
    NUM_IMAGES,
    make_costs,
    make_gallery,
    make_measurements,
    make_tables,
)
from messnet.errors import RunError
from messnet.records.instance import ExitChoice, Instance
from messnet.records.selection import CostUnit, Expected
from messnet.report.classes import missed_by_rows
from messnet.report.page import (
    ReportInputs,
    headline,
    measurements_markdown,
    not_in_table,
    rank_correlation,
    render_report,
    terminal_table,
)
from messnet.report.wording import about, spoken, verdict
from messnet.searching.answers import Comparison, FrontPoint
from messnet.searching.findings import Findings, OneFinding
from messnet.searching.objective import Objective
from messnet.searching.words import objective_text


@pytest.fixture(scope="module")
def inputs() -> ReportInputs:
    rng = np.random.default_rng(0)
    tables = make_tables(rng)
    measurements = make_measurements(rng, tables)
    cost = np.linspace(35e9, 140e9, 24)
    return ReportInputs(
        title="CamVid, DRN-50 & FCN",
        measurements=measurements,
        gallery=make_gallery(rng, measurements),
        tables=tables,
        costs=make_costs(),
        findings=Findings(
            fronts={
                "input-dependent": [(c, 0.735 - 0.3 * np.exp(-c / 30e9)) for c in cost],
                "budgeted": [(c, 0.725 - 0.4 * np.exp(-c / 45e9)) for c in cost[::6]],
            },
            names=[],
            verdicts=[
                "cheapest at <= 1 pp: proved optimal over 41 216 instances; beats the best static model by 1.31x."
            ],
        ),
        recipe_yaml="data: {name: camvid}\nmodel: drn50_fcn  # <b>not bold</b>\n",
        provenance={"evaluate": {"seconds": "212", "torch": "2.11.0"}, "search": {"seconds": "4.1"}},
    )


@pytest.fixture(scope="module")
def page(inputs: ReportInputs) -> str:
    return render_report(inputs)


class Page(HTMLParser):
    """Tags with their attributes, and the text of the page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_page_needs_nothing_from_outside(page: str) -> None:
    assert not re.search(r"https?://|url\((?!#)|@import", page)
    for tag, attributes in Page(page).tags:
        assert tag not in {"script", "link", "iframe"}
        assert (attributes.get("src") or "data:").startswith("data:")
        assert (attributes.get("href") or "#").startswith("#")
        assert (attributes.get("xlink:href") or "#").startswith("#")


def test_identifiers_are_unique_and_referenced_ones_exist(page: str) -> None:
    tags = Page(page).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    referenced = {attributes[key] for _, attributes in tags for key in ("href", "xlink:href") if attributes.get(key)}
    assert referenced <= {f"#{name}" for name in ids}
    assert set(re.findall(r"url\(#(\w+)\)", page)) <= set(ids)


def test_every_figure_is_present_and_has_words(page: str) -> None:
    tags = Page(page).tags
    assert sum(tag == "svg" for tag, _ in tags) == 3
    assert all(attributes["aria-label"] for tag, attributes in tags if tag == "svg")
    pictures = [attributes for tag, attributes in tags if tag == "img"]
    assert len(pictures) == 2 * (2 + NUM_EXITS) + 3
    assert all(picture["alt"] for picture in pictures)
    assert sum(attributes.get("class") == "taken" for _, attributes in tags) == 2
    assert sum(attributes.get("class") == "unseen" for _, attributes in tags) == 3


def test_table_states_the_measurements(page: str, inputs: ReportInputs) -> None:
    words = "".join(Page(page).words).replace("\N{NO-BREAK SPACE}", " ")
    baseline, *others = inputs.measurements.rows
    for row in others:
        change = 100 * (row.miou - baseline.miou)
        assert f"{100 * row.miou:.2f}{change:+.2f} pp".replace("-", "\u2212") in words
        assert f"{row.macs / 1e9:.4g}{baseline.macs / row.macs:.2f}\u00d7 less" in words
        median = np.median(row.latency_ms)
        assert f"{median:.3g} [{np.percentile(row.latency_ms, 95):.3g}]" in words
        assert f"{np.median(baseline.latency_ms) / median:.2f}\u00d7 faster" in words
        assert f"{np.median(row.predicted_ms):.3g} predicted" in words
        for choice in row.instance.exits:
            assert f" {100 * row.exit_taken.count(choice.exit_index) / NUM_IMAGES:.0f} %" in words
    assert "Selected on one half" in words
    assert inputs.measurements.skipped[0].replace("<=", "\u2264").replace("0.91x", "0.91\u00d7") in words


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (Objective(minimise="latency_ms", max_drop_pp=1.0), "fastest at <= 1 pp less mIoU"),
        (Objective(max_drop_pp=0.5), "cheapest in work at <= 0.5 pp less mIoU"),
        (Objective(maximise="miou", max_cost_ratio=0.5), "most accurate at <= 0.5x the model's work"),
        (Objective(maximise="miou", max_cost=1e9), "most accurate at <= 1e+09 multiply-accumulates"),
        (
            Objective(maximise="miou", cost="latency_ms", statistic="p95", max_cost=40),
            "most accurate at <= 40 95th percentile of milliseconds",
        ),
        (Objective(minimise="memory_bytes"), "cheapest in bytes of memory"),
    ],
)
def test_what_was_asked_is_said_in_words(inputs: ReportInputs, asked: Objective, said: str) -> None:
    assert spoken(objective_text(asked)) == said
    row = inputs.measurements.rows[1]
    rows = [inputs.measurements.rows[0], replace(row, instance=replace(row.instance, objective=objective_text(asked)))]
    assert f"| {row.instance.name}, {said} |" in measurements_markdown(replace(inputs.measurements, rows=rows), [])


def test_odd_names_are_escaped(page: str, inputs: ReportInputs) -> None:
    assert "&lt;script&gt;alert(1)" in page
    assert "&lt;b&gt;not bold" in page
    odd = "<img src=x onerror=1>$_$"
    names = [odd, *inputs.measurements.image_names[1:]]
    tables = replace(inputs.tables, image_names=(odd, *inputs.tables.image_names[1:]))
    gallery = replace(inputs.gallery, image_names=(odd, odd))
    html = render_report(
        replace(
            inputs,
            title=odd,
            measurements=replace(inputs.measurements, image_names=names, device=odd, skipped=[odd]),
            tables=tables,
            gallery=gallery,
            findings=Findings(fronts={odd: [(1e9, 0.5)]}, names=[], verdicts=[odd]),
            provenance={odd: {odd: odd}},
        )
    )
    assert "<img src=x" not in html


def test_spearman_is_scipys_and_is_stated(page: str, inputs: ReportInputs) -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        a, b = rng.integers(0, 6, 30), rng.normal(size=30)
        assert rank_correlation(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)
    assert np.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
    row = inputs.measurements.rows[-1]
    stated = scipy.stats.spearmanr(inputs.measurements.difficulty, row.exit_taken).statistic
    assert f"rank correlation {stated:+.2f} over {NUM_IMAGES} images" in page


def test_final_exit_error_stands_in_for_difficulty(inputs: ReportInputs) -> None:
    measurements = replace(inputs.measurements, difficulty=[float("nan")] * NUM_IMAGES)
    assert "share of pixels the final exit gets wrong (no difficulty recorded)" in render_report(
        replace(inputs, measurements=measurements)
    )


def test_heads_are_scored_on_the_reported_images(page: str, inputs: ReportInputs) -> None:
    reported = [inputs.tables.image_names.index(name) for name in inputs.measurements.image_names]
    final = inputs.tables.final
    common = inputs.tables.intersection[reported, final].sum(0)
    union = inputs.tables.predicted[reported, final].sum(0) + inputs.tables.labelled[reported].sum(0) - common
    assert f"<td>{100 * np.mean(common / union):.2f}</td><td>{(sum(GMACS) + 1e9) / 1e9:.1f}</td>" in page


def test_baseline_alone_makes_a_page(inputs: ReportInputs) -> None:
    measurements = replace(inputs.measurements, rows=inputs.measurements.rows[:1])
    html = render_report(
        replace(inputs, measurements=measurements, gallery=None, findings=Findings(fronts={}, names=[]), provenance={})
    )
    assert "No instance met what was asked" in html
    assert html.count("<svg") == 2
    assert "no instance loses at most" in html


def test_measurements_without_a_row_are_an_error(inputs: ReportInputs) -> None:
    with pytest.raises(RunError, match="without a row"):
        render_report(replace(inputs, measurements=replace(inputs.measurements, rows=[])))


def test_images_missing_from_the_tables_are_an_error(inputs: ReportInputs) -> None:
    with pytest.raises(RunError, match="messnet evaluate"):
        render_report(replace(inputs, tables=inputs.tables.subset(np.arange(3))))


@pytest.mark.parametrize(
    ("miou", "macs", "latency", "words"),
    [
        (0.697, 50e9, 50.0, "2.0x less work at 0.3 pp less mIoU; 2.0x faster on this machine"),
        (0.700, 50e9, 125.0, "2.0x less work at the same mIoU; but 1.2x slower on this machine"),
        (0.705, 100e9, 100.0, "about as much work at 0.5 pp more mIoU; no faster on this machine"),
        (0.695, 125e9, 125.0, "Nothing gained: 1.2x more work at 0.5 pp less mIoU; 1.2x slower on this machine"),
        (0.600, 50e9, 50.0, "2.0x less work at 10.0 pp less mIoU; 2.0x faster on this machine"),
    ],
)
def test_headline_is_honest(inputs: ReportInputs, miou: float, macs: float, latency: float, words: str) -> None:
    baseline = replace(inputs.measurements.rows[0], miou=0.7, macs=100e9, latency_ms=[100.0] * 3)
    row = replace(inputs.measurements.rows[2], miou=miou, macs=macs, latency_ms=[latency] * 3)
    assert headline(replace(inputs.measurements, rows=[baseline, row])) == words


@pytest.mark.parametrize(
    ("miou", "macs", "error", "words"),
    [
        (
            0.705,
            100e9,
            0.004,
            "Nothing gained: about as much work at no clear change of mIoU (+0.5 ± 0.8 pp); no faster",
        ),
        (0.695, 50e9, 0.004, "2.0x less work at no clear change of mIoU (-0.5 ± 0.8 pp); but no faster"),
        (0.705, 100e9, 0.001, "about as much work at 0.5 pp more mIoU (+0.5 ± 0.2 pp); no faster"),
        (0.695, 125e9, 0.001, "Nothing gained: 1.2x more work at 0.5 pp less mIoU (-0.5 ± 0.2 pp); no faster"),
        (0.700, 50e9, 0.001, "2.0x less work at the same mIoU (+0.0 ± 0.2 pp); but no faster"),
        (0.787, 100e9, None, "Nothing gained: about as much work at no clear change of mIoU; no faster"),
    ],
)
def test_headline_does_not_celebrate_noise(
    inputs: ReportInputs, miou: float, macs: float, error: float | None, words: str
) -> None:
    baseline = replace(inputs.measurements.rows[0], miou=0.7, macs=100e9, latency_ms=[100.0] * 3, miou_change_error=0.0)
    row = replace(inputs.measurements.rows[2], miou=miou, macs=macs, latency_ms=[100.0] * 3, miou_change_error=error)
    measurements = replace(inputs.measurements, rows=[baseline, row], chance_miou=0.1)
    assert headline(measurements).startswith(words)
    assert ("1.96 standard errors" in measurements_markdown(measurements)) == (
        "±" in measurements_markdown(measurements)
    )


def test_terminal_table_explains_its_margins(inputs: ReportInputs) -> None:
    rows = [replace(row, miou_change_error=0.0123) for row in inputs.measurements.rows]
    console = Console(width=100, file=io.StringIO(), force_terminal=False)
    console.print(terminal_table(replace(inputs.measurements, rows=rows, chance_miou=0.1)))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    assert "-0.32 ± 2.41 pp" in text
    assert "±: 1.96 standard errors" in text
    console.print(terminal_table(inputs.measurements))
    assert console.file.getvalue().count("standard errors") == 1


def test_a_final_exit_that_learnt_too_little_is_told(inputs: ReportInputs) -> None:
    baseline = replace(inputs.measurements.rows[0], miou=0.42, macs=100e9)
    row = replace(inputs.measurements.rows[2], miou=0.46, macs=50e9)
    said = "the final exit has learnt too little"
    assert said in measurements_markdown(replace(inputs.measurements, rows=[baseline, row]))
    assert said not in measurements_markdown(replace(inputs.measurements, rows=[baseline, replace(row, miou=0.425)]))


def test_an_instance_that_never_chooses_is_told(inputs: ReportInputs) -> None:
    baseline, _, row = inputs.measurements.rows
    said = f"{row.instance.name}: every image stops at exit 0"
    assert said not in measurements_markdown(inputs.measurements)
    stops = replace(row, exit_taken=[0] * len(row.exit_taken))
    assert said in measurements_markdown(replace(inputs.measurements, rows=[baseline, stops]))


def test_headline_of_an_untrained_network_says_so(inputs: ReportInputs) -> None:
    baseline = replace(inputs.measurements.rows[0], miou=0.053)
    row = replace(inputs.measurements.rows[2], miou=0.14, miou_change_error=0.001)
    measurements = replace(inputs.measurements, rows=[baseline, row], chance_miou=0.048)
    said = "Too little was learnt to compare exits: the final exit's mIoU of 5.3 % is near chance (4.8 %)"
    assert headline(measurements) == said
    page = render_report(replace(inputs, measurements=measurements))
    assert "The headline is the row" not in page
    assert "pp more mIoU" not in page
    assert "Too little" not in headline(replace(measurements, rows=[replace(baseline, miou=0.08), row]))


def test_classes_at_zero_are_named(inputs: ReportInputs) -> None:
    """Sky is never predicted, building only where it is not; road and the last class are in no mask, the last is
    predicted all the same."""
    confusion = np.zeros((5, 5), int)
    confusion[0, 3] = confusion[1, 3] = confusion[3, 1] = confusion[3, 4] = confusion[3, 3] = 10
    other = confusion.copy()
    other[3, 2] = 1
    made = inputs.measurements
    confusions = [confusion.tolist(), confusion.tolist(), other.tolist()]
    rows = [replace(row, confusion=one) for row, one in zip(made.rows, confusions, strict=True)]
    measurements = replace(made, rows=rows, class_names=list(CLASSES))
    first, second, third = (row.instance.name for row in rows)
    start = "never predicted: sky; predicted, but never where it is: building; absent in these masks"
    yet = "absent in these masks, yet predicted, which counts as 0 %:"
    sentences = [
        f"{first}, {second}: {start}: road; {yet} {CLASSES[4]}",
        f"{third}: {start}, yet predicted, which counts as 0 %: road, {CLASSES[4]}",
    ]
    assert missed_by_rows(measurements) == sentences
    assert all(sentence in measurements_markdown(measurements) for sentence in sentences)
    text = html.unescape(render_report(replace(inputs, measurements=measurements)))
    assert all(f"{sentence}." in text for sentence in sentences)
    # Instances that were chosen without the images found some sky: the table beside the sentence says so.
    expected = Expected(
        num_images=48,
        num_groups=48,
        num_folds=2,
        unit=CostUnit("macs", relative=False),
        miou=0.1,
        baseline_miou=0.1,
        drop_error=0.0,
        cost=1.0,
        cost_error=0.0,
        baseline_cost=1.0,
        macs=1.0,
        macs_paper=1.0,
        macs_error=0.0,
        exit_shares=(),
        class_iou=(0.1, 0.0, None, 0.2, 0.0),
    )
    fitted = replace(rows[0], instance=replace(rows[0].instance, expected=expected))
    assert missed_by_rows(replace(measurements, rows=[fitted]))[0].startswith(
        f"{first}: predicted, but never where it is: building; absent"
    )
    everywhere = replace(rows[0], confusion=np.ones((5, 5), int).tolist())
    assert missed_by_rows(replace(measurements, rows=[everywhere])) == []


def test_a_routing_unlike_the_tables_is_a_warning(page: str, inputs: ReportInputs) -> None:
    assert 'class="warning"' not in page
    row = replace(inputs.measurements.rows[2], miou_from_tables=inputs.measurements.rows[2].miou + 1e-6)
    measurements = replace(inputs.measurements, rows=[*inputs.measurements.rows[:2], row])
    assert 'class="warning"' in render_report(replace(inputs, measurements=measurements))
    assert "warning: cheapest-1pp" in measurements_markdown(measurements)


def test_terminal_table_fits_100_columns(inputs: ReportInputs) -> None:
    console = Console(width=100, file=io.StringIO(), force_terminal=False)
    console.print(terminal_table(inputs.measurements, not_in_table(inputs.measurements, inputs.findings)))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    assert "\u2026" not in text  # nothing was cut off
    assert f"{100 * inputs.measurements.rows[2].miou:.2f}" in text
    assert "no instance loses" in text


def test_markdown_table_has_a_row_per_measurement(inputs: ReportInputs) -> None:
    text = measurements_markdown(replace(inputs.measurements, device="a|b"))
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(inputs.measurements.rows)
    assert {line.count("|") for line in table} == {6}
    assert "| cheapest-1pp, cheapest at <= 1 pp | 71.91, -0.32 pp |" in text


@pytest.mark.parametrize(
    ("num_exits", "said"),
    [
        (1, "It has a single exit: no better one with early exits was found"),
        (2, "The best network with a single exit takes 100 % more work at 1.00 pp less mIoU"),
    ],
)
def test_a_single_exit_is_not_its_own_rival(num_exits: int, said: str) -> None:
    exits = tuple(ExitChoice(exit_index=i, head="a") for i in range(num_exits))
    chosen = FrontPoint(miou=0.5, cost=1e9, instance=Instance(name="x", setting="input_dependent", exits=exits))
    static = replace(chosen, miou=0.49, cost=2e9)
    rivals = Comparison(
        chosen=chosen, unit=CostUnit("macs"), static=static, has_early_exits=num_exits > 1, uniform=chosen
    )
    assert verdict(OneFinding(name="x", objective=Objective(), comparison=rivals)) == said


def test_importing_the_report_loads_no_torch() -> None:
    command = "import sys, messnet.report.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.2, "1 s"),
        (9.6, "10 s"),
        (52, "50 s"),
        (148, "2 min 30 s"),
        (700, "12 min"),
        (3700, "1 h"),
        (7900, "2 h 10 min"),
        (5e4, "14 h"),
    ],
)
def test_estimates_have_two_digits(seconds: float, said: str) -> None:
    assert about(seconds) == said
