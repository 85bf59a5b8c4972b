"""How much of the model's time is left when a queue stands around it, beside plain Celery and celery-batches.

    python -m benchmarks.queue [--jobs 8000] [--rounds 3] [--json FILE] [--markdown FILE]

A fake model costs 5 ms + 0.5 ms an image. Efficiency = ideal model time at batch 64 / wall time, where wall time runs
from the start of the first forward pass to the end of the last. Every way gets the same broker (the embedded Valkey),
one worker process, one device, and writes one row an image into SQLite. The second table races `enqueue`: rows and
messages for the same jobs, against one row, one commit and one message each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

BASE_MS, ITEM_MS = 5.0, 0.5
# `pixels=0`: the files are not decoded, so that only the queue is measured.
DUMMY = f"dummy:base_ms={BASE_MS:g},item_ms={ITEM_MS:g},pixels=0"
PLAIN_SHARE = 8  # plain Celery is ten times slower: it gets an eighth of the jobs, its rate is what counts
TIME_LIMIT_S = 300.0


@dataclass(frozen=True, slots=True)
class Run:
    """One way, once. `wall_s` covers the forward passes; `ideal_s` is the model's own time at full batches."""

    way: str
    jobs: int
    wall_s: float
    ideal_s: float

    @property
    def efficiency(self) -> float:
        """Ideal model time / wall time."""
        return self.ideal_s / self.wall_s


def ideal_seconds(jobs: int, batch: int) -> float:
    """The model's own time for `jobs` images in full batches, seconds."""
    full, rest = divmod(jobs, batch)
    batches = full + (1 if rest else 0)
    return (batches * BASE_MS + jobs * ITEM_MS) / 1000


def draw_images(folder: Path, count: int) -> Path:
    """`count` tiny distinct PNG files."""
    from PIL import Image

    folder.mkdir(parents=True)
    for number in range(count):
        colour = (number % 256, number // 256 % 256, number // 65536)
        Image.new("RGB", (8, 8), colour).save(folder / f"{number:07}.png")
    return folder


def run_readroom(home: Path, images: Path, jobs: int, batch: int) -> tuple[Run, float]:
    """Enqueue, then drain with one worker process; also the enqueue rate in jobs a second."""
    environment = {
        **os.environ,
        "READROOM_HOME": str(home),
        "READROOM_BLIP_MODEL": DUMMY,
        "READROOM_MAX_BATCH": str(batch),
        "READROOM_LOG_LEVEL": "WARNING",
    }
    command = [sys.executable, "-m", "readroom.cli"]
    started = time.monotonic()
    subprocess.run([*command, "enqueue", "images", str(images), "--json"], env=environment, check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    enqueue_s = time.monotonic() - started
    subprocess.run([*command, "worker", "--drain"], env=environment, check=True, timeout=TIME_LIMIT_S)
    with sqlite3.connect(home / "readroom.sqlite3") as store:
        count, first, last = store.execute("SELECT count(*), min(started_at), max(finished_at) FROM jobs").fetchone()
    if count != jobs:
        raise SystemExit(f"{count} jobs in the store, {jobs} were enqueued")
    return Run("readroom", jobs, last - first, ideal_seconds(jobs, batch)), jobs / enqueue_s


def run_peer(folder: Path, way: str, task: str, jobs: int, batch: int, options: list[str], prefetch: int) -> Run:
    """Send one message a job, then run one worker process of a peer until every row is written."""
    from readroom.broker import start_broker, stop_broker

    folder.mkdir(parents=True)
    database = folder / "results.sqlite3"
    broker = start_broker(folder)
    environment = {**os.environ, "PEER_BROKER": broker.url, "PEER_DATABASE": str(database),
                   "PEER_BATCH": str(batch), "PEER_PREFETCH": str(prefetch)}  # fmt: skip
    script = f"from benchmarks.peers import app\nfor job in range({jobs}): app.send_task('{task}', args=(job,))"
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    command = [sys.executable, "-m", "celery", "-A", "benchmarks.peers", "worker", "--loglevel=ERROR", *options]
    worker = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_rows(database, jobs, worker)
    finally:
        worker.terminate()
        worker.wait(60)
        stop_broker(folder)
    with sqlite3.connect(database) as store:
        first, last = store.execute("SELECT min(started), max(finished) FROM results").fetchone()
    return Run(way, jobs, last - first, ideal_seconds(jobs, batch))


def wait_for_rows(database: Path, jobs: int, worker: subprocess.Popen[bytes]) -> None:
    """Wait until a peer has written all its rows."""
    deadline = time.monotonic() + TIME_LIMIT_S
    while time.monotonic() < deadline:
        if worker.poll() is not None:
            raise SystemExit(f"the peer's worker ended with status {worker.returncode}")
        try:
            with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as store:
                if store.execute("SELECT count(*) FROM results").fetchone()[0] >= jobs:
                    return
        except sqlite3.OperationalError:
            pass  # the worker has not made the table yet
        time.sleep(0.2)
    raise SystemExit(f"the peer did not finish {jobs} jobs within {TIME_LIMIT_S:.0f} s")


def list_peers(batch: int) -> dict[str, Callable[[Path, int], Run]]:
    """The peers that are installed, by name."""
    from benchmarks import peers

    plain = ["-P", "threads", "-c", "8"]
    ways: dict[str, Callable[[Path, int], Run]] = {
        "plain Celery, one image a task": lambda folder, jobs: run_peer(
            folder, "plain Celery, one image a task", "peers.caption_one", jobs // PLAIN_SHARE, batch, plain, 4
        )
    }
    if peers.Batches is not None:
        # The best of five settings tried here: 8 threads, 512 messages in hand, a long flush interval.
        options = ["-P", "threads", "-c", "8"]
        ways["celery-batches"] = lambda folder, jobs: run_peer(
            folder, "celery-batches", "peers.caption_batch", jobs, batch, options, batch
        )
    else:
        print("celery-batches is not installed: pip install --no-deps celery-batches==0.11", file=sys.stderr)
    return ways


def enqueue_in_bulk(home: Path, images: Path, jobs: int) -> float:
    """Jobs a second: rows in lists, ids in messages; files are hashed beforehand, so that only the queue is raced."""
    settings, store, app, plan, found = open_stack(home, images)
    from producer.enqueue import enqueue
    from readroom.transport import publish

    started = time.monotonic()
    enqueue(settings, store, iter(found), plan, depth=lambda: 0,
            publish=lambda kind, urgency, ids: publish(app, kind, urgency, ids, settings.ids_per_message))  # fmt: skip
    return jobs / (time.monotonic() - started)


def enqueue_one_by_one(home: Path, images: Path, jobs: int) -> float:
    """Jobs a second: the same rows through the same functions, one row, one commit, one message at a time."""
    _, store, app, plan, found = open_stack(home, images)
    from db.jobs import mark_published
    from db.submissions import add_images, open_submission
    from readroom.transport import publish

    started = time.monotonic()
    submission = open_submission(store, plan)
    for image in found:
        added = add_images(store, submission, plan, [image])
        publish(app, plan.kinds[0], plan.priority, added.queued, 1)
        mark_published(store, added.queued)
    return jobs / (time.monotonic() - started)


def open_stack(home, images):  # type: ignore[no-untyped-def]
    """Settings, store, application, plan and the found images of a fresh home."""
    from dataclasses import replace

    from db.session import open_store, store_url
    from producer.images import scan_images
    from readroom.broker import start_broker
    from readroom.intake import Intake, plan_submission
    from readroom.records import FoundImage, Priority
    from readroom.settings import load_settings
    from readroom.transport import make_celery

    settings = load_settings(home=home, blip_model=DUMMY, broker_url=None, database_url=None)
    home.mkdir(parents=True)
    store = open_store(store_url(settings))
    app = make_celery(settings, start_broker(home).url)
    plan = plan_submission(settings, store, Intake("images", images, Priority.BULK))
    found = [item for item in scan_images(images, settings) if isinstance(item, FoundImage)]
    hashed = [replace(image, ref=replace(image.ref, digest=f"{n:064x}")) for n, image in enumerate(found)]
    return settings, store, app, plan, hashed


def describe_machine() -> str:
    """Processor, cores, Python and library versions."""
    from importlib.metadata import version

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    packages = ", ".join(f"{name} {version(name)}" for name in ("celery", "kombu", "redis", "sqlalchemy"))
    return f"{processor}, {os.cpu_count()} cores, Python {platform.python_version()}, {packages}"


def race_ways(folder: Path, jobs: int, batch: int, rounds: int) -> tuple[list[Run], list[float]]:
    """Every way in every round, one after the other, so that a busy spell hits all alike."""
    from readroom.broker import stop_broker

    images = draw_images(folder / "images", jobs)
    runs, rates = [], []
    for number in range(rounds):
        home = folder / f"readroom-{number}"
        run, rate = run_readroom(home, images, jobs, batch)
        stop_broker(home)
        runs.append(run)
        rates.append(rate)
        for way, race in list_peers(batch).items():
            runs.append(race(folder / f"{way.split()[0]}-{number}", jobs))
        print(f"round {number + 1}: " + "; ".join(f"{r.way} {r.efficiency:.3f}" for r in runs[-3:]), file=sys.stderr)
    return runs, rates


def race_enqueues(folder: Path, rounds: int, jobs: int = 2000) -> list[tuple[float, float]]:
    """Pairs of jobs a second: in bulk, and one by one."""
    from readroom.broker import stop_broker

    images = draw_images(folder / "enqueue-images", jobs)
    pairs = []
    for number in range(rounds):
        homes = folder / f"bulk-{number}", folder / f"single-{number}"
        pairs.append((enqueue_in_bulk(homes[0], images, jobs), enqueue_one_by_one(homes[1], images, jobs)))
        for home in homes:
            stop_broker(home)
    return pairs


def summarise(runs: list[Run], pairs: list[tuple[float, float]], batch: int) -> dict[str, object]:
    """Medians, spreads and ratios, ready for JSON."""
    ways = list(dict.fromkeys(run.way for run in runs))
    table = {}
    for way in ways:
        values = [run.efficiency for run in runs if run.way == way]
        jobs = next(run.jobs for run in runs if run.way == way)
        table[way] = {"efficiency": statistics.median(values), "low": min(values), "high": max(values), "jobs": jobs}
    ours = table["readroom"]["efficiency"]
    ratios = {way: ours / row["efficiency"] for way, row in table.items() if way != "readroom"}
    bulk, single = (statistics.median(column) for column in zip(*pairs, strict=True))
    enqueue = {"bulk_per_s": bulk, "single_per_s": single,
               "ratio": statistics.median(a / b for a, b in pairs)}  # fmt: skip
    return {"machine": describe_machine(), "batch": batch, "ways": table, "ratios": ratios, "enqueue": enqueue,
            "runs": [asdict(run) for run in runs]}  # fmt: skip


def render_markdown(summary: dict, rounds: int) -> str:  # type: ignore[type-arg]
    """The tables of docs/benchmarks.md."""
    lines = [f"Machine: {summary['machine']}. Median of {rounds} rounds, lowest and highest in brackets.", "",
             "| way | jobs | efficiency | Readroom is |", "| --- | --- | --- | --- |"]  # fmt: skip
    for way, row in summary["ways"].items():
        ratio = f"{summary['ratios'][way]:.2f}x" if way in summary["ratios"] else ""
        spread = f"{row['efficiency']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
        lines.append(f"| {way} | {row['jobs']} | {spread} | {ratio} |")
    enqueue = summary["enqueue"]
    lines += ["", "| enqueue | jobs/s |", "| --- | --- |",
              f"| rows in lists, ids in messages | {enqueue['bulk_per_s']:,.0f} |",
              f"| one row, one commit, one message | {enqueue['single_per_s']:,.0f} |",
              f"| ratio | {enqueue['ratio']:.1f}x |"]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    """Race, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    for name in [name for name in os.environ if name.startswith("READROOM_")]:
        del os.environ[name]
    with tempfile.TemporaryDirectory() as scratch:
        pairs = race_enqueues(Path(scratch), options.rounds)
        runs, _ = race_ways(Path(scratch), options.jobs, options.batch, options.rounds)
    summary = summarise(runs, pairs, options.batch)
    if options.json:
        options.json.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(render_markdown(summary, options.rounds))


if __name__ == "__main__":
    main()
