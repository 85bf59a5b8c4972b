"""What a walk must remember of an export: instances seen, studies with a presentation image, raw images set aside.

Kept in a temporary SQLite file without name (the operating system drops it with the process): memory stays flat
whatever the export holds. UIDs are kept as 16-byte hashes.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass

CACHE_KIB = 512
SCHEMA = """
    CREATE TABLE instances (uid BLOB PRIMARY KEY, path BLOB, pixels_start INT, pixels_end INT, digest TEXT,
                            pixels_digest TEXT) WITHOUT ROWID;
    CREATE TABLE studies (uid BLOB PRIMARY KEY) WITHOUT ROWID;
    CREATE TABLE raw_images (number INTEGER PRIMARY KEY, item TEXT, study BLOB);
"""


@dataclass(frozen=True, slots=True)
class Content:
    """Where an instance's bytes can be read again, or their digests when they cannot (or are known already).

    Pixel positions are None where the pixel data has no bytes of its own (deflated files).
    """

    path: str
    pixels_start: int | None
    pixels_end: int | None
    digest: str = ""
    pixels_digest: str = ""


def open_temporary(schema: str) -> sqlite3.Connection:
    """A nameless SQLite file of half a MiB of memory at most, in one transaction that is never committed."""
    connection = sqlite3.connect("", isolation_level=None, check_same_thread=False)
    pragmas = f"PRAGMA cache_size = -{CACHE_KIB}; PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
    connection.executescript(f"{pragmas} {schema} BEGIN;")
    return connection


class ExportIndex:
    """Bounded memory of one walk."""

    def __init__(self) -> None:
        self._connection = open_temporary(SCHEMA)

    def close(self) -> None:
        """Forget everything."""
        self._connection.close()

    def remember_instance(self, sop_instance_uid: str, content: Content) -> Content | None:
        """Note an instance; the content that was seen before under its UID, None when it is the first."""
        uid = _hash(sop_instance_uid)
        columns = "path, pixels_start, pixels_end, digest, pixels_digest"
        found = self._connection.execute(f"SELECT {columns} FROM instances WHERE uid = ?", (uid,)).fetchone()  # noqa: S608
        if found:
            return Content(os.fsdecode(found[0]), *found[1:])
        values = (content.pixels_start, content.pixels_end, content.digest, content.pixels_digest)
        self._connection.execute(
            "INSERT INTO instances VALUES (?, ?, ?, ?, ?, ?)", (uid, os.fsencode(content.path), *values)
        )
        return None

    def remember_study(self, study_instance_uid: str) -> None:
        """Note a study that has an image to present."""
        self._connection.execute("INSERT OR IGNORE INTO studies VALUES (?)", (_hash(study_instance_uid),))

    def set_aside(self, item: str, study_instance_uid: str) -> None:
        """Note a raw image; what becomes of it depends on the rest of its study."""
        self._connection.execute(
            "INSERT INTO raw_images (item, study) VALUES (?, ?)", (item, _hash(study_instance_uid))
        )

    def list_raw(self) -> Iterator[tuple[str, bool]]:
        """The raw images in the order they were found, each with whether its study has an image to present."""
        known = "EXISTS (SELECT 1 FROM studies WHERE studies.uid = raw_images.study)"
        query = f"SELECT item, {known} FROM raw_images ORDER BY number"  # noqa: S608
        for item, has_presentation in self._connection.execute(query):
            yield item, bool(has_presentation)


def _hash(uid: str) -> bytes:
    return hashlib.blake2b(uid.encode("utf-8", "replace"), digest_size=16).digest()
