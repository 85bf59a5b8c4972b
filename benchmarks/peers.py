"""The named peers of benchmarks/queue.py: plain Celery with one image a task, and celery-batches.

Both run the same fake model behind one lock (one device), write one row an image into SQLite, and are otherwise as
their documentation shows. Run as `python -m celery -A benchmarks.peers worker ...` by the benchmark.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Sequence
from typing import Any

from celery import Celery

BASE_S = float(os.environ.get("PEER_BASE_MS", "5")) / 1000
ITEM_S = float(os.environ.get("PEER_ITEM_MS", "0.5")) / 1000
INTERVAL_S = float(os.environ.get("PEER_INTERVAL_S", "1"))
BATCH = int(os.environ.get("PEER_BATCH", "64"))
DATABASE = os.environ.get("PEER_DATABASE", ":memory:")

SCHEMA = "CREATE TABLE IF NOT EXISTS results (job INTEGER PRIMARY KEY, text TEXT, started REAL, finished REAL)"
INSERT = "INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?)"

app = Celery("peers", broker=os.environ.get("PEER_BROKER", "redis://127.0.0.1:6379/0"))
app.conf.update(
    task_ignore_result=True,
    task_acks_late=True,
    task_serializer="json",
    accept_content=["json"],
    worker_prefetch_multiplier=int(os.environ.get("PEER_PREFETCH", "4")),
    broker_connection_retry_on_startup=True,
)

device = threading.Lock()
local = threading.local()


def open_database() -> sqlite3.Connection:
    """This thread's connection, in WAL mode like Readroom's."""
    if not hasattr(local, "connection"):
        local.connection = sqlite3.connect(DATABASE, timeout=30)
        local.connection.execute("PRAGMA journal_mode=WAL")
        local.connection.execute("PRAGMA synchronous=NORMAL")
        local.connection.execute(SCHEMA)
    return local.connection


def run_model(jobs: Sequence[int]) -> list[tuple[int, str, float, float]]:
    """One forward pass on the one device; a row for each job."""
    with device:
        started = time.time()
        time.sleep(BASE_S + ITEM_S * len(jobs))
    return [(job, f"caption of {job}", started, time.time()) for job in jobs]


def write_rows(rows: list[tuple[int, str, float, float]]) -> None:
    """All rows in one transaction."""
    connection = open_database()
    with connection:
        connection.executemany(INSERT, rows)


@app.task(name="peers.caption_one")
def caption_one(job: int) -> None:
    """Plain Celery: one image a task."""
    write_rows(run_model([job]))


try:
    from celery_batches import Batches
except ImportError:  # the benchmark says so; its other rows do not need it
    Batches = None

if Batches is not None:

    @app.task(name="peers.caption_batch", base=Batches, flush_every=BATCH, flush_interval=INTERVAL_S)
    def caption_batch(requests: list[Any]) -> None:
        """celery-batches: the worker buffers messages and calls this with a list."""
        write_rows(run_model([request.args[0] for request in requests]))
