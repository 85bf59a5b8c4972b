"""From found images to queued jobs: rows first, committed a list at a time; then messages that carry their ids.

Everything is idempotent. The same content, task, checkpoint and settings are the same job, so a rerun adds nothing;
a killed enqueue is started again with the same arguments, finds its unfinished submission and goes on. A message that
cannot be published is no loss: its rows say that no message holds them, and workers' rescue publishes them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import product

from db.jobs import mark_published, unpublished_jobs
from db.session import Store
from db.submissions import (
    SubmissionPlan,
    SubmissionState,
    add_images,
    close_submission,
    get_submission,
    open_submission,
    tally_submission,
)
from producer.index import open_temporary
from producer.pacs import Found, digest_span, skip
from producer.skipped import SkippedLog, skipped_path
from producer.spool import sync_content
from producer.walk import open_file
from readroom.errors import BrokerError, SourceError
from readroom.records import FoundImage, JobKind, Priority, Reason, SkippedItem, SubmissionCounts
from readroom.settings import Settings

Publish = Callable[[JobKind, Priority, list[int]], int]
Progress = Callable[[str, int], None]

# One transaction of 500 images takes 0.1 s. A list is also closed after two seconds, so that workers get their first
# images while the rest of the export is still being read; then at one of a few lengths, since the SQLite driver keeps
# a prepared statement (0.5 MB) for each length it has seen.
LIST_IMAGES = 500
LIST_SECONDS = 2.0
LIST_LENGTHS = (200, 100, 50, 20, 10, 5, 2, 1)
POLL_SECONDS = 0.5
PROGRESS_ITEMS = 50
LEFTOVER_IDS = 1000

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Walked:
    """What the walk has met so far."""

    images: int = 0
    skipped: int = 0

    @property
    def items(self) -> int:
        """Everything considered."""
        return self.images + self.skipped


def enqueue(
    settings: Settings,
    store: Store,
    found: Iterable[Found],
    plan: SubmissionPlan,
    publish: Publish,
    depth: Callable[[], int],
    progress: Progress | None = None,
    dry_run: bool = False,
) -> SubmissionCounts:
    """Queue a job of each captioner and kind of `plan` for each image found; what is skipped is listed beside them.

    `publish(kind, priority, ids)` sends messages, `depth()` says how many wait; while that is
    `settings.max_queue_depth` or more nothing is added. `progress(event, number)` hears `found` (items so far),
    `waiting` (messages waiting) and `done` (items). Rows outlive a broker that does not answer.
    Raises StoreError, and BadCall from the source or when another process is enqueueing the same plan.
    """
    report = progress or (lambda event, number: None)
    if dry_run:
        return count_dry(found, plan, report)
    submission, skipped = take_submission(settings, store, plan)
    try:
        desk = Desk(settings, store, plan, submission, publish, depth, report)
        walked = Walked()
        for images in list_images(found, skipped, walked, report):
            desk.add_list(images)
        desk.publish_leftovers()
        counts = count_rows(store, submission, walked, skipped)
        close_submission(store, submission, counts)
        skipped.unlock()
    except BaseException:
        skipped.close()
        raise
    report("done", walked.items)
    return counts


def take_submission(settings: Settings, store: Store, plan: SubmissionPlan) -> tuple[str, SkippedLog]:
    """The submission of this plan, for this process alone while it holds the (empty) list of skipped items."""
    while True:
        submission = open_submission(store, plan)
        skipped = SkippedLog(skipped_path(settings.home_dir, submission))
        record = get_submission(store, submission)
        if record is not None and record.state is SubmissionState.ENQUEUING:
            skipped.clear()
            return submission, skipped
        skipped.close()  # the process that held it has just finished the submission: this one is another


def list_images(
    found: Iterable[Found], skipped: SkippedLog, walked: Walked, report: Progress
) -> Iterator[list[FoundImage]]:
    """Lists of images, each with its digest; skipped items go to their file on the way."""
    images: list[FoundImage] = []
    started = time.monotonic()
    for item in map(digest_image, found):
        if isinstance(item, SkippedItem):
            skipped.add(item)
            walked.skipped += 1
        else:
            images.append(item)
            walked.images += 1
        if walked.items % PROGRESS_ITEMS == 0:
            report("found", walked.items)
        if images and (len(images) >= LIST_IMAGES or time.monotonic() - started > LIST_SECONDS):
            skipped.flush()
            length = cut_length(len(images))
            yield images[:length]
            images, started = images[length:], time.monotonic()
    if images:
        yield images


def cut_length(count: int) -> int:
    """How many of `count` waiting images make the next list: all that a full list holds, else one of few lengths."""
    return count if count >= LIST_IMAGES else next(length for length in LIST_LENGTHS if length <= count)


def digest_image(item: Found) -> Found:
    """The image with the SHA-256 of its file, or a skipped item when the file cannot be read (any more)."""
    if isinstance(item, SkippedItem) or item.ref.digest:
        return item
    try:
        with open_file(item.ref.path) as file:
            return replace(item, ref=replace(item.ref, digest=digest_span(file)))
    except SourceError as error:
        return skip(item.item, error)
    except OSError:
        return SkippedItem(item.item, Reason.UNREADABLE, "the file cannot be read to its end")


class Desk:
    """Where lists of images become rows and messages of one submission."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        plan: SubmissionPlan,
        submission: str,
        publish: Publish,
        depth: Callable[[], int],
        report: Progress,
    ) -> None:
        self._settings, self._store, self._plan, self._submission = settings, store, plan, submission
        self._publish, self._depth, self._report = publish, depth, report
        self._resumed = 0

    def wait_for_room(self) -> None:
        """Return when fewer messages wait than `max_queue_depth`, or when the broker cannot be asked."""
        pause = threading.Event()
        while (waiting := self._measure_depth()) >= self._settings.max_queue_depth:
            self._report("waiting", waiting)
            pause.wait(POLL_SECONDS)

    def add_list(self, images: Sequence[FoundImage]) -> None:
        """Commit the rows of a list of images, then publish the jobs that are new, while there is room for them.

        One kind and one captioner at a time: a message has one kind, and a batch one captioner.
        """
        sync_content(self._settings.home_dir, (image.ref.path for image in images))
        for kind, captioner in product(self._plan.kinds, self._plan.captioners):
            self.wait_for_room()
            part = replace(self._plan, kinds=(kind,), captioners=(captioner,))
            added = add_images(self._store, self._submission, part, images)
            self._resumed += added.resumed
            self._publish_ids(kind, self._plan.priority, [*added.queued, *added.raised])

    def publish_leftovers(self) -> None:
        """After a resume: publish what was committed before the kill but not published. Others' jobs, too: harmless."""
        while self._resumed:
            left = unpublished_jobs(self._store, self._plan.kinds, grace_s=0.0, limit=LEFTOVER_IDS)
            groups: dict[tuple[JobKind, Priority], list[int]] = {}
            for job_id, kind, priority in left:
                groups.setdefault((kind, priority), []).append(job_id)
            self.wait_for_room()
            if not left or not all(self._publish_ids(*group, ids) for group, ids in groups.items()):
                return

    def _publish_ids(self, kind: JobKind, priority: Priority, ids: list[int]) -> bool:
        """Whether messages hold the ids now."""
        if not ids:
            return True
        try:
            self._publish(kind, priority, ids)
        except BrokerError as error:
            log.warning("jobs are stored but not published, workers will find them: %s", error)
            return False
        mark_published(self._store, ids)
        return True

    def _measure_depth(self) -> int:
        try:
            return self._depth()
        except BrokerError:
            return 0


def count_rows(store: Store, submission: str, walked: Walked, skipped: SkippedLog) -> SubmissionCounts:
    """What the submission holds, over all its runs: a resumed enqueue counts as one that was never killed."""
    skipped.flush()
    tally = tally_submission(store, submission)
    return SubmissionCounts(
        submission=submission,
        found=walked.items,
        queued=tally.queued,
        already_done=tally.already_done,
        skipped=skipped,
        studies=tally.studies,
        images=walked.images,
        already_failed=tally.failed,
    )


def count_dry(found: Iterable[Found], plan: SubmissionPlan, report: Progress) -> SubmissionCounts:
    """What would be enqueued. Nothing is written or digested, so `queued` counts jobs that may exist already."""
    skipped, walked = SkippedLog(None), Walked()
    with closing(open_temporary("CREATE TABLE studies (uid TEXT PRIMARY KEY) WITHOUT ROWID;")) as memory:
        for item in found:
            if isinstance(item, SkippedItem):
                skipped.add(item)
                walked.skipped += 1
            else:
                walked.images += 1
                if item.study_instance_uid:
                    memory.execute("INSERT OR IGNORE INTO studies VALUES (?)", (item.study_instance_uid,))
            if walked.items % PROGRESS_ITEMS == 0:
                report("found", walked.items)
        studies = memory.execute("SELECT count(*) FROM studies").fetchone()[0]
    queued = walked.images * len(plan.kinds) * len(plan.captioners)
    return SubmissionCounts("", walked.items, queued, 0, skipped, studies, walked.images)
