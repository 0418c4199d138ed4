import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from messnet.errors import DataError, RecipeError
from messnet.images.preprocessing import MEAN, STD, Normalisation, normalise


@pytest.mark.parametrize(
    "normalisation",
    [
        Normalisation(mean=MEAN, std=STD),
        Normalisation(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        Normalisation(mean=(0, 0, 0), std=(1, 1, 1)),
        Normalisation(mean=(0.1, 0.2, 0.3), std=(0.01, 0.2, 1)),
    ],
)
def test_normalise_equals_torchvision(normalisation: Normalisation) -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)
    steps = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(normalisation.mean, normalisation.std)]
    x = normalise(image, normalisation)
    assert x.dtype == np.float32
    assert x.flags.c_contiguous
    np.testing.assert_allclose(x, v2.Compose(steps)(image).numpy(), rtol=1e-6, atol=1e-5)
    if normalisation == Normalisation():
        np.testing.assert_array_equal(x, normalise(image))


def test_bytes_stay_what_they_are() -> None:
    image = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, 2)
    std = 0.00392156862745098  # as the docstring gives it
    x = normalise(image, Normalisation(mean=(0, 0, 0), std=(std, std, std)))
    np.testing.assert_array_equal(x[2, 0], np.arange(256))


@pytest.mark.parametrize(
    "values",
    [
        {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)},
        {"std": (0.0, 0.5, 0.5)},
        {"mean": (float("nan"), 0.5, 0.5)},
        {"mean": (-0.1, 0.5, 0.5)},
    ],
)
def test_values_of_another_unit_are_refused(values: dict[str, tuple[float, float, float]]) -> None:
    with pytest.raises(RecipeError, match=r"must be those of pixel values in \[0, 1\]: divide yours by 255"):
        Normalisation(**values)


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
