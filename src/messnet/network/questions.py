"""The questions of a model's code while it is traced and nothing has a value yet, and which have an answer."""

from __future__ import annotations

import dis
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import fx

_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


def is_users(filename: str) -> bool:
    """Tells the code of models from torch's and messnet's own."""
    return not filename.startswith(_NOT_THE_USERS)


class _Unknown:
    """A side, or the number of images, before it is known: to compare it or to reckon with it is a TypeError."""

    def __eq__(self, other: object) -> bool:
        raise TypeError

    __hash__ = None  # type: ignore[assignment]


class _Images:
    """The shape (N, 3, H, W) of images, as models ask for it."""

    ndim = 4

    def __init__(self, size: Sequence[int] | None) -> None:
        self.shape = (_Unknown(), 3, *(size or (_Unknown(), _Unknown())))

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> object:
        return self.shape if dim is None else self.shape[dim]


def answer_of(question: fx.Node, size: Sequence[int] | None = None) -> bool | None:
    """The truth of a value that follows from the shape of the images alone: for all images, or for those of ``size``
    (H, W). None where it does not."""
    images = _Images(size)

    def value(node: fx.Node) -> Any:
        if node.op == "placeholder":
            return images
        target: Any = node.target
        if node.op == "call_method":
            found, *args = fx.map_arg(node.args, value)
            return getattr(found, target)(*args, **node.kwargs)
        if node.op != "call_function" or target.__module__ not in ("_operator", "builtins"):
            raise TypeError
        return target(*fx.map_arg(node.args, value))

    try:
        return bool(value(question))
    except (TypeError, AttributeError, ArithmeticError, LookupError):
        return None


def failing_answer(frame: FrameType) -> bool | None:
    """The answer to what the code of ``frame`` asks right now from which the model goes on to nothing but an error: an
    assert, or an ``if`` whose block ends in ``raise``. None where there is no such answer, or both are."""
    code = [one for one in dis.get_instructions(frame.f_code) if one.opname != "EXTENDED_ARG"]
    asked = next(k for k, one in enumerate(code) if one.offset == frame.f_lasti)
    # The jump asks itself, or takes what the instruction before it has asked; a jump further on asks another thing.
    following = asked + 1 + (code[asked + 1].opname == "TO_BOOL")
    jump = next((k for k in (asked, following) if "JUMP" in code[k].opname and "IF" in code[k].opname), None)
    if jump is None:
        return None
    jumps_on = "IF_TRUE" in code[jump].opname
    ways = {jumps_on: code[jump].argval, not jumps_on: code[jump + 1].offset}
    failing = [answer for answer, start in ways.items() if _only_fails(frame, start)]
    return failing[0] if len(failing) == 1 else None


def _only_fails(frame: FrameType, start: int) -> bool:
    """Tells whether every way on from the instruction at ``start`` ends in an error that the model does not catch."""
    code = list(dis.get_instructions(frame.f_code))
    positions = {one.offset: k for k, one in enumerate(code)}
    seen: set[int] = set()
    ahead = [start]
    while ahead:
        offset = ahead.pop()
        if offset in seen:
            continue
        seen.add(offset)
        k = positions[offset]
        name = code[k].opname
        if name.startswith(("RETURN_", "YIELD_")):
            return False
        ahead += _handlers(frame.f_code, offset)  # any instruction may fail
        if name in ("RAISE_VARARGS", "RERAISE"):
            continue
        # A ``with`` block is taken to let errors out: where its handler jumps it would swallow one.
        swallows = any(one.opname == "WITH_EXCEPT_START" for one in code[max(k - 2, 0) : k])
        if code[k].opcode in dis.hasjrel and not swallows:
            ahead.append(code[k].argval)
        if not name.startswith("JUMP_") or "IF" in name:
            ahead.append(code[k + 1].offset)
    caller = frame.f_back
    while caller is not None and caller.f_code is not fx.Tracer.trace.__code__:
        if is_users(caller.f_code.co_filename) and (handlers := _handlers(caller.f_code, caller.f_lasti)):
            return all(_only_fails(caller, handler) for handler in handlers)
        caller = caller.f_back
    return True


def _handlers(code: CodeType, offset: int) -> list[int]:
    """Where the code goes on when the instruction at ``offset`` fails: in no place or one."""
    entries = dis.Bytecode(code).exception_entries  # type: ignore[attr-defined]
    return [entry.target for entry in entries if entry.start <= offset < entry.end]
