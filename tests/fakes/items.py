"""Items and plans as producers make them, for tests of what comes after."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from sqlalchemy import update

from db.jobs import claim_jobs, write_outcomes
from db.session import Store
from db.submissions import PlannedCaptioner, SubmissionPlan, add_images, open_submission
from db.tables import jobs
from readroom.records import FoundImage, GenerationSettings, ImageRef, JobKind, JobState, Outcome, Priority, Reason

PLAN = SubmissionPlan(
    source_kind="pacs",
    source="/exports/monday",
    priority=Priority.ROUTINE,
    captioners=(PlannedCaptioner("blip", "dummy:", GenerationSettings(num_beams=2)),),
    kinds=(JobKind.CAPTION,),
)


def make_plan(**changes: Any) -> SubmissionPlan:
    """The usual plan with some fields changed, its own or those of its one captioner."""
    own = {name: changes.pop(name) for name in ("captioner", "checkpoint", "settings") if name in changes}
    plan = replace(PLAN, **changes)
    return replace(plan, captioners=tuple(replace(one, **own) for one in plan.captioners))


def make_image(number: int, **changes: Any) -> FoundImage:
    """A DICOM image; three of them in a row make a study."""
    study = number // 3
    usual = FoundImage(
        ref=ImageRef(f"/exports/monday/{number:06}", hashlib.sha256(str(number).encode()).hexdigest()),
        item=f"{number:06}",
        study_instance_uid=f"1.2.826.{study}",
        series_instance_uid=f"1.2.826.{study}.1",
        sop_instance_uid=f"1.2.826.{study}.1.{number}",
        accession_number=f"A{study}",
        patient_id=f"P{study}",
        view="PA",
        view_rank=0,
        rows=2048,
        columns=2500,
        size_bytes=10_000_000,
        flags=("body_part_unknown",),
    )
    return replace(usual, **changes)


def make_images(count: int, start: int = 0) -> list[FoundImage]:
    """Several DICOM images."""
    return [make_image(number) for number in range(start, start + count)]


def add_jobs(store: Store, count: int, start: int = 0, **changes: Any) -> list[int]:
    """Queue jobs for new images in a submission of their own; the jobs' ids."""
    plan = make_plan(**changes)
    return add_images(store, open_submission(store, plan), plan, make_images(count, start)).queued


def finish_jobs(store: Store, job_ids: list[int], text: str = "no acute finding") -> None:
    """Claim the jobs and write a text for each."""
    claimed = claim_jobs(store, job_ids, "finisher", 60)
    write_outcomes(store, [Outcome(one.id, one.attempt, one.checkpoint, text=text) for one in claimed], "finisher", 3)


def fail_jobs(store: Store, job_ids: list[int], reason: str = Reason.CORRUPT, detail: str = "cut short") -> None:
    """Claim the jobs and let each fail for good."""
    claimed = claim_jobs(store, job_ids, "finisher", 60)
    failures = [Outcome(one.id, one.attempt, one.checkpoint, reason=reason, detail=detail) for one in claimed]
    write_outcomes(store, failures, "finisher", 3)


def set_columns(store: Store, job_ids: list[int], **values: Any) -> None:
    """Write into job rows behind the store's back, e.g. to age a lease instead of waiting for it."""
    with store.begin() as connection:
        connection.execute(update(jobs).where(jobs.c.id.in_(job_ids)).values(**values))


def read_columns(store: Store, job_id: int) -> Any:
    """One job's row as it stands."""
    with store.read() as connection:
        return connection.execute(jobs.select().where(jobs.c.id == job_id)).one()


def state_of(store: Store, job_id: int) -> JobState:
    """One job's state."""
    return JobState(read_columns(store, job_id).state)
