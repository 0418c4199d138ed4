"""The exit policy: how sure is an exit of one image, and may the image stop there?

    c_map = confidence_map(logits)                                       per pixel, [0, 1]          (1)
    M     = pixels near the semantic edges of argmax(logits); there c_map becomes its window's median   (2)
    c_img = mean over all pixels of 1(c_map >= th_pix)                   share of confident pixels  (3)
    the image exits at the first exit with c_img >= th_img

The paper writes M = erode(cannyEdge(y), s_i). Eroding lines one pixel thin leaves nothing; eroding their complement
is meant, so here the edges are thickened. Evaluation and the running network call the same functions.

``by_operators`` is the definition that every other form is tested against: ``compiled`` for the processor, ``arrays``
for deployment without torch, ``graph`` for runtimes of ONNX. ``image_confidence`` gives its counts, always: on the
processor the compiled pass finds them in a fifth of the time, and says which images it cannot be certain of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import assert_never

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from messnet.policy.compiled import confident_share
from messnet.policy.edges import canny_edges, label_boundary, thicken, window_majority, window_median
from messnet.policy.policy import Confidence, Policy

Thresholds = Tensor | NDArray[np.generic] | Sequence[float]


def confidence_map(logits: Tensor, kind: Confidence) -> Tensor:
    """Confidence per pixel, eq. (1): (N, K, h, w) floating point, K >= 2 -> (N, h, w) float32 in [0, 1].

    Computed in float32 whatever the logits are: bfloat16 would leave about 128 levels between 0.5 and 1. A sure pixel
    reaches exactly 1 in both kinds, so a threshold of 1 does not mean "never".
    """
    return _confidence(_below_top(logits), kind)


def image_confidence(
    logits: Tensor, output_stride: int, input_size: tuple[int, int], pixel_thresholds: Thresholds, policy: Policy
) -> Tensor:
    """Share of confident pixels, c_img of eq. (3), at each pixel threshold: (N, K, h, w) -> (N, T) float32 in [0, 1].

    ``output_stride`` is os_i, input pixels per feature pixel; ``input_size`` (H, W) the network's input; both serve the
    "paper" form only. ``pixel_thresholds`` (T,) in [0, 1] are rounded to float32, the dtype of
    the map that they are compared with. The mean is over all pixels of the map, ignored ones included: nothing is known
    to be ignorable at run time. No median is computed: for a threshold it is decided by a count, see
    ``window_majority``.
    """
    if policy.refinement == "paper" or not on_processor(logits):
        return by_operators(logits, output_stride, input_size, pixel_thresholds, policy)
    found, certain = confident_share(
        logits.detach().float().numpy(),
        np.ascontiguousarray(pixel_thresholds, np.float32),
        entropy=policy.confidence == "entropy",
        refine=policy.refinement == "native",
    )
    shares = torch.from_numpy(found)
    if not all(certain.tolist()):
        doubtful = torch.from_numpy(~certain)
        shares[doubtful] = by_operators(logits[doubtful], output_stride, input_size, pixel_thresholds, policy)
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


def on_processor(tensor: Tensor) -> bool:
    """Whether NumPy may read it: a plain tensor of the CPU, and no graph is being recorded."""
    return type(tensor) is Tensor and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


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


def by_operators(
    logits: Tensor, output_stride: int, input_size: tuple[int, int], pixel_thresholds: Thresholds, policy: Policy
) -> Tensor:
    """``image_confidence`` by tensor operators alone, on any device: what the other forms must give."""
    thresholds = torch.as_tensor(pixel_thresholds, dtype=torch.float32, device=logits.device)
    confidence, near_edge, radius = _map_and_edges(logits, output_stride, input_size, policy)
    # Input-resolution maps are os_i^2 times larger: one threshold at a time bounds the memory.
    groups = torch.split(thresholds, 1) if policy.refinement == "paper" else (thresholds,)
    shares = []
    for group in groups:
        confident = confidence[:, None] >= group[:, None, None]  # (N, T, h, w)
        if near_edge is not None:
            confident = torch.where(near_edge[:, None], window_majority(confident, radius), confident)
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
