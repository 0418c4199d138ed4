"""Image files in; masks, overlays and confidence maps out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from messnet.deployment.loading import load
from messnet.errors import DataError
from messnet.files import write_atomically

__all__ = ["IMAGE_SUFFIXES", "overlay", "predict_files", "read_image"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_OVERLAY_STRENGTH = 0.55


def predict_files(
    run: Path, images: Sequence[Path], out: Path, *, instance: str | None = None, device: str = "auto"
) -> list[dict[str, Any]]:
    """Predicts image files and folders of them; writes masks, overlays, confidence maps and predictions.json to
    ``out``. Returns the records of predictions.json, one per image.

    Raises DataError for a missing or unreadable image, or two of the same name: files of one image are NAME.png.
    """
    files = _image_files(images)
    session = load(run, instance=instance, device=_device(device))
    assert session.palette is not None
    palette = session.palette
    records = []
    for file in tqdm(files, desc="predict", unit="img", mininterval=1, dynamic_ncols=True):
        image = read_image(file)
        result = session.predict([image])[0]
        name = f"{file.stem}.png"
        _write_png(out / "masks" / name, _with_palette(result.labels, palette))
        _write_png(out / "overlays" / name, Image.fromarray(overlay(image, result.labels, palette)))
        confidence = (result.confidence_map * 255).round().astype(np.uint8)
        _write_png(out / "confidence" / name, Image.fromarray(confidence))
        records.append(
            {
                "image": str(file),
                "mask": f"masks/{name}",
                "overlay": f"overlays/{name}",
                "confidence": f"confidence/{name}",
                "exit_index": result.exit_index,
                "image_confidence": result.image_confidence,
                "latency_ms": result.latency_ms,
            }
        )
    summary = {
        "instance": session.instance.name,
        "class_names": session.class_names,
        "predictions": records,
    }
    write_atomically(out / "predictions.json", json.dumps(summary, indent=1) + "\n")
    return records


def read_image(path: Path) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB. Raises DataError for a file that is no whole image."""
    try:
        with Image.open(path) as file:
            return np.array(file.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path} cannot be read as an image ({error}); replace it") from error


def overlay(image: NDArray[np.uint8], labels: NDArray[np.uint8], palette: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The image (H, W, 3) with the classes (H, W) laid over it in the colours of ``palette`` (K, 3)."""
    return np.asarray(cv2.addWeighted(image, 1 - _OVERLAY_STRENGTH, palette[labels], _OVERLAY_STRENGTH, 0), np.uint8)


def _image_files(paths: Iterable[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
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


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise DataError("--device cuda was asked for but torch sees no CUDA device; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _with_palette(labels: NDArray[np.uint8], palette: NDArray[np.uint8]) -> Image.Image:
    mask = Image.fromarray(labels)
    mask.putpalette(palette.flatten().tolist())
    return mask


def _write_png(path: Path, image: Image.Image) -> None:
    import io

    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())
