"""The plain values that travel between rooms: no torch, no Celery, no SQLAlchemy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any, NamedTuple


class JobKind(StrEnum):
    """What is asked of an image (caption, answer) or of a study (report)."""

    CAPTION = "caption"
    ANSWER = "answer"
    REPORT = "report"


# The families of models that caption and answer, in the order in which they are listed. Each has a setting
# (READROOM_<FAMILY>_MODEL), a bundled checkpoint, and at most one active checkpoint in the registry.
FAMILIES = ("blip", "vlp")


class JobState(StrEnum):
    """Where a job stands; docs/how-it-works.md draws the machine."""

    WAITING = "waiting"
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


FINAL_STATES = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})

TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.WAITING: frozenset({JobState.QUEUED, JobState.CANCELLED}),
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.CANCELLED, JobState.FAILED}),
    JobState.RUNNING: frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.QUEUED, JobState.CANCELLED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset({JobState.QUEUED, JobState.CANCELLED}),  # only a person requeues or drops
    JobState.CANCELLED: frozenset({JobState.QUEUED}),  # only when somebody enqueues it again
}


class Priority(StrEnum):
    """Which of the three queues of a job kind a job goes to."""

    STAT = "stat"
    ROUTINE = "routine"
    BULK = "bulk"


class Reason(StrEnum):
    """Why an item was skipped by a producer, or a job failed in a worker."""

    NOT_DICOM = "not_dicom"
    NOT_IMAGE = "not_image"
    OTHER_MODALITY = "other_modality"
    FOR_PROCESSING = "for_processing"
    SECONDARY_CAPTURE = "secondary_capture"
    BURNED_IN = "burned_in"
    NOT_CHEST = "not_chest"
    TRUNCATED = "truncated"
    EMPTY = "empty"
    DUPLICATE = "duplicate"
    UID_CONFLICT = "uid_conflict"
    UNSAFE_PATH = "unsafe_path"
    TOO_LARGE = "too_large"
    ENCRYPTED = "encrypted"
    MISSING = "missing"
    UNREADABLE = "unreadable"
    CORRUPT = "corrupt"
    MULTI_FRAME = "multi_frame"
    UNSUPPORTED_SYNTAX = "unsupported_syntax"
    DECODER_CRASHED = "decoder_crashed"
    DECODER_TIMEOUT = "decoder_timeout"
    CHANGED = "changed"
    MODEL_FAILED = "model_failed"
    WORKER_LOST = "worker_lost"
    CHECKPOINT = "checkpoint"
    BUG = "bug"


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Where a picture is and what it is; never its pixels.

    `path` is a file, `member` the entry inside it when the file is an archive (`.zip`, `.tar*`), `frame` the index in a
    multi-frame instance, `digest` the SHA-256 of the file's bytes in hex ("" when nobody has read them yet).
    """

    path: str
    digest: str = ""
    frame: int = 0
    member: str | None = None


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How text is generated; part of a job's identity. Lengths are in tokens."""

    num_beams: int = 1
    max_new_tokens: int = 40
    min_new_tokens: int = 1
    prompt: str = ""

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON of the settings."""
        return digest_json(asdict(self))


@dataclass(frozen=True, slots=True)
class GeneratedText:
    """One text a model produced. `score` is the mean token log-probability (natural log), None where unknown."""

    text: str
    score: float | None = None


@dataclass(frozen=True, slots=True)
class JobRequest:
    """A job that a producer wants to exist."""

    kind: JobKind
    image_digest: str
    frame: int
    captioner: str
    checkpoint: str
    settings: GenerationSettings
    question: str = ""

    @property
    def key(self) -> str:
        """SHA-256 (hex): same content, task, checkpoint and settings give the same job (DESIGN.md)."""
        parts = [self.kind, self.image_digest, self.frame, self.captioner, self.checkpoint, self.settings.digest]
        return digest_json([*parts, self.question])


@dataclass(frozen=True, slots=True)
class ClaimedJob:
    """A job a worker holds a lease on, with what it needs to run it.

    `unanswered`: how many attempts before this one may have ended with their worker; 0 when the last had an outcome.
    """

    id: int
    kind: JobKind
    image: ImageRef
    captioner: str
    checkpoint: str
    settings: GenerationSettings
    question: str
    priority: Priority
    attempt: int
    unanswered: int = 0


class QueuedJob(NamedTuple):
    """What a worker wants to know of a job before it claims it.

    `unanswered` as in ClaimedJob, had it been claimed just now. `needs` is what jobs of one batch have in common: kind,
    captioner, checkpoint, digest of the generation settings.
    """

    unanswered: int
    needs: tuple[str, str, str, str]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one attempt. Exactly one of `text` and `reason` is set.

    `retry` sends the job back to `queued` instead of `failed` (while attempts are left).
    """

    job_id: int
    attempt: int
    checkpoint: str
    text: str | None = None
    score: float | None = None
    reason: str | None = None
    detail: str = ""
    retry: bool = False
    model_ms: float | None = None


@dataclass(frozen=True, slots=True)
class SkippedItem:
    """An item a producer left out, and why. `item` is a path relative to the source: it stays out of logs."""

    item: str
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class FoundImage:
    """One image a producer found: a row to be, with the identifiers of its study when it is DICOM.

    `view_rank` orders the images of a study: 0 PA, 1 AP, 2 unknown, 3 lateral, 4 other. `flags` holds warnings
    such as `view_unknown`, `body_part_unknown`.
    """

    ref: ImageRef
    item: str
    study_instance_uid: str | None = None
    series_instance_uid: str | None = None
    sop_instance_uid: str | None = None
    accession_number: str | None = None
    patient_id: str | None = None
    source_id: str | None = None
    view: str | None = None
    view_rank: int = 2
    rows: int | None = None
    columns: int | None = None
    size_bytes: int | None = None
    flags: tuple[str, ...] = ()
    reference_texts: tuple[str, ...] = ()


@dataclass(slots=True)
class SubmissionCounts:
    """What one `enqueue` found and did; the shape of `enqueue --json`."""

    submission: str
    found: int = 0
    queued: int = 0
    already_done: int = 0
    skipped: Sequence[SkippedItem] = field(default_factory=list)  # a producer's stands in a file, not in memory
    studies: int = 0
    images: int = 0
    already_failed: int = 0  # of its jobs, those that stand as dead letters; told to people, not in the document

    def as_json(self) -> dict[str, Any]:
        """The document `enqueue --json` prints."""
        skipped = [asdict(item) for item in self.skipped]
        names = [item.name for item in fields(self) if item.name != "already_failed"]
        return {name: getattr(self, name) for name in names} | {"skipped": skipped}


def digest_json(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of a plain value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
