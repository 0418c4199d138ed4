"""The exit policy in NumPy, for what is deployed without torch; ``reference`` defines it and gives the formulas.

Counts of confident pixels are those of the compiled pass where that has been loaded, see ``load_compiled``. NumPy and
torch round the exponentials of a softmax differently in the last bit, so confidences agree to about 1e-6 and counts
agree unless a pixel's confidence lies that close to the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from messnet.errors import needing_extras
from messnet.policy.labels import first_largest, loaded_compiled
from messnet.policy.policy import Confidence, Policy

if TYPE_CHECKING:
    from torch import Tensor

FloatMap = NDArray[np.float32]
BoolMap = NDArray[np.bool_]
Pixel = TypeVar("Pixel", np.float32, np.uint8)

# Half the side of the window whose median the native form takes, in pixels of the logits.
_RADIUS = 2


def confidence_map(logits: NDArray[np.float32], kind: Confidence) -> FloatMap:
    """Confidence per pixel, eq. (1): logits (N, K, h, w) float32, K >= 2 -> (N, h, w) float32 in [0, 1]."""
    below = logits - logits.max(1, keepdims=True)
    terms = np.exp(below)
    total: FloatMap = terms.sum(1)
    if kind == "top1":  # the largest term of the softmax is exp(0) = 1
        return np.reciprocal(total)
    # H = -sum p log p with log p = below - log total.
    entropy = np.log(total) - (terms * below).sum(1) / total
    confidence: FloatMap = 1 - entropy / np.float32(math.log(logits.shape[1]))
    return np.clip(confidence, 0, 1)  # uniform p: rounding may leave -1e-7


def image_confidence(
    logits: NDArray[np.float32],
    output_stride: int,
    input_size: tuple[int, int],
    pixel_thresholds: Sequence[float] | NDArray[np.float32],
    policy: Policy,
    *,
    by_torch: bool = False,
) -> NDArray[np.float32]:
    """Share of confident pixels, c_img of eq. (3), at each pixel threshold: logits (N, K, h, w) float32 -> (N, T)
    float32 in [0, 1].

    ``by_torch`` leaves it to ``reference``, to the bit of exit tables; so does the "paper" form, which alone reads
    ``output_stride`` and ``input_size``. Raises MessError where torch is not installed.
    """
    thresholds = np.ascontiguousarray(pixel_thresholds, np.float32)
    if by_torch or policy.refinement == "paper":
        reference, given = _in_torch(logits)
        exact: NDArray[np.float32] = reference.image_confidence(
            given, output_stride, input_size, thresholds, policy
        ).numpy()
        return exact
    compiled = loaded_compiled()
    if compiled is None:
        return _counted(logits, thresholds, policy)
    native = policy.refinement == "native"
    shares: NDArray[np.float32]
    shares, certain = compiled.confident_share(
        logits, thresholds, entropy=policy.confidence == "entropy", refine=native
    )
    if not certain.all():
        shares[~certain] = _counted(logits[~certain], thresholds, policy)
    return shares


def refined_confidence_map(
    logits: NDArray[np.float32],
    output_stride: int,
    input_size: tuple[int, int],
    policy: Policy,
    *,
    by_torch: bool = False,
) -> tuple[FloatMap, FloatMap]:
    """The confidence map before and after edge refinement, eq. (1) and (2): logits (N, K, h, w) float32 -> two
    (N, h, w) float32 in [0, 1]; (N, H, W) for the "paper" form. ``by_torch`` and errors as for ``image_confidence``.
    """
    if by_torch or policy.refinement == "paper":
        reference, given = _in_torch(logits)
        before, after = reference.refined_confidence_map(given, output_stride, input_size, policy)
        return before.numpy(), after.numpy()
    confidence = confidence_map(logits, policy.confidence)
    if policy.refinement == "none":
        return confidence, confidence
    return confidence, _window_median(confidence, _near_boundaries(first_largest(logits)))


def nearest(maps: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Maps (..., h, w) at ``size`` (H, W): each pixel takes the value of the pixel that it lies in, as
    ``torch.nn.functional.interpolate(mode="nearest")``."""
    rows, columns = (
        np.minimum(np.floor(np.arange(to, dtype=np.float32) * np.float32(length / to)), length - 1).astype(np.intp)
        for length, to in zip(maps.shape[-2:], size, strict=True)
    )
    return maps[..., rows[:, None], columns]


def _counted(logits: NDArray[np.float32], thresholds: NDArray[np.float32], policy: Policy) -> NDArray[np.float32]:
    confidence = confidence_map(logits, policy.confidence)
    near = _near_boundaries(first_largest(logits)) if policy.refinement == "native" else None
    shares = np.empty((len(logits), len(thresholds)), np.float32)
    for t, threshold in enumerate(thresholds):
        confident = confidence >= threshold
        if near is not None:
            confident = np.where(near, _majority(confident), confident)
        # A whole number divided in float64, then rounded: the same float32 wherever it is computed.
        shares[:, t] = np.count_nonzero(confident, (1, 2)) / confidence[0].size
    return shares


def _near_boundaries(labels: NDArray[np.uint8]) -> BoolMap:
    """M of eq. (2): pixels at most one step, diagonals included, from one with a 4-neighbour of another label."""
    boundary = np.zeros(labels.shape, np.bool_)
    across = labels[:, :, 1:] != labels[:, :, :-1]
    down = labels[:, 1:] != labels[:, :-1]
    boundary[:, :, 1:] |= across
    boundary[:, :, :-1] |= across
    boundary[:, 1:] |= down
    boundary[:, :-1] |= down
    # A square is a row of a column.
    for axis in (1, 2):
        once = np.moveaxis(boundary.copy(), axis, 0)
        grown = np.moveaxis(boundary, axis, 0)
        grown[1:] |= once[:-1]
        grown[:-1] |= once[1:]
    return boundary


def _majority(confident: BoolMap) -> BoolMap:
    """Where more than half of the 5 x 5 window is set, which is where its median is. Beyond the border the nearest
    pixel repeats, so that every window holds an odd number."""
    side, (height, width) = 2 * _RADIUS + 1, confident.shape[1:]
    padded = _padded(confident.view(np.uint8))
    # A sum of shifted maps: five rows, then five columns of those sums, at most 25 in a byte.
    rows = sum(padded[:, k : k + height] for k in range(1, side)) + padded[:, :height]
    counts = sum(rows[:, :, k : k + width] for k in range(1, side)) + rows[:, :, :width]
    majority: BoolMap = counts > side**2 // 2
    return majority


def _window_median(confidence: FloatMap, where: BoolMap) -> FloatMap:
    """The median of the 5 x 5 window in the pixels of ``where``, the confidence itself in the others."""
    side = 2 * _RADIUS + 1
    windows = np.lib.stride_tricks.sliding_window_view(_padded(confidence), (side, side), (1, 2))
    refined = confidence.copy()
    refined[where] = np.partition(windows[where].reshape(-1, side**2), side**2 // 2, axis=1)[:, side**2 // 2]
    return refined


def _padded(maps: NDArray[Pixel]) -> NDArray[Pixel]:
    return np.pad(maps, ((0, 0), (_RADIUS, _RADIUS), (_RADIUS, _RADIUS)), mode="edge")


def _in_torch(logits: NDArray[np.float32]) -> tuple[ModuleType, Tensor]:
    """The policy's definition in torch, and the logits as it takes them. Raises MessError where torch is missing."""
    with needing_extras():
        import torch

        from messnet.policy import reference
    return reference, torch.from_numpy(np.ascontiguousarray(logits))
