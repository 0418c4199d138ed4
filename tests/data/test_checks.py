import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from messnet.data import SegmentationSample
from messnet.data.checks import check_dataset, failed_report
from messnet.data.folders import open_folder
from messnet.data.image_files import FileDataset
from messnet.data.scenes import Scenes, ScenesOptions
from messnet.data.splits import shared_images
from messnet.errors import DataError


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
    assert report.class_images == {"a": 2, "b": 1}
    assert report.void_share == pytest.approx(14 / 20)
    assert report.unlabelled == ("s1",)
    assert report.problems == ()
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
        (
            IMAGE.astype(float),
            HALF,
            "s1: expected an image (H, W, 3) uint8, got (2, 4, 3) float64: scale it to 0 to 255 "
            "and convert it with astype(np.uint8)",
        ),
        (
            IMAGE[..., 0],
            HALF,
            "s1: expected an image (H, W, 3) uint8, got (2, 4) uint8: repeat the one channel, "
            "np.repeat(image.reshape(H, W, 1), 3, axis=2)",
        ),
        (
            np.zeros((2, 4, 4), np.uint8),
            HALF,
            "s1: expected an image (H, W, 3) uint8, got (2, 4, 4) uint8: choose three channels, image[..., :3]",
        ),
        (
            np.zeros((3, 2, 4), np.uint8),
            HALF,
            "s1: expected an image (H, W, 3) uint8, got (3, 2, 4) uint8: put channels last",
        ),
        (IMAGE, HALF[:1], "s1: expected a mask (2, 4) uint8, got (1, 4) uint8"),
        (IMAGE, HALF.astype(np.int64), "s1: expected a mask (2, 4) uint8, got (2, 4) int64"),
        (IMAGE, HALF + 7, "s1: expected labels 0 to 1 or 255, got [6, 7, 8]"),
    ],
)
def test_problems_are_collected(image: np.ndarray, mask: np.ndarray, problem: str) -> None:
    report = check_dataset(Listed((IMAGE, HALF), (image, mask), (IMAGE, HALF)))
    assert report.problems == (problem,)
    assert report.sizes == {"2x4": 2}
    assert problem in report.to_text()


def test_damaged_files_are_collected(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / "train" / folder).mkdir(parents=True)
        for name in "xyz":
            Image.fromarray(IMAGE if folder == "images" else HALF).save(tmp_path / "train" / folder / f"{name}.png")
    (tmp_path / "train/images/x.png").write_bytes(b"")
    (tmp_path / "train/masks/z.png").write_bytes(b"nothing")
    report = check_dataset(open_folder(tmp_path, "train", class_names=("a", "b", "c")))
    assert [problem.split()[2].rsplit("train/")[1] for problem in report.problems] == ["images/x.png", "masks/z.png"]
    assert report.class_share["c"] == 0
    assert "in no image" in report.to_text()


def test_an_empty_data_set_has_a_report() -> None:
    report = check_dataset(Listed())
    assert (report.num_images, report.problems) == (0, ())
    assert "0 images, height x width: none readable" in report.to_text()


def test_the_generated_scenes_are_sound() -> None:
    report = check_dataset(Scenes("val", ScenesOptions(num_val=30)))
    assert not report.problems
    assert sum(report.class_share.values()) == pytest.approx(1)


def in_folders(root: Path, masks: dict[str, np.ndarray], **options: object) -> FileDataset:
    """One split; every image its own, unless the names begin alike."""
    for folder in ("images", "masks"):
        (root / "train" / folder).mkdir(parents=True)
    for k, (name, mask) in enumerate(masks.items()):
        seed = 0 if name.startswith("same") else k + 1
        picture = np.random.default_rng(seed).integers(0, 256, (*mask.shape[:2], 3), np.uint8)
        Image.fromarray(picture).save(root / "train/images" / f"{name}.png")
        Image.fromarray(mask).save(root / "train/masks" / f"{name}.png")
    return open_folder(root, "train", class_names=("a", "b"), **options)


def test_problems_of_a_kind_are_counted_and_said_once(tmp_path: Path) -> None:
    """Every mask has an id that is no class: one advice, not a thousand lines."""
    masks = {f"m{k}": np.where(HALF == 255, 2 + k % 2, HALF).astype(np.uint8) for k in range(9)}
    report = check_dataset(in_folders(tmp_path, masks | {"rgb": IMAGE, "small": HALF}))
    assert report.problem_kinds == {"unknown ids": 9, "mask of another format": 1}
    assert report.unknown_ids == {"2": 5, "3": 4}
    assert len(report.problems) == 10
    text = report.to_text()
    assert text.count("name every class in data.class_names") == 1
    assert "images per id: 2 (5), 3 (4)" in text
    assert "and 5 more: --json lists all" in text
    assert report.label_formats == {"8-bit indices": 10, "RGB colours": 1}
    assert "list the colour of each class as data.mask_values" in text


def test_black_and_white_masks_are_no_data_set_of_two_classes(tmp_path: Path) -> None:
    mask = np.where(HALF == 0, 0, 255).astype(np.uint8)
    report = check_dataset(in_folders(tmp_path, {"x": mask, "y": mask}))
    assert len(report.problems) == 1
    assert "nothing but 0 and 255, and 255 means void" in report.problems[0]
    assert "data.mask_values: [0, 255]" in report.problems[0]
    told = open_folder(tmp_path, "train", class_names=("a", "b"), mask_values=(0, 255))
    assert check_dataset(told).class_share == {"a": pytest.approx(3 / 8), "b": pytest.approx(5 / 8)}
    assert not check_dataset(told).problems


def test_ids_that_begin_with_one_are_noticed(tmp_path: Path) -> None:
    masks = {"x": np.array([[1, 1, 2, 2]], np.uint8), "y": np.array([[1, 1, 1, 1]], np.uint8)}
    report = check_dataset(in_folders(tmp_path, masks))
    assert any("ids run from 1 to 2" in note and "data.void_index: 0" in note for note in report.notes)
    told = check_dataset(open_folder(tmp_path, "train", class_names=("a", "b"), mask_values=(1, 2), void_index=0))
    assert told.class_share == {"a": pytest.approx(6 / 8), "b": pytest.approx(2 / 8)}
    assert not told.notes


def test_notes_say_what_to_do(tmp_path: Path) -> None:
    masks = {"same_x": HALF[:, :2] * 0, "same_y": HALF[:, :2] * 0, "z": VOID}
    report = check_dataset(in_folders(tmp_path, masks))
    notes = "\n".join(report.notes)
    assert report.duplicates == (("same_x", "same_y"),)
    assert "same_x = same_y; keep one of each" in notes
    assert "no pixel of b: their IoU is undefined here" in notes
    assert "images differ in size: training needs a crop" in notes
    assert "50% of all pixels are void" in notes
    record = json.loads(json.dumps(report.to_record()))
    assert record["duplicates"] == [["same_x", "same_y"]]
    assert "images" not in record


def test_the_same_image_in_both_splits_is_found_under_any_name_and_compression(tmp_path: Path) -> None:
    masks = {"p": HALF, "q": HALF, "r": HALF}
    train = in_folders(tmp_path, masks)
    copy = tmp_path / "other"
    for folder in ("images", "masks"):
        (copy / "train" / folder).mkdir(parents=True)
        Image.open(tmp_path / "train" / folder / "q.png").save(copy / "train" / folder / "new.png", compress_level=0)
    Image.open(tmp_path / "train/images/q.png").save(copy / "train/images/new.png", compress_level=0)
    other = open_folder(copy, "train", class_names=("a", "b"))
    assert (copy / "train/images/new.png").read_bytes() != (tmp_path / "train/images/q.png").read_bytes()
    assert shared_images(check_dataset(train), check_dataset(other)) == (("q", "new"),)
    turned = Listed((np.zeros((4, 2, 3), np.uint8), HALF.T))
    assert shared_images(check_dataset(Listed((IMAGE, HALF))), check_dataset(turned)) == ()  # same bytes, other shape


def test_threads_find_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    masks = {f"m{k:02d}": rng.integers(0, 2 + (k == 7), (8, 9)).astype(np.uint8) for k in range(40)}
    dataset = in_folders(tmp_path, masks)
    (tmp_path / "train/images/m20.png").write_bytes(b"")
    alone = check_dataset(dataset)
    assert len(alone.problems) == 2
    assert check_dataset(dataset, num_threads=4) == alone


def test_a_users_bug_is_not_hidden_by_threads() -> None:
    class Broken(Listed):
        def __getitem__(self, index: int) -> SegmentationSample:
            raise ZeroDivisionError(f"sample {index}")

    for num_threads in (1, 3):
        with pytest.raises(ZeroDivisionError, match="sample 0"):
            check_dataset(Broken((IMAGE, HALF)), num_threads=num_threads)


def test_a_split_that_cannot_be_opened() -> None:
    report = failed_report(DataError("no folder x"))
    assert report.problems == ("no folder x",)
    assert "no folder x" in report.to_text()
