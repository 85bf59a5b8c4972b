"""A whole plant for tests: store, broker and worker processes under one home, with a supervisor that restarts them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from celery import Celery
from sqlalchemy import func, select

from db.jobs import mark_published
from db.session import Store, open_store, store_url
from db.tables import images, jobs, results
from readroom import broker
from readroom.records import Priority
from readroom.settings import Settings, load_settings
from readroom.transport import make_celery, publish
from tests.fakes.store import add_jobs, write_items

WAIT_S = 90.0
POLL_S = 0.02
# Short times, so that leases end and repairs come while a test watches.
QUICK = {
    "lease_s": 2.0,
    "rescue_interval_s": 0.3,
    "publish_grace_s": 1.5,
    "batch_wait_ms": 5.0,
    "stall_s": 60.0,
    "max_batch": 16,
    "ids_per_message": 4,
    "concurrency": 12,
}


def wait_until(is_true: Callable[[], object], what: str, timeout_s: float = WAIT_S) -> None:
    """Wait for something that another process does; fail naming it when it does not come."""
    deadline = time.monotonic() + timeout_s
    while not is_true():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not happen within {timeout_s:.0f} s")
        time.sleep(POLL_S)


class Plant:
    """Everything under `home`; `options` are settings that differ from QUICK."""

    def __init__(self, home: Path, **options: Any) -> None:
        self.home = home
        self.settings: Settings = load_settings(home=home, **{**QUICK, **options})
        self.store: Store = open_store(store_url(self.settings))
        self.workers: list[Worker] = []
        self.url = broker.broker_url(self.settings)
        self.app: Celery = make_celery(self.settings, self.url)

    def close(self) -> None:
        """End every process."""
        for worker in self.workers:
            worker.close()
        if self.settings.broker_url is None:
            broker.stop_broker(self.home)
        self.store.close()

    def enqueue(self, numbers: range, priority: Priority = Priority.BULK, **options: Any) -> list[int]:
        """Rows and messages, as a producer makes them."""
        ids = self.add_rows(numbers, priority, **options)
        self.publish(ids, priority)
        return ids

    def add_rows(self, numbers: range, priority: Priority = Priority.BULK, **options: Any) -> list[int]:
        """Rows only: what a producer that was killed leaves."""
        return add_jobs(self.store, write_items(self.home / "items", numbers), priority, **options)

    def publish(self, ids: list[int], priority: Priority = Priority.BULK) -> None:
        publish(self.app, "caption", priority, ids, self.settings.ids_per_message)
        mark_published(self.store, ids)

    def start_worker(self, trouble: str = "", drain: bool = False, restarts: bool = False) -> Worker:
        worker = Worker(self, trouble, drain, restarts)
        self.workers.append(worker)
        return worker

    def count(self, *states: str) -> int:
        """Jobs in these states."""
        with self.store.read() as connection:
            rows = select(func.count()).select_from(jobs).where(jobs.c.state.in_(states))
            return int(connection.scalar(rows) or 0)

    def states(self) -> dict[str, int]:
        with self.store.read() as connection:
            rows = connection.execute(select(jobs.c.state, func.count()).group_by(jobs.c.state))
            return {row[0]: row[1] for row in rows}

    def fetch_jobs(self, ids: list[int]) -> list[Any]:
        with self.store.read() as connection:
            return list(connection.execute(select(jobs).where(jobs.c.id.in_(ids)).order_by(jobs.c.id)))

    def read_numbers(self) -> dict[int, int]:
        """What the item of each job holds."""
        with self.store.read() as connection:
            rows = connection.execute(select(jobs.c.id, images.c.path).join_from(jobs, images))
            return {row.id: int(Path(row.path).stem) for row in rows}

    def count_results(self) -> int:
        with self.store.read() as connection:
            return int(connection.scalar(select(func.count()).select_from(results)) or 0)

    def wait_final(self, count: int, timeout_s: float = WAIT_S) -> None:
        """Wait until `count` jobs are final."""
        wait_until(lambda: self.count("succeeded", "failed") >= count, f"{count} final jobs", timeout_s)

    def wait_running(self, count: int = 1) -> None:
        wait_until(lambda: self.count("running") >= count, f"{count} running jobs")


class Worker:
    """One worker process; with `restarts` it is started again whenever it ends, as a supervisor does."""

    def __init__(self, plant: Plant, trouble: str, drain: bool, restarts: bool) -> None:
        self.log_path = plant.home / f"worker-{len(plant.workers)}.log"
        self.statuses: list[int] = []
        self._command = [sys.executable, "-m", "tests.fakes.worker_main", *(["--drain"] if drain else [])]
        self._environment = {**os.environ, **name_settings(plant.settings), "TEST_TROUBLE": trouble}
        self._is_closing = False
        self._lock = threading.Lock()
        self._start()
        self._watch = threading.Thread(target=self._supervise, args=(restarts,), daemon=True)
        self._watch.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process that runs now."""
        with self._lock:
            self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        with self._lock:
            process = self.process
            process.kill()
        process.wait(WAIT_S)

    def wait(self, timeout_s: float = WAIT_S) -> int:
        """The exit status, of a worker without restarts."""
        return self.process.wait(timeout_s)

    def wait_ready(self) -> None:
        """Wait until it consumes: Celery says that it is connected."""
        wait_until(lambda: "Connected to" in self.log, "the worker's connection")

    def close(self) -> None:
        with self._lock:
            self._is_closing = True
            self.process.kill()
        self._watch.join()

    def _start(self) -> None:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(self._command, env=self._environment, stdout=log, stderr=log)

    def _supervise(self, restarts: bool) -> None:
        while True:
            status = self.process.wait()
            self.statuses.append(status)
            with self._lock:
                if self._is_closing or not restarts:
                    return
                self._start()


def name_settings(settings: Settings) -> dict[str, str]:
    """The environment variables that give another process the same settings."""
    values = {name: getattr(settings, name) for name in settings.model_fields_set}
    plain = {name: value.get_secret_value() if hasattr(value, "get_secret_value") else value
             for name, value in values.items()}  # fmt: skip
    return {f"READROOM_{name.upper()}": str(value) for name, value in plain.items() if value is not None}
