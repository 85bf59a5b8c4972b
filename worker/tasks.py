"""The Celery tasks: unpack a message, hand its jobs to the batcher, wait. Nothing else happens here."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from celery import Celery, Task
from celery.exceptions import Reject

from readroom.errors import BadCall
from readroom.messages import JobMessage, parse_payload
from readroom.transport import task_name
from worker.batcher import Batcher, Ending

logger = logging.getLogger(__name__)


def register_tasks(app: Celery, kinds: Iterable[str], batcher: Batcher) -> None:
    """Give the application one task for each kind of job this worker runs."""
    for kind in kinds:
        app.task(_make_task(kind, batcher), bind=True, name=task_name(kind), throws=(BadCall,), acks_late=True)


def _make_task(kind: str, batcher: Batcher) -> Any:
    def run_message(self: Task, payload: Any) -> None:
        """Return when every job of the message has its outcome in the store: only then is it acknowledged.

        A message of another shape fails with BadCall. A message whose jobs were given back returns to its queue.
        """
        message = read_message(kind, payload)
        ticket = batcher.submit(message.job_ids, read_priority(self.request.delivery_info))
        if ticket.wait() is not Ending.DONE:
            raise Reject("its jobs were given back", requeue=True)

    return run_message


def read_message(kind: str, payload: Any) -> JobMessage:
    """The message of a payload that came from Redis. Raises BadCall, and says so: nobody else would notice."""
    try:
        message = parse_payload(payload)
        if message.kind != kind:
            raise BadCall(f"a message of {message.kind} jobs on a queue of {kind} jobs")
        return message
    except BadCall as error:
        logger.warning("a message was refused: %s", error)
        raise


def read_priority(delivery_info: dict[str, Any] | None) -> str:
    """The priority a message came with: the last part of its queue's name."""
    return str((delivery_info or {}).get("routing_key", "")).rpartition(".")[2]
