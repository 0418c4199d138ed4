"""What the exit policy costs for one image, and how often its two forms decide alike.

    python benchmarks/bench_policy.py [--threads 2] [--models 0.5 1.0 drn50] [--json PATH]

At every early exit of MobileNetV2 + FCN (by width) and of DRN-50 + FCN: the native form's time, from the exit's logits
to the decision, against that of the segment and the head before it, 512 x 512, batch 1, five early exits; the goal is
3 %. The head is the plain FCN one (r = 1); the lightest one (r = 8) is reported too. Segment, head and decision take
turns in the order in which they run. The figure is the ratio of the lower quartiles: on a machine that others use too,
medians measure the others. Then, apart from any network:
Logits of 21 classes, 64 x 64, for a 512 x 512 input (output stride 8). The baselines are the paper's literal form,
Canny and a median over 33 x 33 input pixels, and the native form by tensor operators instead of the compiled pass,
measured in the same run, interleaved. ``doubtful`` is the share of images that the pass leaves to the operators. One
line per figure: ``name value unit goal ok|short``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from messnet.network.head_space import HeadConfig
from messnet.network.multi_exit import convert
from messnet.network.zoo import drn50_fcn, mobilenetv2_fcn
from messnet.policy.compiled import confident_share
from messnet.policy.edges import label_boundary, thicken
from messnet.policy.policy import Policy
from messnet.policy.reference import by_operators, image_confidence, refined_confidence_map, should_exit

Figure = tuple[str, float, str, float | None]
"""name, value, unit, goal: at least so much; negative: at most its absolute value; None: reported only."""

NUM_CLASSES, FEATURES, OUTPUT_STRIDE = 21, (64, 64), 8
INPUT_SIZE = (FEATURES[0] * OUTPUT_STRIDE, FEATURES[1] * OUTPUT_STRIDE)
NATIVE, PAPER, NONE = (Policy(refinement=refinement) for refinement in ("native", "paper", "none"))


def smooth_logits(num_images: int, seed: int = 0) -> Tensor:
    """Random fields, (N, K, 64, 64): per image of another grain (object size) and contrast (certainty)."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for _ in range(num_images):
        cells = int(torch.randint(2, 9, (), generator=generator))
        contrast = 2 + 10 * torch.rand((), generator=generator)
        field = torch.randn(1, NUM_CLASSES, cells, cells, generator=generator)
        images.append(contrast * F.interpolate(field, FEATURES, mode="bicubic"))
    return torch.cat(images)


def literal(logits: Tensor, policy: Policy) -> Tensor:
    """c_img at 0.7 by sorting every window near an edge."""
    return (refined_confidence_map(logits, OUTPUT_STRIDE, INPUT_SIZE, policy)[1] >= 0.7).float().mean((1, 2))


def counted(logits: Tensor, policy: Policy, num_thresholds: int = 1) -> Tensor:
    thresholds = torch.linspace(0.7, 0.95, num_thresholds)
    return image_confidence(logits, OUTPUT_STRIDE, INPUT_SIZE, thresholds, policy)


def native_by_operators(logits: Tensor) -> Tensor:
    """The native form's c_img as accelerators and graphs compute it."""
    return by_operators(logits, OUTPUT_STRIDE, INPUT_SIZE, torch.tensor([0.7]), NATIVE)


def doubtful(num_images: int) -> float:
    logits = smooth_logits(num_images, seed=1).numpy()
    return 1 - confident_share(logits, np.array([0.7], np.float32), entropy=False, refine=True)[1].mean()


def interleaved_ms(forms: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median ms of each form, warm; the forms take turns of about 50 ms, so that all meet the same machine."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            if not times[name] or times[name][-1] < 50:  # a quick form has lost its caches to the slow ones
                form()
            turn_ends = time.perf_counter() + 0.05
            while True:
                start = time.perf_counter()
                form()
                end = time.perf_counter()
                times[name].append((end - start) * 1e3)
                if end > turn_ends:
                    break
    return {name: statistics.median(values) for name, values in times.items()}


def shares_of_parts(name: str, rounds: int) -> list[Figure]:
    """Decision / (segment + head) at each early exit of a model: a MobileNetV2 width, or "drn50"."""
    model = drn50_fcn(NUM_CLASSES) if name == "drn50" else mobilenetv2_fcn(NUM_CLASSES, width=float(name))
    net = convert(model.eval(), torch.zeros(1, 3, *INPUT_SIZE), num_exits=6)
    for i in range(net.num_exits - 1):
        net.add_head(i, HeadConfig())
        net.add_head(i, HeadConfig(channel_reduction=8))
    net = net.to(memory_format=torch.channels_last)
    x = torch.rand(1, 3, *INPUT_SIZE).to(memory_format=torch.channels_last)
    times = np.zeros((rounds + 2, net.num_exits - 1, 4))
    with torch.inference_mode():
        for row in times:
            states = net.states(x)
            for i, cell in enumerate(row):
                plain, light = (exit for exit in net.exits if exit.exit_index == i)
                stride = net.exit_points[i].output_stride
                stamps = [time.perf_counter()]
                state = next(states)
                stamps.append(time.perf_counter())
                net.logits(light, state)
                stamps.append(time.perf_counter())
                logits = net.logits(plain, state)
                stamps.append(time.perf_counter())
                bool(should_exit(image_confidence(logits, stride, INPUT_SIZE, [0.9], NATIVE)[:, 0], 0.5))
                stamps.append(time.perf_counter())
                cell[:] = np.diff(stamps) * 1e3
    label = name if name == "drn50" else f"mobilenetv2_{name}"
    figures: list[Figure] = []
    for i, (segment, light_ms, plain_ms, decision) in enumerate(np.quantile(times[2:], 0.25, axis=0)):
        print(
            f"# {label} exit {i}: segment {segment:.2f} head {plain_ms:.2f} (light {light_ms:.2f}) "
            f"policy {decision:.3f} ms"
        )
        figures.append((f"{label}/exit_{i}/policy_share", decision / (segment + plain_ms), "of segment+head", -0.03))
        figures.append(
            (f"{label}/exit_{i}/policy_share_light_head", decision / (segment + light_ms), "of segment+head", None)
        )
    return figures


def agreement(num_images: int) -> dict[str, float]:
    """How native and paper form compare over a grid of thresholds; shares of decisions, [0, 1]."""
    logits = smooth_logits(num_images)
    pixel_thresholds = np.linspace(0.1, 0.95, 18)
    native, paper, none = (
        torch.cat([image_confidence(one[None], OUTPUT_STRIDE, INPUT_SIZE, pixel_thresholds, p) for one in logits])
        for p in (NATIVE, PAPER, NONE)
    )
    alike, contested = [], []
    for image_threshold in np.linspace(0.05, 0.95, 19):
        exits = should_exit(paper, image_threshold)
        same = exits == should_exit(native, image_threshold)
        splits = exits.any(0) & ~exits.all(0)  # pixel thresholds at which the images do not all go the same way
        alike.append(same.float().mean().item())
        contested.extend(same[:, splits].float().mean(0).tolist())
    near_edge = thicken(label_boundary(logits.argmax(1)), 1)
    return {
        "near_edge": near_edge.float().mean().item(),
        "decide_alike": statistics.mean(alike),
        "decide_alike_contested": statistics.mean(contested),
        "image_confidence_difference": (native - paper).abs().mean().item(),
        "image_confidence_difference_unrefined": (none - paper).abs().mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--models", nargs="*", default=["0.5", "1.0"], help="MobileNetV2 widths, or drn50")
    parser.add_argument("--images", type=int, default=16, help="synthetic images of the comparison of forms")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    logits = smooth_logits(1)
    ms = interleaved_ms(
        {
            "native": lambda: counted(logits, NATIVE),
            "native_by_operators": lambda: native_by_operators(logits),
            "native_20_thresholds": lambda: counted(logits, NATIVE, 20),
            "native_literal_median": lambda: literal(logits, NATIVE),
            "paper": lambda: counted(logits, PAPER),
            "paper_literal_median": lambda: literal(logits, PAPER),
            "none": lambda: counted(logits, NONE),
        },
        options.rounds,
    )
    shares = agreement(options.images)

    figures: list[Figure] = [figure for name in options.models for figure in shares_of_parts(name, options.rounds)]
    figures += [(f"policy_{name}", v, "ms", None) for name, v in ms.items()]
    figures += [
        ("native_vs_operators", ms["native_by_operators"] / ms["native"], "x", 3.0),
        ("doubtful", doubtful(200), "share", None),
        ("pixels_near_edges", shares["near_edge"], "share", None),
        ("native_vs_literal_paper", ms["paper_literal_median"] / ms["native"], "x", 100.0),
        ("native_vs_paper", ms["paper"] / ms["native"], "x", OUTPUT_STRIDE**2 / 2),
        ("paper_vs_literal_paper", ms["paper_literal_median"] / ms["paper"], "x", 10.0),
        ("native_vs_literal_native", ms["native_literal_median"] / ms["native"], "x", 2.0),
        ("native_and_paper_decide_alike", shares["decide_alike"], "share", 0.95),
        ("native_and_paper_decide_alike_contested", shares["decide_alike_contested"], "share", 0.9),
        ("native_paper_mean_difference", shares["image_confidence_difference"], "c_img", None),
        ("none_paper_mean_difference", shares["image_confidence_difference_unrefined"], "c_img", None),
    ]
    device = f"{platform.machine()} {options.threads} thread(s), torch {torch.__version__}, float32"
    print(f"# {device}; {FEATURES} features, {INPUT_SIZE} input, {NUM_CLASSES} classes; median of {options.rounds}")
    rows = []
    for name, value, unit, goal in figures:
        verdict = "ok" if goal is None or (value >= goal if goal >= 0 else value <= -goal) else "short"
        wanted = "-" if goal is None else f">={goal:g}" if goal >= 0 else f"<={-goal:g}"
        print(f"{name} {value:.4g} {unit} {wanted} {verdict}")
        rows.append({"name": name, "value": value, "unit": unit, "goal": goal, "verdict": verdict})
    if options.json:
        options.json.write_text(json.dumps({"device": device, "figures": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
