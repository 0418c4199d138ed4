"""The promised names, and what ``import messnet`` does not do."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import messnet

PROMISED = {
    "AugmentOptions", "ComputeOptions", "CostTable", "DistillOptions", "EightBits", "EvaluationOptions", "Exit",
    "ExitChoice", "ExitTables", "HeadConfig", "HeadSpace", "Instance", "LatencyOptions", "MessError", "MultiExitNet",
    "Normalisation", "PretrainOptions", "Result", "Session", "convert", "distill", "evaluate", "export", "load",
    "pretrain", "profile", "search", "zoo",
}  # fmt: skip
ARGUMENTS = {
    "convert": ["model", "example_input", "num_exits", "normalisation"],
    "profile": ["net", "input_size"],
    "pretrain": ["net", "data", "options", "val", "folder", "compute"],
    "distill": ["net", "data", "heads", "options", "val", "folder", "compute"],
    "evaluate": ["net", "data", "options", "device"],
    "export": ["source", "out", "instance", "graphs", "weights", "images", "model"],
    "search": ["tables", "costs", "setting", "minimise", "maximise", "max_drop_pp"],
    "load": ["path", "instance", "device"],
    "MultiExitNet.load": ["path"],
    "MultiExitNet.run_until": ["x", "exit_index"],
    "MultiExitNet.save": ["path"],
    "CostTable.total_macs": ["convention"],
    "CostTable.to_json": ["path"],
    "Session.predict": ["images"],
    "Session.anytime": ["image", "deadline_ms"],
    "Session.budgeted": ["image", "exit_index"],
    "zoo.drn50_fcn": ["num_classes"],
    "zoo.drn50_deeplabv3": ["num_classes"],
    "zoo.mobilenetv2_fcn": ["num_classes"],
}
QUIET_IMPORT = """
import random, sys, warnings
import numpy  # which adds filters of its own
state, filters = random.getstate(), list(warnings.filters)
import messnet
from types import FunctionType
assert not {"torch", "torchvision", "lightning", "cv2", "matplotlib"} & set(sys.modules), "import messnet is heavy"
assert random.getstate() == state and warnings.filters == filters
assert isinstance(messnet.search, FunctionType), messnet.search
import messnet.cli, messnet.records.exit_tables, messnet.records.costs, messnet.records.instance
try:
    messnet.cli.main(["--help"])
except SystemExit as end:
    assert not end.code
assert "torch" not in sys.modules, "the command's help waits for torch"
import messnet.deployment.loading, messnet.apps.predictions
assert "torchvision" not in sys.modules, "predict waits for torchvision, which brings torch's compiler"
"""


def test_all_is_sorted_and_complete() -> None:
    assert messnet.__all__ == sorted(messnet.__all__)
    assert set(messnet.__all__) == PROMISED
    assert set(messnet.__all__) <= set(dir(messnet))
    assert all(getattr(messnet, name) is not None for name in messnet.__all__)
    assert messnet.__version__.count(".") == 2


@pytest.mark.parametrize("name", ARGUMENTS)
def test_promised_arguments(name: str) -> None:
    function = messnet
    for part in name.split("."):
        function = getattr(function, part)
    assert not [argument for argument in ARGUMENTS[name] if argument not in inspect.signature(function).parameters]


def test_a_result_has_what_is_promised() -> None:
    promised = {"labels", "exit_index", "image_confidence", "confidence_map", "latency_ms"}
    assert promised <= set(messnet.Result.__dataclass_fields__) | set(dir(messnet.Result))


def test_zoo_is_the_module() -> None:
    assert isinstance(messnet.zoo, ModuleType)


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'messnet' has no attribute 'nope'"):
        messnet.nope  # noqa: B018


def test_import_is_light_and_leaves_no_trace(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", QUIET_IMPORT], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert done.stdout.lstrip().startswith("Usage: messnet")  # of --help; the import itself is silent
    assert not list(tmp_path.iterdir())
