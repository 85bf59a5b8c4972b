"""Writing what was trained as a checkpoint folder, which stands there whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Put what `fill` writes into an empty folder in the place of `folder`; if `fill` fails, nothing is changed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(4)
    staged, old = (folder.with_name(f".{kind}-{folder.name}-{mark}") for kind in ("staged", "old"))
    staged.mkdir()
    try:
        fill(staged)
        for entry in staged.iterdir():
            sync(entry)
        if folder.exists():
            folder.rename(old)
        staged.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
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
