"""Several processes that serve one address, each with a session of its own."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from multiprocessing import connection, get_context, parent_process
from multiprocessing.context import SpawnProcess
from socket import socket
from types import FrameType

from messnet.errors import MessError

Serve = Callable[[int, Sequence[socket]], None]
"""What a worker does: serves, as the worker of this number, from 1, on the sockets until SIGTERM. It is pickled."""


def run_workers(serve: Serve, shared: socket, own: Sequence[socket]) -> None:
    """Runs one worker for each socket of ``own``; all of them accept connections of ``shared`` too, whoever is free
    first. Closes the sockets here. SIGTERM and SIGINT end all workers; so does the end of one, which nobody asked for:
    whatever has started this process can start it again.

    Raises MessError when a worker ended by itself, or with an error.
    """
    context = get_context("spawn")  # a fork would copy threads that hold locks
    workers = [
        context.Process(target=_work, args=(serve, number, [shared, sock]), name=f"worker {number}")
        for number, sock in enumerate(own, 1)
    ]
    asked = threading.Event()

    def end(number: int, frame: FrameType | None = None) -> None:
        # A worker takes the second SIGINT for "at once".
        passed_on = signal.SIGINT if asked.is_set() and number == signal.SIGINT else signal.SIGTERM
        asked.set()
        _send(workers, passed_on)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with ExitStack() as stack:
            for sock in (shared, *own):
                # Here they are closed when all workers have theirs: the last that holds a socket keeps its port.
                stack.enter_context(sock)
            for worker in workers:
                worker.start()
        if asked.is_set():  # while they were started
            _send(workers, signal.SIGTERM)
        connection.wait([worker.sentinel for worker in workers])
        by_itself = not asked.is_set()
        if by_itself:
            end(signal.SIGTERM)
        for worker in workers:
            worker.join()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    # One that had not begun to serve ends at the signal itself.
    well = (0, -signal.SIGTERM)
    failed = [f"{worker.name} with exit code {worker.exitcode}" for worker in workers if worker.exitcode not in well]
    if by_itself or failed:
        raise MessError(f"a worker of the service ended by itself ({', '.join(failed) or 'without an error'})")


def _send(workers: Sequence[SpawnProcess], number: int) -> None:
    for worker in workers:
        if worker.pid is not None and worker.is_alive():
            os.kill(worker.pid, number)


def _work(serve: Serve, number: int, sockets: list[socket]) -> None:
    """The process of one worker."""
    if sys.platform != "win32":
        os.setsid()  # ctrl-c in a terminal reaches the first process alone, which passes it on
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        serve(number, sockets)
    except MessError as error:
        print(f"messnet: worker {number}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def _end_with_parent() -> None:
    """SIGTERM to this worker when the first process is gone, however that ended."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
