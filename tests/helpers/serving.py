"""Services to test: a session that does as it is told, behind a service in a thread or in a process of its own."""

from __future__ import annotations

import io
import json
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from messnet.apps.serving.app import Sample, Service
from messnet.apps.serving.draining import Server, run_until_stopped
from messnet.apps.serving.options import ServeOptions
from messnet.errors import ModelError, PredictionError
from messnet.records.instance import ExitChoice, Instance

FCN = "crm1-blocks0-fcn"
REFINING = Instance(
    name="refining",
    setting="anytime",
    exits=(
        *(ExitChoice(exit_index=i, head=FCN, pixel_threshold=0.4, image_threshold=2.0) for i in range(3)),
        ExitChoice(exit_index=3, head="final"),
    ),
)


def encoded(image: NDArray[np.uint8], format: str = "PNG", **how: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format, **how)
    return buffer.getvalue()


def grey(value: int, side: int = 4) -> bytes:
    return encoded(np.full((side, side, 3), value, np.uint8))


def many_scans(side: int, count: int) -> bytes:
    """A progressive JPEG, ``side`` pixels square, that goes over its coefficients ``count`` times: about 40 bytes and
    20 ms (of 4 megapixels) each."""
    data = encoded(np.zeros((side, side, 3), np.uint8), "JPEG", progressive=True)
    scan = data.rfind(b"\xff\xda")
    tables = data.rfind(b"\xff\xc4", 0, scan)
    start = tables if tables > data.rfind(b"\xff\xda", 0, scan) else scan
    return data[:start] + data[start:-2] * count + data[-2:]


class FakeSession:
    """Answers with the image's first value as the label; while ``open`` is not set it does not."""

    palette = np.arange(768, dtype=np.uint8).reshape(256, 3)
    class_names = tuple(map(str, range(256)))
    runtime, precision, costs, workload = "fake", "f32", None, None
    instance = REFINING
    input_size = (8, 8)

    def __init__(self) -> None:
        self.open, self.batches, self.exits_run = threading.Event(), [], 0
        self.open.set()

    def predict(self, images: Sequence[NDArray[np.uint8]], batch_size: int = 1) -> list[Any]:
        self.batches.append(len(images))
        assert self.open.wait(120)
        if any(image[0, 0, 0] == 255 for image in images):
            raise ModelError("it does not\nlike white")
        if any(image[0, 0, 0] == 253 for image in images):
            raise PredictionError("the logits are not finite")
        if any(image[0, 0, 0] == 254 for image in images):
            raise ZeroDivisionError
        return [result(image[..., 0]) for image in images]

    def anytime(self, image: NDArray[np.uint8], *, deadline_ms: float | None = None) -> Iterator[Any]:
        for i in range(4):
            assert self.open.wait(120)
            self.exits_run += 1
            yield result(image[..., 0], i)


def result(labels: NDArray[np.uint8], exit_index: int = 0) -> Any:
    return SimpleNamespace(labels=labels, exit_index=exit_index, image_confidence=0.25 * exit_index, latency_ms=1.0)


def fake(samples: Sequence[Sample] = (), **options: Any) -> tuple[FakeSession, Service]:
    session = FakeSession()
    return session, Service(session, ServeOptions(**{"drain_s": 0, **options}), samples=samples)  # type: ignore[arg-type]


def until(holds: Callable[[], object], seconds: float = 120) -> None:
    """Returns when it holds; fails after ``seconds``, which no machine needs, however busy."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.002)


@contextmanager
def running(service: Service) -> Iterator[httpx.Client]:
    """A client of ``service``, which listens on the loopback in a thread. Every request must have been answered."""
    with listening(service) as (server, client):
        yield client
        server.handle_exit(signal.SIGTERM, None)
    assert service.gate.num_in_work == 0


@contextmanager
def listening(service: Service) -> Iterator[tuple[Server, httpx.Client]]:
    server = Server(service)
    with socket.create_server(("127.0.0.1", 0)) as sock, ThreadPoolExecutor(1) as pool:
        ended = pool.submit(server.run, sockets=[sock])
        try:
            while not server.started:
                assert not ended.done(), ended.exception()
                time.sleep(0.005)
            with httpx.Client(
                base_url=f"http://127.0.0.1:{sock.getsockname()[1]}", timeout=120, trust_env=False
            ) as client:
                yield server, client
        finally:
            server.should_exit = True
        ended.result(120)


class ServedProcess:
    """A service on a FakeSession in a process of its own, which may open ``num_files`` files."""

    def __init__(self, errors: Path, *, num_files: int | None = None, **options: Any) -> None:
        self.errors = errors
        paths = [str(Path(__file__).parents[1]), *sys.path]
        code = f"import sys; sys.path[:0] = {paths!r}; from helpers.serving import serve_fake; serve_fake()"
        with errors.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, json.dumps(options), json.dumps(num_files)],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, errors.read_text()
        self.port = int(line)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=120, trust_env=False)
        until(self.answers)

    def answers(self) -> bool:
        try:
            return self.client.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=120)

    def children(self) -> list[int]:
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(pid) for task in tasks for pid in task.read_text().split()]

    def end(self) -> str:
        """SIGTERM. What the process said last."""
        self.process.send_signal(signal.SIGTERM)
        said, _ = self.process.communicate(timeout=120)
        return said

    def __enter__(self) -> ServedProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.process.kill()
        self.process.communicate()


def serve_fake() -> None:
    """The process: serves until it gets a signal."""
    options, num_files = map(json.loads, sys.argv[1:])
    if num_files is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (num_files, num_files))
    _, service = fake(**options)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        print(sock.getsockname()[1], flush=True)
        run_until_stopped(service, [sock])
    print(f"accepted {service.gate.accepted}, answered {service.gate.answered}", flush=True)


def post_whole(client: httpx.Client, path: str, data: bytes) -> httpx.Response:
    """The answer to ``data`` that came in time: on a busy machine even a body may be late, which is answered 408."""
    while (response := client.post(path, content=data)).status_code == 408:
        pass
    return response


def expect_error(response: httpx.Response, words: str = "") -> None:
    """{"error": one line} that holds ``words``, a pattern."""
    record = response.json()
    assert list(record) == ["error"]
    assert record["error"].isprintable()
    assert re.search(words, record["error"]), record
