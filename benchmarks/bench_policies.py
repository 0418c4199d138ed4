"""Which exit policy buys most accuracy at the same mean cost, and how often the native and the paper form decide alike.

    python benchmarks/bench_policies.py RUN [RUN ...] --cache FOLDER [--data-root FOLDER] [--halvings 10] [--json PATH]

RUN holds run.json, stage1.safetensors and stage2.safetensors; nothing is trained or written there. Of each exit point
the best head in the run's tables.npz is kept. Every image then is tabulated once under all policies (FOLDER/*.npz, used
again the next time). For each policy the exact front of workload and mIoU is searched on one half of the images, and
its instances are run on the other half: mIoU there at equal mean cost, interpolated between instances, averaged over
random halvings, both ways round. "random" gives each image a confidence by lot: what a policy that knows nothing gets.
The baseline is top1+native, in the same run. One line per figure: ``name value unit goal ok|short``; a picture per RUN.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import replace
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from scipy import ndimage

from messnet.data.sources import open_dataset
from messnet.evaluation import evaluate
from messnet.images.preprocessing import normalise
from messnet.network.multi_exit import MultiExitNet
from messnet.policy.options import EvaluationOptions
from messnet.policy.policy import Confidence
from messnet.policy.reference import confidence_map
from messnet.profiling import profile
from messnet.records.costs import CostTable
from messnet.records.exit_tables import ExitTables
from messnet.run.measuring import build_network
from messnet.run.recipe import recipe_from_record
from messnet.searching.grid import Grid, cost_of, route
from messnet.searching.optima import pareto_front
from messnet.training.checkpoint import Checkpoint

BASELINE, RANDOM = "top1+native", "random"
FORMS = [f"{c}+{how}" for c in ("top1", "entropy") for how in ("native", "paper", "none")]
RIVALS = ("mean", "patches", "classes")
PATCH = 50  # input pixels, the side of a patch
QUANTILE = 100  # the least sure hundredth of the patches speaks for the image
RATIOS = np.array([0.5, 0.6, 0.7, 0.8, 0.9])  # of the whole model's workload
Figure = tuple[str, float, str, float | None]


def load_run(run: Path, data_root: str | None) -> tuple[MultiExitNet, CostTable, object, ExitTables]:
    """The trained network with one head per exit point, its costs, its validation images, its own tables."""
    recipe = recipe_from_record(json.loads((run / "run.json").read_text())["recipe"])
    if data_root and recipe.data.root:
        recipe = replace(recipe, data=replace(recipe.data, root=data_root))
    val, tables = open_dataset(recipe.data, "val"), ExitTables.from_bytes((run / "tables.npz").read_bytes())
    size = val[0].mask.shape
    # Its weights come from the run itself.
    model = replace(recipe.model, weights=None)
    net = build_network(model, recipe.heads, len(val.class_names), (size[0], size[1]))
    net.load_model_state_dict(safetensors.torch.load_file(run / "stage1.safetensors"))
    net.heads.load_state_dict(safetensors.torch.load_file(run / "stage2.safetensors"))
    best = {}
    for h, exit in enumerate(tables.exits):
        miou = tables.miou(np.full(len(tables.image_names), h))
        best[exit.exit_index] = max(best.get(exit.exit_index, (0.0, exit)), (miou, exit))
    net.drop_heads([exit for _, exit in best.values()])
    return net, profile(net, (size[0], size[1])), val, tables


def tabulate(run: Path, cache: Path, data_root: str | None) -> tuple[ExitTables, CostTable]:
    net, costs, val, own = load_run(run, data_root)
    rare = tuple(sorted(np.argsort(own.labelled.sum(0))[:3].tolist()))
    rivals = [f"{c}+{how}" for c in ("top1", "entropy") for how in RIVALS]
    file = cache / f"{run.name}.npz"
    if file.exists():
        tables = ExitTables.from_bytes(file.read_bytes())
        if tables.policies == (*FORMS, *rivals) and tables.exits == net.exits:
            return tables, costs
    options = EvaluationOptions(policies=tuple(FORMS), pixel_thresholds=tuple(own.pixel_thresholds.tolist()))
    checkpoint = Checkpoint(cache / f"{run.name}.checkpoint")
    tables = evaluate(net, val, options, origin=run.name, checkpoint=checkpoint)
    found = np.stack([rivals_of_image(net, val[v].image, rare) for v in range(len(val))])  # (V, H, P)
    repeated = found[..., None].repeat(len(tables.pixel_thresholds), 3)
    tables = replace(
        tables,
        policies=(*FORMS, *rivals),
        image_confidence=np.concatenate([tables.image_confidence, repeated], 2),
    )
    cache.mkdir(parents=True, exist_ok=True)
    file.write_bytes(tables.to_bytes())
    checkpoint.discard()
    return tables, costs


def rivals_of_image(net: MultiExitNet, image: np.ndarray, classes: tuple[int, ...]) -> np.ndarray:
    """(H, P): what each rival says at each exit, P as c+how for c of top1, entropy and how of ``RIVALS``."""
    x = torch.from_numpy(normalise(image))[None].to(memory_format=torch.channels_last)
    rows = []
    with torch.inference_mode():
        states = list(net.states(x))
        for exit in net.exits:
            logits = net.logits(exit, states[exit.exit_index])
            stride = net.exit_points[exit.exit_index].output_stride
            rows.append([rival(logits, stride, c, how, classes) for c in ("top1", "entropy") for how in RIVALS])
    return np.array(rows, np.float32)


def rival(logits: torch.Tensor, output_stride: int, kind: Confidence, how: str, classes: tuple[int, ...]) -> float:
    """A confidence of one image that needs no pixel threshold, in [0, 1]; summed in float64.

    "mean": over all pixels. "patches": of the means over all windows of about 50 input pixels, the one that 1 % of them
    are not above (after Kahl et al., "ValUES", 2024, and Jazbec et al., "Fast yet Safe", 2024, who slide windows of 50
    pixels and take the same quantile). "classes": mean over the pixels predicted as one of ``classes``; over all where
    there is none, for a shallow exit may have overlooked them.
    """
    confidence = confidence_map(logits, kind)[0].double().numpy()
    if how == "patches":
        side = 2 * max(1, PATCH // (2 * output_stride)) + 1
        means = ndimage.uniform_filter(confidence, side, mode="nearest")
        return float(np.quantile(means, 1 / QUANTILE, method="lower"))
    if how == "classes" and (wanted := np.isin(logits[0].argmax(0).numpy(), classes)).any():
        return float(confidence[wanted].mean())
    return float(confidence.mean())


def with_random(tables: ExitTables) -> ExitTables:
    shape = (*tables.image_confidence.shape[:2], 1, 1)
    lots = np.random.default_rng(0).random(shape, np.float32).repeat(len(tables.pixel_thresholds), 3)
    return replace(
        tables,
        policies=(*tables.policies, RANDOM),
        image_confidence=np.concatenate([tables.image_confidence, lots], 2),
    )


def curve(selection: ExitTables, reported: ExitTables, costs: CostTable, policy: str) -> np.ndarray:
    """mIoU on the reported images at each cost of RATIOS, of the instances searched on the selection images."""
    grid = Grid(policy=policy, max_exits=3, num_image_thresholds=16)
    front = pareto_front(selection, costs, grid=grid)
    instances = [point.instance for point in front.points]
    spent = np.array([cost_of(reported, costs, one).mean() for one in instances]) / costs.total("macs")
    miou = np.array([reported.miou(route(reported, one)) for one in instances])
    order = np.argsort(spent, kind="stable")
    return np.interp(RATIOS, spent[order], miou[order])


def compare(tables: ExitTables, costs: CostTable, halvings: int) -> dict[str, np.ndarray]:
    """Per policy (2 * halvings, ratios): held-out mIoU."""
    found: dict[str, list[np.ndarray]] = {policy: [] for policy in tables.policies}
    for seed in range(halvings):
        halves = [tables.subset(half) for half in tables.halves(seed)]
        for selection, reported in (halves, halves[::-1]):
            for policy in tables.policies:
                found[policy].append(curve(selection, reported, costs, policy))
    return {policy: np.array(rows) for policy, rows in found.items()}


def agreement(tables: ExitTables, kind: str) -> dict[str, float]:
    """Native against paper form, over early exits, pixel thresholds and images. "same_thresholds": with one image
    threshold for both, over 19 of them, where the paper form does not send all images the same way. "same_rate": each
    with the threshold that lets its k surest images leave, over all k."""
    native, paper = (
        tables.image_confidence[:, : tables.final, tables.policies.index(f"{kind}+{form}")].astype(np.float64)
        for form in ("native", "paper")
    )
    contested = []
    for threshold in np.linspace(0.05, 0.95, 19):
        a, b = native >= threshold, paper >= threshold
        splits = b.any(0) & ~b.all(0)
        contested.extend((a == b).mean(0)[splits])
    num_images = len(native)
    ranks_a, ranks_b = (np.argsort(np.argsort(-form, axis=0, kind="stable"), axis=0) for form in (native, paper))
    ranked = [((ranks_a < k) == (ranks_b < k)).mean() for k in range(1, num_images)]
    return {
        "same_thresholds": float(np.mean(contested)),
        "same_rate": float(np.mean(ranked)),
        "difference": float(np.abs(native - paper).mean()),
    }


def draw(run: str, found: dict[str, np.ndarray], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for axis, kind in zip(axes, ("top1", "entropy"), strict=True):
        for policy, rows in found.items():
            if policy.startswith(kind) or policy == RANDOM:
                axis.plot(
                    RATIOS, rows.mean(0) * 100, marker="o", label=policy, color="0.6" if policy == RANDOM else None
                )
        axis.set(
            xlabel="mean workload against the whole model", ylabel="mIoU on the other half, %", title=f"{run}, {kind}"
        )
        axis.legend(fontsize=8)
    figure.savefig(path)
    plt.close(figure)


def figures_of(run: Path, tables: ExitTables, found: dict[str, np.ndarray]) -> list[Figure]:
    figures: list[Figure] = []
    baseline = found[BASELINE]
    print(f"# {run.name}: {len(tables.image_names)} images; mIoU (%) on the other half, {len(baseline)} selections")
    print(f"{'policy':24s} " + " ".join(f"{ratio:6.1f}x" for ratio in RATIOS) + "   mean - top1+native (pp)")
    for policy, rows in sorted(found.items(), key=lambda pair: -pair[1].mean()):
        gain = (rows - baseline).mean(1) * 100
        print(
            f"{policy:24s} "
            + " ".join(f"{value:7.2f}" for value in rows.mean(0) * 100)
            + f"   {gain.mean():+.2f} (spread over halvings {gain.std():.2f}, better in {np.mean(gain > 0):.0%})"
        )
        figures.append((f"{run.name}/{policy}/miou_gain_over_{BASELINE}", float(gain.mean()), "pp", None))
        figures.append((f"{run.name}/{policy}/better_than_{BASELINE}", float(np.mean(gain > 0)), "share", None))
    over_random = float((baseline - found[RANDOM]).mean() * 100)
    figures.append((f"{run.name}/{BASELINE}/miou_gain_over_random", over_random, "pp", 0.0))
    for kind in ("top1", "entropy"):
        for name, value in agreement(tables, kind).items():
            goal = 0.9 if name == "same_rate" else None
            unit = "c_img" if name == "difference" else "share"
            figures.append((f"{run.name}/{kind}/native_and_paper_{name}", value, unit, goal))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--cache", type=Path, required=True, help="folder of the tables and pictures")
    parser.add_argument("--data-root", help="where the images of a run on files are now")
    parser.add_argument("--halvings", type=int, default=10)
    parser.add_argument("--only-tables", action="store_true", help="stop once the tables are there")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.cache.mkdir(parents=True, exist_ok=True)

    figures: list[Figure] = []
    for run in options.runs:
        tables, costs = tabulate(run, options.cache, options.data_root)
        if options.only_tables:
            continue
        tables = with_random(tables)
        found = compare(tables, costs, options.halvings)
        figures += figures_of(run, tables, found)
        draw(run.name, found, options.cache / f"{run.name}_policies.png")
    rows = []
    for name, value, unit, goal in figures:
        verdict = "ok" if goal is None or value >= goal else "short"
        print(f"{name} {value:.4g} {unit} {'-' if goal is None else f'>={goal:g}'} {verdict}")
        rows.append({"name": name, "value": value, "unit": unit, "goal": goal, "verdict": verdict})
    if options.json:
        device = f"{platform.machine()} 1 thread, torch {torch.__version__}, float32"
        options.json.write_text(json.dumps({"device": device, "figures": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
