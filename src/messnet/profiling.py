"""Costs of every part of an overprovisioned network -> CostTable."""

from __future__ import annotations

import torch
from torch import nn

from messnet.network.multi_exit import MultiExitNet
from messnet.tables import CostTable, PartCost
from messnet.workload import count_module, output_shape

__all__ = ["profile"]


def profile(net: MultiExitNet, input_size: tuple[int, int], *, model: str = "") -> CostTable:
    """Workload (both conventions, see ``messnet.workload``) and parameters of every segment and head.

    Counted for one image of ``input_size`` (height, width) without computing anything. ``model`` is the name that the
    table carries.
    """
    shape: tuple[int, ...] = (1, 3, *input_size)
    segments, features = [], []
    for segment in net.segments:
        segments.append(_cost(segment, shape))
        shape = output_shape(segment, shape)
        features.append(shape)
    return CostTable(
        model=model,
        input_size=input_size,
        segments=tuple(segments),
        heads={exit: _cost(net.head(exit), features[exit.exit_index]) for exit in net.exits},
        provenance={"method": "counted on the graph, batch 1", "torch": torch.__version__},
    )


def _cost(module: nn.Module, shape: tuple[int, ...]) -> PartCost:
    workload = count_module(module, shape)
    return PartCost(**workload._asdict(), parameters=sum(p.numel() for p in module.parameters()))
