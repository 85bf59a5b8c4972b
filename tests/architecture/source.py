"""The source files of this repository, read as text and as syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("readroom", "producer", "worker", "models", "training", "db")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def list_modules(*folders: str) -> list[Path]:
    return sorted(path for folder in folders or PACKAGES for path in (ROOT / folder).rglob("*.py"))


def parse_module(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def list_functions(path: Path) -> Iterator[Function]:
    return (node for node in ast.walk(parse_module(path)) if isinstance(node, Function))


def count_lines(function: Function) -> int:
    """Lines from `def` to the end; the docstring and its blank line are not counted."""
    total = (function.end_lineno or function.lineno) - function.lineno + 1
    if ast.get_docstring(function, clean=False) is None:
        return total
    docstring = function.body[0]
    return total - ((docstring.end_lineno or docstring.lineno) - docstring.lineno + 1)


def imported_names(path: Path) -> set[str]:
    """Every module a file imports, at any depth: `a.b` for `import a.b` and for `from a.b import c`."""
    names: set[str] = set()
    for node in ast.walk(parse_module(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
    return names


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()
