"""The endpoints of the service."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import TypeVar

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message

from messnet import __version__
from messnet.apps.serving.batching import Answer, Stopped, Worker
from messnet.apps.serving.decoders import Decoders
from messnet.apps.serving.decoding import RequestError
from messnet.apps.serving.description import ModelInfo
from messnet.apps.serving.gate import BUSY, Gate, Metrics, client_of, drain
from messnet.apps.serving.options import ServeOptions
from messnet.deployment.session import Session
from messnet.errors import MessError, one_line
from messnet.images.drawing import as_png, mask, overlay

_T = TypeVar("_T")
# The values of two parameters, the default first; openapi.yaml tells programs.
FORMAT_NAMES, STOP_NAMES = ("mask", "overlay", "json"), ("last_exit", "instance")
_OPENAPI = Path(__file__).with_name("openapi.yaml")
_PAGE = Path(__file__).parents[1] / "page"
_PAGE_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/source.js": ("service.js", "text/javascript"),
}
# A browser is told to take nothing from anywhere else, and nothing that stands in the page itself.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
# Two decoders, and two threads for encoding, which lets go of the interpreter lock, keep the network fed.
_NUM_DECODERS = _NUM_ENCODERS = 2
# For so long after a request that was given up for time, and none answered since, the service says it is overloaded.
_OVERLOADED_S = 5.0
_LONGEST_ERROR = 500
# In half the time of Pillow's default, for a few per cent more bytes.
_png = partial(as_png, compress_level=3)
_ANSWERED = (RequestError, HTTPException, MessError, ClientDisconnect, Exception)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An image that the page offers."""

    name: str
    media_type: str
    data: bytes


class _TimeLimit:
    """The end of a request's time, ``seconds`` from now."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._until = seconds, asyncio.get_running_loop().time() + seconds

    @asynccontextmanager
    async def or_status(self, status: int) -> AsyncGenerator[asyncio.Timeout]:
        """Raises RequestError with ``status`` when what is done within is not done in time."""
        try:
            async with asyncio.timeout_at(self._until) as timeout:
                yield timeout
        except TimeoutError as error:
            what = "the body did not arrive" if status == 408 else "there was no answer"
            raise RequestError(status, f"{what} within {self._seconds:g} s; try again later") from error


class Service:
    """A session behind HTTP. ``app`` is what a server runs: the endpoints behind the ``gate``.

    ``info`` is what /v1/info says of the model beyond the session's own.
    """

    def __init__(
        self,
        session: Session,
        options: ServeOptions | None = None,
        *,
        samples: Sequence[Sample] = (),
        info: ModelInfo | None = None,
    ) -> None:
        self.session, self.options, self.samples = session, options or ServeOptions(), samples
        self.metrics = Metrics()
        assert session.palette is not None
        self._palette: NDArray[np.uint8] = session.palette
        self._info: ModelInfo = info or {}
        self._encoders = ThreadPoolExecutor(_NUM_ENCODERS, thread_name_prefix="encoder")
        self._decoders = Decoders(_NUM_DECODERS, self.options)
        self.gate = Gate(
            self._endpoints(), options=self.options, metrics=self.metrics, num_given_up=lambda: self.worker.num_given_up
        )
        self.worker = Worker(session, self.options, self.metrics, num_requests=lambda: self.gate.num_in_work)
        self.app: ASGIApp = self.gate
        if self.options.cors:  # outside the gate: pages may read its refusals too
            self.app = CORSMiddleware(
                self.gate,
                allow_origins=self.options.cors,
                allow_methods=["GET", "POST"],
                allow_headers=["Content-Type"],
                expose_headers=["X-Messnet-Exit", "X-Messnet-Confidence", "X-Messnet-Latency-Ms", "Retry-After"],
            )
        self._started = False
        self._given_up_at: float | None = None
        self._arriving: set[asyncio.Timeout] = set()
        # Gauges read their values where they are, whenever Prometheus asks.
        self.metrics.queue_depth.set_function(lambda: self.worker.depth)
        self.metrics.in_work.set_function(lambda: self.gate.num_in_work)
        self.metrics.ready.set_function(lambda: self.status == "ready")

    @property
    def status(self) -> str:
        """Whether requests are welcome: "ready", or why not. "no_decoder": no process for decoding runs; "stalled": the
        network has run for longer than a request may take; "overloaded": requests were given up for time a moment ago,
        and none was answered since."""
        if self.gate.draining:
            return "draining"
        if not self._started:
            return "starting"
        if not self._decoders.num_running:
            return "no_decoder"
        if self.worker.busy_s > self.options.timeout_s:
            return "stalled"
        now = asyncio.get_running_loop().time()
        if self._given_up_at is not None and now - self._given_up_at < _OVERLOADED_S:
            return "overloaded"
        return "ready"

    def end_arrivals(self) -> None:
        """Gives up requests whose bodies have not arrived whole, for the service is about to end."""
        self._started = False
        # Their time is over now, which is told to each client as any other end of its time.
        for timeout in self._arriving:
            timeout.reschedule(asyncio.get_running_loop().time())

    @asynccontextmanager
    async def _life(self, app: Starlette) -> AsyncGenerator[None]:
        height, width = self.session.input_size or (256, 256)
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        await self._decoders.start()
        answers = await self.worker.start(noise)
        # Where the caller gave no records of exits there is none to fill.
        for record, answer in zip(self._info.get("exits", ()), answers, strict=False):
            record["warm_up_latency_ms"] = answer.latency_ms
        self._started = True
        yield
        self._started = False
        await self.worker.stop()
        await self._decoders.stop()
        self._encoders.shutdown()

    def _endpoints(self) -> Starlette:
        app = Starlette(
            lifespan=self._life,
            routes=[
                *(Route(path, self._page) for path in _PAGE_FILES),
                Route("/samples/{index:int}", self._sample),
                Route("/v1/predict", self._predict, methods=["POST"]),
                Route("/v1/anytime", self._anytime, methods=["POST"]),
                Route("/v1/info", self._describe),
                Route("/health", self._health),
                Route("/ready", self._ready),
                Route("/metrics", self._prometheus),
                Route("/openapi.json", self._openapi),
            ],
            exception_handlers=dict.fromkeys(_ANSWERED, _say),
        )
        # A path with a slash too many would be sent on to whatever host the request names.
        app.router.redirect_slashes = False
        return app

    async def _page(self, request: Request) -> Response:
        name, media_type = _PAGE_FILES[request.url.path]
        return Response((_PAGE / name).read_bytes(), media_type=media_type, headers=_PAGE_HEADERS)

    async def _sample(self, request: Request) -> Response:
        index = int(request.path_params["index"])
        if not index < len(self.samples):
            raise RequestError(404, f"no sample {index}: there are {len(self.samples)}")
        sample = self.samples[index]
        return Response(sample.data, media_type=sample.media_type, headers={"X-Content-Type-Options": "nosniff"})

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def _ready(self, request: Request) -> Response:
        status = self.status
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    async def _prometheus(self, request: Request) -> Response:
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def _openapi(self, request: Request) -> Response:
        specification = yaml.safe_load(_OPENAPI.read_text(encoding="utf-8"))
        specification["info"]["version"] = __version__
        return JSONResponse(specification)

    async def _describe(self, request: Request) -> Response:
        """The model: its classes and their colours, its exits with their thresholds and what each costs; the limits."""
        return JSONResponse(
            {
                "messnet_version": __version__,
                "instance": self.session.instance.name,
                "runtime": f"{self.session.runtime} {self.session.precision}",
                "setting": self.session.instance.setting,
                "class_names": list(self.session.class_names),
                "palette": self._palette.tolist(),
                **self._info,
                "samples": [sample.name for sample in self.samples],
                "limits": {
                    "max_body_bytes": self.options.max_body_bytes,
                    "max_pixels": self.options.max_pixels,
                    "timeout_s": self.options.timeout_s,
                    "decode_s": self.options.decode_s,
                },
            }
        )

    async def _predict(self, request: Request) -> Response:
        format = _choice(request, "format", FORMAT_NAMES, known=("format",))
        limit = _TimeLimit(self.options.timeout_s)
        image = await self._image(request, limit)
        async with self._answered(limit):
            answer = await self.worker.predict(image)
        self.metrics.took("/v1/predict", answer.exit_index, answer.latency_ms)
        headers = {
            "X-Messnet-Exit": str(answer.exit_index),
            "X-Messnet-Confidence": f"{answer.image_confidence:.6f}",
            "X-Messnet-Latency-Ms": f"{answer.latency_ms:.3f}",
        }
        if format == "json":
            return JSONResponse(await self._encoded(partial(self._record, answer)), headers=headers)
        if format == "overlay":
            png = await self._encoded(lambda: _png(Image.fromarray(overlay(image, answer.labels, self._palette))))
        else:
            png = await self._encoded(lambda: _png(mask(answer.labels, self._palette)))
        return Response(png, media_type="image/png", headers=headers)

    async def _anytime(self, request: Request) -> Response:
        known = ("deadline_ms", "threshold", "stop")
        deadline_ms, threshold = _number(request, "deadline_ms"), _number(request, "threshold", 1)
        stop = _choice(request, "stop", STOP_NAMES, known=known)
        limit = _TimeLimit(self.options.timeout_s)
        image = await self._image(request, limit)
        thresholds = [
            choice.image_threshold if stop == "instance" else threshold for choice in self.session.instance.exits
        ]
        refinements = self.worker.refine(image, deadline_ms=deadline_ms, thresholds=thresholds)
        # With the first line the status is sent: what fails before it can still be told by a status.
        async with self._answered(limit):
            first = await anext(refinements)
        lines = self._lines(first, refinements, limit)
        return StreamingResponse(lines, media_type="application/x-ndjson", headers={"Cache-Control": "no-store"})

    async def _lines(
        self, first: Answer | Stopped, refinements: AsyncGenerator[Answer | Stopped], limit: _TimeLimit
    ) -> AsyncGenerator[str]:
        answer: Answer | Stopped | None = first
        try:
            while answer is not None:
                if isinstance(answer, str):
                    yield json.dumps({"stopped": answer}) + "\n"
                else:
                    self.metrics.took("/v1/anytime", answer.exit_index, answer.latency_ms)
                    yield json.dumps(await self._encoded(partial(self._record, answer))) + "\n"
                async with self._answered(limit):
                    answer = await anext(refinements, None)
        except (RequestError, MessError) as error:  # too late for a status
            yield json.dumps({"error": _one_line(str(error))}) + "\n"
        finally:
            await refinements.aclose()

    def _record(self, answer: Answer) -> dict[str, object]:
        counts = np.bincount(answer.labels.ravel(), minlength=len(self._palette))
        height, width = answer.labels.shape
        return {
            "exit_index": answer.exit_index,
            "image_confidence": round(answer.image_confidence, 6),
            "latency_ms": round(answer.latency_ms, 3),
            "width": width,
            "height": height,
            "class_shares": [round(count / answer.labels.size, 6) for count in counts.tolist()],
            "mask": base64.b64encode(_png(mask(answer.labels, self._palette))).decode(),
        }

    async def _image(self, request: Request, limit: _TimeLimit) -> NDArray[np.uint8]:
        async with limit.or_status(408) as arriving:
            self._arriving.add(arriving)
            try:
                data = await self._body(request)
            finally:
                self._arriving.discard(arriving)
        if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            data = await _file_of_form(request, data)
        async with self._answered(limit):
            return await self._decoders.decode(data, client_of(request.scope))

    @asynccontextmanager
    async def _answered(self, limit: _TimeLimit) -> AsyncGenerator[None]:
        """Raises RequestError (503) when what is done within is not done in time, and notes whether it was."""
        try:
            async with limit.or_status(503):
                yield
        except RequestError as error:
            if error.status == 503:
                self._given_up_at = asyncio.get_running_loop().time()
            raise
        self._given_up_at = None

    async def _body(self, request: Request) -> bytes:
        """Raises RequestError (413) as soon as more has come than is allowed: a length is not always sent, or true."""
        limit, body = self.options.max_body_bytes, bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                del body  # before waiting for the rest: many such requests may come at once
                await drain(request.receive, limit, request.headers)
                raise RequestError(413, f"the body has more than {limit} bytes, which is the limit; scale it down")
        return bytes(body)

    async def _encoded(self, call: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._encoders, call)


def _choice(request: Request, name: str, values: Sequence[str], *, known: Sequence[str]) -> str:
    """The parameter ``name``, by default the first of ``values``. Raises RequestError (422) for another value, and for
    a parameter that is not ``known``, such as a misspelt one."""
    for given in request.query_params:
        if given not in known:
            raise RequestError(422, f"there is no parameter {given!r}: expected {' or '.join(known)}; correct its name")
    value = request.query_params.get(name, values[0])
    if value not in values:
        raise RequestError(422, f"{name}: expected {' or '.join(values)}, got {value!r}")
    return value


def _number(request: Request, name: str, most: float = float("inf")) -> float | None:
    """The parameter ``name``, a number from 0 to ``most``, or None. Raises RequestError (422) for anything else."""
    text = request.query_params.get(name)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = float("nan")  # is in no range, so the line below refuses it as it does "nan" itself
    if not 0 <= value <= most:
        expected = "a number of at least 0" if most == float("inf") else f"a number from 0 to {most:g}"
        raise RequestError(422, f"{name}: expected {expected}, got {text!r}")
    return value


async def _file_of_form(request: Request, body: bytes) -> bytes:
    """The file in a form, which has been read whole. Raises RequestError when there is none."""

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        async with Request(request.scope, receive).form(max_files=1, max_fields=16) as form:
            for value in form.values():
                if isinstance(value, UploadFile):
                    return await value.read()
    except (MultiPartException, HTTPException, ValueError, KeyError, LookupError) as error:
        why = _one_line(str(error.detail if isinstance(error, HTTPException) else error))
        raise RequestError(422, f"the form cannot be read ({why}); send it as multipart/form-data") from error
    raise RequestError(422, "the form has no file: send the image as its field 'file'")


async def _say(request: Request, error: Exception) -> Response:
    """Any error as {"error": one line}."""
    headers: dict[str, str] = {}
    match error:
        case RequestError():
            status, text = error.status, str(error)
            if status == 503:
                headers = BUSY
            elif status in (408, 413):
                headers = {"Connection": "close"}  # what is left of the body is not wanted
        case HTTPException():
            status, text, headers = error.status_code, str(error.detail), dict(error.headers or {})
            if status in (404, 405):  # of somebody who tries it in a browser, mostly
                text += ": GET / is a page to try it on, /openapi.json says how programs ask"
        case MessError():
            status, text = 422, str(error)
        case ClientDisconnect():
            status, text = 499, "the client went away"  # nobody will read it
        case _:
            status, text = 500, "the service has a bug; its log says where"
    return JSONResponse({"error": _one_line(text)}, status, headers=headers)


def _one_line(text: str) -> str:
    """No more of ``text`` than one reads, on one line."""
    return shorten(one_line(text), _LONGEST_ERROR, placeholder=" ...")
