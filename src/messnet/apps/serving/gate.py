"""Every request passes here: it is let in or turned away, counted and timed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter as Tally
from collections.abc import Callable
from functools import partial
from ipaddress import IPv6Address, IPv6Network, ip_address

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from messnet.apps.serving.decoding import RequestError
from messnet.apps.serving.options import ServeOptions

BUSY = {"Retry-After": "1"}

_WORK = ("/v1/predict", "/v1/anytime")
_PATHS = {*_WORK, "/v1/info", "/", "/health", "/ready", "/metrics", "/openapi.json"}
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_DRAIN_S = 5.0


class Metrics:
    """The figures that Prometheus gets, in a registry of the service's own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, namespace="messnet", registry=self.registry)
        histogram = partial(Histogram, namespace="messnet", registry=self.registry)
        gauge = partial(Gauge, namespace="messnet", registry=self.registry)
        self.requests = counter("requests", "Requests by path and status.", ["path", "status"])
        self.request_seconds = histogram(
            "request_seconds", "From a request's first byte to the end of its answer.", ["path"], buckets=_SECONDS
        )
        self.exits = counter("exits", "Answers by the exit they come from.", ["path", "exit_index"])
        self.inference_seconds = histogram(
            "inference_seconds", "From the image on the device to its labels.", ["exit_index"], buckets=_SECONDS
        )
        self.batch_size = histogram("batch_size", "Requests run together.", buckets=(1, 2, 4, 8, 16, 32, 64))
        self.not_finite = counter("not_finite", "Images for which the network computed NaN or infinite values.")
        self.queue_depth = gauge("queue_depth", "Requests that wait for the network.")
        self.in_work = gauge("requests_in_work", "Requests being read, waiting, run or answered.")
        self.ready = gauge("ready", "1 while new requests are welcome.")
        ProcessCollector(registry=self.registry)

    def took(self, path: str, exit_index: int, latency_ms: float) -> None:
        """An answer of the exit ``exit_index``."""
        self.exits.labels(path, exit_index).inc()
        self.inference_seconds.labels(exit_index).observe(latency_ms / 1000)


class Gate:
    """ASGI middleware. Requests for work are limited, in all and per address; ``num_in_work`` of them are in.

    ``draining`` says that the service is about to end: what comes is answered still, and its connection closed then.
    ``accepted`` and ``answered`` count requests for work; a client that goes away has been answered.
    ``num_given_up()`` of them have been answered with 503 while the network still runs their images: they too take
    a place, or else a service that cannot keep up would take on ever more.
    """

    def __init__(
        self, app: ASGIApp, *, options: ServeOptions, metrics: Metrics, num_given_up: Callable[[], int] = lambda: 0
    ) -> None:
        self.app, self.options, self.metrics, self._num_given_up = app, options, metrics, num_given_up
        self.draining = False
        self.accepted = self.answered = 0
        self._addresses: Tally[str] = Tally()

    @property
    def num_in_work(self) -> int:
        return self.accepted - self.answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 499  # a client that went away before there was an answer

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self.draining:
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        path = scope["path"] if scope["path"] in _PATHS else "other"
        try:
            if path in _WORK and scope["method"] == "POST":
                await self._work(scope, receive, counted)
            else:
                await self.app(scope, receive, counted)
        except Exception:  # a bug; it has been answered with 500, and the connection is as good as before
            logging.getLogger(__name__).exception("messnet: a bug in %s", path)
        finally:
            self.metrics.requests.labels(path, status).inc()
            self.metrics.request_seconds.labels(path).observe(time.perf_counter() - start)

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        address = client_of(scope)
        refusal = self._refusal(Headers(scope=scope), address)
        if refusal is not None:
            await drain(receive, self.options.max_body_bytes, Headers(scope=scope))
            headers = BUSY if refusal.status in (429, 503) else {"Connection": "close"}
            answer = JSONResponse({"error": str(refusal)}, refusal.status, headers=headers)
            await answer(scope, receive, send)
            return
        self.accepted += 1
        self._addresses[address] += 1
        try:
            # Four times the time for an answer: then its client does not read it.
            async with asyncio.timeout(4 * self.options.timeout_s):
                await self.app(scope, receive, send)
        except TimeoutError:
            return  # the server closes the connection
        finally:
            self.answered += 1
            self._addresses[address] -= 1
            if not self._addresses[address]:  # or strangers could fill the memory with addresses
                del self._addresses[address]

    def _refusal(self, headers: Headers, address: str) -> RequestError | None:
        options = self.options
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > options.max_body_bytes:
            return RequestError(
                413, f"the body has {length} bytes, {options.max_body_bytes} are the limit; scale it down"
            )
        num_in_work = self.num_in_work + self._num_given_up()
        if num_in_work >= options.max_queue:
            return RequestError(503, f"busy: {num_in_work} requests are in work; try again later")
        if self._addresses[address] >= options.max_concurrency:
            count = self._addresses[address]
            return RequestError(429, f"{count} requests from {address} are in work already; wait for their answers")
        return None


def client_of(scope: Scope) -> str:
    """Whose request it is, as limits count: the address, of IPv6 the network of its first 64 bits, as a single customer
    of a provider has that many addresses at least."""
    host = str(scope["client"][0]) if scope.get("client") else ""
    try:
        address = ip_address(host)
    except ValueError:  # a proxy's word, or a socket without addresses
        return host
    if not isinstance(address, IPv6Address):
        return host
    # An IPv4 client of a socket for both kinds comes as ::ffff:192.0.2.7.
    return str(address.ipv4_mapped or IPv6Network((int(address) >> 64 << 64, 64)))


async def drain(receive: Receive, limit: int, headers: Headers) -> None:
    """Reads and forgets up to ``limit`` more bytes of a request: many a client reads no answer before all is sent."""
    if "expect" in headers:  # this one asks before it sends
        return
    try:
        async with asyncio.timeout(_DRAIN_S):
            while limit > 0:
                message: Message = await receive()
                limit -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return
