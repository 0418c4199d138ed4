"""Cutting a model: where exits may sit, what they tap, and what cannot be cut."""

import inspect
import itertools
import re
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.segmentation import fcn_resnet50

from messnet.errors import ModelError
from messnet.network.backbone import Chain, cut_model
from messnet.network.zoo import mobilenetv2_fcn

IMAGE = torch.zeros(1, 3, 64, 80)
# torchvision's names: what precedes the blocks, then the 16 residual blocks, the last of a stage under the stage's name
RESNET_PLACES = ["backbone.relu", "backbone.maxpool"] + [
    f"backbone.layer{stage}" + (f".{i}" if i < blocks - 1 else "")
    for stage, blocks in enumerate((3, 4, 6, 3), start=1)
    for i in range(blocks)
]


def tiny() -> nn.Module:
    return mobilenetv2_fcn(5, width=0.25, depth=0.01)


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return fcn_resnet50(weights=None, weights_backbone=None, num_classes=5, aux_loss=False).eval()


@pytest.fixture(scope="module")
def finest(resnet: nn.Module) -> Chain:
    """Cut at every legal place."""
    return cut_model(resnet, IMAGE, num_exits=18)


def test_exits_sit_between_residual_blocks_never_inside(resnet: nn.Module, finest: Chain) -> None:
    places = [point.module for point in finest.exit_points]
    assert places == [*RESNET_PLACES[:-1], "backbone"]
    with pytest.raises(ModelError, match="ask for 1 to 18 exits"):
        cut_model(resnet, IMAGE, num_exits=19)


def test_an_exit_taps_the_output_of_its_module(resnet: nn.Module, finest: Chain) -> None:
    expected: dict[str, Tensor] = {}
    hooks = [
        # a copy: in-place operators go on writing to the first feature maps
        resnet.get_submodule(name).register_forward_hook(lambda _, __, y, name=name: expected.update({name: y.clone()}))
        for name in RESNET_PLACES[1:]
    ]
    x = torch.randn(IMAGE.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        resnet(x)
        for hook in hooks:
            hook.remove()
        for segment, point, name in zip(finest.segments, finest.exit_points, RESNET_PLACES, strict=True):
            x = segment(x)
            assert x.shape == (1, point.channels, 64 // point.output_stride, 80 // point.output_stride)
            if name in expected:
                assert torch.equal(x, expected[name])


def test_exit_points_know_their_stride_and_dilation(finest: Chain) -> None:
    by_module = {point.module: (point.output_stride, point.dilation) for point in finest.exit_points}
    assert by_module["backbone.relu"] == (2, 1)
    assert by_module["backbone.maxpool"] == by_module["backbone.layer1"] == (4, 1)
    assert by_module["backbone.layer2"] == (8, 1)
    assert by_module["backbone.layer3.1"] == by_module["backbone.layer3"] == (8, 2)
    assert by_module["backbone.layer4.1"] == by_module["backbone"] == (8, 4)
    assert finest.block == "bottleneck"


def test_exit_points_are_strictly_increasing_in_workload() -> None:
    for num_exits in (1, 4, 8):
        chain = cut_model(tiny(), IMAGE, num_exits=num_exits)
        macs = [point.macs for point in chain.exit_points]
        assert len(chain.segments) == num_exits
        assert all(a < b for a, b in itertools.pairwise(macs))
        assert all(re.fullmatch(r"backbone(\.\d+)?", point.module) for point in chain.exit_points)  # whole blocks
    assert chain.block == "inverted_residual"
    with pytest.raises(ModelError, match="ask for 1 to 8 exits"):  # the stem and 7 blocks
        cut_model(tiny(), IMAGE, num_exits=9)


def test_named_exit_points_reproduce() -> None:
    chain = cut_model(tiny(), IMAGE, num_exits=4)
    names = [point.node for point in chain.exit_points[:-1]]
    again = cut_model(tiny(), IMAGE, exit_points=names)
    assert again.exit_points == chain.exit_points
    assert [s.code for s in again.segments] == [s.code for s in chain.segments]
    with pytest.raises(ModelError, match=r"no exit point 'add_99' in this model; expected some of .*backbone_2_conv_3"):
        cut_model(tiny(), IMAGE, exit_points=["add_99"])
    for wrong in (names[::-1], names[:1] * 2):
        with pytest.raises(ModelError, match="different places from shallow to deep, got"):
            cut_model(tiny(), IMAGE, exit_points=wrong)


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 8, 3)
        self.classifier = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone(x)
        if features.mean() > 0:
            features = -features
        return self.classifier(features)


def test_an_untraceable_model_is_told_the_line() -> None:
    lines, first = inspect.getsourcelines(DataDependent)
    place = first + next(i for i, line in enumerate(lines) if "if features" in line)
    with pytest.raises(ModelError, match=rf"DataDependent could not be traced at {__file__}:{place} \(if features"):
        cut_model(DataDependent(), IMAGE)


class Chained(nn.Module):
    """Children of unusual names; ``out`` says how the logits are returned."""

    def __init__(self, out: str = "tensor") -> None:
        super().__init__()
        self.body = nn.Sequential(*[layer for _ in range(3) for layer in (nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())])
        self.last = nn.Conv2d(3, 5, 1)
        self.out = out

    def forward(self, x: Tensor) -> object:
        logits = self.last(self.body(x))
        return {"tensor": logits, "dict": {"out": logits, "aux": self.last(x)}, "tuple": (logits, x)}[self.out]


def test_a_model_without_a_known_head_is_told_its_children() -> None:
    with pytest.raises(ModelError, match=r"no segmentation head .* in Chained; its children are body, last: .* head="):
        cut_model(Chained(), IMAGE)
    with pytest.raises(ModelError, match="no segmentation head 'tail'"):
        cut_model(Chained(), IMAGE, head="tail")
    chain = cut_model(Chained(), IMAGE, num_exits=3, head="last")
    assert [point.module for point in chain.exit_points] == ["body.1", "body.3", "body"]  # after the ReLU


def test_logits_come_as_a_tensor_or_under_out() -> None:
    model, x = Chained("dict"), torch.randn(IMAGE.shape, generator=torch.Generator().manual_seed(0))
    chain = cut_model(model, IMAGE, num_exits=2, head="last")
    y = chain.final_head(chain.segments[1](chain.segments[0](x)))
    assert torch.equal(y, model(x)["out"])
    with pytest.raises(ModelError, match="Chained must return logits as a tensor or under the key 'out'"):
        cut_model(Chained("tuple"), IMAGE, head="last")


class NormAct(nn.BatchNorm2d):
    """Normalisation and activation in one, as timm has it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        batch = self.training
        mean, var = (None, None) if batch else (self.running_mean, self.running_var)
        return self.act(nn.functional.batch_norm(x, mean, var, self.weight, self.bias, batch))


def test_a_subclass_of_batchnorm_keeps_its_two_modes() -> None:
    model = nn.Sequential(OrderedDict(body=nn.Conv2d(3, 8, 3), norm=NormAct(8), head=nn.Conv2d(8, 5, 1)))
    chain = cut_model(model, IMAGE, num_exits=1)
    x = torch.randn(IMAGE.shape, generator=torch.Generator().manual_seed(0))
    for training in (True, False):
        model.train(training)
        expected = model(x)
        assert torch.equal(chain.final_head(chain.segments[0](x)), expected)
        assert torch.equal(expected, model.train(not training)(x)) is False  # the modes differ


class Skipping(nn.Module):
    """The head reads two feature maps."""

    def __init__(self) -> None:
        super().__init__()
        self.shallow, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.classifier = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        shallow = self.shallow(x)
        return self.classifier(torch.cat([shallow, self.deep(shallow)], 1))


def test_no_exit_sits_where_two_feature_maps_are_alive() -> None:
    chain = cut_model(Skipping(), IMAGE, num_exits=2)
    assert [point.module for point in chain.exit_points] == ["shallow", "cat"]  # not "deep"
    with pytest.raises(ModelError, match="ask for 1 to 2 exits"):
        cut_model(Skipping(), IMAGE, num_exits=3)
