"""The compiled pass against SciPy, and against the tensor operators where rounding could tell them apart."""

import numpy as np
import pytest
import torch
from scipy import ndimage, special, stats

from messnet.policy import reference
from messnet.policy.compiled import confident_share
from messnet.policy.policy import Policy
from messnet.policy.reference import confidence_map, image_confidence

FORMS = [Policy.parse(f"{confidence}+{form}") for confidence in ("top1", "entropy") for form in ("native", "none")]
THRESHOLDS = np.linspace(0.05, 0.95, 19, dtype=np.float32)


def noise(num_images: int, num_classes: int, size: tuple[int, int], scale: float, seed: int = 0) -> torch.Tensor:
    """Blobs, as a network predicts them."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.standard_normal((num_images, num_classes, *size)), (0, 0, 2, 2))
    return torch.from_numpy(smooth * scale).float()


def count(logits: torch.Tensor, policy: Policy, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    entropy, refine = policy.confidence == "entropy", policy.refinement == "native"
    shares, certain = confident_share(logits.numpy(), thresholds, entropy=entropy, refine=refine)
    return np.rint(shares * (logits.shape[2] * logits.shape[3])).astype(int), certain


def by_operators(logits: torch.Tensor, policy: Policy, thresholds: np.ndarray) -> np.ndarray:
    return reference.by_operators(logits, 8, (1, 1), torch.from_numpy(thresholds), policy).numpy()


def by_scipy(logits: torch.Tensor, policy: Policy, threshold: float) -> list[int]:
    """Softmax, boundaries, dilation and median written out, in float64."""
    counts = []
    for one in logits.double().numpy():
        p, labels = special.softmax(one, axis=0), one.argmax(0)
        confidence = p.max(0) if policy.confidence == "top1" else 1 - stats.entropy(p, base=len(p))
        if policy.refinement == "native":
            cross = ndimage.generate_binary_structure(2, 1)
            largest = ndimage.maximum_filter(labels, footprint=cross, mode="nearest")
            smallest = ndimage.minimum_filter(labels, footprint=cross, mode="nearest")
            near = ndimage.binary_dilation(largest != smallest, np.ones((3, 3)))
            confidence = np.where(near, ndimage.median_filter(confidence, 5, mode="nearest"), confidence)
        counts.append(int((confidence >= threshold).sum()))
    return counts


@pytest.mark.parametrize("policy", FORMS, ids=lambda policy: policy.name)
@pytest.mark.parametrize(
    ("num_classes", "size"), [(2, (13, 40)), (21, (31, 64)), (150, (9, 17)), (5, (2, 2)), (7, (3, 2))]
)
def test_counts_equal_scipy(policy: Policy, num_classes: int, size: tuple[int, int]) -> None:
    logits = noise(2, num_classes, size, 40)
    counts, certain = count(logits, policy, THRESHOLDS)
    assert certain.any()
    expected = np.array([by_scipy(logits, policy, threshold) for threshold in THRESHOLDS.astype(float)]).T
    np.testing.assert_array_equal(counts[certain], expected[certain])


@pytest.mark.parametrize("policy", FORMS, ids=lambda policy: policy.name)
@pytest.mark.parametrize("num_classes", [2, 21, 150])
@pytest.mark.parametrize("scale", [0.1, 10, 1000])
def test_the_closest_thresholds_are_decided_as_by_the_operators(policy: Policy, num_classes: int, scale: float) -> None:
    """Thresholds at confidences that occur and up to 64 float32 beside them: on both sides of the tolerance."""
    logits = noise(2, num_classes, (12, 19), scale)
    own = confidence_map(logits, policy.confidence).numpy().ravel()[::23].view(np.int32)
    thresholds = np.unique((own[:, None] + np.array([-64, -24, -5, -1, 0, 1, 5, 24, 64], np.int32)).ravel())
    thresholds = np.clip(thresholds.astype(np.int32).view(np.float32), 0, 1)
    expected = by_operators(logits, policy, thresholds)
    found = image_confidence(logits, 8, (1, 1), thresholds, policy).numpy()
    np.testing.assert_array_equal(found, expected)
    for threshold, shares in zip(thresholds[:, None], expected.T, strict=True):
        counts, certain = count(logits, policy, threshold)
        equal = (counts[:, 0] / (12 * 19)).astype(np.float32) == shares
        assert (equal | ~certain).all()


@pytest.mark.parametrize("policy", FORMS, ids=lambda policy: policy.name)
def test_doubt_is_rare_and_settled_by_the_operators(policy: Policy) -> None:
    logits = noise(40, 11, (30, 40), 40)
    certain = count(logits, policy, np.array([0.9], np.float32))[1]
    assert certain.mean() >= 0.9
    # At a confidence that occurs, the image in which it occurs is always in doubt.
    occurs = confidence_map(logits[:1], policy.confidence).numpy().ravel()[7::100]
    for threshold in occurs[:, None]:
        assert not count(logits[:1], policy, threshold)[1].any()
        settled = image_confidence(logits, 8, (1, 1), threshold, policy).numpy()
        np.testing.assert_array_equal(settled, by_operators(logits, policy, threshold))


@pytest.mark.parametrize("policy", FORMS, ids=lambda policy: policy.name)
def test_any_layout_and_dtype_counts_alike(policy: Policy) -> None:
    logits = noise(3, 6, (20, 31), 20).bfloat16()
    expected = by_operators(logits, policy, THRESHOLDS)
    views = (logits, logits.float(), logits.double(), logits.to(memory_format=torch.channels_last))
    strided = torch.stack([logits, logits], 4)[..., 1]
    for view in (*views, strided, logits.float().requires_grad_()):
        found = image_confidence(view, 8, (1, 1), THRESHOLDS, policy)
        np.testing.assert_array_equal(found.numpy(), expected)
    with torch.inference_mode():
        np.testing.assert_array_equal(image_confidence(logits * 1, 8, (1, 1), THRESHOLDS, policy).numpy(), expected)


@pytest.mark.parametrize("policy", FORMS, ids=lambda policy: policy.name)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, -3e38])
def test_values_beyond_the_usual_are_decided_as_by_the_operators(policy: Policy, value: float) -> None:
    logits = noise(3, 4, (8, 9), 5)
    logits[1, 2, 3, 4] = value
    logits[2, :, 1] = value
    thresholds = np.array([0, 0.3, 0.9, 1], np.float32)
    found = image_confidence(logits, 8, (1, 1), thresholds, policy).numpy()
    np.testing.assert_array_equal(found, by_operators(logits, policy, thresholds))
