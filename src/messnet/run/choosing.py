"""Exits, heads and thresholds for a run: those that its recipe asks for, and one for an objective of the user's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from messnet.errors import InfeasibleError, RecipeError
from messnet.records.costs import CostTable
from messnet.records.exit_tables import ExitTables
from messnet.records.instance import Exit, Instance
from messnet.records.measurements import Front
from messnet.records.names import Precision
from messnet.records.run_directory import RunDirectory
from messnet.searching import (
    AnytimeObjective,
    Guarantee,
    Objective,
    SearchResult,
    SearchSetting,
    certify,
    choose,
    pareto_front,
    search_for,
)
from messnet.searching.measure import CostMeasure, baseline_miou_of
from messnet.searching.options import SearchOptions

__all__ = ["Alternative", "best_of", "search_all", "search_precisions", "search_run"]

_BYTES: dict[Precision, int] = {"f32": 4, "bf16": 2, "f16": 2, "int8": 1}


def search_all(tables: ExitTables, costs: CostTable, options: SearchOptions) -> tuple[Front, list[Instance]]:
    """The best accuracy at no more work than the model, and the least work for each drop, on the selection half."""
    tables = tables.subset(tables.halves(options.seed)[0])
    fronts = {
        setting: pareto_front(
            tables, costs, setting=setting, grid=options.grid, time_limit=options.time_limit, progress=True
        )
        for setting in ("budgeted", "input_dependent")
    }
    # The names of the paper's two questions: the best accuracy for the work, the least work for the accuracy.
    objectives = {"max-miou": Objective(maximise="miou", max_cost_ratio=1.0)}
    objectives |= {f"drop-{drop:g}pp": Objective(minimise="macs", max_drop_pp=drop) for drop in options.max_drops_pp}
    instances, verdicts, skipped = [], [], []
    for name, objective in objectives.items():
        try:
            if fronts["input_dependent"].proof.optimal:
                result = choose(fronts["input_dependent"], objective, name=name)
            else:  # one objective is proved sooner than the whole front
                limit = options.time_limit
                result = search_for(
                    tables, costs, objective, grid=options.grid, name=name, time_limit=limit, progress=True
                )
        except InfeasibleError as error:
            skipped.append(f"{name}: {error}")
            continue
        instances.append(result.instance)
        verdicts.append(f"{name}: {result.verdict}; {result.certificate}")
    points = {key: [(point.cost, point.miou) for point in front.points] for key, front in fronts.items()}
    return Front(fronts=points, names=list(objectives), verdicts=verdicts, skipped=skipped), instances


def search_run(
    directory: RunDirectory,
    options: SearchOptions,
    objective: Objective | AnytimeObjective,
    *,
    name: str,
    setting: SearchSetting = "input_dependent",
    costs: Sequence[Path] = (),
    guarantee: Guarantee | None = None,
    time_limit: float | None = None,
) -> SearchResult:
    """One more instance in the run at ``directory``, beside those of its recipe, whose ``options`` hold for it too. It
    needs the run's tables, not its network, and so no torch. The half that it is not selected on is what a guarantee
    calibrates on, all of it: the certificate is then the report. Several cost tables: the least bad over these
    devices."""
    devices = [directory.costs(path) for path in costs or (None,)]
    tables = directory.tables_for(devices)
    selection, calibration = (tables.subset(half) for half in tables.halves(options.seed))
    limit = options.time_limit if time_limit is None else time_limit
    result = search_for(
        selection,
        devices,
        objective,
        setting=setting,
        grid=options.grid,
        name=name,
        time_limit=limit,
        progress=True,
    )
    if guarantee is not None:
        result = certify(result, guarantee, selection=selection, calibration=calibration, costs=devices)
    result = replace(result, instance=replace(result.instance, precision=tables.precision))
    directory.instance(name).write(result.instance)
    return result


class Alternative(NamedTuple):
    """One precision in one runtime, with the user's whole model and the best instance in it, on the selection half."""

    name: str
    """Runtime and precision, as "onnxruntime int8"."""
    model: tuple[float, float, float]
    """mIoU in [0, 1], cost, and megabytes of weights of the whole model."""
    result: SearchResult | None
    megabytes: float = 0.0
    """Weights of the instance."""
    why_none: str = ""
    """Why no instance meets the objective here."""


def search_precisions(
    directory: RunDirectory,
    options: SearchOptions,
    objective: Objective,
    costs: Sequence[Path],
    *,
    name: str,
    setting: SearchSetting = "input_dependent",
    time_limit: float | None = None,
) -> list[Alternative]:
    """The search of ``search_run`` where the precision is one more choice: one cost table for each precision and
    runtime, all of one device. Drops and ratios are against the model of the first table.

    The best instance of all is written into the run. Raises InfeasibleError where no precision has one, RecipeError for
    tables of several devices.
    """
    devices = [directory.costs(path) for path in costs]
    if len({(one.conditions.get("device"), one.conditions.get("threads")) for one in devices}) > 1:
        raise RecipeError(
            "costs in several precisions are compared on one device with as many threads: measure them so"
        )
    every = [directory.tables_for([one]) for one in devices]
    selected = [tables.subset(tables.halves(options.seed)[0]) for tables in every]
    asked = _in_absolute_terms(objective, selected[0], devices[0])
    limit = options.time_limit if time_limit is None else time_limit
    found = []
    for table, tables in zip(devices, selected, strict=True):
        kind = f"{str(table.conditions.get('runtime', 'counted')).partition(' ')[0]} {tables.precision}"
        final = np.full(len(tables.image_names), tables.final)
        megabytes = _megabytes(table, [table.final_exit], tables.precision)
        model = tables.miou(final), table.total(objective.cost_name), megabytes
        try:
            result = search_for(
                tables, table, asked, setting=setting, grid=options.grid, name=name, time_limit=limit, progress=True
            )
        except InfeasibleError as error:
            found.append(Alternative(kind, model, None, why_none=str(error)))
            continue
        instance = replace(result.instance, precision=tables.precision)
        megabytes = _megabytes(table, [choice.exit for choice in instance.exits], tables.precision)
        found.append(Alternative(kind, model, replace(result, instance=instance), megabytes))
    directory.instance(name).write(best_of(found).instance)
    return found


def best_of(alternatives: Sequence[Alternative]) -> SearchResult:
    """The result that serves the objective best. Raises InfeasibleError where there is none."""
    results = [one.result for one in alternatives if one.result is not None]
    if not results:
        raise InfeasibleError("; ".join(f"{one.name}: {one.why_none}" for one in alternatives))

    def key(result: SearchResult) -> tuple[float, float]:
        miou, cost = result.selection.miou, result.selection.cost
        return (-miou, cost) if isinstance(result.objective, Objective) and result.objective.maximise else (cost, -miou)

    return min(results, key=key)


def _in_absolute_terms(objective: Objective, tables: ExitTables, costs: CostTable) -> Objective:
    """The objective without drops and ratios, which would be another model's in another precision."""
    least = objective.least_miou(baseline_miou_of(tables))
    largest = CostMeasure.of(objective, costs).largest(objective)
    limits = [
        replace(limit, relative=False, at_most=limit.at_most * costs.total(limit.cost)) if limit.relative else limit
        for limit in objective.limits_on
    ]
    return replace(
        objective,
        max_drop_pp=None,
        min_miou=max(least, 0.0) if math.isfinite(least) else None,
        max_cost_ratio=None,
        max_cost=largest if math.isfinite(largest) else None,
        limits_on=tuple(limits),
    )


def _megabytes(costs: CostTable, exits: Sequence[Exit], precision: Precision) -> float:
    return float(costs.column("parameters", exits).leaving()[-1]) * _BYTES[precision] / 1e6
