"""The edge where errors of SQLAlchemy and the drivers become StoreError.

The drivers quote rows in their texts (PostgreSQL: `Key (digest)=(...) already exists`), so no foreign text is passed
on: only our words and the driver's code.
"""

from __future__ import annotations

import sqlite3
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from readroom.errors import StoreError, StoreUnavailable

FULL = ("the store's disk is full", "Free some space; nothing was half written and the work goes on.")
BUSY = ("the store is busy: a lock was not had in time", "Try again; look for another process that holds it long.")
LOST = ("the connection to the store was lost", "See whether the database server runs; the call may be repeated.")
AWAY = ("the store cannot be reached", "See whether the database server runs and READROOM_DATABASE_URL is right.")
REFUSED = ("the store refuses the login", "Check user and password in READROOM_DATABASE_URL.")
UNTRUSTED = ("the database server's certificate is not trusted", "Check sslmode in READROOM_DATABASE_URL.")
DAMAGED = ("the store's file is damaged or no SQLite file", "Restore it from a backup; keep the damaged file.")
READ_ONLY = ("the store cannot be written", "Check owner and permissions of its file and folder.")
DISK = ("the store's disk does not answer", "Check the disk and its free space.")
SCHEMA = ("the store's tables are not what this release expects", "Run the same release everywhere.")
CROWDED = ("the database server has no free connection", "Raise its max_connections or run fewer workers.")

# https://www.sqlite.org/rescode.html: the low byte is the primary code. Those that pass by themselves are marked.
SQLITE_FAULTS: dict[int, tuple[tuple[str, str], bool]] = {
    sqlite3.SQLITE_FULL: (FULL, True),
    sqlite3.SQLITE_BUSY: (BUSY, True),
    sqlite3.SQLITE_LOCKED: (BUSY, True),
    sqlite3.SQLITE_CANTOPEN: (READ_ONLY, False),
    sqlite3.SQLITE_READONLY: (READ_ONLY, False),
    sqlite3.SQLITE_PERM: (READ_ONLY, False),
    sqlite3.SQLITE_CORRUPT: (DAMAGED, False),
    sqlite3.SQLITE_NOTADB: (DAMAGED, False),
    sqlite3.SQLITE_IOERR: (DISK, True),
}
# Writing the shared-memory index or truncating fails with an I/O code where the cause is a full disk.
SQLITE_FULL_CODES = frozenset({sqlite3.SQLITE_IOERR_SHMSIZE, sqlite3.SQLITE_IOERR_SHMOPEN})

# https://www.postgresql.org/docs/current/errcodes-appendix.html, by code or by its class (the first two characters).
POSTGRES_FAULTS: dict[str, tuple[tuple[str, str], bool]] = {
    "53100": (FULL, True),
    "53300": (CROWDED, True),
    "53": (CROWDED, True),
    "55P03": (BUSY, True),
    "57014": (BUSY, True),
    "25P03": (LOST, True),  # the server ended our session, since we stood still in a transaction
    "57P": (LOST, True),
    "08": (LOST, True),
    "40": (BUSY, True),
    "58": (DISK, True),
    "28": (REFUSED, False),
    "3D": (("the database does not exist", "Create it, then run the command again."), False),
    "25006": (READ_ONLY, False),
    "42": (SCHEMA, False),
}


@contextmanager
def translate_faults(sockets: bool = False) -> Iterator[None]:
    """Turn errors of SQLAlchemy and the drivers into StoreError; StoreUnavailable when a repeat may help.

    With `sockets` an OSError is the network's; without, it is not ours.
    """
    try:
        yield
    except PoolTimeout:
        raise StoreUnavailable("all connections to the store are in use") from None
    except DBAPIError as error:
        raise _name_fault(error) from None
    except ssl.SSLCertVerificationError:
        raise StoreError(*UNTRUSTED) from None
    except OSError as error:
        if not sockets:
            raise
        # pg8000 lets the socket's own error through when the server goes away during the handshake.
        raise _build(AWAY, True, type(error).__name__) from None
    except SQLAlchemyError as error:
        raise StoreError(f"the store was used wrongly ({type(error).__name__})") from None


def _name_fault(error: DBAPIError) -> StoreError:
    origin = error.orig
    if isinstance(origin, sqlite3.Error):
        return _name_sqlite(origin)
    code = _postgres_code(origin)
    if code:
        return _name_postgres(code)
    # pg8000 gives no code when the socket breaks or was never there.
    return _build(LOST if error.connection_invalidated else AWAY, True, type(origin).__name__)


def _name_sqlite(error: sqlite3.Error) -> StoreError:
    code = getattr(error, "sqlite_errorcode", 0)
    name = getattr(error, "sqlite_errorname", type(error).__name__)
    if code in SQLITE_FULL_CODES:
        return _build(FULL, True, name)
    if any(words in str(error) for words in ("no such table", "no such column", "already exists")):
        return _build(SCHEMA, False, name)
    words, passes = SQLITE_FAULTS.get(code & 0xFF, (("the store refuses", ""), False))
    return _build(words, passes, name)


def _name_postgres(code: str) -> StoreError:
    for length in (5, 3, 2):
        if code[:length] in POSTGRES_FAULTS:
            words, passes = POSTGRES_FAULTS[code[:length]]
            return _build(words, passes, code)
    return _build(("the store refuses", ""), False, code)


def _postgres_code(error: Any) -> str:
    """The SQLSTATE that pg8000 hands over as field `C` of the server's message; "" when the server said nothing."""
    fields = error.args[0] if getattr(error, "args", None) else None
    return str(fields.get("C", "")) if isinstance(fields, dict) else ""


def _build(words: tuple[str, str], passes: bool, code: str) -> StoreError:
    kind = StoreUnavailable if passes else StoreError
    return kind(f"{words[0]} ({code})", words[1])
