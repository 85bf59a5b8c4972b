"""Several threads and processes on one store: nobody gets a job twice, nobody is told that it is locked."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import TypeVar

import pytest
from sqlalchemy import func, select, text, update

from db.checkpoints import CheckpointRecord, CheckpointState, add_checkpoint, list_checkpoints, set_active
from db.jobs import claim_jobs, has_work, mark_published, release_jobs, return_expired, write_outcomes
from db.session import Store, open_store
from db.submissions import add_images, count_jobs, open_submission, tally_submission
from db.tables import jobs, results, submission_jobs
from readroom.errors import StoreUnavailable
from readroom.records import JobKind, JobState, Outcome
from tests.fakes.items import add_jobs, make_images, make_plan

Answer = TypeVar("Answer")

CLAIMER = """
import sys
from db.session import open_store
from db.jobs import claim_jobs, write_outcomes
from readroom.records import Outcome
url, owner, first, last = sys.argv[1:]
store = open_store(url, create=False)
print("ready", flush=True)
input()
ids = list(range(int(first), int(last) + 1))
for start in range(0, len(ids), 16):
    claimed = claim_jobs(store, ids[start:start + 16], owner, 60)
    written = write_outcomes(store, [Outcome(one.id, one.attempt, "dummy:", text=owner) for one in claimed], owner, 3)
    assert written.succeeded == len(claimed)
    print(len(claimed), flush=True)
"""


def full_url(store: Store) -> str:
    return store._url.render_as_string(hide_password=False)


def run_together(count: int, act: Callable[[int], Answer]) -> list[Answer]:
    """Run `act` in several threads that begin at the same moment; their answers."""
    barrier = threading.Barrier(count)

    def start(number: int) -> Answer:
        barrier.wait()
        return act(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(start, range(count)))


def test_threads_that_race_for_the_same_jobs_share_them_without_overlap(store: Store) -> None:
    ids = add_jobs(store, 200)

    def claim_all(number: int) -> list[int]:
        mixed = Random(number).sample(ids, len(ids))
        parts = [mixed[start : start + 10] for start in range(0, len(ids), 10)]
        return [one.id for part in parts for one in claim_jobs(store, part, f"thread {number}", 60)]

    taken = [set(part) for part in run_together(6, claim_all)]
    assert sum(map(len, taken)) == 200
    assert set.union(*taken) == set(ids)
    with store.read() as connection:
        owners = connection.execute(select(jobs.c.lease_owner, func.count()).group_by(jobs.c.lease_owner)).all()
        assert connection.scalar(select(func.max(jobs.c.attempt))) == 1
    assert dict(map(tuple, owners)) == {f"thread {number}": len(part) for number, part in enumerate(taken) if part}


def test_processes_that_race_for_the_same_jobs_write_one_result_each(store: Store) -> None:
    ids = add_jobs(store, 400)
    pipe = subprocess.PIPE
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIMER, full_url(store), f"process {number}", str(min(ids)), str(max(ids))],
            text=True,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
        )
        for number in range(3)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    answers = []
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    for racer in racers:
        output, errors = racer.communicate(timeout=120)
        assert racer.returncode == 0, errors
        answers.append(sum(map(int, output.split())))
    assert sum(answers) == 400
    with store.read() as connection:
        assert connection.scalar(select(func.count()).select_from(results)) == 400
    assert count_jobs(store)[JobState.SUCCEEDED] == 400


def test_threads_that_read_and_write_everything_at_once_never_find_the_store_locked(store: Store) -> None:
    plan = make_plan()
    submission = open_submission(store, plan)

    def work(number: int) -> int:
        done = 0
        for turn in range(6):
            # Every second thread adds the same images as its neighbour, in the opposite order.
            images = make_images(30, start=200 * (number // 2) + 15 * turn)
            ids = add_images(store, submission, plan, images[:: 1 if number % 2 else -1]).queued
            mark_published(store, ids)
            claimed = claim_jobs(store, ids, f"thread {number}", 60)
            count_jobs(store, submission)
            release_jobs(store, [one.id for one in claimed[:2]], f"thread {number}")
            outcomes = [Outcome(one.id, one.attempt, "dummy:", text="clear") for one in claimed]
            done += write_outcomes(store, outcomes, f"thread {number}", 3).succeeded
            return_expired(store, 3)
            has_work(store, [JobKind.CAPTION])
        return done

    done = run_together(8, work)
    counts = count_jobs(store, submission)
    assert counts[JobState.SUCCEEDED] == sum(done)
    assert counts[JobState.RUNNING] == counts[JobState.FAILED] == 0
    assert sum(counts.values()) == 4 * (30 + 5 * 15)


def test_producers_of_the_same_plan_add_each_item_once(store: Store) -> None:
    def produce(number: int) -> str:
        plan = make_plan()
        submission = open_submission(store, plan)
        images = make_images(120)
        for start in range(0, 120, 40):
            add_images(store, submission, plan, images[start : start + 40])
        return submission

    submissions = set(run_together(4, produce))
    assert len(submissions) == 1
    tally = tally_submission(store, str(submissions.pop()))
    assert (tally.queued, tally.already_done, tally.images, tally.studies) == (120, 0, 120, 40)
    with store.read() as connection:
        assert connection.scalar(select(func.count()).select_from(submission_jobs)) == 120


def test_promotions_at_the_same_time_leave_exactly_one_active_checkpoint(store: Store) -> None:
    refs = [f"sha256:{number}" for number in range(4)]
    for ref in refs:
        add_checkpoint(store, CheckpointRecord(ref, "blip", "bundled", "/checkpoints"))

    def promote(number: int) -> None:
        for _ in range(5):
            set_active(store, refs[number])

    run_together(4, promote)
    assert [one.state for one in list_checkpoints(store)].count(CheckpointState.ACTIVE) == 1


def test_a_peer_that_stands_still_in_a_transaction_loses_its_locks_and_its_transaction(
    postgres_store: Store, postgres_tables: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = add_jobs(postgres_store, 4)
    monkeypatch.setattr("db.session.POSTGRES_IDLE_S", 0.5)
    frozen = open_store(postgres_tables, create=False)
    with pytest.raises(StoreUnavailable, match="lost"), frozen.begin() as connection:
        connection.execute(update(jobs).where(jobs.c.id.in_(ids[:2])).values(attempt=7))
        # It says nothing more. The claim waits for it and then finds the rows as they were, none is left out.
        claimed = claim_jobs(postgres_store, ids, "living", 60)
        connection.execute(update(jobs).values(attempt=8))
    assert [(one.id, one.attempt) for one in claimed] == [(job, 1) for job in ids]
    assert len(claim_jobs(frozen, ids, "frozen", 60)) == 0  # its next call has a connection that works
    frozen.close()


def test_a_claim_waits_for_a_locked_row_for_a_bounded_time_and_may_be_repeated(
    postgres_store: Store, postgres_tables: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = add_jobs(postgres_store, 2)
    monkeypatch.setattr("db.session.POSTGRES_LOCK_S", 0.1)
    impatient = open_store(postgres_tables, create=False)
    with postgres_store.begin() as connection:
        connection.execute(update(jobs).where(jobs.c.id == ids[0]).values(attempt=0))
        with pytest.raises(StoreUnavailable, match="a lock was not had in time"):
            claim_jobs(impatient, ids, "w", 60)
    assert len(claim_jobs(impatient, ids, "w", 60)) == 2
    impatient.close()


def test_every_session_has_its_bounds(postgres_store: Store) -> None:
    names = ("idle_in_transaction_session_timeout", "lock_timeout", "tcp_keepalives_idle")
    with postgres_store.read() as connection:
        values = [connection.scalar(text(f"SHOW {name}")) for name in names]
        connection.rollback()
        assert [connection.scalar(text(f"SHOW {name}")) for name in names] == values == ["1min", "30s", "30"]


def test_a_store_goes_on_working_in_a_forked_child(store: Store) -> None:
    ids = add_jobs(store, 20)
    child = os.fork()
    if child == 0:
        claimed = claim_jobs(store, ids[:10], "child", 60)
        os._exit(0 if len(claimed) == 10 else 1)
    taken = claim_jobs(store, ids[10:], "parent", 60)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(taken) == 10
    assert count_jobs(store)[JobState.RUNNING] == 20
