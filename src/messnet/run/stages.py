"""The paper on one page: each stage loads artefacts, calls one function, saves an artefact."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import yaml

from messnet.costs.latency import LatencyOptions, num_threads
from messnet.data import SegmentationDataset
from messnet.deployment.bundle import open_bundle
from messnet.deployment.loading import COSTS, INSTANCES, load, load_instance
from messnet.deployment.measurement import check_additivity, measure_heads, measure_session
from messnet.deployment.restoring import restore_bundle
from messnet.deployment.session import Session
from messnet.deployment.side_by_side import Running, device_in_words, make_gallery, run_side_by_side
from messnet.errors import InfeasibleError, ModelError, RunError
from messnet.evaluation import evaluate, merge_shards
from messnet.network.blueprint import Blueprint
from messnet.network.exit_head import HeadSpace
from messnet.network.multi_exit import MultiExitNet, convert
from messnet.network.weights import load_weights
from messnet.network.zoo import build_model
from messnet.profiling import profile
from messnet.records.costs import CostTable
from messnet.records.exit_tables import ExitTables
from messnet.records.files import writing
from messnet.records.instance import Exit, ExitChoice, Instance
from messnet.records.measurements import Gallery, Measurement, Measurements
from messnet.records.names import GRAPH_RUNTIMES, RuntimeName, precision_of_dtype
from messnet.records.run_directory import RunDirectory
from messnet.report.page import ReportInputs, render_report
from messnet.run.recipe import ModelOptions, recipe_from_record, recipe_to_record
from messnet.run.run import ARTEFACTS, Run, expect_same, fingerprint, parts_fingerprint, tables_origin
from messnet.run.shards import Part, Shard, discard_parts, expect_whole, join, read_parts, unpack, write_part
from messnet.searching import (
    AnytimeObjective,
    Guarantee,
    Objective,
    SearchResult,
    SearchSetting,
    certify,
    choose,
    cost_of,
    pareto_front,
    route,
    search_for,
)
from messnet.training import distill, pretrain, space_exits

__all__ = [
    "STAGES",
    "adopt_pretrained",
    "build_network",
    "distill_stage",
    "follow_stage",
    "measure_run",
    "merge_stage",
    "merge_tables",
    "profile_bundle",
    "profile_model",
    "run_stage",
    "search_run",
]


def build_network(
    options: ModelOptions,
    heads: HeadSpace,
    num_classes: int,
    input_size: tuple[int, int],
    *,
    device: torch.device | str = "cpu",
) -> MultiExitNet:
    """The overprovisioned network: the user's model, converted, with every head of the space. ``device`` is where node
    latencies are measured if they place the exits; the network stays on the CPU."""
    model = build_model(options.name, num_classes, **options.build_options)
    if options.weights:
        load_weights(model, options.weights)  # only to know that they fit before hours are spent
    where = device if options.exit_cost == "latency" else "cpu"
    example = torch.zeros(1, 3, *input_size, device=where)
    net = convert(
        model.to(where),
        example,
        num_exits=options.num_exits,
        exit_points=options.exit_points,
        head=options.head,
        exit_cost=options.exit_cost,
    ).cpu()
    if net.num_classes != num_classes:
        raise ModelError(f"{options.name} gives {net.num_classes} classes, expected {num_classes}")
    _add_heads(net, heads)
    return net


def profile_model(
    options: ModelOptions,
    heads: HeadSpace,
    num_classes: int,
    input_size: tuple[int, int],
    latency: LatencyOptions | None = None,
) -> tuple[MultiExitNet, CostTable]:
    """A model without a run: its network and what it costs, measured too where ``latency`` says how."""
    latency_device, threads = (latency.device, latency.threads) if latency else ("cpu", None)
    with num_threads(threads):
        net = build_network(options, heads, num_classes, input_size, device=latency_device)
    if latency is None:
        return net, profile(net, input_size, model=options.name)
    return net, _measure_costs(net, input_size, latency, model=options.name)


def profile_bundle(
    path: Path, latency: LatencyOptions | None = None, runtime: RuntimeName = "torch"
) -> tuple[MultiExitNet, CostTable]:
    """A bundle's network, cut where its instance ends, and what its own exits cost, as ``profile_model``; measured in
    another ``runtime`` stage by stage."""
    blueprint, net, _ = restore_bundle(open_bundle(path))
    cut = net.num_exits < len(blueprint.exit_points)
    model = f"{blueprint.model} cut after exit {net.num_exits - 1}" if cut else blueprint.model
    if latency is None:
        return net, profile(net, blueprint.input_size, model=model)
    if runtime == "torch":
        return net, _measure_costs(net, blueprint.input_size, latency, model=model)
    precision = precision_of_dtype(latency.dtype)
    session = load(path, runtime=runtime, precision=precision, threads=latency.threads, device=latency.device)
    return net, measure_session(session, profile(net, blueprint.input_size, model=model), latency)


def measure_run(run: Run, latency: LatencyOptions, name: str, runtime: RuntimeName = "torch") -> CostTable:
    """What the run's network costs on this device, every head of it: RUN/costs/NAME.json. Latency asks for no training.
    In a ``runtime`` of graphs, those of all heads are made, and decisions are of the recipe's first policy."""
    blueprint = run.blueprint()
    net = blueprint.build()
    _add_heads(net, run.recipe.heads)
    if runtime not in GRAPH_RUNTIMES:
        costs = _measure_costs(net, blueprint.input_size, latency, model=blueprint.model)
    else:
        workload = profile(net, blueprint.input_size, model=blueprint.model)
        costs = measure_heads(net.eval(), workload, latency, runtime=runtime, policy=run.recipe.evaluate.policies[0])
    run.directory.write(f"{COSTS}/{name}.json", costs.to_json())
    return costs


def profile_stage(run: Run) -> None:
    """Convert the model: candidate exit points, the workload of every segment and head."""
    options, train, val = run.recipe.model, run.dataset("train"), run.dataset("val")
    height, width = val[0].mask.shape
    net = build_network(options, run.recipe.heads, len(train.class_names), (height, width), device=run.device)
    blueprint = Blueprint(
        model=options.name,
        model_options=options.build_options,
        class_names=train.class_names,
        palette=tuple((int(r), int(g), int(b)) for r, g, b in train.palette),
        input_size=(height, width),
        exit_points=net.exit_points,
        head=options.head,
    )
    run.directory.write("exits.json", blueprint.to_json())
    run.directory.write("profile.json", profile(net, (height, width), model=options.name).to_json())


def pretrain_stage(run: Run) -> None:
    """Stage 1: the backbone and the final head, by default with the early exits in turn."""
    torch.manual_seed(run.recipe.pretrain.seed)
    net, fabric = run.blueprint().build(), run.recipe.compute.launch()
    if run.recipe.model.weights:
        _start_from(run.recipe.model.weights, net, run.recipe.model)
    checkpoint = run.checkpoint("pretrain")
    pretrain(net, run.dataset("train"), run.recipe.pretrain, run.recipe.compute, checkpoint, run.monitor("pretrain"))
    if fabric.global_rank == 0:  # of processes that train together one writes
        with writing(run.directory.path):
            run.directory.write("stage1.safetensors", _tensors(net.model_state_dict()))
        checkpoint.discard()


def distill_stage(run: Run, shard: Shard | None = None) -> None:
    """Stage 2: every head of the space on the frozen backbone, or a ``shard`` of them, which then is in
    RUN/stage2.KofN.safetensors. Heads that such a part holds already are not trained again; processes that train
    together (torchrun) divide the heads among them."""
    recipe, made_from = run.recipe, parts_fingerprint(run)
    net, fabric = run.pretrained(), recipe.compute.launch()
    heads, finished = space_exits(net, recipe.heads), read_parts(run.directory, made_from)
    own = (shard or Shard(1, 1)).divided(fabric.global_rank, fabric.world_size) if fabric.world_size > 1 else shard
    wanted = [exit for exit in (own.share(net, heads) if own else heads) if exit not in finished.exits]
    name = f"distill.{own}" if own else "distill"
    checkpoint = replace(run.checkpoint(name), made_from=made_from if own else "")
    stopped = {}
    if wanted:
        rest = (recipe.heads, recipe.distill, recipe.compute, checkpoint, run.monitor(name))
        stopped = distill(net, run.dataset("train"), *rest, exits=wanted)
    trained = Part(net.heads.state_dict(), stopped, made_from)
    if own is None:
        write_part(run.directory, None, join([finished, trained]))
        discard_parts(run.directory)
    elif wanted:
        write_part(run.directory, own, trained)
    checkpoint.discard()
    if fabric.world_size > 1:
        fabric.barrier()
        if shard is None and fabric.global_rank == 0:
            _merge_parts(run, heads)
        fabric.barrier()


def merge_stage(run: Run) -> None:
    """Stage 2 from the parts that shards left. Raises RunError that says what is missing."""
    with run.directory.finishing("distill", fingerprint(recipe_to_record(run.recipe), "distill")):
        _merge_parts(run, space_exits(run.pretrained(), run.recipe.heads))


def _merge_parts(run: Run, heads: Sequence[Exit]) -> None:
    whole = read_parts(run.directory, parts_fingerprint(run))
    expect_whole(whole, heads, run.directory)
    write_part(run.directory, None, whole)
    discard_parts(run.directory)


def adopt_pretrained(run: Run, source: Path) -> None:
    """Takes stage 1 over from another run whose data, model and pretrain sections are the same. Raises RunError when
    they are not, or it is not finished."""
    if run.directory.fingerprint("pretrain") is not None:
        return
    if run.directory.checkpoint("pretrain").exists():
        raise RunError(f"{run.directory.path} has a stage 1 of its own under way: finish it, or choose another --out")
    other, record = RunDirectory(source), recipe_to_record(run.recipe)
    theirs = recipe_to_record(recipe_from_record(other.record()["recipe"]))
    advice = "stage 1 is shared only where data, model and pretrain agree"
    expect_same("pretrain", theirs, record, was=f"{source} was pretrained", advice=advice)
    weights = other.read("stage1.safetensors", made_by="pretrain")
    if theirs["heads"] == record["heads"] and run.directory.fingerprint("profile") is None:
        with run.directory.finishing("profile", fingerprint(record, "profile")):
            for name in ("profile.json", "exits.json"):
                run.directory.write(name, other.read(name, made_by="profile"))
    run_stage(run, "profile")
    if Blueprint.from_json(other.read("exits.json", made_by="profile")) != run.blueprint():
        raise RunError(f"{source} was pretrained with other exit points than {run.directory.path} has (exits.json)")
    with run.directory.finishing("pretrain", fingerprint(record, "pretrain")):
        run.directory.write("stage1.safetensors", weights)


def follow_stage(run: Run, stage: str) -> None:
    """``run_stage`` for every process but the first of those that train together: nothing is recorded."""
    made_from = fingerprint(recipe_to_record(run.recipe), stage)
    if run.directory.fingerprint(stage) != made_from or not (run.directory.path / ARTEFACTS[stage]).exists():
        STAGES[stage](run)


def evaluate_stage(run: Run, shard: Shard | None = None) -> None:
    """What every exit does to every validation image, or to a ``shard`` of them, in RUN/tables.KofN.npz then."""
    heads = unpack(run.directory.read("stage2.safetensors", made_by="distill"), "stage2.safetensors")
    net = run.pretrained()
    _add_heads(net, run.recipe.heads)
    net.drop_heads([exit for exit in net.exits if exit not in heads.stopped])  # they diverged and have no weights
    net.heads.load_state_dict(heads.tensors)
    name = f"tables.{shard}" if shard else "tables"
    checkpoint, part = run.checkpoint(name), (shard.index, shard.count) if shard else (1, 1)
    origin = tables_origin(run)
    tables = evaluate(
        net, run.dataset("val"), run.recipe.evaluate, run.device, part=part, origin=origin, checkpoint=checkpoint
    )
    run.directory.write(f"{name}.npz", tables.to_bytes())
    checkpoint.discard()


def merge_tables(run: Run) -> None:
    """tables.npz from the parts that shards left. Raises RunError that says what is missing."""
    paths = sorted(run.directory.path.glob("tables.*of*.npz"))
    shards = {}
    for path in paths:
        part = Shard.parse(path.name.split(".")[1].replace("of", "/"))
        shards[part.index, part.count] = ExitTables.from_bytes(path.read_bytes())
    with run.directory.finishing("evaluate", fingerprint(recipe_to_record(run.recipe), "evaluate")):
        run.directory.write("tables.npz", merge_shards(shards, tables_origin(run)).to_bytes())
    for path in paths:
        path.unlink()


def search_stage(run: Run) -> None:
    """Exits, heads and thresholds, on one half of the validation images; nothing is trained again."""
    options, tables, costs = run.recipe.search, run.tables(), run.costs()
    selection, _ = tables.halves(options.seed)
    tables = tables.subset(selection)
    fronts = {
        setting: pareto_front(
            tables, costs, setting=setting, grid=options.grid, time_limit=options.time_limit, progress=True
        )
        for setting in ("budgeted", "input_dependent")
    }
    objectives = {"max-miou": Objective(maximise="miou", max_cost_ratio=1.0)}
    objectives |= {f"drop-{drop:g}pp": Objective(minimise="macs", max_drop_pp=drop) for drop in options.max_drops_pp}
    verdicts, skipped = [], []
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
        run.directory.write(f"{INSTANCES}/{name}.json", result.instance.to_json())
        verdicts.append(f"{name}: {result.verdict}; {result.certificate}")
    front = {
        "fronts": {key: [(point.cost, point.miou) for point in front.points] for key, front in fronts.items()},
        "names": list(objectives),
        "verdicts": verdicts,
        "skipped": skipped,
    }
    run.directory.write("front.json", json.dumps(front, indent=1) + "\n")


def search_run(
    run: Run,
    objective: Objective | AnytimeObjective,
    *,
    name: str,
    setting: SearchSetting = "input_dependent",
    costs: Sequence[Path] = (),
    guarantee: Guarantee | None = None,
    time_limit: float | None = None,
) -> SearchResult:
    """One more instance, RUN/instances/NAME.json. The half that it is not selected on is what a guarantee calibrates
    on, all of it: the certificate is then the report. Several cost tables: the least bad over these devices."""
    options, tables, devices = run.recipe.search, run.tables(), [run.costs(path) for path in costs or (None,)]
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
    run.directory.write(f"{INSTANCES}/{name}.json", result.instance.to_json())
    return result


def report_stage(run: Run) -> None:
    """Run the chosen instances on the other half of the images, measure them, and write the page."""
    front = json.loads(run.directory.read("front.json", made_by="search"))
    tables, costs, val = run.tables(), run.costs(), run.dataset("val")
    selection, half = tables.halves(run.recipe.search.seed)
    reported = half.tolist()
    found = [name for name in front["names"] if (run.directory.path / INSTANCES / f"{name}.json").exists()]
    final = tables.exits[tables.final]
    baseline = Instance(
        name="baseline", setting="budgeted", exits=(ExitChoice(exit_index=final.exit_index, head=final.head),)
    )
    instances = [baseline, *(load_instance(run.directory.path, name) for name in found)]
    sessions = [load(run.directory.path, instance=instance, device=str(run.device)) for instance in instances]
    samples = ((val[v].image, val[v].mask) for v in reported)
    runnings = run_side_by_side(sessions, samples, len(tables.class_names))
    tables_reported = tables.subset(half)
    predicted = _predict_latency(run, instances, costs.input_size)
    measurements = Measurements(
        device=device_in_words(run.device),
        input_size=costs.input_size,
        image_names=list(tables_reported.image_names),
        difficulty=_known(tables_reported.difficulty),
        final_exit_error=_known(runnings[0].errors()),
        num_selection_images=len(selection),
        rows=[_measurement(*pair, tables_reported, costs, predicted) for pair in zip(instances, runnings, strict=True)],
        skipped=front["skipped"],
    )
    gallery = _gallery(val, reported, sessions, measurements.rows)
    run.directory.write("measurements.json", measurements.to_json())
    if gallery is not None:
        run.directory.write("gallery.npz", gallery.to_bytes())
    inputs = ReportInputs(
        title=f"{run.recipe.model.name} on {run.recipe.data.source}",
        measurements=measurements,
        gallery=gallery,
        tables=tables,
        costs=costs,
        fronts=front["fronts"],
        verdicts=front["verdicts"],
        recipe_yaml=yaml.safe_dump(recipe_to_record(run.recipe), sort_keys=False),
        provenance={stage: _words(entry) for stage, entry in run.directory.record()["stages"].items()},
    )
    run.directory.write("report.html", render_report(inputs))


STAGES: dict[str, Callable[[Run], None]] = {
    "profile": profile_stage,
    "pretrain": pretrain_stage,
    "distill": distill_stage,
    "evaluate": evaluate_stage,
    "search": search_stage,
    "report": report_stage,
}
# Done again whenever its verb is called.
REPEATABLE = ("search", "report")


def run_stage(run: Run, stage: str, *, again: bool = False) -> bool:
    """Does one stage unless it is done; ``again`` repeats it where that is cheap. Tells whether it did."""
    made_from = fingerprint(recipe_to_record(run.recipe), stage)
    done = run.directory.fingerprint(stage) == made_from and (run.directory.path / ARTEFACTS[stage]).exists()
    if done and not (again and stage in REPEATABLE):
        return False
    with run.directory.finishing(stage, made_from):
        STAGES[stage](run)
    return True


def _add_heads(net: MultiExitNet, heads: HeadSpace) -> None:
    for i, point in enumerate(net.exit_points[:-1]):
        for config in heads.configs(point.channels):
            net.add_head(i, config)


def _measure_costs(net: MultiExitNet, input_size: tuple[int, int], latency: LatencyOptions, *, model: str) -> CostTable:
    costs = profile(net, input_size, model=model, latency=latency)
    if latency.batch > 1:  # sessions run one image at a time
        return costs
    return replace(costs, additivity=check_additivity(net, costs, latency))


def _predict_latency(run: Run, instances: Sequence[Instance], input_size: tuple[int, int]) -> CostTable:
    """The parts that the instances are made of, each measured for itself."""
    exits = {choice.exit for instance in instances for choice in instance.exits}
    latency = LatencyOptions(device=str(run.device), max_seconds=20)
    return profile(run.blueprint().build(tuple(sorted(exits))), input_size, latency=latency)


def _measurement(
    instance: Instance, running: Running, tables: ExitTables, costs: CostTable, predicted: CostTable
) -> Measurement:
    return Measurement(
        instance=instance,
        miou=running.miou(),
        miou_from_tables=tables.miou(route(tables, instance)),
        macs=float(cost_of(tables, costs, instance, "macs").mean()),
        macs_paper=float(cost_of(tables, costs, instance, "macs_paper").mean()),
        exit_taken=running.exit_taken,
        image_confidence=running.image_confidence,
        latency_ms=running.latency_ms,
        predicted_ms=cost_of(tables, predicted, instance, "latency_ms").tolist(),
    )


def _gallery(
    val: SegmentationDataset, reported: Sequence[int], sessions: Sequence[Session], rows: Sequence[Measurement]
) -> Gallery | None:
    """An image that stopped early and one that went deep, through the instance whose images spread most."""
    if len(sessions) < 2:
        return None
    session, row = max(zip(sessions[1:], rows[1:], strict=True), key=lambda pair: pair[1].spread())
    order = np.lexsort((row.image_confidence, row.exit_taken))
    first, last = int(order[len(order) // 10]), int(order[-1 - len(order) // 10])
    samples = [val[reported[v]] for v in dict.fromkeys((first, last))]
    samples = [sample for sample in samples if sample.mask.shape == samples[0].mask.shape]
    taken = [row.exit_taken[v] for v in dict.fromkeys((first, last))][: len(samples)]
    return make_gallery(session, [(sample.name, sample.image, sample.mask) for sample in samples], taken)


def _known(values: Iterable[float]) -> list[float | None]:
    """JSON has no NaN."""
    return [None if math.isnan(value) else float(value) for value in values]


def _start_from(weights: str, net: MultiExitNet, options: ModelOptions) -> None:
    """Loads the user's weights into ``net``, through the plain model: that has all names, the net those it runs."""
    model = build_model(options.name, net.num_classes, **options.build_options)
    for note in load_weights(model, weights):
        print(note, file=sys.stderr)
    state = model.state_dict()
    net.load_model_state_dict({name: state[name] for name in net.model_state_dict()})


def _tensors(state: dict[str, torch.Tensor]) -> bytes:
    return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})


def _words(entry: dict[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in entry.items() if key != "fingerprint"}
