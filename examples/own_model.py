"""A model of your own, made multi-exit: run `python examples/own_model.py`, or name it in a recipe as
`model: {name: "own_model:small_net"}` with this folder on PYTHONPATH."""

import torch
from torch import Tensor, nn

import messnet


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.bn(self.conv(x)))


class SmallNet(nn.Module):
    """Anything with a child called ``classifier`` that maps (N, 3, H, W) to logits (N, K, h, w)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, 32, 3, stride=4, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.backbone = nn.Sequential(stem, *(Block(32) for _ in range(8)))
        self.classifier = nn.Conv2d(32, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.backbone(x))


def small_net(num_classes: int) -> nn.Module:
    return SmallNet(num_classes)


if __name__ == "__main__":
    model = small_net(num_classes=5).eval()
    net = messnet.convert(model, torch.zeros(1, 3, 96, 128), num_exits=4)
    for point in net.exit_points:
        print(f"after {point.module}: {point.channels} channels, {point.macs / 1e6:.1f} MMACs")
    image = torch.rand(1, 3, 96, 128)
    exit = net.add_head(0, messnet.HeadConfig(channel_reduction=2, extra_blocks=1, segmentation_head="deeplabv3"))
    net.eval()
    print("early exit:", tuple(net.run_until(image, 0, exit.head).shape), "final exit:", tuple(net(image).shape))
    costs = messnet.profile(net, input_size=(96, 128))
    print(f"the whole model: {costs.total_macs() / 1e6:.1f} MMACs")
