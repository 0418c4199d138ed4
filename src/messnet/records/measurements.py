"""Records that a report is made of: the results of the search and of running instances. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from messnet.records.codec import Stored
from messnet.records.instance import Exit, Instance
from messnet.records.iou import class_iou, counts_of
from messnet.records.selection import ExpectedShare


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One instance run over the reported images, one image at a time, every stop a real one.

    Lists are per image, V long, in the order of ``Measurements.image_names``.
    """

    instance: Instance
    miou: float
    """[0, 1], from the predictions of the running instance."""
    miou_from_tables: float
    """[0, 1], the same figure as the search's tables give it for these images; equal when routing is."""
    macs: float
    """Multiply-accumulates per image, mean over the images, early stops counted."""
    macs_paper: float
    """The same in the paper's convention."""
    exit_taken: list[int]
    """exit_index per image."""
    image_confidence: list[float]
    """c_img at the exit taken."""
    latency_ms: list[float]
    """Wall time per image, from the normalised image on the device to labels at input resolution."""
    predicted_ms: list[float] = field(default_factory=list)
    """The same as the sum of parts measured one by one beforehand; empty where that was not done."""
    miou_change_error: float | None = None
    """Standard error over the draw of the images of ``miou`` less that of the delivered model, or of the baseline where
    none was delivered, from leaving groups out one by one; None where there is one image or group alone, and in files
    of version 0.1."""
    confusion: list[list[int]] = field(default_factory=list)
    """Pixels of all images by (label, prediction), K x K; empty in files of before."""

    def class_iou(self) -> list[float | None]:
        """IoU of each class in [0, 1], None of one that neither labels nor predictions have; empty without
        ``confusion``."""
        if self.instance.expected is not None:
            return list(self.instance.expected.class_iou)
        if not self.confusion:  # a file of before
            return []
        return known(class_iou(*counts_of(np.array(self.confusion, np.int64))))

    # What tables show: figures on images that the instance was not chosen on, cross-fitted where it is so.

    @property
    def judged_miou(self) -> float:
        """[0, 1]"""
        return self.miou if self.instance.expected is None else self.instance.expected.miou

    @property
    def judged_macs(self) -> float:
        """Per image, as ``macs``."""
        return self.macs if self.instance.expected is None else self.instance.expected.macs

    @property
    def judged_macs_paper(self) -> float:
        """The same in the paper's convention."""
        return self.macs_paper if self.instance.expected is None else self.instance.expected.macs_paper

    @property
    def judged_error(self) -> float | None:
        """Standard error of the change of mIoU, as ``miou_change_error``."""
        return self.miou_change_error if self.instance.expected is None else self.instance.expected.drop_error

    def judged_shares(self) -> list[ExpectedShare]:
        """For each exit, shallow to deep, the share of images that stop there, in [0, 1], with its standard error:
        None where it was not cross-fitted."""
        if self.instance.expected is not None:
            return list(self.instance.expected.exit_shares)
        return [ExpectedShare(exit.exit_index, share, None) for exit, share in self.exit_shares()]

    def exit_shares(self) -> list[tuple[Exit, float]]:
        """For each exit of the instance the share of images, in [0, 1], that stopped there."""
        taken = np.array(self.exit_taken)
        return [(choice.exit, float((taken == choice.exit_index).mean())) for choice in self.instance.exits]

    def spread(self) -> float:
        """How evenly the images spread over the exits: the entropy of the shares in bits, 0 if all leave at one."""
        shares = np.array([share for _, share in self.exit_shares() if share > 0])  # 0 log 0 is 0
        return float(-(shares * np.log2(shares)).sum())


@dataclass(frozen=True, kw_only=True)
class Delivered:
    """The user's model as it was delivered, before stage 1, on the reported images. Changes of mIoU are counted against
    it. It has the baseline's costs, for it is the same network with other weights."""

    miou: float
    """[0, 1]"""
    class_iou: list[float | None]
    """[0, 1] of each class, None of one that neither labels nor predictions have."""
    is_kept: bool
    """Whether the baseline still is this model, to the bit: stage 1 had no iterations."""


@dataclass(frozen=True, kw_only=True)
class Measurements(Stored, what="a measurements file", made_by="report"):
    """All rows of the end-to-end table, the baseline (the user's own model, whole, after stage 1) first."""

    device: str
    """In words: processor, threads, runtime, dtype."""
    input_size: tuple[int, int]
    image_names: list[str]
    difficulty: list[float | None]
    """[0, 1], None where the data set records none."""
    final_exit_error: list[float | None]
    """Share of wrong pixels of the final exit, [0, 1], None where no pixel is labelled: stands in for difficulty where
    none is recorded."""
    num_selection_images: int
    """Images that the search selected on, disjoint from ``image_names``."""
    rows: list[Measurement]
    left_out: list[str] = field(default_factory=list)
    """Names of instances that have no row, for they were searched on other images or heads than the run has now: they
    may have seen the images of the report."""
    skipped: list[str] = field(default_factory=list)
    """In files of version 0.2, instead of ``left_out``: a sentence for each row that is missing."""
    chance_miou: float | None = None
    """mIoU in [0, 1] of a guess that does not look at these images (docs/method.md#uncertainty-of-the-report); None in
    files of version 0.1 and where no pixel is labelled."""
    class_names: list[str] = field(default_factory=list)
    """K names; empty in files of before."""
    delivered: Delivered | None = None
    """None where the recipe gives no weights of the whole model, and in files of before."""

    @property
    def miou_to_keep(self) -> float:
        """mIoU in [0, 1] that changes are counted against: the delivered model's, else the baseline's."""
        # A model that was kept is the baseline to the bit.
        return self.rows[0].miou if self.delivered is None or self.delivered.is_kept else self.delivered.miou


@dataclass(frozen=True, kw_only=True, eq=False)
class Gallery(Stored, what="a gallery", made_by="report"):
    """Some reported images, each through every exit of one instance, for the pictures. G images, E exits, K classes."""

    image_names: tuple[str, ...]
    class_names: tuple[str, ...]
    exits: tuple[Exit, ...]
    """The instance's exits, shallow to deep."""
    palette: NDArray[np.uint8]
    """(K, 3) RGB."""
    images: NDArray[np.uint8]
    """(G, H, W, 3)"""
    masks: NDArray[np.uint8]
    """(G, H, W), 255 where ignored."""
    predictions: NDArray[np.uint8]
    """(G, E, H, W)"""
    confidence: NDArray[np.float16]
    """(G, E, H, W): per-pixel confidence before edge refinement, [0, 1]."""
    refined: NDArray[np.float16]
    """(G, E, H, W): after it."""
    image_confidence: NDArray[np.float32]
    """(G, E): c_img."""
    exit_taken: NDArray[np.int64]
    """(G,): exit_index where the instance stopped."""
    worst: tuple[str, ...] = ()
    """Names of the images that the instance gets most wrong of all, the worst first; empty in files of before."""


def known(values: Iterable[float]) -> list[float | None]:
    """The values with None in the place of NaN, which JSON has not."""
    # NaN would be written as a bare word that other readers of JSON refuse.
    return [None if math.isnan(value) else float(value) for value in values]
