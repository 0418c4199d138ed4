"""Labels at the input's size against torch, in NumPy and compiled."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from messnet.policy.labels import first_largest, load_compiled, upsampled_labels

SIZES = [(1, 1), (37, 50), (200, 130), (5, 4), (9, 7)]
BY_NUMPY = """
import sys
import numpy as np
sys.modules["numba"] = sys.modules["torch"] = None
from messnet.policy.labels import load_compiled, upsampled_labels
assert not load_compiled()
cases = np.load(sys.argv[1])
np.savez(sys.argv[2], **{name: upsampled_labels(cases[name], eval(name.split(" ", 1)[1]), threads=2) for name in cases})
"""


def neighbours(num_images: int, num_classes: int, size: tuple[int, int]) -> np.ndarray:
    """Neighbouring float32 values: where an upsampled logit is rounded decides the label."""
    steps = np.random.default_rng(0).integers(0, 3, (num_images, num_classes, *size)).astype(np.int32)
    return (np.float32(3.7).view(np.int32) + steps).view(np.float32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_classes", [1, 2, 4, 256])
def test_labels_at_the_input(size: tuple[int, int], num_classes: int) -> None:
    logits = torch.randn(2, num_classes, 9, 7, generator=torch.Generator().manual_seed(1))
    expected = F.interpolate(logits, size, mode="bilinear", align_corners=False).argmax(1).numpy()
    for threads in (1, 2, 7):
        found = upsampled_labels(logits.numpy(), size, threads=threads)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, expected)


def test_of_equal_logits_the_first_class_counts() -> None:
    logits = np.random.default_rng(0).integers(-2, 3, (2, 9, 12, 14)).astype(np.float32)
    assert ((logits == logits.max(1, keepdims=True)).sum(1) > 1).any()
    np.testing.assert_array_equal(first_largest(logits), logits.argmax(1))
    np.testing.assert_array_equal(upsampled_labels(logits, (12, 14)), logits.argmax(1))


def test_without_numba_and_torch_labels_are_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    kinds = {"noise": rng.standard_normal((2, 256, 9, 7)).astype(np.float32), "neighbours": neighbours(1, 5, (30, 40))}
    cases = {f"{kind} {size}": logits for kind, logits in kinds.items() for size in [*SIZES, (171, 233)]}
    np.savez(tmp_path / "logits.npz", **cases)
    subprocess.run([sys.executable, "-c", BY_NUMPY, tmp_path / "logits.npz", tmp_path / "labels.npz"], check=True)
    assert load_compiled()
    with np.load(tmp_path / "labels.npz") as by_numpy:
        for name, logits in cases.items():
            compiled = upsampled_labels(logits, eval(name.split(" ", 1)[1]))
            np.testing.assert_array_equal(by_numpy[name], compiled, err_msg=name)
