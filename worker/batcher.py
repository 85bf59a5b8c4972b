"""Batches across messages: three stages in three threads, so that decoding and writing overlap the forward pass.

    submit -> [buffer] -> gather: claim, decode -> [1 ready] -> forward -> [outcomes] -> write -> the ticket is done

A batch holds jobs that need the same: kind, captioner, checkpoint, settings. It is chosen for that from all that is
buffered, so that batches are full when messages of several models come mixed. The job whose turn it is says which.

Plain threads, no Celery. A task waits on its ticket; the ticket ends when every job of the message has an outcome in
the store, or was given back. No ticket is ever left waiting: a stage that fails breaks all of them.

A job whose last attempt has no outcome may be what killed the process then. Such suspects run apart from
everything else in this process: the second time at most 8 together, from the third on alone. So a job that kills its
process is known after three kills, and nobody who stood beside it loses a last attempt.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol, TypeVar

from readroom.errors import StoreError, StoreUnavailable
from readroom.log import describe_error
from readroom.records import ClaimedJob, Outcome, Priority, QueuedJob, Reason
from worker.handle import ReadyBatch

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

URGENCY: dict[str, int] = {Priority.STAT: 0, Priority.ROUTINE: 1, Priority.BULK: 2}
# In the buffer stat goes first; whoever waited this long goes with it, so that nobody waits for ever.
AGE_FLOOR_S = 30.0
SUSPECT_GROUP = 8
# One batch in the forward pass and one ready behind it: more would be claimed for nothing when the process dies.
MAX_AHEAD = 2
RETRY_FIRST_S = 0.1
RETRY_LONGEST_S = 5.0


class Ending(StrEnum):
    """How a message's jobs ended: each has its outcome; some were given back; a stage broke."""

    DONE = "done"
    RELEASED = "released"
    BROKEN = "broken"


class Handler(Protocol):
    """The steps of a job; `worker.handle.JobHandler` is the real one. StoreUnavailable of any step is waited out."""

    def find_queued(self, job_ids: Sequence[int]) -> dict[int, QueuedJob]: ...  # noqa: D102
    def claim_jobs(self, job_ids: Sequence[int]) -> list[ClaimedJob]: ...  # noqa: D102
    def prepare_batches(self, jobs: Sequence[ClaimedJob]) -> list[ReadyBatch]: ...  # noqa: D102
    def warm_up(self, batch: ReadyBatch) -> None: ...  # noqa: D102
    def run_batch(self, batch: ReadyBatch) -> list[Outcome]: ...  # noqa: D102
    def write_outcomes(self, outcomes: Sequence[Outcome]) -> object: ...  # noqa: D102
    def release_jobs(self, job_ids: Sequence[int]) -> int: ...  # noqa: D102


class Ticket:
    """One message in the batcher; its task waits here."""

    def __init__(self, count: int) -> None:
        self._left = count
        self._ending = Ending.DONE
        self._over = threading.Event()
        if count == 0:
            self._over.set()

    def wait(self, timeout_s: float | None = None) -> Ending | None:
        """How it ended; None when it has not within `timeout_s`."""
        return self._ending if self._over.wait(timeout_s) else None

    @property
    def is_over(self) -> bool:
        """Whether nobody needs to wait any more."""
        return self._over.is_set()

    def settle(self, ending: Ending = Ending.DONE) -> bool:
        """One job less; True when it was the last. The batcher calls this under its lock."""
        if ending is not Ending.DONE:
            self._ending = ending
        self._left -= 1
        if self._left > 0:
            return False
        self._over.set()
        return True


@dataclass(slots=True)
class Entry:
    """One job of one message. `unanswered` and `needs` as in QueuedJob, as far as is known."""

    job_id: int
    urgency: int
    arrived: float
    ticket: Ticket
    unanswered: int = 0
    needs: tuple[str, ...] = ()
    is_settled: bool = False


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """`capacity` is how many messages can wait here at once: when all do, nothing more can join a batch."""

    max_batch: int
    batch_wait_s: float
    capacity: int


@dataclass(slots=True)
class Tally:
    """What a batcher has done since it started."""

    batches: int = 0
    images: int = 0
    succeeded: int = 0
    failed: int = 0
    forward_s: float = 0.0


class Batcher:
    """The pipeline of one process. `on_fatal` is called once, by the thread of the stage that failed."""

    def __init__(
        self, handler: Handler, limits: BatchLimits, on_fatal: Callable[[str, BaseException], None] | None = None
    ) -> None:
        self._handler = handler
        self._limits = limits
        self._on_fatal = on_fatal or (lambda stage, error: None)
        self._changed = threading.Condition()
        self._arrived: list[Entry] = []  # nobody has looked them up yet
        self._buffer: list[Entry] = []
        self._moving: list[Entry] = []  # out of the buffer, not claimed yet
        self._claimed: dict[int, list[Entry]] = {}  # jobs this process holds a lease on
        self._started: set[int] = set()  # those of them that a forward pass has seen
        self._forward_since: float | None = None
        self._warm_since: float | None = None
        self._prepare_since: float | None = None
        self._preparing: list[int] = []
        self._ahead = 0
        self._open_tickets = 0
        self._last_submit = time.monotonic()
        self._stopping = False
        self._closed = False
        self._ready: queue.SimpleQueue[ReadyBatch | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[list[Outcome] | None] = queue.SimpleQueue()
        self._threads = [
            self._make_thread("gather", self._gather),
            self._make_thread("forward", self._forward),
            self._make_thread("write", self._write),
        ]
        self.tally = Tally()

    # What tasks and watchdogs call

    def start(self) -> None:
        """Start the stages."""
        for thread in self._threads:
            thread.start()

    def submit(self, job_ids: Sequence[int], priority: Priority | str) -> Ticket:
        """Take a message's jobs in; the caller waits on the ticket."""
        ticket = Ticket(len(job_ids))
        moment = time.monotonic()
        urgency = URGENCY.get(priority, len(URGENCY))
        with self._changed:
            self._last_submit = moment
            if not ticket.is_over:
                self._open_tickets += 1
            entries = [Entry(job_id, urgency, moment, ticket) for job_id in job_ids]
            if self._stopping:
                self._settle(entries, Ending.RELEASED)
            else:
                self._arrived.extend(entries)
            self._changed.notify_all()
        return ticket

    def release_waiting(self) -> None:
        """Finish the batch in hand and give back everything else at once; later messages are given back too."""
        with self._changed:
            self._stopping = True
            waiting = self._arrived + self._buffer
            self._arrived, self._buffer = [], []
            self._settle(waiting, Ending.RELEASED)
            unstarted = [job_id for job_id in self._claimed if job_id not in self._started]
            self._changed.notify_all()
        if unstarted:
            self._release(unstarted)

    def close(self, timeout_s: float = 10.0) -> bool:
        """Stop the stages after `release_waiting`; False when one of them did not end in time. Ends every ticket."""
        self.release_waiting()
        self.wait_idle(timeout_s)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread, orders in zip(self._threads, (None, self._ready, self._outcomes), strict=True):
            if orders is not None:
                orders.put(None)
            thread.join(timeout_s)
        self._break_tickets(Ending.RELEASED)
        return not any(thread.is_alive() for thread in self._threads)

    def wait_idle(self, timeout_s: float | None = None) -> bool:
        """Wait until no message is in hand; False when some still are."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._open_tickets, timeout_s)

    def jobs_in_hand(self) -> list[int]:
        """Jobs this process holds a lease on."""
        with self._changed:
            return list(self._claimed)

    def jobs_unstarted(self) -> list[int]:
        """Those of the jobs in hand that no forward pass has seen."""
        with self._changed:
            return [job_id for job_id in self._claimed if job_id not in self._started]

    def blame_prepared(self) -> None:
        """Call the jobs being prepared started: the file of one of them keeps the process from going on."""
        with self._changed:
            self._started.update(self._preparing)

    @property
    def forward_seconds(self) -> float:
        """How long the present forward pass has been running; 0 when there is none."""
        return _measure_since(self._forward_since)

    @property
    def warm_seconds(self) -> float:
        """How long a model has been made ready for the batch in the forward stage; 0 when none is."""
        return _measure_since(self._warm_since)

    @property
    def prepare_seconds(self) -> float:
        """How long the present batch has been loaded and decoded for; 0 when none is."""
        return _measure_since(self._prepare_since)

    @property
    def idle_seconds(self) -> float:
        """How long ago the last message came in; 0 while messages are in hand."""
        with self._changed:
            return 0.0 if self._open_tickets else time.monotonic() - self._last_submit

    # Stage 1: gather

    def _gather(self) -> None:
        while self._take_batch():
            is_suspect = self._moving[0].unanswered > 0
            for batch in self._claim_moving():
                self._hand_over(batch)
            if is_suspect:
                self._wait_alone()

    def _take_batch(self) -> bool:
        """Move the next jobs out of the buffer: suspects, or others that need the same; False when all is over."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or ((self._arrived or self._buffer) and self._has_room()))
                if self._closed:
                    return False
            self._look_up_arrived()
            if self._move_due():
                return True

    def _has_room(self) -> bool:
        return self._ahead < MAX_AHEAD

    def _look_up_arrived(self) -> None:
        """Learn what new jobs need and which are suspects.

        A job that is not queued is running elsewhere or has its outcome: the message came late or twice.
        """
        with self._changed:
            entries = self._moving = self._arrived
            self._arrived = []
        found = self._insist(lambda: self._handler.find_queued([one.job_id for one in entries])) if entries else {}
        with self._changed:
            self._moving = []
            if found is None:
                self._settle(entries, Ending.RELEASED)
                return
            self._settle([entry for entry in entries if entry.job_id not in found], Ending.DONE)
            known = [entry for entry in entries if entry.job_id in found]
            for entry in known:
                entry.unanswered, entry.needs = found[entry.job_id]
            self._put_back(known)

    def _move_due(self) -> bool:
        """Move a batch that is full, has waited long enough, or can grow no more; else wait for a change."""
        with self._changed:
            if self._closed or self._arrived:
                return False
            now = time.monotonic()  # read once: what is found not to be due is waited for until it is
            chosen = self._choose_entries(now)
            if not chosen:
                self._changed.wait(self._measure_wait(now))
                return False
            gone = set(map(id, chosen))
            self._buffer = [entry for entry in self._buffer if id(entry) not in gone]
            self._moving = chosen
            return True

    def _choose_entries(self, now: float) -> list[Entry]:
        if not self._buffer:
            return []
        aged = now - AGE_FLOOR_S
        ordered = sorted(self._buffer, key=lambda entry: (entry.urgency if entry.arrived > aged else 0, entry.arrived))
        first = ordered[0] if self._is_due(now) else self._find_ready(ordered)
        if first is None:
            return []
        if first.unanswered:
            # The pipeline runs empty first; then one looks again, for something urgent may have come.
            return self._choose_suspects(first, ordered) if not self._claimed else []
        return [one for one in ordered if one.needs == first.needs and not one.unanswered][: self._limits.max_batch]

    def _find_ready(self, ordered: list[Entry]) -> Entry | None:
        """The first job of those that a whole batch is there of; one that is more urgent does not wait for it."""
        counts = Counter(entry.needs for entry in ordered if not entry.unanswered)
        whole = (one for one in ordered if not one.unanswered and counts[one.needs] >= self._limits.max_batch)
        first, foremost = next(whole, None), ordered[0]
        if first is not None and foremost.urgency < first.urgency and not foremost.unanswered:
            return foremost
        return first

    def _choose_suspects(self, first: Entry, ordered: list[Entry]) -> list[Entry]:
        if first.unanswered == 1:
            return [entry for entry in ordered if entry.unanswered == 1][:SUSPECT_GROUP]
        return [entry for entry in ordered if entry.job_id == first.job_id]

    def _is_due(self, now: float) -> bool:
        return self._open_tickets >= self._limits.capacity or self._due_at() <= now

    def _due_at(self) -> float:
        return min(entry.arrived for entry in self._buffer) + self._limits.batch_wait_s

    def _measure_wait(self, now: float) -> float | None:
        """Seconds until the buffer is due; None when that alone changes nothing."""
        return None if not self._buffer or self._is_due(now) else self._due_at() - now

    def _claim_moving(self) -> list[ReadyBatch]:
        known = {entry.job_id: entry.unanswered for entry in self._moving}
        job_ids = sorted(known)
        claimed = self._insist(lambda: self._handler.claim_jobs(job_ids)) if job_ids else []
        self._note_claimed(claimed)
        if not claimed:
            return []
        late = [job for job in claimed if job.unanswered > known[job.id]]
        if late:
            self._postpone(late)
        return self._prepare_jobs([job for job in claimed if job not in late] if late else claimed)

    def _note_claimed(self, claimed: list[ClaimedJob] | None) -> None:
        with self._changed:
            entries, self._moving = self._moving, []
            if claimed is None:
                self._settle(entries, Ending.RELEASED)
                return
            held = {job.id for job in claimed}
            for entry in entries:
                if entry.job_id in held:
                    self._claimed.setdefault(entry.job_id, []).append(entry)
            self._settle([entry for entry in entries if entry.job_id not in held], Ending.DONE)

    def _postpone(self, jobs: list[ClaimedJob]) -> None:
        """Give back jobs that another worker claimed and lost between our look and our claim: more suspect now."""
        attempts = {job.id: job.unanswered for job in jobs}
        self._insist(lambda: self._handler.release_jobs(list(attempts)))
        with self._changed:
            entries = [entry for job_id in attempts for entry in self._claimed.pop(job_id, [])]
            for entry in entries:
                entry.unanswered = attempts[entry.job_id]
            self._put_back(entries)

    def _put_back(self, entries: list[Entry]) -> None:
        if self._stopping:
            self._settle(entries, Ending.RELEASED)
        else:
            self._buffer.extend(entries)

    def _prepare_jobs(self, jobs: list[ClaimedJob]) -> list[ReadyBatch]:
        self._preparing = [job.id for job in jobs]
        self._prepare_since = time.monotonic()
        batches = self._insist(lambda: self._handler.prepare_batches(jobs)) if jobs and not self._stopping else None
        self._prepare_since = None
        self._preparing = []
        if batches is None:
            self._release([job.id for job in jobs])
        return batches or []

    def _hand_over(self, batch: ReadyBatch) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._ahead < MAX_AHEAD or self._stopping or self._closed)
            self._ahead += 1
        self._ready.put(batch)

    def _wait_alone(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._claimed or self._closed)

    # Stage 2: forward

    def _forward(self) -> None:
        while (batch := self._ready.get()) is not None:
            self._warm_since = time.monotonic()
            self._handler.warm_up(batch)
            self._warm_since = None
            if self._start_batch(batch):
                self._run_batch(batch)
            else:
                self._release(batch.job_ids)
            with self._changed:
                self._ahead -= 1
                self._changed.notify_all()

    def _start_batch(self, batch: ReadyBatch) -> bool:
        """Under the lock that `release_waiting` takes too: a job is started or given back, never both."""
        with self._changed:
            if self._stopping:
                return False
            self._started.update(batch.job_ids)
            self._forward_since = time.monotonic()
            return True

    def _run_batch(self, batch: ReadyBatch) -> None:
        outcomes = self._handler.run_batch(batch)
        self.tally.forward_s += self.forward_seconds
        self._forward_since = None
        self.tally.images += len(batch.jobs)
        self.tally.batches += 1
        self._outcomes.put(outcomes)

    # Stage 3: write

    def _write(self) -> None:
        while (outcomes := self._outcomes.get()) is not None:
            for rows in self._write_rows(outcomes):
                states = Counter(row.text is not None for row in rows)
                self.tally.succeeded += states[True]
                self.tally.failed += states[False]
                self._finish_jobs([row.job_id for row in rows])

    def _write_rows(self, rows: list[Outcome]) -> Iterator[list[Outcome]]:
        """Write the outcomes; one the store refuses fails alone, it does not keep the others from being written."""
        try:
            if self._insist(lambda: self._handler.write_outcomes(rows) or True, patient=True):
                yield rows
        except StoreError as error:
            logger.warning("the store refuses %d outcomes: %s", len(rows), describe_error(error))
            if len(rows) > 1:
                for row in rows:
                    yield from self._write_rows([row])
            elif rows[0].reason == Reason.BUG:
                raise
            else:
                refused = replace(
                    rows[0], text=None, score=None, reason=Reason.BUG, detail="the store refuses its text"
                )
                yield from self._write_rows([refused])

    # Endings

    def _finish_jobs(self, job_ids: Iterable[int], ending: Ending = Ending.DONE) -> None:
        with self._changed:
            for job_id in job_ids:
                self._started.discard(job_id)
                self._settle(self._claimed.pop(job_id, []), ending)
            self._changed.notify_all()

    def _release(self, job_ids: Sequence[int]) -> None:
        """Give back claimed jobs that were not started. When the store is away their leases run out by themselves."""
        try:
            self._handler.release_jobs(job_ids)
        except StoreError as error:
            logger.warning("%d jobs wait for their lease to end: %s", len(job_ids), describe_error(error))
        self._finish_jobs(job_ids, Ending.RELEASED)

    def _settle(self, entries: Iterable[Entry], ending: Ending) -> None:
        """Take entries off their tickets, under the lock; a second time does nothing."""
        for entry in entries:
            if not entry.is_settled:
                entry.is_settled = True
                self._open_tickets -= entry.ticket.settle(ending)
        self._changed.notify_all()

    def _break_tickets(self, ending: Ending) -> None:
        with self._changed:
            self._stopping = True
            held = [entry for entries in self._claimed.values() for entry in entries]
            self._settle(self._arrived + self._buffer + self._moving + held, ending)
            self._arrived, self._buffer = [], []

    # Running and retrying

    def _make_thread(self, stage: str, run: Callable[[], None]) -> threading.Thread:
        return threading.Thread(target=self._guard, args=(stage, run), name=f"batcher-{stage}", daemon=True)

    def _guard(self, stage: str, run: Callable[[], None]) -> None:
        """Run a stage; whatever ends it ends every ticket, so that no task waits for ever."""
        try:
            run()
        except BaseException as error:
            logger.critical("stage %s failed: %s", stage, describe_error(error), exc_info=True)
            self._break_tickets(Ending.BROKEN)
            self._on_fatal(stage, error)

    def _insist(self, call: Callable[[], Result], patient: bool = False) -> Result | None:
        """Call until the store answers; None when the process stops meanwhile (`patient`: only when it is closed)."""
        pause = RETRY_FIRST_S
        while True:
            try:
                return call()
            except StoreUnavailable as error:
                logger.warning("the store does not answer, trying again: %s", describe_error(error))
            with self._changed:
                if self._changed.wait_for(lambda: self._closed or (self._stopping and not patient), pause):
                    return None
            pause = min(2 * pause, RETRY_LONGEST_S)


def _measure_since(begin: float | None) -> float:
    return 0.0 if begin is None else time.monotonic() - begin
