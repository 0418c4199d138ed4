"""A recipe's network, and what it costs on the device at hand: that of a model, a bundle or a run."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from messnet.costs.latency import LatencyOptions, num_threads
from messnet.costs.workload import copy_module, in_eval_mode
from messnet.deployment.bundle import Bundle, open_bundle
from messnet.deployment.graphs import MadeStages, make_graphs
from messnet.deployment.loading import WORKLOAD, default_runtime, load
from messnet.deployment.measurement import check_additivity, instances_of_all_heads, measure_heads, measure_session
from messnet.deployment.restoring import graph_runner, restore_bundle
from messnet.deployment.runner import Live, Runner
from messnet.deployment.torch_runner import TorchRunner
from messnet.errors import MessError, ModelError, RunError
from messnet.evaluation import LogitsOf
from messnet.network.head_space import HeadSpace
from messnet.network.multi_exit import MultiExitNet, convert
from messnet.network.weights import load_backbone_weights, load_weights
from messnet.network.zoo import MODELS, build_model, build_noted_model
from messnet.policy.policy import Policy
from messnet.profiling import profile
from messnet.records.costs import CostTable
from messnet.records.exit_point import ExitPoint
from messnet.records.instance import Exit, Instance
from messnet.records.names import GRAPH_RUNTIMES, Precision, RuntimeName, precision_of_dtype
from messnet.run.recipe import ModelOptions
from messnet.run.run import Run, add_heads

_TRIED_SIZE = 64
"""Height and width at most of the image that graphs are tried with."""


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
    model, notes = build_noted_model(options.name, num_classes, **options.build_options)
    _load_weights(model, options)  # only to know that they fit before hours are spent
    where = device if options.exit_cost == "latency" else "cpu"
    net = convert(
        model.to(where),
        torch.zeros(1, 3, *input_size, device=where),
        num_exits=options.num_exits,
        exit_points=options.exit_points,
        head=options.head,
        exit_cost=options.exit_cost,
        normalisation=options.normalisation,
    ).cpu()
    # The zoo's models are known to export, and of what cannot be exported the conversion has said so.
    is_known = options.name in MODELS or any("can be exported" in note for note in net.notes)
    if net.backbone.exportable and not is_known:
        notes = (*notes, *_without_graphs(net, input_size))
    net.backbone.notes = (*notes, *net.notes)
    if net.num_classes != num_classes:
        raise ModelError(f"{options.name} gives {net.num_classes} classes, expected {num_classes}")
    add_heads(net, heads)
    return net


def _without_graphs(net: MultiExitNet, input_size: tuple[int, int]) -> tuple[str, ...]:
    """A sentence where an operator of a user's model has no form in ONNX. Only the exporter knows, so it is asked, on a
    small image: seconds before a training of hours."""
    height, width = (min(length, _TRIED_SIZE) for length in input_size)
    try:
        with in_eval_mode(net):
            make_graphs(net, [net.exits[-1]], Policy(), (height, width))
    except ModelError as error:
        return (f"no instance of this network can be exported: {error}",)
    return ()


def _load_weights(model: nn.Module, options: ModelOptions, *, is_trained: bool = True) -> list[str]:
    """Loads what the recipe starts from, if anything, and says what was not as expected."""
    if options.weights:
        return load_weights(model, options.weights, new_classifier=is_trained)
    if options.backbone_weights:
        return load_backbone_weights(model, options.backbone_weights, head=options.head)
    return []


def start_from_weights(net: MultiExitNet, options: ModelOptions, *, is_trained: bool = True) -> None:
    """Loads what the recipe starts from into ``net``, through the plain model: that has all names, the net those it
    runs. What is not loaded stays as it is in ``net``. Unless the net ``is_trained`` then, weights of another number
    of classes are refused with a ModelError."""
    model = build_model(options.name, net.num_classes, **options.build_options)
    model.load_state_dict(net.model_state_dict(), strict=False)
    for note in _load_weights(model, options, is_trained=is_trained):
        print(note, file=sys.stderr)
    state = model.state_dict()
    # Constants of forward are in the network alone.
    net.load_model_state_dict({name: state.get(name, own) for name, own in net.model_state_dict().items()})


class Profile(NamedTuple):
    """What a network costs, and where it can be cut."""

    costs: CostTable
    exit_points: Sequence[ExitPoint]
    cuts: Sequence[ExitPoint]
    notes: Sequence[str] = ()

    @classmethod
    def of(cls, net: MultiExitNet, costs: CostTable) -> Profile:
        return cls(costs, net.exit_points, net.cuts, net.notes)


def profile_model(
    options: ModelOptions,
    heads: HeadSpace,
    num_classes: int,
    input_size: tuple[int, int],
    latency: LatencyOptions | None = None,
) -> Profile:
    """A model without a run; measured too where ``latency`` says how."""
    latency_device, threads = (latency.device, latency.threads) if latency else ("cpu", None)
    with num_threads(threads):
        net = build_network(options, heads, num_classes, input_size, device=latency_device)
    if latency is None:
        return Profile.of(net, profile(net, input_size, model=options.name))
    return Profile.of(net, _measure_costs(net, input_size, latency, model=options.name))


def profile_bundle(
    path: Path, latency: LatencyOptions | None = None, runtime: RuntimeName | None = None, *, model: str | None = None
) -> Profile:
    """A bundle's network, cut where its instance ends, and its own exits. What is measured in another ``runtime`` than
    torch is measured stage by stage; ``runtime`` and ``model`` as for ``load``. Where torch cannot run the bundle, its
    workload is what its maker counted."""
    bundle = open_bundle(path)
    runs_in = default_runtime(bundle, model)
    chosen = runtime or runs_in
    # Graphs are measured through a session, which runs one image at a time.
    if chosen in GRAPH_RUNTIMES and latency and latency.batch > 1:
        raise MessError(f"{path} is measured in {chosen}, one image at a time: leave --batch out")
    if runs_in in GRAPH_RUNTIMES:
        found = _as_counted(bundle)
    else:
        blueprint, net, _ = restore_bundle(bundle, model=model)
        name, size = _cut_name(blueprint.model, net.num_exits, len(blueprint.exit_points)), blueprint.input_size
        if latency and chosen == "torch":
            return Profile.of(net, _measure_costs(net, size, latency, model=name))
        found = Profile.of(net, profile(net, size, model=name))
    if latency is None:
        return found
    session = load(
        path,
        runtime=chosen,
        precision=precision_of_dtype(latency.dtype),
        threads=latency.threads,
        device=latency.device,
        model=model,
    )
    return found._replace(costs=measure_session(session, found.costs, latency))


def _as_counted(bundle: Bundle) -> Profile:
    """A bundle by its own table of workload, which has every exit of the run that it came from."""
    network, exits = bundle.manifest.network, [choice.exit for choice in bundle.manifest.instance.exits]
    if WORKLOAD not in bundle.manifest.files:
        raise RunError(f"{bundle.path} has no {WORKLOAD}; export it from its run")
    table = CostTable.from_json(bundle.read(WORKLOAD))
    num_exits, whole = exits[-1].exit_index + 1, len(network.exit_points)
    sizes = {len(table.segments), len(table.policies) + 1, len(table.outputs)}
    if sizes != {whole} or not {*exits} <= table.heads.keys():
        raise RunError(f"{bundle.path}: {WORKLOAD} is of another network; export it from its run")
    points = network.exit_points[:num_exits]
    costs = replace(
        table,
        model=_cut_name(network.model, num_exits, whole),
        segments=table.segments[:num_exits],
        heads={exit: table.heads[exit] for exit in exits},
        policies=table.policies[: num_exits - 1],
        outputs=table.outputs[:num_exits],
    )
    if num_exits == whole:
        return Profile(costs, points, points)
    # Which operators do the work was counted for the whole model alone.
    note = "its network is not built here: memory is that of the model before it was cut"
    return Profile(replace(costs, operators={}, uncounted={}), points, points, (note,))


def _cut_name(model: str, num_exits: int, whole: int) -> str:
    return f"{model} cut after exit {num_exits - 1}" if num_exits < whole else model


def measure_run(run: Run, latency: LatencyOptions, name: str, runtime: RuntimeName = "torch") -> CostTable:
    """Measures the run's network on this device, every head of it: RUN/costs/NAME.json. Latency asks for no training.
    In a ``runtime`` of graphs, those of all heads are made, and decisions are of the recipe's first policy."""
    blueprint, net = run.blueprint(), run.network()
    add_heads(net, run.recipe.heads)
    if runtime not in GRAPH_RUNTIMES:
        costs = _measure_costs(net, blueprint.input_size, latency, model=blueprint.model)
    else:
        workload = profile(net, blueprint.input_size, model=blueprint.model)
        policy, calibration = run.recipe.evaluate.policies[0], run.calibration() if latency.dtype == "int8" else []
        runner = partial(graph_runner, calibration=calibration)
        costs = measure_heads(net, workload, latency, runtime=runtime, policy=policy, make_runner=runner)
    run.directory.measured(name).write(costs)
    return costs


def logits_in(
    run: Run, net: MultiExitNet, runtime: RuntimeName, precision: Precision, *, made: MadeStages | None = None
) -> LogitsOf:
    """The logits of every exit of ``net`` as a runtime computes them in a precision. Graphs are made of all heads,
    which takes seconds an exit; ``made`` as for ``graph_runner``."""
    policy, size = run.recipe.evaluate.policies[0], run.blueprint().input_size
    runners: list[tuple[Instance, Runner]] = []
    calibration = run.calibration() if precision == "int8" else []
    copied = None if runtime in GRAPH_RUNTIMES else copy_module(net, lambda tensor: tensor)
    for instance in instances_of_all_heads(net, policy):
        if runtime in GRAPH_RUNTIMES:
            how = partial(graph_runner, runtime=runtime, precision=precision, calibration=calibration, made=made)
            runners.append((instance, how(net, instance, size)))
        else:
            assert copied is not None
            by_torch = TorchRunner(copied, Policy.parse(policy), device=str(run.device), precision=precision)
            runners.append((instance, by_torch))

    def logits_of(image: NDArray[np.uint8]) -> Iterator[tuple[Exit, Tensor]]:
        # Every instance holds one head of each exit; heads that an earlier one gave are passed.
        known: set[Exit] = set()
        for instance, runner in runners:
            live: Live | None = runner.start(image[None])
            new = [choice.exit not in known for choice in instance.exits]
            for choice in instance.exits[: len(new) - new[::-1].index(True)]:  # what all instances share runs once more
                assert live is not None
                step = runner.advance(live, choice.exit, logits=choice.exit not in known)
                live = step.live
                if choice.exit not in known:
                    known.add(choice.exit)
                    yield choice.exit, torch.from_numpy(runner.array(step.logits, 0))

    return logits_of


def _measure_costs(net: MultiExitNet, input_size: tuple[int, int], latency: LatencyOptions, *, model: str) -> CostTable:
    costs = profile(net, input_size, model=model, latency=latency)
    if latency.batch > 1:  # sessions run one image at a time
        return costs
    return replace(costs, additivity=check_additivity(net, costs, latency))
