"""The one place that knows whether the inner loops are compiled.

numba compiles them when they are first called and keeps the machine code on the disk. Where numba is not installed the
same functions run as the plain Python that they are written in.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TypeVar, cast

import numpy as np

try:
    from numba import njit
except ModuleNotFoundError as missing:
    if missing.name != "numba":
        raise
    COMPILED = False
else:
    COMPILED = True

F = TypeVar("F", bound=Callable[..., object])


def compiled(fastmath: bool = False) -> Callable[[F], F]:
    """Decorates an inner loop. ``fastmath``: floating-point sums may be reordered, which only bounds allow."""
    if not COMPILED:
        return lambda function: function
    return cast(Callable[[F], F], njit(cache=True, nogil=True, fastmath=fastmath, error_model="numpy"))


def loops_running() -> AbstractContextManager[None]:
    """Around inner loops: says once that they are slow, where they are, and lets plain Python divide by 0 as they
    do."""
    if COMPILED:
        return nullcontext()
    _say_slow()
    return np.errstate(all="ignore")


@cache
def _say_slow() -> None:
    print(
        "messnet: numba is not installed, so the search runs in plain Python: seconds for two exits, long for three "
        "(bound it with --time-limit); `pip install messnet[train]` brings numba and makes it fast",
        file=sys.stderr,
    )
