"""Habits of this repository that no linter knows."""

from __future__ import annotations

import ast
import re
import statistics
from pathlib import Path

import pytest

from readroom.settings import Settings
from tests.architecture.source import (
    PACKAGES,
    ROOT,
    count_lines,
    list_functions,
    list_modules,
    name_of,
    parse_module,
)

FORBIDDEN_STEMS = {"utils", "util", "helpers", "helper", "common", "misc", "base_utils", "tools"}
DOORS = ("train_blip.py", "evaluate.py", "inference.py")
# The one long function that is allowed: the training loop, read top to bottom.
LONG_FUNCTIONS = {"train_captioner", "run_recipe", "train"}
# Who may look a variable up. Preparing the environment of a child process is no look-up.
ENVIRONMENT_READERS = {"readroom/settings.py"}
UNPICKLER = re.compile(r"^(c?pickle|dill|joblib|shelve|marshal)\.(loads?|Unpickler|open)$|^Unpickler$")


def test_every_init_file_is_empty() -> None:
    inits = [ROOT / package / "__init__.py" for package in PACKAGES]
    inits += [path for path in list_modules(*PACKAGES, "tests", "benchmarks") if path.name == "__init__.py"]
    assert len(set(inits)) >= len(PACKAGES) + 8
    assert [name_of(path) for path in set(inits) if path.read_text().strip()] == []


def test_no_file_is_named_for_nothing() -> None:
    modules = list_modules(*PACKAGES, "tests", "benchmarks", "examples")
    assert len(modules) > 40
    assert [name_of(path) for path in modules if path.stem in FORBIDDEN_STEMS] == []


def test_root_holds_no_scripts_but_the_doors() -> None:
    scripts = sorted(ROOT.glob("*.py"))
    assert {path.name for path in scripts} <= set(DOORS)
    assert [path.name for path in scripts if len(path.read_text().splitlines()) > 20] == []


def test_functions_are_short() -> None:
    lengths = {
        f"{name_of(path)}:{function.name}": count_lines(function)
        for path in list_modules()
        for function in list_functions(path)
        # A migration is a list of tables, however it is cut.
        if function.name not in LONG_FUNCTIONS and "migrations" not in path.parts
    }
    assert len(lengths) > 200
    values = sorted(lengths.values())
    longest = sorted(lengths, key=lambda name: -lengths[name])[:10]
    assert statistics.median(values) <= 8
    assert values[int(0.9 * len(values))] <= 32, longest
    assert values[-1] <= 80, longest


def test_only_settings_read_the_environment() -> None:
    readers = {name_of(path) for path in list_modules() if _reads_environment(path)}
    assert "readroom/settings.py" in readers
    assert readers <= ENVIRONMENT_READERS, "a value from the environment belongs into readroom/settings.py"


def test_nothing_is_ever_unpickled() -> None:
    calls = [(name_of(path), call) for path in list_modules() for call in _list_calls(path)]
    assert len(calls) > 1000
    assert [name for name, call in calls if UNPICKLER.match(ast.unparse(call.func))] == []
    loads = [(name, call) for name, call in calls if ast.unparse(call.func) == "torch.load"]
    assert [name for name, call in loads if not _loads_weights_only(call)] == []


def test_no_error_is_raised_from_a_bare_exception_class() -> None:
    raised = [
        f"{name_of(path)}:{node.lineno}"
        for path in list_modules()
        for node in ast.walk(parse_module(path))
        if isinstance(node, ast.Raise) and _raised_name(node) in {"Exception", "BaseException"}
    ]
    assert raised == []


@pytest.mark.parametrize("name", Settings.model_fields)
def test_setting_is_described(name: str) -> None:
    setting = Settings.model_fields[name]
    assert setting.description, "say what it means"
    assert setting.description.endswith(".")
    unit = {"_ms": "milliseconds", "_s": "seconds", "_mb": "MiB"}.get(_suffix(name))
    assert unit is None or unit in setting.description


def test_settings_were_found() -> None:
    assert len(Settings.model_fields) >= 35


def test_sources_name_no_machine() -> None:
    pattern = re.compile(r"/work/|/root/|/home/[a-z]|/Users/")
    modules = list_modules(*PACKAGES, "benchmarks", "examples")
    assert [name_of(path) for path in modules if pattern.search(path.read_text())] == []


def _reads_environment(path: Path) -> bool:
    return any(_is_look_up(node) for node in ast.walk(parse_module(path)))


def _is_look_up(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) in {"os.getenv", "os.environ.get", "os.environ.setdefault", "os.environ.pop"}
    return (
        isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and ast.unparse(node.value) == "os.environ"
    )


def _list_calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(parse_module(path)) if isinstance(node, ast.Call)]


def _loads_weights_only(call: ast.Call) -> bool:
    return any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords)


def _raised_name(node: ast.Raise) -> str:
    target = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
    return target.id if isinstance(target, ast.Name) else ""


def _suffix(name: str) -> str:
    return f"_{name.rsplit('_', 1)[-1]}"
