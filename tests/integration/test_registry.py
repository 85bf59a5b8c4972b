"""Checkpoints from a name on the command line into the registry, and out of it again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from db.checkpoints import get_checkpoint
from db.session import Store
from models.checkpoint import resolve_checkpoint, verify_folder
from readroom.intake import choose_checkpoint
from readroom.registry import register_checkpoint
from readroom.settings import Settings, load_settings
from worker.app import locate_checkpoint


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(home=tmp_path / "home")


@pytest.fixture
def plain_folder(tmp_path: Path) -> Path:
    """A folder as the hub has them, without a manifest."""
    folder = tmp_path / "work" / "plain"
    folder.mkdir(parents=True)
    header = json.dumps({"weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 0]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (folder / "config.json").write_text('{"model_type": "blip"}')
    (folder / "README.md").write_text("words")
    return folder


# Folders -------------------------------------------------------------------------------------------------------------


def test_a_plain_folder_named_relatively_is_served_after_it_is_gone(
    settings: Settings, sqlite_store: Store, plain_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plain_folder.parent)
    enqueued = choose_checkpoint(settings, sqlite_store, "blip", "plain", remember=True)
    record = register_checkpoint(settings, sqlite_store, "./plain", name=None, activate=True, convert=False)
    assert record.ref == enqueued.ref == resolve_checkpoint("plain").ref
    assert record.manifest["parameters"] == 6
    assert record.name == "plain"
    shutil.rmtree(plain_folder)
    monkeypatch.chdir("/")
    found = locate_checkpoint(settings, sqlite_store, record.ref)
    assert Path(found.location).is_relative_to(settings.home_dir)
    assert verify_folder(found.location).ref == record.ref
    assert choose_checkpoint(settings, sqlite_store, "blip", None, remember=False).ref == record.ref


def test_a_folder_used_without_adding_it_is_remembered_by_its_whole_path(
    settings: Settings, sqlite_store: Store, plain_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plain_folder.parent)
    ref = choose_checkpoint(settings, sqlite_store, "blip", "./plain", remember=True).ref
    record = get_checkpoint(sqlite_store, ref)
    assert record is not None
    assert record.location == str(plain_folder)
