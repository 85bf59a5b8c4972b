"""The page of settings and the example file say what the settings are."""

from __future__ import annotations

import re

from readroom.configuration import SECTIONS, render_configuration
from readroom.manual import render_commands
from readroom.settings import PREFIX, SECRET_SETTINGS, Settings, load_settings
from tests.docs.markdown import ROOT

EXAMPLE = (ROOT / ".env.example").read_text()
# Variables of docker-compose.yml that no program of ours reads.
COMPOSE_ONLY = {"POSTGRES_PASSWORD", "EXPORTS_DIR", "CHECKPOINTS_DIR"}


def known_variables() -> set[str]:
    names = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    return names | {f"{PREFIX}{name.upper()}_FILE" for name in SECRET_SETTINGS}


def read_example() -> dict[str, str]:
    """Every assignment of the example file, also those behind a comment sign."""
    return dict(re.findall(r"^#?([A-Z_]+)=(.*)$", EXAMPLE, flags=re.MULTILINE))


def test_configuration_page_is_current() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == render_configuration(), "run `make docs`"


def test_commands_page_is_current() -> None:
    assert (ROOT / "docs" / "commands.md").read_text() == render_commands(), "run `make docs`"


def test_configuration_page_has_every_setting_with_its_meaning() -> None:
    page = render_configuration()
    rows = [line for line in page.splitlines() if line.startswith(f"| `{PREFIX}")]
    assert len(rows) == len(Settings.model_fields) >= 35
    assert [row for row in rows if "||" in row.replace(" ", "") or row.count(" | ") != 3] == []


def test_sections_begin_at_settings_that_exist() -> None:
    assert set(SECTIONS) <= set(Settings.model_fields)
    assert next(iter(SECTIONS)) == next(iter(Settings.model_fields))


def test_example_file_names_known_variables_only() -> None:
    variables = read_example()
    assert len(variables) >= 10
    assert set(variables) - known_variables() - COMPOSE_ONLY == set()


def test_example_file_values_are_accepted(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in read_example().items():
        if name.startswith(PREFIX) and not name.endswith("_FILE"):
            monkeypatch.setenv(name, value)
    assert load_settings().max_batch == 64


def test_example_file_holds_no_working_password() -> None:
    passwords = {name: value for name, value in read_example().items() if name.endswith("PASSWORD")}
    assert len(passwords) == 3
    assert [name for name, value in passwords.items() if not value.startswith("CHANGE_ME")] == []
