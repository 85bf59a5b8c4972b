"""Putting checkpoints into the registry that workers serve from."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from readroom.errors import CheckpointMissing
from readroom.settings import Settings

if TYPE_CHECKING:
    from db.checkpoints import CheckpointRecord
    from db.session import Store
    from models.checkpoint import CheckpointSource

log = logging.getLogger(__name__)


def register_checkpoint(
    settings: Settings, store: Store, source: str, name: str | None, activate: bool, convert: bool
) -> CheckpointRecord:
    """Verify, copy under the home, and record a checkpoint; `activate` serves it to new jobs.

    A hub checkpoint is recorded by its commit; to be activated it is downloaded first.
    One that is known already gets the name given now, if any, and the place and manifest found now.

    Raises CheckpointMissing or CheckpointBroken with what to do.
    """
    from db.checkpoints import get_checkpoint, renew_checkpoint, set_active

    found = convert_source(settings, source) if convert else find_source(settings, source)
    if found.ref.startswith("hub:"):
        found = fetch_checkpoint(found) if activate else pin_checkpoint(found)
    known = get_checkpoint(store, found.ref)
    renew_checkpoint(store, replace(describe_source(found), name=name or (known.name if known else found.name)))
    if activate:
        set_active(store, found.ref)
    record = get_checkpoint(store, found.ref)
    assert record is not None  # it was added above, and nothing deletes checkpoints
    return record


def find_source(settings: Settings, source: str) -> CheckpointSource:
    """A checkpoint by name; a folder is copied to `<home>/checkpoints/<digest>`.

    One with a manifest is verified first, a plain hub folder gets a manifest there. Its ref stays what it was.
    """
    from models.checkpoint import is_bundled, publish_folder, resolve_checkpoint, resolve_folder
    from models.plain import publish_plain

    found = resolve_checkpoint(source)
    if is_bundled(source) or not found.ref.startswith("sha256:"):
        return found
    root = (settings.home_dir / "checkpoints").resolve()
    folder = publish_folder(found.location, root) if found.manifest else publish_plain(found, root)
    return resolve_folder(folder, found.name)


def convert_source(settings: Settings, source: str) -> CheckpointSource:
    """Pickled weights (an original BLIP .pth or VLP .bin, a folder or hub id), in `<home>/checkpoints/<digest>`."""
    from models.convert import convert_checkpoint

    return find_source(settings, str(convert_checkpoint(source, settings.home_dir / "checkpoints")))


def pin_checkpoint(source: CheckpointSource) -> CheckpointSource:
    """A hub checkpoint by the commit its branch names now; any other, and one that nobody knows here, as it is."""
    from models.checkpoint import COMMIT_ID

    if not source.ref.startswith("hub:"):
        return source
    try:
        from models.hub import pin_source
    except ImportError:  # a producer needs no huggingface_hub
        pinned = source
    else:
        pinned = pin_source(source)
    if not COMMIT_ID.fullmatch(pinned.location.partition("@")[2]):
        log.warning("neither the hub nor its cache tells the commit of %s: results name the branch", source.location)
    return pinned


def fetch_checkpoint(source: CheckpointSource) -> CheckpointSource:
    """A hub checkpoint, downloaded, by the commit that came. Raises CheckpointMissing or CheckpointBroken."""
    try:
        from models.hub import fetch_source
    except ImportError:
        raise CheckpointMissing(
            "a hub checkpoint cannot be looked at without huggingface_hub", "pip install 'readroom[models]'"
        ) from None
    return fetch_source(source)


def record_source(store: Store, source: CheckpointSource) -> None:
    """Write the checkpoint's row; nothing happens when its ref is known already."""
    from db.checkpoints import add_checkpoint

    add_checkpoint(store, describe_source(source))


def describe_source(source: CheckpointSource) -> CheckpointRecord:
    """The row to be of a checkpoint."""
    from db.checkpoints import CheckpointRecord

    return CheckpointRecord(
        ref=source.ref,
        family=source.family,
        name=source.name,
        location=source.location,
        manifest=source.manifest.as_json() if source.manifest else {},
    )
