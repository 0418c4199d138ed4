"""The bundle: one instance, complete and checked, in a folder or a zip of it. Read and written without torch.

    manifest.json            what is in it (``Manifest``), with the size and SHA-256 of every other file
    weights.safetensors      tensors for torch; graphs of other runtimes lie in folders of theirs
    costs/*.json             cost tables: workload.json, and one for each device that was measured

No file is code: a model of the user's own is named as "module:function", which must be importable where torch is to run
it. Files that the manifest does not list are left alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import IO, Any, get_args

from messnet.errors import RunError
from messnet.images.preprocessing import MEAN, STD
from messnet.records.codec import from_plain
from messnet.records.files import reading, write_atomically
from messnet.records.instance import FINAL_HEAD, Instance, Setting

__all__ = [
    "MANIFEST",
    "Bundle",
    "Manifest",
    "Preprocessing",
    "Runtime",
    "StoredFile",
    "is_bundle",
    "open_bundle",
    "write_bundle",
]

FORMAT = "messnet bundle"
SCHEMA_VERSION = 1
MANIFEST = "manifest.json"

_MAX_MANIFEST_BYTES = 2**24
_MAX_SIDE = 2**15  # pixels of the images that the network was made for
_MAX_CLASSES = 256  # labels are uint8


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """What a file of the bundle must be."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """An image (H, W, 3) uint8 RGB becomes (image / 255 - mean) / std."""

    mean: tuple[float, ...]
    """Per channel, (3,)."""
    std: tuple[float, ...]
    input_size: tuple[int, int]
    """(height, width) of the training images; others are taken too."""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What a runtime needs of the bundle."""

    files: dict[str, str]
    """By what they are to it: "weights" for torch, graphs of segments, heads and policy for others."""
    checked: dict[str, float] = field(default_factory=dict)
    """How far it agrees with torch on real images; empty for torch itself."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a bundle says of itself: all that a reader needs but the weights."""

    messnet_version: str
    """Of the messnet that wrote it."""
    created: str
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    """RGB per class."""
    preprocessing: Preprocessing
    instance: Instance
    """Its exits, heads and thresholds."""
    network: dict[str, Any]
    """What rebuilds the network: the record of its Blueprint, less what the manifest has of its own."""
    runtimes: dict[str, Runtime]
    """What each of them runs, by its name: "torch"."""
    provenance: dict[str, Any]
    """The stages that made it: when, how long, with which versions."""
    files: dict[str, StoredFile] = field(default_factory=dict)
    """All files but the manifest, by path inside the bundle."""

    def to_json(self) -> str:
        """With a SHA-256 of the record itself at its end."""
        record = {"format": FORMAT, "schema_version": SCHEMA_VERSION, **asdict(self)}
        return json.dumps({**record, "sha256": _digest(record)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, *, source: str) -> Manifest:
        """Raises RunError when ``text``, which came from ``source``, is damaged, foreign or of a newer schema."""
        with reading(f"a bundle's manifest: {source}", made_by="export"):
            record: dict[str, Any] = json.loads(text)
            if record.get("format") != FORMAT:
                raise RunError(f"{source} is not of a messnet bundle; make one with `messnet export RUN`")
            version = record["schema_version"]
            if version != SCHEMA_VERSION:
                newer = version > SCHEMA_VERSION
                advice = f"use messnet {record.get('messnet_version')} or later" if newer else "export it again"
                raise RunError(f"{source} has schema version {version}, this messnet reads {SCHEMA_VERSION}: {advice}")
            if record.pop("sha256") != _digest(record):
                raise RunError(f"{source} is damaged, or was edited: it differs from its SHA-256; export it again")
            del record["format"], record["schema_version"]
            record["class_names"] = tuple(record["class_names"])
            record["palette"] = tuple((r, g, b) for r, g, b in record["palette"])
            sizes = {name: tuple(values) for name, values in record["preprocessing"].items()}
            record["preprocessing"] = Preprocessing(**sizes)
            record["instance"] = from_plain(record["instance"], Instance)
            record["runtimes"] = {name: Runtime(**runtime) for name, runtime in record["runtimes"].items()}
            record["files"] = {name: StoredFile(**stored) for name, stored in record["files"].items()}
            manifest = cls(**record)
            _expect_sound(manifest)
            return manifest


@dataclass(frozen=True)
class Bundle:
    """A bundle that has been opened: it was whole then."""

    path: Path
    manifest: Manifest

    def read(self, name: str) -> bytes:
        """A file that the manifest lists. Raises RunError when it is missing, a link, or not what was written."""
        expected = self.manifest.files[name]
        with reading(f"a whole bundle: {self.path}", made_by="export"), _opened(self.path, name) as (size, stream):
            if size != expected.bytes:
                raise RunError(f"{self.path} is damaged: {name} has {size} bytes, not {expected.bytes}; copy it again")
            data = stream.read()
        if hashlib.sha256(data).hexdigest() != expected.sha256:
            raise RunError(f"{self.path} is damaged: {name} differs from its SHA-256; copy it again")
        return data

    def choose(self, instance: str | Instance | None) -> Instance:
        """The bundle's own instance, or one that was given. Raises RunError for another's name, and where images are
        normalised as this messnet does not."""
        manifest = self.manifest
        if isinstance(instance, str) and instance != manifest.instance.name:
            raise RunError(f"{self.path} has no instance {instance!r}; it has {manifest.instance.name}")
        if (manifest.preprocessing.mean, manifest.preprocessing.std) != (MEAN, STD):
            raise RunError(f"{self.path} normalises images otherwise: use messnet {manifest.messnet_version}")
        return instance if isinstance(instance, Instance) else manifest.instance


def is_bundle(path: str | Path) -> bool:
    """Whether ``path`` is to be read as a bundle: a folder with a manifest, or a zip."""
    path = Path(path)
    return (path / MANIFEST).is_file() or (path.is_file() and (path.suffix == ".zip" or zipfile.is_zipfile(path)))


def open_bundle(path: str | Path) -> Bundle:
    """Reads the manifest of the bundle at ``path``, a folder or a zip of it, and checks every file that it lists.

    Raises RunError, one line, when it is no bundle, damaged, incomplete or newer, or names what lies outside of it.
    """
    path = Path(path)
    with reading(f"a whole bundle: {path}", made_by="export"), _opened(path, MANIFEST) as (size, stream):
        if size > _MAX_MANIFEST_BYTES:
            raise ValueError(f"a {MANIFEST} of {size} bytes")
        text = stream.read()
    bundle = Bundle(path, Manifest.from_json(text, source=f"{path}/{MANIFEST}"))
    for name in bundle.manifest.files:
        bundle.read(name)
    return bundle


def write_bundle(out: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Bundle:
    """Writes ``files`` and the ``manifest`` that lists them: a folder, or a zip where ``out`` ends in .zip.

    A kill leaves nothing under the name ``out``. Raises RunError when something is there already.
    """
    sizes = {name: StoredFile(bytes=len(data), sha256=hashlib.sha256(data).hexdigest()) for name, data in files.items()}
    manifest = replace(manifest, files=sizes)
    _expect_sound(manifest)
    contents = {**files, MANIFEST: manifest.to_json().encode()}
    target = out.resolve()  # a plain name: what comes may be "."
    try:
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise RunError(f"{out} exists already; choose another with --out, or remove it")
        if target.suffix == ".zip":
            write_atomically(target, _zipped(contents))
        else:
            _write_folder(target, contents)
    except OSError as error:
        raise RunError(f"the bundle {out} cannot be written: {error}") from error
    return Bundle(out, manifest)


def _write_folder(target: Path, contents: Mapping[str, bytes]) -> None:
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # what a kill left
    try:
        for name, data in contents.items():
            write_atomically(temporary / name, data)
        if target.exists():
            target.rmdir()
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _zipped(contents: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # stored: weights hardly shrink
        for name, data in contents.items():
            archive.writestr(name, data)
    return buffer.getvalue()


@contextmanager
def _opened(path: Path, name: str) -> Iterator[tuple[int, IO[bytes]]]:
    """Size in bytes and content of a file in the bundle. Raises RunError when it is not there, or a link."""
    missing = RunError(f"{path} is no whole bundle: it has no {name}; copy it again, or `messnet export RUN`")
    if not path.is_file():
        file = path / name
        if os.path.realpath(file) != os.path.join(os.path.realpath(path), *name.split("/")):
            raise RunError(f"{path} is refused: {name} is a link, or lies behind one; a bundle holds plain files")
        if not file.is_file():
            raise missing
        with open(file, "rb") as stream:
            yield os.fstat(stream.fileno()).st_size, stream
        return
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            _expect_inside(member.removesuffix("/"))
        # Zipped by hand, all may lie in one folder.
        manifests = [file for file in archive.namelist() if file.count("/") <= 1 and file.split("/")[-1] == MANIFEST]
        root = min(manifests, key=len, default=MANIFEST).removesuffix(MANIFEST)
        if root + name not in archive.namelist():
            raise missing
        entry = archive.getinfo(root + name)
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise RunError(f"{path} is compressed in a rare way: zip it again, stored or deflated")
        with archive.open(entry) as content:
            yield entry.file_size, content


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _expect_inside(name: str) -> None:
    if {"", ".", ".."} & {*name.split("/")} or {*"\\:\0"} & {*name}:
        raise RunError(f"a bundle is refused: its file {name!r} would lie outside of it")


def _expect_sound(manifest: Manifest) -> None:
    """Raises RunError for a file that would lie outside of the bundle, and for values that no network has."""
    for name in manifest.files:
        _expect_inside(name)
    classes, network, exits = manifest.class_names, manifest.network, manifest.instance.exits
    points, indices = network["exit_points"], [choice.exit_index for choice in exits]
    words = [*classes, network["model"], manifest.instance.name, manifest.instance.policy]
    words += [network["head"]] if network["head"] is not None else []
    words += [choice.head for choice in exits] + [point["node"] for point in points]
    thresholds = [value for choice in exits for value in (choice.pixel_threshold, choice.image_threshold)]
    sizes = manifest.preprocessing.input_size
    sound = {
        "a name": all(isinstance(word, str) for word in words),
        "class_names": 0 < len(classes) <= _MAX_CLASSES,
        "palette": len(manifest.palette) == len(classes) and _within(chain(*manifest.palette), 0, 255, int),
        "input_size": len(sizes) == 2 and _within(sizes, 1, _MAX_SIDE, int),
        "model_options": _within(network["model_options"].values()),
        "a head": all((choice.head == FINAL_HEAD) == (choice.exit_index == len(points) - 1) for choice in exits),
        "setting": manifest.instance.setting in get_args(Setting),
        "exit_index": len(exits) > 0 and _within(indices, 0, len(points) - 1, int) and indices == sorted({*indices}),
        "a threshold": _within(value for value in thresholds if value is not None),
        "a runtime": all(name in manifest.files for one in manifest.runtimes.values() for name in one.files.values()),
    }
    wrong = [what for what, holds in sound.items() if not holds]
    if wrong:
        raise RunError(f"a bundle's manifest is refused: {', '.join(wrong)} cannot be right; export it again")


def _within(values: Iterable[Any], low: float = -1e9, high: float = 1e9, kind: Any = int | float) -> bool:
    """Whether all are numbers from ``low`` to ``high``, none of them NaN."""
    return all(isinstance(value, kind) and low <= value <= high for value in values)
