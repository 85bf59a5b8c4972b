"""What a producer left out: JSON lines beside the submission, however many."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, overload

from readroom.errors import StoreError
from readroom.records import SkippedItem

FILE_NAME = "skipped.jsonl"
PIECE_BYTES = 64 * 1024


def skipped_path(home: Path, submission: str) -> Path:
    """Where a submission's skipped items stand. They name paths: the file is for its owner only (0600)."""
    return home / "submissions" / submission / FILE_NAME


class SkippedLog(Sequence[SkippedItem]):
    """A list of skipped items that lives in a file: written item by item, read back when somebody looks.

    `path` None (a dry run) keeps it in an unnamed temporary file.
    """

    def __init__(self, path: Path | None) -> None:
        self._length = 0
        self._file = _open_log(path)

    def add(self, item: SkippedItem) -> None:
        """Write one item. Raises StoreError when the disk is full."""
        line = {"item": item.item, "reason": str(item.reason), "detail": item.detail}
        try:
            self._file.write(json.dumps(line) + "\n")
        except OSError:
            raise StoreError("the list of skipped items cannot be written") from None
        self._length += 1

    def flush(self) -> None:
        """Let others see what was written."""
        self._file.flush()

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[SkippedItem]:
        # By position and in pieces: writer and readers share one descriptor, which an unnamed file has no more of.
        self._file.flush()
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


def _open_log(path: Path | None) -> TextIO:
    if path is None:
        return tempfile.TemporaryFile("w+", encoding="utf-8")
    try:
        path.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.fdopen(os.open(path, flags, 0o600), "w+", encoding="utf-8")
    except OSError:
        raise StoreError("the list of skipped items cannot be written") from None
