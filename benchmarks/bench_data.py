"""Images per second that one worker reads and augments, against torchvision's reference pipeline on the same files.

    python benchmarks/bench_data.py [--root CAMVID] [--crop 360 480] [--rounds 5] [--json PATH]

Reference: torchvision.transforms.v2 with Pillow, as references/segmentation composes it: ScaleJitter (0.5 to 2),
RandomCrop with padding, RandomHorizontalFlip, ToDtype, Normalize. Both read JPEG and PNG files from disk, scale by the
same range and give a normalised float32 image and int64 labels; rounds take turns. Without --root 48 generated scenes
of 360 x 480 are written to a temporary folder. Ends with one line per figure: name value unit goal ok|short.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from messnet.data import SegmentationDataset
from messnet.data.camvid import open_camvid
from messnet.data.checks import check_dataset
from messnet.data.folders import open_folder
from messnet.data.options import AugmentOptions
from messnet.data.scenes import Scenes, ScenesOptions
from messnet.data.transforms import TrainingStream, build_augmentation
from messnet.images.preprocessing import MEAN, STD

SCALES = (0.5, 2.0)


class Reference(Dataset[tuple[Tensor, Tensor]]):
    """What a user of torchvision writes."""

    def __init__(self, pairs: list[tuple[Path, Path]], crop: tuple[int, int], length: int) -> None:
        self.pairs, self.length = pairs, length
        with Image.open(pairs[0][0]) as first:
            size = (first.height, first.width)
        self.transform = v2.Compose(
            [
                v2.ScaleJitter(size, SCALES, antialias=True),
                v2.RandomCrop(crop, pad_if_needed=True, fill={tv_tensors.Image: 0, tv_tensors.Mask: 255}),
                v2.RandomHorizontalFlip(0.5),
                v2.ToDtype({tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64, "others": None}, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        image_path, mask_path = self.pairs[k % len(self.pairs)]
        image = tv_tensors.Image(v2.functional.pil_to_tensor(Image.open(image_path).convert("RGB")))
        mask = tv_tensors.Mask(v2.functional.pil_to_tensor(Image.open(mask_path))[0])
        pixels, labels = self.transform(image, mask)
        return pixels.as_subclass(Tensor), labels.as_subclass(Tensor)


def generated_files(root: Path) -> SegmentationDataset:
    scenes = Scenes("train", ScenesOptions(size=(360, 480), num_train=48))
    for folder in ("images", "masks"):
        (root / "train" / folder).mkdir(parents=True)
    for k in range(len(scenes)):
        sample = scenes[k]
        Image.fromarray(sample.image).save(root / "train/images" / f"{k:03d}.jpg", quality=90)
        Image.fromarray(sample.mask).save(root / "train/masks" / f"{k:03d}.png")
    return open_folder(root, "train", class_names=scenes.class_names)


def pairs_of(root: Path) -> list[tuple[Path, Path]]:
    images = sorted((root / "train/images").iterdir())
    return [(path, root / "train/masks" / f"{path.stem}.png") for path in images]


def rate(read: Callable[[int], object], num_images: int, start: int) -> float:
    """Of processor time, which other programs on the machine do not stretch."""
    begun = time.process_time()
    for k in range(start, start + num_images):
        read(k)
    return num_images / (time.process_time() - begun)


def loader_rate(dataset: Dataset[tuple[Tensor, Tensor]], num_images: int, num_workers: int) -> float:
    """With warm workers: what the first batch costs is not counted."""
    batches = iter(DataLoader(dataset, 8, sampler=range(num_images + 32), num_workers=num_workers))
    next(batches)
    begun, done = time.perf_counter(), 0
    for pixels, _ in batches:
        done += len(pixels)
        if done >= num_images:
            break
    return done / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="CamVid with train/images and train/masks; generated files without")
    parser.add_argument("--crop", type=int, nargs=2, default=(360, 480))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=64, help="a round")
    parser.add_argument("--workers", type=int, default=2, help="of the loader that is measured besides")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    with tempfile.TemporaryDirectory() as folder:
        root = options.root or Path(folder)
        dataset = open_camvid(root, "train") if options.root else generated_files(root)
        crop = (options.crop[0], options.crop[1])
        length = 10**6
        augment = build_augmentation(AugmentOptions(crop=crop, scale_min=SCALES[0], scale_max=SCALES[1]))
        ours = TrainingStream(dataset, augment, iterations=length // 8, batch_size=8)
        reference = Reference(pairs_of(root), crop, length)
        read = {
            "ours": ours.__getitem__,
            "torchvision": reference.__getitem__,
            "ours, reading only": lambda k: dataset[k % len(dataset)],
        }
        rates: dict[str, list[float]] = {name: [] for name in read}
        for name in read:
            rate(read[name], 8, 0)  # warm
        for turn in range(options.rounds):
            for name in read:
                rates[name].append(rate(read[name], options.images, turn * options.images))
        for name, values in rates.items():
            print(f"{name:<20} {statistics.median(values):7.1f} img per CPU s  (rounds {np.round(values, 1).tolist()})")
        ratios = [a / b for a, b in zip(rates["ours"], rates["torchvision"], strict=True)]
        loader: dict[str, list[float]] = {"ours": [], "torchvision": []}
        for _ in range(options.rounds):
            loader["ours"].append(loader_rate(ours, options.images, options.workers))
            loader["torchvision"].append(loader_rate(reference, options.images, options.workers))
        loader_ratios = [a / b for a, b in zip(loader["ours"], loader["torchvision"], strict=True)]
        for name, values in loader.items():
            print(f"{name:<20} {statistics.median(values):7.1f} img/s DataLoader of {options.workers} workers")
        begun = time.perf_counter()
        report = check_dataset(dataset, num_threads=options.workers)
        check_rate = report.num_images / (time.perf_counter() - begun)

    median = statistics.median
    figures = [
        ("one_worker_rate", median(rates["ours"]), "img/cpu_s", None),
        ("one_worker_ratio_to_torchvision", median(ratios), "x", 1.0),
        ("loader_ratio_to_torchvision", median(loader_ratios), "x", 1.0),
        ("check_data_rate", check_rate, "img/s", None),
    ]
    for name, value, unit, goal in figures:
        verdict = "ok" if goal is None or value >= goal else "short"
        print(f"{name} {value:.3g} {unit} {'-' if goal is None else f'>={goal:g}'} {verdict}")
    if options.json:
        record = [{"name": name, "value": value, "unit": unit, "goal": goal} for name, value, unit, goal in figures]
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
