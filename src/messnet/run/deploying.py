"""The end of a run: the fastest instance in every precision of a runtime, and what it gains there over the model."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch

from messnet.costs.latency import DType, LatencyOptions, device_name
from messnet.deployment.export import export
from messnet.deployment.graphs import MadeStages
from messnet.deployment.measurement import measure_heads
from messnet.deployment.quantising import CALIBRATION, EightBits
from messnet.deployment.restoring import graph_runner
from messnet.deployment.session import Session
from messnet.deployment.side_by_side import run_side_by_side
from messnet.deployment.torch_runner import TorchRunner
from messnet.policy.policy import Policy
from messnet.records.deployed import Deployed, DeployedRow
from messnet.records.instance import Instance, whole_model
from messnet.records.names import DTYPES, Precision
from messnet.records.run_directory import DEPLOYED
from messnet.run.choosing import search_precisions
from messnet.run.reporting import measurement_of
from messnet.run.run import Run
from messnet.searching.objective import Objective

_SECONDS = 10.0
"""For the costs of all parts in one precision and one head of each exit."""
_COMPARED = 8
"""Images that a bundle's graphs are compared with torch on: its accuracy is known from the tables."""


def deploy(run: Run, made: MadeStages) -> Deployed:
    """What every head costs in each precision, the fastest instance that loses at most ``deploy.max_drop_pp`` in each,
    all of them beside the model, in turns, and a bundle of the fastest of all, be it the model in one precision. The
    tables of the precisions are there; ``made`` as for ``graph_runner``, of the trained network. Costs are kept when
    this is stopped and called again."""
    options, directory, val = run.recipe.deploy, run.directory, run.dataset("val")
    threads = options.threads or torch.get_num_threads()
    # Costs first, one precision after the other: the search compares what was measured on this machine just now.
    files = _measure(run, threads, made)
    objective = Objective(minimise="latency_ms", max_drop_pp=options.max_drop_pp)
    found = search_precisions(directory, run.recipe.search, objective, files, name=DEPLOYED)
    # The instance of that name is another one now, so that a record of before would tell of what is gone.
    directory.deployed.discard()
    costs = [directory.costs(file) for file in files]
    tables = [directory.tables_for([one]) for one in costs]
    model = whole_model(tables[0].exits[tables[0].final])
    pairs: list[tuple[Precision, Instance]] = [(precision, model) for precision in options.precisions]
    pairs += [(one.result.instance.precision, one.result.instance) for one in found if one.result]
    sessions, megabytes = _sessions(run, pairs, threads, made)
    if options.precisions[0] == "f32":  # the model as training left it: what a runtime alone gains
        net = run.trained([model.exits[0].exit])
        weights = sum(tensor.nbytes for tensor in net.model_state_dict().values())
        pairs.append(("f32", model))
        sessions.append(Session(TorchRunner(net, Policy.parse(model.policy), threads=threads), model))
        megabytes.append(weights / 1e6)
    # In turns, image by image: a machine that slows down slows all of them down.
    samples = ((val[v].image, val[v].mask) for v in range(len(val)))
    runnings = run_side_by_side(sessions, samples, len(tables[0].class_names))
    rows = []
    for (precision, instance), session, running, size in zip(pairs, sessions, runnings, megabytes, strict=True):
        place = options.precisions.index(precision)
        # Changes are counted against the model in the first precision, whichever the row is in.
        own = tables[place] if tables[0].delivered is not None else tables[place].with_delivered(tables[0])
        rows.append(
            DeployedRow(
                runtime=session.runner.runtime,
                precision=precision,
                megabytes=size,
                is_model=instance is model,
                row=measurement_of(instance, running, own, directory.profile.read(), costs[place]),
            )
        )
    deployed = Deployed(
        device=f"{device_name(torch.device('cpu'))}, {threads} thread{'s' * (threads > 1)}, "
        f"{sessions[0].runner.conditions['runtime']}",
        threads=threads,
        max_drop_pp=options.max_drop_pp,
        rows=rows,
        missing=[f"{one.name}: {one.why_none}" for one in found if one.result is None],
    )
    deployed = replace(deployed, ships=deployed.chosen)
    if deployed.best.is_model:  # early exits gain too little beside the precision: what ships has none
        directory.instance(DEPLOYED).write(replace(model, name=DEPLOYED, precision=deployed.best.precision))
    _bundle(run, directory.read_instance(DEPLOYED), made)
    return deployed


def _measure(run: Run, threads: int, made: MadeStages) -> list[Path]:
    """For each precision the file of what every head that has weights costs; what was measured before a kill is kept,
    if it was of the same weights on the same device."""
    options, policy, checkpoint = run.recipe.deploy, run.recipe.evaluate.policies[0], run.checkpoint("deploy")
    origin = run.directory.tables.read().origin
    key = f"{origin} {options.runtime} {threads} {device_name(torch.device('cpu'))}"
    state, done, files = checkpoint.load() or {}, list[str](), []
    for precision in options.precisions:
        file = run.directory.measured(f"{DEPLOYED}-{options.runtime}-{precision}")
        files.append(file.path)
        if state.get("key") != key or precision not in cast("list[str]", state["measured"]) or not file.exists:
            dtype = cast("DType", DTYPES[precision])
            how = LatencyOptions(dtype=dtype, threads=threads, max_seconds=_SECONDS, tolerance=0.01)
            runner = partial(graph_runner, calibration=run.calibration() if precision == "int8" else [], made=made)
            net, workload = run.trained(), run.directory.profile.read()
            file.write(measure_heads(net, workload, how, runtime=options.runtime, policy=policy, make_runner=runner))
        done.append(precision)
        checkpoint.save({"key": key, "measured": done})
    return files


def _sessions(
    run: Run, pairs: Sequence[tuple[Precision, Instance]], threads: int, made: MadeStages
) -> tuple[list[Session], list[float]]:
    """A session for each, and the megabytes of its graphs."""
    options, size = run.recipe.deploy, run.blueprint().input_size
    net = run.trained(sorted({choice.exit for _, instance in pairs for choice in instance.exits}))
    calibration = run.calibration() if "int8" in options.precisions else []
    runner = partial(graph_runner, runtime=options.runtime, threads=threads, calibration=calibration, made=made)
    sessions, megabytes = [], []
    for precision, instance in pairs:
        opened = runner(net, instance, size, precision=precision)
        sessions.append(Session(opened, instance))
        megabytes.append(opened.num_bytes / 1e6)
    return sessions, megabytes


def _bundle(run: Run, instance: Instance, made: MadeStages) -> Path:
    """The instance, in its own precision, as all that a device needs."""
    val, path = run.dataset("val"), run.directory.bundle
    chosen = np.linspace(0, len(val) - 1, min(_COMPARED, len(val))).astype(int).tolist()
    samples = [val[v] for v in chosen]
    in_int8 = instance.precision == "int8"
    eight_bits = EightBits(
        calibration=run.calibration() if in_int8 else [],
        samples=[(one.image, one.mask) for one in samples],
        max_loss_pp=100.0,  # judged by the search, on all images
        origin={"source": "training images", "seed": CALIBRATION.seed},
    )
    # A bundle of an earlier call: the verb may be repeated.
    shutil.rmtree(path, ignore_errors=True)
    export(
        run.directory.path,
        path,
        instance=instance.name,
        graphs=not in_int8,
        eight_bits=eight_bits if in_int8 else None,
        weights=False,
        images=[one.image for one in samples],
        made=made,
    )
    return path
