"""The tables of the store. Times are seconds since 1970 (UTC), so that both dialects compare them alike.

What stands where:
- what a file's bytes say (identifiers, size, view) stands on `images` and `studies`, once for all submissions;
- what the source says of it (its path there, its COCO id, its reference texts) stands on `submission_jobs`;
- what a model said stands on `results`, once for equal content, question, checkpoint and settings.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    ColumnElement,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    literal_column,
)

from readroom.records import JobState

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "pk": "pk_%(table_name)s",
}
metadata = MetaData(naming_convention=NAMING)

BigId = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows by itself only in an INTEGER column
Digest = String(64)  # SHA-256 in hex
ODD_ESCAPE = re.compile(r"\\u(0000|d[89a-f])")  # NUL or half of a surrogate pair, as json.dumps writes them
ESCAPED_BYTE = re.compile(r"\\udc([89a-f][0-9a-f])")


def clean_text(value: str) -> str:
    """The text as the databases hold it: NUL dropped, a lone surrogate written as an escape."""
    if value.isascii() and "\0" not in value:
        return value
    return value.replace("\0", "").encode("utf-8", "backslashreplace").decode("utf-8")


class ForeignText(TypeDecorator[str]):
    """Text that came from outside: without NUL (PostgreSQL refuses it) and without lone surrogates (both refuse)."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """Escape what the databases cannot hold."""
        return self.clean(value)

    @staticmethod
    def clean(value: str | None) -> str | None:
        """The same for a value on its way in a JSON document."""
        return None if value is None else clean_text(value)


class PathText(ForeignText):
    r"""A path; bytes that are no UTF-8 (Latin-1 names in old exports) stand as `\udcXX` and come back as they were."""

    cache_ok = True

    def process_result_value(self, value: Any | None, dialect: Dialect) -> str | None:
        """Turn escaped bytes back into what `os.fsencode` understands."""
        if value is None or "\\udc" not in value:
            return value
        return ESCAPED_BYTE.sub(lambda found: chr(0xDC00 + int(found[1], 16)), value)


class ForeignJson(TypeDecorator[Any]):
    """A JSON document whose strings came from outside: cleaned as ForeignText; NaN and infinities become null."""

    impl = JSON
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        """Escape what the databases cannot hold."""
        return self.clean(value)

    @staticmethod
    def clean(value: Any) -> Any:
        """The same for a value on its way in a larger document."""
        try:
            harmless = ODD_ESCAPE.search(json.dumps(value, allow_nan=False)) is None
        except ValueError:
            harmless = False
        return value if harmless else _clean_json(value)


def _clean_json(value: Any) -> Any:
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {clean_text(str(key)): _clean_json(item) for key, item in value.items()}
    return [_clean_json(item) for item in value] if isinstance(value, list | tuple) else value


submissions = Table(
    "submissions",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("plan_digest", Digest, nullable=False),
    Column("source_kind", String(16), nullable=False),
    Column("source", PathText, nullable=False),
    Column("priority", String(16), nullable=False),
    Column("captioners", ForeignJson, nullable=False),  # [{captioner, checkpoint, settings}, ...]: each sees each image
    Column("kinds", ForeignJson, nullable=False),
    Column("question", ForeignText, nullable=False),
    Column("options", ForeignJson, nullable=False),
    Column("found", Integer, nullable=False),
    Column("queued", Integer, nullable=False),
    Column("already_done", Integer, nullable=False),
    Column("skipped", Integer, nullable=False),
    Column("studies", Integer, nullable=False),
    Column("images", Integer, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("closed_at", Double),
)
# At most one unfinished submission of a plan: two producers started on the same folder share it.
Index(
    "uq_submissions_unfinished",
    submissions.c.plan_digest,
    unique=True,
    sqlite_where=submissions.c.state == literal_column("'enqueuing'"),
    postgresql_where=submissions.c.state == literal_column("'enqueuing'"),
)

studies = Table(
    "studies",
    metadata,
    Column("id", BigId, primary_key=True),
    Column("study_key", String(32), nullable=False, unique=True),  # names the study where its UID must not appear
    Column("study_instance_uid", ForeignText, nullable=False, unique=True),
    Column("accession_number", ForeignText),
    Column("patient_id", ForeignText),
    Column("created_at", Double, nullable=False),
)

images = Table(
    "images",
    metadata,
    Column("id", BigId, primary_key=True),
    Column("digest", Digest, nullable=False),
    Column("frame", Integer, nullable=False),
    Column("sop_instance_uid", ForeignText, nullable=False),  # "" when it is not DICOM
    Column("series_instance_uid", ForeignText),
    Column("study_id", ForeignKey("studies.id"), index=True),
    Column("path", PathText, nullable=False),  # where it was seen last
    Column("member", PathText),
    Column("view", ForeignText),
    Column("view_rank", Integer, nullable=False),
    Column("rows", Integer),
    Column("columns", Integer),
    Column("size_bytes", BigInteger),
    Column("flags", ForeignJson, nullable=False),
    Column("created_at", Double, nullable=False),
    UniqueConstraint("digest", "frame", "sop_instance_uid"),
)

results = Table(
    "results",
    metadata,
    Column("id", BigId, primary_key=True),
    Column("image_digest", Digest, nullable=False),
    Column("frame", Integer, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("question", ForeignText, nullable=False),
    Column("checkpoint", Text, nullable=False),
    Column("settings_digest", Digest, nullable=False),
    Column("settings", ForeignJson, nullable=False),
    Column("text", ForeignText, nullable=False),
    Column("score", Double),
    Column("model_ms", Double),
    Column("worker", Text, nullable=False),
    Column("job_id", BigId, nullable=False),  # the job whose attempt wrote it; equal jobs share it by jobs.result_id
    Column("attempt", Integer, nullable=False),
    Column("created_at", Double, nullable=False),
    UniqueConstraint("image_digest", "frame", "kind", "question", "checkpoint", "settings_digest", name="uq_results"),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", BigId, primary_key=True),
    Column("key", Digest, nullable=False, unique=True),  # records.JobRequest.key
    Column("kind", String(16), nullable=False),
    Column("state", String(16), nullable=False),
    Column("priority", String(16), nullable=False),
    Column("submission_id", ForeignKey("submissions.id"), nullable=False),  # the one that created or revived it
    Column("image_id", ForeignKey("images.id"), nullable=False),
    Column("captioner", Text, nullable=False),
    Column("checkpoint", Text, nullable=False),
    Column("question", ForeignText, nullable=False),
    Column("settings_digest", Digest, nullable=False),
    Column("settings", ForeignJson, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("lease_owner", Text),
    Column("lease_until", Double),
    Column("not_before", Double),
    Column("published_at", Double),  # NULL: no message is known to hold it
    Column("created_at", Double, nullable=False),
    Column("queued_at", Double, nullable=False),
    Column("started_at", Double),
    Column("finished_at", Double),
    Column("reason", String(32)),
    Column("detail", ForeignText),
    Column("result_id", ForeignKey("results.id")),
)


def state_is(state: JobState) -> ColumnElement[bool]:
    """`jobs.state = 'queued'` with the word written out: a partial index is not used for a bound parameter."""
    return jobs.c.state == literal_column(f"'{state.value}'")


def still_is(state: JobState) -> ColumnElement[bool]:
    """The same question about jobs that are named by their ids, written so that no index answers it.

    Without statistics SQLite takes the index on `state` for the better way and reads all queued jobs to claim 64.
    """
    return jobs.c.state.concat("") == state.value


def _index_jobs(name: str, *columns: Column[Any], where: ColumnElement[bool] | None = None) -> None:
    Index(name, *columns, sqlite_where=where, postgresql_where=where)


# Counts by state, `has_work`, the age of the oldest queued job: answered from the index alone.
_index_jobs("ix_jobs_state", jobs.c.state, jobs.c.kind, jobs.c.queued_at)
_index_jobs(
    "ix_jobs_unpublished",
    jobs.c.kind,
    jobs.c.priority,
    jobs.c.id,
    where=state_is(JobState.QUEUED) & jobs.c.published_at.is_(None),
)
_index_jobs("ix_jobs_published", jobs.c.kind, jobs.c.published_at, where=state_is(JobState.QUEUED))
_index_jobs("ix_jobs_leases", jobs.c.lease_until, where=state_is(JobState.RUNNING))
_index_jobs("ix_jobs_failures", jobs.c.reason, jobs.c.id, where=state_is(JobState.FAILED))
_index_jobs("ix_jobs_finished", jobs.c.finished_at, where=jobs.c.finished_at.is_not(None))

submission_jobs = Table(
    "submission_jobs",
    metadata,
    Column("submission_id", ForeignKey("submissions.id"), primary_key=True),
    Column("job_id", ForeignKey("jobs.id"), primary_key=True, autoincrement=False),
    Column("item", ForeignText, primary_key=True),  # path relative to the source: equal files are two items, one job
    Column("image_id", ForeignKey("images.id"), nullable=False),
    Column("source_id", ForeignText),
    Column("reference_texts", ForeignJson, nullable=False),
    sqlite_with_rowid=False,  # the primary key is the table: one B-tree less to write for each link
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("ref", String(255), primary_key=True),
    Column("family", String(64), nullable=False),
    Column("name", Text, nullable=False),
    Column("location", PathText, nullable=False),
    Column("state", String(16), nullable=False),
    Column("manifest", ForeignJson, nullable=False),
    Column("added_at", Double, nullable=False),
)
Index(
    "uq_checkpoints_active",
    checkpoints.c.family,
    unique=True,
    sqlite_where=checkpoints.c.state == literal_column("'active'"),
    postgresql_where=checkpoints.c.state == literal_column("'active'"),
)
