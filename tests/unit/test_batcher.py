from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from readroom.errors import StoreError, StoreUnavailable
from readroom.records import Priority
from tests.fakes.handler import FakeHandler, FakeRow, make_rows
from worker import batcher as batcher_module
from worker.batcher import Batcher, BatchLimits, Ending, Ticket

WAIT_S = 20.0
LONG_S = 600.0  # a batch timer that must never be waited for in these tests


@contextmanager
def run_batcher(
    handler: FakeHandler, max_batch: int = 4, batch_wait_s: float = 0.01, capacity: int = 64
) -> Iterator[Batcher]:
    failures: list[tuple[str, BaseException]] = []
    batcher = Batcher(handler, BatchLimits(max_batch, batch_wait_s, capacity), lambda *what: failures.append(what))
    batcher.failures = failures  # type: ignore[attr-defined]
    batcher.start()
    try:
        yield batcher
    finally:
        handler.gate.set()
        batcher.close(WAIT_S)


def end_all(tickets: list[Ticket]) -> list[Ending | None]:
    return [ticket.wait(WAIT_S) for ticket in tickets]


def fail_step(step: str, error: Exception, times: int = 1) -> Callable[[str, list[int]], None]:
    left = [times]

    def trouble(name: str, jobs: list[int]) -> None:
        if name == step and left[0] > 0:
            left[0] -= 1
            raise error

    return trouble


def test_a_batch_forms_across_messages() -> None:
    handler = FakeHandler(make_rows(1, 2, 3, 4))
    with run_batcher(handler, batch_wait_s=LONG_S) as batcher:
        tickets = [batcher.submit([job_id], Priority.BULK) for job_id in (1, 2, 3, 4)]

        assert end_all(tickets) == [Ending.DONE] * 4
    assert handler.batches == [[1, 2, 3, 4]]


def test_a_batch_does_not_wait_longer_than_its_timer() -> None:
    handler = FakeHandler(make_rows(1))
    with run_batcher(handler, batch_wait_s=0.01) as batcher:
        assert batcher.submit([1], Priority.BULK).wait(WAIT_S) is Ending.DONE


def test_a_batch_does_not_wait_when_no_further_message_can_come() -> None:
    handler = FakeHandler(make_rows(1, 2))
    with run_batcher(handler, max_batch=64, batch_wait_s=LONG_S, capacity=2) as batcher:
        tickets = [batcher.submit([1], Priority.BULK), batcher.submit([2], Priority.BULK)]

        assert end_all(tickets) == [Ending.DONE] * 2


def test_a_message_larger_than_a_batch_is_cut() -> None:
    handler = FakeHandler(make_rows(*range(1, 11)))
    with run_batcher(handler) as batcher:
        assert batcher.submit(list(range(1, 11)), Priority.BULK).wait(WAIT_S) is Ending.DONE
    assert [len(batch) for batch in handler.batches] == [4, 4, 2]


def test_an_empty_message_is_done_at_once() -> None:
    with run_batcher(FakeHandler()) as batcher:
        assert batcher.submit([], Priority.BULK).wait(0) is Ending.DONE
        assert batcher.wait_idle(0)


def test_a_late_duplicate_is_done_without_running_again() -> None:
    handler = FakeHandler(make_rows(1))
    with run_batcher(handler) as batcher:
        assert batcher.submit([1], Priority.BULK).wait(WAIT_S) is Ending.DONE
        assert batcher.submit([1], Priority.BULK).wait(WAIT_S) is Ending.DONE
    assert handler.batches == [[1]]


def test_a_duplicate_of_a_job_in_hand_does_not_end_the_first_message() -> None:
    handler = FakeHandler(make_rows(1))
    handler.gate.clear()
    with run_batcher(handler) as batcher:
        first = batcher.submit([1], Priority.BULK)
        assert handler.entered.wait(WAIT_S)

        assert batcher.submit([1], Priority.BULK).wait(WAIT_S) is Ending.DONE
        assert not first.is_over
        assert batcher.jobs_in_hand() == [1]

        handler.gate.set()
        assert first.wait(WAIT_S) is Ending.DONE


def test_the_same_job_twice_in_one_batch_runs_once() -> None:
    handler = FakeHandler(make_rows(1, 2))
    with run_batcher(handler, batch_wait_s=LONG_S) as batcher:
        tickets = [batcher.submit([1, 2], Priority.BULK), batcher.submit([1, 2], Priority.STAT)]

        assert end_all(tickets) == [Ending.DONE] * 2
    assert handler.batches == [[1, 2]]


def test_the_next_batch_is_decoded_while_the_forward_pass_runs() -> None:
    handler = FakeHandler(make_rows(1, 2))
    handler.gate.clear()
    prepared = threading.Event()
    handler.trouble = lambda step, jobs: prepared.set() if (step, jobs) == ("prepare", [2]) else None
    with run_batcher(handler, max_batch=1) as batcher:
        tickets = [batcher.submit([1], Priority.BULK), batcher.submit([2], Priority.BULK)]

        assert prepared.wait(WAIT_S) and handler.entered.wait(WAIT_S)
        assert handler.batches == [[1]]

        handler.gate.set()
        assert end_all(tickets) == [Ending.DONE] * 2


def test_no_more_than_two_batches_are_claimed_ahead() -> None:
    handler = FakeHandler(make_rows(*range(1, 7)))
    handler.gate.clear()
    prepared = threading.Event()
    handler.trouble = lambda step, jobs: prepared.set() if (step, jobs) == ("prepare", [2]) else None
    with run_batcher(handler, max_batch=1) as batcher:
        tickets = [batcher.submit([job_id], Priority.BULK) for job_id in range(1, 7)]
        assert prepared.wait(WAIT_S)

        assert batcher.jobs_in_hand() == [1, 2]

        handler.gate.set()
        assert end_all(tickets) == [Ending.DONE] * 6


def test_stat_goes_first_within_what_is_buffered() -> None:
    handler = FakeHandler(make_rows(*range(1, 9)))
    handler.gate.clear()
    with run_batcher(handler, max_batch=1) as batcher:
        tickets = [batcher.submit([1], Priority.BULK)]
        assert handler.entered.wait(WAIT_S)
        tickets += [batcher.submit([job_id], Priority.BULK) for job_id in (2, 3, 4)]
        tickets += [batcher.submit([5], Priority.ROUTINE), batcher.submit([6], Priority.STAT)]

        handler.gate.set()
        assert end_all(tickets) == [Ending.DONE] * 6
    order = [jobs[0] for jobs in handler.batches]
    # Job 2 may have been claimed ahead already; everything else stands by urgency, then by arrival.
    assert [job for job in order if job not in (1, 2)] == [6, 5, 3, 4]


def test_who_waited_long_goes_with_stat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batcher_module, "AGE_FLOOR_S", 0.0)
    handler = FakeHandler(make_rows(*range(1, 6)))
    handler.gate.clear()
    with run_batcher(handler, max_batch=1) as batcher:
        tickets = [batcher.submit([job_id], Priority.BULK) for job_id in (1, 2, 3, 4)]
        assert handler.entered.wait(WAIT_S)
        tickets.append(batcher.submit([5], Priority.STAT))

        handler.gate.set()
        assert end_all(tickets) == [Ending.DONE] * 5
    assert handler.batches == [[1], [2], [3], [4], [5]]


def test_different_checkpoints_never_share_a_batch() -> None:
    handler = FakeHandler(make_rows(1, 3, checkpoint="a") | make_rows(2, 4, checkpoint="b"))
    with run_batcher(handler, batch_wait_s=LONG_S, capacity=1) as batcher:
        assert batcher.submit([1, 2, 3, 4], Priority.BULK).wait(WAIT_S) is Ending.DONE
    assert handler.batches == [[1, 3], [2, 4]]


def make_mixed(count: int, *checkpoints: str) -> dict[int, FakeRow]:
    """Rows whose checkpoints take turns."""
    return {number: FakeRow(checkpoint=checkpoints[number % len(checkpoints)]) for number in range(count)}


def test_mixed_messages_of_several_checkpoints_make_full_batches() -> None:
    handler = FakeHandler(make_mixed(48, "a", "b", "a"))  # twice as many of one as of the other
    with run_batcher(handler, max_batch=8, batch_wait_s=LONG_S, capacity=12) as batcher:
        tickets = [batcher.submit(range(first, first + 4), Priority.BULK) for first in range(0, 48, 4)]

        assert end_all(tickets) == [Ending.DONE] * 12
    assert {len(batch) for batch in handler.batches} == {8}
    assert {len({handler.rows[job].checkpoint for job in batch}) for batch in handler.batches} == {1}


def test_a_full_batch_does_not_wait_for_a_few_jobs_of_another_checkpoint() -> None:
    handler = FakeHandler(make_rows(1, checkpoint="a") | make_rows(2, 3, 4, checkpoint="b"))
    with run_batcher(handler, max_batch=3, batch_wait_s=LONG_S, capacity=3) as batcher:
        first = batcher.submit([1], Priority.BULK)
        assert batcher.submit([2, 3, 4], Priority.BULK).wait(WAIT_S) is Ending.DONE
        assert not first.is_over

        handler.rows |= make_rows(5, checkpoint="a") | make_rows(6, checkpoint="c")
        tickets = [first, batcher.submit([5], Priority.BULK), batcher.submit([6], Priority.BULK)]
        assert end_all(tickets) == [Ending.DONE] * 3
    assert handler.batches == [[2, 3, 4], [1, 5], [6]]


def test_a_backlog_of_one_checkpoint_does_not_starve_another() -> None:
    handler = FakeHandler(make_rows(*range(40), checkpoint="a") | make_rows(40, 41, checkpoint="b"))
    handler.gate.clear()
    with run_batcher(handler, max_batch=4, batch_wait_s=0.0) as batcher:
        tickets = [batcher.submit(range(20), Priority.BULK), batcher.submit([40, 41], Priority.BULK)]
        tickets.append(batcher.submit(range(20, 40), Priority.BULK))
        assert handler.entered.wait(WAIT_S)

        handler.gate.set()
        assert end_all(tickets) == [Ending.DONE] * 3
    assert handler.batches.index([40, 41]) == 5  # after the 20 jobs that arrived before it


def test_a_job_that_is_looked_up_once_is_not_looked_up_for_each_batch() -> None:
    handler = FakeHandler(make_rows(*range(40)))
    with run_batcher(handler, batch_wait_s=LONG_S, capacity=1) as batcher:
        assert batcher.submit(range(40), Priority.BULK).wait(WAIT_S) is Ending.DONE
    assert [jobs for step, jobs in handler.log if step == "find"] == [list(range(40))]


def test_a_job_that_another_worker_took_after_it_was_looked_up_is_done_with() -> None:
    handler = FakeHandler(make_rows(1, 2))

    def take_job(step: str, jobs: list[int]) -> None:
        if step == "claim":
            handler.rows[1].state = "succeeded"

    handler.trouble = take_job
    with run_batcher(handler, batch_wait_s=LONG_S, capacity=1) as batcher:
        assert batcher.submit([1, 2], Priority.BULK).wait(WAIT_S) is Ending.DONE
    assert handler.batches == [[2]]


def test_a_stop_while_new_jobs_are_looked_up_gives_them_back() -> None:
    handler = FakeHandler(make_rows(1))
    with run_batcher(handler) as batcher:
        with hold_step(handler, "find") as held:
            ticket = batcher.submit([1], Priority.BULK)
            assert held.wait(WAIT_S)
            batcher.release_waiting()
            assert not ticket.is_over
        assert ticket.wait(WAIT_S) is Ending.RELEASED
    assert handler.batches == []


def test_jobs_started_once_before_run_apart_in_groups_of_eight() -> None:
    handler = FakeHandler(make_rows(*range(1, 11), attempt=1) | make_rows(11, 12))
    with run_batcher(handler, max_batch=32) as batcher:
        assert batcher.submit(list(range(1, 13)), Priority.BULK).wait(WAIT_S) is Ending.DONE

    assert sorted(map(len, handler.batches)) == [2, 2, 8]
    assert [11, 12] in handler.batches
    assert all(not beside for _, beside in handler.claimed_beside)


def test_a_job_started_twice_before_runs_alone() -> None:
    handler = FakeHandler(make_rows(1, 2, attempt=2) | make_rows(3, 4))
    with run_batcher(handler) as batcher:
        tickets = [batcher.submit([1, 2, 3, 4], Priority.STAT), batcher.submit([1], Priority.BULK)]

        assert end_all(tickets) == [Ending.DONE] * 2
    assert sorted(handler.batches) == [[1], [2], [3, 4]]
    assert all(not beside for ids, beside in handler.claimed_beside if ids in ([1], [2]))


def test_a_suspect_waits_until_nothing_else_is_in_hand() -> None:
    handler = FakeHandler(make_rows(1) | make_rows(2, attempt=1))
    handler.gate.clear()
    seen = threading.Event()
    with run_batcher(handler, max_batch=1) as batcher:
        first = batcher.submit([1], Priority.BULK)
        assert handler.entered.wait(WAIT_S)
        handler.trouble = lambda step, jobs: seen.set() if (step, jobs) == ("find", [2]) else None
        suspect = batcher.submit([2], Priority.STAT)
        assert seen.wait(WAIT_S)
        assert batcher.jobs_in_hand() == [1]

        handler.gate.set()
        assert end_all([first, suspect]) == [Ending.DONE] * 2
    assert handler.claimed_beside == [([1], set()), ([2], set())]


def test_a_job_lost_by_another_worker_between_look_and_claim_is_run_apart() -> None:
    handler = FakeHandler(make_rows(1, 2))

    def lose_job(step: str, jobs: list[int]) -> None:
        if (step, jobs) == ("claim", [1, 2]):
            handler.rows[1].attempt = 2

    handler.trouble = lose_job
    with run_batcher(handler, batch_wait_s=LONG_S, capacity=1) as batcher:
        assert batcher.submit([1, 2], Priority.BULK).wait(WAIT_S) is Ending.DONE

    assert handler.batches == [[2], [1]]
    assert handler.rows[1].attempt == 3


def test_a_suspect_lost_once_more_between_look_and_claim_runs_alone() -> None:
    handler = FakeHandler(make_rows(1, 2, 3, attempt=1))

    def lose_job(step: str, jobs: list[int]) -> None:
        if (step, jobs) == ("claim", [1, 2, 3]):
            handler.rows[1].attempt = 2

    handler.trouble = lose_job
    with run_batcher(handler, batch_wait_s=LONG_S, capacity=1) as batcher:
        assert batcher.submit([1, 2, 3], Priority.BULK).wait(WAIT_S) is Ending.DONE

    assert handler.batches == [[2, 3], [1]]
    assert handler.rows[1].attempt == 3


def test_jobs_that_are_tried_again_after_an_outcome_are_no_suspects() -> None:
    handler = FakeHandler(make_rows(1, 2, attempt=2, is_answered=True) | make_rows(3, 4))
    with run_batcher(handler, batch_wait_s=LONG_S) as batcher:
        assert batcher.submit([1, 2, 3, 4], Priority.BULK).wait(WAIT_S) is Ending.DONE

    assert handler.batches == [[1, 2, 3, 4]]


@contextmanager
def hold_step(handler: FakeHandler, step: str) -> Iterator[threading.Event]:
    """Hold a step; the event tells that it is held."""
    held, proceed = threading.Event(), threading.Event()

    def hold(name: str, jobs: list[int]) -> None:
        if name == step:
            held.set()
            proceed.wait(WAIT_S)

    handler.trouble = hold
    try:
        yield held
    finally:
        proceed.set()


def test_a_model_that_is_made_ready_is_timed_and_its_jobs_are_not_started() -> None:
    handler = FakeHandler(make_rows(1))
    with run_batcher(handler) as batcher:
        with hold_step(handler, "warm") as held:
            ticket = batcher.submit([1], Priority.BULK)
            assert held.wait(WAIT_S)
            assert batcher.warm_seconds > 0
            assert batcher.forward_seconds == 0
            assert batcher.jobs_unstarted() == [1]
        assert ticket.wait(WAIT_S) is Ending.DONE
        assert batcher.warm_seconds == 0


def test_a_batch_whose_files_do_not_come_counts_as_started_when_it_is_blamed() -> None:
    handler = FakeHandler(make_rows(1, 2))
    with run_batcher(handler, batch_wait_s=LONG_S, capacity=1) as batcher, hold_step(handler, "prepare") as held:
        batcher.submit([1, 2], Priority.BULK)
        assert held.wait(WAIT_S)
        assert batcher.jobs_unstarted() == [1, 2]

        batcher.blame_prepared()

        assert batcher.jobs_unstarted() == []


def test_a_stop_finishes_the_batch_in_hand_and_gives_back_the_rest() -> None:
    handler = FakeHandler(make_rows(*range(1, 9)))
    handler.gate.clear()
    prepared = threading.Event()
    handler.trouble = lambda step, jobs: prepared.set() if (step, jobs) == ("prepare", [3, 4]) else None
    with run_batcher(handler, max_batch=2, batch_wait_s=LONG_S) as batcher:
        tickets = [batcher.submit([n, n + 1], Priority.BULK) for n in (1, 3, 5, 7)]
        assert handler.entered.wait(WAIT_S) and prepared.wait(WAIT_S)

        batcher.release_waiting()

        assert end_all(tickets[1:]) == [Ending.RELEASED] * 3
        assert not tickets[0].is_over
        handler.gate.set()
        assert tickets[0].wait(WAIT_S) is Ending.DONE
    assert handler.batches == [[1, 2]]
    assert {row.state for n, row in handler.rows.items() if n > 2} == {"queued"}
    assert {row.attempt for n, row in handler.rows.items() if n > 2} == {0}


def test_a_message_that_comes_after_the_stop_is_given_back_at_once() -> None:
    with run_batcher(FakeHandler(make_rows(1)), batch_wait_s=LONG_S) as batcher:
        batcher.release_waiting()

        assert batcher.submit([1], Priority.STAT).wait(0) is Ending.RELEASED


def test_a_message_half_done_at_the_stop_is_given_back_when_its_batch_is_written() -> None:
    handler = FakeHandler(make_rows(1, 2))
    handler.gate.clear()
    with run_batcher(handler, max_batch=1) as batcher:
        ticket = batcher.submit([1, 2], Priority.BULK)
        assert handler.entered.wait(WAIT_S)

        batcher.release_waiting()
        assert not ticket.is_over

        handler.gate.set()
        assert ticket.wait(WAIT_S) is Ending.RELEASED
    assert handler.rows[1].state == "succeeded"
    assert handler.rows[2].state == "queued"


@pytest.mark.parametrize("step", ["find", "claim", "prepare", "warm", "run", "write"])
def test_a_stage_that_breaks_leaves_no_message_waiting(step: str) -> None:
    handler = FakeHandler(make_rows(*range(1, 20)), trouble=fail_step(step, RuntimeError("Doe^Jane")))
    with run_batcher(handler) as batcher:
        tickets = [batcher.submit([n], Priority.BULK) for n in range(1, 20)]

        assert Ending.BROKEN in end_all(tickets)
        assert None not in end_all(tickets)
        assert [type(error) for _, error in batcher.failures] == [RuntimeError]  # type: ignore[attr-defined]


@pytest.mark.parametrize("step", ["find", "claim", "prepare", "write"])
def test_a_store_that_is_away_is_waited_out(step: str) -> None:
    handler = FakeHandler(make_rows(1, 2), trouble=fail_step(step, StoreUnavailable("the disk is full"), times=3))
    with run_batcher(handler) as batcher:
        assert batcher.submit([1, 2], Priority.BULK).wait(WAIT_S) is Ending.DONE
    assert handler.batches == [[1, 2]]


def test_a_store_that_is_away_does_not_hold_up_a_stop() -> None:
    handler = FakeHandler(make_rows(1), trouble=fail_step("claim", StoreUnavailable("away"), times=10**6))
    with run_batcher(handler) as batcher:
        ticket = batcher.submit([1], Priority.BULK)

        batcher.release_waiting()

        assert ticket.wait(WAIT_S) is Ending.RELEASED


def test_an_outcome_the_store_refuses_fails_alone() -> None:
    handler = FakeHandler(make_rows(1, 2, 3))
    refused: list[list[int]] = []

    def refuse(step: str, jobs: list[int]) -> None:
        if step == "write" and 2 in jobs and len(refused) < 2:
            refused.append(jobs)
            raise StoreError("the store refuses")

    handler.trouble = refuse
    with run_batcher(handler, batch_wait_s=LONG_S, capacity=1) as batcher:
        assert batcher.submit([1, 2, 3], Priority.BULK).wait(WAIT_S) is Ending.DONE
    assert {n: row.state for n, row in handler.rows.items()} == {1: "succeeded", 2: "failed", 3: "succeeded"}


def test_leases_are_held_until_the_outcome_is_written() -> None:
    handler = FakeHandler(make_rows(1))
    writing, proceed = threading.Event(), threading.Event()

    def hold_write(step: str, jobs: list[int]) -> None:
        if step == "write":
            writing.set()
            proceed.wait()

    handler.trouble = hold_write
    with run_batcher(handler) as batcher:
        ticket = batcher.submit([1], Priority.BULK)
        assert writing.wait(WAIT_S)
        assert batcher.jobs_in_hand() == [1]
        assert batcher.jobs_unstarted() == []

        proceed.set()
        assert ticket.wait(WAIT_S) is Ending.DONE
        assert batcher.jobs_in_hand() == []


def test_many_messages_from_many_threads_all_end_with_each_job_run_once() -> None:
    count, threads = 40, 16
    handler = FakeHandler(make_rows(*range(threads * count)))
    endings: list[Ending | None] = []
    with run_batcher(handler, max_batch=32, capacity=threads) as batcher:

        def send(first: int) -> None:
            for job_id in range(first, first + count, 4):
                endings.append(batcher.submit(range(job_id, job_id + 4), Priority.BULK).wait(WAIT_S))

        senders = [threading.Thread(target=send, args=(n * count,)) for n in range(threads)]
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join()
        assert batcher.tally.succeeded == threads * count
    assert endings == [Ending.DONE] * (threads * count // 4)
    ran = [job_id for batch in handler.batches for job_id in batch]
    assert sorted(ran) == list(range(threads * count))


def test_a_job_that_comes_due_while_it_is_looked_at_is_not_slept_over() -> None:
    handler = FakeHandler(make_rows(1))
    with run_batcher(handler, batch_wait_s=0.02, capacity=100) as batcher:
        look = batcher._find_ready

        def look_slowly(ordered: list[Any]) -> Any:
            found = look(ordered)
            due = ordered[0].arrived + 0.02
            while time.monotonic() <= due:  # a thread that was not scheduled for a moment
                pass
            return found

        batcher._find_ready = look_slowly  # type: ignore[method-assign]
        assert batcher.submit([1], Priority.STAT).wait(WAIT_S) is Ending.DONE


def test_full_batches_of_another_model_do_not_go_before_an_urgent_job() -> None:
    handler = FakeHandler(make_rows(*range(1, 10)))
    for number in range(2, 10):
        handler.rows[number].checkpoint = "other"
    with run_batcher(handler, max_batch=4, batch_wait_s=LONG_S, capacity=100) as batcher:
        with batcher._changed:  # nothing is chosen before all of it is there
            tickets = [batcher.submit([1], Priority.STAT), batcher.submit(range(2, 10), Priority.BULK)]
        assert all(ticket.wait(WAIT_S) is Ending.DONE for ticket in tickets)
    assert handler.batches[0] == [1]
