"""All that is needed to build a multi-exit network again, but for its weights: ``exits.json`` of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from messnet.images.preprocessing import IMAGENET, Normalisation
from messnet.network.head_space import HeadConfig
from messnet.network.multi_exit import MultiExitNet, convert
from messnet.records.codec import LEFT_OUT, Stored
from messnet.records.exit_point import ExitPoint
from messnet.records.instance import FINAL_HEAD, Exit


@dataclass(frozen=True, kw_only=True)
class Blueprint(Stored, what="a network's exits.json", made_by="profile"):
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
    resize: int | None = field(default=None, metadata=LEFT_OUT)
    """Pixels of the shorter side that images are brought to before the network sees them; None: as they are."""
    normalisation: Normalisation = field(default=IMAGENET, metadata=LEFT_OUT)

    def build(self, exits: tuple[Exit, ...] = ()) -> MultiExitNet:
        """The network with the heads of ``exits``, freshly initialised, in eval mode. Raises ModelError when the model
        is no longer what it was."""
        from messnet.network.zoo import build_noted_model  # seconds: torchvision brings torch's compiler

        model, notes = build_noted_model(self.model, len(self.class_names), **self.model_options)
        early = [point.node for point in self.exit_points[:-1]]
        x = torch.zeros(1, 3, *self.input_size)
        net = convert(model, x, exit_points=early, head=self.head, normalisation=self.normalisation)
        net.backbone.notes = (*notes, *net.notes)
        for exit in exits:
            if exit.head != FINAL_HEAD:
                net.add_head(exit.exit_index, HeadConfig.parse(exit.head))
        return net.eval()
