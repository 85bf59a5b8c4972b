"""Enqueue against a real store: rows, messages, reruns, back-pressure, dry runs, a killed process."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from db.jobs import drop_failures, unpublished_jobs
from db.session import Store, open_store, store_url
from db.submissions import (
    PlannedCaptioner,
    SubmissionPlan,
    SubmissionState,
    add_images,
    get_submission,
    list_submissions,
    open_submission,
)
from db.tables import images, jobs, studies, submission_jobs
from producer.coco import read_coco
from producer.enqueue import cut_length, enqueue
from producer.images import scan_images
from producer.pacs import scan_export
from producer.skipped import SkippedLog, read_skipped, skipped_path
from readroom.cli import name_failed
from readroom.errors import BadCall, BrokerError, SourceError, StoreError
from readroom.records import FAMILIES, GenerationSettings, JobKind, Priority, SkippedItem, SubmissionCounts
from readroom.settings import Settings, load_settings
from tests import exports
from tests.fakes.items import fail_jobs
from tests.unit.test_coco import picture, write_coco

Sent = list[tuple[str, str, list[int]]]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(home=tmp_path / "home")


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    settings.home_dir.mkdir(parents=True)
    opened = open_store(store_url(settings))
    yield opened
    opened.close()


@pytest.fixture
def export(tmp_path: Path) -> Path:
    exports.build_export(tmp_path / "export")
    return tmp_path / "export"


class Queue:
    """Takes the messages; `broken` makes it refuse them."""

    def __init__(self) -> None:
        self.sent: Sent = []
        self.broken = False
        self.waiting = 0

    def publish(self, kind: JobKind, priority: Priority, ids: list[int]) -> int:
        if self.broken:
            raise BrokerError("the broker does not answer")
        self.sent.append((kind, priority, ids))
        return 1

    def depth(self) -> int:
        if self.broken:
            raise BrokerError("the broker does not answer")
        return self.waiting

    @property
    def ids(self) -> list[int]:
        return [job_id for _, _, ids in self.sent for job_id in ids]


@pytest.fixture
def queue() -> Queue:
    return Queue()


def make_plan(
    source: str = "export",
    priority: Priority = Priority.BULK,
    checkpoint: str = "dummy",
    captioners: tuple[PlannedCaptioner, ...] = (),
) -> SubmissionPlan:
    one = PlannedCaptioner("blip", checkpoint, GenerationSettings())
    return SubmissionPlan("pacs", source, priority, captioners or (one,), (JobKind.CAPTION,))


def run(
    settings: Settings, store: Store, found: Any, queue: Queue, plan: SubmissionPlan | None = None, **more: Any
) -> SubmissionCounts:
    return enqueue(settings, store, found, plan or make_plan(), queue.publish, queue.depth, **more)


def read_rows(store: Store) -> dict[str, list[tuple[Any, ...]]]:
    """All rows of a store without what differs between two runs of the same thing (random keys, times)."""
    columns = {
        "studies": [studies.c.study_instance_uid, studies.c.accession_number, studies.c.patient_id],
        "images": [images.c.digest, images.c.sop_instance_uid, images.c.path, images.c.view, images.c.view_rank],
        "jobs": [jobs.c.key, jobs.c.kind, jobs.c.state, jobs.c.priority, jobs.c.attempt],
        "links": [submission_jobs.c.item, submission_jobs.c.source_id],
    }
    with store.read() as connection:
        return {
            name: sorted(map(tuple, connection.execute(select(*some)).all()), key=repr)
            for name, some in columns.items()
        }


def test_enqueue_makes_studies_images_and_jobs_and_publishes_their_ids(
    settings: Settings, store: Store, queue: Queue, export: Path
) -> None:
    counts = run(settings, store, scan_export(export, settings), queue)
    rows = read_rows(store)
    assert counts.images == counts.queued == len(rows["jobs"]) == len(rows["images"]) == 19
    assert counts.found == counts.images + len(counts.skipped) == 75
    assert (counts.studies, counts.already_done) == (len(rows["studies"]), 0) == (18, 0)
    assert sorted(queue.ids) == sorted(set(queue.ids)) and len(queue.ids) == 19
    assert {(kind, priority) for kind, priority, _ in queue.sent} == {("caption", "bulk")}
    assert unpublished_jobs(store, ["caption"], 0.0, 100) == []
    record = get_submission(store, counts.submission)
    assert record is not None and record.state is SubmissionState.ENQUEUED
    assert (record.found, record.queued, record.skipped) == (75, 19, 56)


def test_the_counts_are_one_json_document(settings: Settings, store: Store, queue: Queue, export: Path) -> None:
    document = json.loads(json.dumps(run(settings, store, scan_export(export, settings), queue).as_json()))
    assert set(document) == {"submission", "found", "queued", "already_done", "skipped", "studies", "images"}
    assert {"item": "bad/burned", "reason": "burned_in", "detail": "text is burned into the picture"} in document[
        "skipped"
    ]


def test_skipped_items_stand_beside_the_submission_for_its_owner_only(
    settings: Settings, store: Store, queue: Queue, export: Path
) -> None:
    counts = run(settings, store, scan_export(export, settings), queue)
    path = skipped_path(settings.home_dir, counts.submission)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path == settings.home_dir / "submissions" / counts.submission / "skipped.jsonl"
    listed = list(read_skipped(settings.home_dir, counts.submission))
    assert listed == list(counts.skipped) == [counts.skipped[n] for n in range(len(counts.skipped))]
    assert counts.skipped[-1] == listed[-1] and counts.skipped[2:4] == listed[2:4]
    assert list(read_skipped(settings.home_dir, "unknown")) == []


def test_a_rerun_enqueues_nothing_twice(settings: Settings, store: Store, queue: Queue, export: Path) -> None:
    first = run(settings, store, scan_export(export, settings), queue)
    rows, ids = read_rows(store), list(queue.ids)
    second = run(settings, store, scan_export(export, settings), queue)
    assert second.submission != first.submission
    assert (second.queued, second.already_done, second.images) == (0, 19, 19)
    assert (second.found, second.studies) == (first.found, first.studies)
    again = read_rows(store)
    assert {name: again[name] for name in ("studies", "images", "jobs")} == {
        n: rows[n] for n in ("studies", "images", "jobs")
    }
    assert queue.ids == ids


def test_a_rerun_publishes_cancelled_jobs_and_counts_dead_letters(
    settings: Settings, store: Store, queue: Queue, export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(settings, store, scan_export(export, settings), queue)
    ids = sorted(queue.ids)
    fail_jobs(store, ids[:5])
    drop_failures(store, ids[:2])
    queue.sent.clear()
    counts = run(settings, store, scan_export(export, settings), queue)
    assert (sorted(queue.ids), counts.queued, counts.already_done) == (ids[:2], 2, 17)
    assert counts.already_failed == 3 and "already_failed" not in counts.as_json()
    name_failed(counts)
    said = capsys.readouterr()
    assert "3 of its jobs are dead letters" in said.err
    assert f"readroom failures requeue --submission {counts.submission}" in said.err
    assert "dead letters" not in said.out


def test_another_checkpoint_is_other_work(settings: Settings, store: Store, queue: Queue, export: Path) -> None:
    run(settings, store, scan_export(export, settings), queue)
    other = run(settings, store, scan_export(export, settings), queue, make_plan(checkpoint="other"))
    assert (other.queued, other.already_done) == (19, 0)


BOTH = tuple(PlannedCaptioner(family, f"dummy:{family}", GenerationSettings()) for family in FAMILIES)


def test_several_captioners_get_their_own_messages_of_every_image(
    settings: Settings, store: Store, queue: Queue, export: Path
) -> None:
    counts = run(settings, store, scan_export(export, settings), queue, make_plan(captioners=BOTH))
    assert (counts.images, counts.queued, counts.already_done, counts.studies) == (19, 38, 0, 18)
    with store.read() as connection:
        captioner_of = dict(connection.execute(select(jobs.c.id, jobs.c.captioner)).all())
    assert len(queue.ids) == len(set(queue.ids)) == len(captioner_of) == 38
    # A batch has one captioner, so that messages of several would be cut up again by every worker.
    assert [{captioner_of[job_id] for job_id in ids} for _, _, ids in queue.sent] == [{"blip"}, {"vlp"}]
    again = run(settings, store, scan_export(export, settings), queue, make_plan(captioners=BOTH))
    assert (again.queued, again.already_done) == (0, 38)


def test_a_captioner_that_is_added_later_gets_only_its_own_jobs(
    settings: Settings, store: Store, queue: Queue, export: Path
) -> None:
    run(settings, store, scan_export(export, settings), queue, make_plan(captioners=BOTH[:1]))
    counts = run(settings, store, scan_export(export, settings), queue, make_plan(captioners=BOTH))
    assert (counts.images, counts.queued, counts.already_done) == (19, 19, 19)


def test_a_dry_run_counts_the_jobs_of_each_captioner(
    settings: Settings, store: Store, queue: Queue, export: Path
) -> None:
    found = scan_export(export, settings, keep=False)
    counts = run(settings, store, found, queue, make_plan(captioners=BOTH), dry_run=True)
    assert (counts.images, counts.queued) == (19, 38)


def test_a_queue_that_the_first_captioner_fills_holds_up_the_second(
    settings: Settings, store: Store, queue: Queue, export: Path
) -> None:
    def progress(event: str, _number: int) -> None:
        if event == "waiting":
            queue.waiting = 0
            waited.append(len(queue.sent))

    waited: list[int] = []
    queue.publish = lambda *message: fill(queue, message)  # type: ignore[method-assign]
    narrow = settings.model_copy(update={"max_queue_depth": 5})
    run(narrow, store, scan_export(export, settings), queue, make_plan(captioners=BOTH), progress=progress)
    assert (waited, len(queue.ids)) == ([1], 38)


def fill(queue: Queue, message: tuple[JobKind, Priority, list[int]]) -> int:
    """Every message fills the queue until somebody waits."""
    queue.sent.append(message)
    queue.waiting = 9
    return 1


def test_a_more_urgent_rerun_publishes_waiting_jobs_again(
    settings: Settings, store: Store, queue: Queue, export: Path
) -> None:
    run(settings, store, scan_export(export, settings), queue)
    counts = run(settings, store, scan_export(export, settings), queue, make_plan(priority=Priority.STAT))
    assert (counts.queued, counts.already_done) == (0, 19)
    assert [(priority, len(ids)) for _, priority, ids in queue.sent] == [("bulk", 19), ("stat", 19)]


def test_an_archive_is_the_same_work_as_its_folder(
    settings: Settings, store: Store, queue: Queue, tmp_path: Path
) -> None:
    exports.write_files(tmp_path / "in", exports.good_files())
    run(settings, store, scan_export(tmp_path / "in", settings), queue)
    (tmp_path / "a.zip").write_bytes(exports.zip_bytes(exports.good_files()))
    counts = run(settings, store, scan_export(tmp_path / "a.zip", settings), queue, make_plan("zip"))
    assert (counts.queued, counts.already_done) == (0, 17)


def test_members_of_an_archive_are_on_the_disk_before_a_row_names_them(
    settings: Settings, store: Store, queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    at_commit: list[list[str]] = []

    def note_sync(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))

    def note_commit(*arguments: Any) -> Any:
        at_commit.append(list(synced))
        return add_images(*arguments)

    monkeypatch.setattr("os.fsync", note_sync)
    monkeypatch.setattr("producer.enqueue.add_images", note_commit)
    exports.write_files(tmp_path / "in", {"plain": exports.good_files()["A/dx.dcm"]})
    (tmp_path / "in" / "a.zip").write_bytes(exports.zip_bytes({"b": exports.good_files()["B/ap.dcm"]}))
    run(settings, store, scan_export(tmp_path / "in", settings), queue)
    spool = settings.home_dir / "spool"
    (kept,) = [path for path in spool.rglob("*") if path.is_file()]
    ((first, *folders),) = at_commit
    assert (first, set(folders)) == (str(kept), {str(kept.parent), str(spool), str(settings.home_dir)})


def test_a_dry_run_writes_nothing(settings: Settings, store: Store, queue: Queue, export: Path) -> None:
    before = sorted(settings.home_dir.rglob("*"))
    counts = run(settings, store, scan_export(export, settings, keep=False), queue, dry_run=True)
    assert (counts.submission, counts.found, counts.queued, counts.studies) == ("", 75, 19, 18)
    assert {item.reason for item in counts.skipped} >= {"burned_in", "unsafe_path"}
    assert len(list(counts.skipped)) == len(counts.as_json()["skipped"]) == 56
    assert list_submissions(store) == [] and queue.sent == []
    assert sorted(settings.home_dir.rglob("*")) == before


def test_a_file_that_vanishes_or_cannot_be_read_is_skipped_and_the_rest_goes_on(
    settings: Settings, store: Store, queue: Queue, tmp_path: Path
) -> None:
    exports.write_files(tmp_path / "in", {"a": exports.good_files()["A/dx.dcm"], "b": exports.good_files()["B/ap.dcm"]})

    def found() -> Iterator[Any]:
        for one in scan_export(tmp_path / "in", settings):
            if one.item == "a":
                (tmp_path / "in" / "a").unlink()
            yield one

    counts = run(settings, store, found(), queue)
    assert (counts.images, list(counts.skipped)) == (1, [SkippedItem("a", "unreadable", "the file cannot be opened")])


def test_names_that_are_no_utf8_are_stored_and_found_again(
    settings: Settings, store: Store, queue: Queue, tmp_path: Path
) -> None:
    data = {b"M\xfcller.dcm": exports.good_files()["A/dx.dcm"], b"caf\xe9.txt": b"x"}
    exports.write_files(tmp_path / "in", {os.fsdecode(name): content for name, content in data.items()})
    counts = run(settings, store, scan_export(tmp_path / "in", settings), queue)
    assert (counts.images, [one.item for one in counts.skipped]) == (1, ["caf\\udce9.txt"])
    with store.read() as connection:
        path = connection.execute(select(images.c.path)).scalar_one()
    assert Path(path).read_bytes() == data[b"M\xfcller.dcm"]


def test_equal_files_are_two_items_and_one_job(settings: Settings, store: Store, queue: Queue, tmp_path: Path) -> None:
    exports.write_files(tmp_path / "in", {"a.jpg": picture(1), "b.jpg": picture(1), "c.jpg": picture(2)})
    counts = run(settings, store, scan_images(tmp_path / "in", settings), queue)
    assert (counts.found, counts.images, counts.queued, counts.already_done) == (3, 3, 2, 1)


def test_a_coco_submission_keeps_ids_and_captions(
    settings: Settings, store: Store, queue: Queue, tmp_path: Path
) -> None:
    write_coco(tmp_path / "coco", ["a.jpg", "b.jpg"], [{"id": 5, "file_name": "gone.jpg"}])
    counts = run(settings, store, read_coco(tmp_path / "coco", settings), queue)
    assert (counts.queued, [one.reason for one in counts.skipped]) == (2, ["missing"])
    with store.read() as connection:
        links = connection.execute(select(submission_jobs.c.source_id, submission_jobs.c.reference_texts)).all()
    assert sorted(map(tuple, links)) == [("100", ["caption 1", "caption 0"]), ("101", ["caption 3", "caption 2"])]


# -------------------------------------------------------------------------------------------- a broker in difficulties


def test_rows_outlive_a_broker_that_does_not_answer(
    settings: Settings, store: Store, queue: Queue, export: Path, caplog
) -> None:
    queue.broken = True
    counts = run(settings, store, scan_export(export, settings), queue)
    assert counts.queued == 19 and len(unpublished_jobs(store, ["caption"], 0.0, 100)) == 19
    assert "CANARY" not in caplog.text and str(export) not in caplog.text


def test_a_full_queue_pauses_the_producer_until_there_is_room(
    store: Store, queue: Queue, export: Path, settings: Settings
) -> None:
    narrow = settings.model_copy(update={"max_queue_depth": 5})
    queue.waiting = 7
    paused = threading.Event()
    events: list[tuple[str, int]] = []

    def progress(event: str, number: int) -> None:
        events.append((event, number))
        if event == "waiting":
            paused.set()

    found = scan_export(export, settings)
    producer = threading.Thread(target=run, args=(narrow, store, found, queue), kwargs={"progress": progress})
    producer.start()
    assert paused.wait(30)
    assert queue.sent == [] and read_rows(store)["jobs"] == []
    queue.waiting = 4
    producer.join(30)
    assert not producer.is_alive() and len(queue.ids) == 19
    assert ("waiting", 7) in events and events[-1] == ("done", 75)


# ----------------------------------------------------------------------------------------------------- a killed process


def start_child(folder: Path, home: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.integration.enqueue_child", "pacs", str(folder), str(home)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
    )


def finish_child(folder: Path, home: Path) -> dict[str, Any]:
    child = start_child(folder, home, READROOM_TEST_LIST="20")
    out, _ = child.communicate(timeout=120)
    assert child.returncode == 0
    return json.loads(out.splitlines()[-1])


@pytest.mark.crash
@pytest.mark.parametrize("lists", [1, 3])
def test_a_killed_enqueue_resumes_and_ends_with_the_rows_of_an_uninterrupted_one(tmp_path: Path, lists: int) -> None:
    folder = tmp_path / "export"
    exports.build_export(folder)
    exports.write_many(folder / "many", 80)
    (tmp_path / "killed").mkdir()
    (tmp_path / "whole").mkdir()
    child = start_child(folder, tmp_path / "killed", READROOM_TEST_STEP="1", READROOM_TEST_LIST="20")
    assert child.stdout is not None and child.stdin is not None
    for _ in range(lists):
        while not child.stdout.readline().startswith("published"):
            pass
        if _ < lists - 1:
            child.stdin.write("on\n")
            child.stdin.flush()
    # It stands between publishing a list and noting that: the order "do it, then fail".
    child.send_signal(signal.SIGKILL)
    assert child.wait(30) == -signal.SIGKILL
    resumed = finish_child(folder, tmp_path / "killed")
    whole = finish_child(folder, tmp_path / "whole")
    names = ("found", "queued", "already_done", "images", "skipped")
    assert {name: resumed[name] for name in names} == {name: whole[name] for name in names}
    assert resumed["queued"] == 99
    killed_store = open_store(store_url(load_settings(home=tmp_path / "killed")))
    whole_store = open_store(store_url(load_settings(home=tmp_path / "whole")))
    assert read_rows(killed_store) == read_rows(whole_store)
    assert len(list_submissions(killed_store)) == 1
    assert unpublished_jobs(killed_store, ["caption"], 0.0, 1000) == []
    texts = [
        skipped_path(tmp_path / n, r["submission"]).read_text() for n, r in (("killed", resumed), ("whole", whole))
    ]
    assert texts[0] == texts[1]
    killed_store.close()
    whole_store.close()


def test_the_same_source_is_enqueued_by_one_process_at_a_time(
    settings: Settings, store: Store, queue: Queue, tmp_path: Path
) -> None:
    folder = tmp_path / "export"
    exports.build_export(folder)
    plan = make_plan(str(folder))
    child = start_child(folder, settings.home_dir, READROOM_TEST_STEP="1", READROOM_TEST_LIST="19")
    assert child.stdout is not None
    while not child.stdout.readline().startswith("published"):
        pass
    (submission,) = list_submissions(store)
    before = skipped_path(settings.home_dir, submission.id).read_text()
    assert before
    with pytest.raises(BadCall, match="enqueued by another process"):
        run(settings, store, scan_export(folder, settings), queue, plan)
    assert skipped_path(settings.home_dir, submission.id).read_text() == before
    # A killed process holds nothing; the next one begins the list anew.
    child.kill()
    child.communicate()
    counts = run(settings, store, scan_export(folder, settings), queue, plan)
    assert (counts.submission, counts.queued, len(list(counts.skipped))) == (submission.id, 19, 56)
    again = run(settings, store, scan_export(folder, settings), queue, plan)
    assert (again.submission != submission.id, again.already_done) == (True, 19)


def test_a_submission_that_ends_while_somebody_waits_for_it_is_not_written_to_again(
    settings: Settings, store: Store, queue: Queue, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(settings, store, scan_export(export, settings), queue)
    answers = iter([first.submission])
    monkeypatch.setattr("producer.enqueue.open_submission", lambda *both: next(answers, None) or open_submission(*both))
    second = run(settings, store, scan_export(export, settings), queue)
    assert second.submission != first.submission
    assert len(list(read_skipped(settings.home_dir, first.submission))) == 56


def test_a_failed_enqueue_lets_go_of_its_source(settings: Settings, store: Store, queue: Queue, export: Path) -> None:
    def found() -> Iterator[Any]:
        yield SkippedItem("a", "empty")
        raise SourceError("corrupt")

    with pytest.raises(SourceError) as caught:
        run(settings, store, found(), queue)
    assert run(settings, store, scan_export(export, settings), queue).queued == 19
    assert caught.traceback


def test_a_disk_too_full_for_the_skipped_items_is_named() -> None:
    # Every write to it fails, and only when the buffer is written.
    skipped = SkippedLog(None)
    with Path("/dev/full").open("w", encoding="utf-8") as skipped._file:
        skipped.add(SkippedItem("a", "empty"))
        with pytest.raises(StoreError, match=r"skipped items cannot be written \(ENOSPC\).*goes on where it stood"):
            skipped.flush()
        skipped.close()


def test_lists_closed_early_have_few_lengths_and_lose_nothing(
    settings: Settings, store: Store, queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.enqueue.LIST_SECONDS", 0.0)
    exports.write_many(tmp_path / "in", 30)
    counts = run(settings, store, scan_export(tmp_path / "in", settings), queue)
    assert (counts.queued, len(set(queue.ids))) == (30, 30)
    assert {len(ids) for _, _, ids in queue.sent} == {1}
    assert [cut_length(count) for count in (1, 3, 9, 60, 499, 500)] == [1, 2, 5, 50, 200, 500]
