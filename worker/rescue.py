"""Rescue: what brings back every job that fell into a gap between the store and Redis.

    gap                                        found by                                   repaired by
    a worker died with jobs in hand            their lease ended                          queued again, or failed
    a row was committed and never published    queued, no message for a moment            published
    a message was lost, or a worker died       queued and published long ago, and its     published again
      before it claimed its jobs                 queue is empty
    Redis was emptied                          our marker is gone and nothing waits       published again at once

The rows are the truth. Every step only names rows in the state it expects, and a message too many is harmless, so any
number of workers may run this; a lock in Redis merely keeps them from publishing the same jobs side by side.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from celery import Celery

from db.jobs import forget_published, mark_published, return_expired, unpublished_jobs
from db.session import Store
from readroom.messages import queue_name, queue_names
from readroom.settings import Settings
from readroom.transport import PRIORITIES, broker_errors, publish, queue_depths, redis_client

logger = logging.getLogger(__name__)

EPOCH_KEY = "readroom:epoch"
TURN_KEY = "readroom:rescue"
UNACKED_KEY = "unacked"  # kombu's hash of messages that some worker holds
# A rescuer that is killed keeps its turn this long; the turn is extended with each step of a long round.
TURN_SECONDS = 5
# A producer publishes right after it commits; a row is not called unpublished before this age.
PUBLISH_MOMENT_S = 2.0
PUBLISH_STEP = 2_000
FORGET_STEP = 10_000


@dataclass(frozen=True, slots=True)
class Repair:
    """What one round did, in jobs: back from lost workers, failed for want of attempts, messages lost, published."""

    returned: int = 0
    failed: int = 0
    forgotten: int = 0
    published: int = 0

    def __bool__(self) -> bool:
        return any((self.returned, self.failed, self.forgotten, self.published))


class Rescuer:
    """Repairs the gaps for some kinds of jobs. Not thread-safe: each thread makes its own."""

    def __init__(self, store: Store, app: Celery, kinds: Sequence[str], settings: Settings) -> None:
        self.store = store
        self.app = app
        self.kinds = tuple(kinds)
        self.settings = settings
        self.queues = queue_names(kinds, PRIORITIES)
        self._token = secrets.token_hex(8)

    def run_once(self) -> Repair:
        """One round of repair. Raises StoreError and BrokerError; what was done before stays done."""
        # The store's part first: it helps even while the broker is away.
        returned, failed = return_expired(self.store, self.settings.max_attempts)
        forgotten = published = 0
        with self._take_turn() as is_mine:
            if is_mine:
                forgotten = self._forget_lost()
                published = self._publish_waiting()
        repair = Repair(len(returned), len(failed), forgotten, published)
        if repair:
            logger.info("rescue: %d jobs back from lost workers, %d failed for want of attempts, %d messages lost, "
                        "%d jobs published", *(len(returned), len(failed), forgotten, published))  # fmt: skip
        return repair

    def _forget_lost(self) -> int:
        """Take messages for lost; an empty queue cannot hold those of jobs that wait for long."""
        depths = queue_depths(self.app, self.queues)
        age_s = 0.0 if self._was_emptied(depths) else self.settings.publish_grace_s
        forgotten = 0
        for kind in self.kinds:
            empty = [priority for priority in PRIORITIES if not depths[queue_name(kind, priority)]]
            forgotten += self._forget_jobs(kind, age_s, empty)
        return forgotten

    def _was_emptied(self, depths: dict[str, int]) -> bool:
        """Whether Redis forgot everything: it has no marker of ours, no message waits, and no worker holds one."""
        with broker_errors():
            client = redis_client(self.app)
            is_new = bool(client.set(EPOCH_KEY, self._token, nx=True))
            return is_new and not any(depths.values()) and not client.hlen(UNACKED_KEY)

    def _forget_jobs(self, kind: str, age_s: float, priorities: Sequence[str]) -> int:
        forgotten = 0
        most = self.settings.max_queue_depth * self.settings.ids_per_message
        while priorities and forgotten < most:
            count = forget_published(self.store, [kind], age_s, FORGET_STEP, priorities)
            forgotten += count
            if count < FORGET_STEP:
                break
        return forgotten

    def _publish_waiting(self) -> int:
        """Publish jobs that no message holds, most urgent first, as long as the queues are not full."""
        waiting = sum(queue_depths(self.app, self.queues).values())
        room = (self.settings.max_queue_depth - waiting) * self.settings.ids_per_message
        published = 0
        while published < room:
            moment_s = min(PUBLISH_MOMENT_S, self.settings.publish_grace_s)
            found = unpublished_jobs(self.store, self.kinds, moment_s, min(PUBLISH_STEP, room - published))
            if not found:
                break
            self._publish_jobs(found)
            published += len(found)
            self._extend_turn()
        return published

    def _publish_jobs(self, found: Sequence[tuple[int, str, str]]) -> None:
        groups: dict[tuple[str, str], list[int]] = {}
        for job_id, kind, priority in found:
            groups.setdefault((kind, priority), []).append(job_id)
        for (kind, priority), job_ids in groups.items():
            # Published, then noted: a crash in between sends a message twice, the other order would lose one.
            publish(self.app, kind, priority, job_ids, self.settings.ids_per_message)
            mark_published(self.store, job_ids)

    @contextmanager
    def _take_turn(self) -> Iterator[bool]:
        with broker_errors():
            client = redis_client(self.app)
            is_mine = bool(client.set(TURN_KEY, self._token, nx=True, ex=TURN_SECONDS))
        try:
            yield is_mine
        finally:
            if is_mine:
                self._end_turn()

    def _extend_turn(self) -> None:
        with broker_errors():
            redis_client(self.app).expire(TURN_KEY, TURN_SECONDS)

    def _end_turn(self) -> None:
        with broker_errors():
            client = redis_client(self.app)
            if client.get(TURN_KEY) == self._token:
                client.delete(TURN_KEY)
