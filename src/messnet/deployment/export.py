"""From a run, or a bundle, to a bundle: what one instance needs, and nothing else."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import safetensors.torch
from numpy.typing import NDArray

from messnet import __version__
from messnet.costs.workload import copy_module
from messnet.deployment.bundle import (
    Bundle,
    Manifest,
    Network,
    Preprocessing,
    Runtime,
    is_bundle,
    open_bundle,
    write_bundle,
)
from messnet.deployment.graph_runner import OUTPUT, Graph, GraphRunner, graphs_for, load_graph
from messnet.deployment.graphs import MadeStages, make_graphs
from messnet.deployment.loading import COSTS, WORKLOAD, default_runtime
from messnet.deployment.quantising import METHOD, EightBits, check_quantised, quantise
from messnet.deployment.restoring import expect_finite, restore_bundle, restore_run
from messnet.deployment.runner import Runner
from messnet.deployment.session import Session
from messnet.deployment.torch_runner import TorchRunner, size_multiple
from messnet.errors import ModelError, RecipeError, RunError
from messnet.images.colours import default_palette
from messnet.images.inputs import as_image
from messnet.images.preprocessing import resize
from messnet.network.blueprint import Blueprint
from messnet.network.multi_exit import MultiExitNet
from messnet.policy.policy import Policy
from messnet.profiling import profile
from messnet.records.codec import from_plain
from messnet.records.costs import CostTable
from messnet.records.instance import Exit, Instance
from messnet.records.names import GRAPH_RUNTIMES, LabelSize, Precision
from messnet.records.run_directory import RunDirectory

_WEIGHTS = "weights.safetensors"
# The model of a session, which nobody can build again by a name.
_UNNAMED = "session:model"
# Of the largest logit: graphs add in another order.
_TOLERANCE = 1e-3


def export(
    source: str | Path | Session,
    out: str | Path | None = None,
    *,
    instance: str | None = None,
    tables: Sequence[Path] | None = None,
    graphs: bool | None = None,
    eight_bits: EightBits | None = None,
    weights: bool | None = None,
    images: Sequence[NDArray[np.uint8]] | None = None,
    static: tuple[int, int] | None = None,
    labels: LabelSize = "input",
    model: str | None = None,
    made: MadeStages | None = None,
) -> Bundle:
    """Writes an instance of the run or bundle at the path ``source``, or a session in torch, as a bundle: a folder, or
    a zip where ``out`` ends in .zip; by default RUN-INSTANCE.mess.

    ``instance`` and ``model`` as for ``load``; a bundle and a session have but one instance. The measured cost
    ``tables`` go with it, by default all there are. ``weights`` for torch, by default of paths; ``graphs`` in ONNX for
    other runtimes, by default of sessions, whose weights are of use only where ``model`` names the function that builds
    the network, "module:function". Graphs are checked against torch on ``images``, (H, W, 3) uint8 RGB, generated ones
    where None are given. ``eight_bits`` asks for graphs in int8, alone or beside the others, and says how they are made
    and what they may lose; graphs for one image of the size ``static``, (height, width), take no other. ``made`` is
    what ``make_graphs`` has made of the same network already. The graph of ``labels`` makes them at the image's size,
    or at that of the "logits".

    Raises RunError when something is missing or does not fit, or ``out`` exists; ModelError for a model that cannot be
    cut, or graphs that cannot be made, disagree, or lose more than they may.
    """
    if not isinstance(source, str | Path | Session):
        raise RecipeError(
            f"export takes the path of a run or bundle, or a messnet.Session, not a {type(source).__name__}: of a "
            "network make messnet.Session(net, found.instance, input_size=(height, width))"
        )
    if not isinstance(eight_bits, EightBits | None):
        raise RecipeError(
            f"eight_bits={eight_bits!r:.40}: expected messnet.EightBits(calibration=images, "
            "samples=[(image, mask), ...])"
        )
    images = images and [as_image(image) for image in images]
    out = None if out is None else Path(out)
    is_session = isinstance(source, Session)
    graphs = is_session if graphs is None else graphs
    weights = not is_session or model is not None if weights is None else weights
    if isinstance(source, Session):
        path = Path(source.instance.name)  # what messages call it
        taken = _from_session(source, model)
    elif is_bundle(path := Path(source)):
        bundle = open_bundle(path)
        # Graphs need no code, so neither does a bundle of nothing but the graphs that are there.
        if (
            graphs
            and not (weights or eight_bits or static or labels != "input")
            and default_runtime(bundle, model) in GRAPH_RUNTIMES
        ):
            return _with_its_graphs(bundle, out, instance, tables)
        taken = _from_bundle(bundle, instance, model)
    elif model is None:
        taken = _from_run(RunDirectory(path), instance)
    else:
        raise RecipeError(f"a run remembers how its model is built: leave model={model!r} out for {path}")
    blueprint, net, chosen = taken.blueprint, taken.net, taken.instance
    if not net.backbone.exportable:
        raise ModelError(f"{path} cannot be exported: {'; '.join(net.notes)}")
    if not (weights or graphs or eight_bits):
        raise RunError(f"a bundle of {path} with neither weights nor graphs could not run: add --runtime onnxruntime")
    exits = tuple(choice.exit for choice in chosen.exits)
    net.keep_only(exits)
    expect_finite(net.tensors(), str(path))  # or whoever opens the bundle is refused
    files, runtimes, provenance = _cost_tables(path, *taken.tables, exits, tables), {}, taken.provenance
    if weights:
        # safetensors takes no two tensors that share memory.
        tensors = {name: tensor.contiguous().clone() for name, tensor in net.tensors().items()}
        files[_WEIGHTS] = safetensors.torch.save(tensors)
        runtimes["torch"] = Runtime(files={"weights": _WEIGHTS})
    if graphs or eight_bits:
        if blueprint.resize is not None:  # graphs see what the network sees
            images = images and [resize(image, blueprint.resize) for image in images]
            eight_bits = eight_bits and eight_bits.resized(blueprint.resize)
        size, multiple = static or blueprint.input_size, size_multiple(net)
        if size[0] % multiple or size[1] % multiple:
            raise RecipeError(f"--static {size[0]} {size[1]}: this network takes multiples of {multiple} only")
        written = make_graphs(
            net, exits, Policy.parse(chosen.policy), size, static=static is not None, labels=labels, made=made
        )
        sets: dict[Precision, tuple[dict[str, bytes], dict[str, float]]] = {}
        if graphs:
            checked = check_graphs(net, chosen, written, images or _generated_images(size), odd_size=static is None)
            sets["f32"] = written, {**checked, "real_images": float(images is not None)}
        if eight_bits:
            sets["int8"] = _in_eight_bits(net, blueprint, chosen, written, eight_bits)
            calibration = {"method": METHOD, "images": len(eight_bits.calibration), **eight_bits.origin}
            provenance = {**provenance, "int8": calibration}
        for precision, (found, checked) in sets.items():
            named = {name: f"{graphs_for(precision)}/{name}.onnx" for name in found}
            files |= {named[name]: data for name, data in found.items()}
            runtimes[graphs_for(precision)] = Runtime(files=named, checked=checked)
    own = ("class_names", "palette", "input_size", "resize", "normalisation")  # the manifest's
    network = {name: value for name, value in json.loads(blueprint.to_json()).items() if name not in own}
    manifest = Manifest(
        messnet_version=__version__,
        created=_now(),
        class_names=blueprint.class_names,
        palette=blueprint.palette,
        preprocessing=Preprocessing(
            **asdict(blueprint.normalisation), input_size=blueprint.input_size, resize=blueprint.resize
        ),
        instance=chosen,
        network=from_plain(network, Network),
        runtimes=runtimes,
        provenance=provenance,
    )
    return write_bundle(out or Path(f"{taken.name}-{chosen.name}.mess"), manifest, files)


def _with_its_graphs(bundle: Bundle, out: Path | None, instance: str | None, tables: Sequence[Path] | None) -> Bundle:
    """A bundle that torch cannot run, with its graphs as they are and without its weights."""
    chosen, manifest = bundle.choose(instance), bundle.manifest
    runtimes = {name: runtime for name, runtime in manifest.runtimes.items() if name != "torch"}
    files = _cost_tables(bundle.path, *_tables_of(bundle), [choice.exit for choice in chosen.exits], tables)
    for name in (name for runtime in runtimes.values() for name in runtime.files.values()):
        files[name] = bundle.read(name)
    made = replace(manifest, messnet_version=__version__, created=_now(), runtimes=runtimes)
    return write_bundle(out or Path(f"{bundle.path.resolve().stem}-{chosen.name}.mess"), made, files)


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S%z")


class _Source(NamedTuple):
    name: str
    blueprint: Blueprint
    net: MultiExitNet
    instance: Instance
    tables: tuple[bytes, dict[Path, bytes]]
    """Of workload, and what was measured by file."""
    provenance: dict[str, Any]


def _from_run(run: RunDirectory, instance: str | None) -> _Source:
    restored = restore_run(run.path, instance)
    workload = run.profile.read().to_json().encode()
    measured = {file.path: file.path.read_bytes() for file in run.all_measured()}
    record = run.record()
    data = cast("Mapping[str, object]", record.recipe.get("data", {}))
    masks = {name: data[name] for name in ("mask_values", "void_index") if data.get(name) not in (None, [])}
    provenance = {**record.stages, **({"masks": masks} if masks else {})}
    return _Source(run.path.resolve().name, *restored, (workload, measured), provenance)


def _from_bundle(bundle: Bundle, instance: str | None, model: str | None) -> _Source:
    restored = restore_bundle(bundle, instance, model=model)
    return _Source(bundle.path.resolve().stem, *restored, _tables_of(bundle), bundle.manifest.provenance)


def _from_session(session: Session, model: str | None) -> _Source:
    if session.input_size is None:
        raise RecipeError("a bundle names the size of its images: give the session input_size=(height, width)")
    # A copy: the session goes on with its own network, on its device and in its precision.
    name, net = model or _UNNAMED, copy_module(session.net, lambda tensor: tensor.cpu()).float()
    workload = profile(net, session.input_size, model=name).to_json().encode()
    palette = default_palette(net.num_classes) if session.palette is None else session.palette
    blueprint = Blueprint(
        model=name,
        model_options={},
        class_names=session.class_names or tuple(f"class {k}" for k in range(net.num_classes)),
        palette=tuple((int(r), int(g), int(b)) for r, g, b in palette),
        input_size=session.input_size,
        exit_points=net.exit_points,
        resize=session.resize,
        normalisation=net.normalisation,
    )
    return _Source("session", blueprint, net, session.instance, (workload, {}), {})


def _tables_of(bundle: Bundle) -> tuple[bytes, dict[Path, bytes]]:
    """A bundle's workload, and its measured tables by file."""
    tables = {Path(name): bundle.read(name) for name in bundle.manifest.files if name.startswith(f"{COSTS}/")}
    workload = tables.pop(Path(WORKLOAD), None)
    if workload is None:
        raise RunError(f"{bundle.path} has no {WORKLOAD}; export it from its run")
    return workload, tables


def _in_eight_bits(
    net: MultiExitNet, blueprint: Blueprint, instance: Instance, graphs: Mapping[str, bytes], bits: EightBits
) -> tuple[dict[str, bytes], dict[str, float]]:
    """The graphs in int8, and how far they agree with torch."""
    made = quantise(graphs, bits.calibration, net.normalisation)
    runners = _beside_torch(net, instance, made, "onnxruntime", "int8")
    expected, session = (Session(runner, instance, class_names=blueprint.class_names) for runner in runners)
    return made, {**check_quantised(expected, session, bits), "size_multiple": float(size_multiple(net))}


def _beside_torch(
    net: MultiExitNet,
    instance: Instance,
    graphs: Mapping[str, bytes],
    runtime: Literal["onnxruntime", "openvino"],
    precision: Literal["f32", "int8"],
) -> tuple[Runner, Runner]:
    """The network in torch, and its graphs."""
    strides = [point.output_stride for point in net.exit_points]
    of_graphs = GraphRunner(
        graphs,
        instance.exits,
        strides,
        runtime=runtime,
        precision=precision,
        size_multiple=size_multiple(net),
        normalisation=net.normalisation,
    )
    return TorchRunner(net, Policy.parse(instance.policy)), of_graphs


def check_graphs(
    net: MultiExitNet,
    instance: Instance,
    graphs: Mapping[str, bytes],
    images: Sequence[NDArray[np.uint8]],
    *,
    odd_size: bool = True,
) -> dict[str, float]:
    """How far the ``graphs`` of an instance agree with torch on ``images``, every exit of each: ``logits_max_abs`` and
    ``confidence_max_abs``, the largest differences; ``equal_decisions`` and ``equal_pixels``, shares in [0, 1].

    The first image is run once more without its last rows and columns, as no size may be fixed, unless ``odd_size`` is
    off. Raises ModelError when they disagree, or no runtime is installed.
    """
    multiple = size_multiple(net)
    runtime: Literal["onnxruntime", "openvino"] = "onnxruntime" if find_spec("onnxruntime") else "openvino"
    output = load_graph(graphs[OUTPUT], runtime, "f32", 1)
    runners = _beside_torch(net, instance, graphs, runtime, "f32")
    cut = max(multiple, 27)
    # A size that no example had shows what the exporter has fixed without a word.
    odd = [image[:-cut, :-cut] for image in images[: int(odd_size)] if min(image.shape[:2]) > 2 * cut]
    agreements = [_compare(runners, output, instance, image) for image in (*images, *odd)]
    logits, largest, confidence, decisions, pixels = np.concatenate(agreements).T
    found = {
        "images": float(len(agreements)),
        "logits_max_abs": float(logits.max()),
        "confidence_max_abs": float(confidence.max()),
        "equal_decisions": float(decisions.mean()),
        "equal_pixels": float(pixels.mean()),
        "size_multiple": float(multiple),
    }
    tolerable = found["logits_max_abs"] <= _TOLERANCE * max(1.0, largest.max())
    if not tolerable or found["equal_pixels"] < 0.999 or found["confidence_max_abs"] > 0.01:
        figures = ", ".join(f"{name} {value:.6g}" for name, value in found.items())
        raise ModelError(f"the ONNX graphs do not do what torch does ({figures}): export without --runtime onnxruntime")
    return found


def _compare(
    runners: Sequence[Runner], output: Graph, instance: Instance, image: NDArray[np.uint8]
) -> NDArray[np.float64]:
    """(E, 5): per exit the largest difference of logits, the largest logit, the difference of confidences, whether
    decisions are equal, the share of equal pixels, labels by the ``output`` graph too."""
    multiple = runners[0].size_multiple()
    height, width = (side // multiple * multiple for side in image.shape[:2])
    # Both go on from their own tensors, as a device does: differences add up from exit to exit.
    lives: list[Any] = [runner.start(image[None, :height, :width]) for runner in runners]
    rows = []
    for choice in instance.exits:
        threshold = 0.9 if choice.pixel_threshold is None else choice.pixel_threshold
        steps = [
            runner.advance(live, choice.exit, pixel_threshold=threshold)
            for runner, live in zip(runners, lives, strict=True)
        ]
        lives = [step.live for step in steps]
        ours, theirs = (
            runner.array(step.logits, 0).astype(np.float64) for runner, step in zip(runners, steps, strict=True)
        )
        shares = [float(step.confidence[0]) for step in steps if step.confidence is not None]
        decisions = [share >= choice.image_threshold for share in shares if choice.image_threshold is not None]
        feeds = {"logits": steps[1].logits, "size": np.array([height, width], np.int64)}
        drawn = output.run(feeds, ["labels"])[0]
        expected, found = (
            runner.labels(step.logits, np.ones(1, bool), drawn.shape[1:])
            for runner, step in zip(runners, steps, strict=True)
        )
        rows.append(
            [
                np.abs(ours - theirs).max(),
                np.abs(ours).max(),
                abs(shares[0] - shares[1]),
                len({*decisions}) < 2,
                ((expected == found) & (expected == drawn)).mean(),
            ]
        )
    return np.array(rows, np.float64)


def _generated_images(size: tuple[int, int], num_images: int = 4) -> list[NDArray[np.uint8]]:
    """Coloured blocks with noise, where there are no real images."""
    draw, images = np.random.default_rng(0), []
    for _ in range(num_images):
        blocks = draw.integers(0, 256, (size[0] // 16 + 1, size[1] // 16 + 1, 3)).repeat(16, 0).repeat(16, 1)
        noise = draw.normal(0, 8, (*size, 3))
        images.append(np.clip(blocks[: size[0], : size[1]] + noise, 0, 255).astype(np.uint8))
    return images


def _cost_tables(
    path: Path, workload: bytes, measured: Mapping[Path, bytes], exits: Sequence[Exit], named: Sequence[Path] | None
) -> dict[str, bytes]:
    """The table that counts work and the ``named`` ones, by default all that there are, as files of a bundle."""
    files, sizes = {WORKLOAD: workload}, _sizes(workload, exits)
    tables = measured.items() if named is None else [(file, _read_table(file, path)) for file in named]
    for file, data in tables:
        if f"{COSTS}/{file.name}" in files:
            raise RunError(f"{file} cannot go into the bundle, which has a {COSTS}/{file.name}: rename it")
        files[f"{COSTS}/{file.name}"] = data
        try:
            fits = _sizes(data, exits) == sizes
        except RunError as error:
            raise RunError(f"{file}: {error}") from error
        if not fits:
            raise RunError(f"{file} is a cost table of another network than that of {path}")
    return files


def _read_table(file: Path, path: Path) -> bytes:
    if not file.is_file():
        raise RunError(f"no cost table {file}; make one with `messnet profile {path} --measure`")
    return file.read_bytes()


def _sizes(table: bytes, exits: Sequence[Exit]) -> tuple[list[float], list[float]]:
    """Parameters of the segments and of the heads of ``exits``: the same on every device."""
    column = CostTable.from_json(table.decode(errors="replace")).column("parameters", exits)
    return column.segments.tolist(), column.heads.tolist()
