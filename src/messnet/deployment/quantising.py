"""Graphs in eight bits, made of those in float32 by ONNX Runtime's own quantiser.

Weights are int8, one scale for each output channel, symmetric about 0; activations are uint8, one scale and zero point
for each tensor, from the least and the largest value that calibration images give it ("static, min-max", Jacob et al.,
CVPR 2018). Q and DQ operators say so in the graph, which each runtime turns into its own integer kernels.

Ranges are those of the float network, whatever the cuts: a tensor that two stages share is rounded once, and the stages
of any instance of a network compute the same integers, up to the last digit of a range. So tables of all exits foretell
what each instance does.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from messnet.deployment.graph_runner import OUTPUT, load_graph, stage_name
from messnet.deployment.session import Session
from messnet.errors import ModelError, RecipeError, needing_extras
from messnet.images.inputs import as_image
from messnet.images.preprocessing import IMAGENET, Normalisation, normalise, resize, resize_map, resized_size
from messnet.policy.graph import serialised
from messnet.records.iou import mean_iou, pixel_counts

if TYPE_CHECKING:
    from onnx import GraphProto

METHOD = "static, QDQ, min-max; weights int8 per channel, activations uint8; stem, logits and policy in float"

Feeds = dict[str, NDArray[np.generic]]


class Calibration(NamedTuple):
    """How many of a run's training images, drawn with which seed: tables, costs and bundles use the same."""

    images: int = 32
    seed: int = 0


CALIBRATION = Calibration()


@dataclass(frozen=True, kw_only=True)
class EightBits:
    """What an export in int8 is made and judged with. Images are (H, W, 3) uint8 RGB."""

    calibration: Sequence[NDArray[np.uint8]]
    """What the ranges of activations are taken from."""
    samples: Sequence[tuple[NDArray[np.uint8], NDArray[np.uint8] | None]]
    """Images to compare with float on, with their labels (H, W) where those are known."""
    max_loss_pp: float | None = None
    """What int8 may lose, see ``check_quantised``; None: 1 with labels, 3 without, where changed pixels count."""
    origin: Mapping[str, str | int] = field(default_factory=dict)
    """Where the images to calibrate on come from, for the manifest."""

    def resized(self, shorter: int) -> EightBits:
        """With ``shorter`` pixels on the shorter side of all images."""
        calibration = [resize(image, shorter) for image in self.calibration]
        samples = [
            (
                resize(image, shorter),
                None if mask is None else resize_map(mask, resized_size((mask.shape[0], mask.shape[1]), shorter)),
            )
            for image, mask in self.samples
        ]
        return replace(self, calibration=calibration, samples=samples)


# Operators with integer kernels in both runtimes; what lies between others stays in float.
_OPERATORS = ("Conv", "Add", "Clip", "Relu", "MaxPool", "Concat", "MatMul", "Gemm")
_NETWORK = "net/"  # how nodes of segments and heads are called; others are the policy's


def quantise(
    graphs: Mapping[str, bytes], images: Sequence[NDArray[np.uint8]], normalisation: Normalisation = IMAGENET
) -> dict[str, bytes]:
    """The stages of ``make_graphs``, in int8; what turns logits into labels stays as it is.

    ``images`` to calibrate on, (H, W, 3) uint8 RGB each, and the network's ``normalisation``. Raises RecipeError where
    there are none, ModelError when the quantiser refuses a graph, or its packages are missing.
    """
    if not images:
        raise RecipeError("int8 needs images to take the ranges of activations from: name some with --images")
    with needing_extras():
        import onnx

    live: list[tuple[NDArray[np.generic], ...]] = [
        (normalise(as_image(image)[None], normalisation),) for image in images
    ]
    found = {OUTPUT: graphs[OUTPUT]}
    for position in range(len(graphs) - 1):
        name = stage_name(position)
        stage = load_graph(graphs[name], "onnxruntime", "f32", 1, name)
        threshold = np.array([0.5], np.float32)
        every = [{f"live{k}": value for k, value in enumerate(one)} | {"pixel_threshold": threshold} for one in live]
        feeds = [{port: one[port] for port in stage.inputs} for one in every]
        model = onnx.load_from_string(graphs[name])
        try:
            found[name] = _quantised(model, feeds, first=position == 0)
        except Exception as error:  # of the quantiser's own kinds
            line = str(error).strip().splitlines() or [type(error).__name__]
            raise ModelError(f"{name} cannot be quantised ({line[0]}): export it with --precision f32") from error
        following = [port for port in stage.outputs if port.startswith("next")]
        live = [tuple(stage.run(one, following)) for one in feeds] if following else []
    return found


def check_quantised(expected: Session, session: Session, bits: EightBits) -> dict[str, float]:
    """How far a ``session`` in int8 does what the ``expected`` one does, the same instance in float.

    With labels ``loss_pp`` is the largest drop of mIoU, in percentage points, of an exit or of the instance with its
    stops. Without, it is the share of pixels of all exits that changed, in percent: no accuracy over pixels can have
    fallen by more. Raises ModelError where that is more than ``bits`` allows.
    """
    labelled = all(mask is not None for _, mask in bits.samples)
    names = [f"exit{choice.exit_index}" for choice in session.instance.exits] + ["instance"]
    counts = np.zeros((2, len(names), 3, len(session.class_names)), np.int64)
    equal_exits, equal_pixels = [], []
    for image, mask in bits.samples:
        # Where each stops, and every exit: a wrong stop and wrong labels are different faults.
        stops = [one.predict([image])[0] for one in (expected, session)]
        shown = [[*one.anytime(image), stop] for one, stop in zip((expected, session), stops, strict=True)]
        equal_exits.append(stops[0].exit_index == stops[1].exit_index)
        equal_pixels.append([(a.labels == b.labels).mean() for a, b in zip(*shown, strict=True)])
        if mask is not None:
            counts += [[pixel_counts(one.labels, mask, counts.shape[3]) for one in row] for row in shown]
    found = {
        "images": float(len(bits.samples)),
        "real_images": 1.0,
        "labelled": float(labelled),
        "equal_exits": float(np.mean(equal_exits)),
        "equal_pixels": float(np.mean(equal_pixels)),
    }
    drops = {"share of pixels that changed": 100 * (1 - found["equal_pixels"])}
    if labelled:
        miou = [[mean_iou(*one) for one in row] for row in counts]
        for name, before, after in zip(names, *miou, strict=True):
            found |= {f"miou_{name}_float": before, f"miou_{name}": after}
        drops = {f"mIoU of {name}": 100 * (a - b) for name, a, b in zip(names, *miou, strict=True)}
    worst, limit = max(drops, key=lambda name: drops[name]), bits.max_loss_pp
    limit = (1.0 if labelled else 3.0) if limit is None else limit
    if not drops[worst] <= limit:
        raise ModelError(
            f"int8 loses {drops[worst]:.2f} pp ({worst}, {len(bits.samples)} images), more than --max-loss-pp "
            f"{limit:g}: calibrate on images more like those, allow more, or export --precision f32"
        )
    return {**found, "loss_pp": float(drops[worst])}


def _quantised(model: object, feeds: Sequence[Feeds], *, first: bool) -> bytes:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    assert isinstance(model, onnx.ModelProto)

    class Readings(CalibrationDataReader):  # type: ignore[misc]  # ONNX Runtime's tools have no types
        left = iter(feeds)

        def get_next(self) -> Feeds | None:
            return next(self.left, None)

    in_float = _last_layers(model.graph) | (_stem(model.graph) if first else set())
    chosen = [
        node.name
        for node in model.graph.node
        if node.name.startswith(_NETWORK) and node.op_type in _OPERATORS and node.output[0] not in in_float
    ]
    with TemporaryDirectory() as folder, _quiet():  # the quantiser writes to files alone
        file = Path(folder, "int8.onnx")
        quantize_static(
            model,
            file,
            Readings(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            op_types_to_quantize=list(_OPERATORS),
            nodes_to_quantize=chosen,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return serialised(onnx.load(file))


def _stem(graph: GraphProto) -> set[str]:
    """What the first convolution gives, and depth-wise ones straight behind it: with 3 channels, or one at a time, on
    the largest maps of all, integer kernels take twice as long as those in float."""
    reached = {"live0"}
    for node in graph.node:
        groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
        is_stem = node.op_type in ("Clip", "Relu") or (node.op_type == "Conv" and (groups > 1 or "live0" in node.input))
        if is_stem and node.input[0] in reached:
            reached.add(node.output[0])
    return reached


def _last_layers(graph: GraphProto) -> set[str]:
    """What the convolutions or products give that logits come of at once: a step of eight bits there moves labels."""
    made_by = {output: node for node in graph.node for output in node.output}
    last, todo = set[str](), ["logits"]
    while todo:
        node = made_by.get(todo.pop())
        if node is None or node.op_type == "Shape":
            continue
        last.add(node.output[0])
        if node.op_type not in ("Conv", "MatMul", "Gemm"):
            todo += node.input
    return last


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantiser's advice to prepare graphs for it, as these are."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
