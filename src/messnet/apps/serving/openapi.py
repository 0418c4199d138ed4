"""How to ask, for programs: what /openapi.json says."""

from __future__ import annotations

from messnet import __version__
from messnet.apps.serving.decoding import FORMATS

NDJSON = "application/x-ndjson"
FORMAT_NAMES = ("mask", "overlay", "json")
STOP_NAMES = ("last_exit", "instance")

Json = dict[str, object]

_STATUSES = {
    "408": "The body did not arrive in time.",
    "413": "The body, or the image, is larger than the service takes.",
    "415": "The body is no JPEG, PNG, WebP or BMP.",
    "422": "The image is damaged or takes too long to decode, or a parameter is not valid.",
    "429": "Too many requests of this client are in work.",
    "503": "The service is busy, or the answer took too long; Retry-After says when to try again.",
}


def specification() -> Json:
    """An OpenAPI 3.1 document."""
    predict = _work(
        "Segment an image (the body, or the file of a form) in the instance's setting.",
        [
            _parameter(
                "format",
                "mask: PNG of class indices; overlay: PNG to look at; json: a record, mask included.",
                {"enum": list(FORMAT_NAMES), "default": "mask"},
            )
        ],
        {
            "description": "The classes, the overlay, or a record with the mask in base64.",
            "content": {"image/png": _binary(), "application/json": {"schema": {"type": "object"}}},
            "headers": {
                name: {"schema": {"type": kind}}
                for name, kind in (
                    ("X-Messnet-Exit", "integer"),
                    ("X-Messnet-Confidence", "number"),
                    ("X-Messnet-Latency-Ms", "number"),
                )
            },
        },
    )
    anytime = _work(
        "Segment an image exit by exit: a line of JSON for each, as it is ready.",
        [
            _parameter("deadline_ms", "Begin no exit after this many milliseconds.", {"type": "number", "minimum": 0}),
            _parameter(
                "threshold", "Stop at the first exit this confident.", {"type": "number", "minimum": 0, "maximum": 1}
            ),
            _parameter(
                "stop",
                "last_exit: run all exits; instance: stop where the instance itself lets the image go.",
                {"enum": list(STOP_NAMES), "default": "last_exit"},
            ),
        ],
        {
            "description": "One JSON record per line: a refinement per exit, at last why there are no more.",
            "content": {NDJSON: {"schema": {"type": "string"}}},
        },
    )
    ready = _answers("Whether requests are welcome.")
    ready["responses"] = {
        "200": {"description": "Ready."},
        "503": {"description": "Starting, about to stop, or not able to serve; the status says which."},
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "messnet",
            "version": __version__,
            "description": "One MESS instance: images in, class indices out, each image only as deep as it needs.",
        },
        "paths": {
            "/v1/predict": {"post": predict},
            "/v1/anytime": {"post": anytime},
            "/v1/info": {"get": _answers("The model: its classes, its exits and what each costs; the limits.")},
            "/health": {"get": _answers("Whether the process lives.")},
            "/ready": {"get": ready},
            "/metrics": {"get": _answers("Requests by status, exits, latencies, batches, for Prometheus.")},
        },
    }


def _parameter(name: str, description: str, schema: Json) -> Json:
    return {"name": name, "in": "query", "required": False, "description": description, "schema": schema}


def _binary() -> Json:
    return {"schema": {"type": "string", "format": "binary"}}


def _answers(summary: str) -> Json:
    return {"summary": summary, "responses": {"200": {"description": "The answer."}}}


def _work(summary: str, parameters: list[Json], answer: Json) -> Json:
    error = {"application/json": {"schema": {"type": "object", "properties": {"error": {"type": "string"}}}}}
    form = {"type": "object", "required": ["file"], "properties": {"file": {"type": "string", "format": "binary"}}}
    content: Json = {media: _binary() for media in FORMATS.values()}
    content["multipart/form-data"] = {"schema": form}
    return {
        "summary": summary,
        "parameters": parameters,
        "requestBody": {"required": True, "content": content},
        "responses": {
            "200": answer,
            **{status: {"description": text, "content": error} for status, text in _STATUSES.items()},
        },
    }
