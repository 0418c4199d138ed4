"""A data set of noise, a small network and short trainings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from messnet.data import IGNORE_INDEX, SegmentationSample
from messnet.data.options import AugmentOptions
from messnet.errors import DataError
from messnet.network.head_space import HeadSpace
from messnet.network.multi_exit import MultiExitNet, convert
from messnet.network.zoo import mobilenetv2_fcn
from messnet.training.checkpoint import Checkpoint
from messnet.training.options import ComputeOptions, DistillOptions, PretrainOptions
from messnet.training.stage1 import pretrain

SIZE, CLASSES = (32, 40), 3
AUGMENT = AugmentOptions(crop=SIZE)
PRETRAIN = PretrainOptions(iterations=6, batch_size=2, augment=AUGMENT, checkpoint_every=2, learning_rate=0.1)
DISTILL = DistillOptions(iterations=4, batch_size=2, augment=AUGMENT, checkpoint_every=1, learning_rate=0.1)
SPACE = HeadSpace(channel_reduction=(1,), extra_blocks=(0, 1), rapid_dilation=(True,))
HERE = ComputeOptions(device="cpu", num_workers=0)
WORKER = ComputeOptions(device="cpu", num_workers=1)


@dataclass
class Noise:
    """Random images and labels, the same for every instance."""

    broken: bool = False
    class_names = ("a", "b", "c")
    palette = np.zeros((3, 3), np.uint8)

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> SegmentationSample:
        if self.broken:
            raise DataError(f"image {index}.png: expected RGB, got nothing")
        rng = np.random.default_rng(index)
        mask = rng.choice([0, 1, 2, IGNORE_INDEX], SIZE).astype(np.uint8)
        return SegmentationSample(name=str(index), image=rng.integers(0, 256, (*SIZE, 3), np.uint8), mask=mask)


@dataclass(frozen=True)
class Interrupting(Checkpoint):
    """Ctrl-C right after the state of iteration ``after`` was saved."""

    after: int

    def save(self, state: dict[str, object]) -> None:
        super().save(state)
        if state["iteration"] == self.after:
            raise KeyboardInterrupt


def build(seed: int = 0) -> MultiExitNet:
    torch.manual_seed(seed)
    return convert(mobilenetv2_fcn(CLASSES, width=0.25, depth=0.01), torch.zeros(1, 3, *SIZE), num_exits=3)


def tensors(net: MultiExitNet) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def model_parameters(net: MultiExitNet) -> dict[str, Tensor]:
    return {name: p for name, p in net.named_parameters() if not name.startswith("heads.")}


def pretrained(path: Path, options: PretrainOptions = PRETRAIN) -> dict[str, Tensor]:
    net = build()
    pretrain(net, Noise(), options, HERE, Checkpoint(path))
    return tensors(net)


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]
