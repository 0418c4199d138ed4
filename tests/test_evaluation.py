"""The tables against a literal count, image by image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import smooth_image

from messnet.data import IGNORE_INDEX, SegmentationSample
from messnet.errors import RecipeError
from messnet.evaluation import EvaluationOptions, evaluate
from messnet.exit_policy import Policy, refined_confidence_map
from messnet.instance import Exit
from messnet.network.multi_exit import MultiExitNet
from messnet.preprocessing import normalise
from messnet.tables import ExitTables

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
        return SegmentationSample(name=f"image {v}", image=smooth_image(*SIZES[v], v), mask=mask, **difficulty)


def as_input(sample: SegmentationSample) -> torch.Tensor:
    return normalise(sample.image)[None].to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def tables(small_net: MultiExitNet) -> ExitTables:
    return evaluate(small_net, Pictures(), OPTIONS)


def test_what_the_tables_are_about(tables: ExitTables, small_net: MultiExitNet) -> None:
    assert tables.image_names == ("image 0", "image 1", "image 2")
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
