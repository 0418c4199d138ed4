"""Stage 1 against torchvision's reference training of the same model at the same batch: images per second.

    python benchmarks/bench_stage1.py [--size 192 192] [--batch 4] [--rounds 3] [--json PATH]

The model is torchvision's fcn_resnet50. The reference is its own training step (references/segmentation/train.py):
logits and auxiliary classifier, cross-entropy + 0.5 x auxiliary, SGD, channels first, as it ships. Ours is an iteration
of stage 1, alternating schedule, six exits; on CUDA a second time with ``compute.cuda_graphs``. All on the same
tensors, in turns; the time of loading is measured apart.

Ends with one line per figure: name value unit goal ok|short.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.models.segmentation import fcn_resnet50

from messnet.data.options import AugmentOptions
from messnet.data.scenes import Scenes, ScenesOptions
from messnet.data.transforms import TrainingStream, build_augmentation
from messnet.network.head_space import plain_head_config
from messnet.network.multi_exit import convert
from messnet.training.cuda_graphs import Recorder
from messnet.training.options import ComputeOptions, PretrainOptions
from messnet.training.stage1 import _Pretraining

CLASSES = 21


def reference_step(size: tuple[int, int], device: torch.device) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """torchvision's: its criterion and its optimiser."""
    torch.manual_seed(0)
    model = fcn_resnet50(weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=True).train().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        output = model(images)
        losses = {name: F.cross_entropy(y, labels, ignore_index=255) for name, y in output.items()}
        loss = losses["out"] + 0.5 * losses["aux"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def our_step(
    size: tuple[int, int], options: PretrainOptions, compute: ComputeOptions
) -> Callable[[torch.Tensor, torch.Tensor], None]:
    torch.manual_seed(0)
    model = fcn_resnet50(weights=None, weights_backbone=None, num_classes=CLASSES)
    net = convert(model, torch.zeros(1, 3, *size), num_exits=6)
    plain = [net.add_head(i, plain_head_config()) for i in range(5)]
    fabric = compute.fabric()
    stage = _Pretraining(net, plain, options, fabric, None, Recorder(compute.records(fabric)))
    iteration = 0

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        nonlocal iteration
        iteration += 1
        stage.step(iteration, 0.01, images, labels)

    return step


def images_per_second(
    step: Callable[[torch.Tensor, torch.Tensor], None], images: torch.Tensor, labels: torch.Tensor, iterations: int
) -> float:
    """On one CPU thread: a second of processor time, which other programs on the machine do not stretch."""
    clock = time.perf_counter if images.is_cuda or torch.get_num_threads() > 1 else time.process_time
    synchronise = torch.cuda.synchronize if images.is_cuda else lambda: None
    synchronise()
    start = clock()
    for _ in range(iterations):
        step(images, labels)
    synchronise()
    return iterations * len(images) / (clock() - start)


def loading_rate(size: tuple[int, int], batch: int) -> float:
    """Images per second that one worker draws and augments."""
    scenes = Scenes("train", ScenesOptions(size=size, num_train=4 * batch))
    augment = build_augmentation(AugmentOptions())
    stream = TrainingStream(scenes, augment, iterations=4, batch_size=batch)
    start = time.perf_counter()
    for k in range(len(stream)):
        stream[k]
    return len(stream) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(192, 192))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=6, help="a round; 5 show every early exit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    size = (options.size[0], options.size[1])
    compute = ComputeOptions(device=options.device)
    device = compute.fabric().device
    images = torch.randn(options.batch, 3, *size, device=device)
    labels = torch.randint(0, CLASSES, (options.batch, *size), device=device)
    steps = {"torchvision": reference_step(size, device), "ours": our_step(size, PretrainOptions(), compute)}
    if device.type == "cuda":
        steps["ours_recorded"] = our_step(size, PretrainOptions(), replace(compute, cuda_graphs=True))
    for name, step in steps.items():
        start = time.perf_counter()
        images_per_second(step, images, labels, 6 if name == "ours_recorded" else 1)  # every exit is a graph
        print(f"{name}: warm after {time.perf_counter() - start:.1f} s", flush=True)
    rounds = [
        {name: images_per_second(step, images, labels, options.iterations) for name, step in steps.items()}
        for _ in range(options.rounds)
    ]
    figures: list[tuple[str, float, str, float | None, bool]] = []
    for name in steps:
        rate = statistics.median(r[name] for r in rounds)
        figures.append((f"{name}_rate", rate, "images/s", None, True))
        if name != "torchvision":
            ratio = statistics.median(r[name] / r["torchvision"] for r in rounds)
            figures.append((f"{name}_to_torchvision", ratio, "ratio", 1.0, ratio >= 1.0))
    figures.append(("loading_rate_of_a_worker", loading_rate(size, options.batch), "images/s", None, True))
    for name, value, unit, goal, ok in figures:
        print(f"{name} {value:.4g} {unit} {'-' if goal is None else f'{goal:g}'} {'ok' if ok else 'short'}")
    if options.json:
        record = [dict(zip(("name", "value", "unit", "goal", "ok"), figure, strict=True)) for figure in figures]
        setting = {"size": list(size), "batch": options.batch}
        options.json.write_text(json.dumps({**setting, "figures": record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
