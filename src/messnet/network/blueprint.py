"""All that is needed to build a multi-exit network again, but for its weights: ``exits.json`` of a run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import torch

from messnet.network.backbone import ExitPoint
from messnet.network.exit_head import HeadConfig
from messnet.network.multi_exit import MultiExitNet, convert
from messnet.records.files import expect_schema, reading
from messnet.records.instance import FINAL_HEAD, Exit

__all__ = ["Blueprint"]

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """A model by name, where it is cut, and what it tells apart."""

    model: str
    """A zoo name or "module:function"."""
    model_options: dict[str, float]
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    """RGB per class."""
    input_size: tuple[int, int]
    """(height, width) that workload is counted at."""
    exit_points: tuple[ExitPoint, ...]
    """N - 1 early ones, then the end of the backbone."""
    head: str | None = None
    """The module that is the segmentation head, where it was named."""

    def build(self, exits: tuple[Exit, ...] = ()) -> MultiExitNet:
        """The network with the heads of ``exits``, freshly initialised, in eval mode. Raises ModelError when the model
        is no longer what it was."""
        from messnet.network.zoo import build_model  # seconds: torchvision brings torch's compiler

        model = build_model(self.model, len(self.class_names), **self.model_options)
        early = [point.node for point in self.exit_points[:-1]]
        net = convert(model, torch.zeros(1, 3, *self.input_size), exit_points=early, head=self.head)
        for exit in exits:
            if exit.head != FINAL_HEAD:
                net.add_head(exit.exit_index, HeadConfig.parse(exit.head))
        return net.eval()

    def to_json(self) -> str:
        return json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Blueprint:
        """Raises RunError when ``text`` is no blueprint of this schema version."""
        with reading("a network's exits.json", made_by="profile"):
            record: dict[str, Any] = json.loads(text)
            expect_schema(record, SCHEMA_VERSION, "exits.json")
            record["class_names"] = tuple(record["class_names"])
            record["palette"] = tuple((r, g, b) for r, g, b in record["palette"])
            record["input_size"] = tuple(record["input_size"])
            record["exit_points"] = tuple(ExitPoint(**point) for point in record["exit_points"])
            return cls(**record)
