"""``messnet evaluate``."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter, Token
from rich.table import Table
from rich.text import Text

from messnet.cli.app import (
    AsJson,
    Out,
    Overrides,
    SessionOptions,
    app,
    do_stage,
    examples,
    open_target,
    quieten,
    say,
    show,
)
from messnet.errors import DataError, RecipeError
from messnet.records.names import Precision, RuntimeName, expect_runtime
from messnet.records.shard import Shard

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from messnet.apps.scoring import Score
    from messnet.data import SegmentationDataset
    from messnet.deployment.session import Session
    from messnet.records.instance import Instance

_SESSION = SessionOptions()
_VALUES = "--mask-values"


def _values(_: object, tokens: Sequence[Token]) -> tuple[int, ...]:
    """A list as recipes take it."""
    from messnet.records.codec import MismatchError, from_plain
    from messnet.records.written import value_of

    try:
        return from_plain(value_of([token.value for token in tokens], tuple[int, ...], _VALUES), tuple[int, ...])
    except MismatchError as error:
        raise RecipeError(f"{_VALUES}{error.place}: {error.problem}") from None


@app.command(
    help_epilogue=examples(
        "evaluate runs/demo",
        "evaluate runs/demo --json",
        "evaluate runs/demo --data photos/test",
        "evaluate demo.mess --data photos/test --runtime onnxruntime --json",
        "evaluate runs/demo --shard 2/8",
        "evaluate runs/demo --merge",
        "evaluate runs/demo --runtime onnxruntime --precision int8",
    )
)
def evaluate(
    target: Path,
    *overrides: Overrides,
    out: Out = None,
    shard: str | None = None,
    merge: Annotated[bool, Parameter(negative="")] = False,
    data: Path | None = None,
    void_index: int | None = None,
    mask_values: Annotated[
        tuple[int, ...] | None,
        Parameter(
            converter=_values, n_tokens=1, accepts_keys=False, consume_multiple=True, json_list=False, negative=()
        ),
    ] = None,
    full_size: Annotated[bool, Parameter(negative="")] = False,
    session: Annotated[SessionOptions, Parameter(name="*", group="What is deployed, with --data")] = _SESSION,
    as_json: AsJson = False,
) -> None:
    """Tabulate what every exit does to every validation image, and print each exit's mIoU and IoU by class.

    With --runtime or --precision the tables are of the network as another runtime computes it, or in another precision:
    RUN/tables-RUNTIME-PRECISION.npz. With --data all instances of a run, or the one named by --instance, are scored on
    labelled images beside its baseline, or a bundle's instance is; --json has the confusion matrix of each.

    Args:
        target: A recipe (YAML) or a run's directory; with --data a run or a bundle.
        shard: Only this part of the images, K/N, into RUN/tables.KofN.npz.
        merge: Put the parts that shards left together.
        data: Score what is deployed on the images of this folder, which has images/ and masks/ (or val/).
        void_index: With --data: the mask value to ignore, beside 255; by default as in training.
        mask_values: With --data: the mask value of class 0, 1, ...; by default as in training.
        full_size: With --data: compute large images as they are. Otherwise those of more than twice the pixels that the
            network learned on are scaled down to that many first, as predict does; labels are compared at full size.
    """
    if merge and shard:
        raise RecipeError("--merge puts together what is there: give it without --shard")
    if data is not None:
        if overrides or out is not None or shard or merge:
            raise RecipeError("--data scores what is deployed: recipe values, --out, --shard and --merge mean nothing")
        quieten()
        names = _names(target, session.instance)
        with _under_option_names():
            dataset = _labelled(data, target, void_index, mask_values)

        def opened(one: str | Instance | None) -> Session:
            from messnet.deployment.bundle import is_bundle
            from messnet.deployment.loading import load

            # A run has no graphs in int8: what was searched in it is scored as its weights do.
            own = session.precision if is_bundle(target) else session.precision or "f32"
            how = asdict(session) | {"instance": one, "precision": own, "full_size": full_size}
            return load(target, **how)

        from messnet.apps.predictions import scaling
        from messnet.apps.scoring import score_sessions

        sessions = [opened(one) for one in names]
        remarks: list[str | None] = []

        def pairs() -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
            for sample in (dataset[v] for v in range(len(dataset))):
                remarks.append(scaling(sessions[0], sample.name, sample.image))
                yield sample.image, sample.mask

        with _under_option_names():
            scores = score_sessions(sessions, pairs())
        _show_scores(scores, as_json)
        if remark := next(filter(None, remarks), None):
            print(f"messnet: {remark}", file=sys.stderr)
        return
    if replace(session, runtime=None, precision=None) != _SESSION or void_index is not None or mask_values or full_size:
        raise RecipeError("options of what is deployed need labelled images: add --data FOLDER")
    kind: tuple[RuntimeName, Precision] = session.runtime or "torch", session.precision or "f32"
    expect_runtime(*kind)
    deployed = kind != ("torch", "f32")
    if deployed and (shard or merge):
        raise RecipeError("--shard and --merge are for torch in f32: leave them out, or --runtime and --precision")
    from messnet.deployment.bundle import is_bundle

    if is_bundle(target):
        raise RecipeError(f"{target} is a bundle, which is scored on labelled images: add --data FOLDER")
    # A shard has rows of some images only, of which no mIoU is told: that is for the tables that --merge makes.
    if shard:
        part = Shard.parse(shard)
        run = open_target(target, overrides, out)
        from messnet.run.stages import evaluate_stage

        evaluate_stage(run, part)
        print(f"evaluate: shard {shard} done; when all are, `messnet evaluate {run.directory.path} --merge`")
        return
    if merge:
        run = open_target(target, overrides, out)
        from messnet.run.stages import merge_tables

        merge_tables(run)
        if not as_json:
            print("evaluate: merged")
    elif deployed:
        run = open_target(target, overrides, out)
        from messnet.run.stages import deployed_tables_stage

        say("evaluate", deployed_tables_stage(run, *kind), as_json)
    else:
        run = do_stage("evaluate", target, overrides, out, quiet=as_json)
    from messnet.report.classes import class_terminal_table
    from messnet.report.page import exit_classes, exit_rows, exits_table, missed_by_final_exit

    file = run.directory.deployed_tables(*kind) if deployed else run.directory.tables
    tables, costs = file.read(), run.costs()
    rows = exit_rows(tables, costs)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    show(exits_table(tables, costs), class_terminal_table(exit_classes(tables, rows)))
    for sentence in missed_by_final_exit(tables):
        print(sentence)


@contextmanager
def _under_option_names() -> Iterator[None]:
    """Errors of a data set name keys of a recipe; with --data there is none, and options stand for the keys."""
    try:
        yield
    except DataError as error:
        raise DataError(
            re.sub(r"\b(mask_values|void_index)\b", lambda key: f"--{key[0].replace('_', '-')}", str(error))
        ) from error


def _labelled(
    data: Path, target: Path, void_index: int | None, mask_values: tuple[int, ...] | None
) -> SegmentationDataset:
    """The images of a folder, with the classes of a run or a bundle."""
    from messnet.data.folders import IMAGE_FOLDERS, contents, open_folder, subfolder
    from messnet.deployment.bundle import is_bundle, open_bundle
    from messnet.records.run_directory import RunDirectory

    if is_bundle(target):
        manifest = open_bundle(target).manifest
        class_names: Sequence[str] = manifest.class_names
        own: object = {"void_index": manifest.masks.void_index, "mask_values": manifest.masks.mask_values}
    else:
        directory = RunDirectory(target)
        class_names, own = directory.tables.read().class_names, directory.record().recipe.get("data")
    # Masks of another folder are most likely made as those that the network was trained on.
    if isinstance(own, dict) and void_index is None and mask_values is None:
        void_index, mask_values = own.get("void_index"), tuple(own.get("mask_values") or ())
    folder = data.resolve()
    if not folder.is_dir():
        raise DataError(f"--data {data} is no folder: name one with images/ and masks/, or with the split val")
    has_split = any((folder / one).exists() for one in ("val", "val.txt"))
    if not has_split and subfolder(folder, IMAGE_FOLDERS) is None:
        raise DataError(
            f"--data {data} holds no images/ and masks/, nor a split val, but {contents(folder)}: name the folder that "
            "has them"
        )
    root, split = (folder, "val") if has_split else (folder.parent, folder.name)
    return open_folder(root, split, class_names=class_names, void_index=void_index, mask_values=mask_values or ())


def _names(target: Path, instance: str | None) -> list[str | Instance | None]:
    """The instances to score: a bundle's one; a run's baseline and all others, or that of a name."""
    from messnet.deployment.bundle import is_bundle
    from messnet.records.instance import whole_model
    from messnet.records.run_directory import RunDirectory

    if is_bundle(target):
        return [instance]
    directory = RunDirectory(target)
    baseline = whole_model(directory.tables.read().exits[-1])
    return [baseline, *([instance] if instance else directory.instance_names())]


def _show_scores(scores: Sequence[Score], as_json: bool) -> None:
    if as_json:
        print(json.dumps([asdict(score) for score in scores], indent=1))
        return
    import numpy as np

    from messnet.records.iou import counts_of
    from messnet.report.classes import class_table, class_terminal_table, missed_classes

    first = scores[0]
    title = f"{first.num_images} images, {first.runtime}, {first.precision}, one image at a time"
    table = Table(title=title, title_justify="left")
    for name in ("instance", "mIoU %", "ms: median [p95]", "images per exit"):
        table.add_column(Text(name), justify="right" if name != "instance" else "left")
    for score in scores:
        exits = ", ".join(f"{exit}: {count}" for exit, count in score.exits.items())
        miou = "" if score.miou is None else f"{100 * score.miou:.2f}"
        table.add_row(Text(score.instance), miou, Text(f"{score.latency_ms:.1f} [{score.latency_p95_ms:.1f}]"), exits)
    classes = class_table({score.instance: [*score.iou.values()] for score in scores}, [*first.iou])
    show(table, class_terminal_table(classes))
    counts = {score.instance: counts_of(np.array(score.confusion)) for score in scores}
    for sentence in missed_classes(counts, [*first.iou]):
        print(sentence)
