"""``messnet serve``."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from messnet.apps.serving.options import ServeOptions
from messnet.cli.app import SessionFlags, SessionOptions, app, examples, quieten

_LIMITS, _SESSION = ServeOptions(), SessionOptions()


@app.command(
    help_epilogue=examples(
        "serve runs/demo",
        "serve demo.mess --port 9000 --samples photos/",
        "serve demo.mess --host 0.0.0.0 --max-body-mb 4 --max-queue 32",
        "serve demo.mess --workers 4",
        "serve demo.mess --proxy 10.0.0.7 --cors https://example.org",
    )
)
def serve(
    target: Path,
    *,
    session: SessionFlags = _SESSION,
    samples: Path | None = None,
    full_size: Annotated[bool, Parameter(negative="")] = False,
    # The record is the options: its fields, their defaults and texts are the command's, and it refuses what is out of
    # range itself.
    options: Annotated[ServeOptions, Parameter(name="*")] = _LIMITS,
) -> None:
    """Serve an instance over HTTP, with a page to try it on.

    POST an image to /v1/predict and get a mask, to /v1/anytime and get a line of JSON per exit; GET / is the page,
    /v1/info says what the model is, /openapi.json how to ask; /health, /ready and /metrics are for operators. SIGTERM
    ends it when every accepted request has been answered, within drain-s and timeout-s.

    Args:
        target: A finished run, or a bundle.
        samples: A folder of images that the page offers; by default those of a run's report.
        full_size: Compute large images as they are. Otherwise those of more than twice the pixels that the network
            learned on are scaled down to that many first; the answer has the image's own size.
    """
    quieten()
    from messnet.apps.serving.server import serve as serve_until_stopped

    if options.workers > 1 and session.threads is None:  # a part of the processors each
        session = replace(session, threads=max(1, (os.cpu_count() or 1) // options.workers))
    if full_size and options.max_pixels == _LIMITS.max_pixels:  # the network's memory grows with them
        options = replace(options, max_pixels=_LIMITS.batch_pixels)
    serve_until_stopped(target, options, samples=samples, open_session=partial(session.open, full_size=full_size))
