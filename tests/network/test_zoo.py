"""The paper's models: their workload against the paper, their layers against torchvision's."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models.segmentation import deeplabv3_resnet50, fcn_resnet50

from messnet.costs.workload import count_module
from messnet.errors import ModelError
from messnet.network.zoo import MODELS, build_model, mobilenetv2_fcn

# GMACs at 512x512, 21 classes: as the paper prints them, and convolutions alone (shared/paper/README.md)
POSTER = {
    "drn50_fcn": (138.63, 138.368),
    "drn50_deeplabv3": (163.86, 163.579),
    "mobilenetv2_fcn": (8.78, 8.621),
}
TORCHVISION = {"drn50_fcn": fcn_resnet50, "drn50_deeplabv3": deeplabv3_resnet50}


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return MODELS[name](21)


def output_shape(on_meta: nn.Module, input_shape: tuple[int, ...]) -> tuple[int, ...]:
    output = on_meta.eval()(torch.empty(input_shape, device="meta"))
    return tuple((output["out"] if isinstance(output, dict) else output).shape)


@pytest.mark.parametrize("name", POSTER)
def test_the_workload_is_the_papers(name: str) -> None:
    workload = count_module(on_meta(name), (1, 3, 512, 512))
    paper, conv = POSTER[name]
    assert math.floor(workload.macs_paper / 1e7) / 100 == paper
    assert workload.macs / 1e9 == pytest.approx(conv, abs=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_output_stride_is_8_and_logits_have_the_size_of_the_input(name: str) -> None:
    model = on_meta(name)
    assert output_shape(model.backbone, (1, 3, 512, 512))[2:] == (64, 64)
    assert output_shape(model, (2, 3, 65, 97)) == (2, 21, 65, 97)


@pytest.mark.parametrize("name", TORCHVISION)
def test_layers_are_torchvisions(name: str) -> None:
    own = on_meta(name)
    with torch.device("meta"):
        theirs = TORCHVISION[name](weights=None, weights_backbone=None, num_classes=21, aux_loss=False)
    assert set(own.state_dict()) == set(theirs.state_dict())
    convs = [{n: repr(m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d)} for net in (own, theirs)]
    assert convs[0] == convs[1]  # channels, strides and dilations, one by one


def test_the_cut_drn_has_the_layers_of_the_whole_one() -> None:
    cut, whole = on_meta("drn50_layer3_fcn"), on_meta("drn50_fcn")
    kept = [name for name, _ in whole.backbone.named_modules() if not name.startswith("layer4")]
    assert [name for name, _ in cut.backbone.named_modules()] == kept
    assert output_shape(cut.backbone, (1, 3, 64, 64)) == (1, 1024, 8, 8)
    with torch.device("meta"):
        parts = fcn_resnet50(weights=None, weights_backbone=None, num_classes=21, aux_loss=True)
        parts.backbone.return_layers = {"layer3": "out"}
    parts.backbone.pop("layer4")
    parts.classifier, parts.aux_classifier = parts.aux_classifier, None  # torchvision's auxiliary head is FCN on layer3
    assert count_module(cut, (1, 3, 512, 512)).macs == count_module(parts, (1, 3, 512, 512)).macs


def test_mobilenetv2_dilates_instead_of_striding() -> None:
    depthwise = [m for m in on_meta("mobilenetv2_fcn").backbone.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    # 17 blocks: strides 2 of blocks 13 and 6 become dilation for what comes after them
    assert [m.stride[0] for m in depthwise] == [1, 2, 1, 2] + 13 * [1]
    assert [m.dilation[0] for m in depthwise] == 7 * [1] + 7 * [2] + 3 * [4]


def test_width_and_depth_shrink_mobilenetv2() -> None:
    small, large = (
        sum(p.numel() for p in m.parameters()) for m in (mobilenetv2_fcn(21, width=0.25), mobilenetv2_fcn())
    )
    assert small < large / 8
    assert len(mobilenetv2_fcn(depth=0.01).backbone) == 1 + 7  # one block per stage is left
    for options in ({"width": 0.0}, {"depth": -1.0}, {"width": float("nan")}):
        with pytest.raises(ModelError, match="width and depth"):
            mobilenetv2_fcn(**options)


def test_an_unknown_model_lists_the_known() -> None:
    with pytest.raises(ModelError, match="no model 'unet': expected one of " + ", ".join(MODELS)):
        build_model("unet", 21)


def test_the_users_own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zoo_test_own.py").write_text(
        "from torch import nn\n"
        "def make(num_classes, kernel=1): return nn.Conv2d(3, num_classes, kernel)\n"
        "def number(num_classes): return num_classes\n"
        "def otherwise(classes, kernel=1): return nn.Conv2d(3, classes, kernel)\n"
        "def anything(*, kernel=1, **options): return nn.Conv2d(3, options['num_classes'], kernel)\n"
        "constant = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for function in ("make", "anything"):
        assert repr(build_model(f"zoo_test_own:{function}", 7, kernel=3)) == repr(nn.Conv2d(3, 7, 3))
    for name, options, message in (
        ("zoo_test_own:missing", {}, "not found .*missing"),
        ("zoo_test_none:make", {}, "not found .*zoo_test_none"),
        ("zoo_test_own:make", {"depth": 1}, "does not take .*depth"),
        ("zoo_test_own:otherwise", {}, r"takes \(classes, kernel\), expected a parameter num_classes: call the one "),
        ("zoo_test_own:constant", {}, "3 is not a callable object"),
        ("zoo_test_own:number", {}, "returned int, expected a torch.nn.Module"),
    ):
        with pytest.raises(ModelError, match=message):
            build_model(name, 7, **options)


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"])
def test_torchvisions_builders_download_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("went to the network")

    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    with torch.device("meta"):
        model = build_model(f"torchvision.models.segmentation:{name}", 7)
    assert output_shape(model, (1, 3, 64, 64)) == (1, 7, 64, 64)
