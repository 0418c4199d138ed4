"""Which memory layout a model takes: channels last is faster in many places, but code with views refuses it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn

from messnet.costs.workload import device_of, dtype_of, in_eval_mode
from messnet.network.tracing import logits_of, place_of

# Height and width of the image that a model is tried on, where its own example is larger.
_TRIED_SIZE = 128
# What PyTorch's own modules and these functions do holds in any layout.
_VIEWS = ("view", "view_as", "as_strided")
_KNOWN = ("torch.nn.", "torchvision.ops.misc")


def find_memory_format(
    model: nn.Module, graphs: Iterable[fx.GraphModule], size: tuple[int, int]
) -> tuple[torch.memory_format, str | None]:
    """The layout that a network runs and trains in: channels last, or the model's own where that alone runs, with a
    sentence that says so.

    ``graphs`` are what the model was made into; a model with none, one that takes views or has modules with code of
    their own is tried on two images of at most ``size`` (height, width), forwards and backwards, in eval mode.
    """
    graphs = list(graphs)
    if device_of(model).type == "meta" or (graphs and not any(_is_doubtful(graph) for graph in graphs)):
        return torch.channels_last, None
    tried = [(min(size[0], _TRIED_SIZE), min(size[1], _TRIED_SIZE)), size]
    for one in dict.fromkeys(tried):
        error = _try(model, one, torch.channels_last)
        if error is None:
            return torch.channels_last, None
        if _try(model, one, torch.contiguous_format) is None:
            return torch.contiguous_format, (
                f"runs in its own memory layout: in channels last, which is faster in places, it fails"
                f"{place_of(error)}; there .reshape takes any layout where .view does not"
            )
    return torch.channels_last, None  # nothing can be told, and errors tell of themselves


def _is_doubtful(graph: fx.GraphModule) -> bool:
    for node in graph.graph.nodes:
        if node.op == "call_method" and node.target in _VIEWS:
            return True
        if node.op == "call_module":
            parts = graph.get_submodule(str(node.target)).modules()
            if not all(type(part).__module__.startswith(_KNOWN) for part in parts):
                return True
    return False


def _try(model: nn.Module, size: tuple[int, int], layout: torch.memory_format) -> Exception | None:
    x = torch.zeros(2, 3, *size, dtype=dtype_of(model), device=device_of(model))
    x = x.contiguous(memory_format=layout).requires_grad_()
    with in_eval_mode(model), torch.enable_grad():
        try:
            logits = logits_of(model(x), model)
            if isinstance(logits, Tensor) and logits.requires_grad:
                torch.autograd.grad(logits.sum(), x, allow_unused=True)
        except Exception as error:
            return error
    return None
