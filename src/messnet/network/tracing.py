"""A user's model as a graph over its own modules (method.md section 2)."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from itertools import combinations, takewhile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from messnet.errors import ModelError

__all__ = [
    "WAY_OUT",
    "UntraceableError",
    "drop_dead_code",
    "logits_of",
    "module_stack",
    "run_error",
    "trace",
    "writes_in_place",
]

WAY_OUT = 'name the exits by module path, exit_points=["backbone.layer2", ...], and the model is tapped as it runs'
_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


class UntraceableError(ModelError):
    """What is asked of the model needs a graph of a part that has none; tapping does not."""


def trace(model: nn.Module) -> tuple[fx.GraphModule, dict[str, str]]:
    """The graph of ``model`` from images (N, 3, H, W) to logits, and the modules kept as one node each because they
    could not be traced, with the reason.

    The graph holds in train() and in eval(): a module whose own code asks for the mode is kept whole too. The model is
    left in the mode it came in. Raises UntraceableError, with the line, when the model's own forward cannot be traced.
    """
    modes = [(module, module.training) for module in model.modules()]
    whole: dict[str, str] = {}
    try:
        while True:
            graphs = []
            for training in (True, False):
                for module, _ in modes:
                    module.training = training
                graphs.append(_graph(model, whole))
            culprit = _first_difference(*graphs)
            if culprit is None:
                return fx.GraphModule(model, graphs[1]), whole
            if not culprit:
                raise UntraceableError(
                    f"{type(model).__name__}.forward itself does other things in train() than in eval(); move them "
                    f"into a module (nn.Dropout for F.dropout), or {WAY_OUT}"
                )
            whole[culprit] = "does other things in train() than in eval()"
    finally:
        for module, training in modes:
            module.training = training


def logits_of(output: Any, model: nn.Module) -> Any:
    """The logits in what ``model`` returned: a tensor, under "out", or as ``.logits``. Raises ModelError otherwise."""
    if isinstance(output, Tensor | fx.Proxy):
        return output
    if isinstance(output, Mapping) and "out" in output:
        return output["out"]
    if getattr(output, "logits", None) is not None:
        return output.logits
    kind = type(output).__name__
    if isinstance(output, tuple | list):
        kind = f"a {kind} of {len(output)}"
    elif isinstance(output, Mapping):
        kind = f"a {kind} with the keys {', '.join(map(repr, output))}"
    raise ModelError(
        f"{type(model).__name__} returned {kind}; expected logits (N, K, H, W) as a tensor, under the key 'out' or as "
        f".logits: wrap it in a module that returns those"
    )


def module_stack(node: fx.Node) -> list[tuple[str, type]]:
    """(name, type) of the modules that a node is part of, outermost first; a module called again is "name@1"."""
    stack = node.meta.get("nn_module_stack", {})
    return [(name, kind) for name, (_, kind) in stack.items() if name]


def drop_dead_code(graph: fx.Graph, root: nn.Module) -> None:
    """Only size arithmetic and auxiliary outputs die; what writes into something that lives lives."""

    def lives(node: fx.Node) -> bool:
        if not writes_in_place(node, root):
            return node.op in ("placeholder", "output")
        return any(user is not node for source in node.all_input_nodes[:1] for user in source.users)

    graph.eliminate_dead_code(is_impure_node=lives)


def writes_in_place(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node of a graph over ``root`` changes the first tensor that it reads."""
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    if node.op not in ("call_function", "call_method") or getattr(node.target, "__module__", "") == "_operator":
        return False
    name = str(getattr(node.target, "__name__", node.target))
    return bool(node.kwargs.get("inplace")) or (name.endswith("_") and not name.endswith("__"))


def run_error(error: Exception, shape: tuple[int, ...]) -> ModelError:
    """Of a model that could be traced but not run on images of this shape."""
    if "meta tensor" in str(error):
        return UntraceableError(f"the model asks for the values of its feature maps{_place(error)}; {WAY_OUT}")
    why, *executing = str(error).split("\n\nWhile executing %")
    place = _place(error) or "".join(f" in {node.partition(' ')[0]}" for node in executing)
    return ModelError(f"the model does not run on images {shape}{place}: {' '.join(why.split())}")


class _Rooted(nn.Module):
    """The model with ``forward(images) -> logits``, whatever its own signature is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return logits_of(self.model(images), self.model)


class _Tracer(fx.Tracer):
    """Keeps as one node each: torch's own modules, modules without children, normalisation layers (timm's subclass
    BatchNorm; traced into, their training mode would be frozen), and those of ``whole``."""

    def __init__(self, model: nn.Module, whole: Mapping[str, str]) -> None:
        super().__init__()
        self.model, self.whole = model, whole
        self.failed: str | None = None

    def path_of_module(self, mod: nn.Module) -> str:
        return "" if mod is self.model else super().path_of_module(mod).removeprefix("model.")

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m is self.model:
            return False
        childless = next(m.children(), None) is None
        known = isinstance(m, _NormBase) or module_qualified_name in self.whole
        return childless or known or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None:  # the innermost is the first to see it
                self.failed = self.path_of_module(m)
            raise


def _graph(model: nn.Module, whole: dict[str, str]) -> fx.Graph:
    """Traces until it succeeds; the innermost module that fails is kept whole next time, and added to ``whole``."""
    while True:
        tracer = _Tracer(model, whole)
        try:
            # guards such as "height divisible by 32" are control flow on sizes; libraries skip them while tracing
            with mock.patch.object(torch.jit, "is_tracing", return_value=True):
                graph = tracer.trace(_Rooted(model))
        except ModelError:
            raise
        except Exception as error:
            why = f"could not be traced{_place(error)}: {' '.join(str(error).split()).partition('. ')[0]}"
            if not tracer.failed:
                raise UntraceableError(f"{type(model).__name__} {why}; {WAY_OUT}") from error
            whole[tracer.failed] = why
            continue
        for node in graph.nodes:
            if node.op == "get_attr":
                node.target = str(node.target).removeprefix("model.")
        drop_dead_code(graph, model)
        return graph


def _place(error: Exception) -> str:
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_NOT_THE_USERS)
    ]
    return f" at {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""


def _first_difference(one: fx.Graph, other: fx.Graph) -> str | None:
    """The innermost module whose own code makes two graphs differ first ("" for the model itself), None if equal."""
    before: list[str] = []
    for a, b in zip(one.nodes, other.nodes, strict=False):
        if _signature(a) != _signature(b):
            callers = (before, _callers(a), _callers(b))
            shared = max((_common(*pair) for pair in combinations(callers, 2)), key=len)
            return shared[-1].partition("@")[0] if shared else ""
        before = _callers(a)
    return None


def _common(one: list[str], other: list[str]) -> list[str]:
    return [a for a, b in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]


def _callers(node: fx.Node) -> list[str]:
    """The modules whose code makes the node, outermost first."""
    names = [name for name, _ in module_stack(node)]
    return names[:-1] if node.op == "call_module" else names


def _signature(node: fx.Node) -> tuple[str, ...]:
    return node.op, str(node.target), str(node.args), str(node.kwargs)
