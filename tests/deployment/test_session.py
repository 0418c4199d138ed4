"""A running session against the tables: the same exits, the same confidences, the same mIoU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.images import smooth_image
from messnet.data import IGNORE_INDEX, SegmentationSample
from messnet.deployment.loading import load
from messnet.deployment.runner import Live, Step
from messnet.deployment.session import Session
from messnet.deployment.torch_runner import TorchRunner
from messnet.errors import DataError, ModelError, RecipeError, RunError
from messnet.network.multi_exit import MultiExitNet
from messnet.policy.policy import Policy
from messnet.policy.reference import refined_confidence_map
from messnet.records.exit_tables import ExitTables
from messnet.records.instance import Exit, ExitChoice, Instance
from messnet.records.iou import mean_iou
from messnet.run.opening import open_run
from messnet.searching.grid import route

FINAL = ExitChoice(exit_index=3, head="final")


@pytest.fixture(scope="module")
def tables(tiny_run: Path) -> ExitTables:
    return open_run(tiny_run).tables()


@pytest.fixture(scope="module")
def samples(tiny_run: Path) -> list[SegmentationSample]:
    val = open_run(tiny_run).dataset("val")
    return [val[v] for v in range(len(val))]


def brute_force_miou(labels: list[np.ndarray], masks: list[np.ndarray], num_classes: int) -> float:
    counts = np.zeros((3, num_classes), np.int64)
    for prediction, mask in zip(labels, masks, strict=True):
        for k in range(num_classes):
            predicted, labelled = (prediction == k) & (mask != IGNORE_INDEX), mask == k
            counts[:, k] += (predicted & labelled).sum(), predicted.sum(), labelled.sum()
    return mean_iou(*counts)


def instances(tables: ExitTables) -> list[Instance]:
    """One early exit, then the final one: at its observed confidences (ties), just above, and in between; then two
    early exits."""
    found = []
    for h in (0, 3):  # fcn at exit 0, deeplabv3 at exit 1
        head = tables.exits[h]
        t = int(np.argmax(tables.image_confidence[:, h, 0].std(0)))
        observed = np.unique(tables.image_confidence[:, h, 0, t]).astype(np.float64)
        middle = observed[len(observed) // 2]
        for threshold in (0.0, middle, np.nextafter(middle, 1), (middle + observed[-1]) / 2, 1.0):
            early = ExitChoice(
                exit_index=head.exit_index,
                head=head.head,
                pixel_threshold=float(tables.pixel_thresholds[t]),
                image_threshold=float(threshold),
            )
            found.append(Instance(name="pair", setting="input_dependent", exits=(early, FINAL)))
    triple = (found[1].exits[0], found[6].exits[0], ExitChoice(exit_index=2, head=tables.exits[4].head))
    return [*found, Instance(name="triple", setting="input_dependent", exits=triple)]


def test_a_session_does_what_the_tables_say(
    tiny_run: Path, tables: ExitTables, samples: list[SegmentationSample]
) -> None:
    mixed = 0
    for instance in instances(tables):
        routing = route(tables, instance)
        mixed += len(set(routing)) > 1
        results = load(tiny_run, instance=instance).predict([sample.image for sample in samples])
        assert [result.exit_index for result in results] == [tables.exits[p].exit_index for p in routing]
        thresholds = {choice.exit_index: choice.pixel_threshold for choice in instance.exits}
        last_deciding = [choice.pixel_threshold for choice in instance.exits if choice.pixel_threshold is not None][-1]
        for v, (p, result) in enumerate(zip(routing, results, strict=True)):
            t = list(tables.pixel_thresholds).index(thresholds[result.exit_index] or last_deciding)
            assert result.image_confidence == tables.image_confidence[v, p, 0, t]
        labels, masks = [result.labels for result in results], [sample.mask for sample in samples]
        assert brute_force_miou(labels, masks, len(tables.class_names)) == tables.miou(routing)
    assert mixed >= 3  # instances at which some images stop and some go on


def test_a_result_is_complete(small_net: MultiExitNet) -> None:
    instance = Instance(name="whole", setting="budgeted", exits=(FINAL,), policy="entropy+native")
    session = Session(small_net, instance)
    results = session.predict([smooth_image(61, 83), smooth_image(64, 80), smooth_image(90, 35)])
    assert [result.labels.shape for result in results] == [(61, 83), (64, 80), (90, 35)]
    for result in results:
        assert result.labels.dtype == np.uint8
        assert result.labels.max() < 5
        assert result.latency_ms > 0
        before, after = result.confidence_maps()
        np.testing.assert_array_equal(result.confidence_map, after)
        for confidence in (before, after):
            assert confidence.shape == result.labels.shape
            assert confidence.dtype == np.float32
            assert 0 <= confidence.min() < confidence.max() <= 1
        native = refined_confidence_map(
            torch.from_numpy(result.logits), 8, result.labels.shape, Policy.parse("entropy+native")
        )[1][0]
        rows = np.floor((np.arange(len(after))) * native.shape[0] / len(after)).astype(int)
        columns = np.floor((np.arange(after.shape[1])) * native.shape[1] / after.shape[1]).astype(int)
        np.testing.assert_array_equal(after, native.numpy()[np.ix_(rows, columns)])


def test_a_pixel_threshold_of_0_is_a_threshold(small_net: MultiExitNet) -> None:
    head = small_net.exits[0].head
    early = ExitChoice(exit_index=0, head=head, pixel_threshold=0.0, image_threshold=1.0)
    session = Session(small_net, Instance(name="all", setting="input_dependent", exits=(early, FINAL)))
    result = session.predict([smooth_image(64, 80)])[0]
    assert (result.exit_index, result.image_confidence) == (0, 1.0)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((64, 80), np.uint8),
        np.zeros((64, 80, 4), np.uint8),
        np.zeros((64, 80, 3), np.int64),
        np.zeros((3, 64, 80), np.uint8),
    ],
    ids=["grey", "alpha", "integers", "channels first"],
)
def test_what_is_no_image_is_refused(small_net: MultiExitNet, image: np.ndarray) -> None:
    session = Session(small_net, Instance(name="whole", setting="budgeted", exits=(FINAL,)))
    for call in (lambda: session.predict([image]), lambda: list(session.anytime(image))):
        with pytest.raises(DataError, match=r"\(H, W, 3\).*uint8.*RGB"):
            call()


def test_a_deadline_in_the_past_is_refused(tiny_run: Path) -> None:
    session = load(tiny_run)
    image = np.zeros((64, 64, 3), np.uint8)
    for deadline_ms in (-50.0, float("nan")):
        with pytest.raises(RecipeError, match="at least 0 ms"):
            next(session.anytime(image, deadline_ms=deadline_ms))
    assert next(session.anytime(image, deadline_ms=0.0)).labels.shape == (64, 64)


def test_a_warm_up_runs_every_exit_and_is_forgotten(small_net: MultiExitNet) -> None:
    taken: list[Exit] = []

    class Watched(TorchRunner):
        def advance(self, live: Live, exit: Exit, **how: Any) -> Step:
            taken.append(exit)
            return super().advance(live, exit, **how)

    exits = [exit for exit in small_net.exits if exit.head in (small_net.exits[0].head, "final")]
    choices = [ExitChoice(exit_index=e.exit_index, head=e.head, pixel_threshold=0, image_threshold=0) for e in exits]
    session = Session(
        Watched(small_net, Policy()), Instance(name="x", setting="input_dependent", exits=(*choices[:-1], FINAL))
    )
    image = np.zeros((64, 64, 3), np.uint8)
    session.warm_up(image)
    assert taken == 2 * exits
    taken.clear()
    assert [result.exit_index for result in session.anytime(image, deadline_ms=1e9)] == [e.exit_index for e in exits]
    assert taken == exits  # the warm-up has foretold nothing


def test_an_exit_that_is_not_there(small_net: MultiExitNet) -> None:
    session = Session(small_net, Instance(name="whole", setting="budgeted", exits=(FINAL,)))
    with pytest.raises(ModelError, match="no exit 1; it has 3, or from the end -1 to -1"):
        session.budgeted(smooth_image(64, 80), exit_index=1)
    for choice in (ExitChoice(exit_index=1, head="nope"), ExitChoice(exit_index=9, head="final")):
        with pytest.raises(ModelError, match="no head"):
            Session(small_net, Instance(name="bad", setting="budgeted", exits=(choice,)))
    with pytest.raises(ModelError, match="no exits"):
        Session(small_net, Instance(name="none", setting="budgeted", exits=()))


def test_load_names_what_there_is(tiny_run: Path, tmp_path: Path) -> None:
    assert load(tiny_run).instance.name == "drop-1pp"
    session = load(tiny_run, instance="max-miou")
    assert session.instance.name == "max-miou"
    assert session.class_names == open_run(tiny_run).dataset("val").class_names
    with pytest.raises(RunError, match=r"no instance 'nope'; it has drop-0.1pp, drop-1pp, max-miou"):
        load(tiny_run, instance="nope")
    with pytest.raises(RunError, match="is no run directory"):
        load(tmp_path)


def test_only_the_heads_of_the_instance_are_loaded(tiny_run: Path, tables: ExitTables) -> None:
    early = tables.exits[2]
    instance = Instance(
        name="cut", setting="budgeted", exits=(ExitChoice(exit_index=early.exit_index, head=early.head),)
    )
    net = load(tiny_run, instance=instance).net
    assert net.exits == (early, Exit(3, "final"))
    trained = open_run(tiny_run).pretrained().model_state_dict()
    assert all(torch.equal(tensor, net.model_state_dict()[name]) for name, tensor in trained.items())


def test_a_result_tells_and_draws_itself(small_net: MultiExitNet, tmp_path: Path) -> None:
    palette = np.array([[0, 0, 0], [250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 0]], np.uint8)
    early = ExitChoice(exit_index=0, head=small_net.exits[0].head, pixel_threshold=0.5, image_threshold=0.0)
    instance = Instance(name="pair", setting="input_dependent", exits=(early, FINAL))
    session = Session(small_net, instance, class_names=("a", "b", "c", "d", "e"), palette=palette)
    image = smooth_image(61, 83)
    (result,) = session.predict(image)
    counts = np.bincount(result.labels.ravel(), minlength=5)
    largest = int(counts.argmax())
    assert repr(result).startswith(f"<Result 61 x 83: {'abcde'[largest]} {100 * counts[largest] / (61 * 83):.0f} %")
    assert f"left at exit 0 with confidence {result.image_confidence:.2f} after " in repr(result)
    result.save(tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as file:
        np.testing.assert_array_equal(np.array(file), result.labels)
        np.testing.assert_array_equal(np.array(file.convert("RGB")), palette[result.labels])
    blended = 0.55 * palette[result.labels] + 0.45 * image  # the class's colour over the image
    np.testing.assert_allclose(np.array(result.overlay()), blended, atol=0.51)
    explained = np.array(result.overlay(legend=True))
    np.testing.assert_array_equal(explained[:61], np.array(result.overlay()))
    below = {tuple(pixel) for pixel in explained[61:].reshape(-1, 3).tolist()}
    assert {k for k in range(1, 5) if tuple(palette[k].tolist()) in below} == {*np.flatnonzero(counts)} - {0}
    with pytest.raises(DataError, match=r"go into a PNG, not 'mask\.jpg'"):
        result.save(tmp_path / "mask.jpg")


def test_exits_are_counted_from_the_end_too(small_net: MultiExitNet) -> None:
    early = ExitChoice(exit_index=1, head=small_net.exits[2].head)
    session = Session(small_net, Instance(name="pair", setting="anytime", exits=(early, FINAL)))
    image = smooth_image(48, 64)
    for negative, index in ((-1, 3), (-2, 1), (None, 3)):
        one, other = session.budgeted(image, exit_index=negative), session.budgeted(image, exit_index=index)
        assert one.exit_index == other.exit_index == index
        np.testing.assert_array_equal(one.labels, other.labels)
    with pytest.raises(ModelError, match="no exit -3; it has 1, 3, or from the end -1 to -2"):
        session.budgeted(image, exit_index=-3)


def test_a_mixed_list_is_run_in_its_order(small_net: MultiExitNet, tmp_path: Path) -> None:
    session = Session(small_net, Instance(name="x", setting="budgeted", exits=(FINAL,)))
    images = [smooth_image(48, 64, seed) if seed % 2 else smooth_image(64, 48, seed) for seed in range(5)]
    Image.fromarray(images[1]).save(tmp_path / "1.png")
    mixed = [images[0], tmp_path / "1.png", Image.fromarray(images[2]), torch.from_numpy(images[3]).movedim(-1, 0)]
    for batch_size in (1, 2, 3):
        for found, image in zip(session.predict([*mixed, images[4]], batch_size=batch_size), images, strict=True):
            np.testing.assert_array_equal(found.labels, session.budgeted(image).labels)
            np.testing.assert_array_equal(found.image, image)
