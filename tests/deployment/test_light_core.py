"""What ``pip install messnet`` promises, in an environment without torch: it predicts, serves and searches, and says
which extra brings the rest."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import numpy as np
import pytest
from PIL import Image

import messnet
from helpers.images import smooth_image
from helpers.light import REPOSITORY, LightEnvironment
from messnet.apps.tiling import predict_tiled
from messnet.deployment.loading import load
from messnet.deployment.session import Session
from messnet.records.instance import Instance, whole_model
from messnet.records.measurements import Measurement, Measurements
from messnet.records.run_directory import RunDirectory
from messnet.searching.grid import cost_of, route

BUNDLE = REPOSITORY / "examples/scenes_mobilenetv2.mess"
GRAPHS = REPOSITORY / "examples/camvid_mobilenetv2.mess"
RUN = REPOSITORY / "examples/camvid_mobilenetv2"
GREY = np.full((61, 83, 3), 90, np.uint8)
IMAGES = [smooth_image(96, 128, 0), GREY, np.full((96, 128, 3), 200, np.uint8), smooth_image(144, 208, 2)]
HEAVY = ("torch", "torchvision", "lightning_fabric", "cv2", "numba", "matplotlib", "onnx", "jinja2", "safetensors")


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> LightEnvironment:
    return LightEnvironment(tmp_path_factory.mktemp("light"))


@pytest.fixture(scope="module")
def session() -> Session:
    """What the light environment is compared with: torch, on the weights of the same bundle."""
    return messnet.load(BUNDLE, runtime="torch", threads=1)


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}.png" for i in range(len(IMAGES))]
    for path, image in zip(paths, IMAGES, strict=True):
        Image.fromarray(image).save(path)
    return paths


def test_the_environment_has_nothing_heavy(light: LightEnvironment) -> None:
    code = "from importlib.util import find_spec; print([name for name in sys.argv[1:] if find_spec(name)])"
    assert light.run(code, *HEAVY).stdout.strip() == "[]"


def test_the_command_predicts_as_torch_does(
    light: LightEnvironment, session: Session, photos: Sequence[Path], tmp_path: Path
) -> None:
    done = light.messnet("predict", BUNDLE, *photos, "--out", tmp_path / "out", "--threads", "1", "--full-size")
    assert done.returncode == 0, done.stderr
    assert "messnet: computing with onnxruntime" in done.stderr
    records = json.loads((tmp_path / "out/predictions.json").read_text())["predictions"]
    expected = session.predict(IMAGES)
    assert {result.exit_index for result in expected} == {0, 1, 2}
    for record, result in zip(records, expected, strict=True):
        assert record["exit_index"] == result.exit_index
        assert record["image_confidence"] == pytest.approx(result.image_confidence, abs=1e-6)
        with Image.open(tmp_path / "out" / record["mask"]) as mask:
            np.testing.assert_array_equal(np.array(mask), result.labels)
        with Image.open(tmp_path / "out" / record["confidence"]) as confidence:
            np.testing.assert_allclose(np.array(confidence) / 255, result.confidence_map, atol=0.51 / 255 + 1e-5)


def test_the_command_scores_labelled_images(light: LightEnvironment, session: Session, tmp_path: Path) -> None:
    for kind in ("images", "masks"):
        (tmp_path / "data" / kind).mkdir(parents=True)
    masks = [np.full(image.shape[:2], k, np.uint8) for k, image in enumerate(IMAGES)]
    for k, (image, mask) in enumerate(zip(IMAGES, masks, strict=True)):
        Image.fromarray(image).save(tmp_path / f"data/images/{k}.png")
        Image.fromarray(mask).save(tmp_path / f"data/masks/{k}.png")
    done = light.messnet("evaluate", BUNDLE, "--data", tmp_path / "data", "--full-size", "--threads", "1", "--json")
    assert done.returncode == 0, done.stderr
    (score,) = json.loads(done.stdout)
    assert score["runtime"] == "onnxruntime"
    rows = np.array(score["confusion"])
    for k, result in enumerate(session.predict(IMAGES)):
        assert rows[k].tolist() == np.bincount(result.labels.ravel(), minlength=len(rows)).tolist()


API = """
import json, numpy as np, messnet
from PIL import Image
from messnet.apps.tiling import predict_tiled
image = np.array(Image.open(sys.argv[2]))
session = messnet.load(sys.argv[1], threads=1)
tiled = predict_tiled(session, image, tile=(64, 80))
found = {
    "runtime": session.runtime,
    "every": [[r.exit_index, r.image_confidence] for r in session.anytime(image)],
    "in_no_time": [r.exit_index for r in session.anytime(image, deadline_ms=0.0)],
    "in_time": [r.exit_index for r in session.anytime(image, deadline_ms=1e9)],
    "budgeted": [session.budgeted(image, exit_index=c.exit_index).labels.tolist() for c in session.instance.exits],
    "tiled": [tiled.exit_map.tolist(), tiled.labels.tolist()],
    "logits": [type(session.budgeted(image).logits).__name__, str(session.budgeted(image).logits.dtype)],
}
assert not {"torch", "numba", "cv2", "matplotlib", "onnx"} & {*sys.modules}
print(json.dumps(found))
"""


def test_every_setting_and_tiles(light: LightEnvironment, session: Session, photos: Sequence[Path]) -> None:
    done = light.run(API, BUNDLE, photos[3])
    assert done.returncode == 0, done.stderr
    found, image = json.loads(done.stdout), IMAGES[3]
    every = list(session.anytime(image))
    assert found["runtime"] == "onnxruntime"
    assert found["every"] == [[r.exit_index, pytest.approx(r.image_confidence, abs=1e-6)] for r in every]
    assert found["in_no_time"] == [every[0].exit_index]
    assert found["in_time"] == [result.exit_index for result in every]
    assert found["budgeted"] == [result.labels.tolist() for result in every]
    tiled = predict_tiled(session, image, tile=(64, 80))
    assert found["tiled"] == [tiled.exit_map.tolist(), tiled.labels.tolist()]
    assert found["logits"] == ["ndarray", "float32"]


SEARCH = """
import json, messnet
from pathlib import Path
from messnet.records.costs import CostTable
from messnet.records.exit_tables import ExitTables
run = Path(sys.argv[1])
tables = ExitTables.from_bytes((run / "tables.npz").read_bytes())
costs = CostTable.from_json((run / "profile.json").read_text())
pair = [exit for exit in tables.exits if exit.exit_index in (2, tables.exits[-1].exit_index)]
found = messnet.search(tables, costs, setting="budgeted", minimise="macs", max_drop_pp=1.0)
print(found.instance.to_json())
"""


def test_it_searches(light: LightEnvironment) -> None:
    done = light.run(SEARCH, RUN)
    assert done.returncode == 0, done.stderr
    tables = messnet.ExitTables.from_bytes((RUN / "tables.npz").read_bytes())
    costs = messnet.CostTable.from_json((RUN / "profile.json").read_text())
    expected = messnet.search(tables, costs, setting="budgeted", minimise="macs", max_drop_pp=1.0)
    assert json.loads(done.stdout) == json.loads(expected.instance.to_json())


def test_the_command_searches_with_a_guarantee(light: LightEnvironment, tmp_path: Path) -> None:
    """In plain Python, within a time limit; what is promised is counted here once more."""
    run = shutil.copytree(RUN, tmp_path / "run")
    tokens = ["--max-drop-pp", "1", "--guarantee", "0.1", "0.1", "--time-limit", "5"]
    done = light.messnet("search", run, "--name", "safe", *tokens, "--json")
    assert done.returncode == 0, done.stderr
    assert "numba is not installed" in done.stderr
    instance = Instance.from_json((run / "instances/safe.json").read_text())
    assert [instance.name, instance.setting] == ["safe", "input_dependent"]
    assert "0.1" in instance.certificate
    tables = messnet.ExitTables.from_bytes((RUN / "tables.npz").read_bytes())
    calibration = tables.subset(tables.halves()[1])
    routing = route(calibration, instance)
    correct = calibration.intersection.sum(2) / calibration.labelled.sum(1)[:, None]
    images = np.arange(len(routing))
    assert (correct[images, -1] - correct[images, routing]).mean() <= 0.1


def test_it_draws_the_report_of_what_was_measured(tmp_path: Path) -> None:
    """With the extra ``report``, and where the run's measurements are. They are made up here from the run's tables."""
    run = shutil.copytree(RUN, tmp_path / "run")
    light, directory = LightEnvironment(tmp_path, "report"), RunDirectory(run)
    done = light.messnet("report", run)
    assert (done.returncode, done.stderr.splitlines()[-1][-24:]) == (2, "install 'messnet[train]'"), done.stderr
    tables, rows = directory.tables.read(), []
    for instance in (whole_model(tables.exits[-1]), directory.read_instance("drop-2pp")):
        routing = route(tables, instance)
        taken = [tables.exits[position].exit_index for position in routing]
        miou, macs = tables.miou(routing), float(cost_of(tables, directory.costs(), instance).mean())
        rows.append(
            Measurement(
                instance=instance,
                miou=miou,
                miou_from_tables=miou,
                macs=macs,
                macs_paper=macs,
                exit_taken=taken,
                image_confidence=[0.5] * len(taken),
                latency_ms=[float(1 + index) for index in taken],
            )
        )
    measurements = Measurements(
        device="a machine",
        input_size=directory.costs().input_size,
        image_names=list(tables.image_names),
        difficulty=[None] * len(taken),
        final_exit_error=[0.1] * len(taken),
        num_selection_images=len(taken),
        rows=rows,
        left_out=["stranger"],
    )
    directory.measurements.write(measurements)
    done = light.messnet("report", run, "--markdown", tmp_path / "table.md")
    assert done.returncode == 0, done.stderr
    assert f"the page shows what {run} has measured before" in done.stderr
    page, table = directory.report.path.read_text(), (tmp_path / "table.md").read_text()
    assert "drop-2pp" in page
    assert page.count("<svg") >= 2
    assert f"| {100 * rows[0].miou:.2f}" in table
    assert "- not in the table: stranger: " in table


def test_it_serves_with_its_page(light: LightEnvironment, session: Session, photos: Sequence[Path]) -> None:
    code = "from messnet.cli import main; main()"
    command = light.command(code, "serve", BUNDLE, "--port", "0", "--threads", "1")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            line = process.stdout.readline()
            address = re.search(r"http://\S+/", line)
            assert address, line + (process.stderr.read() if process.stderr and process.poll() is not None else "")
            assert b"<html" in _asked(address[0]).lower()
            request = Request(f"{address[0]}v1/predict", photos[0].read_bytes(), {"Content-Type": "image/png"})
            with urlopen(request) as answer:
                mask = Image.open(answer)
                np.testing.assert_array_equal(np.array(mask), session.predict(IMAGES[:1])[0].labels)
        finally:
            process.terminate()
            process.wait(120)


def _asked(address: str) -> bytes:
    """What a service answers that is about to listen."""
    for _ in range(600):
        with suppress(URLError), urlopen(address) as answer:
            return bytes(answer.read())
        time.sleep(0.1)
    raise AssertionError(f"no answer from {address}")


@pytest.mark.parametrize(
    ("tokens", "package", "extra"),
    [
        (["predict", BUNDLE, "0.png", "--runtime", "torch"], "", "train"),
        (["predict", BUNDLE, "0.png", "--runtime", "openvino"], "openvino", "openvino"),
        (["predict", RUN, "0.png"], "", "train"),
        (["predict", BUNDLE, "film.mp4"], "cv2", "video"),
        (["run", REPOSITORY / "configs/demo.yaml"], "", "train"),
        (["profile", "mobilenetv2_fcn"], "", "train"),
        (["export", BUNDLE, "--out", "x.mess"], "", "train"),
    ],
)
def test_what_is_missing_is_named(
    light: LightEnvironment, photos: Sequence[Path], tokens: list[object], package: str, extra: str
) -> None:
    (photos[0].parent / "film.mp4").write_bytes(b"no film")
    done = light.messnet(*tokens, cwd=photos[0].parent)
    lines = done.stderr.splitlines()
    assert (done.returncode, len(lines)) == (2, 1), done.stderr
    assert package in lines[0]
    assert lines[0].endswith(f"pip install 'messnet[{extra}]'")


@pytest.mark.parametrize("name", ["convert", "zoo", "profile", "MultiExitNet"])
def test_the_names_that_need_torch_say_so(light: LightEnvironment, name: str) -> None:
    done = light.run(f"import messnet\ntry: messnet.{name}\nexcept messnet.MessError as error: print(error)")
    assert "pip install 'messnet[train]'" in done.stdout, done.stderr


def test_a_runtime_that_is_not_installed(light: LightEnvironment) -> None:
    code = "sys.modules['onnxruntime'] = None\nimport messnet\n"
    code += "try: messnet.load(sys.argv[1])\nexcept messnet.MessError as error: print(error)"
    assert "onnxruntime is not installed: pip install 'messnet'" in light.run(code, BUNDLE).stdout


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("recipe nope.yaml", "there is no recipe nope.yaml"),
        ("run nodir", "there is no run and no recipe nodir"),
        ("init nodir", "there is no folder nodir"),
        (f"report {GRAPHS.with_suffix('')}", "nothing was measured in .* yet, and measuring needs torch"),
        (f"predict {GRAPHS} nope.png --runtime torch", "no image nope.png"),
        (f"export {GRAPHS} --out x.mess", "holds no weights for torch, but onnx, onnx-int8: run its graphs"),
        (f"export {GRAPHS} --web page --precision int8", "offers all the graphs that the bundle holds"),
        (f"profile {GRAPHS} --measure", "profile counts and measures with torch"),
        ("predict photo.jpg", "photo.jpg is an image: the first argument is a bundle or a run"),
    ],
)
def test_what_is_missing_is_told_before_what_is_not_installed(
    light: LightEnvironment, tmp_path: Path, command: str, line: str
) -> None:
    done = light.messnet(*command.split(), cwd=tmp_path)
    assert done.returncode == 2
    assert re.search(line, done.stderr), done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_session_says_what_it_is() -> None:
    words = "drop-1pp of camvid_mobilenetv2.mess: onnxruntime f32, exits 2, 3 and 4, 360 x 480, 11 classes"
    assert repr(load(GRAPHS)) == f"<Session {words}>"
