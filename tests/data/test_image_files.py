"""Image files become pixels the same way in training, prediction and the service."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from helpers.images import smooth_image
from messnet.data.image_files import SampleError, read_image
from messnet.errors import DataError
from messnet.images.reading import read_image as predicted
from messnet.images.reading import rgb_of


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled(tmp_path: Path, suffix: str) -> None:
    grey = smooth_image(40, 48)[..., 0]
    cv2.imwrite(str(tmp_path / f"deep.{suffix}"), grey.astype(np.uint16) * 257)
    with Image.open(tmp_path / f"deep.{suffix}") as file:
        assert file.mode.startswith("I;16")
        np.testing.assert_array_equal(rgb_of(file), np.repeat(grey[..., None], 3, axis=2))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_upright(orientation: int) -> None:
    image, buffer = Image.fromarray(smooth_image(40, 48)), io.BytesIO()
    image.getexif()[0x0112] = orientation
    image.save(buffer, "JPEG", exif=image.getexif(), quality=95)
    upright = cv2.imdecode(np.frombuffer(buffer.getvalue(), np.uint8), cv2.IMREAD_COLOR)  # OpenCV heeds EXIF
    with Image.open(buffer) as file:
        found = rgb_of(file)
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright[..., ::-1]).max() <= 3  # two JPEG decoders


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_other_modes_are_pillows(mode: str) -> None:
    image = Image.fromarray(smooth_image(40, 48)).convert(mode)
    np.testing.assert_array_equal(rgb_of(image.copy()), np.array(image.convert("RGB")))


def test_pixels_of_unknown_range_are_refused(tmp_path: Path) -> None:
    Image.fromarray(smooth_image(40, 48)[..., 0].astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(SampleError, match="32 bits, expected 8 or 16"):
        read_image(tmp_path / "float.tif")
    with pytest.raises(DataError, match="32 bits, expected 8 or 16"):
        predicted(tmp_path / "float.tif")
