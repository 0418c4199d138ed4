"""Bundles: what they hold, that they do what the run does, and what is refused."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import messnet
from helpers.files import snapshot
from helpers.images import smooth_image
from messnet.cli import main
from messnet.deployment.bundle import MANIFEST, Manifest, is_bundle, open_bundle, write_bundle
from messnet.deployment.export import export
from messnet.deployment.loading import load
from messnet.deployment.session import Result
from messnet.errors import MessError, ModelError, RunError
from messnet.images.preprocessing import MEAN, STD
from messnet.network.backbone import Chain
from messnet.network.blueprint import Blueprint
from messnet.records.costs import CostTable
from messnet.records.instance import Exit, ExitChoice, Instance

FCN, DEEPLAB = "crm1-blocks0-fcn", "crm1-blocks0-deeplabv3"
IMAGES = [smooth_image(64, 80, 0), smooth_image(61, 83, 1), np.full((90, 35, 3), 90, np.uint8)]
# name: setting, exits, whether the early ones may stop an image
INSTANCES: dict[str, tuple[Any, list[Exit]]] = {
    "whole": ("budgeted", [Exit(3, "final")]),
    "cut": ("budgeted", [Exit(1, FCN)]),
    "refining": ("anytime", [Exit(0, DEEPLAB), Exit(2, FCN)]),
    "early": ("input_dependent", [Exit(0, FCN), Exit(1, DEEPLAB)]),
    "deep": ("input_dependent", [Exit(0, FCN), Exit(2, DEEPLAB), Exit(3, "final")]),
}


@pytest.fixture(scope="module")
def run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run with instances of every setting; the first exit lets some of the images go."""
    path = shutil.copytree(tiny_run, tmp_path_factory.mktemp("bundle") / "run")
    probe = Instance(name="probe", setting="budgeted", exits=(ExitChoice(exit_index=0, head=FCN),))
    maps = [result.confidence_map for result in load(path, instance=probe).predict(IMAGES)]
    pixel_threshold = float(np.median(np.concatenate([one.flatten() for one in maps])))
    shares = sorted(float((one >= pixel_threshold).mean()) for one in maps)
    deciding = {"pixel_threshold": pixel_threshold, "image_threshold": (shares[0] + shares[-1]) / 2}
    for name, (setting, exits) in INSTANCES.items():
        choices = [ExitChoice(exit_index=exit.exit_index, head=exit.head) for exit in exits]
        if setting == "input_dependent":
            early = [ExitChoice(exit_index=exit.exit_index, head=exit.head, **deciding) for exit in exits[:-1]]
            choices = [*early, choices[-1]]
        instance = Instance(name=name, setting=setting, exits=tuple(choices))
        (path / f"instances/{name}.json").write_text(instance.to_json())
    return path


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    """The instance "early" as a folder. Tests that change it work on a copy."""
    return export(run, run.parent / "early.mess", instance="early").path


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "copy.mess")


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest as someone who knows the format would, its own SHA-256 too."""
    record = json.loads((bundle / MANIFEST).read_text())
    del record["sha256"]
    change(record)
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    (bundle / MANIFEST).write_text(json.dumps({**record, "sha256": digest}))


def zipped(bundle: Path, path: Path, prefix: str = "", compression: int = zipfile.ZIP_DEFLATED) -> Path:
    """As a person zips a folder."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(bundle.rglob("*")):
            archive.write(file, f"{prefix}{file.relative_to(bundle)}")
    return path


def everything(session: messnet.Session) -> Iterator[Result]:
    """All that a session does, in all settings."""
    for image in IMAGES:
        yield session.predict([image])[0]
        yield from session.anytime(image)
        yield from (session.budgeted(image, exit_index=choice.exit_index) for choice in session.instance.exits)


@pytest.mark.parametrize("name", INSTANCES)
def test_it_does_what_the_run_does(run: Path, tmp_path: Path, name: str) -> None:
    expected = list(everything(load(run, instance=name)))
    if name == "early":
        assert len({result.exit_index for result in expected[:: len(expected) // len(IMAGES)]}) == 2
    folder = export(run, tmp_path / "a.mess", instance=name).path
    archive = export(run, tmp_path / "a.zip", instance=name).path
    assert archive.is_file()
    for path in (folder, archive, zipped(folder, tmp_path / "by_hand.zip", prefix="a.mess/")):
        session = messnet.load(path)
        assert session.instance == load(run, instance=name).instance
        for one, other in zip(everything(session), expected, strict=True):
            assert (one.exit_index, one.image_confidence) == (other.exit_index, other.image_confidence)
            np.testing.assert_array_equal(one.logits, other.logits)
            np.testing.assert_array_equal(one.labels, other.labels)
            np.testing.assert_array_equal(one.confidence_map, other.confidence_map)


@pytest.mark.parametrize("name", INSTANCES)
def test_it_holds_what_the_instance_needs_and_no_more(run: Path, tmp_path: Path, name: str) -> None:
    exits = INSTANCES[name][1]
    last = exits[-1].exit_index
    whole = Blueprint.from_json((run / "exits.json").read_text()).build(tuple(exits))
    parts = [*whole.backbone.segments[: last + 1], *([whole.backbone.final_head] if last == 3 else [])]
    names = {f"model.{tensor}" for part in parts for tensor in part.state_dict()}
    names |= {f"heads.{tensor}" for tensor in whole.heads.state_dict()}
    export(run, tmp_path / "a.mess", instance=name)
    held = safetensors.torch.load_file(tmp_path / "a.mess/weights.safetensors")
    assert held.keys() == names
    session = load(tmp_path / "a.mess")
    assert session.net.exits == tuple(exits)
    assert sum(p.numel() for p in session.net.parameters()) == sum(
        tensor.numel() for tensor in held.values() if tensor.is_floating_point()
    ) - sum(b.numel() for b in session.net.buffers() if b.is_floating_point())
    assert set(snapshot(tmp_path / "a.mess")) == {MANIFEST, "weights.safetensors", "costs/workload.json"}


def test_nothing_past_the_last_exit_can_run(run: Path, tmp_path: Path) -> None:
    session = load(export(run, tmp_path / "cut.mess", instance="cut").path)
    x = torch.zeros(1, 3, 64, 80)
    for ask in (
        lambda: session.net.run_until(x, 2),
        lambda: session.net.run_until(x, 3, "final"),
        lambda: session.net(x),
        lambda: session.budgeted(IMAGES[0], exit_index=3),
        lambda: load(tmp_path / "cut.mess", instance=load(run, instance="whole").instance),
    ):
        with pytest.raises(ModelError, match=r"exit_index must lie in 0\.\.1|no head 'final'|no exit 3"):
            ask()
    assert [len(session.net.backbone.segments), len(session.net.heads)] == [2, 2]


def test_the_manifest_says_it_all(run: Path, exported: Path) -> None:
    record = json.loads((exported / MANIFEST).read_text())
    blueprint = json.loads((run / "exits.json").read_text())
    assert (record["format"], record["schema_version"]) == ("messnet bundle", 1)
    assert record["messnet_version"] == messnet.__version__
    assert record["created"].startswith("20")
    assert record["preprocessing"] == {"mean": list(MEAN), "std": list(STD), "input_size": [64, 80], "resize": None}
    instance = json.loads((run / "instances/early.json").read_text())
    del instance["schema_version"]
    assert record["instance"] == {"expected": None, **instance}  # of an instance of one's own nothing is judged
    own = {"class_names": record["class_names"], "palette": record["palette"], "input_size": [64, 80]}
    assert record["network"] | own == blueprint
    assert record["runtimes"] == {"torch": {"files": {"weights": "weights.safetensors"}, "checked": {}}}
    assert record["provenance"] == json.loads((run / "run.json").read_text())["stages"]
    for name, stored in record["files"].items():
        data = (exported / name).read_bytes()
        assert stored == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert (exported / "costs/workload.json").read_bytes() == (run / "profile.json").read_bytes()
    assert open_bundle(exported).manifest == Manifest.from_json((exported / MANIFEST).read_bytes(), source="it")


def test_cost_tables_go_with_it(run: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(run, tmp_path / "run")
    table = CostTable.from_json((run / "profile.json").read_text())
    table.to_json(copied / "costs/here.json")
    table.to_json(tmp_path / "there.json")

    def tables(*named: Path) -> set[str]:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.mess"
        files = export(copied, out, instance="early", tables=named or None).manifest.files
        return {name for name in files if name.startswith("costs/")}

    assert tables() == {"costs/workload.json", "costs/here.json"}
    assert tables(tmp_path / "there.json") == {"costs/workload.json", "costs/there.json"}
    with pytest.raises(RunError, match=r"no cost table .*nowhere\.json; make one"):
        tables(tmp_path / "nowhere.json")
    with pytest.raises(RunError, match=r"has a costs/here\.json: rename"):
        tables(tmp_path / "there.json", copied / "costs/here.json", copied / "costs/here.json")
    with pytest.raises(RunError, match=r"front\.json: not a cost table"):
        tables(copied / "front.json")
    record = json.loads((run / "profile.json").read_text())
    record["segments"][0]["parameters"] += 1
    (tmp_path / "other.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match=r"other\.json is a cost table of another network"):
        tables(tmp_path / "other.json")


def test_a_bundle_of_a_bundle(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What has weights can get graphs, without the run: all else stays as it was."""
    table = CostTable.from_json((exported / "costs/workload.json").read_text())
    table.to_json(tmp_path / "here.json")
    export(exported, tmp_path / "measured.zip", tables=[tmp_path / "here.json"])
    (tmp_path / "photos").mkdir()
    Image.fromarray(IMAGES[0]).save(tmp_path / "photos/one.png")
    monkeypatch.chdir(tmp_path)
    main(["export", "measured.zip", "--runtime", "onnx", "--images", "photos"])
    told = capsys.readouterr().out
    assert "early in measured-early.mess" in told
    assert "graphs against torch on 2 images: 100.0% of decisions" in told
    before, after = open_bundle(exported).manifest, open_bundle(Path("measured-early.mess")).manifest
    assert after.runtimes["onnx"].checked["equal_pixels"] == 1
    assert {*after.files} == {*before.files, "costs/here.json", *after.runtimes["onnx"].files.values()}
    assert {name: after.files[name] for name in before.files} == before.files
    new = {"created": "", "files": {}, "runtimes": {}}
    assert replace(after, **new) == replace(before, **new)
    for one, other in zip(everything(load(exported)), everything(load("measured-early.mess")), strict=True):
        np.testing.assert_array_equal(one.logits, other.logits)
    with pytest.raises(RunError, match="has no instance 'cut'; it has early"):
        export(exported, tmp_path / "x.mess", instance="cut")
    for tokens in (["--images", "photos"], ["--images", "nowhere", "--runtime", "onnx"]):
        with pytest.raises(SystemExit) as stopped:
            main(["export", str(exported), "--out", "other.mess", *tokens])
        assert stopped.value.code == 2
    assert not (tmp_path / "other.mess").exists()


@pytest.mark.parametrize("suffix", ["mess", "zip"])
def test_what_is_there_stays(run: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"mine.{suffix}"
    export(run, out, instance="cut")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("precious")
    before = snapshot(tmp_path)
    for taken in (out, tmp_path / "thesis", tmp_path / "thesis/chapter.txt"):
        with pytest.raises(RunError, match="exists already"):
            export(run, taken, instance="whole")
    assert snapshot(tmp_path) == before


def test_half_a_bundle_is_never_left(run: Path, exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "new/mine.mess"
    manifest = open_bundle(exported).manifest
    files = {name: open_bundle(exported).read(name) for name in manifest.files}
    with pytest.raises(RunError, match="cannot be written"):  # the last of them has too long a name
        write_bundle(out, manifest, {**files, "x" * 300: b"more"})
    assert not list((tmp_path / "new").iterdir())
    left = tmp_path / "new/.mine.mess.tmp/costs"  # by a kill
    left.mkdir(parents=True)
    (left / "old.json").write_text("half")
    out.mkdir()  # an empty folder is as good as none
    export(run, out, instance="cut")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mine.mess"]
    assert set(snapshot(out)) == {MANIFEST, "weights.safetensors", "costs/workload.json"}


def test_a_folder_that_cannot_be_written(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(RunError, match="cannot be written"):
        export(run, tmp_path / "file/mine.mess", instance="cut")


def test_a_model_that_cannot_be_cut(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Chain, "exportable", False)
    with pytest.raises(ModelError, match="cannot be exported"):
        export(run, tmp_path / "mine.mess", instance="cut")
    assert not (tmp_path / "mine.mess").exists()


@pytest.mark.parametrize("name", ["weights.safetensors", "costs/workload.json", MANIFEST])
def test_a_byte_that_differs_is_damage(copy: Path, name: str) -> None:
    data = (copy / name).read_bytes()
    draw = random.Random(0)
    for place in draw.sample(range(len(data)), 20):
        (copy / name).write_bytes(data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :])
        if name != MANIFEST or json_of(copy) != json.loads(data):  # white space is no damage
            with pytest.raises(RunError):
                open_bundle(copy)
    for wrong in (data[:-2], data + b"x", b""):
        (copy / name).write_bytes(wrong)
        with pytest.raises(RunError, match=r"damaged|manifest"):
            load(copy)
    (copy / name).unlink()
    with pytest.raises(RunError, match=r"it has no |is no run directory .* and no bundle"):
        load(copy)


def json_of(bundle: Path) -> Any:
    try:
        return json.loads((bundle / MANIFEST).read_bytes())
    except ValueError:
        return None


def test_files_that_are_not_listed_are_left_alone(copy: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    (copy / "link").symlink_to("/etc/passwd")
    assert load(copy).instance.name == "early"


@pytest.mark.parametrize(
    "name", ["../x", "/etc/hostname", "costs/../../x", "costs//x", "./x", "", "C:x", "a\\x", "a\0b"]
)
def test_no_file_leaves_the_folder(copy: Path, name: str) -> None:
    (copy.parent / "x").write_bytes(b"outside")
    stored = {"bytes": 7, "sha256": hashlib.sha256(b"outside").hexdigest()}
    edit(copy, lambda record: record["files"].update({name: stored}))
    for path in (copy, zipped(copy, copy.parent / "a.zip")):
        with pytest.raises(RunError, match="would lie outside"):
            open_bundle(path)
    with pytest.raises(RunError, match="would lie outside"):
        write_bundle(copy.parent / "new", open_manifest(copy.parent, copy), {name: b"x"})
    assert not (copy.parent / "new").exists()


def test_a_zip_with_a_file_from_elsewhere(copy: Path) -> None:
    archive = zipped(copy, copy.parent / "a.zip")
    open_bundle(archive)
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("../../slipped", b"x")
    with pytest.raises(RunError, match=r"'\.\./\.\./slipped' would lie outside"):
        open_bundle(archive)


def open_manifest(tmp_path: Path, copy: Path) -> Manifest:
    edit(copy, lambda record: record["files"].popitem())
    return open_bundle(copy).manifest


@pytest.mark.parametrize("name", ["weights.safetensors", "costs", MANIFEST])
def test_links_are_refused(copy: Path, name: str) -> None:
    (copy / name).rename(copy.parent / "elsewhere")
    (copy / name).symlink_to(copy.parent / "elsewhere")
    with pytest.raises(RunError, match="is a link, or lies behind one"):
        load(copy)


def test_the_bundle_itself_may_be_a_link(copy: Path) -> None:
    (copy.parent / "link").symlink_to(copy)
    assert load(copy.parent / "link").instance.name == "early"


def newer(record: dict[str, Any]) -> None:
    record |= {"schema_version": 2, "messnet_version": "3.0", "wheels": 4}


REFUSED: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (newer, r"schema version 2, this messnet reads 1: use messnet 3\.0 or later"),
    (lambda record: record.update(schema_version=0), "schema version 0, .*export it again"),
    (lambda record: record.update(format="other"), "is not of a messnet bundle"),
    (lambda record: record["preprocessing"].update(std=[0.5, 0, 0.5]), "std cannot be right"),
    (lambda record: record["preprocessing"].update(mean=[0.5, 0.5]), "preprocessing.mean"),
    (lambda record: record["runtimes"].pop("torch"), "holds no weights for torch"),
    (lambda record: record["network"].update(model="no.such:model"), "imports nothing that the bundle names"),
    (lambda record: record["network"].update(model_options={"num_classes": 3}), "model_options"),
    (lambda record: record["network"]["exit_points"][0].update(output_stride=2**20), "an exit point"),
    (lambda record: record["preprocessing"].update(input_size=[2**15, 2**15]), "input_size"),
    (lambda record: record["instance"]["exits"][0].update(head="crm1-blocks99999999-fcn"), "a head"),
    (lambda record: record["network"].update(model_options={"width": 0.5}), "does not fit the model"),
    (lambda record: record["network"].update(model_options={"width": "wide"}), "model_options"),
    (lambda record: record["class_names"].pop(), "palette"),
    (lambda record: record["instance"]["exits"][0].update(exit_index=9), "exit_index"),
    (lambda record: record["instance"]["exits"][0].update(head="final"), "a head"),
    (lambda record: record["instance"]["exits"].reverse(), "exit_index"),
    (lambda record: record["instance"]["exits"][0].update(image_threshold=float("nan")), "a threshold"),
    (lambda record: record["instance"].update(policy="top2+none"), "policy"),
    (lambda record: record["files"].pop("weights.safetensors"), "a runtime"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED, ids=[words[:24] for _, words in REFUSED])
def test_foreign_and_impossible_ones(copy: Path, change: Callable[[dict[str, Any]], object], words: str) -> None:
    edit(copy, change)
    with pytest.raises(MessError, match=words):
        load(copy)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON record."""
    for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(item, dict | list):
            yield from places(item)


def test_a_manifest_of_anything(exported: Path) -> None:
    record = json.loads((exported / MANIFEST).read_text())
    del record["sha256"]
    for container, key in places(record):
        kept = container[key]
        for wrong in (None, -1, 1.5, 10**400, "../x", [], {}, [[]], True):
            container[key] = wrong
            digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
            with contextlib.suppress(MessError):
                Manifest.from_json(json.dumps({**record, "sha256": digest}), source="it")
        container[key] = kept
    for text in (b"", b"[]", b"null", b"{}", b"\xff", b"[" * 100_000, b'{"format": "messnet bundle"}'):
        with pytest.raises(RunError):
            Manifest.from_json(text, source="it")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_zip(exported: Path, tmp_path: Path, compression: int) -> None:
    data = zipped(exported, tmp_path / "whole.zip", compression=compression).read_bytes()
    manifest = open_bundle(tmp_path / "whole.zip").manifest
    draw, refused = random.Random(1), 0
    for _ in range(150):
        place = draw.randrange(len(data))
        (tmp_path / "a.zip").write_bytes(data[:place] + bytes([draw.randrange(256)]) + data[place + 1 :])
        try:  # a time of writing may change; what is read may not
            assert open_bundle(tmp_path / "a.zip").manifest == manifest
        except RunError:
            refused += 1
    assert refused > 75
    zipped(exported, tmp_path / "rare.zip", compression=zipfile.ZIP_LZMA)
    with pytest.raises(RunError, match=r"rare\.zip is compressed in a rare way"):
        open_bundle(tmp_path / "rare.zip")
    for length in (0, 1, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "a.zip").write_bytes(data[:length])
        assert is_bundle(tmp_path / "a.zip")
        with pytest.raises(RunError, match=r"a\.zip"):
            load(tmp_path / "a.zip")


def test_what_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8")
    with pytest.raises(RunError, match=r"there is no .*nowhere: expected"):
        load(tmp_path / "nowhere")
    for path in (tmp_path / "photo.jpg", tmp_path):
        assert not is_bundle(path)
        with pytest.raises(RunError, match=r"is no run directory .* and no bundle"):
            load(path)
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("photo.jpg", "")
    with pytest.raises(RunError, match=r"it has no manifest\.json"):
        load(tmp_path / "photos.zip")


def test_a_bundle_has_one_instance(exported: Path) -> None:
    assert load(exported, instance="early").instance.name == "early"
    with pytest.raises(RunError, match="no instance 'deep'; it has early"):
        load(exported, instance="deep")
    own = Instance(name="own", setting="budgeted", exits=(ExitChoice(exit_index=1, head=DEEPLAB),))
    assert load(exported, instance=own).predict(IMAGES[:1])[0].exit_index == 1


def test_reading_needs_no_torch(exported: Path) -> None:
    code = (
        "import sys; from messnet.deployment.bundle import open_bundle; "
        f"print(open_bundle({str(exported)!r}).manifest.instance.name); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("early\n", "")


def test_the_commands(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def says(*tokens: object) -> Any:
        capsys.readouterr()
        main([str(token) for token in tokens])
        return json.loads(capsys.readouterr().out)

    def fails(*tokens: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(token) for token in tokens])
        assert end.value.code == 2
        return capsys.readouterr().err

    said = says("export", run, "--instance", "early", "--json")
    bundle = tmp_path / "run-early.mess"
    assert (said["bundle"], said["instance"]) == (bundle.name, "early")
    assert said["files"]["weights.safetensors"] == (bundle / "weights.safetensors").stat().st_size
    before = snapshot(bundle)
    for i, image in enumerate(IMAGES):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    photos = sorted(tmp_path.glob("*.png"))
    ours = says("predict", bundle, *photos, "--json", "--out", "a")
    theirs = says("predict", run, *photos, "--json", "--out", "b", "--instance", "early")
    for one, other in zip(ours, theirs, strict=True):
        assert one | {"latency_ms": 0} == other | {"latency_ms": 0}
    for name in snapshot(tmp_path / "a"):
        assert (
            name == "predictions.json" or (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        )

    costs = says("profile", bundle, "--json", "--out", "costs.json")
    assert [Exit(index, head) for index, head, _ in costs["heads"]] == INSTANCES["early"][1]
    assert costs == json.loads((tmp_path / "costs.json").read_text())
    whole = json.loads((run / "profile.json").read_text())
    assert costs["segments"] == whole["segments"][:2]
    parts = {(index, head): part for index, head, part in whole["heads"]}
    smaller = {"memory_bytes": 0}  # where nothing goes on, nothing has to be kept
    assert all(part | smaller == parts[index, head] | smaller for index, head, part in costs["heads"])
    for tokens in (["--num-exits", 3], ["--model.width", "0.5"], ["--out", bundle / "costs/x.json"]):
        assert "bundle" in fails("profile", bundle, *tokens)
    assert "--name is for a table of a run" in fails("profile", bundle, "--measure", "--name", "x")
    assert "exists already" in fails("export", run, "--instance", "early")
    assert "no instance 'nope'" in fails("export", run, "--instance", "nope")
    assert "is no run directory" in fails("export", tmp_path / "a")
    assert snapshot(bundle) == before


def test_a_bundle_measured_here(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(exported)
    main(["profile", str(exported), "--measure", "--threads", "1", "--repeats", "2", "--json"])
    costs = CostTable.from_json(capsys.readouterr().out)
    assert costs.model == "mobilenetv2_fcn cut after exit 1"
    assert costs.total("latency_ms") > 0
    assert costs.additivity["num_instances"] == 20
    assert snapshot(exported) == before
