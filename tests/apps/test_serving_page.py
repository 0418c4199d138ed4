"""The page in a real browser: an image in, refinements out; by keyboard; on a small screen; nothing leaves the host."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.images import smooth_image

pytest.importorskip("playwright.sync_api", reason="the page is looked at with playwright")

from playwright.sync_api import expect, sync_playwright

import messnet
from helpers.serving import REFINING, encoded, listening
from messnet.apps.serving.app import Sample, Service
from messnet.apps.serving.description import describe
from messnet.apps.serving.options import ServeOptions

CHROMIUM = Path("/usr/bin/chromium")
TIMES = "\N{MULTIPLICATION SIGN}"
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no browser at {CHROMIUM}")


@pytest.fixture(scope="module")
def session(tiny_run: Path) -> messnet.Session:
    return messnet.load(tiny_run, instance=REFINING)


@pytest.fixture(scope="module")
def address(session: messnet.Session) -> Iterator[str]:
    samples = [Sample(name="blocks", media_type="image/png", data=encoded(smooth_image(48, 64, 5)))]
    options = ServeOptions(max_pixels=128 * 128, drain_s=0)
    service = Service(session, options, samples=samples, info=describe(session))
    with listening(service) as (_, client):
        yield str(client.base_url)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    expect.set_options(timeout=300_000)
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


both_widths = pytest.mark.parametrize("page", [1280, 360], indirect=True)


@pytest.fixture
def page(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page, 360 pixels wide or as asked for. At its end: it scrolls downwards only, it asked nobody but the
    service, and said no error."""
    width = getattr(request, "param", 360)
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme="dark")
    page = context.new_page()
    asked: list[str] = []
    errors: list[str] = []
    page.on("request", lambda asking: asked.append(asking.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    expect(page.locator("#keys li").first).to_be_visible()
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert all(url.startswith((address, "data:", "blob:")) for url in asked), asked
    assert not [error for error in errors if "status of 4" not in error], errors
    context.close()


@both_widths
def test_an_image_exit_by_exit(page: Any, session: messnet.Session, tmp_path: Path) -> None:
    image = smooth_image(64, 80, 3)
    Image.fromarray(image).save(tmp_path / "a.png")
    page.set_input_files("#file", tmp_path / "a.png")
    expect(page.locator("#detail")).to_contain_text(f"Stopped: the last exit. 80 {TIMES} 64 pixels.")
    expected = list(session.anytime(image))
    said = page.locator("#exits small:nth-of-type(1)").all_inner_texts()
    assert all(text.endswith(" % confident") for text in said)
    shown = [float(text.split()[0]) for text in said]
    assert shown == pytest.approx([100 * one.image_confidence for one in expected], abs=0.0501)
    assert session.palette is not None
    for exit_index in (3, 1):
        page.locator("#exits button").nth(exit_index).click()
        expect(page.locator("#exits [aria-pressed=true] b")).to_have_text(f"Exit {exit_index}")
        drawn = page.evaluate("[...document.querySelector('#mask').getContext('2d').getImageData(0, 0, 80, 64).data]")
        seen = np.array(drawn, np.uint8).reshape(64, 80, 4)
        np.testing.assert_array_equal(seen[..., :3], session.palette[expected[exit_index].labels])
    shares = page.locator("#keys li").all_inner_texts()
    assert len(shares) == len(session.class_names)
    common = int(np.bincount(expected[1].labels.ravel()).argmax())
    share = (expected[1].labels == common).mean()
    name, shown_share = shares[common].removesuffix(" %").rsplit(maxsplit=1)
    assert name == session.class_names[common]
    assert float(shown_share) == pytest.approx(100 * share, abs=0.0501)


def test_by_keyboard(page: Any, session: messnet.Session) -> None:
    def press_until(holds: str, key: str = "Tab") -> None:
        for _ in range(30):
            page.keyboard.press(key)
            if page.evaluate(f"document.activeElement.matches({holds!r})"):
                style = "getComputedStyle(document.activeElement)"
                seen = page.evaluate(f"{style}.outlineStyle !== 'none' || document.activeElement.id === 'file'")
                assert seen, "focus cannot be seen"
                return
        raise AssertionError(f"{holds} cannot be reached")

    press_until("#file")
    assert page.evaluate("getComputedStyle(document.querySelector('#drop')).outlineStyle") == "solid"
    press_until("#samples button")
    page.keyboard.press("Enter")
    expect(page.locator("#detail")).to_contain_text("Stopped: the last exit")
    press_until("[name=stop]")
    assert page.evaluate("document.activeElement.value") == "instance"
    expect(page.locator("#instance-hint")).to_have_text("It runs all its exits, and keeps the last result.")
    page.keyboard.press("ArrowDown")
    press_until("#threshold")
    page.keyboard.press("Home")  # nothing has to be confident
    expect(page.locator("#detail")).to_contain_text("Stopped: confident enough; 3 of 4 exits not needed")
    expect(page.locator("#exits .thumb", has_text="not run")).to_have_count(3)
    assert page.get_attribute("#threshold", "aria-valuetext") == "0 %"
    page.keyboard.press("End")
    expect(page.locator("#detail")).to_contain_text("Stopped: the last exit")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("ArrowDown")
    press_until("#deadline")
    page.keyboard.press("Home")
    expect(page.locator("#detail")).to_contain_text("Stopped: time is up, 3 of 4 exits not run")
    press_until("#opacity")
    page.keyboard.press("Home")
    assert page.evaluate("getComputedStyle(document.querySelector('#mask')).opacity") == "0"
    press_until("#exits button")
    page.keyboard.press("Enter")
    expect(page.locator("#exits [aria-pressed=true] b")).to_have_text("Exit 0")


def test_what_is_no_image_and_what_is_too_large(page: Any, session: messnet.Session, tmp_path: Path) -> None:
    Image.fromarray(smooth_image(48, 64)).save(tmp_path / "good.png")
    page.set_input_files("#file", tmp_path / "good.png")
    expect(page.locator("#keys")).to_contain_text("%")
    (tmp_path / "a.png").write_text("no image")
    page.set_input_files("#file", tmp_path / "a.png")
    expect(page.locator("#error")).to_have_text(
        "a.png is no image that the browser can read: expected a JPEG, PNG, WebP or BMP file."
    )
    # Nothing is left of the image before.
    expect(page.locator("#headline")).to_have_text("No result")
    expect(page.locator("#keys li")).to_have_text([*session.class_names])
    expect(page.locator("#exits .thumb")).to_have_text([""] * 4)
    Image.fromarray(smooth_image(150, 300)).save(tmp_path / "b.png")
    page.set_input_files("#file", tmp_path / "b.png")
    expect(page.locator("#detail")).to_contain_text(f"181 {TIMES} 90 pixels, scaled down here from 300 {TIMES} 150.")
    expect(page.locator("#error")).to_be_hidden()


def test_of_two_images_chosen_at_once_the_later_is_shown(page: Any) -> None:
    """Whichever is read first, and whichever has to be scaled down."""
    large, small = (
        base64.b64encode(encoded(np.full((*size, 3), 90, np.uint8))).decode() for size in ((4000, 6000), (48, 64))
    )
    choose = """async (images) => {
        const files = images.map((data) => new File([Uint8Array.from(atob(data), (c) => c.charCodeAt())], "a.png"));
        for (const file of files) {
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(file);
            dispatchEvent(new DragEvent("drop", { dataTransfer, cancelable: true }));
        }
        for (const file of [...files, ...files]) await createImageBitmap(file); // no longer than the page takes
    }"""
    scaled = f"156 {TIMES} 104 pixels, scaled down here from 6000"
    for images, said in (([large, small], f"64 {TIMES} 48 pixels."), ([small, large], scaled)):
        page.evaluate(choose, images)
        expect(page.locator("#detail")).to_contain_text("Stopped: ")
        page.wait_for_timeout(300)
        expect(page.locator("#detail")).to_contain_text(said)


def test_it_can_be_read_by_a_machine(page: Any) -> None:
    """Every control has a name; one heading of the first rank; what changes is announced."""
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, button:not([disabled])')].filter((control) => !control.labels?.length"
        " && !control.textContent.trim() && !control.querySelector('img[alt]')).length"
    )
    assert unnamed == 0
    assert page.locator("h1").count() == 1
    assert page.get_attribute("html", "lang") == "en"
    expect(page.locator("[aria-live=polite] #headline")).to_have_text("No image yet")
