"""Bundles are strangers' files: what they claim is bounded, what they name is not run, what they hold is checked."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from onnx import numpy_helper
from PIL import Image

import messnet
from helpers.images import smooth_image
from helpers.light import REPOSITORY
from messnet.apps.predictions import PredictOptions, predict_files
from messnet.cli import main
from messnet.deployment.bundle import MANIFEST, open_bundle
from messnet.deployment.runner import Live, Step
from messnet.deployment.session import Session
from messnet.deployment.torch_runner import TorchRunner
from messnet.errors import DataError, ModelError, PredictionError, RunError
from messnet.network.multi_exit import MultiExitNet
from messnet.policy.policy import Policy
from messnet.records.instance import Exit, ExitChoice, Instance

BUNDLE = REPOSITORY / "examples/scenes_mobilenetv2.mess"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return shutil.copytree(BUNDLE, tmp_path / "copy.mess")


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest as someone who knows the format would, its own SHA-256 too."""
    record = json.loads((bundle / MANIFEST).read_text())
    del record["sha256"]
    change(record)
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    (bundle / MANIFEST).write_text(json.dumps({**record, "sha256": digest}))


def replace_file(bundle: Path, name: str, data: bytes) -> None:
    (bundle / name).write_bytes(data)
    stored = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit(bundle, lambda record: record["files"].update({name: stored}))


def zipped(bundle: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(file for file in bundle.rglob("*") if file.is_file()):
            archive.write(file, str(file.relative_to(bundle)))
    return path


def peak_of_refusing(path: Path, words: str) -> float:
    """MiB of Python's memory at most while the bundle is refused."""
    tracemalloc.start()
    try:
        with pytest.raises(RunError, match=words) as refused:
            open_bundle(path)
        assert "\n" not in str(refused.value)
        return tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


def test_no_more_is_read_than_was_claimed(copy: Path, tmp_path: Path) -> None:
    """256 MiB of zeros in a quarter of a MiB, whose entry claims as many bytes as the manifest lists."""
    stored = {"bytes": 1000, "sha256": hashlib.sha256(bytes(1000)).hexdigest()}
    edit(copy, lambda record: record["files"].update({"bomb": stored}))
    archive = zipped(copy, tmp_path / "bomb.zip")
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as file, file.open("bomb", "w") as entry:
        for _ in range(256):
            entry.write(bytes(2**20))
    data = archive.read_bytes()
    sizes = struct.pack("<I", 256 * 2**20)
    assert data.count(sizes) >= 1
    archive.write_bytes(data.replace(sizes, struct.pack("<I", 1000)))
    assert peak_of_refusing(archive, "bomb|whole bundle") < 32


def test_no_more_is_claimed_than_a_zip_can_hold(copy: Path, tmp_path: Path) -> None:
    zeros = bytes(2**20)
    digest = hashlib.sha256()
    for _ in range(256):
        digest.update(zeros)
    edit(copy, lambda r: r["files"].update({"bomb": {"bytes": 256 * 2**20, "sha256": digest.hexdigest()}}))
    archive = zipped(copy, tmp_path / "bomb.zip")
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as file, file.open("bomb", "w") as entry:
        for _ in range(256):
            entry.write(zeros)
    assert peak_of_refusing(archive, "can be a bundle of this size") < 32


def test_many_files_are_refused_before_any_is_read(copy: Path, tmp_path: Path) -> None:
    stored = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    edit(copy, lambda record: record["files"].update({f"x{i}": stored for i in range(5000)}))
    archive = zipped(copy, tmp_path / "many.zip")
    with zipfile.ZipFile(archive, "a") as file:
        for i in range(5000):
            file.writestr(f"x{i}", b"")
    peak_of_refusing(archive, "it lists 5006 files")
    with zipfile.ZipFile(archive, "a") as file:
        for i in range(20_000):
            file.writestr(f"y{i}", b"")
    assert peak_of_refusing(archive, "lists more files than any bundle has") < 8


@pytest.mark.parametrize("comment", [b"", b"PK\5\6" + bytes(18), b"x" * 65_535])
def test_a_comment_hides_no_long_list(copy: Path, tmp_path: Path, comment: bytes) -> None:
    archive = zipped(copy, tmp_path / "a.zip")
    with zipfile.ZipFile(archive, "a") as file:
        for i in range(30_000):
            file.writestr(f"y{i}", b"")
        file.comment = comment
    with pytest.raises(RunError):
        open_bundle(archive)


def test_a_long_manifest_is_refused(copy: Path) -> None:
    (copy / MANIFEST).write_bytes(b" " * (2**22 + 1))
    assert peak_of_refusing(copy, "4194304 are the limit") < 8


@pytest.mark.parametrize("name", [MANIFEST, "weights.safetensors"])
def test_a_pipe_is_no_file(copy: Path, name: str) -> None:
    """It would be waited for without end."""
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises(RunError):
        messnet.load(copy)
    with pytest.raises(RunError, match="it has no"):
        open_bundle(copy)


@pytest.mark.parametrize("named", ["stranger:build", "os:system", "torchvision.models.segmentation:fcn_resnet50"])
def test_nothing_is_imported_that_only_the_bundle_names(
    copy: Path, tmp_path: Path, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stranger.py").write_text("open('it_ran', 'w').close()\ndef build(num_classes, **options): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    edit(copy, lambda record: record["network"].update(model=named))
    with pytest.raises(RunError, match=rf"name it yourself with --model {named}"):
        messnet.load(copy, runtime="torch")
    with pytest.raises(SystemExit):
        main(["export", str(copy), "--out", "out.mess"])
    assert not (tmp_path / "it_ran").exists()
    # With graphs no code is needed at all.
    image = smooth_image(64, 80)
    main(["export", str(copy), "--runtime", "onnxruntime", "--no-torch", "--out", "graphs.mess"])
    assert list(open_bundle("graphs.mess").manifest.runtimes) == ["onnx"]
    assert not Path("graphs.mess/weights.safetensors").exists()
    for graphs in (messnet.load(copy, threads=1), messnet.load("graphs.mess", threads=1)):
        labels = graphs.predict([image])[0].labels
        np.testing.assert_array_equal(labels, messnet.load(BUNDLE).predict([image])[0].labels)


def test_what_the_user_names_is_found_in_the_working_folder(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_own_module.py").write_text("from messnet.network.zoo import mobilenetv2_fcn\n")
    monkeypatch.chdir(tmp_path)
    edit(copy, lambda record: record["network"].update(model="another:name"))
    session = messnet.load(copy, runtime="torch", model="my_own_module:mobilenetv2_fcn")
    image = smooth_image(64, 80)
    np.testing.assert_array_equal(
        session.predict([image])[0].logits, messnet.load(BUNDLE, runtime="torch").predict([image])[0].logits
    )
    with pytest.raises(ModelError, match="'nowhere:build' not found"):
        messnet.load(copy, runtime="torch", model="nowhere:build")


def test_profile_of_a_bundle_that_torch_cannot_run(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It takes the graphs and what the bundle's maker counted, unless the user names the function."""
    (tmp_path / "profiled_module.py").write_text("from messnet.network.zoo import mobilenetv2_fcn\n")
    monkeypatch.chdir(tmp_path)

    def told(*arguments: object) -> dict[str, Any]:
        capsys.readouterr()
        main(["profile", *map(str, arguments), "--json"])
        record: dict[str, Any] = json.loads(capsys.readouterr().out)
        return record

    def work(record: dict[str, Any]) -> list[object]:
        counted = ("macs", "macs_paper", "parameters")
        parts = [*record["segments"], *(part for _, _, part in record["heads"]), *record["policies"]]
        return [[part[name] for name in counted] for part in parts]

    zoo = told(BUNDLE)
    edit(copy, lambda record: record["network"].update(model="profiled_module:mobilenetv2_fcn"))
    own = told(copy, "--model", "profiled_module:mobilenetv2_fcn")
    assert own == zoo | {"model": "profiled_module:mobilenetv2_fcn cut after exit 2"}
    edit(copy, lambda record: record["runtimes"].pop("torch"))
    graphs = told(copy)
    assert work(graphs) == work(zoo)
    measured = told(copy, "--measure", "--threads", 1, "--repeats", 2, "--plot", "cuts.png")
    assert work(measured) == work(zoo)
    assert measured["conditions"]["runtime"].startswith("onnxruntime")
    assert all(part["latency_ms"] > 0 for part in measured["segments"])
    assert (tmp_path / "cuts.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        main(["profile", str(copy), "--measure", "--batch", "2"])
    assert "measured in onnxruntime, one image at a time: leave --batch out" in capsys.readouterr().err
    main(["profile", str(copy)])
    assert "memory is that of the model before it was cut" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        main(["profile", "mobilenetv2_fcn", "--model", "profiled_module:mobilenetv2_fcn"])
    assert "leave it out" in capsys.readouterr().err
    workload = json.loads((copy / "costs/workload.json").read_text())
    replace_file(copy, "costs/workload.json", json.dumps(workload | {"outputs": []}).encode())
    with pytest.raises(SystemExit):
        main(["profile", str(copy)])
    assert "is of another network; export it from its run" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_refused(copy: Path) -> None:
    tensors = safetensors.torch.load_file(copy / "weights.safetensors")
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    for value in (float("nan"), float("inf")):
        tensors[name].view(-1)[0] = value
        replace_file(copy, "weights.safetensors", safetensors.torch.save(tensors))
        with pytest.raises(RunError, match=r"holds NaN or infinite weights"):
            messnet.load(copy, runtime="torch")
    graph = onnx.load_from_string((copy / "onnx/stage1.onnx").read_bytes())
    weights = max(graph.graph.initializer, key=lambda one: len(one.raw_data))
    values = numpy_helper.to_array(weights).copy()
    values.flat[0] = np.nan
    weights.raw_data = values.tobytes()
    replace_file(copy, "onnx/stage1.onnx", graph.SerializeToString())
    for runtime in ("onnxruntime", "openvino"):
        with pytest.raises(RunError, match="stage1 holds NaN or infinite weights"):
            messnet.load(copy, runtime=runtime)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32, torch.complex64, torch.float8_e4m3fn])
def test_weights_of_another_number_format_are_refused(copy: Path, dtype: torch.dtype) -> None:
    tensors = safetensors.torch.load_file(copy / "weights.safetensors")
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    tensors[name] = tensors[name].to(dtype)
    replace_file(copy, "weights.safetensors", safetensors.torch.save(tensors))
    with pytest.raises(RunError, match=r"expected torch\.float32"):
        messnet.load(copy, runtime="torch")


class _Overflowing(TorchRunner):
    """Its logits are NaN for images whose first pixel is white."""

    def start(self, images: np.ndarray) -> Live:
        self.white = images[:, 0, 0, 0] == 255
        return super().start(images)

    def advance(self, live: Live, exit: Exit, **how: Any) -> Step:
        step = super().advance(live, exit, **how)
        if step.logits is not None and self.white.any():
            logits = step.logits.clone()
            logits[torch.from_numpy(self.white)] = float("nan")
            return step._replace(logits=logits)
        return step


@pytest.fixture
def overflowing(small_net: MultiExitNet) -> Session:
    instance = Instance(name="x", setting="budgeted", exits=(ExitChoice(exit_index=3, head="final"),))
    return Session(
        _Overflowing(small_net, Policy()), instance, palette=np.zeros((5, 3), np.uint8), class_names=tuple("abcde")
    )


def test_logits_that_are_not_finite_are_an_error_of_their_image(overflowing: Session, tmp_path: Path) -> None:
    images = [smooth_image(64, 80, seed) for seed in range(4)]
    for image in images:
        image[0, 0] = 0
    images[2][0, 0] = 255
    with pytest.raises(PredictionError, match="logits at exit 3 are not finite"):
        overflowing.predict([images[2]])
    with pytest.raises(PredictionError):
        next(overflowing.anytime(images[2]))
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    files = sorted(tmp_path.glob("*.png"))
    for batch_size in (1, 4):
        done = predict_files(overflowing, files, tmp_path / "out", PredictOptions(batch_size=batch_size))
        assert [Path(record["image"]).name for record in done.records] == ["0.png", "1.png", "3.png"]
        assert len(done.failed) == 1
        assert done.failed[0].startswith(f"{files[2]}: the logits at exit 3 are not finite")
    with pytest.raises(DataError, match=r"2\.png: the logits"):
        predict_files(overflowing, files[2:3], tmp_path / "none")
