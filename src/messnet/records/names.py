"""The names that recipes, commands, bundles and tables share: of precisions, runtimes, costs and settings. This module
imports nothing that takes time."""

from __future__ import annotations

import sys
from typing import Literal, TypeVar, get_args

from messnet.errors import RecipeError

_Name = TypeVar("_Name", bound=str)

RuntimeName = Literal["torch", "torch-compiled", "onnxruntime", "openvino"]
"""What runs a network. "torch" runs it eagerly, "torch-compiled" through ``torch.compile``; the other two run the ONNX
graphs of a bundle."""
GraphRuntime = Literal["onnxruntime", "openvino"]
Precision = Literal["f32", "bf16", "f16", "int8"]
"""The number format of weights and activations. Graphs in "int8" are made when a bundle is exported."""
CostName = Literal["macs", "macs_paper", "parameters", "memory_bytes", "latency_ms", "latency_p95_ms"]
"""The columns of a cost table: multiply-accumulates in two conventions, sizes, measured times."""
Statistic = Literal["mean", "worst", "p95"]
"""How a cost is counted over images: their mean, the largest, or the least that 95 % of them do not exceed."""
Setting = Literal["budgeted", "anytime", "input_dependent"]
"""How an instance uses its exits: one, all in turn, or the first that is confident."""

LabelSize = Literal["input", "logits"]
"""Where labels are made: at the image's size, or as many as there are logits, without upsampling."""

GRAPH_RUNTIMES: tuple[GraphRuntime, ...] = get_args(GraphRuntime)

DTYPES: dict[Precision, str] = {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "int8": "int8"}
"""What torch and NumPy call each precision, which is how cost tables have always named it."""

_PRECISIONS_OF: dict[str, tuple[Precision, ...]] = {
    "torch": ("f32", "bf16", "f16"),
    "torch-compiled": ("f32", "bf16", "f16"),
    "onnxruntime": ("f32", "int8"),
    "openvino": ("f32", "bf16", "f16", "int8"),
}
# Spellings of version 0.1: --dtype took torch's names, recipes took those of Lightning.
_OLD_PRECISIONS: dict[str, Precision] = {
    "float32": "f32",
    "32-true": "f32",
    "bfloat16": "bf16",
    "bf16-mixed": "bf16",
    "float16": "f16",
    "16-mixed": "f16",
}
_OLD_RUNTIMES: dict[str, RuntimeName] = {"onnx": "onnxruntime"}


def expect_runtime(runtime: str, precision: str) -> None:
    """Raises RecipeError when no runtime has this name, or it cannot compute in this precision."""
    if runtime not in _PRECISIONS_OF:
        raise RecipeError(f"no runtime is called {runtime!r}; choose one of {', '.join(get_args(RuntimeName))}")
    if precision not in _PRECISIONS_OF[runtime]:
        others = [name for name, precisions in _PRECISIONS_OF.items() if precision in precisions]
        advice = f", or run it with {' or '.join(others)}" if others else ""
        raise RecipeError(
            f"{runtime} has no precision {precision!r}; choose one of {', '.join(_PRECISIONS_OF[runtime])}{advice}"
        )


def precision_named(name: str, *, option: str = "precision", quiet: bool = False) -> Precision:
    """The precision that a user calls ``name``. A spelling of version 0.1 is taken, unless ``quiet`` with a line on
    standard error that says the new one. Raises RecipeError for any other word."""
    if name in DTYPES:  # the names of this version are its keys
        return name
    if name not in _OLD_PRECISIONS:
        raise RecipeError(f"{option} {name!r} is unknown: expected one of {', '.join(DTYPES)}")
    return _OLD_PRECISIONS[name] if quiet else _said(option, name, _OLD_PRECISIONS[name])


def runtime_named(name: str, *, option: str = "--runtime") -> RuntimeName:
    """The runtime that a user calls ``name``, with old spellings as for ``precision_named``."""
    if name in _PRECISIONS_OF:
        return name  # type: ignore[return-value]
    if name not in _OLD_RUNTIMES:
        raise RecipeError(f"no runtime is called {name!r}; choose one of {', '.join(_PRECISIONS_OF)}")
    return _said(option, name, _OLD_RUNTIMES[name])


def precision_of_dtype(dtype: str) -> Precision:
    """The precision whose dtype is called "float32", "bfloat16", "float16" or "int8"."""
    return next(precision for precision, name in DTYPES.items() if name == dtype)


def _said(option: str, old: str, new: _Name) -> _Name:
    # On standard error: standard output may be JSON that a program reads.
    print(f"messnet: {option} {old} is called {new} now; the old name goes in the next version", file=sys.stderr)
    return new
