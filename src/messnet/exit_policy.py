"""The exit policy: how sure is an exit of one image, and may the image stop there? (method.md section 7)

    c_map = confidence_map(logits)                                       per pixel, [0, 1]          (1)
    M     = pixels near the semantic edges of argmax(logits); there c_map becomes its window's median   (2)
    c_img = mean over all pixels of 1(c_map >= th_pix)                   share of confident pixels  (3)
    the image exits at the first exit with c_img >= th_img

The posters write M = erode(cannyEdge(y), s_i). Eroding lines one pixel thin leaves nothing; eroding their complement
is meant, so here the edges are thickened. Evaluation and the running network call the same functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, assert_never, cast, get_args

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from messnet.edges import canny_edges, label_boundary, thicken, window_majority, window_median
from messnet.errors import RecipeError

__all__ = [
    "Confidence",
    "Policy",
    "Refinement",
    "confidence_map",
    "image_confidence",
    "refined_confidence_map",
    "should_exit",
]

Confidence = Literal["top1", "entropy"]
Refinement = Literal["native", "paper", "none"]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How an exit's confidence is computed. Its thresholds belong to the exits of an instance."""

    confidence: Confidence = "top1"
    """Of a pixel. "top1": the largest softmax probability. "entropy": 1 - H(p) / log K."""
    refinement: Refinement = "native"
    """Near edges. "native": exact label boundaries at the logits' own resolution, windows of 5 x 5 feature pixels.
    "paper": Canny on the upsampled label map, windows of +-2 os_i input pixels. "none": no edge refinement."""

    @property
    def name(self) -> str:
        """``"top1+native"``: the name in tables and instances, which ``parse`` reads."""
        return f"{self.confidence}+{self.refinement}"

    @classmethod
    def parse(cls, name: str) -> Policy:
        """The policy of a name such as ``"top1+native"``. Raises RecipeError, which lists the options."""
        confidence, _, refinement = name.partition("+")
        if confidence not in get_args(Confidence) or refinement not in get_args(Refinement):
            options = (f"{c}+{r}" for c in get_args(Confidence) for r in get_args(Refinement))
            raise RecipeError(f"no exit policy is called {name!r}; choose one of {', '.join(options)}")
        return cls(confidence=cast(Confidence, confidence), refinement=cast(Refinement, refinement))


def confidence_map(logits: Tensor, kind: Confidence) -> Tensor:
    """Confidence per pixel, eq. (1): (N, K, h, w) floating point, K >= 2 -> (N, h, w) float32 in [0, 1].

    Computed in float32 whatever the logits are: bfloat16 would leave about 128 levels between 0.5 and 1. A sure pixel
    reaches exactly 1 in both kinds, so a threshold of 1 does not mean "never".
    """
    # log_softmax for both: softmax on the CPU rounds a pixel by its place in a thread's share, so by its batch.
    log_p = logits.float().log_softmax(1)
    match kind:
        case "top1":
            return log_p.amax(1).exp()
        case "entropy":
            entropy = -(log_p.exp() * log_p).sum(1)
            return (1 - entropy / math.log(logits.shape[1])).clamp(0, 1)  # uniform p: rounding may leave -1e-7
        case _:
            assert_never(kind)


def image_confidence(
    logits: Tensor,
    output_stride: int,
    input_size: tuple[int, int],
    pixel_thresholds: Tensor | NDArray[Any] | Sequence[float],
    policy: Policy,
) -> Tensor:
    """Share of confident pixels, c_img of eq. (3), at each pixel threshold: (N, K, h, w) -> (N, T) float32 in [0, 1].

    ``output_stride`` is os_i, input pixels per feature pixel; ``input_size`` (H, W) the network's input; both serve the
    "paper" form only. ``pixel_thresholds`` (T,) in [0, 1] are rounded to float32, the dtype of the map that they are
    compared with. The mean is over all pixels of the map, ignored ones included: nothing is known to be ignorable at
    run time. No median is computed: for a threshold it is decided by a count, see ``window_majority``.
    """
    confidence, near_edge, radius = _map_and_edges(logits, output_stride, input_size, policy)
    thresholds = torch.as_tensor(pixel_thresholds, dtype=torch.float32, device=logits.device)
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

    Compared in float64, as NumPy compares a float32 table with float64 thresholds. PyTorch, and NumPy with a Python
    float, would round the threshold to float32 first, and an image just below it might exit here but not in the search.
    """
    return image_confidence.double() >= image_threshold


def _map_and_edges(
    logits: Tensor, output_stride: int, input_size: tuple[int, int], policy: Policy
) -> tuple[Tensor, Tensor | None, int]:
    """The confidence map, M of eq. (2) or None, and the radius of the median's window, in pixels of that map."""
    match policy.refinement:
        case "native":  # os_i input pixels are one feature pixel
            near_edge = thicken(label_boundary(_labels(logits)), 1)
            return confidence_map(logits, policy.confidence), near_edge, 2
        case "paper":
            logits = F.interpolate(logits.float(), input_size, mode="bilinear", align_corners=False)
            near_edge = thicken(canny_edges(_labels(logits)), output_stride)
            return confidence_map(logits, policy.confidence), near_edge, 2 * output_stride
        case "none":
            return confidence_map(logits, policy.confidence), None, 0
        case _:
            assert_never(policy.refinement)


def _labels(logits: Tensor) -> Tensor:
    """argmax over the classes: (N, K, H, W) -> (N, H, W) int64. ``max`` finds it 3 times faster than ``argmax``."""
    return logits.max(1).indices
