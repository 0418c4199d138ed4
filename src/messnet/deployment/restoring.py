"""From a run or a bundle back to the network with its weights, for torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from messnet.deployment.bundle import Bundle
from messnet.deployment.graph_runner import GraphRunner
from messnet.deployment.graphs import MadeStages, make_graphs
from messnet.deployment.quantising import quantise
from messnet.deployment.torch_runner import size_multiple
from messnet.errors import RunError
from messnet.network.blueprint import Blueprint
from messnet.network.multi_exit import MultiExitNet
from messnet.network.weights import expect_fit
from messnet.policy.policy import Policy
from messnet.records.instance import Instance
from messnet.records.names import GraphRuntime, Precision, expect_runtime
from messnet.records.run_directory import RunDirectory


def restore_run(path: Path, instance: str | Instance | None = None) -> tuple[Blueprint, MultiExitNet, Instance]:
    """A run's network with the heads of an instance, chosen as for ``load``. Raises RunError as ``load`` does."""
    run = RunDirectory(path)
    run.record()
    blueprint = Blueprint.from_json(run.exits.read())
    chosen = instance if isinstance(instance, Instance) else run.read_instance(instance)
    net = blueprint.build(tuple(choice.exit for choice in chosen.exits))
    try:
        net.load_model_state_dict(safetensors.torch.load(run.stage1.read()))
        heads = safetensors.torch.load(run.stage2.read())
        net.heads.load_state_dict({name: heads[name] for name in net.heads.state_dict()})
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise RunError(f"the weights in {path} are damaged or of another network ({error})") from error
    expect_finite(net.tensors(), str(path))
    return blueprint, net, chosen


def restore_bundle(
    bundle: Bundle, instance: str | Instance | None = None, *, model: str | None = None
) -> tuple[Blueprint, MultiExitNet, Instance]:
    """A bundle's network, which ends where its instance does.

    ``model`` is the user's word for the function that builds the network, "module:function"; a bundle's own word is
    taken for models of the zoo only, as opening a stranger's file runs no code. Raises RunError, or ModelError for a
    function that is not to be found here.
    """
    manifest, path = bundle.manifest, bundle.path
    chosen = bundle.choose(instance)
    weights = bundle.weights
    named = manifest.network.model
    if ":" in named and model is None:
        raise RunError(
            f"{path} is of a model of its maker's own, {named}, and opening a bundle imports nothing that the bundle "
            f"names: if you trust that function, name it yourself with --model {named} (in Python model={named!r}), or "
            f"run the bundle's graphs with --runtime onnxruntime"
        )
    own = {"class_names": manifest.class_names, "palette": manifest.palette, "model": model or named}
    preprocessing = manifest.preprocessing
    seen = {
        "input_size": preprocessing.input_size,
        "resize": preprocessing.resize,
        "normalisation": asdict(preprocessing.normalisation),
    }
    record = {**asdict(manifest.network), **own, **seen}
    blueprint = Blueprint.from_json(json.dumps(record))
    exits = tuple(choice.exit for choice in manifest.instance.exits)
    net = blueprint.build(exits)
    net.keep_only(exits)
    try:
        tensors = safetensors.torch.load(bundle.read(weights))
    except (SafetensorError, KeyError) as error:  # KeyError: a number format that safetensors does not know
        raise RunError(f"{path}/{weights} cannot be read ({error}); export the bundle again") from error
    places = net.tensors()
    expect_fit(tensors, places, source=f"{path}/{weights}")
    for name, place in places.items():
        if tensors[name].dtype != place.dtype:
            raise RunError(
                f"{path}/{weights}: {name} is {tensors[name].dtype}, expected {place.dtype}; export the bundle again"
            )
        place.copy_(tensors[name])  # in the memory layout that the network has here
    expect_finite(places, f"{path}/{weights}")
    return blueprint, net, chosen


def expect_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises RunError that names the first tensor with NaN or infinite values: a network with such weights gives class
    0 everywhere, or nothing."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise RunError(
                f"{source}: {name} holds NaN or infinite weights, from a training that failed; train it again"
            )


def graph_runner(
    net: MultiExitNet,
    instance: Instance,
    input_size: tuple[int, int],
    *,
    runtime: GraphRuntime = "onnxruntime",
    precision: Precision = "f32",
    threads: int | None = None,
    calibration: Sequence[NDArray[np.uint8]] = (),
    made: MadeStages | None = None,
) -> GraphRunner:
    """The graphs of an instance, made of a network on the CPU, in a runtime that runs graphs; for int8 with images to
    calibrate on, see ``quantise``; ``made`` as for ``make_graphs``."""
    expect_runtime(runtime, precision)
    exits = tuple(choice.exit for choice in instance.exits)
    graphs = make_graphs(net, exits, Policy.parse(instance.policy), input_size, made=made)
    if precision == "int8":
        graphs = quantise(graphs, calibration, net.normalisation)
    return GraphRunner(
        graphs,
        instance.exits,
        [point.output_stride for point in net.exit_points],
        runtime=runtime,
        precision=precision,
        threads=threads,
        size_multiple=size_multiple(net),
        policy=Policy.parse(instance.policy),
        normalisation=net.normalisation,
    )
