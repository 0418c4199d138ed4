"""Chosen images on the page: through every exit, the worst ones, and a map of confidence."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from messnet.records.instance import FINAL_HEAD, Exit, ExitChoice
from messnet.records.measurements import Gallery, Measurements
from messnet.report.figures import confidence_colours, confidence_picture, data_uri, label_picture


class _Picture(NamedTuple):
    source: str
    alt: str
    caption: str
    note: str = ""
    state: str = ""
    """CSS class: "taken" for the exit where the image stopped, "unseen" for the ones past it."""


def exit_name(of: Exit) -> str:
    return "final exit" if of.head == FINAL_HEAD else f"exit {of.exit_index}"


def _shown(gallery: Gallery, measurements: Measurements) -> list[int]:
    """Positions of at most two pictures: the one that left first and is easiest, the one that went furthest. The worst
    images are shown elsewhere."""
    ease = dict(zip(measurements.image_names, difficulty_of(measurements)[0], strict=True))
    # Sorted by the exit taken, and among images of one exit by difficulty.
    keys = [(int(gallery.exit_taken[g]), ease.get(name, 0.0)) for g, name in enumerate(gallery.image_names)]
    first = [g for g, name in enumerate(gallery.image_names) if name not in gallery.worst] or range(len(keys))
    order = sorted(first, key=keys.__getitem__)
    return sorted({order[0], order[-1]}, key=order.index) if order else []


class _Strip(NamedTuple):
    """One image through every exit."""

    name: str
    left: str
    """The exit where it stopped."""
    pictures: list[_Picture]


def strips_of(gallery: Gallery, measurements: Measurements) -> list[_Strip]:
    """For each picture shown: its name, in words where it left, and the pictures from input to final exit."""
    strips = []
    for g in _shown(gallery, measurements):
        name, taken = gallery.image_names[g], int(gallery.exit_taken[g])
        pictures = [
            _Picture(data_uri(gallery.images[g], "jpeg"), f"{name}, the input", "input"),
            _Picture(label_picture(gallery.masks[g], gallery.palette), f"{name}, the true labels", "label"),
        ]
        for e, place in enumerate(gallery.exits):
            state = "taken" if place.exit_index == taken else "unseen" if place.exit_index > taken else ""
            right, c_img = _share_right(gallery, g, e), float(gallery.image_confidence[g, e])
            alt = f"{name}, prediction of {exit_name(place)}: {right} of the pixels right"
            note = f"{right} right" + ("" if math.isnan(c_img) else f", confidence {c_img:.2f}")
            source = label_picture(gallery.predictions[g, e], gallery.palette)
            pictures.append(_Picture(source, alt, exit_name(place), note, state))
        left = next((exit_name(place) for place in gallery.exits if place.exit_index == taken), f"exit {taken}")
        strips.append(_Strip(name, left, pictures))
    return strips


class _Worst(NamedTuple):
    """One of the images that an instance gets most wrong."""

    name: str
    sentence: str
    pictures: list[_Picture]


def worst_of(gallery: Gallery) -> list[_Worst]:
    found = []
    for name in gallery.worst:
        g = gallery.image_names.index(name)
        e = next(e for e, place in enumerate(gallery.exits) if place.exit_index == gallery.exit_taken[g])
        mask, labels = gallery.masks[g], gallery.predictions[g, e]
        valid = mask < len(gallery.class_names)
        wrong = valid & (labels != mask)
        # The most frequent confusion of this image, as one number for each pair of classes.
        pairs, counts = np.unique(mask[wrong].astype(np.int64) * 256 + labels[wrong], return_counts=True)
        of, taken_for = divmod(int(pairs[counts.argmax()]), 256)
        share, most = 100 * wrong.sum() / valid.sum(), 100 * counts.max() / valid.sum()
        left = exit_name(gallery.exits[e])
        names = gallery.class_names
        sentence = f"{share:.0f} % of the pixels wrong, {most:.0f} % {names[of]} taken for {names[taken_for]}"
        pictures = [
            _Picture(data_uri(gallery.images[g], "jpeg"), f"{name}, the input", "input"),
            _Picture(label_picture(mask, gallery.palette), f"{name}, the true labels", "label"),
            _Picture(label_picture(labels, gallery.palette), f"{name}, prediction of {left}", "prediction", f"{left}"),
        ]
        if e < len(gallery.exits) - 1:
            last, right = exit_name(gallery.exits[-1]), _share_right(gallery, g, len(gallery.exits) - 1)
            deepest = label_picture(gallery.predictions[g, -1], gallery.palette)
            note = f"{last}, {right} right"
            pictures.append(_Picture(deepest, f"{name}, prediction of {last}", "had it gone on", note))
        found.append(_Worst(name, sentence, pictures))
    return found


def _share_right(gallery: Gallery, g: int, e: int) -> str:
    # Ignored pixels carry an id past the classes.
    valid = gallery.masks[g] < len(gallery.class_names)
    right = (gallery.predictions[g, e] == gallery.masks[g]) & valid
    return f"{100 * right.sum() / max(1, valid.sum()):.1f} %"


def class_legend(gallery: Gallery) -> list[tuple[str, str]]:
    """(class, colour) of the classes that occur in the pictures."""
    occurring = np.unique(np.concatenate([gallery.masks.ravel(), gallery.predictions.ravel()]))
    known = [int(k) for k in occurring if k < len(gallery.class_names)]
    return [(gallery.class_names[k], f"#{gallery.palette[k].tobytes().hex()}") for k in known]


class _ConfidenceExample(NamedTuple):
    """A confidence map before and after edge refinement."""

    exit: str
    name: str
    c_img: float
    choice: ExitChoice | None
    pictures: list[_Picture]
    gradient: str


def confidence_pictures(gallery: Gallery, measurements: Measurements) -> _ConfidenceExample | None:
    """The confidence map of one image before and after edge refinement, at the first exit that decides something on
    the image that went furthest. None where no exit decides anything."""
    shown = _shown(gallery, measurements)
    deciding = [e for e in range(len(gallery.exits)) if shown and np.isfinite(gallery.image_confidence[shown[-1], e])]
    if not deciding:
        return None
    g, e = shown[-1], deciding[0]
    name = gallery.image_names[g]
    pictures = [_Picture(data_uri(gallery.images[g], "jpeg"), f"{name}, the input", "input")]
    for caption, values in (("before", gallery.confidence[g, e]), ("after", gallery.refined[g, e])):
        source = confidence_picture(values)
        alt, note = f"{name}, confidence map {caption} edge refinement", f"mean {values.mean(dtype=np.float64):.3f}"
        pictures.append(_Picture(source, alt, f"{caption} edge refinement", note))
    return _ConfidenceExample(
        exit=exit_name(gallery.exits[e]),
        name=name,
        c_img=float(gallery.image_confidence[g, e]),
        choice=_choice_behind(gallery, e, measurements),
        pictures=pictures,
        gradient=", ".join(confidence_colours()),
    )


def _choice_behind(gallery: Gallery, e: int, measurements: Measurements) -> ExitChoice | None:
    """The thresholds of the gallery's exit, where exactly one measured instance has its exits."""
    # Two instances may share their exits and differ in thresholds: then the picture cannot say whose they are.
    rows = [row for row in measurements.rows if tuple(c.exit for c in row.instance.exits) == gallery.exits]
    return rows[0].instance.exits[e] if len(rows) == 1 else None


def difficulty_of(measurements: Measurements) -> tuple[NDArray[np.float64], str]:
    """Per image, and what it is in words: the error of the final exit stands in where no difficulty is recorded."""
    difficulty = np.array(measurements.difficulty, np.float64)
    if np.isfinite(difficulty).any():
        return difficulty, "difficulty"
    error = np.array(measurements.final_exit_error, np.float64)
    return error, "share of pixels the final exit gets wrong (no difficulty recorded)"
