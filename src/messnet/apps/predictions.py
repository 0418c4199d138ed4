"""Image files in; masks, overlays and confidence maps out."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from messnet.apps.tiling import TiledResult, predict_tiled
from messnet.deployment.session import Result, Session
from messnet.errors import DataError, PredictionError, RecipeError
from messnet.images.reading import rgb_of
from messnet.records.files import write_atomically

__all__ = [
    "IMAGE_SUFFIXES",
    "VIDEO_SUFFIXES",
    "PredictOptions",
    "Predictions",
    "draw_exit_map",
    "exit_colour",
    "image_files",
    "overlay",
    "predict_files",
    "read_image",
    "write_mask",
]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")
_OVERLAY_STRENGTH = 0.55
# The report's: mid lightness, shallow to deep.
_EXIT_COLOURS = np.array([(0x2F, 0xA0, 0x8E), (0x4B, 0x86, 0xD3), (0x8B, 0x6C, 0xD0), (0xCF, 0x5F, 0x8D)])
_EXIT_MAP_SIDE = 1600


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
    """What neighbouring tiles share at least, in pixels; None: an eighth of the tile's shorter side."""

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


@dataclass(frozen=True)
class Predictions:
    """What was written, and what was not."""

    records: list[dict[str, Any]] = field(default_factory=list)
    """The records of predictions.json, one per image."""
    failed: list[str] = field(default_factory=list)
    """A line for each image that could not be read, or for which the network computes nothing finite."""


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
    try:
        with tqdm(total=len(files), desc="predict", unit="img", mininterval=1, dynamic_ncols=True) as bar:
            for batch in _batches(files, 1 if options.tiled else options.batch_size, done.failed):
                if not done.records:
                    _warm_up(session, batch[0][1], options)
                for file, image, result in _results(batch, session, options, done.failed):
                    done.records.append(_write(file, image, result, session, out))
                bar.update(len(done.records) + len(done.failed) - bar.n)
    finally:
        if done.records:
            summary: dict[str, Any] = {
                "instance": session.instance.name,
                "class_names": session.class_names,
                "predictions": done.records,
            }
            if done.failed:
                summary["failed"] = done.failed
            write_atomically(out / "predictions.json", json.dumps(summary, indent=1) + "\n")
    if not done.records:
        more = f" (and {len(done.failed) - 1} other images likewise)" if len(done.failed) > 1 else ""
        raise DataError(done.failed[0] + more)
    return done


def _batches(
    files: Sequence[Path], batch_size: int, failed: list[str]
) -> Iterator[list[tuple[Path, NDArray[np.uint8]]]]:
    """Images that follow each other and are of one size, read as they are needed. Adds to ``failed``."""
    batch: list[tuple[Path, NDArray[np.uint8]]] = []
    for file in files:
        try:
            image = read_image(file)
        except DataError as error:
            failed.append(str(error))
            continue
        if batch and (len(batch) == batch_size or image.shape != batch[0][1].shape):
            yield batch
            batch = []
        batch.append((file, image))
    if batch:
        yield batch


def _warm_up(session: Session, image: NDArray[np.uint8], options: PredictOptions) -> None:
    """So that the first image's latency is that of the network, as the others' is."""
    if options.tiled:
        height, width = options.tile or session.input_size or image.shape[:2]
        image = image[:height, :width]
    with suppress(PredictionError):  # of an exit that the image may not take; if it does, the prediction tells
        session.warm_up(image)


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
    if options.deadline_ms is not None:
        return [list(session.anytime(image, deadline_ms=options.deadline_ms))[-1] for image in images]
    return session.predict(images, batch_size=options.batch_size)


def _write(
    file: Path, image: NDArray[np.uint8], result: Result | TiledResult, session: Session, out: Path
) -> dict[str, Any]:
    """Writes the files of one image. Returns its record."""
    assert session.palette is not None
    name = f"{file.stem}.png"
    write_mask(out / "masks" / name, result.labels, session.palette)
    _write_png(out / "overlays" / name, Image.fromarray(overlay(image, result.labels, session.palette)))
    # In place: for an image of 8000 x 8000 pixels each copy is 256 MB.
    confidence = np.array(result.confidence_map, np.float32)
    confidence *= 255
    _write_png(out / "confidence" / name, Image.fromarray(confidence.round(out=confidence).astype(np.uint8)))
    record: dict[str, Any] = {
        "image": str(file),
        "mask": f"masks/{name}",
        "overlay": f"overlays/{name}",
        "confidence": f"confidence/{name}",
        "exit_index": result.exit_index,
        "image_confidence": result.image_confidence,
        "latency_ms": result.latency_ms,
    }
    if isinstance(result, TiledResult):
        exit_indices = [choice.exit_index for choice in session.instance.exits]
        _write_png(out / "exits" / name, Image.fromarray(draw_exit_map(image, result, exit_indices)))
        record |= {
            "exits": f"exits/{name}",
            "tiles": [
                {
                    "rows": tile.rows,
                    "columns": tile.columns,
                    "exit_index": tile.exit_index,
                    "image_confidence": tile.image_confidence,
                }
                for tile in result.tiles
            ],
        }
    return record


def read_image(path: Path) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB, upright as the file says. Raises DataError for a file that is no whole image."""
    try:
        with Image.open(path) as file:
            return rgb_of(file)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image ({error}); replace it") from error


def overlay(image: NDArray[np.uint8], labels: NDArray[np.uint8], palette: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The image (H, W, 3) with the classes (H, W) laid over it in the colours of ``palette`` (K, 3)."""
    colours = np.zeros((256, 3), np.float32)
    colours[: len(palette)] = palette * np.float32(_OVERLAY_STRENGTH)
    blend = image * np.float32(1 - _OVERLAY_STRENGTH)
    blend += colours.take(labels, 0)
    blended: NDArray[np.uint8] = np.rint(blend, out=blend).astype(np.uint8)
    return blended


def exit_colour(place: int, num_exits: int) -> tuple[int, int, int]:
    """RGB of the exit at ``place`` among ``num_exits``, as in the report."""
    at = place / max(1, num_exits - 1) * (len(_EXIT_COLOURS) - 1)
    red, green, blue = (round(float(np.interp(at, range(len(_EXIT_COLOURS)), c))) for c in _EXIT_COLOURS.T)
    return red, green, blue


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
        draw.rectangle((left, top, right - 1, bottom - 1), outline="white")
        font = ImageFont.load_default(max(8.0, min(bottom - top, right - left) / 3))
        draw.text(((left + right) / 2, (top + bottom) / 2), str(tile.exit_index), (31, 35, 40), font, anchor="mm")
    return np.array(picture)


def image_files(paths: Iterable[Path]) -> list[Path]:
    """The image files among ``paths`` and in the folders among them. Raises DataError as ``predict_files`` does."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(
                file
                for file in path.iterdir()
                if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
            )
            if not found:
                raise DataError(f"folder {path} holds no image; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
            files += found
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


def write_mask(path: Path, labels: NDArray[np.uint8], palette: NDArray[np.uint8]) -> None:
    """Class indices (H, W) as a PNG whose colours are ``palette`` (K, 3)."""
    mask = Image.fromarray(labels)
    mask.putpalette(palette.flatten().tolist())
    _write_png(path, mask)


def _write_png(path: Path, image: Image.Image) -> None:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())
