"""A model that its user has trained, made multi-exit twice: with its backbone kept as delivered, and fine-tuned.

    python benchmarks/bench_delivered.py train --camvid ../shared/camvid --out /tmp/delivered
    python benchmarks/bench_delivered.py run --out /tmp/delivered
    python benchmarks/bench_delivered.py table --out /tmp/delivered

``train`` writes CamVid at half size and trains a small U-Net on it with a plain loop of PyTorch, as a user's own script
would. ``run`` gives its weights to messnet: with `pretrain.iterations: 0`, and with a short stage 1 at a low learning
rate and at the rate that a network from scratch wants. ``table`` puts what came of it side by side, class by class.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import Tensor, nn

from messnet.records.measurements import Measurements
from messnet.report.page import headline

CLASSES = [
    "sky", "building", "pole", "road", "pavement", "tree", "sign symbol", "fence", "car", "pedestrian", "bicyclist",
]  # fmt: skip
STAGE_1 = {
    "frozen": {"iterations": 0},
    "tuned": {"iterations": 300, "learning_rate": 0.004, "batch_size": 8},
    "as_if_new": {"iterations": 300, "learning_rate": 0.1, "batch_size": 8},
}
"""The runs, by name, and what each says of stage 1."""


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(2):
        step = stride if i == 0 else 1
        layers += [nn.Conv2d(inputs if i == 0 else outputs, outputs, 3, stride=step, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """(N, 3, H, W) to logits (N, K, H / 2, W / 2); H and W are multiples of 16."""

    def __init__(self, num_classes: int, width: int = 16) -> None:
        super().__init__()
        sizes = [width, 2 * width, 4 * width, 8 * width]
        self.down = nn.ModuleList(_block(a, b, 2) for a, b in zip([3, *sizes[:-1]], sizes, strict=True))
        self.up = nn.ModuleList(_block(a + b, b) for a, b in zip(sizes[:0:-1], sizes[-2::-1], strict=True))
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for block in self.down:
            x = block(x)
            kept.append(x)
        kept.pop()
        for block in self.up:
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
            x = block(torch.cat([x, kept.pop()], 1))
        logits: Tensor = self.classifier(x)
        return logits


def unet(num_classes: int) -> nn.Module:
    """For recipes: "bench_delivered:unet"."""
    return UNet(num_classes)


def halve(camvid: Path, out: Path) -> None:
    """CamVid's images and masks at 176 x 240, for a processor alone."""
    for split in ("train", "val"):
        for kind, resample in (("images", Image.Resampling.BOX), ("masks", Image.Resampling.NEAREST)):
            (out / split / kind).mkdir(parents=True, exist_ok=True)
            for path in sorted((camvid / split / kind).iterdir()):
                Image.open(path).resize((240, 176), resample).save(out / split / kind / f"{path.stem}.png")


def load(folder: Path) -> tuple[Tensor, Tensor]:
    """Normalised images (N, 3, H, W) and labels (N, H, W), 255 for void."""
    names = sorted(path.name for path in (folder / "images").iterdir())
    images = np.stack([np.array(Image.open(folder / "images" / name).convert("RGB")) for name in names])
    masks = np.stack([np.array(Image.open(folder / "masks" / name)) for name in names])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((torch.from_numpy(images).float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
    return pixels, torch.from_numpy(np.where(masks < len(CLASSES), masks, 255)).long()


def train(data: Path, iterations: int, batch: int = 8) -> UNet:
    """AdamW and one cycle of the learning rate, flips and shifts of brightness."""
    torch.manual_seed(0)
    images, labels = load(data / "train")
    shares = torch.bincount(labels[labels < 255].flatten(), minlength=len(CLASSES)) / (labels < 255).sum()
    weights = 1 / torch.log(1.1 + shares)
    model = UNet(len(CLASSES)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, iterations)
    order = torch.randint(0, len(images), (iterations, batch))
    begin = time.perf_counter()
    for i in range(iterations):
        x, y = images[order[i]], labels[order[i]]
        if torch.rand(()) < 0.5:
            x, y = x.flip(-1), y.flip(-1)
        x = x * (1 + 0.2 * torch.randn(batch, 1, 1, 1)) + 0.2 * torch.randn(batch, 1, 1, 1)
        loss = F.cross_entropy(model(x), y[:, 1::2, 1::2], weights, ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if i % 50 == 49:
            print(f"iteration {i + 1}: loss {loss.item():.3f}, {time.perf_counter() - begin:.0f} s", flush=True)
    return model.eval()


def recipe(out: Path, name: str) -> dict[str, object]:
    augment = {"crop": [144, 192], "scale_min": 0.8, "scale_max": 1.25, "color_jitter": 0.3}
    stage_1 = {"scheme": "baseline", "augment": augment, "class_weights": "auto", "warmup": 20, **STAGE_1[name]}
    return {
        "data": {"source": "folder", "root": str(out / "data"), "class_names": CLASSES, "void_index": 11},
        "model": {"name": "bench_delivered:unet", "weights": str(out / "unet.pth"), "num_exits": 4},
        "heads": {
            "channel_reduction": [1],
            "extra_blocks": [0, 1],
            "rapid_dilation": [True],
            "segmentation_head": ["fcn"],
        },
        "pretrain": {"checkpoint_every": 50, **stage_1},
        "distill": {
            "loss": "ce",
            "iterations": 300,
            "batch_size": 8,
            "learning_rate": 0.1,
            "warmup": 20,
            "augment": augment,
            "class_weights": "auto",
            "loss_stride": 2,
        },
        "compute": {"num_workers": 0},
    }


def run(out: Path, names: list[str]) -> None:
    here = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}
    for name in names:
        path = out / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe(out, name), sort_keys=False))
        command = [sys.executable, "-m", "messnet", "run", str(path), "--out", str(out / name)]
        subprocess.run(command, check=True, env=environment)


def table(out: Path, names: list[str]) -> None:
    """The delivered model, then of each run the final exit and the cheapest instance within 1 pp of the delivered
    model, cross-fitted."""
    columns: dict[str, tuple[list[float | None], str]] = {}
    classes: list[str] = []
    for name in names:
        measured = Measurements.from_json((out / name / "measurements.json").read_bytes())
        classes = measured.class_names
        if measured.delivered is not None:
            columns["delivered"] = (measured.delivered.class_iou, "1.00x")
        baseline = measured.rows[0]
        for row in measured.rows:
            if row is baseline or row.instance.name == "drop-1pp":
                work = f"{baseline.macs / row.judged_macs:.2f}x"
                columns[f"{name}: {'final exit' if row is baseline else row.instance.name}"] = (row.class_iou(), work)
        print(f"- {name}: {headline(measured)}")
    lines = [["class", *columns], ["---"] * (1 + len(columns))]
    mious = [np.mean([iou for iou in ious if iou is not None]) for ious, _ in columns.values()]
    lines += [["**mIoU**", *(f"{100 * miou:.2f}" for miou in mious)]]
    lines += [["less work", *(work for _, work in columns.values())]]
    for k, name in enumerate(classes):
        values = [ious[k] for ious, _ in columns.values()]
        lines.append([name, *("" if value is None else f"{100 * value:.1f}" for value in values)])
    print("\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "run", "table"])
    parser.add_argument("--camvid", type=Path, default=Path("../shared/camvid"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--iterations", type=int, default=700)
    parser.add_argument("--only", nargs="*", default=list(STAGE_1))
    given = parser.parse_args()
    out = given.out.resolve()
    if given.what == "train":
        halve(given.camvid, out / "data")
        torch.save(train(out / "data", given.iterations).state_dict(), out / "unet.pth")
    elif given.what == "run":
        run(out, given.only)
    else:
        table(out, given.only)


if __name__ == "__main__":
    main()
