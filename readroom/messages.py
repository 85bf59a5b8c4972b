"""What travels on Redis: a version, a job kind and a few job ids. Small, JSON, and nothing about anybody."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from readroom.errors import BadCall
from readroom.records import JobKind
from readroom.settings import MAX_IDS_PER_MESSAGE

MESSAGE_VERSION = 1
MAX_JOB_ID = 2**63 - 1


@dataclass(frozen=True, slots=True)
class JobMessage:
    """A few jobs of one kind."""

    kind: JobKind
    job_ids: tuple[int, ...]

    def as_payload(self) -> dict[str, Any]:
        """The JSON object that is the task's only argument."""
        return {"v": MESSAGE_VERSION, "kind": str(self.kind), "jobs": list(self.job_ids)}

    def describe(self) -> str:
        """What Flower and logs show as the task's arguments."""
        return f"{self.kind} jobs {','.join(map(str, self.job_ids))}"


def parse_payload(payload: Any) -> JobMessage:
    """Check a payload that came from Redis, where anybody with the password can write.

    Raises BadCall when it is not a message of this version.
    """
    if not isinstance(payload, dict) or payload.get("v") != MESSAGE_VERSION:
        raise BadCall("a message of another format or version", "Run producers and workers of the same release.")
    if payload.get("kind") not in list(JobKind):
        raise BadCall("a message of an unknown job kind")
    ids = payload.get("jobs")
    if not isinstance(ids, list) or not 1 <= len(ids) <= MAX_IDS_PER_MESSAGE or not all(map(_is_job_id, ids)):
        raise BadCall(f"a message must hold 1 to {MAX_IDS_PER_MESSAGE} job ids")
    return JobMessage(JobKind(payload["kind"]), tuple(ids))


def pack_messages(kind: JobKind, job_ids: Iterable[int], ids_per_message: int) -> Iterator[JobMessage]:
    """Cut job ids into messages of at most `ids_per_message` ids, in order."""
    remaining = iter(job_ids)
    while group := tuple(islice(remaining, ids_per_message)):
        yield JobMessage(kind, group)


def queue_name(kind: str, priority: str) -> str:
    """The Redis list of one job kind and priority, e.g. `caption.stat`."""
    return f"{kind}.{priority}"


def queue_names(kinds: Sequence[str], priorities: Sequence[str]) -> list[str]:
    """All queues of some job kinds, most urgent first."""
    return [queue_name(kind, priority) for priority in priorities for kind in kinds]


def _is_job_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_JOB_ID
