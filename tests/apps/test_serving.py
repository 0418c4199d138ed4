"""The service: what it answers, what it refuses, that it neither loses a request nor falls over one."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import struct
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

import messnet
from helpers.images import smooth_image
from helpers.serving import (
    REFINING,
    encoded,
    expect_error,
    fake,
    grey,
    listening,
    post_whole,
    result,
    running,
    until,
)
from messnet.apps.serving import server
from messnet.apps.serving.app import FORMAT_NAMES, STOP_NAMES, Service
from messnet.apps.serving.description import describe
from messnet.apps.serving.options import ServeOptions
from messnet.apps.serving.server import open_service
from messnet.cli import main
from messnet.deployment.export import export
from messnet.errors import DataError, MessError, RecipeError
from messnet.images.drawing import overlay
from messnet.records.costs import CostTable, PartCost

IMAGE = smooth_image(64, 80, 3)
PNG, JPEG = encoded(IMAGE), encoded(IMAGE, "JPEG")


@pytest.fixture(scope="module")
def bundle(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tiny_run, tmp_path_factory.mktemp("bundles") / "good.mess", instance="max-miou").path


@pytest.fixture(scope="module")
def session(tiny_run: Path) -> messnet.Session:
    return messnet.load(tiny_run, instance=REFINING)


@pytest.fixture(scope="module")
def service(session: messnet.Session) -> Service:
    options = ServeOptions(max_body_mb=0.2, max_pixels=128 * 128, drain_s=0)
    return Service(session, options, info=describe(session))


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[httpx.Client]:
    with running(service) as client:
        yield client


def labels_of(png: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(png)) as file:
        assert file.mode == "P"
        return np.array(file)


@pytest.mark.parametrize("form", [False, True])
def test_a_mask(client: httpx.Client, session: messnet.Session, form: bool) -> None:
    expected = session.predict([IMAGE])[0]
    response = client.post("/v1/predict", **({"files": {"file": ("a.png", PNG)}} if form else {"content": PNG}))
    assert (response.status_code, response.headers["content-type"]) == (200, "image/png")
    np.testing.assert_array_equal(labels_of(response.content), expected.labels)
    coloured = cv2.cvtColor(
        cv2.imdecode(np.frombuffer(response.content, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB
    )
    assert session.palette is not None
    np.testing.assert_array_equal(coloured, session.palette[expected.labels])
    assert int(response.headers["x-messnet-exit"]) == expected.exit_index == 3
    assert float(response.headers["x-messnet-confidence"]) == pytest.approx(expected.image_confidence, abs=1e-6)
    assert float(response.headers["x-messnet-latency-ms"]) > 0


def test_other_answers(client: httpx.Client, session: messnet.Session) -> None:
    expected = session.predict([IMAGE])[0].labels
    assert session.palette is not None
    response = client.post("/v1/predict", params={"format": "overlay"}, content=PNG)
    shown = np.array(Image.open(io.BytesIO(response.content)))
    np.testing.assert_array_equal(shown, overlay(IMAGE, expected, session.palette))
    record = client.post("/v1/predict", params={"format": "json"}, content=PNG).json()
    np.testing.assert_array_equal(labels_of(base64.b64decode(record["mask"])), expected)
    assert (record["width"], record["height"], record["exit_index"]) == (80, 64, 3)
    assert record["class_shares"] == [
        pytest.approx((expected == k).mean(), abs=1e-6) for k in range(len(session.palette))
    ]


@pytest.mark.parametrize("how", [("JPEG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("PNG", {})])
def test_formats(client: httpx.Client, session: messnet.Session, how: tuple[str, dict[str, Any]]) -> None:
    data = encoded(IMAGE, how[0], **how[1])
    bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    expected = session.predict([np.ascontiguousarray(bgr[..., ::-1])])[0].labels
    got = labels_of(client.post("/v1/predict", content=data).content)
    assert (got != expected).mean() < 0.02  # decoders of JPEG round differently


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (90, 1), (3, 2), (33, 31)])
def test_any_size(client: httpx.Client, size: tuple[int, int]) -> None:
    response = client.post("/v1/predict", content=encoded(smooth_image(*size)))
    assert response.status_code == 200, response.text
    assert labels_of(response.content).shape == size


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_an_image_is_taken_upright(
    client: httpx.Client, session: messnet.Session, orientation: int, turns: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    response = client.post("/v1/predict", content=encoded(IMAGE, "PNG", exif=exif))
    upright = np.ascontiguousarray(np.rot90(IMAGE, turns))
    np.testing.assert_array_equal(labels_of(response.content), session.predict([upright])[0].labels)


def stream(client: httpx.Client, data: bytes = PNG, **parameters: Any) -> list[dict[str, Any]]:
    with client.stream("POST", "/v1/anytime", params=parameters, content=data) as response:
        assert (response.status_code, response.headers["content-type"]) == (200, "application/x-ndjson")
        return [json.loads(line) for line in response.iter_lines()]


def test_refinements(client: httpx.Client, session: messnet.Session) -> None:
    *records, end = stream(client)
    expected = list(session.anytime(IMAGE))
    assert end == {"stopped": "last_exit"}
    assert [record["exit_index"] for record in records] == [0, 1, 2, 3]
    for record, one in zip(records, expected, strict=True):
        np.testing.assert_array_equal(labels_of(base64.b64decode(record["mask"])), one.labels)
        assert record["image_confidence"] == pytest.approx(one.image_confidence, abs=1e-6)
    times = [record["latency_ms"] for record in records]
    assert times == sorted(times)


def test_refinements_stop(client: httpx.Client, session: messnet.Session) -> None:
    confidences = [result.image_confidence for result in session.anytime(IMAGE)]
    for threshold in (0.0, confidences[1], max(confidences[:3]), 1.0):
        first = next((i for i, confidence in enumerate(confidences) if confidence >= threshold), 3)
        *records, end = stream(client, threshold=threshold)
        assert len(records) == first + 1
        assert end == {"stopped": "last_exit" if first == 3 else "threshold"}
    *records, end = stream(client, deadline_ms=0)
    assert [len(records), end] == [1, {"stopped": "deadline"}]


def test_a_refinement_does_not_wait_for_the_next() -> None:
    session, service = fake()
    with running(service) as client:
        session.exits_run = 0
        steps = iter([True])

        def one_by_one(image: NDArray[np.uint8], *, deadline_ms: float | None = None) -> Iterator[Any]:
            yield result(image[..., 0], 0)
            assert session.open.wait(120)
            yield result(image[..., 0], 3)

        session.anytime = one_by_one  # type: ignore[method-assign]
        session.open.clear()
        with client.stream("POST", "/v1/anytime", content=grey(7)) as response:
            lines = response.iter_lines()
            assert json.loads(next(lines))["exit_index"] == 0
            assert next(steps)
            session.open.set()
            assert [json.loads(line).get("exit_index") for line in lines] == [3, None]


def chunks(data: bytes, size: int = 1000) -> Iterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is this large, of a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(999))) + chunk(b"IEND", b"")
    )


REFUSED: list[tuple[str, dict[str, Any], int, str]] = [
    ("nothing", {"content": b""}, 415, "got nothing"),
    ("text", {"content": b"hello, world"}, 415, "expected a JPEG, PNG, WebP or BMP image, got 12 bytes"),
    ("a format not taken", {"content": encoded(IMAGE, "TIFF")}, 415, "expected a JPEG"),
    ("half of it", {"content": PNG[: len(PNG) // 2]}, 422, "damaged"),
    ("pixels", {"content": encoded(smooth_image(129, 128))}, 413, "128 x 129 pixels, 16384 are the limit"),
    ("a strip", {"content": encoded(smooth_image(1, 300))}, 413, "300 x 1 pixels"),
    ("a bomb", {"content": png_header(9_000, 9_000)}, 413, "9000 x 9000 pixels"),
    ("a larger bomb", {"content": png_header(2**31 - 1, 2**31 - 1)}, 413, "too large"),
    ("a body", {"content": bytes(200_001)}, 413, "200001 bytes, 200000 are the limit"),
    ("a body of unknown length", {"content": chunks(bytes(900_000))}, 413, "more than 200000 bytes"),
    ("a format unheard of", {"content": PNG, "params": {"format": "svg"}}, 422, "format: .*got 'svg'"),
    ("a form without a file", {"data": {"file": "text"}, "files": {}}, 415, "expected a JPEG"),
    ("a parameter unheard of", {"content": PNG, "params": {"fromat": "json"}}, 422, "no parameter 'fromat'.* format;"),
    ("a form with a field", {"files": {"file": (None, b"text")}}, 422, "has no file"),
    ("no form", {"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 422, "form cannot be read"),
    (
        "half a form",
        {"content": b"--a\r\nContent-Dis", "headers": {"content-type": "multipart/form-data; boundary=a"}},
        422,
        "form",
    ),
]


@pytest.mark.parametrize(("request_", "status", "words"), [case[1:] for case in REFUSED], ids=[c[0] for c in REFUSED])
def test_what_is_refused(client: httpx.Client, request_: dict[str, Any], status: int, words: str) -> None:
    response = client.post("/v1/predict", **request_)
    assert response.status_code == status, response.text
    expect_error(response, words)


def test_the_rest_of_http(client: httpx.Client) -> None:
    for response, status in (
        (client.get("/nowhere"), 404),
        (client.get("/v1/predict"), 405),
        (client.get("/samples/0"), 404),
        (client.get("/samples/x"), 404),
        (client.post("/v1/anytime", params={"threshold": 2}, content=PNG), 422),
        (client.post("/v1/anytime", params={"deadline_ms": "nan"}, content=PNG), 422),
        (client.post("/v1/anytime", content=b"no"), 415),
    ):
        assert response.status_code == status, response.text
        expect_error(response, "/openapi.json says how" if response.url.path in ("/nowhere", "/v1/predict") else "")


def test_what_it_says_of_itself(client: httpx.Client, session: messnet.Session) -> None:
    assert client.get("/health").json() == {"status": "alive"}
    assert client.get("/ready").json() == {"status": "ready"}
    info = client.get("/v1/info").json()
    assert info["class_names"] == list(session.class_names)
    assert session.palette is not None
    assert info["palette"] == session.palette.tolist()
    assert [exit["exit_index"] for exit in info["exits"]] == [0, 1, 2, 3]
    assert [exit["pixel_threshold"] for exit in info["exits"]] == [0.4, 0.4, 0.4, None]
    macs = [exit["macs"] for exit in info["exits"]]
    assert macs == sorted(macs)
    assert all(exit["warm_up_latency_ms"] > 0 for exit in info["exits"])
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/predict", "/v1/anytime", "/v1/info", "/health", "/ready", "/metrics"} == set(paths)
    parameters = [one for work in ("/v1/predict", "/v1/anytime") for one in paths[work]["post"]["parameters"]]
    choices = {one["name"]: tuple(one["schema"]["enum"]) for one in parameters if "enum" in one["schema"]}
    assert choices == {"format": FORMAT_NAMES, "stop": STOP_NAMES}
    assert "application/json" in paths["/v1/anytime"]["post"]["responses"]["503"]["content"]
    body = paths["/v1/predict"]["post"]["requestBody"]["content"]
    assert {"image/jpeg", "image/png", "multipart/form-data"} < set(body)
    assert {"413", "415", "422", "503"} < set(paths["/v1/predict"]["post"]["responses"])
    assert "default-src 'none'" in client.get("/").headers["content-security-policy"]


def samples_of(client: httpx.Client) -> dict[tuple[str, ...], float]:
    """Every figure of /metrics by name and label values, the path first."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = (sample for family in families for sample in family.samples)
    return {(s.name, *sorted(s.labels.values(), key=lambda value: "/" not in value)): s.value for s in samples}


def test_metrics() -> None:
    _, service = fake(batch_size=4)
    with running(service) as client:
        for value in (1, 2, 255, 253):
            client.post("/v1/predict", content=grey(value))
        stream(client, grey(3))
        client.get("/a")
        client.get("/b")
        figures = samples_of(client)
    assert figures["messnet_requests_total", "/v1/predict", "200"] == 2
    assert figures["messnet_requests_total", "/v1/predict", "422"] == 2
    assert figures["messnet_not_finite_total",] == 1
    assert figures["messnet_requests_total", "other", "404"] == 2
    assert figures["messnet_exits_total", "/v1/predict", "0"] == 2
    assert [figures["messnet_exits_total", "/v1/anytime", str(i)] for i in range(4)] == [1] * 4
    assert figures["messnet_inference_seconds_sum", "0"] == pytest.approx(0.003)
    assert figures["messnet_batch_size_count",] == 4
    assert figures["messnet_request_seconds_count", "/v1/anytime"] == 1
    assert (figures["messnet_queue_depth",], figures["messnet_requests_in_work",], figures["messnet_ready",]) == (
        0,
        0,
        1,
    )
    assert figures["process_resident_memory_bytes",] > 1e6


def posted(pool: ThreadPoolExecutor, client: httpx.Client, value: int, **how: Any) -> Future[httpx.Response]:
    return pool.submit(client.post, "/v1/predict", content=grey(value, **how))


@pytest.mark.parametrize("bad", [None, 255])
def test_those_that_come_together_run_together(bad: int | None) -> None:
    session, service = fake(batch_size=4, batch_wait_ms=2000)
    values = [10, 20, bad or 30, 40]
    with running(service) as client, ThreadPoolExecutor(8) as pool:
        session.open.clear()
        first = posted(pool, client, 1)
        until(lambda: session.batches == [1])  # alone: it did not wait for others
        later = []
        for i, value in enumerate(values):
            later.append(posted(pool, client, value))
            until(lambda n=i + 1: service.worker.depth == n)  # type: ignore[misc]
        assert samples_of(client)["messnet_queue_depth",] == 4
        session.open.set()
        answers = [future.result() for future in (first, *later)]
    assert session.batches == [1, 4, *([1] * 4 if bad else [])]
    for value, answer in zip([1, *values], answers, strict=True):
        if value == bad:
            assert answer.status_code == 422
            expect_error(answer, "it does not like white")
        else:
            assert (labels_of(answer.content) == value).all()


def test_a_batch_is_bounded_in_pixels_too() -> None:
    session, service = fake(batch_size=8, max_pixels=128 * 128)
    with running(service) as client, ThreadPoolExecutor(8) as pool:
        session.open.clear()
        futures = [posted(pool, client, 1)]
        until(lambda: session.batches == [1])
        for i in range(4):
            futures.append(posted(pool, client, i, side=90))
            until(lambda n=i + 1: service.worker.depth == n)  # type: ignore[misc]
        session.open.set()
        assert [future.result().status_code for future in futures] == [200] * 5
    assert session.batches == [1, 2, 2]


def test_a_photograph_of_a_telephone_is_taken() -> None:
    photo = encoded(np.full((3024, 4032, 3), (7, 7, 7), np.uint8), "JPEG")
    _, service = fake()
    with running(service) as client:
        mask = client.post("/v1/predict", content=photo)
        assert mask.status_code == 200
        with Image.open(io.BytesIO(mask.content)) as file:
            assert file.size == (4032, 3024)
        assert service.options.max_pixels > 5712 * 4284  # as the larger sensors of 2024 have by default


def test_a_bug_is_no_secret() -> None:
    _, service = fake()
    with running(service) as client:
        response = client.post("/v1/predict", content=grey(254))
        assert response.status_code == 500
        expect_error(response, "has a bug; its log")
        assert client.post("/v1/predict", content=grey(3)).status_code == 200


@pytest.mark.parametrize(("limits", "status"), [({"max_queue": 2}, 503), ({"max_concurrency": 2}, 429)])
def test_too_many(limits: dict[str, int], status: int) -> None:
    session, service = fake(**limits)
    with running(service) as client, ThreadPoolExecutor(4) as pool:
        session.open.clear()
        futures = [posted(pool, client, i) for i in range(2)]
        until(lambda: service.gate.num_in_work == 2)
        refused = client.post("/v1/predict", content=grey(1))
        assert (refused.status_code, refused.headers["retry-after"]) == (status, "1")
        expect_error(refused, "2 requests")
        assert client.get("/health").status_code == 200  # never refused
        session.open.set()
        assert [future.result().status_code for future in futures] == [200, 200]
        assert client.post("/v1/predict", content=grey(1)).status_code == 200


def test_too_late() -> None:
    session, service = fake(timeout_s=0.1)
    with running(service) as client:
        session.open.clear()
        for path in ("/v1/predict", "/v1/anytime"):
            response = post_whole(client, path, grey(1))
            assert (response.status_code, response.headers["retry-after"]) == (503, "1")
            expect_error(response, r"no answer within 0\.1 s")
            session.open.set()
            until(lambda: service.worker.depth == 0)
            session.open.clear()
        session.open.set()
        address = (client.base_url.host, client.base_url.port)
        with socket.create_connection(address) as slow:
            slow.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc")
            assert b" 408 " in slow.recv(4096)


def test_a_client_that_goes_away() -> None:
    session, service = fake()
    with running(service) as client:
        session.exits_run = 0
        session.open.clear()
        address = (client.base_url.host, client.base_url.port)
        body = grey(1)
        with socket.create_connection(address) as gone:
            gone.sendall(b"POST /v1/anytime HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            until(lambda: service.gate.num_in_work == 1)
        with socket.create_connection(address) as gone:
            gone.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc")
            until(lambda: service.gate.num_in_work >= 1)
        session.open.set()
        until(lambda: service.gate.num_in_work == 0)
        assert client.post("/v1/predict", content=grey(1)).status_code == 200


def test_the_end_loses_nothing() -> None:
    session, service = fake(drain_s=3, batch_size=2)
    with listening(service) as (server, client), ThreadPoolExecutor(4) as pool:
        assert client.post("/v1/predict", content=grey(9)).status_code == 200
        session.open.clear()
        futures = [posted(pool, client, value) for value in (1, 2, 3)]
        until(lambda: service.gate.num_in_work == 3)
        with socket.create_connection((client.base_url.host, client.base_url.port)) as kept:
            kept.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"200 OK" in kept.recv(4096)
            server.handle_exit(signal.SIGTERM, None)
            kept.sendall(b"GET /ready HTTP/1.1\r\nHost: x\r\n\r\n")  # it stands: it may ask once more
            answer = b"".join(iter(lambda: kept.recv(4096), b""))
            assert b" 503 " in answer
            assert b"connection: close" in answer.lower()
            assert b"draining" in answer
        with pytest.raises(httpx.ConnectError):
            httpx.post(str(client.base_url.join("/v1/predict")), content=grey(1), trust_env=False)
        until(lambda: server.should_exit)  # drain_s is over
        assert not any(future.done() for future in futures)
        session.open.set()
        assert [labels_of(future.result().content)[0, 0] for future in futures] == [1, 2, 3]
    assert service.gate.accepted == service.gate.answered == 4


def test_the_command(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of it, with a real signal: it returns as a command does that ends well."""
    statuses = []

    def ask() -> None:
        try:
            until(lambda: port_said(capsys, said))
            with httpx.Client(base_url=said[-1], trust_env=False, timeout=120) as client:
                until(lambda: answers(client))
                statuses.append(client.post("/v1/predict", content=JPEG).status_code)
                statuses.append(client.get("/v1/info").json()["samples"] != [])
                sample = client.get("/samples/0")
                statuses.append(client.post("/v1/predict", content=sample.content).status_code)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    said: list[str] = []
    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask)
        main(["serve", str(tiny_run), "--port", "0", "--instance", "max-miou"])
        asked.result()
    assert statuses == [200, True, 200]
    assert "stopped: 2 requests accepted, 2 answered" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before


def port_said(capsys: pytest.CaptureFixture[str], said: list[str]) -> bool:
    words = capsys.readouterr().out.split()
    said += [word for word in words if word.startswith("http://")]
    return bool(said)


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/ready").status_code == 200
    except httpx.ConnectError:
        return False


def test_what_cannot_be_served(tiny_run: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(MessError, match=r"cannot listen on .*--port"):
        server.serve(tiny_run, ServeOptions(port=taken.getsockname()[1]))
    for wrong, words in (
        ({"port": 70_000}, "--port must be at most 65535, got 70000"),
        ({"max_queue": 0}, "--max-queue must be at least 1, got 0"),
        ({"timeout_s": float("nan")}, "--timeout-s must be greater than 0, got nan"),
    ):
        with pytest.raises(RecipeError, match=words):
            ServeOptions(**wrong)
    with pytest.raises(DataError, match="is no folder"):
        open_service(tiny_run, ServeOptions(), samples=tmp_path / "none")
    with pytest.raises(DataError, match="holds no image"):
        open_service(tiny_run, ServeOptions(), samples=tmp_path)
    (tmp_path / "a.png").write_bytes(PNG[:100])
    with pytest.raises(DataError, match=r"a\.png: the image is damaged"):
        open_service(tiny_run, ServeOptions(), samples=tmp_path)


def test_latencies_where_they_were_measured(tiny_run: Path) -> None:
    measured = messnet.load(tiny_run, instance=REFINING)
    plain = CostTable.from_json((tiny_run / "profile.json").read_text())

    def timed(part: PartCost) -> PartCost:
        return replace(part, latency_ms=1.0, latency_p95_ms=2.0)

    parts = {name: tuple(map(timed, getattr(plain, name))) for name in ("segments", "policies", "outputs")}
    heads = {exit: timed(part) for exit, part in plain.heads.items()}
    measured.costs = replace(plain, heads=heads, conditions={"device": "here"}, **parts)
    info = describe(measured)
    # Of exit i: i + 1 segments, heads and decisions, and one output; the last decides nothing.
    assert [exit["latency_ms"] for exit in info["exits"]] == [4, 7, 10, 12]
    assert info["latency_conditions"] == {"device": "here"}
    assert info["workload"]["original_macs"] == round(plain.total_macs())


def test_samples_and_a_bundle(bundle: Path, tmp_path: Path) -> None:
    service = open_service(bundle, ServeOptions())
    assert service.samples == []
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/one.jpg").write_bytes(JPEG)
    (tmp_path / "samples/notes.txt").write_text("no image")
    service = open_service(bundle, ServeOptions(), samples=tmp_path / "samples")
    assert [(s.name, s.media_type, s.data) for s in service.samples] == [("one", "image/jpeg", JPEG)]


def malformed_images() -> list[tuple[bytes, bool]]:
    """150 files made from good ones, and whether they may pass for an image still (a bit more or less)."""
    draw = np.random.default_rng(0)
    good = [PNG, JPEG, encoded(IMAGE, "WEBP"), encoded(IMAGE, "BMP")]
    cases: list[tuple[bytes, bool]] = []
    for data in good:
        for _ in range(14):  # bits
            changed = bytearray(data)
            for place in draw.integers(0, len(data), draw.integers(1, 20)):
                changed[place] ^= 1 << int(draw.integers(8))
            cases.append((bytes(changed), True))
        cases += [(data[: int(share * len(data))], share > 0.9) for share in np.linspace(0, 0.99, 10)]
        cases += [(draw.bytes(16) + data[16:], False), (b"GIF89a" + data[6:], False), (data[1:], False)]
        cases += [(data[:40] + draw.bytes(len(data) - 40), True)]
    cases += [(png_header(int(w), int(h)), False) for w, h in draw.integers(2**14, 2**31 - 1, (16, 2))]
    cases += [(png_header(0, 5), False), (png_header(5, 0), False), (png_header(5, 500), False)]
    others = [b"%PDF-1.7", b"PK\3\4" + bytes(99), b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\x7fELF" + bytes(99)]
    others += [encoded(IMAGE, "GIF"), encoded(IMAGE, "TIFF"), b"{}", b"\0" * 1000, "ünï".encode(), draw.bytes(5000)]
    cases += [(data, False) for data in others]
    while len(cases) < 150:
        cases.append((draw.bytes(int(draw.integers(1, 3000))), False))
    return cases


def test_malformed_images(client: httpx.Client) -> None:
    cases = malformed_images()
    assert len(cases) == 150
    refused = 0
    for i, (data, may_pass) in enumerate(cases):
        path = ("/v1/predict", "/v1/anytime")[i % 2]
        how = {"files": {"file": ("photo.jpg", data)}} if i % 3 == 0 else {"content": data}
        response = client.post(path, **how)  # type: ignore[arg-type]
        if response.status_code == 200:
            assert may_pass, (i, data[:40])
            assert cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) is not None
            continue
        refused += 1
        assert response.status_code in (413, 415, 422), response.text
        expect_error(response)
    assert refused >= 100
    assert client.post("/v1/predict", content=PNG).status_code == 200


def malformed_bundles(bundle: Path, folder: Path) -> Iterator[Path]:
    """50 zips made from a good one whose content differs from it."""
    draw = np.random.default_rng(1)
    manifest = (bundle / "manifest.json").read_bytes()
    weights = (bundle / "weights.safetensors").read_bytes()
    places = [i for i, byte in enumerate(manifest) if bytes([byte]).isalnum()]
    for i in range(50):
        changed, tensors = bytearray(manifest), bytearray(weights)
        if i % 5 == 0:
            tensors[int(draw.integers(len(tensors)))] ^= 1 << int(draw.integers(8))
        elif i % 5 == 1:
            changed = changed[: int(draw.integers(len(changed)))]
        elif i % 5 == 2:
            tensors = tensors[: int(draw.integers(len(tensors)))]
        else:
            changed[int(draw.choice(places))] ^= 1
        with zipfile.ZipFile(folder / f"{i}.zip", "w") as archive:
            archive.writestr("manifest.json", bytes(changed))
            archive.writestr("weights.safetensors", bytes(tensors))
            archive.writestr("costs/workload.json", (bundle / "costs/workload.json").read_bytes())
        yield folder / f"{i}.zip"


def test_malformed_bundles(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    for i, path in enumerate(malformed_bundles(bundle, tmp_path)):
        verb = ["serve", str(path), "--port", "0"] if i % 2 else ["predict", str(path), str(tmp_path / "a.png")]
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(verb)
        said = capsys.readouterr().err
        assert end.value.code == 2, said
        assert said.startswith("messnet: ")
        assert said.count("\n") == 1
