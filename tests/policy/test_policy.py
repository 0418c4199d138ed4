"""Confidence and decision against SciPy and the literal median, and what must not change them."""

import numpy as np
import pytest
import torch
from scipy import ndimage, special, stats

from messnet.errors import RecipeError
from messnet.policy.policy import Policy
from messnet.policy.reference import (
    _below_top,
    _labels,
    confidence_map,
    image_confidence,
    refined_confidence_map,
    should_exit,
)

POLICIES = [Policy.parse(f"{c}+{r}") for c in ("top1", "entropy") for r in ("native", "paper", "none")]
SIZE, STRIDE = (88, 120), 8
THRESHOLDS = torch.linspace(0, 1, 21, dtype=torch.float64)


def smooth_logits(num_images: int = 3, num_classes: int = 5, scale: float = 30.0) -> torch.Tensor:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((num_images, num_classes, SIZE[0] // STRIDE, SIZE[1] // STRIDE))
    return torch.from_numpy(ndimage.gaussian_filter(noise, (0, 0, 2, 2)) * scale).float()


def test_policy_names_round_trip() -> None:
    assert Policy().name == "top1+native"
    assert len({policy.name for policy in POLICIES}) == 6
    assert all(Policy.parse(policy.name) == policy for policy in POLICIES)


BAD_NAMES = ["", "top1", "top1+", "top2+native", "native+top1", "top1+native+none", "top1+share"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_an_unknown_policy_lists_the_options(name: str) -> None:
    with pytest.raises(RecipeError, match=r"top1 or entropy, \+, native, paper, none, such as top1\+native"):
        Policy.parse(name)


def test_confidence_equals_scipy() -> None:
    logits = smooth_logits()
    p = special.softmax(logits.double().numpy(), axis=1)
    np.testing.assert_allclose(confidence_map(logits, "top1").numpy(), p.max(1), atol=1e-6)
    entropy = stats.entropy(p, base=p.shape[1], axis=1)
    np.testing.assert_allclose(confidence_map(logits, "entropy").numpy(), 1 - entropy, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["top1", "entropy"])
def test_confidence_is_float32_within_0_and_1(kind: str, dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0], [30000.0, 0.0, 0.0], [30000.0, 30000.0, -30000.0], [0.1, 0.2, 0.3]])
    confidence = confidence_map(logits.T[None, :, :, None].to(dtype), kind)
    assert confidence.dtype == torch.float32
    assert ((confidence >= 0) & (confidence <= 1)).all()  # no NaN either
    uniform, sure, torn = confidence.flatten()[:3].tolist()
    assert uniform == pytest.approx(1 / 3 if kind == "top1" else 0, abs=1e-6)
    assert sure == 1
    assert torn == pytest.approx(0.5 if kind == "top1" else 1 - np.log(2) / np.log(3), abs=1e-6)


def test_bfloat16_logits_are_not_reduced_in_bfloat16() -> None:
    logits = smooth_logits().bfloat16()
    for kind in ("top1", "entropy"):
        assert torch.equal(confidence_map(logits, kind), confidence_map(logits.float(), kind))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_image_confidence_counts_what_the_literal_median_gives(policy: Policy) -> None:
    logits = smooth_logits()
    before, after = refined_confidence_map(logits, STRIDE, SIZE, policy)
    assert before.shape == after.shape == (3, *(SIZE if policy.refinement == "paper" else logits.shape[2:]))
    assert torch.equal(before, after) == (policy.refinement == "none")
    thresholds = torch.cat([THRESHOLDS.float(), after.flatten()[:: max(1, after.numel() // 30)]])  # the latter: ties
    share = (after.numpy()[:, None] >= thresholds.numpy()[:, None, None]).mean((2, 3), dtype=np.float64)
    counted = image_confidence(logits, STRIDE, SIZE, thresholds, policy)
    assert counted.dtype == torch.float32
    np.testing.assert_array_equal(counted.numpy(), share.astype(np.float32))


def test_native_form_is_written_out() -> None:
    logits = smooth_logits(1)
    labels, confidence = logits[0].argmax(0).numpy(), confidence_map(logits, "top1")[0].numpy()
    largest, smallest = (
        f(labels, footprint=ndimage.generate_binary_structure(2, 1), mode="nearest")
        for f in (ndimage.maximum_filter, ndimage.minimum_filter)
    )
    near_edge = ndimage.binary_dilation(largest != smallest, np.ones((3, 3)))
    expected = np.where(near_edge, ndimage.median_filter(confidence, (5, 5), mode="nearest"), confidence)
    assert 0 < near_edge.mean() < 1
    np.testing.assert_array_equal(refined_confidence_map(logits, STRIDE, SIZE, Policy())[1][0].numpy(), expected)


@pytest.mark.parametrize("confidence", ["top1", "entropy"])
def test_native_form_is_independent_of_class_numbering(confidence: str) -> None:
    logits = smooth_logits(num_classes=7)
    order = torch.tensor([3, 6, 0, 5, 1, 4, 2])
    policy = Policy.parse(f"{confidence}+native")
    a, b = (image_confidence(x, STRIDE, SIZE, THRESHOLDS, policy) for x in (logits, logits[:, order]))
    # sums over classes in another order may differ in the last bit of a pixel; thresholds here hit none
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@pytest.mark.parametrize("size", [(11, 15), (8, 16)])
def test_an_image_decides_alike_in_any_batch(policy: Policy, size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 5, *size, generator=generator) * 3
    together = image_confidence(logits, STRIDE, SIZE, THRESHOLDS, policy)
    alone = [image_confidence(one[None], STRIDE, SIZE, THRESHOLDS, policy) for one in logits]
    assert torch.equal(together, torch.cat(alone))
    each_threshold = [image_confidence(logits, STRIDE, SIZE, [th], policy) for th in THRESHOLDS.tolist()]
    assert torch.equal(together, torch.cat(each_threshold, 1))


def test_a_threshold_of_1_is_not_never() -> None:
    saturated = torch.zeros(1, 5, 6, 6)
    saturated[:, 2] = 200.0
    for policy in POLICIES:
        share = image_confidence(saturated, STRIDE, (48, 48), [1.0], policy)
        assert should_exit(share[:, 0], 1.0).all()


def test_image_confidence_falls_with_the_threshold() -> None:
    for policy in POLICIES:
        share = image_confidence(smooth_logits(), STRIDE, SIZE, THRESHOLDS, policy)
        assert (share[:, 0] == 1).all()  # every pixel is at least 0 sure
        assert (share.diff(dim=1) <= 0).all()


def test_should_exit_compares_as_the_search_does() -> None:
    table = np.array([0.1, 0.7, 1 / 3], np.float32)
    for threshold in [0.1, 0.7, 1 / 3, *table.astype(np.float64), *np.nextafter(table.astype(np.float64), 1)]:
        searched = table >= np.array([threshold])  # float32 against a float64 array: float64
        np.testing.assert_array_equal(should_exit(torch.from_numpy(table), float(threshold)).numpy(), searched)
    just_above = float(np.nextafter(np.float64(table[1]), 1))
    assert not should_exit(torch.from_numpy(table[1:2]), just_above).any()
    assert (torch.from_numpy(table[1:2]) >= just_above).all()  # what a plain comparison would have said


def test_labels_are_argmax_with_ties() -> None:
    logits = torch.randint(-2, 3, (2, 9, 12, 14), generator=torch.Generator().manual_seed(0)).float()
    assert ((logits == logits.amax(1, keepdim=True)).sum(1) > 1).any()
    for layout in (torch.contiguous_format, torch.channels_last):
        labels = _labels(_below_top(logits.to(memory_format=layout)))
        np.testing.assert_array_equal(labels.numpy(), logits.numpy().argmax(1))  # the first of equals


@pytest.mark.parametrize("name", ["top1+mean", "entropy+patches", "top1+classes:8+9"])
def test_policies_of_before_say_what_to_do(name: str) -> None:
    with pytest.raises(RecipeError, match=r"did not pay, and is gone: evaluate and search again with top1\+native"):
        Policy.parse(name)
