"""Parts of the overprovisioned network: which heads a process trains, and how the parts come together again.

A head does not depend on the heads beside it (``distill``), so any division gives the same weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import safetensors.torch
import torch
from torch import Tensor

from messnet.errors import RunError
from messnet.network.exit_head import build_head
from messnet.network.head_space import HeadConfig
from messnet.network.multi_exit import MultiExitNet
from messnet.records.instance import Exit
from messnet.records.run_directory import RunDirectory
from messnet.records.shard import Shard


def share(shard: Shard, net: MultiExitNet, exits: Sequence[Exit]) -> tuple[Exit, ...]:
    """The part of ``exits`` that is ``shard``'s; they are dealt out by their workload."""
    dealt = deal({exit: _cost(net, exit) for exit in exits}, shard.count)
    return tuple(exit for exit in exits if dealt[exit] == shard.index - 1)


def deal(costs: Mapping[Exit, float], count: int) -> dict[Exit, int]:
    """The part, 0 .. ``count`` - 1, of each exit: heaviest first, each to the part with the least so far, so that parts
    take about the same time. The backbone pass, which every part does, does not count."""
    # Longest processing time first (Graham 1969): no part takes more than 4/3 of what the best division would.
    loads = [0.0] * count
    dealt: dict[Exit, int] = {}
    for exit in sorted(costs, key=lambda exit: (-costs[exit], exit)):
        dealt[exit] = loads.index(min(loads))
        loads[dealt[exit]] += costs[exit]
    return dealt


def _cost(net: MultiExitNet, exit: Exit) -> float:
    """About a head's workload: its parameters, each used once per feature pixel."""
    point = net.exit_points[exit.exit_index]
    with torch.device("meta"):
        head = build_head(
            HeadConfig.parse(exit.head),
            channels=point.channels,
            num_classes=net.num_classes,
            dilation=point.dilation,
            output_stride=point.output_stride,
            block=net.backbone.block,
            seed=0,
        )
    # Parameters times feature pixels, of an image of one pixel.
    return sum(p.numel() for p in head.parameters()) / point.output_stride**2


@dataclass(frozen=True)
class Part:
    """Trained heads in a file: ``stage2.safetensors``, or a part of it."""

    tensors: dict[str, Tensor]
    """As ``net.heads.state_dict()`` names them: "EXIT.HEAD.rest"."""
    stopped: Mapping[Exit, int]
    """Heads that diverged and are left out, with the iteration."""
    made_from: str = ""
    """Fingerprint of the recipe; parts of different recipes do not belong together."""

    @property
    def exits(self) -> frozenset[Exit]:
        """The heads that it tells of, diverged ones included."""
        names = {tuple(name.split(".")[:2]) for name in self.tensors}
        return frozenset({*(Exit(int(i), head) for i, head in names), *self.stopped})


def pack(part: Part) -> bytes:
    metadata = {}
    if part.stopped:
        metadata["diverged"] = json.dumps([[*exit, iteration] for exit, iteration in sorted(part.stopped.items())])
    if part.made_from:
        metadata["made_from"] = part.made_from
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in part.tensors.items()}
    return safetensors.torch.save(tensors, metadata or None)


def unpack(data: bytes, name: str) -> Part:
    """The inverse. Raises RunError when ``data``, the content of file ``name``, is damaged."""
    try:
        # safetensors gives tensors alone; its header is JSON behind eight bytes that say its length.
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
        stopped = {Exit(i, head): iteration for i, head, iteration in json.loads(metadata.get("diverged", "[]"))}
        return Part(safetensors.torch.load(data), stopped, metadata.get("made_from", ""))
    except Exception as error:  # safetensors raises a kind of its own, json and the rest theirs
        raise RunError(f"{name} cannot be read (damaged); delete it and train its heads again") from error


def read_parts(directory: RunDirectory, made_from: str) -> Part:
    """All that the parts in a run directory hold. Raises RunError for one that was made from another recipe."""
    parts = []
    for file in directory.parts_of_stage2().values():
        part = unpack(file.read(), str(file.path))
        if part.made_from != made_from:
            raise RunError(
                f"{file.path} was made from another recipe or stage 1 than {directory.path} has; delete it and train "
                f"its heads again"
            )
        parts.append(part)
    return join(parts)


def join(parts: Sequence[Part]) -> Part:
    tensors: dict[str, Tensor] = {}
    stopped: dict[Exit, int] = {}
    for part in parts:
        tensors |= part.tensors
        stopped |= part.stopped
    return Part(tensors, stopped)


def expect_whole(part: Part, exits: Sequence[Exit], directory: RunDirectory) -> None:
    """Raises RunError that says which of ``exits`` ``part`` lacks and how to get them."""
    missing = [exit for exit in exits if exit not in part.exits]
    if missing:
        words = ", ".join(f"exit {exit.exit_index} ({exit.head})" for exit in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        there = [shard.words for shard in directory.parts_of_stage2()]
        raise RunError(
            f"{len(missing)} of {len(exits)} heads are missing: {words}{more}; {directory.path} has the shards "
            f"{', '.join(there) or '(none)'}: copy the other stage2.KofN.safetensors there, train them with --shard, "
            f"or `messnet distill {directory.path}` trains what is missing"
        )


def discard_parts(directory: RunDirectory) -> None:
    for file in directory.parts_of_stage2().values():
        file.discard()
