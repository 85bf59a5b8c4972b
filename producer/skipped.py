"""What a producer left out: JSON lines beside the submission, however many."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, overload

from readroom.errors import BadCall, StoreError
from readroom.records import SkippedItem

FILE_NAME = "skipped.jsonl"
PIECE_BYTES = 64 * 1024


def skipped_path(home: Path, submission: str) -> Path:
    """Where a submission's skipped items stand. They name paths: the file is for its owner only (0600)."""
    return home / "submissions" / submission / FILE_NAME


class SkippedLog(Sequence[SkippedItem]):
    """A list of skipped items that lives in a file: written item by item, read back when somebody looks.

    `path` None (a dry run) keeps it in an unnamed temporary file. Else the file is locked until `unlock` or `close`:
    one process at a time enqueues a submission. The kernel lets go of the lock of a process that is killed.
    Raises BadCall when another process holds it, and StoreError when it cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self._length = 0
        with translate_unwritable():
            self._file = _open_log(path)

    def clear(self) -> None:
        """Forget what an earlier run wrote, which was killed: the walk begins anew."""
        with translate_unwritable():
            self._file.truncate(0)

    def add(self, item: SkippedItem) -> None:
        """Write one item. Raises StoreError when the disk is full."""
        line = {"item": item.item, "reason": str(item.reason), "detail": item.detail}
        with translate_unwritable():
            self._file.write(json.dumps(line) + "\n")
        self._length += 1

    def flush(self) -> None:
        """Let others see what was written. Raises StoreError when the disk is full."""
        with translate_unwritable():
            self._file.flush()

    def unlock(self) -> None:
        """Let another process have the submission; the list can still be read."""
        self.flush()
        fcntl.flock(self._file.fileno(), fcntl.LOCK_UN)

    def close(self) -> None:
        """Give up, and the lock with it. What the disk did not take is dropped."""
        with suppress(OSError):
            self._file.close()

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[SkippedItem]:
        # By position and in pieces: writer and readers share one descriptor, which an unnamed file has no more of.
        self.flush()
        position, held = 0, b""
        while piece := os.pread(self._file.fileno(), PIECE_BYTES, position):
            position += len(piece)
            *lines, held = (held + piece).split(b"\n")
            yield from (SkippedItem(**json.loads(line)) for line in lines)

    @overload
    def __getitem__(self, index: int) -> SkippedItem: ...
    @overload
    def __getitem__(self, index: slice) -> list[SkippedItem]: ...
    def __getitem__(self, index: int | slice) -> SkippedItem | list[SkippedItem]:
        """By position from the start; a slice is a list."""
        if isinstance(index, slice):
            return list(islice(self, *index.indices(self._length)))
        found = next(islice(self, index if index >= 0 else self._length + index, None), None)
        if found is None:
            raise IndexError(index)
        return found


def read_skipped(home: Path, submission: str) -> Iterator[SkippedItem]:
    """The skipped items of a submission, as they were written; nothing when there is no such file."""
    path = skipped_path(home, submission)
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            values: dict[str, Any] = json.loads(line)
            yield SkippedItem(**values)


@contextmanager
def translate_unwritable() -> Iterator[None]:
    """A list that cannot be written ends the enqueue: nobody may believe that nothing was left out."""
    try:
        yield
    except OSError as error:
        cause = errno.errorcode.get(error.errno or 0, "unknown cause")
        remedy = "See whether there is space under READROOM_HOME, then repeat the command: it goes on where it stood."
        raise StoreError(f"the list of skipped items cannot be written ({cause})", remedy) from None


def _open_log(path: Path | None) -> TextIO:
    if path is None:
        return tempfile.TemporaryFile("w+", encoding="utf-8")
    path.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    # Not truncated here: it may be the list of a process that is writing it.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    file = os.fdopen(os.open(path, flags, 0o600), "w+", encoding="utf-8")
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        remedy = "Wait until it has ended, or end it; then repeat the command."
        raise BadCall("this source is being enqueued by another process", remedy) from None
    return file
