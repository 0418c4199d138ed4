"""How every drawing of messnet looks: its inks, and quiet axes. Matplotlib is imported by whoever draws."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Inks(NamedTuple):
    """Colours of a drawing, as "#rrggbb"."""

    ink: str
    """Names and what counts most."""
    muted: str
    """Labels and numbers."""
    rule: str
    """Grid and frame."""
    paper: str
    """Background."""


LIGHT = Inks("#1f2328", "#636b74", "#e3e0d8", "#fcfbf8")
"""Dark on light, as the report's page is by day."""


def style(axes: Axes, inks: Inks) -> None:
    """Quiet axes: a grid and two sides in the colour of rules, labels and numbers muted."""
    axes.xaxis.label.set_color(inks.muted)
    axes.yaxis.label.set_color(inks.muted)
    axes.tick_params(color=inks.rule, labelcolor=inks.muted)
    axes.grid(color=inks.rule, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(inks.rule)
