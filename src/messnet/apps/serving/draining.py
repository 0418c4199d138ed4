"""The HTTP server, and its end: what has been accepted is answered, and it does end."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from types import FrameType

import uvicorn

from messnet.apps.serving.app import Service
from messnet.apps.serving.connections import ACCEPTED_AT_ONCE, LogLimit, connections_within
from messnet.errors import MessError

_HANDLES_KEPT = 24  # for the loop, the decoders' pipes, and what comes and goes: forms on disk, a new decoder, the page
_END_S = 5.0  # for a process whose requests are all answered
_BACKLOG = 1024


class Server(uvicorn.Server):
    """At SIGTERM or SIGINT uvicorn ends connections that are between two requests, though one may be on its way.

    Here listening ends first; for ``drain_s`` connections that stand are served and each answer closes its own; what
    has not arrived whole by then is refused. The rest is answered within ``timeout_s``, the limit of every request,
    and then, where ``ends_process`` allows it, the process ends, whatever hangs. SIGINT once more ends it sooner.
    """

    def __init__(self, service: Service, *, ends_process: bool = False) -> None:
        options = service.options
        self._connections = connections_within(options)
        config = uvicorn.Config(
            service.app,
            http=self._connections,
            loop="asyncio",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=ACCEPTED_AT_ONCE,
            timeout_graceful_shutdown=math.ceil(options.timeout_s),
            # Anyone can send X-Forwarded-For: believed from a client, it is another address for every request.
            proxy_headers=options.proxy is not None,
            forwarded_allow_ips=options.proxy or "",
        )
        super().__init__(config)
        self._service, self._ends_process = service, ends_process
        self._overdue: threading.Timer | None = None

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Raises MessError when there are too few file handles to serve anyone."""
        self._connections.max_connections = _connections_that_fit(self._service.options.max_connections)
        try:
            super().run(sockets)
        finally:
            if self._overdue is not None:
                self._overdue.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        gate, options = self._service.gate, self._service.options
        if gate.draining or not self.started:
            super().handle_exit(sig, frame)
            return
        gate.draining = True
        if self._ends_process:
            self._overdue = threading.Timer(options.drain_s + options.timeout_s + _END_S, self._end_now)
            self._overdue.daemon = True
            self._overdue.start()
        # A signal comes between any two instructions of the loop, where its methods may not be called.
        self._loop.call_soon_threadsafe(self._drain)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for sock in sockets or ():
            sock.listen(_BACKLOG)  # the kernel may hold more than asyncio accepts at once

    def _drain(self) -> None:
        for server in self.servers:
            server.close()
        self._loop.call_later(self._service.options.drain_s, self._exit)

    def _exit(self) -> None:
        self._service.end_arrivals()
        self.should_exit = True

    def _end_now(self) -> None:
        """In a thread of its own: the loop, or what it waits for, may hang."""
        print(f"messnet: ended with {self._service.gate.num_in_work} requests in work", file=sys.stderr, flush=True)
        os._exit(1)


def _connections_that_fit(wanted: int) -> int:
    """As many connections as wanted, or as file handles are left for. Raises MessError when there are none."""
    if sys.platform == "win32":
        return wanted
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    # Handles are numbered from 0 on, and the lowest free number is given: nearly all below it are in use.
    lowest_free = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest_free)
    left = limit - lowest_free - ACCEPTED_AT_ONCE - _HANDLES_KEPT
    if limit == resource.RLIM_INFINITY or left >= wanted:
        return wanted
    if left < 1:
        raise MessError(f"the service may open {limit} files, it needs {limit - left + 1}: raise the limit (ulimit -n)")
    print(f"messnet: {left} connections at once, for there are {limit} file handles (ulimit -n)", file=sys.stderr)
    return left


def run_until_stopped(service: Service, sockets: Sequence[socket.socket]) -> None:
    """Serves on ``sockets``, which are bound; returns after SIGTERM or SIGINT, when every request has been answered."""
    with _calm(), _limited_log():
        Server(service, ends_process=True).run(sockets=[*sockets])


@contextmanager
def _limited_log() -> Generator[None]:
    """Warnings and errors to standard error, each kind a few times a minute."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(LogLimit())
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


@contextmanager
def _calm() -> Generator[None]:
    """uvicorn raises the signals that ended it again at its end; they have done their work."""
    signals = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: None) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
