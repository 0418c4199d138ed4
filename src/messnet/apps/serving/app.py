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
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from numpy.typing import NDArray
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect
from starlette.types import Message

from messnet import __version__
from messnet.apps.serving.batching import Answer, Stopped, Worker
from messnet.apps.serving.gate import BUSY, Gate, Metrics, drain, track
from messnet.apps.serving.images import FORMATS, RequestError, decode_image, encode_mask, encode_overlay
from messnet.apps.serving.options import ServeOptions
from messnet.deployment.session import Session
from messnet.errors import MessError

__all__ = ["NDJSON", "Sample", "Service"]

NDJSON = "application/x-ndjson"

_T = TypeVar("_T")
_PAGE = Path(__file__).with_name("page.html")
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            **{media: {"schema": {"type": "string", "format": "binary"}} for media in FORMATS.values()},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": {"type": "string", "format": "binary"}},
                }
            },
        },
    }
}
_STATUSES = {
    408: "The body did not arrive in time.",
    413: "The body, or the image, is larger than the service takes.",
    415: "The body is no JPEG, PNG, WebP or BMP.",
    422: "The image is damaged, or a parameter is not valid.",
    429: "Too many requests of this client are in work.",
    503: "The service is busy, or the answer took too long; Retry-After says when to try again.",
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": text,
        "content": {"application/json": {"schema": {"type": "object", "properties": {"error": {"type": "string"}}}}},
    }
    for status, text in _STATUSES.items()
}
_MASK = {
    200: {
        "description": "The classes, the overlay, or a record with the mask in base64.",
        "content": {
            "image/png": {"schema": {"type": "string", "format": "binary"}},
            "application/json": {"schema": {"type": "object"}},
        },
        "headers": {
            name: {"schema": {"type": kind}}
            for name, kind in (
                ("X-Messnet-Exit", "integer"),
                ("X-Messnet-Confidence", "number"),
                ("X-Messnet-Latency-Ms", "number"),
            )
        },
    },
    **_ERRORS,
}
_STREAM = {
    200: {
        "description": "One JSON record per line: a refinement per exit, at last why there are no more.",
        "content": {NDJSON: {"schema": {"type": "string"}}},
    },
    **_ERRORS,
}
# The page is one file: a browser is told to take nothing from anywhere else.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

Format = Annotated[
    Literal["mask", "overlay", "json"],
    Query(description="mask: PNG of class indices; overlay: PNG to look at; json: a record, mask included."),
]
Deadline = Annotated[float | None, Query(ge=0, description="Begin no exit after this many milliseconds.")]
Threshold = Annotated[float | None, Query(ge=0, le=1, description="Stop at the first exit this confident.")]


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
    async def or_status(self, status: int) -> AsyncGenerator[None]:
        """Raises RequestError with ``status`` when what is done within is not done in time."""
        try:
            async with asyncio.timeout_at(self._until):
                yield
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
        info: dict[str, Any] | None = None,
    ) -> None:
        self.session, self.options, self.samples = session, options or ServeOptions(), samples
        self.metrics = Metrics()
        assert session.palette is not None
        self._palette: NDArray[np.uint8] = session.palette
        self._info = info or {}
        # Decoding and encoding let go of the interpreter lock; two are enough to keep the network fed.
        self._codecs = ThreadPoolExecutor(2, thread_name_prefix="codec")
        self.app = self.gate = Gate(self._endpoints(), options=self.options, metrics=self.metrics)
        self.worker = Worker(
            session,
            batch_size=self.options.batch_size,
            batch_wait_ms=self.options.batch_wait_ms,
            max_pixels=self.options.max_pixels,
            num_requests=lambda: self.gate.num_in_work,
            on_batch=self.metrics.batch_size.observe,
        )
        self.ready = False
        track(self.metrics, lambda: self.worker.depth, lambda: self.gate.num_in_work, self._is_ready)

    def _is_ready(self) -> bool:
        return self.ready and not self.gate.draining

    @asynccontextmanager
    async def _life(self, app: FastAPI) -> AsyncGenerator[None]:
        height, width = self.session.input_size or (256, 256)
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        answers = await self.worker.start(noise)
        for record, answer in zip(self._info.get("exits", ()), answers, strict=False):
            record["warm_up_latency_ms"] = answer.latency_ms
        self.ready = True
        yield
        self.ready = False
        await self.worker.stop()
        self._codecs.shutdown()

    def _endpoints(self) -> FastAPI:
        about = "One MESS instance: images in, class indices out, each image only as deep as it needs."
        app = FastAPI(
            title="messnet",
            version=__version__,
            description=about,
            lifespan=self._life,
            docs_url=None,  # their pages load scripts from elsewhere; /openapi.json is here
            redoc_url=None,
        )
        post, get = app.post, app.get
        get("/", include_in_schema=False)(self.page)
        get("/samples/{index}", include_in_schema=False)(self.sample)
        known = [Depends(_expect_known_parameters)]
        post("/v1/predict", responses=_MASK, openapi_extra=_BODY, dependencies=known)(self.predict)
        post("/v1/anytime", responses=_STREAM, openapi_extra=_BODY, dependencies=known)(self.anytime)
        get("/v1/info")(self.info)
        get("/health")(self.health)
        get("/ready", responses={503: {"description": "Starting, or about to stop."}})(self.readiness)
        get("/metrics", response_class=Response)(self.prometheus)
        app.add_exception_handler(RequestError, _say)
        app.add_exception_handler(HTTPException, _say)
        app.add_exception_handler(RequestValidationError, _say)
        app.add_exception_handler(MessError, _say)
        app.add_exception_handler(ClientDisconnect, _say)
        app.add_exception_handler(Exception, _say)
        return app

    async def page(self) -> Response:
        return HTMLResponse(_PAGE.read_text(), headers=_PAGE_HEADERS)

    async def sample(self, index: int) -> Response:
        if not 0 <= index < len(self.samples):
            raise RequestError(404, f"no sample {index}: there are {len(self.samples)}")
        sample = self.samples[index]
        return Response(sample.data, media_type=sample.media_type, headers={"X-Content-Type-Options": "nosniff"})

    async def health(self) -> dict[str, str]:
        """Whether the process lives."""
        return {"status": "alive"}

    async def readiness(self) -> Response:
        """Whether requests are welcome: the model is loaded, and the service is not about to stop."""
        ready = self._is_ready()
        status = "ready" if ready else "draining" if self.gate.draining else "starting"
        return JSONResponse({"status": status}, 200 if ready else 503)

    async def prometheus(self) -> Response:
        """Requests by status, exit rates, latencies, batch sizes, queue depth."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def info(self) -> dict[str, Any]:
        """The model: its classes and their colours, its exits with their thresholds and what each costs; the limits."""
        return {
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
            },
        }

    async def predict(self, request: Request, format: Format = "mask") -> Response:
        """Segment an image (the body, or the file of a form) in the instance's setting."""
        limit = self._time_limit()
        image = await self._image(request, limit)
        async with limit.or_status(503):
            answer = await self.worker.predict(image)
        self.metrics.took("/v1/predict", answer.exit_index, answer.latency_ms)
        headers = {
            "X-Messnet-Exit": str(answer.exit_index),
            "X-Messnet-Confidence": f"{answer.image_confidence:.6f}",
            "X-Messnet-Latency-Ms": f"{answer.latency_ms:.3f}",
        }
        if format == "json":
            return JSONResponse(await self._coded(partial(self._record, answer)), headers=headers)
        encode = partial(encode_overlay, image) if format == "overlay" else encode_mask
        png = await self._coded(lambda: encode(answer.labels, self._palette))
        return Response(png, media_type="image/png", headers=headers)

    async def anytime(self, request: Request, deadline_ms: Deadline = None, threshold: Threshold = None) -> Response:
        """Segment an image exit by exit: a line of JSON for each, as it is ready."""
        limit = self._time_limit()
        image = await self._image(request, limit)
        refinements = self.worker.refine(image, deadline_ms=deadline_ms, threshold=threshold)
        async with limit.or_status(503):
            first = await anext(refinements)
        lines = self._lines(first, refinements, limit)
        return StreamingResponse(lines, media_type=NDJSON, headers={"Cache-Control": "no-store"})

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
                    yield json.dumps(await self._coded(partial(self._record, answer))) + "\n"
                async with limit.or_status(503):
                    answer = await anext(refinements, None)
        except (RequestError, MessError) as error:  # too late for a status
            yield json.dumps({"error": _one_line(error)}) + "\n"
        finally:
            await refinements.aclose()

    def _record(self, answer: Answer) -> dict[str, Any]:
        counts = np.bincount(answer.labels.ravel(), minlength=len(self._palette))
        height, width = answer.labels.shape
        return {
            "exit_index": answer.exit_index,
            "image_confidence": round(answer.image_confidence, 6),
            "latency_ms": round(answer.latency_ms, 3),
            "width": width,
            "height": height,
            "class_shares": [round(count / answer.labels.size, 6) for count in counts.tolist()],
            "mask": base64.b64encode(encode_mask(answer.labels, self._palette)).decode(),
        }

    async def _image(self, request: Request, limit: _TimeLimit) -> NDArray[np.uint8]:
        async with limit.or_status(408):
            data = await self._body(request)
        if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            data = await _file_of_form(request, data)
        async with limit.or_status(503):
            return await self._coded(partial(decode_image, data, max_pixels=self.options.max_pixels))

    async def _body(self, request: Request) -> bytes:
        """Raises RequestError (413) as soon as more has come than is allowed: a length is not always sent, or true."""
        limit, body = self.options.max_body_bytes, bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                del body
                await drain(request.receive, limit, request.headers)
                raise RequestError(413, f"the body has more than {limit} bytes, which is the limit; scale it down")
        return bytes(body)

    def _time_limit(self) -> _TimeLimit:
        return _TimeLimit(self.options.timeout_s)

    async def _coded(self, call: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._codecs, call)


def _expect_known_parameters(request: Request) -> None:
    """Raises RequestError (422) for a parameter that the route does not have, such as a misspelt one."""
    known = [field.alias for field in request.scope["route"].dependant.query_params]
    for name in request.query_params:
        if name not in known:
            raise RequestError(422, f"there is no parameter {name!r}: expected {' or '.join(known)}; correct its name")


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
        raise RequestError(
            422, f"the form cannot be read ({_one_line(error)}); send it as multipart/form-data"
        ) from error
    raise RequestError(422, "the form has no file: send the image as its field 'file'")


async def _say(request: Request, error: Exception) -> Response:
    """Any error as {"error": one line}."""
    headers: dict[str, str] = {}
    match error:
        case RequestError():
            status = error.status
            if status == 503:
                headers = BUSY
            elif status in (408, 413):
                headers = {"Connection": "close"}  # what is left of the body is not wanted
        case HTTPException():
            status, headers = error.status_code, dict(error.headers or {})
        case RequestValidationError() | MessError():
            status = 422
        case ClientDisconnect():
            status = 499  # nobody will read it
        case _:
            status = 500
            return JSONResponse({"error": "the service has a bug; its log says where"}, status)
    return JSONResponse({"error": _one_line(error)}, status, headers=headers)


def _one_line(error: Exception) -> str:
    if isinstance(error, RequestValidationError):
        return "; ".join(
            f"{'.'.join(map(str, item['loc']))}: {item['msg']}, got {item['input']!r}" for item in error.errors()
        )
    if isinstance(error, HTTPException):
        return str(error.detail)
    return " ".join(str(error).split())
