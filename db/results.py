"""Results: what the models said, each with its checkpoint and settings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, Select, select, tuple_

from db.rows import insert_new
from db.session import Store
from db.tables import images, jobs, results, studies, submission_jobs
from readroom.records import JobKind, Outcome

ROWS_PER_PAGE = 1000
IDENTITY = (
    results.c.image_digest,
    results.c.frame,
    results.c.kind,
    results.c.question,
    results.c.checkpoint,
    results.c.settings_digest,
)


@dataclass(frozen=True, slots=True)
class ResultRecord:
    """One text about one item of a submission. `created_at` in seconds since 1970, `score` a mean log-probability."""

    submission: str
    job: int
    kind: JobKind
    study_instance_uid: str | None
    series_instance_uid: str | None
    sop_instance_uid: str | None
    accession_number: str | None
    source_id: str | None
    item: str
    view: str | None
    image_digest: str
    frame: int
    question: str
    text: str
    score: float | None
    captioner: str
    checkpoint: str
    created_at: float


def save_results(
    connection: Connection, outcomes: Sequence[Outcome], held: Mapping[int, Row[Any]], worker: str, moment: float
) -> dict[int, int]:
    """Insert the texts; result ids by job id. A result that stands already is kept and shared.

    `held` has the job's row by its id: kind, question, settings, settings_digest, and the image's digest and frame.
    """
    rows = {
        _identify(held[one.job_id], one): _describe_result(held[one.job_id], one, worker, moment) for one in outcomes
    }
    # In one order: two workers that write the same results wait for each other and do not deadlock.
    ordered = [rows[identity] for identity in sorted(rows)]
    new = {row.job_id: row.id for row in insert_new(connection, results, ordered, (results.c.id, results.c.job_id))}
    ids = {identity: new[row["job_id"]] for identity, row in rows.items() if row["job_id"] in new}
    if len(ids) < len(rows):
        old = select(results.c.id, *IDENTITY).where(tuple_(*IDENTITY).in_(rows.keys() - ids.keys()))
        ids |= {tuple(row)[1:]: row[0] for row in connection.execute(old)}
    return {one.job_id: ids[_identify(held[one.job_id], one)] for one in outcomes}


def iter_results(store: Store, submission_id: str) -> Iterator[ResultRecord]:
    """The submission's results in the order of its jobs, read page by page: memory stays flat.

    Results that are written meanwhile may or may not be among them.
    """
    place: tuple[int, str] = (0, "")
    while True:
        page = _select_page(submission_id).where(_after(place)).limit(ROWS_PER_PAGE)
        with store.read() as connection:
            rows = connection.execute(page).all()
        yield from (_read_result(row) for row in rows)
        if len(rows) < ROWS_PER_PAGE:
            return
        place = (rows[-1].job, rows[-1].item)


def _after(place: tuple[int, str]) -> Any:
    return tuple_(submission_jobs.c.job_id, submission_jobs.c.item) > place


def _select_page(submission_id: str) -> Select[Any]:
    link = submission_jobs.c
    joined = (
        submission_jobs.join(jobs, jobs.c.id == link.job_id)
        .join(results, results.c.id == jobs.c.result_id)
        .join(images, images.c.id == link.image_id)
        .outerjoin(studies, studies.c.id == images.c.study_id)
    )
    columns = (
        link.submission_id.label("submission"),
        link.job_id.label("job"),
        results.c.kind,
        studies.c.study_instance_uid,
        images.c.series_instance_uid,
        images.c.sop_instance_uid,
        studies.c.accession_number,
        link.source_id,
        link.item,
        images.c.view,
        results.c.image_digest,
        results.c.frame,
        results.c.question,
        results.c.text,
        results.c.score,
        jobs.c.captioner,
        results.c.checkpoint,
        results.c.created_at,
    )
    chosen = select(*columns).select_from(joined).where(link.submission_id == submission_id)
    return chosen.order_by(link.job_id, link.item)


def _read_result(row: Row[Any]) -> ResultRecord:
    values = row._asdict()
    return ResultRecord(**values | {"kind": JobKind(row.kind), "sop_instance_uid": row.sop_instance_uid or None})


def _identify(held: Row[Any], outcome: Outcome) -> tuple[Any, ...]:
    return held.digest, held.frame, held.kind, held.question, outcome.checkpoint, held.settings_digest


def _keep_finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _describe_result(held: Row[Any], outcome: Outcome, worker: str, moment: float) -> dict[str, Any]:
    identity = dict(zip((column.name for column in IDENTITY), _identify(held, outcome), strict=True))
    return identity | {
        "settings": held.settings,
        "text": outcome.text,
        "score": _keep_finite(outcome.score),
        "model_ms": _keep_finite(outcome.model_ms),
        "worker": worker,
        "job_id": outcome.job_id,
        "attempt": outcome.attempt,
        "created_at": moment,
    }
