"""What the doctor calls unsafe."""

from __future__ import annotations

from pathlib import Path

import pytest

from readroom import doctor
from readroom.doctor import check_broker_url, check_home, check_safety, check_store_url, examine
from readroom.settings import load_settings


@pytest.mark.parametrize(
    ("url", "levels"),
    [
        ("redis://:p@127.0.0.1:6379/0", []),
        ("rediss://:p@broker.example:6379/0", []),
        ("redis://:p@broker.example:6379/0", ["warning"]),
        ("rediss://broker.example:6379/0", ["error"]),
        ("redis://broker.example:6379/0", ["error", "warning"]),
    ],
)
def test_remote_broker_needs_a_password_and_should_be_encrypted(url: str, levels: list[str]) -> None:
    assert [finding.level for finding in check_broker_url(url)] == levels


@pytest.mark.parametrize(
    ("url", "levels"),
    [
        ("postgresql://u:p@127.0.0.1/readroom", []),
        ("postgresql://u:p@db.example/readroom", ["warning"]),
        ("postgresql://u:p@db.example/readroom?sslmode=require", ["warning"]),
        ("postgresql://u:p@db.example/readroom?sslmode=verify-full", []),
    ],
)
def test_remote_store_should_be_encrypted_and_verified(url: str, levels: list[str]) -> None:
    assert [finding.level for finding in check_store_url(url)] == levels


def test_home_open_to_others_is_a_warning(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    assert "warning" in {finding.level for finding in check_home(load_settings(home=tmp_path))}
    tmp_path.chmod(0o700)
    assert {finding.level for finding in check_home(load_settings(home=tmp_path))} <= {"ok", "note"}


def test_flower_beyond_this_machine_without_a_chosen_password_is_an_error() -> None:
    assert [f.level for f in check_safety(load_settings(flower_host="0.0.0.0"))] == ["error"]
    assert list(check_safety(load_settings(flower_host="0.0.0.0", flower_password="chosen"))) == []


def test_check_that_fails_is_a_line_that_quotes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_secrets(_: object) -> None:
        raise ValueError("SECRETNAME")

    monkeypatch.setattr(doctor, "CHECKS", (check_secrets,))
    [finding] = examine(load_settings())
    assert (finding.subject, finding.level, finding.text) == ("secrets", "error", "ValueError")
