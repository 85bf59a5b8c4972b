"""Results and checkpoints on SQLite and on PostgreSQL."""

from __future__ import annotations

from dataclasses import replace

import pytest

import db.results
from db.checkpoints import (
    CheckpointRecord,
    CheckpointState,
    active_checkpoint,
    add_checkpoint,
    find_checkpoint,
    get_checkpoint,
    list_checkpoints,
    renew_checkpoint,
    set_active,
)
from db.results import iter_results
from db.session import Store, now
from db.submissions import add_images, open_submission
from readroom.errors import BadCall, CheckpointMissing
from readroom.records import JobKind
from tests.fakes.items import fail_jobs, finish_jobs, make_image, make_images, make_plan

# --- results --------------------------------------------------------------------------------------------------------


def test_a_result_names_its_image_study_and_checkpoint(store: Store) -> None:
    plan = make_plan()
    submission = open_submission(store, plan)
    (job,) = add_images(store, submission, plan, [make_image(4)]).queued
    finish_jobs(store, [job], "small effusion on the left")
    (one,) = iter_results(store, submission)
    image = make_image(4)
    assert (one.submission, one.job, one.kind, one.text) == (
        submission,
        job,
        JobKind.CAPTION,
        "small effusion on the left",
    )
    assert (one.study_instance_uid, one.series_instance_uid) == (image.study_instance_uid, image.series_instance_uid)
    assert (one.sop_instance_uid, one.accession_number) == (image.sop_instance_uid, image.accession_number)
    assert (one.item, one.view, one.image_digest, one.frame) == (image.item, "PA", image.ref.digest, 0)
    assert (one.question, one.captioner, one.checkpoint) == ("", "blip", "dummy:")
    assert (one.source_id, one.score) == (None, None)
    assert abs(one.created_at - now()) < 60


def test_results_come_page_by_page_each_once_in_the_order_of_the_jobs(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan()
    submission = open_submission(store, plan)
    plain = {"study_instance_uid": None, "sop_instance_uid": None}
    equal = [make_image(3, item=f"copy {number}", source_id=str(number), **plain) for number in range(5)]
    ids = add_images(store, submission, plan, [*make_images(20), *equal]).queued
    finish_jobs(store, ids[:18])
    fail_jobs(store, ids[18:])
    monkeypatch.setattr(db.results, "ROWS_PER_PAGE", 3)
    found = [(one.job, one.item) for one in iter_results(store, submission)]
    assert len(found) == 23
    assert found == sorted(found)
    assert {one.item for one in iter_results(store, submission) if one.source_id} == {one.item for one in equal}
    assert list(iter_results(store, "another")) == []


# --- checkpoints ----------------------------------------------------------------------------------------------------


def make_checkpoint(digit: str, family: str = "blip", added_at: float = 0.0) -> CheckpointRecord:
    manifest = {"scores": {"effusion": 0.93}, "parent": None}
    ref = f"sha256:{digit * 64}"
    return CheckpointRecord(ref, family, "bundled", f"/checkpoints/{digit}", manifest=manifest, added_at=added_at)


def test_a_checkpoint_is_registered_once_and_read_back(store: Store) -> None:
    record = make_checkpoint("a", added_at=5.0)
    assert add_checkpoint(store, record)
    assert not add_checkpoint(store, make_checkpoint("a", added_at=99.0))
    assert get_checkpoint(store, record.ref) == record
    assert get_checkpoint(store, "sha256:a") is None
    with pytest.raises(BadCall, match="candidate"):
        add_checkpoint(store, CheckpointRecord("x", "blip", "x", "/x", CheckpointState.ACTIVE))


def test_a_checkpoint_is_found_by_ref_by_newest_name_and_by_its_beginning(store: Store) -> None:
    records = [make_checkpoint(digit, added_at=float(moment)) for moment, digit in enumerate(("a", "b", "c"), 1)]
    for record in records:
        add_checkpoint(store, record)
    add_checkpoint(store, CheckpointRecord(f"sha256:{'a' * 10}{'b' * 54}", "blip", "other", "/other"))
    assert find_checkpoint(store, records[0].ref) == records[0]
    assert find_checkpoint(store, "bundled") == records[2]
    assert find_checkpoint(store, "b" * 8) == records[1] == find_checkpoint(store, "sha256:bbbbbbbb")
    assert find_checkpoint(store, "f" * 8) is None
    assert find_checkpoint(store, "") is None
    with pytest.raises(BadCall, match="2 checkpoints"):
        find_checkpoint(store, "aaaaaaaa")
    assert [one.ref for one in list_checkpoints(store)][1:] == [one.ref for one in reversed(records)]


@pytest.mark.parametrize("word", ["a", "aaaaaaa", "sha256:", "sha256:aaaaaaa", "sha256", "s"])
def test_a_short_word_is_not_the_beginning_of_a_digest(store: Store, word: str) -> None:
    add_checkpoint(store, make_checkpoint("a"))
    assert find_checkpoint(store, word) is None


def test_the_checkpoint_added_last_is_the_newest_of_its_name(store: Store) -> None:
    before = now()
    for digit in ("c", "a", "b"):
        add_checkpoint(store, make_checkpoint(digit))
    found = find_checkpoint(store, "bundled")
    assert found is not None
    assert found.ref == make_checkpoint("b").ref
    assert before <= found.added_at <= now()


def test_a_known_checkpoint_described_anew_keeps_its_state_and_is_the_newest(store: Store) -> None:
    for digit in ("a", "b"):
        add_checkpoint(store, make_checkpoint(digit))
    first = make_checkpoint("a")
    set_active(store, first.ref)
    renew_checkpoint(store, replace(first, name="mine", location="/elsewhere"))
    found = find_checkpoint(store, "mine")
    assert found is not None
    assert (found.ref, found.location, found.state) == (first.ref, "/elsewhere", CheckpointState.ACTIVE)
    renew_checkpoint(store, first)
    assert next(one.ref for one in list_checkpoints(store)) == first.ref


def test_exactly_one_checkpoint_of_a_family_is_active(store: Store) -> None:
    first, second, other = make_checkpoint("a"), make_checkpoint("b"), make_checkpoint("c", family="vlp")
    for record in (first, second, other):
        add_checkpoint(store, record)
    assert active_checkpoint(store, "blip") is None
    for chosen in (first, other, second, second):
        set_active(store, chosen.ref)
        active = active_checkpoint(store, chosen.family)
        assert active is not None
        assert active.ref == chosen.ref
    states = {one.ref: one.state for one in list_checkpoints(store)}
    assert states[first.ref] is CheckpointState.RETIRED
    assert states[other.ref] is CheckpointState.ACTIVE
    set_active(store, first.ref)
    with pytest.raises(CheckpointMissing):
        set_active(store, "sha256:unknown")
    active = active_checkpoint(store, "blip")
    assert active is not None
    assert active.ref == first.ref
