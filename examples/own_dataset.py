"""Images of your own that are not in folders: name this in a recipe as `data: {source: "own_dataset:stripes"}` with
this folder on PYTHONPATH, or run `python examples/own_dataset.py`."""

import numpy as np

from messnet.data import SegmentationSample


class Stripes:
    """Two classes; any object with these two attributes and these two methods is a data set."""

    class_names = ("dark", "light")
    palette = np.array([(40, 40, 60), (250, 220, 120)], np.uint8)

    def __init__(self, num_images: int, seed: int) -> None:
        self.num_images = num_images
        self.seed = seed

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> SegmentationSample:
        rng = np.random.default_rng([self.seed, index])
        columns = np.arange(96) + rng.integers(32)
        mask = np.broadcast_to((columns // 16 % 2).astype(np.uint8), (64, 96)).copy()
        image = self.palette[mask] * 0.7 + rng.integers(0, 60, (64, 96, 3))
        return SegmentationSample(name=f"stripes_{index}", image=image.clip(0, 255).astype(np.uint8), mask=mask)


def stripes(split: str) -> Stripes:
    """Called with "train" and with "val"."""
    return Stripes(64, seed=0) if split == "train" else Stripes(16, seed=1)


if __name__ == "__main__":
    from messnet.data.checks import check_dataset

    print(check_dataset(stripes("val")).to_text())
