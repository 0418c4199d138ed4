"""The command: one verb per stage. Bad input ends in one line and exit code 2; heavy imports wait inside the verbs."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console

from messnet import __version__
from messnet.errors import MessError
from messnet.tables import CostName

__all__ = ["app", "main"]


def _examples(*commands: str) -> str:
    """For the end of a help page. (cyclopts leaves an "Examples" section of a docstring out.)"""
    return "**Examples**\n\n" + "\n".join(f"    messnet {command}" for command in commands)


app = App(
    name="messnet",
    version=__version__,
    help="Turn a semantic segmentation model into a multi-exit one and deploy it on the device at hand.",
    help_epilogue=_examples(
        "run configs/demo.yaml",
        "run configs/camvid_mobilenetv2.yaml --data.root ../shared/camvid --out runs/camvid",
        "predict runs/camvid photos/ --out predictions",
    ),
    help_format="markdown",
)

Target = Annotated[Path, Parameter(help="A recipe (YAML), or the directory of a run, which remembers its recipe.")]
Out = Annotated[Path | None, Parameter(help="Run directory; by default runs/NAME of the recipe.")]
AsJson = Annotated[bool, Parameter(name="--json", negative="", help="Print the result as JSON.")]
Overrides = Annotated[
    str, Parameter(allow_leading_hyphen=True, help="Recipe values over the file's: --pretrain.iterations 500 ...")
]


def main(tokens: Sequence[str] | None = None) -> None:
    """Runs the command; exits with 0, 1 (a bug, with its traceback), 2 (bad input, one line) or 130 (interrupted)."""
    try:
        app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except (MessError, CycloptsError) as error:
        print(f"messnet: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("messnet: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None


@app.command(
    help_epilogue=_examples(
        "run configs/demo.yaml",
        "run configs/camvid_mobilenetv2.yaml --data.root ../shared/camvid --out runs/camvid",
        "run runs/camvid",
    )
)
def run(target: Target, *overrides: Overrides, out: Out = None, as_json: AsJson = False) -> None:
    """Do all of it, from where it stopped: profile, pretrain, distill, evaluate, search, report."""
    opened = _open(target, overrides, out)
    from messnet.pipeline import STAGES, run_stage

    for stage in STAGES:
        _say(stage, run_stage(opened, stage), as_json)
    _print_table(opened.directory.path, as_json)


@app.command(
    help_epilogue=_examples(
        "profile configs/demo.yaml",
        "profile runs/demo --measure --threads 2",
        "profile demo.mess --measure --out here.json",
        "profile mobilenetv2_fcn --input-size 512 512 --measure --plot cuts.png --out costs.json",
        "profile my_module:my_function --num-classes 19 --model.num_exits 4 --model.exit_cost latency",
    )
)
def profile(
    target: str,
    *overrides: Overrides,
    num_classes: int | None = None,
    input_size: tuple[int, int] | None = None,
    measure: Annotated[bool, Parameter(negative="")] = False,
    device: Literal["cpu", "cuda"] | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    batch: int | None = None,
    threads: int | None = None,
    name: str | None = None,
    plot: Path | None = None,
    out: Path | None = None,
    as_json: AsJson = False,
) -> None:
    """Convert the model: candidate exit points, what every part costs, and whether early exits can pay.

    Args:
        target: A recipe (YAML), a run's directory, a bundle, or a model: of the zoo, or module:function of your own.
        num_classes: Of a model; by default 21.
        input_size: Height and width, for a model; by default 512 512.
        measure: Time every part here as well. A run keeps the table in RUN/costs, beside those of other devices.
        device: To measure on; by default cpu.
        dtype: To measure in; by default float32.
        batch: Images at a time; by default 1.
        threads: Of the processor; by default torch's choice.
        name: Of a run's measured table; by default it says device, dtype and batch.
        plot: Draw the cumulative cost and the chosen exit points, as PNG, SVG or PDF.
        out: A model's or bundle's table as JSON; for a recipe its run directory, by default runs/NAME.
    """
    how = {"device": device, "dtype": dtype, "batch": batch, "threads": threads}
    how = {option: value for option, value in how.items() if value is not None}
    if not measure and (how or name):
        raise MessError(f"--{next(iter(how), 'name')} is for measuring: add --measure")
    from messnet.deployment.bundle import is_bundle

    bundled, named = is_bundle(target), Path(target).exists() or "/" in target or target.endswith((".yaml", ".yml"))
    is_model = not bundled and (":" in target or not named)
    if (is_model or bundled) and name:
        raise MessError(f"--name is for a table of a run; that of {target} is written with --out FILE.json")
    if bundled:
        _expect_no_change(Path(target), overrides, out)
    if not is_model and (num_classes or input_size):
        raise MessError("--num-classes and --input-size are for a model; others have theirs from their data set")
    _quieten()
    from messnet.latency import LatencyOptions
    from messnet.pipeline import measure_run, profile_bundle, profile_model

    latency = LatencyOptions(**how) if measure else None  # type: ignore[arg-type]
    if is_model:
        recipe = _recipe_of_model(target, overrides)
        net, costs = profile_model(recipe.model, recipe.heads, num_classes or 21, input_size or (512, 512), latency)
    elif bundled:
        net, costs = profile_bundle(Path(target), latency)
    else:
        opened = _stage("profile", Path(target), overrides, out, quiet=as_json)
        costs = measure_run(opened, latency, _plain_name(name or latency.name)) if latency else opened.costs()
        net = opened.blueprint().build()
    if out is not None and (is_model or bundled):
        costs.to_json(out)
    if plot is not None:
        _plot_cuts(net, plot)
    if as_json:
        print(costs.to_json(), end="")
        return
    from messnet.cost_report import cost_notes, cost_table

    console = Console()
    console.print(cost_table(costs, [(p.module, f"{p.channels} at 1/{p.output_stride}") for p in net.exit_points]))
    for note in (*net.notes, *cost_notes(costs)):
        console.print(note, markup=False, highlight=False)


@app.command(
    help_epilogue=_examples(
        "pretrain runs/demo", "pretrain configs/demo.yaml --pretrain.iterations 2000 --out runs/longer"
    )
)
def pretrain(target: Target, *overrides: Overrides, out: Out = None) -> None:
    """Stage 1: exit-aware pre-training of the backbone and the final head."""
    _stage("pretrain", target, overrides, out)


@app.command(help_epilogue=_examples("distill runs/demo"))
def distill(target: Target, *overrides: Overrides, out: Out = None) -> None:
    """Stage 2: train every head of the space on the frozen backbone, by positive filtering distillation."""
    _stage("distill", target, overrides, out)


@app.command(help_epilogue=_examples("evaluate runs/demo", "evaluate runs/demo --json"))
def evaluate(target: Target, *overrides: Overrides, out: Out = None, as_json: AsJson = False) -> None:
    """Tabulate what every exit does to every validation image, and print each exit's mIoU."""
    opened = _stage("evaluate", target, overrides, out, quiet=as_json)
    from messnet.report import exit_rows, exits_table

    tables, costs = opened.tables(), opened.costs()
    if as_json:
        print(json.dumps(exit_rows(tables, costs), indent=1))
    else:
        Console().print(exits_table(tables, costs))


@app.command(
    help_epilogue=_examples(
        "search runs/demo",
        "search runs/demo --name half --maximise miou --max-cost-ratio 0.5",
        "search runs/demo --name fast --minimise latency_ms --max-drop-pp 1 --costs runs/demo/costs/NAME.json",
        "search runs/demo --name cut --setting budgeted --max-drop-pp 2",
        "search runs/demo --name safe --max-drop-pp 1 --guarantee 0.05 0.1",
    )
)
def search(
    target: Target,
    *overrides: Overrides,
    name: Annotated[str | None, Parameter(help="Search once more, for this objective; the instance's name.")] = None,
    setting: Literal["budgeted", "input_dependent"] = "input_dependent",
    minimise: CostName | None = None,
    maximise: Literal["miou"] | None = None,
    cost: Annotated[CostName | None, Parameter(help="What is constrained when mIoU is maximised; macs.")] = None,
    max_drop_pp: float | None = None,
    min_miou: float | None = None,
    max_cost: float | None = None,
    max_cost_ratio: float | None = None,
    guarantee: Annotated[
        tuple[float, float] | None,
        Parameter(help="EPSILON DELTA: expected loss <= EPSILON, certified on the other images, wrong at most DELTA."),
    ] = None,
    costs: Annotated[
        Path | None,
        Parameter(help="A table of `profile --measure`; by default the run's profile.json, without latency."),
    ] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Choose exits, heads and thresholds; nothing is trained again.

    Without --name: the recipe's instances (most accurate at <= 1x, cheapest at each allowed drop). With --name: one
    instance for the objective given, beside the others in RUN/instances. With --guarantee its image thresholds then
    retreat until the promise holds: the share of correct pixels that an image loses, expected, against the final exit.
    """
    asked = (minimise, maximise, cost, max_drop_pp, min_miou, max_cost, max_cost_ratio, guarantee, costs)
    if name is None and (any(value is not None for value in asked) or setting != "input_dependent"):
        raise MessError("an objective of your own needs a name for its instance: add --name NAME")
    if name is not None:
        _plain_name(name)
    opened = _open(target, overrides, out)
    from messnet.deployment.loading import INSTANCES, load_instance
    from messnet.pipeline import run_stage, search_run
    from messnet.search import Guarantee, Objective

    if name is None:
        run_stage(opened, "search", again=True)
        front = json.loads((opened.directory.path / "front.json").read_text())
        names = [n for n in front["names"] if (opened.directory.path / INSTANCES / f"{n}.json").exists()]
        instances = [load_instance(opened.directory.path, n) for n in names]
        words = front["verdicts"] + front["skipped"]
    else:
        objective = Objective(
            minimise=minimise,
            maximise=maximise,
            cost=cost or "macs",
            max_drop_pp=max_drop_pp,
            min_miou=min_miou,
            max_cost=max_cost,
            max_cost_ratio=max_cost_ratio,
        )
        promise = Guarantee(epsilon=guarantee[0], delta=guarantee[1]) if guarantee else None
        result = search_run(opened, objective, name=name, setting=setting, costs=costs, guarantee=promise)
        instances, words = [result.instance], [result.verdict, result.certificate]
    if as_json:
        print(json.dumps([json.loads(instance.to_json()) for instance in instances], indent=1))
        return
    for instance in instances:
        print(f"{instance.name}: {instance.objective}; on the selection images {_figures(instance.selected_on)}")
        for choice in instance.exits:
            rule = (
                f"stop if {choice.image_threshold:.1%} of the pixels have confidence >= {choice.pixel_threshold:g}"
                if choice.image_threshold is not None
                else "last"
            )
            print(f"  exit {choice.exit_index}  {choice.head:28} {rule}")
    print("\n".join(words))


@app.command(
    help_epilogue=_examples(
        "export runs/demo --out demo.mess",
        "export runs/demo --instance max-miou --out demo.zip",
        "export runs/demo --device-table runs/demo/costs/NAME.json --out demo.mess",
    )
)
def export(
    run_directory: Path,
    *,
    instance: str | None = None,
    out: Path | None = None,
    device_table: Annotated[list[Path] | None, Parameter(consume_multiple=True, negative="")] = None,
    as_json: AsJson = False,
) -> None:
    """Write an instance as a bundle: all that it needs, and nothing else, for `predict` and `profile` anywhere.

    A bundle holds the backbone as far as the instance goes, its heads and thresholds, class names and palette, cost
    tables, and the SHA-256 of every file; nothing in it is code.

    Args:
        run_directory: A finished run.
        instance: One of the run's instances; by default the cheapest within 1 pp.
        out: A new folder, or a zip if it ends in .zip; by default RUN-INSTANCE.mess.
        device_table: Tables of `profile --measure` that go with it; by default all in RUN/costs.
    """
    _quieten()
    from messnet.deployment.export import export as export_bundle

    bundle = export_bundle(run_directory, out, instance=instance, tables=device_table)
    files = {name: stored.bytes for name, stored in bundle.manifest.files.items()}
    if as_json:
        print(
            json.dumps(
                {"bundle": str(bundle.path), "instance": bundle.manifest.instance.name, "files": files}, indent=1
            )
        )
        return
    print(
        f"{bundle.manifest.instance.name} in {bundle.path}: {sum(files.values()) / 2**20:.1f} MiB, {', '.join(files)}"
    )


@app.command(
    help_epilogue=_examples(
        "predict runs/demo photo.jpg",
        "predict demo.mess photo.jpg",
        "predict runs/camvid ../shared/camvid/val/images --instance drop-0.1pp --out predictions",
    )
)
def predict(
    target: Path,
    *images: Path,
    out: Path = Path("predictions"),
    instance: str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    as_json: AsJson = False,
) -> None:
    """Segment images, or all images of folders, each stopping at the first exit that is confident.

    Writes OUT/masks (class indices, PNG), OUT/overlays, OUT/confidence (0 to 255 for 0 to 1, PNG) and
    OUT/predictions.json (exit taken, image confidence, latency).

    Args:
        target: A finished run, or a bundle.
        images: Image files and folders.
        out: Where to write.
        instance: One of the run's instances; by default the cheapest within 1 pp. A bundle has but one.
        device: Where to compute.
    """
    from messnet.deployment.predictions import predict_files

    records = predict_files(target, images, out, instance=instance, device=device)
    if as_json:
        print(json.dumps(records, indent=1))
        return
    taken = sorted({record["exit_index"] for record in records})
    shares = ", ".join(f"exit {e}: {sum(r['exit_index'] == e for r in records)}" for e in taken)
    print(f"{len(records)} images ({shares}) in {out}/")


@app.command(help_epilogue=_examples("report runs/demo", "report runs/demo --markdown table.md"))
def report(
    target: Target,
    *overrides: Overrides,
    out: Out = None,
    markdown: Annotated[Path | None, Parameter(help="Write the table as Markdown too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the chosen instances on the reported half of the images and write RUN/report.html."""
    opened = _open(target, overrides, out)
    from messnet.pipeline import run_stage

    run_stage(opened, "report", again=True)
    if markdown is not None:
        from messnet.files import write_atomically
        from messnet.measurements import Measurements
        from messnet.report import measurements_markdown

        measurements = Measurements.from_json((opened.directory.path / "measurements.json").read_text())
        write_atomically(markdown, measurements_markdown(measurements))
    _print_table(opened.directory.path, as_json)


@app.command(
    name="check-data",
    help_epilogue=_examples("check-data configs/camvid_mobilenetv2.yaml --data.root ../shared/camvid"),
)
def check_data(target: Target, *overrides: Overrides, as_json: AsJson = False) -> None:
    """Read every image and mask of a recipe's data set and say what is in them and what is wrong."""
    from functools import partial

    from tqdm import tqdm

    from messnet.data.checks import check_dataset
    from messnet.data.sources import open_dataset

    recipe = _recipe(target, overrides)
    reports = {}
    for split in ("train", "val"):
        dataset = open_dataset(recipe.data, split)
        reports[split] = check_dataset(dataset, progress=partial(tqdm, desc=f"check {split}", unit="img"))
    if as_json:
        print(json.dumps({split: found.to_record() for split, found in reports.items()}, indent=1))
    else:
        for split, found in reports.items():
            print(f"{split}\n{found.to_text()}\n")
    problems = sum(len(found.problems) for found in reports.values())
    if problems:
        raise MessError(f"the data set has {problems} problems, listed above")


@app.command(help_epilogue=_examples("recipe configs/demo.yaml", "recipe runs/demo --json"))
def recipe(target: Target, *overrides: Overrides, as_json: AsJson = False) -> None:
    """Print a recipe with every key it has, defaults and overrides included."""
    from messnet.config import recipe_to_record

    record = recipe_to_record(_recipe(target, overrides))
    if as_json:
        print(json.dumps(record, indent=1))
        return
    import yaml

    print(yaml.safe_dump(record, sort_keys=False), end="")


def _plot_cuts(net: Any, path: Path) -> None:
    from messnet.report_figures import draw_cumulative_cost

    cuts, timed = net.cuts, all(cut.latency_ms is not None for cut in net.cuts)
    figure = draw_cumulative_cost(
        [cut.module for cut in cuts],
        [cut.latency_ms if timed else cut.macs / 1e9 for cut in cuts],
        [cuts.index(point) for point in net.exit_points[:-1]],
        unit="ms" if timed else "GMACs",
    )
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise MessError(f"cannot write the plot: {error}") from error


def _expect_no_change(bundle: Path, overrides: Sequence[object], out: Path | None) -> None:
    if overrides:
        raise MessError(f"the bundle {bundle} has one network with fixed exits, {overrides[0]} cannot change it")
    if out is not None and bundle.resolve() in (out.resolve(), *out.resolve().parents):
        raise MessError(f"--out {out} lies inside the bundle, which stays as it is: write the table elsewhere")


def _open(target: Path, overrides: Sequence[str], out: Path | None) -> Any:
    _quieten()
    from messnet.pipeline import open_run

    return open_run(target, overrides, out=out)


def _recipe(target: Path, overrides: Sequence[str]) -> Any:
    from messnet.config import load_recipe, recipe_from_record
    from messnet.runs import RunDirectory

    if target.is_dir():
        return recipe_from_record(RunDirectory(target).record()["recipe"], overrides)
    return load_recipe(target, overrides)


def _recipe_of_model(name: str, overrides: Sequence[str]) -> Any:
    from messnet.config import recipe_from_record

    return recipe_from_record({"model": {"name": name}}, overrides)


def _stage(stage: str, target: Path, overrides: Sequence[str], out: Path | None, *, quiet: bool = False) -> Any:
    opened = _open(target, overrides, out)
    from messnet.pipeline import run_stage

    _say(stage, run_stage(opened, stage), quiet)
    return opened


def _say(stage: str, did: bool, quiet: bool) -> None:
    if not quiet:
        print(f"{stage}: {'done' if did else 'already done'}")


def _print_table(path: Path, as_json: bool) -> None:
    from messnet.measurements import Measurements
    from messnet.report import headline, terminal_table

    text = (path / "measurements.json").read_text()
    if as_json:
        print(text, end="")
        return
    measurements = Measurements.from_json(text)
    console = Console()
    console.print(terminal_table(measurements))
    console.print(headline(measurements))
    print(f"report: {path / 'report.html'}")


def _plain_name(name: str) -> str:
    if not name or Path(name).name != name:
        raise MessError(f"--name must be a plain file name, got {name!r}")
    return name


def _figures(selected_on: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in selected_on.items())


def _quieten() -> None:
    """Libraries' advice to developers is no news to the user of a command."""
    warnings.filterwarnings("ignore", module="lightning.*")
