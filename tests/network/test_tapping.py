"""A model that cannot be traced: it runs as it is, is tapped as it runs, and stops there."""

from __future__ import annotations

import copy
import gc
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from messnet.costs.workload import count_module
from messnet.data import SegmentationSample
from messnet.data.options import AugmentOptions
from messnet.deployment.session import Session
from messnet.errors import ModelError
from messnet.images.preprocessing import normalise
from messnet.network.backbone import Chain
from messnet.network.head_space import HeadConfig, HeadSpace
from messnet.network.multi_exit import MultiExitNet, convert
from messnet.network.tapping import TappedModel
from messnet.records.instance import FINAL_HEAD, ExitChoice, Instance
from messnet.training.checkpoint import Checkpoint
from messnet.training.options import ComputeOptions, DistillOptions, PretrainOptions, TrainOptions
from messnet.training.stage1 import pretrain
from messnet.training.stage2 import distill

CLASSES, SIZE = 3, (32, 40)
HEADS = (HeadConfig(), HeadConfig(2, 1, True, "deeplabv3"))


def conv(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1), nn.BatchNorm2d(out), nn.ReLU(inplace=True))


class Deciding(nn.Module):
    """Looks at its features to decide what to do; writes in place to what is tapped."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.idle = conv(3, 16, 2), nn.Conv2d(16, 16, 3, 2, 2, dilation=2), conv(3, 3)
        self.deep, self.attention = conv(16, 24), nn.MultiheadAttention(24, 2, batch_first=True)
        self.classifier = nn.Conv2d(24, CLASSES, 1)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.middle(self.stem(x) * self.scale)
        y = y.relu_() if y.mean() < 1e9 else self.idle(y)
        y = self.deep(y)
        flat = y.flatten(2).transpose(1, 2)
        y = y + self.attention(flat, flat, flat)[0].transpose(1, 2).reshape(y.shape)
        return F.interpolate(self.classifier(y), x.shape[-2:], mode="bilinear")


def build(seed: int = 0) -> tuple[Deciding, MultiExitNet]:
    torch.manual_seed(seed)
    model = Deciding()
    return model, convert(model, images(1), exit_points=["stem", "middle"])


def with_heads(net: MultiExitNet) -> MultiExitNet:
    for i in range(net.num_exits - 1):
        for config in HEADS:
            net.add_head(i, config)
    return net.eval()


def images(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, *SIZE, generator=torch.Generator().manual_seed(seed))


def features(model: Deciding, x: Tensor) -> tuple[Tensor, Tensor]:
    one = model.stem(x)
    return one, model.middle(one * model.scale)


@pytest.fixture
def ran() -> list[str]:
    return []


@pytest.fixture
def tapped(ran: list[str]) -> Iterator[tuple[Deciding, MultiExitNet]]:
    """With the names of the modules that ran in ``ran``."""
    model, net = build()
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        for name, module in model.named_children()
    ]
    yield model, with_heads(net)
    for hook in hooks:
        hook.remove()


def test_it_says_what_it_is_and_cannot_do() -> None:
    _, net = build()
    assert isinstance(net.backbone, TappedModel)
    assert not net.backbone.exportable
    (note,) = net.notes
    assert f"could not be traced at {__file__}:" in note
    assert "(y = y.relu_() if y.mean() < 1e9" in note
    assert note.endswith("so it runs as it is, tapped at stem, middle, and cannot be exported")
    with pytest.raises(ModelError, match="cannot be exported"):
        net.backbone.cut_after(0)


def test_the_final_exit_is_the_model() -> None:
    model, net = build()
    original = copy.deepcopy(model)
    for training in (True, False):
        original.train(training), net.train(training)
        x = images(2, seed=int(training))
        assert torch.equal(net(x), original(x))
        theirs = dict(original.named_buffers())
        assert all(torch.equal(buffer, theirs[name]) for name, buffer in model.named_buffers())
    assert original.stem[1].running_mean.any()
    assert {name: t.data_ptr() for name, t in net.model_state_dict().items()} == {
        name: t.data_ptr() for name, t in model.state_dict().items()
    }


def test_states_are_the_features_and_what_follows_does_not_change_them(
    tapped: tuple[Deciding, MultiExitNet],
) -> None:
    model, net = tapped
    with torch.no_grad():
        states = list(net.states(images(2)))
        for state, expected in zip(states, (*features(model, images(2)), model(images(2))), strict=True):
            assert torch.equal(state.features, expected)
            assert state.kept == ()


def test_nothing_past_an_exit_runs(tapped: tuple[Deciding, MultiExitNet], ran: list[str]) -> None:
    model, net = tapped
    everything = ["stem", "middle", "deep", "attention", "classifier"]
    for exit in net.exits:
        ran.clear()
        assert net.run_until(images(1), *exit).shape == (1, CLASSES, *SIZE)
        assert ran == [everything[:1], everything[:2], everything][exit.exit_index]
    ran.clear()
    states = net.states(images(1))
    for until in (0, 1, 2):  # what ran before the next state is asked for
        assert ran == everything[:until]
        next(states)
    assert ran == everything
    assert not model.stem._forward_hooks
    assert not model.middle._forward_hooks


def test_runs_do_not_meet(tapped: tuple[Deciding, MultiExitNet]) -> None:
    (_, net), (_, other) = tapped, build(seed=1)
    other.eval()
    with torch.no_grad():
        expected = [list(one.states(x)) for one, x in ((net, images(1)), (net, images(1, 1)), (other, images(1)))]
        together = zip(net.states(images(1)), net.states(images(1, 1)), other.states(images(1)), strict=True)
        for k, states in enumerate(together):
            assert all(
                torch.equal(state.features, one[k].features) for state, one in zip(states, expected, strict=True)
            )
    assert k == 2


def test_a_run_that_nobody_asks_on_is_unwound(tapped: tuple[Deciding, MultiExitNet], ran: list[str]) -> None:
    model, net = tapped
    unwound: list[str] = []
    forward = model.middle.forward

    def guarded(x: Tensor) -> Tensor:
        states = net.states(images(1, 2))  # of its own, inside the other
        next(states)
        try:
            return forward(x)
        finally:
            unwound.append("middle")

    model.middle.forward = guarded
    states = net.states(images(1))
    next(states)
    next(states)
    del states
    assert ran == ["stem", "middle", "stem"]
    assert unwound == ["middle"]
    assert not model.stem._forward_hooks
    model.middle.forward = forward
    with torch.no_grad():
        assert torch.equal(net(images(1)), model(images(1)))


def test_a_run_may_be_ended_by_the_garbage_collector_inside_another(tapped: tuple[Deciding, MultiExitNet]) -> None:
    model, net = tapped
    x, other = images(1), build(1)[1]
    expected = [state.features for state in net.states(x)]
    cycle: list[object] = [other.states(x)]
    next(cycle[0])  # type: ignore[call-overload]
    cycle.append(cycle)
    del cycle  # nobody asks on, but it lives until the next collection
    hook = model.register_forward_pre_hook(lambda *_: gc.collect() and None)
    try:
        found = [state.features for state in net.states(x)]
    finally:
        hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_error_of_the_model_reaches_the_caller(tapped: tuple[Deciding, MultiExitNet]) -> None:
    model, net = tapped
    model.deep = nn.Conv2d(99, 24, 3)
    states = net.states(images(1))
    next(states), next(states)
    with pytest.raises(RuntimeError, match="99"):
        next(states)
    assert not model.stem._forward_hooks


def test_gradients_flow_through_the_taps() -> None:
    model, net = build()
    with_heads(net).train()
    original, heads = copy.deepcopy(model), copy.deepcopy(net.heads)
    x, loss = images(2), torch.zeros(())
    for i, state in enumerate(net.states(x)):  # as training does it: heads while the model sleeps
        for exit in [exit for exit in net.exits if exit.exit_index == i]:
            torch.manual_seed(0)
            loss = loss + net.logits(exit, state).square().mean()
    loss.backward()

    outputs = []
    for i, feature in enumerate(features(original, x)):
        for config in HEADS:
            torch.manual_seed(0)
            outputs.append(heads[i][config.name](feature))
    torch.stack([y.square().mean() for y in (*outputs, original(x))]).sum().backward()
    for name, parameter in original.named_parameters():
        theirs, ours = parameter.grad, model.get_parameter(name).grad
        assert (theirs is None) == (ours is None) == name.startswith("idle")
        torch.testing.assert_close(ours, theirs)


class Frozen(Deciding):
    """Its stem is run without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.middle(self.stem(x))
        return self.classifier(self.deep(y if y.mean() < 1e9 else -y))


def test_a_no_grad_block_of_the_model_stays_its_own() -> None:
    model = Frozen()
    net = with_heads(convert(model, images(1), exit_points=["stem"])).train()
    states = net.states(images(2))
    state = next(states)
    assert not state.features.requires_grad
    assert net.logits(net.exits[0], state).requires_grad
    final = next(states).features
    final.sum().backward()
    assert model.middle.weight.grad is None
    assert model.deep[0].weight.grad.any()


def test_a_session_predicts(tapped: tuple[Deciding, MultiExitNet], ran: list[str]) -> None:
    model, net = tapped
    image = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    early = ExitChoice(exit_index=0, head=HEADS[0].name, pixel_threshold=0.5, image_threshold=1.0)
    exits = (early, ExitChoice(exit_index=2, head=FINAL_HEAD))
    (result,) = Session(net, Instance(name="two", setting="input_dependent", exits=exits)).predict([image])
    with torch.no_grad():
        expected = model(torch.from_numpy(normalise(image))[None]).argmax(1)[0]
    assert result.exit_index == 2
    assert np.array_equal(result.labels, expected.numpy())

    ran.clear()
    stops = (replace(early, image_threshold=0.0), exits[1])
    (result,) = Session(net, Instance(name="two", setting="input_dependent", exits=stops)).predict([image])
    assert result.exit_index == 0
    assert ran == ["stem"]


class Noise:
    class_names = ("a", "b", "c")
    palette = np.zeros((3, 3), np.uint8)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> SegmentationSample:
        rng = np.random.default_rng(index)
        image, mask = rng.integers(0, 256, (*SIZE, 3), np.uint8), rng.integers(0, CLASSES, SIZE, np.uint8)
        return SegmentationSample(name=str(index), image=image, mask=mask)


def test_both_stages_train_it(tmp_path: Path) -> None:
    model, net = build()
    options = TrainOptions(iterations=2, batch_size=2, augment=AugmentOptions(crop=SIZE), learning_rate=0.1)
    here = ComputeOptions(device="cpu", num_workers=0)
    before = copy.deepcopy(model.state_dict())
    pretrain(net, Noise(), PretrainOptions(**vars(options)), here, Checkpoint(tmp_path / "1"))
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if not name.startswith("idle")}

    before = copy.deepcopy(model.state_dict())
    space = HeadSpace(channel_reduction=(1,), extra_blocks=(0,), segmentation_head=("fcn",))
    distill(net, Noise(), space, DistillOptions(**vars(options)), here, Checkpoint(tmp_path / "2"))
    assert not [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    fresh = copy.deepcopy(net)
    for exit in net.exits[:-1]:
        fresh.add_head(exit.exit_index, HeadConfig())
        initial = fresh.head(exit).state_dict()
        assert not [name for name, p in net.head(exit).named_parameters() if torch.equal(p, initial[name])]


def test_the_parts_add_up() -> None:
    model, net = build()
    stem, middle, end = net.exit_points
    assert (stem.node, stem.channels, stem.output_stride, stem.dilation) == ("stem", 16, 2, 1)
    assert (middle.node, middle.channels, middle.output_stride, middle.dilation) == ("middle", 16, 4, 2)
    assert (end.channels, end.output_stride) == (CLASSES, 1)
    assert net.num_classes == CLASSES
    assert stem.macs == count_module(model.stem, (1, 3, *SIZE)).macs
    assert middle.macs - stem.macs == count_module(model.middle, (1, 16, 16, 20)).macs
    rest = [(model.deep, (1, 16, 8, 10)), (model.classifier, (1, 24, 8, 10))]
    tokens, width = 80, 24
    attention = 4 * tokens * width**2 + 2 * tokens**2 * width
    assert end.macs - middle.macs == sum(count_module(module, shape).macs for module, shape in rest) + attention

    sizes = [sum(p.numel() for p in part.parameters()) for part in (model.stem, model.middle, model)]
    assert net.backbone.segment_parameters() == (sizes[0], sizes[1], sizes[2] - sizes[1] - sizes[0])


def test_it_can_be_copied_and_converted_again(tapped: tuple[Deciding, MultiExitNet]) -> None:
    _, net = tapped
    twin = copy.deepcopy(net)
    again = convert(twin.backbone.model, images(1), exit_points=[point.node for point in net.exit_points[:-1]])
    assert again.exit_points == net.exit_points
    with torch.no_grad():
        expected = [net.run_until(images(2), *exit) for exit in net.exits]
        for parameter in net.parameters():
            parameter.zero_()
        assert all(
            torch.equal(twin.run_until(images(2), *exit), y) for exit, y in zip(net.exits, expected, strict=True)
        )


class Moody(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = conv(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.inner(x), training=self.training)


def test_a_module_that_was_kept_whole_is_tapped_inside_but_not_at_its_end() -> None:
    model = nn.Sequential(OrderedDict(backbone=nn.Sequential(Moody(), conv(8, 8)), classifier=nn.Conv2d(8, 3, 1)))
    assert isinstance(convert(model, images(1), exit_points=["backbone.0"]).backbone, Chain)
    net = convert(model, images(1), exit_points=["backbone.0.inner"])
    assert isinstance(net.backbone, TappedModel)
    reason = (
        "the exit point 'backbone.0.inner' lies inside backbone.0, which does other things in train() than in eval()"
    )
    assert net.notes[0].startswith(f"{reason}; so it runs as it is")


class Tuples(Deciding):
    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.attention(*[self.deep(self.middle(self.stem(x))).flatten(2).transpose(1, 2)] * 3)
        return y if y.mean() < 1e9 else -y


@pytest.mark.parametrize(
    ("kind", "paths", "message"),
    [
        (Deciding, ["stem", "midle"], "no exit point 'midle' in Deciding; did you mean middle?"),
        (Deciding, ["middle", "stem"], "exit_points must come in the order the model runs them: middle is not next"),
        (Deciding, ["stem", "idle"], "1 of the exit points stem, idle are not run by the model"),
        (Deciding, ["stem", "attention"], "the exit point 'attention' gives tuple, expected a feature map"),
        (Tuples, ["stem"], r"Tuples gives \(1, 80, 24\), expected a feature map"),
    ],
)
def test_places_that_cannot_be_tapped_are_told(kind: type[nn.Module], paths: list[str], message: str) -> None:
    with pytest.raises(ModelError, match=message) as info:
        convert(kind(), images(1), exit_points=paths)
    assert "\n" not in str(info.value)


def test_images_that_the_model_does_not_take_are_told() -> None:
    model = Deciding()
    model.deep = nn.Conv2d(99, 24, 3)
    with pytest.raises(ModelError, match=rf"the model does not run on images \(1, 3, 32, 40\) at {__file__}:\d+ .*99"):
        convert(model, images(1), exit_points=["stem"])
