"""``messnet serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from messnet.apps.serving.options import ServeOptions
from messnet.cli.app import PrecisionOption, RuntimeOption, app, examples, quieten, tell_of_translating

_LIMITS = ServeOptions()


@app.command(
    help_epilogue=examples(
        "serve runs/demo",
        "serve demo.mess --port 9000 --samples photos/",
        "serve demo.mess --host 0.0.0.0 --max-body-mb 4 --max-queue 32",
        "serve demo.mess --proxy 10.0.0.7 --cors https://example.org",
    )
)
def serve(
    target: Path,
    *,
    instance: str | None = None,
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = "auto",
    runtime: RuntimeOption | None = None,
    precision: PrecisionOption | None = None,
    threads: int | None = None,
    model: str | None = None,
    samples: Path | None = None,
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
        instance: One of the run's instances; by default the cheapest within 1 pp. A bundle has but one.
        device: Where torch computes: auto is CUDA where there is any. mps and xpu are untested.
        runtime: What computes; by default torch, or for a bundle with graphs onnxruntime where torch is not installed.
        precision: Of weights and activations, where the runtime has it; by default f32, or the only one that a bundle
            has graphs in. int8 is of bundles that were exported with it.
        threads: Of the processor, for the network; by default as many as the runtime takes.
        model: module:function that builds the network of a bundle whose model is its maker's own. What a bundle names
            is not imported unless you name it here.
        samples: A folder of images that the page offers; by default those of a run's report.
    """
    quieten()
    tell_of_translating(runtime)
    from messnet.apps.serving.server import serve as serve_until_stopped

    serve_until_stopped(
        target,
        options,
        instance=instance,
        device=device,
        runtime=runtime,
        precision=precision,
        threads=threads,
        model=model,
        samples=samples,
    )
