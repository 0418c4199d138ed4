"""What a conversion costs: the converted network, run to its final exit, against the user's model.

    python benchmarks/bench_conversion.py [--size 512 512] [--models NAME ...] [--compile] [--json PATH]
    python benchmarks/bench_conversion.py --families

Both run in one run, in turns, on the same weights, in eval mode, channels last, batch 1, to logits at input resolution;
a ratio is the median over rounds. One line per figure: ``name value unit goal ok|short``. With --families instead the
table of what converts, and how (Markdown): all on the meta device, nothing is computed.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import segmentation

import messnet
from messnet.errors import MessError
from messnet.network.multi_exit import MultiExitNet, upsample
from messnet.network.tracing import logits_of

CLASSES = 21
MAX_RATIO = 1.03


def torchvision(name: str, **options: object) -> nn.Module:
    return getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=CLASSES, **options)


def smp(architecture: str, encoder: str) -> nn.Module:
    import segmentation_models_pytorch as library

    return getattr(library, architecture)(encoder, encoder_weights=None, classes=CLASSES)


def segformer_b0() -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    return SegformerForSemanticSegmentation(SegformerConfig(num_labels=CLASSES))


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "fcn_resnet50": lambda: torchvision("fcn_resnet50"),
    "fcn_resnet50_aux": lambda: torchvision("fcn_resnet50", aux_loss=True),
    "deeplabv3_resnet50": lambda: torchvision("deeplabv3_resnet50"),
    "deeplabv3_mobilenet_v3_large": lambda: torchvision("deeplabv3_mobilenet_v3_large"),
    "lraspp_mobilenet_v3_large": lambda: torchvision("lraspp_mobilenet_v3_large"),
    **{f"zoo_{name}": lambda build=build: build(CLASSES) for name, build in messnet.zoo.MODELS.items()},
    "segformer_b0": segformer_b0,
    **{
        f"{architecture.lower()}_{encoder}": lambda architecture=architecture, encoder=encoder: smp(
            architecture, encoder
        )
        for architecture, encoder in (
            ("Unet", "resnet18"),
            ("Unet", "mobilenet_v2"),
            ("Unet", "tu-efficientnet_b0"),
            ("UnetPlusPlus", "resnet18"),
            ("DeepLabV3Plus", "mobilenet_v2"),
            ("FPN", "resnet18"),
            ("FPN", "tu-convnext_atto"),
            ("PSPNet", "resnet18"),
            ("Linknet", "resnet18"),
            ("MAnet", "resnet18"),
            ("UPerNet", "resnet18"),
            ("Segformer", "resnet18"),
        )
    },
}
TIMED = ("fcn_resnet50", "deeplabv3_resnet50", "zoo_mobilenetv2_fcn", "segformer_b0", "unet_resnet18")


def families(size: tuple[int, int], num_exits: int) -> None:
    print(f"{num_exits} exits by workload at {size[0]}x{size[1]}; an exit is module:channels/output stride.\n")
    print("| family | converts | cut points | exits | blocks | notes |\n| --- | --- | ---: | --- | --- | --- |")
    for name, build in FAMILIES.items():
        try:
            with torch.device("meta"):
                net = messnet.convert(build(), torch.zeros(1, 3, *size), num_exits=num_exits)
        except MessError as error:
            print(f"| {name} | no | | | | {error} |")
            continue
        exits = ", ".join(f"{point.module}:{point.channels}/{point.output_stride}" for point in net.exit_points)
        notes = re.sub(r"/\S*/site-packages/", "", "; ".join(net.notes)).replace("|", "\\|")
        print(f"| {name} | yes | {len(net.cuts) - 1} | {exits} | {net.backbone.block} | {notes} |", flush=True)


def own(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: upsample(logits_of(model(x), model), x.shape[-2:])


def ratio(
    one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor], x: Tensor, rounds: int
) -> tuple[float, ...]:
    """Median seconds of both and median of other / one; they take turns, each is first in every second round."""
    seconds: list[tuple[float, float]] = []
    for k in range(rounds + 2):
        times = {}
        for form in (one, other) if k % 2 else (other, one):
            start = time.perf_counter()
            form(x)
            times[form] = time.perf_counter() - start
        if k >= 2:  # warm
            seconds.append((times[one], times[other]))
    medians = [statistics.median(column) for column in zip(*seconds, strict=True)]
    return (*medians, statistics.median(b / a for a, b in seconds))


def time_model(name: str, x: Tensor, num_exits: int, rounds: int, *, compiled: bool) -> list[tuple[str, float, str]]:
    torch.manual_seed(0)
    model = FAMILIES[name]().eval().to(memory_format=torch.channels_last)
    start = time.perf_counter()
    net = messnet.convert(model, x, num_exits=num_exits)
    figures = [(f"{name}_conversion", time.perf_counter() - start, "s")]
    torch.testing.assert_close(net(x), own(model)(x), rtol=0, atol=1e-5)
    forms: dict[str, tuple[nn.Module, MultiExitNet]] = {"eager": (model, net)}
    if compiled:
        forms["compiled"] = (torch.compile(model), torch.compile(net))
    for form, (original, converted) in forms.items():
        before, after, overhead = ratio(own(original), converted, x, rounds)
        figures += [
            (f"{name}_{form}_original", 1000 * before, "ms"),
            (f"{name}_{form}_converted", 1000 * after, "ms"),
            (f"{name}_{form}_ratio", overhead, "x"),
        ]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(256, 256), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--models", nargs="+", choices=tuple(FAMILIES), default=TIMED, metavar="NAME")
    parser.add_argument("--exits", type=int, default=6)
    parser.add_argument("--compile", action="store_true", help="compiled too")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--families", action="store_true", help="print the table of what converts")
    options = parser.parse_args()
    size = (options.size[0], options.size[1])
    if options.families:
        families(size, options.exits)
        return
    torch.set_num_threads(options.threads)
    x = torch.rand(1, 3, *size).to(memory_format=torch.channels_last)
    device = f"{platform.machine()} {options.threads} thread(s), torch {torch.__version__}, float32"
    print(f"# {device}; {size[0]}x{size[1]}, {options.exits} exits; median of {options.rounds} rounds", flush=True)
    rows = []
    for model in options.models:
        with torch.inference_mode():
            figures = time_model(model, x, options.exits, options.rounds, compiled=options.compile)
        for name, value, unit in figures:
            goal = MAX_RATIO if unit == "x" else None
            verdict = "ok" if goal is None or value <= goal else "short"
            print(f"{name} {value:.4g} {unit} {'-' if goal is None else f'<={goal:g}'} {verdict}", flush=True)
            rows.append({"name": name, "value": value, "unit": unit, "goal": goal, "verdict": verdict})
    if options.json:
        options.json.write_text(json.dumps({"device": device, "size": size, "figures": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
