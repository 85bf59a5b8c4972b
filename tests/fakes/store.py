"""Jobs for the tests of the worker: tiny files whose content is a number, which the fake captioner repeats."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from db.session import Store
from db.submissions import PlannedCaptioner, SubmissionPlan, add_images, open_submission
from models.base import Picture
from models.decode_guard import RenderRequest
from readroom.errors import ImageError
from readroom.records import FoundImage, GenerationSettings, ImageRef, JobKind, Priority
from tests.fakes.models import paint

CHECKPOINT = "fake"


def write_items(folder: Path, numbers: Iterable[int]) -> list[FoundImage]:
    """One file for each number; they are read by PixelRenderer."""
    folder.mkdir(parents=True, exist_ok=True)
    return [_write_item(folder, number) for number in numbers]


def add_jobs(
    store: Store, found: Sequence[FoundImage], priority: Priority = Priority.BULK, checkpoint: str = CHECKPOINT
) -> list[int]:
    """Queued rows, as a producer leaves them before it publishes; the ids in the order of `found`."""
    captioners = (PlannedCaptioner("fake", checkpoint, GenerationSettings()),)
    plan = SubmissionPlan("images", f"/{priority}", priority, captioners, (JobKind.CAPTION,))
    submission = open_submission(store, plan)
    ids: list[int] = []
    for start in range(0, len(found), 500):
        ids += add_images(store, submission, plan, found[start : start + 500]).queued
    return ids


class PixelRenderer:
    """A renderer for files that hold a number: a picture of number % 256. No child processes."""

    def render_many(self, requests: Iterable[RenderRequest]) -> list[Picture | ImageError]:
        return [paint(int(Path(str(request.source)).read_text()) % 256) for request in requests]

    def close(self) -> None:
        """Nothing to end."""


def _write_item(folder: Path, number: int) -> FoundImage:
    path = folder / f"{number}.txt"
    path.write_text(str(number))
    return FoundImage(ImageRef(str(path), hashlib.sha256(str(number).encode()).hexdigest()), path.name)
