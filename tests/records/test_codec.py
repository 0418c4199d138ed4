"""The codec against dataclasses.asdict and json, and every way in which a file can be wrong."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from messnet.errors import RunError
from messnet.records.codec import MismatchError, Stored, from_plain, to_plain
from messnet.records.instance import Exit


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: tuple[int, int] = (1, 2)
    rate: float = 0.5
    kind: Literal["fast", "slow"] = "fast"


@dataclass(frozen=True, kw_only=True)
class Outer(Stored, what="an outer file", made_by="search", version=3):
    name: str
    inner: Inner = Inner()
    weights: tuple[float, ...] | Literal["auto"] | None = None
    root: Path | None = None
    by_exit: dict[Exit, Inner] = field(default_factory=dict)
    more: list[Inner] = field(default_factory=list)
    words: dict[str, str | int] = field(default_factory=dict)


FULL = Outer(
    name="n",
    inner=Inner(size=(3, 4), rate=1e-7, kind="slow"),
    weights=(1.0, 2.5),
    root=Path("a/b"),
    by_exit={Exit(0, "x"): Inner(), Exit(1, "final"): Inner(rate=2.0)},
    more=[Inner(), Inner(kind="slow")],
    words={"a": 1, "b": "c"},
)


def test_plain_values_are_those_of_asdict() -> None:
    expected = asdict(FULL) | {"root": "a/b", "by_exit": [[*key, asdict(part)] for key, part in FULL.by_exit.items()]}
    assert to_plain(FULL) == json.loads(json.dumps(expected))
    assert list(to_plain(FULL)) == list(expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("record", [FULL, Outer(name=""), Outer(name="auto", weights="auto")], ids=lambda r: r.name)
def test_a_record_reads_back(record: Outer) -> None:
    again = from_plain(json.loads(json.dumps(to_plain(record))), Outer)
    assert again == record
    assert all(isinstance(key, Exit) for key in again.by_exit)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nam": 1}, "unknown key 'nam': did you mean 'name'?"),
        ({"inner": {"zzz": 1}}, "inner: unknown key 'zzz': expected one of size, rate, kind"),
        ({"more": [{}, {"sise": 1}]}, "more[1]: unknown key 'sise': did you mean 'size'?"),
        ({"inner": {"size": [1]}}, "inner.size: expected a list of length 2, got [1]"),
        ({"inner": {"size": [1, "2"]}}, "inner.size[1]: expected a whole number, got '2'"),
        ({"inner": {"rate": True}}, "inner.rate: expected a number, got True"),
        ({"inner": {"kind": "medium"}}, "inner.kind: expected 'fast' or 'slow', got 'medium'"),
        ({"inner": 5}, "inner: expected keys and values, got 5"),
        ({"root": 5}, "root: expected a path, got 5"),
        ({"by_exit": [[0, "x"]]}, "by_exit"),
        ({"by_exit": [0]}, "by_exit[0]: expected a key and its value in a row"),
        ({"by_exit": [[[0], "x", {}]]}, "by_exit[0]: expected a key and its value in a row"),
        ({"name": None}, "name: expected text, got None"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(change: dict[str, object], words: str) -> None:
    with pytest.raises(MismatchError) as error:
        from_plain({"name": "n"} | change, Outer)
    assert words in str(error.value)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(MismatchError, match="no key 'name'"):
        from_plain({}, Outer)


def test_numbers_as_text() -> None:
    assert from_plain({"name": "7", "inner": {"rate": "1e-3"}}, Outer, texts=True) == Outer(
        name="7", inner=Inner(rate=0.001)
    )


@dataclass(frozen=True, kw_only=True)
class Faulty(Stored, what="a file", made_by="run"):
    length: int = 0

    def __post_init__(self) -> None:
        len(self.length)  # type: ignore[arg-type]


def test_a_fault_of_our_own_is_no_damage() -> None:
    with pytest.raises(TypeError, match=r"object of type 'int' has no len\(\)"):
        Faulty.from_json('{"schema_version": 1}')


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not an outer file"),
        (b"\xff\xfe", "not an outer file"),
        ("[" * 100_000, "not an outer file"),
        ("[]", "names no schema_version"),
        ("null", "names no schema_version"),
        ('{"schema_version": 3}', "no key 'name'"),
        ('{"schema_version": 4, "name": "n"}', "schema version 4: this messnet reads 3"),
        ('{"schema_version": 3, "name": "n", "new": 1}', "unknown key 'new'"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_other_files_are_refused_in_one_line(text: str | bytes, words: str) -> None:
    with pytest.raises(RunError) as error:
        Outer.from_json(text)
    message = str(error.value)
    assert words in message
    assert message.endswith("make it again with `messnet search`")
    assert len(message.splitlines()) == 1


def test_json_is_written_with_its_version_first() -> None:
    assert json.loads(FULL.to_json()) == {"schema_version": 3} | to_plain(FULL)  # type: ignore[operator]
    assert Outer.from_json(FULL.to_json()) == FULL


@dataclass(frozen=True, kw_only=True, eq=False)
class Arrays(Stored, what="arrays", made_by="evaluate"):
    names: tuple[str, ...]
    exits: tuple[Exit, ...]
    values: NDArray[np.float16]
    origin: str = ""


def test_arrays_are_kept_as_they_are() -> None:
    record = Arrays(names=("ä",), exits=(Exit(0, "x"),), values=np.array([[0.1, np.nan]], np.float16), origin="o")
    again = Arrays.from_bytes(record.to_bytes())
    assert (again.names, again.exits, again.origin) == (record.names, record.exits, record.origin)
    np.testing.assert_array_equal(again.values, record.values)
    assert again.values.dtype == np.float16
    data = record.to_bytes()
    for damaged in (b"", data[:20], data[:-30], json.dumps(to_plain({"schema_version": 1})).encode()):
        with pytest.raises(RunError, match=r"not arrays .*messnet evaluate"):
            Arrays.from_bytes(damaged)


def test_an_array_that_claims_more_than_it_has_is_refused_before_room_is_made() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        header = io.BytesIO()
        claim = {"descr": "<f8", "fortran_order": False, "shape": (2**37,)}  # a terabyte
        np.lib.format.write_array_header_1_0(header, claim)
        archive.writestr("values.npy", header.getvalue() + bytes(64))
    with pytest.raises(RunError, match=r"values.npy claims 1,099,511,627,776 bytes and has \d+"):
        Arrays.from_bytes(buffer.getvalue())
