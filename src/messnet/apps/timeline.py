"""The course of a video, frame by frame: exit, confidence and time; as records, figures and a picture."""

from __future__ import annotations

import csv
import io
import json
import textwrap
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from messnet.apps.exit_control import Reason, change_rate
from messnet.images.axes import LIGHT, style
from messnet.images.colours import exit_colour
from messnet.records.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ALARM = "#b3382c"
MAX_NAMED = 4
"""Runs of frames that the budget cut, named in the summary's sentence."""
MAX_DRAWN = 2000
"""Frames of a longer video share a column of the picture."""


class FrameRecord(NamedTuple):
    """One frame."""

    frame: int
    """Place in the video, from 0; for a camera the frames that were dropped count."""
    time_s: float
    """Seconds from the first frame, by the time stamps of the container or camera."""
    exit_index: int
    """The exit taken."""
    image_confidence: float
    """c_img in [0, 1] there."""
    latency_ms: float
    """From the decoded frame to labels and confidence, normalisation included."""
    stopped_by: Reason
    unsteadied_exit: int
    """The exit that the instance's own thresholds would have taken, among those that ran."""


class Summary(TypedDict):
    """Figures over all frames of a video: shares and rates in [0, 1]."""

    frames: int
    dropped: int
    seconds: float
    frames_per_second: float
    latency_ms_median: float
    latency_ms_p95: float
    within_budget: float | None
    """Share of the frames; None where there is no budget."""
    stopped_by_budget: float
    cut_by_budget: list[tuple[int, int]]
    """Which frames those are: (first, last) of each run of them, both included."""
    exits: dict[str, int]
    """Frames by the exit taken, as JSON names it."""
    change_rate: float
    change_rate_unsteadied: float
    """By the instance's own thresholds."""


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """The frames of one video and how they were run."""

    source: str
    instance: str
    exit_indices: tuple[int, ...]
    """The instance's exits, shallow to deep."""
    fps: float
    """Frames per second of the video, on average."""
    size: tuple[int, int]
    """(H, W)."""
    frame_budget_ms: float | None
    hysteresis: float
    seconds: float
    """From the start, the network being warm, to the last frame's writing."""
    interrupted: bool = False
    damage: str = ""
    """Why the file ended early, in words."""
    frames: list[FrameRecord] = field(repr=False)

    @property
    def dropped(self) -> int:
        """Frames of a camera that were passed over, being stale."""
        return self.frames[-1].frame + 1 - len(self.frames) if self.frames else 0

    def summary(self) -> Summary:
        latencies = np.array([frame.latency_ms for frame in self.frames])
        taken = [frame.exit_index for frame in self.frames]
        budget = self.frame_budget_ms
        return {
            "frames": len(self.frames),
            "dropped": self.dropped,
            "seconds": self.seconds,
            "frames_per_second": len(self.frames) / self.seconds,
            "latency_ms_median": float(np.median(latencies)),
            "latency_ms_p95": float(np.percentile(latencies, 95)),
            "within_budget": None if budget is None else float((latencies <= budget).mean()),
            "stopped_by_budget": sum(frame.stopped_by == "budget" for frame in self.frames) / len(self.frames),
            "cut_by_budget": self.cut_by_budget(),
            "exits": {str(exit_index): taken.count(exit_index) for exit_index in self.exit_indices},
            "change_rate": change_rate(taken),
            "change_rate_unsteadied": change_rate([frame.unsteadied_exit for frame in self.frames]),
        }

    def cut_by_budget(self) -> list[tuple[int, int]]:
        """The frames that would have gone deeper had there been time, by their number in the video: (first, last) of
        each run of them, both included."""
        runs: list[tuple[int, int]] = []
        for is_cut, frames in groupby(self.frames, lambda frame: frame.stopped_by == "budget"):
            if is_cut:
                numbers = [frame.frame for frame in frames]
                runs.append((numbers[0], numbers[-1]))
        return runs

    def describe(self) -> str:
        """The summary as a sentence."""
        figures = self.summary()
        parts = [f"{Path(self.source).name}, {self.instance}: {figures['frames']} frames"]
        parts.append(f"{figures['frames_per_second']:.1f} per second")
        parts.append(f"median {figures['latency_ms_median']:.0f} ms")
        if figures["within_budget"] is not None:
            parts.append(f"{100 * figures['within_budget']:.1f} % within {self.frame_budget_ms:g} ms")
            parts.append(_cut_in_words(figures["stopped_by_budget"], figures["cut_by_budget"]))
        rate, plain = figures["change_rate"], figures["change_rate_unsteadied"]
        parts.append(f"exit changes at {100 * rate:.1f} % of the frames ({100 * plain:.1f} % without hysteresis)")
        return ", ".join(parts)

    def write(self, folder: Path) -> None:
        """timeline.json, timeline.csv and timeline.png in ``folder``."""
        record = {
            name: value for name, value in vars(self).items() if name not in ("exit_indices", "seconds", "frames")
        }
        record["summary"] = self.summary()
        frames = ",\n".join(json.dumps(frame._asdict()) for frame in self.frames)  # a line per frame
        head = json.dumps(record, indent=1)[:-2]  # without its last line, "}"
        write_atomically(folder / "timeline.json", f'{head},\n "frames": [\n{frames}\n]\n}}\n')
        table = io.StringIO()
        rows = csv.writer(table, lineterminator="\n")
        rows.writerow(FrameRecord._fields)
        rows.writerows(self.frames)
        write_atomically(folder / "timeline.csv", table.getvalue())
        picture = io.BytesIO()
        draw_timeline(self).savefig(picture, format="png", dpi=100)
        write_atomically(folder / "timeline.png", picture.getvalue())


def _cut_in_words(share: float, runs: list[tuple[int, int]]) -> str:
    """Which frames the budget cut, the first runs of them by number."""
    if not runs:
        return "none cut by the budget"
    named = ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in runs[:MAX_NAMED])
    more = " and others, see timeline.csv" if len(runs) > MAX_NAMED else ""
    return f"{100 * share:.1f} % cut by the budget (frames {named}{more})"


def draw_timeline(timeline: Timeline) -> Figure:
    """Exit taken, confidence and latency over time, 1200 x 750 pixels as PNG; colours by exit, a dashed line for the
    budget, rings around the frames that it cut."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.5), layout="constrained", facecolor=LIGHT.paper)
    figure.set_layout_engine("constrained", w_pad=0.15, h_pad=0.12)
    taken, sure, spent = figure.subplots(3, sharex=True, height_ratios=(1, 1, 1.3))
    frames = timeline.frames
    step = -(-len(frames) // MAX_DRAWN)
    starts = range(0, len(frames), step)
    time = np.array([frames[i].time_s for i in starts])
    # A column shows its slowest frame: a late one must not vanish from the picture of a long video.
    shown = [max(frames[i : i + step], key=lambda frame: frame.latency_ms) for i in starts]
    places = np.array([timeline.exit_indices.index(frame.exit_index) for frame in shown])
    num_exits = len(timeline.exit_indices)
    colours = [np.array(exit_colour(place, num_exits)) / 255 for place in range(num_exits)]

    taken.step(time, places, where="post", color=LIGHT.rule, lw=1.2, zorder=1)
    sure_of, latency = [f.image_confidence for f in shown], np.array([f.latency_ms for f in shown])
    for axes, values in ((taken, places), (sure, sure_of), (spent, latency)):
        axes.scatter(time, values, s=14, c=[colours[place] for place in places], linewidths=0, zorder=2)
    # Any frame of a column, not the slowest alone: what the budget cuts is what it keeps from being slow.
    cut = np.array([any(frame.stopped_by == "budget" for frame in frames[i : i + step]) for i in starts])
    if cut.any():
        taken.scatter(
            time[cut], places[cut], s=44, facecolors="none", edgecolors=ALARM, linewidths=1, label="cut by the budget"
        )
        taken.legend(frameon=False, loc="lower right", labelcolor=LIGHT.muted)
    taken.set_yticks(range(len(colours)), [f"exit {i}" for i in timeline.exit_indices])
    # The axis points down: shallow exits above, as in every table.
    taken.set_ylim(len(colours) - 0.5, -0.5)
    taken.set_ylabel("exit taken")
    sure.set_ylim(min(sure_of) - 0.04, min(1.01, max(sure_of) + 0.04))
    sure.set_ylabel("image confidence")
    _draw_latency(spent, timeline, latency)
    spent.set_xlabel("time in the video, s")
    for axes in (taken, sure, spent):
        axes.set_facecolor(LIGHT.paper)
        style(axes, LIGHT)
    taken.set_title(
        textwrap.fill(timeline.describe(), 115), loc="left", color=LIGHT.ink, fontsize=12, pad=12, parse_math=False
    )
    return figure


def _draw_latency(axes: Axes, timeline: Timeline, latency: NDArray[np.float64]) -> None:
    budget = timeline.frame_budget_ms
    # Rare peaks (a page fault, another program) would flatten the rest: they are drawn as arrows at the edge.
    top = 1.15 * max(float(np.percentile(latency, 99)), budget or 0.0)
    above = latency > top
    # The times of the points that were scattered just before.
    x = np.asarray(axes.collections[0].get_offsets())[:, 0]
    axes.plot(x[above], np.full(above.sum(), 0.97 * top), "^", ms=6, color=ALARM, mec="none", label="higher still")
    axes.set_ylim(0, top)
    axes.set_ylabel("latency, ms")
    if budget is not None:
        axes.axhline(budget, color=LIGHT.ink, lw=1.2, ls=(0, (5, 4)), zorder=1, label=f"budget, {budget:g} ms")
    if budget is not None or above.any():
        handles = axes.get_legend_handles_labels()[0]
        shown = [handle for handle in handles if above.any() or handle.get_label() != "higher still"]
        axes.legend(handles=shown, frameon=False, loc="lower right", labelcolor=LIGHT.muted)
