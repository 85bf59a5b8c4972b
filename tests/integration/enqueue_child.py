"""A producer process for tests: enqueues a folder, prints a line per event, says its peak memory at the end.

    python -m tests.integration.enqueue_child KIND FOLDER HOME

Event lines are `event number`; the last line is JSON with the counts and the peak resident set size in kB. After each
published list it prints `published n` and waits for a line on standard input while READROOM_TEST_STEP is set.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

from db.session import open_store, store_url
from db.submissions import PlannedCaptioner, SubmissionPlan
from producer import enqueue
from producer.coco import read_coco
from producer.pacs import scan_export
from readroom.records import GenerationSettings, JobKind, Priority
from readroom.settings import load_settings


def say(event: str, number: int) -> None:
    print(event, number, flush=True)


def publish(kind: JobKind, priority: Priority, ids: list[int]) -> int:
    say("published", len(ids))
    if os.environ.get("READROOM_TEST_STEP"):
        sys.stdin.readline()
    return 1


def read_peak() -> int:
    """Peak resident set size, kB. Not getrusage's: that one starts with the size of the process that started us."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(status.read_text().split("VmHWM:")[1].split()[0])


def main(kind: str, folder: str, home: str) -> None:
    settings = load_settings(home=Path(home))
    enqueue.LIST_IMAGES = int(os.environ.get("READROOM_TEST_LIST", enqueue.LIST_IMAGES))
    store = open_store(store_url(settings))
    found = scan_export(Path(folder), settings) if kind == "pacs" else read_coco(Path(folder), settings)
    captioners = (PlannedCaptioner("blip", "dummy", GenerationSettings()),)
    plan = SubmissionPlan(kind, folder, Priority.BULK, captioners, (JobKind.CAPTION,))
    counts = enqueue.enqueue(settings, store, found, plan, publish, lambda: 0, say)
    numbers = {name: getattr(counts, name) for name in ("submission", "found", "queued", "already_done", "images")}
    print(json.dumps(numbers | {"skipped": len(counts.skipped), "peak_kb": read_peak()}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
