"""Rescue: what brings back every job that fell into a gap between the store and Redis.

    gap                                        found by                                   repaired by
    a worker died with jobs in hand            their lease ended                          queued again, or failed
    a row was committed and never published    queued, no message for a moment            published
    a message was lost, or a worker died       queued and published long ago, and its     published again
      before it claimed its jobs                 queue is empty or holds younger ones
    Redis was emptied                          our marker is gone                         all published again at once

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

from db.jobs import first_published, forget_published, mark_published, return_expired, unpublished_jobs
from db.session import Store
from readroom.messages import queue_name, queue_names
from readroom.records import Priority
from readroom.settings import Settings
from readroom.transport import PRIORITIES, broker_errors, peek_jobs, publish, queue_depths, redis_client

logger = logging.getLogger(__name__)

EPOCH_KEY = "readroom:epoch:"  # and the kind of jobs whose rows were compared with this Redis
TURN_KEY = "readroom:rescue"
# A rescuer that is killed keeps its turn this long; the turn is extended with each step of a long round.
TURN_SECONDS = 5
# A producer publishes right after it commits; a row is not called unpublished before this age.
PUBLISH_MOMENT_S = 2.0
PUBLISH_STEP = 2_000
FORGET_STEP = 10_000
# A message that was given back stands first, though its jobs may be published anew: the oldest of several counts.
PEEK_MESSAGES = 100
# Ids published on each queue in each round, however full it is: repair does not wait for producers to make room.
LEAST_ROOM = 1_000


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
        """Take messages for lost; how many jobs they held."""
        return sum(self._compare_kind(kind) for kind in self.kinds)

    def _compare_kind(self, kind: str) -> int:
        moment = self.store.now()
        with broker_errors():
            client = redis_client(self.app)
            is_known = bool(client.exists(EPOCH_KEY + kind))
        if is_known:
            return sum(self._forget_older(kind, priority) for priority in PRIORITIES)
        # Redis was emptied, or nobody ever looked. What was published since may be there: a second message is harmless.
        forgotten = self._forget_jobs(kind, PRIORITIES, 0.0, moment)
        with broker_errors():
            client.set(EPOCH_KEY + kind, self._token)  # last: a round that is cut short is done again
        return forgotten

    def _forget_older(self, kind: str, priority: str) -> int:
        """Forget messages that cannot be on their queue: it is empty, or what is taken next was published later."""
        queue = queue_name(kind, priority)
        moment: float | None = self.store.now()
        if queue_depths(self.app, [queue])[queue]:
            moment = first_published(self.store, peek_jobs(self.app, queue, PEEK_MESSAGES), kind, priority)
        return 0 if moment is None else self._forget_jobs(kind, [priority], self.settings.publish_grace_s, moment)

    def _forget_jobs(self, kind: str, priorities: Sequence[str], age_s: float, moment: float) -> int:
        forgotten = 0
        while count := forget_published(self.store, [kind], age_s, FORGET_STEP, priorities, moment):
            forgotten += count
            self._extend_turn()
        return forgotten

    def _publish_waiting(self) -> int:
        """Publish jobs that no message holds, most urgent first; each queue is filled as far as producers fill it."""
        depths = queue_depths(self.app, self.queues)
        published = 0
        for priority in PRIORITIES:
            for kind in self.kinds:
                free = self.settings.max_queue_depth - depths[queue_name(kind, priority)]
                published += self._fill_queue(kind, priority, max(LEAST_ROOM, free * self.settings.ids_per_message))
        return published

    def _fill_queue(self, kind: str, priority: str, room: int) -> int:
        published = 0
        moment_s = min(PUBLISH_MOMENT_S, self.settings.publish_grace_s)
        while published < room:
            step = min(PUBLISH_STEP, room - published)
            found = unpublished_jobs(self.store, [kind], moment_s, step, [Priority(priority)])
            if not found:
                break
            job_ids = [job_id for job_id, _, _ in found]
            # Published, then noted: a crash in between sends a message twice, the other order would lose one.
            publish(self.app, kind, priority, job_ids, self.settings.ids_per_message)
            mark_published(self.store, job_ids)
            published += len(found)
            self._extend_turn()
        return published

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
