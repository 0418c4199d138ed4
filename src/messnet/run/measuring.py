"""A recipe's network, and what it costs on the device at hand: that of a model, a bundle or a run."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from messnet.costs.latency import LatencyOptions, num_threads
from messnet.deployment.bundle import open_bundle
from messnet.deployment.loading import load
from messnet.deployment.measurement import check_additivity, measure_heads, measure_session
from messnet.deployment.restoring import restore_bundle
from messnet.errors import ModelError
from messnet.network.exit_head import HeadSpace
from messnet.network.multi_exit import MultiExitNet, convert
from messnet.network.weights import load_backbone_weights, load_weights
from messnet.network.zoo import build_model, build_noted_model
from messnet.profiling import profile
from messnet.records.costs import CostTable
from messnet.records.names import GRAPH_RUNTIMES, RuntimeName, precision_of_dtype
from messnet.run.recipe import ModelOptions
from messnet.run.run import Run, add_heads

__all__ = ["build_network", "measure_run", "profile_bundle", "profile_model", "start_from_weights"]


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
    ).cpu()
    net.backbone.notes = (*notes, *net.notes)
    if net.num_classes != num_classes:
        raise ModelError(f"{options.name} gives {net.num_classes} classes, expected {num_classes}")
    add_heads(net, heads)
    return net


def _load_weights(model: nn.Module, options: ModelOptions) -> list[str]:
    """Loads what the recipe starts from, if anything, and says what was not as expected."""
    if options.weights:
        return load_weights(model, options.weights)
    if options.backbone_weights:
        return load_backbone_weights(model, options.backbone_weights, head=options.head)
    return []


def start_from_weights(net: MultiExitNet, options: ModelOptions) -> None:
    """Loads what the recipe starts from into ``net``, through the plain model: that has all names, the net those it
    runs. What is not loaded stays as it is in ``net``."""
    model = build_model(options.name, net.num_classes, **options.build_options)
    model.load_state_dict(net.model_state_dict(), strict=False)
    for note in _load_weights(model, options):
        print(note, file=sys.stderr)
    state = model.state_dict()
    # Constants of forward are in the network alone.
    net.load_model_state_dict({name: state.get(name, own) for name, own in net.model_state_dict().items()})


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
    path: Path, latency: LatencyOptions | None = None, runtime: RuntimeName = "torch", *, model: str | None = None
) -> tuple[MultiExitNet, CostTable]:
    """A bundle's network, cut where its instance ends, and what its own exits cost, as ``profile_model``; measured in
    another ``runtime`` stage by stage. ``model``: see ``restore_bundle``."""
    blueprint, net, _ = restore_bundle(open_bundle(path), model=model)
    cut = net.num_exits < len(blueprint.exit_points)
    name = f"{blueprint.model} cut after exit {net.num_exits - 1}" if cut else blueprint.model
    if latency is None:
        return net, profile(net, blueprint.input_size, model=name)
    if runtime == "torch":
        return net, _measure_costs(net, blueprint.input_size, latency, model=name)
    precision = precision_of_dtype(latency.dtype)
    threads, device = latency.threads, latency.device
    session = load(path, runtime=runtime, precision=precision, threads=threads, device=device, model=model)
    return net, measure_session(session, profile(net, blueprint.input_size, model=name), latency)


def measure_run(run: Run, latency: LatencyOptions, name: str, runtime: RuntimeName = "torch") -> CostTable:
    """Measures the run's network on this device, every head of it: RUN/costs/NAME.json. Latency asks for no training.
    In a ``runtime`` of graphs, those of all heads are made, and decisions are of the recipe's first policy."""
    blueprint, net = run.blueprint(), run.network()
    add_heads(net, run.recipe.heads)
    if runtime not in GRAPH_RUNTIMES:
        costs = _measure_costs(net, blueprint.input_size, latency, model=blueprint.model)
    else:
        workload = profile(net, blueprint.input_size, model=blueprint.model)
        costs = measure_heads(net, workload, latency, runtime=runtime, policy=run.recipe.evaluate.policies[0])
    run.directory.measured(name).write(costs)
    return costs


def _measure_costs(net: MultiExitNet, input_size: tuple[int, int], latency: LatencyOptions, *, model: str) -> CostTable:
    costs = profile(net, input_size, model=model, latency=latency)
    if latency.batch > 1:  # sessions run one image at a time
        return costs
    return replace(costs, additivity=check_additivity(net, costs, latency))
