"""mIoU of a bundle on labelled images: `python score.py camvid_mobilenetv2.mess ../../shared/camvid/val`.

The folder holds images/ and masks/ of the same names; pixels with an id that is no class are left out.
"""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

import messnet


def main(bundle: str, folder: str) -> None:
    session = messnet.load(bundle)
    num_classes, taken = len(session.class_names), Counter[int]()
    confusion = np.zeros((num_classes, num_classes), np.int64)
    for path in sorted((Path(folder) / "images").iterdir()):
        result = session.predict([np.array(Image.open(path).convert("RGB"))])[0]
        mask = np.array(Image.open(Path(folder) / "masks" / f"{path.stem}.png"))
        known = mask < num_classes
        pairs = mask[known].astype(np.int64) * num_classes + result.labels[known]
        confusion += np.bincount(pairs, minlength=num_classes**2).reshape(confusion.shape)
        taken[result.exit_index] += 1
    right = np.diag(confusion)
    iou = right / (confusion.sum(0) + confusion.sum(1) - right)
    for name, value in zip(session.class_names, iou, strict=True):
        print(f"{name:12} {value:.4f}")
    print(f"mIoU {np.nanmean(iou):.4f} on {taken.total()} images; exits taken: {dict(sorted(taken.items()))}")


if __name__ == "__main__":
    main(*sys.argv[1:])
