"""Figures of the source: size, functions, comments, annotations, import cycles. Needs nothing but Python.

    python benchmarks/source_figures.py [--against OTHER/src/messnet] [--packages]

Lines are all lines of .py files. A function's length is from its first decorator or ``def`` to its last line. Comments
are lines that hold a ``#`` comment for a reader: neither docstrings nor directives to tools. Annotations are of
parameters, results and variables. Import cycles are counted with imports inside functions and those for type
checkers; the package itself (``messnet``, whose names are resolved when they are used) is left out.
"""

from __future__ import annotations

import argparse
import ast
import io
import statistics
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parents[1] / "src" / "messnet"


def modules_of(root: Path) -> dict[str, Path]:
    """Dotted name of every module below ``root``, a package's folder."""
    names = {}
    for path in sorted(root.rglob("*.py")):
        parts = [root.name, *path.relative_to(root).with_suffix("").parts]
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def num_comments(text: str) -> int:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT]
    return sum(not comment.startswith(("noqa", "type: ignore")) for comment in comments)


def function_lengths(tree: ast.AST) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield (node.end_lineno or first) - first + 1


def annotations(tree: ast.AST) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns is not None:
            yield node.returns
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            yield node.annotation


def holds_any(annotation: ast.expr) -> bool:
    return any(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(annotation))


def imports(tree: ast.AST, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a module imports, at its top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in inner}
    return {name for name in found if name in known and "." in name}


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Sets of modules that import one another (strongly connected components of more than one, by Tarjan)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        number[name] = low[name] = len(number)
        stack.append(name)
        for other in graph[name]:
            if other not in number:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], number[other])
        if low[name] == number[name]:  # the root of a component: all above it on the stack belong to it
            members = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(members) > 1:
                found.append(sorted(members))

    for name in graph:
        if name not in number:
            visit(name)
    return found


def figures_of(root: Path) -> tuple[dict[str, str], list[str]]:
    """The figures of a package's source by name, and its comments per 100 lines by sub-package."""
    known = modules_of(root)
    texts = {name: path.read_text() for name, path in known.items()}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    lengths = [length for tree in trees.values() for length in function_lengths(tree)]
    noted = [annotation for tree in trees.values() for annotation in annotations(tree)]
    circles = cycles({name: imports(tree, known) for name, tree in trees.items()})
    lines, comments = defaultdict[str, int](int), defaultdict[str, int](int)
    for name, text in texts.items():
        package = ".".join(name.split(".")[:2]) if known[name].parent != root else root.name
        lines[package] += len(text.splitlines())
        comments[package] += num_comments(text)
    whole = sum(lines.values())
    figures = {
        "lines of source": f"{whole:,}",
        "functions": f"{len(lengths):,}",
        "function length, median / p90 / max": f"{statistics.median(lengths):.0f} / "
        f"{statistics.quantiles(lengths, n=10)[8]:.0f} / {max(lengths)}",
        "comments per 100 lines": f"{100 * sum(comments.values()) / whole:.1f}",
        "annotations that hold Any": f"{100 * sum(map(holds_any, noted)) / len(noted):.1f} %",
        "import cycles, imports in functions counted": f"{len(circles)}"
        + "".join(f"; {', '.join(circle)}" for circle in circles),
        "modules and packages at the top": str(
            sum(not path.name.startswith("_") for path in root.glob("*.py"))
            + sum((folder / "__init__.py").is_file() for folder in root.iterdir())
        ),
        "modules at the top": str(sum(not path.name.startswith("_") for path in root.glob("*.py"))),
    }
    packages = [f"{name}: {lines[name]:,} lines, {100 * comments[name] / lines[name]:.1f}" for name in sorted(lines)]
    return figures, packages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another package's folder, printed beside this one's")
    parser.add_argument("--packages", action="store_true", help="comments per 100 lines of each package too")
    options = parser.parse_args()
    figures, packages = figures_of(HERE)
    other = figures_of(options.against)[0] if options.against else None
    print("| figure | here |" + (f" {options.against} |" if other else ""))
    print("| --- | ---: |" + (" ---: |" if other else ""))
    for name, value in figures.items():
        print(f"| {name} | {value} |" + (f" {other[name]} |" if other else ""))
    if options.packages:
        print("\ncomments per 100 lines, by package:", *packages, sep="\n  ")


if __name__ == "__main__":
    main()
