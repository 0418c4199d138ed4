"""Figures as a person says them: the same in the terminal, in Markdown and on the page."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from messnet.searching.findings import OneFinding


def significant(value: float, digits: int = 3) -> str:
    """``value`` with so many significant digits, never in powers of ten."""
    if not math.isfinite(value) or value == 0:
        return f"{value:.0f}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def fold(ratio: float, gained: str, lost: str, digits: int = 2) -> str:
    """A ratio in words, at least 1: "2.40x less", "1.10x more"; "the same" where rounding leaves nothing."""
    if round(ratio, digits) == 1 or round(1 / ratio, digits) == 1:
        return "the same"
    return f"{ratio:.{digits}f}x {gained}" if ratio >= 1 else f"{1 / ratio:.{digits}f}x {lost}"


def change(change_pp: float, margin_pp: float | None) -> str:
    """A change of mIoU with its margin where that is known, such as "-0.70 ± 0.30 pp"."""
    # Rounded first: + 0.0 makes no minus of a zero.
    margin = f" ± {margin_pp:.2f}" if margin_pp is not None and math.isfinite(margin_pp) else ""
    return f"{round(change_pp, 2) + 0.0:+.2f}{margin} pp"


def accuracy(change_pp: float, margin_pp: float | None) -> str:
    """A change of mIoU, such as "0.7 pp less mIoU (-0.7 ± 0.3 pp)"; what is within its margin is no clear change."""
    # Below 0.05 pp a change is within what rounding makes of none.
    if abs(change_pp) < 0.05:
        text = "the same mIoU"
    elif margin_pp is not None and abs(change_pp) <= margin_pp:
        text = "no clear change of mIoU"
    else:
        text = f"{abs(change_pp):.1f} pp {'more' if change_pp > 0 else 'less'} mIoU"
    if margin_pp is not None and math.isfinite(margin_pp) and max(abs(change_pp), margin_pp) >= 0.05:
        text += f" ({change_pp:+.1f} ± {margin_pp:.1f} pp)"
    return text


_SAID = {
    r"cheapest in latency_ms": "fastest",
    r"latency_p95_ms|p95 latency_ms": "95th percentile of milliseconds",
    r"latency_ms": "milliseconds",
    r"memory_bytes": "bytes of memory",
    r"(<= [0-9.e+]+) macs(_paper)?\b": r"\1 multiply-accumulates",
    r"macs(_paper)?\b": "work",
    r"pp drop": "pp less mIoU",
}
"""The names of costs in what searches were asked for, by what one says."""


def spoken(text: str) -> str:
    """An instance's objective, such as "cheapest in latency_ms at <= 1 pp drop", in words for people: "fastest at <= 1
    pp less mIoU"."""
    for written, said in _SAID.items():
        text = re.sub(rf"(?<!\w)(?:{written})", said, text)
    return text


def verdict(one: OneFinding) -> str:
    """What a search proved and what it gained over plain ways, as one would tell it; ``words.finding`` has it all."""
    told = []
    if one.proof is not None:
        number = f"{one.proof.num_declared:,}".replace(",", "\N{NO-BREAK SPACE}")
        if one.proof.optimal:
            told.append(f"The best of {number} combinations of exits, heads and thresholds, proved")
        else:
            known = "" if one.proof.gap_miou is None else f", at most {100 * one.proof.gap_miou:.2g} pp from the best"
            told.append(f"The best that was found among {number} combinations of exits, heads and thresholds{known}")
    rivals = one.comparison
    if rivals is not None and rivals.static is None:
        told.append("No network with a single exit does what was asked")
    elif rivals is not None and len(rivals.chosen.instance.exits) == 1:
        told.append("It has a single exit: no better one with early exits was found")
    elif rivals is not None and rivals.static is not None:
        chosen, static = rivals.chosen, rivals.static
        change = 100 * (static.miou - chosen.miou)
        ratio = static.cost / chosen.cost if chosen.cost else 1.0
        costs = (
            "as much" if 0.995 < ratio < 1.005 else f"{100 * abs(ratio - 1):.0f} % {'more' if ratio > 1 else 'less'}"
        )
        at = "the same mIoU" if abs(change) < 0.005 else f"{abs(change):.2f} pp {'more' if change > 0 else 'less'} mIoU"
        told.append(f"The best network with a single exit takes {costs} work at {at}")
    return ". ".join(told)


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def duration(seconds: float) -> str:
    """Such as "0.4 s", "12 s", "2 min 2 s", "1 h 5 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def about(seconds: float) -> str:
    """A duration that is only estimated, with about two digits: "40 s", "12 min", "2 h 10 min", "14 h"."""
    for step, from_ in ((3600, 36_000), (600, 3600), (60, 600), (30, 120), (5, 10)):
        if seconds >= from_:
            return duration(round(seconds / step) * step)
    return f"{max(1, round(seconds))} s"
