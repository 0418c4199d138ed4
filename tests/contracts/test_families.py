"""The contract of a conversion, for every family of models: the final exit is the model, an early one a part of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import NamedTuple
from unittest import mock

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models import segmentation as torchvision_models
from torchvision.models.segmentation import deeplabv3, fcn

from messnet.network import zoo
from messnet.network.head_space import HeadConfig
from messnet.network.multi_exit import MultiExitNet, convert

CLASSES = 5
HEADS = (HeadConfig(2, 1, True, "fcn"), HeadConfig(2, 1, True, "deeplabv3"))
SIZES = ((64, 64), (32, 64))  # the first is the example's


def torchvision(name: str, **options: object) -> nn.Module:
    build = getattr(torchvision_models, name)
    return build(weights=None, weights_backbone=None, num_classes=CLASSES, **options)


def slim(module: ModuleType, build: Callable[[], nn.Module]) -> nn.Module:
    """With a ResNet-50 that is a quarter as wide within its blocks."""
    with mock.patch.object(module, "resnet50", partial(resnet50, width_per_group=16)):
        return build()


def smp(architecture: str, encoder: str, **options: object) -> nn.Module:
    library = pytest.importorskip("segmentation_models_pytorch")
    return getattr(library, architecture)(encoder, encoder_weights=None, classes=CLASSES, **options)


def transformers_segformer() -> nn.Module:
    library = pytest.importorskip("transformers")
    config = library.SegformerConfig(
        num_labels=CLASSES,
        hidden_sizes=[8, 16, 24, 32],
        depths=[2, 1, 1, 1],
        decoder_hidden_size=16,
        initializer_range=0.3,
    )
    return library.SegformerForSemanticSegmentation(config)


def conv(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True))


class UNet(nn.Module):
    """All in one forward, as tutorials have it."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.down3 = conv(3, 8), conv(8, 16), conv(16, 32)
        self.up2, self.up1 = conv(48, 16), conv(24, 8)
        self.last = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        three = self.down3(F.max_pool2d(two, 2))
        two = self.up2(torch.cat([F.interpolate(three, scale_factor=2), two], 1))
        one = self.up1(torch.cat([F.interpolate(two, size=one.shape[-2:]), one], 1))
        return self.last(one)


class ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1), nn.Conv2d(channels, channels, 3, 1, 1)
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += x
        return F.relu(y)


class FunctionalDropout(nn.Module):
    """A block whose own code asks for the mode."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.conv(x), 0.3, training=self.training)


class TwoBranches(nn.Module):
    """One branch sees detail, the other context."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8, 2)
        self.detail = nn.Sequential(conv(8, 8, 2), conv(8, 8))
        self.context = nn.Sequential(conv(8, 16, 2), conv(16, 16, 2), conv(16, 8))
        self.fuse, self.head = conv(8, 8), nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        detail, context = self.detail(y), self.context(y)
        y = self.fuse(detail + F.interpolate(context, detail.shape[-2:], mode="bilinear"))
        return F.interpolate(self.head(y), x.shape[-2:], mode="bilinear")


class Plain(nn.Module):
    """``blocks`` between a stem and a last layer; ``wrap`` is how the logits are given."""

    def __init__(self, *blocks: nn.Module, wrap: Callable[[Tensor], object] = lambda logits: logits) -> None:
        super().__init__()
        self.stem, self.blocks, self.last = conv(3, 8, 2), nn.Sequential(*blocks), nn.Conv2d(8, CLASSES, 1)
        self.wrap = wrap

    def forward(self, x: Tensor) -> object:
        return self.wrap(self.last(self.blocks(self.stem(x))))


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "fcn_resnet50": lambda: slim(fcn, lambda: torchvision("fcn_resnet50")),
    "fcn_resnet50_aux": lambda: slim(fcn, lambda: torchvision("fcn_resnet50", aux_loss=True)),
    "deeplabv3_resnet50": lambda: slim(deeplabv3, lambda: torchvision("deeplabv3_resnet50")),
    "deeplabv3_mobilenet_v3": lambda: torchvision("deeplabv3_mobilenet_v3_large"),
    "lraspp_mobilenet_v3": lambda: torchvision("lraspp_mobilenet_v3_large"),
    "zoo_drn50_fcn": lambda: slim(zoo, lambda: zoo.drn50_fcn(CLASSES)),
    "zoo_drn50_deeplabv3": lambda: slim(zoo, lambda: zoo.drn50_deeplabv3(CLASSES)),
    "zoo_mobilenetv2_fcn": lambda: zoo.mobilenetv2_fcn(CLASSES, width=0.25, depth=0.5),
    "unet_resnet18": lambda: smp("Unet", "resnet18", decoder_channels=(64, 32, 16, 8, 8)),
    "unet_mobilenet_v2": lambda: smp("Unet", "mobilenet_v2", decoder_channels=(64, 32, 16, 8, 8)),
    "unet_timm_efficientnet": lambda: smp("Unet", "tu-efficientnet_b0", decoder_channels=(64, 32, 16, 8, 8)),
    "unetplusplus": lambda: smp("UnetPlusPlus", "resnet18", decoder_channels=(64, 32, 16, 8, 8)),
    "deeplabv3plus": lambda: smp("DeepLabV3Plus", "mobilenet_v2"),
    "fpn_resnet18": lambda: smp("FPN", "resnet18"),
    "fpn_timm_convnext": lambda: smp("FPN", "tu-convnext_atto"),
    "pspnet": lambda: smp("PSPNet", "resnet18"),
    "linknet": lambda: smp("Linknet", "resnet18"),
    "manet": lambda: smp("MAnet", "resnet18", decoder_channels=(64, 32, 16, 8, 8)),
    "upernet": lambda: smp("UPerNet", "resnet18", decoder_channels=32),
    "smp_segformer": lambda: smp("Segformer", "resnet18"),
    "transformers_segformer": transformers_segformer,
    "own_unet": UNet,
    "own_residual": lambda: Plain(*(ResidualBlock(8) for _ in range(3))),
    "own_branches": TwoBranches,
    "own_dropout": lambda: Plain(conv(8, 8), FunctionalDropout(8), conv(8, 8)),
    "own_dict": lambda: Plain(conv(8, 8), conv(8, 8), wrap=lambda logits: {"out": logits, "aux": logits}),
    "own_object": lambda: Plain(conv(8, 8), conv(8, 8), wrap=lambda logits: SimpleNamespace(logits=logits)),
}


# What a model has but does not run on the way to its logits.
IDLE = {"fcn_resnet50_aux": ("aux_classifier.",), "pspnet": ("encoder.layer3.", "encoder.layer4.")}


class Case(NamedTuple):
    original: nn.Module
    """A copy from before the conversion."""
    model: nn.Module
    net: MultiExitNet
    idle: tuple[str, ...]

    def reached(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in tensors.items() if not name.startswith(self.idle)}


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    model = FAMILIES[request.param]()
    original = copy.deepcopy(model)
    net = convert(model, images(1), num_exits=3)
    for i in range(2):
        for config in HEADS:
            net.add_head(i, config)
    return Case(original, model, net, IDLE.get(request.param, ()))


def images(batch: int, size: tuple[int, int] = SIZES[0]) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(batch))


def own_output(model: nn.Module, x: Tensor) -> Tensor:
    """Logits at input resolution."""
    y = model(x)
    logits = y if isinstance(y, Tensor) else y["out"] if isinstance(y, dict) and "out" in y else y.logits
    return F.interpolate(logits, x.shape[-2:], mode="bilinear") if logits.shape[-2:] != x.shape[-2:] else logits


def test_what_reaches_no_logits_is_told(case: Case) -> None:
    told = [note for note in case.net.notes if note.startswith("left out")]
    assert len(told) == bool(case.idle)
    assert not told or f": {', '.join(module.rstrip('.') for module in case.idle)} (" in told[0]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_final_exit_trains_as_the_users_model(case: Case, size: tuple[int, int]) -> None:
    before = {name: buffer.clone() for name, buffer in case.original.named_buffers()}
    results = []
    for model, output in ((case.original, own_output), (case.net, MultiExitNet.__call__)):
        model.train().zero_grad()
        torch.manual_seed(1)  # for dropout
        results.append(output(model, images(2, size)))
        results[-1].mul(torch.linspace(-1, 1, size[1])).sum().backward()
    expected, logits = results
    assert expected.std() > 1e-2
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)

    expected = {name: p.grad.norm() for name, p in case.original.named_parameters() if p.grad is not None}
    gradients = {name: p.grad.norm() for name, p in case.model.named_parameters() if p.grad is not None}
    assert expected.keys() == case.reached(expected).keys()
    torch.testing.assert_close(gradients, expected)

    theirs, ours = (case.reached(dict(model.named_buffers())) for model in (case.original, case.model))
    torch.testing.assert_close(ours, theirs)
    assert not [n for n, buffer in ours.items() if n.endswith("running_mean") and torch.equal(buffer, before[n])]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_final_exit_is_the_users_model(case: Case, batch: int, size: tuple[int, int]) -> None:
    case.original.eval(), case.net.eval()
    with torch.no_grad():
        expected = own_output(case.original, images(batch, size))
        assert expected.std() > 1e-2
        torch.testing.assert_close(case.net(images(batch, size)), expected, rtol=0, atol=1e-5)


def test_the_users_tensors_go_into_another_conversion_without_pickle(case: Case) -> None:
    theirs, ours = case.reached(case.model.state_dict()), case.net.model_state_dict()
    assert {name: t.data_ptr() for name, t in ours.items()} == {name: t.data_ptr() for name, t in theirs.items()}
    blank = copy.deepcopy(case.original)
    with torch.no_grad():
        for tensor in blank.state_dict().values():
            tensor.zero_()
    again = convert(blank, images(1), exit_points=[point.node for point in case.net.exit_points[:-1]]).eval()
    assert again.exit_points == case.net.exit_points
    again.load_model_state_dict(safetensors.torch.load(safetensors.torch.save(ours)))
    with torch.no_grad():
        assert torch.equal(again(images(1)), case.net.eval()(images(1)))


@contextmanager
def recording(model: nn.Module) -> Iterator[tuple[list[nn.Module], dict[str, int]]]:
    """The childless modules that ran, in order, and how many had when a module was last done."""
    ran: list[nn.Module] = []
    done: dict[str, int] = {}

    def record(name: str, module: nn.Module) -> None:
        if not list(module.children()):
            ran.append(module)
        done[name] = len(ran)

    hooks = [
        module.register_forward_hook(lambda module, *_, name=name: record(name, module))
        for name, module in model.named_modules()
    ]
    with torch.no_grad():
        yield ran, done
    for hook in hooks:
        hook.remove()


def test_nothing_past_an_exit_runs(case: Case) -> None:
    x, idle = images(1), {module for name, module in case.model.named_modules() if f"{name}.".startswith(case.idle)}
    case.net.eval()
    with recording(case.model) as (ran, done):
        case.model(x)
        everything, ends, until = [module for module in ran if module not in idle], dict(done), []
        for exit in case.net.exits:
            ran.clear()
            case.net.run_until(x, *exit)
            until.append(len(ran))
            assert ran == everything[: len(ran)]
            point = case.net.exit_points[exit.exit_index]
            if exit.exit_index < 2 and point.module in ends:
                assert len(ran) == ends[point.module]
        assert 0 < until[0] == until[1] < until[2] == until[3] < until[4] == len(everything)

        ran.clear()
        states = case.net.states(x)
        for expected in (0, until[0], until[2]):  # what ran before the next state is asked for
            assert len(ran) == expected
            next(states)
        assert until[2] < len(ran) <= until[4]


def test_every_early_exit_takes_every_kind_of_head(case: Case) -> None:
    case.net.eval()
    with torch.no_grad():
        states = list(case.net.states(images(1)))
        for exit in case.net.exits[:-1]:
            logits = case.net.logits(exit, states[exit.exit_index])
            stride = case.net.exit_points[exit.exit_index].output_stride
            assert logits.shape == (1, CLASSES, 64 // stride, 64 // stride)
            assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("lraspp_mobilenet_v3", torch.float64),
        ("fpn_timm_convnext", torch.bfloat16),
        ("transformers_segformer", torch.bfloat16),
        ("own_unet", torch.float64),
    ],
)
def test_the_dtype_of_the_model_is_kept(family: str, dtype: torch.dtype) -> None:
    model = FAMILIES[family]().to(dtype).eval()
    net = convert(model, images(1), num_exits=2)
    exit, x = net.add_head(0, HEADS[1]), images(1).to(dtype)
    with torch.no_grad():
        assert torch.equal(net(x), own_output(model, x))
        assert net.eval().run_until(x, 0, exit.head).dtype == dtype


def test_the_device_of_the_model_is_kept() -> None:
    net = convert(FAMILIES["own_unet"]().to("meta"), images(1), num_exits=2)
    exit = net.add_head(0, HEADS[0])
    assert {tensor.device.type for tensor in net.state_dict().values()} == {"meta"}
    assert net.run_until(images(1).to("meta"), 0, exit.head).shape == (1, CLASSES, 64, 64)
