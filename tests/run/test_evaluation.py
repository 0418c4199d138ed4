"""The tables against a literal count, image by image."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.images import smooth_image
from messnet.cli import main
from messnet.data import IGNORE_INDEX, SegmentationSample
from messnet.errors import ModelError, RecipeError, RunError
from messnet.evaluation import evaluate, merge_shards
from messnet.images.preprocessing import normalise
from messnet.network.multi_exit import MultiExitNet
from messnet.policy.options import EvaluationOptions
from messnet.policy.policy import Policy
from messnet.policy.reference import refined_confidence_map
from messnet.records.exit_tables import ExitTables
from messnet.records.instance import Exit
from messnet.records.shard import Shard
from messnet.run.measuring import logits_in
from messnet.run.opening import open_run
from messnet.training.checkpoint import Checkpoint

OPTIONS = EvaluationOptions(policies=("top1+native", "entropy+paper"), pixel_thresholds=(0.3, 0.5, 0.8))
SIZES = ((64, 80), (61, 83), (72, 64))


@dataclass
class Pictures:
    """Three images of different sizes, with void, one of unknown difficulty."""

    class_names = ("a", "b", "c", "d", "e")
    palette = np.zeros((5, 3), np.uint8)

    def __len__(self) -> int:
        return len(SIZES)

    def __getitem__(self, v: int) -> SegmentationSample:
        mask = np.random.default_rng(v).integers(0, 4, SIZES[v]).astype(np.uint8)  # class 4 is nowhere
        mask[:9] = IGNORE_INDEX
        difficulty = {} if v == 2 else {"difficulty": 0.25 + v / 2}
        group = "" if v == 1 else "walk"
        image = smooth_image(*SIZES[v], v)
        return SegmentationSample(name=f"image {v}", image=image, mask=mask, group=group, **difficulty)


def as_input(sample: SegmentationSample) -> torch.Tensor:
    return torch.from_numpy(normalise(sample.image))[None].to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def tables(small_net: MultiExitNet) -> ExitTables:
    return evaluate(small_net, Pictures(), OPTIONS)


def test_what_the_tables_are_about(tables: ExitTables, small_net: MultiExitNet) -> None:
    assert tables.image_names == ("image 0", "image 1", "image 2")
    assert tables.groups == ("walk", "", "walk")
    np.testing.assert_array_equal(tables.difficulty, [0.25, 0.75, np.nan])
    assert tables.class_names == Pictures.class_names
    assert tables.policies == OPTIONS.policies
    assert tuple(tables.pixel_thresholds) == OPTIONS.pixel_thresholds
    assert tables.exits == small_net.exits == tuple(sorted(tables.exits, key=lambda exit: exit.exit_index))
    assert len(tables.exits) == 7
    assert tables.exits[tables.final] == Exit(3, "final")


def test_counts_are_those_of_each_image_alone(tables: ExitTables, small_net: MultiExitNet) -> None:
    seen = set()
    for v, h in np.ndindex(3, 7):
        sample, exit = Pictures()[v], tables.exits[h]
        with torch.no_grad():
            logits = small_net.run_until(as_input(sample), exit.exit_index, exit.head)
        prediction = logits[0].argmax(0).numpy()
        seen |= set(prediction.flat)
        valid = sample.mask != IGNORE_INDEX
        for k in range(5):
            assert tables.intersection[v, h, k] == ((prediction == k) & (sample.mask == k)).sum()
            assert tables.predicted[v, h, k] == ((prediction == k) & valid).sum()
            assert tables.labelled[v, k] == (sample.mask == k).sum()
    assert len(seen) > 2  # or the counts would prove little


def test_image_confidence_is_the_share_of_the_literal_map(tables: ExitTables, small_net: MultiExitNet) -> None:
    for v, h in np.ndindex(3, 7):
        sample, exit = Pictures()[v], tables.exits[h]
        with torch.no_grad():
            logits = small_net.logits(exit, list(small_net.states(as_input(sample)))[exit.exit_index])
        for p, name in enumerate(OPTIONS.policies):
            stride = small_net.exit_points[exit.exit_index].output_stride
            refined = refined_confidence_map(logits, stride, SIZES[v], Policy.parse(name))[1][0].numpy()
            shares = [(refined >= np.float32(threshold)).mean() for threshold in OPTIONS.pixel_thresholds]
            np.testing.assert_array_equal(tables.image_confidence[v, h, p], np.float32(shares))
    assert 0.05 < tables.image_confidence.mean() < 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policies": ("top1",)}, r"top1\+native"),
        ({"policies": ()}, "at least one"),
        ({"pixel_thresholds": ()}, "at least one"),
        ({"pixel_thresholds": (0.9, 0.5)}, "ascend"),
        ({"pixel_thresholds": (0.5, 0.5)}, "ascend"),
    ],
)
def test_options_are_checked(options: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        EvaluationOptions(**options)


ARRAYS = ("intersection", "predicted", "labelled", "image_confidence", "difficulty", "pixel_thresholds")


def assert_equal_tables(a: ExitTables, b: ExitTables) -> None:
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert getattr(a, name).dtype == getattr(b, name).dtype
    for name in ("image_names", "groups", "class_names", "exits", "policies", "origin"):
        assert getattr(a, name) == getattr(b, name)


class Stopping(Pictures):
    """The power fails when image ``last`` is read."""

    def __init__(self, last: int) -> None:
        self.last, self.read = last, []

    def __getitem__(self, v: int) -> SegmentationSample:
        if v == self.last:
            raise KeyboardInterrupt
        self.read.append(v)
        return super().__getitem__(v)


def test_a_killed_evaluation_goes_on(tables: ExitTables, small_net: MultiExitNet, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "tables.checkpoint")
    with pytest.raises(KeyboardInterrupt):
        evaluate(small_net, Stopping(2), OPTIONS, origin="a", checkpoint=checkpoint, checkpoint_seconds=0)
    rest = Stopping(99)
    resumed = evaluate(small_net, rest, OPTIONS, origin="a", checkpoint=checkpoint)
    assert rest.read == [2]
    assert_equal_tables(resumed, replace(tables, origin="a"))
    of_others = Stopping(99)
    evaluate(small_net, of_others, OPTIONS, origin="other weights", checkpoint=checkpoint)
    assert of_others.read == [0, 1, 2]


def test_shards_merge_to_the_tables_of_one_pass(tables: ExitTables, small_net: MultiExitNet) -> None:
    parts = [Shard(1, 2), Shard(2, 2)]
    shards = {part: evaluate(small_net, Pictures(), OPTIONS, part=part, origin="a") for part in parts}
    assert shards[Shard(1, 2)].image_names == ("image 0", "image 2")
    assert_equal_tables(merge_shards(dict(reversed(shards.items())), "a"), replace(tables, origin="a"))
    for wrong, message in (
        ({}, "found none"),
        ({Shard(2, 2): shards[Shard(2, 2)]}, r"shards 1/2 are missing"),
        (shards | {Shard(1, 3): shards[Shard(1, 2)]}, "2 and 3 parts"),
        ({Shard(1, 2): shards[Shard(2, 2)], Shard(2, 2): shards[Shard(1, 2)]}, "shard 1/2 was made from another"),
    ):
        with pytest.raises(RunError, match=message):
            merge_shards(wrong, "a")
    with pytest.raises(RunError, match="another recipe or other weights"):
        merge_shards(shards, "b")


def test_the_command_in_shards(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    before = ExitTables.from_bytes((run / "tables.npz").read_bytes())
    assert before.origin
    (run / "tables.npz").unlink()

    def fails(*tokens: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(["evaluate", str(run), *tokens])
        assert end.value.code == 2
        return capsys.readouterr().err

    main(["evaluate", str(run), "--shard", "2/2"])
    assert "shards 1/2 are missing" in fails("--merge")
    assert "such as 2/8" in fails("--shard", "3/2")
    assert "without --shard" in fails("--shard", "1/2", "--merge")
    main(["evaluate", str(run), "--shard", "1/2"])
    main(["evaluate", str(run), "--merge", "--json"])
    assert_equal_tables(ExitTables.from_bytes((run / "tables.npz").read_bytes()), before)
    assert not list(run.glob("tables.*of*")) + list(run.glob("*.checkpoint"))


def test_logits_that_are_not_finite_name_exit_and_image(small_net: MultiExitNet, tables: ExitTables) -> None:
    broken = copy.deepcopy(small_net)
    head = broken.exits[3]
    next(broken.head(head).parameters()).data[0] = float("nan")
    with pytest.raises(ModelError, match=rf"exit {head.exit_index}, head {head.head}, gives NaN .* image 'image 0'"):
        evaluate(broken, Pictures(), OPTIONS)
    damaged = replace(tables, image_confidence=tables.image_confidence.copy())
    damaged.image_confidence[1, 6, 0, 1] = np.nan
    with pytest.raises(RunError, match="first at exit 3, head final, image 'image 1'"):
        ExitTables.from_bytes(damaged.to_bytes())


def test_logits_of_another_runtime_stand_in_for_the_network(small_net: MultiExitNet, tables: ExitTables) -> None:
    def logits_of(image: np.ndarray) -> list[tuple[Exit, torch.Tensor]]:
        """The network's own, in another order."""
        x = torch.from_numpy(normalise(image))[None].to(memory_format=torch.channels_last)
        states = list(small_net.states(x))
        return [(exit, small_net.logits(exit, states[exit.exit_index])) for exit in reversed(small_net.exits)]

    found = evaluate(small_net, Pictures(), OPTIONS, logits_of=logits_of)
    for name in ("intersection", "predicted", "labelled", "image_confidence"):
        np.testing.assert_array_equal(getattr(found, name), getattr(tables, name))


def test_tables_of_another_precision(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """torch in bf16: close to those in f32, in a file of their own, and not made twice."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    arguments = ["evaluate", str(run), "--runtime", "torch", "--precision", "bf16"]
    main(arguments)
    assert capsys.readouterr().out.startswith("evaluate: done")
    own, found = (ExitTables.from_bytes((run / f"tables{which}.npz").read_bytes()) for which in ("", "-torch-bf16"))
    assert (own.precision, found.precision) == ("f32", "bf16")
    assert (own.exits, own.image_names) == (found.exits, found.image_names)
    assert 0 < np.abs(own.image_confidence - found.image_confidence).max() < 0.5
    share = np.abs(own.predicted - found.predicted).sum() / (2 * own.predicted.sum())
    assert 0 < share < 0.03
    assert (run / "tables.npz").read_bytes() == (tiny_run / "tables.npz").read_bytes()
    main(arguments)
    assert capsys.readouterr().out.startswith("evaluate: already done")


def test_every_head_is_tabulated_once_whatever_runs_it(tiny_run: Path) -> None:
    """Instances with a head of every exit point each, run by torch in f32, give the tables to the bit."""
    run = open_run(tiny_run)
    net = run.trained()
    found = evaluate(net, run.dataset("val"), run.recipe.evaluate, logits_of=logits_in(run, net, "torch", "f32"))
    for name in ("intersection", "predicted", "labelled", "image_confidence"):
        np.testing.assert_array_equal(getattr(found, name), getattr(run.tables(), name))
