"""Connections that keep the service waiting are closed: file handles are few, and holding one costs nothing."""

from __future__ import annotations

import asyncio
import logging
from typing import ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

from messnet.apps.serving.options import ServeOptions

ACCEPTED_AT_ONCE = 16
"""asyncio accepts this many connections before any of them can be closed again."""

_UNREAD_TIMES = 4  # of a request's time limit, for an answer to be read


class Connection(H11Protocol):
    """uvicorn's connection, with limits that uvicorn does not have.

    From its beginning, and from the end of each answer, a client has ``header_s`` seconds to send the whole head of a
    request; bytes that trickle in do not prolong it. An answer that is not read within four times ``timeout_s`` ends
    its connection. When there are more than ``max_connections``, the one that has waited longest for a request makes
    room, or else the new one: whoever fills the service with idle connections keeps nobody out.
    """

    options: ClassVar[ServeOptions]
    max_connections: ClassVar[int]
    waiting: ClassVar[dict[Connection, None]]
    """Those without a request in work, in the order in which they began to wait."""

    _until_request: asyncio.TimerHandle | None = None
    _until_read: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_request()
        if len(self.connections) > self.max_connections:
            longest = next(iter(self.waiting))
            longest._stop_waiting()  # aborting takes until the next turn of the loop; more may come in this one
            longest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_waiting()
        if self._until_read is not None:
            self._until_read.cancel()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_work():
            self._stop_waiting()

    def on_response_complete(self) -> None:
        super().on_response_complete()  # may begin the next request, where the client did not wait for this answer
        if not self._in_work():
            self._await_request()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._until_read = self.loop.call_later(_UNREAD_TIMES * self.options.timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._until_read is not None:
            self._until_read.cancel()

    def _unsupported_upgrade_warning(self) -> None:
        """An upgrade that is asked for is passed over, as HTTP allows: the log need not advise to install more."""

    def _in_work(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _await_request(self) -> None:
        self._stop_waiting()
        self.waiting[self] = None  # at the end: a dictionary keeps the order in which its keys came
        self._until_request = self.loop.call_later(self.options.header_s, self._no_request, self.loop.time())

    def _stop_waiting(self) -> None:
        self.waiting.pop(self, None)
        if self._until_request is not None:
            self._until_request.cancel()

    def _no_request(self, since: float) -> None:
        unread = self.transport.get_write_buffer_size() > 0
        if unread and self.loop.time() - since < _UNREAD_TIMES * self.options.timeout_s:
            # It cannot ask before it has read the last answer.
            self._until_request = self.loop.call_later(self.options.header_s, self._no_request, since)
        else:
            self.transport.abort()


def connections_within(options: ServeOptions) -> type[Connection]:
    """The class of one service's connections: uvicorn takes a class, and connections of two services are not counted
    together."""

    class LimitedConnection(Connection):
        pass

    LimitedConnection.options = options
    LimitedConnection.max_connections = options.max_connections
    LimitedConnection.waiting = {}
    return LimitedConnection


class LogLimit(logging.Filter):
    """Lets ``lines`` records of each kind through in ``seconds``: what a stranger does a million times is not told a
    million times. The next one after that says how many were left out."""

    def __init__(self, lines: int = 5, seconds: float = 60) -> None:
        super().__init__()
        self._lines, self._seconds = lines, seconds
        # A kind is a place in the source: there are only so many, whatever the texts say.
        self._kinds: dict[tuple[str, int], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        kind = (record.pathname, record.lineno)
        since, count = self._kinds.get(kind, (record.created, 0))
        left_out = max(0, count - self._lines)
        if record.created - since >= self._seconds:
            since, count = record.created, 0
            if left_out:
                record.msg, record.args = f"{record.getMessage()} (and {left_out} more like it before)", ()
        self._kinds[kind] = (since, count + 1)
        return count < self._lines
