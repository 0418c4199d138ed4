"""The pages in docs/ do what they say: their Python runs, their commands run, their links lead somewhere.

A block marked ``sh`` runs line by line, all of a page in one folder with a finished run, a recipe, a photo and a film;
``sh fails`` must end with exit code 2; blocks without a mark are not run.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import cv2
import pytest
from PIL import Image

from helpers.images import smooth_image
from messnet.cli import main

PAGES = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(\w+)( fails)?\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text())], ids=lambda page: page.stem)
def test_what_a_page_says_runs(
    page: Path, tiny_run: Path, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_run, "runs/demo")
    shutil.copy(tiny_recipe, "my.yaml")
    Image.fromarray(smooth_image(64, 80)).save("photo.jpg")
    film = cv2.VideoWriter("drive.mp4", cv2.VideoWriter.fourcc(*"mp4v"), 10, (80, 64))
    for seed in range(3):
        film.write(smooth_image(64, 80, seed))
    film.release()
    namespace: dict[str, object] = {"__name__": "docs"}
    for language, fails, code in BLOCK.findall(page.read_text()):
        if language == "python":
            exec(compile(code, str(page), "exec"), namespace)
        for line in code.splitlines() if language == "sh" else ():
            command, *words = shlex.split(line, comments=True) or [""]
            if not command:
                continue
            assert command == "messnet", f"{page.name}: only messnet runs here, not {command}"
            if not fails:
                main(words)
                continue
            with pytest.raises(SystemExit) as stopped:
                main(words)
            assert stopped.value.code == 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
        assert (page.parent / path).exists(), path


def test_what_the_source_cites_of_the_method_is_there() -> None:
    """``docs/method.md#anchor`` in a docstring leads to a heading, as GitHub names it."""
    root = Path(__file__).parents[2]
    headings = re.findall(r"^#+ (.*)$", (root / "docs/method.md").read_text(), re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    cited = {
        (file.name, anchor)
        for file in (root / "src").rglob("*.py")
        for anchor in re.findall(r"method\.md#?([\w-]*)", file.read_text())
    }
    assert len(cited) > 5
    assert not {(name, anchor) for name, anchor in cited if anchor not in anchors}
