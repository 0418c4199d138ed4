"""What is deployed, read back into a Session. For now that is a run directory; bundles come with ``export``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError

from messnet.deployment.inference import Session
from messnet.errors import RunError
from messnet.instance import Instance
from messnet.network.blueprint import Blueprint
from messnet.runs import RunDirectory

__all__ = ["DEFAULT_INSTANCE", "INSTANCES", "instance_names", "load", "load_instance"]

DEFAULT_INSTANCE = "drop-1pp"
INSTANCES = "instances"


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
    """A session for an instance of the run at ``path``.

    ``instance`` is the name of one in the run or one of your own over the run's heads; None: the cheapest within 1 pp
    (``"drop-1pp"``), or the only one. Raises RunError when something is missing, damaged or newer.
    """
    run = RunDirectory(Path(path))
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
    return Session(
        net,
        chosen,
        class_names=blueprint.class_names,
        palette=np.array(blueprint.palette, np.uint8),
        device=device,
    )
