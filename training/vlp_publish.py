"""Writing what was trained as a checkpoint folder, which stands there whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from models.checkpoint import MANIFEST_NAME
from readroom.errors import BadCall


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Put what `fill` writes into an empty folder in the place of a checkpoint; if anything fails, it still stands.

    Raises BadCall for a folder that is neither empty nor a checkpoint: somebody's files are in it.
    """
    refuse_foreign(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(4)
    staged, old = (folder.with_name(f".{kind}-{folder.name}-{mark}") for kind in ("staged", "old"))
    staged.mkdir()
    try:
        fill(staged)
        for entry in staged.iterdir():
            sync(entry)
        swap_folder(staged, folder, old)
        sync(folder.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def refuse_foreign(folder: Path) -> None:
    """Raise BadCall unless a folder may be replaced: it does not exist, is empty, or holds a checkpoint."""
    if folder.exists() and not (folder / MANIFEST_NAME).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadCall(f"{folder.name} holds other things than a checkpoint", "Name a new folder.")


def swap_folder(staged: Path, folder: Path, old: Path) -> None:
    """Move `staged` into the place of `folder`; what stood there goes when the new one stands."""
    if folder.exists():
        folder.rename(old)
    try:
        staged.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def copy_folder(source: Path, folder: Path) -> None:
    """Put a copy of a folder's files in the place of `folder`."""

    def fill(staged: Path) -> None:
        for entry in source.iterdir():
            shutil.copyfile(entry, staged / entry.name)

    replace_folder(folder, fill)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk: a power cut must not leave a folder of empty files."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
