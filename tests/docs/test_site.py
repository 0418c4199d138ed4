"""The documentation as a site: it builds without a warning, and its reference leaves nothing out."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import messnet
from messnet.run.recipe import Recipe

ROOT = Path(__file__).parents[2]


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    pytest.importorskip("mkdocstrings", reason="needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "learning_rate" in (tmp_path / "reference/recipe/index.html").read_text()


def test_the_reference_names_all_that_is_public() -> None:
    page = (ROOT / "docs/reference/python.md").read_text()
    assert set(re.findall(r"^::: messnet\.\S*?(\w+)$", page, re.MULTILINE)) == set(messnet.__all__)


def test_the_recipe_page_has_every_section() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "docs/reference/recipe.md").read_text(), re.MULTILINE)
    assert {field.name for field in fields(Recipe)} <= set(headings)
