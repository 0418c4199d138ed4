"""What training tells and keeps: curves without a gap or a double row, the best state, warnings, full disks."""

from __future__ import annotations

import csv
import errno
import os
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.training import CLASSES, DISTILL, HERE, PRETRAIN, SPACE, Interrupting, Noise, assert_equal, build, tensors
from messnet.data import SegmentationSample
from messnet.errors import DataError, RecipeError, RunError
from messnet.images.preprocessing import normalise
from messnet.network.head_space import plain_head_config
from messnet.training.checkpoint import Checkpoint
from messnet.training.journal import Journal, Monitor, Validation
from messnet.training.stage1 import pretrain
from messnet.training.stage2 import distill

LOOKING = replace(HERE, validate_images=3)


def rows(path: Path) -> list[dict[str, str]]:
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("stage", ["pretrain", "distill"])
def test_a_resumed_curve_is_the_uninterrupted_one(tmp_path: Path, stage: str) -> None:
    def train(checkpoint: Checkpoint, folder: Path) -> None:
        rest = (LOOKING, checkpoint, Monitor(folder, Noise()))
        if stage == "pretrain":
            pretrain(build(), Noise(), PRETRAIN, *rest)
        else:
            distill(build(), Noise(), SPACE, replace(DISTILL, checkpoint_every=2), *rest)

    train(Checkpoint(tmp_path / "a"), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(Interrupting(tmp_path / "c", 2), tmp_path / "part")
    path = tmp_path / f"part/{stage}.csv"
    with open(path, "a") as file:  # past the checkpoint, the last one torn by a kill
        file.write("3,0.1,9,9,9,9,9,9\n4,0.1,9")
    train(Checkpoint(tmp_path / "c"), tmp_path / "part")
    assert path.read_bytes() == (tmp_path / f"whole/{stage}.csv").read_bytes()
    iterations = [int(row["iteration"]) for row in rows(path)]
    assert iterations == {"pretrain": [2, 4, 6], "distill": [2, 4]}[stage]
    final = "final" if stage == "pretrain" else "exit1"
    assert all(0 <= float(row[f"miou.{final}"]) <= 1 and float(row[f"loss.{final}"]) > 0 for row in rows(path))
    assert all(all(row.values()) for row in rows(path))  # the exits that had their turn between two rows too


@pytest.mark.parametrize("stage", ["pretrain", "distill"])
def test_states_saved_by_the_clock_change_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    def train(checkpoint: Checkpoint, folder: Path) -> dict[str, torch.Tensor]:
        net, rest = build(), (LOOKING, checkpoint, Monitor(folder, Noise()))
        if stage == "pretrain":
            pretrain(net, Noise(), replace(PRETRAIN, iterations=4, checkpoint_every=3), *rest)
        else:
            distill(net, Noise(), SPACE, replace(DISTILL, checkpoint_every=3), *rest)
        return tensors(net)

    whole = train(Checkpoint(tmp_path / "a"), tmp_path / "whole")
    for after in (1, 2):  # of three: neither is a checkpoint's iteration
        with pytest.raises(KeyboardInterrupt):
            train(Interrupting(tmp_path / "c", after, seconds=0), tmp_path / "part")
    capsys.readouterr()
    assert_equal(train(Checkpoint(tmp_path / "c"), tmp_path / "part"), whole)
    assert f"{stage}: goes on after iteration 2 of 4, from {tmp_path / 'c'}" in capsys.readouterr().err
    # The losses of exits that had their turn before the kill too: one early exit has it in an iteration of stage 1.
    curves = [(tmp_path / f"{folder}/{stage}.csv").read_bytes() for folder in ("part", "whole")]
    assert curves[0] == curves[1]


def test_a_start_that_left_no_state_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = "pretrain: an earlier start left no checkpoint"
    for broken in (True, False):
        data = Noise(broken=broken)
        with suppress(DataError):
            pretrain(build(), data, PRETRAIN, LOOKING, Checkpoint(tmp_path / "c"), Monitor(tmp_path, Noise()))
        assert (said in capsys.readouterr().err) is not broken


def test_the_curves_exits_are_the_schemes(tmp_path: Path) -> None:
    for scheme, early in (("baseline", []), ("end_to_end", ["exit0", "exit1"])):
        options = replace(PRETRAIN, scheme=scheme, iterations=1)
        pretrain(
            build(),
            Noise(),
            options,
            LOOKING,
            Checkpoint(tmp_path / f"{scheme}.checkpoint"),
            Monitor(tmp_path / scheme, Noise()),
        )
        (row,) = rows(tmp_path / scheme / "pretrain.csv")
        names = [*early, "final"]
        assert [*row] == ["iteration", "learning_rate", *(f"{k}.{n}" for k in ("loss", "miou") for n in names)]
        assert all(row.values())


def test_looking_changes_no_weight(tmp_path: Path) -> None:
    nets = []
    for name, compute in (("with", LOOKING), ("without", replace(HERE, validate_every=0, log="none"))):
        net, monitor = build(), Monitor(tmp_path / name, Noise())
        pretrain(net, Noise(), PRETRAIN, compute, Checkpoint(tmp_path / "1" / name), monitor)
        distill(net, Noise(), SPACE, DISTILL, compute, Checkpoint(tmp_path / "2" / name), monitor)
        nets.append(tensors(net))
    assert_equal(*nets)
    assert not (tmp_path / "without").exists()


def test_what_is_seen_is_the_miou_over_the_images() -> None:
    net = build().eval()
    found = Validation(Noise(), 3).look(net, [net.exits[-1]], torch.device("cpu"))[net.exits[-1]]
    intersection, union = np.zeros(CLASSES), np.zeros(CLASSES)
    for v in (0, 2, 4):
        sample = Noise()[v]
        with torch.no_grad():
            labels = net(torch.from_numpy(normalise(sample.image))[None])[0].argmax(0).numpy()
        valid = sample.mask < CLASSES
        for k in range(CLASSES):
            a, b = (labels == k) & valid, sample.mask == k
            intersection[k] += (a & b).sum()
            union[k] += (a | b).sum()
    assert found.miou == pytest.approx(np.mean((intersection / union)[union > 0]))


@dataclass
class OneClass(Noise):
    """Nothing but class 1, so that the network soon says nothing else."""

    def __getitem__(self, index: int) -> SegmentationSample:
        sample = super().__getitem__(index)
        return replace(sample, mask=np.ones_like(sample.mask))


def test_one_class_for_all_is_warned_of_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = replace(PRETRAIN, iterations=12, learning_rate=2.0, scheme="baseline")
    pretrain(build(), OneClass(), options, LOOKING, Checkpoint(tmp_path / "c"), Monitor(tmp_path, Noise()))
    err = capsys.readouterr().err
    assert err.count("still takes every validation pixel for 'b': look at the masks") == 1
    assert "exit 2 (final)" in err


def test_the_best_weights_can_be_kept(tmp_path: Path) -> None:
    options = replace(PRETRAIN, keep="best", learning_rate=1.0)
    net = build()
    pretrain(net, Noise(), options, LOOKING, Checkpoint(tmp_path / "a.checkpoint"), Monitor(tmp_path, Noise()))
    curve = rows(tmp_path / "pretrain.csv")
    means = [np.mean([float(row[f"miou.{name}"]) for name in ("exit0", "exit1", "final")]) for row in curve]
    best = Checkpoint(tmp_path / "a.checkpoint").best.load()
    assert best is not None
    assert best["iteration"] == int(curve[int(np.argmax(means))]["iteration"])
    then = build()
    for k in range(2):
        then.add_head(k, plain_head_config())
    then.load_state_dict(best["stage"]["net"])
    assert_equal(net.model_state_dict(), then.model_state_dict())
    for compute, monitor in ((replace(LOOKING, validate_every=0), Monitor(tmp_path, Noise())), (LOOKING, None)):
        with pytest.raises(RecipeError, match=r"pretrain.keep is 'best' but nothing is validated"):
            pretrain(build(), Noise(), options, compute, Checkpoint(tmp_path / "d"), monitor)


def test_automatic_class_weights_are_counted_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masks = np.stack([Noise()[v].mask for v in range(5)])
    share = np.array([(masks == k).sum() for k in range(CLASSES)]) / (masks < CLASSES).sum()
    weights = 1 / np.log(1.02 + share)
    weights /= (share * weights).sum()
    given, auto = build(), build()
    exact = tuple(float(np.float32(w)) for w in weights)
    for net, chosen in ((given, exact), (auto, "auto")):
        options = replace(PRETRAIN, class_weights=chosen, iterations=1)
        pretrain(net, Noise(), options, HERE, Checkpoint(tmp_path / str(len(chosen))))
    words = ", ".join(f"{name} {w:.2f}" for name, w in zip("abc", weights, strict=True))
    told = capsys.readouterr().err
    assert f"pretrain.class_weights auto, from 5 images: {words}" in told
    rate = options.learning_rate * options.batch_size / 16  # what the optimiser gets
    scaled = f"(pretrain.learning_rate {options.learning_rate:g} x batch {options.batch_size} / 16)"
    assert f"images; the learning rate falls from {rate:g} {scaled} to 0" in told
    for one, two in zip(tensors(given).values(), tensors(auto).values(), strict=True):
        torch.testing.assert_close(one, two)


def test_tensorboard_has_the_same_curve(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for done, iterations in ((0, (10, 20)), (10, (20, 30))):  # resumed at 10: 20 is written anew
        journal = Journal(tmp_path, "pretrain", ["loss.final"], kind="both", done=done)
        for iteration in iterations:
            journal.write({"iteration": iteration, "learning_rate": 0.1, "loss.final": iteration + done})
        journal.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard/pretrain"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/final")] == [(10, 10), (20, 30), (30, 40)]
    assert [(row["iteration"], row["loss.final"]) for row in rows(tmp_path / "pretrain.csv")] == [
        ("10", "10"), ("20", "30"), ("30", "40")
    ]  # fmt: skip


def test_tensorboard_that_is_missing_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RecipeError, match=r"pip install 'messnet\[log\]', or log 'csv'"):
        Journal(tmp_path, "pretrain", [], kind="tensorboard", done=0)


def test_a_full_disk_is_told_and_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second checkpoint finds no room, half way; the training goes on from the first."""
    whole = build()
    pretrain(whole, Noise(), PRETRAIN, HERE, Checkpoint(tmp_path / "whole"))
    fsync, saves = os.fsync, iter(range(100))

    def full(descriptor: int) -> None:
        if next(saves) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match=r"c cannot be written \(No space left on device\): free space") as info:
            pretrain(build(), Noise(), PRETRAIN, HERE, Checkpoint(tmp_path / "c"))
    assert "\n" not in str(info.value)
    state = Checkpoint(tmp_path / "c").load()
    assert state is not None
    assert state["iteration"] == 2
    assert not [*tmp_path.glob(".*.tmp")]
    net = build()
    pretrain(net, Noise(), PRETRAIN, HERE, Checkpoint(tmp_path / "c"))
    assert_equal(tensors(net), tensors(whole))


def test_a_folder_that_cannot_be_written_is_told_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(RunError, match=r"cannot be written \(Read-only file system\).*make the folder writable"):
        pretrain(build(), Noise(broken=True), PRETRAIN, HERE, Checkpoint(tmp_path / "c"))  # no image was read
    monkeypatch.undo()
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(RunError, match=r"pretrain.csv cannot be written"):
        pretrain(build(), Noise(broken=True), PRETRAIN, HERE, Checkpoint(tmp_path / "c"),
                 Monitor(tmp_path / "file", Noise()))  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [("devices", 0), ("validate_every", -1), ("validate_images", 0)])
def test_compute_options_out_of_range_are_told(name: str, value: int) -> None:
    with pytest.raises(RecipeError, match=rf"compute.{name} must be at least {value + 1}, got {value}"):
        replace(HERE, **{name: value})


def test_unknown_schemes_and_losses_are_told() -> None:
    with pytest.raises(RecipeError, match="'exit_aware', 'baseline' or 'end_to_end', got 'joint'"):
        replace(PRETRAIN, scheme="joint")
    with pytest.raises(RecipeError, match="'pfd', 'kd', 'self_distillation' or 'ce', got 'mse'"):
        replace(DISTILL, loss="mse")
