"""The head space and the layers of a head, against method.md section 5."""

import itertools
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn
from torchvision.models.segmentation.deeplabv3 import ASPPPooling

from messnet.costs.workload import count_module
from messnet.deployment.graphs import make_graphs
from messnet.errors import RecipeError
from messnet.network.exit_head import build_head
from messnet.network.head_space import HeadConfig, HeadSpace, plain_head_config
from messnet.network.multi_exit import convert
from messnet.policy.policy import Policy


def build(
    config: HeadConfig, *, channels: int = 64, dilation: int = 2, output_stride: int = 8, seed: int = 0
) -> nn.Module:
    return build_head(
        config,
        channels=channels,
        num_classes=5,
        dilation=dilation,
        output_stride=output_stride,
        block="bottleneck",
        seed=seed,
    )


def spatial(module: nn.Module) -> list[nn.Conv2d]:
    return [m for m in module.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]


def test_the_full_space_is_the_papers() -> None:
    literal = {
        HeadConfig(r, n, rapid, head)
        for r, n, rapid, head in itertools.product((1, 2, 4, 8), range(4), (False, True), ("fcn", "deeplabv3"))
        if not (rapid and n == 0)
    }
    assert len(literal) == 56
    configs = HeadSpace().configs(256)
    assert len(configs) == 56
    assert set(configs) == literal
    assert plain_head_config() in literal


def test_names_round_trip() -> None:
    configs = HeadSpace().configs(256)
    assert len({config.name for config in configs}) == 56
    assert all(HeadConfig.parse(config.name) == config for config in configs)
    assert HeadConfig(4, 2, True, "fcn").name == "crm4-blocks2-rdi-fcn"
    for name in ("", "final", "crm4-blocks2-fcn-rdi", "crm-blocks2-fcn", "crm4-blocks2-unet", "crm4-blocks2-fcn\n"):
        with pytest.raises(RecipeError, match="crm4-blocks2-rdi-fcn"):
            HeadConfig.parse(name)


@pytest.mark.parametrize(
    ("channels", "widths"),
    [(8, [8]), (12, [12, 8]), (16, [16, 8]), (24, [24, 12, 8]), (40, [40, 20, 10, 8]), (64, [64, 32, 16, 8])],
)
def test_heads_that_coincide_are_listed_once(channels: int, widths: list[int]) -> None:
    configs = HeadSpace().configs(channels)
    assert len(set(configs)) == len(configs) == 14 * len(widths)
    with torch.device("meta"):
        plain = [
            spatial(build(c, channels=channels)) for c in configs if replace(c, channel_reduction=1) == HeadConfig()
        ]
    assert [convs[0].in_channels for convs in plain] == widths


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (HeadSpace(extra_blocks=()), "at least one value"),
        (HeadSpace(channel_reduction=(0,)), "channel_reduction >= 1"),
        (HeadSpace(extra_blocks=(-1,)), "extra_blocks >= 0"),
        (HeadSpace(channel_reduction=(4, 8)), "no head of the space fits 8 channels"),
    ],
)
def test_an_impossible_space_says_why(space: HeadSpace, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        space.configs(8)


@pytest.mark.parametrize("dilation", [1, 2, 4])
def test_rapid_dilation_doubles_from_block_to_block(dilation: int) -> None:
    for n in range(4):
        plain, rapid = (spatial(build(HeadConfig(1, n, rdi, "fcn"), dilation=dilation)) for rdi in (False, True))
        assert [conv.dilation[0] for conv in plain] == [dilation] * (n + 1)
        blocks = [dilation * 2 ** (k + 1) for k in range(n)]
        assert [conv.dilation[0] for conv in rapid] == [*blocks, blocks[-1] if n else dilation]


@pytest.mark.parametrize(("output_stride", "rates"), [(4, [24, 48, 72]), (8, [12, 24, 36]), (16, [6, 12, 18])])
def test_aspp_rates_scale_with_the_output_stride(output_stride: int, rates: list[int]) -> None:
    for rdi in (False, True):
        head = build(HeadConfig(2, 1, rdi, "deeplabv3"), output_stride=output_stride)
        assert [conv.dilation[0] for conv in spatial(head)][1:4] == rates
    assert any(isinstance(m, ASPPPooling) for m in head.modules())


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_channels_are_reduced_before_all_else(reduction: int) -> None:
    convs = [m for m in build(HeadConfig(reduction, 1), channels=256).modules() if isinstance(m, nn.Conv2d)]
    width = 256 // reduction
    crm = [(256, width)] if reduction > 1 else []
    block = [(width, width // 4), (width // 4, width // 4), (width // 4, width)]
    assert [(c.in_channels, c.out_channels) for c in convs] == [*crm, *block, (width, width // 4), (width // 4, 5)]


def test_initial_weights_depend_on_the_seed_alone() -> None:
    config = HeadConfig(2, 1, True, "deeplabv3")
    before = torch.get_rng_state()
    first = build(config, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    build(HeadConfig(), seed=1)
    again, other = build(config, seed=3).state_dict(), build(config, seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["0.0.weight"], other["0.0.weight"])


def test_building_a_head_leaves_the_accelerators_random_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the accelerator was seeded"))
    build(HeadConfig())


def test_context_is_one_more_part_and_none_changes_nothing() -> None:
    space = HeadSpace(context=(0, 3))
    assert space.configs(256)[:56] == HeadSpace().configs(256)
    assert len(space.configs(256)) == 2 * 56
    config = HeadConfig(context=3)
    assert config.name == "crm1-blocks0-context3-fcn"
    assert all(HeadConfig.parse(config.name) == config for config in space.configs(256))
    with pytest.raises(RecipeError, match="context >= 0"):
        HeadSpace(context=(-1,)).configs(256)


def test_context_costs_what_its_blocks_cost_at_a_quarter_and_a_sixteenth_of_the_pixels() -> None:
    height, width, channels, inner = 16, 24, 40, 6 * 96
    block = 2 * 96 * inner + 9 * inner  # an inverted residual: 1x1, depthwise 3x3, 1x1
    pixels = height * width
    blocks = 3 * block * (pixels // 4 + pixels // 16)
    own = pixels * (channels * 96 + 9 * 96 + 96 * 5)  # projection, depthwise 3x3, classifier
    head = build_head(
        HeadConfig(context=3),
        channels=channels,
        num_classes=5,
        dilation=1,
        output_stride=4,
        block="inverted_residual",
        seed=0,
    )
    assert count_module(head, (1, channels, height, width)).macs == blocks + own


@pytest.mark.parametrize("size", [(8, 12), (7, 9), (1, 3), (1, 1)], ids=str)
def test_context_sees_the_whole_image_at_any_size(size: tuple[int, int]) -> None:
    head = build(HeadConfig(context=1)).eval()
    x = torch.randn(1, 64, *size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = head(x)
    assert y.shape == (1, 5, *size)
    (gradient,) = torch.autograd.grad(y[0, 0, 0, 0], x)
    assert gradient[0].abs().sum(0).gt(0).all()  # every pixel has a say in the first


def test_context_pools_as_scipy_does() -> None:
    x = torch.randn(2, 64, 7, 10, generator=torch.Generator().manual_seed(0))
    context = build(HeadConfig(context=1))[0].eval()
    context.at_half, context.at_quarter = nn.Identity(), nn.Identity()
    with torch.no_grad():
        projected = context.project(x)
        half = torch.from_numpy(pooled(projected.numpy()))
        quarter = torch.from_numpy(pooled(half.numpy()))
        quarter = quarter + quarter.mean((2, 3), keepdim=True)
        expected = projected + sum(nn.functional.interpolate(y, (7, 10), mode="bilinear") for y in (half, quarter))
        torch.testing.assert_close(context(x), expected)


def pooled(x: np.ndarray) -> np.ndarray:
    odd = [(0, 0), (0, 0), *((0, length % 2) for length in x.shape[2:])]
    windows = ndimage.uniform_filter(np.pad(x, odd, mode="edge"), (1, 1, 2, 2), origin=(0, 0, -1, -1))
    return np.ascontiguousarray(windows[:, :, ::2, ::2])


def test_context_exports_for_any_size() -> None:
    runtime = pytest.importorskip("onnxruntime")
    net = convert(nn.Sequential(OrderedDict(stem=nn.Conv2d(3, 16, 3, 4, 1), body=nn.Conv2d(16, 16, 3, 1, 1),
        classifier=nn.Conv2d(16, 5, 1))), torch.zeros(1, 3, 32, 48), num_exits=2)  # fmt: skip
    exit = net.add_head(0, HeadConfig(context=1))
    (stage, _) = make_graphs(net.eval(), [exit], Policy(), (32, 48)).values()
    session = runtime.InferenceSession(stage)
    for size in ((32, 48), (60, 36)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected = net.logits(exit, next(net.states(x)))
        feeds = {"live0": x.numpy(), "pixel_threshold": np.array([0.5], np.float32)}
        np.testing.assert_allclose(session.run(["logits"], feeds)[0], expected.numpy(), atol=1e-5)
