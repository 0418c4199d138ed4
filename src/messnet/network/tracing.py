"""A user's model as a graph over its own modules (docs/method.md#segments)."""

from __future__ import annotations

import pickle
import random
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations, takewhile
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from messnet.costs.workload import users_hooks
from messnet.errors import ModelError
from messnet.network.questions import answer_of, failing_answer, is_users

WAY_OUT = 'name the exits by module path, exit_points=["backbone.layer2", ...], and the model is tapped as it runs'


class UntraceableError(ModelError):
    """The request needs the graph of a part that has none; the model can still be tapped as it runs."""


def trace(model: nn.Module, size: Sequence[int] | None = None) -> tuple[fx.GraphModule, dict[str, str]]:
    """The graph of ``model`` from images (N, 3, H, W) to logits, and the modules kept as one node each because they
    could not be traced, with the reason.

    The graph holds in train() and in eval(): a module whose own code asks for the mode is kept whole too. A tensor that
    ``forward`` makes or holds, neither parameter nor buffer, becomes a buffer of the graph. The model is left in the
    mode and with the attributes that it came with. Checks that end in an error are left out of the graph. Raises
    UntraceableError, with the line, when the model's own forward cannot be traced; ModelError where a check refuses
    images of ``size`` (H, W).
    """
    modes = [(module, module.training) for module in model.modules()]
    whole: dict[str, str] = {}
    try:
        while True:
            graphs = []
            # Once in each mode: a graph cannot switch what the code itself does otherwise in the other.
            for training in (True, False):
                for module, _ in modes:
                    module.training = training
                graphs.append(_graph(model, whole, size))
            culprit = _first_difference(*graphs)
            if culprit is None:
                return _graph_module(model, graphs[1]), whole
            if not culprit:
                raise UntraceableError(
                    f"{type(model).__name__}.forward itself does other things in train() than in eval(); move them "
                    f"into a module (nn.Dropout for F.dropout), or {WAY_OUT}"
                )
            whole[culprit] = "does other things in train() than in eval()"
    finally:
        for module, training in modes:
            module.training = training


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that torch.compile or DataParallel was given. Raises ModelError for a model that has no Python code."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            "a TorchScript model has no Python code that could be cut: give the nn.Module that it was made from; its "
            "tensors go into that by model.load_state_dict(torch.jit.load(FILE).state_dict())"
        )
    name = "module" if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) else "_orig_mod"
    inner = getattr(model, name, None)  # importing what torch.compile makes takes seconds
    return unwrapped(inner) if isinstance(inner, nn.Module) else model


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


def expect_classes_first(logits: Tensor, size: Sequence[int], model: nn.Module) -> None:
    """Raises ModelError for ``logits`` that are shaped as (N, h, w, K) from images of ``size`` (H, W), whose rows would
    be taken for classes."""

    def looks_like_image(height: int, width: int) -> bool:
        return 2 / 3 <= (size[0] * width) / (size[1] * height) <= 3 / 2

    if logits.dim() == 4 and looks_like_image(*logits.shape[1:3]) and not looks_like_image(*logits.shape[2:]):
        raise ModelError(
            f"{type(model).__name__} gives {tuple(logits.shape)}, classes last; expected logits (N, K, h, w): return "
            f"y.permute(0, 3, 1, 2)"
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
    """Tells whether a node of a graph over ``root`` changes the first tensor that it reads."""
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    if node.op not in ("call_function", "call_method") or getattr(node.target, "__module__", "") == "_operator":
        return False
    name = str(getattr(node.target, "__name__", node.target))
    return bool(node.kwargs.get("inplace")) or (name.endswith("_") and not name.endswith("__"))


def run_error(error: Exception, shape: tuple[int, ...]) -> ModelError:
    """The error of a model that could be traced but not run on images of ``shape`` (N, 3, H, W)."""
    channels = re.search(r"expected input\[[\d, ]+\] to have (\d+) channels?, but got 3 channels", str(error))
    if channels and f"input[{', '.join(map(str, shape))}]" in str(error):
        way_out = "x.mean(1, keepdim=True)" if channels[1] == "1" else f"{channels[1]} channels of x"
        return ModelError(
            f"the model takes images of {channels[1]} channel{'s' * (channels[1] != '1')}; every image here is RGB "
            f"{shape}, normalised: wrap it in a module whose forward gives it {way_out}, or give it a first layer of 3"
        )
    if "meta tensor" in str(error):
        return UntraceableError(f"the model asks for the values of its feature maps{place_of(error)}; {WAY_OUT}")
    why, *executing = str(error).split("\n\nWhile executing %")
    place = place_of(error) or "".join(f" in {node.partition(' ')[0]}" for node in executing)
    return ModelError(f"the model does not run on images {shape}{place}: {' '.join(why.split())}")


class _Rooted(nn.Module):
    """The model with ``forward(images) -> logits``, whatever its own signature is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return logits_of(self.model(images), self.model)


class _UnansweredError(BaseException):
    """A question that only a run can answer. A model that catches Exception does not catch this."""


class _Tracer(fx.Tracer):
    """Keeps as one node each: torch's own modules, modules without children, normalisation layers (timm's subclass
    BatchNorm; traced into, their training mode would be frozen), and those of ``whole``."""

    def __init__(self, model: nn.Module, whole: Mapping[str, str], size: Sequence[int] | None) -> None:
        super().__init__()
        self.model, self.whole, self.size = model, whole, size
        self.failed: str | None = None
        self.random: str | None = None
        """The innermost module whose forward draws random numbers while it is traced, which would stay the same."""

    def path_of_module(self, mod: nn.Module) -> str:
        return "" if mod is self.model else super().path_of_module(mod).removeprefix("model.")

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m is self.model:
            return False
        childless = next(m.children(), None) is None
        known = isinstance(m, _NormBase) or module_qualified_name in self.whole
        return childless or known or super().is_leaf_module(m, module_qualified_name)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Checks hold: they guard what is computed and are no part of it."""
        answer = answer_of(obj.node)
        if answer is None:
            frame = sys._getframe(2)  # whose code asks the proxy
            failing = failing_answer(frame)
            if failing is None:
                raise _UnansweredError("what it computes depends on values that there are only when it runs")
            if self.size is not None and answer_of(obj.node, self.size) == failing:
                place = _place(traceback.extract_stack(frame, limit=1))
                raise ModelError(
                    f"the model refuses images of {self.size[0]}x{self.size[1]} itself{place}; give it another size"
                )
            answer = not failing
        return answer

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        before = _random_state()
        try:
            result = super().call_module(m, forward, args, kwargs)
        except (Exception, _UnansweredError):
            if self.failed is None:  # the innermost is the first to see it
                self.failed = self.path_of_module(m)
            raise
        if self.random is None and _random_state() != before:
            self.random = self.path_of_module(m)
        if self.is_leaf_module(m, self.path_of_module(m)):
            self._run_hooks(m, args, result)
        return result

    def _run_hooks(self, module: nn.Module, args: tuple[object, ...], result: fx.Proxy) -> None:
        """Shows the user's forward hooks of a module that is one node what they see when it runs, for a hook may keep a
        feature map that a later module reads: from here on that is the node's output. What the hook changes needs no
        care, it changes it again when the module runs."""
        own = users_hooks(module)
        for hook in [hook for hook in module._forward_pre_hooks.values() if hook in own]:
            hook(module, args)
        for hook in [hook for hook in module._forward_hooks.values() if hook in own]:
            if hook(module, args, result) is not None:
                raise UntraceableError(
                    f"a forward hook changes what {self.path_of_module(module)} returns, which a graph does not show; "
                    f"{WAY_OUT}"
                )


def _random_state() -> tuple[object, ...]:
    """The state of every generator of the processor that a forward may draw from."""
    # Asked for at every module: NumPy's state as text took three quarters of the tracing.
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), pickle.dumps(np.random.get_state(legacy=False))


@contextmanager
def _attributes_restored(model: nn.Module) -> Iterator[None]:
    """Attributes of modules are afterwards as they were: what forward assigns while it is traced holds proxies. So are
    hooks, which some libraries install in the first call and remember to have installed."""
    attributes = [(module, dict(module.__dict__)) for module in model.modules()]
    values = [value for _, held in attributes for value in held.values()]
    dicts = [(value, dict(value)) for value in values if isinstance(value, dict)]
    lists = [(value, value.copy()) for value in values if type(value) is list]
    try:
        yield
    finally:
        for module, held in attributes:
            module.__dict__.clear()
            module.__dict__.update(held)
        for one_dict, items in dicts:
            one_dict.clear()
            one_dict.update(items)
        for one_list, entries in lists:
            one_list[:] = entries


class _Traced(NamedTuple):
    graph: fx.Graph
    constants: dict[str, Tensor]
    """The tensors that it reads besides parameters and buffers of the model, by name."""


def _graph(model: nn.Module, whole: dict[str, str], size: Sequence[int] | None) -> _Traced:
    """Traces until it succeeds; the innermost module that fails is kept whole next time, and added to ``whole``."""
    while True:
        tracer, rooted = _Tracer(model, whole, size), _Rooted(model)
        before = _random_state()
        try:
            # guards such as "height divisible by 32" are control flow on sizes; libraries skip them while tracing
            with _attributes_restored(model), mock.patch.object(torch.jit, "is_tracing", return_value=True):
                graph = tracer.trace(rooted)
                rewritten = _rewritten(graph, tracer, rooted)
        except ModelError:
            raise
        except (Exception, _UnansweredError) as error:
            why = f"could not be traced{place_of(error)}: {' '.join(str(error).split()).partition('. ')[0]}"
            if not tracer.failed:
                raise UntraceableError(f"{type(model).__name__} {why}; {WAY_OUT}") from error
            whole[tracer.failed] = why
            continue
        drop_dead_code(graph, model)
        culprit, why = rewritten, "keeps a tensor from one call to the next"
        if _random_state() != before:
            culprit, why = tracer.random or "", "draws random numbers, which would stay the same"
        if culprit is None:
            return _named_as_the_users(graph, rooted, model)
        if not culprit:
            raise UntraceableError(
                f"{type(model).__name__}.forward itself {why}; move that into a module, or {WAY_OUT}"
            )
        whole[culprit] = why


def _rewritten(graph: fx.Graph, tracer: fx.Tracer, rooted: _Rooted) -> str | None:
    """The module that has an attribute which the graph reads as a constant although forward assigns it anew."""
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    for name in tracer.tensor_attrs.values():
        owner, _, attribute = name.rpartition(".")
        if name in read and isinstance(getattr(rooted.get_submodule(owner), attribute, None), fx.Proxy):
            return owner.removeprefix("model").removeprefix(".")
    return None


def _named_as_the_users(graph: fx.Graph, rooted: _Rooted, model: nn.Module) -> _Traced:
    """The graph with the names that tensors have in ``model``, and the ones that are no parameters or buffers of it."""
    known = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    constants: dict[str, Tensor] = {}
    for node in graph.nodes:
        # Modules have the user's names already; tensors those below ``rooted``.
        if node.op != "get_attr":
            continue
        owner, _, attribute = str(node.target).rpartition(".")
        value = getattr(rooted.get_submodule(owner), attribute)
        node.target = str(node.target).removeprefix("model.")
        if isinstance(value, Tensor) and id(value) not in known:
            if node.target.rpartition(".")[0] in called:  # a node of its own, which takes no further buffers
                node.target = node.name
            constants[node.target] = value.detach()
    return _Traced(graph, constants)


def _graph_module(model: nn.Module, traced: _Traced) -> fx.GraphModule:
    root: dict[str, object] = dict(traced.constants)
    for node in traced.graph.nodes:
        if node.op in ("call_module", "get_attr") and node.target not in root:
            owner, _, attribute = str(node.target).rpartition(".")
            root[node.target] = getattr(model.get_submodule(owner), attribute)
    graph_module = fx.GraphModule(root, traced.graph)
    graph_module.training = model.training
    return graph_module


def place_of(error: BaseException) -> str:
    """The last line of the user's own code that an error went through: " at FILE:LINE (CODE)", "" if there is none."""
    return _place(frame for frame in traceback.extract_tb(error.__traceback__) if is_users(frame.filename))


def _place(frames: Iterable[traceback.FrameSummary]) -> str:
    return "".join(f" at {frame.filename}:{frame.lineno} ({frame.line})" for frame in [*frames][-1:])


def _first_difference(one: _Traced, other: _Traced) -> str | None:
    """The innermost module whose own code makes two graphs differ first ("" for the model itself), None if equal."""
    before: list[str] = []
    for a, b in zip(one.graph.nodes, other.graph.nodes, strict=False):
        # The first difference alone tells whose code it is: all that follows may differ because of it.
        if _signature(a, one.constants) != _signature(b, other.constants):
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
    # A module that is one node is the last of its own stack, and made no code.
    return names[:-1] if node.op == "call_module" else names


def _signature(node: fx.Node, constants: Mapping[str, Tensor]) -> tuple[object, ...]:
    value = constants.get(str(node.target)) if node.op == "get_attr" else None
    held = None if value is None else (value.dtype, value.cpu().tolist())
    return node.op, str(node.target), str(node.args), str(node.kwargs), held
