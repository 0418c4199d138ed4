"""What cannot be exported is said before a training: an operator that ONNX has no form for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from helpers.peoples_models import Net, layer
from messnet.network.head_space import HeadSpace
from messnet.run.measuring import profile_model
from messnet.run.recipe import ModelOptions

PLAIN_HEADS = HeadSpace(channel_reduction=(1,), extra_blocks=(0,), segmentation_head=("fcn",))


class Median(nn.Module):
    """PyTorch traces it, and ONNX does not know it."""

    def forward(self, x: Tensor) -> Tensor:
        return x - torch.median(x, dim=1, keepdim=True).values


def with_median(num_classes: int) -> nn.Module:
    return Net(num_classes, block=lambda channels: nn.Sequential(layer(channels, channels), Median()))


def plain(num_classes: int) -> nn.Module:
    return Net(num_classes)


@pytest.mark.parametrize(("name", "is_told"), [("with_median", True), ("plain", False)])
def test_an_operator_without_a_form_in_onnx_is_told(name: str, is_told: bool) -> None:
    notes = profile_model(ModelOptions(name=f"{__name__}:{name}", num_exits=2), PLAIN_HEADS, 3, (32, 48)).notes
    told = [note for note in notes if note.startswith("no instance of this network can be exported: ")]
    assert bool(told) == is_told, notes
    assert all("aten.median" in note and "\n" not in note for note in told)
