"""The operators against OpenCV, scikit-image, SciPy and brute force."""

import cv2
import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.morphology import footprint_rectangle
from skimage.segmentation import find_boundaries

from messnet.policy.edges import canny_edges, label_boundary, thicken, window_majority, window_median


def label_maps(num_classes: int = 6, size: tuple[int, int] = (45, 60), num_images: int = 3) -> torch.Tensor:
    """Blobs, as a network predicts them."""
    rng = np.random.default_rng(num_classes)
    noise = rng.standard_normal((num_images, num_classes, *size))
    return torch.from_numpy(ndimage.gaussian_filter(noise, (0, 0, 4, 4)).argmax(1))


def confidence_maps(kind: str) -> torch.Tensor:
    rng = np.random.default_rng(0)
    noise = rng.random((2, 23, 31), np.float32)
    match kind:
        case "random":
            return torch.from_numpy(noise)
        case "smooth":
            return torch.from_numpy(ndimage.gaussian_filter(noise, (0, 3, 3)))
        case "ties":  # 4 levels: every window holds many equal values
            return torch.from_numpy((noise * 4).astype(np.int32) / np.float32(4))
        case _:  # saturated softmax
            return torch.from_numpy(np.where(noise > 0.4, np.float32(1), noise))


@pytest.mark.parametrize("num_classes", [2, 6, 21])
def test_label_boundary_equals_scikit_image(num_classes: int) -> None:
    labels = label_maps(num_classes)
    expected = [find_boundaries(one, connectivity=1, mode="thick") for one in labels.numpy()]
    np.testing.assert_array_equal(label_boundary(labels).numpy(), np.stack(expected))


def test_label_boundary_does_not_wrap_around_the_image() -> None:
    labels = torch.zeros(1, 4, 6, dtype=torch.uint8)
    labels[:, :, 3:] = 7  # the left and the right border differ: no boundary between them
    assert label_boundary(labels)[0].int().sum(0).tolist() == [0, 0, 4, 4, 0, 0]
    assert not label_boundary(torch.ones(2, 5, 5, dtype=torch.int64)).any()


def test_label_boundary_is_independent_of_class_numbering() -> None:
    labels = label_maps(21)
    renumbered = torch.randperm(21, generator=torch.Generator().manual_seed(1))[labels]
    assert torch.equal(label_boundary(labels), label_boundary(renumbered))
    assert not torch.equal(canny_edges(labels), canny_edges(renumbered))  # why the native form is the default


@pytest.mark.parametrize("num_classes", [2, 6, 21])
def test_canny_keeps_every_boundary_and_adds_none(num_classes: int) -> None:
    labels = label_maps(num_classes)
    edges, boundary = canny_edges(labels), label_boundary(labels)
    assert edges.dtype == torch.bool
    diagonal_too = np.stack([find_boundaries(one, connectivity=2) for one in labels.numpy()])
    assert not (edges.numpy() & ~diagonal_too).any()
    assert (boundary & ~thicken(edges, 2)).sum() <= 0.01 * boundary.sum()


def test_canny_thresholds_of_0_equal_scaled_labels() -> None:
    labels = label_maps(21)
    scaled = [cv2.Canny(one.astype(np.uint8) * 12, 1, 2) > 0 for one in labels.numpy()]
    np.testing.assert_array_equal(canny_edges(labels).numpy(), np.stack(scaled))


def test_the_papers_literal_erosion_of_edges_leaves_nothing() -> None:
    edges = canny_edges(label_maps(21, (128, 128)))
    assert edges.sum() > 1000
    square = np.ones((3, 3), np.uint8)
    assert sum(int(cv2.erode(one, square).sum()) for one in edges.numpy().astype(np.uint8)) == 0


@pytest.mark.parametrize("radius", [1, 2, 8, 40])  # 40: a window larger than the map
def test_thicken_equals_dilation_by_a_square(radius: int) -> None:
    mask = canny_edges(label_maps())
    square = footprint_rectangle((2 * radius + 1, 2 * radius + 1))
    expected = [ndimage.binary_dilation(one, square) for one in mask.numpy()]
    np.testing.assert_array_equal(thicken(mask, radius).numpy(), np.stack(expected))


@pytest.mark.parametrize("radius", [1, 2, 8])
@pytest.mark.parametrize("kind", ["random", "smooth", "ties", "saturated"])
def test_majority_decides_as_scipys_median_at_every_threshold(kind: str, radius: int) -> None:
    confidence = confidence_maps(kind)
    side = 2 * radius + 1
    median = np.stack([ndimage.median_filter(one, (side, side), mode="nearest") for one in confidence.numpy()])
    np.testing.assert_array_equal(window_median(confidence, radius).numpy(), median)
    # thresholds that occur in the map are the ties; those beside them are the nearest misses
    values = np.unique(confidence.numpy())
    values = values[:: max(1, len(values) // 60)]
    for threshold in np.concatenate([values, np.nextafter(values, np.float32(2)), [0.0, 0.5, 1.0]]).astype(np.float32):
        decided = window_majority(confidence >= torch.tensor(threshold), radius)
        np.testing.assert_array_equal(decided.numpy(), median >= threshold)


def test_majority_and_median_against_brute_force() -> None:
    confidence, radius = confidence_maps("ties")[:1, :7, :9], 2
    for y in range(7):
        for x in range(9):
            rows = [min(max(y + dy, 0), 6) for dy in range(-radius, radius + 1)]
            columns = [min(max(x + dx, 0), 8) for dx in range(-radius, radius + 1)]
            window = sorted(float(confidence[0, row, column]) for row in rows for column in columns)
            assert window_median(confidence, radius)[0, y, x] == window[12]
            assert window_majority(confidence >= 0.5, radius)[0, y, x] == (sum(v >= 0.5 for v in window) > 12.5)


def test_majority_of_a_large_map_counts_exactly() -> None:
    mask = torch.rand(1, 600, 700, generator=torch.Generator().manual_seed(0)) < 0.5
    padded = np.pad(mask[0].numpy(), 32, mode="edge").astype(np.int64)
    count = np.lib.stride_tricks.sliding_window_view(padded, (65, 65))[::37, ::41].sum((2, 3))
    np.testing.assert_array_equal(window_majority(mask, 32)[0, ::37, ::41].numpy(), count > 65 * 65 / 2)


def test_median_is_computed_only_where_asked() -> None:
    confidence = confidence_maps("random")
    where = confidence > 0.7
    refined = window_median(confidence, 2, where)
    assert torch.equal(refined[~where], confidence[~where])
    assert torch.equal(refined[where], window_median(confidence, 2)[where])


@pytest.mark.parametrize("dimensions", [3, 4])
def test_operators_treat_every_map_alone(dimensions: int) -> None:
    mask = torch.rand(6, 20, 17, generator=torch.Generator().manual_seed(0)) < 0.4
    batch = mask if dimensions == 3 else mask.view(2, 3, 20, 17)
    for operator in (window_majority, thicken):
        alone = torch.cat([operator(mask[i : i + 1], 2) for i in range(6)])
        assert torch.equal(operator(batch, 2).view(6, 20, 17), alone)
