"""The worker program: Celery's consumer in this process, the batcher behind it, the duties beside it."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from celery import Celery
from celery.app import trace
from celery.worker import WorkController, state

from db.checkpoints import CheckpointRecord, get_checkpoint
from db.jobs import has_work
from db.session import Store, open_store, store_url
from models.base import Captioner
from models.checkpoint import BUNDLED, CheckpointSource, resolve_checkpoint
from models.decode_guard import DecodeGuard
from models.limits import PixelLimits
from models.load import load_captioner
from readroom.broker import broker_url
from readroom.errors import BadCall, BrokerError, CheckpointError, CheckpointMissing, StoreError
from readroom.log import describe_error, set_up_logging
from readroom.messages import queue_names
from readroom.records import FAMILIES, JobKind
from readroom.settings import MEBIBYTE, Settings
from readroom.transport import APP_NAME, KINDS, PRIORITIES, check_broker, make_celery, queue_depths
from worker.batcher import Batcher, BatchLimits
from worker.engine import Engine, LoadCaptioner
from worker.handle import JobHandler, Renderer
from worker.lifecycle import ExitCode, Lifecycle
from worker.rescue import Rescuer
from worker.tasks import register_tasks

logger = logging.getLogger(__name__)

RUNNABLE_KINDS = (JobKind.CAPTION,)
# Rounds of repair that a job waits for its next attempt: a mount that went away takes its time to come back.
RETRY_ROUNDS = 2
CANCEL_TIMEOUT_S = 2.0
ACK_TIMEOUT_S = 5.0
ACK_CHECK_S = 0.02
# Celery writes a line when a message comes, when it is done and when it is given back: the summary says enough.
# The pool reports each connection that was lost with a page of frames; we report the loss itself.
CHATTY_LOGGERS = {
    "celery.worker.strategy": "WARNING",
    "celery.app.trace": "ERROR",
    "kombu": "WARNING",
    "sqlalchemy.pool": "CRITICAL",
}


class QueueWorker(WorkController):  # type: ignore[misc]
    """Celery's worker in this process; `when_closing` is called before it waits for its tasks."""

    when_closing: Callable[[], None] = staticmethod(lambda: None)

    def on_before_init(self, **_options: Any) -> None:
        """What Celery's own worker program does here."""
        trace.setup_worker_optimizations(self.app, self.hostname)

    def on_close(self) -> None:
        """Release the tasks that wait in the batcher, whatever it is that ends the consumer."""
        super().on_close()
        self.when_closing()


class CeleryIntake:
    """Celery's consumer, as the lifecycle sees it. Its methods are called from other threads."""

    def __init__(self, app: Celery, queues: Sequence[str]) -> None:
        self.app = app
        self.queues = tuple(queues)
        self.worker: QueueWorker | None = None

    def stop_taking(self) -> None:
        """Cancel the consumer; messages it holds stay with their tasks."""
        is_done = threading.Event()
        self._call_in_loop(lambda: self._cancel_consumer(is_done))
        is_done.wait(CANCEL_TIMEOUT_S)

    def stop_loop(self) -> None:
        """End Celery's loop, once the acknowledgements of finished tasks are out."""
        deadline = time.monotonic() + ACK_TIMEOUT_S
        while self._count_unacknowledged() and time.monotonic() < deadline:
            time.sleep(ACK_CHECK_S)
        state.should_stop = ExitCode.STOPPED.value
        self._call_in_loop(lambda: None)

    def count_waiting(self) -> int:
        """Messages waiting on this worker's queues. Raises BrokerError."""
        return sum(queue_depths(self.app, self.queues).values())

    def _call_in_loop(self, function: Callable[[], object]) -> None:
        if self.worker is not None and self.worker.hub is not None:
            self.worker.hub.call_soon(function)

    def _cancel_consumer(self, is_done: threading.Event) -> None:
        try:
            self.worker.consumer.task_consumer.cancel()  # type: ignore[union-attr]
        except Exception as error:  # the connection is just lost: nothing is taken then either
            logger.info("the consumer was not cancelled (%s)", describe_error(error))
        is_done.set()

    def _count_unacknowledged(self) -> int:
        try:
            qos = self.worker.consumer.task_consumer.channel.qos  # type: ignore[union-attr]
            return int(qos.prefetch_count - qos.can_consume_max_estimate())
        except (AttributeError, TypeError):
            return 0  # not connected


def run_worker(
    settings: Settings,
    kinds: Sequence[str] = ("caption",),
    concurrency: int | None = None,
    drain: bool = False,
    *,
    load: LoadCaptioner | None = None,
    renderer: Renderer | None = None,
) -> int:
    """Run a worker until it is told to stop (or, with `drain`, has nothing left to do); its exit status.

    `load` and `renderer` replace the real models and decoder in tests. Runs in the main thread, for the signals.
    Raises BadCall for a kind nobody knows, StoreError and BrokerError when they cannot be had at the start.
    """
    check_kinds(kinds)
    set_up_worker_logging(settings)
    app = make_celery(settings, broker_url(settings, start=True))
    check_broker(app)  # later it may go and come back; at the start a wrong address or password must be said
    store = open_store(store_url(settings))
    eyes = renderer or make_renderer(settings)
    try:
        engine = Engine(load or make_loader(settings, store), settings.max_loaded_models)
        return _run_until_stopped(settings, app, store, engine, eyes, tuple(kinds), concurrency, drain)
    finally:
        eyes.close()
        store.close()


def _run_until_stopped(
    settings: Settings, app: Celery, store: Store, engine: Engine, renderer: Renderer, kinds: tuple[str, ...],
    concurrency: int | None, drain: bool,
) -> int:  # fmt: skip
    owner = f"{APP_NAME}-{secrets.token_hex(6)}"
    threads = concurrency or settings.concurrency
    retry_delay_s = RETRY_ROUNDS * settings.rescue_interval_s
    handler = JobHandler(store, engine, renderer, owner, settings.lease_s, settings.max_attempts, retry_delay_s)
    limits = BatchLimits(settings.max_batch, settings.batch_wait_ms / 1000, threads)
    batcher = Batcher(handler, limits, lambda stage, error: lifecycle.end_broken(stage, error))
    intake = CeleryIntake(app, queue_names(kinds, PRIORITIES))
    lifecycle = Lifecycle(settings, batcher, handler, intake)
    register_tasks(app, kinds, batcher)

    lifecycle.catch_signals()
    try_rescue(Rescuer(store, app, kinds, settings))
    batcher.start()
    lifecycle.start_duties()
    start_rescue(lifecycle, Rescuer(store, app, kinds, settings), settings, drain)
    worker = make_worker(app, intake.queues, owner, threads, batcher)
    intake.worker = worker
    logger.info("worker %s takes %s with %d threads", owner, ", ".join(kinds), threads)
    worker.start()

    batcher.close()
    lifecycle.write_summary()
    lifecycle.finish()
    return ExitCode.STOPPED if not worker.exitcode else ExitCode.BROKER


def check_kinds(kinds: Sequence[str]) -> None:
    """Raise BadCall unless this worker can run every kind."""
    for kind in kinds:
        if kind not in KINDS:
            raise BadCall("no such kind of jobs", f"There are: {', '.join(KINDS)}.")
        if kind not in RUNNABLE_KINDS:
            raise BadCall(f"this release runs no {kind} jobs", f"It runs: {', '.join(RUNNABLE_KINDS)}.")
    if not kinds:
        raise BadCall("a worker needs at least one kind of jobs")


def set_up_worker_logging(settings: Settings) -> None:
    """Our logging only; Celery's lines for each message only at DEBUG."""
    set_up_logging(settings.log_level)
    if settings.log_level != "DEBUG":
        for name, level in CHATTY_LOGGERS.items():
            logging.getLogger(name).setLevel(level)


def make_worker(app: Celery, queues: Sequence[str], owner: str, threads: int, batcher: Batcher) -> QueueWorker:
    """Celery's worker. Its name is a token: this machine's name has no place in messages and events."""
    worker = QueueWorker(
        app=app,
        hostname=f"{owner}@localhost",
        queues=list(queues),
        pool_cls="threads",
        concurrency=threads,
        without_gossip=True,
        without_mingle=True,
        task_events=True,
    )
    worker.when_closing = batcher.release_waiting
    return worker


def make_renderer(settings: Settings) -> Renderer:
    """The decoding child processes with the limits of the settings."""
    return DecodeGuard(
        settings.decoder_processes,
        limits=PixelLimits(max_file_bytes=settings.max_file_mb * MEBIBYTE, max_pixels=settings.max_pixels),
        item_seconds=settings.decoder_timeout_s,
        memory_bytes=settings.decoder_memory_mb * MEBIBYTE,
    )


def make_loader(settings: Settings, store: Store) -> LoadCaptioner:
    """How a checkpoint's ref becomes a model here: by the registry, else by the names this machine knows."""

    def load(ref: str) -> Captioner:
        source = locate_checkpoint(settings, store, ref)
        return load_captioner(source, settings.device, settings.precision, settings.region_dir)

    return load


def locate_checkpoint(settings: Settings, store: Store, ref: str) -> CheckpointSource:
    """Where the checkpoint of a ref is. Nothing else is ever taken in its place.

    Raises CheckpointMissing with what to do.
    """
    for name, family in list_names(settings, get_checkpoint(store, ref), ref):
        try:
            source = resolve_checkpoint(name, family)
        except CheckpointError:
            continue
        if source.ref == ref:
            return source
    raise CheckpointMissing(f"this machine does not have checkpoint {ref}", "Run: readroom checkpoints add")


def list_names(settings: Settings, record: CheckpointRecord | None, ref: str) -> Iterator[tuple[str, str]]:
    """Names under which this machine may have a checkpoint, each with the family it would be of."""
    yield ref.removeprefix("hub:"), record.family if record else FAMILIES[0]
    if record is not None:
        yield record.location, record.family
    for family in FAMILIES:
        if name := settings.name_model(family):
            yield name, family
        yield BUNDLED, family


def try_rescue(rescuer: Rescuer) -> None:
    """One round of repair; what is away is for the duty to try again."""
    try:
        rescuer.run_once()
    except (StoreError, BrokerError) as error:
        logger.warning("rescue: %s", describe_error(error))


def start_rescue(lifecycle: Lifecycle, rescuer: Rescuer, settings: Settings, drain: bool) -> None:
    """Repair in the background; with `drain`, end when nothing is left."""
    lifecycle.start_duty("rescue", settings.rescue_interval_s, rescuer.run_once, jitter=0.2)
    if drain:
        again = Rescuer(rescuer.store, rescuer.app, rescuer.kinds, settings)
        lifecycle.watch_drain(lambda: has_work(rescuer.store, rescuer.kinds), again.run_once)
