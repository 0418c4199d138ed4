"""``messnet profile``."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from rich.console import Console

from messnet.cli.app import (
    AsJson,
    Overrides,
    PrecisionOption,
    RuntimeOption,
    app,
    do_stage,
    examples,
    expect_picture,
    plain_name,
    quieten,
    save_figure,
    tell_of_translating,
)
from messnet.errors import MessError
from messnet.records.names import DTYPES, GRAPH_RUNTIMES

if TYPE_CHECKING:
    from messnet.run.measuring import Profile
    from messnet.run.recipe import Recipe

QUICK_SECONDS = 10.0  # for the parts, and as much again for whole instances
QUICK_TOLERANCE = 0.01


@app.command(
    help_epilogue=examples(
        "profile configs/demo.yaml",
        "profile runs/demo --measure --threads 2",
        "profile runs/demo --measure --runtime onnxruntime",
        "profile demo.mess --measure --out here.json",
        "profile demo.mess --measure --runtime onnxruntime --threads 2",
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
    device: Literal["cpu", "cuda", "mps", "xpu"] | None = None,
    precision: Annotated[PrecisionOption | None, Parameter(name=("--precision", "--dtype"))] = None,
    runtime: RuntimeOption | None = None,
    model: str | None = None,
    batch: int | None = None,
    threads: int | None = None,
    repeats: int | None = None,
    thorough: Annotated[bool, Parameter(negative="")] = False,
    name: str | None = None,
    plot: Path | None = None,
    out: Path | None = None,
    as_json: AsJson = False,
) -> None:
    """Convert the model, and say where it can exit, what every part costs and whether early exits can pay. For all
    of it torch is needed, for bundles of graphs too.

    Args:
        target: A recipe (YAML), a run's directory, a bundle, or a model: of the zoo, or module:function of your own.
        num_classes: Number of classes, for a model; by default 21.
        input_size: Height and width, for a model; by default 512 512.
        measure: Time every part here as well. A run keeps the table in RUN/costs, beside those of other devices.
        device: Where to measure; by default cpu. mps and xpu are untested.
        precision: The number format to measure in; by default f32. --dtype is the option's name in version 0.1.
        runtime: What computes, by default torch. A bundle needs graphs for onnxruntime and openvino (see export) and is
            measured in onnxruntime where torch cannot run it; graphs of all heads of a run are made first.
        model: module:function that builds the network of a bundle whose model is its maker's own. What a bundle names
            is not imported unless you name it here.
        batch: How many images are run at a time; by default 1.
        threads: Threads of the processor; by default torch's choice.
        repeats: The most rounds of measurement; by default 50, and fewer where they agree to 1 % or take 10 s.
        thorough: Measure 50 rounds or for two minutes, even where rounds agree sooner; and for a model every head of
            the space, not only a plain and a light one for each exit.
        name: Name of a run's measured table; by default made of device, dtype and batch.
        plot: Draw the cumulative cost and the chosen exit points into this file, PNG, SVG or PDF.
        out: Where the table of a model or a bundle goes, as JSON; for a recipe the run's directory, by default
            runs/NAME.
    """
    given: dict[str, str | int | None] = {
        "device": device,
        "precision": precision,
        "batch": batch,
        "threads": threads,
        "repeats": repeats,
    }
    how = {option: value for option, value in given.items() if value is not None}
    if thorough and repeats is not None:
        raise MessError("--thorough sets the rounds itself: leave --repeats out")
    if not measure and (how or name or thorough):
        how |= {"thorough": True} if thorough else {}
        raise MessError(f"--{next(iter(how), 'name')} is for measuring: add --measure")
    from messnet.deployment.bundle import is_bundle

    # A target that is no file may be a model of the zoo or module:function; what looks like a path is taken for one, so
    # that a recipe with a slip in its name is "no recipe", not "no model".
    bundled, named = is_bundle(target), Path(target).exists() or "/" in target or target.endswith((".yaml", ".yml"))
    is_model = not bundled and (":" in target or not named)
    if (is_model or bundled) and name:
        raise MessError(f"--name is for a table of a run; that of {target} is written with --out FILE.json")
    if runtime not in (None, "torch") and (is_model or not measure or (batch or 1) > 1):
        raise MessError(f"--runtime {runtime} measures a run or a bundle, one image at a time: RUN --measure")
    if runtime == "torch-compiled" and not bundled:
        raise MessError("--runtime torch-compiled measures a bundle; a run: torch, onnxruntime or openvino")
    if bundled:
        _expect_no_change(Path(target), overrides, out)
        if find_spec("torch") is None:
            raise MessError(
                "profile counts and measures with torch, in bundles of graphs too: pip install 'messnet[train]'; "
                "`predict` says how long the graphs take"
            )
    elif model is not None:
        raise MessError(f"--model names the function behind a bundle; {target} is none: leave it out")
    if not is_model and (num_classes is not None or input_size):
        raise MessError("--num-classes and --input-size are for a model; others have theirs from their data set")
    if input_size and min(input_size) < 1:
        raise MessError(f"--input-size is height and width, at least 1 each, not {input_size[0]} {input_size[1]}")
    if plot is not None:
        expect_picture(plot)
    quieten()
    tell_of_translating(runtime)
    from messnet.costs.latency import LatencyOptions
    from messnet.run.measuring import Profile, measure_run, profile_bundle, profile_model

    # Quick by default: rounds end when the median is known to 1 %, and a busy machine cannot hold the command for long.
    pace = {} if thorough else {"max_seconds": QUICK_SECONDS, "tolerance": QUICK_TOLERANCE}
    if precision is not None:
        how["dtype"] = DTYPES[precision]
        del how["precision"]
    latency = LatencyOptions(**how, **pace) if measure else None  # type: ignore[arg-type]
    use = ""
    if is_model:
        # To time every head of the space takes minutes, to time two an exit tells already whether an exit can pay. Who
        # names heads gets those.
        quick = measure and not thorough and not any(str(option).startswith("--heads.") for option in overrides)
        recipe = _recipe_of_model(target, overrides, few_heads=quick)
        classes = 21 if num_classes is None else num_classes
        found = profile_model(recipe.model, recipe.heads, classes, input_size or (512, 512), latency)
    elif bundled:
        found = profile_bundle(Path(target), latency, runtime, model=model)
    else:
        opened = do_stage("profile", Path(target), overrides, out, quiet=as_json)
        costs = opened.costs()
        if latency:
            table = plain_name(name or (f"{runtime}-{latency.name}" if runtime in GRAPH_RUNTIMES else latency.name))
            costs = measure_run(opened, latency, table, runtime or "torch")
            use = (
                f"once trained, search on this table: messnet search {opened.directory.path} --name fast --minimise "
                f"latency_ms --max-drop-pp 1 --costs {opened.directory.measured(table).path}"
            )
        found = Profile.of(opened.network(), costs)
    costs = found.costs
    # For a recipe --out is the run directory, and the table is in it.
    if out is not None and (is_model or bundled):
        costs.to_json(out)
    if plot is not None:
        _plot_cuts(found, plot)
    if as_json:
        print(costs.to_json(), end="")
        return
    from messnet.report.costs import cost_notes, cost_table

    console = Console()
    console.print(cost_table(costs, [(p.module, f"{p.channels} at 1/{p.output_stride}") for p in found.exit_points]))
    for note in (*found.notes, *cost_notes(costs)):
        console.print(note, markup=False, highlight=False)
    if use:  # a command stays on one line, to be copied
        print(use)


def _plot_cuts(found: Profile, path: Path) -> None:
    """Milliseconds of every cut where exits were placed by them, of the exit points where those were measured."""
    from messnet.report.figures import draw_cumulative_cost

    points, places, unit = found.exit_points, found.cuts, "GMACs"
    values = [cut.macs / 1e9 for cut in places]
    if all(cut.latency_ms is not None for cut in places):
        values, unit = [cut.latency_ms or 0.0 for cut in places], "ms"
    elif found.costs.conditions:
        column, places = found.costs.column("latency_ms", []), points
        values, unit = [column.prefix(i) for i in range(len(places))], "ms"
    chosen = [places.index(point) for point in points[:-1]]
    figure = draw_cumulative_cost([place.module for place in places], values, chosen, unit=unit)
    save_figure(figure, path, dpi=figure.dpi)


def _expect_no_change(bundle: Path, overrides: Sequence[object], out: Path | None) -> None:
    if overrides:
        raise MessError(f"the bundle {bundle} has one network with fixed exits, {overrides[0]} cannot change it")
    if out is not None and bundle.resolve() in (out.resolve(), *out.resolve().parents):
        raise MessError(f"--out {out} lies inside the bundle, which stays as it is: write the table elsewhere")


def _recipe_of_model(name: str, overrides: Sequence[str], *, few_heads: bool) -> Recipe:
    from messnet.run.recipe import recipe_from_record

    record: dict[str, object] = {"model": {"name": name}}
    if few_heads:
        record["heads"] = {
            "channel_reduction": [1, 8],
            "extra_blocks": [0],
            "rapid_dilation": [False],
            "segmentation_head": ["fcn"],
        }
    return recipe_from_record(record, overrides)
