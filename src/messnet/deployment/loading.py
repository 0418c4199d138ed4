"""What is deployed, a run's instance or a bundle, as a Session."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from messnet.deployment.bundle import Bundle, is_bundle, open_bundle
from messnet.deployment.graphs import OUTPUT, make_graphs, stage_name
from messnet.deployment.runtimes import (
    GraphRunner,
    Precision,
    Runner,
    RuntimeName,
    TorchRunner,
    expect_runtime,
    size_multiple,
)
from messnet.deployment.session import Session
from messnet.errors import RecipeError, RunError
from messnet.images.preprocessing import MEAN, STD
from messnet.network.blueprint import Blueprint
from messnet.network.multi_exit import MultiExitNet
from messnet.network.weights import expect_fit
from messnet.policy.reference import Policy
from messnet.records.costs import CostTable
from messnet.records.instance import Instance
from messnet.records.run_directory import RunDirectory

__all__ = [
    "COSTS",
    "DEFAULT_INSTANCE",
    "GRAPHS",
    "INSTANCES",
    "bundle_tensors",
    "graph_runner",
    "instance_names",
    "load",
    "load_instance",
    "restore_bundle",
    "restore_run",
]

DEFAULT_INSTANCE = "drop-1pp"
INSTANCES = "instances"
COSTS = "costs"
GRAPHS = "onnx"
"""What a manifest calls the graphs."""


def instance_names(path: str | Path) -> list[str]:
    """The instances that searches have left in a run."""
    return sorted(file.stem for file in (Path(path) / INSTANCES).glob("*.json"))


def load_instance(path: str | Path, name: str) -> Instance:
    """Raises RunError that lists the instances there are."""
    file = Path(path) / INSTANCES / f"{name}.json"
    if name not in instance_names(path):
        names = ", ".join(instance_names(path)) or f"none yet: make one with `messnet search {path}`"
        raise RunError(f"{path} has no instance {name!r}; it has {names}")
    return Instance.from_json(file.read_text())


def load(
    path: str | Path,
    *,
    instance: str | Instance | None = None,
    device: str | torch.device = "cpu",
    runtime: RuntimeName = "torch",
    precision: Precision = "f32",
    threads: int | None = None,
) -> Session:
    """A session for an instance of the run, or for the bundle (a folder or a zip), at ``path``.

    ``instance`` is the name of one in the run or one of your own over the run's heads; None: the cheapest within 1 pp
    (``"drop-1pp"``), or the only one. A bundle has but one; one of your own may use its exits. "onnxruntime" and
    "openvino" run the graphs of a bundle that was exported for them; for a run they are made anew, which takes seconds
    an exit. ``precision`` is that of weights and activations; "bf16" and "f16" where the runtime has them.
    ``threads`` of the processor; None: as many as torch is set to. The session's ``costs`` are the run's or bundle's
    table that was measured on this device, in this runtime, with so many threads.

    Raises RunError when something is missing, damaged or newer, ModelError when the network cannot be built here or a
    runtime is not installed, RecipeError for a runtime or precision that there is not, or fewer than 1 thread.
    """
    path = Path(path)
    if threads is not None and threads < 1:
        raise RecipeError(f"a network runs on at least 1 thread, not {threads}")
    expect_runtime(runtime, precision)
    how = _How(torch.device(device), runtime, precision, threads)
    if how.graphs and how.device.type != "cpu":
        raise RecipeError(f"{runtime} runs on the processor here: leave device={str(device)!r} out, or use torch")
    if is_bundle(path):
        return _load_bundle(open_bundle(path), instance, how)
    if RunDirectory(path).exists:
        return _load_run(path, instance, how)
    raise RunError(
        f"{path} is no run directory (no run.json) and no bundle (no manifest.json, no zip); start a run with "
        f"`messnet run RECIPE`, make a bundle of it with `messnet export RUN`"
    )


class _How(NamedTuple):
    device: torch.device
    runtime: RuntimeName
    precision: Precision
    threads: int | None

    @property
    def graphs(self) -> bool:
        return self.runtime in ("onnxruntime", "openvino")

    def by_torch(self, net: MultiExitNet, instance: Instance) -> Runner:
        return TorchRunner(
            net,
            Policy.parse(instance.policy),
            device=self.device,
            precision=self.precision,
            threads=self.threads,
            compiled=self.runtime == "torch-compiled",
        )


def _load_bundle(bundle: Bundle, instance: str | Instance | None, how: _How) -> Session:
    manifest = bundle.manifest
    if how.graphs:
        chosen, runner = _bundled_instance(bundle, instance), _bundled_graphs(bundle, how)
    else:
        _, net, chosen = restore_bundle(bundle, instance)
        runner = how.by_torch(net, chosen)
    tables = (bundle.read(name) for name in sorted(manifest.files) if name.startswith(f"{COSTS}/"))
    return Session(
        runner,
        chosen,
        class_names=manifest.class_names,
        palette=np.array(manifest.palette, np.uint8),
        costs=_measured_costs(tables, runner, chosen),
        input_size=manifest.preprocessing.input_size,
    )


def _load_run(path: Path, instance: str | Instance | None, how: _How) -> Session:
    blueprint, net, chosen = restore_run(path, instance)
    if how.graphs:
        runner = graph_runner(
            net, chosen, blueprint.input_size, runtime=how.runtime, precision=how.precision, threads=how.threads
        )
    else:
        runner = how.by_torch(net, chosen)
    return Session(
        runner,
        chosen,
        class_names=blueprint.class_names,
        palette=np.array(blueprint.palette, np.uint8),
        costs=_measured_costs((file.read_bytes() for file in sorted((path / COSTS).glob("*.json"))), runner, chosen),
        input_size=blueprint.input_size,
    )


def graph_runner(
    net: MultiExitNet,
    instance: Instance,
    input_size: tuple[int, int],
    *,
    runtime: RuntimeName = "onnxruntime",
    precision: Precision = "f32",
    threads: int | None = None,
) -> Runner:
    """The graphs of an instance, made of a network on the CPU, in a runtime that runs graphs."""
    exits = tuple(choice.exit for choice in instance.exits)
    graphs = make_graphs(net, exits, Policy.parse(instance.policy), input_size)
    return GraphRunner(
        graphs,
        exits,
        [point.output_stride for point in net.exit_points],
        runtime=runtime,  # type: ignore[arg-type]
        precision=precision,
        threads=threads,
        size_multiple=size_multiple(net),
    )


def _bundled_graphs(bundle: Bundle, how: _How) -> Runner:
    """Raises RunError for a bundle without graphs."""
    manifest = bundle.manifest
    if GRAPHS not in manifest.runtimes:
        source = bundle.path if "torch" in manifest.runtimes else "RUN"
        raise RunError(
            f"{bundle.path} holds no graphs for {how.runtime}; it is for "
            f"{', '.join(manifest.runtimes) or 'no runtime'}: make one with `messnet export {source} --runtime onnx`"
        )
    stored = manifest.runtimes[GRAPHS]
    exits = tuple(choice.exit for choice in manifest.instance.exits)
    missing = {*map(stage_name, range(len(exits))), OUTPUT} - stored.files.keys()
    if missing:
        raise RunError(f"{bundle.path} holds no graph {min(missing)}; export the bundle again")
    return GraphRunner(
        {name: bundle.read(file) for name, file in stored.files.items()},
        exits,
        [point["output_stride"] for point in manifest.network["exit_points"]],
        runtime=how.runtime,  # type: ignore[arg-type]
        precision=how.precision,
        threads=how.threads,
        size_multiple=int(stored.checked.get("size_multiple", 1)),
    )


def _measured_costs(files: Iterable[bytes], runner: Runner, instance: Instance) -> CostTable | None:
    """The table, if there is a readable one, that was measured one image at a time as ``runner`` runs."""
    exits = {choice.exit for choice in instance.exits}
    here = {**runner.conditions, "batch": 1, "runtime": _kind(runner.conditions["runtime"])}
    for file in files:
        try:
            table = CostTable.from_json(file.decode(errors="replace"))
        except RunError:  # of another schema: it foretells nothing, and nothing else needs it
            continue
        there = {**table.conditions, "runtime": _kind(table.conditions.get("runtime", ""))}
        if there == here and table.heads.keys() >= exits:
            return table
    return None


def _kind(runtime: str | int) -> list[str]:
    """Of a runtime's name all but its version: "torch 2.15.0 eager"."""
    words = str(runtime).split()
    return [words[0], *words[2:]] if words else []


def restore_run(path: Path, instance: str | Instance | None = None) -> tuple[Blueprint, MultiExitNet, Instance]:
    """A run's network with the heads of an instance, chosen as for ``load``. Raises RunError as ``load`` does."""
    run = RunDirectory(path)
    run.record()
    blueprint = Blueprint.from_json(run.read("exits.json", made_by="profile"))
    if instance is None:
        names = instance_names(path)
        instance = names[0] if len(names) == 1 else DEFAULT_INSTANCE
    chosen = load_instance(path, instance) if isinstance(instance, str) else instance
    net = blueprint.build(tuple(choice.exit for choice in chosen.exits))
    try:
        net.load_model_state_dict(safetensors.torch.load(run.read("stage1.safetensors", made_by="pretrain")))
        heads = safetensors.torch.load(run.read("stage2.safetensors", made_by="distill"))
        net.heads.load_state_dict({name: heads[name] for name in net.heads.state_dict()})
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise RunError(f"the weights in {path} are damaged or of another network ({error})") from error
    return blueprint, net, chosen


def restore_bundle(bundle: Bundle, instance: str | Instance | None = None) -> tuple[Blueprint, MultiExitNet, Instance]:
    """A bundle's network, which ends where its instance does. Raises RunError, or ModelError for a model of the user's
    own whose function is not to be found here."""
    manifest, path = bundle.manifest, bundle.path
    chosen = _bundled_instance(bundle, instance)
    weights = manifest.runtimes["torch"].files.get("weights") if "torch" in manifest.runtimes else None
    if weights is None:
        raise RunError(f"{path} holds no weights for torch; it is for {', '.join(manifest.runtimes) or 'no runtime'}")
    own = {"class_names": manifest.class_names, "palette": manifest.palette}
    record = {**manifest.network, **own, "input_size": manifest.preprocessing.input_size}
    blueprint = Blueprint.from_json(json.dumps(record))
    exits = tuple(choice.exit for choice in manifest.instance.exits)
    net = blueprint.build(exits)
    net.keep_only(exits)
    try:
        tensors = safetensors.torch.load(bundle.read(weights))
    except SafetensorError as error:
        raise RunError(f"{path}/{weights} cannot be read ({error}); export the bundle again") from error
    places = bundle_tensors(net)
    expect_fit(tensors, places, source=f"{path}/{weights}")
    for name, place in places.items():
        place.copy_(tensors[name])
    return blueprint, net, chosen


def _bundled_instance(bundle: Bundle, instance: str | Instance | None) -> Instance:
    """The bundle's own, or one that was given. Raises RunError for another's name, and where images are normalised as
    this messnet does not."""
    manifest, path = bundle.manifest, bundle.path
    if isinstance(instance, str) and instance != manifest.instance.name:
        raise RunError(f"{path} has no instance {instance!r}; it has {manifest.instance.name}")
    if (manifest.preprocessing.mean, manifest.preprocessing.std) != (MEAN, STD):
        raise RunError(f"{path} normalises images otherwise: use messnet {manifest.messnet_version}")
    return instance if isinstance(instance, Instance) else manifest.instance


def bundle_tensors(net: MultiExitNet) -> dict[str, Tensor]:
    """What a bundle holds of ``net``, by name: the user's model under its own names, the heads by exit; not copied."""
    model = {f"model.{name}": tensor for name, tensor in net.model_state_dict().items()}
    return model | {f"heads.{name}": tensor for name, tensor in net.heads.state_dict().items()}
