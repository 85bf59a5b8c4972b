"""Settings are read once, loudly, and their secrets stay secret."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from readroom import messages
from readroom.errors import SettingsError
from readroom.records import FAMILIES
from readroom.settings import MAX_IDS_PER_MESSAGE, SECRET_SETTINGS, Settings, list_unknown, load_settings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("READROOM_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(Settings.model_config, "env_file", ".env")


def test_defaults_need_no_environment() -> None:
    settings = load_settings()
    assert settings.broker_url is None
    assert settings.home_dir == Path.home() / ".readroom"


def test_environment_and_dotenv_are_read_and_the_environment_wins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("READROOM_MAX_BATCH=7\nREADROOM_LEASE_S=9\n")
    monkeypatch.setenv("READROOM_MAX_BATCH", "11")
    settings = load_settings()
    assert (settings.max_batch, settings.lease_s) == (11, 9)


def test_every_family_has_a_setting_that_names_its_captioner(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [load_settings().name_model(family) for family in FAMILIES] == [None] * len(FAMILIES)
    for family in FAMILIES:
        monkeypatch.setenv(f"READROOM_{family.upper()}_MODEL", f"my-{family}")
    assert [load_settings().name_model(family) for family in FAMILIES] == ["my-blip", "my-vlp"]


def test_the_folder_of_features_may_begin_at_the_users_home(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("READROOM_REGION_DIR=~/features\n")
    assert load_settings().region_dir == Path.home() / "features"


def test_empty_variables_count_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("READROOM_BROKER_URL", "")
    assert load_settings().broker_url is None


def test_wrong_value_is_named_and_not_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("READROOM_MAX_BATCH", "hunter2")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert "READROOM_MAX_BATCH" in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("name", SECRET_SETTINGS)
def test_secret_is_read_from_a_file_and_hidden_in_reprs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    value = {"broker_url": "redis://:s3cret@host", "database_url": "postgresql://u:s3cret@host/db"}.get(name, "s3cret")
    (tmp_path / "secret").write_text(f"{value}\n")
    monkeypatch.setenv(f"READROOM_{name.upper()}_FILE", str(tmp_path / "secret"))
    settings = load_settings()
    assert getattr(settings, name).get_secret_value() == value
    assert "s3cret" not in repr(settings)


def test_unreadable_secret_file_is_a_settings_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("READROOM_BROKER_URL_FILE", str(tmp_path / "absent"))
    with pytest.raises(SettingsError, match="READROOM_BROKER_URL_FILE"):
        load_settings()


def test_every_setting_has_a_meaning() -> None:
    fields = Settings.model_fields
    assert len(fields) > 30
    assert [name for name, field in fields.items() if not field.description] == []


def test_the_limit_of_ids_is_one_number() -> None:
    assert messages.MAX_IDS_PER_MESSAGE == MAX_IDS_PER_MESSAGE


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BROKER_URL", "http://:hunter2@host"),
        ("BROKER_URL", "amqp://hunter2@host"),
        ("BROKER_URL", "redis://:hunter2@host:99999/0"),
        ("DATABASE_URL", "mysql://hunter2@host/readroom"),
        ("DATABASE_URL", "postgres://hunter2"),
        ("DATABASE_URL", "hunter2"),
    ],
)
def test_address_that_leads_nowhere_is_refused_without_its_text(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"READROOM_{name}", value)
    with pytest.raises(SettingsError, match=f"READROOM_{name}") as caught:
        load_settings()
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BROKER_URL", "rediss://:p@host:6380/1"),
        ("BROKER_URL", "redis+socket:///run/valkey.sock"),
        ("DATABASE_URL", "postgresql+psycopg://u:p@host/readroom"),
        ("DATABASE_URL", "postgres://u@host:5432/readroom"),
        ("DATABASE_URL", "sqlite:////var/lib/readroom.sqlite3"),
    ],
)
def test_address_that_leads_somewhere_is_taken(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"READROOM_{name}", value)
    assert getattr(load_settings(), name.lower()).get_secret_value() == value


def test_dotenv_of_another_user_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("READROOM_MAX_BATCH=7\n")
    owner = (tmp_path / ".env").stat().st_uid
    monkeypatch.setattr("os.geteuid", lambda: owner + 1)
    if owner == 0:  # root's files are trusted: give it to somebody else
        os.chown(tmp_path / ".env", 12345, -1)
    with pytest.raises(SettingsError, match="belongs to another user"):
        load_settings()


def test_variable_that_means_nothing_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("READROOM_DATABASE_ULR", "sqlite:////x")
    monkeypatch.setenv("READROOM_BROKER_URL_FILE", "/run/secret")
    assert list_unknown() == ["READROOM_DATABASE_ULR"]
