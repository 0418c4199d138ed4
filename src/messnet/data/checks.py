"""The check of a data set: reads every sample once and tells what is there and what is wrong."""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from messnet.data import IGNORE_INDEX, SegmentationDataset, SegmentationSample
from messnet.data.groups import thumbnail
from messnet.data.image_files import FileDataset, FileHeader, SampleError
from messnet.data.listings import some
from messnet.errors import DataError
from messnet.records.codec import to_plain

WHAT_TO_DO = {
    "unreadable file": "copy these files again or remove them",
    "mask of another size": "make each mask at the size of its image, without interpolation between ids",
    "mask of another format": "save masks as 8-bit PNG of class indices, or list the colour of each class as "
    "data.mask_values: [0xRRGGBB, ...]",
    "unknown ids": "name every class in data.class_names; for other ids give data.mask_values (the value of each "
    "class, in order) or data.void_index (the value to ignore)",
}
SHOWN = 5
"""Problems of a kind that are printed; JSON has all."""
MUCH_VOID = 0.3
FEW_BITS = 15
"""Images of 16 bits whose largest value needs less than these hold data of 8 to 14 bits, as of many cameras."""


@dataclass(frozen=True)
class ImageFacts:
    """One image as the check remembers it: enough to compare it with others."""

    name: str
    group: str
    """"" where it stands for itself."""
    content: str
    """A hash of its pixels."""
    thumbnail: bytes
    """As ``thumbnail`` makes it."""
    is_labelled: bool
    """Whether any pixel counts."""


@dataclass(frozen=True, kw_only=True)
class DatasetReport:
    """One split. Shares are of pixels, in [0, 1], over the samples without a problem."""

    num_images: int
    """All of them, with or without a problem."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Readable images per size "HEIGHTxWIDTH", the most frequent first."""
    class_share: dict[str, float] = field(default_factory=dict)
    """Share of each class in the labelled pixels; sums to 1 unless there are none."""
    class_images: dict[str, int] = field(default_factory=dict)
    """Number of images that the class is in."""
    void_share: float = 0.0
    """Share of the pixels that count nowhere in all pixels."""
    unlabelled: tuple[str, ...] = ()
    """Names of images that are void everywhere."""
    problems: tuple[str, ...] = ()
    """One line each; a sample with a problem counts nowhere else."""
    problem_kinds: dict[str, int] = field(default_factory=dict)
    """Number of problems of each kind that files have."""
    unknown_ids: dict[str, int] = field(default_factory=dict)
    """Images per value that is no class; colours as 0xRRGGBB."""
    label_formats: dict[str, int] = field(default_factory=dict)
    """Images per way that labels are stored; empty for a data set that is not in files."""
    duplicates: tuple[tuple[str, ...], ...] = ()
    """Names of images of this split with the same pixels."""
    notes: tuple[str, ...] = ()
    """Findings that stop nothing but are worth a look, each with what to do."""
    image_formats: dict[str, int] = field(default_factory=dict)
    """Images per way that pixels are stored; empty for a data set that is not in files."""
    groups: dict[str, int] = field(default_factory=dict)
    """Images per group that ``data.group`` or the data set itself names, without images that stand for themselves."""
    images: tuple[ImageFacts, ...] = field(default=(), repr=False)
    """Those without a problem, in order; not in the record."""

    def to_record(self) -> dict[str, object]:
        """Plain values for JSON, without ``images``."""
        return {one.name: to_plain(getattr(self, one.name)) for one in fields(self) if one.name != "images"}

    def to_text(self) -> str:
        lines = [f"{self.num_images} images, height x width: {_counted(self.sizes) or 'none readable'}"]
        if set(self.image_formats) - {"RGB"}:
            lines.append(f"images: {_counted(self.image_formats)}; all are read as RGB")
        if self.label_formats:
            lines.append(f"labels: {_counted(self.label_formats)}")
        width = max(map(len, (*self.class_share, "void")))
        for name, share in self.class_share.items():
            where = f"in {self.class_images[name]} images" if share else "in no image"
            lines.append(f"  {name:<{width}} {share:7.2%}  {where:<16} {'#' * round(40 * share)}".rstrip())
        lines.append(f"  {'void':<{width}} {self.void_share:7.2%}  of all pixels")
        if self.groups:
            counts = list(self.groups.values())
            lines.append(f"groups: {len(counts)}, of {min(counts)} to {max(counts)} images")
        if self.unlabelled:
            lines.append(f"{len(self.unlabelled)} images without any label: {some(self.unlabelled)}")
        lines += [f"note: {note}" for note in self.notes]
        lines.append(f"{len(self.problems) or 'no'} problem{'s' * (len(self.problems) != 1)}")
        for kind, count in self.problem_kinds.items():
            lines.append(f"  {count} x {kind}: {WHAT_TO_DO[kind]}")
            if kind == "unknown ids":
                lines.append(f"    images per id: {_counted(self.unknown_ids)}")
        lines += [f"  {problem}" for problem in self.problems[:SHOWN]]
        if len(self.problems) > SHOWN:
            lines.append(f"  and {len(self.problems) - SHOWN} more: --json lists all")
        return "\n".join(lines)


def check_dataset(
    dataset: SegmentationDataset, *, progress: Callable[[Iterable[int]], Iterable[int]] = iter, num_threads: int = 1
) -> DatasetReport:
    """Read every sample once; a DataError becomes a line of the report. ``progress`` wraps the indices, as tqdm does.
    ``num_threads`` above 1 asks that the data set may be read from several threads, as those in files may."""
    tally, num_images, look = _Tally(dataset), len(dataset), partial(_look, dataset)
    looks = _ahead(look, num_images, num_threads) if num_threads > 1 else map(look, range(num_images))
    for _ in progress(range(num_images)):
        tally.add(next(looks))
    return tally.report()


def left_out_note(dataset: SegmentationDataset) -> str:
    """A line where images have no mask and are left out, else nothing."""
    names = dataset.left_out if isinstance(dataset, FileDataset) else ()
    images = "image without a mask is" if len(names) == 1 else "images without a mask are"
    return f"{len(names)} {images} left out: {some(names)}" if names else ""


def failed_report(error: DataError) -> DatasetReport:
    """The report of a split that cannot be opened at all."""
    return DatasetReport(num_images=0, problems=(str(error),))


@dataclass(frozen=True)
class _Look:
    """One sample as it was read; it has ``facts`` and ``counts`` only if it has no problem."""

    size: tuple[int, int] | None
    header: FileHeader | None
    facts: ImageFacts | None = None
    counts: NDArray[np.int64] | None = None
    error: DataError | None = None


def _look(dataset: SegmentationDataset, index: int) -> _Look:
    header = dataset.header(index) if isinstance(dataset, FileDataset) else None
    try:
        sample = dataset[index]
        _expect_sound(sample, len(dataset.class_names))
    except DataError as error:
        return _Look(header.size if header else None, header, error=error)
    # The hash is of pixels, so that a file copied under another name or compression without loss is found too.
    content = hashlib.blake2b(np.ascontiguousarray(sample.image).data, digest_size=16)
    # A blank image has the same bytes at 2 x 8 and at 4 x 4.
    content.update(repr(sample.image.shape).encode())
    # With a place for every byte, so that counts of all samples add up.
    counts = np.bincount(sample.mask.ravel(), minlength=IGNORE_INDEX + 1)
    is_labelled = bool(counts[IGNORE_INDEX] < counts.sum())
    facts = ImageFacts(sample.name, sample.group, content.hexdigest(), thumbnail(sample.image), is_labelled)
    height, width = sample.mask.shape
    return _Look((height, width), header, facts, counts)


def _ahead(look: Callable[[int], _Look], num_images: int, num_threads: int) -> Iterator[_Look]:
    """In order; only a few are begun ahead, since a data set does not fit in memory."""
    indices = iter(range(num_images))
    with ThreadPoolExecutor(num_threads) as pool:
        # Four samples a thread are enough to keep all threads busy while the oldest is waited for.
        waiting: deque[Future[_Look]] = deque(pool.submit(look, index) for index in islice(indices, 4 * num_threads))
        while waiting:
            done = waiting.popleft().result()
            # One is begun for each that is taken out.
            waiting.extend(pool.submit(look, index) for index in islice(indices, 1))
            yield done


class _Tally:
    """Adds samples up, in order."""

    def __init__(self, dataset: SegmentationDataset) -> None:
        self.dataset = dataset
        self.num_classes = len(dataset.class_names)
        self.sizes: Counter[str] = Counter()
        self.formats: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.unknown: Counter[int] = Counter()
        self.pixels = np.zeros(IGNORE_INDEX + 1, np.int64)
        self.images = np.zeros(IGNORE_INDEX + 1, np.int64)
        self.facts: list[ImageFacts] = []
        self.image_formats: Counter[str] = Counter()
        self.brightest: list[int] = []
        self.problems: list[str] = []
        if np.shape(dataset.palette) != (self.num_classes, 3):
            self.problems.append(f"palette of shape {np.shape(dataset.palette)}: expected ({self.num_classes}, 3)")

    def add(self, look: _Look) -> None:
        if look.size is not None:
            self.sizes[f"{look.size[0]}x{look.size[1]}"] += 1
        if look.header is not None:
            self.formats[look.header.label_format] += 1
            if look.header.image_format:
                self.image_formats[look.header.image_format] += 1
            if look.header.brightest is not None:
                self.brightest.append(look.header.brightest)
        if look.error is not None:
            self.problems.append(str(look.error))
            if isinstance(look.error, SampleError):
                self.kinds[look.error.kind] += 1
                self.unknown.update(look.error.values)
        if look.counts is not None and look.facts is not None:
            self.pixels += look.counts
            self.images += look.counts > 0
            self.facts.append(look.facts)

    def report(self) -> DatasetReport:
        names, labelled = self.dataset.class_names, self.pixels[: self.num_classes]
        if problem := self._mistaken_foreground():
            self.problems.append(problem)
        return DatasetReport(
            num_images=len(self.dataset),
            sizes=dict(self.sizes.most_common()),
            class_share=dict(zip(names, (labelled / max(1, labelled.sum())).tolist(), strict=True)),
            class_images=dict(zip(names, self.images[: self.num_classes].tolist(), strict=True)),
            void_share=self._void_share(),
            unlabelled=tuple(image.name for image in self.facts if not image.is_labelled),
            problems=tuple(self.problems),
            problem_kinds=dict(self.kinds.most_common()),
            unknown_ids={
                f"0x{value:06x}" if max(self.unknown) > IGNORE_INDEX else str(value): count
                for value, count in sorted(self.unknown.items())
            },
            label_formats=dict(self.formats.most_common()),
            duplicates=tuple(self._duplicates()),
            notes=tuple(self._notes()),
            image_formats=dict(self.image_formats.most_common()),
            groups=dict(Counter(image.group for image in self.facts if image.group).most_common()),
            images=tuple(self.facts),
        )

    def _duplicates(self) -> Iterator[tuple[str, ...]]:
        names: dict[str, list[str]] = {}
        for image in self.facts:
            names.setdefault(image.content, []).append(image.name)
        yield from (tuple(same) for same in names.values() if len(same) > 1)

    def _void_share(self) -> float:
        return float(self.pixels[IGNORE_INDEX] / max(1, self.pixels.sum()))

    def _mistaken_foreground(self) -> str:
        """Masks drawn in black and white: the white half is read as void, which is no error but leaves nothing to
        learn."""
        # Only of files: what a user's own code hands out as 255 is meant as void.
        present = np.flatnonzero(self.pixels).tolist()
        if self.num_classes > 1 and present == [0, IGNORE_INDEX] and isinstance(self.dataset, FileDataset):
            return (
                f"the masks hold nothing but 0 and {IGNORE_INDEX}, and {IGNORE_INDEX} means void: if it is the "
                f"second class here, say data.mask_values: [0, {IGNORE_INDEX}]"
            )
        return ""

    def _notes(self) -> Iterator[str]:
        if note := left_out_note(self.dataset):
            yield note
        if len(self.sizes) > 1:
            yield "images differ in size: training needs a crop (pretrain.augment.crop, distill.augment.crop)"
        # A class name that no mask has is often one that was listed in the wrong place.
        absent = [name for k, name in enumerate(self.dataset.class_names) if not self.pixels[k]]
        if absent and self.sizes:
            yield f"no pixel of {some(absent)}: their IoU is undefined here; are the class names in order?"
        # Masks that count classes from 1: the last id is unknown, and nothing is class 0.
        if sorted(self.unknown) == [self.num_classes] and not self.pixels[0]:
            yield (
                f"ids run from 1 to {self.num_classes}: if 0 is no class, say data.mask_values: [1, 2, ..., "
                f"{self.num_classes}] and data.void_index: 0"
            )
        if self._void_share() > MUCH_VOID:
            yield f"{self._void_share():.0%} of all pixels are void: is {IGNORE_INDEX} or data.void_index a class?"
        if self.brightest and (bits := max(self.brightest).bit_length()) < FEW_BITS:
            yield (
                f"images of 16 bits hold no value above {max(self.brightest)}: {bits}-bit data, which is read as dark "
                f"as 16 bits say, at most {max(self.brightest) // 257} of 255; multiply it by {1 << 16 - bits}, or "
                "save it with 8 bits"
            )
        if same := [" = ".join(names) for names in self._duplicates()]:
            yield f"the same image under several names: {some(same)}; keep one of each, or it counts twice"


def _counted(counts: Mapping[str, int]) -> str:
    shown = ", ".join(f"{name} ({count})" for name, count in list(counts.items())[:SHOWN])
    return shown if len(counts) <= SHOWN else f"{shown} and {len(counts) - SHOWN} more"


def _expect_sound(sample: SegmentationSample, num_classes: int) -> None:
    """Raises DataError where a sample is not what SegmentationSample promises: a user's data set may do anything."""
    image, mask = np.asarray(sample.image), np.asarray(sample.mask)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise DataError(
            f"{sample.name}: expected an image (H, W, 3) uint8, got {image.shape} {image.dtype}{_remedy(image)}"
        )
    if mask.dtype != np.uint8 or mask.shape != image.shape[:2]:
        raise DataError(f"{sample.name}: expected a mask {image.shape[:2]} uint8, got {mask.shape} {mask.dtype}")
    wrong = np.unique(mask[(mask >= num_classes) & (mask != IGNORE_INDEX)]).tolist()
    if wrong:
        raise DataError(f"{sample.name}: expected labels 0 to {num_classes - 1} or {IGNORE_INDEX}, got {wrong[:5]}")


def _remedy(image: NDArray[np.generic]) -> str:
    """How an array of another form becomes an image, where that can be told."""
    if image.dtype != np.uint8:
        return ": scale it to 0 to 255 and convert it with astype(np.uint8)"
    if image.ndim == 3 and image.shape[0] == 3:
        return ": put channels last"
    if image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 1):
        return ": repeat the one channel, np.repeat(image.reshape(H, W, 1), 3, axis=2)"
    return ": choose three channels, image[..., :3]" if image.ndim == 3 and image.shape[2] > 3 else ""
