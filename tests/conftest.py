"""Fixtures that several rooms of tests share. Each section belongs to one room of the program."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from db.session import Store, open_store
from readroom.settings import Settings
from tests.postgres import PostgresServer

# --- the user's own installation ----------------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def apart_from_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test may touch the store or broker of whoever runs it: no READROOM_ variable, no `.env`, a home of its own."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("READROOM_")]:
            patch.delenv(name)
        patch.setenv("READROOM_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setitem(Settings.model_config, "env_file", None)
        yield


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
def postgres_tables(postgres_server: PostgresServer) -> str:
    """The URL of a database with all tables, emptied after each test: faster than a new one for each."""
    url = postgres_server.create_database()
    open_store(url).close()
    return url


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
def postgres_store(postgres_server: PostgresServer, postgres_tables: str) -> Iterator[Store]:
    """An empty store on the PostgreSQL server."""
    store = open_store(postgres_tables, create=False)
    yield store
    store.close()
    postgres_server.empty_database(postgres_tables)


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
