import hashlib
import itertools
import subprocess
import sys

import numpy as np
import pytest
from scipy.ndimage import binary_erosion
from scipy.stats import spearmanr

from messnet.data import IGNORE_INDEX, SegmentationSample
from messnet.data.scenes import BOAT, CAR, CLASS_NAMES, GROUND, SKY, WATER, Scenes, ScenesOptions
from messnet.errors import DataError

DIGEST = """
import hashlib
from messnet.data.scenes import Scenes
sample = Scenes("val")[3]
print(hashlib.sha256(sample.image.tobytes() + sample.mask.tobytes()).hexdigest(), sample.difficulty)
"""


@pytest.fixture(scope="module")
def samples() -> list[SegmentationSample]:
    dataset = Scenes("train")
    return [dataset[i] for i in range(160)]


def test_a_sample_depends_on_seed_split_and_index_only() -> None:
    dataset = Scenes("val")
    dataset[0]
    sample = dataset[3]
    digest = hashlib.sha256(sample.image.tobytes() + sample.mask.tobytes()).hexdigest()
    other_process = subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True)
    assert other_process.stdout.split() == [digest, str(sample.difficulty)]
    others = (Scenes("train")[3], Scenes("val")[4], Scenes("val", ScenesOptions(seed=1))[3])
    assert not any(np.array_equal(sample.image, other.image) for other in others)


def test_types_ranges_and_indexing() -> None:
    dataset = Scenes("val", ScenesOptions(num_val=5, size=(64, 72)))
    sample = dataset[-1]
    assert sample.name == "val_00004"
    assert sample.image.shape == (64, 72, 3)
    assert sample.mask.shape == (64, 72)
    assert sample.image.dtype == sample.mask.dtype == np.uint8
    assert 0 <= sample.difficulty <= 1
    assert len(list(itertools.islice(dataset, 10))) == len(dataset) == 5
    assert Scenes("train", ScenesOptions(size=(257, 191)))[0].mask.shape == (257, 191)


def test_every_class_occurs_and_void_is_rare(samples: list[SegmentationSample]) -> None:
    counts = np.bincount(np.concatenate([s.mask.ravel() for s in samples]), minlength=256) / samples[0].mask.size
    share = counts / counts.sum()
    assert (share[: len(CLASS_NAMES)] > 0.02).all()
    assert 0.005 < share[IGNORE_INDEX] < 0.06
    assert share[len(CLASS_NAMES) : IGNORE_INDEX].sum() == 0


def test_difficulty_drives_contrast_and_sharpness(samples: list[SegmentationSample]) -> None:
    difficulty = [s.difficulty for s in samples]
    contrast = [s.image[s.mask != IGNORE_INDEX].astype(float).std(0).mean() for s in samples]
    assert spearmanr(difficulty, contrast).statistic < -0.5
    assert spearmanr(difficulty, [_contour_length(s.mask) for s in samples]).statistic > 0.3


def test_horizons_vary(samples: list[SegmentationSample]) -> None:
    sky = [(s.mask == SKY).mean() for s in samples]
    assert np.quantile(sky, 0.1) < 0.2
    assert np.quantile(sky, 0.9) > 0.45


@pytest.mark.parametrize(("one", "other"), [(SKY, WATER), (CAR, BOAT)])
def test_pairs_look_alike_from_close_by(samples: list[SegmentationSample], one: int, other: int) -> None:
    """In the same image, small windows of one and of the other have the same colours and gradients, up to chance."""
    differences = []
    for sample in samples:
        first, second = (_window_statistics(sample, label) for label in (one, other))
        if min(len(first), len(second)) >= 20:
            spread = np.concatenate([first, second]).std(0) + 1
            differences.append((first.mean(0) - second.mean(0)) / spread)
    assert len(differences) > 30
    assert np.abs(np.mean(differences, 0)).max() < 0.35


def test_a_pair_that_differs_is_noticed(samples: list[SegmentationSample]) -> None:
    chosen = [s for s in samples[:60] if (s.mask == GROUND).mean() > 0.2]
    differences = [_window_statistics(s, SKY).mean(0) - _window_statistics(s, GROUND).mean(0) for s in chosen]
    assert np.abs(np.mean(differences, 0)).max() > 10


@pytest.mark.parametrize(
    ("split", "options", "message"),
    [
        ("test", {}, "split is 'train' or 'val', not 'test'"),
        ("val", {"size": (32, 80)}, "at least 64 x 64 pixels, not"),
        ("val", {"seed": -1}, "seed of the generated scenes is 0 or more"),
    ],
)
def test_wrong_options(split: str, options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Scenes(split, ScenesOptions(**options))


def _window_statistics(sample: SegmentationSample, label: int) -> np.ndarray:
    """RGB and vertical gradient (M, 4) of the pixels whose 5x5 window is all of one class."""
    is_inside = binary_erosion(sample.mask == label, np.ones((5, 5)))
    image = sample.image.astype(np.float32)
    gradient = np.abs(np.gradient(image.mean(2), axis=0))
    return np.concatenate([image, gradient[..., None]], 2)[is_inside]


def _contour_length(mask: np.ndarray) -> float:
    return float((mask[1:] != mask[:-1]).mean() + (mask[:, 1:] != mask[:, :-1]).mean())
