"""The registry of checkpoints the workers serve from: exactly one active per family."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, Row, select, update

from db.rows import insert_new
from db.session import Store, now
from db.tables import checkpoints
from readroom.errors import BadCall, CheckpointMissing

# Fewer characters of a digest are a word like `a` or `bed` rather than a digest.
REF_PREFIX = re.compile(r"(sha256:)?[0-9a-f]{8,64}")


class CheckpointState(StrEnum):
    """Whether workers serve it."""

    CANDIDATE = "candidate"
    ACTIVE = "active"
    RETIRED = "retired"


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """A registered checkpoint. `ref` is what results name; `location` a folder or hub id; `added_at` s since 1970.

    `added_at` 0 means the moment it is added.
    """

    ref: str
    family: str
    name: str
    location: str
    state: CheckpointState = CheckpointState.CANDIDATE
    manifest: dict[str, Any] = field(default_factory=dict)
    added_at: float = 0.0


def add_checkpoint(store: Store, record: CheckpointRecord) -> bool:
    """Register a checkpoint as it is described; False when its ref is known already (nothing changes then).

    Raises BadCall when it calls itself active beside another: that is `set_active`'s to decide.
    """
    if record.state is CheckpointState.ACTIVE:
        raise BadCall("a checkpoint is added as a candidate", "Promote it afterwards.")
    dated = replace(record, added_at=record.added_at or now())
    with store.begin() as connection:
        return bool(insert_new(connection, checkpoints, [asdict(dated)], [checkpoints.c.ref]))


def renew_checkpoint(store: Store, record: CheckpointRecord) -> None:
    """Register a checkpoint, or describe a known one anew: name, family, place and manifest; its state stays.

    It is the newest of its name from now on.
    """
    if add_checkpoint(store, record):
        return
    described = asdict(replace(record, added_at=record.added_at or now()))
    changes = {key: value for key, value in described.items() if key not in ("ref", "state")}
    with store.begin() as connection:
        connection.execute(update(checkpoints).where(checkpoints.c.ref == record.ref).values(changes))


def get_checkpoint(store: Store, ref: str) -> CheckpointRecord | None:
    """The checkpoint of exactly that ref."""
    with store.read() as connection:
        row = connection.execute(select(checkpoints).where(checkpoints.c.ref == ref)).one_or_none()
    return _read_checkpoint(row) if row else None


def find_checkpoint(store: Store, name_or_ref_prefix: str) -> CheckpointRecord | None:
    """The checkpoint a person means: by ref, else the newest of that name, else by the beginning of its digest.

    The beginning has 8 or more hex characters, with or without `sha256:`. Raises BadCall when several digests begin so.
    """
    known = list_checkpoints(store)
    for one in known:
        if one.ref == name_or_ref_prefix:
            return one
    named = [one for one in known if one.name == name_or_ref_prefix]
    if named:
        return named[0]
    begun = [one for one in known if _begins(one.ref, name_or_ref_prefix)]
    if len(begun) > 1:
        raise BadCall(f"{len(begun)} checkpoints begin so", "Give more of the reference.")
    return begun[0] if begun else None


def list_checkpoints(store: Store) -> list[CheckpointRecord]:
    """All checkpoints, newest first."""
    newest = select(checkpoints).order_by(checkpoints.c.added_at.desc(), checkpoints.c.ref)
    with store.read() as connection:
        return [_read_checkpoint(row) for row in connection.execute(newest)]


def active_checkpoint(store: Store, family: str) -> CheckpointRecord | None:
    """The checkpoint that workers of this family serve; None when none was promoted."""
    active = checkpoints.c.state == CheckpointState.ACTIVE
    with store.read() as connection:
        row = connection.execute(select(checkpoints).where(checkpoints.c.family == family, active)).one_or_none()
    return _read_checkpoint(row) if row else None


def set_active(store: Store, ref: str) -> None:
    """Make this checkpoint its family's active one; the one before is retired in the same transaction.

    Raises CheckpointMissing when the ref is not registered.
    """
    with store.begin() as connection:
        family = _lock_family(connection, ref)
        in_family = checkpoints.c.family == family
        active = checkpoints.c.state == CheckpointState.ACTIVE
        others = update(checkpoints).where(in_family, active, checkpoints.c.ref != ref)
        connection.execute(others.values(state=CheckpointState.RETIRED))
        chosen = update(checkpoints).where(checkpoints.c.ref == ref)
        connection.execute(chosen.values(state=CheckpointState.ACTIVE))


def _lock_family(connection: Connection, ref: str) -> str:
    """The checkpoint's family, with its rows locked: two promotions at once go one after the other."""
    family = connection.scalar(select(checkpoints.c.family).where(checkpoints.c.ref == ref))
    if family is None:
        raise CheckpointMissing("no checkpoint is registered under that reference", "See `readroom checkpoints list`.")
    rows = select(checkpoints.c.ref).where(checkpoints.c.family == family).order_by(checkpoints.c.ref)
    connection.execute(rows.with_for_update())
    return str(family)


def _begins(ref: str, prefix: str) -> bool:
    return bool(REF_PREFIX.fullmatch(prefix)) and ref.startswith(f"sha256:{prefix.removeprefix('sha256:')}")


def _read_checkpoint(row: Row[Any]) -> CheckpointRecord:
    return CheckpointRecord(**row._asdict() | {"state": CheckpointState(row.state)})
