"""How a worker process lives and ends: signals, leases, watchdogs, exit status.

A worker runs under a supervisor that starts it again. Whenever a new process is the cure, it ends by itself:

    status  name      meaning
    0       STOPPED   asked to stop (SIGTERM, SIGINT, --drain) and did so; do not start again
    70      BUG       a stage or duty failed in a way nobody foresaw; its log names where
    71      DEVICE    the device is lost (CUDA error); only a new process can use it
    72      HUNG      a forward pass took longer than READROOM_BATCH_DEADLINE_S, or twice that went by while a model was
                      made ready or a batch was read
    73      STALLED   connected, but took nothing for READROOM_STALL_S while messages waited
    74      BROKER    Celery's consumer ended with an error
    75      QUICK     a second signal came; jobs in hand return when their lease ends

(2 for wrong settings comes from the command line.) What was claimed and not started is given back first, as far as the
store answers within seconds; what was started comes back when its lease ends, with its attempt counted.
"""

from __future__ import annotations

import logging
import os
import queue
import random
import signal
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from types import FrameType
from typing import Protocol

from readroom.errors import BrokerError, DeviceBroken, StoreError
from readroom.log import describe_error
from readroom.settings import Settings
from worker.batcher import Batcher

logger = logging.getLogger(__name__)

FAREWELL_S = 3.0  # a store that does not answer must not keep a broken process alive
SUMMARY_INTERVAL_S = 30.0
DRAIN_INTERVAL_S = 0.25
DRAIN_RESCUE_S = 1.0
SIGNAL_CHECK_S = 0.1


class ExitCode(IntEnum):
    """Exit status of a worker; the table stands on top of this file."""

    STOPPED = 0
    BUG = 70
    DEVICE = 71
    HUNG = 72
    STALLED = 73
    BROKER = 74
    QUICK = 75


class Intake(Protocol):
    """What takes messages for this process; worker.app drives Celery's consumer through it."""

    def stop_taking(self) -> None: ...  # noqa: D102
    def stop_loop(self) -> None: ...  # noqa: D102
    def count_waiting(self) -> int: ...  # noqa: D102


class Leases(Protocol):
    """The part of `worker.handle.JobHandler` that leases need."""

    def renew_leases(self, job_ids: list[int]) -> int: ...  # noqa: D102
    def release_jobs(self, job_ids: list[int]) -> int: ...  # noqa: D102


class Lifecycle:
    """The duties beside the work, each in a thread of its own, and the ways to end."""

    def __init__(self, settings: Settings, batcher: Batcher, leases: Leases, intake: Intake) -> None:
        self._settings = settings
        self._batcher = batcher
        self._leases = leases
        self._intake = intake
        self._over = threading.Event()
        self._orders: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._signals = 0
        self._waiting_since: float | None = None
        self._reported = (0, 0, 0, 0.0, time.monotonic())

    # Starting

    def start_duties(self) -> None:
        """Start the stopper, the lease keeper, the watchdogs and the summary."""
        threading.Thread(target=self._obey, name="stopper", daemon=True).start()
        self.start_duty("leases", self._settings.lease_s / 3, self.keep_leases)
        self.start_duty("deadline", min(1.0, self._settings.batch_deadline_s / 4), self.check_deadline)
        self.start_duty("stall", min(5.0, self._settings.stall_s / 4), self.check_stall)
        self.start_duty("summary", SUMMARY_INTERVAL_S, self.write_summary)

    def start_duty(self, name: str, interval_s: float, perform: Callable[[], object], jitter: float = 0.0) -> None:
        """Do something again and again until the process ends; a store or broker that is away is waited out."""
        arguments = (name, interval_s, perform, jitter)
        threading.Thread(target=self._run_duty, args=arguments, name=name, daemon=True).start()

    def catch_signals(self) -> None:
        """SIGTERM and SIGINT: the first ends warmly, the second quickly. Main thread only."""
        signal.signal(signal.SIGTERM, self._note_signal)
        signal.signal(signal.SIGINT, self._note_signal)

    # Ending

    def request_stop(self) -> None:
        """End warmly: finish the batch in hand, give back the rest, leave with status 0."""
        self._orders.put("stop")

    def end_process(self, code: ExitCode, why: str) -> None:
        """End at once. What was not started is given back first; the rest comes back by its lease."""
        logger.critical("this worker ends with status %d: %s", code, why)
        farewell = threading.Thread(target=self._release_unstarted, daemon=True)
        farewell.start()
        farewell.join(FAREWELL_S)
        logging.shutdown()
        os._exit(code)

    def end_broken(self, stage: str, error: BaseException) -> None:
        """End because a stage of the pipeline failed."""
        code = ExitCode.DEVICE if isinstance(error, DeviceBroken) else ExitCode.BUG
        self.end_process(code, f"stage {stage} failed ({describe_error(error)})")

    def finish(self) -> None:
        """End the duties; the process ends by itself."""
        self._over.set()

    # Duties

    def keep_leases(self) -> None:
        """Renew the lease of every job in hand."""
        in_hand = self._batcher.jobs_in_hand()
        if in_hand:
            self._leases.renew_leases(in_hand)

    def check_deadline(self) -> None:
        """A thread cannot be stopped: a forward pass that hangs ends the process, and so does a file that never comes.

        Getting ready gets twice the time: a model may be fetched first. A decoder that hangs has its own deadline. The
        jobs of a batch whose files do not come are not given back as new, so that the culprit becomes a suspect; while
        a model is made ready they may only be waiting for it.
        """
        deadline_s = self._settings.batch_deadline_s
        if self._batcher.forward_seconds > deadline_s:
            self.end_process(ExitCode.HUNG, f"a forward pass took over {deadline_s:g} s")
        if self._batcher.warm_seconds > 2 * deadline_s:
            self.end_process(ExitCode.HUNG, f"making a model ready took over {2 * deadline_s:g} s")
        if self._batcher.prepare_seconds > 2 * deadline_s:
            if not self._batcher.warm_seconds:
                self._batcher.blame_prepared()
            self.end_process(ExitCode.HUNG, f"reading a batch took over {2 * deadline_s:g} s")

    def check_stall(self) -> None:
        """End when messages wait and none was taken for `stall_s`, though the broker answers."""
        now = time.monotonic()
        idle_s = self._batcher.idle_seconds
        try:
            is_stuck = idle_s > 0 and self._intake.count_waiting() > 0
        except BrokerError:
            is_stuck = False  # Celery reconnects by itself
        if not is_stuck:
            self._waiting_since = None
        elif self._waiting_since is None:
            self._waiting_since = now
        elif min(idle_s, now - self._waiting_since) > self._settings.stall_s:
            self.end_process(ExitCode.STALLED, f"took nothing for {self._settings.stall_s:g} s while messages waited")

    def write_summary(self) -> None:
        """One log line about the time since the last one, if anything was done."""
        tally, now = self._batcher.tally, time.monotonic()
        current = (tally.batches, tally.succeeded, tally.failed, tally.forward_s, now)
        batches, succeeded, failed, forward_s, seconds = (a - b for a, b in zip(current, self._reported, strict=True))
        self._reported = current
        if succeeded or failed:
            mean, busy = (succeeded + failed) / max(1, batches), 100 * forward_s / seconds
            words = "%d jobs done, %d failed in %.0f s; %.1f a batch; model busy %.0f %%"
            logger.info(words, succeeded, failed, seconds, mean, busy)

    def watch_drain(self, count_work: Callable[[], int], rescue: Callable[[], object]) -> None:
        """End warmly when nothing is left: no message, nothing in hand, no open row. Meanwhile repair what hides."""
        last_rescue = [0.0]

        def check() -> None:
            if not self._batcher.wait_idle(0) or self._intake.count_waiting():
                return
            if not count_work():
                self.request_stop()
            elif time.monotonic() > last_rescue[0] + DRAIN_RESCUE_S:
                rescue()
                last_rescue[0] = time.monotonic()

        self.start_duty("drain", DRAIN_INTERVAL_S, check)

    # Inside

    def _run_duty(self, name: str, interval_s: float, perform: Callable[[], object], jitter: float) -> None:
        while not self._over.wait(interval_s * random.uniform(1 - jitter, 1 + jitter)):
            try:
                perform()
            except (StoreError, BrokerError) as error:
                logger.warning("%s: %s", name, describe_error(error))
            except Exception as error:
                logger.critical("duty %s failed", name, exc_info=True)
                self.end_process(ExitCode.BUG, f"duty {name} failed ({describe_error(error)})")

    def _note_signal(self, number: int, _frame: FrameType | None) -> None:
        # Nothing here may take a lock that the interrupted main thread could hold; SimpleQueue.put is made for this.
        self._signals += 1
        self._orders.put("stop")

    def _obey(self) -> None:
        self._orders.get()
        try:
            self._stop_warmly()
        except Exception as error:
            logger.critical("stopping failed", exc_info=True)
            self.end_process(ExitCode.BUG, f"stopping failed ({describe_error(error)})")

    def _stop_warmly(self) -> None:
        logger.info("stopping: the batch in hand is finished, the rest is given back")
        self._intake.stop_taking()
        self._batcher.release_waiting()
        while not self._batcher.wait_idle(SIGNAL_CHECK_S):
            if self._signals > 1:
                self.end_process(ExitCode.QUICK, "a second signal came")
        self._intake.stop_loop()
        while not self._over.wait(SIGNAL_CHECK_S):
            if self._signals > 1:
                self.end_process(ExitCode.QUICK, "a second signal came")

    def _release_unstarted(self) -> None:
        job_ids = self._batcher.jobs_unstarted()
        try:
            if job_ids:
                self._leases.release_jobs(job_ids)
        except Exception as error:
            logger.warning("%d jobs wait for their lease to end: %s", len(job_ids), describe_error(error))
