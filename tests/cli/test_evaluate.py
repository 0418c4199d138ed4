"""``messnet evaluate``: scores by class against counting pixels here, of runs and bundles, in any runtime."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import messnet
from helpers.images import smooth_image
from helpers.light import REPOSITORY
from messnet.cli import main
from messnet.deployment.bundle import open_bundle, write_bundle
from messnet.records.instance import whole_model
from messnet.records.run_directory import RunDirectory

CLASSES = 8
VOID = 200


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images of two sizes whose masks have a void value of their own."""
    folder = tmp_path_factory.mktemp("data") / "test"
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    draw = np.random.default_rng(0)
    for k in range(5):
        height, width = (64, 80) if k < 3 else (48, 96)
        Image.fromarray(smooth_image(height, width, k)).save(folder / f"images/{k}.png")
        mask = draw.integers(0, CLASSES, (height, width)).astype(np.uint8)
        mask[:3] = VOID
        Image.fromarray(mask).save(folder / f"masks/{k}.png")
    return folder


def _counted(session: messnet.Session, folder: Path) -> tuple[np.ndarray, list[int]]:
    """Pixels by label and prediction, and the exits taken, counted one class pair at a time."""
    confusion, taken = np.zeros((CLASSES, CLASSES), np.int64), []
    for path in sorted((folder / "images").iterdir()):
        result = session.predict([np.array(Image.open(path))])[0]
        mask = np.array(Image.open(folder / "masks" / path.name))
        for label in range(CLASSES):
            for predicted in range(CLASSES):
                confusion[label, predicted] += ((mask == label) & (result.labels == predicted)).sum()
        taken.append(result.exit_index)
    return confusion, taken


def _scores(capsys: pytest.CaptureFixture[str], *words: object) -> list[dict[str, object]]:
    main(["evaluate", *map(str, words), "--json"])
    scores: list[dict[str, object]] = json.loads(capsys.readouterr().out)
    return scores


def test_a_run_is_scored_on_other_images(tiny_run: Path, labelled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = _scores(capsys, tiny_run, "--data", labelled, "--void-index", VOID)
    assert [score["instance"] for score in scores] == ["baseline", "drop-0.1pp", "drop-1pp", "max-miou"]
    final = RunDirectory(tiny_run).tables.read().exits[-1]
    for score, instance in ((scores[0], whole_model(final)), (scores[2], "drop-1pp")):
        confusion, taken = _counted(messnet.load(tiny_run, instance=instance), labelled)
        assert score["confusion"] == confusion.tolist()
        assert score["exits"] == {str(exit): taken.count(exit) for exit in sorted(set(taken))}
        union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
        iou = confusion.diagonal() / union
        assert list(score["iou"].values()) == pytest.approx(iou.tolist(), abs=1e-12)
        assert score["miou"] == pytest.approx(iou.mean(), abs=1e-12)


def test_a_bundle_is_scored_alike_in_every_runtime(labelled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (REPOSITORY / "examples/scenes_mobilenetv2.mess", "--data", labelled, "--void-index", VOID)
    (by_torch,), (by_graphs,) = (_scores(capsys, *options, "--runtime", name) for name in ("torch", "onnxruntime"))
    assert (by_torch["runtime"], by_graphs["runtime"]) == ("torch", "onnxruntime")
    assert by_graphs["exits"] == by_torch["exits"]
    # Where two classes are next to equal, runtimes may differ by a pixel.
    unlike = np.abs(np.array(by_graphs["confusion"]) - np.array(by_torch["confusion"])).sum()
    assert unlike <= 4
    main(["evaluate", *map(str, options)])
    words = capsys.readouterr().out
    assert f"{100 * by_torch['miou']:.2f}" in words
    assert all(name in words for name in by_torch["iou"])


def test_large_images_are_scored_as_they_are_predicted(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of more than twice the pixels that the network learned on, 96 x 128."""
    bundle = REPOSITORY / "examples/scenes_mobilenetv2.mess"
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        picture = Image.open(labelled / kind / "0.png")
        picture.resize((320, 240), Image.Resampling.NEAREST).save(tmp_path / kind / "0.png")
    options = (bundle, "--runtime", "onnxruntime", "--data", tmp_path, "--void-index", VOID)
    for full_size in (False, True):
        (score,) = _scores(capsys, *options, *["--full-size"] * full_size)
        session = messnet.load(bundle, runtime="onnxruntime", full_size=full_size)
        assert score["confusion"] == _counted(session, tmp_path)[0].tolist()
    main(["evaluate", *map(str, options)])
    assert "0 has 320 x 240 pixels, the network learned on 128 x 96" in capsys.readouterr().err


def test_every_exit_is_told_by_class(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, tables = _scores(capsys, tiny_run), RunDirectory(tiny_run).tables.read()
    assert len(rows) == len(tables.exits)
    for h, row in enumerate(rows):
        for k, name in enumerate(tables.class_names):
            right = tables.intersection[:, h, k].sum()
            union = tables.predicted[:, h, k].sum() + tables.labelled[:, k].sum() - right
            assert row["iou"][name] == pytest.approx(right / union)


def test_a_bundle_needs_images(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", str(Path(__file__).parents[2] / "examples/scenes_mobilenetv2.mess")])
    assert stopped.value.code == 2
    assert "is a bundle, which is scored on labelled images: add --data FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--data", "{data}"], "has the ids 200: expected 0 to 7 for 8 classes"),
        (["--data", "{data}/images"], "holds no images/ and masks/"),
        (["--data", "{data}", "--shard", "1/2"], "--data scores what is deployed"),
        (["--data", "{data}", "--void-index", "200", "--instance", "none"], "has no instance 'none'"),
        (["--instance", "drop-1pp"], "add --data FOLDER"),
        (["--data.cache", "perhaps"], "data.cache"),  # an override of the recipe, as before
    ],
)
def test_what_does_not_fit_is_one_line(
    tiny_run: Path, labelled: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", str(tiny_run), *(word.format(data=labelled) for word in words)])
    assert stopped.value.code == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--mask-values", *"01234567"], ["--mask-values", "[0x0,0x1,2,3,4,5,6,7]"]])
def test_a_bundle_knows_the_masks_it_was_trained_on(
    labelled: Path, tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """With a copy of a bundle whose masks have class k as k + 1; other values given are those of another folder."""
    bundle = open_bundle(Path(__file__).parents[2] / "examples/scenes_mobilenetv2.mess")
    manifest, data = bundle.manifest, tmp_path / "test"
    shift = 0 if words else 1
    masks = {"mask_values": [k + 1 for k in range(CLASSES)], "void_index": VOID}
    files = {name: bundle.read(name) for name in manifest.files}
    made = replace(manifest, provenance={**manifest.provenance, "masks": masks})
    copy = write_bundle(tmp_path / "copy.mess", made, files).path
    for kind in ("images", "masks"):
        (data / kind).mkdir(parents=True)
    Image.open(labelled / "images/0.png").save(data / "images/0.png")
    mask = np.array(Image.open(labelled / "masks/0.png"))
    Image.fromarray(np.where(mask == VOID, VOID, mask + shift).astype(np.uint8)).save(data / "masks/0.png")
    (score,) = _scores(capsys, copy, "--data", data, *words, *(["--void-index", VOID] if words else []))
    assert np.array(score["confusion"]).sum() == (mask != VOID).sum()


def test_a_mask_value_that_is_no_number_is_named(labelled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "any.mess", "--data", str(labelled), "--mask-values", "0x10,road"])
    assert "--mask-values[1]: expected a whole number, got 'road'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "or --void-index, or say with --mask-values which value is which class"),
        (["--void-index", "3"], "--void-index is 8 to 255"),
        (["--mask-values", "1,2"], "2 --mask-values (1, 2) for 8 class names"),
    ],
)
def test_masks_that_do_not_fit_name_the_options(
    labelled: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(__file__).parents[2] / "examples/scenes_mobilenetv2.mess"
    with pytest.raises(SystemExit):
        main(["evaluate", str(bundle), "--data", str(labelled), *words])
    assert expected in capsys.readouterr().err
