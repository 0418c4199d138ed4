"""The address that a service listens to, and its limits."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from messnet.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Memory is bounded by them: ``max_queue`` requests of ``max_body_mb`` may be held at once, and of decoded images
    ``held_pixels`` and two more; one image, or a batch of ``batch_pixels`` in all, goes through the network at a time.
    So is time: ``decode_s`` for an image, ``timeout_s`` for a request, ``header_s`` for a connection that asks
    nothing."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every one that the machine has."""
    port: int = 8000
    """0 takes a free one."""
    max_body_mb: float = 16.0
    """The most that a request may hold, in 10^6 bytes; more is 413."""
    max_pixels: int = 25_000_000
    """The most that an image may have, a side shorter than 64 counted as 64; more is 413, before it is decoded. The
    default is for photographs as telephones take them. With --full-size, where the network computes all, it is
    4194304."""
    max_queue: int = 64
    """Requests in work at once, waiting and arriving ones included; one more is 503."""
    max_concurrency: int = 32
    """Requests in work from one address, of IPv6 from one network of 64 bits; one more is 429."""
    max_connections: int = 256
    """Connections that may be open at once; beyond, the one that has waited longest for a request is closed."""
    timeout_s: float = 30.0
    """Time for a request, from its first byte to its answer; after it 408 while the body comes in, else 503."""
    header_s: float = 10.0
    """Time for the head of a request, from the beginning of its connection or the end of the answer before."""
    decode_s: float = 5.0
    """Processor time to decode one image; more is 422."""
    workers: int = 1
    """Processes that serve the port together, each with a session, a queue and limits of its own. With more than 1,
    worker k, from 1, listens on the port + k too, where its own /metrics and /ready are, and takes an equal part of
    the processors unless --threads says otherwise."""
    batch_size: int = 8
    """Requests run together at most."""
    batch_wait_ms: float = 5.0
    """How long a batch waits for requests that are on their way."""
    drain_s: float = 0.5
    """After SIGTERM: how long connections that stand may bring one more request. What has been accepted is answered
    within ``timeout_s`` more, and then the process ends whatever is left."""
    proxy: str | None = None
    """Address of a proxy in front, whose X-Forwarded-For is believed; by default nobody's."""
    cors: tuple[str, ...] = ()
    """Origins (https://example.org, or *) whose pages may ask; by default only the service's own page."""

    def __post_init__(self) -> None:
        least = {"port": 0, "max_pixels": 1, "max_queue": 1, "max_concurrency": 1, "max_connections": 1}
        least |= {"workers": 1, "batch_size": 1, "batch_wait_ms": 0, "drain_s": 0}
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise RecipeError(f"--{name.replace('_', '-')} must be at least {low}, got {getattr(self, name)}")
        for name in ("max_body_mb", "timeout_s", "header_s", "decode_s"):
            if not getattr(self, name) > 0:
                raise RecipeError(f"--{name.replace('_', '-')} must be greater than 0, got {getattr(self, name)}")
        highest = self.port if self.workers == 1 or not self.port else self.port + self.workers
        if highest > 65535:
            raise RecipeError(f"--port must be at most {65535 - (highest - self.port)}, got {self.port}")
        for origin in self.cors:
            # Browsers send scheme, host and port; with a path or a slash at its end it would never be equal.
            parts = urlsplit(origin)
            if origin != "*" and origin != f"{parts.scheme}://{parts.netloc}":
                raise RecipeError(f"--cors takes an origin such as https://example.org, or *, got {origin!r}")

    @property
    def batch_pixels(self) -> int:
        """The most that the images of a batch have together."""
        return min(self.max_pixels, 2**22)

    @property
    def held_pixels(self) -> int:
        """As many wait decoded, or are computed or answered, before the next image is decoded."""
        return self.max_queue * self.batch_pixels

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mb * 1e6)
