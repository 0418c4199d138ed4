"""What is deployed, a run's instance or a bundle, as a Session."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from messnet.deployment.bundle import Bundle, is_bundle, open_bundle
from messnet.deployment.inference import Session
from messnet.errors import RunError
from messnet.instance import Instance
from messnet.network.blueprint import Blueprint
from messnet.network.multi_exit import MultiExitNet
from messnet.network.weights import expect_fit
from messnet.preprocessing import MEAN, STD
from messnet.runs import RunDirectory

__all__ = [
    "COSTS",
    "DEFAULT_INSTANCE",
    "INSTANCES",
    "bundle_tensors",
    "instance_names",
    "load",
    "load_instance",
    "restore_bundle",
    "restore_run",
]

DEFAULT_INSTANCE = "drop-1pp"
INSTANCES = "instances"
COSTS = "costs"


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


def load(path: str | Path, *, instance: str | Instance | None = None, device: str | torch.device = "cpu") -> Session:
    """A session for an instance of the run, or for the bundle (a folder or a zip), at ``path``.

    ``instance`` is the name of one in the run or one of your own over the run's heads; None: the cheapest within 1 pp
    (``"drop-1pp"``), or the only one. A bundle has but one; one of your own may use its exits. Raises RunError when
    something is missing, damaged or newer, ModelError when the network cannot be built here.
    """
    path = Path(path)
    if is_bundle(path):
        blueprint, net, chosen = restore_bundle(open_bundle(path), instance)
    elif RunDirectory(path).exists:
        blueprint, net, chosen = restore_run(path, instance)
    else:
        raise RunError(
            f"{path} is no run directory (no run.json) and no bundle (no manifest.json, no zip); start a run with "
            f"`messnet run RECIPE`, make a bundle of it with `messnet export RUN`"
        )
    return Session(
        net,
        chosen,
        class_names=blueprint.class_names,
        palette=np.array(blueprint.palette, np.uint8),
        device=device,
    )


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
    if isinstance(instance, str) and instance != manifest.instance.name:
        raise RunError(f"{path} has no instance {instance!r}; it has {manifest.instance.name}")
    if (manifest.preprocessing.mean, manifest.preprocessing.std) != (MEAN, STD):
        raise RunError(f"{path} normalises images otherwise: use messnet {manifest.messnet_version}")
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
    return blueprint, net, instance if isinstance(instance, Instance) else manifest.instance


def bundle_tensors(net: MultiExitNet) -> dict[str, Tensor]:
    """What a bundle holds of ``net``, by name: the user's model under its own names, the heads by exit; not copied."""
    model = {f"model.{name}": tensor for name, tensor in net.model_state_dict().items()}
    return model | {f"heads.{name}": tensor for name, tensor in net.heads.state_dict().items()}
