"""Several processes on one port: all answer, each counts its own, and they end together."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from helpers.images import smooth_image
from helpers.serving import encoded, until
from messnet.apps.serving.options import ServeOptions
from messnet.errors import RecipeError

BUNDLE = Path(__file__).parents[2] / "examples" / "scenes_mobilenetv2.mess"


def free_ports() -> int:
    """The first of three ports in a row that nobody listens on."""
    # Below those that the system gives to whoever asks for any.
    for port in range(20000 + os.getpid() % 4000 * 3, 32768, 3):
        try:
            for k in range(3):
                socket.create_server(("127.0.0.1", port + k)).close()
        except OSError:
            continue
        return port
    raise AssertionError


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ready", trust_env=False, timeout=120).status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def served(port: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "messnet", "serve", str(BUNDLE), "--runtime", "onnxruntime", "--workers", "2"]
    process = subprocess.Popen(
        [*command, "--port", str(port)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        until(lambda: process.poll() is not None or (answers(port + 1) and answers(port + 2)))
        yield process
    finally:
        process.kill()
        process.communicate()


def test_workers_share_a_port_and_end_together() -> None:
    port, image = free_ports(), encoded(smooth_image(64, 80))
    with served(port) as process:
        masks = set()
        for _ in range(20):  # each on a connection of its own, or one worker would have them all
            answer = httpx.post(f"http://127.0.0.1:{port}/v1/predict", content=image, trust_env=False, timeout=120)
            assert answer.status_code == 200
            masks.add(answer.content)
        assert len(masks) == 1
        counted = [predictions(port + k) for k in (1, 2)]
        assert sum(counted) == 20
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
    assert f"http://127.0.0.1:{port}/ by 2 workers" in said
    stops = re.findall(r"^worker \d: stopped: (\d+) requests accepted, (\d+) answered$", said, re.MULTILINE)
    assert len(stops) == 2
    assert all(accepted == answered for accepted, answered in stops)
    socket.create_server(("127.0.0.1", port)).close()


def predictions(port: int) -> int:
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False, timeout=120).text
    found = re.findall(r'^messnet_requests_total\{path="/v1/predict",status="200"\} ([\d.]+)$', text, re.MULTILINE)
    return sum(int(float(value)) for value in found)


def test_the_end_of_one_worker_is_the_end_of_all() -> None:
    port = free_ports()
    with served(port) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = [int(pid) for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 2
    assert re.search(
        r"^messnet: a worker of the service ended by itself \(worker \d with exit code -9\)$", said, re.MULTILINE
    )
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_the_first_process_takes_its_workers_with_it() -> None:
    port = free_ports()
    with served(port) as process:
        process.kill()
        process.wait()
        until(lambda: not answers(port + 1) and not answers(port + 2))


@pytest.mark.parametrize(
    ("options", "told"),
    [({"workers": 0}, "--workers must be at least 1"), ({"workers": 3, "port": 65534}, "--port must be at most 65532")],
)
def test_what_cannot_be_is_told(options: dict[str, int], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        ServeOptions(**options)  # type: ignore[arg-type]
