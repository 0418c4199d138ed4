"""The HTTP server, and its end: what has been accepted is answered."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from messnet.apps.serving.app import Service

__all__ = ["Server", "run_until_stopped"]


class Server(uvicorn.Server):
    """At SIGTERM or SIGINT uvicorn ends connections that are between two requests, though one may be on its way.

    Here listening ends first; for ``drain_s`` connections that stand are served and each answer closes its own; then
    uvicorn waits for what is in work. SIGINT once more ends that too.
    """

    def __init__(self, service: Service) -> None:
        super().__init__(uvicorn.Config(service.app, log_level="warning", access_log=False, server_header=False))
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        gate = self._service.gate
        if gate.draining or not self.started:
            super().handle_exit(sig, frame)
        else:
            gate.draining = True
            self._loop.call_soon_threadsafe(self._drain)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def _drain(self) -> None:
        for server in self.servers:
            server.close()
        self._loop.call_later(self._service.options.drain_s, self._exit)

    def _exit(self) -> None:
        self.should_exit = True


def run_until_stopped(service: Service, sock: socket.socket) -> None:
    """Serves on ``sock``, which is bound; returns after SIGTERM or SIGINT, when every request has been answered."""
    with _calm():
        Server(service).run(sockets=[sock])


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
