"""Exits, heads and thresholds for a run: those that its recipe asks for, and one for an objective of the user's own."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from messnet.errors import InfeasibleError, RecipeError
from messnet.records.costs import CostTable
from messnet.records.exit_tables import ExitTables
from messnet.records.instance import Exit, Instance
from messnet.records.names import Precision
from messnet.records.run_directory import RunDirectory
from messnet.searching.answers import AnytimeProof, SearchResult, SearchSetting
from messnet.searching.cross_fitting import Folds, answer, search_tightened
from messnet.searching.findings import Findings, Judged, OneFinding
from messnet.searching.guarantee import certify
from messnet.searching.measure import CostMeasure
from messnet.searching.objective import AnytimeObjective, Guarantee, Objective
from messnet.searching.optima import Front, choose, nearest_on, pareto_front, search_for
from messnet.searching.options import SearchOptions

_BYTES: dict[Precision, int] = {"f32": 4, "bf16": 2, "f16": 2, "int8": 1}

JUDGED_DROPS_PP = (
    -4.0,
    -2.0,
    -1.0,
    -0.5,
    0.0,
    0.25,
    0.5,
    0.75,
    1.0,
    1.5,
    2.0,
    2.5,
    3.0,
    4.0,
    5.0,
    6.0,
    8.0,
    10.0,
    15.0,
)
"""Limits on the mIoU drop whose searches make the cross-fitted front."""


class _Budget:
    """Seconds for several searches one after another."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds, self.begun = seconds, time.monotonic()

    def share(self, share: float) -> float | None:
        """A share in [0, 1] of what is left; None: as long as it takes."""
        if self.seconds is None:
            return None
        return share * max(0.0, self.seconds - (time.monotonic() - self.begun))


def search_all(tables: ExitTables, costs: CostTable, options: SearchOptions) -> tuple[Findings, list[Instance]]:
    """The best accuracy at no more work than the model, and the least work for each drop, by the protocol that the
    recipe names: on all images with limits tightened by cross-fitting, or on the selection half as they are."""
    cross_fits = options.protocol == "cross_fitted"
    selection = _selection(tables, options)
    # The front of all images has as long as that of each fold, which share half of what is left by then: so a fold's
    # stands for it. The rest is for objectives whose front is not proved by then.
    budget = _Budget(options.time_limit)
    each = budget.share(1 / (1 + 2 * options.folds) if cross_fits else 0.75)
    fronts = {
        setting: pareto_front(selection, costs, setting=setting, grid=options.grid, time_limit=each, progress=True)
        for setting in ("budgeted", "input_dependent")
    }
    # The names of the paper's two questions: the best accuracy for the work, the least work for the accuracy.
    objectives = {"max-miou": Objective(maximise="miou", max_cost_ratio=1.0)}
    objectives |= {f"drop-{drop:g}pp": Objective(minimise="macs", max_drop_pp=drop) for drop in options.max_drops_pp}
    folds = None
    if cross_fits:
        folds = Folds(
            tables=tables,
            costs=costs,
            grid=options.grid,
            num_folds=options.folds,
            seed=options.seed,
            time_limit=budget.share(1.0),
            progress=True,
        )
    found, instances = [], []
    for number, (name, objective) in enumerate(objectives.items()):
        limit = budget.share(1 / (len(objectives) - number))
        one, result = _search_one(folds, fronts["input_dependent"], selection, costs, objective, options, name, limit)
        found.append(one)
        instances += [result.instance] if result else []
    findings = Findings(
        fronts={key: [(point.cost, point.miou) for point in front.points] for key, front in fronts.items()},
        names=list(objectives),
        protocol=options.protocol,
        judged=_judged(folds) if folds else [],
        found=found,
    )
    return findings, instances


def _search_one(
    folds: Folds | None,
    front: Front,
    selection: ExitTables,
    costs: CostTable,
    objective: Objective,
    options: SearchOptions,
    name: str,
    time_limit: float | None,
) -> tuple[OneFinding, SearchResult | None]:
    tightened = folds.tighten(objective) if folds else None
    searched = objective if tightened is None else tightened.searched
    result: SearchResult | None = None
    if searched is not None:
        results: list[SearchResult] = []
        with suppress(InfeasibleError):  # below, the front says what is nearest
            results.append(choose(front, searched, name=name))
        if not front.proof.optimal:  # one objective is proved sooner than the whole front
            with suppress(InfeasibleError):
                results.append(
                    search_for(
                        selection, costs, searched, grid=options.grid, name=name, time_limit=time_limit, progress=True
                    )
                )
        # With little time left the front may hold better; of two alike the proved one, which comes first.
        result = min(results[::-1], key=_rank, default=None)
    if folds is None or tightened is None:
        why = None if result else nearest_on(front, objective)
    else:
        why = None
        try:
            result = answer(folds, tightened, result, name)
            tightened = result.tightened
        except InfeasibleError:
            result = None
    finding = OneFinding(
        name=name,
        objective=objective,
        proof=result.proof if result and not isinstance(result.proof, AnytimeProof) else None,
        comparison=result.comparison if result else None,
        tightened=tightened,
        is_found=result is not None,
        infeasible=why,
    )
    return finding, result


def _judged(folds: Folds) -> list[Judged]:
    """The cross-fitted front: limits that find what a tighter one found are left out."""
    points: list[Judged] = []
    for drop in JUDGED_DROPS_PP:
        expected = folds.judge(Objective(max_drop_pp=drop))
        if not points or (expected.miou, expected.cost) != (points[-1].expected.miou, points[-1].expected.cost):
            points.append(Judged(max_drop_pp=drop, expected=expected))
    return points


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
    needs the run's tables, not its network, and so no torch. Several cost tables: the least bad over these devices.

    A guarantee is calibrated on the half of the images that its instance was not selected on, all of it: the
    certificate is then the report, and limits are not tightened besides. An anytime instance is selected on all images
    too, with its terms as they are: it has no thresholds that could flatter themselves, and few choices of exits.
    """
    devices = [directory.costs(path) for path in costs or (None,)]
    tables = directory.tables_for(devices)
    limit = options.time_limit if time_limit is None else time_limit
    if guarantee is not None:
        # The bound needs images that had no part in the choice.
        options = replace(options, protocol="two_halves")
    result = _search(tables, devices, objective, options, name=name, setting=setting, time_limit=limit)
    if guarantee is not None:
        selection, calibration = (tables.subset(half) for half in tables.halves(options.seed))
        result = certify(result, guarantee, selection=selection, calibration=calibration, costs=devices)
    # An instance is loaded in the precision that it was judged in.
    result = replace(result, instance=replace(result.instance, precision=tables.precision))
    directory.instance(name).write(result.instance)
    return result


def _search(
    tables: ExitTables,
    devices: Sequence[CostTable],
    objective: Objective | AnytimeObjective,
    options: SearchOptions,
    *,
    name: str,
    setting: SearchSetting,
    time_limit: float | None,
) -> SearchResult:
    """One search by the protocol of a recipe."""
    if options.protocol == "cross_fitted" and isinstance(objective, Objective):
        folds = Folds(
            tables=tables,
            costs=devices,
            setting=setting,
            grid=options.grid,
            num_folds=options.folds,
            seed=options.seed,
            time_limit=time_limit,
            progress=True,
        )
        return search_tightened(folds, objective, name=name)
    return search_for(
        _selection(tables, options),
        devices,
        objective,
        setting=setting,
        grid=options.grid,
        name=name,
        time_limit=time_limit,
        progress=True,
    )


def _selection(tables: ExitTables, options: SearchOptions) -> ExitTables:
    """The images that select."""
    return tables if options.protocol == "cross_fitted" else tables.subset(tables.halves(options.seed)[0])


class Alternative(NamedTuple):
    """One precision in one runtime, with the user's model and the best instance in it, on the images that select."""

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

    Those of mIoU are counted image by image, so that they cross-fit as in one precision. The best instance of all is
    written into the run. Raises InfeasibleError where no precision has one, RecipeError for
    tables of several devices.
    """
    devices = [directory.costs(path) for path in costs]
    if len({(one.conditions.get("device"), one.conditions.get("threads")) for one in devices}) > 1:
        raise RecipeError(
            "costs in several precisions are compared on one device with as many threads: measure them so"
        )
    first, *others = (directory.tables_for([one]) for one in devices)
    # A model that was delivered is in all of them.
    every = [first, *(one if one.delivered is not None else one.with_delivered(first) for one in others)]
    asked = _in_absolute_terms(objective, devices[0])
    limit = options.time_limit if time_limit is None else time_limit
    found = []
    for table, tables in zip(devices, every, strict=True):
        kind = f"{str(table.conditions.get('runtime', 'counted')).partition(' ')[0]} {tables.precision}"
        selection = _selection(tables, options)
        final = np.full(len(selection.image_names), tables.final)
        megabytes = _megabytes(table, [table.final_exit], tables.precision)
        model = selection.miou(final), table.total(objective.cost_name), megabytes
        try:
            result = _search(tables, [table], asked, options, name=name, setting=setting, time_limit=limit)
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
    return min(results, key=_rank)


def _rank(result: SearchResult) -> tuple[float, float]:
    """Smaller is better for the result's objective."""
    miou, cost = result.selection.miou, result.selection.cost
    return (-miou, cost) if isinstance(result.objective, Objective) and result.objective.maximise else (cost, -miou)


def _in_absolute_terms(objective: Objective, costs: CostTable) -> Objective:
    """The objective without ratios of costs, which would be another model's in another precision."""
    largest = CostMeasure.of(objective, costs).largest(objective)
    limits = [
        replace(limit, relative=False, at_most=limit.at_most * costs.total(limit.cost)) if limit.relative else limit
        for limit in objective.limits_on
    ]
    return replace(
        objective,
        max_cost_ratio=None,
        max_cost=largest if math.isfinite(largest) else None,
        limits_on=tuple(limits),
    )


def _megabytes(costs: CostTable, exits: Sequence[Exit], precision: Precision) -> float:
    return float(costs.column("parameters", exits).leaving()[-1]) * _BYTES[precision] / 1e6
