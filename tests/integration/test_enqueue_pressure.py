"""A producer's back-pressure against a real broker: each priority has its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from readroom.broker import broker_url, stop_broker
from readroom.intake import Intake, run_intake
from readroom.records import JobKind, Priority
from readroom.settings import Settings, load_settings
from readroom.transport import make_celery, publish, queue_depths
from tests import exports
from tests.unit.test_coco import picture


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    settings = load_settings(home=tmp_path / "home", max_queue_depth=3, ids_per_message=1)
    settings.home_dir.mkdir(mode=0o700)
    yield settings
    stop_broker(settings.home_dir)


class WaitingForRoom(Exception):
    """The producer pauses."""


def report(event: str, _number: int) -> None:
    if event == "waiting":
        raise WaitingForRoom


def test_a_full_bulk_queue_holds_up_bulk_and_not_stat(settings: Settings, tmp_path: Path) -> None:
    exports.write_files(tmp_path / "in", {"a.jpg": picture(1)})
    app = make_celery(settings, broker_url(settings, start=True))
    publish(app, JobKind.CAPTION, Priority.BULK, range(1, 4), 1)
    asked = {"source_kind": "images", "path": tmp_path / "in", "model": "dummy"}
    counts = run_intake(settings, Intake(priority=Priority.STAT, **asked), report)
    assert counts.queued == 1
    assert queue_depths(app, ["caption.stat", "caption.bulk"]) == {"caption.stat": 1, "caption.bulk": 3}
    with pytest.raises(WaitingForRoom):
        run_intake(settings, Intake(priority=Priority.BULK, **asked), report)
