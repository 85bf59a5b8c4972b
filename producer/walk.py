"""Walking a folder that somebody else filled: in a fixed order, never out of it, never into a pipe or a device.

Names of files are kept as plain strings here and in the other modules that meet every file: pathlib interns each name
it sees for the life of the process, which would make memory grow with the export.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from readroom.errors import BadCall, SourceError
from readroom.records import Reason, SkippedItem


@dataclass(frozen=True, slots=True)
class Entry:
    """A regular file: `item` names it relative to the source, `path` is where it really is."""

    item: str
    path: str


def find_source(path: Path) -> Path:
    """The real path of what a command was given. Raises BadCall when nothing is there."""
    try:
        return path.expanduser().resolve(strict=True)
    except (OSError, RuntimeError):
        raise BadCall("nothing stands at the given path", "Give the folder or file to enqueue.") from None


def walk_tree(root: Path) -> Iterator[Entry | SkippedItem]:
    """The files under `root` (a real path) in sorted order, so that a resumed walk meets them as the first one did.

    Links to files inside the tree are read where they lead; every other link, and what is no file, is a SkippedItem.
    A root that is a file is its only entry.
    """
    if not root.is_dir():
        yield Entry(clean_item(root.name), str(root))
        return
    # A stack of iterators instead of recursion: exports can be nested deeper than Python's stack.
    stack = [_list_folder(str(root), "")]
    while stack:
        found = next(stack[-1], None)
        if found is None:
            stack.pop()
        elif isinstance(found, SkippedItem):
            yield found
        else:
            path, item = found
            kind = _look_at(path)
            if stat.S_ISDIR(kind):
                stack.append(_list_folder(path, item))
            else:
                yield judge_entry(str(root), path, item, kind)


def _list_folder(folder: str, item: str) -> Iterator[tuple[str, str] | SkippedItem]:
    # Names only: 20,000 of them in one folder are 1.5 MB, as os.DirEntry objects they would be five times that.
    try:
        names = sorted(os.listdir(folder))  # noqa: PTH208
    except OSError:
        yield SkippedItem(clean_item(item), Reason.UNREADABLE, "the folder cannot be read")
        return
    for name in names:
        yield f"{folder.rstrip(os.sep)}/{name}", f"{item}/{name}" if item else name


def _look_at(path: str) -> int:
    try:
        return os.lstat(path).st_mode
    except (OSError, ValueError):
        return 0


def judge_entry(root: str, path: str, item: str, kind: int) -> Entry | SkippedItem:
    """What one directory entry is worth; `kind` is its st_mode, 0 when it cannot be had."""
    if stat.S_ISREG(kind):
        return Entry(clean_item(item), path)
    if stat.S_ISLNK(kind):
        return follow_link(root, path, item)
    if kind == 0:
        return SkippedItem(clean_item(item), Reason.UNREADABLE, "it vanished or cannot be looked at")
    return SkippedItem(clean_item(item), Reason.UNSAFE_PATH, "a pipe, socket or device")


def follow_link(root: str, path: str, item: str) -> Entry | SkippedItem:
    """A link to a regular file inside `root` stands for that file; any other is refused."""
    target = os.path.realpath(path)
    if target != root and not is_inside(root, target):
        return SkippedItem(clean_item(item), Reason.UNSAFE_PATH, "a link that leads out of the source")
    if not stat.S_ISREG(_look_at(target)):
        return SkippedItem(clean_item(item), Reason.UNSAFE_PATH, "a link to a folder, or to nothing")
    return Entry(clean_item(item), target)


def real_file(path: str) -> str | None:
    """The real path of a regular file, links followed; None when there is none. The caller checks where it leads."""
    try:
        real = os.path.realpath(path)
    except ValueError:  # a name that no file system holds
        return None
    return real if stat.S_ISREG(_look_at(real)) else None


def is_inside(root: str, path: str) -> bool:
    """Whether a real path lies below a real folder."""
    return path.startswith(root.rstrip(os.sep) + os.sep)


@contextmanager
def open_file(path: str) -> Iterator[BinaryIO]:
    """Open a regular file for reading; not through a link, and without waiting on a pipe put in its place.

    Raises SourceError `unreadable`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        raise SourceError(Reason.UNREADABLE, "the file cannot be opened") from None
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise SourceError(Reason.UNREADABLE, "the file is no regular file any more")
        yield file


def judge_name(name: str) -> str | None:
    """Why a name that somebody else chose is unsafe (absolute, climbing, with a NUL); None when it is safe."""
    if not name or "\0" in name:
        return "a name that is none"
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        return "an absolute name"
    return "a name that climbs out of the archive" if ".." in re.split(r"[/\\]", name) else None


def clean_item(item: str) -> str:
    """An item's name as valid Unicode: bytes that are no UTF-8 (old exports in Latin-1) are written as escapes."""
    return item.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "")
