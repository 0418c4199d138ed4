"""Optimisers, the average of weights, and the end by patience: equal to torch's own, and gone on with to the bit."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from helpers.training import (
    AUGMENT,
    DISTILL,
    HERE,
    PRETRAIN,
    SPACE,
    Interrupting,
    Noise,
    assert_equal,
    build,
    model_parameters,
    pretrained,
    tensors,
)
from messnet.data import IGNORE_INDEX, SegmentationSample
from messnet.data.transforms import TrainingStream, build_augmentation
from messnet.errors import RecipeError
from messnet.training.average import WeightAverage
from messnet.training.checkpoint import Checkpoint
from messnet.training.journal import Monitor
from messnet.training.options import DistillOptions, PretrainOptions
from messnet.training.stage1 import pretrain
from messnet.training.stage2 import distill

ADAMW = {"optimizer": "adamw", "learning_rate": 0.004, "weight_decay": 0.1, "ema": 0.7}
LOOKING = replace(HERE, validate_every=1, validate_images=3)


def test_adamw_steps_as_torchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "dropout", lambda x, *_: x)
    options = replace(PRETRAIN, iterations=1, scheme="baseline", optimizer="adamw", weight_decay=0.1)
    net = build().train()
    stream = TrainingStream(Noise(), build_augmentation(AUGMENT), iterations=1, batch_size=2, seed=options.seed)
    images, labels = (torch.stack(x) for x in zip(*(stream[k] for k in range(2)), strict=True))
    F.cross_entropy(net(images), labels, ignore_index=IGNORE_INDEX).backward()
    before = {name: p.detach().clone() for name, p in model_parameters(net).items()}
    torch.optim.AdamW(net.parameters(), lr=options.learning_rate * 2 / 16, weight_decay=0.1).step()
    after = pretrained(tmp_path / "c", options)
    # AdamW's first step is the sign of the gradient: rounding turns it where the gradient is next to 0.
    steps = [(after[name] - before[name], p.detach() - before[name]) for name, p in model_parameters(net).items()]
    ours, theirs = (torch.cat([pair[k].flatten() for pair in steps]) for k in range(2))
    assert float(((ours - theirs).abs() < 1e-5).float().mean()) > 0.97
    assert float(theirs.abs().mean()) > 0.01


def test_what_was_chosen_goes_on_bit_for_bit(tmp_path: Path) -> None:
    options = replace(PRETRAIN, **ADAMW)
    whole = pretrained(tmp_path / "whole", options)
    with pytest.raises(KeyboardInterrupt):
        pretrain(build(), Noise(), options, HERE, Interrupting(tmp_path / "c", 4))
    net = build(seed=7)
    pretrain(net, Noise(), options, HERE, Checkpoint(tmp_path / "c"))
    assert_equal(tensors(net), whole)
    for changed in ({"ema": None}, {"optimizer": "sgd"}):
        other = pretrained(tmp_path / str(changed), replace(options, **changed))
        assert not torch.equal(
            other["backbone.final_head.classifier.4.bias"], whole["backbone.final_head.classifier.4.bias"]
        )


def test_stage_2_goes_on_bit_for_bit_and_heads_see_no_other_head(tmp_path: Path) -> None:
    options = replace(DISTILL, **ADAMW)
    whole, net, alone = build(), build(), build()
    distill(whole, Noise(), SPACE, options, HERE, Checkpoint(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        distill(net, Noise(), SPACE, options, HERE, Interrupting(tmp_path / "c", 2))
    net = build()
    distill(net, Noise(), SPACE, options, HERE, Checkpoint(tmp_path / "c"))
    assert_equal(tensors(net), tensors(whole))
    exits = whole.exits[1:2]
    distill(alone, Noise(), SPACE, options, HERE, Checkpoint(tmp_path / "alone"), exits=exits)
    assert_equal(alone.head(exits[0]).state_dict(), whole.head(exits[0]).state_dict())


def test_the_average_is_torchs() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    theirs = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    ours = WeightAverage(module, 0.9)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for _ in range(5):
        module(torch.rand(2, 3, 8, 8)).square().sum().backward()
        optimizer.step()
        ours.update()
        theirs.update_parameters(module)
    last = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with ours.shown():
        for name, tensor in theirs.module.state_dict().items():
            if tensor.is_floating_point():
                torch.testing.assert_close(module.state_dict()[name], tensor)
                assert not torch.equal(tensor, last[name])
    assert_equal(dict(module.state_dict()), last)


def test_the_average_is_what_is_looked_at_and_handed_on(tmp_path: Path) -> None:
    """With keep: best, the mIoU of the curve's best row is that of the weights that are left."""
    options = replace(PRETRAIN, ema=0.5, keep="best", learning_rate=1.0, scheme="baseline")
    net = build()
    pretrain(net, Noise(), options, LOOKING, Checkpoint(tmp_path / "c"), Monitor(tmp_path, Noise()))
    best = max(float(row["miou.final"]) for row in rows(tmp_path / "pretrain.csv"))
    again = build()
    again.load_model_state_dict(net.model_state_dict())
    still = replace(options, iterations=1, learning_rate=0.0, keep="last", ema=None)
    # A step at rate 0 moves nothing but statistics, at momentum 0 not even these.
    for layer in again.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 0.0
    pretrain(again, Noise(), still, LOOKING, Checkpoint(tmp_path / "d"), Monitor(tmp_path / "again", Noise()))
    (row,) = rows(tmp_path / "again" / "pretrain.csv")
    assert float(row["miou.final"]) == pytest.approx(best, abs=1e-6)


def rows(path: Path) -> list[dict[str, str]]:
    with open(path) as file:
        return list(csv.DictReader(file))


class Swapped(Noise):
    """What is learnt is wrong here: each class is called by another one's name."""

    def __getitem__(self, index: int) -> SegmentationSample:
        sample = super().__getitem__(index)
        mask = np.where(sample.mask == IGNORE_INDEX, sample.mask, (sample.mask + 1) % 3).astype(np.uint8)
        return replace(sample, mask=mask)


def test_patience_ends_the_stage_and_it_stays_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = replace(PRETRAIN, iterations=40, checkpoint_every=100, patience=3, keep="best", scheme="baseline")
    net, checkpoint = build(), Checkpoint(tmp_path / "c")
    pretrain(net, Noise(), options, LOOKING, checkpoint, Monitor(tmp_path, Swapped()))
    curve = [float(row["miou.final"]) for row in rows(tmp_path / "pretrain.csv")]
    best = int(np.argmax(curve))
    assert len(curve) == best + 1 + 3 < 40
    assert f"pretrain: ended at iteration {len(curve)}, 3 looks" in capsys.readouterr().err
    whole = pretrained(tmp_path / "other", replace(options, iterations=40, patience=None, keep="last"))
    assert not torch.equal(
        whole["backbone.final_head.classifier.4.bias"], net.head(net.exits[-1]).state_dict()["classifier.4.bias"]
    )
    again = build(seed=7)
    pretrain(again, Noise(), options, LOOKING, checkpoint, Monitor(tmp_path, Swapped()))
    assert_equal(tensors(again), tensors(net))
    assert len(rows(tmp_path / "pretrain.csv")) == len(curve)
    with pytest.raises(RecipeError, match=r"pretrain.patience is 3 but nothing is validated"):
        pretrain(build(), Noise(), replace(options, keep="last"), HERE, Checkpoint(tmp_path / "d"))


@pytest.mark.parametrize(
    ("kind", "key", "value", "expected"),
    [
        (DistillOptions, "optimizer", "adam", "distill.optimizer must be 'sgd' or 'adamw', got 'adam'"),
        (PretrainOptions, "ema", 1.0, "pretrain.ema must be above 0 and below 1"),
        (PretrainOptions, "momentum", 1.0, "pretrain.momentum must be at least 0 and below 1"),
        (PretrainOptions, "patience", 0, "pretrain.patience must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_told(kind: type, key: str, value: object, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        kind(**{key: value})
