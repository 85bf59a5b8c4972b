from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from db.jobs import get_failure
from db.session import Store
from models.base import Captioner, Picture
from models.decode_guard import RenderRequest
from models.dummy import DummyModel
from readroom.errors import CheckpointBroken, CheckpointMissing, DeviceBroken, ImageError, StoreUnavailable
from readroom.records import ImageRef, Outcome, Reason
from readroom.settings import load_settings
from tests.fakes.models import FakeCaptioner, break_device, paint
from tests.fakes.store import PixelRenderer, add_jobs, write_items
from worker.app import locate_checkpoint
from worker.engine import Engine
from worker.handle import JobHandler, Renderer


class NoRenderer:
    """Nothing may be decoded."""

    def render_many(self, requests: Iterable[RenderRequest]) -> list[Picture | ImageError]:
        raise AssertionError("something was decoded")

    def close(self) -> None:
        """Nothing to end."""


class RefusingRenderer(PixelRenderer):
    """Every second picture cannot be decoded."""

    def render_many(self, requests: Iterable[RenderRequest]) -> list[Picture | ImageError]:
        pictures = super().render_many(requests)
        refusal = ImageError(Reason.CORRUPT, "its pixel data end early")
        return [refusal if number % 2 else picture for number, picture in enumerate(pictures)]


def make_handler(
    store: Store, load: Callable[[str], Captioner] = FakeCaptioner, renderer: Renderer | None = None
) -> JobHandler:
    return JobHandler(store, Engine(load), renderer or PixelRenderer(), "worker", lease_s=60.0, max_attempts=3)


def run_jobs(handler: JobHandler, ids: list[int]) -> list[Outcome]:
    batches = handler.prepare_batches(handler.claim_jobs(ids))
    return sorted((one for batch in batches for one in handler.run_batch(batch)), key=lambda one: one.job_id)


def test_each_job_gets_the_text_of_its_own_picture(sqlite_store: Store, tmp_path: Path) -> None:
    ids = add_jobs(sqlite_store, write_items(tmp_path, range(1, 6)))

    outcomes = run_jobs(make_handler(sqlite_store), ids)

    assert [one.text for one in outcomes] == [f"pixel {number}" for number in range(1, 6)]
    assert all(one.model_ms is not None and one.attempt == 1 for one in outcomes)


def test_pictures_that_cannot_be_decoded_fail_with_their_reason_and_the_others_run(
    sqlite_store: Store, tmp_path: Path
) -> None:
    ids = add_jobs(sqlite_store, write_items(tmp_path, range(1, 5)))

    outcomes = run_jobs(make_handler(sqlite_store, renderer=RefusingRenderer()), ids)

    assert [(one.text, one.reason) for one in outcomes] == [
        ("pixel 1", None), (None, Reason.CORRUPT), ("pixel 3", None), (None, Reason.CORRUPT),
    ]  # fmt: skip


def test_jobs_of_two_checkpoints_are_prepared_apart(sqlite_store: Store, tmp_path: Path) -> None:
    items = write_items(tmp_path, range(1, 4))
    ids = add_jobs(sqlite_store, items, checkpoint="a") + add_jobs(sqlite_store, items, checkpoint="b")
    handler = make_handler(sqlite_store)

    batches = handler.prepare_batches(handler.claim_jobs(ids))

    assert sorted((batch.key.checkpoint, len(batch.jobs)) for batch in batches) == [("a", 3), ("b", 3)]


def test_a_checkpoint_that_is_not_here_fails_its_jobs_with_the_remedy(sqlite_store: Store, tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path)
    handler = make_handler(sqlite_store, lambda ref: locate_checkpoint(settings, sqlite_store, ref))  # type: ignore[arg-type,return-value]
    (job,) = add_jobs(sqlite_store, write_items(tmp_path, range(1, 2)), checkpoint="sha256:" + "0" * 64)

    for attempt in range(1, handler.max_attempts + 1):
        assert get_failure(sqlite_store, job) is None
        assert handler.find_queued([job])[job].unanswered == 0, "an answered attempt makes no suspect"
        (outcome,) = run_jobs(handler, [job])
        assert (outcome.attempt, outcome.retry) == (attempt, True)
        handler.write_outcomes([outcome])

    failure = get_failure(sqlite_store, job)
    assert failure is not None
    assert failure.reason == Reason.CHECKPOINT
    assert "readroom checkpoints add" in failure.detail


def test_nothing_is_ever_taken_in_place_of_a_checkpoint(sqlite_store: Store, tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path, blip_model="dummy")

    assert locate_checkpoint(settings, sqlite_store, "dummy:base_ms=0,item_ms=0").family == "dummy"
    with pytest.raises(CheckpointMissing):
        locate_checkpoint(settings, sqlite_store, "hub:Salesforce/blip-image-captioning-base@elsewhere:main")


def test_a_profile_nobody_knows_fails_its_jobs_and_not_the_worker(sqlite_store: Store, tmp_path: Path) -> None:
    captioner = FakeCaptioner()
    captioner.profile = "made_up_v9"
    ids = add_jobs(sqlite_store, write_items(tmp_path, range(1, 3)))

    outcomes = run_jobs(make_handler(sqlite_store, lambda ref: captioner), ids)

    assert {one.reason for one in outcomes} == {Reason.CHECKPOINT}


class CrashingRenderer(PixelRenderer):
    """Each decoder's process is ended from outside."""

    def render_many(self, requests: Iterable[RenderRequest]) -> list[Picture | ImageError]:
        return [ImageError(Reason.DECODER_CRASHED, "ended by SIGKILL") for _ in requests]


def remove_file(path: Path) -> None:
    path.unlink()


def put_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def put_link(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def change_file(path: Path) -> None:
    path.write_text("another")


@pytest.mark.parametrize(
    ("spoil", "reason", "retry"),
    [
        (remove_file, Reason.MISSING, True),
        (put_pipe, Reason.UNREADABLE, True),
        (put_link, Reason.UNREADABLE, True),
        (change_file, Reason.CHANGED, False),
    ],
)
def test_a_file_that_cannot_be_had_may_be_tried_again_and_one_that_changed_may_not(
    sqlite_store: Store, tmp_path: Path, spoil: Callable[[Path], None], reason: Reason, retry: bool
) -> None:
    (item,) = write_items(tmp_path, range(1, 2))
    ids = add_jobs(sqlite_store, [item])
    spoil(Path(item.ref.path))

    (outcome,) = run_jobs(make_handler(sqlite_store), ids)

    assert (outcome.reason, outcome.retry) == (reason, retry)


def test_a_file_that_gives_an_error_of_the_disk_may_be_tried_again(
    sqlite_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> object:
        raise OSError(errno.EIO, "Input/output error")

    ids = add_jobs(sqlite_store, write_items(tmp_path, range(1, 2)))
    monkeypatch.setattr("worker.handle.hashlib.file_digest", fail)

    (outcome,) = run_jobs(make_handler(sqlite_store), ids)

    assert (outcome.reason, outcome.retry) == (Reason.UNREADABLE, True)


def test_a_decoder_that_was_ended_may_be_tried_again_later(sqlite_store: Store, tmp_path: Path) -> None:
    ids = add_jobs(sqlite_store, write_items(tmp_path, range(1, 2)))
    handler = replace(make_handler(sqlite_store, renderer=CrashingRenderer()), retry_delay_s=600.0)

    assert handler.write_outcomes(run_jobs(handler, ids)).requeued == ids
    assert handler.claim_jobs(ids) == []


def test_a_model_that_looks_at_nothing_is_spared_the_decoding(sqlite_store: Store, tmp_path: Path) -> None:
    name = "dummy:pixels=0"
    ids = add_jobs(sqlite_store, write_items(tmp_path, range(1, 4)), checkpoint=name)

    outcomes = run_jobs(make_handler(sqlite_store, DummyModel, NoRenderer()), ids)

    assert len({one.text for one in outcomes}) == 3


class FeatureReader:
    """Reads the number that a file holds, as if it were features; `trouble` says what else happens with some."""

    def __init__(self, **trouble: Exception) -> None:
        self.trouble = trouble

    def read(self, ref: ImageRef) -> Picture:
        number = Path(ref.path).stem
        if f"n{number}" in self.trouble:
            raise self.trouble[f"n{number}"]
        return paint(int(number))


def make_reading_handler(store: Store, reader: FeatureReader) -> JobHandler:
    captioner = FakeCaptioner()
    captioner.reader = reader
    return make_handler(store, lambda ref: captioner, NoRenderer())


def test_a_model_that_reads_features_gets_them_and_each_image_fails_for_itself(
    sqlite_store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids = add_jobs(sqlite_store, write_items(tmp_path, range(1, 6)))
    trouble = {
        "n2": ImageError(Reason.MISSING, "it has no features"),
        "n3": KeyError("Doe^Jane"),
        "n4": OSError(errno.EIO, "Doe^Jane"),
    }

    outcomes = run_jobs(make_reading_handler(sqlite_store, FeatureReader(**trouble)), ids)

    assert [(one.text, one.reason, one.detail, one.retry) for one in outcomes] == [
        ("pixel 1", None, "", False),
        (None, Reason.MISSING, "it has no features", True),
        (None, Reason.BUG, "KeyError", False),
        (None, Reason.UNREADABLE, "OSError", True),
        ("pixel 5", None, "", False),
    ]
    assert "reading what stands in a picture's place failed" in caplog.text


def test_features_in_another_layout_than_the_checkpoints_are_no_images_fault(
    sqlite_store: Store, tmp_path: Path
) -> None:
    ids = add_jobs(sqlite_store, write_items(tmp_path, range(1, 3)))
    reader = FeatureReader(n1=CheckpointBroken("the features have another size"))

    outcomes = run_jobs(make_reading_handler(sqlite_store, reader), ids)

    assert {(one.reason, one.detail) for one in outcomes} == {(Reason.CHECKPOINT, "the features have another size")}


def test_a_store_that_is_away_while_a_model_is_loaded_is_no_jobs_fault(sqlite_store: Store, tmp_path: Path) -> None:
    def load(ref: str) -> Captioner:
        raise StoreUnavailable("away")

    handler = make_handler(sqlite_store, load)
    jobs = handler.claim_jobs(add_jobs(sqlite_store, write_items(tmp_path, range(1, 2))))

    with pytest.raises(StoreUnavailable):
        handler.prepare_batches(jobs)


def test_a_broken_device_is_for_the_process_and_not_for_the_jobs(sqlite_store: Store, tmp_path: Path) -> None:
    handler = make_handler(sqlite_store, lambda ref: FakeCaptioner(ref, break_device))
    (batch,) = handler.prepare_batches(handler.claim_jobs(add_jobs(sqlite_store, write_items(tmp_path, range(1, 3)))))

    with pytest.raises(DeviceBroken):
        handler.run_batch(batch)
