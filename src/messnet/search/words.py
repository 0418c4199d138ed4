"""A search's answer in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from messnet.search.results import Front, FrontPoint

__all__ = ["certificate_of", "difference", "words"]


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
    return f"mIoU {point.miou:.4f} at {point.cost:.4g} {front.cost_name} (exits {exits})"


def spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")
