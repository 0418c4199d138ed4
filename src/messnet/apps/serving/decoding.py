"""Bytes from strangers to pixels, in a process of its own: a decoder can take minutes over a file that passes every
limit on its size, or crash; a process can be ended.

Run as ``python -m messnet.apps.serving.decoding MAX_PIXELS DECODE_S``. It says that it is ready with one byte, then
answers requests one by one until its standard input ends:

    request   length (8 bytes, big-endian), then the file
    answer    status, a, b (4 bytes each); 200: a x b x 3 bytes follow, the pixels; otherwise a bytes, why not

``decoders.py`` is the other end. This module imports only what decoding needs, so that a new process is soon ready.
"""

from __future__ import annotations

import io
import signal
import struct
import sys
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from messnet.images.reading import rgb_of

FORMATS = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "BMP": "image/bmp"}
"""The formats that are taken: media types by the names that Pillow has for them."""

READY = b"+"
REQUEST = struct.Struct(">Q")
ANSWER = struct.Struct(">III")

_MIN_SIDE = 64  # a network pads to its stride: a strip one pixel high is not as small as it looks
# Address space: the interpreter and its libraries map about 300 MB; a pixel is held as RGBA, as RGB, in the decoder's
# own planes and once more while it is turned upright: at most 19 bytes were measured, of a WebP file.
_BASE_BYTES, _BYTES_PER_PIXEL = 2**30, 32


class RequestError(Exception):
    """A request that cannot be answered: its HTTP status and one line that says why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def decode_image(data: bytes, *, max_pixels: int) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB of a JPEG, PNG, WebP or BMP file, upright as its EXIF orientation says; alpha is dropped, of
    an animation the first picture is taken.

    Raises RequestError: 415 for what is no such file, 413 for more than ``max_pixels``, read from the header before
    anything is decoded, 422 for a damaged one.
    """
    try:
        with Image.open(io.BytesIO(data), formats=tuple(FORMATS)) as file:
            if max(file.width, _MIN_SIDE) * max(file.height, _MIN_SIDE) > max_pixels:
                limit = f"{max_pixels} are the limit (sides of at least 64)"
                raise RequestError(413, f"the image has {file.width} x {file.height} pixels, {limit}; scale it")
            return rgb_of(file)
    except RequestError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RequestError(413, f"the image is too large: more than {max_pixels} pixels; scale it down") from error
    except UnidentifiedImageError as error:
        names = "a JPEG, PNG, WebP or BMP image"
        got = f"{len(data)} bytes of something else" if data else "nothing"
        raise RequestError(415, f"expected {names}, got {got}; send the file as it is") from error
    except Exception as error:  # a decoder meets damage with anything from SyntaxError to struct.error
        why = str(error) or type(error).__name__
        raise RequestError(422, f"the image is damaged ({why}); send it again") from error


def read_exactly(stream: IO[bytes], count: int) -> bytes:
    """The next ``count`` bytes. Raises EOFError when the stream ends before."""
    data = stream.read(count)
    if len(data) < count:
        raise EOFError
    return data


def _limit_resources(max_pixels: int) -> None:
    """SIGTERM and SIGINT reach every process of a service or a terminal; this one ends when its parent does, so that
    requests that were accepted are still answered."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform != "win32":
        import resource

        limit = _BASE_BYTES + _BYTES_PER_PIXEL * max_pixels
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _decode_within(data: bytes, max_pixels: int, seconds: float) -> NDArray[np.uint8]:
    """As ``decode_image``. After ``seconds`` of this process's processor time the kernel ends the process: SIGPROF's
    default action needs no Python code to run, and a busy machine does not count against an image."""
    if sys.platform == "win32":  # no such timer: the request's own time limit ends the process from outside
        return decode_image(data, max_pixels=max_pixels)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return decode_image(data, max_pixels=max_pixels)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main(arguments: list[str]) -> None:
    max_pixels, seconds = int(arguments[0]), float(arguments[1])
    _limit_resources(max_pixels)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    answers.write(READY)
    while True:
        answers.flush()
        try:
            (length,) = REQUEST.unpack(read_exactly(requests, REQUEST.size))
            data = read_exactly(requests, length)
        except EOFError:  # the service has ended, or wants no more of this process
            return
        try:
            image = np.ascontiguousarray(_decode_within(data, max_pixels, seconds))
        except RequestError as error:
            why = str(error).encode(errors="replace")
            answers.write(ANSWER.pack(error.status, len(why), 0) + why)
        else:
            answers.write(ANSWER.pack(200, image.shape[0], image.shape[1]))
            answers.write(image.data)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BrokenPipeError:  # the service has ended; nobody waits for this answer
        sys.exit(1)
