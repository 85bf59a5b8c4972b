"""Migrations on SQLite and on PostgreSQL: from nothing to what the tables say, once, whoever comes first."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import MetaData, text

from db.jobs import claim_jobs
from db.session import Store, open_store
from db.submissions import (
    PlannedCaptioner,
    SubmissionPlan,
    close_submission,
    count_jobs,
    get_submission,
    list_submissions,
    open_submission,
)
from db.tables import metadata
from db.upgrade import HEAD_REVISION, MIGRATIONS, _lock_store, read_revision
from readroom.errors import StoreError
from readroom.records import GenerationSettings, JobKind, JobState, Priority, SubmissionCounts, digest_json
from tests.fakes.items import add_jobs

OPENER = "import sys; from db.session import open_store; print('ready', flush=True); input(); open_store(sys.argv[1])"


def test_the_head_named_in_code_is_the_newest_migration() -> None:
    assert ScriptDirectory(str(MIGRATIONS)).get_heads() == [HEAD_REVISION]


def test_an_empty_store_is_migrated_to_exactly_the_tables_of_the_code(empty_url: str) -> None:
    store = open_store(empty_url)
    assert read_revision(store) == HEAD_REVISION
    with store.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []
    assert len(metadata.tables) == 7
    store.close()


# --- from the first release -----------------------------------------------------------------------------------------

FIRST_PLAN = {
    "source_kind": "coco",
    "source": "/exports/Röntgen",
    "priority": "stat",
    "captioner": "blip",
    "checkpoint": "sha256:aa",
    "settings": {"num_beams": 3, "max_new_tokens": 16, "min_new_tokens": 1, "prompt": "a picture of "},
    "kinds": ["caption"],
    "question": "",
    "options": {"split": "val2017"},
}


def write_first_release(url: str) -> Store:
    """A store at revision 0001 with a closed submission, one that was killed, and a job of it."""
    store = Store(url)
    if store.path is not None:
        store.path.parent.mkdir()
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with store.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        tables = MetaData()
        tables.reflect(connection)
        numbers = dict.fromkeys(("found", "queued", "already_done", "skipped", "studies", "images"), 1)
        digest = digest_json(FIRST_PLAN)
        for name, state in (("closed", "enqueued"), ("killed", "enqueuing")):
            row = {**FIRST_PLAN, **numbers, "id": name, "state": state, "plan_digest": digest, "created_at": 1.0}
            connection.execute(tables.tables["submissions"].insert().values(row))
        image = {"id": 1, "digest": "d" * 64, "frame": 0, "sop_instance_uid": "", "path": "/x", "view_rank": 2}
        connection.execute(tables.tables["images"].insert().values(**image, flags=[], created_at=1.0))
        plan = {name: FIRST_PLAN[name] for name in ("captioner", "checkpoint", "settings", "priority", "question")}
        job = {"id": 1, "key": "k" * 64, "kind": "caption", "state": "queued", "submission_id": "killed", "image_id": 1}
        times = {"attempt": 0, "created_at": 1.0, "queued_at": 1.0, "settings_digest": "s" * 64}
        connection.execute(tables.tables["jobs"].insert().values(plan | job | times))
        link = {"submission_id": "killed", "job_id": 1, "item": "x", "image_id": 1, "reference_texts": []}
        connection.execute(tables.tables["submission_jobs"].insert().values(link))
    return store


def test_a_store_of_the_first_release_keeps_its_submissions_and_their_jobs(empty_url: str) -> None:
    write_first_release(empty_url).close()
    store = open_store(empty_url)
    settings = GenerationSettings(3, 16, 1, "a picture of ")
    captioners = (PlannedCaptioner("blip", "sha256:aa", settings),)
    plan = SubmissionPlan("coco", "/exports/Röntgen", Priority.STAT, captioners, (JobKind.CAPTION,), "",
                          {"split": "val2017"})  # fmt: skip
    records = {record.id: record for record in list_submissions(store)}
    assert {name: record.plan for name, record in records.items()} == {"closed": plan, "killed": plan}
    assert records["closed"].found == records["closed"].images == 1
    assert count_jobs(store, "killed")[JobState.QUEUED] == 1
    assert [job.captioner for job in claim_jobs(store, [1], "w", 60)] == ["blip"]
    store.close()


def test_an_enqueue_that_was_killed_before_an_upgrade_goes_on_after_it(empty_url: str) -> None:
    write_first_release(empty_url).close()
    store = open_store(empty_url)
    record = get_submission(store, "closed")
    assert record is not None
    assert open_submission(store, record.plan) == "killed"
    # The index that makes it so is still there, and still looks at unfinished submissions only.
    close_submission(store, "killed", SubmissionCounts("killed"))
    again = open_submission(store, record.plan)
    assert again not in ("killed", "closed")
    assert open_submission(store, record.plan) == again
    store.close()


def test_a_store_of_the_first_release_becomes_exactly_the_tables_of_the_code(empty_url: str) -> None:
    write_first_release(empty_url).close()
    store = open_store(empty_url)
    with store.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []
        if store.dialect == "sqlite":
            assert connection.scalar(text("PRAGMA foreign_keys")) == 1
            assert connection.execute(text("PRAGMA foreign_key_check")).all() == []
    with pytest.raises(StoreError), store.begin() as connection:
        connection.execute(text("DELETE FROM submissions WHERE id = 'killed'"))
    store.close()


def test_a_store_whose_rows_refer_to_nothing_is_not_migrated(tmp_path: Path) -> None:
    store = write_first_release(f"sqlite:///{tmp_path / 'home' / 'readroom.sqlite3'}")
    with store.alter() as connection:
        connection.execute(text("CREATE TABLE kept (id INTEGER)"))
    with pytest.raises(StoreError, match="which are not there"), store.alter() as connection:
        connection.execute(text("DELETE FROM images"))
    with store.read() as connection:
        assert connection.scalar(text("SELECT count(*) FROM images")) == 1
        assert connection.scalar(text("SELECT count(*) FROM kept")) == 0
    store.close()


def test_the_comparison_would_notice_a_difference(empty_url: str) -> None:
    store = open_store(empty_url)
    with store.begin() as connection:
        connection.execute(text("DROP INDEX ix_jobs_leases"))
        connection.execute(text("ALTER TABLE jobs ADD COLUMN forgotten INTEGER"))
    with store.read() as connection:
        changes = compare_metadata(MigrationContext.configure(connection), metadata)
    assert {change[0] for change in changes} == {"add_index", "remove_column"}
    store.close()


def test_a_second_opening_keeps_what_is_stored(empty_url: str) -> None:
    first = open_store(empty_url)
    assert add_jobs(first, 3) != []
    first.close()
    second = open_store(empty_url)
    assert add_jobs(second, 3) == []
    second.close()


def test_four_processes_that_open_an_empty_store_at_once_all_get_it(empty_url: str) -> None:
    command = [sys.executable, "-c", OPENER, empty_url]
    pipe = subprocess.PIPE
    openers = [subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, stderr=pipe) for _ in range(4)]
    for opener in openers:
        assert opener.stdout is not None
        assert opener.stdout.readline() == "ready\n"
    for opener in openers:
        assert opener.stdin is not None
        opener.stdin.write("go\n")
        opener.stdin.flush()
    errors = [opener.communicate(timeout=120)[1] for opener in openers]
    assert [opener.returncode for opener in openers] == [0, 0, 0, 0], errors
    store = open_store(empty_url, create=False)
    with store.read() as connection:
        assert connection.scalar(text("SELECT count(*) FROM alembic_version")) == 1
    store.close()


def test_the_lock_of_a_long_migration_is_held_by_a_session_that_is_in_no_transaction(postgres_store: Store) -> None:
    # The server ends sessions that stand still in a transaction, and their locks with them.
    held = text("SELECT state FROM pg_stat_activity JOIN pg_locks USING (pid) WHERE locktype = 'advisory'")
    with _lock_store(postgres_store), postgres_store.read() as connection:
        assert connection.scalars(held).all() == ["idle"]
    with postgres_store.read() as connection:
        assert connection.scalars(held).all() == []


def test_opening_without_creating_asks_for_a_store_first(empty_url: str) -> None:
    with pytest.raises(StoreError, match="there is no store yet"):
        open_store(empty_url, create=False)


def test_a_store_of_a_newer_release_is_left_alone(empty_url: str) -> None:
    store = open_store(empty_url)
    with store.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    for create in (True, False):
        with pytest.raises(StoreError, match="release"):
            open_store(empty_url, create=create)
    assert read_revision(store) == "9999"
    store.close()


def test_a_migration_that_fails_leaves_nothing_behind(empty_url: str) -> None:
    store = Store(empty_url)
    if store.path is not None:
        store.path.parent.mkdir()
    with store.begin() as connection:
        connection.execute(text("CREATE TABLE jobs (id INTEGER)"))
    with pytest.raises(StoreError, match="tables are not what this release expects"):
        open_store(empty_url)
    with store.read() as connection:
        names = set(connection.dialect.get_table_names(connection))
    assert names - {"alembic_version"} == {"jobs"}
    store.close()


def test_the_sqlite_file_and_its_folder_are_their_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "home" / "readroom.sqlite3"
    store = open_store(f"sqlite:///{path}")
    add_jobs(store, 1)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert {name: mode for name, mode in modes.items() if "sqlite3" in name and mode != 0o600} == {}
    assert f"{path.name}-wal" in modes
    with store.read() as connection:
        assert connection.scalar(text("PRAGMA journal_mode")) == "wal"
        assert connection.scalar(text("PRAGMA foreign_keys")) == 1
    store.close()


def test_a_file_that_is_no_store_is_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "readroom.sqlite3"
    path.write_bytes(b"JUNK" * 4096)
    with pytest.raises(StoreError, match="damaged or no SQLite file"):
        open_store(f"sqlite:///{path}")
