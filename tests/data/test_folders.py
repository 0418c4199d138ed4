from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from messnet.data import IGNORE_INDEX
from messnet.data.folders import contents, find_pairs, open_folder
from messnet.data.image_files import FileDataset
from messnet.errors import DataError
from messnet.images.colours import default_palette

CAMVID = Path(__file__).parents[3] / "shared" / "camvid"
NAMES = ("a", "b", "c")
IMAGE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
MASK = np.arange(48 * 64, dtype=np.uint8).reshape(48, 64) % 4  # 3 is void


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One sample of three classes, void_index 3, in the SPLIT/images layout."""
    for folder in ("images", "masks"):
        (tmp_path / "train" / folder).mkdir(parents=True)
    Image.fromarray(IMAGE).save(tmp_path / "train" / "images" / "x.png")
    Image.fromarray(MASK).save(tmp_path / "train" / "masks" / "x.png")
    return tmp_path


def read(root: Path, split: str = "train", void_index: int | None = 3, **options: object) -> FileDataset:
    return open_folder(root, split, class_names=NAMES, void_index=void_index, **options)


def test_reads_rgb_and_maps_void(root: Path) -> None:
    sample = read(root)[0]
    assert sample.name == "x"
    assert np.array_equal(sample.image, IMAGE)
    assert np.array_equal(sample.mask, np.where(MASK == 3, IGNORE_INDEX, MASK))
    assert np.isnan(sample.difficulty)


def test_255_is_void_too(root: Path) -> None:
    Image.fromarray(np.where(MASK == 3, 255, MASK).astype(np.uint8)).save(root / "train/masks/x.png")
    assert np.array_equal(read(root, void_index=None)[0].mask == 255, MASK == 3)


def test_a_palette_mask_is_read_by_index(root: Path) -> None:
    picture = Image.fromarray(MASK)
    picture.putpalette([9, 8, 7, 30, 20, 10, 0, 0, 0, 255, 255, 255])
    assert picture.mode == "P"
    picture.save(root / "train/masks/x.png")
    assert np.array_equal(read(root)[0].mask, np.where(MASK == 3, 255, MASK))


def test_binary_masks_of_0_and_255(root: Path) -> None:
    mask = np.where(MASK == 3, 255, 0).astype(np.uint8)
    Image.fromarray(mask).save(root / "train/masks/x.png")
    names = ("background", "tumour")
    plain = open_folder(root, "train", class_names=names)
    assert set(np.unique(plain[0].mask)) == {0, IGNORE_INDEX}  # what check-data warns of
    told = open_folder(root, "train", class_names=names, mask_values=(0, 255))
    assert np.array_equal(told[0].mask, mask // 255)


def test_masks_that_count_from_one(root: Path) -> None:
    Image.fromarray(MASK).save(root / "train/masks/x.png")
    dataset = open_folder(root, "train", class_names=NAMES, mask_values=(1, 2, 3), void_index=0)
    assert np.array_equal(dataset[0].mask, np.where(MASK == 0, 255, MASK.astype(int) - 1))
    dataset = open_folder(root, "train", class_names=NAMES, mask_values=(3, 2, 1))
    with pytest.raises(DataError, match=r"has the ids 0: expected mask_values 3, 2, 1, and 255 for void"):
        dataset[0]


def test_masks_in_colours(root: Path) -> None:
    colours = np.array([(128, 0, 0), (0, 0, 255), (0, 128, 64), (0, 0, 0)], np.uint8)
    Image.fromarray(colours[MASK]).save(root / "train/masks/x.png")
    values = (0x800000, 0x0000FF, 0x008040)
    dataset = open_folder(root, "train", class_names=NAMES, mask_values=values, void_index=0)
    assert np.array_equal(dataset[0].mask, np.where(MASK == 3, 255, MASK))
    assert np.array_equal(dataset.palette, colours[:3])
    no_void = open_folder(root, "train", class_names=NAMES, mask_values=values)
    with pytest.raises(DataError, match=r"has the colours 0x000000: expected mask_values 0x800000, .* none for void"):
        no_void[0]
    picture = Image.fromarray(MASK)
    picture.putpalette(colours.ravel().tolist())
    picture.save(root / "train/masks/x.png")  # a palette PNG: its colours count now
    assert np.array_equal(dataset[0].mask, np.where(MASK == 3, 255, MASK))
    Image.fromarray(MASK).save(root / "train/masks/x.png")
    with pytest.raises(DataError, match=r"has the format L: expected RGB, for mask_values are colours"):
        dataset[0]


def test_list_layout_keeps_the_order_of_the_list(root: Path) -> None:
    (root / "train").rename(root / "all")
    for folder, suffix in (("images", ".jpg"), ("masks", ".png")):
        (root / "all" / folder).rename(root / folder)
        for name in ("p", "q", "unused"):
            Image.fromarray(IMAGE if folder == "images" else MASK).save(root / folder / f"{name}{suffix}")
    (root / "mine.txt").write_text("q\n\np\n")
    dataset = read(root, "mine")
    assert [sample.name for sample in (dataset[0], dataset[1])] == ["q", "p"]
    assert len(dataset) == 2
    (root / "mine.txt").write_text("q\nnobody\n")
    with pytest.raises(DataError, match=r"mine\.txt names nobody, not in .*images: list one file name a line"):
        read(root, "mine")
    (root / "mine.txt").write_text("\n")
    with pytest.raises(DataError, match=r"no images named in .*mine\.txt"):
        read(root, "mine")


def test_cache_reads_a_file_once(root: Path) -> None:
    cached, uncached = read(root, cache=True), read(root)
    before = cached[0]
    (root / "train/images/x.png").unlink()
    assert cached[-1] is before
    assert not before.image.flags.writeable
    with pytest.raises(DataError, match="there is no image"):
        uncached[0]


def test_iteration_ends(root: Path) -> None:
    assert len(list(read(root))) == 1


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (MASK[:40], r"x\.png is 64 x 40 pixels but .*x\.png is 64 x 48 \(width x height\): a mask has the size of its"),
        (MASK + 4, r"x\.png has the ids 4, 5, 6, 7: expected 0 to 2 for 3 classes, and 3 and 255 for void; correct"),
        (
            IMAGE,
            r"masks/x\.png has RGB channels \(3072 colours: .*\): expected one 8-bit channel of class indices; convert",
        ),
        (MASK.astype(np.uint16), r"x\.png has 16 or 32 bits: expected one 8-bit channel"),
        (MASK > 1, r"x\.png has 1 bit: expected one 8-bit channel"),
    ],
)
def test_wrong_masks(root: Path, mask: np.ndarray, message: str) -> None:
    Image.fromarray(mask).save(root / "train/masks/x.png")
    with pytest.raises(DataError, match=message) as caught:
        read(root)[0]
    assert "\n" not in str(caught.value)


def test_a_truncated_jpeg_is_noticed(root: Path) -> None:
    path = root / "train/images/x.jpg"
    Image.fromarray(IMAGE).save(path, quality=95)
    (root / "train/images/x.png").unlink()
    read(root)[0]
    path.write_bytes(path.read_bytes()[:-1500])
    with pytest.raises(DataError, match=r"cannot read .*x\.jpg \(image file is truncated.*\): it is damaged"):
        read(root)[0]


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_a_file_that_is_no_image(root: Path, content: bytes) -> None:
    (root / "train/masks/x.png").write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read .*masks/x\.png \(.*\): it is damaged or no image"):
        read(root)[0]


def test_missing_folders(root: Path) -> None:
    layout = "expected SPLIT/images and SPLIT/masks, or images, masks and SPLIT.txt"
    with pytest.raises(DataError, match=f"no folder .*nowhere: {layout}"):
        read(root / "nowhere")
    with pytest.raises(
        DataError,
        match=rf"no split 'test' in .*, which holds train/images/ \(1 file\), train/masks/ \(1 file\): {layout}",
    ):
        read(root, "test")
    (root / "train/masks/x.png").unlink()
    (root / "train/masks").rmdir()
    with pytest.raises(DataError, match=rf"no folder .*train/masks: {layout} in .*; .* holds images/ \(1 file\)$"):
        read(root)


def test_what_a_folder_holds(tmp_path: Path) -> None:
    assert contents(tmp_path) == "no files"
    for name in ("Photos/a", "Photos/b", "Labels/a", "readme", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert contents(tmp_path) == "1 file, Labels/ (1 file), Photos/ (2 files)"


@pytest.mark.parametrize(
    ("images", "kind", "ending"),
    [
        ("images", "labels", "_mask"),
        ("imgs", "annotations", "_gt"),
        ("images", "masks", "_labels"),
        ("Photos", "Mask", "_L"),
        ("Images", "GT", "-a_b"),
    ],
)
def test_other_names_of_masks(root: Path, images: str, kind: str, ending: str) -> None:
    source = (root / "train/images").rename(root / "train" / images)
    folder = (root / "train/masks").rename(root / "train" / kind)
    (folder / "x.png").rename(folder / f"x{ending}.png")
    for name in ("y", "z"):
        Image.fromarray(IMAGE).save(source / f"{name}.png")
    Image.fromarray(MASK).save(folder / f"y{ending}.png")
    dataset = read(root)
    assert dataset.names == ("x", "y")
    assert dataset.left_out == ("z",)
    (folder / f"y{ending}.png").unlink()
    with pytest.raises(DataError, match=r"no mask for y, z: expected .*; add the masks, or take these names out of"):
        read(root)


@pytest.mark.parametrize("ending", ["", "_seg", "_rgb", "_rgb_mask"])
def test_images_that_share_an_ending(root: Path, ending: str) -> None:
    folder = root / "train"
    for name in ("x", "x_1", "y"):
        Image.fromarray(IMAGE).save(folder / f"images/{name}_rgb.png")
        Image.fromarray(MASK).save(folder / f"masks/{name}{ending}.png")
    (folder / "images/x.png").unlink()
    if ending:
        (folder / "masks/x.png").unlink()
    assert [(image.stem, mask.stem) for image, mask in find_pairs(root, "train")[0]] == [
        (f"{name}_rgb", f"{name}{ending}") for name in ("x_1", "x", "y")
    ]


def test_masks_of_something_else_are_no_masks_of_these(root: Path) -> None:
    """All images end in _left, all masks in _right: two cameras, not a photograph and its mask."""
    folder = root / "train"
    for kind, ending in (("images", "left"), ("masks", "right")):
        (folder / kind / "x.png").rename(folder / kind / f"x_{ending}.png")
    with pytest.raises(DataError, match=r"no image for x_right\.png"):
        read(root)


def test_a_size_is_said_before_foreign_values(root: Path) -> None:
    Image.fromarray(IMAGE[:40]).save(root / "train/masks/x.png")
    with pytest.raises(DataError, match=r"is 64 x 40 pixels but .* is 64 x 48"):
        read(root)[0]


def test_pairs_must_be_whole(root: Path) -> None:
    image, mask = root / "train/images/x.png", root / "train/masks/x.png"
    mask.rename(mask.with_name("y.png"))
    with pytest.raises(DataError, match=r"no image for y\.png in .*masks, and .*images holds x\.png: a mask has"):
        read(root)
    (mask.with_name("y.png")).unlink()
    with pytest.raises(DataError, match=r"no mask for x: expected .*masks/x\.png"):
        read(root)
    Image.fromarray(IMAGE).save(image.with_suffix(".jpg"))
    with pytest.raises(DataError, match=r"x\.jpg and x\.png share one name"):
        read(root)
    image.unlink()
    image.with_suffix(".jpg").unlink()
    with pytest.raises(DataError, match=r"no images in .*images: expected files \.jpg"):
        read(root)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_names": ()}, "expected 2 to 255 class names, got 0"),
        ({"class_names": NAMES, "void_index": 2}, "void_index is 3 to 255, beyond the class indices, not 2"),
        ({"class_names": NAMES, "mask_values": (0, 1)}, r"2 mask_values \(0, 1\) for 3 class names: expected as many"),
        ({"class_names": NAMES, "mask_values": (0, 1, 1)}, r"3 mask_values \(0, 1, 1\) for 3 .* as many different"),
        ({"class_names": NAMES, "mask_values": (5, 6, 7), "void_index": 6}, "void_index is .* no class, 0 to 255, not"),
        ({"class_names": NAMES, "palette": np.zeros((2, 3))}, r"palette of shape \(2, 3\): expected one RGB colour"),
    ],
)
def test_wrong_options(root: Path, options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_folder(root, "train", **options)


def test_default_palettes_are_distinct() -> None:
    palette = default_palette(255)
    assert palette.dtype == np.uint8
    assert len(np.unique(palette, axis=0)) == 255
    assert np.array_equal(default_palette(8), palette[:8])
    few = default_palette(20).astype(int)
    distance = np.abs(few[:, None] - few).sum(2) + 999 * np.eye(20, dtype=int)
    assert distance.min() > 40


@pytest.mark.skipif(not CAMVID.is_dir(), reason="needs CamVid in ../shared/camvid")
def test_camvid() -> None:
    names = ["sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"]
    train, val = (open_folder(CAMVID, split, class_names=names, void_index=11) for split in ("train", "val"))
    assert (len(train), len(val)) == (367, 101)
    sample = val[0]
    assert sample.image.shape == (360, 480, 3)
    assert set(np.unique(sample.mask)) <= {*range(11), 255}
    # Sky is brighter than road: images and masks belong together.
    assert sample.image[sample.mask == 0].mean() > sample.image[sample.mask == 3].mean()
