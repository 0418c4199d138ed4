"""Our own files: written whole or not at all, read with one kind of error."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from zipfile import BadZipFile

from messnet.errors import RecipeError, RunError

# What json, zipfile, NumPy and the codec raise for bytes that are not theirs: KeyError for a member, an array or a key
# that is not there, RuntimeError for an encrypted zip and for JSON too deep. No TypeError and no AttributeError: those
# are faults of our own.
UNREADABLE = (KeyError, ValueError, OSError, EOFError, RuntimeError, MemoryError, BadZipFile, zlib.error)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Writes through a temporary file beside ``path``: a kill leaves the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")  # one name: what a kill leaves is written over
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may keep the new name and lose the bytes
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def expect_free(out: Path) -> None:
    """Raises RunError where there is something at ``out`` that is no empty folder."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise RunError(f"{out} exists already; name another place, or remove it")


def expect_recipe(path: Path) -> None:
    """Raises RecipeError where there is neither a file nor a folder at ``path``; reading it says whether it is a recipe
    or a run, for which packages are needed that may be missing."""
    if not path.exists():
        what = "no recipe" if path.suffix in (".yaml", ".yml") else "no run and no recipe"
        raise RecipeError(
            f"there is {what} {path}: expected the folder of a run or a YAML file; those that come with messnet are in "
            "configs/"
        )


def write_folder(out: Path, files: Mapping[str, bytes]) -> None:
    """Writes ``files``, by path inside the folder: a kill leaves nothing under the name ``out``, where nothing may be
    yet but an empty folder."""
    target = out.resolve()  # a plain name: what comes may be "."
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # what a kill left
    try:
        for name, data in files.items():
            write_atomically(temporary / name, data)
        if target.exists():
            target.rmdir()  # an empty folder may be replaced; one that was filled meanwhile raises
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def reading(what: str, *, made_by: str) -> Iterator[None]:
    """Around the reading of one of our own files: what a damaged or foreign one raises becomes a RunError, which names
    the verb that makes it."""
    try:
        yield
    except UNREADABLE as error:
        raise RunError(f"not {what} ({error}); make it again with `messnet {made_by}`") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around the writing of what training makes: a disk that is full or read-only becomes a RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror or error}): free space or make the folder writable; what was "
            f"saved before is whole, and the same command goes on from there"
        ) from error
