"""Images in every form that people hold them in are the same pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_tensor

from helpers.images import smooth_image
from messnet.errors import DataError
from messnet.images.inputs import as_image, each_image

PIXELS = smooth_image(20, 30, 3)


def forms(folder: Path) -> dict[str, object]:
    picture = Image.fromarray(PIXELS)
    picture.save(folder / "a.png")
    return {
        "path": folder / "a.png",
        "text": str(folder / "a.png"),
        "picture": picture,
        "bytes": PIXELS,
        "float": PIXELS / 255,
        "tensor": pil_to_tensor(picture),
        "to_tensor": to_tensor(picture),
        "half": to_tensor(picture).double().requires_grad_(),
    }


def test_all_forms_are_the_same_pixels(tmp_path: Path) -> None:
    for name, value in forms(tmp_path).items():
        found = as_image(value)
        assert found.dtype == np.uint8, name
        np.testing.assert_array_equal(found, PIXELS, err_msg=name)
        (alone,) = each_image(value)  # one image is a list of one
        np.testing.assert_array_equal(alone, PIXELS)
    assert all((one == PIXELS).all() for one in each_image([*forms(tmp_path).values()]))


def test_batches_are_lists_of_images() -> None:
    other = smooth_image(20, 30, 4)
    both = np.stack([PIXELS, other])
    for batch in (both, torch.from_numpy(both).movedim(-1, 1), tuple(both)):
        for found, expected in zip(each_image(batch), both, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_pictures_are_turned_upright_and_made_rgb(tmp_path: Path) -> None:
    grey = Image.fromarray(PIXELS[..., 0])
    np.testing.assert_array_equal(as_image(grey), np.repeat(PIXELS[..., :1], 3, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(PIXELS).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as file:
        np.testing.assert_array_equal(as_image(file), np.rot90(PIXELS, -1))
        assert file.size == (30, 20)  # the picture of the caller stays as it was


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "not NoneType"),
        ({"image": PIXELS}, "not dict"),
        (PIXELS[..., :1], "(20, 30, 1) uint8"),
        (np.array(5), "this one is () int64"),
        (PIXELS.astype(np.int32), "(20, 30, 3) int32"),
        (PIXELS.astype(float), "lie in [0, 1]"),
        (np.full((2, 2, 3), np.nan), "lie in [0, 1]"),
        (np.zeros((0, 4, 3), np.uint8), "at least one pixel"),
        (torch.zeros(20, 30, 3), "(3, H, W), not (20, 30, 3): image.permute(2, 0, 1) makes it so"),
        (PIXELS.transpose(2, 0, 1), "this one is (3, 20, 30) uint8: image.transpose(1, 2, 0) makes it so"),
        (
            torch.zeros(3, 20, 30, dtype=torch.int32),
            "a tensor is (3, H, W), uint8 or floating in [0, 1], RGB; this one is (3, 20, 30) int",
        ),
        (torch.zeros(2, 3, 4, 4), "give a batch as a list"),
        (to_tensor(Image.fromarray(PIXELS)) * 4 - 2, "leave the normalisation out"),
        ("nowhere.png", "there is no image nowhere.png"),
        (Path(__file__).parent, "is a folder: expected an image"),
    ],
)
def test_what_is_no_image_is_one_line(value: object, words: str) -> None:
    with pytest.raises(DataError) as error:
        as_image(value)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
