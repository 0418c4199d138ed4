"""What people hold an image in, made the one array that networks take: files, Pillow's images, arrays and tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from messnet.errors import DataError
from messnet.images.reading import read_image, rgb_of


@runtime_checkable
class Tensor(Protocol):
    """A torch.Tensor, told without torch."""

    def detach(self) -> Tensor: ...

    def cpu(self) -> Tensor: ...

    def numpy(self) -> NDArray[Any]: ...


ImageLike: TypeAlias = str | Path | Image.Image | NDArray[np.uint8] | NDArray[np.floating[Any]] | Tensor
"""The path of an image file; a Pillow image; an array (H, W, 3) of RGB, or a tensor (3, H, W): uint8, or floating with
values in [0, 1], as torchvision's ToTensor gives them (not normalised by mean and standard deviation)."""


def as_image(value: ImageLike) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB. Raises DataError for a file that is no image, and for anything that is not as ``ImageLike``
    says."""
    match value:
        case str() | Path():
            return read_image(Path(value))
        case Image.Image():
            return rgb_of(value.copy())  # which turns it upright in place
        case np.ndarray():
            return _checked(value, value.shape, "an array is (H, W, 3)")
        case Tensor():
            planes = value.detach().cpu().numpy()
            if planes.ndim != 3 or planes.shape[0] != 3:
                last = planes.ndim == 3 and planes.shape[2] == 3
                advice = "image.permute(2, 0, 1) makes it so" if last else "give a batch as a list"
                raise DataError(f"a tensor is one RGB image (3, H, W), not {planes.shape}: {advice}")
            return _checked(np.ascontiguousarray(np.moveaxis(planes, 0, -1)), planes.shape, "a tensor is (3, H, W)")
    raise DataError(f"an image is a path, a Pillow image, an array or a tensor, not {type(value).__name__}: convert it")


def each_image(images: ImageLike | Sequence[ImageLike]) -> Iterator[NDArray[np.uint8]]:
    """The images of a list, an array (N, H, W, 3) or a tensor (N, 3, H, W), read when their turn comes; one image is a
    list of one. Raises DataError as ``as_image`` does."""
    many = isinstance(images, Sequence) and not isinstance(images, str)
    if many or getattr(images, "ndim", 3) == 4:
        yield from map(as_image, images)  # type: ignore[arg-type]  # arrays and tensors iterate over their first axis
    else:
        yield as_image(images)  # type: ignore[arg-type]


def _checked(image: NDArray[Any], given: tuple[int, ...], expected: str) -> NDArray[np.uint8]:
    """The same as uint8; ``given`` is the shape that it came in."""
    if image.ndim != 3 or image.shape[2] != 3 or not (image.dtype == np.uint8 or image.dtype.kind == "f"):
        # A tensor's channels are last by now, an array's may be first.
        turned = image.shape[:1] == (3,) and image.shape[-1] != 3
        advice = "image.transpose(1, 2, 0) makes it so" if turned else "convert it"
        raise DataError(f"{expected}, uint8 or floating in [0, 1], RGB; this one is {given} {image.dtype}: {advice}")
    if not image.size:
        raise DataError(f"an image has at least one pixel, this one is {image.shape}")
    if image.dtype == np.uint8:
        return image
    least, most = float(image.min()), float(image.max())
    if not 0 <= least <= most <= 1:  # NaN too
        raise DataError(
            f"floating values of an image lie in [0, 1], these in [{least:g}, {most:g}]: divide by 255, or leave the "
            "normalisation out, which the session does itself"
        )
    pixels: NDArray[np.uint8] = np.rint(image.astype(np.float32) * np.float32(255)).astype(np.uint8)
    return pixels
