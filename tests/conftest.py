"""What many tests share: one small finished run and one small network."""
# ruff: noqa: E402  torch reads how its threads wait when it is imported

from __future__ import annotations

from messnet.costs.processor import spin_briefly

spin_briefly()

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from helpers.images import smooth_image
from helpers.recipes import TINY_RECIPE
from messnet.cli import main
from messnet.images.preprocessing import normalise
from messnet.network.head_space import HeadConfig
from messnet.network.multi_exit import MultiExitNet, convert
from messnet.network.zoo import mobilenetv2_fcn


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
    images = torch.from_numpy(normalise(np.stack([smooth_image(64, 80, seed) for seed in range(4)])))
    with torch.no_grad():
        for _ in range(5):  # for the statistics of the normalisation layers
            states = list(net.states(images))
            for exit in net.exits:
                net.logits(exit, states[exit.exit_index])
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d) and layer.out_channels == 5:
                layer.weight *= 20
    return net.eval()
