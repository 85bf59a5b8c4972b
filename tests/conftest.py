"""Fixtures that several rooms of tests share. Each section belongs to one room of the program."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from db.session import Store, open_store
from tests.postgres import PostgresServer

# --- the store ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A real PostgreSQL server for the whole run; a test that stops or kills a server starts its own."""
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture(scope="session")
def postgres_url(postgres_server: PostgresServer) -> str:
    """The URL of one empty database, shared by the whole run."""
    return postgres_server.create_database()


@pytest.fixture(scope="session")
def postgres_template(postgres_server: PostgresServer) -> str:
    """The name of a database with all tables: copying it is faster than migrating anew."""
    url = postgres_server.create_database()
    open_store(url).close()
    return url.rsplit("/", 1)[1]


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file with all tables."""
    path = tmp_path_factory.mktemp("store") / "template.sqlite3"
    open_store(f"sqlite:///{path}").close()
    return path


@pytest.fixture
def sqlite_store(sqlite_template: Path, tmp_path: Path) -> Iterator[Store]:
    """An empty store in a file."""
    path = Path(shutil.copy(sqlite_template, tmp_path / "readroom.sqlite3"))
    store = open_store(f"sqlite:///{path}", create=False)
    yield store
    store.close()


@pytest.fixture
def postgres_store(postgres_server: PostgresServer, postgres_template: str) -> Iterator[Store]:
    """An empty store on the PostgreSQL server."""
    url = postgres_server.create_database(template=postgres_template)
    store = open_store(url, create=False)
    yield store
    store.close()
    postgres_server.drop_database(url)


@pytest.fixture(params=["sqlite", "postgres"])
def store(request: pytest.FixtureRequest) -> Store:
    """An empty store; the test runs once on each dialect."""
    chosen: Store = request.getfixturevalue(f"{request.param}_store")
    return chosen


@pytest.fixture(params=["sqlite", "postgres"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a store that does not exist yet; the test runs once on each dialect."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'home' / 'readroom.sqlite3'}"
    create: Callable[[], str] = request.getfixturevalue("postgres_server").create_database
    return create()
