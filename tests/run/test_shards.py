"""Heads trained in parts, in other processes, beside a head that diverges: the same weights to the bit."""

from __future__ import annotations

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.training import DISTILL, HERE, SPACE, Noise, assert_equal, build
from messnet.cli import main
from messnet.errors import MessError, RecipeError, RunError
from messnet.network.head_space import HeadConfig
from messnet.network.multi_exit import MultiExitNet
from messnet.records.instance import Exit
from messnet.records.run_directory import RunDirectory
from messnet.records.shard import Shard
from messnet.run.shards import Part, deal, expect_whole, join, pack, read_parts, share, unpack
from messnet.training.checkpoint import Checkpoint
from messnet.training.options import DistillationLoss
from messnet.training.stage2 import distill, space_exits

RECIPE = """
data: {source: scenes, scenes: {size: [64, 64], num_train: 6, num_val: 2}}
model: {name: mobilenetv2_fcn, width: 0.25, depth: 0.01, num_exits: 3}
heads: {channel_reduction: [1], extra_blocks: [0], rapid_dilation: [false], segmentation_head: [fcn, deeplabv3]}
pretrain: {iterations: 2, batch_size: 4, checkpoint_every: 1}
distill: {iterations: 2, batch_size: 4, checkpoint_every: 1}
compute: {device: cpu, num_workers: 0, validate_images: 2}
"""


def distilled(path: Path, loss: DistillationLoss, exits: tuple[Exit, ...] | None = None) -> MultiExitNet:
    net = build()
    distill(net, Noise(), SPACE, replace(DISTILL, loss=loss, iterations=2), HERE, Checkpoint(path), exits=exits)
    return net


@pytest.mark.parametrize("loss", ["pfd", "ce", "self_distillation"])
def test_a_part_of_the_heads_learns_what_it_would_among_all(tmp_path: Path, loss: DistillationLoss) -> None:
    whole = distilled(tmp_path / "whole", loss)
    exits = tuple(exit for exit in space_exits(build(), SPACE) if exit.head == "crm1-blocks1-rdi-fcn")
    part = distilled(tmp_path / "part", loss, exits)  # without the plain heads that teach in self-distillation
    assert part.exits[:-1] == exits
    for exit in exits:
        assert_equal(part.head(exit).state_dict(), whole.head(exit).state_dict())


def test_self_distillation_learns_from_the_next_deeper_exit(tmp_path: Path) -> None:
    by_loss = {loss: distilled(tmp_path / loss, loss) for loss in ("kd", "self_distillation")}
    assert build().num_exits == 3
    for exit in by_loss["kd"].exits[:-1]:
        kd, sd = (dict(net.head(exit).named_parameters()) for net in by_loss.values())
        # the next deeper exit of the last early one is the final exit: knowledge distillation
        assert all(torch.equal(kd[name], sd[name]) for name in kd) == (exit.exit_index == 1)


BAD = Exit(0, "crm1-blocks1-rdi-deeplabv3")


class Poisoned(MultiExitNet):
    """One of its heads begins with weights that are not finite."""

    def add_head(self, exit_index: int, config: HeadConfig, *, seed: int = 0) -> Exit:
        exit = super().add_head(exit_index, config, seed=seed)
        if exit == BAD:
            next(self.head(exit).parameters()).data.fill_(float("inf"))
        return exit


@pytest.mark.parametrize("loss", ["pfd", "self_distillation"])
def test_a_head_that_diverges_is_stopped_and_changes_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], loss: DistillationLoss
) -> None:
    sound = distilled(tmp_path / "sound", loss)
    net = Poisoned(build().backbone)
    options = replace(DISTILL, loss=loss, iterations=2)
    stopped = distill(net, Noise(), SPACE, options, HERE, Checkpoint(tmp_path / "c"))
    assert stopped == {BAD: 1}
    assert "left out, for their loss is not finite: exit 0 (crm1-blocks1-rdi-deeplabv3)" in capsys.readouterr().err
    assert set(sound.exits) - set(net.exits) == {BAD}
    for exit in net.exits[:-1]:
        assert_equal(net.head(exit).state_dict(), sound.head(exit).state_dict())
    state = Checkpoint(tmp_path / "c").load()
    assert state is not None
    assert state["stage"]["stopped"] == [[*BAD, 1]]  # and a resumed training does not begin it again
    resumed = Poisoned(build().backbone)
    checkpoint = Checkpoint(tmp_path / "c")
    assert distill(resumed, Noise(), SPACE, options, HERE, checkpoint) == stopped
    assert_equal(resumed.heads.state_dict(), net.heads.state_dict())


def test_what_the_last_step_breaks_is_left_out_too(tmp_path: Path) -> None:
    options = replace(DISTILL, iterations=1, learning_rate=1e300, momentum=0.0)
    with pytest.raises(MessError, match=r"the loss of distill is nan at iteration 1: lower distill.learning_rate"):
        distill(build(), Noise(), SPACE, options, HERE, Checkpoint(tmp_path / "c"))


def test_a_checkpoint_of_other_heads_is_refused(tmp_path: Path) -> None:
    exits = space_exits(build(), SPACE)
    distilled(tmp_path / "c", "ce", exits[:1])
    with pytest.raises(RunError, match="holds other heads than are to be trained: delete it"):
        distilled(tmp_path / "c", "ce", exits[:2])


@pytest.mark.parametrize("count", [1, 2, 5, 8, 100])
def test_parts_take_about_the_same_time(count: int) -> None:
    draw = np.random.default_rng(0)
    costs = {Exit(k % 5, f"h{k}"): float(cost) for k, cost in enumerate(draw.uniform(1, 10, 60))}
    dealt = deal(costs, count)
    assert dealt.keys() == costs.keys()
    loads = [sum(costs[exit] for exit in costs if dealt[exit] == part) for part in range(count)]
    assert set(dealt.values()) <= set(range(count))
    assert max(loads) <= min(loads) + max(costs.values())  # nothing to move from the fullest to the emptiest
    assert deal(dict(reversed(costs.items())), count) == dealt  # however they are listed


def test_shards_divide_the_heads_and_processes_a_shard() -> None:
    net = build()
    exits = space_exits(net, replace(SPACE, channel_reduction=(1, 2)))
    parts = [Shard(k, 2).divided(rank, 3) for k in (1, 2) for rank in range(3)]
    assert [str(part) for part in parts] == [f"{k}of6" for k in range(1, 7)]
    shares = [share(part, net, exits) for part in parts]
    assert sorted(exit for own in shares for exit in own) == sorted(exits)
    assert all(list(own) == [exit for exit in exits if exit in own] for own in shares)
    heavy = max(exits, key=lambda exit: sum(p.numel() for p in net.head(net.add_head(*parsed(exit))).parameters()))
    assert min(shares[0], key=lambda exit: exit != heavy) == heavy  # the heaviest goes to the first


def parsed(exit: Exit) -> tuple[int, HeadConfig]:
    return exit.exit_index, HeadConfig.parse(exit.head)


@pytest.mark.parametrize("text", ["0/4", "5/4", "2", "a/b", "1/4/2", "-1/4"])
def test_what_is_no_shard(text: str) -> None:
    with pytest.raises(RecipeError, match="--shard is K/N with 1 <= K <= N, such as 2/8, got"):
        Shard.parse(text)


def part_of(*names: str, stopped: dict[Exit, int] | None = None, made_from: str = "r") -> Part:
    tensors: dict[str, Tensor] = {f"{name}.0.weight": torch.arange(3.0) for name in names}
    return Part(tensors, stopped or {}, made_from)


def test_parts_come_back_as_they_were(tmp_path: Path) -> None:
    part = part_of("0.a", "1.b", stopped={Exit(1, "c"): 30})
    back = unpack(pack(part), "x")
    assert back.stopped == part.stopped
    assert back.made_from == "r"
    assert back.exits == {Exit(0, "a"), Exit(1, "b"), Exit(1, "c")}
    assert_equal(back.tensors, part.tensors)
    for damaged in (b"", b"\xff" * 40, pack(part)[:-5]):
        with pytest.raises(RunError, match=r"stage2.1of2.safetensors cannot be read \(damaged\)"):
            unpack(damaged, "stage2.1of2.safetensors")


def test_a_merge_says_what_is_missing_and_refuses_what_is_foreign(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.part_of_stage2(Shard(2, 3)).write(pack(part_of("0.a", stopped={Exit(0, "b"): 10})))
    exits = [Exit(0, "a"), Exit(0, "b"), *(Exit(1, f"h{k}") for k in range(7))]
    with pytest.raises(RunError) as info:
        expect_whole(read_parts(directory, "r"), exits, directory)
    assert str(info.value).startswith("7 of 9 heads are missing: exit 1 (h0), ")
    assert "(h4) and 2 more" in str(info.value)
    assert "has the shards 2/3: copy" in str(info.value)
    directory.part_of_stage2(Shard(1, 3)).write(pack(part_of("1.h0", made_from="other")))
    with pytest.raises(RunError, match=r"stage2.1of3.safetensors was made from another recipe or stage 1"):
        read_parts(directory, "r")
    expect_whole(join([part_of("0.a"), part_of("1.b")]), [Exit(0, "a"), Exit(1, "b")], directory)


def test_a_shards_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    Checkpoint(tmp_path / "c", made_from="a").save({"iteration": 3})
    assert Checkpoint(tmp_path / "c", made_from="a").load() == {"iteration": 3}
    with pytest.raises(RunError, match=r"was made from another recipe .*delete it"):
        Checkpoint(tmp_path / "c", made_from="b").load()


@pytest.fixture(scope="module")
def pretrained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    (folder / "tiny.yaml").write_text(RECIPE)
    for stage in ("profile", "pretrain"):
        main([stage, str(folder / "tiny.yaml"), "--out", str(folder / "run")])
    return folder / "run"


@pytest.fixture(scope="module")
def whole_run(pretrained_run: Path) -> Path:
    run = shutil.copytree(pretrained_run, pretrained_run.parent / "whole")
    main(["distill", str(run)])
    return run


def test_shards_merge_to_the_file_of_one_process(
    whole_run: Path, pretrained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(pretrained_run, tmp_path / "run")
    main(["distill", str(run), "--shard", "2/2"])
    with pytest.raises(SystemExit):
        main(["distill", str(run), "--merge"])
    assert "of 4 heads are missing: exit " in capsys.readouterr().err
    rest = shutil.copytree(run, tmp_path / "rest")
    main(["distill", str(run), "--shard", "1/2"])
    main(["distill", str(run), "--merge"])
    main(["distill", str(rest)])  # trains what is missing
    for merged in (run, rest):
        assert (merged / "stage2.safetensors").read_bytes() == (whole_run / "stage2.safetensors").read_bytes()
        assert not [*merged.glob("stage2.*of*"), *merged.glob("*.checkpoint")]
        assert RunDirectory(merged).fingerprint("distill") == RunDirectory(whole_run).fingerprint("distill")
    assert "shard 1/2 done" in capsys.readouterr().out


def test_stage_1_is_shared_by_runs_that_agree(
    pretrained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(pretrained_run.parent / "tiny.yaml")
    own = ["--distill.loss", "ce", "--distill.iterations", "1", "--heads.segmentation_head", "fcn"]
    rest = ["--out", str(tmp_path / "ce"), "--pretrained", str(pretrained_run)]
    main(["distill", recipe, *own, *rest])
    assert (tmp_path / "ce/stage1.safetensors").read_bytes() == (pretrained_run / "stage1.safetensors").read_bytes()
    assert RunDirectory(tmp_path / "ce").fingerprint("pretrain") == RunDirectory(pretrained_run).fingerprint("pretrain")
    assert (tmp_path / "ce/stage2.safetensors").exists()
    rest[1] = str(tmp_path / "other")
    with pytest.raises(SystemExit):
        main(["distill", recipe, "--pretrain.scheme", "baseline", *rest])
    assert (
        "was pretrained with another recipe: pretrain.scheme was exit_aware and is baseline; stage 1"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "other/stage1.safetensors").exists()


def test_the_heads_that_stage_1_trained_are_kept(pretrained_run: Path, tmp_path: Path) -> None:
    """What end-to-end training means in the paper: every exit as it was trained with the backbone."""
    own = ["--distill.plain_heads", "stage1", "--distill.iterations", "0", "--heads.segmentation_head", "fcn"]
    own += ["--heads.channel_reduction", "[1]", "--heads.extra_blocks", "[0]", "--heads.rapid_dilation", "[false]"]
    recipe, out = str(pretrained_run.parent / "tiny.yaml"), tmp_path / "kept"
    main(["distill", recipe, *own, "--out", str(out), "--pretrained", str(pretrained_run)])
    kept, stage1 = (load_file(out / f"{name}.safetensors") for name in ("stage2", "stage1_heads"))
    assert kept.keys() == stage1.keys()
    assert all(torch.equal(kept[name], stage1[name]) for name in kept)


def test_two_processes_share_batches_in_stage_1_and_heads_in_stage_2(pretrained_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(pretrained_run, tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    del record["stages"]["pretrain"]
    (run / "run.json").write_text(json.dumps(record))
    (run / "stage1.safetensors").unlink()
    alone = rows(run / "logs/pretrain.csv")
    script = tmp_path / "both.py"
    script.write_text(
        "import sys\nfrom messnet.cli import main\nfor stage in sys.argv[2:]:\n main([stage, sys.argv[1]])\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command += [str(script), str(run), "pretrain", "distill"]
    # In a session of its own: torchrun may signal its whole process group when it ends.
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=580, start_new_session=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["pretrain:", "done", "distill:", "done"]  # the first process speaks
    assert list(json.loads((run / "run.json").read_text())["stages"]) == ["profile", "pretrain", "distill"]

    # The first iteration's loss, before any step: the mean over all pixels of the batch, but for the normalisation
    # statistics and dropout, which are each process's own.
    together = rows(run / "logs/pretrain.csv")
    assert len(together) == len(alone) == 2
    assert float(together[0]["loss.final"]) == pytest.approx(float(alone[0]["loss.final"]), rel=0.2)
    assert float(together[0]["loss.final"]) != float(alone[0]["loss.final"])

    # Each process trained its heads; what they wrote together is what one process makes of the same stage 1.
    assert sorted(path.name for path in (run / "logs").glob("distill*")) == ["distill.1of2.csv", "distill.2of2.csv"]
    one = tmp_path / "one"
    main(["profile", str(pretrained_run.parent / "tiny.yaml"), "--out", str(one)])
    shutil.copy(run / "stage1.safetensors", one)
    main(["distill", str(one)])
    assert (run / "stage2.safetensors").read_bytes() == (one / "stage2.safetensors").read_bytes()


def rows(path: Path) -> list[dict[str, str]]:
    with open(path) as file:
        return list(csv.DictReader(file))
