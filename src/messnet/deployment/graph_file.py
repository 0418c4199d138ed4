"""ONNX files without the package onnx: what they take and give, whether a bundle may hold them, and their parts.

An ONNX file is one protobuf message. Its encoding is a sequence of fields, each a key (number and wire type) and a
value that says its own length, so it can be walked without knowing every field: see
https://protobuf.dev/programming-guides/encoding and onnx.proto for the numbers below.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from messnet.errors import RunError

_VARINT, _FIXED64, _MESSAGE, _FIXED32 = 0, 1, 2, 5  # wire types; 3 and 4, groups, occur in no ONNX file
_MODEL_GRAPH, _MODEL_TRAINING, _MODEL_FUNCTIONS = 7, 20, 25
_NODE, _INITIALIZER, _INPUT, _OUTPUT = 1, 5, 11, 12  # of a graph
_NODE_INPUT, _NODE_OUTPUT, _VALUE_NAME = 1, 2, 1
_TENSOR_NAME, _TENSOR_TYPE, _TENSOR_DATA = 8, 2, 9
_TENSOR_EXTERNAL = 13, 14  # external_data and data_location
# What lies inside of what, by field number, as far as something may be wrong there.
_INSIDE = {
    "model": {_MODEL_GRAPH: "graph", 8: "operator set"},
    "graph": {_NODE: "node", _INITIALIZER: "tensor", 15: "sparse tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 10: "tensor", 6: "graph", 11: "graph", 22: "sparse tensor", 23: "sparse tensor"},
    "sparse tensor": {1: "tensor", 2: "tensor"},  # values and their places
    "operator set": {},
}
_DOMAIN = {"operator set": 1, "node": 7}
"""The field that says whose operators they are."""
_DOMAINS = (b"", b"ai.onnx")  # operators that every runtime has
_MAX_DEPTH = 8  # of graphs inside of attributes
_FLOATS: dict[int, np.dtype[np.floating]] = {
    1: np.dtype("<f4"),
    10: np.dtype("<f2"),
    11: np.dtype("<f8"),
}  # by ONNX's numbers for them


class GraphPorts(NamedTuple):
    """The names of what a graph takes and gives."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class _Field(NamedTuple):
    number: int
    wire: int
    value: memoryview
    """The content of a message, string or packed field; the encoded number of the others."""
    raw: memoryview
    """Key and value as they stand in the file."""


def expect_self_contained(data: bytes, source: str) -> GraphPorts:
    """What the ONNX file ``data``, which came from ``source``, takes and gives.

    Raises RunError for what a runtime must not see in a stranger's file: data that lie in other files or in the
    process's memory, operators of other domains than ONNX's own, functions, bytes that are no ONNX file; and for NaN or
    infinite weights.
    """
    model = memoryview(data)
    try:
        _expect_sound("model", model, source, depth=-1)
        # Where there are several, a reader of protobuf joins them.
        graphs = [part.value for part in _fields(model) if part.number == _MODEL_GRAPH]
        ports = GraphPorts(_port_names(graphs, _INPUT), _port_names(graphs, _OUTPUT))
    except (ValueError, IndexError) as error:
        raise RunError(f"{source} is no ONNX graph ({error}); export the bundle again") from error
    if not graphs:
        raise RunError(f"{source} is no ONNX graph (it holds none); export the bundle again")
    return ports


def leading_to(data: bytes, outputs: Collection[str]) -> bytes:
    """The part of the ONNX file ``data`` that ``outputs`` are computed from, as a file of its own."""
    wanted = {name.encode() for name in outputs}
    model = list(_fields(memoryview(data)))
    graph = [part for field in model if field.number == _MODEL_GRAPH for part in _fields(field.value)]

    # Nodes stand in the order in which they run, so one pass from the end finds all that is needed.
    needed, kept = set(wanted), []
    for node in (part for part in reversed(graph) if part.number == _NODE):
        if needed & {*_strings(node.value, _NODE_OUTPUT)}:
            needed |= {*_strings(node.value, _NODE_INPUT)}
            kept.append(node.raw)
    parts = [bytes(raw) for raw in reversed(kept)]
    names = {_INITIALIZER: (_TENSOR_NAME, needed), _INPUT: (_VALUE_NAME, needed), _OUTPUT: (_VALUE_NAME, wanted)}
    for part in graph:
        if part.number in names:
            field, those = names[part.number]
            if those & {*_strings(part.value, field)}:
                parts.append(bytes(part.raw))
        elif part.number != _NODE:
            parts.append(bytes(part.raw))
    whole = b"".join(parts)
    others = b"".join(bytes(field.raw) for field in model if field.number != _MODEL_GRAPH)
    return others + _varint(_MODEL_GRAPH << 3 | _MESSAGE) + _varint(len(whole)) + whole


def _port_names(graphs: Sequence[memoryview], number: int) -> tuple[str, ...]:
    ports = [part.value for graph in graphs for part in _fields(graph) if part.number == number]
    return tuple(name.decode() for port in ports for name in _strings(port, _VALUE_NAME))


def _expect_sound(kind: str, message: memoryview, source: str, depth: int) -> None:
    """Raises RunError as ``expect_self_contained`` does, for a message of a ``kind`` and all that lies inside of it,
    ValueError or IndexError where it is none. ``depth`` counts graphs inside of graphs."""
    if depth > _MAX_DEPTH:
        raise RunError(f"{source} is refused: graphs are nested more than {_MAX_DEPTH} deep; export the bundle again")
    if kind == "tensor":
        _expect_own_data(message, source)
        return
    for field in _fields(message):
        if kind == "model" and field.number in (_MODEL_TRAINING, _MODEL_FUNCTIONS):
            raise RunError(f"{source} is refused: a graph of a bundle defines no functions; export it again")
        if field.number == _DOMAIN.get(kind) and bytes(field.value) not in _DOMAINS:
            name = bytes(field.value).decode(errors="replace")
            raise RunError(f"{source} is refused: it uses operators of {name!r}, a bundle's are ONNX's own")
        inner = _INSIDE[kind].get(field.number)
        if inner is not None and field.wire != _MESSAGE:
            raise ValueError(f"a {inner} of wire type {field.wire}")
        if inner is not None:
            _expect_sound(inner, field.value, source, depth + (inner == "graph"))


def _expect_own_data(tensor: memoryview, source: str) -> None:
    """Raises RunError for a tensor whose data lie elsewhere, or that holds NaN or infinite weights."""
    kind, data = 0, memoryview(b"")
    for field in _fields(tensor):
        if field.number == _TENSOR_TYPE and field.wire == _VARINT:
            kind = _read_varint(field.value, 0)[0]
        elif field.number == _TENSOR_DATA:
            data = field.value
        elif field.number in _TENSOR_EXTERNAL and (field.wire == _MESSAGE or any(field.value)):
            raise RunError(
                f"{source} is refused: it says that data lie outside of it, where no bundle can vouch for them; "
                f"graphs of a bundle hold all their weights: export it again"
            )
    if kind in _FLOATS:
        bytes_each = _FLOATS[kind].itemsize
        # A single infinite value is a constant, such as that of a mask; among weights it is a training that failed.
        many = len(data) > bytes_each and len(data) % bytes_each == 0
        if many and not np.isfinite(np.frombuffer(data, _FLOATS[kind])).all():
            raise RunError(f"{source} holds NaN or infinite weights, from a training that failed: train it again")


def _strings(message: memoryview, number: int) -> Sequence[bytes]:
    return [bytes(field.value) for field in _fields(message) if field.number == number and field.wire == _MESSAGE]


def _fields(message: memoryview) -> Iterator[_Field]:
    """The fields of an encoded message, one after the other. Raises ValueError or IndexError where it is none."""
    at = 0
    while at < len(message):
        start = at
        key, at = _read_varint(message, at)
        wire = key & 7
        begin = at
        if wire == _VARINT:
            _, at = _read_varint(message, at)
        elif wire in (_FIXED32, _FIXED64):
            at += 4 if wire == _FIXED32 else 8
        elif wire == _MESSAGE:
            length, begin = _read_varint(message, at)
            at = begin + length
        else:
            raise ValueError(f"wire type {wire}")
        if at > len(message):
            raise ValueError("it is cut short")
        yield _Field(key >> 3, wire, message[begin:at], message[start:at])


def _read_varint(message: memoryview, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, the least significant first, and where the next field begins."""
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than 64 bits")


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
