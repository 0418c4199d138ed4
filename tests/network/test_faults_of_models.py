"""What people's models have in them, kind by kind: the conversion is exact, or its note says what is not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import peoples_models
from helpers.peoples_models import MODELS, Net, SpatialGroups, UNet, Wrapped, layer
from messnet.costs.workload import count_module
from messnet.errors import ModelError
from messnet.network.backbone import Chain
from messnet.network.head_space import HeadConfig
from messnet.network.multi_exit import MultiExitNet, convert
from messnet.network.zoo import build_noted_model
from messnet.profiling import profile

SIZE = (32, 48)
EXACT = (
    "norm_inside", "blur", "made_in_block", "temperature", "random_features", "kept_from_before", "coord_conv", "noisy",
    "tied", "tied_across", "weightnorm_old", "weightnorm_new", "spectral_old", "hooked", "hooked_block",
    "hooked_used_before", "locked", "scripted_part", "views", "attention", "unet_wrapped_twice", "data_parallel",
    "sized_unet", "sized_unet_encoder_kept_whole", "pyramid", "split", "in_a_dict", "grey", "instance_norm",
    "shuffle", "squeeze_excite", "net_wrapped", "remembering", "layer_norm", "group_norm", "transposed", "unet",
    "two_of_one", "spatial_attention",
)  # fmt: skip


def images(batch: int = 2, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(batch))


def logits(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return F.interpolate(y["out"] if isinstance(y, dict) else y, x.shape[-2:], mode="bilinear")


@pytest.mark.parametrize("name", EXACT)
def test_the_final_exit_is_the_model_and_leaves_nothing_behind(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name](3).eval()
    net = convert(model, images(1), num_exits=2).eval()
    for x in (images(1, (64, 32)), images(3)):
        with torch.no_grad():
            torch.testing.assert_close(net(x), logits(model, x), rtol=0, atol=1e-5)
    assert profile(net, SIZE).total_macs() > 0
    assert not [note for note in net.notes if note.startswith("left out")]


def test_a_constant_is_restored_with_the_weights() -> None:
    """A second construction draws other numbers: the ones that were trained with are what counts."""
    nets = [convert(MODELS["random_features"](3), images(1), num_exits=2).eval() for _ in range(2)]
    with torch.no_grad():
        assert not torch.allclose(nets[0](images()), nets[1](images()))
        nets[1].load_model_state_dict(nets[0].model_state_dict())
        assert torch.equal(nets[0](images()), nets[1](images()))


def test_what_is_drawn_or_remembered_in_forward_is_kept_whole() -> None:
    for name, why in (("noisy", "draws random numbers"), ("remembering", "keeps a tensor from one call to the next")):
        (note,) = convert(MODELS[name](3), images(1), num_exits=2).notes
        assert note.startswith("kept whole: blocks.0, blocks.1, which " + why)


def test_tracing_leaves_no_trace_in_the_model() -> None:
    model = MODELS["hooked_used_before"](3)
    convert(model, images(1), num_exits=2)
    assert [*model.kept] == ["low"]
    assert isinstance(model.kept["low"], Tensor)


@pytest.mark.parametrize("name", ["tied", "tied_across"])
def test_what_has_two_names_is_saved_once_and_stays_one(name: str) -> None:
    model = MODELS[name](3)
    net = convert(model, images(1), num_exits=2)
    state = net.model_state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state) < len(model.state_dict())
    assert len([*net.parameters()]) == len([*model.parameters()])
    blank = MODELS[name](3)
    again = convert(blank, images(1), num_exits=2)
    again.load_model_state_dict(copy.deepcopy(state))
    for tensor, other in zip(model.state_dict().values(), blank.state_dict().values(), strict=True):
        assert torch.equal(tensor, other)


def places(net: MultiExitNet) -> list[str]:
    return [cut.module.removeprefix("net.").removeprefix("net.") for cut in net.cuts]


@pytest.mark.parametrize("build", [Net, UNet], ids=lambda build: build.__name__)
def test_a_wrapper_changes_no_cut(build: type[nn.Module]) -> None:
    bare = convert(build(3), images(1), num_exits=2)
    wrapped = convert(Wrapped(Wrapped(build(3))), images(1), num_exits=2)
    assert places(wrapped) == places(bare)
    assert len(bare.cuts) > 2
    assert [cut.dilation for cut in wrapped.cuts] == [cut.dilation for cut in bare.cuts]
    assert wrapped.exit_points[0].macs == bare.exit_points[0].macs


def test_a_residual_block_is_still_no_place_to_cut() -> None:
    class Block(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.one, self.two = layer(channels, channels), layer(channels, channels)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.two(self.one(x))

    net = convert(Wrapped(Net(3, block=Block)), images(1), num_exits=2)
    assert not [cut.module for cut in net.cuts if ".one" in cut.module or ".two" in cut.module]


def test_nothing_but_tensors_is_kept_for_later() -> None:
    for name in ("sized_unet", "sized_unet_encoder_kept_whole", "split", "coord_conv", "unet"):
        probe = convert(MODELS[name](3), images(1), num_exits=2)
        for cut in probe.cuts[:-1]:
            net = convert(MODELS[name](3), images(1), exit_points=[cut.node])
            assert isinstance(net.backbone, Chain)
            for state in net.states(images()):
                assert all(isinstance(value, Tensor) for value in state.kept)


def test_a_decoder_that_takes_sizes_has_exits_in_it() -> None:
    net = convert(MODELS["sized_unet"](3), images(1), num_exits=3)
    assert any(cut.module.startswith("decoder.") for cut in net.cuts)


def test_code_with_views_runs_and_trains_in_its_own_layout_and_the_note_says_where() -> None:
    net = convert(Net(3, block=SpatialGroups), images(1), num_exits=2)
    assert net.memory_format is torch.contiguous_format
    (note,) = net.notes
    assert note.startswith(f"runs in its own memory layout: in channels last, which is faster in places, it fails at "
                           f"{peoples_models.__file__}:")  # fmt: skip
    assert "(y = x.view(b * 4, -1, h, w))" in note
    assert convert(Net(3), images(1), num_exits=2).memory_format is torch.channels_last


@pytest.mark.parametrize(("name", "precision"), [("half", "float16"), ("bfloat16", "bfloat16"), ("float64", "float64")])
def test_a_model_in_another_precision_is_built_in_float32(name: str, precision: str) -> None:
    model, (note,) = build_noted_model(f"helpers.peoples_models:model_{name}", 3)
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    assert note == f"the model comes in {precision} and is trained and stored in float32"


def test_attention_in_a_tapped_model_is_counted() -> None:
    model = MODELS["untraceable"](3)
    net = convert(model, images(1), exit_points=["blocks.0"])
    tokens, channels = 8 * 12, peoples_models.WIDTH
    attention = 4 * tokens * channels**2 + 2 * tokens**2 * channels
    assert net.exit_points[0].macs == count_module(model.stem, (1, 3, *SIZE)).macs + attention
    assert profile(net, SIZE).column("macs", []).prefix(0) == net.exit_points[0].macs


def test_a_tapped_model_that_keeps_features_in_a_hook_runs_uncopied() -> None:
    model = MODELS["untraceable_hooked"](3).train()
    net = convert(model, images(1), exit_points=["blocks.0"])
    net.add_head(0, HeadConfig())
    assert profile(net, SIZE).total_macs() > 0
    assert model.training
    with torch.no_grad():
        assert torch.equal(net.eval()(images()), model.eval()(images()))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one_channel", "Net gives one channel, as for a sigmoid"),
        ("two_in_one_memory", "classifier.a.weight and classifier.b.weight are two parameters in one memory"),
        ("expanded", "the elements of classifier.bias share their memory"),
        ("torchscript", "a TorchScript model has no Python code"),
        ("one_channel_images", "the model takes images of 1 channel; every image here is RGB"),
        ("four_channel_images", "the model takes images of 4 channels; every image here is RGB"),
    ],
)
def test_what_cannot_be_is_refused_at_conversion(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as info:
        convert(MODELS[name](3), images(1), num_exits=2)
    assert "\n" not in str(info.value)


class Ending(nn.Module):
    """A model with something behind its logits."""

    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.end = MODELS["net_wrapped"](3), end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(F.interpolate(self.model(x), x.shape[-2:], mode="bilinear"))


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (nn.Softmax(1), "Ending ends in a softmax, .* return what goes into the softmax"),
        (lambda y: y.softmax(1), "Ending ends in a softmax"),
        (nn.Sigmoid(), "Ending ends in a sigmoid"),
        (
            lambda y: y.permute(0, 2, 3, 1),
            r"Ending gives \(1, 32, 48, 3\), classes last; .* return y.permute\(0, 3",
        ),
    ],
)
def test_what_are_no_logits_is_refused(end: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        convert(Ending(end), images(1), num_exits=2)
    convert(Ending(nn.LogSoftmax(1)), images(1), num_exits=2)


class Asking(Net):
    def forward(self, x: Tensor, meta: dict[str, int]) -> Tensor:  # type: ignore[override]
        return super().forward(x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Asking, "Asking.forward takes more than one image batch .*'meta'.*: wrap it in a module whose forward"),
        (lambda k: MODELS["pyramid"], "must be a torch.nn.Module, got a .*: call it and give what it returns"),
        (lambda k: Net(k).state_dict(), "got weights alone: build the model and load them into it"),
    ],
)
def test_what_is_no_model_of_images_is_refused(model: Callable[[int], nn.Module], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        convert(model(3), images(1), num_exits=2)


def test_a_hook_that_changes_what_a_layer_gives_is_told() -> None:
    model = Net(3)
    model.stem[0].register_forward_hook(lambda _, __, output: output * 2)
    with pytest.raises(ModelError, match=r"a forward hook changes what stem\.0 returns"):
        convert(model, images(1), num_exits=2)
    assert convert(model, images(1), exit_points=["blocks.0"]).num_exits == 2
