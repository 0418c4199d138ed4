"""The bundle: one instance, complete and checked, in a folder or a zip of it. Read and written without torch.

    manifest.json            what is in it (``Manifest``), with the size and SHA-256 of every other file
    weights.safetensors      tensors for torch; graphs of other runtimes lie in folders of theirs
    costs/*.json             cost tables: workload.json, and one for each device that was measured

No file is code. A model of somebody's own is named as "module:function", but a bundle is a stranger's file, so that
module is imported only where the user names it again; graphs need no code at all. Files that the manifest does not list
are left alone. A SHA-256 tells damage, not origin: whoever changes a file can write the digest that fits.

Whatever comes is read in time linear in its size: nothing is read past what was claimed, and what may be claimed is
bounded below.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import IO, Any

from messnet.errors import RunError
from messnet.images.preprocessing import Normalisation
from messnet.records.codec import from_plain
from messnet.records.exit_point import ExitPoint
from messnet.records.files import expect_free, reading, write_atomically, write_folder
from messnet.records.instance import FINAL_HEAD, Instance

FORMAT = "messnet bundle"
SCHEMA_VERSION = 1
MANIFEST = "manifest.json"

# Bounds on what a bundle may claim: all of them far above what any has needed.
_MAX_MANIFEST_BYTES = 2**22
_MAX_BYTES = 2**30  # of all files
_MAX_FILES = 1000
_MAX_EXPANSION = 64  # bytes for each byte of a zip; weights shrink by a tenth, JSON to a tenth
_MAX_DIRECTORY_BYTES = 2**20  # of a zip: where it lists its files
_MAX_SIDE = 2**13  # pixels of the images that the network was made for
_MAX_PIXELS = 2**24
_MAX_CLASSES = 256  # labels are uint8
_MAX_EXITS = 1000
_MAX_CHANNELS = 2**16
_MAX_STRIDE = 2**10
_MAX_NUMBER_IN_A_HEAD = 64  # such as its extra blocks
_MAX_WORD = 1000  # characters
_CHUNK = 2**20


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """What a file of the bundle must be."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """An image (H, W, 3) uint8 RGB, resized where ``resize`` says so, becomes (image / 255 - mean) / std."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    input_size: tuple[int, int]
    """(height, width) of the training images, resized; others are taken too."""
    resize: int | None = None
    """Pixels of the shorter side that an image is brought to; labels have the image's own size again."""

    @property
    def normalisation(self) -> Normalisation:
        return Normalisation(mean=self.mean, std=self.std)


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What a runtime needs of the bundle."""

    files: dict[str, str]
    """By what they are to it: "weights" for torch, graphs of segments, heads and policy for others."""
    checked: dict[str, float] = field(default_factory=dict)
    """How far it agrees with torch on real images; empty for torch itself."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """What rebuilds the network: the record of its Blueprint, less what the manifest has of its own."""

    schema_version: int
    model: str
    """A zoo name, or "module:function" of the maker's own."""
    model_options: dict[str, float]
    exit_points: tuple[ExitPoint, ...]
    head: str | None = None


@dataclass(frozen=True, kw_only=True)
class Masks:
    """How the masks that it was trained on say classes, as ``open_folder`` takes it."""

    mask_values: tuple[int, ...] = ()
    void_index: int | None = None


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
    network: Network
    runtimes: dict[str, Runtime]
    """What each of them runs, by its name: "torch"."""
    provenance: dict[str, Any]
    """The stages that made it: when, how long, with which versions. ``masks`` lies here too: a key of the manifest's
    own would be unknown to the messnets before it, which then refuse the bundle."""
    files: dict[str, StoredFile] = field(default_factory=dict)
    """All files but the manifest, by path inside the bundle."""

    @property
    def masks(self) -> Masks:
        """Empty where masks are of plain indices, and in bundles of before."""
        return from_plain(self.provenance.get("masks", {}), Masks)

    def to_json(self) -> str:
        """With a SHA-256 of the record itself at its end."""
        record = {"format": FORMAT, "schema_version": SCHEMA_VERSION, **asdict(self)}
        return json.dumps({**record, "sha256": _digest(record)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, *, source: str) -> Manifest:
        """Raises RunError when ``text``, which came from ``source``, is damaged, foreign or of a newer schema."""
        with reading(f"a bundle's manifest: {source}", made_by="export"):
            record: dict[str, Any] = json.loads(text)
            if not isinstance(record, dict) or record.get("format") != FORMAT:
                raise RunError(f"{source} is not of a messnet bundle; make one with `messnet export RUN`")
            version = record["schema_version"]
            if version != SCHEMA_VERSION:
                newer = isinstance(version, int) and version > SCHEMA_VERSION
                advice = f"use messnet {record.get('messnet_version')} or later" if newer else "export it again"
                raise RunError(f"{source} has schema version {version}, this messnet reads {SCHEMA_VERSION}: {advice}")
            if record.pop("sha256") != _digest(record):  # of all but itself
                raise RunError(f"{source} is damaged, or was edited: it differs from its SHA-256; export it again")
            del record["format"], record["schema_version"]
            manifest = from_plain(record, cls)
            _expect_sound(manifest)
            return manifest


@dataclass(frozen=True)
class Bundle:
    """A bundle that has been opened: it was whole then."""

    path: Path
    manifest: Manifest

    def __repr__(self) -> str:
        return f"<Bundle {self.path}: {self.manifest.instance!r} for {', '.join(self.manifest.runtimes)}>"

    def read(self, name: str) -> bytes:
        """A file that the manifest lists. Raises RunError when it is missing, a link, or not what was written."""
        with _contents(self.path) as contents:
            return b"".join(_chunks(contents, name, self.manifest.files[name]))

    @property
    def weights(self) -> str:
        """The name of the file of weights for torch. Raises RunError where there is none."""
        name = self.manifest.runtimes["torch"].files.get("weights") if "torch" in self.manifest.runtimes else None
        if name is None:
            kinds = ", ".join(self.manifest.runtimes) or "nothing that runs"
            raise RunError(
                f"{self.path} holds no weights for torch, but {kinds}: run its graphs with --runtime onnxruntime, and "
                f"export again from its run, or from its session with model='module:function'"
            )
        return name

    def choose(self, instance: str | Instance | None) -> Instance:
        """The bundle's own instance, or one that was given. Raises RunError for another's name."""
        manifest = self.manifest
        if isinstance(instance, str) and instance != manifest.instance.name:
            raise RunError(f"{self.path} has no instance {instance!r}; it has {manifest.instance.name}")
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
    with _contents(path) as contents:
        with contents.opened(MANIFEST) as (size, stream):
            if size > _MAX_MANIFEST_BYTES:
                raise RunError(
                    f"{path} is refused: its {MANIFEST} has {size} bytes, {_MAX_MANIFEST_BYTES} are the limit"
                )
            text = stream.read(_MAX_MANIFEST_BYTES)  # no more, whatever size was claimed
        manifest = Manifest.from_json(text, source=f"{path}/{MANIFEST}")
        claimed = sum(stored.bytes for stored in manifest.files.values())
        if claimed > contents.most_bytes or len(manifest.files) > _MAX_FILES:
            raise RunError(
                f"{path} is refused: it lists {len(manifest.files)} files of {claimed} bytes, at most {_MAX_FILES} of "
                f"{contents.most_bytes} can be a bundle of this size"
            )
        for name, stored in manifest.files.items():
            for _ in _chunks(contents, name, stored):
                pass
    return Bundle(path, manifest)


def write_bundle(out: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Bundle:
    """Writes ``files`` and the ``manifest`` that lists them: a folder, or a zip where ``out`` ends in .zip.

    A kill leaves nothing under the name ``out``. Raises RunError when something is there already.
    """
    sizes = {name: StoredFile(bytes=len(data), sha256=hashlib.sha256(data).hexdigest()) for name, data in files.items()}
    manifest = replace(manifest, files=sizes)
    _expect_sound(manifest)  # what would be refused when it is opened is not written
    contents = {**files, MANIFEST: manifest.to_json().encode()}
    try:
        expect_free(out)
        if out.suffix == ".zip":
            write_atomically(out, _zipped(contents))
        else:
            write_folder(out, contents)
    except OSError as error:
        raise RunError(f"the bundle {out} cannot be written: {error}") from error
    return Bundle(out, manifest)


def _zipped(contents: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # stored: weights hardly shrink
        for name, data in contents.items():
            archive.writestr(name, data)
    return buffer.getvalue()


class _Folder:
    """A bundle as a folder."""

    most_bytes = _MAX_BYTES

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def opened(self, name: str) -> Iterator[tuple[int, IO[bytes]]]:
        """Size in bytes and content of a file. Raises RunError when it is not there, or a link."""
        file = self.path / name
        # By its real path: a link anywhere on the way could lead to any file of this machine.
        if os.path.realpath(file) != os.path.join(os.path.realpath(self.path), *name.split("/")):
            raise RunError(f"{self.path} is refused: {name} is a link, or lies behind one; a bundle holds plain files")
        if not file.is_file():
            raise _missing(self.path, name)
        with open(file, "rb") as stream:
            yield os.fstat(stream.fileno()).st_size, stream


class _Archive:
    """A bundle as a zip, which is opened once: its list of files is read each time that it is."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path, self._archive = path, archive
        self.most_bytes = min(_MAX_BYTES, _MAX_EXPANSION * path.stat().st_size)
        self._names = {*archive.namelist()}
        for member in self._names:
            _expect_inside(member.removesuffix("/"))
        # Zipped by hand, all may lie in one folder.
        manifests = [file for file in self._names if file.count("/") <= 1 and file.split("/")[-1] == MANIFEST]
        self._root = min(manifests, key=len, default=MANIFEST).removesuffix(MANIFEST)

    @contextmanager
    def opened(self, name: str) -> Iterator[tuple[int, IO[bytes]]]:
        """Size in bytes, as the zip claims it, and content of a file. Raises RunError when it is not there."""
        if self._root + name not in self._names:
            raise _missing(self.path, name)
        entry = self._archive.getinfo(self._root + name)
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise RunError(f"{self.path} is compressed in a rare way: zip it again, stored or deflated")
        with self._archive.open(entry) as content:
            yield entry.file_size, content


@contextmanager
def _contents(path: Path) -> Iterator[_Folder | _Archive]:
    """The files of a bundle. What a damaged one raises becomes a RunError."""
    with reading(f"a whole bundle: {path}", made_by="export"):
        if not path.is_file():
            yield _Folder(path)
            return
        _expect_short_directory(path)
        with zipfile.ZipFile(path) as archive:
            yield _Archive(path, archive)


def _expect_short_directory(path: Path) -> None:
    """Raises RunError for a zip whose list of files is long, before it is read: zipfile makes an object for each.

    The last record of a zip says how long the list is: 22 bytes at its end, before a comment of at most 2^16 - 1 bytes.
    zipfile looks for it in the same two steps.
    """
    with open(path, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(-min(size, 22 + 2**16), os.SEEK_END)
        end = stream.read()
    plain = end[-22:-18] == b"PK\5\6" and end[-2:] == b"\0\0"
    at = len(end) - 22 if plain else end.rfind(b"PK\5\6")
    if at < 0:
        return  # no zip, as zipfile will say
    is_zip64 = end[max(0, at - 20) :][:4] == b"PK\6\7"
    if is_zip64 or int.from_bytes(end[at + 12 : at + 16], "little") > _MAX_DIRECTORY_BYTES:
        raise RunError(f"{path} is refused: it lists more files than any bundle has, as torch's weights do")


def _chunks(contents: _Folder | _Archive, name: str, expected: StoredFile) -> Iterator[bytes]:
    """A file of the bundle, piece by piece and no more than is ``expected``. Raises RunError, at its end at the latest,
    when it is something else."""
    path, digest, left = contents.path, hashlib.sha256(), expected.bytes
    with contents.opened(name) as (size, stream):
        if size != expected.bytes:
            raise RunError(f"{path} is damaged: {name} has {size} bytes, not {expected.bytes}; copy it again")
        while chunk := stream.read(min(_CHUNK, left + 1)):  # one byte more than is left tells that there is more
            left -= len(chunk)
            if left < 0:
                raise RunError(f"{path} is damaged: {name} has more than {expected.bytes} bytes; copy it again")
            digest.update(chunk)
            yield chunk
    if digest.hexdigest() != expected.sha256:
        raise RunError(f"{path} is damaged: {name} differs from its SHA-256; copy it again")


def _missing(path: Path, name: str) -> RunError:
    return RunError(f"{path} is no whole bundle: it has no {name}; copy it again, or `messnet export RUN`")


def _digest(record: dict[str, Any]) -> str:
    # Sorted: JSON gives no meaning to the order of keys.
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _expect_inside(name: str) -> None:
    # On Windows a backslash separates folders and a colon names a drive; a zero byte ends a name for the system.
    if {"", ".", ".."} & {*name.split("/")} or {*"\\:\0"} & {*name}:
        raise RunError(f"a bundle is refused: its file {name!r} would lie outside of it")


def _expect_sound(manifest: Manifest) -> None:
    """Raises RunError for a file that would lie outside of the bundle, and for values that no network has."""
    for name in manifest.files:
        _expect_inside(name)
    classes, network, exits = manifest.class_names, manifest.network, manifest.instance.exits
    points, indices = network.exit_points, [choice.exit_index for choice in exits]
    words = [*classes, network.model, manifest.instance.name, manifest.instance.policy, network.head or ""]
    words += [choice.head for choice in exits] + [point.node for point in points] + [*network.model_options]
    thresholds = [value for choice in exits for value in (choice.pixel_threshold, choice.image_threshold)]
    in_heads = [int(number) for choice in exits for number in re.findall(r"[0-9]{1,9}", choice.head)]
    (height, width), multiples = manifest.preprocessing.input_size, _size_multiples(manifest)
    sound = {
        "masks": _within([*manifest.masks.mask_values, manifest.masks.void_index or 0], 0, 0xFFFFFF),
        "a name": all(len(word) <= _MAX_WORD for word in words),
        "class_names": 0 < len(classes) <= _MAX_CLASSES,
        "palette": len(manifest.palette) == len(classes) and _within(chain(*manifest.palette), 0, 255),
        "input_size": _within((height, width), 1, _MAX_SIDE) and height * width <= _MAX_PIXELS,
        "mean": _within(manifest.preprocessing.mean, 0, 1),
        "std": _within(manifest.preprocessing.std, 1e-6, 1),
        "resize": _within([manifest.preprocessing.resize or 1], 1, _MAX_SIDE),
        "model_options": _within(network.model_options.values()) and not _is_taken(network.model_options),
        "an exit point": 0 < len(points) <= _MAX_EXITS
        and _within((point.channels for point in points), 1, _MAX_CHANNELS)
        and _within((value for point in points for value in (point.output_stride, point.dilation)), 1, _MAX_STRIDE),
        "a head": all((choice.head == FINAL_HEAD) == (choice.exit_index == len(points) - 1) for choice in exits)
        and _within(in_heads, 0, _MAX_NUMBER_IN_A_HEAD),
        "exit_index": len(exits) > 0 and _within(indices, 0, len(points) - 1) and indices == sorted({*indices}),
        "a threshold": _within(value for value in thresholds if value is not None),
        "a file": all(stored.bytes >= 0 for stored in manifest.files.values()),
        "a runtime": all(name in manifest.files for one in manifest.runtimes.values() for name in one.files.values()),
        "size_multiple": all(value == int(value) for value in multiples) and _within(multiples, 1, _MAX_STRIDE),
    }
    wrong = [what for what, holds in sound.items() if not holds]
    if wrong:
        raise RunError(f"a bundle's manifest is refused: {', '.join(wrong)} cannot be right; export it again")


def _size_multiples(manifest: Manifest) -> list[float]:
    found = [runtime.checked.get("size_multiple", 1.0) for runtime in manifest.runtimes.values()]
    return found if _within(found) else [0.0]  # neither NaN nor infinite


def _is_taken(options: Mapping[str, float]) -> bool:
    """Whether one of a model's options would stand in for what messnet gives it."""
    return any(name == "num_classes" or name.startswith("weights") for name in options)


def _within(values: Iterable[float], low: float = -1e9, high: float = 1e9) -> bool:
    """Whether all are from ``low`` to ``high``, none of them NaN."""
    return all(low <= value <= high for value in values)
