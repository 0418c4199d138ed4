import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from messnet.data import IGNORE_INDEX, SegmentationSample
from messnet.data.options import AugmentOptions, padding_share
from messnet.data.scenes import Scenes, ScenesOptions
from messnet.data.transforms import TrainingStream, build_augmentation, stack_samples
from messnet.errors import DataError, RecipeError
from messnet.images.preprocessing import IMAGENET, MEAN, STD, Normalisation, normalise

STILL = AugmentOptions(scale_min=1, scale_max=1, hflip=0)


def denormalise(x: torch.Tensor) -> np.ndarray:
    """(3, h, w) to (h, w, 3) in 0 .. 255, the inverse of ``normalise``."""
    return (x.permute(1, 2, 0).double().numpy() * STD + MEAN) * 255


def blocks() -> tuple[np.ndarray, np.ndarray]:
    """A mask of large blocks, and an image that shows the mask in every channel."""
    mask = np.kron(np.random.default_rng(0).permutation(48).reshape(6, 8), np.ones((16, 16))).astype(np.uint8)
    return np.repeat(mask[..., None] * 5, 3, 2), mask


def test_without_augmentation_it_is_normalise() -> None:
    image, mask = blocks()
    x, y = build_augmentation(STILL)(image, mask)
    assert torch.equal(x, torch.from_numpy(normalise(image)))
    assert y.dtype == torch.int64
    assert type(y) is torch.Tensor
    assert np.array_equal(y.numpy(), mask)


@pytest.mark.parametrize("seed", range(6))
def test_image_and_mask_move_together(seed: int) -> None:
    image, mask = blocks()
    torch.manual_seed(seed)
    x, y = build_augmentation(AugmentOptions(crop=(80, 120)))(image, mask)
    assert x.shape == (3, 80, 120)
    assert y.shape == (80, 120)
    shown, labels = denormalise(x)[..., 0] / 5, y.numpy()
    # Away from block borders, where the image is interpolated, the image must show the label.
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(labels, 2, mode="edge"), (5, 5))
    is_inside = (windows == labels[..., None, None]).all((2, 3)) & (labels != 255)
    assert is_inside.mean() > 0.05
    assert np.abs(shown - labels)[is_inside].max() < 0.2


def test_labels_are_not_shifted_by_scaling() -> None:
    """A half-plane's edge stays in the middle: plain nearest would move it by half a pixel."""
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 1
    image = np.repeat(mask[..., None] * 200, 3, 2)
    for scale in (0.5, 0.75, 1.5):
        options = AugmentOptions(scale_min=scale, scale_max=scale, hflip=0, crop=(int(64 * scale), int(64 * scale)))
        x, y = build_augmentation(options)(image, mask)
        assert np.array_equal(denormalise(x)[..., 0] > 100, y.numpy() == 1)


@pytest.mark.parametrize("normalisation", [IMAGENET, Normalisation(mean=(0.2, 0.4, 1), std=(0.5, 1, 0.3))])
def test_outside_is_void_and_of_the_mean_colour(normalisation: Normalisation) -> None:
    image, mask = blocks()
    options = AugmentOptions(scale_min=0.5, scale_max=0.5, crop=(96, 128))
    x, y = build_augmentation(options, normalisation)(image, mask)
    assert (y != 255).sum() == 48 * 64
    assert x.permute(1, 2, 0)[y == 255].abs().max() < 0.01
    assert x.permute(1, 2, 0)[y != 255].abs().max() > 0.5


def test_the_share_of_padding_is_what_is_void_on_average() -> None:
    torch.manual_seed(0)
    image, mask = np.zeros((30, 40, 3), np.uint8), np.zeros((30, 40), np.uint8)
    for crop in ((60, 50), (20, 80), (30, 40), (8, 8), None):
        options = AugmentOptions(crop=crop, scale_min=0.5, scale_max=2.0)
        augment = build_augmentation(options)
        void = [(augment(image, mask)[1] == IGNORE_INDEX).double().mean().item() for _ in range(400)]
        assert padding_share(options, (30, 40)) == pytest.approx(np.mean(void), abs=4 * np.std(void) / 20 + 0.01)


def test_flip_is_a_flip() -> None:
    image, mask = blocks()
    x, y = build_augmentation(AugmentOptions(scale_min=1, scale_max=1, hflip=1))(image, mask)
    assert torch.equal(x, torch.from_numpy(normalise(image[:, ::-1])))
    assert np.array_equal(y.numpy(), mask[:, ::-1])


def test_scales_cover_the_range() -> None:
    mask = np.zeros((64, 64), np.uint8)
    image = np.zeros((64, 64, 3), np.uint8)
    augment = build_augmentation(AugmentOptions(crop=(128, 128)))
    torch.manual_seed(0)
    scales = [float((augment(image, mask)[1] == 0).sum()) ** 0.5 / 64 for _ in range(120)]
    assert min(scales) == pytest.approx(0.5, abs=0.05)
    assert max(scales) == pytest.approx(2, abs=0.05)
    assert np.mean(scales) == pytest.approx(1.25, abs=0.12)


def test_jitter_changes_colour_only() -> None:
    image, mask = blocks()
    torch.manual_seed(0)
    x, y = build_augmentation(AugmentOptions(scale_min=1, scale_max=1, hflip=0, color_jitter=0.5))(image, mask)
    assert np.array_equal(y.numpy(), mask)
    assert (x - torch.from_numpy(normalise(image))).abs().max() > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale_min": 0}, "expected 0 < scale_min <= scale_max, got 0 and 2.0"),
        ({"scale_min": 3}, "expected 0 < scale_min <= scale_max, got 3 and 2.0"),
        ({"hflip": 1.5}, r"hflip lies in \[0, 1\], not 1.5"),
        ({"color_jitter": -1}, r"color_jitter lies in \[0, 1\], not -1"),
        ({"crop": (0, 5)}, "crop is .* at least 1 pixel"),
    ],
)
def test_wrong_options(options: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        AugmentOptions(**options)


class Numbered:
    """Ten images; image i shows i everywhere."""

    class_names = ("a",)
    palette = np.zeros((1, 3), np.uint8)

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> SegmentationSample:
        image = np.full((64, 64, 3), index, np.uint8)
        return SegmentationSample(name=str(index), image=image, mask=np.full((64, 64), index, np.uint8))


def test_every_epoch_is_another_permutation() -> None:
    stream = TrainingStream(Numbered(), build_augmentation(STILL), iterations=6, batch_size=5, seed=3)
    order = [int(y[0, 0]) for _, y in (stream[k] for k in range(len(stream)))]
    epochs = [order[:10], order[10:20], order[20:]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    with pytest.raises(IndexError):
        stream[30]


def test_resumed_training_sees_the_same_batches_with_any_number_of_workers() -> None:
    dataset = Scenes("train", ScenesOptions(num_train=7, size=(64, 64)))

    def stream(seed: int = 0) -> TrainingStream:
        augment = build_augmentation(AugmentOptions(crop=(64, 64), color_jitter=0.2))
        return TrainingStream(dataset, augment, iterations=6, batch_size=3, seed=seed)

    torch.manual_seed(0)
    whole = list(DataLoader(stream(), batch_size=3))
    torch.manual_seed(1)
    resumed = list(DataLoader(stream(), batch_size=3, sampler=range(4 * 3, 6 * 3), num_workers=2))
    assert len(whole) == 6
    assert len(resumed) == 2
    for (x, y), (x_again, y_again) in zip(whole[4:], resumed, strict=True):
        assert torch.equal(x, x_again)
        assert torch.equal(y, y_again)
    assert not torch.equal(stream(seed=1)[0][0], whole[0][0][0])


def test_the_same_image_is_augmented_anew_and_global_randomness_is_left_alone() -> None:
    augment = build_augmentation(AugmentOptions(crop=(32, 32)))
    stream = TrainingStream(Scenes("train", ScenesOptions(num_train=1)), augment, iterations=2, batch_size=1)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second = stream[0][0], stream[1][0]
    assert torch.equal(torch.rand(3), expected)
    assert not torch.equal(first, second)


def test_an_empty_split_is_refused() -> None:
    empty = Scenes("train", ScenesOptions(num_train=0))
    with pytest.raises(DataError, match="the training split is empty"):
        TrainingStream(empty, build_augmentation(STILL), iterations=1, batch_size=1)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_batch_of_several_sizes_says_what_to_do(num_workers: int) -> None:
    """Sizes differ where images do and no crop is given."""
    dataset = [
        SegmentationSample(name="a", image=np.zeros((n, 8, 3), np.uint8), mask=np.zeros((n, 8), np.uint8))
        for n in (4, 5)
    ]
    stream = TrainingStream(Listed(dataset), build_augmentation(STILL), iterations=1, batch_size=2)
    with pytest.raises(DataError, match=r"one batch has images of the sizes 4x8, 5x8 \(height x width\): say augment"):
        next(iter(DataLoader(stream, 2, collate_fn=stack_samples, num_workers=num_workers)))
    cropped = AugmentOptions(scale_min=1, scale_max=1, crop=(4, 4))
    stream = TrainingStream(Listed(dataset), build_augmentation(cropped), iterations=1, batch_size=2)
    images, masks = next(iter(DataLoader(stream, 2, collate_fn=stack_samples, num_workers=num_workers)))
    assert (images.shape, masks.shape) == ((2, 3, 4, 4), (2, 4, 4))


class Listed(list[SegmentationSample]):
    """A data set of the samples it is given."""

    class_names = ("a", "b")
    palette = np.zeros((2, 3), np.uint8)
