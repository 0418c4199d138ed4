"""The machine at hand: its processor's name, how many of its cores a runtime takes by default, its free memory. Works
without torch."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from functools import cache
from pathlib import Path

# About 10 microseconds. libgomp's own is some milliseconds.
_SPINS = "1000"
# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4


@cache
def processor_name() -> str:
    """The processor's own name, such as "AMD EPYC 9R14"; its architecture where the system tells no name."""
    models = [value for name, value in _cpuinfo() if name == "model name"]
    return models[0] if models else platform.processor() or platform.machine()


def default_threads() -> int:
    """As many threads as torch is set to where it is loaded; else ``OMP_NUM_THREADS``, else one for each physical core
    that this process may use, which is torch's own rule."""
    if "torch" in sys.modules:
        return int(sys.modules["torch"].get_num_threads())
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else _physical_cores()


def spin_briefly() -> None:
    """Lets torch's threads on Linux sleep after a short wait for work, which they otherwise spend spinning.

    Beside any other busy process, a loader's workers included, two threads that spin take the processor from the very
    work that they wait for: see ``benchmarks/results/waiting_cpu_202611.md``. It only works before torch is imported
    (libgomp reads its environment once), also for the processes that are started from here, and keeps what the user
    set: ``GOMP_SPINCOUNT`` or ``OMP_WAIT_POLICY``.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


@cache
def keep_freed_memory() -> None:
    """Lets this process keep the memory of freed tensors, where glibc would give each large one back to the system and
    get the next one anew, page by page and zeroed: nearly half of the time of a training step on a processor
    (``benchmarks/results/training_cpu_202611.md``). Other allocators stay as they are. See mallopt(3)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc; TypeError is Windows's
        return
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    if not mallopt(_MMAP_THRESHOLD, 2**30):  # refused by older versions, which can go without mmap
        mallopt(_MMAP_MAX, 0)


def free_memory() -> int | None:
    """Bytes that this process may still take: what Linux can give without swapping, less where its container (cgroup
    v2) allows less. None where the system does not tell."""
    try:
        kib = Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]
        free = int(kib) * 1024
        limit, used = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))
        if limit.exists() and (most := limit.read_text().strip()).isdecimal():
            free = min(free, int(most) - int(used.read_text()))
    except (OSError, IndexError):
        return None
    return free


@cache
def _physical_cores() -> int:
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    # Two logical processors of one core share its arithmetic units, so a second thread on it gains little or nothing.
    # Core numbers begin anew on each socket: only the pair names a core.
    cores, number, socket = set(), 0, ""
    for name, value in _cpuinfo():  # of each logical processor: its number, its socket, then its core
        if name == "processor" and value.isdecimal():
            number = int(value)
        elif name == "physical id":
            socket = value
        elif name == "core id" and number in usable:
            cores.add((socket, value))
    return len(cores) or len(usable)


@cache
def _cpuinfo() -> tuple[tuple[str, str], ...]:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(errors="replace").splitlines() if file.exists() else []
    return tuple((name.strip(), value.strip()) for name, _, value in (line.partition(":") for line in lines))
