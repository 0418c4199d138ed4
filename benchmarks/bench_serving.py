"""A service under load: good, bad and rude requests at once for minutes, then SIGTERM while they come.

    python benchmarks/bench_serving.py BUNDLE-or-RUN [--instance NAME] [--minutes 10] [--clients 6] [--json PATH]

Three parts. "direct": images per second of the session alone and of the service with good requests only, for the ratio.
"load": mixed requests from concurrent clients, bursts beyond the limits among them; memory is read every second.
"end": services that get SIGTERM under load; what they have accepted is compared with what the clients have got.
Ends with one line per figure: name value unit goal ok|short.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

import messnet

LIMITS = {"max-body-mb": "1", "max-pixels": "262144", "max-queue": "16", "max-concurrency": "12", "timeout-s": "30"}
SIZES = [(96, 128), (96, 128), (120, 160), (180, 240), (96, 160), (240, 320)]
WARM_UP_SHARE = 0.2  # of the load, before memory counts


class Kind(NamedTuple):
    """A kind of request, how often it comes, and the statuses that are right for it besides 429 and 503."""

    path: str
    body: Callable[[np.random.Generator], bytes]
    weight: float
    right: tuple[int, ...] = (200,)
    headers: dict[str, str] = {}  # noqa: RUF012
    method: str = "POST"
    chunked: bool = False


@dataclass
class Tally:
    """What the clients saw."""

    statuses: Counter[str] = field(default_factory=Counter)
    latencies_ms: list[float] = field(default_factory=list)
    """Of good requests to /v1/predict."""
    accepted: int = 0
    """Requests for work that were answered, and not turned away at the gate."""
    refused: int = 0
    """No connection: the service does not listen."""
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def picture(draw: np.random.Generator) -> np.ndarray:
    height, width = SIZES[draw.integers(len(SIZES))]
    blocks = draw.integers(0, 256, (height // 12 + 1, width // 12 + 1, 3)).repeat(12, 0).repeat(12, 1)
    return np.clip(blocks[:height, :width] + draw.normal(0, 9, (height, width, 3)), 0, 255).astype(np.uint8)


def encoded(draw: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(draw)).save(buffer, ("PNG", "JPEG")[draw.integers(2)])
    return buffer.getvalue()


def bomb(draw: np.random.Generator) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    side = int(draw.integers(600, 60_000))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(999))) + chunk(b"IEND", b"")


class Load:
    """Kinds of requests over a fixed stock of images: making them costs the clients no time."""

    def __init__(self) -> None:
        draw = np.random.default_rng(0)
        stock = [encoded(draw) for _ in range(64)]

        def good(draw: np.random.Generator) -> bytes:
            return stock[draw.integers(len(stock))]

        def form(draw: np.random.Generator) -> bytes:
            head = b'--sep\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
            return head + good(draw) + b"\r\n--sep--\r\n"

        def half(draw: np.random.Generator) -> bytes:
            return good(draw)[: int(draw.integers(200, 1000))]

        def flipped(draw: np.random.Generator) -> bytes:
            data = bytearray(good(draw))
            for place in draw.integers(0, len(data), 30):
                data[place] ^= 1 << int(draw.integers(8))
            return bytes(data)

        multipart = {"Content-Type": "multipart/form-data; boundary=sep"}
        self.good = [Kind("/v1/predict", good, 1)]
        self.mixed = [
            Kind("/v1/predict", good, 40),
            Kind("/v1/predict?format=json", good, 5),
            Kind("/v1/predict?format=overlay", good, 5),
            Kind("/v1/predict", form, 5, headers=multipart),
            Kind("/v1/anytime", good, 8),
            Kind("/v1/anytime?threshold=0.5", good, 4),
            Kind("/v1/anytime?deadline_ms=1", good, 4),
            Kind("/v1/predict", lambda draw: draw.bytes(500), 4, (415,)),
            Kind("/v1/predict", half, 4, (415, 422)),
            Kind("/v1/predict", flipped, 4, (200, 413, 415, 422)),
            Kind("/v1/predict", bomb, 4, (413,)),
            Kind("/v1/predict", lambda draw: bytes(1_000_001), 1, (413,)),
            Kind("/v1/predict", lambda draw: bytes(1_300_000), 1, (413,), chunked=True),
            Kind("/v1/predict?format=svg", good, 2, (422,)),
            Kind("/v1/anytime?threshold=7", good, 2, (422,)),
            Kind("/v1/predict", lambda draw: b"--sep\r\nnonsense", 2, (422,), headers=multipart),
            Kind("/v1/predict", lambda draw: b"", 1, (415,)),
            Kind("/nowhere", lambda draw: b"", 1, (404,), method="GET"),
            Kind("/v1/predict", lambda draw: b"", 1, (405,), method="GET"),
            Kind("/v1/info", lambda draw: b"", 1, method="GET"),
            Kind("/metrics", lambda draw: b"", 1, method="GET"),
            Kind("/ready", lambda draw: b"", 1, method="GET"),
            Kind("/", lambda draw: b"", 1, method="GET"),
        ]


class Client(threading.Thread):
    """Sends requests over one connection, a new one where the service closed the last, until ``stop``; from 127.0.0.x,
    ``address`` being x."""

    def __init__(
        self, port: int, kinds: list[Kind], tally: Tally, stop: threading.Event, *, address: int, seed: int
    ) -> None:
        super().__init__(daemon=True)
        self.port, self.kinds, self.tally, self.stop, self.address = port, kinds, tally, stop, address
        self.draw = np.random.default_rng(seed)
        self.weights = np.array([kind.weight for kind in kinds]) / sum(kind.weight for kind in kinds)
        self.rude = len(kinds) > 1

    def run(self) -> None:
        source = (f"127.0.0.{self.address}", 0)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120, source_address=source)
        while not self.stop.is_set():
            if self.rude and self.draw.random() < 0.02:
                self.leave()
                continue
            kind = self.kinds[self.draw.choice(len(self.kinds), p=self.weights)]
            body = kind.body(self.draw)
            try:
                if connection.sock is None:
                    connection.connect()
            except OSError:
                with self.tally.lock:
                    self.tally.refused += 1
                return
            self.ask(connection, kind, body)

    def ask(self, connection: http.client.HTTPConnection, kind: Kind, body: bytes) -> None:
        start = time.perf_counter()
        try:
            pieces = (body[i : i + 65536] for i in range(0, len(body), 65536)) if kind.chunked else body
            connection.request(
                kind.method,
                kind.path,
                pieces or None,
                kind.headers,
                encode_chunked=kind.chunked,  # type: ignore[arg-type]
            )
            response = connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            with self.tally.lock:
                self.tally.wrong.append(f"no answer to {kind.method} {kind.path}: {error!r}")
            return
        milliseconds = (time.perf_counter() - start) * 1000
        with self.tally.lock:
            self.note(kind, response.status, answer, milliseconds)

    def note(self, kind: Kind, status: int, answer: bytes, milliseconds: float) -> None:
        tally = self.tally
        tally.statuses[str(status)] += 1
        turned_away = status in (429, 503) and b"in work" in answer
        if kind.method == "POST" and not turned_away:
            tally.accepted += 1
        if turned_away and kind.path.startswith("/v1/"):
            time.sleep(0.05)
            return
        if status == 503 and (kind.path == "/ready" or b"no answer within" in answer):
            return
        if status not in kind.right:
            tally.wrong.append(f"{status} to {kind.method} {kind.path}, expected {kind.right}: {answer[:200]!r}")
        elif status >= 400 and list(json.loads(answer)) != ["error"]:
            tally.wrong.append(f"{status} to {kind.path} says {answer[:200]!r}")
        elif kind.path.startswith("/v1/anytime") and status == 200 and b'"stopped"' not in answer.splitlines()[-1]:
            tally.wrong.append(f"a stream that breaks off: {answer[-200:]!r}")
        elif kind.path == "/v1/predict" and kind.right == (200,):
            tally.latencies_ms.append(milliseconds)

    def leave(self) -> None:
        """Sends a part of a request, or all of it, and goes away."""
        body = self.kinds[0].body(self.draw)
        path = (b"/v1/predict", b"/v1/anytime")[self.draw.integers(2)]
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=10) as gone:
                head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (path, len(body))
                gone.sendall((head + body)[: int(self.draw.integers(1, len(head) + len(body) + 1))])
                time.sleep(float(self.draw.choice([0, 0.01, 0.3])))
        except OSError:
            return


class Served:
    """A service of its own process."""

    def __init__(self, options: argparse.Namespace) -> None:
        command = [sys.executable, "-m", "messnet", "serve", str(options.target), "--port", "0"]
        command += [word for name, value in LIMITS.items() for word in (f"--{name}", value)]
        command += ["--instance", options.instance] if options.instance else []
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://[\d.]+:(\d+)/", line)
        if found is None:
            raise SystemExit(f"the service did not start: {line!r}")
        self.port = int(found[1])
        while not self.is_ready():
            time.sleep(0.1)

    def is_ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", "/ready")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def memory_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1000  # type: ignore[index]

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> tuple[int, int]:
        """SIGTERM. Exit code, and how many requests it says it has accepted."""
        self.process.send_signal(signal.SIGTERM)
        said, _ = self.process.communicate(timeout=120)
        found = re.search(r"stopped: (\d+) requests accepted, (\d+) answered", said)
        assert found is not None, said
        assert found[1] == found[2], said
        return self.process.returncode, int(found[1])


def clients(
    served: Served, kinds: list[Kind], count: int, tally: Tally, *, seed: int, num_addresses: int = 1
) -> Callable[[], None]:
    """Starts ``count`` clients at as many addresses; call what comes back to stop them."""
    stop = threading.Event()
    threads = [
        Client(served.port, kinds, tally, stop, address=1 + i % num_addresses, seed=seed + i) for i in range(count)
    ]
    for thread in threads:
        thread.start()

    def end() -> None:
        stop.set()
        for thread in threads:
            thread.join(150)
            assert not thread.is_alive(), "a request without an answer"

    return end


def direct_rate(options: argparse.Namespace, load: Load, seconds: float) -> float:
    """Images per second of the session alone, decoding included."""
    session, draw = messnet.load(options.target, instance=options.instance), np.random.default_rng(1)
    done, end = 0, 0.0
    for warm_up in (True, False):
        start, done = time.perf_counter(), 0
        end = start + (seconds / 3 if warm_up else seconds)
        while time.perf_counter() < end:
            with Image.open(io.BytesIO(load.good[0].body(draw))) as file:
                session.predict([np.array(file.convert("RGB"))])
            done += 1
    return done / seconds


def service_rate(served: Served, load: Load, options: argparse.Namespace, seconds: float) -> float:
    rates = []
    for length in (seconds / 3, seconds):  # the first to warm up
        tally, start = Tally(), time.perf_counter()
        end = clients(served, load.good, options.clients, tally, seed=7)
        time.sleep(length)
        rates.append(len(tally.latencies_ms) / (time.perf_counter() - start))
        end()
    return rates[-1]


def mixed_load(served: Served, load: Load, options: argparse.Namespace) -> tuple[Tally, list[float], float, float]:
    """What the clients saw, memory in MB each second, seconds, processor seconds of the service."""
    tally, memory, start, cpu = Tally(), [], time.perf_counter(), served.cpu_s()
    end = clients(served, load.mixed, options.clients, tally, seed=100)
    while (seconds := time.perf_counter() - start) < 60 * options.minutes:
        if len(memory) % 20 == 10:  # beyond the limits: of one address, of all
            num_addresses = 1 + 3 * (len(memory) // 20 % 2)
            burst = clients(served, load.good, 24, tally, seed=1000 + len(memory), num_addresses=num_addresses)
            time.sleep(1)
            burst()
        time.sleep(1)
        memory.append(served.memory_mb())
        if len(memory) % 30 == 0:
            print(f"{seconds:.0f} s: {sum(tally.statuses.values())} answers, {memory[-1]:.0f} MB", flush=True)
        if served.process.poll() is not None:
            raise SystemExit(f"the service ended with {served.process.returncode}")
    end()
    return tally, memory, time.perf_counter() - start, served.cpu_s() - cpu


def end_under_load(options: argparse.Namespace, load: Load, served: Served, seed: int) -> tuple[int, int, Tally]:
    """Exit code; how many of the accepted requests the clients have no answer to; what else they saw."""
    tally = Tally()
    end = clients(served, load.good, options.clients, tally, seed=seed)
    time.sleep(2)
    code, accepted = served.end()
    end()
    return code, accepted - tally.accepted, tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="a run or a bundle")
    parser.add_argument("--instance")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--ends", type=int, default=4, help="how many services are ended under load")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    load = Load()

    served = Served(options)
    direct = direct_rate(options, load, 10)
    service = service_rate(served, load, options, 10)
    print(f"direct {direct:.1f} images/s, service {service:.1f} images/s", flush=True)
    tally, memory, seconds, cpu_s = mixed_load(served, load, options)
    settled = memory[int(WARM_UP_SHARE * len(memory)) :]
    tenth = max(1, len(settled) // 10)
    growth = 100 * (np.median(settled[-tenth:]) / np.median(settled[:tenth]) - 1)
    spread = 100 * (max(settled) / min(settled) - 1)
    codes, lost, cut = [served.end()[0]], 0, []
    for i in range(options.ends):
        code, missing, seen = end_under_load(options, load, Served(options), 50 * i)
        codes.append(code)
        lost += abs(missing)
        cut += [line for line in seen.wrong if not line.startswith("no answer")]
        print(f"end {i}: {seen.accepted} answers, {missing} lost, {len(seen.wrong)} turned away, exit code {code}")
    for line in [*tally.wrong[:20], *cut[:20]]:
        print(f"wrong: {line}")
    latencies = np.percentile(tally.latencies_ms, [50, 95, 99])
    server_errors = sum(count for status, count in tally.statuses.items() if status >= "500" and status != "503")
    total = sum(tally.statuses.values())
    print(f"statuses: {dict(sorted(tally.statuses.items()))}")
    print(f"memory after warm-up: {settled[0]:.0f} MB first, {settled[-1]:.0f} MB last, {max(settled):.0f} MB at most")
    figures = [
        ("minutes", seconds / 60, "min", None, True),
        ("answers", total, "requests", None, True),
        ("throughput", total / seconds, "requests/s", None, True),
        ("good_predictions", len(tally.latencies_ms), "requests", None, True),
        ("latency_p50", latencies[0], "ms", None, True),
        ("latency_p95", latencies[1], "ms", None, True),
        ("latency_p99", latencies[2], "ms", None, True),
        ("service_cpu", cpu_s / seconds, "cores", None, True),
        ("service_over_direct", service / direct, "ratio", 0.5, service / direct >= 0.5),
        ("wrong_or_missing_answers", len(tally.wrong), "requests", 0, not tally.wrong),
        ("5xx_but_503", server_errors, "requests", 0, server_errors == 0),
        ("busy_503", tally.statuses["503"], "requests", None, True),
        ("busy_429", tally.statuses["429"], "requests", None, True),
        ("memory_growth", growth, "%", 5, abs(growth) <= 5),
        ("memory_spread", spread, "%", None, True),
        ("ends_under_load", options.ends, "services", None, True),
        ("lost_at_sigterm", lost + len(cut), "requests", 0, lost + len(cut) == 0),
        ("worst_exit_code", max(codes, key=abs), "code", 0, not any(codes)),
    ]
    for name, value, unit, goal, reached in figures:
        print(f"{name} {value:.6g} {unit} {'-' if goal is None else f'{goal:g}'} {'ok' if reached else 'short'}")
    if options.json:
        record = [
            dict(zip(("name", "value", "unit", "goal", "ok"), map(plain, figure), strict=True)) for figure in figures
        ]
        options.json.write_text(json.dumps({"statuses": tally.statuses, "memory_mb": memory, "figures": record}) + "\n")


def plain(value: object) -> object:
    return float(value) if isinstance(value, np.floating) else bool(value) if isinstance(value, np.bool_) else value


if __name__ == "__main__":
    main()
