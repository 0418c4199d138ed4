"""The page of `messnet export --web` in Chromium beside ONNX Runtime outside of it, in turn, in one run: milliseconds
of each stage (network, decision, labels), and seconds from opening the page to the first exit on the screen.

    python benchmarks/bench_browser.py BUNDLE IMAGES [--onnxruntime-web DIR] [--num-images 10] [--rounds 3]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import Page, sync_playwright

from messnet.apps.web import find_onnxruntime_web, write_web_page
from messnet.deployment.loading import load
from messnet.deployment.session import Session
from messnet.images.reading import list_images, read_image
from messnet.records.names import Precision

# Every exit of the picture on the page, milliseconds each.
STAGES = """async () => {
  const source = await import("./source.js"), canvas = document.querySelector("#photo"), times = [];
  const refinements = source.refine({ canvas }, {}, { aborted: false });
  for await (const found of refinements) if (!found.stopped) times.push(found.took_ms);
  return times;
}"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def first_result(page: Page, address: str, image: Path) -> tuple[float, float]:
    """Seconds from opening the page until it can take an image, and from there to the first exit on the screen."""
    start = time.perf_counter()
    page.goto(address)
    page.wait_for_function("document.querySelector('#headline').textContent === 'No image yet'")
    ready = time.perf_counter()
    page.set_input_files("#file", image)
    page.wait_for_selector("#exits button[data-index='0']")
    return ready - start, time.perf_counter() - ready


def stages(page: Page, session: Session, files: list[Path], rounds: int) -> tuple[Any, Any]:
    """Milliseconds in the browser and outside, each (rounds x images, exits), one after the other."""
    inside, outside = [], []
    for file in files:
        image = read_image(file)
        session.warm_up(image)
        page.evaluate("document.querySelector('#detail').textContent = ''")
        page.set_input_files("#file", file)
        page.wait_for_function("document.querySelector('#detail').textContent.startsWith('Stopped')")
        for _ in range(rounds):
            inside.append(page.evaluate(STAGES))
            outside.append(np.diff([one.latency_ms for one in session.anytime(image)], prepend=0.0).tolist())
    return np.array(inside), np.array(outside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--onnxruntime-web", type=Path)
    parser.add_argument("--num-images", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    given = parser.parse_args()
    files = list_images(given.images)
    files = files[:: -(-len(files) // given.num_images)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "page")
        write_web_page(given.bundle, folder, onnxruntime_web=find_onnxruntime_web(given.onnxruntime_web))
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with sync_playwright() as p:
            # A second name of this machine: over plain HTTP a page from there is not isolated, and has one thread.
            hosts = "--host-resolver-rules=MAP phone.test 127.0.0.1"
            browser = p.chromium.launch(executable_path=given.chromium, args=["--no-sandbox", hosts])
            print(f"Chromium {browser.version}, load average {Path('/proc/loadavg').read_text().split()[0]}")
            for threads, host in {2: "127.0.0.1", 1: "phone.test"}.items():
                address = f"http://{host}:{server.server_port}/?threads={threads}"
                opened = []
                for _ in range(given.rounds):
                    context = browser.new_context()
                    page = context.new_page()
                    opened.append((*first_result(page, address, files[0]), *first_result(page, address, files[0])))
                    if len(opened) < given.rounds:
                        context.close()
                print(f"{threads} thread(s)")
                names = ("first visit: ready", "first exit", "second visit: ready", "first exit")
                for name, seconds in zip(names, zip(*opened, strict=True), strict=True):
                    print(f"  {name} after {statistics.median(seconds):.2f} s (least {min(seconds):.2f})")
                for name in page.locator("#variant option").all_inner_texts():
                    precision: Precision = "int8" if name.startswith("int8") else "f32"
                    session = load(given.bundle, runtime="onnxruntime", precision=precision, threads=threads)
                    page.select_option("#variant", label=name)
                    page.wait_for_function("document.querySelector('#headline').textContent !== 'Loading …'")
                    inside, outside = stages(page, session, files, given.rounds)
                    for position, choice in enumerate(session.instance.exits):
                        # The least too, which other work on the machine changes least.
                        ours, native = (
                            (float(np.median(times[:, position])), times[:, position].min())
                            for times in (inside, outside)
                        )
                        shown = ", ".join(
                            f"{kind} {a:.1f} ms, outside {b:.1f} ms, {a / b:.2f}x"
                            for kind, a, b in zip(("median", "least"), ours, native, strict=True)
                        )
                        print(f"  {precision}, exit {choice.exit_index}: {shown}")
                context.close()
            browser.close()
        server.shutdown()


if __name__ == "__main__":
    main()
