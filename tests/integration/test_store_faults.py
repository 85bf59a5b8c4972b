"""What the store says and does when its disk is full, its file is locked, its server goes away."""

from __future__ import annotations

import os
import subprocess
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, func, select, text

from db.jobs import claim_jobs, write_outcomes
from db.session import Store, name_driver, open_store, store_url
from db.submissions import add_images, count_jobs, open_submission
from db.tables import images, jobs, results, submission_jobs
from readroom.errors import SettingsError, StoreError, StoreUnavailable
from readroom.records import JobState, Outcome
from readroom.settings import load_settings
from tests.fakes.items import add_jobs, make_image, make_images, make_plan
from tests.postgres import PostgresServer, find_port

MARK = "CANARY^PATIENT"


def count_rows(store: Store, table: object) -> int:
    with store.read() as connection:
        return connection.scalar(select(func.count()).select_from(table)) or 0  # type: ignore[arg-type]


# --- a full disk ----------------------------------------------------------------------------------------------------


class SmallFileSystem:
    """A file system of two megabytes in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self, _store: Store, left: int) -> None:
        """Leave this many bytes."""
        free = os.statvfs(self.folder).f_bavail * os.statvfs(self.folder).f_frsize
        (self.folder / "ballast").write_bytes(b"x" * (free - left))

    def free(self, _store: Store) -> None:
        """Make space again."""
        (self.folder / "ballast").unlink()


class PageLimit:
    """SQLite's own limit of the file's size, for those who may not mount anything."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pages = 0

    def fill(self, store: Store, left: int) -> None:
        """Leave this many bytes, for all connections to come."""
        store.close()
        with store.read() as connection:
            self.pages = connection.scalar(text("PRAGMA page_count")) + left // 4096
        store.close()
        event.listen(store._engine, "connect", self._limit)

    def free(self, store: Store) -> None:
        """Make space again."""
        event.remove(store._engine, "connect", self._limit)
        store.close()

    def _limit(self, connection: Any, _record: Any) -> None:
        connection.execute(f"PRAGMA max_page_count={self.pages}")


Disk = SmallFileSystem | PageLimit


@pytest.fixture(params=["file system", "page limit"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    """Something that is soon full; the real thing where mounting is permitted."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if request.param == "page limit" or subprocess.run(command, check=False).returncode != 0:
        yield PageLimit(folder)
        return
    yield SmallFileSystem(folder)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_named_and_the_work_goes_on_when_there_is_space_again(small_disk: Disk) -> None:
    store = open_store(f"sqlite:///{small_disk.folder / 'readroom.sqlite3'}")
    plan = make_plan()
    submission = open_submission(store, plan)
    small_disk.fill(store, left=600_000)
    added, start = 0, 0
    with pytest.raises(StoreUnavailable, match="disk is full") as caught:
        for start in range(0, 100_000, 50):
            added += len(add_images(store, submission, plan, make_images(50, start)).queued)
    assert "Free some space" in caught.value.remedy
    assert 0 < added == count_rows(store, jobs) == count_rows(store, images) == count_rows(store, submission_jobs)
    with store.read() as connection:
        assert connection.scalar(text("PRAGMA integrity_check")) == "ok"
    small_disk.free(store)
    assert len(add_images(store, submission, plan, make_images(50, start)).queued) == 50
    assert count_jobs(store, submission)[JobState.QUEUED] == added + 50
    store.close()


def test_outcomes_that_find_the_disk_full_are_written_later_and_none_is_lost(small_disk: Disk) -> None:
    store = open_store(f"sqlite:///{small_disk.folder / 'readroom.sqlite3'}")
    ids = add_jobs(store, 100)
    claimed = claim_jobs(store, ids, "w", 60)
    outcomes = [Outcome(one.id, one.attempt, "dummy:", text="long " * 2000) for one in claimed]
    small_disk.fill(store, left=50_000)
    with pytest.raises(StoreUnavailable, match="disk is full"):
        write_outcomes(store, outcomes, "w", 3)
    assert (count_rows(store, results), count_jobs(store)[JobState.RUNNING]) == (0, 100)
    small_disk.free(store)
    outcomes = [Outcome(one.id, one.attempt, "dummy:", text="short") for one in claimed]
    assert write_outcomes(store, outcomes, "w", 3).succeeded == 100
    store.close()


# --- locks and files ------------------------------------------------------------------------------------------------


def test_a_store_that_another_process_holds_too_long_is_called_busy(
    sqlite_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("db.session.SQLITE_BUSY_S", 0.2)
    impatient = open_store(f"sqlite:///{sqlite_store.path}", create=False)
    with sqlite_store.begin(), pytest.raises(StoreUnavailable, match="busy"):
        add_jobs(impatient, 1)
    assert len(add_jobs(impatient, 1)) == 1
    impatient.close()


def test_threads_of_one_process_wait_for_their_turn(sqlite_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("db.session.SQLITE_BUSY_S", 0.2)
    with sqlite_store.begin():
        errors: list[BaseException] = []
        thread = threading.Thread(target=lambda: errors.append(_catch(sqlite_store)))
        thread.start()
        thread.join()
    assert isinstance(errors[0], StoreUnavailable)
    assert len(add_jobs(sqlite_store, 1)) == 1


def _catch(store: Store) -> BaseException:
    try:
        add_jobs(store, 1)
    except StoreError as error:
        return error
    raise AssertionError("no error")


def test_a_transaction_that_raises_leaves_nothing(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), store.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'x'"))
        raise ZeroDivisionError
    with store.read() as connection:
        assert connection.scalar(text("SELECT version_num FROM alembic_version")) != "x"


def test_a_folder_that_cannot_be_written_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="cannot be made") as caught:
        open_store(f"sqlite:///{tmp_path / 'file' / 'readroom.sqlite3'}")
    assert not isinstance(caught.value, StoreUnavailable)


def test_an_error_of_the_callers_own_files_is_left_as_it_is(sqlite_store: Store) -> None:
    with pytest.raises(FileNotFoundError), sqlite_store.begin():
        Path("/missing").read_text()


# --- nothing about anybody ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statement", ["SELECT no FROM jobs WHERE key = :mark", "INSERT INTO studies VALUES (:mark)"])
def test_errors_quote_neither_rows_nor_parameters(store: Store, statement: str) -> None:
    with pytest.raises(StoreError) as caught, store.begin() as connection:
        connection.execute(text(statement), {"mark": MARK})
    assert MARK not in "".join(traceback.format_exception(caught.value))


def test_a_violated_constraint_does_not_name_the_row(store: Store) -> None:
    add_jobs(store, 1)
    statement = text("INSERT INTO studies (study_key, study_instance_uid, created_at) VALUES ('k', :uid, 0.0)")
    with pytest.raises(StoreError) as caught, store.begin() as connection:
        for _ in range(2):
            connection.execute(statement, {"uid": MARK})
    assert MARK not in "".join(traceback.format_exception(caught.value))
    assert not isinstance(caught.value, StoreUnavailable)


def test_a_value_that_the_database_refuses_is_not_named(store: Store) -> None:
    plan = make_plan()
    submission = open_submission(store, plan)
    with pytest.raises(StoreError) as caught:
        add_images(store, submission, plan, [make_image(0, rows=[MARK])])
    assert MARK not in "".join(traceback.format_exception(caught.value))


# --- the server goes away -------------------------------------------------------------------------------------------


@pytest.fixture
def own_server() -> Iterator[PostgresServer]:
    """A server of this test alone, to be stopped."""
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.remove()


def test_a_store_outlives_restarts_and_crashes_of_its_server(own_server: PostgresServer) -> None:
    store = open_store(own_server.create_database())
    ids = add_jobs(store, 20)
    for mode in ("fast", "immediate"):
        own_server.restart(mode)
        assert len(claim_jobs(store, ids[:5], mode, 60)) == 5
        ids = ids[5:]
    with pytest.raises(StoreUnavailable, match=r"lost|reached"), store.begin() as connection:
        connection.execute(text("UPDATE jobs SET attempt = 7"))
        own_server.restart("immediate")
        connection.execute(text("UPDATE jobs SET attempt = 8"))
    with store.read() as connection:
        assert connection.scalar(select(func.max(jobs.c.attempt))) == 1
    own_server.stop()
    with pytest.raises(StoreUnavailable, match="cannot be reached"):
        claim_jobs(store, ids, "w", 60)
    own_server.start()
    assert len(claim_jobs(store, ids, "w", 60)) == 10
    store.close()


def test_a_missing_database_and_a_wrong_login_are_permanent(postgres_server: PostgresServer) -> None:
    with pytest.raises(StoreError, match="the database does not exist") as caught:
        open_store(postgres_server.url("missing"))
    assert not isinstance(caught.value, StoreUnavailable)
    url = postgres_server.url("postgres").replace("postgres@", f"nobody:{MARK}@")
    with pytest.raises(StoreError, match="refuses the login") as caught:
        open_store(url)
    assert not isinstance(caught.value, StoreUnavailable)
    assert MARK not in "".join(traceback.format_exception(caught.value))


def test_a_server_that_is_not_there_may_come_back() -> None:
    with pytest.raises(StoreUnavailable, match="cannot be reached"):
        open_store(f"postgresql://readroom@127.0.0.1:{find_port()}/readroom")


# --- addresses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("postgres://u:p%40@h:5/d", "postgresql+pg8000://u:p%40@h:5/d"),
        ("postgresql://u@h/d", "postgresql+pg8000://u@h/d"),
        ("postgresql+psycopg://u@h/d?sslmode=require", "postgresql+pg8000://u@h/d?sslmode=require"),
        ("sqlite:////data/store.sqlite3", "sqlite:////data/store.sqlite3"),
    ],
)
def test_urls_are_given_the_driver_that_is_installed(given: str, used: str) -> None:
    assert name_driver(given) == used
    assert store_url(load_settings(database_url=given)) == used


@pytest.mark.parametrize(
    "given", ["mysql://u:secret@h/d", "secret", "sqlite://", "sqlite:///:memory:", "postgresql://h:x/d"]
)
def test_other_urls_are_refused_without_quoting_them(given: str) -> None:
    with pytest.raises(SettingsError) as caught:
        name_driver(given)
    assert "secret" not in str(caught.value)


def test_without_a_url_the_store_is_a_file_under_the_home(tmp_path: Path) -> None:
    assert store_url(load_settings(home=tmp_path)) == f"sqlite:///{tmp_path}/readroom.sqlite3"


def test_options_of_libpq_in_the_url_become_the_drivers(postgres_server: PostgresServer) -> None:
    folder = postgres_server.folder
    store = Store(f"postgresql://postgres@/postgres?host={folder}&port={postgres_server.port}&sslmode=disable")
    with store.read() as connection:
        assert connection.scalar(text("SELECT inet_server_addr() IS NULL"))
        assert connection.scalar(text("SELECT current_setting('application_name')")) == "readroom"
    store.close()


def test_home_with_signs_of_a_url_in_its_name_keeps_its_store(tmp_path: Path) -> None:
    home = tmp_path / "h o?m%20e#x"
    home.mkdir()
    open_store(store_url(load_settings(home=home))).close()
    assert (home / "readroom.sqlite3").is_file()
    assert [entry.name for entry in tmp_path.iterdir()] == [home.name]
