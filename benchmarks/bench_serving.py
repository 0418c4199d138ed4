"""A service under load: good, bad and rude requests at once for minutes, then SIGTERM while they come.

    python benchmarks/bench_serving.py BUNDLE-or-RUN [--instance NAME] [--minutes 10] [--clients 6] [--hostile 0.05]
        [--runtime onnxruntime] [--json PATH]

Three parts. "direct": images per second of the session alone and of the service with good requests only, for the ratio.
"load": mixed requests from concurrent clients, bursts beyond the limits among them; memory is read every second. With
--hostile a share of them is meant to stop the service: images that decode for minutes, forms that parse for long,
connections that ask nothing, stop half-way, trickle or do not read, addresses that are lied about.
"end": services that get SIGTERM under load; what they have accepted is compared with what the clients have got.
Ends with one line per figure: name value unit goal ok|short.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
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
from messnet.apps.serving.decoders import Decoders
from messnet.apps.serving.decoding import decode_image

LIMITS = {"max-body-mb": "1", "max-pixels": "262144", "max-queue": "16", "max-concurrency": "12", "timeout-s": "30"}
LIMITS |= {"header-s": "5", "decode-s": "1", "max-connections": "64", "drain-s": "0.5"}
MOST_ATTACKS = 40  # that stand at once
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
    hostile: Counter[str] = field(default_factory=Counter)
    """Ends of hostile requests, by what they are and what came of them."""
    standing: int = 0
    """Hostile connections at this moment."""
    not_in_time: int = 0
    """Good requests that were let in and not answered within the time limit."""
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


def many_scans(side: int, count: int) -> bytes:
    """A progressive JPEG that goes over its coefficients ``count`` times."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    scan = data.rfind(b"\xff\xda")
    tables = data.rfind(b"\xff\xc4", 0, scan)
    start = tables if tables > data.rfind(b"\xff\xda", 0, scan) else scan
    return data[:start] + data[start:-2] * count + data[-2:]


class Attack(NamedTuple):
    """A connection that is meant to do harm: what it sends, in parts, and the seconds between them."""

    name: str
    parts: list[bytes]
    wait_s: float = 0.0
    reads: bool = True


def attacks(good: bytes) -> list[Attack]:
    def post(body: bytes, *headers: bytes) -> bytes:
        head = [b"POST /v1/predict HTTP/1.1", b"Host: x", b"Content-Length: %d" % len(body), *headers]
        return b"\r\n".join(head) + b"\r\n\r\n" + body

    part = b'--b\r\nContent-Disposition: form-data; name="%d"\r\n\r\nx\r\n'
    form = b"Content-Type: multipart/form-data; boundary=b"
    whole, page = post(good), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    return [
        Attack("minutes of decoding", [post(many_scans(512, 20_000))]),
        Attack("minutes of decoding, another address", [post(many_scans(512, 20_000), b"X-Forwarded-For: 192.0.2.1")]),
        Attack("a form of many fields", [post(b"".join(part % i for i in range(12_000)) + b"--b--\r\n", form)]),
        Attack("a form that never begins", [post(b"\r\n" * 450_000, form)]),
        Attack("nothing", []),
        Attack("a part of a head", [whole[:30]]),
        Attack("a head that trickles", [page[:-2], *([b"X: 1\r\n"] * 40)], 0.5),
        Attack("a part of a body", [whole[:-20]]),
        Attack("a body that trickles", [whole[:-40], *(whole[i : i + 1] for i in range(-40, 0))], 0.5),
        Attack("reads no answer", [page * 300], 3.0, reads=False),
        Attack("a head without end", [page[:-2] + b"X: " + bytes(200_000)]),
        Attack("no HTTP", [bytes(range(256)) * 4]),
        Attack("upgrades", [page[:-2] + b"Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n"]),
        Attack(
            "chunks of one byte",
            [
                page[:-2].replace(b"GET /", b"POST /v1/predict") + b"Transfer-Encoding: chunked\r\n\r\n",
                b"1\r\na\r\n" * 20_000,
            ],
        ),
    ]


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
        self.attacks = attacks(stock[0])
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
        self,
        port: int,
        kinds: list[Kind],
        tally: Tally,
        stop: threading.Event,
        *,
        address: int,
        seed: int,
        hostile: list[Attack] = [],  # noqa: B006
        share: float = 0.0,
    ) -> None:
        super().__init__(daemon=True)
        self.hostile, self.share = hostile, share
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
            if self.draw.random() < self.share and self.tally.standing < MOST_ATTACKS:
                attack = self.hostile[self.draw.integers(len(self.hostile))]
                threading.Thread(target=self.attack, args=(attack,), daemon=True).start()
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
        if status == 503 and kind.path == "/ready":
            return
        if status == 503 and b"no answer within" in answer:
            tally.not_in_time += kind.right == (200,)
            return
        if status not in kind.right:
            tally.wrong.append(f"{status} to {kind.method} {kind.path}, expected {kind.right}: {answer[:200]!r}")
        elif status >= 400 and list(json.loads(answer)) != ["error"]:
            tally.wrong.append(f"{status} to {kind.path} says {answer[:200]!r}")
        elif kind.path.startswith("/v1/anytime") and status == 200 and b'"stopped"' not in answer.splitlines()[-1]:
            tally.wrong.append(f"a stream that breaks off: {answer[-200:]!r}")
        elif kind.path == "/v1/predict" and kind.right == (200,):
            tally.latencies_ms.append(milliseconds)

    def attack(self, attack: Attack) -> None:
        """Until the service answers and closes, or closes."""
        end, tally = "closed", self.tally
        with tally.lock:
            tally.standing += 1
        try:
            # From an address of their own: one that sends images which take long waits for them alone.
            source = ("127.0.0.66", 0)
            with socket.create_connection(("127.0.0.1", self.port), timeout=120, source_address=source) as connection:
                for part in attack.parts:
                    connection.sendall(part)
                    time.sleep(attack.wait_s)
                if attack.reads:
                    answer = b"".join(iter(lambda: connection.recv(65536), b""))
                    end = answer[9:12].decode(errors="replace") or end
        except TimeoutError:
            end = "stands after 120 s"
        except OSError:
            pass
        with tally.lock:
            tally.standing -= 1
            tally.hostile[f"{attack.name}: {end}"] += 1
            if end.startswith(("stands", "5")) and end != "503":
                tally.wrong.append(f"{end} to {attack.name}")

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
        command += ["--runtime", options.runtime] if options.runtime else []
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
        """Resident, of the process and its children."""
        total, pids = 0.0, [str(self.process.pid)]
        for task in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # a thread that has ended
                pids += task.read_text().split()
        for pid in pids:
            with contextlib.suppress(OSError, TypeError):  # a process that has ended, or is about to
                status = Path(f"/proc/{pid}/status").read_text()
                total += int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1000  # type: ignore[index]
        return total

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> tuple[int, int, float]:
        """SIGTERM. Exit code, how many requests it says it has accepted, and seconds until it had ended."""
        start = time.perf_counter()
        self.process.send_signal(signal.SIGTERM)
        said, _ = self.process.communicate(timeout=120)
        took = time.perf_counter() - start
        found = re.search(r"stopped: (\d+) requests accepted, (\d+) answered", said)
        assert found is not None, said
        assert found[1] == found[2], said
        return self.process.returncode, int(found[1]), took


def clients(
    served: Served,
    kinds: list[Kind],
    count: int,
    tally: Tally,
    *,
    seed: int,
    num_addresses: int = 1,
    hostile: list[Attack] = [],  # noqa: B006
    share: float = 0.0,
) -> Callable[[], None]:
    """Starts ``count`` clients at as many addresses, a ``share`` of whose requests is ``hostile``; call what comes back
    to stop them."""
    stop = threading.Event()
    threads = []
    for i in range(count):
        address, own_seed = 1 + i % num_addresses, seed + i
        client = Client(served.port, kinds, tally, stop, address=address, seed=own_seed, hostile=hostile, share=share)
        threads.append(client)
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
    session = messnet.load(options.target, instance=options.instance, runtime=options.runtime)
    draw = np.random.default_rng(1)
    done, end = 0, 0.0
    for warm_up in (True, False):
        start, done = time.perf_counter(), 0
        end = start + (seconds / 3 if warm_up else seconds)
        while time.perf_counter() < end:
            with Image.open(io.BytesIO(load.good[0].body(draw))) as file:
                session.predict([np.array(file.convert("RGB"))])
            done += 1
    return done / seconds


def decoding_overhead(height: int, width: int, repeats: int = 40) -> float:
    """Milliseconds that a JPEG of this size takes more in a process of its own than here. Each is the fastest of
    ``repeats``, in turn, for other processes only ever add to it."""
    draw = np.random.default_rng(2)
    blocks = draw.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3)).repeat(16, 0).repeat(16, 1)
    buffer = io.BytesIO()
    Image.fromarray(blocks[:height, :width].astype(np.uint8)).save(buffer, "JPEG")
    data, here, there = buffer.getvalue(), [], []

    async def measure() -> None:
        decoders = Decoders(1, max_pixels=2**22, decode_s=10)
        await decoders.start()
        for _ in range(repeats):
            start = time.perf_counter()
            decode_image(data, max_pixels=2**22)
            here.append(time.perf_counter() - start)
            start = time.perf_counter()
            await decoders.decode(data)
            there.append(time.perf_counter() - start)
        await decoders.stop()

    asyncio.run(measure())
    return 1000 * (min(there) - min(here))


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
    end = clients(served, load.mixed, options.clients, tally, seed=100, hostile=load.attacks, share=options.hostile)
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


def end_under_load(
    options: argparse.Namespace, load: Load, served: Served, seed: int, share: float
) -> tuple[int, int, float, Tally]:
    """Exit code; how many of the accepted requests the clients have no answer to; seconds to the end; what else they
    saw. Of hostile requests nobody knows how many were accepted: with a ``share`` of them none counts as lost."""
    tally = Tally()
    end = clients(served, load.good, options.clients, tally, seed=seed, hostile=load.attacks, share=share)
    time.sleep(2 if not share else 10)
    code, accepted, took = served.end()
    end()
    return code, 0 if share else accepted - tally.accepted, took, tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="a run or a bundle")
    parser.add_argument("--instance")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--hostile", type=float, default=0.0, metavar="SHARE", help="of requests that mean harm")
    parser.add_argument("--runtime", help="as `messnet serve` takes it")
    parser.add_argument("--ends", type=int, default=4, help="how many services are ended under load")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    load = Load()

    served = Served(options)
    direct = direct_rate(options, load, 10)
    service = service_rate(served, load, options, 10)
    small, large = decoding_overhead(240, 320), decoding_overhead(2048, 2048, repeats=15)
    print(f"decoding in another process: {small:.2f} ms more for 240 x 320, {large:.2f} ms for 2048 x 2048", flush=True)
    print(f"direct {direct:.1f} images/s, service {service:.1f} images/s", flush=True)
    tally, memory, seconds, cpu_s = mixed_load(served, load, options)
    settled = memory[int(WARM_UP_SHARE * len(memory)) :]
    tenth = max(1, len(settled) // 10)
    growth = 100 * (np.median(settled[-tenth:]) / np.median(settled[:tenth]) - 1)
    spread = 100 * (max(settled) / min(settled) - 1)
    code, _, took = served.end()
    codes, ends, lost, cut = [code], [took], 0, []
    for i in range(options.ends):
        code, missing, took, seen = end_under_load(
            options, load, Served(options), 50 * i, options.hostile if i % 2 else 0.0
        )
        codes.append(code)
        ends.append(took)
        lost += abs(missing)
        cut += [line for line in seen.wrong if not line.startswith("no answer")]
        print(
            f"end {i}: {seen.accepted} answers, {missing} lost, {len(seen.wrong)} turned away; {code} in {took:.1f} s"
        )
    for line in [*tally.wrong[:20], *cut[:20]]:
        print(f"wrong: {line}")
    latencies = np.percentile(tally.latencies_ms, [50, 95, 99])
    server_errors = sum(count for status, count in tally.statuses.items() if status >= "500" and status != "503")
    total = sum(tally.statuses.values())
    print(f"statuses: {dict(sorted(tally.statuses.items()))}")
    if options.hostile:
        print(f"hostile: {dict(sorted(tally.hostile.items()))}")
    limit_s = float(LIMITS["timeout-s"])
    slowest_s = max(tally.latencies_ms) / 1000
    print(f"memory after warm-up: {settled[0]:.0f} MB first, {settled[-1]:.0f} MB last, {max(settled):.0f} MB at most")
    figures = [
        ("minutes", seconds / 60, "min", None, True),
        ("answers", total, "requests", None, True),
        ("throughput", total / seconds, "requests/s", None, True),
        ("good_predictions", len(tally.latencies_ms), "requests", None, True),
        ("latency_p50", latencies[0], "ms", None, True),
        ("latency_p95", latencies[1], "ms", None, True),
        ("latency_p99", latencies[2], "ms", None, True),
        ("slowest_good_prediction", slowest_s, "s", limit_s, slowest_s <= limit_s),
        ("good_not_in_time", tally.not_in_time, "requests", 0, not tally.not_in_time),
        ("hostile", tally.hostile.total(), "connections", None, True),
        ("service_cpu", cpu_s / seconds, "cores", None, True),
        ("decoding_elsewhere_240x320", small, "ms", 1, small <= 1),
        ("decoding_elsewhere_2048x2048", large, "ms", None, True),
        ("service_over_direct", service / direct, "ratio", 0.5, service / direct >= 0.5),
        ("wrong_or_missing_answers", len(tally.wrong), "requests", 0, not tally.wrong),
        ("5xx_but_503", server_errors, "requests", 0, server_errors == 0),
        ("busy_503", tally.statuses["503"], "requests", None, True),
        ("busy_429", tally.statuses["429"], "requests", None, True),
        ("memory_growth", growth, "%", 5, abs(growth) <= 5),
        ("memory_spread", spread, "%", None, True),
        ("ends_under_load", options.ends, "services", None, True),
        ("slowest_end", max(ends), "s", limit_s, max(ends) <= limit_s),
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
