"""The posters' two training tables on any recipe: per-exit mIoU of stage 1 initialisations, or of stage 2 losses.

    python benchmarks/compare_training.py RECIPE --what stage1|stage2 [--seeds 0 1 2] [--set --data.root X]

Each variant is a run of its own, in FOLDER/NAME-SEED; what is finished is not done again, an interrupted one goes on.
Variants that differ in stage 2 alone share stage 1. ``--set`` passes recipe values on to all of them. mIoU is over the
whole validation split, of the plain head (1, 0, no, fcn) and of the best head at each exit point.

stage1: the backbone from "baseline", "end_to_end" and "exit_aware" pre-training, the recipe's own stage 2 on each.
stage2: the recipe's own stage 1, then "ce", "kd", "self_distillation", "pfd", "pfd_filtered"; and "exits_only",
which is "ce" on a backbone that never saw an early exit (pretrain.scheme baseline).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from messnet.cli.app import quieten
from messnet.errors import MessError
from messnet.instance import FINAL_HEAD
from messnet.network.exit_head import plain_head_config
from messnet.opening import Run, open_run
from messnet.pipeline import adopt_pretrained, run_stage
from messnet.tables import ExitTables

# What is overridden in each variant, and the variant whose stage 1 is the same.
STAGE1 = {name: (["--pretrain.scheme", name], None) for name in ("baseline", "end_to_end", "exit_aware")}
STAGE2: dict[str, tuple[list[str], str | None]] = {
    "ce": (["--distill.loss", "ce"], None),
    "kd": (["--distill.loss", "kd"], "ce"),
    "self_distillation": (["--distill.loss", "self_distillation"], "ce"),
    "pfd": (["--distill.loss", "pfd", "--distill.filter_kl", "false"], "ce"),
    "pfd_filtered": (["--distill.loss", "pfd", "--distill.filter_kl", "true"], "ce"),
    "exits_only": (["--pretrain.scheme", "baseline", "--distill.loss", "ce"], None),
}


def finished(recipe: Path, overrides: list[str], out: Path, pretrained: Path | None) -> Run:
    run = open_run(recipe, overrides, out=out)
    if pretrained is not None:
        adopt_pretrained(run, pretrained)
    for stage in ("profile", "pretrain", "distill", "evaluate"):
        if run_stage(run, stage):
            print(f"{out}: {stage} done", flush=True)
    return run


def per_exit(tables: ExitTables) -> tuple[list[float], list[float]]:
    """mIoU in percent of the plain head (the best, where the recipe has none) and of the best head at each exit."""
    mious: dict[int, dict[str, float]] = {}
    for h, exit in enumerate(tables.exits):
        counts = np.full(len(tables.image_names), h)
        mious.setdefault(exit.exit_index, {})[exit.head] = 100 * tables.miou(counts)
    plain = plain_head_config().name
    best = [max(heads.values()) for _, heads in sorted(mious.items())]
    return [heads.get(plain, heads.get(FINAL_HEAD, max(heads.values()))) for _, heads in sorted(mious.items())], best


def cell(values: list[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread}"


def table(rows: dict[str, list[list[float]]], title: str) -> str:
    """Markdown; ``rows`` holds (seeds, exits) per variant."""
    num_exits = len(next(iter(rows.values()))[0])
    names = [f"exit {i}" for i in range(num_exits - 1)] + ["final"]
    lines = [f"| {title} | {' | '.join(names)} |", f"| --- |{' ---: |' * num_exits}"]
    for variant, seeds in rows.items():
        lines.append(f"| {variant} | {' | '.join(cell(list(values)) for values in zip(*seeds, strict=True))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--what", choices=("stage1", "stage2"), required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, help="by default runs/compare-NAME-WHAT")
    parser.add_argument("--markdown", type=Path, help="write the tables here too")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--set", nargs=argparse.REMAINDER, default=[], help="recipe values for all; comes last")
    options = parser.parse_args()
    quieten()
    out = options.out or Path("runs") / f"compare-{options.recipe.stem}-{options.what}"
    plain: dict[str, list[list[float]]] = {}
    best: dict[str, list[list[float]]] = {}
    try:
        for seed in options.seeds:
            for variant, (own, shares) in (STAGE1 if options.what == "stage1" else STAGE2).items():
                overrides = [*options.set, *own, "--pretrain.seed", str(seed), "--distill.seed", str(seed)]
                pretrained = out / f"{shares}-{seed}" if shares else None
                run = finished(options.recipe, overrides, out / f"{variant}-{seed}", pretrained)
                of_plain, of_best = per_exit(run.tables())
                plain.setdefault(variant, []).append(of_plain)
                best.setdefault(variant, []).append(of_best)
    except MessError as error:
        raise SystemExit(f"compare_training: {error}") from None
    seeds = ", ".join(map(str, options.seeds))
    text = (
        f"{options.recipe.stem}, {options.what}, seeds {seeds}: mIoU in percent over the validation split"
        f"{', mean ± standard deviation over the seeds' if len(options.seeds) > 1 else ''}.\n\n"
        f"{table(plain, 'plain head')}\n\n{table(best, 'best head')}\n"
    )
    print(text)
    if options.markdown:
        options.markdown.write_text(text)
    if options.json:
        options.json.write_text(json.dumps({"seeds": options.seeds, "plain": plain, "best": best}, indent=1) + "\n")


if __name__ == "__main__":
    main()
