"""The converted network against the user's model, and the contract of an exit: nothing past it runs."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.segmentation import deeplabv3_resnet50, fcn_resnet50

from messnet.errors import ModelError
from messnet.network.head_space import HeadConfig
from messnet.network.multi_exit import MultiExitNet, convert, labels_at, upsample
from messnet.network.zoo import mobilenetv2_fcn
from messnet.records.instance import FINAL_HEAD, Exit

HEADS = (HeadConfig(), HeadConfig(2, 1, True, "deeplabv3"))


def images(batch: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height))


@pytest.fixture(scope="module", params=[fcn_resnet50, deeplabv3_resnet50], ids=["fcn", "deeplabv3"])
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, MultiExitNet]:
    """(a copy of the user's model, the model that was converted, the multi-exit network)"""
    torch.manual_seed(0)
    model = request.param(weights=None, weights_backbone=None, num_classes=5, aux_loss=False)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return copy.deepcopy(model), model, convert(model, images(1, 64, 96), num_exits=6)


@pytest.fixture(scope="module")
def tiny() -> MultiExitNet:
    net = convert(mobilenetv2_fcn(5, width=0.25, depth=0.5), images(1, 64, 80), num_exits=4)
    for i in range(3):
        for config in HEADS:
            net.add_head(i, config)
    return net.eval()


def test_a_network_is_printed_in_a_line_for_each_exit(tiny: MultiExitNet) -> None:
    first, *exits, last = repr(tiny).splitlines()
    assert (first, last) == ("MultiExitNet of 4 exits, 5 classes (", ")")
    assert len(exits) == 4
    for i, (line, point) in enumerate(zip(exits, tiny.exit_points, strict=True)):
        assert line.startswith(f"  exit {i} after {point.module}: {point.channels} channels at 1/")
    assert exits[0].endswith(", ".join(config.name for config in HEADS))
    assert exits[3].endswith("your model's own head")
    short = copy.deepcopy(tiny)
    short.keep_only([Exit(1, HEADS[0].name)])
    assert [line.rpartition(", ")[2] for line in repr(short).splitlines()[1:-1]] == ["no heads yet", HEADS[0].name]
    with pytest.raises(ModelError, match=r"a batch of images such as torch.zeros\(1, 3, 512, 512\), got \(64, 80\)"):
        convert(nn.Conv2d(3, 5, 1), (64, 80))  # type: ignore[arg-type]


def test_the_final_exit_is_the_users_model_in_train_and_eval(
    pair: tuple[nn.Module, nn.Module, MultiExitNet],
) -> None:
    original, _, net = pair
    original.train(), net.train()
    x = images(2, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(net(x), original(x)["out"], rtol=0, atol=1e-5)
    buffers = dict(original.named_buffers())
    assert any(tensor.any() for name, tensor in buffers.items() if name.endswith("running_mean"))  # they moved
    for name, tensor in net.model_state_dict().items():
        torch.testing.assert_close(tensor, original.state_dict()[name], rtol=0, atol=1e-5)
    original.eval(), net.eval()
    for x in (images(2, 64, 96), images(1, 65, 49)):
        with torch.no_grad():
            logits = net(x)
            assert logits.shape == (len(x), 5, *x.shape[2:])
            torch.testing.assert_close(logits, original(x)["out"], rtol=0, atol=1e-5)


def test_weights_are_shared_under_the_users_names(pair: tuple[nn.Module, nn.Module, MultiExitNet]) -> None:
    _, model, net = pair
    theirs, ours = model.state_dict(), net.model_state_dict()
    assert set(ours) == set(theirs)
    assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in theirs)
    assert {id(p) for p in net.parameters()} == {id(p) for p in model.parameters()}
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in model.parameters())


def test_batchnorm_stays_a_trainable_module(pair: tuple[nn.Module, nn.Module, MultiExitNet]) -> None:
    _, model, net = pair
    norms = [[m for m in x.modules() if isinstance(m, nn.BatchNorm2d)] for x in (net, model)]
    assert len(norms[0]) == len(norms[1]) > 50
    assert {id(m) for m in norms[0]} == {id(m) for m in norms[1]}
    assert all(m.weight.requires_grad and m.track_running_stats for m in norms[0])


def test_the_mode_of_the_model_is_kept() -> None:
    for training in (True, False):
        model = mobilenetv2_fcn(5, width=0.25, depth=0.01).train(training)
        convert(model, images(1, 64, 80), num_exits=2)
        assert all(m.training is training for m in model.modules())


def test_the_users_weights_load_and_save(tiny: MultiExitNet) -> None:
    other = mobilenetv2_fcn(5, width=0.25, depth=0.5).eval()
    state = other.state_dict()
    net = copy.deepcopy(tiny)
    net.load_model_state_dict(state)
    saved = net.model_state_dict()
    assert all(torch.equal(saved[name], state[name]) for name in state)
    assert saved.keys() == state.keys()
    with torch.no_grad():
        x = images(1, 64, 80)
        torch.testing.assert_close(net(x), other(x), rtol=0, atol=1e-5)


def test_weights_that_do_not_fit_are_listed(tiny: MultiExitNet) -> None:
    state = tiny.model_state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    del state["classifier.0.weight"]
    state |= {
        "aux.weight": torch.zeros(1),
        "classifier.4.bias": torch.zeros(21),
        "backbone.0.0.weight": torch.zeros(8, 3, 3, 3),
    }
    with pytest.raises(ModelError) as info:
        tiny.load_model_state_dict(state)
    for problem in (
        "missing classifier.0.weight",
        "unexpected aux.weight",
        "classifier.4.bias is (21,), expected (5,)",
    ):
        assert problem in str(info.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.model_state_dict().items())  # nothing loaded
    with pytest.raises(ModelError, match=r"missing .*and \d\d+ more"):
        tiny.load_model_state_dict({})


def parts(net: MultiExitNet) -> dict[str, nn.Module]:
    segments = {f"segment{i}": segment for i, segment in enumerate(net.backbone.segments)}
    return segments | {f"{exit.exit_index}/{exit.head}": net.head(exit) for exit in net.exits}


@pytest.fixture
def calls(tiny: MultiExitNet) -> Iterator[Counter[str]]:
    """Counts, by part of the network, each call of the part and of every module in it."""
    counter: Counter[str] = Counter()
    handles = [
        module.register_forward_hook(lambda *_, name=name: counter.update([name]))
        for name, part in parts(tiny).items()
        for module in part.modules()
    ]
    yield counter
    for handle in handles:
        handle.remove()


def test_nothing_past_an_exit_runs(tiny: MultiExitNet, calls: Counter[str]) -> None:
    assert len(tiny.exits) == 7
    for i, head in tiny.exits:
        calls.clear()
        with torch.no_grad():
            assert tiny.run_until(images(2, 64, 80), i, head).shape == (2, 5, 64, 80)
        assert set(calls) == {f"segment{k}" for k in range(i + 1)} | {f"{i}/{head}"}
        layers = [m for m in tiny.head(Exit(i, head)).modules() if not list(m.children())]
        assert calls[f"{i}/{head}"] >= len(layers)  # the hooks do see every layer


def test_states_are_lazy(tiny: MultiExitNet, calls: Counter[str]) -> None:
    states = tiny.states(images(1, 64, 80))
    for i in range(tiny.num_exits):
        assert set(calls) == {f"segment{k}" for k in range(i)}
        next(states)
    assert not any("/" in part for part in calls)  # no head


def test_an_exit_is_its_head_on_the_tapped_features(tiny: MultiExitNet) -> None:
    x = images(1, 64, 80)
    with torch.no_grad():
        states = list(tiny.states(x))
        for exit in tiny.exits:
            logits = nn.functional.interpolate(tiny.logits(exit, states[exit.exit_index]), (64, 80), mode="bilinear")
            assert torch.equal(tiny.run_until(x, *exit), logits)


def test_exits_that_do_not_exist_are_told(tiny: MultiExitNet) -> None:
    x = images(1, 64, 80)
    for index in (-1, 4):
        with pytest.raises(ModelError, match=rf"exit_index must lie in 0..3, got {index}"):
            tiny.run_until(x, index)
    with pytest.raises(ModelError, match="exit 1 has 2 heads; name one: crm1-blocks0-fcn, crm2-blocks1-rdi-deeplabv3"):
        tiny.run_until(x, 1)
    for exit in (Exit(1, "crm8-blocks0-fcn"), Exit(2, FINAL_HEAD), Exit(7, FINAL_HEAD)):
        with pytest.raises(ModelError, match=f"no head '{exit.head}' at exit {exit.exit_index}"):
            tiny.head(exit)


def test_a_heads_weights_depend_on_seed_exit_and_config_only(tiny: MultiExitNet) -> None:
    alone = copy.deepcopy(tiny)
    alone.drop_heads()
    assert alone.exits == (Exit(3, FINAL_HEAD),)
    torch.manual_seed(1234)
    state = torch.get_rng_state()
    exit = alone.add_head(1, HEADS[1])
    assert torch.equal(torch.get_rng_state(), state)
    first, among = alone.head(exit).state_dict(), tiny.head(exit).state_dict()
    assert all(torch.equal(first[name], among[name]) for name in among)

    weight = "0.0.weight"  # of the channel reduction module
    alone.add_head(1, HEADS[1], seed=1)
    assert not torch.equal(alone.head(exit).state_dict()[weight], among[weight])
    elsewhere = tiny.head(Exit(2, HEADS[1].name)).state_dict()[weight]
    assert elsewhere.shape != among[weight].shape or not torch.equal(elsewhere, among[weight])


def test_heads_are_dropped_but_those_to_keep(tiny: MultiExitNet) -> None:
    net = copy.deepcopy(tiny)
    keep = Exit(1, HEADS[1].name)
    net.drop_heads(keep=[keep])
    assert net.exits == (keep, Exit(3, FINAL_HEAD))
    assert net.run_until(images(1, 64, 80), 1).shape == (1, 5, 64, 80)  # one head: no need to name it


class Deciding(nn.Module):
    """Looks at the values of its features."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.mean() > 0 else -x


class Moody(nn.Module):
    """Three layers that can be cut when they are traced."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.layers(x), training=self.training)


class Model(nn.Module):
    def __init__(self, middle: nn.Module, finish: Callable[[Tensor], object] = lambda logits: logits) -> None:
        super().__init__()
        self.stem, self.middle, self.head = nn.Conv2d(3, 8, 3, 2, 1), middle, nn.Conv2d(8, 5, 1)
        self.finish = finish

    def forward(self, x: Tensor) -> object:
        return self.finish(self.head(self.middle(self.stem(x))))


def test_a_model_with_less_output_than_input_is_upsampled_and_says_so() -> None:
    model = Model(nn.ReLU())
    net = convert(model, images(1, 64, 80), num_exits=1)
    assert net.notes == (
        "the model's own output is 1/2 of the input: every exit, the final one too, is upsampled to it",
    )
    expected = nn.functional.interpolate(model(images(2, 32, 48)), (32, 48), mode="bilinear", align_corners=False)
    torch.testing.assert_close(net(images(2, 32, 48)), expected)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            Model(nn.ReLU(), lambda y: (y, y)),
            {},
            r"Model returned a tuple of 2; expected logits \(N, K, H, W\) as a tensor",
        ),
        (
            Model(nn.ReLU(), lambda y: y.mean((2, 3))),
            {},
            r"the model gives \(1, 5\) for images \(1, 3, 64, 80\); expected logits \(N, K, H, W\): a classifier\?",
        ),
        (
            Model(nn.ReLU(), lambda y: y.argmax(1)),
            {},
            r"the model gives \(1, 32, 40\) .*: class indices\? leave argmax out",
        ),
        (
            Model(nn.ReLU(), lambda y: y if y.mean() > 0 else -y),
            {},
            rf"Model could not be traced at {__file__}:\d+ \(.*if y.mean.*name the exits by module path, exit_points=",
        ),
        (
            Model(Deciding()),
            {},
            rf"the values of its feature maps at {__file__}:\d+ \(return x if x.*; name the exits by module path",
        ),
        (Model(nn.ReLU()), {"exit_points": ["midle"]}, "no exit point 'midle' in the backbone; did you mean middle?"),
        (
            Model(nn.ReLU()),
            {"head": "classifier"},
            "no module 'classifier' in Model to be the head; there are stem, mid",
        ),
        (
            Model(nn.ReLU()),
            {"num_exits": 3},
            "3 exits need 2 cuts before the end of the backbone, it has 0: ask for 1 to",
        ),
        (
            Model(Moody()),
            {"num_exits": 3},
            r"it has 1: ask for 1 to 2 exits; kept whole: middle, which does other things in train.*name the exits",
        ),
        (Model(nn.Conv2d(9, 8, 1)), {}, r"the model does not run on images \(1, 3, 64, 80\) in middle: "),
    ],
)
def test_what_cannot_be_converted_is_told_in_one_line(model: nn.Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as info:
        convert(model, images(1, 64, 80), **options)
    assert "\n" not in str(info.value)


def test_an_example_that_is_no_batch_of_images_is_told() -> None:
    for shape in ((3, 64, 80), (1, 1, 64, 80), (1, 64, 80, 3)):
        with pytest.raises(ModelError, match=rf"example_input must be RGB images \(N, 3, H, W\), got \({shape[0]}, "):
            convert(Model(nn.ReLU()), torch.zeros(shape))


@pytest.mark.parametrize("num_classes", [1, 2, 4, 11, 21])
@pytest.mark.parametrize("size", [(23, 31), (9, 7), (5, 40)])
def test_labels_are_the_argmax_of_what_is_upsampled(num_classes: int, size: tuple[int, int]) -> None:
    logits = torch.randn(3, num_classes, 9, 7, generator=torch.Generator().manual_seed(num_classes))
    expected = upsample(logits, size).argmax(1)
    for given in (logits, logits.to(memory_format=torch.channels_last), logits.double()):
        torch.testing.assert_close(labels_at(given, size).long(), expected, rtol=0, atol=0)
    half = labels_at(logits.bfloat16(), size).long()
    torch.testing.assert_close(half, labels_at(logits.bfloat16().float(), size).long(), rtol=0, atol=0)
    assert labels_at(logits.to("meta"), size).shape == expected.shape


def test_of_equal_logits_the_first_class_counts() -> None:
    logits = torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0])[None, :, None, None].expand(1, 5, 2, 2)
    assert (labels_at(logits, (6, 6)) == 1).all()


def test_labels_have_eight_bits() -> None:
    with pytest.raises(ModelError, match="at most 256 classes, not 257"):
        labels_at(torch.zeros(1, 257, 2, 2), (4, 4))
