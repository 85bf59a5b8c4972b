"""The directory of a DICOM medium (DICOMDIR), as a hint: which files it names that are not there.

The files themselves are always found by walking: directories are stale, cut, or hold wrong offsets often enough. So
this one is not parsed either; its ReferencedFileID elements are searched for in its bytes, whatever their order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from producer.walk import Entry, clean_item
from readroom.records import Reason, SkippedItem

CHUNK_BYTES = 256 * 1024
# (0004,1500) ReferencedFileID: up to 8 components of 8 characters (PS3.10 8.2), in the three encodings.
REFERENCED_FILE = re.compile(
    rb"(?:\x04\0\0\x15(?:CS.\0|.\0\0\0)|\0\x04\x15\0CS\0.)([A-Z0-9_]{1,8}(?:\\[A-Z0-9_]{1,8}){0,7}) ?", re.DOTALL
)
LONGEST_ELEMENT = 8 + 72


def list_missing(entry: Entry, file: BinaryIO) -> Iterator[SkippedItem]:
    """The files a DICOMDIR names that do not stand beside it (in upper or lower case)."""
    folder = Path(entry.path).parent
    for parts in find_references(file):
        if not _stands(folder, parts):
            item = Path(entry.item).parent.joinpath(*parts)
            yield SkippedItem(clean_item(str(item)), Reason.MISSING, "named by the DICOMDIR beside it, but not there")


def find_references(file: BinaryIO) -> Iterator[list[str]]:
    """The paths a DICOMDIR names, as components."""
    file.seek(0)
    held = b""
    while chunk := file.read(CHUNK_BYTES):
        held += chunk
        # What begins in the last bytes may be cut: it is found with the next chunk.
        is_last = len(chunk) < CHUNK_BYTES
        limit = len(held) if is_last else max(0, len(held) - LONGEST_ELEMENT)
        done = limit
        for found in REFERENCED_FILE.finditer(held):
            if found.start() < limit:
                done = max(done, found.end())
                yield found[1].decode("ascii").split("\\")
        held = held[done:]


def _stands(folder: Path, parts: list[str]) -> bool:
    spellings = (parts, [part.lower() for part in parts])
    return any(folder.joinpath(*spelling).exists() for spelling in spellings)
