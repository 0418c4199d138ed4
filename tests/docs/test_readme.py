"""The README's Python runs as it stands, top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


def test_python_blocks_run(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, namespace = README.read_text(), {"__name__": "readme"}
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if "# not run" in block[1]:
            continue
        line = text.count("\n", 0, block.start(1))  # so that a traceback points into the README
        code = "\n" * line + block[1].replace("runs/demo", str(tiny_run))
        exec(compile(code, str(README), "exec"), namespace)


@pytest.mark.parametrize("path", sorted({*re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text())}))
def test_links_lead_somewhere(path: str) -> None:
    assert (README.parent / path).exists()
