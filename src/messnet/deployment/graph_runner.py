"""Runs the ONNX graphs of an instance in ONNX Runtime or OpenVINO, on the processor and without torch."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from messnet.costs.processor import default_threads, processor_name
from messnet.deployment.graph_file import expect_self_contained, leading_to
from messnet.deployment.runner import Live, Runner, Step
from messnet.errors import ModelError, RunError
from messnet.images.preprocessing import IMAGENET, Normalisation, normalise
from messnet.policy.arrays import image_confidence
from messnet.policy.labels import loaded_compiled, upsampled_labels
from messnet.policy.policy import Policy
from messnet.records.instance import Exit, ExitChoice
from messnet.records.names import DTYPES, GraphRuntime, Precision, RuntimeName, expect_runtime

GRAPHS = "onnx"
"""What a manifest calls the runtime that graphs are for, and the folder that they lie in; see ``graphs_for``."""
OUTPUT = "output"
"""The graph from logits to labels; the others are called ``stage_name(0)``, ``stage_name(1)`` and so on."""

_STAGE_INPUTS, _STAGE_OUTPUTS = "pixel_threshold", ("logits", "confidence")


def graphs_for(precision: Precision) -> str:
    """What a manifest calls the graphs for a precision: runtimes compute the same ones in f32, bf16 and f16."""
    return f"{GRAPHS}-int8" if precision == "int8" else GRAPHS


def stage_name(position: int) -> str:
    """The name of the graph that ends at the instance's exit at ``position``."""
    return f"stage{position}"


class GraphRunner(Runner):
    """The graphs of an instance, in ONNX Runtime or OpenVINO. It runs the instance's exits only."""

    device = "cpu"

    def __init__(
        self,
        graphs: Mapping[str, bytes],
        choices: Sequence[ExitChoice],
        output_strides: Sequence[int],
        *,
        runtime: GraphRuntime,
        precision: Precision = "f32",
        threads: int | None = None,
        size_multiple: int = 1,
        policy: Policy | None = None,
        normalisation: Normalisation = IMAGENET,
    ) -> None:
        """``graphs`` as ``graphs.make_graphs`` names them, one for each of ``choices``, shallow to deep; for the
        precision int8 those of ``quantising.quantise``. With the instance's ``policy``, the compiled pass decides where
        it has been loaded, in a fraction of the time of the graph's operators. ``normalisation`` is the network's.

        Raises RecipeError for a precision that the runtime does not have, RunError for a graph that is missing or that
        is not what a bundle may hold, ModelError when the runtime is not installed or refuses a graph.
        """
        expect_runtime(runtime, precision)
        self.runtime: RuntimeName = runtime
        self.precision = precision
        self._threads = threads or default_threads()
        self._exits = tuple(choice.exit for choice in choices)
        self.num_bytes = sum(map(len, graphs.values()))
        self._strides, self._multiple, self._policy = tuple(output_strides), size_multiple, policy
        self._normalisation = normalisation
        missing = {*map(stage_name, range(len(choices)))} - graphs.keys()
        if missing:
            raise RunError(f"there is no graph {min(missing)}: export the bundle again")

        self._stages: list[Graph] = []
        for position, choice in enumerate(choices):
            graph = load_graph(graphs[stage_name(position)], runtime, precision, self.threads, stage_name(position))
            _expect_stage(graph, position, self._stages[-1:])
            self._stages.append(graph)
            # What the instance's own setting will ask for is compiled now, so that a refusal comes when it is loaded.
            last = position == len(choices) - 1
            decides = choice.image_threshold is not None and not last
            following = [] if last else self._following(position)
            graph.prepare([*following, "logits", *(["confidence"] if decides else [])])

    @property
    def threads(self) -> int:
        return self._threads

    @property
    def conditions(self) -> dict[str, str | int]:
        return {
            "device": processor_name(),
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
        return Live((normalise(images, self._normalisation),), (images.shape[1], images.shape[2]))

    def advance(
        self, live: Live, exit: Exit, *, pixel_threshold: float | None = None, logits: bool = True, keep: bool = True
    ) -> Step:
        values, last = live.take(), self._exits.index(exit)
        # A stage takes a threshold in any case; without a question, nobody reads what it decides.
        threshold = np.array([0.5 if pixel_threshold is None else pixel_threshold], np.float32)
        for position in range(live.depth, last):  # exits that are passed: their heads do not run
            values = self._run(position, values, self._following(position), threshold)
        following = self._following(last) if keep else []
        wanted = [*following, *(["logits"] if logits else [])]
        on_host = self._policy is not None and logits and loaded_compiled() is not None
        wanted += ["confidence"] if pixel_threshold is not None and not on_host else []
        found = self._run(last, values, wanted, threshold)
        after, rest = found[: len(following)], found[len(following) :]
        confidence = None
        if pixel_threshold is not None:
            confidence = rest[-1]
            if on_host and self._policy is not None:
                stride = self.output_stride(exit)
                confidence = image_confidence(rest[0], stride, live.size, threshold, self._policy)[:, 0]
        return Step(Live(after, live.size, last + 1) if keep else None, rest[0] if logits else None, confidence)

    def _following(self, position: int) -> list[str]:
        return [name for name in self._stages[position].outputs if name.startswith("next")]

    def _run(
        self, position: int, values: tuple[Any, ...], wanted: Sequence[str], threshold: NDArray[np.float32]
    ) -> tuple[NDArray[Any], ...]:
        feeds = {f"live{k}": value for k, value in enumerate(values)} | {"pixel_threshold": threshold}
        return tuple(self._stages[position].run(feeds, wanted))

    def select(self, live: Live, rows: NDArray[np.bool_]) -> Live | None:
        if any(len(value) != len(rows) for value in live.values):  # what holds no batch cannot be divided
            return None
        return Live(tuple(value[rows] for value in live.take()), live.size, live.depth)

    def array(self, logits: NDArray[np.float32], row: int) -> NDArray[np.float32]:
        return logits[row : row + 1]

    def finite(self, logits: NDArray[np.float32]) -> NDArray[np.bool_]:
        return np.array([np.isfinite(one).all() for one in logits])

    def labels(self, logits: Any, rows: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.uint8]:
        return upsampled_labels(logits[rows], size, threads=self.threads)

    def synchronise(self) -> None:
        pass


class Graph(Protocol):
    """One graph, loaded."""

    version: str
    """The runtime's version."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def prepare(self, wanted: Sequence[str]) -> object:
        """Compiles what leads to the outputs that are ``wanted``, which a later ``run`` does otherwise."""
        ...

    def run(self, feeds: Mapping[str, NDArray[Any]], wanted: Sequence[str]) -> list[NDArray[Any]]:
        """The outputs that are ``wanted``. What leads to none of them does not run, and what it alone would read may be
        left out of ``feeds``."""
        ...


def load_graph(data: bytes, runtime: str, precision: Precision, threads: int, name: str = "a graph") -> Graph:
    """The ONNX graph ``data`` in a runtime. Raises ModelError when the runtime is not installed, RunError when
    ``data`` is no graph that holds all it needs."""
    if runtime == "onnxruntime":
        return _OnnxRuntimeGraph(data, threads, name)
    if runtime == "openvino":
        return _OpenVinoGraph(data, precision, threads, name)
    raise ModelError(f"{runtime} runs no graphs: expected onnxruntime or openvino")


class _OnnxRuntimeGraph:
    """ONNX Runtime runs a graph whole, whatever is asked for (its ``only_execute_path_to_fetches`` left nothing out in
    1.31), so each set of outputs that is asked for gets a session on the part of the graph that leads to it."""

    def __init__(self, data: bytes, threads: int, name: str) -> None:
        self._ort = _package("onnxruntime", "messnet")
        self.version: str = self._ort.__version__
        self._data, self._threads, self._name = data, threads, name
        self.inputs, self.outputs = expect_self_contained(data, name)
        self._sessions: dict[tuple[str, ...], Any] = {}
        self._lock = threading.Lock()

    def prepare(self, wanted: Sequence[str]) -> Any:
        with self._lock:
            if tuple(wanted) not in self._sessions:
                whole = {*wanted} == {*self.outputs}
                data = self._data if whole else leading_to(self._data, wanted)
                self._sessions[tuple(wanted)] = _loaded(
                    f"onnxruntime {self.version}", self._name, lambda: self._session(data)
                )
            return self._sessions[tuple(wanted)]

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
        session = self.prepare(wanted)
        given = {one.name: feeds[one.name] for one in session.get_inputs()}
        try:
            found: list[NDArray[Any]] = session.run(list(wanted), given)
        except Exception as error:
            raise _run_error("ONNX Runtime", error, given) from error
        return found


@functools.cache
def _openvino_core() -> Any:
    """One for the process, which keeps it. Each core gives its thread a stack for signal handlers and puts back, at its
    end, the one it found: of two that end in the order of their making, the first unmaps what the second puts back,
    and the next signal that Python handles ends the process (OpenVINO 2026.4; openvinotoolkit/openvino#11894)."""
    return _package("openvino", "messnet[openvino]").Core()


class _OpenVinoGraph:
    """Compiled once for each set of outputs that is asked for: what leads to no other is left out."""

    def __init__(self, data: bytes, precision: Precision, threads: int, name: str) -> None:
        os.environ.setdefault("OPENVINO_TELEMETRY", "0")
        openvino = _package("openvino", "messnet[openvino]")
        self.version: str = openvino.__version__.partition("-")[0]
        self.inputs, self.outputs = expect_self_contained(data, name)
        self._core, self._tensor, self._name = _openvino_core(), openvino.Tensor, name
        self._config = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32" if precision == "int8" else precision,  # of what is not in int8
            "INFERENCE_NUM_THREADS": threads,
            # OpenVINO keeps what it has prepared for each operator and each size of image, by default 5000 of them: 900
            # sizes took 702 MB more, with this limit 78 MB more and a quarter more processor time. Images of one size
            # are not slower.
            "CPU_RUNTIME_CACHE_CAPACITY": 200,
        }
        self._model = _loaded(f"openvino {self.version}", name, lambda: self._core.read_model(data))
        self._requests: dict[tuple[str, ...], Any] = {}
        self._lock = threading.RLock()

    def prepare(self, wanted: Sequence[str]) -> Any:
        with self._lock:
            if tuple(wanted) not in self._requests:
                compiled = _loaded(f"openvino {self.version}", self._name, lambda: self._compile(wanted))
                self._requests[tuple(wanted)] = compiled
            return self._requests[tuple(wanted)]

    def _compile(self, wanted: Sequence[str]) -> Any:
        model = self._model.clone()
        for result in model.get_results():
            if not {*wanted} & {*result.input_value(0).get_names()}:
                model.remove_result(result)
        return self._core.compile_model(model, "CPU", self._config).create_infer_request()

    def run(self, feeds: Mapping[str, NDArray[Any]], wanted: Sequence[str]) -> list[NDArray[Any]]:
        with self._lock:  # a request runs once at a time
            request = self.prepare(wanted)
            given = {name: feeds[name] for port in request.model_inputs for name in port.get_names() if name in feeds}
            found: dict[str, Any] = {}
            try:
                # What it computes goes into memory that is made for this call, so that neither the next stage nor the
                # caller needs a copy before the request runs again.
                for port in request.model_outputs:
                    made = self._tensor(port.get_element_type(), port.get_partial_shape().get_min_shape())
                    request.set_tensor(port, made)
                    found |= dict.fromkeys(port.get_names(), made)
                request.infer(given, share_inputs=True, share_outputs=True)
            except Exception as error:
                raise _run_error("OpenVINO", error, given) from error
            return [found[name].data for name in wanted]


def _expect_stage(graph: Graph, position: int, before: Sequence[Graph]) -> None:
    """Raises RunError for a stage that takes or gives other values than stages do."""
    given = [f"live{k}" for k in range(sum(name.startswith("next") for name in before[0].outputs) if before else 1)]
    following = [name for name in graph.outputs if name not in _STAGE_OUTPUTS]
    # A stage may leave out inputs that it does not read, as its runtime would; its own outputs are all there.
    sound = {*graph.inputs} <= {*given, _STAGE_INPUTS} and {*_STAGE_OUTPUTS} <= {*graph.outputs}
    if not sound or following != [f"next{k}" for k in range(len(following))]:
        raise RunError(
            f"the graph {stage_name(position)} is refused: it takes {', '.join(graph.inputs)} and gives "
            f"{', '.join(graph.outputs)}, which no stage of an instance does; export the bundle again"
        )


def _loaded(runtime: str, name: str, load: Any) -> Any:
    try:
        return load()
    except Exception as error:  # of the runtime's own kinds
        line = str(error).strip().splitlines()[0]
        raise ModelError(f"{runtime} cannot load {name} ({line}): export the bundle again, or use torch") from error


def _run_error(runtime: str, error: Exception, given: Mapping[str, NDArray[Any]]) -> ModelError:
    shapes = ", ".join(f"{name} {value.shape}" for name, value in given.items())
    line = str(error).strip().splitlines()[0]
    return ModelError(f"{runtime} cannot run a graph for {shapes} ({line}): resize the images, or use torch")


def _package(name: str, extra: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ModelError(f"the runtime {name} is not installed: pip install '{extra}'") from error
