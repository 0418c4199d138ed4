"""Exits, heads and thresholds for a run: those that its recipe asks for, and one for an objective of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from messnet.errors import InfeasibleError
from messnet.records.costs import CostTable
from messnet.records.exit_tables import ExitTables
from messnet.records.instance import Instance
from messnet.records.measurements import Front
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
from messnet.searching.options import SearchOptions

__all__ = ["search_all", "search_run"]


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
