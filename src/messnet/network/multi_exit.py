"""The multi-exit network: a backbone in segments, exit heads at the exit points, the user's own head at the end."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from messnet.errors import ModelError
from messnet.instance import FINAL_HEAD, Exit
from messnet.network.backbone import Chain, ExitPoint, cut_model
from messnet.network.exit_head import HeadConfig, build_head
from messnet.workload import output_shape

__all__ = ["MultiExitNet", "convert", "upsample"]


class MultiExitNet(nn.Module):
    """N exits: N - 1 early ones, which have any number of heads each, and the final one.

    ``net(x)`` is the final exit: logits (N, K, H, W) at input resolution, as the user's model gives them.
    """

    def __init__(self, chain: Chain, num_classes: int) -> None:
        super().__init__()
        self.exit_points: tuple[ExitPoint, ...] = chain.exit_points
        self.block = chain.block
        self.num_classes = num_classes
        self.segments = nn.ModuleList(chain.segments)
        self.final_head = chain.final_head
        self.heads = nn.ModuleList(nn.ModuleDict() for _ in chain.exit_points[:-1])

    @property
    def num_exits(self) -> int:
        return len(self.segments)

    @property
    def exits(self) -> tuple[Exit, ...]:
        """Every exit point with every head it has, shallow to deep, the final exit last."""
        early = [Exit(i, name) for i, heads in enumerate(self._heads()) for name in heads]
        return (*early, Exit(self.num_exits - 1, FINAL_HEAD))

    def _heads(self) -> Iterator[nn.ModuleDict]:
        for heads in self.heads:
            assert isinstance(heads, nn.ModuleDict)
            yield heads

    def head(self, exit: Exit) -> nn.Module:
        """The module of an exit's head. Raises ModelError when the network has no such exit."""
        if exit == Exit(self.num_exits - 1, FINAL_HEAD):
            return self.final_head
        for i, heads in enumerate(self._heads()):
            if i == exit.exit_index and exit.head in heads:
                return heads[exit.head]
        raise ModelError(f"the network has no head {exit.head!r} at exit {exit.exit_index}")

    def add_head(self, exit_index: int, config: HeadConfig, *, seed: int = 0) -> Exit:
        """Attaches a fresh head. Its initial weights depend on ``seed``, the exit point and the config only."""
        point = self.exit_points[exit_index]
        head = build_head(
            config,
            channels=point.channels,
            num_classes=self.num_classes,
            dilation=point.dilation,
            output_stride=point.output_stride,
            block=self.block,
            seed=zlib.crc32(f"{seed}/{exit_index}/{config.name}".encode()),
        )
        reference = next(self.segments.parameters())
        heads = self.heads[exit_index]
        assert isinstance(heads, nn.ModuleDict)
        heads[config.name] = head.to(device=reference.device, dtype=reference.dtype).train(self.training)
        return Exit(exit_index, config.name)

    def drop_heads(self, keep: Sequence[Exit] = ()) -> None:
        """Removes all early heads but those of ``keep``."""
        for i, heads in enumerate(self._heads()):
            for name in [name for name in heads if Exit(i, name) not in keep]:
                del heads[name]

    def features(self, x: Tensor) -> Iterator[Tensor]:
        """The tapped feature map of every exit, one after the other: a segment runs when its map is asked for."""
        for segment in self.segments:
            x = segment(x)
            yield x

    def run_until(self, x: Tensor, exit_index: int, head: str | None = None) -> Tensor:
        """Logits (N, K, H, W) of one exit at input resolution; nothing past it runs.

        ``head`` names the exit's head; it may be left out where the exit has just one.
        """
        if not 0 <= exit_index < self.num_exits:
            raise ModelError(f"exit_index must lie in 0..{self.num_exits - 1}, got {exit_index}")
        names = [exit.head for exit in self.exits if exit.exit_index == exit_index]
        if head is None and len(names) != 1:
            raise ModelError(f"exit {exit_index} has {len(names)} heads; name one: {', '.join(names)}")
        features = x
        for segment in self.segments[: exit_index + 1]:
            features = segment(features)
        return upsample(self.head(Exit(exit_index, head or names[0]))(features), x.shape[-2:])

    def forward(self, x: Tensor) -> Tensor:
        return self.run_until(x, self.num_exits - 1)

    def model_state_dict(self) -> dict[str, Tensor]:
        """The user's model: its tensors under its own names, heads left out."""
        state: dict[str, Tensor] = {}
        for part in (*self.segments, self.final_head):
            state |= part.state_dict()
        return state

    def load_model_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads tensors under the names of the user's model. Raises ModelError that lists what does not fit."""
        own = self.model_state_dict()
        problems = [f"missing {name}" for name in own if name not in state]
        problems += [f"unexpected {name}" for name in state if name not in own]
        problems += [
            f"{name} is {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
            for name, tensor in own.items()
            if name in state and state[name].shape != tensor.shape
        ]
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise ModelError(f"the weights do not fit the model: {'; '.join(problems[:5])}{more}")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])


def convert(
    model: nn.Module,
    example_input: Tensor,
    num_exits: int = 6,
    *,
    exit_points: Sequence[str] | None = None,
    head: str | None = None,
) -> MultiExitNet:
    """Turns a segmentation model into a multi-exit network without heads yet; weights are shared, not copied.

    ``model`` maps images (N, 3, H, W) to logits (N, K, H, W), given as a tensor or under "out"; ``example_input`` is a
    batch of its input, whose size the workload is counted at. ``exit_points`` names the traced nodes to cut after
    instead of the ``num_exits`` - 1 of equal workload, ``head`` the child that is the segmentation head.

    Raises ModelError when the model cannot be traced or cut.
    """
    if example_input.dim() != 4:
        raise ModelError(f"example_input must be (N, 3, H, W), got {tuple(example_input.shape)}")
    chain = cut_model(model, example_input, num_exits=num_exits, exit_points=exit_points, head=head)
    num_classes = output_shape(chain.final_head, (1, chain.exit_points[-1].channels, 8, 8))[1]
    net = MultiExitNet(chain, num_classes)
    net.training = model.training  # the parts keep their own modes: a part may be frozen
    return net


def upsample(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear (align_corners=False), as every exit ends."""
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)
