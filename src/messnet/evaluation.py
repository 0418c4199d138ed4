"""One pass over a labelled split -> ExitTables: what every head of every exit does to every image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from messnet.data import SegmentationDataset
from messnet.errors import RecipeError
from messnet.exit_policy import Policy, image_confidence
from messnet.metrics import pixel_counts
from messnet.network.multi_exit import MultiExitNet, upsample
from messnet.preprocessing import normalise
from messnet.tables import ExitTables

__all__ = ["EvaluationOptions", "evaluate"]


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What is recorded of every image."""

    policies: tuple[str, ...] = ("top1+native",)
    """Confidence and edge refinement, "top1" or "entropy" + "native", "paper" or "none"; the first is deployed."""
    pixel_thresholds: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.96, 0.98, 0.99)
    """Grid of th_pix, ascending, in [0, 1]."""

    def __post_init__(self) -> None:
        if not self.policies or not self.pixel_thresholds:
            raise RecipeError("evaluate.policies and evaluate.pixel_thresholds need at least one value each")
        if list(self.pixel_thresholds) != sorted(set(self.pixel_thresholds)):
            raise RecipeError(f"evaluate.pixel_thresholds must ascend, got {self.pixel_thresholds}")
        for name in self.policies:
            Policy.parse(name)


def evaluate(
    net: MultiExitNet, dataset: SegmentationDataset, options: EvaluationOptions, device: torch.device | str = "cpu"
) -> ExitTables:
    """Runs every exit of ``net`` on every image of ``dataset`` (method.md section 8).

    One image at a time, in its own size and in float32, as a deployed instance runs it: its decisions can then be read
    from the tables exactly. Raises DataError for the first image that cannot be read.
    """
    # The layout that a Session runs in: another one rounds otherwise.
    net = net.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    policies = [Policy.parse(name) for name in options.policies]
    thresholds = torch.tensor(options.pixel_thresholds, dtype=torch.float32, device=device)
    num_images, num_exits, num_classes = len(dataset), len(net.exits), net.num_classes
    intersection = np.zeros((num_images, num_exits, num_classes), np.int32)
    predicted = np.zeros_like(intersection)
    labelled = np.zeros((num_images, num_classes), np.int32)
    confidence = np.zeros((num_images, num_exits, len(policies), len(thresholds)), np.float32)
    names, difficulty = [], []
    for v in tqdm(range(num_images), desc="evaluate", unit="img", mininterval=2, dynamic_ncols=True):
        sample = dataset[v]
        names.append(sample.name)
        difficulty.append(sample.difficulty)
        image = normalise(sample.image)[None].to(device, memory_format=torch.channels_last)
        label = torch.tensor(sample.mask)[None].to(device)  # copies: cached masks are read-only
        size = (image.shape[2], image.shape[3])
        with torch.inference_mode():
            states = list(net.states(image))
            for h, exit in enumerate(net.exits):
                logits = net.logits(exit, states[exit.exit_index])
                stride = net.exit_points[exit.exit_index].output_stride
                for p, policy in enumerate(policies):
                    confidence[v, h, p] = image_confidence(logits, stride, size, thresholds, policy)[0].cpu()
                prediction = upsample(logits, size).max(1).indices
                counts = pixel_counts(prediction, label, num_classes)
                intersection[v, h], predicted[v, h], labelled[v] = (count[0].cpu() for count in counts)
    return ExitTables(
        image_names=tuple(names),
        difficulty=np.array(difficulty, np.float64),
        class_names=tuple(dataset.class_names),
        exits=net.exits,
        intersection=intersection,
        predicted=predicted,
        labelled=labelled,
        policies=options.policies,
        pixel_thresholds=np.array(options.pixel_thresholds, np.float64),
        image_confidence=confidence,
    )
