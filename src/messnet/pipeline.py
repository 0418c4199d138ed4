"""The paper on one page: each stage loads artefacts, calls one function, saves an artefact."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import yaml
from tqdm import tqdm

from messnet.config import ModelOptions, Recipe, load_recipe, recipe_from_record, recipe_to_record
from messnet.data import SegmentationDataset
from messnet.data.checks import check_dataset
from messnet.data.sources import DataOptions, open_dataset
from messnet.deployment.bundle import open_bundle
from messnet.deployment.inference import Session
from messnet.deployment.loading import COSTS, INSTANCES, load, load_instance, restore_bundle
from messnet.deployment.measurement import (
    Running,
    check_additivity,
    device_in_words,
    make_gallery,
    run_side_by_side,
)
from messnet.errors import DataError, InfeasibleError, ModelError, RunError
from messnet.evaluation import evaluate
from messnet.instance import ExitChoice, Instance
from messnet.latency import LatencyOptions, num_threads
from messnet.measurements import Gallery, Measurement, Measurements
from messnet.network.blueprint import Blueprint
from messnet.network.exit_head import HeadSpace
from messnet.network.multi_exit import MultiExitNet, convert
from messnet.network.weights import load_weights
from messnet.network.zoo import build_model
from messnet.profiling import profile
from messnet.report import ReportInputs, render_report
from messnet.runs import RunDirectory
from messnet.search import Guarantee, Objective, SearchResult, certify, choose, cost_of, pareto_front, route
from messnet.search.engine import SearchSetting
from messnet.tables import COSTS_SCHEMA_VERSION, SCHEMA_VERSION, CostTable, ExitTables
from messnet.training import distill, pretrain

__all__ = [
    "STAGES",
    "Run",
    "build_network",
    "measure_run",
    "open_run",
    "profile_bundle",
    "profile_model",
    "run_stage",
    "search_run",
]


@dataclass(frozen=True)
class Run:
    """A recipe and the directory that its artefacts go to."""

    recipe: Recipe
    directory: RunDirectory

    @property
    def device(self) -> torch.device:
        return self.recipe.compute.fabric().device

    def dataset(self, split: Any) -> SegmentationDataset:
        return open_dataset(self.recipe.data, split)

    def blueprint(self) -> Blueprint:
        return Blueprint.from_json(self.directory.read("exits.json", made_by="profile"))

    def costs(self, path: Path | None = None) -> CostTable:
        """The table at ``path``, by default the run's own, which knows no latency."""
        if path is None:
            return CostTable.from_json(self.directory.read("profile.json", made_by="profile").decode())
        if not path.is_file():
            raise RunError(f"no cost table {path}; make one with `messnet profile {self.directory.path} --measure`")
        return CostTable.from_json(path.read_text(errors="replace"))

    def tables(self) -> ExitTables:
        return ExitTables.from_bytes(self.directory.read("tables.npz", made_by="evaluate"))

    def pretrained(self) -> MultiExitNet:
        """The network after stage 1, without heads."""
        weights = self.directory.read("stage1.safetensors", made_by="pretrain")
        net = self.blueprint().build()
        net.load_model_state_dict(safetensors.torch.load(weights))
        return net


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


def profile_bundle(path: Path, latency: LatencyOptions | None = None) -> tuple[MultiExitNet, CostTable]:
    """A bundle's network, cut where its instance ends, and what its own exits cost, as ``profile_model``."""
    blueprint, net, _ = restore_bundle(open_bundle(path))
    cut = net.num_exits < len(blueprint.exit_points)
    model = f"{blueprint.model} cut after exit {net.num_exits - 1}" if cut else blueprint.model
    if latency is None:
        return net, profile(net, blueprint.input_size, model=model)
    return net, _measure_costs(net, blueprint.input_size, latency, model=model)


def measure_run(run: Run, latency: LatencyOptions, name: str) -> CostTable:
    """What the run's network costs on this device: RUN/costs/NAME.json. Latency asks for no training."""
    blueprint = run.blueprint()
    net = blueprint.build()
    _add_heads(net, run.recipe.heads)
    costs = _measure_costs(net, blueprint.input_size, latency, model=blueprint.model)
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
    """Stage 1: exit-aware pre-training of the backbone and the final head."""
    torch.manual_seed(run.recipe.pretrain.seed)
    net = run.blueprint().build()
    if run.recipe.model.weights:
        _start_from(run.recipe.model.weights, net, run.recipe.model)
    checkpoint = run.directory.checkpoint("pretrain")
    pretrain(net, run.dataset("train"), run.recipe.pretrain, run.recipe.compute, checkpoint)
    run.directory.write("stage1.safetensors", _tensors(net.model_state_dict()))
    checkpoint.discard()


def distill_stage(run: Run) -> None:
    """Stage 2: every head of the space on the frozen backbone, by positive filtering distillation."""
    net, checkpoint = run.pretrained(), run.directory.checkpoint("distill")
    distill(net, run.dataset("train"), run.recipe.heads, run.recipe.distill, run.recipe.compute, checkpoint)
    run.directory.write("stage2.safetensors", _tensors(net.heads.state_dict()))
    checkpoint.discard()


def evaluate_stage(run: Run) -> None:
    """What every exit does to every validation image."""
    heads = safetensors.torch.load(run.directory.read("stage2.safetensors", made_by="distill"))
    net = run.pretrained()
    _add_heads(net, run.recipe.heads)
    net.heads.load_state_dict(heads)
    tables = evaluate(net, run.dataset("val"), run.recipe.evaluate, run.device)
    run.directory.write("tables.npz", tables.to_bytes())


def search_stage(run: Run) -> None:
    """Exits, heads and thresholds, on one half of the validation images; nothing is trained again."""
    options, tables, costs = run.recipe.search, run.tables(), run.costs()
    selection, _ = tables.halves(options.seed)
    tables = tables.subset(selection)
    fronts = {
        setting: pareto_front(tables, costs, setting=setting, grid=options.grid, progress=True)
        for setting in ("budgeted", "input_dependent")
    }
    objectives = {"max-miou": Objective(maximise="miou", max_cost_ratio=1.0)}
    objectives |= {f"drop-{drop:g}pp": Objective(minimise="macs", max_drop_pp=drop) for drop in options.max_drops_pp}
    verdicts, skipped = [], []
    for name, objective in objectives.items():
        try:
            result = choose(fronts["input_dependent"], objective, name=name)
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
    objective: Objective,
    *,
    name: str,
    setting: SearchSetting = "input_dependent",
    costs: Path | None = None,
    guarantee: Guarantee | None = None,
) -> SearchResult:
    """One more instance, RUN/instances/NAME.json. The half that it is not selected on is what a guarantee calibrates
    on, all of it: the certificate is then the report."""
    options, tables, table = run.recipe.search, run.tables(), run.costs(costs)
    selection, calibration = (tables.subset(half) for half in tables.halves(options.seed))
    front = pareto_front(selection, table, setting=setting, cost=objective.cost_name, grid=options.grid, progress=True)
    result = choose(front, objective, name=name)
    if guarantee is not None:
        result = certify(result, objective, guarantee, selection=selection, calibration=calibration, costs=table)
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
    sessions = [load(run.directory.path, instance=instance, device=run.device) for instance in instances]
    samples = ((val[v].image, val[v].mask) for v in reported)
    runnings = run_side_by_side(sessions, samples, len(tables.class_names))
    tables_reported = tables.subset(half)
    predicted = _predict_latency(run, instances, costs.input_size)
    measurements = Measurements(
        device=device_in_words(run.device),
        input_size=costs.input_size,
        image_names=list(tables_reported.image_names),
        difficulty=[float(d) for d in tables_reported.difficulty],
        final_exit_error=runnings[0].errors(),
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
# The sections of the recipe that a stage's artefact depends on.
SECTIONS = {
    "profile": ("data", "model", "heads"),
    "pretrain": ("data", "model", "pretrain"),
    "distill": ("data", "model", "pretrain", "heads", "distill"),
    "evaluate": ("data", "model", "pretrain", "heads", "distill", "evaluate"),
    "search": ("data", "model", "pretrain", "heads", "distill", "evaluate", "search"),
    "report": ("data", "model", "pretrain", "heads", "distill", "evaluate", "search"),
}
# A stage whose artefacts have another format today is done again; trainings have none but safetensors.
FORMATS = {"costs": COSTS_SCHEMA_VERSION, "tables": SCHEMA_VERSION}
FORMATS_OF = {
    "profile": ("costs",),
    "evaluate": ("tables",),
    "search": ("costs", "tables"),
    "report": ("costs", "tables"),
}
# What costs hours is refused when its options change; the rest is just done again.
TRAINING = ("pretrain", "distill")
# Done again whenever its verb is called.
REPEATABLE = ("search", "report")
ARTEFACTS = {
    "profile": "exits.json",
    "pretrain": "stage1.safetensors",
    "distill": "stage2.safetensors",
    "evaluate": "tables.npz",
    "search": "front.json",
    "report": "report.html",
}


def open_run(target: Path, overrides: Sequence[str] = (), *, out: Path | None = None) -> Run:
    """The run of a recipe file (in ``out``, by default runs/NAME) or of a run directory, which remembers its recipe.

    Raises RecipeError or DataError when the recipe is not in order, RunError when the directory belongs to another
    recipe: what a stage was made from cannot change once it has begun. Nothing is written in either case.
    """
    if target.is_dir():
        directory = RunDirectory(target)
        recipe = recipe_from_record(directory.record()["recipe"], overrides)
    else:
        recipe = load_recipe(target, overrides)
        directory = RunDirectory(out or Path("runs") / target.stem)
    record = recipe_to_record(recipe)
    known = _known_recipe(directory) if directory.exists else None
    if known == record:
        return Run(recipe, directory)
    if known is not None:
        _refuse_other_recipe(directory, known, record)
    if known is None or known["data"] != record["data"]:
        _expect_sound_data(recipe.data)
    if known is None:
        directory.create(record)
    else:
        directory.update_recipe(record)
    return Run(recipe, directory)


def run_stage(run: Run, stage: str, *, again: bool = False) -> bool:
    """Does one stage unless it is done; ``again`` repeats it where that is cheap. Tells whether it did."""
    fingerprint = _fingerprint(recipe_to_record(run.recipe), stage)
    done = run.directory.fingerprint(stage) == fingerprint and (run.directory.path / ARTEFACTS[stage]).exists()
    if done and not (again and stage in REPEATABLE):
        return False
    with run.directory.finishing(stage, fingerprint):
        STAGES[stage](run)
    return True


def _known_recipe(directory: RunDirectory) -> dict[str, Any]:
    """The recipe of a run. Options that came after it have their defaults, and its stages stay done."""
    old = directory.record()["recipe"]
    known = recipe_to_record(recipe_from_record(old))
    if known != old:
        stages = [stage for stage in STAGES if directory.fingerprint(stage) == _fingerprint(old, stage)]
        directory.update_recipe(known, {stage: _fingerprint(known, stage) for stage in stages})
    return known


def _fingerprint(record: dict[str, Any], stage: str) -> str:
    """Of the recipe's sections that a stage is made from, and of the formats that it reads and writes."""
    parts: dict[str, Any] = {section: record[section] for section in SECTIONS[stage]}
    if formats := [FORMATS[name] for name in FORMATS_OF.get(stage, ())]:
        parts["formats"] = formats
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _refuse_other_recipe(directory: RunDirectory, known: dict[str, Any], record: dict[str, Any]) -> None:
    for stage in TRAINING:
        if directory.fingerprint(stage) is None and not directory.checkpoint(stage).path.exists():
            continue  # not begun: may still change
        for section in SECTIONS[stage]:
            old, new = _flat(known.get(section, {})), _flat(record[section])
            for key in sorted(old.keys() | new.keys()):
                if old.get(key) != new.get(key):
                    raise RunError(
                        f"{directory.path} was made with {section}.{key} = {old.get(key)}, this recipe says "
                        f"{new.get(key)}: choose another directory with --out, or delete it"
                    )


def _flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in record.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


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


def _expect_sound_data(options: DataOptions) -> None:
    """Reads every image once before hours are spent on them; generated ones cannot be broken."""
    train, val = open_dataset(options, "train"), open_dataset(options, "val")
    if options.source == "scenes":
        return
    for split, dataset in (("train", train), ("val", val)):
        report = check_dataset(dataset, progress=partial(tqdm, desc=f"check {split}", unit="img"))
        if report.problems:
            more = f" (and {len(report.problems) - 1} more: `messnet check-data`)" if len(report.problems) > 1 else ""
            raise DataError(f"{report.problems[0]}{more}")


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
