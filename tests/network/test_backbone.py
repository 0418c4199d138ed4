"""Cutting a model: where exits may sit, what they tap, and what cannot be cut."""

from __future__ import annotations

import itertools
import re
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision.models import convnext_tiny, efficientnet_b0, mobilenet_v2, resnet18, resnet50, resnext50_32x4d
from torchvision.models.segmentation import fcn_resnet50

from messnet.errors import ModelError
from messnet.network.backbone import Chain, block_kind, cut_model
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
        for state, point, name in zip(finest.states(x), finest.exit_points, RESNET_PLACES, strict=True):
            x, kept = state
            assert kept == ()
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
    modules = [point.module for point in chain.exit_points[:-1]]
    assert modules != names
    assert cut_model(tiny(), IMAGE, exit_points=modules).exit_points == chain.exit_points
    with pytest.raises(ModelError, match=r"no exit point 'backbone\.22' in the backbone; did you mean backbone\.2"):
        cut_model(tiny(), IMAGE, exit_points=["backbone.22"])
    for wrong in (names[::-1], names[:1] * 2):
        with pytest.raises(ModelError, match="different places from shallow to deep, got"):
            cut_model(tiny(), IMAGE, exit_points=wrong)


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


def test_the_head_is_guessed_where_no_name_tells() -> None:
    with pytest.raises(ModelError, match="no module 'lst' in Chained to be the head; did you mean last"):
        cut_model(Chained(), IMAGE, head="lst")
    guessed, named = (cut_model(Chained(), IMAGE, num_exits=3, head=head) for head in (None, "last"))
    assert [point.module for point in named.exit_points] == ["body.1", "body.3", "body"]  # after the ReLU
    assert guessed.exit_points == named.exit_points
    (note,) = set(guessed.notes) - set(named.notes)
    assert "last is taken for the head; head= names another" in note


class Written(nn.Module):
    """Layers by name, made in any order, and a forward."""

    def __init__(self, forward: Callable[[Written, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.own_forward = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.own_forward(self, x)


def conv(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1), nn.ReLU())


def places(model: nn.Module) -> list[str]:
    return [point.module for point in cut_model(model, IMAGE, num_exits=1).cuts]


def test_the_last_convolution_that_runs_is_the_head_not_the_last_that_was_made() -> None:
    model = Written(
        lambda self, x: self.out(self.two(self.one(x))), out=nn.Conv2d(8, 5, 1), two=conv(8, 8), one=conv(3, 8)
    )
    assert places(model) == ["one", "two"]


def test_logits_come_as_a_tensor_or_under_out() -> None:
    model, x = Chained("dict"), torch.randn(IMAGE.shape, generator=torch.Generator().manual_seed(0))
    chain = cut_model(model, IMAGE, num_exits=2, head="last")
    features, kept = chain.run_until(x, 1)
    assert torch.equal(chain.final_head(features, *kept), model(x)["out"])
    with pytest.raises(ModelError, match="Chained returned a tuple of 2; expected logits"):
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
        assert torch.equal(chain.final_head(*chain.segments[0](x)), expected)
        assert torch.equal(expected, model.train(not training)(x)) is False  # the modes differ


def test_what_later_segments_need_is_carried_past_an_exit() -> None:
    def forward(self: Written, x: Tensor) -> Tensor:
        one = self.one(x)
        two = self.two(one)
        three = self.three(two)
        two = self.up2(torch.cat([two, F.interpolate(three, size=two.shape[-2:])], 1))
        return self.head(torch.cat([one, F.interpolate(two, size=one.shape[-2:])], 1))

    model = Written(
        forward, one=conv(3, 8), two=conv(8, 8, 2), three=conv(8, 16, 2), up2=conv(24, 8), head=nn.Conv2d(16, 5, 1)
    )
    chain = cut_model(model, IMAGE, exit_points=["one", "two", "three", "up2"])
    x = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    maps = [[value.shape[1:] for value in kept if isinstance(value, Tensor)] for _, kept in chain.states(x)]
    one, two = (8, 32, 48), (8, 16, 24)
    assert maps == [[], [one], [one, two], [one], []]
    features, kept = chain.run_until(x, 4)
    assert torch.equal(chain.final_head(features, *kept), model(x))


def test_a_module_that_runs_again_is_cut_there_and_counted_once() -> None:
    def forward(self: Written, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = self.again(x)
        return self.head(x)

    model = Written(forward, stem=conv(3, 8), again=conv(8, 8), head=nn.Conv2d(8, 5, 1))
    chain = cut_model(model, IMAGE, num_exits=4)
    assert [point.module for point in chain.exit_points] == ["stem", "again", "again@1", "again@2"]
    sizes = [sum(p.numel() for p in part.parameters()) for part in (model.stem, model.again)]
    assert chain.segment_parameters() == (*sizes, 0, 0)
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(chain.final_head(chain.run_until(x, 3).features), model(x))


def test_no_exit_sits_in_a_branch() -> None:
    def forward(self: Written, x: Tensor) -> Tensor:
        x = self.stem(x)
        wide, narrow = self.wide(x), self.narrow(x)
        return self.head(wide + narrow)

    layers = {"wide": nn.Sequential(conv(8, 8), conv(8, 8)), "narrow": nn.Sequential(conv(8, 8), conv(8, 8))}
    # all that "wide" needs is there, while "narrow" knows nothing of it
    expected = ["stem", "wide.0", "wide", "add"]
    assert places(Written(forward, stem=conv(3, 8), **layers, head=nn.Conv2d(8, 5, 1))) == expected


def test_no_exit_sits_on_what_is_no_feature_map() -> None:
    def forward(self: Written, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # (N, h, w, C) between
        x = x * self.gate(x.mean((2, 3), keepdim=True))  # (N, C, 1, 1)
        tokens = self.mix(x.flatten(2).transpose(1, 2))  # (N, h w, C)
        return self.head(tokens.transpose(1, 2).reshape(x.shape))

    layers = {"norm": nn.LayerNorm(8), "gate": nn.Conv2d(8, 8, 1), "mix": nn.Linear(8, 8), "head": nn.Conv2d(8, 5, 1)}
    model = Written(forward, stem=conv(3, 8, 2), **layers)
    chain = cut_model(model, IMAGE, num_exits=1)
    assert [(point.module, point.channels, point.output_stride) for point in chain.cuts] == [
        ("permute_1", 8, 2),
        ("mul", 8, 2),
        ("reshape", 8, 2),
    ]
    for wrong, gives in (("gate", r"\(1, 8, 1, 1\)"), ("norm", r"\(1, 32, 40, 8\)"), ("mix", r"\(1, 1280, 8\)")):
        with pytest.raises(ModelError, match=f"the exit point '{wrong}' gives {gives}, expected a feature map"):
            cut_model(model, IMAGE, exit_points=[wrong])


def test_no_exit_sits_on_what_is_written_to_in_place() -> None:
    def forward(self: Written, x: Tensor) -> Tensor:
        x = F.relu(self.one(x), inplace=True)
        x = self.two(x)
        x.mul_(self.gate(x.mean((2, 3), keepdim=True)))
        return self.head(self.three(x))

    layers = {"one": nn.Conv2d(3, 8, 3), "two": conv(8, 8), "gate": nn.Conv2d(8, 8, 1)}
    layers |= {"three": conv(8, 8), "head": nn.Conv2d(8, 5, 1)}
    assert places(Written(forward, **layers)) == ["relu", "mul_", "three"]
    for wrong, by in (("one", "relu"), ("two", "mul_")):
        with pytest.raises(
            ModelError, match=f"the exit point '{wrong}' is changed in place by {by}: name that instead"
        ):
            cut_model(Written(forward, **layers), IMAGE, exit_points=[wrong])


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (resnet18, "residual"),
        (resnet50, "bottleneck"),
        (resnext50_32x4d, "bottleneck"),  # grouped, not depthwise
        (mobilenet_v2, "inverted_residual"),
        (efficientnet_b0, "inverted_residual"),
        (convnext_tiny, "residual"),  # depthwise, but without batch normalisation
    ],
)
def test_heads_get_blocks_of_the_backbones_own_kind(build: Callable[[], nn.Module], kind: str) -> None:
    with torch.device("meta"):
        model = build()
    model.classifier = nn.Conv2d(8, 8, 3, groups=8)  # the head is not looked at
    assert block_kind(model, "classifier") == kind


def test_exits_are_placed_by_measured_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five layers of 1, 4, 8, 12, 16 channels: the workload is in the last, the time in the first."""
    widths = (1, 4, 8, 12, 16)
    layers = {f"body{i}": conv(a, b) for i, (a, b) in enumerate(itertools.pairwise((3, *widths)))}
    model = nn.Sequential(OrderedDict(**layers, head=nn.Conv2d(16, 5, 1)))
    sizes: list[torch.Size] = []

    def fixed(graph: fx.GraphModule, x: Tensor) -> dict[str, float]:
        sizes.append(x.shape)
        return {node.name: 10.0 if node.target == "body0.0" else 1.0 for node in graph.graph.nodes}

    monkeypatch.setattr("messnet.network.backbone.node_latencies", fixed)
    by_workload = cut_model(model, IMAGE, num_exits=3)
    assert not sizes
    by_latency = cut_model(model, IMAGE, num_exits=3, exit_cost="latency")
    assert sizes == [IMAGE.shape]
    assert [point.module for point in by_workload.exit_points] == ["body2", "body3", "body4"]
    assert [point.latency_ms for point in by_workload.cuts] == [None] * 5
    # the input is a node too: 1 ms
    assert [point.latency_ms for point in by_latency.cuts] == [12.0, 14.0, 16.0, 18.0, 20.0]
    assert [point.module for point in by_latency.exit_points] == ["body0", "body1", "body4"]
    assert [point.macs for point in by_latency.cuts] == [point.macs for point in by_workload.cuts]
