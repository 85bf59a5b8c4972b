"""Submissions: what one `enqueue` asked for, the jobs it needs, how far they are."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from itertools import product
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Row, func, select, update

from db.jobs import linked_jobs, raise_priority, revive_jobs
from db.rows import insert_new
from db.session import Store
from db.studies import ImageKey, add_studies, image_key
from db.studies import add_images as add_image_rows
from db.tables import images, jobs, submission_jobs, submissions
from readroom.errors import BadCall, StoreUnavailable
from readroom.records import (
    FoundImage,
    GenerationSettings,
    JobKind,
    JobRequest,
    JobState,
    Priority,
    SubmissionCounts,
    digest_json,
)

# Both stand in an index, and PostgreSQL indexes no row of more than 2,704 bytes: 4 bytes a character at worst.
MAX_ITEM_CHARS = 600
MAX_QUESTION_CHARS = 400


class SubmissionState(StrEnum):
    """Whether the producer has named all its items."""

    ENQUEUING = "enqueuing"
    ENQUEUED = "enqueued"


@dataclass(frozen=True, slots=True)
class PlannedCaptioner:
    """A model that sees every image of a submission: its family, its checkpoint's ref, how it generates."""

    captioner: str
    checkpoint: str
    settings: GenerationSettings


@dataclass(frozen=True, slots=True)
class SubmissionPlan:
    """What is asked for; an unfinished submission with an equal plan is gone on with. `options` is plain JSON.

    Each of the captioners gets a job of each kind for each image.
    """

    source_kind: str
    source: str
    priority: Priority
    captioners: tuple[PlannedCaptioner, ...]
    kinds: tuple[JobKind, ...]
    question: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the plan's canonical JSON.

        With one captioner it is what it was when a plan had only one (revision 0001), so that an upgrade does not keep
        a killed `enqueue` from going on.
        """
        described = asdict(self)
        first, *others = described.pop("captioners")
        return digest_json(described | first | ({"captioners": others} if others else {}))


@dataclass(frozen=True, slots=True)
class SubmissionRecord:
    """A submission with its counts as they were when it was closed (zeros before). Times in seconds since 1970."""

    id: str
    state: SubmissionState
    plan: SubmissionPlan
    created_at: float
    closed_at: float | None
    found: int
    queued: int
    already_done: int
    skipped: int
    studies: int
    images: int


@dataclass(frozen=True, slots=True)
class Added:
    """What became of one list of images.

    queued: ids of the jobs that are new, or were cancelled and are wanted again. already_done: jobs that existed before
    (in any other state).
    resumed: jobs that this very submission had already, from before it was killed; in no other count.
    raised: ids of existing queued jobs that a more urgent submission moved to its queue; they need a new message.
    """

    queued: list[int]
    already_done: int
    studies_new: int
    images_new: int
    resumed: int = 0
    raised: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Tally:
    """A submission's totals as its rows say, over all its runs: the counts that a resumed `enqueue` reports.

    `failed`: jobs among them that stand as dead letters.
    """

    queued: int
    already_done: int
    studies: int
    images: int
    failed: int = 0


def open_submission(store: Store, plan: SubmissionPlan) -> str:
    """The id of a new submission, or of the unfinished one with an equal plan (a killed `enqueue` goes on)."""
    if len(plan.question) > MAX_QUESTION_CHARS:
        raise BadCall(f"a question has {MAX_QUESTION_CHARS} characters at most")
    row = {**_describe_plan(plan), "id": secrets.token_hex(6), "created_at": store.now()}
    unfinished = submissions.c.state == SubmissionState.ENQUEUING
    same = select(submissions.c.id).where(submissions.c.plan_digest == plan.digest, unfinished)
    with store.begin() as connection:
        # Twice: the one that stands in the way may be closed just then by its own producer.
        for _ in range(2):
            ids = insert_new(connection, submissions, [row], [submissions.c.id]) or connection.execute(same).all()
            if ids:
                return str(ids[0].id)
    raise StoreUnavailable("the submission was opened and closed elsewhere at the same time", "Try again.")


def add_images(store: Store, submission_id: str, plan: SubmissionPlan, found: Sequence[FoundImage]) -> Added:
    """Store a few hundred images with their jobs, queued and linked to the submission, in one transaction.

    A repeat changes and counts nothing. Raises BadCall for an image without digest or a kind that is not of images.
    """
    if JobKind.REPORT in plan.kinds:
        raise BadCall("report jobs belong to studies, not to images")
    if not found:
        return Added([], 0, 0, 0)
    moment = store.now()
    with store.begin() as connection:
        study_ids, studies_new = add_studies(connection, found, moment)
        image_ids, images_new = add_image_rows(connection, found, study_ids, moment)
        wanted = _want_jobs(plan, found)
        job_ids, queued = _add_jobs(connection, submission_id, plan, wanted, image_ids, moment)
        linked = _link_jobs(connection, submission_id, wanted, job_ids, image_ids)
        # Only what is linked just now: a resumed submission does not undo a drop.
        revived = revive_jobs(connection, set(linked).difference(queued), submission_id, plan.priority, moment)
        queued = sorted([*queued, *revived])
        raised = raise_priority(connection, set(job_ids.values()).difference(queued), plan.priority)
        numbers = (len(linked) - len(queued), studies_new, images_new, len(wanted) - len(linked))
        return Added(queued, *numbers, raised)


def tally_submission(store: Store, submission_id: str) -> Tally:
    """Count the submission's rows: its own jobs, those that others had made, its studies and images, dead letters."""
    link = submission_jobs.c
    counts = select(
        func.count(),
        func.count(jobs.c.id.distinct()).filter(jobs.c.submission_id == submission_id),
        func.count(images.c.study_id.distinct()),
        func.count(link.image_id.distinct()),
        func.count(jobs.c.id.distinct()).filter(jobs.c.state == JobState.FAILED),
    )
    joined = submission_jobs.join(jobs, jobs.c.id == link.job_id).join(images, images.c.id == link.image_id)
    with store.read() as connection:
        total, queued, studies, pictures, failed = connection.execute(
            counts.select_from(joined).where(link.submission_id == submission_id)
        ).one()
    return Tally(queued, total - queued, studies, pictures, failed)


def close_submission(store: Store, submission_id: str, counts: SubmissionCounts) -> None:
    """Note that all items are named, with what the producer counted."""
    numbers = {name: getattr(counts, name) for name in ("found", "queued", "already_done", "studies", "images")}
    numbers |= {"skipped": len(counts.skipped), "state": SubmissionState.ENQUEUED, "closed_at": store.now()}
    with store.begin() as connection:
        connection.execute(update(submissions).where(submissions.c.id == submission_id).values(numbers))


def get_submission(store: Store, submission_id: str) -> SubmissionRecord | None:
    """The submission of that id, or None."""
    with store.read() as connection:
        row = connection.execute(select(submissions).where(submissions.c.id == submission_id)).one_or_none()
    return _read_submission(row) if row else None


def list_submissions(store: Store, limit: int = 20) -> list[SubmissionRecord]:
    """The latest submissions, newest first."""
    newest = select(submissions).order_by(submissions.c.created_at.desc(), submissions.c.id).limit(limit)
    with store.read() as connection:
        return [_read_submission(row) for row in connection.execute(newest)]


def count_jobs(store: Store, submission_id: str | None = None, kind: JobKind | None = None) -> dict[JobState, int]:
    """How many jobs stand in each state (every state is a key), of one submission or of the whole store."""
    counts = select(jobs.c.state, func.count()).where(*_within(submission_id, kind)).group_by(jobs.c.state)
    with store.read() as connection:
        found = {JobState(state): number for state, number in connection.execute(counts)}
    return {state: found.get(state, 0) for state in JobState}


def measure_rate(store: Store, submission_id: str | None = None, window_s: float = 60.0) -> float:
    """Jobs finished per second over the last `window_s` seconds, or since the first one finished in them."""
    moment = store.now()
    recent = (jobs.c.finished_at.is_not(None), jobs.c.finished_at > moment - window_s)
    finished = select(func.count(), func.min(jobs.c.finished_at)).where(*recent)
    if submission_id is not None:
        # EXISTS, not IN: the few that finished just now are looked up, instead of all jobs of the submission.
        finished = finished.where(linked_jobs(submission_id).where(submission_jobs.c.job_id == jobs.c.id).exists())
    with store.read() as connection:
        number, first = connection.execute(finished).one()
    # A second at least: one batch that finished just now says little about the rate.
    return float(number / max(1.0, moment - first)) if number else 0.0


def _within(submission_id: str | None, kind: JobKind | None) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if submission_id is not None:
        conditions.append(jobs.c.id.in_(linked_jobs(submission_id)))
    if kind is not None:
        conditions.append(jobs.c.kind == kind)
    return conditions


class _Wanted(NamedTuple):
    """One job that one item needs. `by` is the place of its captioner in the plan."""

    found: FoundImage
    by: int
    kind: JobKind
    question: str
    key: str


def _want_jobs(plan: SubmissionPlan, found: Sequence[FoundImage]) -> list[_Wanted]:
    wanted = []
    for by, model in enumerate(plan.captioners):
        for one, kind in product(found, plan.kinds):
            question = plan.question if kind is JobKind.ANSWER else ""
            names = (model.captioner, model.checkpoint, model.settings, question)
            key = JobRequest(kind, one.ref.digest, one.ref.frame, *names).key
            wanted.append(_Wanted(one, by, kind, question, key))
    return wanted


def _add_jobs(
    connection: Connection,
    submission_id: str,
    plan: SubmissionPlan,
    wanted: Sequence[_Wanted],
    image_ids: Mapping[ImageKey, int],
    moment: float,
) -> tuple[dict[str, int], list[int]]:
    """Job ids by key, and the ids of those that are new."""
    shared = [_describe_job(submission_id, plan, model, moment) for model in plan.captioners]
    rows: dict[str, dict[str, Any]] = {}
    for one in wanted:
        own = {"key": one.key, "kind": one.kind, "question": one.question, "image_id": image_ids[image_key(one.found)]}
        rows.setdefault(one.key, shared[one.by] | own)
    # PostgreSQL makes a second producer of the same jobs wait for the first one's rows: in one order, or they deadlock.
    keys = sorted(rows) if connection.dialect.name == "postgresql" else list(rows)
    columns = (jobs.c.key, jobs.c.id)
    new = {row.key: row.id for row in insert_new(connection, jobs, [rows[key] for key in keys], columns)}
    if len(new) == len(rows):
        return new, sorted(new.values())
    known = connection.execute(select(*columns).where(jobs.c.key.in_(rows.keys() - new.keys())))
    return {row.key: row.id for row in known} | new, sorted(new.values())


def _describe_job(submission_id: str, plan: SubmissionPlan, model: PlannedCaptioner, moment: float) -> dict[str, Any]:
    return {
        "submission_id": submission_id,
        "state": JobState.QUEUED,
        "priority": plan.priority,
        "captioner": model.captioner,
        "checkpoint": model.checkpoint,
        "settings": asdict(model.settings),
        "settings_digest": model.settings.digest,
        "attempt": 0,
        "created_at": moment,
        "queued_at": moment,
    }


def _link_jobs(
    connection: Connection,
    submission_id: str,
    wanted: Sequence[_Wanted],
    job_ids: Mapping[str, int],
    image_ids: Mapping[ImageKey, int],
) -> list[int]:
    """Link the jobs to the submission; the job of each link that is new."""
    rows = [
        {
            "submission_id": submission_id,
            "job_id": job_ids[one.key],
            "item": one.found.item[-MAX_ITEM_CHARS:],
            "image_id": image_ids[image_key(one.found)],
            "source_id": one.found.source_id,
            "reference_texts": list(one.found.reference_texts),
        }
        for one in wanted
    ]
    rows.sort(key=lambda row: (row["job_id"], row["item"]))
    return [row.job_id for row in insert_new(connection, submission_jobs, rows, [submission_jobs.c.job_id])]


def _describe_plan(plan: SubmissionPlan) -> dict[str, Any]:
    numbers = dict.fromkeys(("found", "queued", "already_done", "skipped", "studies", "images"), 0)
    return {
        **numbers,
        "state": SubmissionState.ENQUEUING,
        "plan_digest": plan.digest,
        "source_kind": plan.source_kind,
        "source": plan.source,
        "priority": plan.priority,
        "captioners": [asdict(model) for model in plan.captioners],
        "kinds": list(plan.kinds),
        "question": plan.question,
        "options": plan.options,
    }


def _read_captioner(model: Mapping[str, Any]) -> PlannedCaptioner:
    return PlannedCaptioner(model["captioner"], model["checkpoint"], GenerationSettings(**model["settings"]))


def _read_submission(row: Row[Any]) -> SubmissionRecord:
    plan = SubmissionPlan(
        row.source_kind,
        row.source,
        Priority(row.priority),
        tuple(_read_captioner(model) for model in row.captioners),
        tuple(JobKind(kind) for kind in row.kinds),
        row.question,
        row.options,
    )
    counts = (row.found, row.queued, row.already_done, row.skipped, row.studies, row.images)
    return SubmissionRecord(row.id, SubmissionState(row.state), plan, row.created_at, row.closed_at, *counts)
