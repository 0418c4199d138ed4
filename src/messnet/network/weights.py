"""The user's weights: from a file, or torchvision's by name, into the user's own model before it is converted."""

from __future__ import annotations

import contextlib
import difflib
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from messnet.errors import ModelError

__all__ = ["expect_fit", "load_weights"]

# Where training scripts put the state dict in what they save, and what wrappers put before each name.
_CONTAINERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("", "module.", "model.")
_AUXILIARY = "aux_classifier."
_COUNTER = "num_batches_tracked"
_NAMED = re.compile(r"\w+_Weights\.\w+")


def load_weights(model: nn.Module, source: str | Path) -> list[str]:
    """Loads ``source`` into ``model`` and returns what was not as expected but harmless, a sentence each.

    ``source`` is a .safetensors file, a torch state dict (.pt, .pth, alone or in a checkpoint; read as weights only: no
    code of the file runs), or torchvision's name of weights, such as "FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1",
    downloaded once. Tensors of an auxiliary classifier that the model does not have are left out. Where only the last
    layer (of the model, and of its auxiliary classifier) differs, and only in the number of classes, that layer keeps
    its initial weights and the rest is loaded.

    Raises ModelError when it cannot be read, or a tensor is missing, unexpected or of another shape; nothing is loaded
    then.
    """
    own, state = model.state_dict(), _read(str(source))
    renamed = [
        {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        for prefix in _PREFIXES
        if all(name.startswith(prefix) for name in state)
    ]
    adapted = [_adapted(candidate, own) for candidate in renamed]
    fitting, notes = next((pair for pair in adapted if pair[0].keys() == own.keys()), adapted[0])
    fitting, more = _with_own_classifier(fitting, own, model)
    notes = [*notes, *more]
    expect_fit(fitting, own, source=str(source))
    model.load_state_dict(fitting)
    return [f"{source}: {note}" for note in notes]


def expect_fit(state: Mapping[str, Tensor], own: Mapping[str, Tensor], *, source: str) -> None:
    """Raises ModelError that lists what ``state`` lacks, has too much or in another shape than a model's ``own``."""
    problems = [f"missing {name}" for name in own if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in own]
    problems += [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ModelError(
            f"{source} does not fit the model: {'; '.join(problems[:5])}{more}. Give weights of this very model, with "
            f"as many classes"
        )


def _adapted(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """``state`` without an auxiliary classifier that has no place, with the counters that old files lack; in words."""
    auxiliary = [name for name in state if name.startswith(_AUXILIARY) and name not in own]
    # Files from before torch 0.4.1, some of torchvision's too, have none; torch itself lets them start at zero.
    statistics = {f"{name.removesuffix('running_mean')}{_COUNTER}" for name in state if name.endswith("running_mean")}
    counters = [name for name in own if name in statistics and name not in state]
    notes = []
    if auxiliary:
        notes.append(f"{len(auxiliary)} tensors of {_AUXILIARY[:-1]} left out, the model has no place for them")
    if counters:
        notes.append(f"{_COUNTER} of {len(counters)} normalisation layers is not in it and starts as in a new model")
    kept = {name: tensor for name, tensor in state.items() if name not in auxiliary}
    return kept | {name: own[name] for name in counters}, notes


def _with_own_classifier(
    state: dict[str, Tensor], own: Mapping[str, Tensor], model: nn.Module
) -> tuple[dict[str, Tensor], list[str]]:
    """``state`` with the model's own last layers where they tell another number of classes apart; in words."""
    other = {name: state[name] for name, tensor in own.items() if name in state and state[name].shape != tensor.shape}
    if not other or other.keys() - _last_layers(model):
        return state, []
    counts = {(len(tensor), len(own[name])) for name, tensor in other.items() if tensor.dim() and own[name].dim()}
    if len(counts) != 1 or any(tensor.shape[1:] != own[name].shape[1:] for name, tensor in other.items()):
        return state, []
    ((theirs, ours),) = counts
    note = f"{', '.join(other)}: of {theirs} classes, the model has {ours}; initialised anew, all else is loaded"
    return state | {name: own[name] for name in other}, [note]


def _last_layers(model: nn.Module) -> set[str]:
    """Parameters of the last layer of the model, and of the last one of an auxiliary classifier."""
    layers = [name for name, module in model.named_modules() if [*module.parameters(recurse=False)]]
    main = [name for name in layers if not name.startswith(_AUXILIARY)][-1:]
    auxiliary = [name for name in layers if name.startswith(_AUXILIARY)][-1:]
    return {f"{name}.{kind}".lstrip(".") for name in (*main, *auxiliary) for kind in ("weight", "bias")}


def _read(source: str) -> dict[str, Tensor]:
    path = Path(source)
    if path.is_file():
        content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    elif _NAMED.fullmatch(source):
        content = _download(source)
    else:
        raise ModelError(
            f"no weights {source}: expected a .safetensors file, a torch state dict (.pt, .pth) or a name of "
            f"torchvision's such as FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1"
        )
    found = type(content).__name__
    if isinstance(content, dict):
        state = next((content[key] for key in _CONTAINERS if isinstance(content.get(key), dict)), content)
        if all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()):
            return state
        found = f"the keys {', '.join(map(str, [*content][:5]))}"
    raise ModelError(
        f"{source} holds no state dict: expected tensors by name, alone or under one of {', '.join(_CONTAINERS)}, got "
        f"{found}; save model.state_dict()"
    )


def _read_safetensors(path: Path) -> Any:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read ({error}); expected a whole safetensors file") from error


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise ModelError(
                f"{path} needs code to be read ({code[1]}), which could do anything, and is not opened: save the "
                f"tensors alone, torch.save(model.state_dict(), ...) or as safetensors"
            ) from error
        raise ModelError(
            f"{path} cannot be read (damaged, or not made by torch.save); expected a whole torch state dict or a "
            f".safetensors file"
        ) from error


def _download(name: str) -> Any:
    from torchvision.models import get_model_weights, get_weight, list_models

    try:
        weights = get_weight(name)
    except (ValueError, KeyError) as error:
        known = [repr(weights) for model in list_models() for weights in get_model_weights(model)]
        of_model = [other for other in known if other.startswith(f"{name.split('.')[0]}.")]
        close = of_model or difflib.get_close_matches(name, known, 3)
        hint = f"did you mean {' or '.join(close)}?" if close else "its documentation lists them, model by model"
        raise ModelError(f"torchvision has no weights {name}; {hint}") from error
    try:
        with contextlib.redirect_stdout(sys.stderr):  # torch announces the download on stdout, where JSON may go
            return weights.get_state_dict(check_hash=True, map_location="cpu", weights_only=True)
    except Exception as error:  # a network has many ways to fail, a damaged file too
        kept = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
        if kept.exists():
            raise ModelError(f"{kept} cannot be read (damaged); delete it, it is downloaded again then") from error
        raise ModelError(
            f"{name} could not be downloaded ({error}): is the network reachable? Where it is not, fetch {weights.url} "
            f"elsewhere and give the file instead of the name"
        ) from error
