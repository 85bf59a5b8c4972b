"""The state machine of jobs. Only TRANSITIONS succeed; each UPDATE names the state it expects in its WHERE.

Rows are always locked in the order of their ids, so that transactions with overlapping lists wait and never deadlock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, func, literal, or_, select, update

from db.results import save_results
from db.rows import among, choose_value, slice_ids
from db.session import Store
from db.tables import images, jobs, state_is, still_is, submission_jobs
from readroom.errors import BadCall
from readroom.records import (
    TRANSITIONS,
    ClaimedJob,
    GenerationSettings,
    ImageRef,
    JobKind,
    JobState,
    Outcome,
    Priority,
    QueuedJob,
    Reason,
)

URGENCY = (Priority.STAT, Priority.ROUTINE, Priority.BULK)
MAX_DETAIL_CHARS = 500
UNLEASED: dict[str, Any] = {"lease_owner": None, "lease_until": None}
# What a job loses when it goes back to its queue: its lease, and the message that held it.
BACK_IN_QUEUE: dict[str, Any] = {**UNLEASED, "published_at": None, "started_at": None, "finished_at": None}
# What a job loses besides when a person gives it a new start.
FRESH: dict[str, Any] = {**BACK_IN_QUEUE, "attempt": 0, "reason": None, "detail": None, "not_before": None}


@dataclass(frozen=True, slots=True)
class Written:
    """What became of a list of outcomes. `ignored` came late or twice; `requeued` are the ids to publish again."""

    succeeded: int
    failed: int
    requeued: list[int]
    ignored: int


@dataclass(frozen=True, slots=True)
class FailureRecord:
    """A dead letter: a job that failed for good, and why. `item` is a path: it stays out of logs."""

    job: int
    kind: JobKind
    priority: Priority
    submission: str
    item: str
    reason: str
    detail: str
    attempt: int
    captioner: str
    checkpoint: str
    question: str
    image_digest: str
    frame: int
    failed_at: float


def check_transition(source: JobState, target: JobState) -> None:
    """Raise BadCall for a step that the state machine does not have."""
    if target not in TRANSITIONS[source]:
        raise BadCall(f"a {source} job cannot become {target}")


def move_jobs(
    connection: Connection,
    job_ids: Collection[int],
    source: JobState,
    target: JobState,
    *conditions: ColumnElement[bool],
    **changes: Any,
) -> list[int]:
    """Take those of the jobs that are `source` (and meet the conditions) to `target`; their ids, sorted.

    Raises BadCall for a step that the state machine does not have.
    """
    check_transition(source, target)
    moved: list[int] = []
    for part in slice_ids(job_ids):
        conditions_here = (among(jobs.c.id, part), still_is(source), *conditions)
        moved += change_jobs(connection, conditions_here, state=target, **changes)
    return moved


def change_jobs(connection: Connection, conditions: Collection[ColumnElement[bool]], **changes: Any) -> list[int]:
    """UPDATE the jobs that meet the conditions; their ids, sorted.

    SQLite has one writer and needs no row locks. On PostgreSQL a row that another transaction holds is waited for and
    judged anew. Not `FOR UPDATE` but the weaker lock: new links to a job need not wait for its claim.

    Not SKIP LOCKED: a worker takes an id that its claim does not give for a late duplicate and drops it, so a job whose
    locker then fails would lie until its message is taken for lost. The wait is bounded, for us by `lock_timeout`, and
    for a peer that stands still by `idle_in_transaction_session_timeout`.
    """
    chosen = select(jobs.c.id).where(*conditions).order_by(jobs.c.id).with_for_update(key_share=True)
    where = conditions if connection.dialect.name == "sqlite" else (*conditions, jobs.c.id.in_(chosen))
    return sorted(connection.scalars(update(jobs).where(*where).values(**changes).returning(jobs.c.id)))


def find_queued(store: Store, job_ids: Sequence[int]) -> dict[int, QueuedJob]:
    """What each of these jobs needs, and how many of its attempts are unanswered; those not queued are left out.

    A job that is tried again keeps the reason of its last outcome until it succeeds or an attempt ends without one.
    """
    needs = (jobs.c.kind, jobs.c.captioner, jobs.c.checkpoint, jobs.c.settings_digest)
    columns = (jobs.c.id, jobs.c.attempt, jobs.c.reason, *needs)
    with store.read() as connection:
        parts = (select(*columns).where(among(jobs.c.id, part)) for part in slice_ids(job_ids))
        rows = [row for part in parts for row in connection.execute(part.where(still_is(JobState.QUEUED)))]
    return {row.id: QueuedJob(0 if row.reason else row.attempt, tuple(row[-len(needs) :])) for row in rows}


def claim_jobs(store: Store, job_ids: Sequence[int], owner: str, lease_s: float) -> list[ClaimedJob]:
    """Take the queued ones of these jobs: running, attempt + 1, leased to `owner` for `lease_s` seconds.

    Jobs that are not queued (a late or double message) or whose time has not come are left out; two owners never get
    the same job.
    """
    moment = store.now()
    due = or_(jobs.c.not_before.is_(None), jobs.c.not_before <= moment)
    lease = {"lease_owner": owner, "lease_until": moment + lease_s, "started_at": moment, "not_before": None}
    with store.begin() as connection:
        attempt = jobs.c.attempt + 1
        ids = move_jobs(connection, job_ids, JobState.QUEUED, JobState.RUNNING, due, attempt=attempt, **lease)
        return [claimed for part in slice_ids(ids) for claimed in _load_claimed(connection, part)]


def renew_leases(store: Store, job_ids: Sequence[int], owner: str, lease_s: float) -> int:
    """Lengthen the leases that `owner` still holds; how many they are."""
    held, lease = _held_by(owner), {"lease_until": store.now() + lease_s}
    with store.begin() as connection:
        parts = [(among(jobs.c.id, part), *held) for part in slice_ids(job_ids)]
        return sum(len(change_jobs(connection, part, **lease)) for part in parts)


def release_jobs(store: Store, job_ids: Sequence[int], owner: str) -> int:
    """Give back jobs that were claimed and never started: queued, the attempt not counted, to be published again."""
    back = BACK_IN_QUEUE | {"attempt": jobs.c.attempt - 1, "queued_at": store.now()}
    with store.begin() as connection:
        return len(move_jobs(connection, job_ids, JobState.RUNNING, JobState.QUEUED, *_held_by(owner), **back))


def write_outcomes(
    store: Store, outcomes: Sequence[Outcome], owner: str, max_attempts: int, retry_delay_s: float = 0.0
) -> Written:
    """Write what became of a batch, in one transaction.

    An outcome counts only while its job is running with that owner and attempt; all others are ignored. A text makes a
    result and `succeeded`; a reason makes `failed`, or `queued` again while attempts are left. With `retry_delay_s` the
    job cannot be claimed before: leave its publishing to `unpublished_jobs`.
    """
    moment = store.now()
    with store.begin() as connection:
        held = _load_held(connection, [one.job_id for one in outcomes], owner)
        counting = {one.job_id: one for one in outcomes if _is_held(held, one)}
        texts, again, dead = _sort_outcomes(counting.values(), max_attempts)
        _succeed_jobs(connection, texts, held, owner, moment)
        _fail_jobs(connection, dead, owner, moment)
        _retry_jobs(connection, again, owner, moment, moment + retry_delay_s)
    requeued = sorted(one.job_id for one in again)
    return Written(len(texts), len(dead), requeued, len(outcomes) - len(counting))


def return_expired(store: Store, max_attempts: int) -> tuple[list[int], list[int]]:
    """Take back the jobs whose lease ended: ids queued again, and ids failed (`worker_lost`) for want of attempts."""
    moment = store.now()
    expired = (state_is(JobState.RUNNING), jobs.c.lease_until < moment)
    spent = jobs.c.attempt >= max_attempts
    death = {"reason": Reason.WORKER_LOST, "detail": f"no sign of life in {max_attempts} attempts"}
    with store.begin() as connection:
        # A row that is locked just now is being renewed or written by its owner, who is alive after all.
        stale = select(jobs.c.id).where(*expired).order_by(jobs.c.id)
        ids = connection.scalars(stale.with_for_update(key_share=True, skip_locked=True)).all()
        failed = move_jobs(
            connection, ids, JobState.RUNNING, JobState.FAILED, spent, **UNLEASED, **death, finished_at=moment
        )
        rest = set(ids).difference(failed)
        back = BACK_IN_QUEUE | {"reason": None, "detail": None, "queued_at": moment}
        queued = move_jobs(connection, rest, JobState.RUNNING, JobState.QUEUED, **back)
    return queued, failed


def unpublished_jobs(
    store: Store, kinds: Collection[str], grace_s: float, limit: int, priorities: Sequence[Priority] = URGENCY
) -> list[tuple[int, JobKind, Priority]]:
    """Queued jobs that no message is known to hold since `grace_s` seconds, by `priorities`, then oldest first."""
    moment = store.now()
    lone = (
        state_is(JobState.QUEUED),
        jobs.c.published_at.is_(None),
        jobs.c.queued_at + 0.0 <= moment - grace_s,  # + 0.0: not by the index on it, which would have to be sorted
        or_(jobs.c.not_before.is_(None), jobs.c.not_before <= moment),
    )
    found: list[tuple[int, JobKind, Priority]] = []
    with store.read() as connection:
        # One kind and priority at a time: the index then gives the first rows without sorting all of them.
        for priority in priorities:
            some: list[tuple[int, JobKind, Priority]] = []
            for kind in kinds:
                oldest = select(jobs.c.id).where(*lone, jobs.c.kind == kind, jobs.c.priority == priority)
                ids = connection.scalars(oldest.order_by(jobs.c.id).limit(limit - len(found)))
                some += [(job_id, JobKind(kind), priority) for job_id in ids]
            found += sorted(some)[: limit - len(found)]
    return found


def mark_published(store: Store, job_ids: Sequence[int]) -> int:
    """Note that messages hold these jobs; how many of them were queued."""
    queued, moment = still_is(JobState.QUEUED), store.now()
    with store.begin() as connection:
        parts = [(among(jobs.c.id, part), queued) for part in slice_ids(job_ids)]
        return sum(len(change_jobs(connection, part, published_at=moment)) for part in parts)


def first_published(store: Store, job_ids: Sequence[int], kind: str, priority: str) -> float | None:
    """When the first of those of these jobs that still wait with this kind and priority was published."""
    waiting = (still_is(JobState.QUEUED), jobs.c.kind == kind, jobs.c.priority == priority)
    first = select(func.min(jobs.c.published_at)).where(*waiting)
    with store.read() as connection:
        moments = [connection.scalar(first.where(among(jobs.c.id, part))) for part in slice_ids(job_ids)]
    return min((moment for moment in moments if moment is not None), default=None)


def forget_published(
    store: Store,
    kinds: Collection[str],
    older_than_s: float,
    limit: int = 10_000,
    priorities: Collection[str] = URGENCY,
    moment: float | None = None,
) -> int:
    """Take messages sent more than `older_than_s` before `moment` (default: now) for lost, if their jobs still wait.

    Returns how many jobs these are, `limit` at most.
    """
    before = (store.now() if moment is None else moment) - older_than_s
    old = (state_is(JobState.QUEUED), jobs.c.kind.in_(kinds), jobs.c.published_at < before)
    chosen = select(jobs.c.id).where(*old, jobs.c.priority.in_(priorities))
    lost = chosen.order_by(jobs.c.published_at, jobs.c.id).limit(limit)
    with store.begin() as connection:
        ids = connection.scalars(lost.with_for_update(key_share=True, skip_locked=True)).all()
        for part in slice_ids(ids):
            connection.execute(update(jobs).where(among(jobs.c.id, part)).values(published_at=None))
    return len(ids)


def revive_jobs(
    connection: Connection, job_ids: Collection[int], submission_id: str, priority: Priority, moment: float
) -> list[int]:
    """Queue those of the jobs that were cancelled, with all their attempts, as this submission's own; their ids."""
    fresh = FRESH | {"queued_at": moment, "submission_id": submission_id, "priority": priority}
    return move_jobs(connection, job_ids, JobState.CANCELLED, JobState.QUEUED, **fresh)


def raise_priority(connection: Connection, job_ids: Collection[int], priority: Priority) -> list[int]:
    """Move queued jobs of less urgent queues to this one; their ids. Their old messages do no harm."""
    lower = jobs.c.priority.in_(URGENCY[URGENCY.index(priority) + 1 :])
    raised: list[int] = []
    for part in slice_ids(job_ids):
        chosen = (among(jobs.c.id, part), still_is(JobState.QUEUED), lower)
        raised += change_jobs(connection, chosen, priority=priority, published_at=None)
    return raised


def has_work(store: Store, kinds: Collection[str]) -> int:
    """How many jobs of these kinds are queued or running."""
    open_states = or_(state_is(JobState.QUEUED), state_is(JobState.RUNNING))
    with store.read() as connection:
        return connection.scalar(select(func.count()).select_from(jobs).where(open_states, jobs.c.kind.in_(kinds))) or 0


def oldest_queued_age(store: Store, kinds: Collection[str]) -> float | None:
    """Seconds since the longest waiting job of these kinds was queued; None when none waits."""
    with store.read() as connection:
        # One look into the index for each kind, instead of a walk over all queued jobs.
        oldest = [connection.scalar(_first_queued(kind)) for kind in kinds]
    moments = [moment for moment in oldest if moment is not None]
    return max(0.0, store.now() - min(moments)) if moments else None


def list_failures(
    store: Store, submission: str | None = None, reason: str | None = None, limit: int = 100
) -> list[FailureRecord]:
    """Failed jobs, in the order of their ids."""
    chosen = _select_failures(submission).where(*_failed(None, submission, reason)).order_by(jobs.c.id).limit(limit)
    with store.read() as connection:
        return [_read_failure(row) for row in connection.execute(chosen)]


def get_failure(store: Store, job_id: int) -> FailureRecord | None:
    """The failed job of that id; None when there is none or it is in another state."""
    with store.read() as connection:
        row = connection.execute(_select_failures(None).where(*_failed([job_id], None, None))).one_or_none()
    return _read_failure(row) if row else None


def requeue_failures(
    store: Store, job_ids: Collection[int] | None = None, submission: str | None = None, reason: str | None = None
) -> list[int]:
    """Queue failed jobs again with all their attempts; their ids. Without any filter: all failed jobs."""
    fresh = FRESH | {"queued_at": store.now()}
    return _move_failures(store, _failed(job_ids, submission, reason), JobState.QUEUED, fresh)


def drop_failures(
    store: Store, job_ids: Collection[int] | None = None, submission: str | None = None, reason: str | None = None
) -> list[int]:
    """Give failed jobs up (cancelled); their ids. Without any filter: all failed jobs."""
    return _move_failures(store, _failed(job_ids, submission, reason), JobState.CANCELLED, {"finished_at": store.now()})


def linked_jobs(submission_id: str) -> Select[Any]:
    """The ids of a submission's jobs, as a subquery."""
    return select(submission_jobs.c.job_id).where(submission_jobs.c.submission_id == submission_id)


def _held_by(owner: str) -> tuple[ColumnElement[bool], ...]:
    return still_is(JobState.RUNNING), jobs.c.lease_owner == owner


def _load_claimed(connection: Connection, job_ids: Sequence[int]) -> list[ClaimedJob]:
    asked = (jobs.c.captioner, jobs.c.checkpoint, jobs.c.settings, jobs.c.question)
    columns = (jobs.c.id, jobs.c.kind, jobs.c.priority, jobs.c.attempt, jobs.c.reason, *asked)
    picture = (images.c.path, images.c.member, images.c.digest, images.c.frame)
    joined: Select[Any] = select(*columns, *picture).join_from(jobs, images)
    rows = connection.execute(joined.where(among(jobs.c.id, job_ids)).order_by(jobs.c.id))
    return [_read_claimed(row) for row in rows]


def _read_claimed(row: Row[Any]) -> ClaimedJob:
    image = ImageRef(row.path, row.digest, row.frame, row.member)
    settings = GenerationSettings(**row.settings)
    names = (row.captioner, row.checkpoint, settings, row.question, Priority(row.priority))
    return ClaimedJob(row.id, JobKind(row.kind), image, *names, row.attempt, 0 if row.reason else row.attempt - 1)


def _load_held(connection: Connection, job_ids: Collection[int], owner: str) -> dict[int, Row[Any]]:
    """The rows that `owner` holds a lease on, locked, with what a result repeats of them."""
    columns = (jobs.c.id, jobs.c.attempt, jobs.c.kind, jobs.c.question, jobs.c.settings, jobs.c.settings_digest)
    joined = select(*columns, images.c.digest, images.c.frame).join_from(jobs, images).order_by(jobs.c.id)
    locked = joined.where(*_held_by(owner)).with_for_update(of=jobs, key_share=True)
    held: dict[int, Row[Any]] = {}
    for part in slice_ids(job_ids):
        held |= {row.id: row for row in connection.execute(locked.where(among(jobs.c.id, part)))}
    return held


def _is_held(held: dict[int, Row[Any]], outcome: Outcome) -> bool:
    row = held.get(outcome.job_id)
    return row is not None and row.attempt == outcome.attempt


def _sort_outcomes(
    outcomes: Iterable[Outcome], max_attempts: int
) -> tuple[list[Outcome], list[Outcome], list[Outcome]]:
    """Those with a text, those to be tried again, those that failed for good."""
    texts, again, dead = [], [], []
    for one in outcomes:
        if one.text is not None:
            texts.append(one)
        elif one.retry and one.attempt < max_attempts:
            again.append(one)
        else:
            dead.append(one)
    return texts, again, dead


def _succeed_jobs(
    connection: Connection, texts: Sequence[Outcome], held: dict[int, Row[Any]], owner: str, moment: float
) -> None:
    result_ids = save_results(connection, texts, held, owner, moment)
    changes = {"reason": None, "detail": None, "finished_at": moment, **UNLEASED}
    for part in slice_ids(result_ids):
        # One statement for the batch; a CASE of a batch's size is cheap, a round trip for each row is not.
        result = choose_value(jobs.c.id, {job_id: result_ids[job_id] for job_id in part})
        move_jobs(connection, part, JobState.RUNNING, JobState.SUCCEEDED, *_held_by(owner), **changes, result_id=result)


def _fail_jobs(connection: Connection, dead: Sequence[Outcome], owner: str, moment: float) -> None:
    for (reason, detail), ids in _group_causes(dead).items():
        cause = {"reason": reason, "detail": detail, "finished_at": moment}
        move_jobs(connection, ids, JobState.RUNNING, JobState.FAILED, *_held_by(owner), **UNLEASED, **cause)


def _retry_jobs(connection: Connection, again: Sequence[Outcome], owner: str, moment: float, not_before: float) -> None:
    for (reason, detail), ids in _group_causes(again).items():
        cause = {"reason": reason, "detail": detail, "queued_at": moment, "not_before": not_before}
        move_jobs(connection, ids, JobState.RUNNING, JobState.QUEUED, *_held_by(owner), **BACK_IN_QUEUE, **cause)


def _group_causes(outcomes: Sequence[Outcome]) -> dict[tuple[str, str], list[int]]:
    groups: dict[tuple[str, str], list[int]] = {}
    for one in outcomes:
        cause = (one.reason or Reason.BUG, one.detail[:MAX_DETAIL_CHARS])
        groups.setdefault(cause, []).append(one.job_id)
    return groups


def _first_queued(kind: str) -> Select[Any]:
    queued = select(jobs.c.queued_at).where(state_is(JobState.QUEUED), jobs.c.kind == kind)
    return queued.order_by(jobs.c.queued_at).limit(1)


def _failed(job_ids: Collection[int] | None, submission: str | None, reason: str | None) -> list[ColumnElement[bool]]:
    if job_ids is None:
        conditions = [state_is(JobState.FAILED)]
    else:
        conditions = [still_is(JobState.FAILED), among(jobs.c.id, job_ids)]
    if submission is not None:
        conditions.append(jobs.c.id.in_(linked_jobs(submission)))
    if reason is not None:
        conditions.append(jobs.c.reason == reason)
    return conditions


def _move_failures(
    store: Store, conditions: Sequence[ColumnElement[bool]], target: JobState, changes: dict[str, Any]
) -> list[int]:
    check_transition(JobState.FAILED, target)
    with store.begin() as connection:
        return change_jobs(connection, conditions, state=target, **changes)


def _select_failures(submission: str | None) -> Select[Any]:
    """Failed jobs with their image, and the first of their items in the submission asked for (or that made them)."""
    named = jobs.c.submission_id if submission is None else literal(submission)
    links = submission_jobs.c
    item = select(func.min(links.item)).where(links.job_id == jobs.c.id, links.submission_id == named)
    columns = (named.label("submission"), item.scalar_subquery().label("item"), images.c.digest, images.c.frame)
    return select(jobs, *columns).join_from(jobs, images)


def _read_failure(row: Row[Any]) -> FailureRecord:
    return FailureRecord(
        row.id,
        JobKind(row.kind),
        Priority(row.priority),
        row.submission,
        row.item,
        row.reason,
        row.detail or "",
        row.attempt,
        row.captioner,
        row.checkpoint,
        row.question,
        row.digest,
        row.frame,
        row.finished_at,
    )
