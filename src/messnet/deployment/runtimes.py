"""What runs an instance: torch, eager or compiled, ONNX Runtime and OpenVINO, behind one narrow interface.

A ``Runner`` goes from exit to exit. What is alive between two exits is a ``Live``, opaque to its user; logits and live
tensors have the images of the batch in their first dimension.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from messnet.costs.latency import device_name, num_threads
from messnet.costs.workload import dtype_of, shadow
from messnet.deployment.graphs import leading_to, stage_name
from messnet.deployment.planes import normalised_planes
from messnet.errors import ModelError, RecipeError
from messnet.images.preprocessing import normalise
from messnet.network.backbone import Chain, State
from messnet.network.multi_exit import MultiExitNet, labels_at
from messnet.policy.labels import upsampled_labels
from messnet.policy.reference import Policy, image_confidence
from messnet.records.instance import FINAL_HEAD, Exit

__all__ = [
    "DTYPES",
    "Graph",
    "GraphRunner",
    "Live",
    "Precision",
    "Runner",
    "RuntimeName",
    "Step",
    "TorchRunner",
    "expect_runtime",
    "load_graph",
    "size_multiple",
]

RuntimeName = Literal["torch", "torch-compiled", "onnxruntime", "openvino"]
Precision = Literal["f32", "bf16", "f16"]

DTYPES: dict[Precision, str] = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
_PRECISIONS: dict[str, tuple[Precision, ...]] = {
    "torch": ("f32", "bf16", "f16"),
    "torch-compiled": ("f32", "bf16", "f16"),
    "onnxruntime": ("f32",),
    "openvino": ("f32", "bf16", "f16"),
}
# Networks that do not take every size, for their skip connections would not fit, take multiples of this.
_STRIDE = 32


def expect_runtime(runtime: str, precision: str) -> None:
    """Raises RecipeError when there is no such runtime, or it has no such precision."""
    if runtime not in _PRECISIONS:
        raise RecipeError(f"no runtime is called {runtime!r}; choose one of {', '.join(get_args(RuntimeName))}")
    if precision not in _PRECISIONS[runtime]:
        raise RecipeError(f"{runtime} has no precision {precision!r}; choose one of {', '.join(_PRECISIONS[runtime])}")


@dataclass
class Live:
    """What is alive behind the segments that have run. Whoever goes on from it uses it up."""

    values: tuple[Any, ...]
    size: tuple[int, int]
    """(H, W) of the images."""
    depth: int = 0
    """Of a network its segments, of graphs the stages that have run."""
    states: Iterator[tuple[int, State]] | None = None
    """Of a network that cannot be resumed: where it waits."""

    def take(self) -> tuple[Any, ...]:
        """The values, no longer held here: memory for what comes after them."""
        values, self.values = self.values, ()
        return values


class Step(NamedTuple):
    """What one exit gives."""

    live: Live | None
    """To go on from, where that was asked for."""
    logits: Any
    """(N, K, h, w) in the runtime's own form; None where not asked for."""
    confidence: NDArray[np.float32] | None
    """(N,) c_img at the pixel threshold that was asked for."""


class Runner(Protocol):
    """Runs images, a batch of one size, from exit to exit of a network."""

    runtime: RuntimeName
    precision: Precision

    @property
    def threads(self) -> int:
        """Of the processor."""
        ...

    @property
    def conditions(self) -> dict[str, str | int]:
        """Device, runtime, dtype and threads, as a cost table names them."""
        ...

    def expect(self, exit: Exit) -> None:
        """Raises ModelError when there is no such exit."""
        ...

    def output_stride(self, exit: Exit) -> int:
        """Input pixels per pixel of the logits."""
        ...

    def size_multiple(self) -> int:
        """What height and width of the images must be multiples of; 1 for most networks."""
        ...

    def start(self, images: NDArray[np.uint8]) -> Live:
        """Images (N, H, W, 3) RGB, normalised, on the device."""
        ...

    def advance(
        self, live: Live, exit: Exit, *, pixel_threshold: float | None = None, logits: bool = True, keep: bool = True
    ) -> Step:
        """Runs the segments up to an exit; its head for ``logits``; its policy where there is a ``pixel_threshold``;
        no other head. ``keep`` to go on afterwards."""
        ...

    def select(self, live: Live, rows: NDArray[np.bool_]) -> Live | None:
        """The images of ``rows`` (N,) alone; None where images cannot be taken out of the batch."""
        ...

    def labels(self, logits: Any, rows: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.uint8]:
        """(n, H, W) at input ``size``, of the n images of ``rows`` (N,)."""
        ...

    def synchronise(self) -> None:
        """Waits until the device is idle."""
        ...


class TorchRunner:
    """The network itself; any of its heads. Compiled, each part is translated when it first runs, which takes up to a
    minute, and once more when the size of the images changes."""

    def __init__(
        self,
        net: MultiExitNet,
        policy: Policy,
        *,
        device: torch.device | str = "cpu",
        precision: Precision | None = None,
        threads: int | None = None,
        compiled: bool = False,
    ) -> None:
        self.device, self.policy = torch.device(device), policy
        dtype = dtype_of(net) if precision is None else getattr(torch, DTYPES[precision])
        layout = {"memory_format": torch.channels_last}
        self.net: MultiExitNet = net.eval().to(self.device, dtype, **layout)  # type: ignore[call-overload]
        self.runtime: RuntimeName = "torch-compiled" if compiled else "torch"
        self.precision: Precision = next(p for p in get_args(Precision) if str(dtype) == f"torch.{DTYPES[p]}")
        self._threads = threads
        self._multiple: int | None = None
        self._parts: dict[tuple[int, Exit], Callable[..., Any]] = {}

    @property
    def threads(self) -> int:
        return self._threads or torch.get_num_threads()

    @property
    def conditions(self) -> dict[str, str | int]:
        how = "compiled" if self.runtime == "torch-compiled" else "eager"
        return {
            "device": device_name(self.device),
            "runtime": f"torch {torch.__version__} {how}",
            "dtype": DTYPES[self.precision],
            "threads": self.threads,
        }

    def expect(self, exit: Exit) -> None:
        self.net.head(exit)

    def output_stride(self, exit: Exit) -> int:
        return self.net.exit_points[exit.exit_index].output_stride

    def size_multiple(self) -> int:
        if self._multiple is None:
            self._multiple = size_multiple(self.net)
        return self._multiple

    def start(self, images: NDArray[np.uint8]) -> Live:
        x = normalise(images).to(self.device, dtype_of(self.net), memory_format=torch.channels_last)
        size = (images.shape[1], images.shape[2])
        if isinstance(self.net.backbone, Chain):
            return Live((x,), size)
        return Live((), size, states=enumerate(self.net.states(x)))

    def advance(
        self, live: Live, exit: Exit, *, pixel_threshold: float | None = None, logits: bool = True, keep: bool = True
    ) -> Step:
        with torch.inference_mode(), num_threads(self._threads):
            if live.states is not None:
                state = next(state for i, state in live.states if i == exit.exit_index)
                found = self.net.logits(exit, state) if logits else None
                following = Live((), live.size, exit.exit_index + 1, live.states)
            else:
                part = self._part(live.depth, exit)
                values, found = part(logits, *live.take())
                following = Live(values, live.size, exit.exit_index + 1)
            confidence = None
            if pixel_threshold is not None and found is not None:
                stride = self.output_stride(exit)
                shares = image_confidence(found, stride, live.size, [pixel_threshold], self.policy)
                confidence = shares[:, 0].cpu().numpy()
        return Step(following if keep else None, found, confidence)

    def _part(self, depth: int, exit: Exit) -> Callable[..., Any]:
        """From the live values behind ``depth`` segments to those at ``exit``, and its logits where wanted."""
        if (depth, exit) not in self._parts:
            assert isinstance(self.net.backbone, Chain)
            segments, head = self.net.backbone.segments[depth : exit.exit_index + 1], self.net.head(exit)
            final = exit.head == FINAL_HEAD

            def run(logits: bool, *values: Any) -> tuple[tuple[Any, ...], Tensor | None]:
                for segment in segments:
                    values = segment(*values)
                if not logits:
                    return values, None
                return values, head(*values) if final else head(values[0])

            self._parts[depth, exit] = torch.compile(run) if self.runtime == "torch-compiled" else run
        return self._parts[depth, exit]

    def select(self, live: Live, rows: NDArray[np.bool_]) -> Live | None:
        if live.states is not None or not _are_batches(live.values, len(rows)):
            return None
        kept = torch.from_numpy(np.flatnonzero(rows)).to(self.device)
        with torch.inference_mode():
            values = tuple(_in_channels_last(value.index_select(0, kept)) for value in live.take())
        return Live(values, live.size, live.depth)

    def labels(self, logits: Any, rows: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.uint8]:
        with torch.inference_mode(), num_threads(self._threads):
            some = logits if rows.all() else logits[torch.from_numpy(rows).to(self.device)]
            labels: NDArray[np.uint8] = labels_at(some, size).cpu().numpy()
        return labels

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class GraphRunner:
    """The graphs of an instance, in ONNX Runtime or OpenVINO. Its exits only."""

    def __init__(
        self,
        graphs: Mapping[str, bytes],
        exits: Sequence[Exit],
        output_strides: Sequence[int],
        *,
        runtime: Literal["onnxruntime", "openvino"],
        precision: Precision = "f32",
        threads: int | None = None,
        size_multiple: int = 1,
    ) -> None:
        """``graphs`` as ``graphs.make_graphs`` names them, one for each of ``exits``. Raises RecipeError for a
        precision that the runtime does not have, ModelError without its package."""
        expect_runtime(runtime, precision)
        self.runtime: RuntimeName = runtime
        self.precision = precision
        self.threads = threads or torch.get_num_threads()
        self._exits, self._strides, self._multiple = tuple(exits), tuple(output_strides), size_multiple

        stages = [graphs[stage_name(position)] for position in range(len(exits))]
        self._stages = [load_graph(stage, runtime, precision, self.threads) for stage in stages]

    @property
    def conditions(self) -> dict[str, str | int]:
        return {
            "device": device_name(torch.device("cpu")),
            "runtime": f"{self.runtime} {self._stages[0].version}",
            "dtype": DTYPES[self.precision],
            "threads": self.threads,
        }

    def expect(self, exit: Exit) -> None:
        if exit not in self._exits:
            names = ", ".join(f"{one.exit_index} ({one.head})" for one in self._exits)
            raise ModelError(f"there is no graph of head {exit.head!r} at exit {exit.exit_index}; there are {names}")

    def output_stride(self, exit: Exit) -> int:
        return self._strides[exit.exit_index]

    def size_multiple(self) -> int:
        return self._multiple

    def start(self, images: NDArray[np.uint8]) -> Live:
        return Live((normalised_planes(images),), (images.shape[1], images.shape[2]))

    def advance(
        self, live: Live, exit: Exit, *, pixel_threshold: float | None = None, logits: bool = True, keep: bool = True
    ) -> Step:
        values, last = live.take(), self._exits.index(exit)
        threshold = np.array([0.5 if pixel_threshold is None else pixel_threshold], np.float32)
        for position in range(live.depth, last):  # exits of the graphs that are none of the instance: no head runs
            values = self._run(position, values, self._following(position), threshold)
        following = self._following(last) if keep else []
        wanted = [*following, *(["logits"] if logits else [])]
        wanted += ["confidence"] if pixel_threshold is not None else []
        found = self._run(last, values, wanted, threshold)
        after, rest = found[: len(following)], found[len(following) :]
        return Step(
            Live(after, live.size, last + 1) if keep else None,
            rest[0] if logits else None,
            rest[-1] if pixel_threshold is not None else None,
        )

    def _following(self, position: int) -> list[str]:
        return [name for name in self._stages[position].outputs if name.startswith("next")]

    def _run(
        self, position: int, values: tuple[Any, ...], wanted: Sequence[str], threshold: NDArray[np.float32]
    ) -> tuple[NDArray[Any], ...]:
        feeds = {f"live{k}": value for k, value in enumerate(values)} | {"pixel_threshold": threshold}
        return tuple(self._stages[position].run(feeds, wanted))

    def select(self, live: Live, rows: NDArray[np.bool_]) -> Live | None:
        if any(len(value) != len(rows) for value in live.values):
            return None
        return Live(tuple(value[rows] for value in live.take()), live.size, live.depth)

    def labels(self, logits: Any, rows: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.uint8]:
        return upsampled_labels(logits[rows], size, threads=self.threads)

    def synchronise(self) -> None:
        pass


class Graph(Protocol):
    """One graph, loaded."""

    version: str
    """Of the runtime."""
    outputs: tuple[str, ...]

    def run(self, feeds: Mapping[str, NDArray[Any]], wanted: Sequence[str]) -> list[NDArray[Any]]:
        """The outputs that are ``wanted``; what leads to no other is left out."""
        ...


class _OnnxRuntimeGraph:
    """ONNX Runtime runs a graph whole, whatever is asked for (its ``only_execute_path_to_fetches`` left nothing out in
    1.31), so segments that are wanted without their head are a graph of their own, loaded when first asked for."""

    def __init__(self, data: bytes, threads: int) -> None:
        self._ort = _onnxruntime()
        self.version: str = self._ort.__version__
        self._data, self._threads = data, threads
        self._whole = self._session(data)
        self._headless: Any = None
        self._lock = threading.Lock()
        self.outputs = tuple(one.name for one in self._whole.get_outputs())

    def _session(self, data: bytes) -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self._threads, 1
        options.log_severity_level = 3
        # Threads that wait for the next operator by spinning save a sixth of the time; those of several sessions take
        # each other's processors, unless they soon sleep, as versions from 1.26 on let them.
        soon_sleeps = tuple(map(int, self.version.split(".")[:2])) >= (1, 26)
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if soon_sleeps else "0")
        options.add_session_config_entry("session.intra_op.spin_duration_us", "50")
        return self._ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run(self, feeds: Mapping[str, NDArray[Any]], wanted: Sequence[str]) -> list[NDArray[Any]]:
        session = self._whole
        if all(name.startswith("next") for name in wanted):
            with self._lock:
                self._headless = session = self._headless or self._session(leading_to(self._data, wanted))
        given = {one.name: feeds[one.name] for one in session.get_inputs()}
        try:
            found: list[NDArray[Any]] = session.run(list(wanted), given)
        except Exception as error:
            raise _graph_error("ONNX Runtime", error, given) from error
        return found


class _OpenVinoGraph:
    """Compiled once for each set of outputs that is asked for: what leads to no other is left out."""

    def __init__(self, data: bytes, precision: Precision, threads: int) -> None:
        openvino = _openvino()
        self.version: str = openvino.__version__.partition("-")[0]
        self._core = openvino.Core()
        self._config = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
        }
        self._model = self._core.read_model(data)
        self.outputs = tuple(output.get_any_name() for output in self._model.outputs)
        self._requests: dict[tuple[str, ...], Any] = {}
        self._lock = threading.Lock()

    def run(self, feeds: Mapping[str, NDArray[Any]], wanted: Sequence[str]) -> list[NDArray[Any]]:
        with self._lock:  # a request runs once at a time
            request = self._requests.get(tuple(wanted)) or self._compile(tuple(wanted))
            given = {name: feeds[name] for port in request.model_inputs for name in port.get_names() if name in feeds}
            try:
                results = request.infer(given, share_inputs=True)
            except Exception as error:
                raise _graph_error("OpenVINO", error, given) from error
            return [results[name] for name in wanted]

    def _compile(self, wanted: tuple[str, ...]) -> Any:
        model = self._model.clone()
        for result in model.get_results():
            if not {*wanted} & {*result.input_value(0).get_names()}:
                model.remove_result(result)
        self._requests[wanted] = self._core.compile_model(model, "CPU", self._config).create_infer_request()
        return self._requests[wanted]


def load_graph(data: bytes, runtime: str, precision: Precision, threads: int) -> Graph:
    """Raises ModelError when the runtime is not installed or refuses the graph."""
    try:
        if runtime == "onnxruntime":
            return _OnnxRuntimeGraph(data, threads)
        if runtime == "openvino":
            return _OpenVinoGraph(data, precision, threads)
        raise ModelError(f"{runtime} runs no graphs: expected onnxruntime or openvino")
    except ModelError:
        raise
    except Exception as error:  # of the runtime's own kinds
        line = str(error).strip().splitlines()[0]
        raise ModelError(f"{runtime} cannot load a graph ({line}): export the bundle again, or use torch") from error


def _graph_error(runtime: str, error: Exception, given: Mapping[str, NDArray[Any]]) -> ModelError:
    shapes = ", ".join(f"{name} {value.shape}" for name, value in given.items())
    line = str(error).strip().splitlines()[0]
    return ModelError(f"{runtime} cannot run a graph for {shapes} ({line}): resize the images, or use torch")


def _onnxruntime() -> Any:
    try:
        return import_module("onnxruntime")
    except ImportError as error:
        raise ModelError("the runtime onnxruntime is not installed: pip install messnet[onnx]") from error


def _openvino() -> Any:
    try:
        os.environ.setdefault("OPENVINO_TELEMETRY", "0")
        return import_module("openvino")
    except ImportError as error:
        raise ModelError("the runtime openvino is not installed: pip install messnet[openvino]") from error


def size_multiple(net: MultiExitNet) -> int:
    """1, or 32 for a network that does not take an odd size. It is run without computing anything."""
    try:
        empty = shadow(net)
        for module in empty.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        _run_through(empty, 6 * _STRIDE, 8 * _STRIDE)
    except Exception:  # it looks at values: nothing can be told, and errors tell of themselves
        return 1
    try:
        _run_through(empty, 6 * _STRIDE + 13, 8 * _STRIDE - 19)
    except RuntimeError:
        return _STRIDE
    return 1


def _run_through(net: MultiExitNet, height: int, width: int) -> None:
    with torch.no_grad():
        x = torch.zeros(1, 3, height, width, dtype=dtype_of(net), device="meta")
        *_, state = net.states(x)
        if net.backbone.final_head is not None:
            net.logits(net.exits[-1], state)


def _are_batches(values: Sequence[Any], batch: int) -> bool:
    return all(isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch for value in values)


def _in_channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
