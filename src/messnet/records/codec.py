"""Records (frozen dataclasses) to plain values and back: one codec for every JSON, .npz and YAML file of messnet.

msgspec checks the types and builds the records; what it leaves out is here: keys that no field has are refused with the
nearest name, and a dictionary whose keys are tuples is written as rows, for JSON knows only text as a key.
"""

from __future__ import annotations

import difflib
import io
import json
import math
import re
import zipfile
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import ClassVar, Literal, Self, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import msgspec
import numpy as np

from messnet.errors import RunError
from messnet.records.files import UNREADABLE

Plain = None | bool | int | float | str | list["Plain"] | dict[str, "Plain"]
"""The values that JSON and YAML hold."""

LEFT_OUT = MappingProxyType({"left_out": True})
"""Metadata of a field that is not written where it is its default: files then are those of before there was it."""

_Record = TypeVar("_Record")

# Tables of pixel counts compress 20 to 100 times, deflate at most a thousand times.
_MOST_COMPRESSED = 300
_ALWAYS_FITS = 2**28

_WORDS = {  # for msgspec's names of types
    "object": "keys and values",
    "array": "a list",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "path": "a path",
    "|": "or",
}


class MismatchError(ValueError):
    """A value that does not fit its record. ``place`` is where, as "pretrain.augment.crop[0]"; empty: the whole."""

    def __init__(self, place: str, problem: str) -> None:
        super().__init__(f"{place}: {problem}" if place else problem)
        self.place, self.problem = place, problem


class _OtherTypeError(ValueError):
    """Raised in ``_convert_other`` only, so that it is told from the errors of a record's own checks."""


def to_plain(value: object) -> Plain:
    """Plain values of a record, its fields in their order. Arrays are none: see ``Stored.to_bytes``."""
    if is_dataclass(value) and not isinstance(value, type):
        # Not dataclasses.asdict: that copies what it does not know, such as arrays.
        given = ((field, getattr(value, field.name)) for field in fields(value))
        return {field.name: to_plain(own) for field, own in given if field.metadata != LEFT_OUT or own != field.default}
    match value:
        case None | bool() | int() | float() | str():
            return value
        case dict() if any(isinstance(key, tuple) for key in value):
            return [[*map(to_plain, key), to_plain(item)] for key, item in value.items()]
        case dict():
            return {str(key): to_plain(item) for key, item in value.items()}
        case list() | tuple():  # JSON has but one of them: the declared type says which it was
            return [to_plain(item) for item in value]
        case Path():
            return str(value)
    raise TypeError(f"{type(value).__name__} is no plain value")


def from_plain(value: object, kind: type[_Record], *, texts: bool = False) -> _Record:
    """The record of type ``kind`` that ``to_plain`` made ``value`` of. ``texts``: numbers may come as text, "1e-3".

    Raises MismatchError where a key is unknown or missing, or a value is of another type. What the record's own checks
    raise is passed on.
    """
    value = _prepared(value, kind, "")
    try:
        return msgspec.convert(value, kind, strict=not texts, dec_hook=_convert_other)
    except msgspec.ValidationError as error:
        cause = error.__cause__
        if cause is not None and not isinstance(cause, _OtherTypeError):
            raise cause from None  # a ValueError or TypeError of the record's own checks is a fault of ours, not damage
        raise _mismatch(error, value, kind) from None


class Stored:
    """A dataclass that is a file of its own. The class says what the file is called in errors, which verb makes it and
    its version (None: the file names none): ``class Instance(Stored, what="an instance file", made_by="search")``.

    All that reads raises RunError, one line, for what is damaged, something else, or of another version.
    """

    what: ClassVar[str]
    made_by: ClassVar[str]
    version: ClassVar[int | None]
    indent: ClassVar[int]

    def __init_subclass__(cls, *, what: str, made_by: str, version: int | None = 1, indent: int = 1) -> None:
        cls.what, cls.made_by, cls.version, cls.indent = what, made_by, version, indent

    def to_json(self) -> str:
        return json.dumps(self._stamped(to_plain(self)), indent=self.indent) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        try:
            record: object = json.loads(text)
        except UNREADABLE as error:
            raise cls._refused(error) from error
        return cls._built(record)

    def to_bytes(self) -> bytes:
        """A .npz file: arrays as they are, all other fields as JSON in the array ``meta``."""
        arrays = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        meta = self._stamped({name: to_plain(value) for name, value in vars(self).items() if name not in arrays})
        buffer = io.BytesIO()
        np.savez_compressed(buffer, meta=np.array(json.dumps(meta)), **arrays)  # type: ignore[arg-type]
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        try:
            _expect_honest(data)
            # A pickle would run whatever its maker wants.
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            meta: object = json.loads(str(arrays.pop("meta")))
        except UNREADABLE as error:
            raise cls._refused(error) from error
        return cls._built({**meta, **arrays} if isinstance(meta, dict) else meta)

    def _stamped(self, record: Plain) -> dict[str, Plain]:
        assert isinstance(record, dict)
        return record if self.version is None else {"schema_version": self.version, **record}

    @classmethod
    def _built(cls, record: object) -> Self:
        if not isinstance(record, dict) or (cls.version is not None and "schema_version" not in record):
            raise cls._refused("it names no schema_version")
        if (found := record.pop("schema_version", None)) != cls.version:
            raise RunError(
                f"{cls.what} of schema version {found}: this messnet reads {cls.version}; make it again with "
                f"`messnet {cls.made_by}`"
            )
        try:
            return from_plain(record, cls)
        # What else a record's own checks raise is a fault of ours and no damage: it keeps its traceback.
        except MismatchError as error:
            raise cls._refused(error) from error

    @classmethod
    def _refused(cls, reason: object) -> RunError:
        return RunError(f"not {cls.what} ({reason}); make it again with `messnet {cls.made_by}`")


def _expect_honest(data: bytes) -> None:
    """Raises ValueError for a .npz whose arrays claim more than the file can hold.

    NumPy makes room for an array as its header says before it reads it: a few bytes could ask for a terabyte.
    """
    total = 0
    # Headers alone are read here, nothing is unpacked.
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for member in archive.infolist():
            total += member.file_size
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                if version not in read:
                    raise ValueError(f"array {member.filename} is of format {version}")
                shape, _, dtype = read[version](file)
            if (claimed := math.prod(shape) * dtype.itemsize) > member.file_size:
                raise ValueError(f"array {member.filename} claims {claimed:,} bytes and has {member.file_size:,}")
    if total > max(_ALWAYS_FITS, _MOST_COMPRESSED * len(data)):
        raise ValueError(f"its arrays claim {total:,} bytes, more than {_MOST_COMPRESSED} times the file")


def field_type(kind: object, key: str | int) -> object:
    """The declared type of what lies under ``key`` in a value of type ``kind``; ``object`` where there is none."""
    for option in type_options(kind):
        args = get_args(option)
        if is_dataclass(option):
            return _hints(cast("type", option)).get(str(key), object)
        if get_origin(option) is dict:
            return args[1]
        if get_origin(option) is list or (get_origin(option) is tuple and args[-1] is ...):
            return args[0]
        if get_origin(option) is tuple and isinstance(key, int) and key < len(args):
            return args[key]
    return object


def type_options(kind: object) -> tuple[object, ...]:
    """The members of a union, or the type itself."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


@cache  # resolving annotations takes longer than reading a small record
def _hints(kind: type) -> dict[str, object]:
    return get_type_hints(kind)


def _prepared(value: object, kind: object, place: str) -> object:
    """``value`` with rows for a dictionary put back into one. Raises MismatchError for a key that no field has."""
    if isinstance(value, dict):
        record = next((option for option in type_options(kind) if is_dataclass(option)), None)
        if record is not None:
            _expect_fields(value, [field.name for field in fields(cast("type", record))], place)
        dotted = f"{place}." if place else ""
        return {key: _prepared(item, field_type(kind, key), f"{dotted}{key}") for key, item in value.items()}
    if isinstance(value, list):
        # JSON's keys are text: what stands where a dictionary is declared is its rows.
        if any(get_origin(option) is dict for option in type_options(kind)):
            return _from_rows(value, field_type(kind, ""), place)
        return [_prepared(item, field_type(kind, i), f"{place}[{i}]") for i, item in enumerate(value)]
    return value


def _from_rows(rows: list[object], kind: object, place: str) -> dict[tuple[object, ...], object]:
    found = {}
    for i, row in enumerate(rows):
        if not isinstance(row, list) or len(row) < 2 or any(isinstance(part, list | dict) for part in row[:-1]):
            raise MismatchError(f"{place}[{i}]", "expected a key and its value in a row")
        found[tuple(row[:-1])] = _prepared(row[-1], kind, f"{place}[{i}]")
    return found


def _expect_fields(value: dict[str, object], known: list[str], place: str) -> None:
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            advice = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
            raise MismatchError(place, f"unknown key {str(key)!r}: {advice}")


def _convert_other(kind: type, value: object) -> object:
    """Types that msgspec does not know: paths; arrays and what may be anything, which stay as they are."""
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is object or isinstance(value, np.ndarray):
        return value
    raise _OtherTypeError(f"Expected `{'path' if kind is Path else 'array'}`, got another type")


def _mismatch(error: msgspec.ValidationError, value: object, kind: object) -> MismatchError:
    """msgspec's words, made to name the value and the choices there were."""
    problem, _, place = str(error).partition(" - at `$")
    place = place.strip("`").removeprefix(".")
    # Walk to the place, to show the value that stands there and the choices there were.
    for step in re.findall(r"[^.\[\]]+", place):
        key = int(step) if isinstance(value, list) and step.isdigit() else step
        inside = isinstance(value, dict) and key in value
        value = value[key] if inside or isinstance(key, int) else None  # type: ignore[index]
        kind = field_type(kind, key)
    choices = [choice for option in type_options(kind) if get_origin(option) is Literal for choice in get_args(option)]
    if problem.startswith("Invalid enum value"):
        problem = f"expected {' or '.join(map(repr, choices))}, got {value!r}"
    elif problem.startswith("Expected") and ", got " in problem:
        expected = problem.removeprefix("Expected ").partition(", got ")[0]
        words = [_WORDS.get(word, word) for word in expected.replace("`", "").split()]
        problem = f"expected {' '.join(words)}, got {value!r}"
    return MismatchError(place, problem.replace("`", "'").replace("Object missing required field", "no key"))
