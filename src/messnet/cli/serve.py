"""``messnet serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from messnet.cli.app import PrecisionOption, RuntimeOption, app, examples, quieten

__all__ = ["serve"]


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
    host: str = "127.0.0.1",
    port: int = 8000,
    instance: str | None = None,
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = "auto",
    runtime: RuntimeOption | None = None,
    precision: PrecisionOption = "f32",
    threads: int | None = None,
    model: str | None = None,
    samples: Path | None = None,
    max_body_mb: float = 16.0,
    max_pixels: int = 2**22,
    max_queue: int = 64,
    max_concurrency: int = 32,
    max_connections: int = 256,
    timeout_s: float = 30.0,
    header_s: float = 10.0,
    decode_s: float = 2.0,
    batch_size: int = 8,
    batch_wait_ms: float = 5.0,
    drain_s: float = 0.5,
    proxy: str | None = None,
    cors: tuple[str, ...] = (),
) -> None:
    """Serve an instance over HTTP, with a page to try it on.

    POST an image to /v1/predict and get a mask, to /v1/anytime and get a line of JSON per exit; GET / is the page,
    /v1/info says what the model is, /openapi.json how to ask; /health, /ready and /metrics are for operators. SIGTERM
    ends it when every accepted request has been answered, within drain-s and timeout-s.

    Args:
        target: A finished run, or a bundle.
        host: Address to listen on; 0.0.0.0 for every one that the machine has.
        port: 0 takes a free one.
        instance: One of the run's instances; by default the cheapest within 1 pp. A bundle has but one.
        device: Where torch computes: auto is CUDA where there is any. mps and xpu are untested.
        runtime: What computes; by default torch, or for a bundle with graphs onnxruntime where torch is not installed.
        precision: Of weights and activations, where the runtime has it.
        threads: Of the processor, for the network; by default as many as the runtime takes.
        model: module:function that builds the network of a bundle whose model is its maker's own. What a bundle names
            is not imported unless you name it here.
        samples: A folder of images that the page offers; by default those of a run's report.
        max_body_mb: Of a request, in 10^6 bytes.
        max_pixels: Of an image.
        max_queue: Requests in work at once; one more is answered 503.
        max_concurrency: Of them from one address; one more is answered 429.
        max_connections: Open at once; one more closes the one that has waited longest for a request.
        timeout_s: For a request, from its first byte to its answer.
        header_s: For the head of a request; a connection that asks nothing for so long is closed.
        decode_s: Of processor time to decode an image; more is answered 422.
        batch_size: Requests run together at most.
        batch_wait_ms: How long a batch waits for requests that are on their way.
        drain_s: After SIGTERM: how long connections that stand may bring one more request.
        proxy: Address of a proxy in front, whose X-Forwarded-For is believed; by default nobody's.
        cors: Origins whose pages may ask, such as https://example.org, or *; by default only the service's own page.
    """
    quieten()
    from messnet.apps.serving.options import ServeOptions
    from messnet.apps.serving.server import serve as serve_until_stopped

    options = ServeOptions(
        host=host,
        port=port,
        max_body_mb=max_body_mb,
        max_pixels=max_pixels,
        max_queue=max_queue,
        max_concurrency=max_concurrency,
        max_connections=max_connections,
        timeout_s=timeout_s,
        header_s=header_s,
        decode_s=decode_s,
        batch_size=batch_size,
        batch_wait_ms=batch_wait_ms,
        drain_s=drain_s,
        proxy=proxy,
        cors=cors,
    )
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
