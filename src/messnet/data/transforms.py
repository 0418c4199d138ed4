"""Training augmentation, and the endless stream of augmented samples that training reads.

Every sample of the stream has its own random state, made from the seed and its position alone. So training that is
resumed, or that runs with another number of workers, sees the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2

from messnet.data import IGNORE_INDEX, SegmentationDataset
from messnet.data.options import AugmentOptions
from messnet.errors import DataError
from messnet.images.preprocessing import IMAGENET, Normalisation, normalise

Augmentation = Callable[[NDArray[np.uint8], NDArray[np.uint8]], tuple[Tensor, Tensor]]
"""(H, W, 3) image and (H, W) mask to a normalised float32 tensor (3, h, w) and an int64 tensor (h, w)."""


def build_augmentation(options: AugmentOptions, normalisation: Normalisation = IMAGENET) -> Augmentation:
    """Random colour, scale, crop and flip, drawn from torch's global CPU generator, then the ``normalisation``. What
    lies outside of the image is of its mean colour (0 once normalised, up to rounding) and IGNORE_INDEX."""
    # Colour comes first, while the pixels are bytes and before a crop fills in the mean colour, which stays as it is.
    jitter = v2.ColorJitter(*[options.color_jitter] * 3) if options.color_jitter else v2.Identity()
    flip = v2.RandomHorizontalFlip(options.hflip)
    outside = {tv_tensors.Image: tuple(round(255 * mean) for mean in normalisation.mean), tv_tensors.Mask: IGNORE_INDEX}

    def augment(image: NDArray[np.uint8], mask: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        pixels = jitter(torch.tensor(image).permute(2, 0, 1))
        labels = torch.tensor(mask)[None]
        if options.scale_max > options.scale_min or options.scale_min != 1:
            scale = torch.empty(()).uniform_(options.scale_min, options.scale_max).item()
            size = [max(1, round(length * scale)) for length in mask.shape]
            pixels = v2.functional.resize(pixels, size, v2.InterpolationMode.BILINEAR, antialias=True)
            # Exact: plain nearest, which v2 would use for a Mask, shifts labels by up to half a pixel.
            labels = v2.functional.resize(labels, size, v2.InterpolationMode.NEAREST_EXACT)
        crop = v2.RandomCrop(options.crop or mask.shape, pad_if_needed=True, fill=outside)
        pixels, labels = flip(crop(tv_tensors.Image(pixels), tv_tensors.Mask(labels)))
        normalised = normalise(pixels.permute(1, 2, 0).numpy(), normalisation)
        return torch.from_numpy(normalised), labels[0].as_subclass(Tensor).long()

    return augment


def stack_samples(samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A batch: images (N, 3, h, w) and masks (N, h, w). Raises DataError when samples are of several sizes."""
    if len(sizes := {tuple(mask.shape) for _, mask in samples}) > 1:
        shown = ", ".join(f"{height}x{width}" for height, width in sorted(sizes))
        raise DataError(
            f"one batch has images of the sizes {shown} (height x width): say augment.crop, the size that all are cut "
            "to, in the sections pretrain and distill, or resize the images"
        )
    images, masks = default_collate(list(samples))
    return images, masks


class TrainingStream(Dataset[tuple[Tensor, Tensor]]):
    """Augmented samples by position k = 0 .. iterations * batch_size - 1, the data set shuffled anew in every epoch.

    Read it in order; to resume at iteration j, start at position j * batch_size, for instance with
    ``DataLoader(stream, batch_size, sampler=range(j * batch_size, len(stream)))``.
    """

    def __init__(
        self, dataset: SegmentationDataset, augment: Augmentation, *, iterations: int, batch_size: int, seed: int = 0
    ) -> None:
        if len(dataset) == 0:
            raise DataError("the training split is empty: training needs at least one image")
        self.dataset = dataset
        self.augment = augment
        self.length = iterations * batch_size
        self.seed = seed
        self._order = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        k = range(self.length)[k]
        epoch, position = divmod(k, len(self.dataset))
        sample = self.dataset[int(self._permutation(epoch)[position])]
        state = np.random.SeedSequence([self.seed, k]).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: that would reset the random numbers of the accelerator too.
            torch.default_generator.manual_seed(int(state[0]))
            return self.augment(sample.image, sample.mask)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        # One epoch's order is kept: the stream is read in order, and each worker comes by every epoch.
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset)))
        return self._order[1]
