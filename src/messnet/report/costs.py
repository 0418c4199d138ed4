"""A cost table for people: the terminal table of ``messnet profile`` and the sentences under it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from messnet.costs.break_even import verdict
from messnet.records.costs import CostTable
from messnet.records.instance import FINAL_HEAD, Exit

_NUM_OPERATORS = 6  # that are named
_ADDITIVE = 0.1  # median error up to which the parts tell the whole (docs/method.md#costs)


def cost_table(costs: CostTable, points: Sequence[tuple[str, str]]) -> Table:
    """A row for each of the N exit points, given as (module, features); milliseconds where they were measured."""
    measured = bool(costs.conditions)
    more = ("ms", "share", "heads ms", "policy", "output") if measured else ("features", "heads", "GMACs each")
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title_justify="left")
    table.title = f"{costs.model} at {costs.input_size[0]}x{costs.input_size[1]}"
    for column in ("exit", "after", "GMACs", "share", *more):
        place = column == "after"  # a module's path may be long: it alone is folded
        table.add_column(column, justify="left" if place else "right", no_wrap=not place, overflow="fold")
    for i, (module, features) in enumerate(points):
        # Heads are not added up: an instance has one at an exit, so their span is what can be chosen from.
        heads = [part for exit, part in costs.heads.items() if exit.exit_index == i]
        so_far = costs.column("macs", []).prefix(i)
        cells = [f"{so_far / 1e9:.4f}", f"{so_far / costs.total_macs():.0%}"]
        if measured:
            so_far = costs.column("latency_ms", []).prefix(i)
            cells += [f"{so_far:.2f}", f"{so_far / costs.total('latency_ms'):.0%}"]
            cells += [_span([part.latency_ms or 0 for part in heads], 2)]
            cells += [f"{costs.policies[i].latency_ms:.2f}" if i < len(costs.policies) else ""]
            cells += [f"{costs.outputs[i].latency_ms:.2f}"]
        else:
            cells += [features, str(len(heads)), _span([part.macs / 1e9 for part in heads], 4)]
        table.add_row("final" if Exit(i, FINAL_HEAD) in costs.heads else str(i), module, *cells)
    return table


def cost_notes(costs: CostTable) -> list[str]:
    """The model's own figures, what was not counted, the conditions of a measurement, and the verdict."""
    notes = [
        f"whole model: {costs.total_macs() / 1e9:.3f} GMACs ({costs.total_macs('paper') / 1e9:.3f} in the paper's "
        f"count), {costs.total('parameters') / 1e6:.2f} M parameters, {costs.total('memory_bytes') / 2**20:.1f} MiB of "
        f"activations at most"
    ]
    # What counts nothing may still take time: it is named, the most frequent first, so that nobody takes MACs for all.
    calls = sorted(costs.uncounted.items(), key=lambda item: -item[1])
    named = ", ".join(f"{name} {num}x" for name, num in calls[:_NUM_OPERATORS])
    more = f" and {len(calls) - _NUM_OPERATORS} more" if len(calls) > _NUM_OPERATORS else ""
    operators = sorted(costs.operators.items(), key=lambda item: -item[1])
    counted = ", ".join(f"{name} {macs / costs.total_macs():.1%}" for name, macs in operators)
    if counted:
        notes.append(f"counted: {counted}; not counted: {named or 'nothing'}{more}")
    if costs.conditions:
        words = ", ".join(f"{key} {value}" for key, value in costs.conditions.items())
        notes.append(f"whole model: {costs.total('latency_ms'):.2f} ms ({words})")
        if not costs.additivity:
            notes.append("the sum of the parts was not checked: sessions run one image at a time")
    if costs.additivity:
        off = costs.additivity["median_error"]
        notes.append(
            f"the sum of the parts is {off:.1%} off measured instances (median of "
            f"{costs.additivity['num_instances']:.0f}), {costs.additivity['worst_error']:.1%} at worst"
            + (": is the device busy with something else? measure again" if off > _ADDITIVE else "")
        )
    return [*notes, *verdict(costs, "latency_ms" if costs.conditions else "macs")]


def _span(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    least, most = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return least if least == most else f"{least}-{most}"
