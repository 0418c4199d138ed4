"""The README's Python runs as it stands, top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

README = Path(__file__).parents[2] / "README.md"


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(README.parent / "examples")
    Image.new("RGB", (160, 120)).save(tmp_path / "photo.jpg")
    text, namespace = README.read_text(), {"__name__": "readme"}
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if "# not run" in block[1]:
            continue
        line = text.count("\n", 0, block.start(1))  # so that a traceback points into the README
        code = "\n" * line + block[1]
        exec(compile(code, str(README), "exec"), namespace)


@pytest.mark.parametrize("path", sorted({*re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text())}))
def test_links_lead_somewhere(path: str) -> None:
    assert (README.parent / path).exists()
