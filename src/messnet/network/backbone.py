"""From a user's model to a chain of segments (method.md section 2): trace, find the legal cuts, choose, cut.

The modules are the user's own: shared, not copied, under their own names, so weights are kept and train() and eval()
mean what they meant.
"""

from __future__ import annotations

import operator
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from messnet.errors import ModelError
from messnet.exit_points import choose_exit_points
from messnet.network.exit_head import BlockKind
from messnet.workload import Workload, count_nodes

__all__ = ["Chain", "ExitPoint", "cut_model"]

# Where architectures keep their segmentation head, the first that exists counts.
_HEAD_NAMES = ("classifier", "decode_head", "segmentation_head", "head")
_ADDITIONS = (operator.add, operator.iadd, torch.add)
# A tap belongs after these, not between them and the layer that they finish.
_FINISHING = (_NormBase, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU, nn.LeakyReLU, nn.ELU, nn.PReLU, nn.Dropout)


@dataclass(frozen=True, kw_only=True)
class ExitPoint:
    """A place in the model where a feature map (N, ``channels``, h, w) can be tapped."""

    node: str
    """Name of the traced node whose output is tapped; identifies the place."""
    module: str
    """The module whose output it is, in the user's names."""
    channels: int
    output_stride: int
    """Input pixels per feature pixel."""
    dilation: int
    """Of the backbone's last spatial convolution before this point."""
    macs: float
    """Workload of the backbone up to here, at the example input's size."""


@dataclass(frozen=True, kw_only=True)
class Chain:
    """A model cut into N segments and its final head: ``final_head(segments[N-1](... segments[0](x)))``."""

    segments: tuple[fx.GraphModule, ...]
    final_head: fx.GraphModule
    exit_points: tuple[ExitPoint, ...]
    """N - 1 early ones, then the end of the backbone."""
    block: BlockKind
    """What the backbone is made of."""


def cut_model(
    model: nn.Module,
    example_input: Tensor,
    *,
    num_exits: int = 6,
    exit_points: Sequence[str] | None = None,
    head: str | None = None,
) -> Chain:
    """Traces ``model`` and cuts it at ``num_exits`` - 1 exit points of about equal workload, or at the named nodes.

    ``example_input`` (N, 3, H, W) gives the size that workload is counted at. ``head`` names the child module that is
    the segmentation head (found by itself where it has a usual name). A trailing bilinear upsampling to the input size
    is left out of the chain: every exit ends with the same one.

    Raises ModelError when the model cannot be traced or has too few places to cut.
    """
    traced = _trace(model)
    shape = tuple(example_input.shape)
    outputs = count_nodes(traced, shape)
    _strip_upsampling(traced, outputs, shape)
    nodes = [node for node in traced.graph.nodes if node.op != "output"]
    head_start = _head_start(model, nodes, head)
    legal = _legal_cuts(traced, nodes[:head_start], outputs)
    if not legal or legal[-1] is not nodes[head_start - 1]:
        raise ModelError(
            "the segmentation head takes more than one tensor of the backbone; name another module with head="
        )
    costs = dict(zip(nodes, accumulate(outputs[node.name][0].macs for node in nodes), strict=True))
    if exit_points is None:
        chosen = [legal[index] for index in choose_exit_points([costs[node] for node in legal], num_exits)]
    else:
        by_name = {node.name: node for node in legal}
        unknown = [name for name in exit_points if name not in by_name]
        if unknown:
            raise ModelError(f"no exit point {unknown[0]!r} in this model; expected some of {', '.join(by_name)}")
        chosen = [by_name[name] for name in exit_points]
        if chosen != [node for node in legal if node in chosen]:
            raise ModelError(f"exit_points must name different places from shallow to deep, got {list(exit_points)}")
    ends = [*chosen, legal[-1]]
    places = [nodes.index(node) for node in ends]
    starts = [0, *(place + 1 for place in places)]
    return Chain(
        segments=tuple(
            _extract(traced, nodes[start : place + 1], ends[k - 1] if k else None)
            for k, (start, place) in enumerate(zip(starts, places, strict=False))
        ),
        final_head=_extract(traced, nodes[head_start:], ends[-1]),
        exit_points=tuple(_exit_point(node, traced, nodes, outputs, costs[node], shape) for node in ends),
        block=_block_kind(traced, nodes[:head_start]),
    )


class _Tracer(fx.Tracer):
    """Keeps as one node each: torch's own modules, modules without children, and normalisation layers (timm's subclass
    BatchNorm; traced into, their training mode would be frozen)."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        childless = next(m.children(), None) is None
        return childless or isinstance(m, _NormBase) or super().is_leaf_module(m, module_qualified_name)


def _trace(model: nn.Module) -> fx.GraphModule:
    try:
        graph = _Tracer().trace(model)
    except Exception as error:
        frames = [
            f
            for f in traceback.extract_tb(error.__traceback__)
            if "/torch/" not in f.filename and f.filename != __file__
        ]
        place = f" at {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""
        raise ModelError(f"{type(model).__name__} could not be traced{place}: {error}") from error
    output = next(iter(reversed(graph.nodes)))
    logits = output.args[0]
    if isinstance(logits, dict):
        logits = logits.get("out")
    if not isinstance(logits, fx.Node):
        raise ModelError(f"{type(model).__name__} must return logits as a tensor or under the key 'out'")
    output.args = (logits,)
    # only size arithmetic and auxiliary outputs die here; an in-place operator is not dead
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    return fx.GraphModule(model, graph)


def _strip_upsampling(traced: fx.GraphModule, outputs: dict[str, tuple[Workload, Any]], shape: tuple[int, ...]) -> None:
    output = next(iter(reversed(traced.graph.nodes)))
    last = output.args[0]
    bilinear = last.target is F.interpolate and last.kwargs.get("mode") == "bilinear"
    to_input = tuple(outputs[last.name][1].shape[-2:]) == shape[-2:]
    if bilinear and to_input and not last.kwargs.get("align_corners"):
        output.args = (last.args[0],)
        traced.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
        traced.recompile()


def _head_start(model: nn.Module, nodes: Sequence[fx.Node], head: str | None) -> int:
    """Position of the first node of the segmentation head."""
    children = [name for name, _ in model.named_children()]
    name = head or next((name for name in _HEAD_NAMES if name in children), None)
    inside = [i for i, node in enumerate(nodes) if name and f"{node.target}.".startswith(f"{name}.")]
    if not inside:
        raise ModelError(
            f"no segmentation head {name or _HEAD_NAMES!r} in {type(model).__name__}; its children are "
            f"{', '.join(children)}: name one with head="
        )
    return inside[0]


def _legal_cuts(
    traced: fx.GraphModule, nodes: Sequence[fx.Node], outputs: dict[str, tuple[Workload, Any]]
) -> list[fx.Node]:
    """Nodes after which just their own feature map is alive, which no normalisation or activation follows, and which
    do not lie inside a residual block: where a block has no skip connection it could be cut, but is wide."""
    residual = {_stack(node)[-1][1] for node in nodes if node.target in _ADDITIONS and _stack(node)}
    last_of = {name: node for node in nodes for name, _ in _stack(node)}
    position = {node: i for i, node in enumerate(nodes)}
    beyond = len(nodes)
    last_use = [max((position.get(user, beyond) for user in node.users), default=i) for i, node in enumerate(nodes)]
    legal, alive_until = [], -1
    for i, node in enumerate(nodes):
        alone = alive_until <= i
        alive_until = max(alive_until, last_use[i])
        value = outputs[node.name][1]
        feature_map = isinstance(value, Tensor) and value.dim() == 4 and node.op != "placeholder"
        finished = not any(
            user.op == "call_module" and isinstance(traced.get_submodule(str(user.target)), _FINISHING)
            for user in node.users
        )
        inside_block = any(kind in residual and last_of[name] is not node for name, kind in _stack(node))
        if alone and feature_map and finished and not inside_block:
            legal.append(node)
    return legal


def _extract(traced: fx.GraphModule, nodes: Sequence[fx.Node], source: fx.Node | None) -> fx.GraphModule:
    """The nodes as a module of their own, from the output of ``source`` to that of the last of ``nodes``."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    if source is not None:
        copies[source] = graph.placeholder("features")
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[nodes[-1]] if nodes else copies[source] if source else None)
    return fx.GraphModule(traced, graph)


def _exit_point(
    node: fx.Node,
    traced: fx.GraphModule,
    nodes: Sequence[fx.Node],
    outputs: dict[str, tuple[Workload, Any]],
    macs: float,
    shape: tuple[int, ...],
) -> ExitPoint:
    features = outputs[node.name][1]
    convs = [conv for conv in _convolutions(traced, nodes[: nodes.index(node) + 1]) if max(conv.kernel_size) > 1]
    last_of = {name: user for user in nodes for name, _ in _stack(user)}
    ended = [name for name, _ in _stack(node) if last_of[name] is node]
    return ExitPoint(
        node=node.name,
        module=ended[0] if ended else str(node.target) if node.op == "call_module" else node.name,
        channels=features.shape[1],
        output_stride=round(shape[-2] / features.shape[-2]),
        dilation=convs[-1].dilation[0] if convs else 1,
        macs=macs,
    )


def _stack(node: fx.Node) -> list[tuple[str, type]]:
    """(name, type) of the modules that a node is part of, outermost first; a module called again is "name@1"."""
    stack = node.meta.get("nn_module_stack", {})
    return [(name, kind) for name, (_, kind) in stack.items() if name]


def _convolutions(traced: fx.GraphModule, nodes: Sequence[fx.Node]) -> list[nn.Conv2d]:
    modules = [traced.get_submodule(str(node.target)) for node in nodes if node.op == "call_module"]
    return [module for module in modules if isinstance(module, nn.Conv2d)]


def _block_kind(traced: fx.GraphModule, nodes: Sequence[fx.Node]) -> BlockKind:
    depthwise = any(conv.groups == conv.in_channels > 1 for conv in _convolutions(traced, nodes))
    return "inverted_residual" if depthwise else "bottleneck"
