"""Images as they come over the wire: bytes to pixels, labels to PNG. What comes is not trusted."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from messnet.apps.predictions import overlay
from messnet.images.reading import rgb_of

__all__ = ["FORMATS", "RequestError", "decode_image", "encode_mask", "encode_overlay", "expect_pixels"]

FORMATS = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "BMP": "image/bmp"}
"""What is taken: by the name that Pillow has for it, its media type."""

_MIN_SIDE = 64  # a network pads to its stride: a strip one pixel high is not as small as it looks


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
            expect_pixels(file.size, max_pixels)
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
        raise RequestError(422, f"the image is damaged ({type(error).__name__}: {error}); send it again") from error


def expect_pixels(size: tuple[int, int], max_pixels: int) -> None:
    """Raises RequestError (413) for an image (width, height) of more than ``max_pixels``."""
    width, height = size
    if max(width, _MIN_SIDE) * max(height, _MIN_SIDE) > max_pixels:
        raise RequestError(
            413, f"the image has {width} x {height} pixels, {max_pixels} are the limit (sides of at least 64); scale it"
        )


def encode_mask(labels: NDArray[np.uint8], palette: NDArray[np.uint8]) -> bytes:
    """PNG of (H, W) class indices, which carries ``palette`` (K, 3) as its colours."""
    mask = Image.fromarray(labels)
    mask.putpalette(palette.flatten().tolist())
    return encode_png(mask)


def encode_overlay(image: NDArray[np.uint8], labels: NDArray[np.uint8], palette: NDArray[np.uint8]) -> bytes:
    """PNG of the image (H, W, 3) with its classes laid over it."""
    return encode_png(Image.fromarray(overlay(image, labels, palette)))


def encode_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=3)  # half the time of the default for a few per cent more bytes
    return buffer.getvalue()
