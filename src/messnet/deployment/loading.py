"""What is deployed, a run's instance or a bundle, as a Session. A bundle with graphs opens without torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from messnet.deployment.bundle import Bundle, is_bundle, open_bundle
from messnet.deployment.graph_runner import OUTPUT, GraphRunner, graphs_for, stage_name
from messnet.deployment.runner import Runner
from messnet.deployment.session import Session
from messnet.errors import RecipeError, RunError, needing_extras
from messnet.policy.policy import Policy
from messnet.records.costs import CostTable
from messnet.records.instance import Instance
from messnet.records.names import GRAPH_RUNTIMES, GraphRuntime, LabelSize, Precision, RuntimeName, expect_runtime
from messnet.records.run_directory import RunDirectory

if TYPE_CHECKING:
    from messnet.network.multi_exit import MultiExitNet

# Of a bundle: the folder of its cost tables, and the one that was counted rather than measured.
COSTS = "costs"
WORKLOAD = f"{COSTS}/workload.json"


def load(
    path: str | Path,
    *,
    instance: str | Instance | None = None,
    device: str = "cpu",
    runtime: RuntimeName | None = None,
    precision: Precision | None = None,
    threads: int | None = None,
    model: str | None = None,
    full_size: bool = True,
    labels: LabelSize = "input",
) -> Session:
    """A session for an instance of the run, or for the bundle (a folder or a zip), at ``path``.

    ``instance`` is the name of one in the run or one of your own over the run's heads; None: the cheapest within 1 pp
    (``"drop-1pp"``), or the only one. A bundle has but one; one of your own may use its exits. ``device`` is what torch
    calls it ("cpu", "cuda:1"), or "auto" for CUDA where there is any.

    "onnxruntime" and "openvino" run the graphs of a bundle that was exported for them; for a run they are made anew,
    which takes seconds an exit. ``runtime`` None is torch; for a bundle with graphs it is ONNX Runtime where torch is
    not installed, the bundle holds no weights for it, or only your ``model`` could say how the network is built, and
    where int8 is asked for. ``precision`` is that of weights and activations; "bf16" and "f16" where the runtime has
    them, "int8" of a bundle that was exported with it; None is f32, or what the bundle's instance was searched in, or
    the only one that the bundle has graphs in. ``threads`` of the processor; None: as many as torch is set to, which
    without torch is one for each core. The session's ``costs`` are the run's or bundle's table that was measured on
    this device, in this runtime, with so many threads.

    ``model`` names the function that builds the network of a bundle whose model is not of the zoo, "module:function":
    nothing is imported only because a bundle names it. Graphs need no such function.

    Unless at ``full_size`` the network sees images of more than twice the pixels of those that it was trained on scaled
    down to that many; a recipe's ``data.resize`` is followed either way. Results have the image's own size.

    ``labels`` "logits" are made at the resolution of the logits, a stride coarser than the image, and not upsampled.

    Raises RunError when something is missing, damaged or newer, ModelError when the network cannot be built here,
    MessError that names the extra to install when a runtime is not installed, RecipeError for a device, runtime or
    precision that there is not, or fewer than 1 thread.
    """
    path, device = Path(path), str(device)
    if threads is not None and threads < 1:
        raise RecipeError(f"a network runs on at least 1 thread, not {threads}")
    if is_bundle(path):
        bundle = open_bundle(path)
        how = _How(device, *_defaults(bundle, runtime, precision, model), threads)
        return _load_bundle(bundle, instance, how, model, full_size, labels)
    if model is not None:
        raise RecipeError(f"a run remembers how its model is built: leave model={model!r} out for {path}")
    if RunDirectory(path).exists:
        chosen = instance if isinstance(instance, Instance) else RunDirectory(path).read_instance(instance)
        precision = precision or chosen.precision
        runs_in = runtime or ("onnxruntime" if precision == "int8" else "torch")
        return _load_run(path, chosen, _How(device, runs_in, precision, threads), full_size, labels)
    if not path.exists():
        raise RunError(f"there is no {path}: expected the directory of a run, or a bundle")
    raise RunError(
        f"{path} is no run directory (no run.json) and no bundle (no manifest.json, no zip); start a run with "
        f"`messnet run RECIPE`, make a bundle of it with `messnet export RUN`"
    )


def default_runtime(bundle: Bundle, model: str | None = None) -> RuntimeName:
    """torch, unless the bundle has graphs and torch cannot run it: it is not installed, has no weights, or does not
    know how the network is built, as the user names no ``model``."""
    runtimes = bundle.manifest.runtimes
    unknown = ":" in bundle.manifest.network.model and model is None
    if _graph_sets(bundle) and ("torch" not in runtimes or unknown or find_spec("torch") is None):
        return "onnxruntime"
    return "torch"


def _defaults(
    bundle: Bundle, runtime: RuntimeName | None, precision: Precision | None, model: str | None
) -> tuple[RuntimeName, Precision]:
    sets, own = _graph_sets(bundle), bundle.manifest.instance.precision
    wants_int8 = precision == "int8" or (precision is None and own == "int8" and graphs_for(own) in sets)
    if runtime is None:
        runtime = "onnxruntime" if wants_int8 else default_runtime(bundle, model)
    if precision is None and runtime in GRAPH_RUNTIMES and (wants_int8 or sets == {graphs_for("int8")}):
        precision = "int8"
    return runtime, precision or "f32"


def _graph_sets(bundle: Bundle) -> set[str]:
    """Which graphs the bundle holds, by what its manifest calls them."""
    return {graphs_for("f32"), graphs_for("int8")} & bundle.manifest.runtimes.keys()


@dataclass(frozen=True)
class _How:
    device: str
    runtime: RuntimeName
    precision: Precision
    threads: int | None

    def __post_init__(self) -> None:
        expect_runtime(self.runtime, self.precision)
        if self.graph_runtime and self.device not in ("cpu", "auto"):
            raise RecipeError(
                f"{self.runtime} runs on the processor here: leave device={self.device!r} out, or use torch"
            )

    @property
    def graph_runtime(self) -> GraphRuntime | None:
        return self.runtime if self.runtime in GRAPH_RUNTIMES else None

    def by_torch(self, net: MultiExitNet, instance: Instance) -> Runner:
        from messnet.deployment.torch_runner import TorchRunner

        return TorchRunner(
            net,
            Policy.parse(instance.policy),
            device=self.device,
            precision=self.precision,
            threads=self.threads,
            compiled=self.runtime == "torch-compiled",
        )


def _load_bundle(
    bundle: Bundle,
    instance: str | Instance | None,
    how: _How,
    model: str | None,
    full_size: bool,
    labels: LabelSize,
) -> Session:
    manifest = bundle.manifest
    runner: Runner
    if how.graph_runtime:
        chosen = bundle.choose(instance)
        runner = _bundled_graphs(bundle, how.graph_runtime, how)
    else:
        _ = bundle.weights  # what the bundle lacks is told before what is not installed
        with needing_extras():
            from messnet.deployment.restoring import restore_bundle

            _, net, chosen = restore_bundle(bundle, instance, model=model)
            runner = how.by_torch(net, chosen)
    # In order, so that of two tables that fit it is always the same one.
    tables = {name: bundle.read(name) for name in sorted(manifest.files) if name.startswith(f"{COSTS}/")}
    return Session(
        runner,
        chosen,
        class_names=manifest.class_names,
        palette=np.array(manifest.palette, np.uint8),
        costs=_measured_costs(tables.values(), runner, chosen),
        input_size=manifest.preprocessing.input_size,
        resize=manifest.preprocessing.resize,
        full_size=full_size,
        workload=_table(tables.get(WORKLOAD, b""), chosen),
        labels=labels,
        source=bundle.path,
    )


def _load_run(path: Path, chosen: Instance, how: _How, full_size: bool, labels: LabelSize) -> Session:
    if how.precision == "int8":
        raise RunError(
            f"{path} has no graphs in int8, which training images calibrate: make a bundle of {chosen.name} with "
            f"`messnet export {path} --instance {chosen.name} --runtime onnxruntime --precision int8`"
        )
    with needing_extras():
        from messnet.deployment.restoring import graph_runner, restore_run

        blueprint, net, chosen = restore_run(path, chosen)
        runner: Runner
        if how.graph_runtime:
            runner = graph_runner(
                net,
                chosen,
                blueprint.input_size,
                runtime=how.graph_runtime,
                precision=how.precision,
                threads=how.threads,
            )
        else:
            runner = how.by_torch(net, chosen)
    run = RunDirectory(path)
    return Session(
        runner,
        chosen,
        class_names=blueprint.class_names,
        palette=np.array(blueprint.palette, np.uint8),
        costs=_measured_costs((file.path.read_bytes() for file in run.all_measured()), runner, chosen),
        input_size=blueprint.input_size,
        resize=blueprint.resize,
        full_size=full_size,
        workload=_table(run.profile.path.read_bytes(), chosen) if run.profile.exists else None,
        labels=labels,
        source=path,
    )


def _bundled_graphs(bundle: Bundle, runtime: GraphRuntime, how: _How) -> GraphRunner:
    """Raises RunError for a bundle without graphs."""
    manifest, kind = bundle.manifest, graphs_for(how.precision)
    if kind not in manifest.runtimes:
        source = bundle.path if "torch" in manifest.runtimes else "RUN"
        eight_bits = how.precision == "int8"
        raise RunError(
            f"{bundle.path} holds no graphs for {runtime}{' in int8' if eight_bits else ''}; it is for "
            f"{', '.join(manifest.runtimes) or 'no runtime'}: make one with `messnet export {source} --runtime "
            f"onnxruntime{' --precision int8' if eight_bits else ''}`"
        )
    stored, choices = manifest.runtimes[kind], manifest.instance.exits
    missing = {*map(stage_name, range(len(choices))), OUTPUT} - stored.files.keys()
    if missing:
        raise RunError(f"{bundle.path} holds no graph {min(missing)}; export the bundle again")
    return GraphRunner(
        {name: bundle.read(file) for name, file in stored.files.items() if name != OUTPUT},
        choices,
        [point.output_stride for point in manifest.network.exit_points],
        runtime=runtime,
        precision=how.precision,
        threads=how.threads,
        size_multiple=int(stored.checked.get("size_multiple", 1)),
        policy=Policy.parse(manifest.instance.policy),
        normalisation=manifest.preprocessing.normalisation,
    )


def _measured_costs(files: Iterable[bytes], runner: Runner, instance: Instance) -> CostTable | None:
    """The table, if there is a readable one, that was measured one image at a time as ``runner`` runs."""
    here = {**runner.conditions, "batch": 1, "runtime": _kind(runner.conditions["runtime"])}
    for file in files:
        table = _table(file, instance)
        if table is None:
            continue
        there = {**table.conditions, "runtime": _kind(table.conditions.get("runtime", ""))}
        if there == here:
            return table
    return None


def _table(file: bytes, instance: Instance) -> CostTable | None:
    """None for a table of another schema or other exits: it foretells nothing, and what is deployed runs without."""
    try:
        table = CostTable.from_json(file.decode(errors="replace"))
    except RunError:
        return None
    return table if table.heads.keys() >= {choice.exit for choice in instance.exits} else None


def _kind(runtime: str | int) -> list[str]:
    """Of a runtime's name all but its version: "torch 2.15.0 eager"."""
    words = str(runtime).split()  # the second is the version: another one is slower or faster by a few per cent
    return [words[0], *words[2:]] if words else []
