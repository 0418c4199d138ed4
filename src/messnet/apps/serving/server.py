"""Starts a service on a model, and stops it without losing a request."""

from __future__ import annotations

import io
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from PIL import Image

from messnet.apps.serving.app import Sample, Service
from messnet.apps.serving.decoding import FORMATS, RequestError, decode_image
from messnet.apps.serving.description import describe
from messnet.apps.serving.draining import run_until_stopped
from messnet.apps.serving.options import ServeOptions
from messnet.apps.serving.workers import run_workers
from messnet.deployment.bundle import is_bundle
from messnet.deployment.loading import load
from messnet.deployment.session import Session
from messnet.errors import DataError, MessError
from messnet.images.drawing import as_png
from messnet.images.reading import list_images
from messnet.records.run_directory import RunDirectory

MAX_SAMPLES = 12


OpenSession = Callable[[Path], Session]
_LOAD: OpenSession = partial(load, device="auto")


def serve(path: Path, options: ServeOptions, *, samples: Path | None = None, open_session: OpenSession = _LOAD) -> None:
    """Serves a run's instance, or a bundle, until SIGTERM or SIGINT; then answers every request that it has accepted.

    ``samples`` is a folder of images that the page offers; None: those of a run's gallery. ``open_session`` loads the
    model; it is pickled where there are several workers. Raises MessError, one line, when that cannot be done or the
    address cannot be listened to.
    """
    with _listening(options.host, options.port) as sock:  # before the model is loaded: a port that is taken is known
        serve_on = partial(_serve, path, options, samples, open_session)
        if options.workers == 1:
            serve_on(0, [sock])
            return
        with ExitStack() as stack:
            own = [
                stack.enter_context(_listening(options.host, options.port and options.port + k))
                for k in range(1, options.workers + 1)
            ]
            print(f"{path}: http://{_address(sock)}/ by {options.workers} workers (ctrl-c stops them)", flush=True)
            run_workers(serve_on, sock, own)


def _serve(
    path: Path,
    options: ServeOptions,
    samples: Path | None,
    open_session: OpenSession,
    worker: int,
    sockets: Sequence[socket.socket],
) -> None:
    """As the ``worker`` of this number, or alone where it is 0."""
    service = open_service(path, options, samples=samples, open_session=open_session)
    name, hint = (f"worker {worker}: ", "") if worker else ("", " (ctrl-c stops it)")
    print(f"{name}{service.session.instance.name} of {path}: http://{_address(sockets[-1])}/{hint}", flush=True)
    run_until_stopped(service, sockets)
    gate = service.gate
    print(f"{name}stopped: {gate.accepted} requests accepted, {gate.answered} answered", flush=True)


def _address(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    # An IPv6 address stands in brackets in a URL.
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def open_service(
    path: Path, options: ServeOptions, *, samples: Path | None = None, open_session: OpenSession = _LOAD
) -> Service:
    """The service that ``serve`` runs. Raises as it does."""
    # Before the model is loaded, which takes longer than to find that a sample cannot be read.
    chosen = None if samples is None else _samples_of(samples, options)
    session = open_session(path)
    found = _gallery_of(path) if chosen is None else chosen
    return Service(session, options, samples=found, info=describe(session))


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens on the address: who asks before the model is loaded waits for it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        try:
            # Or else a service that is started again would wait for the connections of the one before to time out.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen()  # two sockets may be bound to one port until one of them listens
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        raise MessError(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another --host or --port"
        ) from error
    return sock


def _samples_of(folder: Path, options: ServeOptions) -> list[Sample]:
    """The first images of a folder. Raises DataError when there is none, or one that the service would not take."""
    if not folder.is_dir():
        raise DataError(f"--samples {folder} is no folder; expected one that holds images")
    found = []
    for file in list_images(folder)[:MAX_SAMPLES]:
        data = file.read_bytes()
        try:
            decode_image(data, max_pixels=options.max_pixels)
        except RequestError as error:
            raise DataError(f"--samples: {file}: {error}") from error
        with Image.open(io.BytesIO(data)) as image:
            media_type = FORMATS[image.format or ""]
        found.append(Sample(name=file.stem, media_type=media_type, data=data))
    return found


def _gallery_of(path: Path) -> list[Sample]:
    """The images that a run's report shows; a bundle and a run without a report have none."""
    file = RunDirectory(path).gallery
    if is_bundle(path) or not file.exists:
        return []
    gallery = file.read()
    pairs = zip(gallery.image_names, gallery.images, strict=True)
    return [Sample(name=name, media_type="image/png", data=as_png(Image.fromarray(image))) for name, image in pairs]
