"""The page that `export --web` writes, in a real browser: it computes what a session of ONNX Runtime computes."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

pytest.importorskip("playwright.sync_api", reason="the page is looked at with playwright")

from playwright.sync_api import expect, sync_playwright

import messnet
from messnet.apps.web import find_onnxruntime_web, write_web_page
from messnet.cli import main
from messnet.deployment.bundle import open_bundle, write_bundle
from messnet.errors import RunError
from messnet.images.preprocessing import resize, resized_size
from messnet.images.reading import list_images, read_image

REPOSITORY = Path(__file__).parents[2]
BUNDLE = REPOSITORY / "examples/camvid_mobilenetv2.mess"
IMAGES = REPOSITORY.parent / "shared/camvid/val/images"
CHROMIUM = Path("/usr/bin/chromium")


def _onnxruntime_web() -> Path | None:
    for folder in (REPOSITORY / ".venv", REPOSITORY, *REPOSITORY.parents):
        try:
            return find_onnxruntime_web(folder)
        except RunError:
            pass
    return None


PACKAGE = _onnxruntime_web()
in_browser = pytest.mark.skipif(
    not CHROMIUM.exists() or PACKAGE is None or not IMAGES.is_dir(),
    reason=f"needs {CHROMIUM}, `npm install onnxruntime-web` in the repository, and CamVid in ../shared",
)


# The function of the page's worker, for both axes.
RESIZED = """async ([pixels, width, height, wide, high]) => {
  const resized = new Function(`${await (await fetch("worker.js")).text()}; return resized;`)();
  return [...resized(resized(pixels, width, height, 0, wide), wide, height, 1, high)];
}"""


class _Quiet(SimpleHTTPRequestHandler):
    """Holds back the file that is called ``late`` until ``asked_for`` has been set."""

    late = ""
    asked_for = Event()

    def do_GET(self) -> None:
        if self.path.startswith(f"/{self.late or None}"):
            self.asked_for.wait(60)
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(folder: Path, handler: type[_Quiet] = _Quiet) -> Iterator[str]:
    """As `python -m http.server --directory`, until the block ends."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=folder)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("web") / "page"
    main(["export", str(BUNDLE), "--web", str(out), "--onnxruntime-web", str(PACKAGE)])
    return out


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    expect.set_options(timeout=300_000)
    with sync_playwright() as p:
        # A second name of this machine, from which a page is not isolated; a camera that shows a test picture.
        args = ["--no-sandbox", "--host-resolver-rules=MAP phone.test 127.0.0.1"]
        args += ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        browser = p.chromium.launch(executable_path=str(CHROMIUM), args=args)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def session() -> messnet.Session:
    return messnet.load(BUNDLE, runtime="onnxruntime")


def opened(context: Any, address: str) -> Any:
    page = context.new_page()
    page.goto(address)
    expect(page.locator("#headline")).to_have_text("No image yet")
    return page


def shown_labels(page: Any, palette: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The mask on the page, from its colours back to classes."""
    png = page.evaluate("document.querySelector('#mask').toDataURL('image/png')").partition(",")[2]
    drawn = np.array(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"))
    is_class = (drawn[:, :, None] == palette).all(-1)  # (H, W, K)
    assert is_class.any(-1).all(), "a colour of no class"
    return is_class.argmax(-1).astype(np.uint8)


@in_browser
def test_every_exit_is_that_of_a_session(folder: Path, browser: Any, session: messnet.Session) -> None:
    assert session.palette is not None
    taken = set()
    with served(folder) as address:
        context = browser.new_context(viewport={"width": 360, "height": 740})
        page = opened(context, f"{address}?threads=2")
        expect(page.locator("#variant option").first).to_have_text("f32, WebAssembly, 2 threads")
        for file in list_images(IMAGES)[::35]:
            image = read_image(file)
            page.locator("[value=instance]").check()
            page.set_input_files("#file", file)
            expect(page.locator("#detail")).to_contain_text("Stopped: ")
            (own,) = session.predict([image])
            taken.add(own.exit_index)
            expect(page.locator("#headline")).to_contain_text(f"Exit {own.exit_index} after ")
            page.locator("[value=last]").check()
            expect(page.locator("#detail")).to_contain_text(
                "Stopped: the last exit. 480 \N{MULTIPLICATION SIGN} 360", timeout=60_000
            )
            for place, expected in enumerate(session.anytime(image)):
                button = page.locator("#exits button").nth(place)
                button.click()
                expect(button).to_contain_text(f"{100 * expected.image_confidence:.1f} % confident")
                assert (shown_labels(page, session.palette) == expected.labels).mean() >= 0.999
        assert len(taken) > 1, "images that tell exits apart"
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.locator("#camera").click()
        # Chromium's own camera: less than twice the pixels that the network learned on.
        expect(page.locator("#detail")).to_contain_text("640 \N{MULTIPLICATION SIGN} 480 pixels")
        page.locator("#camera").click()
        expect(page.locator("#camera")).to_have_text("Use the camera")
        Image.fromarray(read_image(file)).resize((1440, 1080)).save(folder.parent / "large.png")
        page.set_input_files("#file", folder.parent / "large.png")
        expect(page.locator("#detail")).to_contain_text("scaled down here from 1440")
    # The server is gone; what has been seen once is enough.
    page.reload()
    expect(page.locator("#headline")).to_have_text("No image yet")
    page.set_input_files("#file", list_images(IMAGES)[0])
    expect(page.locator("#detail")).to_contain_text("Stopped: ")
    context.close()


# The service worker, after which the page loads once more; the model.
@in_browser
@pytest.mark.parametrize("file", ["offline.js", "model.json"])
def test_an_image_chosen_while_the_model_loads_is_kept(folder: Path, browser: Any, file: str) -> None:
    class Slow(_Quiet):
        late, asked_for = file, Event()

    with served(folder, Slow) as address:
        context = browser.new_context()
        page = context.new_page()
        page.goto(address)
        expect(page.locator("#headline")).to_have_text("Loading the model …")
        page.set_input_files("#file", list_images(IMAGES)[0])
        expect(page.locator("#detail")).to_have_text("Your image is next.")
        Slow.asked_for.set()
        expect(page.locator("#detail")).to_contain_text("Stopped: ")
        assert page.evaluate("caches.has('messnet held')") is False
        context.close()


@in_browser
def test_over_plain_http_and_by_keyboard(folder: Path, browser: Any, session: messnet.Session, tmp_path: Path) -> None:
    with served(folder) as address:
        context = browser.new_context()
        page = opened(context, address.replace("127.0.0.1", "phone.test"))
        expect(page.locator("#variant-hint")).to_contain_text("One thread, for the browser gives WebAssembly more only")
        (tmp_path / "a.png").write_text("no image")
        page.set_input_files("#file", tmp_path / "a.png")
        expect(page.locator("#error")).to_contain_text("no image that the browser can read")
        page.set_input_files("#file", list_images(IMAGES)[0])
        expect(page.locator("#detail")).to_contain_text("Stopped: ")
        page.locator("[value=instance]").focus()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Tab")
        page.keyboard.press("Home")  # nothing has to be confident
        exits = len(session.instance.exits)
        expect(page.locator("#detail")).to_contain_text(f"Stopped: confident enough; {exits - 1} of {exits}")
        for _ in range(5):  # each begins anew before the one before has ended
            page.keyboard.press("ArrowRight")
        page.keyboard.press("End")
        expect(page.locator("#detail")).to_contain_text("Stopped: the last exit")
        for place, expected in enumerate(session.anytime(read_image(list_images(IMAGES)[0]))):
            shown = f"{100 * expected.image_confidence:.1f} % confident"
            expect(page.locator("#exits li").nth(place)).to_contain_text(shown)
        context.close()


@in_browser
def test_a_bundle_in_int8_alone_of_another_normalisation_whose_images_are_resized(browser: Any, tmp_path: Path) -> None:
    whole = open_bundle(BUNDLE)
    runtimes = {"onnx-int8": whole.manifest.runtimes["onnx-int8"]}
    names = [
        *runtimes["onnx-int8"].files.values(),
        *(name for name in whole.manifest.files if name.startswith("costs/")),
    ]
    own = replace(whole.manifest.preprocessing, mean=(0.45, 0.5, 0.42), std=(0.26, 0.2, 0.24), resize=250)
    manifest = replace(whole.manifest, runtimes=runtimes, preprocessing=own)
    write_bundle(tmp_path / "b.mess", manifest, {name: whole.read(name) for name in names})
    main(["export", str(tmp_path / "b.mess"), "--web", str(tmp_path / "page"), "--onnxruntime-web", str(PACKAGE)])
    session, file = messnet.load(tmp_path / "b.mess"), list_images(IMAGES)[0]
    assert (session.precision, session.palette is None) == ("int8", False)
    with served(tmp_path / "page") as address:
        context = browser.new_context()
        page = opened(context, f"{address}?threads=2")
        expect(page.locator("#variant option")).to_have_text(["int8, WebAssembly, 2 threads"])
        page.locator("[value=last]").check()
        page.set_input_files("#file", file)
        expect(page.locator("#detail")).to_contain_text("Stopped: the last exit")
        expected = [*session.anytime(read_image(file))][-1]
        assert session.palette is not None
        assert expected.resized_size == (250, 333)
        assert (shown_labels(page, session.palette) == expected.labels).mean() >= 0.98
        for height, width, shorter in ((37, 50, 20), (50, 37, 61), (40, 60, 40)):
            noise = np.random.default_rng(0).integers(0, 256, (height, width, 4), np.uint8)
            (high, wide), given = resized_size((height, width), shorter), noise.ravel().tolist()
            found = np.array(page.evaluate(RESIZED, [given, width, height, wide, high]), np.uint8)
            by_pillow = resize(np.ascontiguousarray(noise[:, :, :3]), shorter)
            np.testing.assert_array_equal(found.reshape(high, wide, 4)[:, :, :3], by_pillow)
        context.close()


def stand_in_for_onnxruntime_web(folder: Path) -> None:
    """Empty files of the names that a page needs."""
    (folder / "dist").mkdir(parents=True, exist_ok=True)
    for name in ("ort.wasm.min", "ort-wasm-simd-threaded", "ort.webgpu.min", "ort-wasm-simd-threaded.asyncify"):
        (folder / "dist" / f"{name}.mjs").touch()
        (folder / "dist" / f"{name}.wasm").touch()


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_what_cannot_be_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    export = ["export", str(BUNDLE), "--web", "page"]
    assert "there is no onnxruntime-web in " in refused(export, capsys)
    package = tmp_path / "node_modules/onnxruntime-web"
    (package / "dist").mkdir(parents=True)
    assert "has no dist/ort.wasm.min.mjs: install onnxruntime-web 1.24 or later" in refused(export, capsys)
    stand_in_for_onnxruntime_web(package)
    assert "leave one of them out" in refused([*export, "--out", "b.mess"], capsys)
    assert "--images is for graphs" in refused([*export, "--images", "photos"], capsys)
    main(export)
    assert {file.name for file in Path("page").iterdir()} >= {"index.html", "source.js", "model.json", "onnx", "ort"}
    assert "page exists already" in refused(export, capsys)


def test_each_precision_of_a_bundle_goes_along(tmp_path: Path) -> None:
    whole = open_bundle(BUNDLE)
    files = {name: whole.read(name) for name in whole.manifest.files}
    named = {name: file.replace("onnx/", "onnx-int8/") for name, file in whole.manifest.runtimes["onnx"].files.items()}
    runtimes = {**whole.manifest.runtimes, "onnx-int8": replace(whole.manifest.runtimes["onnx"], files=named)}
    files |= {file: files[file.replace("onnx-int8/", "onnx/")] for file in named.values()}
    write_bundle(tmp_path / "both.zip", replace(whole.manifest, runtimes=runtimes), files)
    package = tmp_path / "package"
    stand_in_for_onnxruntime_web(package)
    written = write_web_page(tmp_path / "both.zip", tmp_path / "page", onnxruntime_web=package)
    model = json.loads((tmp_path / "page/model.json").read_text())
    assert model["graphs"] == {
        precision: [f"{folder}/stage{position}.onnx" for position in range(len(whole.manifest.instance.exits))]
        for precision, folder in {"f32": "onnx", "int8": "onnx-int8"}.items()
    }
    assert {*model["graphs"]["f32"], *model["graphs"]["int8"], model["output"]} <= written.keys()
    assert all((tmp_path / "page" / name).stat().st_size == size for name, size in written.items())
