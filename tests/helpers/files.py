"""Files outside of the package, and folders before and after."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def module_of(path: Path) -> ModuleType:
    """A file outside of the package, imported."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file below ``folder`` with the hash of its content and its time of writing; empty if there is none. The
    lock of a run, an empty file, holds nothing."""
    return {
        str(file.relative_to(folder)): (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }
