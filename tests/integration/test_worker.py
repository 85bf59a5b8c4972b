"""The real worker program: a process, a broker, a store."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from db.jobs import claim_jobs, mark_published
from readroom.errors import StoreUnavailable
from readroom.records import Priority, Reason
from readroom.transport import queue_depths, redis_client, task_name
from tests.fakes.plant import Plant, wait_until
from tests.fakes.queue import read_payloads
from worker.lifecycle import ExitCode
from worker.rescue import Repair, Rescuer

StartPlant = Callable[..., Plant]


@pytest.fixture
def start_plant(tmp_path: Path) -> Iterator[StartPlant]:
    plants: list[Plant] = []

    def start(**options: Any) -> Plant:
        plants.append(Plant(tmp_path / f"home{len(plants)}", **options))
        return plants[-1]

    yield start
    for plant in plants:
        plant.close()


@pytest.fixture
def plant(start_plant: StartPlant) -> Plant:
    return start_plant()


def count_messages(plant: Plant) -> int:
    return sum(queue_depths(plant.app).values()) + int(redis_client(plant.app).hlen("unacked"))


def hold_batches(plant: Plant) -> tuple[str, Path, Path]:
    """Trouble that holds each batch until the second path exists; the third appears when one is held."""
    gate = plant.home / "gate.open"
    return f"hold:{gate}", gate, gate.with_suffix(".held")


# --- the way of a job -----------------------------------------------------------------------------------------------


def test_a_drained_worker_leaves_a_result_for_each_job_and_no_message(plant: Plant) -> None:
    ids = plant.enqueue(range(1, 101))
    worker = plant.start_worker(drain=True)

    assert worker.wait() == ExitCode.STOPPED
    assert plant.states() == {"succeeded": 100}
    assert plant.count_results() == 100
    assert {row.attempt for row in plant.fetch_jobs(ids)} == {1}
    assert count_messages(plant) == 0


def test_messages_given_out_again_make_no_second_result(plant: Plant) -> None:
    ids = plant.add_rows(range(1, 201))
    for _ in range(3):
        plant.publish(ids)
    workers = [plant.start_worker(trouble="slow:0.01", drain=True) for _ in range(2)]

    assert [worker.wait() for worker in workers] == [ExitCode.STOPPED] * 2
    assert plant.states() == {"succeeded": 200}
    assert plant.count_results() == 200
    assert {row.attempt for row in plant.fetch_jobs(ids)} == {1}


def test_stat_is_done_long_before_a_bulk_backlog(start_plant: StartPlant) -> None:
    plant = start_plant(concurrency=4, max_batch=8)
    plant.enqueue(range(1, 1_001))
    plant.start_worker(trouble="slow:0.05")
    plant.wait_running()

    done_before = plant.count("succeeded")
    (stat,) = plant.enqueue(range(5_000, 5_001), Priority.STAT)
    wait_until(lambda: plant.fetch_jobs([stat])[0].state == "succeeded", "the stat job")

    # In hand were 4 messages of 4 jobs and two batches of 8; one bulk turn may come first.
    assert plant.count("succeeded") - done_before < 100


def test_a_message_of_another_version_fails_alone_and_stays_out_of_the_log(plant: Plant) -> None:
    odd = {"v": 99, "kind": "caption", "jobs": [1], "patient": "Doe^Jane"}
    plant.app.send_task(task_name("caption"), args=(odd,), queue="caption.stat", argsrepr="?")
    plant.enqueue(range(1, 5))
    worker = plant.start_worker(drain=True)

    assert worker.wait() == ExitCode.STOPPED
    assert plant.states() == {"succeeded": 4}
    assert "another format or version" in worker.log
    assert "Doe" not in worker.log


def test_a_picture_the_model_fails_on_is_named_and_the_others_pass(plant: Plant) -> None:
    ids = plant.enqueue(range(1, 65))
    worker = plant.start_worker(trouble="fail:42", drain=True)

    assert worker.wait() == ExitCode.STOPPED
    (failed,) = [row for row in plant.fetch_jobs(ids) if row.state != "succeeded"]
    assert (failed.id, failed.reason, failed.detail) == (ids[41], Reason.MODEL_FAILED, "ZeroDivisionError")


def test_a_file_that_is_gone_or_changed_fails_with_its_reason(plant: Plant) -> None:
    ids = plant.enqueue(range(1, 11))
    (plant.home / "items" / "3.txt").unlink()
    (plant.home / "items" / "5.txt").write_text("55")

    assert plant.start_worker(drain=True).wait() == ExitCode.STOPPED
    rows = plant.fetch_jobs(ids)
    assert (rows[2].reason, rows[4].reason) == (Reason.MISSING, Reason.CHANGED)
    assert [row.attempt for row in rows] == [1, 1, plant.settings.max_attempts, *[1] * 7]
    assert plant.states() == {"succeeded": 8, "failed": 2}


def test_a_file_that_comes_back_in_time_loses_nothing(start_plant: StartPlant) -> None:
    plant = start_plant(rescue_interval_s=0.5)
    ids = plant.enqueue(range(1, 11))
    item = plant.home / "items" / "3.txt"
    item.rename(item.with_suffix(".away"))
    plant.start_worker()
    wait_until(lambda: plant.fetch_jobs(ids)[2].reason == Reason.MISSING, "the first attempt")
    item.with_suffix(".away").rename(item)
    plant.wait_final(10)

    assert plant.states() == {"succeeded": 10}


# --- ends -----------------------------------------------------------------------------------------------------------


def test_sigterm_finishes_the_batch_in_hand_and_gives_back_the_rest_at_once(start_plant: StartPlant) -> None:
    plant = start_plant(lease_s=600.0, batch_wait_ms=10_000.0, rescue_interval_s=600.0)
    ids = plant.enqueue(range(1, 101))
    trouble, gate, held = hold_batches(plant)
    worker = plant.start_worker(trouble)
    wait_until(held.exists, "a batch in the forward pass")
    plant.wait_running(32)

    worker.send(signal.SIGTERM)
    # While the batch is still held: everything else is queued again, in rows and in messages.
    wait_until(lambda: plant.count("running") == 16, "the release of the batch that was ready")
    wait_until(lambda: sum(queue_depths(plant.app).values()) >= 21, "the return of the messages")
    gate.touch()

    assert worker.wait() == ExitCode.STOPPED
    assert plant.states() == {"succeeded": 16, "queued": 84}
    assert plant.start_worker(drain=True).wait() == ExitCode.STOPPED
    assert plant.states() == {"succeeded": 100}
    assert {row.attempt for row in plant.fetch_jobs(ids)} == {1}


def test_a_second_signal_ends_quickly_and_costs_only_the_batch_in_hand_an_attempt(start_plant: StartPlant) -> None:
    plant = start_plant(lease_s=600.0, batch_wait_ms=10_000.0)
    plant.enqueue(range(1, 101))
    trouble, _, held = hold_batches(plant)
    worker = plant.start_worker(trouble)
    wait_until(held.exists, "a batch in the forward pass")

    worker.send(signal.SIGTERM)
    wait_until(lambda: "stopping" in worker.log, "the stop")
    worker.send(signal.SIGINT)

    assert worker.wait() == ExitCode.QUICK
    assert plant.states() == {"running": 16, "queued": 84}


def test_a_forward_pass_that_hangs_ends_the_process_and_its_culprit_is_found(start_plant: StartPlant) -> None:
    plant = start_plant(batch_deadline_s=0.5, lease_s=1.0)
    ids = plant.enqueue(range(1, 41))
    worker = plant.start_worker(trouble="hang:7", restarts=True)
    plant.wait_final(40)

    assert set(worker.statuses) == {ExitCode.HUNG}
    assert len(worker.statuses) == plant.settings.max_attempts
    (failed,) = [row for row in plant.fetch_jobs(ids) if row.state == "failed"]
    assert (failed.id, failed.reason) == (ids[6], Reason.WORKER_LOST)


def test_a_lost_device_ends_the_process_for_its_supervisor(plant: Plant) -> None:
    plant.enqueue(range(1, 41))
    worker = plant.start_worker(trouble="break:7", restarts=True)
    plant.wait_final(40)

    assert set(worker.statuses) == {ExitCode.DEVICE}
    assert plant.states() == {"succeeded": 39, "failed": 1}


def test_an_error_in_celerys_consumer_ends_the_process_for_its_supervisor(plant: Plant) -> None:
    plant.enqueue(range(1, 101))
    worker = plant.start_worker(trouble="consumer:7")

    assert worker.wait() == ExitCode.BROKER
    assert plant.count("running") == 0
    assert plant.start_worker(drain=True).wait() == ExitCode.STOPPED
    assert plant.states() == {"succeeded": 100}


def test_a_file_that_never_comes_ends_the_process_and_is_found(start_plant: StartPlant) -> None:
    plant = start_plant(batch_deadline_s=0.5, lease_s=1.0)
    ids = plant.enqueue(range(1, 21))
    worker = plant.start_worker(trouble="read:7", restarts=True)
    plant.wait_final(20)

    assert set(worker.statuses) == {ExitCode.HUNG}
    assert len(worker.statuses) == plant.settings.max_attempts
    (failed,) = [row for row in plant.fetch_jobs(ids) if row.state == "failed"]
    assert (failed.id, failed.reason) == (ids[6], Reason.WORKER_LOST)


def test_a_model_that_never_gets_warm_ends_the_process_and_costs_no_attempt(start_plant: StartPlant) -> None:
    plant = start_plant(batch_deadline_s=0.5)
    ids = plant.enqueue(range(1, 5))
    worker = plant.start_worker(trouble="warm")

    assert worker.wait() == ExitCode.HUNG
    assert {(row.state, row.attempt) for row in plant.fetch_jobs(ids)} == {("queued", 0)}


def test_a_worker_that_is_connected_but_takes_nothing_ends_for_its_supervisor(start_plant: StartPlant) -> None:
    plant = start_plant(stall_s=1.0)
    worker = plant.start_worker()
    worker.wait_ready()
    wait_until(lambda: plant.app.control.ping(timeout=0.5), "the worker's answer")
    for priority in Priority:
        plant.app.control.cancel_consumer(f"caption.{priority}", reply=True)

    plant.enqueue(range(1, 5))

    assert worker.wait() == ExitCode.STALLED
    assert plant.states() == {"queued": 4}


def test_an_idle_worker_is_not_taken_for_stalled_when_work_comes_late(start_plant: StartPlant) -> None:
    plant = start_plant(stall_s=0.4)
    worker = plant.start_worker()
    worker.wait_ready()
    for number in range(1, 6):
        plant.enqueue(range(number, number + 1))
        plant.wait_final(number)

    worker.send(signal.SIGTERM)
    assert worker.wait() == ExitCode.STOPPED


def test_a_worker_does_not_name_its_machine(plant: Plant) -> None:
    worker = plant.start_worker()
    worker.wait_ready()
    wait_until(lambda: plant.app.control.ping(timeout=0.5), "the worker's answer")
    (name,) = plant.app.control.ping(timeout=1.0)[0]

    assert name.startswith("readroom-") and name.endswith("@localhost")
    password = plant.url.split(":")[2].split("@")[0]
    assert password not in str(plant.app.control.inspect(timeout=1.0).conf()) + worker.log


# --- gaps -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def rescuer(plant: Plant) -> Rescuer:
    plant.settings = plant.settings.model_copy(update={"publish_grace_s": 0.0, "max_queue_depth": 5})
    return Rescuer(plant.store, plant.app, ("caption",), plant.settings)


def list_published(plant: Plant, queue: str = "caption.bulk") -> list[int]:
    return sorted(job_id for payload in read_payloads(plant.app, queue) for job_id in payload["jobs"])


def test_rows_that_were_never_published_are_published_on_their_queue(plant: Plant, rescuer: Rescuer) -> None:
    bulk = plant.add_rows(range(1, 6))
    stat = plant.add_rows(range(6, 8), Priority.STAT)

    assert rescuer.run_once() == Repair(published=7)
    assert list_published(plant) == bulk
    assert list_published(plant, "caption.stat") == stat
    assert rescuer.run_once() == Repair()


def test_lost_messages_are_published_again_when_their_queue_is_empty(plant: Plant, rescuer: Rescuer) -> None:
    lost = plant.enqueue(range(1, 5), Priority.STAT)
    rescuer.run_once()
    redis_client(plant.app).delete("caption.stat")
    plant.enqueue(range(5, 9))

    assert rescuer.run_once() == Repair(forgotten=4, published=4)
    assert list_published(plant, "caption.stat") == lost


def test_messages_that_wait_on_their_queue_are_not_published_again(plant: Plant, rescuer: Rescuer) -> None:
    rescuer.run_once()
    ids = plant.enqueue(range(1, 9))

    assert rescuer.run_once() == Repair()
    assert list_published(plant) == ids


def test_lost_messages_are_published_again_while_their_queue_holds_younger_ones(plant: Plant, rescuer: Rescuer) -> None:
    rescuer.run_once()
    lost = plant.enqueue(range(1, 9))
    redis_client(plant.app).delete("caption.bulk")
    younger = plant.enqueue(range(9, 13))
    odd = ["{", "[]", '{"body": 1}', '{"body": "e30="}', "\udcff"]
    redis_client(plant.app).rpush("caption.bulk", *(text.encode(errors="surrogateescape") for text in odd))

    assert rescuer.run_once() == Repair(forgotten=8, published=8)
    redis_client(plant.app).rpop("caption.bulk", len(odd))
    assert list_published(plant) == lost + younger


def test_a_message_given_back_does_not_make_those_behind_it_look_lost(plant: Plant, rescuer: Rescuer) -> None:
    rescuer.run_once()
    returned, behind = plant.enqueue(range(1, 5)), plant.enqueue(range(5, 9))
    mark_published(plant.store, returned)  # published anew while the old message came back to the head

    assert rescuer.run_once() == Repair()
    assert list_published(plant) == returned + behind


@pytest.mark.parametrize("since", ["nothing", "one message more"])
def test_an_emptied_redis_is_filled_again_at_once(plant: Plant, since: str) -> None:
    rescuer = Rescuer(plant.store, plant.app, ("caption",), plant.settings.model_copy(update={"publish_grace_s": 600}))
    rescuer.run_once()
    ids = plant.enqueue(range(1, 9))
    redis_client(plant.app).flushall()
    if since == "one message more":
        ids += plant.enqueue(range(9, 10))

    rounds = [rescuer.run_once()]
    # Fresh rows are left to their producer for a moment, which may be over in the first round or in a later one.
    wait_until(
        lambda: rounds.append(rescuer.run_once()) or sum(one.published for one in rounds) >= len(ids), "the messages"
    )

    assert rounds[0].forgotten == len(ids)
    assert set(list_published(plant)) == set(ids)


def test_an_emptied_redis_is_seen_again_when_the_repair_was_cut_short(
    plant: Plant, rescuer: Rescuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant.enqueue(range(1, 9))
    redis_client(plant.app).flushall()
    with monkeypatch.context() as patch, pytest.raises(StoreUnavailable):
        patch.setattr("worker.rescue.forget_published", raise_unavailable)
        rescuer.run_once()

    assert rescuer.run_once() == Repair(forgotten=8, published=8)


def raise_unavailable(*_arguments: Any) -> int:
    raise StoreUnavailable("away")


def test_a_job_whose_lease_ended_is_queued_again_or_failed(plant: Plant, rescuer: Rescuer) -> None:
    ids = plant.add_rows(range(1, 3))
    for attempt in range(1, plant.settings.max_attempts + 1):
        claim_jobs(plant.store, ids[: 1 if attempt > 1 else 2], "a dead worker", -1.0)
        repair = rescuer.run_once()
        is_last = attempt == plant.settings.max_attempts
        assert (repair.returned, repair.failed) == ((0, 1) if is_last else (2 if attempt == 1 else 1, 0))

    assert [row.state for row in plant.fetch_jobs(ids)] == ["failed", "queued"]


def test_rescue_fills_a_queue_as_far_as_producers_do_and_a_little_in_any_case(
    plant: Plant, rescuer: Rescuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.rescue.LEAST_ROOM", 3)
    plant.add_rows(range(1, 101))

    assert rescuer.run_once().published == 5 * plant.settings.ids_per_message
    assert rescuer.run_once().published == 3


def test_a_bulk_backlog_does_not_keep_stat_from_being_published(plant: Plant, rescuer: Rescuer) -> None:
    rescuer.run_once()
    plant.enqueue(range(1, 101))
    stat = plant.add_rows(range(200, 210), Priority.STAT)

    assert rescuer.run_once() == Repair(published=10)
    assert list_published(plant, "caption.stat") == stat


def test_two_rescuers_at_once_do_not_publish_side_by_side(plant: Plant, rescuer: Rescuer) -> None:
    plant.add_rows(range(1, 5))
    other = Rescuer(plant.store, plant.app, ("caption",), plant.settings)

    with other._take_turn() as is_mine:
        assert is_mine
        assert rescuer.run_once() == Repair()
    assert rescuer.run_once() == Repair(published=4)


@pytest.mark.parametrize("gap", ["never published", "message lost", "redis emptied", "worker killed"])
def test_a_running_worker_closes_each_gap_by_itself(plant: Plant, gap: str) -> None:
    ids = plant.add_rows(range(1, 41))
    if gap != "never published":
        plant.publish(ids)
    if gap == "message lost":
        redis_client(plant.app).ltrim("caption.bulk", 2, -1)
    if gap == "redis emptied":
        redis_client(plant.app).flushall()
    if gap == "worker killed":
        claim_jobs(plant.store, ids[:8], "a worker that was killed", 1.0)
    worker = plant.start_worker(drain=True)

    assert worker.wait() == ExitCode.STOPPED
    assert plant.states() == {"succeeded": 40}
    assert plant.count_results() == 40
