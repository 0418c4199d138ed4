"""The chosen instances on validation images: what they did, how fast, and pictures of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from messnet.costs.latency import LatencyOptions, device_name
from messnet.data import SegmentationDataset
from messnet.deployment.session import Session
from messnet.deployment.side_by_side import Running, make_gallery, run_side_by_side
from messnet.errors import RunError
from messnet.profiling import profile
from messnet.records.costs import CostTable
from messnet.records.exit_tables import ExitTables
from messnet.records.instance import Exit, Instance, whole_model
from messnet.records.iou import chance_miou, class_iou
from messnet.records.measurements import Delivered, Gallery, Measurement, Measurements, known
from messnet.records.run_directory import DEPLOYED
from messnet.run.run import Run
from messnet.searching.cross_fitting import error_of_drop
from messnet.searching.findings import Findings
from messnet.searching.grid import cost_of, route
from messnet.searching.measure import Routed

_NUM_WORST = 3


def measure_instances(run: Run, findings: Findings) -> tuple[Measurements, Gallery | None]:
    """The baseline and every instance on validation images, one image at a time; pictures where there is an instance
    to show. All images where what to expect of new ones is cross-fitted, else the half that nothing was selected on."""
    tables, costs, val = run.tables(), run.costs(), run.dataset("val")
    selection, half = tables.halves(run.recipe.search.seed)
    selections = [tables.subset(selection)]
    if findings.protocol == "cross_fitted":
        # A guarantee, and the other protocol, select on the half: such an instance is shown, and said to be so.
        selection = half = np.arange(len(tables.image_names))
        selections.append(tables)
    reported, tables_reported = half.tolist(), tables.subset(half)
    found, left_out = _found(run, findings, selections)
    instances = [whole_model(tables.exits[tables.final]), *found]
    exits = sorted({choice.exit for instance in instances for choice in instance.exits})
    # Before the sessions take the network over: parts are timed on a copy of it.
    latency = LatencyOptions(device=str(run.device), max_seconds=20)
    predicted = profile(run.network(exits), costs.input_size, latency=latency)
    sessions = _sessions(run, instances, exits)
    samples = ((val[v].image, val[v].mask) for v in reported)
    runnings = run_side_by_side(sessions, samples, len(tables.class_names))
    measurements = Measurements(
        device=_device_in_words(run.device),
        input_size=costs.input_size,
        image_names=list(tables_reported.image_names),
        difficulty=known(tables_reported.difficulty),
        final_exit_error=known(runnings[0].errors),
        num_selection_images=len(selection),
        rows=[measurement_of(*one, tables_reported, costs, predicted) for one in zip(instances, runnings, strict=True)],
        left_out=left_out,
        chance_miou=known([chance_miou(tables_reported.labelled.sum(0, dtype=np.int64))])[0],
        class_names=list(tables.class_names),
        delivered=_delivered(tables_reported, is_kept=not run.recipe.pretrain.iterations),
    )
    errors = [running.errors for running in runnings]
    return measurements, _gallery(val, reported, sessions, measurements.rows, errors)


def _delivered(tables: ExitTables, *, is_kept: bool) -> Delivered | None:
    if tables.delivered is None:
        return None
    intersection, predicted = tables.delivered.sum(0, dtype=np.int64)
    iou = class_iou(intersection, predicted, tables.labelled.sum(0, dtype=np.int64))
    return Delivered(miou=float(np.nanmean(iou)), class_iou=known(iou), is_kept=is_kept)


def _found(run: Run, findings: Findings, selections: Sequence[ExitTables]) -> tuple[list[Instance], list[str]]:
    """The instances of the recipe, then those of the user's own searches; and the names of those that are left out,
    see ``Measurements.left_out``."""
    # A dictionary keeps the order and drops what is named twice.
    names = dict.fromkeys((*findings.names, *run.directory.instance_names()))
    found, left_out = [], []
    for name in names:
        file = run.directory.instance(name)
        if not file.exists:
            continue
        instance = file.read()
        if name == DEPLOYED and instance.precision != selections[0].precision:
            continue  # it has a table of its own
        if any(_was_selected_on(selection, instance) for selection in selections):
            found.append(instance)
        else:
            left_out.append(instance.name)
    return found, left_out


def _was_selected_on(selection: ExitTables, instance: Instance) -> bool:
    """Whether these images give the mIoU that the instance's search noted: to the last digits no others do."""
    if any(choice.exit not in selection.exits for choice in instance.exits):
        return False
    try:
        return abs(Routed.through(selection, instance).miou - instance.selected_on.get("miou", np.inf)) < 1e-9
    except RunError:  # of a policy or a threshold that the tables do not have
        return False


def _sessions(run: Run, instances: Sequence[Instance], exits: Sequence[Exit]) -> list[Session]:
    """One network for all of them, with the heads of all."""
    net, blueprint = run.trained(exits).float(), run.blueprint()
    return [
        Session(
            net,
            instance,
            class_names=blueprint.class_names,
            palette=np.array(blueprint.palette, np.uint8),
            device=str(run.device),
            input_size=blueprint.input_size,
        )
        for instance in instances
    ]


def measurement_of(
    instance: Instance, running: Running, tables: ExitTables, costs: CostTable, predicted: CostTable
) -> Measurement:
    """One row: an instance, what it did on the images of ``tables``, the workload, and the times of its parts."""
    routing = route(tables, instance)
    return Measurement(
        instance=instance,
        miou=running.miou(),
        miou_from_tables=tables.miou(routing),
        macs=float(cost_of(tables, costs, instance, "macs").mean()),
        macs_paper=float(cost_of(tables, costs, instance, "macs_paper").mean()),
        exit_taken=running.exit_taken,
        image_confidence=running.image_confidence,
        latency_ms=running.latency_ms,
        predicted_ms=cost_of(tables, predicted, instance, "latency_ms").tolist(),
        miou_change_error=known([error_of_drop(tables, routing)])[0],
        confusion=running.confusion.tolist(),
    )


def _gallery(
    val: SegmentationDataset,
    reported: Sequence[int],
    sessions: Sequence[Session],
    rows: Sequence[Measurement],
    errors: Sequence[Sequence[float]],
) -> Gallery | None:
    """An image that stopped early and one that went deep, through the instance whose images spread most, and those that
    it gets most wrong by its ``errors``, shares of pixels of each image by row."""
    if len(sessions) < 2:
        return None
    # Row 0 is the whole model, which has one exit.
    chosen = max(range(1, len(sessions)), key=lambda i: rows[i].spread())
    session, row = sessions[chosen], rows[chosen]
    # From shallow to deep, and from unsure to sure among those that left together; the tenth from either end.
    order = np.lexsort((row.image_confidence, row.exit_taken))
    first, last = int(order[len(order) // 10]), int(order[-1 - len(order) // 10])
    wrong = np.nan_to_num(np.array(errors[chosen], np.float64), nan=-1.0)  # nothing is known without a labelled pixel
    worst = [int(v) for v in np.argsort(-wrong, kind="stable")[:_NUM_WORST] if wrong[v] > 0]
    samples = {v: val[reported[v]] for v in dict.fromkeys((first, last, *worst))}
    size = samples[first].mask.shape
    # The gallery is one array: pictures of another size are left out.
    shown = {v: sample for v, sample in samples.items() if sample.mask.shape == size}
    return make_gallery(
        session,
        [(sample.name, sample.image, sample.mask) for sample in shown.values()],
        [row.exit_taken[v] for v in shown],
        [shown[v].name for v in worst if v in shown],
    )


def _device_in_words(device: torch.device) -> str:
    """Processor or accelerator, threads, runtime and dtype: what a latency was measured on."""
    if device.type == "cuda":
        return f"{device_name(device)}, torch {torch.__version__} eager float32"
    threads = torch.get_num_threads()
    plural = "s" if threads > 1 else ""
    return f"{device_name(device)}, {threads} thread{plural}, torch {torch.__version__} eager float32"
