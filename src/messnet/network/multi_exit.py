"""The multi-exit network: a backbone in segments, exit heads at the exit points, the user's own head at the end."""

from __future__ import annotations

import inspect
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, fx, nn

from messnet.errors import ModelError
from messnet.images.preprocessing import IMAGENET, Normalisation
from messnet.network.backbone import Backbone, State, cut_model
from messnet.network.exit_head import build_head
from messnet.network.exit_points import ExitCost
from messnet.network.head_space import HeadConfig
from messnet.network.memory_layout import find_memory_format
from messnet.network.tracing import UntraceableError, unwrapped
from messnet.network.weights import expect_fit
from messnet.policy.labels import upsampled_labels
from messnet.policy.reference import on_processor
from messnet.records.codec import from_plain, to_plain
from messnet.records.exit_point import ExitPoint
from messnet.records.files import write_atomically, writing
from messnet.records.instance import FINAL_HEAD, Exit


class MultiExitNet(nn.Module):
    """N exits: N - 1 early ones, which have any number of heads each, and the final one.

    ``net(x)`` is the final exit: logits (N, K, H, W) at input resolution, as the user's model gives them. A network
    that ``keep_only`` has cut ends at an early exit and has no final one.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.normalisation = IMAGENET
        """What images become before ``net`` takes them; everything that reads images for it follows this."""
        self.heads = nn.ModuleList(nn.ModuleDict() for _ in backbone.exit_points[:-1])

    def __repr__(self) -> str:
        """A line for each exit; ``net.backbone`` has the modules."""
        heads = [", ".join(names) if len(names) < 3 else f"{len(names)} heads" for names in self._heads()]
        lines = [f"MultiExitNet of {self.num_exits} exits, {self.num_classes} classes ("]
        # A network that was cut has no final exit, whose head is the model's own.
        for i, (point, names) in enumerate(zip(self.exit_points, [*heads, "your model's own head"], strict=False)):
            where = f"{point.channels} channels at 1/{point.output_stride}"
            lines.append(f"  exit {i} after {point.module}: {where}, {names or 'no heads yet'}")
        return "\n".join([*lines, ")"])

    @property
    def exit_points(self) -> tuple[ExitPoint, ...]:
        """N - 1 early ones, then the end of the backbone."""
        return self.backbone.exit_points

    @property
    def cuts(self) -> tuple[ExitPoint, ...]:
        """Every place where an early exit could sit, then the end of the backbone."""
        return self.backbone.cuts

    @property
    def num_classes(self) -> int:
        return self.backbone.num_classes

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of the conversion, a sentence each."""
        return self.backbone.notes

    @property
    def memory_format(self) -> torch.memory_format:
        """Channels last, or contiguous for a model whose code takes nothing else."""
        return self.backbone.memory_format

    @property
    def num_exits(self) -> int:
        return len(self.exit_points)

    @property
    def exits(self) -> tuple[Exit, ...]:
        """Every exit point with every head it has, shallow to deep, the final exit last."""
        early = [Exit(i, name) for i, heads in enumerate(self._heads()) for name in heads]
        final = [Exit(self.num_exits - 1, FINAL_HEAD)] if self.backbone.final_head is not None else []
        return (*early, *final)

    def _heads(self) -> Iterator[nn.ModuleDict]:
        for heads in self.heads:
            assert isinstance(heads, nn.ModuleDict)
            yield heads

    def head(self, exit: Exit) -> nn.Module:
        """The module of an exit's head. Raises ModelError when the network has no such exit."""
        final = self.backbone.final_head
        if final is not None and exit == Exit(self.num_exits - 1, FINAL_HEAD):
            return final
        for i, heads in enumerate(self._heads()):
            if i == exit.exit_index and exit.head in heads:
                return heads[exit.head]
        raise ModelError(f"the network has no head {exit.head!r} at exit {exit.exit_index}")

    def add_head(self, exit_index: int, config: HeadConfig, *, seed: int = 0) -> Exit:
        """Attaches a fresh head. Its initial weights depend on ``seed``, the exit point and the config only.

        Raises ModelError when there is no such early exit point.
        """
        if not 0 <= exit_index < self.num_exits - 1:
            raise ModelError(f"heads go to exit points 0 to {self.num_exits - 2}, there is no {exit_index}")
        point = self.exit_points[exit_index]
        head = build_head(
            config,
            channels=point.channels,
            num_classes=self.num_classes,
            dilation=point.dilation,
            output_stride=point.output_stride,
            block=self.backbone.block,
            # By name, not by number: a head begins alike whichever heads are beside it.
            seed=zlib.crc32(f"{seed}/{exit_index}/{config.name}".encode()),
        )
        reference = next(self.backbone.parameters())
        heads = self.heads[exit_index]
        assert isinstance(heads, nn.ModuleDict)
        heads[config.name] = head.to(device=reference.device, dtype=reference.dtype).train(self.training)
        return Exit(exit_index, config.name)

    def drop_heads(self, keep: Sequence[Exit] = ()) -> None:
        """Removes all early heads but those of ``keep``."""
        for i, heads in enumerate(self._heads()):
            for name in [name for name in heads if Exit(i, name) not in keep]:
                del heads[name]

    def keep_only(self, exits: Sequence[Exit]) -> None:
        """Removes all that no exit of ``exits`` needs: the other early heads; where the final exit is not among them
        also the backbone past the last of them, and the final head.

        Raises ModelError when there is no such exit, or the backbone cannot be cut there.
        """
        for exit in exits:
            self.head(exit)
        self.drop_heads(exits)
        last = max(exits)
        if last.head != FINAL_HEAD:  # an instance may end early: the rest of the backbone serves nobody
            self.backbone.cut_after(last.exit_index)
            del self.heads[last.exit_index + 1 :]

    def states(self, x: Tensor) -> Iterator[State]:
        """What is alive at every exit point, one after the other: a segment runs when its state is asked for."""
        return self.backbone.states(x)

    def logits(self, exit: Exit, state: State) -> Tensor:
        """Logits (N, K, h, w) of one exit from the state at its exit point, at the exit's own resolution."""
        head = self.head(exit)
        final = exit.head == FINAL_HEAD
        logits: Tensor = head(state.features, *state.kept) if final else head(state.features)
        return logits

    def run_until(self, x: Tensor, exit_index: int, head: str | None = None) -> Tensor:
        """Logits (N, K, H, W) of one exit at input resolution; nothing past it runs.

        ``head`` names the exit's head; it may be left out where the exit has just one.
        """
        if not 0 <= exit_index < self.num_exits:
            raise ModelError(f"exit_index must lie in 0..{self.num_exits - 1}, got {exit_index}")
        names = [exit.head for exit in self.exits if exit.exit_index == exit_index]
        if head is None and len(names) != 1:
            raise ModelError(f"exit {exit_index} has {len(names)} heads; name one: {', '.join(names)}")
        exit = Exit(exit_index, head or names[0])
        return upsample(self.logits(exit, self.backbone.run_until(x, exit_index)), x.shape[-2:])

    def forward(self, x: Tensor) -> Tensor:
        return self.run_until(x, self.num_exits - 1, FINAL_HEAD)

    def model_state_dict(self) -> dict[str, Tensor]:
        """The user's model: its tensors under its own names, heads left out."""
        return self.backbone.model_state_dict()

    def tensors(self) -> dict[str, Tensor]:
        """All its tensors, not copied: the user's model as "model." and its own names, heads as "heads.EXIT.HEAD."."""
        model = {f"model.{name}": tensor for name, tensor in self.model_state_dict().items()}
        return model | {f"heads.{name}": tensor for name, tensor in self.heads.state_dict().items()}

    def save(self, path: str | Path) -> None:
        """Writes the weights of the model and of its heads to ``path``, a safetensors file, whole or not at all.
        ``load`` reads it. Raises RunError when the disk is full or read-only."""
        heads = tuple(exit for exit in self.exits if exit.head != FINAL_HEAD)
        form = _Form(exit_points=self._early_nodes(), heads=heads, normalisation=self.normalisation)
        # Copied, for safetensors takes no two tensors that share memory.
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.tensors().items()}
        with writing(Path(path)):
            write_atomically(Path(path), safetensors.torch.save(tensors, {"messnet": json.dumps(to_plain(form))}))

    def load(self, path: str | Path) -> None:
        """Takes weights, heads and normalisation from a file that ``save`` wrote of a network converted alike: the same
        model, the same exit points.

        Raises ModelError that says what does not fit, or that the file cannot be read.
        """
        try:
            with safetensors.safe_open(path, "pt") as file:
                form = from_plain(json.loads(file.metadata()["messnet"]), _Form)
            tensors = safetensors.torch.load_file(path)
        except (OSError, TypeError, KeyError, ValueError, SafetensorError) as error:  # TypeError: it has no metadata
            raise ModelError(f"{path} cannot be read ({error}); expected a file that net.save(path) wrote") from error
        if form.exit_points != self._early_nodes():
            raise ModelError(
                f"{path} is of a network with exits after {', '.join(form.exit_points)}, and this one's are after "
                f"{', '.join(self._early_nodes())}: convert the same model, with exit_points={[*form.exit_points]}"
            )
        model = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
        self.load_model_state_dict(model, source=str(path))
        self.drop_heads()
        for exit_index, head in form.heads:
            self.add_head(exit_index, HeadConfig.parse(head))
        heads = {name.removeprefix("heads."): tensor for name, tensor in tensors.items() if name.startswith("heads.")}
        expect_fit(heads, self.heads.state_dict(), source=str(path))
        self.heads.load_state_dict(heads)
        self.normalisation = form.normalisation

    def _early_nodes(self) -> tuple[str, ...]:
        return tuple(point.node for point in self.exit_points[:-1])

    def load_model_state_dict(self, state: Mapping[str, Tensor], *, source: str = "the state dict") -> None:
        """Loads tensors under the names of the user's model. Raises ModelError that lists what does not fit."""
        own = self.model_state_dict()
        expect_fit(state, own, source=source)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])


@dataclass(frozen=True, kw_only=True)
class _Form:
    """What a file of ``MultiExitNet.save`` says of the network beside its tensors."""

    exit_points: tuple[str, ...]
    """Nodes of the early ones."""
    heads: tuple[Exit, ...]
    normalisation: Normalisation


def convert(
    model: nn.Module,
    example_input: Tensor,
    num_exits: int = 6,
    *,
    exit_points: Sequence[str] | None = None,
    head: str | None = None,
    exit_cost: ExitCost = "workload",
    normalisation: Normalisation = IMAGENET,
) -> MultiExitNet:
    """Turns a segmentation model into a multi-exit network without heads yet; weights are shared, not copied.

    ``model`` maps images (N, 3, H, W) to logits (N, K, h, w), given as a tensor, under "out" or as ``.logits``;
    ``example_input`` is a batch of its input, at whose size costs are counted or measured. Of the places where the
    model can be cut, ``num_exits`` - 1 at about equal steps of ``exit_cost`` become early exit points. ``exit_points``
    names them instead, shallow to deep, by module path: a model that cannot be traced is then tapped there as it runs.
    ``head`` names the module that is the segmentation head. ``normalisation`` is that of the images which ``model`` was
    trained on or is to be. ``net.notes`` says what else there is to know.

    Raises ModelError when the model cannot be converted.
    """
    if not isinstance(model, nn.Module):
        advice = "call it and give what it returns" if callable(model) else "build the model and load them into it"
        what = "weights alone" if isinstance(model, Mapping) else f"a {type(model).__name__}"
        raise ModelError(f"model must be a torch.nn.Module, got {what}: {advice}")
    if not isinstance(example_input, torch.Tensor):
        raise ModelError(
            f"example_input must be a batch of images such as torch.zeros(1, 3, 512, 512), got {example_input!r:.80}"
        )
    if example_input.dim() != 4 or example_input.shape[1] != 3:
        raise ModelError(f"example_input must be RGB images (N, 3, H, W), got {tuple(example_input.shape)}")
    if isinstance(exit_points, str):
        raise ModelError(f"exit_points must be a list of module paths, got the string {exit_points!r}")
    if not isinstance(normalisation, Normalisation):
        raise ModelError(
            f"normalisation must be messnet.Normalisation(mean=(r, g, b), std=(r, g, b)), got {normalisation!r:.80}"
        )
    model = unwrapped(model)
    try:
        inspect.signature(model.forward).bind(example_input)
    except TypeError as error:
        raise ModelError(
            f"{type(model).__name__}.forward takes more than one image batch ({error}): wrap it in a module whose "
            f"forward(x) gives it the rest"
        ) from error
    try:
        backbone: Backbone = cut_model(
            model, example_input, num_exits=num_exits, exit_points=exit_points, head=head, exit_cost=exit_cost
        )
    except UntraceableError as error:
        if exit_points is None:
            raise
        from messnet.network.tapping import tap_model

        backbone = tap_model(
            model, example_input, exit_points=exit_points, head=head, reason=str(error).partition("; ")[0]
        )
    _expect_usable(model, backbone)
    graphs = [part for part in backbone.modules() if isinstance(part, fx.GraphModule)]
    height, width = example_input.shape[-2:]
    backbone.memory_format, note = find_memory_format(model, graphs, (height, width))
    backbone.notes += (note,) if note else ()
    net = MultiExitNet(backbone)
    net.normalisation = normalisation
    net.training = model.training  # the parts keep their own modes: a part may be frozen
    return net


def expect_converted(net: object) -> None:
    """Raises ModelError for what is not made by ``convert``."""
    if not isinstance(net, MultiExitNet):
        raise ModelError(
            f"net must be a converted network, got a {type(net).__name__}: net = messnet.convert(model, "
            "torch.zeros(1, 3, height, width)) makes one of your model"
        )


def _expect_usable(model: nn.Module, backbone: Backbone) -> None:
    """Raises ModelError for what would only be found out in or after training."""
    if backbone.num_classes == 1:
        raise ModelError(
            f"{type(model).__name__} gives one channel, as for a sigmoid; expected logits (N, K, h, w) of K >= 2 "
            f"classes, of which the largest wins: return torch.cat([torch.zeros_like(y), y], 1), which tells the same "
            f"two apart"
        )
    spans: list[tuple[int, int, str]] = []
    for name, parameter in model.named_parameters():
        steps = list(zip(parameter.shape, parameter.stride(), strict=True))
        if any(stride == 0 and length > 1 for length, stride in steps):
            raise ModelError(f"the elements of {name} share their memory, so no step can train them: .clone() it")
        # Where it lies in memory: of spans in order, two that overlap are neighbours.
        if not parameter.is_meta and parameter.numel():
            reach = 1 + sum((length - 1) * stride for length, stride in steps)
            start = parameter.data_ptr()
            spans.append((start, start + reach * parameter.element_size(), name))
    for (_, end, other), (start, _, name) in pairwise(sorted(spans)):
        if start < end:
            raise ModelError(
                f"{other} and {name} are two parameters in one memory, which cannot be saved and restored: make them "
                f"one parameter where they are the same (b.weight = a.weight), else .clone() one"
            )


def upsample(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear (align_corners=False), as every exit ends."""
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def labels_at(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """argmax over the classes at input ``size`` (H, W), as every prediction ends: (N, K, h, w) -> (N, H, W) uint8 on
    the logits' device. On the processor in one pass, without the upsampled map. Raises ModelError for more than 256
    classes."""
    if logits.shape[1] > 256:
        raise ModelError(f"labels are of 8 bits, so a network has at most 256 classes, not {logits.shape[1]}")
    if on_processor(logits):
        given = logits.detach().float().numpy()
        return torch.from_numpy(upsampled_labels(given, size, threads=torch.get_num_threads()))
    # One by one: an upsampled batch would not stay in the caches.
    return torch.cat([upsample(one, size).max(1).indices.to(torch.uint8) for one in logits.split(1)])
