"""What strangers send to stop a service, to get past its limits or to learn of its host; it goes on serving."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from PIL import Image

from helpers.serving import (
    FakeSession,
    ServedProcess,
    expect_error,
    fake,
    grey,
    listening,
    many_scans,
    post_whole,
    running,
    until,
)
from messnet.apps.serving.app import Sample, Service
from messnet.apps.serving.decoders import Decoders
from messnet.apps.serving.description import describe
from messnet.apps.serving.options import ServeOptions
from messnet.errors import RecipeError

# Minutes of decoding each, far below the limits on bytes and pixels.
SLOW = many_scans(2048, 20_000)
WITHOUT_BODY = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
UPGRADE = b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
STOPS = ("instance", "last_exit")
linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes are looked up in /proc")


def test_the_image_that_takes_minutes_is_an_image() -> None:
    """Otherwise the tests below would show nothing."""
    with Image.open(io.BytesIO(many_scans(64, 3))) as file:
        np.testing.assert_array_equal(np.asarray(file), 0)
    assert len(SLOW) < 1_000_000


def test_decoding_is_bounded_in_time() -> None:
    _, service = fake(decode_s=0.2)
    with running(service) as client, ThreadPoolExecutor(8) as pool:
        slow = [pool.submit(client.post, "/v1/predict", content=SLOW) for _ in range(4)]
        good = [pool.submit(client.post, "/v1/predict", content=grey(7)) for _ in range(4)]
        for answer in slow:
            assert answer.result().status_code == 422
            expect_error(answer.result(), r"more than 0\.2 s of processor time to decode")
        assert [answer.result().status_code for answer in good] == [200] * 4
        until(lambda: client.get("/ready").status_code == 200)  # once a new decoder has started


@linux  # where all of 127.0.0.0/8 is this machine
def test_slow_images_of_one_address_keep_no_other_waiting(tmp_path: Path) -> None:
    with ServedProcess(tmp_path / "log", timeout_s=3600, decode_s=3600) as served, contextlib.ExitStack() as stack:
        for _ in range(4):
            slow = stack.enter_context(socket.create_connection(("127.0.0.1", served.port), 60, ("127.0.0.2", 0)))
            slow.sendall(WITHOUT_BODY.replace(b"9", str(len(SLOW)).encode()) + SLOW)
        until(lambda: "messnet_requests_in_work 4.0" in served.client.get("/metrics").text)
        for value in (1, 2, 3):
            assert served.client.post("/v1/predict", content=grey(value)).status_code == 200


def test_decoding_ends_with_its_request() -> None:
    """Its place at the gate is free when the work has ended, not when the answer is sent."""
    _, service = fake(timeout_s=1, decode_s=600)
    with running(service) as client, ThreadPoolExecutor(4) as pool:

        def given_up() -> bool:
            for answer in pool.map(lambda _: post_whole(client, "/v1/predict", SLOW), range(4)):
                assert answer.status_code == 503
                expect_error(answer, "no answer within 1 s")
            until(lambda: service.gate.num_in_work == 0)  # far below the 600 s that the decoder would take
            return client.get("/ready").json() == {"status": "overloaded"}

        until(given_up)  # "no_decoder" where both have ended and none has started anew
        until(lambda: client.post("/v1/predict", content=grey(7)).status_code == 200)
        assert client.get("/ready").json() == {"status": "ready"}


@linux
def test_decoded_images_are_bounded_in_pixels_together() -> None:
    """Room for four images of 64 x 64, two of them of one client; each takes its place until it is let go."""
    options = ServeOptions(max_queue=4, max_pixels=64 * 64)
    data = grey(7, side=64)

    async def decode() -> None:
        decoders = Decoders(2, options)
        await decoders.start()

        async def waits(client: str) -> bool:
            try:
                await asyncio.wait_for(decoders.decode(data, client), 0.3)
            except TimeoutError:
                return True
            return False

        try:
            one = [await decoders.decode(data, "a") for _ in range(2)]
            other = [await decoders.decode(data, "b") for _ in range(2)]
            assert await waits("c")
            one.pop()
            assert await waits("b")  # it has its half
            third = await decoders.decode(data, "c")
            part = one.pop()[:1]  # keeps all of the image
            assert await waits("d")
            del part
            assert (await decoders.decode(data, "d") == 7).all()
            assert len(other) + len(third) == 2 + 64
        finally:
            await decoders.stop()

    asyncio.run(decode())


def test_decoders_that_end_are_replaced(tmp_path: Path) -> None:
    with ServedProcess(tmp_path / "log") as served:
        before = served.children()
        assert len(before) == 2
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        statuses = [served.client.post("/v1/predict", content=grey(7)).status_code for _ in range(4)]
        assert statuses.count(200) >= 2
        assert set(statuses) <= {200, 422}
        until(lambda: len(served.children()) == 2)
        assert not set(before) & set(served.children())
        # SIGTERM for every process, as service managers send it, ends no decoder before its service.
        for pid in served.children():
            os.kill(pid, signal.SIGTERM)
        assert served.client.post("/v1/predict", content=grey(7)).status_code == 200
        served.end()


def test_the_network_that_nobody_waits_for_takes_a_place() -> None:
    session, service = fake(timeout_s=0.3, max_queue=1)
    with running(service) as client:
        session.open.clear()
        # On a busy machine the first may be given up before they come to the network.
        until(lambda: client.post("/v1/predict", content=grey(1)).status_code in (408, 503) and session.batches)
        until(lambda: service.gate.num_in_work == 0)
        refused = client.post("/v1/predict", content=grey(2))
        assert refused.status_code == 503
        expect_error(refused, "busy: 1 requests are in work")
        until(lambda: client.get("/ready").json() == {"status": "stalled"})
        session.open.set()
        until(lambda: client.post("/v1/predict", content=grey(3)).status_code == 200)
        assert client.get("/ready").json() == {"status": "ready"}


def test_sigterm_ends_it_whatever_is_in_work(tmp_path: Path) -> None:
    """Images that would be decoded for minutes, bodies that never come, heads that never end."""
    # In so much time all of them arrive, on a busy machine too.
    with ServedProcess(tmp_path / "log", timeout_s=5, decode_s=600) as served, ThreadPoolExecutor(3) as pool:
        slow = [pool.submit(served.client.post, "/v1/predict", content=SLOW) for _ in range(3)]
        sockets = [served.connect() for _ in range(9)]
        for i, kept in enumerate(sockets):
            kept.sendall(
                [b"", b"POST /v1/pre", b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"][i % 3]
            )
        until(lambda: "messnet_requests_in_work 6.0" in served.client.get("/metrics").text)
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(120) == 0  # SLOW alone takes longer
        # 408: on a busy machine a body may not have arrived whole when draining ended arrivals.
        assert {answer.result().status_code for answer in slow} <= {503, 408}
        for kept in sockets:
            kept.close()


def test_sigterm_waits_for_no_body(tmp_path: Path) -> None:
    with ServedProcess(tmp_path / "log", timeout_s=3600) as served, served.connect() as kept:
        kept.sendall(WITHOUT_BODY)
        until(lambda: "messnet_requests_in_work 1.0" in served.client.get("/metrics").text)
        assert "accepted 1, answered 1" in served.end()
        assert b" 408 " in kept.recv(4096)


@pytest.mark.parametrize(
    "sent",
    [b"", b"GE", b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: 1\r\n", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"],
    ids=["nothing", "a part of a line", "a part of a head", "a request, then nothing"],
)
def test_connections_that_ask_nothing_are_closed(sent: bytes) -> None:
    _, service = fake(header_s=0.3)
    with running(service) as client, socket.create_connection((client.base_url.host, client.base_url.port)) as kept:
        kept.settimeout(120)
        with contextlib.suppress(ConnectionError):  # a busy machine may send it too late
            kept.sendall(sent)
        assert until_closed(kept)


def test_bytes_that_trickle_in_do_not_keep_a_connection() -> None:
    _, service = fake(header_s=0.3)
    with running(service) as client, socket.create_connection((client.base_url.host, client.base_url.port)) as kept:
        kept.settimeout(0.05)
        lines = chain([b"GET /health HTTP/1.1\r\n"], repeat(b"X: 1\r\n"))

        def is_closed() -> bool:
            try:
                kept.sendall(next(lines))
                return not kept.recv(1)
            except TimeoutError:
                return False
            except OSError:
                return True

        until(is_closed)


def test_an_answer_that_nobody_reads_is_given_up() -> None:
    large = [Sample(name="large", media_type="image/png", data=bytes(40_000_000))]
    _, service = fake(large, timeout_s=0.1)
    with running(service) as client, socket.socket() as kept:
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        kept.settimeout(120)
        kept.connect((client.base_url.host, client.base_url.port))
        before = figure(client, "process_open_fds")
        kept.sendall(b"GET /samples/0 HTTP/1.1\r\nHost: x\r\n\r\n")
        until(lambda: figure(client, "process_open_fds") < before)
    _, service = fake(large)
    with running(service) as client:  # whoever reads gets it
        assert len(client.get("/samples/0").content) == 40_000_000


def figure(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(name + " ")).split()[1])


def until_closed(kept: socket.socket) -> bytes:
    """What comes until the other side closes, and a mark that it did."""
    try:
        return b"".join(iter(lambda: kept.recv(4096), b"")) + b"closed"
    except ConnectionResetError:
        return b"closed"


def test_many_connections_keep_nobody_out(tmp_path: Path) -> None:
    """64 file handles, three times as many connections that ask nothing: /health answers, the log stays short."""
    with ServedProcess(tmp_path / "log", num_files=64, header_s=3600) as served:
        kept = [served.connect() for _ in range(200)]
        for _ in range(3):
            with httpx.Client(base_url=served.client.base_url, timeout=120, trust_env=False) as client:
                assert client.get("/health").status_code == 200
                assert client.post("/v1/predict", content=grey(7)).status_code == 200
        for connection in kept:
            connection.close()
        served.end()
    log = served.errors.read_text()
    assert "64 file handles" in log
    assert len(log) < 10_000


def test_the_log_is_limited(tmp_path: Path) -> None:
    with ServedProcess(tmp_path / "log") as served:
        for i in range(40):
            with served.connect() as kept:
                kept.sendall(UPGRADE if i % 2 else b"?\r\n\r\n")
                assert kept.recv(100)
            assert served.client.post("/v1/predict", content=grey(254)).status_code == 500
        served.end()
    log = served.errors.read_text()
    assert "ZeroDivisionError" in log
    assert len(log) < 30_000


@pytest.mark.parametrize(("proxy", "status"), [(None, 429), ("127.0.0.1", 200), ("10.0.0.1", 429)])
def test_who_asks_is_not_what_a_client_says(proxy: str | None, status: int) -> None:
    session, service = fake(max_concurrency=1, proxy=proxy)
    with running(service) as client, ThreadPoolExecutor(2) as pool:
        session.open.clear()
        first = pool.submit(client.post, "/v1/predict", content=grey(1))
        until(lambda: service.gate.num_in_work == 1)
        headers = {"X-Forwarded-For": "192.0.2.7"}
        second = pool.submit(client.post, "/v1/predict", content=grey(1), headers=headers)
        until(lambda: second.done() or service.gate.num_in_work == 2)
        session.open.set()
        assert [first.result().status_code, second.result().status_code] == [200, status]


@pytest.mark.parametrize(
    ("one", "other", "status"),
    [
        ("2001:db8::1", "2001:db8::ffff:1:2:3", 429),
        ("2001:db8::1", "2001:db8:0:1::1", 200),
        ("::ffff:192.0.2.7", "192.0.2.7", 429),
        ("::ffff:192.0.2.7", "::ffff:192.0.2.8", 200),
    ],
)
def test_addresses_of_one_network_are_one_client(one: str, other: str, status: int) -> None:
    session, service = fake(max_concurrency=1, proxy="127.0.0.1")
    with running(service) as client, ThreadPoolExecutor(2) as pool:
        session.open.clear()
        asked = []
        for address in (one, other):
            headers = {"X-Forwarded-For": address}
            asked.append(pool.submit(client.post, "/v1/predict", content=grey(1), headers=headers))
            until(lambda: asked[-1].done() or service.gate.num_in_work == len(asked))
        session.open.set()
        assert [answer.result().status_code for answer in asked] == [200, status]


def test_no_redirects_but_head() -> None:
    _, service = fake()
    with running(service) as client:
        for path in ("/v1/info/", "/v1/predict/", "/health/"):
            answer = client.get(path, headers={"Host": "evil.example"})
            assert answer.status_code == 404, path
            assert "location" not in answer.headers
        for path in ("/", "/health", "/ready", "/v1/info", "/metrics", "/openapi.json"):
            head, got = client.head(path), client.get(path)
            assert head.status_code == got.status_code == 200
            assert head.content == b""
            assert head.headers["content-type"] == got.headers["content-type"]


def test_info_of_a_model_without_a_table_of_costs() -> None:
    info = describe(FakeSession())  # type: ignore[arg-type]
    assert [exit["exit_index"] for exit in info["exits"]] == [0, 1, 2, 3]
    assert "missing" in info["workload"]


@pytest.mark.parametrize("text", ["\x1b[31m\x07\x00", "\u202eexe.gpj", "\x85\u2028\x9b", "\ud800", "a" * 5000])
def test_errors_are_fit_for_a_terminal(text: str) -> None:
    _, service = fake()
    name = text.encode(errors="surrogatepass")
    query = "".join(f"%{byte:02x}" for byte in name)
    form = b"multipart/form-data; boundary=" + bytes(byte for byte in name if byte >= 32)
    with running(service) as client:
        for answer in (
            client.post(f"/v1/predict?{query}=1", content=grey(1)),
            client.post(f"/v1/predict?format={query}", content=grey(1)),
            client.post(f"/v1/anytime?threshold={query}", content=grey(1)),
            client.post(
                "/v1/predict",
                content=b"x",
                headers={b"Content-Type": form},
            ),
        ):
            assert answer.status_code in (400, 422)
            if answer.status_code == 422:
                expect_error(answer)
                assert len(answer.json()["error"]) < 600


def preflight(client: httpx.Client, origin: str) -> httpx.Response:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    return client.options("/v1/predict", headers=headers)


def test_other_pages_may_ask_where_that_is_allowed() -> None:
    origin, other = "https://good.example", "https://other.example"
    session, service = fake(cors=(origin,), max_concurrency=1)
    with running(service) as client, ThreadPoolExecutor(1) as pool:
        assert preflight(client, origin).headers["access-control-allow-origin"] == origin
        assert preflight(client, other).status_code == 400
        session.open.clear()
        first = pool.submit(client.post, "/v1/predict", content=grey(1), headers={"Origin": origin})
        until(lambda: service.gate.num_in_work == 1)
        refused = client.post("/v1/predict", content=grey(1), headers={"Origin": origin})
        session.open.set()
        for answer, status in ((first.result(), 200), (refused, 429)):
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, origin)
        assert "access-control-allow-origin" not in client.get("/v1/info", headers={"Origin": other}).headers
    _, service = fake()
    with running(service) as client:
        assert preflight(client, origin).status_code == 405
        assert "access-control-allow-origin" not in client.get("/v1/info", headers={"Origin": origin}).headers


@pytest.mark.parametrize("origin", ["example.org", "https://example.org/", "https://example.org/a", "null", ""])
def test_what_is_no_origin(origin: str) -> None:
    with pytest.raises(RecipeError, match="--cors takes an origin such as"):
        ServeOptions(cors=(origin,))


def test_where_the_instance_stops() -> None:
    class Unsure(FakeSession):
        """Lets an image go at its second exit, for 0.25 of its pixels are confident there."""

        instance = SimpleNamespace(
            name="unsure",
            setting="input_dependent",
            exits=[SimpleNamespace(exit_index=i, image_threshold=t) for i, t in enumerate((0.25, 0.25, 0.1, None))],
        )

    service = Service(Unsure(), ServeOptions(drain_s=0))  # type: ignore[arg-type]
    with listening(service) as (_, client):
        exits = {stop: exits_of(client, stop) for stop in STOPS}
    assert exits == {"instance": [0, 1, "threshold"], "last_exit": [0, 1, 2, 3, "last_exit"]}


def exits_of(client: httpx.Client, stop: str) -> list[object]:
    answer = client.post("/v1/anytime", params={"stop": stop}, content=grey(1))
    assert answer.status_code == 200, answer.text
    records = [json.loads(line) for line in answer.text.splitlines()]
    return [record.get("exit_index", record.get("stopped")) for record in records]


def test_too_few_file_handles_are_said_in_one_line() -> None:
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))\n"
        "from messnet.cli import main; main(['serve', sys.argv[1], '--port', '0', '--runtime', 'onnxruntime'])"
    )
    bundle = Path(__file__).parents[2] / "examples/scenes_mobilenetv2.mess"
    ended = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert re.fullmatch(r"messnet: the service may open 40 files, it needs \d+: .*\n", ended.stderr), ended.stderr


def test_two_services_on_one_port() -> None:
    """Started at once: whichever comes second says so in one line, though the first has no model yet."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    bundle = Path(__file__).parents[2] / "examples/scenes_mobilenetv2.mess"
    command = [sys.executable, "-m", "messnet", "serve", bundle, "--runtime", "onnxruntime", "--port", str(port)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        until(lambda: any(process.poll() is not None for process in both))
        (ended,) = [process for process in both if process.poll() is not None]
        assert ended.returncode == 2
        said = ended.communicate()[1]
        assert re.fullmatch(rf"messnet: cannot listen on 127\.0\.0\.1:{port} .*--port\n", said), said
        assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=120, trust_env=False).status_code == 200
    finally:
        for process in both:
            process.kill()
            process.communicate()
