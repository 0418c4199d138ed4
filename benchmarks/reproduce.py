"""The paper's tables on any recipe, each training done once and shared by all tables.

    python benchmarks/reproduce.py RECIPE TABLE [TABLE ...] [--seeds 0 1 2] [--out FOLDER] [--set --data.root X]

initialisations  per-exit mIoU of backbones from "baseline", "end_to_end" and "exit_aware" pre-training
losses           per-exit mIoU of the stage 2 losses; "exits only" is CE on a backbone that never saw an early exit
instances        what MESS finds against the original network, a smaller one (--smaller), the best static cut of the
                 same network and uniform heads: searched on one half of the validation images, reported on the
                 other; ``--against own`` compares with the network's own final exit and trains no other
cost             what training took: one MESS network for all operating points against one network for each

``instances`` and ``cost`` train by the recipe's own scheme and loss, ``--mess exit_aware-ce`` by others: SCHEME-LOSS,
where a scheme alone means PFD.

Each variant is a run of its own, FOLDER/VARIANT-SEED; what is finished is not done again, an interrupted one goes on.
``--set`` comes last and passes recipe values on to all runs. Tables go to the screen, and to FOLDER/TABLE.md.
The tables of policies are ``bench_policies.py``; the figures are on the page of ``messnet report FOLDER/exit_aware-0``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from messnet.cli.app import quieten
from messnet.errors import MessError
from messnet.evaluation import evaluate
from messnet.network.head_space import plain_head_config
from messnet.network.zoo import MODELS
from messnet.records.costs import CostTable
from messnet.records.exit_tables import ExitTables
from messnet.records.files import write_atomically
from messnet.records.instance import FINAL_HEAD, Instance
from messnet.run.opening import adopt_pretrained, open_run
from messnet.run.recipe import Recipe, load_recipe
from messnet.run.run import Run
from messnet.run.stages import run_stage
from messnet.searching.answers import FrontPoint
from messnet.searching.grid import cost_of, route
from messnet.searching.optima import pareto_front


class Variant(NamedTuple):
    """What differs from the recipe, and the variant whose stage 1 is the same."""

    overrides: tuple[str, ...] = ()
    shares: str | None = None


def variant_of(scheme: str, loss: str) -> tuple[str, Variant]:
    """``loss`` as the recipe names it, or "pfd_filtered". PFD, the paper's choice, goes without saying."""
    name, filtered = loss.removesuffix("_filtered"), str(loss == "pfd_filtered").lower()
    overrides = ("--pretrain.scheme", scheme, "--distill.loss", name, "--distill.filter_kl", filtered)
    return (scheme, Variant(overrides)) if loss == "pfd" else (f"{scheme}-{loss}", Variant(overrides, scheme))


def variant_of_recipe(recipe: Recipe) -> str:
    """The name of the variant that trains as the recipe says."""
    loss = recipe.distill.loss
    filtered = "_filtered" * (loss == "pfd" and recipe.distill.filter_kl)
    return variant_of(recipe.pretrain.scheme, loss + filtered)[0]


LOSS_NAMES = ("pfd", "pfd_filtered", "ce", "kd", "self_distillation")
VARIANTS = dict(variant_of(scheme, loss) for scheme in ("exit_aware", "baseline", "end_to_end") for loss in LOSS_NAMES)
INITIALISATIONS = {"baseline": "baseline", "end to end": "end_to_end", "exit-aware": "exit_aware"}
LOSSES = {
    "exits only (CE, baseline backbone)": "baseline-ce",
    "CE": "exit_aware-ce",
    "KD": "exit_aware-kd",
    "self-distillation": "exit_aware-self_distillation",
    "PFD": "exit_aware",
    "PFD, KL filtered too": "exit_aware-pfd_filtered",
}
SMALLER = {"mobilenetv2_fcn": "0.35", "drn50_fcn": "drn50_layer3_fcn", "drn50_deeplabv3": "drn50_layer3_fcn"}
"""By zoo model, the smaller static network it is compared with: a width, or another zoo model."""
OBJECTIVES = {"most accurate at <= 1x": None, "cheapest at <= 0.1 pp": 0.1, "cheapest at <= 1 pp": 1.0}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A recipe, where its runs are, and the recipe values that hold for all of them."""

    recipe: Path
    folder: Path
    seeds: Sequence[int]
    overrides: Sequence[str] = ()
    baseline_rate: float | None = None
    """Learning rate of the networks without exits; None: the recipe's."""

    def opened(self, variant: str, seed: int, smaller: str | None = None) -> Run:
        other = ["--model.name" if smaller in MODELS else "--model.width", smaller] if smaller else []
        seeds = ["--pretrain.seed", str(seed), "--distill.seed", str(seed)]
        name = f"{variant}-{f'{smaller}-' if smaller else ''}{seed}"
        if self.baseline_rate and variant.startswith("baseline"):
            name = f"rate{self.baseline_rate:g}-{name}"
            seeds += ["--pretrain.learning_rate", f"{self.baseline_rate:g}"]
        overrides = [*self.overrides, *VARIANTS[variant].overrides, *other, *seeds]
        return open_run(self.recipe, overrides, out=self.folder / name)

    def trained(self, variant: str, seed: int) -> Run:
        """The run with its tables, trained if it is not yet."""
        run = self.opened(variant, seed)
        if shares := VARIANTS[variant].shares:
            shared = self.opened(shares, seed)
            advance(shared, "profile", "pretrain")
            adopt_pretrained(run, shared.directory.path)
        advance(run, "profile", "pretrain", "distill", "evaluate")
        return run

    def static(self, seed: int, smaller: str | None = None) -> tuple[ExitTables, CostTable]:
        """The network itself, or the ``smaller`` one, trained without exits: its final exit's tables."""
        run = self.opened("baseline", seed, smaller)
        advance(run, "profile", "pretrain")
        path = run.directory.path / "final.npz"
        if not path.exists():
            tables = evaluate(run.pretrained(), run.dataset("val"), run.recipe.evaluate, run.device)
            write_atomically(path, tables.to_bytes())
        return ExitTables.from_bytes(path.read_bytes()), run.costs()


def advance(run: Run, *stages: str) -> None:
    for stage in stages:
        if run_stage(run, stage):
            print(f"{run.directory.path}: {stage} done", flush=True)


def cell(values: Sequence[float], digits: int = 2, sign: str = "", unit: str = "") -> str:
    """Mean, with the standard deviation where there are several."""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.{digits}f}{spread}{unit}"


def markdown(columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())])


def mious(tables: ExitTables) -> list[dict[str, float]]:
    """mIoU in percent over all images, of each head of each exit point."""
    found: dict[int, dict[str, float]] = {}
    for h, exit in enumerate(tables.exits):
        found.setdefault(exit.exit_index, {})[exit.head] = 100 * tables.miou(np.full(len(tables.image_names), h))
    return [heads for _, heads in sorted(found.items())]


def per_exit(experiment: Experiment, variants: dict[str, str], title: str) -> str:
    found = {
        label: [mious(experiment.trained(variant, seed).tables()) for seed in experiment.seeds]
        for label, variant in variants.items()
    }
    plain, parts = plain_head_config().name, []
    for which in ("plain head", "best head"):
        rows = {}
        for label, seeds in found.items():
            exits = zip(*seeds, strict=True)
            wanted = {plain, FINAL_HEAD} if which == "plain head" else {name for one in seeds[0] for name in one}
            rows[label] = [
                cell([max(miou for name, miou in heads.items() if name in wanted) for heads in one]) for one in exits
            ]
        names = [f"exit {i}" for i in range(len(seeds[0]) - 1)]
        parts.append(markdown([f"{title}: mIoU %, {which}", *names, "final"], rows))
    return "\n\n".join(parts)


def uniform(tables: ExitTables) -> Iterator[ExitTables]:
    """The tables with one and the same head at every early exit point, for each head that every point has."""
    points = {exit.exit_index for exit in tables.exits[:-1]}
    for head in dict.fromkeys(exit.head for exit in tables.exits[:-1]):
        kept = [h for h, exit in enumerate(tables.exits) if exit.head in (head, FINAL_HEAD)]
        if len(kept) == len(points) + 1:
            yield replace(
                tables,
                exits=tuple(tables.exits[h] for h in kept),
                intersection=tables.intersection[:, kept],
                predicted=tables.predicted[:, kept],
                image_confidence=tables.image_confidence[:, kept],
            )


def pick(points: Sequence[FrontPoint], drop_pp: float | None, miou: float, max_cost: float) -> tuple[Instance, bool]:
    """The most accurate point at ``max_cost`` at most, or the cheapest that loses ``drop_pp`` against ``miou`` at most;
    where there is none, the most accurate at any cost, and False."""
    if drop_pp is None:
        feasible = [point for point in points if point.cost <= max_cost]
        best = max(feasible, key=lambda point: (point.miou, -point.cost), default=None)
    else:
        feasible = [point for point in points if point.miou >= miou - drop_pp / 100]
        best = min(feasible, key=lambda point: (point.cost, -point.miou), default=None)
    return (best or max(points, key=lambda point: point.miou)).instance, best is not None


class Reported(NamedTuple):
    """On the images that were not selected on, against the original network on the same."""

    gain_pp: float
    reduction: float
    is_feasible: bool


class Trained(NamedTuple):
    """One seed's networks: tables of the same images, in the same order."""

    mess: ExitTables
    costs: CostTable
    baseline: ExitTables
    smaller: tuple[ExitTables, CostTable] | None


def one_selection(nets: Trained, selection: np.ndarray, reported: np.ndarray) -> dict[tuple[str, str], Reported]:
    """By kind of network and objective."""
    macs = nets.costs.total("macs")

    def final(tables: ExitTables, images: np.ndarray) -> float:
        return tables.subset(images).miou(np.full(len(images), tables.final))

    there, base = nets.mess.subset(reported), final(nets.baseline, reported)
    front = pareto_front(nets.mess.subset(selection), nets.costs)
    alike = [pareto_front(tables.subset(selection), nets.costs) for tables in uniform(nets.mess)]
    kinds = {
        "MESS": front.points,
        "best static cut": front.static,
        "uniform heads": [point for one in alike for point in one.points],
    }
    found = {}
    if nets.smaller:
        tables, costs = nets.smaller
        found["smaller network", ""] = Reported(
            100 * (final(tables, reported) - base), macs / costs.total("macs"), True
        )
    for kind, points in kinds.items():
        for name, drop in OBJECTIVES.items():
            instance, is_feasible = pick(points, drop, final(nets.baseline, selection), macs)
            miou = there.miou(route(there, instance))
            spent = float(cost_of(there, nets.costs, instance).mean())
            found[kind, name] = Reported(100 * (miou - base), macs / spent, is_feasible)
    return found


def instances(experiment: Experiment, variant: str, against: str, smaller: str | None, halvings: int) -> str:
    smaller = None if against == "own" else smaller
    found: dict[tuple[str, str], list[Reported]] = {}
    base = []
    for seed in experiment.seeds:
        run = experiment.trained(variant, seed)
        baseline = run.tables() if against == "own" else experiment.static(seed)[0]
        nets = Trained(run.tables(), run.costs(), baseline, experiment.static(seed, smaller) if smaller else None)
        for draw in range(halvings):
            halves = nets.mess.halves(draw)
            for selection, reported in (halves, halves[::-1]):
                base.append(100 * baseline.subset(reported).miou(np.full(len(reported), baseline.final)))
                for key, one in one_selection(nets, selection, reported).items():
                    found.setdefault(key, []).append(one)
    name = "network's own final exit" if against == "own" else "original network"
    rows = {f"{name}: {cell(base)} %": ["0", "1", ""]}
    for (kind, objective), ones in found.items():
        met = np.mean([one.is_feasible for one in ones])
        rows[f"{kind}{', ' if objective else ''}{objective}"] = [
            cell([one.gain_pp for one in ones], sign="+"),
            cell([one.reduction for one in ones], unit="x"),
            "" if met == 1 else f"{met:.0%}",
        ]
    columns = ["on the images not selected on", "mIoU, pp", "less work", "limit could be met in"]
    note = (
        f"Mean ± standard deviation over {len(base)} selections ({len(experiment.seeds)} seeds, {halvings} halvings, "
        f"both ways round; they overlap). Limits are against the {name}"
        + (". " if against == "own" else ", trained by the same schedule without exits. ")
        + "Where no instance met a limit, the most accurate one was taken."
        + (f" The smaller network is {named(smaller)}." if smaller else "")
    )
    return f"{markdown(columns, rows)}\n\n{note}"


def named(smaller: str) -> str:
    return smaller if smaller in MODELS else f"of width {smaller}"


def cost(experiment: Experiment, variant: str, smaller: str | None, num_points: int = 3) -> str:
    """Minutes of processor time, where the run recorded them, else of the clock."""

    def minutes(run: Run, *stages: str) -> float:
        entries = [run.directory.record().stages[stage] for stage in stages]
        return sum(float(entry.get("cpu_seconds", entry["seconds"])) for entry in entries) / 60

    rows: dict[str, list[float]] = {}
    for seed in experiment.seeds:
        mess = experiment.trained(variant, seed)
        advance(mess, "search")
        networks = (None, smaller) if smaller else (None,)
        for network in networks:
            experiment.static(seed, network)
        trained_first = experiment.opened(VARIANTS[variant].shares or variant, seed)  # ``mess`` may have adopted it
        stage1 = minutes(trained_first, "profile", "pretrain")
        stage2, search = minutes(mess, "distill"), minutes(mess, "evaluate", "search")
        original, *others = (
            minutes(experiment.opened("baseline", seed, network), "profile", "pretrain") for network in networks
        )
        figures = {
            "MESS, stage 1": stage1,
            "MESS, stage 2": stage2,
            "MESS, tables and search": search,
            "MESS, all operating points": stage1 + stage2 + search,
            "original network": original,
        }
        for network, one in zip(networks[1:], others, strict=True):
            figures[f"smaller network ({named(network)})"] = one
            together = f"original and {num_points} smaller networks, one for each operating point"
            figures[together] = original + num_points * one
        for name, value in figures.items():
            rows.setdefault(name, []).append(value)
    return markdown(["training", "minutes"], {name: [cell(values, 1)] for name, values in rows.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument(
        "tables", nargs="+", choices=("initialisations", "losses", "instances", "cost"), metavar="TABLE"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, help="by default runs/RECIPE-NAME")
    parser.add_argument("--mess", choices=VARIANTS, help="whose heads are searched; by default as the recipe trains")
    parser.add_argument("--against", choices=("original", "own"), default="original", help="what instances gain on")
    parser.add_argument("--smaller", help=f"static network: a width, a zoo model or none; by default {SMALLER}")
    parser.add_argument("--baseline-rate", type=float, help="learning rate of the networks without exits")
    parser.add_argument("--halvings", type=int, default=5)
    parser.add_argument("--set", nargs=argparse.REMAINDER, default=[], help="recipe values for all runs")
    options = parser.parse_args()
    quieten()
    folder = options.out or Path("runs") / options.recipe.stem
    rate = options.baseline_rate
    experiment = Experiment(
        recipe=options.recipe, folder=folder, seeds=options.seeds, overrides=options.set, baseline_rate=rate
    )
    make = {
        "initialisations": lambda: per_exit(experiment, INITIALISATIONS, "stage 1"),
        "losses": lambda: per_exit(experiment, LOSSES, "stage 2 loss"),
        "instances": lambda: instances(experiment, mess, options.against, smaller, options.halvings),
        "cost": lambda: cost(experiment, mess, smaller),
    }
    try:
        recipe = load_recipe(options.recipe, options.set)
        mess = options.mess or variant_of_recipe(recipe)
        smaller = options.smaller or SMALLER.get(recipe.model.name)
        smaller = None if smaller == "none" else smaller
        for name in options.tables:
            text = make[name]()
            print(f"\n{text}\n", flush=True)
            given = [options.mess] * bool(options.mess) + ["own"] * (options.against == "own")
            given += [f"rate{rate:g}"] if rate else []
            of = "".join(f"-{one}" for one in given) if name == "instances" else ""
            write_atomically(folder / f"{name}{of}.md", text + "\n")
    except MessError as error:
        raise SystemExit(f"reproduce: {error}") from None


if __name__ == "__main__":
    main()
