"""Both stages: the paper's loss, training that goes on bit for bit where it stopped, heads that see no other head."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.training import (
    AUGMENT,
    DISTILL,
    HERE,
    PRETRAIN,
    SIZE,
    SPACE,
    WORKER,
    Interrupting,
    Noise,
    assert_equal,
    build,
    model_parameters,
    pretrained,
    tensors,
)
from messnet.data import IGNORE_INDEX
from messnet.data.transforms import TrainingStream, build_augmentation
from messnet.errors import DataError, MessError, RecipeError
from messnet.network.head_space import HeadSpace, plain_head_config
from messnet.training.checkpoint import Checkpoint
from messnet.training.options import ComputeOptions, DistillOptions, PretrainOptions, TrainOptions
from messnet.training.stage1 import active_exits, pretrain
from messnet.training.stage2 import distill


@pytest.mark.parametrize("num_exits", range(2, 7))
def test_active_exits_are_the_papers(num_exits: int) -> None:
    for j in range(1, 25):
        alternating = {1 + (j % (num_exits - 1))}
        modulo = {i for i in range(1, num_exits) if j % i == 0}
        assert {index + 1 for index in active_exits("alternating", j, num_exits - 1)} == alternating
        assert {index + 1 for index in active_exits("modulo", j, num_exits - 1)} == modulo
    assert active_exits("alternating", 1, 0) == active_exits("modulo", 1, 0) == ()


@pytest.mark.parametrize(
    ("scheme", "schedule", "active"),
    [
        ("exit_aware", "alternating", [1]),
        ("exit_aware", "modulo", [0]),
        ("baseline", "alternating", []),
        ("end_to_end", "alternating", [0, 1]),
    ],
)
def test_one_iteration_is_one_step_on_the_papers_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, schedule: str, active: list[int]
) -> None:
    monkeypatch.setattr(F, "dropout", lambda x, *_: x)
    options = replace(PRETRAIN, iterations=1, scheme=scheme, schedule=schedule, momentum=0.0, weight_decay=0.0)
    net = build().train()
    heads = [net.head(net.add_head(i, plain_head_config(), seed=options.seed)).train() for i in active]
    stream = TrainingStream(Noise(), build_augmentation(AUGMENT), iterations=1, batch_size=2, seed=options.seed)
    images, labels = (torch.stack(x) for x in zip(*(stream[k] for k in range(2)), strict=True))
    states = list(net.states(images))
    early = [head(states[i].features) for i, head in zip(active, heads, strict=True)]
    logits = [*(F.interpolate(y, SIZE, mode="bilinear") for y in early), net(images)]
    loss = sum(F.cross_entropy(y, labels, ignore_index=IGNORE_INDEX) for y in logits)
    own = model_parameters(net)
    gradients = torch.autograd.grad(loss, list(own.values()))
    rate = options.learning_rate * 2 / 16  # for a batch of 2
    expected = {name: p - rate * g for (name, p), g in zip(own.items(), gradients, strict=True)}

    trained = build()
    pretrain(trained, Noise(), options, HERE, Checkpoint(tmp_path / "c"))
    # The step as a whole: batch statistics of two small images amplify the rounding of another layout or thread count.
    after = model_parameters(trained)
    step, error = (
        torch.cat([(one[name] - two[name]).flatten() for name in own]).norm()
        for one, two in ((expected, own), (expected, after))
    )
    assert step > 0
    assert error < 0.05 * step  # a wrong exit or weight changes it by tens of percent


@pytest.mark.parametrize(("schedule", "after"), [("alternating", 4), ("modulo", 2)])
def test_interrupted_pretraining_goes_on_bit_for_bit(tmp_path: Path, schedule: str, after: int) -> None:
    options = replace(PRETRAIN, schedule=schedule)
    whole = pretrained(tmp_path / "whole", options)
    with pytest.raises(KeyboardInterrupt):
        pretrain(build(), Noise(), options, HERE, Interrupting(tmp_path / "c", after))
    net = build(seed=7)  # all that matters comes from the checkpoint
    pretrain(net, Noise(), options, WORKER, Checkpoint(tmp_path / "c"))
    assert_equal(tensors(net), whole)
    assert not any(torch.equal(whole[name], p) for name, p in build().named_parameters())  # it did train


def test_plain_heads_go_on_from_stage_1(tmp_path: Path) -> None:
    net, plain, checkpoint = build(), plain_head_config().name, Checkpoint(tmp_path / "c")
    pretrain(net, Noise(), PRETRAIN, HERE, checkpoint)
    checkpoint.discard()
    stage1 = tensors(net)
    alone = HeadSpace(channel_reduction=(1,), extra_blocks=(0,), rapid_dilation=(True,), segmentation_head=("fcn",))
    kept = replace(DISTILL, plain_heads="stage1", iterations=0)
    distill(net, Noise(), alone, kept, HERE, checkpoint)
    assert_equal(tensors(net), stage1)
    # Without a rate parameters stay as they begin; others than plain ones begin anew.
    still = replace(DISTILL, plain_heads="stage1", iterations=1, learning_rate=0.0, weight_decay=0.0)
    distill(net, Noise(), SPACE, still, HERE, checkpoint)
    checkpoint.discard()
    parameters = {name for name, _ in net.heads.named_parameters(prefix="heads") if f".{plain}." in name}
    assert parameters
    assert_equal({name: tensors(net)[name] for name in parameters}, {name: stage1[name] for name in parameters})
    distill(net, Noise(), alone, replace(still, plain_heads="new"), HERE, checkpoint)
    assert not all(torch.equal(tensors(net)[name], stage1[name]) for name in parameters)
    with pytest.raises(RecipeError, match=r"leaves \d+ heads as they are drawn.*only plain heads"):
        distill(net, Noise(), SPACE, kept, HERE, checkpoint)


def test_interrupted_distillation_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, net = build(), build()
    distill(whole, Noise(), SPACE, DISTILL, HERE, Checkpoint(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        distill(net, Noise(), SPACE, DISTILL, HERE, Interrupting(tmp_path / "c", 2))
    net = build()
    distill(net, Noise(), SPACE, DISTILL, WORKER, Checkpoint(tmp_path / "c"))
    assert_equal(tensors(net), tensors(whole))


def test_heads_learn_at_a_rate_of_their_own(tmp_path: Path) -> None:
    once = replace(PRETRAIN, iterations=1)
    before = tensors(build())
    same, faster = (
        pretrained(tmp_path / str(rate), replace(once, head_learning_rate=rate))
        for rate in (None, 10 * once.learning_rate)
    )
    for name, _ in build().named_parameters():
        is_head = name.startswith("backbone.final_head.")
        steps = (same[name] - before[name], faster[name] - before[name])
        torch.testing.assert_close(steps[1], (10 if is_head else 1) * steps[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("rate", "head_rate"),
    [(0.1, 0.0), (0.1, -1.0), (0.1, math.inf), (0.0, 0.1), (-1.0, None), (math.inf, None), (math.nan, None)],
)
def test_rates_are_checked(rate: float, head_rate: float | None) -> None:
    with pytest.raises(RecipeError, match=r"learning_rate .*(above|at least) 0( and finite)?, got"):
        replace(PRETRAIN, learning_rate=rate, head_learning_rate=head_rate)


def test_a_rate_for_heads_needs_a_final_head() -> None:
    net = build()
    net.backbone.final_head = nn.Identity()
    with pytest.raises(RecipeError, match="a final head with parameters of its own"):
        pretrain(net, Noise(), replace(PRETRAIN, head_learning_rate=1.0), HERE, Checkpoint(Path("c")))


def test_distillation_leaves_the_users_model_alone(tmp_path: Path) -> None:
    net = build()
    before = {name: tensor.clone() for name, tensor in net.model_state_dict().items()}
    distill(net, Noise(), SPACE, DISTILL, HERE, Checkpoint(tmp_path / "c"))
    assert_equal(net.model_state_dict(), before)  # backbone, final head and their statistics
    fresh = build()
    for exit in net.exits[:-1]:
        fresh.add_head(exit.exit_index, *[c for c in SPACE.configs(64) if c.name == exit.head])
        initial = dict(fresh.head(exit).named_parameters())
        assert not [
            n for n, p in net.head(exit).named_parameters() if torch.equal(p, initial[n])
        ]  # all of a head moved


def test_a_head_learns_the_same_alone_and_among_others(tmp_path: Path) -> None:
    together = build()
    distill(together, Noise(), SPACE, DISTILL, HERE, Checkpoint(tmp_path / "together"))
    assert len(together.exits) == 2 * 4 + 1
    for head in ("fcn", "deeplabv3"):
        alone = build()
        space = replace(SPACE, extra_blocks=(1,), segmentation_head=(head,))
        distill(alone, Noise(), space, DISTILL, HERE, Checkpoint(tmp_path / head))
        assert len(alone.exits) == 2 * 1 + 1
        for exit in alone.exits[:-1]:
            assert_equal(alone.head(exit).state_dict(), together.head(exit).state_dict())


@pytest.mark.parametrize("stage", ["pretrain", "distill"])
def test_a_loss_that_is_not_finite_stops_with_one_line(tmp_path: Path, stage: str) -> None:
    rest = (HERE, Checkpoint(tmp_path / "c"))
    train = {
        "pretrain": lambda: pretrain(build(), Noise(), replace(PRETRAIN, learning_rate=1e30), *rest),
        "distill": lambda: distill(build(), Noise(), SPACE, replace(DISTILL, learning_rate=1e30), *rest),
    }[stage]
    with pytest.raises(MessError, match=rf"the loss of {stage} is (nan|inf).* lower {stage}.learning_rate") as info:
        train()
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("compute", [HERE, WORKER], ids=["here", "worker"])
def test_broken_data_is_told_in_one_line(tmp_path: Path, compute: ComputeOptions) -> None:
    with pytest.raises(DataError) as info:
        pretrain(build(), Noise(broken=True), PRETRAIN, compute, Checkpoint(tmp_path / "c"))
    assert str(info.value) in [f"image {index}.png: expected RGB, got nothing" for index in range(5)]


def test_class_weights_are_one_per_class(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"pretrain.class_weights has 2 values for 3 classes"):
        pretrain(build(), Noise(), replace(PRETRAIN, class_weights=(1.0, 2.0)), HERE, Checkpoint(tmp_path / "c"))
    options = replace(PRETRAIN, iterations=1)
    weighted, ones, none = (
        pretrained(tmp_path / str(weights), replace(options, class_weights=weights))[
            "backbone.final_head.classifier.4.bias"
        ]
        for weights in ((1.0, 5.0, 0.0), (1.0, 1.0, 1.0), None)
    )
    torch.testing.assert_close(ones, none)
    assert not torch.allclose(weighted, none)


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [("iterations", 0, 1), ("batch_size", 1, 2), ("loss_stride", 0, 1), ("checkpoint_every", 0, 1)],
)
def test_options_out_of_range_are_told(name: str, value: int, least: int) -> None:
    # The stages may have no iteration: stage 1 then keeps the model as it was delivered, stage 2 the heads of stage 1.
    for kind in (TrainOptions, *((PretrainOptions, DistillOptions) if name != "iterations" else ())):
        kind(**{name: least})
        with pytest.raises(RecipeError, match=f"{name} must be at least {least}, got {value}"):
            kind(**{name: value})


@pytest.mark.parametrize("device", ["cuda", "mps", "xpu"])
def test_a_device_that_is_not_there_is_told(device: str) -> None:
    here = torch.accelerator.current_accelerator(check_available=True)
    if here is not None and here.type == device:
        assert ComputeOptions(device=device).fabric().device.type == device
        return
    with pytest.raises(RecipeError, match=f"compute.device: .* torch sees no {device} device; use cpu"):
        ComputeOptions(device=device).fabric()


def test_a_device_that_nothing_is_called() -> None:
    assert ComputeOptions(device="cpu").fabric().device == torch.device("cpu")
    with pytest.raises(RecipeError, match="no device is called 'tpu': expected auto, cpu, cuda, mps or xpu"):
        ComputeOptions(device="tpu").fabric()


@pytest.mark.parametrize("has_instructions", [False, True])
def test_bf16_that_is_emulated_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, has_instructions: bool
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_instructions)
    compute = replace(HERE, precision="bf16")
    once = replace(PRETRAIN, iterations=1, checkpoint_every=1)
    pretrain(build(), Noise(), once, compute, Checkpoint(tmp_path / "state.pt"))
    assert ("--compute.precision f32" in capsys.readouterr().err) != has_instructions


def test_bf16_autocast_trains_close_to_float32(tmp_path: Path) -> None:
    half = replace(HERE, precision="bf16")
    nets = []
    for compute in (HERE, half):
        net = build()
        pretrain(net, Noise(), PRETRAIN, compute, Checkpoint(tmp_path / f"{compute.precision}1"))
        distill(net, Noise(), SPACE, DISTILL, compute, Checkpoint(tmp_path / f"{compute.precision}2"))
        nets.append(tensors(net))
    start = tensors(build())
    assert all(tensor.dtype == nets[0][name].dtype for name, tensor in nets[1].items())  # weights stay float32
    moved = {name for name in start if not torch.equal(nets[0][name], start[name])}
    full, low = (torch.cat([(net[name] - start[name]).flatten().double() for name in sorted(moved)]) for net in nets)
    assert not torch.equal(full, low)
    assert float(torch.cosine_similarity(full, low, dim=0)) > 0.9
