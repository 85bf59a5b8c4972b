"""Real processes, real signals: whatever dies, every job ends final, with exactly one result, and none is lost."""

from __future__ import annotations

import os
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from db.tables import jobs, results
from readroom import broker
from readroom.records import Reason
from readroom.transport import redis_client
from tests.fakes.plant import Plant, wait_until
from tests.postgres import PostgresServer
from worker.batcher import SUSPECT_GROUP
from worker.lifecycle import ExitCode

pytestmark = pytest.mark.crash

StartPlant = Callable[..., Plant]
LIMIT_S = 200.0


@pytest.fixture
def start_plant(tmp_path: Path) -> Iterator[StartPlant]:
    plants: list[Plant] = []

    def start(home: Path | None = None, **options: Any) -> Plant:
        plants.append(Plant(home or tmp_path / f"home{len(plants)}", **options))
        return plants[-1]

    yield start
    for plant in plants:
        plant.close()


def assert_none_lost(plant: Plant, ids: list[int], failed: Counter[str] | None = None) -> None:
    """Each job is final; the succeeded ones have exactly one result, their own; the failed ones failed as expected."""
    rows = plant.fetch_jobs(ids)
    expected = failed or Counter()
    assert len(rows) == len(ids)
    assert Counter(row.reason for row in rows if row.state == "failed") == expected
    assert sum(row.state == "succeeded" for row in rows) == len(ids) - expected.total()
    with plant.store.read() as connection:
        written = connection.execute(select(results.c.id, results.c.text)).all()
        owned = connection.execute(
            select(jobs.c.id, results.c.text).join_from(jobs, results, jobs.c.result_id == results.c.id)
        ).all()
    assert len(written) == len(owned) == sum(row.state == "succeeded" for row in rows)
    numbers = plant.read_numbers()
    assert all(text == f"pixel {numbers[job_id] % 256}" for job_id, text in owned)


def kill_broker(plant: Plant) -> None:
    """SIGKILL the embedded Valkey, then start it again on its port with what its file holds."""
    handle = broker.find_broker(plant.home)
    assert handle is not None
    os.kill(handle.pid, signal.SIGKILL)
    assert broker.start_broker(plant.home).port == handle.port


def test_two_thousand_jobs_survive_ten_kills_of_the_worker_two_of_valkey_and_a_flush(start_plant: StartPlant) -> None:
    plant = start_plant(concurrency=8, max_batch=16, ids_per_message=8)
    ids = plant.enqueue(range(1, 2_001))
    worker = plant.start_worker(trouble="slow:0.02", restarts=True)
    # One act whenever this many more jobs are done: twelve kills of the worker, two of Valkey, one flush.
    acts = ["worker"] * 3 + ["valkey"] + ["worker"] * 3 + ["flush"] + ["worker"] * 3 + ["valkey"] + ["worker"] * 3
    done = 0
    for act in acts:
        done = max(done + 60, plant.count("succeeded", "failed") + 16)
        plant.wait_final(done, LIMIT_S)
        if act == "worker":
            # A kill that hits a full batch does the most damage. Hitting the same job three times, while it runs apart
            # as a suspect, would make it a dead letter by rule: nobody could tell it from one that kills.
            plant.wait_running(SUSPECT_GROUP + 1)
            worker.kill()
        elif act == "valkey":
            kill_broker(plant)
        else:
            redis_client(plant.app).flushall()
    plant.wait_final(2_000, LIMIT_S)

    assert worker.statuses.count(-signal.SIGKILL) == 12
    assert_none_lost(plant, ids)


def test_an_image_that_kills_the_process_is_found_after_three_kills_and_takes_nobody_along(
    start_plant: StartPlant,
) -> None:
    plant = start_plant(lease_s=1.0)
    ids = plant.enqueue(range(1, 201))
    worker = plant.start_worker(trouble="kill:77", restarts=True)
    plant.wait_final(200, LIMIT_S)

    assert Counter(worker.statuses) == {139: plant.settings.max_attempts}
    assert_none_lost(plant, ids, Counter({Reason.WORKER_LOST: 1}))
    assert plant.fetch_jobs([ids[76]])[0].state == "failed"


def test_two_images_that_kill_the_process_are_both_found(start_plant: StartPlant) -> None:
    # 77 and 333 both draw a picture of pixel 77: in one batch, in two, or one after the other.
    plant = start_plant(lease_s=1.0)
    ids = plant.enqueue(range(70, 120)) + plant.enqueue(range(330, 340))
    worker = plant.start_worker(trouble="kill:77", restarts=True)
    plant.wait_final(60, LIMIT_S)

    assert 139 in worker.statuses
    assert_none_lost(plant, ids, Counter({Reason.WORKER_LOST: 2}))


def test_two_workers_killed_in_turn_lose_nothing_and_write_nothing_twice(start_plant: StartPlant) -> None:
    plant = start_plant(lease_s=1.0)
    ids = plant.enqueue(range(1, 401))
    workers = [plant.start_worker(trouble="slow:0.05", restarts=True) for _ in range(2)]
    for number in range(4):
        plant.wait_final(60 * (number + 1), LIMIT_S)
        workers[number % 2].kill()
    plant.wait_final(400, LIMIT_S)

    assert_none_lost(plant, ids)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB."""
    if os.geteuid() != 0 and "CI" not in os.environ:
        pytest.skip("only root can mount a small disk")
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_under_sqlite_holds_the_work_up_and_loses_nothing(
    start_plant: StartPlant, small_disk: Path, tmp_path: Path
) -> None:
    store_url = f"sqlite:///{small_disk / 'readroom.sqlite3'}"
    plant = start_plant(tmp_path / "home", database_url=store_url, lease_s=1.0)
    ids = plant.enqueue(range(1, 301))
    worker = plant.start_worker(trouble="slow:0.02", restarts=True)
    plant.wait_final(50)

    filler = small_disk / "filler"
    fill_disk(filler)
    wait_until(lambda: "disk is full" in worker.log, "the worker's complaint")
    filler.unlink()
    plant.wait_final(300, LIMIT_S)

    assert worker.statuses == []
    assert_none_lost(plant, ids)


def fill_disk(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (65_536, 4_096, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue


def test_a_restart_of_postgresql_is_waited_out(start_plant: StartPlant) -> None:
    server = PostgresServer()
    try:
        server.start()
        plant = start_plant(database_url=server.create_database(), lease_s=2.0)
        ids = plant.enqueue(range(1, 401))
        worker = plant.start_worker(trouble="slow:0.05", restarts=True)
        for mode in ("fast", "immediate"):
            plant.wait_final(plant.count("succeeded") + 50)
            complaints = worker.log.count("trying again")
            server.stop(mode)
            wait_until(lambda seen=complaints: worker.log.count("trying again") > seen, "the worker's complaint")
            server.start()
        plant.wait_final(400, LIMIT_S)

        assert worker.statuses == []
        assert_none_lost(plant, ids)
        plant.close()
    finally:
        server.remove()


def test_a_worker_goes_on_by_itself_when_valkey_was_away(start_plant: StartPlant) -> None:
    plant = start_plant()
    ids = plant.enqueue(range(1, 101))
    worker = plant.start_worker(trouble="slow:0.02", restarts=True)
    plant.wait_final(20)
    broker.stop_broker(plant.home)
    wait_until(lambda: "Trying" in worker.log or "consumer: Cannot connect" in worker.log, "the lost connection")
    broker.start_broker(plant.home)
    plant.wait_final(100, LIMIT_S)

    worker.send(signal.SIGTERM)
    assert_none_lost(plant, ids)


def test_drained_workers_that_are_killed_end_in_the_end(start_plant: StartPlant) -> None:
    plant = start_plant(lease_s=1.0)
    ids = plant.enqueue(range(1, 101))
    first = plant.start_worker(trouble="slow:0.05", drain=True)
    plant.wait_running()
    first.kill()
    second = plant.start_worker(drain=True)

    assert second.wait() == ExitCode.STOPPED
    assert_none_lost(plant, ids)
