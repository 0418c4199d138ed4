"""Does an early exit pay? What a cost table says of it before anything is trained.

An image that goes on pays the exit's head and decision on top of the model; one that leaves is spared the rest of the
model. To win back what the others pay, of all images at least the share

    (head + decision) / (model - segments to the exit - output)

must leave.
"""

from __future__ import annotations

from dataclasses import dataclass

from messnet.errors import RecipeError
from messnet.records.costs import CostTable
from messnet.records.instance import Exit
from messnet.records.names import CostName

_PAID_BY_AN_IMAGE = ("macs", "macs_paper", "latency_ms", "latency_p95_ms")
_DISAGREEMENT = 0.1  # between workload and latency, relative to the model


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """One early exit beside the user's own model, whose cost is 1."""

    exit: Exit
    cut: float
    """The static model cut here: segments, head, output."""
    saving: float
    """What an image that leaves is spared, the decision paid; negative where the exit is dearer than the model."""
    surcharge: float
    """Head and decision: what an image that goes on pays more."""
    share: float
    """Of the images, that must leave for the mean to be the model's own; infinite where nothing is left to save."""

    @property
    def pays(self) -> bool:
        return self.share < 1


def break_even(costs: CostTable, exit: Exit, name: CostName = "macs") -> BreakEven:
    """Raises RecipeError for a cost that is not paid by an image, RunError for one that the table does not hold."""
    if name not in _PAID_BY_AN_IMAGE:
        raise RecipeError(f"no image pays {name}: expected one of {', '.join(_PAID_BY_AN_IMAGE)}")
    model, column = costs.total(name), costs.column(name, [exit])
    cut, head, decision = column.leaving()[0], column.heads[0], column.policies[0]
    # ``cut`` is segments + head + output, so cut - head is what an image pays up to this exit and for its labels,
    # whatever becomes of the head: the rest is what is left to save, the divisor of the module's formula.
    rest = model - (cut - head)
    return BreakEven(
        exit=exit,
        cut=float(cut / model),
        saving=float(1 - (cut + decision) / model),
        surcharge=float((head + decision) / model),
        share=float((head + decision) / rest) if rest > 0 else float("inf"),
    )


def verdict(costs: CostTable, name: CostName = "macs") -> list[str]:
    """A sentence for each early exit point with its cheapest head, then the conclusion; for a latency also where the
    workload says otherwise. Raises as ``break_even``."""
    exits = _cheapest(costs, name)
    if not exits:
        return ["no early exit has a head, so nothing can be saved"]
    where = "on this device" if name.startswith("latency") else "in workload"
    words = [_describe(one, where) for one in exits]
    best, paying = max(exits, key=lambda one: one.saving), [one for one in exits if one.pays]
    if paying:
        words.append(
            f"an early exit can save at most {best.saving:.0%} {where}, if every image left at exit "
            f"{best.exit.exit_index}; the model cut there, which decides nothing, saves {1 - best.cut:.0%}"
        )
    else:
        words.append(f"no early exit ever pays {where}: head and decision cost more than what is left of the model")
    return words + (_disagreements(costs, exits, name) if name.startswith("latency") else [])


def _cheapest(costs: CostTable, name: CostName) -> list[BreakEven]:
    """The cheapest head of every early exit point, shallow to deep."""
    found: dict[int, BreakEven] = {}
    for exit in costs.heads:
        if exit != costs.final_exit:
            one = break_even(costs, exit, name)
            # Segments and decision are the same for all heads of a point, so the least surcharge is the cheapest head.
            rival = found.setdefault(exit.exit_index, one)
            found[exit.exit_index] = min(rival, one, key=lambda each: each.surcharge)
    return [found[index] for index in sorted(found)]


def _describe(one: BreakEven, where: str) -> str:
    verb = "saves" if one.saving >= 0 else "loses"
    pays = f"pays once {one.share:.1%} of the images leave" if one.pays else f"never pays {where}"
    return (
        f"exit {one.exit.exit_index} ({one.exit.head}): the model cut here costs {one.cut:.2f}x; an image that leaves "
        f"{verb} {abs(one.saving):.0%}, one that goes on pays {one.surcharge:.1%} more: {pays}"
    )


def _disagreements(costs: CostTable, exits: list[BreakEven], name: CostName) -> list[str]:
    words = []
    for one in exits:
        workload = break_even(costs, one.exit)
        if abs(one.cut - workload.cut) > _DISAGREEMENT or one.pays != workload.pays:
            pays = f", and an early exit {'pays' if workload.pays else 'never pays'}" * (one.pays != workload.pays)
            words.append(
                f"workload says otherwise of exit {one.exit.exit_index}: cut here {workload.cut:.2f}x, not "
                f"{one.cut:.2f}x{pays}"
            )
    return words or [f"workload agrees: within {_DISAGREEMENT:g}x of the latency at every exit"]
