"""Submissions on SQLite and on PostgreSQL: what is added once, what is resumed, what is counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sqlalchemy import func, select

from db.jobs import claim_jobs, drop_failures, list_failures, mark_published, unpublished_jobs
from db.session import Store, now
from db.submissions import (
    MAX_QUESTION_CHARS,
    PlannedCaptioner,
    SubmissionState,
    add_images,
    close_submission,
    count_jobs,
    get_submission,
    list_submissions,
    measure_rate,
    open_submission,
    tally_submission,
)
from db.tables import images, studies, submission_jobs
from readroom.errors import BadCall
from readroom.records import (
    GenerationSettings,
    ImageRef,
    JobKind,
    JobState,
    Priority,
    SkippedItem,
    SubmissionCounts,
)
from tests.fakes.items import add_jobs, fail_jobs, finish_jobs, make_image, make_images, make_plan, set_columns


def count_rows(store: Store, table: object) -> int:
    with store.read() as connection:
        return connection.scalar(select(func.count()).select_from(table)) or 0  # type: ignore[arg-type]


# --- opening and closing --------------------------------------------------------------------------------------------


def test_an_unfinished_submission_with_an_equal_plan_is_gone_on_with(store: Store) -> None:
    first = open_submission(store, make_plan())
    assert open_submission(store, make_plan()) == first
    assert open_submission(store, make_plan(checkpoint="sha256:other")) != first
    assert open_submission(store, make_plan(options={"limit": 3})) != first
    close_submission(store, first, SubmissionCounts(first))
    assert open_submission(store, make_plan()) != first


def test_a_submission_is_read_back_as_it_was_planned_and_closed(store: Store) -> None:
    plan = make_plan(kinds=(JobKind.CAPTION, JobKind.ANSWER), question="Ist das Herz groß?", options={"split": "val"})
    submission = open_submission(store, plan)
    record = get_submission(store, submission)
    assert record is not None
    assert (record.plan, record.state, record.closed_at) == (plan, SubmissionState.ENQUEUING, None)
    skipped = [SkippedItem("DICOMDIR", "not_image"), SkippedItem("x", "empty")]
    close_submission(store, submission, SubmissionCounts(submission, 9, 5, 2, skipped, studies=3, images=7))
    record = get_submission(store, submission)
    assert record is not None
    assert (record.found, record.queued, record.already_done, record.skipped) == (9, 5, 2, 2)
    assert (record.studies, record.images, record.state) == (3, 7, SubmissionState.ENQUEUED)
    assert get_submission(store, "unknown") is None


def test_submissions_are_listed_newest_first(store: Store) -> None:
    made = [open_submission(store, make_plan(source=f"/exports/{day}")) for day in range(4)]
    assert [one.id for one in list_submissions(store, 3)] == made[:0:-1]


def test_a_question_too_long_for_the_index_is_refused(store: Store) -> None:
    open_submission(store, make_plan(question="é" * MAX_QUESTION_CHARS))
    with pytest.raises(BadCall, match="400 characters"):
        open_submission(store, make_plan(question="?" * (MAX_QUESTION_CHARS + 1)))


# --- adding ---------------------------------------------------------------------------------------------------------


def test_images_are_stored_with_their_studies_and_queued_in_order(store: Store) -> None:
    plan = make_plan()
    submission = open_submission(store, plan)
    added = add_images(store, submission, plan, make_images(7))
    assert len(set(added.queued)) == 7
    assert (added.already_done, added.studies_new, added.images_new, added.resumed) == (0, 3, 7, 0)
    with store.read() as connection:
        keys = connection.scalars(select(studies.c.study_key)).all()
    assert len(set(keys)) == 3
    assert all(len(key) == 16 for key in keys)
    assert count_jobs(store, submission)[JobState.QUEUED] == 7


def test_a_resumed_submission_links_and_counts_nothing_twice(store: Store) -> None:
    plan = make_plan()
    submission = open_submission(store, plan)
    add_images(store, submission, plan, make_images(4))
    again = open_submission(store, plan)
    added = add_images(store, again, plan, make_images(6))
    assert again == submission
    assert (len(added.queued), added.already_done, added.resumed, added.studies_new, added.images_new) == (
        2,
        0,
        4,
        0,
        2,
    )
    tally = tally_submission(store, submission)
    assert (tally.queued, tally.already_done, tally.studies, tally.images) == (6, 0, 2, 6)
    assert count_rows(store, submission_jobs) == 6


def test_a_second_submission_of_the_same_files_finds_its_jobs_done(store: Store) -> None:
    first = add_jobs(store, 6)
    finish_jobs(store, first[:3])
    plan = make_plan(source="/exports/copy")
    submission = open_submission(store, plan)
    added = add_images(store, submission, plan, make_images(8))
    assert (len(added.queued), added.already_done, added.images_new) == (2, 6, 2)
    counts = count_jobs(store, submission)
    assert (counts[JobState.QUEUED], counts[JobState.SUCCEEDED], set(counts)) == (5, 3, set(JobState))
    assert count_jobs(store, None) == counts
    tally = tally_submission(store, submission)
    assert (tally.queued, tally.already_done) == (2, 6)


def test_a_new_submission_takes_up_cancelled_jobs_and_leaves_dead_letters_alone(store: Store) -> None:
    ids = add_jobs(store, 4)
    fail_jobs(store, ids[:3])
    drop_failures(store, ids[:2])
    plan = make_plan(source="/exports/copy", priority=Priority.STAT)
    submission = open_submission(store, plan)
    added = add_images(store, submission, plan, make_images(5))
    assert (added.queued[:2], len(added.queued), added.already_done, added.raised) == (ids[:2], 3, 2, ids[3:])
    assert [(one.id, one.attempt, one.priority) for one in claim_jobs(store, ids[:2], "w", 60)] == [
        (job, 1, Priority.STAT) for job in ids[:2]
    ]
    tally = tally_submission(store, submission)
    assert (tally.queued, tally.already_done, tally.failed) == (3, 2, 1)
    assert [one.job for one in list_failures(store, submission)] == ids[2:3]


def test_a_resumed_submission_does_not_take_up_what_was_dropped_meanwhile(store: Store) -> None:
    plan = make_plan()
    submission = open_submission(store, plan)
    ids = add_images(store, submission, plan, make_images(2)).queued
    fail_jobs(store, ids[:1])
    drop_failures(store, ids[:1])
    again = add_images(store, submission, plan, make_images(2))
    assert (again.queued, again.already_done, again.resumed) == ([], 0, 2)
    assert count_jobs(store, submission)[JobState.CANCELLED] == 1


def test_another_checkpoint_settings_or_question_is_other_work(store: Store) -> None:
    answer = {"kinds": (JobKind.ANSWER,)}
    for plan in ({}, {"checkpoint": "sha256:b"}, {**answer, "question": "Big heart?"}, {**answer, "question": "Gas?"}):
        assert len(add_jobs(store, 2, **plan)) == 2
    assert add_jobs(store, 2, source="elsewhere") == []
    assert count_jobs(store, kind=JobKind.ANSWER)[JobState.QUEUED] == 4
    assert count_rows(store, images) == 2


def test_several_kinds_make_several_jobs_of_each_image(store: Store) -> None:
    assert len(add_jobs(store, 3, kinds=(JobKind.CAPTION, JobKind.ANSWER), question="Effusion?")) == 6
    with pytest.raises(BadCall, match="studies"):
        add_jobs(store, 1, kinds=(JobKind.REPORT,))


TWO = (
    PlannedCaptioner("blip", "sha256:b", GenerationSettings(num_beams=3)),
    PlannedCaptioner("vlp", "sha256:v", GenerationSettings(num_beams=5, min_new_tokens=0)),
)


def test_several_captioners_each_get_a_job_of_each_image(store: Store) -> None:
    plan = make_plan(captioners=TWO)
    submission = open_submission(store, plan)
    added = add_images(store, submission, plan, make_images(5))
    assert (len(added.queued), added.images_new, added.already_done) == (10, 5, 0)
    claimed = claim_jobs(store, added.queued, "w", 60)
    asked = {(job.image.digest, PlannedCaptioner(job.captioner, job.checkpoint, job.settings)) for job in claimed}
    assert asked == {(make_image(number).ref.digest, one) for one in TWO for number in range(5)}
    tally = tally_submission(store, submission)
    assert (tally.queued, tally.already_done, tally.images, tally.studies) == (10, 0, 5, 2)
    record = get_submission(store, submission)
    assert record is not None
    assert record.plan == plan


def test_a_second_captioner_finds_the_first_ones_jobs_done(store: Store) -> None:
    alone = make_plan(captioners=TWO[:1])
    add_images(store, open_submission(store, alone), alone, make_images(4))
    both = make_plan(captioners=TWO)
    submission = open_submission(store, both)
    added = add_images(store, submission, both, make_images(4))
    assert (len(added.queued), added.already_done, added.images_new) == (4, 4, 0)
    assert {job.captioner for job in claim_jobs(store, added.queued, "w", 60)} == {"vlp"}
    again = add_images(store, submission, both, make_images(4))
    assert (again.queued, again.already_done, again.resumed) == ([], 0, 8)


def test_plans_with_other_captioners_are_other_plans() -> None:
    plans = [make_plan(captioners=chosen) for chosen in (TWO, TWO[:1], TWO[1:], TWO[::-1])]
    assert len({plan.digest for plan in plans}) == 4


def test_equal_files_are_two_items_and_one_job(store: Store) -> None:
    plan = make_plan(source_kind="coco")
    submission = open_submission(store, plan)
    plain = {"study_instance_uid": None, "sop_instance_uid": None}
    pair = [make_image(1, item=f"val/{n}.jpg", source_id=str(n), **plain) for n in (1, 2)]
    added = add_images(store, submission, plan, pair)
    assert (len(added.queued), added.already_done, added.images_new, added.studies_new) == (1, 1, 1, 0)
    assert sum(count_jobs(store, submission).values()) == 1
    tally = tally_submission(store, submission)
    assert (tally.queued, tally.already_done, tally.images) == (1, 1, 1)


def test_the_same_pixels_in_two_instances_stay_two_images_of_their_studies(store: Store) -> None:
    plan = make_plan()
    submission = open_submission(store, plan)
    same = make_image(0).ref
    added = add_images(store, submission, plan, [make_image(0), make_image(30, ref=same)])
    assert (len(added.queued), added.images_new, added.studies_new) == (1, 2, 2)


def test_an_image_found_elsewhere_is_read_from_there(store: Store) -> None:
    (job,) = add_jobs(store, 1)
    moved = make_image(0, ref=ImageRef("/archive/0", make_image(0).ref.digest, 0, "member"))
    plan = make_plan(source="/archive")
    add_images(store, open_submission(store, plan), plan, [moved])
    (claimed,) = claim_jobs(store, [job], "w", 60)
    assert (claimed.image.path, claimed.image.member) == ("/archive/0", "member")


def test_a_stat_submission_takes_queued_jobs_of_others_along(store: Store) -> None:
    ids = add_jobs(store, 3, priority=Priority.BULK)
    mark_published(store, ids)
    finish_jobs(store, ids[:1])
    plan = make_plan(priority=Priority.STAT)
    added = add_images(store, open_submission(store, plan), plan, make_images(3))
    assert (added.queued, added.raised) == ([], ids[1:])
    assert unpublished_jobs(store, [JobKind.CAPTION], 0, 9) == [
        (one, JobKind.CAPTION, Priority.STAT) for one in ids[1:]
    ]
    lower = make_plan(priority=Priority.ROUTINE)
    assert add_images(store, open_submission(store, lower), lower, make_images(3)).raised == []


def test_file_names_of_any_bytes_come_back_as_they_were(store: Store) -> None:
    name = b"/exports/R\xf6ntgen \xff/\\udc/\xc3\xa4".decode("utf-8", "surrogateescape")
    plan = make_plan(source=name, options={"folder": name, "nothing": "\0", "lung": "🫁"})
    submission = open_submission(store, plan)
    image = make_image(0, ref=ImageRef(name, "d" * 64), item=name, patient_id="A\0B", study_instance_uid="1.2\0")
    image = replace(image, reference_texts=(name, "\0"))
    added = add_images(store, submission, plan, [image, image])
    again = add_images(store, submission, plan, [image])
    assert (len(added.queued), again.resumed) == (1, 1)
    (claimed,) = claim_jobs(store, added.queued, "w", 60)
    assert claimed.image.path == name
    record = get_submission(store, submission)
    assert record is not None
    assert record.plan.source == name
    assert record.plan.options["lung"] == "🫁"


def test_an_item_with_a_very_long_path_is_stored(store: Store) -> None:
    path = "/".join(f"{number:05}ä漢" for number in range(500))
    plan = make_plan()
    submission = open_submission(store, plan)
    added = add_images(store, submission, plan, [make_image(0, ref=ImageRef(path, "d" * 64), item=path)])
    assert claim_jobs(store, added.queued, "w", 60)[0].image.path == path


def test_an_image_without_digest_is_refused_and_nothing_of_its_list_is_stored(store: Store) -> None:
    plan = make_plan()
    submission = open_submission(store, plan)
    with pytest.raises(BadCall, match="digest"):
        add_images(store, submission, plan, [make_image(0), make_image(1, ref=ImageRef("/x"))])
    assert count_rows(store, images) == count_rows(store, studies) == 0
    assert add_images(store, submission, plan, []).queued == []


# --- counting -------------------------------------------------------------------------------------------------------


def test_the_rate_counts_what_finished_in_the_window(store: Store) -> None:
    ids = add_jobs(store, 40)
    assert measure_rate(store) == 0.0
    finish_jobs(store, ids[:20])
    fail_jobs(store, ids[20:30])
    set_columns(store, ids[:10], finished_at=now() - 3600)
    set_columns(store, ids[10:20], finished_at=now() - 10)
    assert measure_rate(store, window_s=60) == pytest.approx(2.0, rel=0.3)
    assert measure_rate(store, "another") == 0.0
