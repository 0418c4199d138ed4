import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from messnet.errors import DataError
from messnet.images.preprocessing import MEAN, STD, normalise


def test_normalise_equals_torchvision() -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)
    reference = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])(image)
    x = normalise(image)
    assert x.dtype == np.float32
    assert x.flags.c_contiguous
    np.testing.assert_allclose(x, reference.numpy(), rtol=0, atol=1e-5)


def test_it_is_what_torch_computed_in_version_0_1() -> None:
    """To the bit: networks that were trained on one form run on the other."""
    image = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, 2)
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (MEAN, STD))
    x = torch.tensor(np.ascontiguousarray(np.moveaxis(image, -1, -3))).float().sub_(mean).div_(std)
    np.testing.assert_array_equal(normalise(image), x.numpy())


def test_a_batch_is_its_images_and_shares_no_memory() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), np.uint8)
    images.flags.writeable = False
    batch = normalise(images[:, :, ::-1])
    assert batch.shape == (2, 3, 4, 5)
    np.testing.assert_array_equal(batch[1], normalise(images[1, :, ::-1]))


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((3, 4, 4), np.uint8)]
)
def test_anything_else_is_refused(image: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"an image is \(H, W, 3\) or \(N, H, W, 3\) uint8 RGB, not"):
        normalise(image)
