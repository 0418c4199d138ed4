"""A model that wants other values than ImageNet's normalisation gives: every way to run it hands it those."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.transforms import v2

import messnet
from helpers.images import smooth_image
from messnet import ExitChoice, Instance, MultiExitNet, Normalisation
from messnet.cli import main
from messnet.deployment.quantising import EightBits
from messnet.network.head_space import HeadConfig
from messnet.network.zoo import mobilenetv2_fcn
from messnet.records.names import Precision, RuntimeName
from messnet.run.recipe import load_recipe, recipe_to_record
from messnet.run.stages import STAGES

# Pixels become values in [-8, 14]: with ImageNet's they, and the ranges of int8, would be far off.
OWN = Normalisation(mean=(0.4, 0.5, 0.3), std=(0.05, 0.06, 0.07))
OPTIONS = ["--model.normalisation.mean", *["0.4", "0.5", "0.3"], "--model.normalisation.std", *["0.05", "0.06", "0.07"]]
INSTANCE = Instance(
    name="own",
    setting="anytime",
    exits=(ExitChoice(exit_index=0, head="crm1-blocks0-fcn"), ExitChoice(exit_index=1, head="final")),
    policy="top1+native",
    selected_on={},
)
IMAGES = [smooth_image(64, 80, seed) for seed in range(4)]


def by_torchvision(image: NDArray[np.uint8]) -> Tensor:
    steps = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(OWN.mean, OWN.std)]
    tensor: Tensor = v2.Compose(steps)(image)
    return tensor[None]


@pytest.fixture(scope="module")
def net() -> MultiExitNet:
    torch.manual_seed(0)
    model = mobilenetv2_fcn(5, width=0.25, depth=0.01)
    net = messnet.convert(model, torch.zeros(1, 3, 64, 80), num_exits=2, normalisation=OWN)
    net.add_head(0, HeadConfig())
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.data *= 1.5  # else all logits are nearly the same
    return net.eval()


@pytest.fixture(scope="module")
def bundle(net: MultiExitNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("normalised")
    (folder / "normalised_model.py").write_text(
        "from messnet.network.zoo import mobilenetv2_fcn\n"
        "def small(num_classes):\n    return mobilenetv2_fcn(num_classes, width=0.25, depth=0.01)\n"
    )
    session = messnet.Session(net, INSTANCE, input_size=(64, 80))
    bits = EightBits(calibration=IMAGES[:2], samples=[(IMAGES[2], None)], max_loss_pp=100)
    out = folder / "own.mess"
    messnet.export(session, out, eight_bits=bits, weights=True, images=IMAGES[:1], model="normalised_model:small")
    return out


@pytest.mark.parametrize(
    ("runtime", "precision"),
    [("torch", "f32"), ("onnxruntime", "f32"), ("openvino", "f32"), ("onnxruntime", "int8"), ("openvino", "int8")],
)
def test_every_runtime_hands_it_the_values_of_torchvision(
    bundle: Path, net: MultiExitNet, runtime: RuntimeName, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(bundle.parent)
    session = messnet.load(bundle, runtime=runtime, precision=precision, model="normalised_model:small")
    for image in IMAGES[1:]:
        for choice, result in zip(INSTANCE.exits, session.anytime(image), strict=True):
            with torch.no_grad():
                expected = net.run_until(by_torchvision(image), choice.exit_index)[0]
            logits = interpolate(torch.from_numpy(result.logits), image.shape[:2], mode="bilinear")[0]
            varies = (expected - expected.mean((1, 2), keepdim=True)).std()
            # Eight bits round; ranges that were calibrated on other values would cut most of them off.
            assert (logits - expected).std() < (0.01 if precision == "f32" else 0.2) * varies


def test_training_and_evaluation_see_the_same(net: MultiExitNet) -> None:
    net = copy.deepcopy(net)
    seen: list[Tensor] = []
    first = next(part for part in net.modules() if isinstance(part, nn.Conv2d))
    first.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().clone()))
    image, mask = IMAGES[0], (IMAGES[0].sum(2) // 154).astype(np.uint8)
    still = messnet.AugmentOptions(scale_min=1, scale_max=1, hflip=0)
    options = messnet.PretrainOptions(iterations=1, batch_size=2, augment=still)
    compute = messnet.ComputeOptions(num_workers=0, validate_every=1, validate_images=1)
    messnet.pretrain(net, [(image, mask)] * 2, options, val=[(image, mask)], compute=compute)
    tables = messnet.evaluate(net, [(image, mask)])
    assert len(seen) >= 3  # a training step, a look at the validation image, an evaluation
    for x in seen:
        torch.testing.assert_close(x, by_torchvision(image).expand_as(x), rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        labels = net.run_until(by_torchvision(image), 0).argmax(1)[0].numpy()
    right = [int(((labels == k) & (mask == k)).sum()) for k in range(5)]
    np.testing.assert_array_equal(tables.intersection[0, 0], right)


def test_a_run_remembers_it(tmp_path: Path, tiny_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["profile", str(tiny_recipe), "--out", str(tmp_path / "run"), *OPTIONS])
    exits = json.loads((tmp_path / "run" / "exits.json").read_text())
    assert exits["normalisation"] == {"mean": list(OWN.mean), "std": list(OWN.std)}
    # What was made without the option has the fingerprints of before there was it.
    record, other = (recipe_to_record(load_recipe(tiny_recipe, options)) for options in ([], OPTIONS))
    model = {key: value for key, value in record["model"].items() if key != "normalisation"}
    for stage in STAGES.values():
        assert stage.fingerprint(record) == stage.fingerprint(record | {"model": model})
        assert (stage.fingerprint(other) == stage.fingerprint(record)) == ("model" not in stage.sections)
    with pytest.raises(SystemExit):
        main(["profile", str(tiny_recipe), "--out", str(tmp_path / "b"), "--model.normalisation.std", "58", "57", "57"])
    assert "pixel values in [0, 1]: divide yours by 255" in capsys.readouterr().err
