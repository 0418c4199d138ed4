"""Strangers' files and the open port: malformed and hostile bundles and requests, made from good ones by fixed seeds.

    python benchmarks/bench_fuzz.py [service] [bundle] [--bundle examples/scenes_mobilenetv2.mess] [--cases 560]
        [--json PATH] [--only KIND]

"service": bodies, headers and connections against one `messnet serve`. Every case ends within 10 s in an answer or a
closed connection; refusals are {"error": one line}; no 5xx but 503; a good image is answered after every 20 cases.
"bundle": manifest values, zip structure, graphs and tensors, each opened by `messnet predict` in a process of its own,
forked from one that has imported what it needs. It ends within 10 s of processor time (and a minute, whatever else the
machine does), with exit code 0 or with 2 and one line.
Memory is that of all processes over what a good request or bundle takes.
Ends with one line per figure: name value unit goal ok|short.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.client
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin

LONGEST_S = 10.0
MOST_MB = 1000.0
TIMEOUTS = {"timeout-s": "5", "header-s": "3", "decode-s": "1", "max-queue": "32", "max-connections": "128"}


@dataclass
class Outcome:
    """What came of the cases of one part."""

    cases: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    crashes: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    long_lines: list[str] = field(default_factory=list)
    """Refusals that are not one line."""
    slowest_s: float = 0.0
    idle_mb: float = 0.0
    peak_mb: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)


# Images --------------------------------------------------------------------------------------------------------------


def picture(draw: random.Random, height: int = 96, width: int = 128) -> Image.Image:
    numbers = np.random.default_rng(draw.randrange(2**32))
    blocks = numbers.integers(0, 256, (height // 12 + 1, width // 12 + 1, 3)).repeat(12, 0).repeat(12, 1)
    return Image.fromarray(blocks[:height, :width].astype(np.uint8))


def encoded(image: Image.Image, format: str, **how: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **how)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes, length: int | None = None) -> bytes:
    """A chunk of a PNG, which says it has ``length`` bytes."""
    size = len(data) if length is None else length
    return struct.pack(">I", size) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *, depth: int = 8, colour: int = 2, interlaced: int = 0, extra: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced))
    pixels = chunk(b"IDAT", zlib.compress(bytes(5000)))
    return b"\x89PNG\r\n\x1a\n" + header + extra + pixels + chunk(b"IEND", b"")


def many_scans(side: int, count: int) -> bytes:
    """A progressive JPEG that goes over its coefficients ``count`` times."""
    data = encoded(Image.new("RGB", (side, side)), "JPEG", progressive=True)
    scan = data.rfind(b"\xff\xda")
    tables = data.rfind(b"\xff\xc4", 0, scan)
    start = tables if tables > data.rfind(b"\xff\xda", 0, scan) else scan
    return data[:start] + data[start:-2] * count + data[-2:]


def flipped(data: bytes, draw: random.Random, most: int = 30) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.randint(1, most)):
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def bodies(draw: random.Random) -> Iterator[bytes]:
    """Images that are damaged, or made to cost more than they weigh; without end."""
    animation = [picture(draw, 64, 64) for _ in range(20)]
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "b" * 5_000_000, zip=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "x" * 60_000
    special = [
        encoded(picture(draw), "PNG", pnginfo=text),
        encoded(picture(draw), "JPEG", exif=exif),
        encoded(animation[0], "WEBP", save_all=True, append_images=animation[1:], duration=1),
        encoded(animation[0], "PNG", save_all=True, append_images=animation[1:]),
        png(64, 64, extra=chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(20_000_000)))),
        png(64, 64, extra=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000))) * 4),
        png(64, 64, extra=chunk(b"eXIf", b"MM\0*" + bytes(8) * 1000)),
        png(64, 64, extra=chunk(b"tEXt", b"", 2**31 - 1)),
        png(64, 64, extra=chunk(b"acTL", struct.pack(">II", 2**31, 2**31))),
        png(2048, 2048, interlaced=1),
        png(2048, 2048, depth=16, colour=6, interlaced=1),
        many_scans(2048, 1000),
        many_scans(2048, 20_000),
        many_scans(512, 300_000),
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, 2048, -2048, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(99),
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, -1, -1, 1, 8, 1, 0, 0, 0, 2**31, 0) + bytes(99),
        b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, 2000, 2000, 1, 8, 1, 0, 0, 0, 0, 0)
        + b"\xff\1" * 999,
        b"RIFF" + struct.pack("<I", 2**32 - 1) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\x12" + bytes(9),
    ]
    yield from special
    good = [
        encoded(picture(draw), "PNG"),
        encoded(picture(draw), "JPEG"),
        encoded(picture(draw), "JPEG", progressive=True),
        encoded(picture(draw), "WEBP"),
        encoded(picture(draw), "WEBP", lossless=True),
        encoded(picture(draw), "BMP"),
        *special[:5],
    ]
    while True:
        data = draw.choice(good)
        yield draw.choice(
            [
                lambda data=data: flipped(data, draw),
                lambda data=data: data[: draw.randrange(len(data))],
                lambda data=data: data[:40] + draw.randbytes(len(data) - 40),
                lambda data=data: draw.randbytes(12) + data[12:],
                lambda data=data: data + draw.randbytes(1000),
                lambda: draw.randbytes(draw.randrange(5000)),
                lambda: png(draw.randrange(2**31), draw.randrange(2**31)),
                lambda: png(draw.randrange(1, 3000), draw.randrange(1, 3000), depth=draw.choice([1, 2, 4, 8, 16, 3])),
                lambda: many_scans(draw.choice([256, 1024, 2048]), draw.randrange(10, 5000)),
            ]
        )()


# The service ---------------------------------------------------------------------------------------------------------


def request(path: str, body: bytes, *headers: bytes, method: str = "POST", length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    head = [f"{method} {path} HTTP/1.1".encode(), b"Host: x", b"Content-Length: %d" % size, *headers]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def form_bodies(draw: random.Random, image: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(boundary, body) of forms as they should not be; without end."""
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
    field = b'--b\r\nContent-Disposition: form-data; name="%d"\r\n\r\nx\r\n'
    yield b"b", b"".join(field % i for i in range(5000)) + b"--b--\r\n"
    yield b"b", (head + image + b"\r\n") * 50 + b"--b--\r\n"
    yield b"b", head.replace(b"a.png", b"../" * 9000) + image + b"\r\n--b--\r\n"
    yield b"b", b"--b\r\n" + b"X-A: 1\r\n" * 20_000 + b"\r\n\r\n--b--\r\n"
    yield b"b", b"--b\r\nContent-Disposition: " + b"form-data; " * 9000 + b"\r\n\r\n--b--\r\n"
    yield b"b", b"\r\n" * 400_000 + head + image + b"\r\n--b--\r\n"
    yield b"b", head + image + b"\r\n--b--\r\n" + b"\r\n--b" * 100_000
    yield b"a" * 60_000, b"--" + b"a" * 60_000 + b"\r\n\r\n"
    good = head + image + b"\r\n--b--\r\n"
    while True:
        yield draw.choice(
            [
                lambda: (b"b", flipped(good, draw, 5)),
                lambda: (b"b", good[: draw.randrange(len(good))]),
                lambda: (draw.randbytes(3).hex().encode(), good),
                lambda: (b"b", good.replace(b"\r\n", b"\n")),
                lambda: (b"", good),
                lambda: (b"b", head + draw.randbytes(300) + b"\r\n--b--\r\n"),
            ]
        )()


def odd_heads(draw: random.Random, image: bytes) -> Iterator[bytes]:
    """Requests whose heads are strange; without end."""
    post = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\n"
    yield post + b"Content-Length: -1\r\n\r\n" + image
    yield post + b"Content-Length: 99999999999999999999\r\n\r\n" + image
    yield post + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd"
    yield post + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    yield post + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nabc"
    yield post + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * 50_000 + b"0\r\n\r\n"
    yield post + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"
    yield post + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n"
    yield post + b"Content-Encoding: gzip\r\nContent-Length: 5\r\n\r\n\x1f\x8b000"
    yield post + b"X: " + b"a" * 300_000 + b"\r\n\r\n"
    yield post + b"".join(b"X%d: 1\r\n" % i for i in range(20_000)) + b"\r\n"
    yield b"GET /" + b"a" * 300_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"
    yield b"GET http://evil.example/v1/info HTTP/1.1\r\nHost: evil.example\r\n\r\n"
    yield b"GET //evil.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n"
    yield b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n"
    yield b"GET /samples/99999999999999999999999999 HTTP/1.1\r\nHost: x\r\n\r\n"
    yield b"GET / HTTP/1.1\r\n\r\n"
    yield b"GET / HTTP/9.9\r\nHost: x\r\n\r\n"
    yield b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    yield b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
    yield b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nConnection: Upgrade\r\nHTTP2-Settings: a\r\n\r\n"
    yield b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + draw.randbytes(500)
    names = [b"format", b"threshold", b"deadline_ms", b"stop", b"%ff", b"\xc3\xa9", b"a" * 2000, b"%00", b"&&==", b"[]"]
    values = [b"", b"nan", b"-1", b"1e999", b"%e2%80%ae", b"%1b[31m", b"mask", b"0x1", b"json&format=svg", b"9" * 9999]
    good = request("/v1/predict", image)
    while True:
        name, value = draw.choice(names), draw.choice(values)
        route = draw.choice([b"/v1/predict", b"/v1/anytime", b"/v1/info", b"/ready", b"/", b"/openapi.json", b"/x"])
        verb = draw.choice([b"POST", b"GET", b"HEAD", b"PUT", b"OPTIONS", b"TRACE", b"CONNECT", b"BREW", b"post"])
        line = verb + b" " + route + b"?" + name + b"=" + value + b" HTTP/1.1\r\nHost: x\r\n"
        yield draw.choice(
            [
                line + b"Content-Length: %d\r\n\r\n" % len(image) + image,
                line + b"X-Forwarded-For: 127.0.0.1, " + draw.randbytes(4).hex().encode() + b"\r\n\r\n",
                flipped(good[:120], draw, 4) + good[120:],
                draw.randbytes(200) + b"\r\n\r\n",
            ]
        )


class Raw(NamedTuple):
    """A connection: what is sent, in parts, with seconds between them; and whether it goes away without reading."""

    kind: str
    parts: list[bytes]
    wait_s: float = 0.0
    leaves: bool = False
    resets: bool = False


def connections(draw: random.Random, image: bytes) -> Iterator[Raw]:
    """Without end."""
    whole = request("/v1/predict", image)
    health = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    page = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    while True:
        cut = draw.randrange(1, len(whole))
        yield Raw("nothing sent", [])
        yield Raw("a part of a head", [whole[: draw.randrange(1, 50)]])
        yield Raw("a part of a body", [whole[:cut]])
        yield Raw("a head byte by byte", [bytes([byte]) for byte in health], 0.2)
        yield Raw(
            "a body in ten parts",
            [whole[i : i + len(whole) // 10 + 1] for i in range(0, len(whole), len(whole) // 10 + 1)],
            0.1,
        )
        yield Raw("pipelined", [health * draw.randrange(2, 200)])
        yield Raw("pipelined work", [whole * draw.randrange(2, 8)])
        yield Raw("leaves in the middle", [whole[:cut]], leaves=True)
        yield Raw("leaves after asking", [whole], leaves=True)
        yield Raw("resets", [whole[:cut]], leaves=True, resets=True)
        yield Raw("reads nothing", [page * 400], 0.5, leaves=True)
        yield Raw("asks, then waits", [health, b""], 1.0)


def service_cases(count: int, seed: int) -> Iterator[Raw]:
    """``count`` of them: half bodies and forms, a quarter heads, a quarter connections."""
    draw = random.Random(seed)
    image = encoded(picture(draw), "PNG")
    raw, forms, heads, lines = bodies(draw), form_bodies(draw, image), odd_heads(draw, image), connections(draw, image)
    for i in range(count):
        match i % 8:
            case 0 | 2 | 4:
                path = draw.choice(["/v1/predict", "/v1/anytime", "/v1/predict?format=json"])
                yield Raw("body", [request(path, next(raw))])
            case 6:
                boundary, body = next(forms)
                kind = b"Content-Type: multipart/form-data; boundary=" + boundary
                yield Raw("form", [request("/v1/predict", body, kind)])
            case 1 | 5:
                yield Raw("head", [next(heads)])
            case _:
                yield next(lines)


class Served:
    """`messnet serve` in a process of its own."""

    def __init__(self, target: Path, log: Path) -> None:
        command = [sys.executable, "-m", "messnet", "serve", str(target), "--port", "0", "--runtime", "onnxruntime"]
        command += [word for name, value in TIMEOUTS.items() for word in (f"--{name}", value)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log.open("wb"), text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://[\d.]+:(\d+)/", line)
        if found is None:
            raise SystemExit(f"the service did not start: {line!r} {log.read_text()[-2000:]}")
        self.port = int(found[1])
        while self.good_status(b"", "GET", "/ready") != 200:
            time.sleep(0.1)

    def good_status(self, body: bytes, method: str = "POST", path: str = "/v1/predict") -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body or None)
            return connection.getresponse().status
        except OSError:
            return 0
        finally:
            connection.close()

    def memory_mb(self) -> float:
        """Resident, of the process and its children."""
        pids = [str(self.process.pid)]
        for task in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                pids += task.read_text().split()
        total = 0.0
        for pid in pids:
            with contextlib.suppress(OSError, TypeError):
                total += int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1000  # type: ignore[index]
        return total


def send(port: int, case: Raw) -> bytes:
    """All that comes back until the service closes, or has answered and waits. Raises TimeoutError after 2 x 10 s."""
    with socket.create_connection(("127.0.0.1", port), timeout=2 * LONGEST_S) as connection:
        if case.resets:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        try:
            for part in case.parts:
                connection.sendall(part)
                time.sleep(case.wait_s)
            if case.leaves:
                return b""
            return b"".join(iter(lambda: connection.recv(65536), b""))
        except (ConnectionResetError, BrokenPipeError):
            return b""  # closed before all was sent: its right


def answers_in(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Status and body of each answer."""
    for piece in re.split(rb"(?=HTTP/1\.1 \d{3} )", data):
        if piece:
            head, _, body = piece.partition(b"\r\n\r\n")
            yield int(head[9:12]), body


def judge(case: Raw, data: bytes, outcome: Outcome) -> None:
    what = f"{case.kind}: {b''.join(case.parts)[:80]!r}"
    if data and not data.startswith(b"HTTP/1.1 "):
        outcome.long_lines.append(f"{what}: {data[:100]!r}")
        return
    if not data:
        outcome.ends["closed"] += 1
    for status, body in answers_in(data):
        outcome.ends[str(status)] += 1
        if status >= 500 and status != 503:
            outcome.crashes.append(f"{status} to {what}: {body[:200]!r}")
        if status >= 400 and body.startswith(b"{") and b'"status"' not in body:
            error = json.loads(body)["error"]
            if not error.isprintable() or len(error) > 600:
                outcome.long_lines.append(f"{what}: {error[:200]!r}")


def fuzz_service(options: argparse.Namespace, scratch: Path) -> Outcome:
    outcome, log = Outcome(), scratch / "service.log"
    served, good = Served(options.bundle, log), encoded(picture(random.Random(1)), "PNG")
    try:
        for _ in range(20):
            served.good_status(good)
        outcome.idle_mb = served.memory_mb()
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(0.05):
                outcome.peak_mb = max(outcome.peak_mb, served.memory_mb())

        def run(case: Raw) -> None:
            start = time.perf_counter()
            try:
                data = send(served.port, case)
            except (TimeoutError, OSError) as error:
                data = b""
                with outcome.lock:
                    outcome.hangs.append(f"{case.kind}: {error!r} {b''.join(case.parts)[:80]!r}")
            took = time.perf_counter() - start - case.wait_s * len(case.parts)
            with outcome.lock:
                outcome.cases[case.kind] += 1
                outcome.slowest_s = max(outcome.slowest_s, took)
                if took > LONGEST_S:
                    outcome.hangs.append(f"{case.kind}: {took:.1f} s {b''.join(case.parts)[:80]!r}")
                judge(case, data, outcome)

        watcher = threading.Thread(target=watch)
        watcher.start()
        cases = list(service_cases(options.cases, seed=7))
        with ThreadPoolExecutor(8) as pool:
            for start in range(0, len(cases), 20):
                list(pool.map(run, cases[start : start + 20]))
                status = served.good_status(good)
                if status != 200:
                    outcome.crashes.append(f"a good image after case {start + 20} was answered {status}")
                if served.process.poll() is not None:
                    outcome.crashes.append(f"the service ended with {served.process.returncode}")
                    break
                print(f"service: {start + 20} cases, {served.memory_mb():.0f} MB", flush=True)
        stop.set()
        watcher.join()
        start_end = time.perf_counter()
        served.process.send_signal(signal.SIGTERM)
        served.process.wait(60)
        print(f"service: SIGTERM ended it in {time.perf_counter() - start_end:.1f} s, code {served.process.returncode}")
        text = log.read_text(errors="replace")
        print(f"service: {len(text)} bytes of log")
        if "Traceback" in text:
            outcome.crashes.append(f"a traceback in the log: {text[-1500:]}")
    finally:
        served.process.kill()
        served.process.wait()
    return outcome


# Bundles -------------------------------------------------------------------------------------------------------------

EVIL: list[object] = [
    None, True, 0, -1, 2**31, 2**63, 1e308, float("nan"), float("inf"), "", "a", "../../etc/passwd", "/etc/passwd",
    "x" * 200_000, "\x1b[31m\x07", "\ud800", "os:system", "subprocess:check_output", [], {}, [[]], {"a": 1},
    [None] * 300,
]  # fmt: skip


def leaves_of(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where a record of JSON has values, and the records and lists that hold them."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        yield from leaves_of(one, (*path, key))


def resealed(files: dict[str, bytes], manifest: dict[str, object], *, sizes: bool = True) -> dict[str, bytes]:
    """The bundle's files with a manifest that holds their sizes and hashes, and its own."""
    if sizes:
        manifest["files"] = {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in files.items()
            if name != "manifest.json"
        }
    manifest.pop("sha256", None)
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return {**files, "manifest.json": json.dumps(manifest, indent=1).encode()}


class BundleCase(NamedTuple):
    kind: str
    what: str
    write: Callable[[Path], None]
    """Writes it at a path."""
    runtime: str


def as_folder(files: dict[str, bytes]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)

    return write


def manifest_cases(files: dict[str, bytes], draw: random.Random) -> Iterator[BundleCase]:
    text = files["manifest.json"].decode()
    places = [path for path in leaves_of(json.loads(text)) if path[0] not in ("provenance", "sha256")]
    nested = '{"a":' * 50_000 + "1" + "}" * 50_000
    for raw in (nested, "[" * 200_000, "", "null", "[]", text[: len(text) // 2], text * 2, "\ufeff" + text, "\0" * 100):
        yield BundleCase("manifest", raw[:30], as_folder({**files, "manifest.json": raw.encode()}), "onnxruntime")
    while True:
        manifest = json.loads(text)
        path = draw.choice(places)
        holder = manifest
        for key in path[:-1]:
            holder = holder[key]
        evil = draw.choice(EVIL)
        if draw.random() < 0.15:
            del holder[path[-1]]
        else:
            holder[path[-1]] = evil
        what = f"{'.'.join(map(str, path))} = {str(evil)[:30]!r}"
        changed = resealed(files, manifest, sizes=False)
        yield BundleCase("manifest", what, as_folder(changed), "torch" if draw.random() < 0.2 else "onnxruntime")


def zip_of(files: dict[str, bytes], *, method: int = zipfile.ZIP_STORED, more: dict[str, bytes] | None = None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in [*files.items(), *(more or {}).items()]:
            archive.writestr(name, data)
    return buffer.getvalue()


def zip_cases(files: dict[str, bytes], draw: random.Random) -> Iterator[BundleCase]:
    def case(what: str, data: bytes) -> BundleCase:
        return BundleCase("zip", what, lambda path: path.with_suffix(".zip").write_bytes(data) and None, "onnxruntime")  # type: ignore[func-returns-value]

    manifest = json.loads(files["manifest.json"])
    good = zip_of(files)
    bomb = {"onnx/stage0.onnx": bytes(500_000_000)}
    yield case("a bomb", zip_of({**files, **bomb}, method=zipfile.ZIP_DEFLATED))
    claims = json.loads(files["manifest.json"])
    claims["files"]["onnx/stage0.onnx"] = {
        "bytes": 500_000_000,
        "sha256": hashlib.sha256(bytes(500_000_000)).hexdigest(),
    }
    yield case(
        "a bomb that is listed", zip_of(resealed({**files, **bomb}, claims, sizes=False), method=zipfile.ZIP_DEFLATED)
    )
    del bomb
    many = {f"f{i}": b"" for i in range(20_000)}
    yield case("many files", zip_of(files, more=many))
    yield case("many files that are listed", zip_of(resealed({**files, **many}, dict(manifest))))
    for name in ("../a", "/a", "a/../../b", "a\\b", "C:a", "a\0b", ".", "manifest.json/x", "x" * 60_000):
        yield case(f"a name: {name[:20]!r}", zip_of(files, more={name: b"x"}))
        yield case(f"a listed name: {name[:20]!r}", zip_of(resealed({**files, name: b"x"}, dict(manifest))))
    yield case("another method", zip_of(files, method=zipfile.ZIP_BZIP2))
    yield case("another method", zip_of(files, method=zipfile.ZIP_LZMA))
    yield case("a comment", good[:-2] + struct.pack("<H", 9) + b"comment!!")
    yield case("twice", good + good)
    yield case("in front of it", b"MZ" + bytes(1000) + good)
    directory = good.rfind(b"PK\x01\x02")
    while True:
        yield draw.choice(
            [
                lambda: case("cut", good[: draw.randrange(len(good))]),
                lambda: case("bits of the directory", good[:directory] + flipped(good[directory:], draw, 8)),
                lambda: case("bits at the end", good[:-60] + flipped(good[-60:], draw, 4)),
                lambda: case("bits at the start", flipped(good[:200], draw, 8) + good[200:]),
                lambda: case("bits anywhere", flipped(good, draw, 200)),
            ]
        )()


def graph_cases(files: dict[str, bytes], draw: random.Random) -> Iterator[BundleCase]:
    import onnx

    def case(what: str, name: str, data: bytes) -> BundleCase:
        changed = resealed({**files, name: data}, json.loads(files["manifest.json"]))
        return BundleCase("graph", what, as_folder(changed), "onnxruntime")

    names = [name for name in files if name.endswith(".onnx")]

    def changed(name: str, change: Callable[[onnx.ModelProto], object]) -> bytes:
        model = onnx.load_from_string(files[name])
        change(model)
        return bytes(model.SerializeToString())

    def external(model: onnx.ModelProto, location: str) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", location

    def enormous(model: onnx.ModelProto) -> None:
        shape = onnx.helper.make_tensor("big", onnx.TensorProto.INT64, [2], [200_000, 200_000])
        model.graph.initializer.append(shape)
        model.graph.node.insert(0, onnx.helper.make_node("ConstantOfShape", ["big"], ["big_out"]))
        model.graph.node.append(onnx.helper.make_node("ReduceSum", ["big_out"], ["sum_out"], keepdims=0))
        model.graph.output.append(onnx.helper.make_tensor_value_info("sum_out", onnx.TensorProto.FLOAT, []))

    def endless(model: onnx.ModelProto) -> None:
        h = onnx.helper
        body = h.make_graph(
            [h.make_node("Identity", ["c"], ["c_out"]), h.make_node("Add", ["v", "v"], ["v_out"])],
            "body",
            [
                h.make_tensor_value_info("i", onnx.TensorProto.INT64, []),
                h.make_tensor_value_info("c", onnx.TensorProto.BOOL, []),
                h.make_tensor_value_info("v", onnx.TensorProto.FLOAT, None),
            ],
            [
                h.make_tensor_value_info("c_out", onnx.TensorProto.BOOL, []),
                h.make_tensor_value_info("v_out", onnx.TensorProto.FLOAT, None),
            ],
        )
        model.graph.initializer.append(h.make_tensor("true", onnx.TensorProto.BOOL, [], [True]))
        model.graph.initializer.append(h.make_tensor("one", onnx.TensorProto.FLOAT, [1], [1.0]))
        model.graph.node.insert(0, h.make_node("Loop", ["", "true", "one"], ["looped"], body=body))
        model.graph.output.append(h.make_tensor_value_info("looped", onnx.TensorProto.FLOAT, None))

    def not_a_number(model: onnx.ModelProto) -> None:
        tensor = next(
            one for one in model.graph.initializer if one.data_type == onnx.TensorProto.FLOAT and one.raw_data
        )
        tensor.raw_data = struct.pack("<f", float("nan")) * (len(tensor.raw_data) // 4)

    changes: list[tuple[str, Callable[[onnx.ModelProto], object]]] = [
        ("external data", lambda m: external(m, "/etc/passwd")),
        ("external data above", lambda m: external(m, "../../../etc/passwd")),
        ("external data in memory", lambda m: external(m, "*/_ORT_MEM_ADDR_/*")),
        ("external data that is missing", lambda m: external(m, "weights.bin")),
        ("an enormous constant", enormous),
        ("an endless loop", endless),
        ("NaN", not_a_number),
        ("no outputs", lambda m: m.graph.ClearField("output")),
        ("no inputs", lambda m: m.graph.ClearField("input")),
        ("no nodes", lambda m: m.graph.ClearField("node")),
        ("another input", lambda m: setattr(m.graph.input[0], "name", "elsewhere")),
        ("another output", lambda m: setattr(m.graph.output[0], "name", "elsewhere")),
        ("an output too many", lambda m: m.graph.output.append(m.graph.input[0])),
        ("another type", lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", onnx.TensorProto.STRING)),
        ("another domain", lambda m: setattr(m.graph.node[0], "domain", "evil.example")),
        ("another operator", lambda m: setattr(m.graph.node[0], "op_type", "PyOp")),
        ("opset 0", lambda m: setattr(m.opset_import[0], "version", 0)),
        ("opset 99999", lambda m: setattr(m.opset_import[0], "version", 99999)),
        ("ir version", lambda m: setattr(m, "ir_version", 2**31)),
        ("a cycle", lambda m: m.graph.node[0].input.append(m.graph.node[-1].output[0])),
        ("a name twice", lambda m: m.graph.node[-1].output.__setitem__(0, m.graph.node[0].output[0])),
    ]
    for what, change in changes:
        for name in names:
            with contextlib.suppress(StopIteration, IndexError):
                yield case(f"{name}: {what}", name, changed(name, change))
    for name in names:
        for other in names:
            yield case(f"{name} is {other}", name, files[other])
        yield case(f"{name} is empty", name, b"")
        yield case(f"{name} is text", name, b"graph")
    while True:
        name = draw.choice(names)
        data = files[name]
        if draw.random() < 0.3:
            yield case(f"{name}: cut", name, data[: draw.randrange(len(data))])
        else:
            place = draw.choice([300, 3000, len(data)])
            yield case(f"{name}: bits", name, flipped(data[:place], draw, 12) + data[place:])


def tensor_cases(files: dict[str, bytes], draw: random.Random) -> Iterator[BundleCase]:
    name = "weights.safetensors"
    data = files[name]
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    tensors = [key for key in header if key != "__metadata__"]

    def case(what: str, new: bytes) -> BundleCase:
        return BundleCase(
            "tensors", what, as_folder(resealed({**files, name: new}, json.loads(files["manifest.json"]))), "torch"
        )

    def joined(header: object, body: bytes = body) -> bytes:
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + body

    for number in (0, 1, 2**31, 2**63, 2**64 - 1):
        yield case(f"a header of {number} bytes", struct.pack("<Q", number) + data[8:])
    yield case("nested", joined({"a": [[[[[]]]]] * 1000}))
    yield case("nested deeper", struct.pack("<Q", 200_000) + b'{"a":' * 40_000)
    yield case(
        "many", joined({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(200_000)})
    )
    for number in (float("nan"), float("inf"), -float("inf")):
        yield case(f"all {number}", data[: 8 + length] + struct.pack("<f", number) * (len(body) // 4))
    while True:
        changed = json.loads(json.dumps(header))
        key = draw.choice(tensors)
        entry = changed[key]
        start, end = entry["data_offsets"]
        what = draw.choice(["shape", "dtype", "offsets", "gone", "renamed", "NaN", "bits", "cut", "evil"])
        new_body = body
        match what:
            case "shape":
                entry["shape"] = draw.choice([[2**62], [-1], [0], [2**31, 2**31], [], [1] * 100, entry["shape"][::-1]])
            case "dtype":
                entry["dtype"] = draw.choice(["F64", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "F4", "C64", "", 3])
            case "offsets":
                entry["data_offsets"] = draw.choice([[0, 2**62], [start, end + 4], [end, start], [-4, end], [0, 0], []])
            case "gone":
                del changed[key]
            case "renamed":
                changed[draw.choice(["", "x", "\0", "a" * 10_000])] = changed.pop(key)
            case "NaN":
                if (end - start) % 4 == 0:
                    new_body = body[:start] + struct.pack("<f", float("nan")) * ((end - start) // 4) + body[end:]
            case "bits":
                yield case("bits", flipped(data[: 8 + length], draw, 6) + body)
                continue
            case "cut":
                new_body = body[: draw.randrange(len(body))]
            case _:
                changed[key] = draw.choice(EVIL)
        yield case(f"{key}: {what}", joined(changed, new_body))


def predict_forked(case: BundleCase, image: Path, folder: Path) -> tuple[int | None, str, float, float]:
    """Exit code (None: it had to be ended), what it said, seconds of processor time, MB at most: of `messnet predict`
    in a fork."""
    target = folder / "case"
    case.write(target)
    target = target if target.exists() else target.with_suffix(".zip")
    said = folder / "said"
    start = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        handle = os.open(said, os.O_WRONLY | os.O_CREAT)
        os.dup2(handle, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (int(LONGEST_S), int(LONGEST_S) + 1))  # then SIGXCPU
        code = 1
        try:
            from messnet.cli import main

            main(["predict", str(target), str(image), "--out", str(folder / "out"), "--runtime", case.runtime])
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    hung = False
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        if time.perf_counter() - start > 6 * LONGEST_S and not hung:
            hung = True
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    took = usage.ru_utime + usage.ru_stime
    hung |= os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU
    text = said.read_text(errors="replace") if said.exists() else ""
    return None if hung else os.waitstatus_to_exitcode(status), text, took, usage.ru_maxrss / 1000


def fuzz_bundles(options: argparse.Namespace, scratch: Path) -> Outcome:
    import onnxruntime  # noqa: F401  so that each fork has it
    import torch

    from messnet.cli import main as command

    torch.set_num_threads(1)  # a pool of threads does not outlive a fork
    outcome = Outcome()
    files = {
        str(file.relative_to(options.bundle)): file.read_bytes() for file in options.bundle.rglob("*") if file.is_file()
    }
    image = scratch / "image.png"
    image.write_bytes(encoded(picture(random.Random(1)), "PNG"))
    draw = random.Random(11)
    kinds = {"manifest": manifest_cases, "zip": zip_cases, "graph": graph_cases, "tensors": tensor_cases}
    cases = {kind: make(files, draw) for kind, make in kinds.items() if options.only in (None, kind)}

    # Loads, and compiles for this processor, what each fork would otherwise load anew.
    command(["predict", str(options.bundle), str(image), "--out", str(scratch / "out"), "--threads", "1"])
    for runtime in ("onnxruntime", "torch"):
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            good = BundleCase("good", "good", as_folder(files), runtime)
            code, said, took, peak = predict_forked(good, image, Path(folder))
            print(
                f"bundle: a good one in {runtime}: exit code {code}, {took:.1f} s, {peak:.0f} MB {said.strip()[-300:]}"
            )
            outcome.idle_mb = max(outcome.idle_mb, peak)
    turns = [kind for kind in ("manifest", "zip", "graph", "manifest", "zip", "graph", "tensors") if kind in cases]
    for i in range(options.cases):
        case = next(cases[turns[i % len(turns)]])
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            code, said, took, peak = predict_forked(case, image, Path(folder))
        said = "\n".join(line for line in said.splitlines() if "predict:" not in line and line.strip())  # the bar
        outcome.cases[case.kind] += 1
        outcome.ends[str(code)] += 1
        outcome.slowest_s = max(outcome.slowest_s, took)
        outcome.peak_mb = max(outcome.peak_mb, peak)
        what = f"{case.kind}: {case.what} ({case.runtime})"
        if peak > outcome.idle_mb + MOST_MB:
            print(f"bundle: {what}: {peak:.0f} MB")
        if code is None:
            outcome.hangs.append(what)
        elif code not in (0, 2):
            outcome.crashes.append(f"{what}: exit code {code}: {said[-300:]}")
        elif code == 2 and (said.count("\n") or not said.startswith("messnet: ") or not said.isprintable()):
            outcome.long_lines.append(f"{what}: {said[:300]!r}")
        if code is None or code not in (0, 2):
            print(f"bundle: {what}: exit code {code} {said[-300:]}", flush=True)
        if (i + 1) % 50 == 0:
            print(f"bundle: {i + 1} cases, {len(outcome.crashes)} crashes, {len(outcome.hangs)} hangs", flush=True)
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["service", "bundle"], choices=["service", "bundle"])
    parser.add_argument("--bundle", type=Path, default=Path(__file__).parents[1] / "examples/scenes_mobilenetv2.mess")
    parser.add_argument("--cases", type=int, default=560, help="of each part")
    parser.add_argument("--only", choices=["manifest", "zip", "graph", "tensors"], help="of bundles only this kind")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    options.bundle = options.bundle.resolve()
    scratch = Path(tempfile.mkdtemp(prefix="fuzz"))
    figures: list[tuple[str, float, str, float | None, bool]] = []
    try:
        for part in options.parts:
            outcome = {"service": fuzz_service, "bundle": fuzz_bundles}[part](options, scratch)
            over_mb = outcome.peak_mb - outcome.idle_mb
            print(f"{part}: cases {dict(outcome.cases)}, ends {dict(sorted(outcome.ends.items()))}")
            for name, lines in (("crash", outcome.crashes), ("hang", outcome.hangs), ("line", outcome.long_lines)):
                for line in lines[:40]:
                    print(f"{part} {name}: {line}")
            figures += [
                (f"{part}_cases", outcome.cases.total(), "cases", None, True),
                (f"{part}_crashes", len(outcome.crashes), "cases", 0, not outcome.crashes),
                (f"{part}_hangs", len(outcome.hangs), "cases", 0, not outcome.hangs),
                (f"{part}_refusals_not_one_line", len(outcome.long_lines), "cases", 0, not outcome.long_lines),
                (f"{part}_slowest", outcome.slowest_s, "s", LONGEST_S, outcome.slowest_s <= LONGEST_S),
                (f"{part}_memory_over_idle", over_mb, "MB", MOST_MB, over_mb <= MOST_MB),
            ]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for name, value, unit, goal, reached in figures:
        print(f"{name} {value:.6g} {unit} {'-' if goal is None else f'{goal:g}'} {'ok' if reached else 'short'}")
    if options.json:
        options.json.write_text(
            json.dumps([dict(zip(("name", "value", "unit", "goal", "ok"), one, strict=True)) for one in figures]) + "\n"
        )


if __name__ == "__main__":
    main()
