"""Image files in; masks, overlays and confidence maps out."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from messnet.apps.tiling import TiledResult, predict_tiled
from messnet.costs.processor import free_memory
from messnet.deployment.session import Result, Session
from messnet.errors import DataError, PredictionError, RecipeError
from messnet.images.colours import exit_colour
from messnet.images.drawing import as_png, confidence_as_grey, legend, mask, overlay
from messnet.images.preprocessing import resize_map
from messnet.images.reading import dimness, large_images, list_images, read_image
from messnet.records.files import write_atomically

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")
_EXIT_MAP_SIDE = 1600
_MANY = 50  # images, from which on it pays to load compiled passes
# Pictures for the eye: a third of the time of Pillow's default, for files a tenth larger.
_FAST = 1
# Threads that draw, compress and write while the network runs, and how many images may wait for them.
_WRITERS, _WAITING = 2, 4
# Memory that a runtime takes, over that of the activations which are alive at once: 1.7 in ONNX Runtime, whose buffers
# also hold what it will not need again.
_TAKEN = 2.0
# Values of an image, beyond which it is written before the next one is read.
_LARGE = 3 * 4096**2


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """How images are run."""

    batch_size: int = 1
    """Images of one size, or tiles, that go through the network together; at least 1."""
    deadline_ms: float | None = None
    """Time for each image, above 0: exit after exit while it lasts, thresholds or not. None: the instance's setting."""
    tile: tuple[int, int] | None = None
    """(height, width) in pixels of the tiles that larger images are cut into; None: images are run whole, or with a
    ``tile_overlap`` in tiles of the size that the network was made for."""
    tile_overlap: int | None = None
    """The least that neighbouring tiles share, in pixels; None: an eighth of the tile's shorter side."""
    overlays: bool = True
    """Write the image with its classes laid over it."""
    legend: bool | None = None
    """Below each overlay the colours and names of the classes that were found; None: where they take at most half of
    the picture's height."""
    confidence: bool = True
    """Write the confidence map as a picture."""
    large_images: bool = False
    """Take images of more than 179 million pixels, which are refused otherwise: a small file can claim to be huge.
    Whether they are scaled down is the session's ``full_size``."""

    @property
    def tiled(self) -> bool:
        return self.tile is not None or self.tile_overlap is not None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise RecipeError(f"a batch holds at least 1 image, not {self.batch_size}")
        if self.deadline_ms is not None and not self.deadline_ms > 0:
            raise RecipeError(f"the deadline is a time above 0 ms, not {self.deadline_ms:g}")
        if self.deadline_ms is not None and (self.tiled or self.batch_size > 1):
            raise RecipeError("a deadline is for one whole image at a time: leave tiles and batches out")


class TileRecord(TypedDict):
    """One tile of an image, as predictions.json has it."""

    rows: tuple[int, int]
    """Pixels, the end exclusive."""
    columns: tuple[int, int]
    exit_index: int
    image_confidence: float
    """In [0, 1]."""


class PredictionRecord(TypedDict):
    """One image, as predictions.json has it. Files are named relative to its folder."""

    image: str
    """The file that was read."""
    mask: str
    exit_index: int
    """The exit taken; with tiles the deepest."""
    image_confidence: float
    """In [0, 1]."""
    latency_ms: float
    overlay: NotRequired[str]
    confidence: NotRequired[str]
    exits: NotRequired[str]
    """With tiles: the picture of the exit that each took."""
    tiles: NotRequired[list[TileRecord]]


@dataclass(frozen=True)
class Predictions:
    """The outcome of ``predict_files``: what was written, and what was not."""

    records: list[PredictionRecord] = field(default_factory=list)
    """The entries of predictions.json, one per image."""
    failed: list[str] = field(default_factory=list)
    """A line for each image that could not be read, or for which the network computes nothing finite."""
    notes: list[str] = field(default_factory=list)
    """A line for each image that was read but looks wrong."""


def predict_files(
    session: Session, images: Sequence[Path], out: Path, options: PredictOptions | None = None
) -> Predictions:
    """Predicts image files and folders of them; writes masks, overlays, confidence maps and predictions.json to
    ``out``, with tiles also a picture of the exit that each took.

    An image that cannot be read or predicted is left out and named in the result; predictions.json is written whatever
    comes, an interrupt too. Raises DataError for a missing image, or two of the same name: files of one image are
    NAME.png; and when not one could be read.
    """
    options = options or PredictOptions()
    files = image_files(images)
    done = Predictions()
    # A deadline is kept on a machine that does nothing else meanwhile.
    writing = _Writing(done.records, waiting=0 if options.deadline_ms is not None else _WAITING)
    try:
        with (
            large_images() if options.large_images else nullcontext(),
            writing,
            tqdm(total=len(files), desc="predict", unit="img", mininterval=1, dynamic_ncols=True) as bar,
        ):
            # Only now is an image known that can be read, and with it the size that the network is warmed up at. Where
            # there is no other image, the warm-up would take longer than what it makes faster.
            warm, told = len(files) == 1, options.tiled
            for batch in _batches(files, 1 if options.tiled else options.batch_size, done):
                if not warm:
                    _warm_up(session, batch[0][1], options, compiled=len(files) >= _MANY)
                    warm = True
                for file, image, result in _results(batch, session, options, done.failed):
                    if not told and (words := scaling(session, file.name, image)):
                        done.notes.append(words)
                        told = True
                    writing.add(_files_of(file, image, result, session, options), out)
                # Images that failed count too, or the bar would never be full.
                bar.update(writing.added + len(done.failed) - bar.n)
    finally:
        if done.records:
            summary: dict[str, object] = {
                "instance": session.instance.name,
                "class_names": session.class_names,
                "palette": None if session.palette is None else session.palette.tolist(),
                "predictions": done.records,
                "failed": done.failed,
            }
            write_atomically(out / "predictions.json", json.dumps(summary, indent=1) + "\n")
    if not done.records:
        more = f" (and {len(done.failed) - 1} other images likewise)" if len(done.failed) > 1 else ""
        raise DataError(done.failed[0] + more)
    written = {record["mask"] for record in done.records}
    if older := sum(f"masks/{file.name}" not in written for file in (out / "masks").iterdir()):
        done.notes.append(f"{out}/ also holds the files of {older} image{'s' * (older > 1)} of an earlier call")
    return done


def scaling(session: Session, name: str, image: NDArray[np.uint8]) -> str | None:
    """A remark on an image (H, W, 3) that is scaled down because it is larger than those that the network was trained
    on; None for others."""
    if session.resize is not None or session.input_size is None or session.resized_size(image) == image.shape[:2]:
        return None
    (height, width), trained = image.shape[:2], session.input_size
    return (
        f"{name} has {width} x {height} pixels, the network learned on {trained[1]} x {trained[0]}: larger images are "
        f"scaled to that first, --full-size computes them as they are"
    )


def _expect_room(session: Session, images: Sequence[NDArray[np.uint8]]) -> None:
    """Raises PredictionError for a batch of images of one size whose activations would not fit into the free memory, as
    far as that and the network's own table tell."""
    costs, free = session.workload, free_memory()
    if costs is None or free is None or session.device != "cpu":
        return
    counted = costs.column("memory_bytes", [choice.exit for choice in session.instance.exits]).leaving().max()
    scale = len(images) * math.prod(session.resized_size(images[0])) / math.prod(costs.input_size)
    if (needed := _TAKEN * scale * float(counted)) > free:
        height, width = images[0].shape[:2]
        raise PredictionError(
            f"{width} x {height} pixels would take about {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} are free: "
            f"leave --full-size out, or cut the image into parts with --tile"
        )


class _Writing:
    """Draws, compresses and writes the files of images in threads of its own, which Pillow and NumPy let run beside the
    network; a picture takes as long to compress as a small network to predict. ``records`` are filled in order."""

    def __init__(self, records: list[PredictionRecord], waiting: int) -> None:
        self.added = 0
        """Images so far."""
        self._records, self._most_waiting = records, waiting
        self._pool = ThreadPoolExecutor(_WRITERS, "writing")
        self._waiting: deque[Future[PredictionRecord]] = deque()

    def add(self, files: _Files, out: Path) -> None:
        """Writes them soon; waits while too many do. Raises what went wrong with earlier ones."""
        self.added += 1
        self._waiting.append(self._pool.submit(files.write, out))
        # The oldest first: records keep the order of the images, whichever thread is done before.
        while len(self._waiting) > (0 if files.is_large else self._most_waiting):
            self._records.append(self._waiting.popleft().result())

    def __enter__(self) -> _Writing:
        return self

    def __exit__(self, *_: object) -> None:
        """What was predicted is written, whatever ended the block."""
        with self._pool:
            while self._waiting:
                self._records.append(self._waiting.popleft().result())


@dataclass(frozen=True)
class _Files:
    """The files of one image, still to be drawn, and its record."""

    record: PredictionRecord
    draw: dict[str, Callable[[], bytes]]
    """Functions that give the bytes of each file, by its path within the folder."""
    is_large: bool
    """So large that only one such image is held at a time."""

    def write(self, out: Path) -> PredictionRecord:
        for name, draw in self.draw.items():
            write_atomically(out / name, draw())
        return self.record


def _batches(
    files: Sequence[Path], batch_size: int, done: Predictions
) -> Iterator[list[tuple[Path, NDArray[np.uint8]]]]:
    """Images that follow each other and are of one size, read as they are needed. Adds to what failed and to notes."""
    batch: list[tuple[Path, NDArray[np.uint8]]] = []
    for file in files:
        try:
            image = read_image(file)
        except DataError as error:
            done.failed.append(str(error))
            continue
        if (words := dimness(int(image.max()))) is not None:
            done.notes.append(f"{file} is {words}")
        if batch and (len(batch) == batch_size or image.shape != batch[0][1].shape):
            yield batch
            batch = []
        batch.append((file, image))
    if batch:
        yield batch


def _warm_up(session: Session, image: NDArray[np.uint8], options: PredictOptions, *, compiled: bool) -> None:
    """Runs an image without keeping the result: then the first image's latency is the network's, as the others' is."""
    if options.tiled:
        height, width = options.tile or session.input_size or image.shape[:2]
        image = image[:height, :width]
    with suppress(PredictionError):  # of an exit that the image may not take; if it does, the prediction tells
        _expect_room(session, [image])
        session.warm_up(image, compiled=compiled)


def _results(
    batch: Sequence[tuple[Path, NDArray[np.uint8]]], session: Session, options: PredictOptions, failed: list[str]
) -> Iterator[tuple[Path, NDArray[np.uint8], Result | TiledResult]]:
    """The results of a batch; an image that cannot be predicted takes none of the others with it. Adds to
    ``failed``."""
    try:
        results = _run([image for _, image in batch], session, options)
    except PredictionError as error:
        if len(batch) == 1:
            failed.append(f"{batch[0][0]}: {error}")
            return
        # Which one it was is not said, so each is run alone.
        for one in batch:
            yield from _results([one], session, options, failed)
        return
    for (file, image), result in zip(batch, results, strict=True):
        yield file, image, result


def _run(
    images: Sequence[NDArray[np.uint8]], session: Session, options: PredictOptions
) -> Sequence[Result | TiledResult]:
    if options.tiled:
        tile, overlap, size = options.tile, options.tile_overlap, options.batch_size
        return [predict_tiled(session, image, tile=tile, overlap=overlap, batch_size=size) for image in images]
    _expect_room(session, images)
    if options.deadline_ms is not None:
        return [list(session.anytime(image, deadline_ms=options.deadline_ms))[-1] for image in images]
    return session.predict(images, batch_size=options.batch_size)


def _files_of(
    file: Path, image: NDArray[np.uint8], result: Result | TiledResult, session: Session, options: PredictOptions
) -> _Files:
    """The files to be written for one image. The confidences are computed here, beside no other work of the runtime."""
    palette = session.palette
    assert palette is not None
    name = f"{file.stem}.png"
    record: PredictionRecord = {
        "image": str(file),
        "mask": f"masks/{name}",
        "exit_index": result.exit_index,
        "image_confidence": result.image_confidence,
        "latency_ms": result.latency_ms,
    }
    draw: dict[str, Callable[[], bytes]] = {f"masks/{name}": lambda: as_png(mask(result.labels, palette))}
    if options.overlays:
        record["overlay"] = f"overlays/{name}"

        def picture() -> bytes:
            size = image.shape[0], image.shape[1]
            shown = overlay(image, resize_map(result.labels, size), palette)
            strip = legend(size, session.class_names, palette, result.labels, wanted=options.legend)
            return as_png(Image.fromarray(np.concatenate([shown, strip])), compress_level=_FAST)

        draw[record["overlay"]] = picture
    if options.confidence:
        record["confidence"] = f"confidence/{name}"
        confidence = result.confidence_map
        draw[record["confidence"]] = lambda: as_png(confidence_as_grey(confidence), compress_level=_FAST)
    if isinstance(result, TiledResult):
        tiled, exit_indices = result, [choice.exit_index for choice in session.instance.exits]
        record["exits"] = f"exits/{name}"
        draw[record["exits"]] = lambda: as_png(Image.fromarray(draw_exit_map(image, tiled, exit_indices)))
        record["tiles"] = [
            {
                "rows": tile.rows,
                "columns": tile.columns,
                "exit_index": tile.exit_index,
                "image_confidence": tile.image_confidence,
            }
            for tile in result.tiles
        ]
    return _Files(record, draw, is_large=image.size > _LARGE)


def draw_exit_map(image: NDArray[np.uint8], result: TiledResult, exit_indices: Sequence[int]) -> NDArray[np.uint8]:
    """The image (H, W, 3), faded and at most 1600 pixels a side, with each tile's own part in the colour of its exit.

    ``exit_indices`` are the instance's exits, shallow to deep.
    """
    scale = min(1.0, _EXIT_MAP_SIDE / max(image.shape[:2]))
    height, width = (max(1, round(scale * side)) for side in image.shape[:2])
    small = Image.fromarray(image).resize((width, height), Image.Resampling.BOX)
    picture = Image.blend(small, Image.new("RGB", small.size, "white"), 0.55)
    draw = ImageDraw.Draw(picture)
    for tile in result.tiles:
        top, bottom = (round(scale * y) for y in tile.own_rows)
        left, right = (round(scale * x) for x in tile.own_columns)
        if right <= left or bottom <= top:  # less than a pixel of the picture
            continue
        colour = exit_colour(list(exit_indices).index(tile.exit_index), len(exit_indices))
        part = picture.crop((left, top, right, bottom))
        picture.paste(Image.blend(part, Image.new("RGB", part.size, colour), 0.45), (left, top))
        # Pillow's rectangles hold their last row and column.
        draw.rectangle((left, top, right - 1, bottom - 1), outline="white")
        font = ImageFont.load_default(max(8.0, min(bottom - top, right - left) / 3))
        draw.text(((left + right) / 2, (top + bottom) / 2), str(tile.exit_index), (31, 35, 40), font, anchor="mm")
    return np.array(picture)


def image_files(paths: Iterable[Path]) -> list[Path]:
    """The image files among ``paths`` and in the folders among them. Raises DataError as ``predict_files`` does."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += list_images(path)
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"no image {path}: expected an image file or a folder of them")
    if not files:
        raise DataError("no image given: name image files or folders after the run directory")
    seen: dict[str, Path] = {}
    for file in files:
        if file.stem in seen:
            raise DataError(f"{seen[file.stem]} and {file} would both be written as {file.stem}.png: rename one")
        seen[file.stem] = file
    return files
