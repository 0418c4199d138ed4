"""The paper's three model families, as plain modules: logits (N, K, H, W) at input resolution, no multi-exit part.

Parameter names are torchvision's (``backbone.conv1.weight``, ``classifier.0.weight``), so that its weights load.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import mobilenet_v2, resnet50
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead

from messnet.errors import ModelError
from messnet.network.tracing import unwrapped

# torchvision's MobileNetV2: (expansion, channels, blocks, stride) per stage
_MOBILENETV2_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class SegmentationModel(nn.Module):
    """Backbone, segmentation head ``classifier``, bilinear upsampling to the input.

    Maps images (N, 3, H, W) float to logits (N, K, H, W).
    """

    def __init__(self, backbone: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        logits = self.classifier(self.backbone(x))
        return F.interpolate(logits, size=x.shape[-2:], mode="bilinear", align_corners=False)


def drn50_fcn(num_classes: int = 21) -> SegmentationModel:
    """DRN-50 + FCN: ResNet-50 at output stride 8 (Yu et al., CVPR 2017); 138.63 GMACs at 512x512, 21 classes."""
    return SegmentationModel(_drn50(), FCNHead(2048, num_classes))


def drn50_layer3_fcn(num_classes: int = 21) -> SegmentationModel:
    """DRN-50 without its layer4 + FCN: a static network to compare instances with; 48.32 GMACs at 512x512."""
    backbone = _drn50()
    del backbone.layer4
    return SegmentationModel(backbone, FCNHead(1024, num_classes))


def drn50_deeplabv3(num_classes: int = 21) -> SegmentationModel:
    """DRN-50 + DeepLabV3 (Chen et al., 2017), output stride 8; 163.86 GMACs at 512x512, 21 classes."""
    return SegmentationModel(_drn50(), DeepLabHead(2048, num_classes))


def mobilenetv2_fcn(num_classes: int = 21, *, width: float = 1.0, depth: float = 1.0) -> SegmentationModel:
    """MobileNetV2 + FCN, output stride 8; 8.78 GMACs at 512x512, 21 classes.

    ``width`` scales the channels (rounded to 8), ``depth`` the number of blocks of every stage (at least 1): 1.0 is
    the paper's model, less is for processors without an accelerator. The last 1x1 layer (320 -> 1280) of the
    classification network is dropped, as the paper's workload shows.
    """
    if not (0 < width <= 4 and 0 < depth <= 4):
        raise ModelError(f"width and depth of mobilenetv2_fcn must lie in (0, 4], got width={width}, depth={depth}")
    # A stage keeps its first block at least, which changes channels and stride.
    stages = [[t, c, max(1, round(n * depth)), s] for t, c, n, s in _MOBILENETV2_STAGES]
    features = mobilenet_v2(weights=None, width_mult=width, inverted_residual_setting=stages).features[:-1]
    _dilate(features, output_stride=8)
    channels = [m for m in features.modules() if isinstance(m, nn.BatchNorm2d)][-1].num_features
    return SegmentationModel(features, FCNHead(channels, num_classes))


MODELS: dict[str, Callable[..., nn.Module]] = {
    "drn50_fcn": drn50_fcn,
    "drn50_deeplabv3": drn50_deeplabv3,
    "drn50_layer3_fcn": drn50_layer3_fcn,
    "mobilenetv2_fcn": mobilenetv2_fcn,
}


def build_model(name: str, num_classes: int, **options: float) -> nn.Module:
    """A zoo model by its name, or any other by ``"module:function"``: a function that takes ``num_classes`` by keyword
    (and ``options``) and returns an nn.Module: the user's own, or "torchvision.models.segmentation:fcn_resnet50".

    Weights are the user's explicit choice (``load_weights``): a function with a ``weights_backbone``, as torchvision's
    have, is called with None instead of its default, which would download some. A model in another precision comes back
    in float32, in which runs train and store.

    Raises ModelError when there is no such model.
    """
    return build_noted_model(name, num_classes, **options)[0]


def build_noted_model(name: str, num_classes: int, **options: float) -> tuple[nn.Module, tuple[str, ...]]:
    """``build_model``, and what the user should know of it, a sentence each."""
    model = unwrapped(_build(name, num_classes, options))
    precision = other_precision(model)
    note = f"the model comes in {precision} and is trained and stored in float32"
    return (model.float(), (note,)) if precision else (model, ())


def other_precision(model: nn.Module) -> str | None:
    """The floating-point type that a model has tensors of besides float32, such as "float16"; None if it has none."""
    tensors = (*model.parameters(), *model.buffers())
    other = [tensor.dtype for tensor in tensors if tensor.is_floating_point() and tensor.dtype != torch.float32]
    return str(other[0]).removeprefix("torch.") if other else None


def _build(name: str, num_classes: int, options: Mapping[str, float]) -> nn.Module:
    if num_classes < 1:
        raise ModelError(f"a model has at least one class, not {num_classes}")
    build = _find(name)
    try:
        parameters = inspect.signature(build).parameters
        if "num_classes" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            raise ModelError(
                f"model {name!r} takes ({', '.join(parameters)}), expected a parameter num_classes: call the one for "
                f"the number of classes num_classes"
            )
        weights: dict[str, Any] = {"weights_backbone": None} if "weights_backbone" in parameters else {}
        model = build(num_classes=num_classes, **{**weights, **options})
    except TypeError as error:
        raise ModelError(
            f"model {name!r} does not take num_classes={num_classes} and {options or 'no options'}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"model {name!r} returned {type(model).__name__}, expected a torch.nn.Module")
    return model


def _find(name: str) -> Callable[..., object]:
    if ":" in name:
        module_name, _, function = name.partition(":")
        try:
            found: Callable[..., object] = getattr(_imported(module_name), function)
            return found
        except (ImportError, AttributeError) as error:
            raise ModelError(
                f"model {name!r} not found ({error}); expected 'module:function' that can be imported"
            ) from error
    if name not in MODELS:
        raise ModelError(f"no model {name!r}: expected one of {', '.join(MODELS)} or 'module:function'")
    return MODELS[name]


def _imported(name: str) -> ModuleType:
    """A module by its name, looked for in the working folder too, where the user's own lies: what is installed comes
    first."""
    here = os.getcwd()
    if here in sys.path:
        return importlib.import_module(name)
    sys.path.append(here)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(here)


def _drn50() -> nn.Module:
    resnet = resnet50(weights=None, replace_stride_with_dilation=[False, True, True])
    # Under torchvision's names, so that its state dicts fit.
    layers = OrderedDict((name, layer) for name, layer in resnet.named_children() if name not in ("avgpool", "fc"))
    return nn.Sequential(layers)


def _dilate(features: nn.Module, output_stride: int) -> None:
    """Replaces strides past ``output_stride`` by dilation, in place, as DRN does: the layer that loses its stride keeps
    the dilation of its input, the ones after it double theirs."""
    stride, dilation = 1, 1
    for conv in features.modules():
        if not isinstance(conv, nn.Conv2d) or conv.kernel_size == (1, 1):
            continue
        before = dilation
        if conv.stride == (2, 2):
            if stride == output_stride:
                conv.stride = (1, 1)
                dilation *= 2
            else:
                stride *= 2
        conv.dilation = (before, before)
        conv.padding = (before, before)
