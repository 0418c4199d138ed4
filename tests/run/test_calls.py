"""The whole road in Python: a data set object and a model object, no recipe, no run directory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import messnet
from helpers.training import CLASSES, DISTILL, HERE, PRETRAIN, SIZE, SPACE, Noise, assert_equal, build, tensors
from messnet.data.objects import as_dataset
from messnet.errors import DataError
from messnet.network.zoo import mobilenetv2_fcn
from messnet.records.instance import whole_model
from messnet.training.checkpoint import Checkpoint
from messnet.training.stage1 import pretrain as stage1


class Pairs:
    """Nothing but a length and (image, mask)."""

    def __init__(self, form: Callable[[np.ndarray, np.ndarray], object] = lambda image, mask: (image, mask)) -> None:
        self.form = form

    def __len__(self) -> int:
        return len(Noise())

    def __getitem__(self, index: int) -> object:
        return self.form(Noise()[index].image, Noise()[index].mask)


@pytest.mark.parametrize(
    "form",
    [
        lambda image, mask: (image, mask.astype(np.int64)),
        lambda image, mask: {"image": torch.tensor(image).permute(2, 0, 1), "mask": torch.tensor(mask), "path": "a"},
        lambda image, mask: [Image.fromarray(image), Image.fromarray(mask)],
    ],
    ids=["arrays", "tensors", "pillow"],
)
def test_an_item_is_an_image_with_its_mask(form: Callable[[np.ndarray, np.ndarray], object]) -> None:
    sample, given = as_dataset(Pairs(form), CLASSES)[-1], Noise()[4]
    np.testing.assert_array_equal(sample.image, given.image)
    np.testing.assert_array_equal(sample.mask, given.mask)
    assert sample.mask.dtype == np.uint8
    assert as_dataset(Noise(), CLASSES)[1].name == "1"
    assert as_dataset(Noise(), CLASSES).class_names == ("a", "b", "c")


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda image, mask: image, r"item 0 of the data set is a ndarray: expected \(image, mask\)"),
        (lambda image, mask: (image, mask[1:]), r"an image of \(32, 40\) and a mask of \(31, 40\)"),
        (lambda image, mask: (image, mask + 1), r"a mask holds \d+: expected 0 to 2, or 255"),
        (lambda image, mask: (image, mask / 2), r"a mask is \(H, W\) of integers, not \(32, 40\) float"),
        (lambda image, mask: (image[..., 0], mask), r"item 0 of the data set: an array is \(H, W, 3\)"),
    ],
)
def test_what_is_no_pair_is_refused(form: Callable[[np.ndarray, np.ndarray], object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_dataset(Pairs(form), CLASSES)[0]


def test_another_number_of_classes_is_refused() -> None:
    with pytest.raises(DataError, match="names 3 classes, and the network tells 4 apart"):
        as_dataset(Noise(), 4)
    with pytest.raises(DataError, match="empty"):
        as_dataset([], 4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.utils.data.DataLoader([(0, 0)]), "a DataLoader has not: give its .dataset"),
        (None, "a NoneType has not: give a list or a torch Dataset"),
        ((pair for pair in [(0, 0)]), "a generator has not: give a list or a torch Dataset"),
    ],
)
def test_what_is_no_data_set_is_told(data: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_dataset(data, CLASSES)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message):
        messnet.pretrain(build(), data)  # type: ignore[arg-type]


@pytest.mark.parametrize("normalisation", [((0.5,) * 3, (0.25,) * 3), {"mean": (0.5,) * 3}])
def test_a_normalisation_has_its_own_type(normalisation: Any) -> None:
    with pytest.raises(messnet.MessError, match="normalisation must be"):
        messnet.convert(mobilenetv2_fcn(3), torch.zeros(1, 3, 32, 64), normalisation=normalisation)
    with pytest.raises(messnet.MessError, match="three values each"):
        messnet.Normalisation(mean=0.5)  # type: ignore[arg-type]


def test_a_model_that_was_not_converted_is_told() -> None:
    model: Any = torch.nn.Conv2d(3, CLASSES, 1)
    final = whole_model(build().exits[-1])
    for call in (
        lambda: messnet.pretrain(model, Pairs()),
        lambda: messnet.distill(model, Pairs()),
        lambda: messnet.evaluate(model, Pairs()),
        lambda: messnet.Session(model, final),
    ):
        with pytest.raises(messnet.MessError, match="got a Conv2d: net = "):
            call()


def test_neighbours_of_what_is_expected_are_told() -> None:
    found: Any = SimpleNamespace(instance=whole_model(build().exits[-1]))
    with pytest.raises(messnet.MessError, match="got a SimpleNamespace: give"):
        messnet.Session(build(), found)
    with pytest.raises(messnet.MessError, match="got a dict"):
        messnet.distill(build(), Pairs(), {"extra_blocks": 0})  # type: ignore[arg-type]


def test_without_heads_the_final_exit_alone_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    net = build()
    tables = messnet.evaluate(net, Pairs())
    assert "evaluate: no heads are attached" in capsys.readouterr().err
    assert len(messnet.search(tables, messnet.profile(net, SIZE), maximise="miou").instance.exits) == 1
    assert "searching 1 instance: no heads are attached" in capsys.readouterr().err
    for wrong in ({"class_names": ("a", "b")}, {"palette": np.zeros((7, 3), np.uint8)}):
        with pytest.raises(messnet.MessError, match=r"has \d entries and the network tells 3 classes apart"):
            messnet.Session(net, whole_model(net.exits[-1]), **wrong)  # type: ignore[arg-type]


def test_a_training_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    whole, net = build(), build()
    stage1(whole, Noise(), PRETRAIN, HERE, Checkpoint(tmp_path / "whole"))
    messnet.pretrain(net, Pairs(), PRETRAIN)
    assert_equal(tensors(net), tensors(whole))
    # Stopped, then called again with the same folder.
    with pytest.raises(RuntimeError):
        messnet.pretrain(build(), Breaking(), PRETRAIN, folder=tmp_path)
    assert (tmp_path / "pretrain.checkpoint").exists()
    with pytest.raises(messnet.MessError, match="made from another recipe"):
        messnet.pretrain(build(), Pairs(), replace(PRETRAIN, learning_rate=0.2), folder=tmp_path)
    again = build(seed=7)
    messnet.pretrain(again, Pairs(), PRETRAIN, folder=tmp_path)
    assert_equal(tensors(again), tensors(whole))


def test_a_training_that_had_finished_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the interval of checkpoints; no item of the data is read again."""
    long = {"checkpoint_every": 200}
    stage1, stage2 = replace(PRETRAIN, **long), replace(DISTILL, **long)  # type: ignore[arg-type]

    def road(net: messnet.MultiExitNet, data: Pairs) -> messnet.MultiExitNet:
        messnet.pretrain(net, data, stage1, folder=tmp_path)
        messnet.distill(net, data, SPACE, stage2, folder=tmp_path)
        return net

    first = tensors(road(build(), Pairs()))
    assert "finished before" not in capsys.readouterr().err
    assert_equal(tensors(road(build(seed=7), Unreadable())), first)
    assert f"distill: finished before, kept in {tmp_path / 'distill.checkpoint'}" in capsys.readouterr().err
    with pytest.raises(messnet.MessError, match="made from another recipe"):  # heads of another backbone
        messnet.distill(build(seed=7), Pairs(), SPACE, stage2, folder=tmp_path)


ELSEWHERE = """
from pathlib import Path
import numpy as np
import messnet
from helpers.training import Noise, build, SIZE
net = build(seed=7)
net.load("net.safetensors")
tables = messnet.ExitTables.from_bytes(Path("tables.npz").read_bytes())
costs = messnet.CostTable.from_json(Path("costs.json").read_text())
found = messnet.search(tables, costs, maximise="miou", max_cost_ratio=0.9, setting="budgeted")
np.save("labels.npy", messnet.Session(net, found.instance).predict(Noise()[0].image)[0].labels)
Path("found.json").write_text(found.instance.to_json())
"""


def test_a_network_is_kept_and_searched_again_in_another_process(tmp_path: Path) -> None:
    net, data = build(), Pairs()
    messnet.distill(net, data, SPACE, replace(DISTILL, iterations=1))
    net.save(tmp_path / "net.safetensors")
    (tmp_path / "tables.npz").write_bytes(messnet.evaluate(net, data).to_bytes())
    messnet.profile(net, SIZE).to_json(tmp_path / "costs.json")
    code = f"import sys; sys.path[:0] = {sys.path!r}\n{ELSEWHERE}"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    instance = messnet.Instance.from_json((tmp_path / "found.json").read_text())
    expected = messnet.Session(net, instance).predict(Noise()[0].image)[0].labels
    np.testing.assert_array_equal(np.load(tmp_path / "labels.npy"), expected)
    again = build(seed=7)
    again.load(tmp_path / "net.safetensors")
    assert again.exits == net.exits
    assert_equal(tensors(again), tensors(net))


def test_a_kept_network_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "net.safetensors"
    net = build()
    net.save(file)
    other = messnet.convert(mobilenetv2_fcn(CLASSES, width=0.25, depth=0.01), torch.zeros(1, 3, *SIZE), num_exits=2)
    with pytest.raises(messnet.MessError, match=r"net\.safetensors is of a network with exits after \w+, \w+, and"):
        other.load(file)
    four = messnet.convert(mobilenetv2_fcn(4, width=0.25, depth=0.01), torch.zeros(1, 3, *SIZE), num_exits=3)
    with pytest.raises(messnet.MessError, match=r"net\.safetensors does not fit the model: .* expected \(4,"):
        four.load(file)
    for content in (b"garbage", safetensors.torch.save({"a": torch.zeros(1)})):
        file.write_bytes(content)
        with pytest.raises(messnet.MessError, match=r"expected a file that net\.save\(path\) wrote"):
            net.load(file)


def test_no_iterations_keep_the_model_and_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    net, before = build(), tensors(build())
    messnet.pretrain(net, Unreadable(), replace(PRETRAIN, iterations=0))
    net.drop_heads()
    assert_equal(tensors(net), before)
    assert "learning rate" not in capsys.readouterr().err


class Breaking(Pairs):
    """Fails in the third of three iterations of two images."""

    read = 0

    def __getitem__(self, index: int) -> object:
        self.read += 1
        if self.read > 9:
            raise RuntimeError
        return super().__getitem__(index)


class Unreadable(Pairs):
    def __getitem__(self, index: int) -> object:
        raise AssertionError("an item was read")


def test_the_whole_road(tmp_path: Path) -> None:
    net, data = build(), Pairs()
    messnet.pretrain(net, data, PRETRAIN, val=data, folder=tmp_path)
    assert (tmp_path / "logs/pretrain.csv").exists()
    assert not messnet.distill(net, data, SPACE, DISTILL)
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert not net.training
    tables = messnet.evaluate(net, data, messnet.EvaluationOptions(pixel_thresholds=(0.3, 0.4, 0.5)))
    assert tables.exits == net.exits
    found = messnet.search(tables, messnet.profile(net, SIZE), minimise="macs", max_drop_pp=50.0)
    session = messnet.Session(net, found.instance, class_names=("a", "b", "c"), input_size=SIZE)
    images: Sequence[np.ndarray] = [Noise()[v].image for v in range(len(data))]
    expected = session.predict(images)
    before = tensors(net)
    pairs = [(Noise()[v].image, Noise()[v].mask) for v in range(len(data))]
    eight_bits = messnet.EightBits(calibration=images, samples=pairs, max_loss_pp=100)
    bundle = messnet.export(session, tmp_path / "graphs.mess", images=images, eight_bits=eight_bits)
    assert_equal(tensors(net), before)  # the bundle is cut, the session's network is not
    assert set(bundle.manifest.runtimes) == {"onnx", "onnx-int8"}
    bundled = messnet.load(tmp_path / "graphs.mess")
    assert bundled.runtime == "onnxruntime"
    assert bundled.class_names == ("a", "b", "c")
    for ours, theirs in zip(expected, bundled.predict(images), strict=True):
        assert ours.exit_index == theirs.exit_index
        assert (ours.labels == theirs.labels).mean() > 0.99
    with pytest.raises(messnet.MessError, match="input_size"):
        messnet.export(messnet.Session(net, found.instance), tmp_path / "other.mess")
    for wrong, message in (
        (lambda: messnet.export(net), "a messnet.Session, not a MultiExitNet"),  # type: ignore[arg-type]
        (lambda: messnet.export(session, eight_bits=True), "eight_bits=True: expected messnet.EightBits"),  # type: ignore[arg-type]
        (lambda: messnet.export(session, images=pairs), "not tuple"),  # type: ignore[arg-type]
    ):
        with pytest.raises(messnet.MessError, match=message):
            wrong()
