"""What is done with jobs, step by step: claim, prepare, run, write. Plain functions over plain records, no queue.

    claim_jobs       ids -> ClaimedJobs         one transaction; what is not queued any more is left out
    prepare_batches  ClaimedJobs -> ReadyBatch  pictures decoded, or features read; a batch for each checkpoint
    run_batch        ReadyBatch -> Outcomes     the forward pass
    write_outcomes   Outcomes -> rows           one transaction

An item that fails becomes an Outcome with a reason at the step where it fails; the others go on.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from db import jobs as job_rows
from db.session import Store
from models.base import Captioner, ItemReader, Picture
from models.decode_guard import RenderRequest
from models.display import PROFILES
from readroom.errors import CheckpointBroken, CheckpointError, DeviceBroken, ImageError, OutOfMemory, StoreError
from readroom.log import describe_error
from readroom.records import (
    ClaimedJob,
    GeneratedText,
    GenerationSettings,
    ImageRef,
    JobKind,
    Outcome,
    QueuedJob,
    Reason,
)
from worker.engine import Engine, ModelFailure

logger = logging.getLogger(__name__)

DIGEST_THREADS = 4
# A mount that is away for a moment, or a machine short of memory, looks like this: another time it may pass.
PASSING_REASONS = frozenset({Reason.MISSING, Reason.UNREADABLE, Reason.DECODER_CRASHED})


class Renderer(Protocol):
    """Turns files into pictures; `models.decode_guard.DecodeGuard` is the real one."""

    def render_many(self, requests: Iterable[RenderRequest]) -> list[Picture | ImageError]:
        """One picture or error for each request, in order."""
        ...

    def close(self) -> None:
        """End what it started."""
        ...


class BatchKey(NamedTuple):
    """What jobs must have in common to share a forward pass."""

    kind: JobKind
    captioner: str
    checkpoint: str
    settings: GenerationSettings


@dataclass(slots=True)
class ReadyBatch:
    """Jobs whose pictures are ready, and the outcomes of those whose pictures cannot be had."""

    key: BatchKey
    jobs: list[ClaimedJob] = field(default_factory=list)
    images: list[Picture] = field(default_factory=list)
    failed: list[Outcome] = field(default_factory=list)

    @property
    def job_ids(self) -> list[int]:
        """All jobs this batch answers for."""
        return [job.id for job in self.jobs] + [outcome.job_id for outcome in self.failed]


@dataclass(frozen=True, slots=True)
class JobHandler:
    """The steps of a job with what they need. `owner` names this process on the leases it takes.

    A job that failed and may pass another time waits `retry_delay_s` for it.
    """

    store: Store
    engine: Engine
    renderer: Renderer
    owner: str
    lease_s: float
    max_attempts: int
    retry_delay_s: float = 0.0

    def find_queued(self, job_ids: Sequence[int]) -> dict[int, QueuedJob]:
        """What each of these jobs needs and how often it was lost; jobs that are not queued are left out."""
        return job_rows.find_queued(self.store, job_ids)

    def claim_jobs(self, job_ids: Sequence[int]) -> list[ClaimedJob]:
        """Take a lease on those that are still queued. Raises StoreError."""
        return job_rows.claim_jobs(self.store, job_ids, self.owner, self.lease_s)

    def renew_leases(self, job_ids: Sequence[int]) -> int:
        """Keep the leases of jobs in hand. Raises StoreError."""
        return job_rows.renew_leases(self.store, job_ids, self.owner, self.lease_s)

    def release_jobs(self, job_ids: Sequence[int]) -> int:
        """Give back jobs that were not started; their attempt does not count. Raises StoreError."""
        return job_rows.release_jobs(self.store, job_ids, self.owner)

    def prepare_batches(self, jobs: Sequence[ClaimedJob]) -> list[ReadyBatch]:
        """Decode the pictures, one batch for each checkpoint and settings. Raises StoreError and EngineError."""
        groups: dict[BatchKey, list[ClaimedJob]] = {}
        for job in jobs:
            key = BatchKey(job.kind, job.captioner, job.checkpoint, job.settings)
            groups.setdefault(key, []).append(job)
        return [self._prepare_group(key, group) for key, group in groups.items()]

    def warm_up(self, batch: ReadyBatch) -> None:
        """Make the batch's model ready to run. Raises DeviceBroken; the batch counts as not started then."""
        if batch.jobs:
            self.engine.warm_up(batch.key.checkpoint)

    def run_batch(self, batch: ReadyBatch) -> list[Outcome]:
        """The forward pass: an outcome for each job of the batch. Raises DeviceBroken."""
        if not batch.jobs:
            return batch.failed
        begin = time.monotonic()
        try:
            results = self.engine.run_captions(batch.key.checkpoint, batch.images, batch.key.settings)
        except DeviceBroken:
            raise
        except Exception as error:
            return batch.failed + fail_jobs(batch.jobs, *_blame_model(error))
        model_ms = (time.monotonic() - begin) * 1000 / len(batch.jobs)
        done = [_make_outcome(job, result, model_ms) for job, result in zip(batch.jobs, results, strict=True)]
        return batch.failed + done

    def write_outcomes(self, outcomes: Sequence[Outcome]) -> job_rows.Written:
        """Write what became of a batch, in one transaction. Raises StoreError."""
        return job_rows.write_outcomes(self.store, outcomes, self.owner, self.max_attempts, self.retry_delay_s)

    def _prepare_group(self, key: BatchKey, jobs: list[ClaimedJob]) -> ReadyBatch:
        if key.kind is not JobKind.CAPTION:
            return ReadyBatch(key, failed=fail_jobs(jobs, Reason.BUG, f"this worker runs no {key.kind} jobs"))
        try:
            captioner = self.engine.find_captioner(key.checkpoint)
            pictures = self._load_pictures(captioner, [job.image for job in jobs])
        except (CheckpointError, OutOfMemory) as error:
            return ReadyBatch(key, failed=fail_jobs(jobs, *_blame_model(error)))
        batch = ReadyBatch(key)
        for job, picture in zip(jobs, pictures, strict=True):
            if isinstance(picture, ImageError):
                batch.failed.append(_fail_job(job, picture.reason, picture.detail, picture.reason in PASSING_REASONS))
            else:
                batch.jobs.append(job)
                batch.images.append(picture)
        return batch

    def _load_pictures(self, captioner: Captioner, refs: Sequence[ImageRef]) -> list[Picture | ImageError]:
        if captioner.reader is not None:
            return [read_item(captioner.reader, ref) for ref in refs]
        if captioner.profile not in PROFILES:
            raise CheckpointBroken(f"it asks for the unknown pixel profile {captioner.profile!r}")
        problems = _map_threads(check_file, refs)
        sound = [ref for ref, problem in zip(refs, problems, strict=True) if problem is None]
        requests = [RenderRequest(ref.path, captioner.profile, captioner.image_size, ref.frame) for ref in sound]
        rendered = iter(self.renderer.render_many(requests) if requests else [])
        return [next(rendered) if problem is None else problem for problem in problems]


def check_file(ref: ImageRef) -> ImageError | None:
    """What is wrong with a file before it is decoded: gone, unreadable, or not the one that was enqueued.

    Results are kept by content: a caption of other content must not stand under this digest. Producers store the path
    of the file itself, so a link in its place is another file; a pipe in its place must not be waited for.
    """
    try:
        with open(ref.path, "rb", opener=_open_itself) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return ImageError(Reason.UNREADABLE, "it is no regular file any more")
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return ImageError(Reason.MISSING, "the file is no longer there")
    except (OSError, ValueError) as error:
        return ImageError(Reason.UNREADABLE, type(error).__name__)
    if ref.digest and digest != ref.digest:
        return ImageError(Reason.CHANGED, "the file's content changed after it was enqueued")
    return None


def _open_itself(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def read_item(reader: ItemReader, ref: ImageRef) -> Any:
    """What the model sees in a picture's place, or why it cannot be had.

    Raises CheckpointError, which concerns every image. What a reader raises besides is this image's alone: the file of
    features that it meets is foreign, and the thread that it runs in serves all the others too.
    """
    try:
        return reader.read(ref)
    except ImageError as error:
        return error
    except CheckpointError:
        raise
    except OSError as error:
        return ImageError(Reason.UNREADABLE, type(error).__name__)
    except Exception as error:
        logger.warning("reading what stands in a picture's place failed", exc_info=True)
        return ImageError(Reason.BUG, type(error).__name__)


def fail_jobs(jobs: Iterable[ClaimedJob], reason: str, detail: str, retry: bool = False) -> list[Outcome]:
    """The same failure for each of several jobs."""
    return [_fail_job(job, reason, detail, retry) for job in jobs]


def _fail_job(job: ClaimedJob, reason: str, detail: str, retry: bool = False) -> Outcome:
    return Outcome(job.id, job.attempt, job.checkpoint, reason=str(reason), detail=detail, retry=retry)


def _make_outcome(job: ClaimedJob, result: GeneratedText | ModelFailure, model_ms: float) -> Outcome:
    if isinstance(result, ModelFailure):
        return _fail_job(job, result.reason, result.detail, result.retry)
    return Outcome(job.id, job.attempt, job.checkpoint, text=result.text, score=result.score, model_ms=model_ms)


def _blame_model(error: Exception) -> tuple[str, str, bool]:
    """Reason, detail and whether a later attempt may pass, for an error that concerns a whole batch."""
    logger.warning("a batch could not be run: %s", describe_error(error))
    if isinstance(error, CheckpointError):
        return Reason.CHECKPOINT, str(error), True  # another worker may have it
    if isinstance(error, OutOfMemory):
        return Reason.MODEL_FAILED, "the device has too little memory for the model", True
    # A store that is away while an evicted model is loaded again is no picture's fault.
    return Reason.MODEL_FAILED, type(error).__name__, isinstance(error, StoreError)


def _map_threads(
    function: Callable[[ImageRef], ImageError | None], refs: Sequence[ImageRef]
) -> list[ImageError | None]:
    """Hash files side by side: hashing leaves the interpreter's lock, and network disks take their time."""
    if len(refs) == 1:
        return [function(refs[0])]
    with ThreadPoolExecutor(DIGEST_THREADS, thread_name_prefix="digest") as threads:
        return list(threads.map(function, refs))
