"""Folders and lists of names, as people make them on any system: the part of a data set that is known before any
image is read."""

from __future__ import annotations

import codecs
import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from messnet.errors import DataError


def composed(name: str) -> str:
    """The name with each accented letter as one character (Unicode's form NFC). macOS and some archives write such a
    letter as two, so that two names which look the same would differ."""
    return unicodedata.normalize("NFC", name)


def visible(paths: Iterable[Path]) -> list[Path]:
    """The paths, sorted, without hidden files: ``._photo.png``, which macOS leaves beside ``photo.png`` on other
    systems' disks and in archives, is no image."""
    return sorted(path for path in paths if not path.name.startswith("."))


def list_files(folder: Path) -> dict[str, Path]:
    """The visible files of a folder by their composed names, sorted.

    Raises DataError when there is no such folder, or when two names differ in nothing but how an accented letter is
    written.
    """
    if not folder.is_dir():
        raise DataError(f"no folder {folder}: unpack the whole archive, or correct data.root")
    # All in one go: asking for each file takes long on network drives.
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    files: dict[str, Path] = {}
    for name in names:
        if composed(name) in files:
            raise DataError(f"{folder} holds {name!r} twice, with accents written in two ways: keep one of them")
        files[composed(name)] = folder / name
    return files


def read_text(path: Path) -> str:
    """The text of a small file, in the encodings that editors save: UTF-8 and UTF-16 with or without a byte order
    mark, and Windows' code page 1252.

    Raises DataError when it is none of them, or cannot be read at all.
    """
    try:
        data = path.read_bytes()
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return data.decode("utf-16")
        if b"\0" in data:
            # UTF-16 without a mark: of Latin letters the upper byte is 0, the second one where the lower comes first.
            return data.decode("utf-16-le" if data[1::2].count(0) > data[::2].count(0) else "utf-16-be")
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError:
            return data.decode("cp1252")  # last, for it takes nearly any bytes for letters
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path} ({error}): expected a text file; save it as UTF-8") from error


def read_names(listing: Path) -> list[str]:
    """The names in the list of a split, one a line, composed; of a line with several words the first.

    Raises DataError when there is no such list, or nothing in it.
    """
    if not listing.is_file():
        found = [path.stem for path in visible(listing.parent.glob("*.txt"))]
        raise DataError(f"no split {listing.stem!r}: no {listing}; there are {some(found) or 'none'}")
    names = [composed(line.split()[0]) for line in read_text(listing).splitlines() if line.strip()]
    if not names:
        raise DataError(f"no images named in {listing}: expected a name a line")
    return names


def bare_name(line: str, suffixes: Sequence[str]) -> str:
    """The name of an image from a line that may hold a path or a suffix: ``images\\a.JPG`` means ``a``."""
    # Lists come from Windows too, wherever they are read.
    path = PurePosixPath(line.replace("\\", "/"))
    return path.stem if path.suffix.lower() in suffixes else path.name


def find_root(root: Path, places: Sequence[str], holds: str, *, download: str) -> Path:
    """The first of ``root / place`` that has ``holds`` in it. Raises DataError, which says what to download."""
    for place in places:
        if (root / place / holds).exists():
            return root / place
    raise DataError(f"no {holds} in {root}{'' if root.is_dir() else ' (no such folder)'}: expected {download}")


def expect_files(what: str, names: Sequence[str], folder: Path) -> list[Path]:
    """The files of these names in ``folder``. ``what`` is "image" or "mask". Raises DataError where one is missing."""
    found = list_files(folder)
    if missing := [name for name in names if name not in found]:
        raise DataError(
            f"no {what} for {some([Path(name).stem for name in missing])}: expected {folder / missing[0]}"
            f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}; unpack the archive again"
        )
    return [found[name] for name in names]


def some(items: Sequence[object]) -> str:
    """The first few of them, and how many more."""
    shown = ", ".join(map(str, items[:5]))
    return shown if len(items) <= 5 else f"{shown} and {len(items) - 5} more"
