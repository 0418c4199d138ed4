"""The paper on one page: each stage loads artefacts, calls one function, saves an artefact."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from messnet.deployment.graphs import MadeStages
from messnet.errors import MessError
from messnet.evaluation import evaluate, merge_shards
from messnet.network.blueprint import Blueprint
from messnet.network.multi_exit import MultiExitNet
from messnet.profiling import profile
from messnet.records.costs import CostTable
from messnet.records.exit_tables import ExitTables
from messnet.records.names import Precision, RuntimeName
from messnet.records.shard import WHOLE, Shard
from messnet.report.page import STAGE_1_ADVICE, read_inputs, render_report
from messnet.report.wording import about
from messnet.run.choosing import search_all
from messnet.run.deploying import deploy
from messnet.run.measuring import build_network, logits_in, start_from_weights
from messnet.run.reporting import measure_instances
from messnet.run.run import Run
from messnet.run.shards import Part, discard_parts, expect_whole, join, pack, read_parts, share
from messnet.run.stage import Stage
from messnet.searching.findings import Findings
from messnet.searching.measure import baseline_miou_of
from messnet.training.journal import Validation, say
from messnet.training.stage1 import pretrain, pretrain_seconds
from messnet.training.stage2 import distill, distill_seconds, space_exits


def profile_stage(run: Run) -> None:
    """Convert the model: candidate exit points, the workload of every segment and head."""
    options, data = run.recipe.model, run.dataset("train")
    height, width = run.dataset("val")[0].mask.shape
    net = build_network(options, run.recipe.heads, len(data.class_names), (height, width), device=run.device)
    for note in net.notes:
        say(note)
    blueprint = Blueprint(
        model=options.name,
        model_options=options.build_options,
        class_names=data.class_names,
        palette=tuple((int(r), int(g), int(b)) for r, g, b in data.palette),
        input_size=(height, width),
        exit_points=net.exit_points,
        head=options.head,
        resize=run.recipe.data.resize,
        normalisation=options.normalisation,
    )
    # The blueprint first: what is left of a run that is killed here is done again, for the stage is not recorded.
    run.directory.exits.write(blueprint.to_json().encode())
    run.directory.profile.write(profile(net, (height, width), model=options.name))
    run.adopt(net)


def pretrain_stage(run: Run) -> None:
    """Stage 1: the backbone and the final head, by default with the early exits in turn."""
    recipe, checkpoint = run.recipe, run.checkpoint("pretrain")
    net, fabric = run.initial(), recipe.compute.launch()
    if recipe.model.weights or recipe.model.backbone_weights:
        start_from_weights(net, recipe.model, is_trained=recipe.pretrain.iterations > 0)
    leads = fabric.global_rank == 0  # of processes that train together one writes
    before = _evaluate_delivered(run, net) if recipe.model.weights and leads else None
    if recipe.pretrain.iterations:
        pretrain(net, run.dataset("train"), recipe.pretrain, recipe.compute, checkpoint, run.monitor("pretrain"))
    if leads:
        if plain := net.heads.state_dict():
            run.directory.stage1_heads.write(_saved(plain))
        run.directory.stage1.write(_saved(net.model_state_dict()))
        checkpoint.discard()
    net.drop_heads()
    if before is not None:
        _tell_of_stage1(run, net, before)


def _saved(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def _evaluate_delivered(run: Run, net: MultiExitNet) -> ExitTables:
    """What the user's model, whose weights ``net`` holds, does to every validation image before anything is trained:
    RUN/delivered.npz. A training that goes on from a checkpoint has it already."""
    file, origin = run.directory.delivered, STAGES["pretrain"].made_from(run)
    # Once stage 1 has begun, ``net`` no longer holds what was delivered.
    if file.exists and run.checkpoint("pretrain").path.exists():
        return file.read()
    tables = evaluate(net, run.dataset("val"), run.recipe.evaluate, run.device, origin=origin)
    file.write(tables)
    return tables


def _tell_of_stage1(run: Run, net: MultiExitNet, before: ExitTables) -> None:
    """What stage 1 made of a delivered model, before hours go into heads of one that it spoilt."""
    delivered = baseline_miou_of(before)
    if not run.recipe.pretrain.iterations:
        say(
            f"pretrain: the model is kept as delivered, {100 * delivered:.2f} % mIoU on the validation images; compare "
            "with the mIoU you know: a difference means other normalisation, classes or image sizes"
        )
        return
    after = baseline_miou_of(evaluate(net, run.dataset("val"), run.recipe.evaluate, run.device))
    # A difference below a tenth of a point is noise of the training, nothing to act on.
    advice = f": worse than it came; {STAGE_1_ADVICE}" if after < delivered - 0.001 else ""
    say(f"pretrain: {100 * delivered:.2f} % mIoU as delivered, {100 * after:.2f} % after stage 1{advice}")


def distill_stage(run: Run, shard: Shard | None = None) -> None:
    """Stage 2: every head of the space on the frozen backbone, or a ``shard`` of them, which then is in a file of its
    own. Heads that such a part holds already are not trained again; processes that train together (torchrun) divide
    the heads among them."""
    recipe, made_from = run.recipe, _made_from(run)
    if recipe.distill.plain_heads == "stage1" and not recipe.plain_heads_go_on:
        say("distill: stage 1 trained no heads, so the plain ones begin anew")
    net, fabric = run.pretrained(with_heads=recipe.plain_heads_go_on), recipe.compute.launch()
    heads, finished = space_exits(net, recipe.heads), read_parts(run.directory, made_from)
    # A process of several trains its part of the part that the command asks for.
    own = (shard or WHOLE).divided(fabric.global_rank, fabric.world_size) if fabric.world_size > 1 else shard
    # Parts that are there already, of this very recipe and stage 1, are taken as they are.
    wanted = [exit for exit in (share(own, net, heads) if own else heads) if exit not in finished.exits]
    name = f"distill.{own}" if own else "distill"
    checkpoint = replace(run.checkpoint(name), made_from=made_from if own else "")
    stopped = {}
    if wanted:
        rest = (recipe.heads, recipe.distill, recipe.compute, checkpoint, run.monitor(name))
        stopped = distill(net, run.dataset("train"), *rest, exits=wanted)
    trained = Part(net.heads.state_dict(), stopped, made_from)
    # One process with no part of its own writes the whole; others leave their parts, which the first then merges.
    if own is None:
        run.directory.stage2.write(pack(join([finished, trained])))
        discard_parts(run.directory)
    elif wanted:
        run.directory.part_of_stage2(own).write(pack(trained))
    checkpoint.discard()
    if fabric.world_size > 1:
        fabric.barrier()
        if shard is None and fabric.global_rank == 0:
            _merge_heads(run)
        fabric.barrier()


def merge_stage(run: Run) -> None:
    """Stage 2 from the parts that shards left. Raises RunError that says what is missing."""
    STAGES["distill"].record(run, _merge_heads)


def _merge_heads(run: Run) -> None:
    whole = read_parts(run.directory, _made_from(run))
    expect_whole(whole, space_exits(run.pretrained(), run.recipe.heads), run.directory)
    run.directory.stage2.write(pack(whole))
    discard_parts(run.directory)


def _made_from(run: Run) -> str:
    """A name for the recipe and the bits of stage 1, which parts of stage 2 that belong together have in common."""
    stage1 = hashlib.sha256(run.directory.stage1.read())
    if run.recipe.plain_heads_go_on:
        stage1.update(run.directory.stage1_heads.read())
    return f"{STAGES['distill'].made_from(run)}-{stage1.hexdigest()[:16]}"


def evaluate_stage(run: Run, shard: Shard | None = None) -> None:
    """Tabulate every exit's predictions on every validation image, or on a ``shard`` of them in a file of its own."""
    net, val, options, origin = run.trained(), run.dataset("val"), run.recipe.evaluate, _tables_origin(run)
    checkpoint = run.checkpoint(f"tables.{shard}" if shard else "tables")
    # A part lacks most images, so what the delivered model does to them is added when all are merged.
    file = run.directory.part_of_tables(shard) if shard else run.directory.tables
    part = shard or WHOLE
    tables = evaluate(net, val, options, run.device, part=part, origin=origin, checkpoint=checkpoint)
    file.write(tables if shard else _beside_delivered(run, tables))
    checkpoint.discard()


def deployed_tables_stage(run: Run, runtime: RuntimeName, precision: Precision, made: MadeStages | None = None) -> bool:
    """``evaluate_stage`` of the network as ``runtime`` computes it in ``precision``, in a file of its own; ``made``
    as for ``graph_runner``. Tells whether there was anything to do."""
    origin = f"{_tables_origin(run)} {runtime} {precision}"
    file = run.directory.deployed_tables(runtime, precision)
    if file.exists and file.read().origin == origin:
        return False
    net, val, checkpoint = run.trained(), run.dataset("val"), run.checkpoint(f"tables-{runtime}-{precision}")
    logits_of = logits_in(run, net, runtime, precision, made=made)
    tables = evaluate(net, val, run.recipe.evaluate, origin=origin, logits_of=logits_of, checkpoint=checkpoint)
    file.write(_beside_delivered(run, replace(tables, precision=precision)))
    checkpoint.discard()
    return True


def _beside_delivered(run: Run, tables: ExitTables) -> ExitTables:
    """The tables of all images with what the delivered model does to them, where stage 1 has left that."""
    delivered = run.directory.delivered
    return tables.with_delivered(delivered.read()) if delivered.exists else tables


def merge_tables(run: Run) -> None:
    """The tables from the parts that shards left. Raises RunError that says what is missing."""
    parts = run.directory.parts_of_tables()
    tables = {shard: file.read() for shard, file in parts.items()}
    merged = _beside_delivered(run, merge_shards(tables, _tables_origin(run)))
    # Recorded as if one pass had made them: they are equal.
    STAGES["evaluate"].record(run, lambda run: run.directory.tables.write(merged))
    for file in parts.values():
        file.discard()


def _tables_origin(run: Run) -> str:
    """A name for all that tables are made from: the recipe, and the weights to the bit."""
    digest = hashlib.sha256(STAGES["evaluate"].made_from(run).encode())
    for weights in (run.directory.stage1, run.directory.stage2):
        digest.update(hashlib.sha256(weights.read()).digest())
    return digest.hexdigest()[:16]


def search_stage(run: Run) -> None:
    """Exits, heads and thresholds by the validation tables; nothing is trained again."""
    findings, instances = search_all(run.tables(), run.costs(), run.recipe.search)
    for instance in instances:
        run.directory.instance(instance.name).write(instance)
    run.directory.front.write(findings.to_json().encode())


def deploy_stage(run: Run) -> None:
    """The fastest instance in each precision that the recipe names, as a bundle, and what it gains over the model."""
    options, made = run.recipe.deploy, MadeStages()
    for precision in options.precisions:
        if precision != "f32":  # the run's own tables hold for f32, which every runtime computes alike
            deployed_tables_stage(run, options.runtime, precision, made)
    run.directory.deployed.write(deploy(run, made))
    run.checkpoint("deploy").discard()


def report_stage(run: Run) -> None:
    """Run the chosen instances on the validation images, measure them, and write the page."""
    findings = Findings.from_json(run.directory.front.read())
    measurements, gallery = measure_instances(run, findings)
    run.directory.measurements.write(measurements)
    if gallery is None:  # one of an earlier report would show other instances
        run.directory.gallery.discard()
    else:
        run.directory.gallery.write(gallery)
    run.directory.report.write(render_report(read_inputs(run.directory)))


_PRETRAINED = ("data", "model", "pretrain")
_DISTILLED = (*_PRETRAINED, "heads", "distill")
_EVALUATED = (*_DISTILLED, "evaluate")
_SEARCHED = (*_EVALUATED, "search")
_DEPLOYED = (*_SEARCHED, "deploy")
# Which images belong together splits validation images and nothing else.
_NO_GROUP = frozenset({"data.group"})
_COSTS, _TABLES = {"costs": CostTable.version}, {"tables": ExitTables.version}

STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            name="profile",
            do=profile_stage,
            sections=("data", "model", "heads"),
            without=_NO_GROUP,
            artefact=lambda directory: directory.exits,
            formats=_COSTS,
        ),
        Stage(
            name="pretrain",
            do=pretrain_stage,
            sections=_PRETRAINED,
            without=_NO_GROUP,
            artefact=lambda directory: directory.stage1,
            is_training=True,
        ),
        Stage(
            name="distill",
            do=distill_stage,
            sections=_DISTILLED,
            without=_NO_GROUP,
            artefact=lambda directory: directory.stage2,
            is_training=True,
        ),
        Stage(
            name="evaluate",
            do=evaluate_stage,
            sections=_EVALUATED,
            artefact=lambda directory: directory.tables,
            formats=_TABLES,
        ),
        Stage(
            name="search",
            do=search_stage,
            sections=_SEARCHED,
            artefact=lambda directory: directory.front,
            formats=_COSTS | _TABLES,
            is_repeatable=True,
        ),
        Stage(
            name="deploy",
            do=deploy_stage,
            sections=_DEPLOYED,
            artefact=lambda directory: directory.deployed,
            formats=_COSTS | _TABLES,
            is_wanted=lambda recipe: bool(recipe.deploy.precisions),
            is_repeatable=True,
        ),
        Stage(
            name="report",
            do=report_stage,
            sections=_DEPLOYED,
            artefact=lambda directory: directory.report,
            formats=_COSTS | _TABLES,
            is_repeatable=True,
        ),
    )
}
"""In the order of a run."""


def run_stage(run: Run, name: str, *, again: bool = False) -> bool:
    """Does one stage unless it is done; ``again`` repeats it where that is cheap. Tells whether it did."""
    return STAGES[name].ensure(run, again=again)


FEWEST = 40
"""Iterations of a training below which it is a trial: to time some of them first would take a tenth of it."""


def expect_seeing(run: Run) -> None:
    """Before stage 2 begins. Raises MessError where stage 1 left a final exit that takes every pixel of the validation
    images for one class: hours would go into heads that learn to do the same. A stage 2 of a few iterations, which
    only tries whether a run goes through, may begin."""
    recipe = run.recipe
    has_begun = STAGES["distill"].is_done(run) or run.checkpoint("distill").path.exists()
    if has_begun or recipe.distill.iterations < FEWEST:
        return
    val, net = run.dataset("val"), run.pretrained().to(run.device)
    final = net.exits[-1]
    look = Validation(val, recipe.compute.validate_images).look(net, [final], run.device)
    if look[final].only_class is None:
        return
    # Where a class is rare, the few images that are looked at may lack it.
    tables = evaluate(net, val, recipe.evaluate, run.device)
    predicted, labelled = tables.predicted.sum((0, 1)), tables.labelled.sum(0)
    if np.count_nonzero(predicted) != 1 or np.count_nonzero(labelled) == 1:
        return
    advice = (
        "lower pretrain.learning_rate or raise pretrain.iterations, with another --out"
        if recipe.pretrain.iterations
        else "model.weights, model.normalisation or the order of the classes do not fit"
    )
    raise MessError(
        f"the final exit takes every pixel of the validation images for {val.class_names[predicted.argmax()]!r} "
        f"({100 * baseline_miou_of(tables):.1f} % mIoU), which stage 2 would teach to every head: {advice}, and look "
        f"at the masks (`messnet check-data {run.directory.path}`); `messnet distill {run.directory.path}` goes on all "
        "the same"
    )


def forecast(run: Run) -> str:
    """How long the trainings of a run that has been profiled will take on this machine, in a sentence, from a few
    iterations of each. Empty where it cannot or need not be told: a training under way has a bar that says so, and one
    of several processes is not begun twice."""
    recipe, seconds = run.recipe, dict[str, float]()
    if recipe.compute.is_parallel:
        return ""
    for name, options in (("pretrain", recipe.pretrain), ("distill", recipe.distill)):
        if STAGES[name].is_done(run) or run.checkpoint(name).path.exists() or options.iterations < FEWEST:
            continue
        net, train = run.network(), run.dataset("train")
        if name == "pretrain":
            seconds[name] = pretrain_seconds(net, train, recipe.pretrain, recipe.compute)
        else:
            seconds[name] = distill_seconds(net, train, recipe.heads, recipe.distill, recipe.compute)
    if not seconds:
        return ""
    numbers = {"pretrain": "stage 1", "distill": "stage 2"}
    parts = [f"{numbers[name]} ({name}) about {about(each)}" for name, each in seconds.items()]
    whole = f"training takes about {about(sum(seconds.values()))}: " if parts[1:] else ""
    threads = torch.get_num_threads()
    where = run.device.type if run.device.type != "cpu" else f"cpu, {threads} thread{'s' if threads > 1 else ''}"
    return f"{whole}{', '.join(parts)} (on this machine: {where}); evaluate, search and report come after it"
