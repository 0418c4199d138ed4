"""Two splits beside each other: images and groups that are in both, and groups that nobody has named yet."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from messnet.data.checks import DatasetReport
from messnet.data.groups import near_duplicates, proposed_pattern
from messnet.data.listings import some


@dataclass(frozen=True, kw_only=True)
class SplitComparison:
    """Images and groups that the training and the validation split have in common."""

    shared: tuple[tuple[str, str], ...]
    """Names, in training and in validation, of images with the same pixels."""
    shared_groups: tuple[str, ...]
    """Groups that data.group, or the data set itself, puts in both."""
    proposed_pattern: str | None
    """A value for data.group, from names and pixels; None where groups are given, or nothing shows any."""
    near_shared: tuple[tuple[str, str], ...]
    """A training image and a validation image that are nearly the same, not with the same pixels; one pair for each
    such validation image."""
    near_val: tuple[tuple[str, ...], ...]
    """Names of validation images that are nearly the same, group by group."""
    near_groups: tuple[tuple[str, str], ...] = field(repr=False)
    """(name, group) of every image of both splits, where nearly the same images are of one group."""
    notes: tuple[str, ...]
    """Findings that stop nothing but are worth a look, each with what to do."""


def shared_images(train: DatasetReport, val: DatasetReport) -> tuple[tuple[str, str], ...]:
    """Names, in the first split and in the second, of images with the same pixels."""
    # Backwards, so that of images with the same pixels the first one gives the name.
    names, others = ({image.content: image.name for image in report.images[::-1]} for report in (train, val))
    return tuple(sorted((names[content], others[content]) for content in names.keys() & others.keys()))


def compare_splits(train: DatasetReport, val: DatasetReport) -> SplitComparison:
    images = (*train.images, *val.images)
    thumbnails = [image.thumbnail for image in images]
    # What the user has said needs no proposal.
    has_groups = bool(train.groups or val.groups)
    pattern = None if has_groups else proposed_pattern([image.name for image in images], thumbnails)
    # Nearly equal images of both splits together, so that one in each is found too.
    members: dict[int, list[int]] = {}
    for v, label in enumerate(near_duplicates(thumbnails).tolist()):
        members.setdefault(label, []).append(v)
    num_train = len(train.images)
    near_shared: list[tuple[str, str]] = []
    near_val: list[tuple[str, ...]] = []
    for alike in members.values():
        ours, theirs = ([images[v] for v in alike if (v < num_train) == in_train] for in_train in (True, False))
        # Those with the very same pixels are a problem of their own.
        contents = {image.content for image in ours}
        near_shared += [(ours[0].name, image.name) for image in theirs if ours and image.content not in contents]
        if len(theirs) > 1:
            near_val.append(tuple(image.name for image in theirs))
    comparison = SplitComparison(
        shared=shared_images(train, val),
        shared_groups=tuple(group for group in val.groups if group in train.groups),
        proposed_pattern=pattern,
        near_shared=tuple(near_shared),
        near_val=tuple(near_val),
        # Numbered, not named after one of its images: a name may occur in both splits.
        near_groups=tuple((images[v].name, f"group{label:05d}") for label, alike in members.items() for v in alike),
        notes=(),
    )
    return replace(comparison, notes=tuple(_notes(comparison, train, val)))


def _notes(found: SplitComparison, train: DatasetReport, val: DatasetReport) -> Iterator[str]:
    if found.shared_groups:
        count = sum(val.groups[group] for group in found.shared_groups)
        yield (
            f"groups in both splits: {some(found.shared_groups)}, {count} of {len(val.images)} validation images; "
            "accuracy on what resembles training images flatters: move each group to one split"
        )
    if found.proposed_pattern:
        yield _proposal(found.proposed_pattern, train, val)
    if found.near_shared:
        pairs = [f"{ours} = {theirs}" for ours, theirs in found.near_shared]
        yield (
            f"{len(pairs)} of {len(val.images)} validation images are nearly the same as training images: "
            f"{some(pairs)}; accuracy on them flatters: keep such images in one split"
        )
    if found.near_val and not val.groups:
        count = sum(map(len, found.near_val))
        yield (
            f"{count} of {len(val.images)} validation images are nearly the same as another one of them, such as "
            f"{' = '.join(found.near_val[0][:2])}: name what they have in common with data.group, or let check-data "
            "write it (--groups groups.csv) and say data.group: groups.csv"
        )


def _proposal(pattern: str, train: DatasetReport, val: DatasetReport) -> str:
    counts = [Counter(_group(pattern, image.name) for image in report.images) for report in (train, val)]
    both = [group for group in counts[1] if group in counts[0]]
    groups = "group" if len(counts[0]) == 1 else "groups"
    text = (
        f"names show images that belong together, {len(counts[0])} {groups} in train and {len(counts[1])} in val (such "
        f"as {', '.join(name for name, _ in (counts[1] or counts[0]).most_common(3))}): data.group: '{pattern}' keeps "
        "each whole when messnet splits the validation images"
    )
    if both:
        text += f"; {some(both)} {'is' if len(both) == 1 else 'are'} in both splits, where accuracy flatters"
    if len(counts[1]) == 1:
        text += "; with all of val in one group it cannot be split so: move some groups between train and val"
    return text


def _group(pattern: str, name: str) -> str:
    match = re.search(pattern, name)
    return match.group(1) if match else name
