"""Bringing the store's tables up to this release, safely when many processes start at once."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, inspect, text

from db.faults import translate_faults
from db.session import Store
from readroom.errors import StoreError, StoreUnavailable

# The newest file of migrations/versions. Written here so that a start need not import Alembic (0.2 s).
HEAD_REVISION = "0002"
MIGRATIONS = Path(__file__).parent / "migrations"
POSTGRES_LOCK = 0x52454144  # "READ": the advisory lock of migrations
LOCK_TIMEOUT_S = 600.0


def check_store(store: Store) -> None:
    """Raise StoreError unless the store exists with this release's tables."""
    revision = read_revision(store) if store.path is None or store.path.exists() else None
    if revision is None:
        raise StoreError("there is no store yet", "Run `readroom demo`, `readroom enqueue` or `readroom up` first.")
    if revision != HEAD_REVISION:
        raise StoreError("the store was made by another release", "Run `readroom up` of this release to upgrade it.")


def upgrade_store(store: Store) -> None:
    """Create or migrate the tables when needed; the first process does it, the others wait."""
    _create_file(store)
    if read_revision(store) == HEAD_REVISION:
        return
    with translate_faults(), _lock_store(store):
        _set_journal(store)
        if read_revision(store) != HEAD_REVISION:
            _migrate(store)


def read_revision(store: Store) -> str | None:
    """The migration the store stands at; None when it is empty."""
    with store.read() as connection:
        if not inspect(connection).has_table("alembic_version"):
            return None
        revision: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
        return revision


def _create_file(store: Store) -> None:
    """Make SQLite's file and folder for their owner only: they name patients."""
    if store.path is None:
        return
    try:
        store.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(store.path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise StoreError(f"the store's file cannot be made ({os.strerror(error.errno or 0)})") from None


def _set_journal(store: Store) -> None:
    """Write-ahead log: readers go on while one writes. The file remembers it.

    Only under the lock: the change needs the file alone and does not wait for others.
    """
    if store.path is not None:
        with store.read() as connection:
            connection.connection.driver_connection.execute("PRAGMA journal_mode=WAL")  # type: ignore[union-attr]


def _migrate(store: Store) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    try:
        with store.alter() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except CommandError:
        raise StoreError("the store was made by a newer release", "Run that release or a later one.") from None


@contextmanager
def _lock_store(store: Store) -> Iterator[None]:
    with _lock_file(store.path) if store.path is not None else _lock_server(store):
        yield


@contextmanager
def _lock_file(path: Path) -> Iterator[None]:
    """Hold a lock file beside the store; the kernel lets go of it when the process dies."""
    with path.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _lock_server(store: Store) -> Iterator[None]:
    """Hold PostgreSQL's advisory lock; the server lets go of it when the connection ends."""
    with store.read() as connection:
        _await_lock(connection)
        connection.commit()  # the lock is the session's; a session idle in a transaction would be ended
        try:
            yield
        finally:
            connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": POSTGRES_LOCK})


def _await_lock(connection: Connection) -> None:
    # Asked again and again: a blocking call would outlast the driver's timeout while a long migration runs elsewhere.
    end = time.monotonic() + LOCK_TIMEOUT_S
    while not connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": POSTGRES_LOCK}):
        if time.monotonic() > end:
            raise StoreUnavailable("another process has been migrating the store for long")
        time.sleep(0.05)
