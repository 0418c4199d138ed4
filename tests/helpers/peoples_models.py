"""Small networks as people bring them, one for each habit that a tool must cope with. Each function takes
``num_classes`` and returns a module that maps images (N, 3, H, W) to logits; none needs a package besides torch."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from messnet.data import SegmentationSample

WIDTH = 8


def layer(channels: int, out: int, stride: int = 1, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1, bias=False), norm(out), nn.ReLU())


def to_size(logits: Tensor, x: Tensor) -> Tensor:
    return F.interpolate(logits, size=x.shape[-2:], mode="bilinear", align_corners=False)


class Net(nn.Module):
    """A stem, two residual blocks at 1/4 and a classifier; ``block`` and ``head`` are what a case is about."""

    def __init__(
        self,
        num_classes: int,
        block: Callable[[int], nn.Module] = lambda channels: layer(channels, channels),
        head: Callable[[int, int], nn.Module] = lambda channels, out: nn.Conv2d(channels, out, 1),
        channels: int = 3,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.stem = layer(channels, WIDTH, 4, norm)
        self.blocks = nn.ModuleList(block(WIDTH) for _ in range(2))
        self.classifier = head(WIDTH, num_classes)

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return x

    def classified(self, y: Tensor) -> Tensor:
        return self.classifier(y)

    def forward(self, x: Tensor) -> object:
        return to_size(self.classified(self.features(x)), x)


class Wrapped(nn.Module):
    """What messnet's message asks for."""

    def __init__(self, net: nn.Module, index: int | None = None) -> None:
        super().__init__()
        self.net, self.index = net, index

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if self.index is None else self.net(x)[self.index]


# Tensors that forward makes or holds.


class NormInside(Net):
    def forward(self, x: Tensor) -> object:
        return super().forward(x - torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1))


class Blur(nn.Module):
    """No parameter, no buffer, no child: a kernel as a plain attribute."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.kernel = torch.ones(channels, 1, 3, 3) / 9

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, padding=1, groups=x.shape[1])


class MadeInBlock(nn.Module):
    """A childless module that makes a tensor."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight) * torch.tensor([0.5])


class Temperature(Net):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.temperature = torch.tensor(2.0)
        self.offsets = [torch.linspace(-1, 1, num_classes).view(1, -1, 1, 1)]

    def classified(self, y: Tensor) -> Tensor:
        return super().classified(y) / self.temperature + self.offsets[0]


class RandomFeatures(Net):
    """Constants that a second construction would not have again."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.directions = torch.randn(WIDTH, WIDTH, 1, 1)

    def features(self, x: Tensor) -> Tensor:
        y = super().features(x)
        return y + torch.sin(F.conv2d(y, self.directions))


class KeptFromBefore(Net):
    """Reads a feature that an earlier call left behind, gradient and all."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.prior = self.stem(torch.rand(1, 3, 16, 16)).mean((2, 3), keepdim=True)

    def features(self, x: Tensor) -> Tensor:
        return super().features(x) + self.prior


class CoordConv(Net):
    """A grid that is made to the size of the features."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.placed = nn.Conv2d(WIDTH + 2, WIDTH, 1)

    def features(self, x: Tensor) -> Tensor:
        y = super().features(x)
        height, width = y.shape[-2:]
        rows = torch.arange(height, device=y.device, dtype=y.dtype).view(1, 1, height, 1) / height
        columns = torch.arange(width, device=y.device, dtype=y.dtype).view(1, 1, 1, width) / width
        grid = [rows.expand(y.shape[0], 1, height, width), columns.expand(y.shape[0], 1, height, width)]
        return self.placed(torch.cat([y, *grid], 1))


class Held(NormInside, Temperature, RandomFeatures, CoordConv, KeptFromBefore):
    """All of these in one."""


class Noisy(nn.Module):
    """Draws random numbers whose shape tracing knows."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = layer(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y * (1 + 0.1 * torch.randn(1)) if self.training else y


class Remembering(nn.Module):
    """Mixes in what it saw in the call before."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.before = layer(channels, channels), torch.zeros(1, channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x + self.before)
        self.before = 0 * y.detach().mean((0, 2, 3), keepdim=True)
        return y


# Tensors with several names.


class TiedHead(nn.Module):
    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, num_classes, 1), nn.Conv2d(channels, num_classes, 1)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(F.avg_pool2d(x, 3, 1, 1))


def tied_across(num_classes: int) -> nn.Module:
    """The first block and the last are one module, on both sides of the exits."""
    net = Net(num_classes)
    net.blocks[1] = net.blocks[0]
    return net


def two_in_one_memory(num_classes: int) -> nn.Module:
    net = Net(num_classes, head=TiedHead)
    net.classifier.b.weight = nn.Parameter(net.classifier.a.weight.data)
    return net


def expanded(num_classes: int) -> nn.Module:
    net = Net(num_classes)
    net.classifier.bias = nn.Parameter(torch.zeros(1).expand(num_classes))
    return net


# Weights that are worked out.


def weightnorm_old(num_classes: int) -> nn.Module:
    net = Net(num_classes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in net.blocks:
            nn.utils.weight_norm(block[0])
    return net


def weightnorm_new(num_classes: int) -> nn.Module:
    net = Net(num_classes)
    for block in net.blocks:
        nn.utils.parametrizations.weight_norm(block[0])
    return net


def spectral_old(num_classes: int) -> nn.Module:
    net = Net(num_classes)
    for block in net.blocks:
        nn.utils.spectral_norm(block[0])
    return net


# Hooks, locks, scripts.


class Hooked(Net):
    """Keeps its low-level features in a forward hook, as people do with pretrained encoders."""

    def __init__(self, num_classes: int, path: str = "stem.2") -> None:
        super().__init__(num_classes)
        self.kept: dict[str, Tensor] = {}
        self.get_submodule(path).register_forward_hook(lambda _, __, output: self.kept.__setitem__("low", output))
        self.low = nn.Conv2d(WIDTH, num_classes, 1)

    def forward(self, x: Tensor) -> object:
        y = to_size(self.classifier(self.features(x)), self.kept["low"])
        return to_size(y + self.low(self.kept["low"]), x)


def hooked_used_before(num_classes: int) -> nn.Module:
    """Has run already: a stale feature map of another image lies in its dictionary."""
    net = Hooked(num_classes)
    net(torch.rand(1, 3, 32, 48))
    return net


class Locked(nn.Module):
    """Python cannot copy a lock."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.lock, self.weight = threading.Lock(), nn.Parameter(torch.randn(channels, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return F.relu(F.conv2d(x, self.weight))


def torchscript(num_classes: int) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(Net(num_classes).eval(), torch.zeros(1, 3, 32, 48))


def scripted_part(num_classes: int) -> nn.Module:
    net = Net(num_classes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net.blocks[1] = torch.jit.script(nn.Hardswish())
    return net


# Layouts.


class SpatialGroups(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dw, self.bn = nn.Conv2d(channels, channels, 3, padding=1, groups=channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.dw(x))
        b, c, h, w = x.shape
        y = x.view(b * 4, -1, h, w)
        return (y * torch.sigmoid(y.mean((2, 3), keepdim=True))).view(b, c, h, w)


class Shuffle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels // 2, channels // 2, 3, padding=1, groups=channels // 2)

    def forward(self, x: Tensor) -> Tensor:
        one, two = x.chunk(2, dim=1)
        y = torch.cat([one, self.conv(two)], 1)
        b, c, h, w = y.shape
        return y.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, c, h, w)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TokenAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = self.qkv(x.flatten(2).transpose(1, 2)).reshape(b, h * w, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        q, k, v = tokens.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h * w, c)
        return self.proj(y).transpose(1, 2).reshape(b, c, h, w)


class Untraceable(Net):
    """Looks at values in its own forward; with attention, which a processor does in one operator."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, block=TokenAttention)

    def forward(self, x: Tensor) -> object:
        y = self.features(x)
        return to_size(self.classifier(y if float(y.detach().abs().mean()) >= 0 else -y), x)


class UntraceableHooked(Hooked):
    def forward(self, x: Tensor) -> object:
        return super().forward(x if float(x.detach().abs().mean()) >= 0 else -x)


# U-Nets, wrapped and not.


class UNet(nn.Module):
    """All in one forward, as tutorials have it."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.e1, self.e2, self.e3 = layer(3, WIDTH), layer(WIDTH, WIDTH), layer(WIDTH, 2 * WIDTH)
        self.pool, self.up = nn.MaxPool2d(2), nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.d2, self.d1 = layer(3 * WIDTH, WIDTH), layer(2 * WIDTH, WIDTH)
        self.last = nn.Conv2d(WIDTH, num_classes, 1)

    def forward(self, x: Tensor) -> object:
        a = self.e1(x)
        b = self.e2(self.pool(a))
        c = self.e3(self.pool(b))
        y = self.d2(torch.cat([self.up(c), b], 1))
        return self.last(self.d1(torch.cat([self.up(y), a], 1)))


class ListUNet(UNet):
    def forward(self, x: Tensor) -> object:
        return [super().forward(x)]


class Encoder(nn.Module):
    """Gives a list of features; where it ``drops`` some in training by its own code, it is kept as one node."""

    def __init__(self, drops: bool) -> None:
        super().__init__()
        self.drops = drops
        self.e1, self.e2, self.e3 = layer(3, WIDTH, 2), layer(WIDTH, WIDTH, 2), layer(WIDTH, 2 * WIDTH, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = [x]
        for stage in (self.e1, self.e2, self.e3):
            features.append(stage(features[-1]))
        if self.drops:
            features[-1] = F.dropout(features[-1], 0.1, self.training)
        return features


class SizedDecoder(nn.Module):
    """Upsamples to sizes that it takes from a list first, as segmentation_models_pytorch's does."""

    def __init__(self) -> None:
        super().__init__()
        self.d2, self.d1, self.d0 = layer(3 * WIDTH, WIDTH), layer(2 * WIDTH, WIDTH), layer(WIDTH, WIDTH)

    def forward(self, features: list[Tensor]) -> Tensor:
        sizes = [feature.shape[2:] for feature in features][::-1]
        features = features[1:][::-1]
        y = features[0]
        for i, stage in enumerate((self.d2, self.d1, self.d0)):
            height, width = sizes[i + 1]
            y = F.interpolate(y, size=(height, width), mode="nearest")
            y = stage(torch.cat([y, features[i + 1]], 1) if i < 2 else y)
        return y


class SizedUNet(nn.Module):
    def __init__(self, num_classes: int, drops: bool = False) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(drops), SizedDecoder()
        self.segmentation_head = nn.Conv2d(WIDTH, num_classes, 1)

    def forward(self, x: Tensor) -> object:
        return self.segmentation_head(self.decoder(self.encoder(x)))


class Pyramid(nn.Module):
    """PSPNet's: pools to fixed numbers of cells."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), nn.Conv2d(channels, 4, 1), nn.ReLU()) for size in (1, 2, 3)
        )
        self.last = nn.Conv2d(channels + 12, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([x, *(to_size(stage(x), x) for stage in self.stages)], 1))


class Split(nn.Module):
    """Cross-stage partial: one half goes around."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.join = layer(channels // 2, channels // 2), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(x.split(x.shape[1] // 2, 1))
        parts[1] = self.conv(parts[1])
        return self.join(torch.cat(parts, 1))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.fc = layer(channels, channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y * torch.sigmoid(self.fc(y.mean((2, 3))))[:, :, None, None]


class SpatialAttention(nn.Module):
    """CBAM's: reads one of several results by name, and by place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [x.max(1, keepdim=True).values, x.min(1, keepdim=True)[0], x.mean(1, keepdim=True)]
        return x * torch.sigmoid(self.conv(torch.cat(maps, 1)))


class Transposed(nn.Module):
    """Learned upsampling at the end."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.up, self.shuffle = nn.ConvTranspose2d(channels, channels, 2, 2), nn.PixelShuffle(2)
        self.last = nn.Conv2d(channels // 4, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.shuffle(self.up(x)))


# Outputs and inputs.


class Outputs(Net):
    def __init__(self, num_classes: int, wrap: Callable[[Tensor], object]) -> None:
        super().__init__(num_classes)
        self.wrap = wrap

    def forward(self, x: Tensor) -> object:
        logits = super().forward(x)
        assert not isinstance(logits, dict)
        return self.wrap(logits)  # type: ignore[arg-type]


class Moody(Net):
    def forward(self, x: Tensor) -> object:
        return to_size(self.classifier(F.dropout(self.features(x), 0.1, self.training)), x)


def one_channel(num_classes: int) -> nn.Module:
    return Net(1)


class TwoOfOne(nn.Module):
    """The way out that the refusal names."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net(1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        return torch.cat([torch.zeros_like(y), y], 1)


class Grey(nn.Module):
    """The way out for a model of grey images."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.net = Net(num_classes, channels=1)

    def forward(self, x: Tensor) -> object:
        return self.net(x.mean(1, keepdim=True))


# Several kinds in one network, for what takes long.


def tensors_in_forward(num_classes: int) -> nn.Module:
    net = Held(num_classes)
    net.blocks = nn.ModuleList([Blur(WIDTH), MadeInBlock(WIDTH)])
    return net


def tied_twice(num_classes: int) -> nn.Module:
    net = Net(num_classes, head=TiedHead)
    net.blocks[1] = net.blocks[0]
    return net


def worked_out(num_classes: int) -> nn.Module:
    net = Net(num_classes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(net.blocks[0][0])
    nn.utils.parametrizations.weight_norm(net.blocks[1][0])
    nn.utils.spectral_norm(net.stem[0])
    return net


class GreyTwoInADict(nn.Module):
    """The ways out for a model of grey images and for one with one output, as torchvision returns logits."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.net = Net(1, channels=1)

    def forward(self, x: Tensor) -> object:
        y = self.net(x.mean(1, keepdim=True))
        return {"out": torch.cat([torch.zeros_like(y), y], 1), "aux": y}


def in_a_row(*blocks: Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    return lambda channels: nn.Sequential(*(block(channels) for block in blocks))


def two_heads(channels: int, num_classes: int) -> nn.Module:
    return nn.Sequential(Pyramid(channels, channels), Transposed(channels, num_classes))


def groups_of_two(channels: int) -> nn.Module:
    return nn.GroupNorm(2, channels)


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "norm_inside": NormInside,
    "blur": lambda num_classes: Net(num_classes, block=Blur),
    "made_in_block": lambda num_classes: Net(num_classes, block=MadeInBlock),
    "temperature": Temperature,
    "random_features": RandomFeatures,
    "kept_from_before": KeptFromBefore,
    "coord_conv": CoordConv,
    "noisy": lambda num_classes: Net(num_classes, block=Noisy),
    "remembering": lambda num_classes: Net(num_classes, block=Remembering),
    "tied": lambda num_classes: Net(num_classes, head=TiedHead),
    "tied_across": tied_across,
    "weightnorm_old": weightnorm_old,
    "weightnorm_new": weightnorm_new,
    "spectral_old": spectral_old,
    "hooked": Hooked,
    "hooked_block": lambda num_classes: Hooked(num_classes, "stem"),
    "hooked_used_before": hooked_used_before,
    "locked": lambda num_classes: Net(num_classes, block=Locked),
    "views": lambda num_classes: Net(num_classes, block=SpatialGroups),
    "shuffle": lambda num_classes: Net(num_classes, block=Shuffle),
    "layer_norm": lambda num_classes: Net(num_classes, norm=LayerNorm2d),
    "group_norm": lambda num_classes: Net(num_classes, norm=groups_of_two),
    "instance_norm": lambda num_classes: Net(num_classes, norm=nn.InstanceNorm2d),
    "attention": lambda num_classes: Net(num_classes, block=TokenAttention),
    "unet": UNet,
    "unet_in_a_list_wrapped": lambda num_classes: Wrapped(ListUNet(num_classes), 0),
    "unet_wrapped_twice": lambda num_classes: Wrapped(Wrapped(UNet(num_classes))),
    "net_wrapped": lambda num_classes: Wrapped(Net(num_classes)),
    "data_parallel": lambda num_classes: nn.DataParallel(Net(num_classes)),
    "compiled": lambda num_classes: torch.compile(Net(num_classes)),
    "sized_unet": SizedUNet,
    "sized_unet_encoder_kept_whole": lambda num_classes: SizedUNet(num_classes, drops=True),
    "pyramid": lambda num_classes: Net(num_classes, head=Pyramid),
    "split": lambda num_classes: Net(num_classes, block=Split),
    "spatial_attention": lambda num_classes: Net(num_classes, block=SpatialAttention),
    "squeeze_excite": lambda num_classes: Net(num_classes, block=SqueezeExcite),
    "transposed": lambda num_classes: Net(num_classes, head=Transposed),
    "half": lambda num_classes: Net(num_classes).half(),
    "bfloat16": lambda num_classes: Net(num_classes).bfloat16(),
    "float64": lambda num_classes: Net(num_classes).double(),
    "in_a_dict": lambda num_classes: Outputs(num_classes, lambda y: {"out": y, "aux": y}),
    "two_of_one": lambda num_classes: TwoOfOne(),
    "grey": Grey,
    # These hold several kinds each.
    "tensors_in_forward": tensors_in_forward,
    "kept_whole": lambda num_classes: Net(num_classes, block=in_a_row(Noisy, Remembering, Locked)),
    "tied_twice": tied_twice,
    "worked_out": worked_out,
    "reshaped": lambda num_classes: Net(
        num_classes, block=in_a_row(SpatialGroups, Shuffle, SqueezeExcite, SpatialAttention, Split)
    ),
    "normed": lambda num_classes: Net(
        num_classes, block=TokenAttention, norm=in_a_row(LayerNorm2d, groups_of_two, nn.InstanceNorm2d)
    ),
    "half_pyramid_transposed": lambda num_classes: Net(num_classes, head=two_heads).half(),
    "grey_two_in_a_dict": GreyTwoInADict,
    "compiled_parallel_wrapped": lambda num_classes: torch.compile(nn.DataParallel(Wrapped(Net(num_classes)))),
    # These are refused.
    "one_channel": one_channel,
    "one_channel_images": lambda num_classes: Net(num_classes, channels=1),
    "four_channel_images": lambda num_classes: Net(num_classes, channels=4),
    "torchscript": torchscript,
    "two_in_one_memory": two_in_one_memory,
    "expanded": expanded,
    "in_a_tuple": lambda num_classes: Outputs(num_classes, lambda y: (y, y)),
    "in_a_list": lambda num_classes: Outputs(num_classes, lambda y: [y, y]),
    "in_an_odd_dict": lambda num_classes: Outputs(num_classes, lambda y: {"masks": y}),
    "of_whole_images": lambda num_classes: Outputs(num_classes, lambda y: y.mean((2, 3))),
    "one_channel_wrapped": lambda num_classes: Wrapped(Net(1)),
    "moody": Moody,
    "untraceable": Untraceable,
    # No graph can be made of these.
    "scripted_part": scripted_part,
    # These run as they are, tapped where exits are named.
    "untraceable_hooked": UntraceableHooked,
}
globals().update({f"model_{name}": build for name, build in MODELS.items()})


class Stripes:
    """Images of two classes, 32 x 48."""

    class_names = ("dark", "light")
    palette = np.array([(0, 0, 0), (255, 255, 255)], np.uint8)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> SegmentationSample:
        rng = np.random.default_rng(index)
        mask = np.broadcast_to(((np.arange(48) + 5 * index) // 12 % 2).astype(np.uint8), (32, 48)).copy()
        image = (mask[..., None] * 120 + rng.integers(0, 120, (32, 48, 3))).astype(np.uint8)
        return SegmentationSample(name=f"stripes_{index}", image=image, mask=mask)


def stripes(split: str) -> Stripes:
    return Stripes()
