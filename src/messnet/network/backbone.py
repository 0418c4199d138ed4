"""From a user's model to a chain of segments (docs/method.md#segments): find the legal cuts, choose, cut.

The modules are the user's own: shared, not copied, under their own names, so weights are kept and train() and eval()
mean what they meant.
"""

from __future__ import annotations

import difflib
import operator
import warnings
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from itertools import accumulate, islice, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves

from messnet.costs.latency import node_latencies
from messnet.costs.workload import Workload, count_nodes, in_eval_mode
from messnet.errors import ModelError
from messnet.network.exit_head import BlockKind
from messnet.network.exit_points import ExitCost, choose_exit_points
from messnet.network.tracing import (
    WAY_OUT,
    UntraceableError,
    drop_dead_code,
    expect_classes_first,
    module_stack,
    run_error,
    trace,
    writes_in_place,
)
from messnet.records.exit_point import ExitPoint

# Where architectures keep their segmentation head, the first that exists counts.
_HEAD_NAMES = ("classifier", "decode_head", "segmentation_head", "head")
_MERGES = (operator.add, operator.iadd, torch.add, torch.cat, torch.concat)
# Height and width of the image that a doubtful segment is exported for, where the example is larger.
_TRIED_SIZE = 128
# A tap belongs after these, not between them and the layer that they finish.
_FINISHING = (_NormBase, _DropoutNd, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU, nn.LeakyReLU, nn.ELU, nn.PReLU)


class State(NamedTuple):
    """The values at an exit point that something later reads."""

    features: Tensor
    """(N, C, h, w): the tapped feature map."""
    kept: tuple[Any, ...] = ()
    """Further values that later segments read: the tensors of skip connections."""


class Backbone(nn.Module, ABC):
    """A user's model that can be run from exit point to exit point."""

    exit_points: tuple[ExitPoint, ...]
    """N - 1 early ones, then the end of the backbone."""
    cuts: tuple[ExitPoint, ...]
    """Every place where an early exit could sit, then the end of the backbone."""
    block: BlockKind
    """The kind of block that the backbone is made of."""
    num_classes: int
    notes: tuple[str, ...]
    """Sentences that the user should read: what the conversion kept whole, left out or could not do."""
    final_head: nn.Module | None
    """None once it is cut off."""
    exportable: bool
    """True where every segment is a graph of its own, as an export needs."""
    memory_format: torch.memory_format = torch.channels_last
    """The memory layout to run and train in: channels last, or contiguous where the model's code takes nothing else."""

    @abstractmethod
    def states(self, x: Tensor) -> Generator[State]:
        """The state at every exit point, one after the other: a segment runs when its state is asked for."""

    def run_until(self, x: Tensor, exit_index: int) -> State:
        """The state at one exit point; nothing past it runs."""
        # Closed, not left to the garbage collector: the forward of a tapped model waits until then.
        with closing(self.states(x)) as states:
            return next(islice(states, exit_index, None))

    @abstractmethod
    def segment_parameters(self) -> tuple[int, ...]:
        """Number of parameters of each segment, (N,)."""

    @abstractmethod
    def model_state_dict(self) -> dict[str, Tensor]:
        """The tensors of the user's model under its own names, one that has several under the first of them."""

    @abstractmethod
    def cut_after(self, exit_index: int) -> None:
        """Removes what lies past an exit point, the final head too. Raises ModelError where that cannot be told."""


class Chain(Backbone):
    """A traced model in N segments and its final head, graphs of their own over the user's modules."""

    exportable = True

    def __init__(
        self,
        segments: Iterable[fx.GraphModule],
        final_head: fx.GraphModule,
        *,
        exit_points: tuple[ExitPoint, ...],
        cuts: tuple[ExitPoint, ...],
        block: BlockKind,
        num_classes: int,
        notes: tuple[str, ...],
    ) -> None:
        super().__init__()
        self.segments = nn.ModuleList(segments)
        self.final_head: nn.Module | None = final_head
        self.exit_points, self.cuts, self.block = exit_points, cuts, block
        self.num_classes, self.notes = num_classes, notes

    def states(self, x: Tensor) -> Generator[State]:
        values: tuple[Any, ...] = (x,)
        del x  # not kept alive behind the first segment
        for segment in self.segments:
            values = segment(*values)
            yield State(values[0], tuple(values[1:]))

    def segment_parameters(self) -> tuple[int, ...]:
        seen: set[nn.Parameter] = set()  # a module that several segments run counts with the first
        sizes = []
        for segment in self.segments:
            new = set(segment.parameters()) - seen
            sizes.append(sum(p.numel() for p in new))
            seen |= new
        return tuple(sizes)

    def model_state_dict(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for part in (*self.segments, *([self.final_head] if self.final_head is not None else [])):
            state |= part.state_dict(keep_vars=True)
        return distinct(state)

    def cut_after(self, exit_index: int) -> None:
        end = self.exit_points[exit_index]
        del self.segments[exit_index + 1 :]
        self.final_head = None
        self.exit_points = self.exit_points[: exit_index + 1]
        self.cuts = (*(cut for cut in self.cuts if cut.macs < end.macs), end)


def distinct(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state``, a state dict with its variables, without the second and further names of tied tensors."""
    first: dict[int, str] = {}
    # By identity, for == of two tensors compares their elements.
    for name, tensor in state.items():
        first.setdefault(id(tensor), name)
    return {name: tensor.detach() for name, tensor in state.items() if first[id(tensor)] == name}


def cut_model(
    model: nn.Module,
    example_input: Tensor,
    *,
    num_exits: int = 6,
    exit_points: Sequence[str] | None = None,
    head: str | None = None,
    exit_cost: ExitCost = "workload",
) -> Chain:
    """Traces ``model`` and cuts it at ``num_exits`` - 1 exit points of about equal cost, or at the named places.

    ``example_input`` (N, 3, H, W) gives the size that cost is counted, or measured, at. ``exit_points`` names traced
    nodes or modules whose output is a feature map. ``head`` names the module that is the segmentation head (found by
    itself where it has a usual name, else the last convolution). A trailing bilinear upsampling to the input size is
    left out of the chain: every exit ends with the same one.

    Raises ModelError when the model cannot be cut, its UntraceableError where tapping still works.
    """
    traced, whole = trace(model, example_input.shape[-2:])
    graph = _Graph(traced, example_input)
    notes = _kept_whole(whole)
    notes += graph.strip_upsampling()
    graph.expect_logits(model)
    head, note = find_head(model, head, graph.modules())
    graph.end_backbone(head)
    notes += note
    legal = graph.legal_cuts()
    # An instance that is cut between tensors alone can be exported: other places only where there are too few of these.
    passing = [node for node in legal if graph.passes_tensors(node)]
    if len(passing) >= num_exits - 1:
        legal = passing
    costs = graph.cumulative(exit_cost, example_input)
    if exit_points is None:
        chosen = _even(legal, costs, num_exits, [*notes, WAY_OUT] if whole else [])
    else:
        chosen = [graph.named(name, whole) for name in exit_points]
        if [graph.position[node] for node in chosen] != sorted({graph.position[node] for node in chosen}):
            raise ModelError(f"exit_points must name different places from shallow to deep, got {list(exit_points)}")
    by_latency = exit_cost == "latency"
    points = {node: graph.exit_point(node, costs[node] if by_latency else None) for node in (*legal, *chosen)}
    notes += [
        f"past the exit point {points[node].module} the model needs more than tensors, which no graph passes on: an "
        f"instance that goes on from there runs with torch alone"
        for node in chosen
        if not graph.passes_tensors(node)
    ]
    end = graph.exit_point(graph.end, max(costs.values()) if by_latency else None, ends=True)
    # A segment holds the nodes from one cut to the next, the last one those up to the head.
    starts = [0, *(graph.position[node] + 1 for node in chosen), graph.head_start]
    states = [graph.alive_after(start, node) for start, node in zip(starts[1:], [*chosen, graph.end], strict=True)]
    chain = Chain(
        (
            graph.extract(start, stop, source, target)
            for start, stop, source, target in zip(starts, starts[1:], [[], *states], states, strict=False)
        ),
        graph.extract(graph.head_start, len(graph.nodes), states[-1], [graph.logits]),
        exit_points=(*(points[node] for node in chosen), end),
        cuts=(*(points[node] for node in legal), end),
        block=block_kind(model, head),
        num_classes=graph.value(graph.logits).shape[1],
        notes=tuple(notes),
    )
    chain.notes += _left_out(model, chain)
    chain.notes += _without_graph(chain, whole, example_input)
    return chain


def _even(legal: Sequence[fx.Node], costs: Mapping[fx.Node, float], num_exits: int, why: list[str]) -> list[fx.Node]:
    """The cuts at equal steps of cost. Raises ModelError, with ``why`` there are too few."""
    try:
        chosen = choose_exit_points([*(costs[node] for node in legal), max(costs.values())], num_exits)
    except ModelError as error:
        raise ModelError("; ".join([str(error), *why])) from error
    return [legal[i] for i in chosen]


def _left_out(model: nn.Module, chain: Chain) -> tuple[str, ...]:
    """A sentence if tensors of the model, such as those of an auxiliary classifier, reach no logits."""
    used = chain.state_dict(keep_vars=True).values()
    known, state = {id(tensor) for tensor in used}, model.state_dict(keep_vars=True)
    run = [name for name, tensor in state.items() if id(tensor) in known]
    running = {name[:i] for name in run for i, letter in enumerate(name) if letter == "."}
    idle = []
    for name in (name for name in state if name not in run):
        # The outermost module of which nothing runs stands for all its tensors.
        outer = list(accumulate(name.split("."), "{}.{}".format))
        idle.append(next((module for module in outer if module not in running), name))
    words = f"left out, for it reaches no logits: {', '.join(dict.fromkeys(idle))} ({len(idle)} tensors)"
    return (words,) if idle else ()


def _without_graph(chain: Chain, whole: Mapping[str, str], example_input: Tensor) -> tuple[str, ...]:
    """A sentence for each segment that cannot be exported, so that nobody learns it after training. Tried are those
    that hold a module which is one node because its code could not be traced, on a small image; others hold PyTorch's
    own modules and functions, and modules without children."""
    notes = []
    size = [min(length, _TRIED_SIZE) for length in example_input.shape[-2:]]
    # A half-precision model wants images of its own type; it is exported in float32, where a run trains and stores it.
    dtype = next((p.dtype for p in chain.parameters() if p.is_floating_point()), example_input.dtype)
    live: tuple[object, ...] = (example_input.new_zeros(2, 3, *size, dtype=dtype),)
    parts = [*chain.segments, chain.final_head]
    with in_eval_mode(chain), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice to whoever exports, which nobody does here
        for i, part in enumerate(parts):
            assert isinstance(part, fx.GraphModule)
            called = {str(node.target) for node in part.graph.nodes if node.op == "call_module"}
            doubtful = [name for name in called if name in whole or _is_script(part.get_submodule(name))]
            try:
                if doubtful:
                    torch.export.export(part, live, strict=False)
                live = tuple(part(*live)) if part is not chain.final_head else ()
            except Exception as error:  # torch raises many kinds
                if not doubtful:  # it does not run on such an image, which says nothing of graphs
                    break
                reason = " ".join(str(error).split()).partition(" While executing")[0].partition(". ")[0]
                where = f"past exit {i - 1}" if i else "of this network"
                notes.append(
                    f"no instance {where} can be exported, it runs with torch: {', '.join(doubtful)}: {reason}"
                )
                break
    return tuple(notes)


def _is_script(module: nn.Module) -> bool:
    return any(isinstance(part, torch.jit.ScriptModule) for part in module.modules())


def _kept_whole(whole: Mapping[str, str]) -> list[str]:
    """A sentence for each reason."""
    groups = {why: [name for name in whole if whole[name] == why] for why in whole.values()}
    listed = {
        why: ", ".join(names[:3]) + (f" and {len(names) - 3} more" * (len(names) > 3)) for why, names in groups.items()
    }
    return [f"kept whole: {names}, which {why}" for why, names in listed.items()]


def find_head(model: nn.Module, head: str | None, ran: Iterable[str]) -> tuple[str, list[str]]:
    """The name of the module that is the segmentation head, and a note when it had to be guessed: the last of ``ran``
    with a convolution. Raises ModelError when ``head`` names none."""
    names = [name for name, _ in model.named_modules() if name]
    if head is not None:
        if head not in names:
            raise ModelError(f"no module {head!r} in {type(model).__name__} to be the head{closest(head, names)}")
        return head, []
    known = next((name for name in _HEAD_NAMES if name in names), None)
    if known:
        return known, []
    convolutions = [
        name for name in ran if any(isinstance(part, nn.Conv2d) for part in model.get_submodule(name).modules())
    ]
    if not convolutions:
        raise ModelError(f"{type(model).__name__} has no convolution that could be its head: name a module with head=")
    last = convolutions[-1]
    outer = accumulate(last.split("."), "{}.{}".format)  # of a model that is wrapped
    if known := next((name for name in outer if name.rpartition(".")[2] in _HEAD_NAMES), None):
        return known, []
    return last, [f"no module is called {', '.join(_HEAD_NAMES)}: {last} is taken for the head; head= names another"]


def block_kind(model: nn.Module, head: str) -> BlockKind:
    """The kind of block that the backbone, all but ``head``, is made of.

    Inverted residuals where it has depthwise convolutions and batch norms; bottlenecks where a block's own convolutions
    are 1x1, kxk, 1x1; else plain residual blocks.
    """
    modules = [module for name, module in model.named_modules() if not f"{name}.".startswith(f"{head}.")]
    convolutions = [module for module in modules if isinstance(module, nn.Conv2d)]
    depthwise = any(conv.groups == conv.in_channels > 1 for conv in convolutions)
    if depthwise and any(isinstance(module, _BatchNorm) for module in modules):
        return "inverted_residual"
    for module in modules:
        own = [max(child.kernel_size) for child in module.children() if isinstance(child, nn.Conv2d)]
        if len(own) == 3 and own[0] == own[2] == 1 < own[1]:
            return "bottleneck"
    return "residual"


def closest(name: str, known: Sequence[str]) -> str:
    """The end of an error's sentence: what may have been meant."""
    found = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    listed = f"; there are {', '.join(known[:8])}{', ...' * (len(known) > 8)}" if known else ""
    return f"; did you mean {' or '.join(found)}?" if found else listed


def _with_parts(arguments: Any, node: fx.Node, parts: list[fx.Node]) -> Any:
    """The arguments of a node with a list of the ``parts`` of ``node`` for the node itself."""
    return fx.map_arg(arguments, lambda one: parts if one is node else one)


def _place_of(part: object, parts: Sequence[object]) -> int | None:
    return next((i for i, one in enumerate(parts) if one is part), None)


class _Graph:
    """A traced model with what every node gives and costs at the example input."""

    def __init__(self, traced: fx.GraphModule, example_input: Tensor) -> None:
        self.traced, self.shape = traced, (1, *example_input.shape[1:])
        try:
            self.outputs: dict[str, tuple[Workload, Any]] = count_nodes(traced, self.shape)
        except Exception as error:
            raise run_error(error, self.shape) from error
        logits: Any = self._output().args[0]
        self.logits: fx.Node = logits
        value = self.value(self.logits)
        if not isinstance(value, Tensor) or value.dim() != 4:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            is_map = isinstance(value, Tensor) and value.dim() == 3
            why = "class indices? leave argmax out" if is_map else "a classifier?"
            raise ModelError(f"the model gives {got} for images {self.shape}; expected logits (N, K, H, W): {why}")
        self.nodes: list[fx.Node] = []
        self.position: dict[fx.Node, int] = {}
        self.head_start = 0
        self.block_kinds: set[type] = set()
        self.networks: set[str] = set()
        self._unpack()

    def value(self, node: fx.Node) -> Any:
        return self.outputs[node.name][1]

    def _output(self) -> fx.Node:
        output: fx.Node = next(iter(reversed(self.traced.graph.nodes)))
        return output

    def modules(self) -> list[str]:
        """The names of those that are run, in that order."""
        return [str(node.target) for node in self.traced.graph.nodes if node.op == "call_module"]

    def strip_upsampling(self) -> list[str]:
        """Leaves out a last bilinear upsampling to the input size; says what is upsampled that was not."""
        last, (height, width) = self.logits, self.shape[-2:]
        if tuple(self.value(last).shape[-2:]) != (height, width):
            # Rounded: a network may lose a row or two at its borders.
            stride = round(height / self.value(last).shape[-2])
            return [
                f"the model's own output is 1/{stride} of the input: every exit, the final one too, is upsampled to it"
            ]
        bilinear = last.target is F.interpolate and last.kwargs.get("mode") == "bilinear" and last.kwargs.get("size")
        # With corners aligned it is another interpolation than the one that ends every exit, and stays.
        if bilinear and not last.kwargs.get("align_corners"):
            source: Any = last.args[0]
            self.logits = source
            self._output().args = (self.logits,)
            drop_dead_code(self.traced.graph, self.traced)
            self.traced.recompile()
        return []

    def expect_logits(self, model: nn.Module) -> None:
        """Raises ModelError for a model that ends in probabilities, or gives classes last."""
        node, logits = self.logits, self.value(self.logits)
        expect_classes_first(logits, self.shape[-2:], model)
        last = type(self.traced.get_submodule(str(node.target))) if node.op == "call_module" else node.target
        name = str(getattr(last, "__name__", last)).lower().removesuffix("2d")
        if name in ("softmax", "sigmoid") and logits.shape[1] > 1:
            raise ModelError(
                f"{type(model).__name__} ends in a {name}, which gives probabilities; expected logits (N, K, h, w), as "
                f"losses and confidences take them: return what goes into the {name}"
            )

    def end_backbone(self, head: str) -> None:
        """Sets where the segmentation head begins. Raises ModelError when nothing of it is in the graph."""
        self.nodes = [node for node in self.traced.graph.nodes if node.op != "output"]
        self.position = {node: i for i, node in enumerate(self.nodes)}
        # A head that is one node is a target; one that was traced into is in the stacks of its nodes.
        inside = [i for i, node in enumerate(self.nodes) if f"{node.target}.".startswith(f"{head}.")]
        inside += [i for i, node in enumerate(self.nodes) if any(name == head for name, _ in module_stack(node))]
        if not inside:
            raise ModelError(f"the module {head!r} is not run on its own by the traced model: name another with head=")
        self.head_start = min(inside)
        alive = [node for node in self.nodes[: self.head_start] if self._last_use(node) >= self.head_start]
        maps = [node for node in alive if self.is_feature_map(node)]
        if not maps:
            hint = f"name another module with head=, or give an input larger than {tuple(self.shape[-2:])}"
            raise ModelError(f"the head {head!r} takes no feature map (N, C, h, w): {hint}")
        self.end = maps[-1]
        self._find_blocks()

    def is_feature_map(self, node: fx.Node) -> bool:
        """(N, C, h, w) with as many input pixels per feature pixel in height as in width: not (N, h, w, C), not
        pooled to one pixel."""
        value = self.value(node)
        if not isinstance(value, Tensor) or value.dim() != 4 or node.op == "placeholder":
            return False
        if value.shape[2] * value.shape[3] < 2:
            return False
        # Of odd sizes, rounding moves the two strides apart, by less than half; an upsampled map is no feature map.
        down, across = (full / part for full, part in zip(self.shape[-2:], value.shape[-2:], strict=True))
        return bool(down >= 0.99 and 2 / 3 <= down / across <= 3 / 2)

    def _last_use(self, node: fx.Node) -> int:
        return max((self.position.get(user, len(self.nodes)) for user in node.users), default=self.position[node])

    def legal_cuts(self) -> list[fx.Node]:
        """The nodes where an early exit may sit, in the order of the graph.

        A node is legal if its output is a feature map, and three things hold. No normalisation or activation follows,
        for a tap belongs behind the layer that they finish. The node lies inside no residual block; a block without a
        skip connection could be cut, but its inside is wide and a head there expensive. And the node is no branch:
        every other feature map that a later node reads must be one that this one was made from.
        """
        last_of = {name: node for node in self.nodes for name, _ in module_stack(node)}
        ancestors: dict[fx.Node, set[fx.Node]] = {}
        legal: list[fx.Node] = []
        last_uses = [self._last_use(node) for node in self.nodes]
        for i, node in enumerate(self.nodes[: self.head_start]):
            ancestors[node] = set().union(*({one, *ancestors[one]} for one in node.all_input_nodes))
            beside = [one for j, one in enumerate(self.nodes[:i]) if last_uses[j] > i]
            branch = any(self._is_branch(one, ancestors[node]) for one in beside)
            inside = any(self._is_block(name, kind) and last_of[name] is not node for name, kind in module_stack(node))
            if node is self.end or (self.is_feature_map(node) and self._finished(node) and not (branch or inside)):
                legal.append(node)
        return [node for node, after in pairwise(legal[: legal.index(self.end) + 1]) if not self._same(node, after)]

    def _is_branch(self, node: fx.Node, ancestors: set[fx.Node]) -> bool:
        """Whether a live value is a feature map that the ones with these ``ancestors`` were not made from. Of a module
        that gives several, such as an encoder, all count as what is made from one of them."""
        if not isinstance(self.value(node), Tensor) or node.op == "get_attr" or node in ancestors:
            return False
        source = node.all_input_nodes[0] if node.target is operator.getitem else None
        return source is None or source.op != "call_module" or source not in ancestors

    def _is_block(self, name: str, kind: type) -> bool:
        """Whether a module is of a kind that joins its own branches by an addition or a concatenation, as residual
        blocks do, and is not the network itself, nor a part of it that goes through several resolutions: those join
        features too, as a U-Net does in its forward."""
        return kind in self.block_kinds and name not in self.networks

    def _find_blocks(self) -> None:
        """Sets ``block_kinds`` and ``networks``, the names of modules that join features but are no blocks."""
        joins: dict[tuple[str, type], set[torch.Size]] = {}
        for node in self.nodes:
            value = self.value(node)
            if node.target in _MERGES and isinstance(value, Tensor) and (stack := module_stack(node)):
                joins.setdefault(stack[-1], set()).add(value.shape[2:])
        macs = {node: self.outputs[node.name][0].macs for node in self.nodes[: self.head_start]}
        first = next((node for node, cost in macs.items() if cost), None)
        self.networks = set()
        for name, kind in joins:
            inside = [node for node in macs if (name, kind) in module_stack(node)]
            # What holds the first layer and half of the work is the network itself.
            most = first in inside and 2 * sum(macs[node] for node in inside) >= sum(macs.values())
            if most or len(joins[name, kind]) > 1:
                self.networks.add(name)
        self.block_kinds = {kind for name, kind in joins if name not in self.networks}

    def _same(self, node: fx.Node, after: fx.Node) -> bool:
        """Tells whether two places are as good as one: what lies between them costs nothing and keeps the shape."""
        between = self.nodes[self.position[node] + 1 : self.position[after] + 1]
        free = all(self.outputs[one.name][0].macs_paper == 0 for one in between)
        return free and self.value(node).shape == self.value(after).shape

    def _finished(self, node: fx.Node) -> bool:
        """Not followed by what finishes a layer, nor changed in place."""
        return self._overwriting(node) is None and not any(
            user.op == "call_module" and isinstance(self.traced.get_submodule(str(user.target)), _FINISHING)
            for user in node.users
        )

    def _overwriting(self, node: fx.Node) -> fx.Node | None:
        users = (user for user in node.users if user.all_input_nodes[0] is node)
        return next((user for user in users if writes_in_place(user, self.traced)), None)

    def cumulative(self, exit_cost: ExitCost, example_input: Tensor) -> dict[fx.Node, float]:
        """Cost of the backbone up to and including each of its nodes."""
        nodes = self.nodes[: self.head_start]
        if exit_cost == "latency":
            latency_ms = node_latencies(self.traced, example_input)
            each = [latency_ms[node.name] for node in nodes]
        else:
            each = [self.outputs[node.name][0].macs for node in nodes]
        return dict(zip(nodes, accumulate(each), strict=True))

    def named(self, name: str, whole: Mapping[str, str]) -> fx.Node:
        """The node of an exit point named by node or module path. Raises ModelError when it is none, UntraceableError
        when it lies inside one of the modules kept ``whole``."""
        backbone = self.nodes[: self.head_start]
        last_of = {module: node for node in backbone for module, _ in module_stack(node)}
        last_of |= {str(node.target): node for node in backbone if node.op == "call_module"}
        # Where both exist, a node's own name goes before a module's: exits.json has names of nodes.
        by_name = last_of | {node.name: node for node in backbone}
        for outer, why in whole.items():
            if name.startswith(f"{outer}."):
                raise UntraceableError(f"the exit point {name!r} lies inside {outer}, which {why}")
        if name not in by_name:
            places = [place for place, node in last_of.items() if self.is_feature_map(node)]
            raise ModelError(f"no exit point {name!r} in the backbone{closest(name, places)}")
        node = by_name[name]
        if not self.is_feature_map(node):
            value = self.value(node)
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ModelError(f"the exit point {name!r} gives {got}, expected a feature map (N, C, h, w)")
        if node is self.end:
            raise ModelError(f"the exit point {name!r} is the end of the backbone, where the final exit is")
        if (user := self._overwriting(node)) is not None:
            by = user.target if user.op == "call_module" else user.name
            raise ModelError(f"the exit point {name!r} is changed in place by {by}: name that instead")
        return node

    def alive_after(self, stop: int, tapped: fx.Node) -> list[fx.Node]:
        """The nodes before position ``stop`` whose values later segments must be given, ``tapped`` first."""
        alive = [node for node in self.nodes[:stop] if self._last_use(node) >= stop]
        # Sorted, so that a segment gives its values in the order in which the next one takes them.
        needed = {source for node in alive for source in self._sources(node)}
        return [tapped, *sorted(needed - {tapped}, key=self.position.__getitem__)]

    def _sources(self, node: fx.Node) -> set[fx.Node]:
        """The nodes to keep so that a later segment has the value of ``node``.

        A size is worked out again from the tensor that it is the size of, because graphs pass on tensors alone.
        Parameters and constants are kept for nobody: every segment holds those that it reads.
        """
        if node.op == "get_attr":
            return set()
        if isinstance(self.value(node), Tensor) or not self._is_size(node):
            return {node}
        return set().union(*(self._sources(one) for one in node.all_input_nodes))

    def _is_size(self, node: fx.Node) -> bool:
        """Tells whether a value holds no tensor and comes from sizes alone, by functions that change nothing."""
        plain = not any(isinstance(part, Tensor) for part in tree_leaves(self.value(node)))
        return plain and node.op in ("call_function", "call_method") and not writes_in_place(node, self.traced)

    def passes_tensors(self, node: fx.Node) -> bool:
        """Tells whether a cut there leaves nothing but tensors for later, as a graph can pass on."""
        return all(isinstance(self.value(one), Tensor) for one in self.alive_after(self.position[node] + 1, node))

    def _unpack(self) -> None:
        """Takes lists and tuples of tensors apart where they are made, so that tensors alone are kept for later."""
        graph = self.traced.graph
        for node in list(graph.nodes):
            value = self.outputs[node.name][1] if node.op != "output" else None
            if not isinstance(value, tuple | list) or isinstance(value, torch.Size) or not value:
                continue
            if not all(isinstance(one, Tensor) for one in value):
                continue
            for user in list(node.users):  # x.max(1).values is x.max(1)[0]
                if (
                    user.target is getattr
                    and (index := _place_of(getattr(value, str(user.args[1])), value)) is not None
                ):
                    user.target, user.args = operator.getitem, (node, index)
            taken = [user for user in node.users if user.target is operator.getitem and user.args[0] is node]
            place = node
            for user in taken:
                place.append(user)
                place = user
            others = [user for user in node.users if user not in taken and user.op != "output"]
            if not others:
                continue
            parts = []
            for i, one in enumerate(value):
                with graph.inserting_after(place):
                    place = graph.call_function(operator.getitem, (node, i))
                place.meta |= {key: node.meta[key] for key in ("nn_module_stack",) if key in node.meta}
                self.outputs[place.name] = Workload(0, 0), one
                parts.append(place)
            for user in others:
                user.args = _with_parts(user.args, node, parts)
                user.kwargs = _with_parts(user.kwargs, node, parts)
        self.traced.recompile()

    def extract(self, start: int, stop: int, sources: Sequence[fx.Node], targets: Sequence[fx.Node]) -> fx.GraphModule:
        """The nodes ``start`` to ``stop`` as a module of their own, from the ``sources`` to a tuple of the ``targets``;
        to the one target itself at the end of the graph. Sizes that earlier nodes worked out are worked out again."""
        graph = fx.Graph()
        copies = {source: graph.placeholder(source.name) for source in sources}

        def copy_of(node: fx.Node) -> fx.Node:
            # What lies before ``start`` and is no source comes from sizes, and is copied as it is met.
            if node not in copies:
                copies[node] = graph.node_copy(node, copy_of)
            return copies[node]

        for node in self.nodes[start:stop]:
            copy_of(node)
        ends = stop == len(self.nodes)
        graph.output(copies[targets[0]] if ends else tuple(copies[target] for target in targets))
        return fx.GraphModule(self.traced, graph)

    def exit_point(self, node: fx.Node, latency_ms: float | None, *, ends: bool = False) -> ExitPoint:
        features, place = self.value(node), self.position[node]
        before = self.nodes[: (self.head_start if ends else place + 1)]
        last_of = {name: user for user in self.nodes for name, _ in module_stack(user)}
        # The outermost module that ends here is what the user knows the place by.
        ended = [name for name, _ in module_stack(node) if last_of[name] is node]
        return ExitPoint(
            node=node.name,
            module=ended[0] if ended else str(node.target) if node.op == "call_module" else node.name,
            channels=features.shape[1],
            output_stride=round(self.shape[-2] / features.shape[-2]),
            dilation=self._dilation(self.nodes[: place + 1]),
            macs=sum(self.outputs[one.name][0].macs for one in before),
            latency_ms=latency_ms,
        )

    def _dilation(self, nodes: Sequence[fx.Node]) -> int:
        """The dilation of the last spatial convolution that is in no pyramid of parallel branches."""
        pyramids = {module_stack(node)[-1][0] for node in self.nodes if node.target is torch.cat and module_stack(node)}
        pyramids -= self.networks
        for node in reversed(nodes):
            module = self.traced.get_submodule(str(node.target)) if node.op == "call_module" else None
            parallel = any(name in pyramids for name, _ in module_stack(node))
            if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1 and not parallel:
                return int(module.dilation[0])
        return 1
