"""The exit policy: how sure is an exit of one image, and may the image stop there? (method.md section 7)

    c_map = confidence_map(logits)                                       per pixel, [0, 1]          (1)
    M     = pixels near the semantic edges of argmax(logits); there c_map becomes its window's median   (2)
    c_img = mean over all pixels of 1(c_map >= th_pix)                   share of confident pixels  (3)
    the image exits at the first exit with c_img >= th_img

The posters write M = erode(cannyEdge(y), s_i). Eroding lines one pixel thin leaves nothing; eroding their complement
is meant, so here the edges are thickened. Evaluation and the running network call the same functions.

Tensor operators define every form. On the processor the native one is counted in one compiled pass (``exit_kernel``),
and by tensor operators where that pass cannot tell how they would decide: the counts are equal, always.

Rivals, to compare with, make c_img of the map otherwise, without a pixel threshold and without edge refinement: see
``Pooling``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, assert_never

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from messnet.errors import RecipeError
from messnet.policy.compiled import confident_share
from messnet.policy.edges import (
    canny_edges,
    label_boundary,
    on_processor,
    thicken,
    window_majority,
    window_median,
    window_sum,
)
from messnet.policy.policy import Confidence, Policy

__all__ = [
    "confidence_map",
    "image_confidence",
    "refined_confidence_map",
    "should_exit",
]

_PATCH = 50  # input pixels, the side of a patch
_QUANTILE = 100  # the least sure hundredth of the patches speaks for the image


def confidence_map(logits: Tensor, kind: Confidence) -> Tensor:
    """Confidence per pixel, eq. (1): (N, K, h, w) floating point, K >= 2 -> (N, h, w) float32 in [0, 1].

    Computed in float32 whatever the logits are: bfloat16 would leave about 128 levels between 0.5 and 1. A sure pixel
    reaches exactly 1 in both kinds, so a threshold of 1 does not mean "never".
    """
    return _confidence(_below_top(logits), kind)


def image_confidence(
    logits: Tensor,
    output_stride: int,
    input_size: tuple[int, int],
    pixel_thresholds: Tensor | NDArray[Any] | Sequence[float],
    policy: Policy,
) -> Tensor:
    """Share of confident pixels, c_img of eq. (3), at each pixel threshold: (N, K, h, w) -> (N, T) float32 in [0, 1].

    ``output_stride`` is os_i, input pixels per feature pixel; ``input_size`` (H, W) the network's input; both serve the
    "paper" form and the size of patches only. ``pixel_thresholds`` (T,) in [0, 1] are rounded to float32, the dtype of
    the map that they are compared with. The mean is over all pixels of the map, ignored ones included: nothing is known
    to be ignorable at run time. No median is computed: for a threshold it is decided by a count, see
    ``window_majority``. A policy without pixel threshold repeats its value T times. Raises RecipeError for a class of
    interest that the logits do not have.
    """
    if policy.pooling != "share":
        return _pooled(logits, output_stride, policy)[:, None].repeat(1, len(pixel_thresholds))
    if policy.refinement == "paper" or not on_processor(logits):
        return _shares(logits, output_stride, input_size, pixel_thresholds, policy)
    found, certain = confident_share(
        logits.detach().float().numpy(),
        np.ascontiguousarray(pixel_thresholds, np.float32),
        entropy=policy.confidence == "entropy",
        refine=policy.refinement == "native",
    )
    shares = torch.from_numpy(found)
    if not all(certain.tolist()):
        doubtful = torch.from_numpy(~certain)
        shares[doubtful] = _shares(logits[doubtful], output_stride, input_size, pixel_thresholds, policy)
    return shares


def refined_confidence_map(
    logits: Tensor, output_stride: int, input_size: tuple[int, int], policy: Policy
) -> tuple[Tensor, Tensor]:
    """The confidence map before and after edge refinement, eq. (1) and (2), for pictures.

    (N, K, h, w) -> two (N, h, w) float32 in [0, 1]; (N, H, W) for the "paper" form. The literal median:
    ``(after >= th_pix).mean()`` is the c_img that ``image_confidence`` counts.
    """
    confidence, near_edge, radius = _map_and_edges(logits, output_stride, input_size, policy)
    return confidence, confidence if near_edge is None else window_median(confidence, radius, near_edge)


def should_exit(image_confidence: Tensor, image_threshold: float) -> Tensor:
    """c_img >= th_img: (N,) float32 -> (N,) bool.

    Compared as float64, as NumPy compares a float32 table with float64 thresholds: with the least float32 that reaches
    the threshold. PyTorch, and NumPy with a Python float, would round the threshold to the nearest, and an image just
    below it might exit here but not in the search.
    """
    least = np.float32(image_threshold)
    if float(least) < image_threshold:
        least = np.nextafter(least, np.float32(np.inf))
    return image_confidence >= float(least)


def _shares(
    logits: Tensor,
    output_stride: int,
    input_size: tuple[int, int],
    pixel_thresholds: Tensor | NDArray[Any] | Sequence[float],
    policy: Policy,
) -> Tensor:
    """``image_confidence`` of the share of confident pixels, by tensor operators."""
    thresholds = torch.as_tensor(pixel_thresholds, dtype=torch.float32, device=logits.device)
    confidence, near_edge, radius = _map_and_edges(logits, output_stride, input_size, policy)
    # Input-resolution maps are os_i^2 times larger: one threshold at a time bounds the memory.
    groups = torch.split(thresholds, 1) if policy.refinement == "paper" else (thresholds,)
    shares = []
    for group in groups:
        confident = confidence[:, None] >= group[:, None, None]  # (N, T, h, w)
        if near_edge is not None:
            refined = near_edge[:, None]  # by logic: ONNX Runtime has no torch.where of booleans
            confident = (refined & window_majority(confident, radius)) | (~refined & confident)
        # An integer count and a division in float64 give every device, batch and runtime the same float32.
        shares.append((confident.sum((2, 3)).double() / confidence[0].numel()).float())
    return torch.cat(shares, 1)


def _map_and_edges(
    logits: Tensor, output_stride: int, input_size: tuple[int, int], policy: Policy
) -> tuple[Tensor, Tensor | None, int]:
    """The confidence map, M of eq. (2) or None, and the radius of the median's window, in pixels of that map."""
    if policy.refinement == "paper":
        logits = F.interpolate(logits.float(), input_size, mode="bilinear", align_corners=False)
    below = _below_top(logits)
    confidence = _confidence(below, policy.confidence)
    match policy.refinement:
        case "native":  # os_i input pixels are one feature pixel
            return confidence, thicken(label_boundary(_labels(below)), 1), 2
        case "paper":
            return confidence, thicken(canny_edges(_labels(below)), output_stride), 2 * output_stride
        case "none":
            return confidence, None, 0
        case _:
            assert_never(policy.refinement)


def _pooled(logits: Tensor, output_stride: int, policy: Policy) -> Tensor:
    """c_img of the policies without a pixel threshold: (N, K, h, w) -> (N,) float32 in [0, 1].

    Summed in float64, where sums of so many float32 below 1 are exact: no order of adding changes the result.
    """
    below = _below_top(logits)
    confidence = _confidence(below, policy.confidence).double()
    match policy.pooling:
        case "mean":
            return confidence.mean((1, 2)).float()
        case "patches":
            radius = max(1, _PATCH // (2 * output_stride))
            means = window_sum(confidence, radius).flatten(1) / (2 * radius + 1) ** 2
            ranked = means.sort(1).values
            return ranked[:, (ranked.shape[1] - 1) // _QUANTILE].float()
        case "classes":
            if max(policy.classes) >= logits.shape[1]:
                raise RecipeError(f"policy {policy.name}: the classes are 0..{logits.shape[1] - 1}")
            wanted = torch.tensor(policy.classes, device=logits.device)
            counts = (_labels(below)[..., None] == wanted).any(-1).double()
            counts = torch.where(counts.sum((1, 2), keepdim=True) > 0, counts, torch.ones_like(counts))
            return ((confidence * counts).sum((1, 2)) / counts.sum((1, 2))).float()
        case _:
            raise AssertionError(policy.pooling)


def _below_top(logits: Tensor) -> Tensor:
    """How far every class is below the largest: (N, K, h, w) -> the same, float32, contiguous, at most 0.

    Labels and confidence both come from it. Contiguous: reductions over classes that lie side by side in memory, as a
    channels-last network leaves them, take several times longer.
    """
    logits = logits.float().contiguous()
    return logits - logits.amax(1, keepdim=True)


def _confidence(below: Tensor, kind: Confidence) -> Tensor:
    """eq. (1) from ``_below_top``. The largest term of the softmax sum is exp(0) = 1, so top1 is 1 / sum."""
    terms = below.exp()
    total = terms.sum(1)
    match kind:
        case "top1":
            return total.reciprocal()
        case "entropy":
            entropy = total.log() - (terms * below).sum(1) / total
            return (1 - entropy / math.log(below.shape[1])).clamp(0, 1)  # uniform p: rounding may leave -1e-7
        case _:
            assert_never(kind)


def _labels(below: Tensor) -> Tensor:
    """argmax over the classes, the first of equals: (N, K, H, W) of ``_below_top`` -> (N, H, W) int64.

    By arithmetic, which takes as long as ``max``, a sixth of ``argmax``, and always finds the first: sign is 0 at the
    largest, -1 elsewhere, and class k there scores K - k.
    """
    num_classes = below.shape[1]
    score = torch.arange(num_classes, 0, -1, dtype=torch.float32, device=below.device)[:, None, None]
    return num_classes - torch.addcmul(score, below.sign(), score).amax(1).long()
