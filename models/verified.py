"""A checkpoint's folder, found and verified before anything in it is loaded. Knows no torch."""

from __future__ import annotations

from pathlib import Path

from models.checkpoint import (
    MANIFEST_NAME,
    CheckpointSource,
    Manifest,
    refuse_pickles,
    resolve_folder,
    verify_folder,
)
from readroom.errors import CheckpointBroken


def open_folder(source: CheckpointSource) -> tuple[Path, Manifest | None]:
    """The folder of a checkpoint and its manifest, every file compared with it; None for a plain hub folder.

    Raises CheckpointMissing, CheckpointBroken.
    """
    folder = find_folder(source)
    refuse_pickles(folder)
    has_manifest = (folder / MANIFEST_NAME).is_file()
    manifest = verify_folder(folder, allow_links=source.ref.startswith("hub:")) if has_manifest else None
    check_identity(source, manifest, folder)
    return folder, manifest


def find_folder(source: CheckpointSource) -> Path:
    """The local folder of a checkpoint; hub ids are fetched."""
    if not source.ref.startswith("hub:"):
        return Path(source.location)
    from models.hub import fetch_snapshot

    return fetch_snapshot(source.location)


def check_identity(source: CheckpointSource, manifest: Manifest | None, folder: Path) -> None:
    """Raise when a folder no longer holds the checkpoint that was asked for: results would name the wrong one."""
    if not source.ref.startswith("sha256:"):
        return
    if (manifest.ref if manifest else resolve_folder(folder).ref) != source.ref:
        raise CheckpointBroken("the folder holds another checkpoint than the one asked for", "Add it again.")
