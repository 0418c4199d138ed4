"""Every form of the exit policy gives what the tensor operators define: compiled, NumPy, an ONNX graph.

Thresholds lie away from all confidences, where rounding cannot decide, or exactly on confidences that every form
computes without rounding.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from scipy import ndimage

from messnet.policy import arrays
from messnet.policy.graph import policy_graph
from messnet.policy.labels import load_compiled
from messnet.policy.policy import Policy
from messnet.policy.reference import by_operators, confidence_map, image_confidence, refined_confidence_map

POLICIES = [Policy.parse(f"{c}+{r}") for c in ("top1", "entropy") for r in ("native", "none")]
WITHOUT_TORCH = """
import sys
import numpy as np
for name in ("torch", "numba", "cv2"):
    sys.modules[name] = None
from messnet.policy import arrays
from messnet.policy.policy import Policy
given, found = np.load(sys.argv[1]), {}
for name in given["policies"].tolist():
    policy = Policy.parse(name)
    for case in given["cases"].tolist():
        thresholds = given[f"{name} {case} thresholds"]
        found[f"{name} {case} shares"] = arrays.image_confidence(given[case], 8, (1, 1), thresholds, policy)
        before, after = arrays.refined_confidence_map(given[case], 8, (1, 1), policy)
        found[f"{name} {case} before"], found[f"{name} {case} after"] = before, after
np.savez(sys.argv[2], **found)
"""


def real_like(num_classes: int, size: tuple[int, int], scale: float = 30.0) -> np.ndarray:
    """Blobs, as a network predicts them; of two images the second is noise of the same strength."""
    rng = np.random.default_rng(num_classes)
    noise = rng.standard_normal((2, num_classes, *size))
    noise[0] = ndimage.gaussian_filter(noise[0], (0, 2, 2)) * 8
    return (noise * scale / 8).astype(np.float32)


def tied(size: tuple[int, int]) -> np.ndarray:
    """Logits of 0 or far below: one, two or four classes tie, and a confidence is exactly 1, 1/2 or 1/4."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 3, (size[0] // 3 + 1, size[1] // 3 + 1)).repeat(3, 0).repeat(3, 1)[: size[0], : size[1]]
    first = rng.integers(0, 5, blocks.shape).repeat(1, 0)
    logits = np.full((1, 8, *size), -300, np.float32)
    for k in range(4):
        np.put_along_axis(logits[0], ((first + k) % 8)[None], np.where(k < 2**blocks, 0, -300)[None], 0)
    return logits


CASES: dict[str, np.ndarray] = {
    "5 classes": real_like(5, (22, 30)),
    "21 classes": real_like(21, (33, 41)),
    "2 classes": real_like(2, (16, 9)),
    "150 classes": real_like(150, (9, 17)),
    "ties": tied((20, 26)),
    "one pixel": real_like(5, (1, 1)),
    "one row": real_like(5, (1, 13)),
    "one column": real_like(5, (13, 1)),
    "two by two": real_like(3, (2, 2)),
    "one label everywhere": real_like(4, (12, 12)) + np.float32([90, 0, 0, 0])[:, None, None],
}


def thresholds_of(case: str, policy: Policy) -> np.ndarray:
    """In the middle of wide gaps between confidences, from all over their range; of ties their own values, which are
    exact, too."""
    values = np.unique(confidence_map(torch.from_numpy(CASES[case]), policy.confidence).numpy().astype(np.float64))
    values = np.concatenate([[0.0], values, [1.1]])
    gaps = np.diff(values)
    widest = np.array([part[gaps[part].argmax()] for part in np.array_split(np.arange(len(gaps)), 12) if len(part)])
    widest = widest[gaps[widest] > 1e-5]
    middles = (values[widest] + values[widest + 1]) / 2
    exact = [0.25, 0.5, 1.0] if case == "ties" and policy.confidence == "top1" else []
    return np.sort(np.concatenate([middles, exact])).astype(np.float32)


def operators(case: str, policy: Policy) -> np.ndarray:
    thresholds = torch.from_numpy(thresholds_of(case, policy))
    return by_operators(torch.from_numpy(CASES[case]), 8, (1, 1), thresholds, policy).numpy()


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What ``arrays`` gives in a process that has neither torch nor numba."""
    folder: Path = tmp_path_factory.mktemp("forms")
    given = {f"{policy.name} {case} thresholds": thresholds_of(case, policy) for policy in POLICIES for case in CASES}
    names = {"policies": np.array([policy.name for policy in POLICIES]), "cases": np.array(list(CASES))}
    np.savez(folder / "given.npz", **CASES, **given, **names)
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, folder / "given.npz", folder / "found.npz"], check=True)
    with np.load(folder / "found.npz") as found:
        return dict(found)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_every_form_counts_alike(policy: Policy, case: str, without_torch: dict[str, np.ndarray]) -> None:
    logits, thresholds, expected = CASES[case], thresholds_of(case, policy), operators(case, policy)
    np.testing.assert_array_equal(without_torch[f"{policy.name} {case} shares"], expected)
    assert load_compiled()
    np.testing.assert_array_equal(arrays.image_confidence(logits, 8, (1, 1), thresholds, policy), expected)
    by_tensors = image_confidence(torch.from_numpy(logits), 8, (1, 1), torch.from_numpy(thresholds), policy)
    np.testing.assert_array_equal(by_tensors.numpy(), expected)
    session = onnxruntime.InferenceSession(policy_graph(policy, logits.shape[1]), providers=["CPUExecutionProvider"])
    for t, threshold in enumerate(thresholds):
        found = session.run(["confidence"], {"logits": logits, "pixel_threshold": threshold[None]})[0]
        np.testing.assert_array_equal(found, expected[:, t])


def test_the_cases_tell_forms_apart() -> None:
    """Shares vary, ties are ties, and the refinement changes what is counted."""
    shares = np.concatenate([operators(case, POLICIES[0]).ravel() for case in CASES])
    assert len(np.unique(shares)) > 30
    top = CASES["ties"].max(1, keepdims=True)
    assert set(np.unique((CASES["ties"] == top).sum(1)).tolist()) == {1, 2, 4}
    native, none = (operators("5 classes", Policy(refinement=form)) for form in ("native", "none"))
    assert (native != none).any()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_maps_are_those_of_the_operators(policy: Policy, case: str, without_torch: dict[str, np.ndarray]) -> None:
    """To the rounding of an exponential."""
    expected = refined_confidence_map(torch.from_numpy(CASES[case]), 8, (1, 1), policy)
    for name, one in zip(("before", "after"), expected, strict=True):
        found = without_torch[f"{policy.name} {case} {name}"]
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, one.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["top1+paper", "entropy+paper"])
def test_the_papers_literal_form_is_left_to_torch(name: str) -> None:
    logits, policy = real_like(5, (11, 15)), Policy.parse(name)
    tensor, size = torch.from_numpy(logits), (88, 120)
    expected = by_operators(tensor, 8, size, [0.3, 0.7], policy).numpy()
    np.testing.assert_array_equal(arrays.image_confidence(logits, 8, size, [0.3, 0.7], policy), expected)
    maps = refined_confidence_map(tensor, 8, size, policy)
    for found, one in zip(arrays.refined_confidence_map(logits, 8, size, policy), maps, strict=True):
        np.testing.assert_array_equal(found, one.numpy())


@pytest.mark.parametrize("size", [(88, 120), (22, 30), (11, 15), (93, 41), (1, 1)])
def test_maps_at_the_inputs_size_are_torchs_nearest(size: tuple[int, int]) -> None:
    maps = np.random.default_rng(0).random((2, 11, 15)).astype(np.float32)
    expected = torch.nn.functional.interpolate(torch.from_numpy(maps)[None], size=size, mode="nearest")[0]
    np.testing.assert_array_equal(arrays.nearest(maps, size), expected.numpy())
