import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from messnet.data import SegmentationSample
from messnet.data.checks import check_dataset
from messnet.data.folders import FolderDataset
from messnet.data.scenes import Scenes, ScenesOptions


class Listed:
    """A user's data set: the samples it was given."""

    class_names = ("a", "b")
    palette = np.zeros((2, 3), np.uint8)

    def __init__(self, *samples: tuple[np.ndarray, np.ndarray]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> SegmentationSample:
        image, mask = self.samples[index]
        return SegmentationSample(name=f"s{index}", image=image, mask=mask)


IMAGE = np.zeros((2, 4, 3), np.uint8)
HALF = np.array([[0, 0, 0, 1], [255, 255, 255, 255]], np.uint8)
VOID = np.full((2, 4), 255, np.uint8)


def test_shares_sizes_and_images_without_labels() -> None:
    seen: list[int] = []
    report = check_dataset(
        Listed((IMAGE, HALF), (IMAGE, VOID), (IMAGE[:, :2], HALF[:, :2])),
        progress=lambda indices: (seen.append(i) or i for i in indices),
    )
    assert seen == [0, 1, 2]
    assert report.num_images == 3
    assert report.sizes == {"2x4": 2, "2x2": 1}
    assert report.class_share == {"a": pytest.approx(5 / 6), "b": pytest.approx(1 / 6)}
    assert report.void_share == pytest.approx(14 / 20)
    assert report.unlabelled == ("s1",)
    assert report.problems == ()
    assert report.is_usable
    assert json.loads(json.dumps(report.to_record()))["sizes"] == {"2x4": 2, "2x2": 1}
    text = report.to_text()
    for part in (
        "3 images, height x width: 2x4 (2), 2x2 (1)",
        "83.33%",
        "1 images without any label: s1",
        "no problems",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("image", "mask", "problem"),
    [
        (IMAGE.astype(float), HALF, "s1: expected an image (H, W, 3) uint8, got (2, 4, 3) float64"),
        (IMAGE, HALF[:1], "s1: expected a mask (2, 4) uint8, got (1, 4) uint8"),
        (IMAGE, HALF.astype(np.int64), "s1: expected a mask (2, 4) uint8, got (2, 4) int64"),
        (IMAGE, HALF + 7, "s1: expected labels 0 to 1 or 255, got [6, 7, 8]"),
    ],
)
def test_problems_are_collected(image: np.ndarray, mask: np.ndarray, problem: str) -> None:
    report = check_dataset(Listed((IMAGE, HALF), (image, mask), (IMAGE, HALF)))
    assert report.problems == (problem,)
    assert report.sizes == {"2x4": 2}
    assert not report.is_usable
    assert problem in report.to_text()


def test_damaged_files_are_collected(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / "train" / folder).mkdir(parents=True)
        for name in "xyz":
            Image.fromarray(IMAGE if folder == "images" else HALF).save(tmp_path / "train" / folder / f"{name}.png")
    (tmp_path / "train/images/x.png").write_bytes(b"")
    (tmp_path / "train/masks/z.png").write_bytes(b"nothing")
    report = check_dataset(FolderDataset(tmp_path, "train", class_names=("a", "b", "c")))
    assert [problem.split()[2].rsplit("train/")[1] for problem in report.problems] == ["images/x.png", "masks/z.png"]
    assert report.class_share["c"] == 0
    assert "in no image" in report.to_text()


def test_an_empty_data_set_is_not_usable() -> None:
    report = check_dataset(Listed())
    assert not report.is_usable
    assert "0 images, height x width: none readable" in report.to_text()


def test_the_generated_scenes_are_sound() -> None:
    report = check_dataset(Scenes("val", ScenesOptions(num_val=30)))
    assert report.is_usable
    assert sum(report.class_share.values()) == pytest.approx(1)
