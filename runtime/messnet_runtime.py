"""Runs a messnet bundle without torch: NumPy, Pillow and ONNX Runtime or OpenVINO.

    model = load("camvid.zip")
    result = model.predict([image])[0]      # .labels (H, W) uint8, .exit_index, .image_confidence, .latency_ms

An image runs from exit to exit of the bundle's instance and stops at the first that is confident: nothing past it runs.
The bundle must hold graphs: `messnet export RUN --runtime onnx`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

__all__ = ["Bundle", "BundleError", "Model", "Result", "load"]
__version__ = "0.1.0"

MANIFEST = "manifest.json"
FORMAT, SCHEMA_VERSION = "messnet bundle", 1
_MAX_MANIFEST_BYTES = 2**24
_DAMAGED = (KeyError, TypeError, ValueError, AttributeError, OSError, EOFError, RuntimeError, zipfile.BadZipFile)


class BundleError(Exception):
    """A bundle that cannot be used: what was expected, what came, what to do, in one line."""


class Bundle:
    """A bundle, a folder or a zip of it, whose manifest has been checked. Raises BundleError when it is none, damaged,
    newer, or names files outside of it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.manifest: dict[str, Any] = self._checked(json.loads(self._stored(MANIFEST)))
        except _DAMAGED as error:
            raise BundleError(f"{path} is no whole messnet bundle ({error}); copy it again") from error

    def _checked(self, record: dict[str, Any]) -> dict[str, Any]:
        if record.get("format") != FORMAT:
            raise BundleError(f"{self.path} is no messnet bundle; make one with `messnet export RUN --runtime onnx`")
        if record["schema_version"] != SCHEMA_VERSION:
            raise BundleError(
                f"{self.path} has schema version {record['schema_version']}, this reader reads {SCHEMA_VERSION}: "
                f"install the messnet-runtime of messnet {record.get('messnet_version')}, or export it again"
            )
        digest = record.pop("sha256")
        if digest != hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest():
            raise BundleError(f"{self.path}/{MANIFEST} is damaged or was edited: export the bundle again")
        for name in record["files"]:
            if {"", ".", ".."} & {*name.split("/")} or {*"\\:\0"} & {*name}:
                raise BundleError(f"{self.path} is refused: its file {name!r} would lie outside of it")
        if "onnx" not in record["runtimes"]:
            raise BundleError(f"{self.path} holds no graphs; export it with `messnet export RUN --runtime onnx`")
        return record

    def read(self, name: str) -> bytes:
        """A file that the manifest lists. Raises BundleError when it is not what was written."""
        try:
            expected, data = self.manifest["files"][name], self._stored(name)
        except _DAMAGED as error:
            raise BundleError(f"{self.path} is no whole bundle: {name} ({error}); copy it again") from error
        if len(data) != expected["bytes"] or hashlib.sha256(data).hexdigest() != expected["sha256"]:
            raise BundleError(f"{self.path} is damaged: {name} differs from its SHA-256; copy it again")
        return data

    def _stored(self, name: str) -> bytes:
        limit = self.manifest["files"][name]["bytes"] if name != MANIFEST else _MAX_MANIFEST_BYTES
        if not self.path.is_file():
            file = self.path / name
            if os.path.realpath(file) != os.path.join(os.path.realpath(self.path), *name.split("/")):
                raise BundleError(f"{self.path} is refused: {name} is a link, or lies behind one")
            if file.stat().st_size > limit:
                raise ValueError(f"{name} is larger than {limit} bytes")
            return file.read_bytes()
        with zipfile.ZipFile(self.path) as archive:
            manifests = [one for one in archive.namelist() if one.count("/") <= 1 and one.split("/")[-1] == MANIFEST]
            root = min(manifests, key=len, default=MANIFEST).removesuffix(MANIFEST)  # zipped by hand: in one folder
            if archive.getinfo(root + name).file_size > limit:
                raise ValueError(f"{name} is larger than {limit} bytes")
            return archive.read(root + name)


@dataclass(frozen=True)
class Result:
    """The prediction for one image (H, W)."""

    labels: np.ndarray
    """(H, W) uint8 class indices."""
    exit_index: int
    """Where the image stopped, from 0, shallow to deep."""
    image_confidence: float
    """Share of confident pixels at that exit, [0, 1]."""
    latency_ms: float
    """From the normalised image to the labels."""


class Model:
    """A bundle's instance, ready to run. Raises BundleError when graphs are missing or the runtime is."""

    def __init__(self, bundle: Bundle, runtime: str | None = None, threads: int = 0, precision: str = "f32") -> None:
        manifest, stored = bundle.manifest, bundle.manifest["runtimes"]["onnx"]
        start = _runtime(runtime, threads, precision)
        try:
            self.class_names: list[str] = manifest["class_names"]
            self.palette = np.array(manifest["palette"], np.uint8)
            self.exits: list[dict[str, Any]] = manifest["instance"]["exits"]
            self._mean = np.array(manifest["preprocessing"]["mean"], np.float32) * np.float32(255)
            self._std = np.array(manifest["preprocessing"]["std"], np.float32) * np.float32(255)
            self._multiple = int(stored["checked"].get("size_multiple", 1))
            names = [f"stage{i}" for i in range(len(self.exits))] + ["output"]
            files = [stored["files"][name] for name in names]
        except _DAMAGED as error:
            raise BundleError(f"{bundle.path}/{MANIFEST} is not whole ({error!r}); export it again") from error
        *self._stages, self._output = (start(bundle.read(file)) for file in files)
        thresholds = [one["pixel_threshold"] for one in self.exits if one["pixel_threshold"] is not None]
        self._pixel_threshold = thresholds[-1] if thresholds else 0.9
        self._took_ms: dict[tuple[int, tuple[int, ...]], float] = {}

    def predict(self, images: Sequence[np.ndarray]) -> list[Result]:
        """Each image (H, W, 3) uint8 RGB, of any size, as far as it has to go."""
        return [next(self._results(image, every=False)) for image in images]

    def anytime(self, image: np.ndarray, deadline_ms: float | None = None) -> Iterator[Result]:
        """The result of exit after exit; the first in any case. Past the deadline no exit is begun, nor one that would
        pass it if it took as long as the last time for an image of this size."""
        start, results = time.perf_counter(), self._results(image, every=True)
        for position in range(len(self.exits)):
            spent = (time.perf_counter() - start) * 1000
            foretold = self._took_ms.get((position, image.shape), 0.0)
            if position and deadline_ms is not None and (spent >= deadline_ms or spent + foretold > deadline_ms):
                return
            yield next(results)

    def _results(self, image: np.ndarray, *, every: bool) -> Iterator[Result]:
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError("an image is (H, W, 3) uint8 RGB: convert it")
        height, width = image.shape[:2]
        bottom, right = -height % self._multiple, -width % self._multiple
        padded = np.pad(image, ((0, bottom), (0, right), (0, 0)), mode="edge")
        x = (padded.astype(np.float32) - self._mean) / self._std
        live = [np.ascontiguousarray(x.transpose(2, 0, 1)[None])]
        size, spent = np.array(padded.shape[:2], np.int64), 0.0
        for position, (stage, choice) in enumerate(zip(self._stages, self.exits, strict=True)):
            start, last = time.perf_counter(), position == len(self.exits) - 1
            own = choice["pixel_threshold"]
            threshold = np.array([self._pixel_threshold if own is None else own], np.float32)
            feeds = {f"live{k}": value for k, value in enumerate(live)} | {"pixel_threshold": threshold}
            found = stage(feeds)
            share = float(found["confidence"][0])
            decides = not every and choice["image_threshold"] is not None and own is not None
            stops = every or last or (decides and share >= choice["image_threshold"])
            labels = None
            if stops:
                labels = self._output({"logits": found["logits"], "size": size})["labels"][0, :height, :width]
            live = [found[f"next{k}"] for k in range(sum(name.startswith("next") for name in found))]
            took = (time.perf_counter() - start) * 1000
            spent += took
            if every:
                self._took_ms[position, image.shape] = took
            if labels is not None:
                yield Result(labels, choice["exit_index"], share, spent)
                if not every:
                    return


def load(path: str | Path, *, runtime: str | None = None, threads: int = 0, precision: str = "f32") -> Model:
    """The bundle at ``path``. ``runtime`` "onnxruntime" or "openvino"; None: the first that is installed. ``precision``
    "bf16" or "f16" with OpenVINO. ``threads`` 0: as many as the runtime likes."""
    return Model(Bundle(path), runtime, threads, precision)


def _runtime(name: str | None, threads: int, precision: str) -> Any:
    """From the bytes of a graph to a function: arrays by name in, arrays by name out."""
    for one, starter in (("onnxruntime", _onnxruntime), ("openvino", _openvino)):
        if name in (one, None):
            try:
                return starter(threads, precision)
            except ImportError as error:
                if name is not None:
                    raise BundleError(f"{one} is not installed: pip install messnet-runtime[{one}]") from error
    wrong = f"no runtime is called {name!r}" if name else "no runtime is installed"
    raise BundleError(f"{wrong}: pip install messnet-runtime[onnxruntime], or [openvino]")


def _onnxruntime(threads: int, precision: str) -> Any:
    import onnxruntime

    if precision != "f32":
        raise BundleError(f"onnxruntime has no precision {precision!r} here, only f32; use openvino")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    # Versions before 1.26 spin for long, and the threads of several sessions take each other's processors.
    soon_sleeps = tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 26)
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if soon_sleeps else "0")
    options.add_session_config_entry("session.intra_op.spin_duration_us", "50")

    def start(graph: bytes) -> Any:
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        inputs, outputs = ([one.name for one in ports] for ports in (session.get_inputs(), session.get_outputs()))
        return lambda feeds: dict(
            zip(outputs, session.run(outputs, {name: feeds[name] for name in inputs}), strict=True)
        )

    return start


def _openvino(threads: int, precision: str) -> Any:
    import openvino

    if precision not in ("f32", "bf16", "f16"):
        raise BundleError(f"openvino has no precision {precision!r}; choose one of f32, bf16, f16")
    config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    config |= {"INFERENCE_NUM_THREADS": threads} if threads else {}
    core = openvino.Core()

    def start(graph: bytes) -> Any:
        model = core.read_model(graph)
        outputs = [port.get_any_name() for port in model.outputs]
        at = {**config, "INFERENCE_PRECISION_HINT": "f32"} if outputs == ["labels"] else config
        request = core.compile_model(model, "CPU", at).create_infer_request()

        def run(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            results = request.infer(feeds)
            return {name: results[name] for name in outputs}

        return run

    return start


def _rgb(file: Image.Image) -> np.ndarray:
    """(H, W, 3), upright as the file says; 16-bit grey is scaled, where Pillow would clip it."""
    ImageOps.exif_transpose(file, in_place=True)
    if file.mode.startswith("I;16"):
        grey = (np.asarray(file).astype(np.uint32) + 128) // 257
        return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
    if file.mode in ("I", "F"):
        raise ValueError("an image of 32-bit pixels, expected 8 or 16 bits")
    return np.array(file.convert("RGB"))


def main(tokens: Sequence[str] | None = None) -> int:
    """The command: masks (class indices, PNG with the bundle's palette) of image files."""
    parser = argparse.ArgumentParser(prog="messnet_runtime", description="Segment images with a messnet bundle.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("masks"))
    parser.add_argument("--runtime", choices=["onnxruntime", "openvino"])
    parser.add_argument("--precision", default="f32", choices=["f32", "bf16", "f16"])
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args(tokens)
    try:
        model = load(options.bundle, runtime=options.runtime, threads=options.threads, precision=options.precision)
        options.out.mkdir(parents=True, exist_ok=True)
        for path in options.images:
            with Image.open(path) as file:
                result = model.predict([_rgb(file)])[0]
            mask = Image.fromarray(result.labels)
            mask.putpalette(model.palette.flatten().tolist())
            mask.save(options.out / f"{path.stem}.png")
            print(
                f"{path}: exit {result.exit_index}, {result.image_confidence:.3f} confident, {result.latency_ms:.1f} ms"
            )
    except (BundleError, OSError, ValueError) as error:
        print(f"messnet_runtime: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
