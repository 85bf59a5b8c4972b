"""Opening the store: SQLite under the home, or PostgreSQL. Transactions, connections, their repair."""

from __future__ import annotations

import os
import random
import sqlite3
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, OperationalError

from db.faults import BUSY, translate_faults
from readroom.errors import SettingsError, StoreError, StoreUnavailable
from readroom.settings import Settings

SQLITE_NAME = "readroom.sqlite3"
SQLITE_BUSY_S = 60.0  # a producer's transaction takes 0.1 s; a slow disk and a dozen processes may queue for seconds
POSTGRES_TIMEOUT_S = 120.0  # no statement of ours takes that long; a server that says nothing is taken for gone
# A process that is stopped or cut off inside a transaction keeps its row locks as long as the server keeps its session.
POSTGRES_IDLE_S = 60.0  # our transactions are idle between two statements for milliseconds
POSTGRES_LOCK_S = 30.0
POSTGRES_KEEPALIVE_S = 30
POSTGRES_DRIVER = "postgresql+pg8000"
CLOCK_LIFE_S = 600.0  # quartz drifts by 0.1 s in that time at worst
CLOCK_STEP_S = 1.0
WRITING = {"readroom_writing": True}


def now() -> float:
    """Seconds since 1970, UTC, by this machine's clock. What the store writes and compares is `Store.now()`."""
    return time.time()


def store_url(settings: Settings) -> str:
    """The store's URL: READROOM_DATABASE_URL with our driver, else SQLite under the home.

    Raises SettingsError for another database or a malformed URL.
    """
    if settings.database_url is None:
        # Not pasted together: a home whose name holds `?` or `%` would lead elsewhere.
        path = str(settings.home_dir.absolute() / SQLITE_NAME)
        return URL.create("sqlite", database=path).render_as_string(hide_password=False)
    return name_driver(settings.database_url.get_secret_value())


def name_driver(url: str) -> str:
    """The same URL with the driver Readroom installs (`postgres://`, `postgresql://` and other drivers: pg8000)."""
    try:
        parsed = make_url(url.replace("postgres://", "postgresql://", 1) if url.startswith("postgres://") else url)
    except (ArgumentError, ValueError):
        raise SettingsError("READROOM_DATABASE_URL is no URL", "See docs/configuration.md.") from None
    dialect = parsed.get_backend_name()
    if dialect not in ("sqlite", "postgresql") or (dialect == "sqlite" and parsed.database in (None, "", ":memory:")):
        raise SettingsError("READROOM_DATABASE_URL names neither PostgreSQL nor an SQLite file")
    driver = POSTGRES_DRIVER if dialect == "postgresql" else "sqlite"
    return parsed.set(drivername=driver).render_as_string(hide_password=False)


@dataclass(frozen=True, slots=True)
class Offset:
    """How far the server's clock is ahead of ours. `width_s`: how long the answer took; it is off by half at most."""

    seconds: float
    width_s: float
    measured_at: float
    measured_monotonic: float

    def is_stale(self, moment: float) -> bool:
        """Whether to measure again: after a while, or when the clock went another way than time did."""
        elapsed = time.monotonic() - self.measured_monotonic
        return elapsed > CLOCK_LIFE_S or abs(moment - self.measured_at - elapsed) > CLOCK_STEP_S


class Store:
    """A handle on the SQL store; safe to share between threads and to carry through a fork.

    `clock` is this machine's, in seconds since 1970.
    """

    def __init__(self, url: str, clock: Callable[[], float] = now) -> None:
        self._url = make_url(name_driver(url))
        self._clock = clock
        self._offset: Offset | None = None
        self._start_engine()

    def now(self) -> float:
        """Seconds since 1970 by the store's only clock: the server's on PostgreSQL, this machine's on SQLite.

        Leases of one machine are judged by another one, so both must read the same clock. The server is asked at first,
        every ten minutes, and when this machine's clock was set or stood still. Raises StoreError when it must be asked
        and does not answer.
        """
        if self.dialect == "sqlite":
            return self._clock()
        offset = self._offset
        if offset is None or offset.is_stale(self._clock()):
            offset = self._offset = self._measure_offset()
        return self._clock() + offset.seconds

    @property
    def dialect(self) -> str:
        """`sqlite` or `postgresql`."""
        return self._url.get_backend_name()

    @property
    def location(self) -> str:
        """The URL without its password."""
        return self._url.render_as_string(hide_password=True)

    @property
    def path(self) -> Path | None:
        """SQLite's file; None on PostgreSQL."""
        return Path(self._url.database or "") if self.dialect == "sqlite" else None

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """A connection in a write transaction: committed at the end, rolled back on any exception.

        Raises StoreUnavailable (busy, full, connection lost) or StoreError.
        """
        with self._connect_writing() as connection, connection.begin():
            yield connection

    @contextmanager
    def alter(self) -> Iterator[Connection]:
        """As `begin`, to change tables: SQLite looks at references between rows only at the end.

        It cannot change a column but makes the table anew, and dropping the old one would count as deleting what other
        tables refer to (sqlite.org/lang_altertable.html, section 7). Raises StoreError when a reference leads nowhere.
        """
        with self._connect_writing() as connection, self._without_references(connection), connection.begin():
            yield connection
            if self.dialect == "sqlite" and connection.execute(text("PRAGMA foreign_key_check")).first():
                raise StoreError("the store holds rows that refer to others which are not there", "Restore a backup.")

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection that sees one state of the store (SQLite) or one per statement (PostgreSQL)."""
        with self._translated(), self._engine_here().connect() as connection:
            yield connection

    def close(self) -> None:
        """Close every pooled connection. A later use opens new ones."""
        with self._translated():
            self._engine_here().dispose()

    @contextmanager
    def _connect_writing(self) -> Iterator[Connection]:
        engine = self._engine_here()
        with self._translated(), self._take_turn(), engine.connect() as connection:
            connection.execution_options(**WRITING)
            yield connection

    @contextmanager
    def _without_references(self, connection: Connection) -> Iterator[None]:
        if self.dialect != "sqlite":
            yield
            return
        # Outside the transaction, where SQLite takes notice; the connection goes back into the pool afterwards.
        driver: Any = connection.connection.driver_connection
        driver.execute("PRAGMA foreign_keys=OFF")
        try:
            yield
        finally:
            driver.execute("PRAGMA foreign_keys=ON")

    def _measure_offset(self) -> Offset:
        with self.read() as connection:
            # The first question begins the transaction too, so that only the second one takes a single round trip.
            return min((self._ask_clock(connection) for _ in range(2)), key=lambda offset: offset.width_s)

    def _ask_clock(self, connection: Connection) -> Offset:
        before = self._clock()
        server = connection.scalar(text("SELECT CAST(extract(epoch FROM clock_timestamp()) AS DOUBLE PRECISION)"))
        after = self._clock()
        return Offset(float(server or 0.0) - (before + after) / 2, after - before, after, time.monotonic())

    def _translated(self) -> AbstractContextManager[None]:
        return translate_faults(sockets=self.dialect == "postgresql")

    def _engine_here(self) -> Engine:
        if os.getpid() != self._pid:
            # A fork shares its parent's sockets and file locks: leave them untouched (not even closed) and start anew.
            self._forsaken = self._engine
            self._start_engine()
        return self._engine

    def _start_engine(self) -> None:
        self._pid = os.getpid()
        self._engine = _create_engine(self._url)
        self._turn = threading.Lock()

    @contextmanager
    def _take_turn(self) -> Iterator[None]:
        # SQLite has one writer. The threads of one process wait here, where the next one wakes at once, and not in
        # SQLite's polling.
        if self.dialect != "sqlite":
            yield
            return
        turn = self._turn
        if not turn.acquire(timeout=SQLITE_BUSY_S):
            raise StoreUnavailable(*BUSY)
        try:
            yield
        finally:
            turn.release()


def open_store(url: str, create: bool = True, clock: Callable[[], float] = now) -> Store:
    """Open the store; with `create` make it and bring its tables up to this release.

    Several processes may do so at once. Raises StoreError when it is missing (without `create`), older than this
    release (without `create`) or newer than it.
    """
    from db.upgrade import check_store, upgrade_store

    store = Store(url, clock)
    if create:
        upgrade_store(store)
    else:
        check_store(store)
    return store


def _create_engine(url: URL) -> Engine:
    # hide_parameters: SQLAlchemy would otherwise write a patient's rows into the text of its errors.
    if url.get_backend_name() == "sqlite":
        engine = create_engine(
            url, hide_parameters=True, pool_size=8, max_overflow=56, connect_args={"timeout": SQLITE_BUSY_S}
        )
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    url, arguments = _read_postgres_options(url)
    engine = create_engine(
        url, hide_parameters=True, pool_pre_ping=True, pool_size=8, max_overflow=56, connect_args=arguments
    )
    event.listen(engine, "connect", _set_up_postgres)
    return engine


def _set_up_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    connection.isolation_level = None  # the driver begins no transaction behind our back
    # The page cache stays at SQLite's 2 MB: 32 MB make a producer's memory grow by a quarter over 20,000 files and its
    # inserts no faster (500 to 800 rows/s with either); the operating system holds the pages anyway.
    for pragma in ("foreign_keys=ON", "synchronous=NORMAL", "temp_store=MEMORY"):
        connection.execute(f"PRAGMA {pragma}")


def _set_up_postgres(connection: Any, _record: Any) -> None:
    # By SET and not among the start-up parameters, which poolers such as PgBouncer refuse.
    settings = {
        "idle_in_transaction_session_timeout": f"{POSTGRES_IDLE_S * 1000:.0f}ms",
        "lock_timeout": f"{POSTGRES_LOCK_S * 1000:.0f}ms",
        "tcp_keepalives_idle": str(POSTGRES_KEEPALIVE_S),  # the server takes no notice of it on a Unix socket
    }
    cursor = connection.cursor()
    calls = ", ".join(["set_config(%s, %s, false)"] * len(settings))
    cursor.execute(f"SELECT {calls}", [part for pair in settings.items() for part in pair])
    cursor.close()
    connection.commit()


def _begin_sqlite(connection: Connection) -> None:
    if not connection.get_execution_options().get("readroom_writing"):
        connection.exec_driver_sql("BEGIN")
        return
    # IMMEDIATE takes the write lock now: a transaction that reads first and then wants to write would fail at once
    # with "database is locked" when another one has written in between, whatever the timeout.
    end = time.monotonic() + SQLITE_BUSY_S
    while not _try_to_begin(connection, last=time.monotonic() > end):
        # SQLite's own waiting looks every 100 ms, and a worker would rarely meet the gap of 1 ms between a producer's
        # transactions. This looks often.
        time.sleep(random.uniform(0.5, 2.5) / 1000)


def _try_to_begin(connection: Connection, last: bool) -> bool:
    driver: Any = connection.connection.driver_connection
    driver.execute("PRAGMA busy_timeout=0")
    try:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    except OperationalError as error:
        if last or getattr(error.orig, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_BUSY:
            raise
        return False
    finally:
        driver.execute(f"PRAGMA busy_timeout={SQLITE_BUSY_S * 1000:.0f}")
    return True


def _read_postgres_options(url: URL) -> tuple[URL, dict[str, Any]]:
    """Translate libpq's `sslmode`, `port` and `host=/folder` from the URL's query into pg8000's arguments."""
    arguments: dict[str, Any] = {"timeout": POSTGRES_TIMEOUT_S, "application_name": "readroom"}
    mode = str(url.query.get("sslmode", ""))
    if mode not in ("", "disable", "allow", "prefer"):
        arguments["ssl_context"] = _build_ssl(mode)
    folder = str(url.query.get("host", ""))
    if folder.startswith("/"):
        arguments["unix_sock"] = f"{folder}/.s.PGSQL.{url.query.get('port', url.port or 5432)}"
    return url.difference_update_query(["sslmode", "host", "port"]), arguments


def _build_ssl(mode: str) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if mode != "verify-full":
        context.check_hostname = False
    if mode == "require":
        context.verify_mode = ssl.CERT_NONE  # libpq's meaning of `require`: encrypted, the server not verified
    return context
