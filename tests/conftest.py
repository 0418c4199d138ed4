"""What many tests share: one small finished run, one small network, and a picture of a folder before and after."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from messnet.cli import main
from messnet.network.exit_head import HeadConfig
from messnet.network.multi_exit import MultiExitNet, convert
from messnet.network.zoo import mobilenetv2_fcn
from messnet.preprocessing import normalise

TINY_RECIPE = """
data: {source: scenes, scenes: {size: [64, 80], num_train: 24, num_val: 16}}
model: {name: mobilenetv2_fcn, width: 0.25, depth: 0.5, num_exits: 4}
heads: {channel_reduction: [1], extra_blocks: [0], rapid_dilation: [false], segmentation_head: [fcn, deeplabv3]}
pretrain: {iterations: 45, batch_size: 4, learning_rate: 0.2, checkpoint_every: 10}
distill: {iterations: 15, batch_size: 4, learning_rate: 0.2, checkpoint_every: 6}
evaluate: {pixel_thresholds: [0.2, 0.3, 0.4, 0.5, 0.7]}
search: {max_drops_pp: [0.1, 1.0], grid: {num_image_thresholds: 8}}
compute: {device: cpu, num_workers: 0}
"""


def module_of(path: Path) -> ModuleType:
    """A file outside of the package, imported."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "tiny.yaml"
    path.write_text(TINY_RECIPE)
    return path


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path) -> Path:
    """A finished run, made by the command. Tests read it; one that writes works on a copy."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    main(["run", str(tiny_recipe), "--out", str(out)])
    return out


@pytest.fixture(scope="session")
def small_net() -> MultiExitNet:
    """5 classes, 4 exits, two heads at each early one, untrained but lively: its labels vary within an image."""
    torch.manual_seed(0)
    model = mobilenetv2_fcn(5, width=0.25, depth=0.5)
    net = convert(model, torch.zeros(1, 3, 64, 80), num_exits=4).train()
    for i in range(3):
        net.add_head(i, HeadConfig())
        net.add_head(i, HeadConfig(channel_reduction=2, extra_blocks=1))
    images = torch.stack([normalise(smooth_image(64, 80, seed)) for seed in range(4)])
    with torch.no_grad():
        for _ in range(5):  # for the statistics of the normalisation layers
            states = list(net.states(images))
            for exit in net.exits:
                net.logits(exit, states[exit.exit_index])
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d) and layer.out_channels == 5:
                layer.weight *= 20
    return net.eval()


def smooth_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8: coloured blocks with noise."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3)).repeat(16, 0).repeat(16, 1)
    return np.clip(blocks[:height, :width] + rng.normal(0, 8, (height, width, 3)), 0, 255).astype(np.uint8)


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file below ``folder`` with the hash of its content and its time of writing; empty if there is none."""
    return {
        str(file.relative_to(folder)): (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
