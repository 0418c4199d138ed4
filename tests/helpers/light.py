"""An environment with what the package declares for its core, or an extra of it too: no torch, OpenCV or numba."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


class LightEnvironment:
    """A folder of links to the dependencies of the core and of ``extras``, as ``pyproject.toml`` declares them, and to
    theirs."""

    def __init__(self, folder: Path, *extras: str) -> None:
        self.folder = folder
        (folder / "messnet").symlink_to(REPOSITORY / "src/messnet")
        project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
        declared = [
            *project["dependencies"],
            *(one for extra in extras for one in project["optional-dependencies"][extra]),
        ]
        for name in sorted(_closure(declared)):
            distribution = metadata.distribution(name)
            root = Path(str(distribution.locate_file("")))
            tops = {file.parts[0] for file in distribution.files or [] if not file.parts[0].startswith("..")}
            for top in tops - {"__pycache__", "bin"}:
                if not (folder / top).exists():
                    (folder / top).symlink_to(root / top)

    def command(self, code: str, *tokens: object) -> list[str]:
        """What runs ``code``, with ``tokens`` as its arguments, in a process of this environment."""
        begin = f"import sys; sys.path.append({str(self.folder)!r})\n"
        return [sys.executable, "-S", "-I", "-c", begin + code, *map(str, tokens)]

    def run(self, code: str, *tokens: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(code, *tokens), capture_output=True, text=True, cwd=cwd)

    def messnet(self, *tokens: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """The command."""
        return self.run("from messnet.cli import main; main()", *tokens, cwd=cwd)


def _closure(requirements: list[str]) -> set[str]:
    """The installed distributions that are required, by name, and what they require in turn; no extras."""
    found: set[str] = set()
    waiting = list(requirements)
    while waiting:
        requirement, _, marker = waiting.pop().partition(";")
        name = re.match(r"[\w.-]+", requirement)
        assert name
        if "extra ==" in marker or name[0].lower() in found:
            continue
        try:
            distribution = metadata.distribution(name[0])
        except metadata.PackageNotFoundError:
            assert marker, f"{name[0]} is declared but not installed"  # for other systems or versions
            continue
        found.add(name[0].lower())
        waiting += distribution.requires or []
    return found
