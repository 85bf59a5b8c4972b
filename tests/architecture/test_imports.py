"""Who may import whom: the contracts in pyproject.toml, run as a test, and what they cannot say."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

from tests.architecture.source import ROOT, imported_names, list_modules, name_of

# Modules whose import costs seconds; a machine beside the PACS does not have them.
HEAVY = ("torch", "transformers", "accelerate")


def test_import_contracts_hold() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert f"{len(contracts)} kept, 0 broken" in result.stdout
    assert len(contracts) >= 6


def test_celery_is_imported_only_where_the_broker_is_the_subject() -> None:
    allowed = {"readroom/transport.py", "readroom/broker.py", "worker/app.py", "worker/tasks.py", "worker/rescue.py"}
    users = {name_of(path) for path in list_modules() if {"celery", "kombu"} & _packages(path)}
    assert "readroom/transport.py" in users
    assert users <= allowed


def test_sql_is_spoken_only_in_the_store_room() -> None:
    users = {name_of(path) for path in list_modules() if "sqlalchemy" in _packages(path)}
    assert users
    assert {name for name in users if not name.startswith("db/")} == set()


def test_torchvision_is_never_imported() -> None:
    modules = list_modules()
    assert len(modules) > 20
    assert [name_of(path) for path in modules if "torchvision" in _packages(path)] == []


def test_console_command_starts_without_heavy_packages() -> None:
    code = f"import sys, readroom.cli; print([name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "[]", result.stderr


def test_producers_load_without_heavy_packages() -> None:
    modules = [name_of(path)[:-3].replace("/", ".") for path in list_modules("producer") if path.stem != "__init__"]
    assert modules
    code = f"import sys, {', '.join(modules)}; print([name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "[]", result.stderr


def _packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported_names(path)}
