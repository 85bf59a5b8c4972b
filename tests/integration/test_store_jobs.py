"""Jobs on SQLite and on PostgreSQL: claims, outcomes, leases, repair, dead letters."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
from sqlalchemy import func, select

from db.jobs import (
    claim_jobs,
    drop_failures,
    find_queued,
    first_published,
    forget_published,
    get_failure,
    has_work,
    list_failures,
    mark_published,
    move_jobs,
    oldest_queued_age,
    release_jobs,
    renew_leases,
    requeue_failures,
    return_expired,
    unpublished_jobs,
    write_outcomes,
)
from db.results import iter_results
from db.session import Store, now
from db.submissions import add_images, open_submission
from db.tables import results
from readroom.errors import BadCall
from readroom.records import TRANSITIONS, GenerationSettings, JobKind, JobState, Outcome, Priority, Reason
from tests.fakes.items import (
    add_jobs,
    fail_jobs,
    finish_jobs,
    make_image,
    make_plan,
    read_columns,
    set_columns,
    state_of,
)

PAIRS = list(product(JobState, JobState))
CAPTION = [JobKind.CAPTION]


def count_results(store: Store) -> int:
    with store.read() as connection:
        return connection.scalar(select(func.count()).select_from(results)) or 0


# --- the state machine ----------------------------------------------------------------------------------------------


def test_moves_succeed_exactly_for_listed_steps_from_the_state_they_expect(store: Store) -> None:
    (job,) = add_jobs(store, 1)
    refused = 0
    for source, target in PAIRS:
        for actual in JobState:
            set_columns(store, [job], state=actual)
            with store.begin() as connection:
                if target not in TRANSITIONS[source]:
                    with pytest.raises(BadCall):
                        move_jobs(connection, [job], source, target)
                    refused += 1
                else:
                    assert move_jobs(connection, [job], source, target) == ([job] if actual is source else [])
            expected = target if target in TRANSITIONS[source] and actual is source else actual
            assert state_of(store, job) is expected
    assert refused == 24 * 6


OPERATIONS: dict[str, Callable[[Store, int], object]] = {
    "claim": lambda store, job: claim_jobs(store, [job], "w", 60),
    "renew": lambda store, job: renew_leases(store, [job], "w", 60),
    "release": lambda store, job: release_jobs(store, [job], "w"),
    "succeed": lambda store, job: write_outcomes(store, [Outcome(job, 1, "dummy:", text="clear")], "w", 3),
    "fail": lambda store, job: write_outcomes(store, [Outcome(job, 1, "dummy:", reason="corrupt")], "w", 3),
    "retry": lambda store, job: write_outcomes(store, [Outcome(job, 1, "", reason="missing", retry=True)], "w", 3),
    "expire": lambda store, job: return_expired(store, 3),
    "expire at the last attempt": lambda store, job: return_expired(store, 1),
    "mark published": lambda store, job: mark_published(store, [job]),
    "forget published": lambda store, job: forget_published(store, CAPTION, 0),
    "requeue": lambda store, job: requeue_failures(store, [job]),
    "drop": lambda store, job: drop_failures(store, [job]),
    "add again": lambda store, job: add_jobs(store, 1, priority=Priority.STAT),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_operation_takes_a_step_that_is_not_listed(store: Store, operation: str) -> None:
    (job,) = add_jobs(store, 1)
    for state in JobState:
        set_columns(store, [job], state=state, attempt=1, lease_owner="w", lease_until=now() - 1, published_at=1.0)
        OPERATIONS[operation](store, job)
        after = state_of(store, job)
        assert after is state or after in TRANSITIONS[state], (operation, state, after)


# --- claims ---------------------------------------------------------------------------------------------------------


def test_a_claimed_job_carries_what_the_worker_needs(store: Store) -> None:
    settings = GenerationSettings(num_beams=3, prompt="chest radiograph of")
    (job,) = add_jobs(store, 1, settings=settings, priority=Priority.STAT)
    (claimed,) = claim_jobs(store, [job], "worker-1", 60)
    image = make_image(0).ref
    assert (claimed.id, claimed.kind, claimed.image, claimed.attempt) == (job, JobKind.CAPTION, image, 1)
    assert (claimed.settings, claimed.priority, claimed.captioner) == (settings, Priority.STAT, "blip")
    row = read_columns(store, job)
    assert row.lease_owner == "worker-1"
    assert 55 < row.lease_until - now() <= 60


def test_a_job_is_claimed_once_and_unknown_ids_are_left_out(store: Store) -> None:
    ids = add_jobs(store, 5)
    assert [one.id for one in claim_jobs(store, [*ids, *ids, 10**15], "first", 60)] == ids
    assert claim_jobs(store, ids, "second", 60) == []
    assert claim_jobs(store, [], "second", 60) == []


def test_a_claim_waits_for_the_time_a_retry_was_put_off_to(store: Store) -> None:
    (job,) = add_jobs(store, 1)
    (claimed,) = claim_jobs(store, [job], "w", 60)
    missing = Outcome(job, claimed.attempt, "dummy:", reason=Reason.MISSING, retry=True)
    assert write_outcomes(store, [missing], "w", 3, retry_delay_s=3600).requeued == [job]
    assert claim_jobs(store, [job], "w", 60) == []
    assert unpublished_jobs(store, CAPTION, 0, 10) == []
    set_columns(store, [job], not_before=now() - 1)
    assert unpublished_jobs(store, CAPTION, 0, 10) == [(job, JobKind.CAPTION, Priority.ROUTINE)]
    assert [one.attempt for one in claim_jobs(store, [job], "w", 60)] == [2]


def find_unanswered(store: Store, ids: list[int]) -> dict[int, int]:
    return {job: known.unanswered for job, known in find_queued(store, ids).items()}


def test_what_a_job_needs_is_known_before_a_claim(store: Store) -> None:
    usual = GenerationSettings(num_beams=2)
    other = GenerationSettings(num_beams=5)
    changes: list[dict[str, Any]] = [{}, {"captioner": "vlp"}, {"checkpoint": "sha256:b"}, {"settings": other}]
    ids = [job for change in changes for job in add_jobs(store, 2, **change)]
    needs = [known.needs for _, known in sorted(find_queued(store, ids).items())]
    assert (
        needs[::2]
        == needs[1::2]
        == [
            ("caption", "blip", "dummy:", usual.digest),
            ("caption", "vlp", "dummy:", usual.digest),
            ("caption", "blip", "sha256:b", usual.digest),
            ("caption", "blip", "dummy:", other.digest),
        ]
    )


def test_attempts_are_known_before_a_claim(store: Store) -> None:
    ids = add_jobs(store, 3)
    claim_jobs(store, ids[:2], "w", 60)
    set_columns(store, ids[:1], lease_until=now() - 1)
    return_expired(store, 3)
    assert find_unanswered(store, [*ids, 10**15]) == {ids[0]: 1, ids[2]: 0}


def test_an_attempt_that_had_an_outcome_is_not_counted_as_unanswered(store: Store) -> None:
    (job,) = add_jobs(store, 1)
    claim_jobs(store, [job], "w", 60)
    write_outcomes(store, [Outcome(job, 1, "dummy:", reason=Reason.MISSING, retry=True)], "w", 3)
    assert find_unanswered(store, [job]) == {job: 0}

    (again,) = claim_jobs(store, [job], "w", -1)
    assert (again.attempt, again.unanswered) == (2, 0)
    return_expired(store, 3)
    assert find_unanswered(store, [job]) == {job: 2}
    (last,) = claim_jobs(store, [job], "w", 60)
    assert (last.attempt, last.unanswered) == (3, 2)


def test_thousands_of_ids_fit_into_one_claim(store: Store) -> None:
    ids = add_jobs(store, 300)
    assert len(claim_jobs(store, [*range(10**6, 10**6 + 40_000), *ids], "w", 60)) == 300


# --- leases ---------------------------------------------------------------------------------------------------------


def test_only_the_owner_renews_a_lease(store: Store) -> None:
    ids = add_jobs(store, 3)
    claim_jobs(store, ids, "w", 1)
    assert renew_leases(store, ids, "somebody else", 500) == 0
    assert renew_leases(store, ids, "w", 500) == 3
    assert read_columns(store, ids[0]).lease_until > now() + 400


def test_released_jobs_are_queued_without_the_attempt_and_to_be_published(store: Store) -> None:
    ids = add_jobs(store, 3)
    mark_published(store, ids)
    claim_jobs(store, ids, "w", 60)
    assert release_jobs(store, ids, "somebody else") == 0
    assert release_jobs(store, ids, "w") == 3
    assert {(row.attempt, row.lease_owner) for row in (read_columns(store, job) for job in ids)} == {(0, None)}
    assert [job for job, _, _ in unpublished_jobs(store, CAPTION, 0, 10)] == ids


def test_a_job_whose_lease_ended_is_queued_again_until_its_attempts_are_spent(store: Store) -> None:
    (job,) = add_jobs(store, 1)
    for attempt in (1, 2):
        assert [one.attempt for one in claim_jobs(store, [job], f"w{attempt}", 60)] == [attempt]
        assert return_expired(store, 3) == ([], [])
        set_columns(store, [job], lease_until=now() - 1)
        assert return_expired(store, 3) == ([job], [])
    claim_jobs(store, [job], "w3", 60)
    set_columns(store, [job], lease_until=now() - 1)
    assert return_expired(store, 3) == ([], [job])
    failure = get_failure(store, job)
    assert failure is not None
    assert (failure.reason, failure.attempt, failure.item) == (Reason.WORKER_LOST, 3, "000000")


def test_an_owner_that_was_taken_for_dead_writes_nothing(store: Store) -> None:
    (job,) = add_jobs(store, 1)
    (slow,) = claim_jobs(store, [job], "slow", 60)
    set_columns(store, [job], lease_until=now() - 1)
    return_expired(store, 3)
    (quick,) = claim_jobs(store, [job], "quick", 60)
    late = write_outcomes(store, [Outcome(job, slow.attempt, "dummy:", text="late")], "slow", 3)
    assert (late.succeeded, late.ignored) == (0, 1)
    assert write_outcomes(store, [Outcome(job, quick.attempt, "dummy:", text="in time")], "quick", 3).succeeded == 1
    late = write_outcomes(store, [Outcome(job, slow.attempt, "dummy:", text="later")], "slow", 3)
    assert late.ignored == 1
    assert count_results(store) == 1


def test_the_same_owner_with_an_older_attempt_writes_nothing(store: Store) -> None:
    (job,) = add_jobs(store, 1)
    claim_jobs(store, [job], "w", 60)
    set_columns(store, [job], lease_until=now() - 1)
    return_expired(store, 3)
    claim_jobs(store, [job], "w", 60)
    assert write_outcomes(store, [Outcome(job, 1, "dummy:", reason="corrupt")], "w", 3).ignored == 1
    assert state_of(store, job) is JobState.RUNNING


def test_an_owner_whose_lease_ended_unnoticed_still_delivers(store: Store) -> None:
    (job,) = add_jobs(store, 1)
    claim_jobs(store, [job], "w", 60)
    set_columns(store, [job], lease_until=now() - 100)
    assert write_outcomes(store, [Outcome(job, 1, "dummy:", text="clear")], "w", 3).succeeded == 1
    assert return_expired(store, 3) == ([], [])


# --- outcomes -------------------------------------------------------------------------------------------------------


def test_a_batch_of_mixed_outcomes_is_written_at_once(store: Store) -> None:
    ids = add_jobs(store, 5)
    claimed = {one.id: one for one in claim_jobs(store, ids, "w", 60)}
    outcomes = [
        Outcome(ids[0], 1, "dummy:", text="heart enlarged", score=-0.25, model_ms=12.5),
        Outcome(ids[1], 1, "dummy:", reason=Reason.CORRUPT, detail="cut short"),
        Outcome(ids[2], 1, "dummy:", reason=Reason.MODEL_FAILED, detail="out of memory", retry=True),
        Outcome(ids[3], 1, "dummy:", text="", score=float("nan")),
        Outcome(10**15, 1, "dummy:", text="of no job"),
    ]
    written = write_outcomes(store, outcomes, "w", 3)
    assert (written.succeeded, written.failed, written.requeued, written.ignored) == (2, 1, [ids[2]], 1)
    assert [state_of(store, job).value for job in ids] == ["succeeded", "failed", "queued", "succeeded", "running"]
    with store.read() as connection:
        row = connection.execute(select(results).where(results.c.job_id == ids[0])).one()
    assert (row.text, row.score, row.model_ms, row.worker, row.attempt) == ("heart enlarged", -0.25, 12.5, "w", 1)
    settings = claimed[ids[0]].settings
    assert (row.checkpoint, row.settings_digest) == ("dummy:", settings.digest)
    assert GenerationSettings(**row.settings) == settings
    assert abs(row.created_at - now()) < 60


def test_an_outcome_that_is_written_twice_counts_once(store: Store) -> None:
    (job,) = add_jobs(store, 1)
    claim_jobs(store, [job], "w", 60)
    outcome = Outcome(job, 1, "dummy:", text="clear")
    assert write_outcomes(store, [outcome, outcome], "w", 3).ignored == 1
    assert write_outcomes(store, [outcome], "w", 3).ignored == 1
    assert count_results(store) == 1


def test_a_retry_becomes_a_failure_at_the_last_attempt(store: Store) -> None:
    (job,) = add_jobs(store, 1)
    for attempt in (1, 2, 3):
        claim_jobs(store, [job], "w", 60)
        written = write_outcomes(store, [Outcome(job, attempt, "dummy:", reason=Reason.MISSING, retry=True)], "w", 3)
        assert (written.requeued, written.failed) == (([job], 0) if attempt < 3 else ([], 1))
    assert state_of(store, job) is JobState.FAILED


def test_equal_work_of_two_jobs_stands_once_and_serves_both(store: Store) -> None:
    # Two captioner names with one checkpoint: two jobs, one result.
    submissions, ids = [], []
    for captioner in ("blip", "also blip"):
        plan = make_plan(captioner=captioner)
        submissions.append(open_submission(store, plan))
        ids += add_images(store, submissions[-1], plan, [make_image(7)]).queued
    for job, text in zip(ids, ("first", "second"), strict=True):
        finish_jobs(store, [job], text)
    assert count_results(store) == 1
    assert [[one.text for one in iter_results(store, one)] for one in submissions] == [["first"], ["first"]]


def test_texts_that_databases_refuse_are_stored_without_what_offends(store: Store) -> None:
    (job,) = add_jobs(store, 1)
    claim_jobs(store, [job], "w", 60)
    write_outcomes(store, [Outcome(job, 1, "dummy:", text="a\0b \udcff ü 🫁")], "w", 3)
    with store.read() as connection:
        assert connection.scalar(select(results.c.text)) == "ab \\udcff ü 🫁"


# --- publishing -----------------------------------------------------------------------------------------------------


def test_unpublished_jobs_come_most_urgent_first_then_oldest_first(store: Store) -> None:
    bulk = add_jobs(store, 2, start=0, priority=Priority.BULK)
    stat = add_jobs(store, 2, start=10, priority=Priority.STAT)
    routine = add_jobs(store, 2, start=20, priority=Priority.ROUTINE)
    assert [job for job, _, _ in unpublished_jobs(store, CAPTION, 0, 100)] == stat + routine + bulk
    assert [job for job, _, _ in unpublished_jobs(store, CAPTION, 0, 3)] == stat + routine[:1]
    assert unpublished_jobs(store, [JobKind.ANSWER], 0, 100) == []
    assert unpublished_jobs(store, CAPTION, 60, 100) == []
    set_columns(store, routine, queued_at=now() - 61)
    assert unpublished_jobs(store, CAPTION, 60, 100) == [(one, JobKind.CAPTION, Priority.ROUTINE) for one in routine]


def test_a_published_job_is_unpublished_again_when_its_message_is_taken_for_lost(store: Store) -> None:
    ids = add_jobs(store, 4)
    claim_jobs(store, ids[3:], "w", 60)
    assert mark_published(store, ids) == 3
    assert unpublished_jobs(store, CAPTION, 0, 100) == []
    assert forget_published(store, CAPTION, 60) == 0
    set_columns(store, ids, published_at=now() - 61)
    assert forget_published(store, [JobKind.ANSWER], 60) == 0
    assert forget_published(store, CAPTION, 60, priorities=[Priority.STAT]) == 0
    assert forget_published(store, CAPTION, 60, limit=2) == 2
    assert forget_published(store, CAPTION, 60) == 1
    assert [job for job, _, _ in unpublished_jobs(store, CAPTION, 0, 100)] == ids[:3]


def test_messages_older_than_the_oldest_that_waits_are_forgotten(store: Store) -> None:
    lost, waiting, other = (add_jobs(store, 2, start=start) for start in (0, 10, 20))
    set_columns(store, lost, published_at=100.0)
    set_columns(store, waiting, published_at=200.0)
    set_columns(store, other, published_at=50.0, priority=Priority.STAT)

    first = first_published(store, [*waiting, *other, 10**15], JobKind.CAPTION, Priority.ROUTINE)
    assert first == 200.0
    assert first_published(store, [10**15], JobKind.CAPTION, Priority.ROUTINE) is None
    assert forget_published(store, CAPTION, 100, priorities=[Priority.ROUTINE], moment=first) == 0
    assert forget_published(store, CAPTION, 99, priorities=[Priority.ROUTINE], moment=first) == 2
    assert [job for job, _, _ in unpublished_jobs(store, CAPTION, 0, 100)] == lost
    assert unpublished_jobs(store, CAPTION, 0, 100, [Priority.STAT]) == []


def test_work_left_and_the_age_of_the_oldest_are_told_by_kind(store: Store) -> None:
    assert (has_work(store, CAPTION), oldest_queued_age(store, CAPTION)) == (0, None)
    ids = add_jobs(store, 3)
    set_columns(store, ids[1:2], queued_at=now() - 500)
    claim_jobs(store, ids[:1], "w", 60)
    assert (has_work(store, CAPTION), has_work(store, [JobKind.ANSWER])) == (3, 0)
    age = oldest_queued_age(store, [JobKind.CAPTION, JobKind.ANSWER])
    assert age is not None
    assert 499 < age < 600
    finish_jobs(store, ids[1:])
    assert (has_work(store, CAPTION), oldest_queued_age(store, CAPTION)) == (1, None)


# --- dead letters ---------------------------------------------------------------------------------------------------


def test_failures_are_listed_with_their_cause_and_item(store: Store) -> None:
    plan = make_plan()
    submission = open_submission(store, plan)
    ids = add_images(store, submission, plan, [make_image(1), make_image(2), make_image(3)]).queued
    fail_jobs(store, ids[:2], Reason.CORRUPT, "x" * 5000)
    fail_jobs(store, ids[2:], Reason.MISSING)
    assert [one.job for one in list_failures(store)] == ids
    assert [one.job for one in list_failures(store, reason=Reason.MISSING)] == ids[2:]
    assert [one.job for one in list_failures(store, submission=submission, limit=2)] == ids[:2]
    assert list_failures(store, submission="another") == []
    (first, *_) = list_failures(store)
    assert (first.item, first.submission, first.kind) == ("000001", submission, JobKind.CAPTION)
    assert len(first.detail) == 500
    assert abs(first.failed_at - now()) < 60
    assert get_failure(store, 10**15) is None


def test_requeued_failures_start_afresh(store: Store) -> None:
    ids = add_jobs(store, 3)
    fail_jobs(store, ids)
    assert requeue_failures(store, ids[:1]) == ids[:1]
    assert requeue_failures(store, reason=Reason.MISSING) == []
    assert requeue_failures(store) == ids[1:]
    row = read_columns(store, ids[0])
    assert (row.state, row.attempt, row.reason, row.finished_at, row.published_at) == ("queued", 0, None, None, None)
    assert [one.attempt for one in claim_jobs(store, ids, "w", 60)] == [1, 1, 1]


def test_dropped_failures_are_cancelled_and_not_requeued_with_the_others(store: Store) -> None:
    ids = add_jobs(store, 2)
    fail_jobs(store, ids)
    assert drop_failures(store, reason=Reason.CORRUPT) == ids
    assert [state_of(store, job) for job in ids] == [JobState.CANCELLED] * 2
    assert requeue_failures(store, ids) == []
