"""The steps of a job without store and model: rows in a dict, a forward pass the test can hold."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from readroom.records import ClaimedJob, GenerationSettings, ImageRef, JobKind, Outcome, Priority, QueuedJob
from worker.handle import BatchKey, ReadyBatch

SETTINGS = GenerationSettings()


@dataclass
class FakeRow:
    state: str = "queued"
    attempt: int = 0
    checkpoint: str = "dummy"
    is_answered: bool = False  # whether the last attempt had an outcome

    @property
    def unanswered(self) -> int:
        return 0 if self.is_answered else self.attempt


@dataclass
class FakeHandler:
    """A handler whose rows are `rows`; a job that has none is not queued.

    `gate` opens the forward pass (open from the start); `trouble` may raise in any step, told its name and the jobs.
    """

    rows: dict[int, FakeRow] = field(default_factory=dict)
    trouble: Callable[[str, list[int]], None] = lambda step, jobs: None
    log: list[tuple[str, list[int]]] = field(default_factory=list)
    claimed_beside: list[tuple[list[int], set[int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    @property
    def batches(self) -> list[list[int]]:
        """The jobs of each forward pass."""
        return [jobs for step, jobs in self.log if step == "run"]

    def find_queued(self, job_ids: Sequence[int]) -> dict[int, QueuedJob]:
        self._note("find", job_ids)
        found = {job_id: self.rows[job_id] for job_id in job_ids if job_id in self.rows}
        queued = {job_id: row for job_id, row in found.items() if row.state == "queued"}
        return {
            job_id: QueuedJob(row.unanswered, (JobKind.CAPTION, "dummy", row.checkpoint, SETTINGS.digest))
            for job_id, row in queued.items()
        }

    def claim_jobs(self, job_ids: Sequence[int]) -> list[ClaimedJob]:
        self._note("claim", job_ids)
        with self.lock:
            beside = {job_id for job_id, row in self.rows.items() if row.state == "running"}
            self.claimed_beside.append((list(job_ids), beside))
            return [self._claim(job_id) for job_id in job_ids if self.rows[job_id].state == "queued"]

    def prepare_batches(self, jobs: Sequence[ClaimedJob]) -> list[ReadyBatch]:
        self._note("prepare", [job.id for job in jobs])
        groups: dict[BatchKey, list[ClaimedJob]] = {}
        for job in jobs:
            groups.setdefault(BatchKey(job.kind, job.captioner, job.checkpoint, job.settings), []).append(job)
        return [ReadyBatch(key, group) for key, group in groups.items()]

    def warm_up(self, batch: ReadyBatch) -> None:
        self._note("warm", batch.job_ids)

    def run_batch(self, batch: ReadyBatch) -> list[Outcome]:
        self._note("run", batch.job_ids)
        self.entered.set()
        self.gate.wait()
        return [Outcome(job.id, job.attempt, job.checkpoint, text="said") for job in batch.jobs]

    def write_outcomes(self, outcomes: Sequence[Outcome]) -> int:
        self._note("write", [outcome.job_id for outcome in outcomes])
        with self.lock:
            for outcome in outcomes:
                self.rows[outcome.job_id].state = "succeeded" if outcome.text is not None else "failed"
        return len(outcomes)

    def release_jobs(self, job_ids: Sequence[int]) -> int:
        self._note("release", job_ids)
        with self.lock:
            held = [job_id for job_id in job_ids if self.rows[job_id].state == "running"]
            for job_id in held:
                self.rows[job_id].state = "queued"
                self.rows[job_id].attempt -= 1
        return len(held)

    def _claim(self, job_id: int) -> ClaimedJob:
        row = self.rows[job_id]
        unanswered = row.unanswered
        row.state, row.attempt = "running", row.attempt + 1
        image = ImageRef(f"/nowhere/{job_id}", str(job_id))
        asked = ("dummy", row.checkpoint, SETTINGS, "", Priority.BULK)
        return ClaimedJob(job_id, JobKind.CAPTION, image, *asked, row.attempt, unanswered)

    def _note(self, step: str, job_ids: Sequence[int]) -> None:
        self.log.append((step, list(job_ids)))
        self.trouble(step, list(job_ids))


def make_rows(*job_ids: int, **changes: Any) -> dict[int, FakeRow]:
    return {job_id: FakeRow(**changes) for job_id in job_ids}
