"""A search's answer in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from messnet.searching.results import Front, FrontPoint

__all__ = ["amount", "certificate_of", "difference", "words"]

_UNITS = {
    "macs": (1e9, "GMACs"),
    "macs_paper": (1e9, "GMACs in the posters' count"),
    "parameters": (1e6, "million parameters"),
    "memory_bytes": (2.0**20, "MiB"),
    "latency_ms": (1.0, "ms"),
    "latency_p95_ms": (1.0, "ms (95th percentile)"),
}


def certificate_of(
    declared: int,
    evaluated: int,
    stopped: str,
    *,
    gap_miou: float,
    gap_cost: float | None = None,
    exact_from: float = np.inf,
    precision: float = 0.0,
) -> str:
    """What was proved; a front that is proved from some mIoU on says so."""
    grid = f"the declared grid of {spaced(declared)} instances"
    if not gap_miou and not gap_cost:
        return f"optimal over {grid}: {spaced(evaluated)} were evaluated, all others were bounded"
    how = f"to {100 * precision:.2g} pp" if precision else "exact"
    if not stopped:
        done = f"{spaced(evaluated)} were evaluated, all others were bounded"
        return f"no instance of {grid} has a larger mIoU at its cost by more than {100 * gap_miou:.2g} pp: {done}"
    why = f"stopped ({stopped}) after {spaced(evaluated)} of {grid}"
    if gap_miou == np.inf:
        return f"{why}: the best of those, nothing is proved of the others"
    proved = f"no other has a larger mIoU at its cost by more than {100 * gap_miou:.2g} pp"
    if exact_from < np.inf:
        proved = f"{how} at mIoU >= {exact_from:.4f}; below, {proved}"
    if gap_cost is not None and gap_cost < np.inf:
        proved = f"within {100 * gap_cost:.2g} % of the least cost; {proved}"
    return f"{why}: {proved}"


def difference(front: Front, best: FrontPoint, rival: FrontPoint) -> str:
    more = f"{100 * (best.cost / rival.cost - 1):+.1f} %" if rival.cost else f"{best.cost:+.4g}"
    return f"{100 * (best.miou - rival.miou):+.2f} pp mIoU, {more} {front.cost_name}"


def words(point: FrontPoint, front: Front) -> str:
    exits = " > ".join(f"{choice.exit_index}:{choice.head}" for choice in point.instance.exits)
    cost = amount(front.cost_name, point.cost, front.baseline_cost)
    return f"mIoU {100 * point.miou:.2f} % at {cost} (exits {exits})"


def amount(name: str, cost: float, of_model: float) -> str:
    """A cost with its unit; over several devices costs are relative to the model, whose own is then 1."""
    if of_model == 1.0:
        return f"{cost:.3g}x the model's {name}"
    scale, unit = _UNITS[name]
    return f"{cost / scale:.4g} {unit}"


def spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")
