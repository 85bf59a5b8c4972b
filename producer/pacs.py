"""A PACS export: a folder of any shape, an archive, or one file. Yields what is to be captioned, and why not the rest.

Two instances under one SOPInstanceUID: the first in the sorted walk stays; a later one is a `duplicate` when its file
or its pixel data is the same, else a `uid_conflict`, left out for a person to look at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from producer.archive import Member, is_archive, is_packed, read_archive
from producer.dicom import Header, check_picture, is_dicom, judge_identity, read_header
from producer.index import Content, ExportIndex
from producer.media import list_missing
from producer.spool import Held, Spool, spool_folder
from producer.walk import Entry, clean_item, find_source, open_file, walk_tree
from readroom.errors import SourceError
from readroom.log import silence_quoting
from readroom.records import FoundImage, ImageRef, Reason, SkippedItem
from readroom.settings import MEBIBYTE, Settings

Found = FoundImage | SkippedItem
HASH_CHUNK_BYTES = MEBIBYTE
MEDIA_DIRECTORY_NAME = "/DICOMDIR"
# Enough of an archive's member to know what it is: the elements that say so stand at the start of the header.
PREFIX_BYTES = 64 * 1024

RAW_WITH_SIBLING = "raw detector data; the study's image FOR PRESENTATION is taken"
RAW_ALONE = "raw detector data without an image FOR PRESENTATION in its study: it needs processing"
CONFLICT = "another picture, or another encoding, under a SOPInstanceUID that was seen before; the first one stays"


def scan_export(path: Path, settings: Settings, keep: bool = True) -> Iterator[Found]:
    """Everything in an export, in a fixed order. Without `keep` (a dry run) nothing is extracted from archives.

    Raises BadCall when nothing is at `path`.
    """
    source = find_source(path)
    return _scan(source, settings, Spool(spool_folder(settings.home_dir) if keep else None))


def _scan(source: Path, settings: Settings, spool: Spool) -> Iterator[Found]:
    silence_quoting()
    spool.sweep_parts()
    with closing(ExportIndex()) as index:
        scan = ExportScan(settings, index, spool)
        for entry in walk_tree(source):
            yield from [entry] if isinstance(entry, SkippedItem) else scan.scan_entry(entry)
        yield from scan.settle_raw()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file that may be a radiograph. `digest` is "" when nobody has read the whole of it."""

    item: str
    path: str
    file: BinaryIO
    size_bytes: int
    digest: str = ""


class ExportScan:
    """One walk over one export."""

    def __init__(self, settings: Settings, index: ExportIndex, spool: Spool) -> None:
        self._settings, self._index, self._spool = settings, index, spool

    def scan_entry(self, entry: Entry) -> Iterator[Found]:
        """One file of the tree: an archive's members, or the file itself."""
        try:
            with open_file(entry.path) as file:
                if is_archive(entry.path):
                    yield from self.scan_archive(entry, file)
                else:
                    yield from self.scan_file(entry, file)
        except SourceError as error:
            yield skip(entry.item, error)
        except OSError:
            yield SkippedItem(entry.item, Reason.UNREADABLE, "the file cannot be read to its end")

    def scan_file(self, entry: Entry, file: BinaryIO) -> Iterator[Found]:
        """One file; a DICOM directory also names what is missing beside it."""
        size_bytes = file.seek(0, 2)
        yield from self.judge(Candidate(entry.item, entry.path, file, size_bytes))
        if entry.path.upper().endswith(MEDIA_DIRECTORY_NAME):
            yield from list_missing(entry, file)

    def scan_archive(self, entry: Entry, file: BinaryIO) -> Iterator[Found]:
        """The members of an archive; when it breaks off, the archive itself is a skipped item."""
        for member in read_archive(entry.path, file, self._settings):
            if isinstance(member, SkippedItem):
                yield replace(member, item=clean_item(f"{entry.item}/{member.item}"))
            else:
                yield from self.scan_member(clean_item(f"{entry.item}/{member.name}"), member)

    def scan_member(self, item: str, member: Member) -> Iterator[Found]:
        """One member: refused by its first bytes where these suffice, else written out and judged as a file."""
        try:
            prefix = read_prefix(member.chunks)
            header = read_early(prefix)
            if header and judge_identity(header):
                yield from self.leave_out(item, header)
                return
            with self._spool.hold_content(chain([prefix], member.chunks)) as held:
                yield from self.judge_held(item, held)
        except SourceError as error:
            yield skip(item, error)

    def judge_held(self, item: str, held: Held) -> Iterator[Found]:
        """Judge extracted content; it is kept only when it is to be captioned."""
        for found in self.judge(Candidate(item, held.path, held.file, held.size_bytes, held.digest)):
            if isinstance(found, FoundImage):
                self._spool.keep_content(held)
            yield found

    def judge(self, candidate: Candidate) -> Iterator[Found]:
        """The image or skipped item that a candidate is; nothing yet for raw data, which waits for its study."""
        try:
            header = read_header(candidate.file, candidate.size_bytes)
            if judge_identity(header):
                yield from self.leave_out(candidate.item, header)
                return
            if candidate.size_bytes > self._settings.max_file_mb * MEBIBYTE:
                raise SourceError(Reason.TOO_LARGE, "the file is larger than READROOM_MAX_FILE_MB")
            check_picture(header, self._settings)
            self.check_instance(candidate, header)
        except SourceError as error:
            yield skip(candidate.item, error)
            return
        self._index.remember_study(header.study_instance_uid)
        yield describe_image(candidate, header)

    def leave_out(self, item: str, header: Header) -> Iterator[SkippedItem]:
        """The skipped item of an instance that is no chest radiograph; raw data is set aside until the end."""
        reason, detail = judge_identity(header) or (Reason.BUG, "")
        if reason is Reason.FOR_PROCESSING:
            self._index.set_aside(item, header.study_instance_uid)
        else:
            yield SkippedItem(item, reason, detail)

    def settle_raw(self) -> Iterator[SkippedItem]:
        """The raw images of all studies, once it is known which studies have something to present."""
        for item, has_presentation in self._index.list_raw():
            yield SkippedItem(item, Reason.FOR_PROCESSING, RAW_WITH_SIBLING if has_presentation else RAW_ALONE)

    def check_instance(self, candidate: Candidate, header: Header) -> None:
        """Raise SourceError `duplicate` or `uid_conflict` for a SOPInstanceUID that was seen before."""
        if not header.sop_instance_uid:
            return
        content = find_content(candidate, header)
        first = self._index.remember_instance(header.sop_instance_uid, content)
        if first is None:
            return
        if digest_content(first) == (digest := digest_content(content, candidate.file)):
            raise SourceError(Reason.DUPLICATE, "the same file again")
        if digest and digest_pixels(first) == digest_pixels(content, candidate.file) != "":
            raise SourceError(Reason.DUPLICATE, "the same pixels again, under another header")
        raise SourceError(Reason.UID_CONFLICT, CONFLICT)


def skip(item: str, error: SourceError) -> SkippedItem:
    """An item with the reason an error gives."""
    return SkippedItem(item, error.reason, error.detail)


def describe_image(candidate: Candidate, header: Header) -> FoundImage:
    """The row to be of an accepted instance."""
    return FoundImage(
        ref=ImageRef(candidate.path, candidate.digest),
        item=candidate.item,
        study_instance_uid=header.study_instance_uid or None,
        series_instance_uid=header.series_instance_uid or None,
        sop_instance_uid=header.sop_instance_uid or None,
        accession_number=header.accession_number or None,
        patient_id=header.patient_id or None,
        view=header.view,
        view_rank=header.view_rank,
        rows=header.rows,
        columns=header.columns,
        size_bytes=candidate.size_bytes,
        flags=header.flags,
    )


def read_prefix(chunks: Iterator[bytes]) -> bytes:
    """The first chunks of a member, until they are 64 KiB or it ends."""
    prefix = bytearray()
    while len(prefix) < PREFIX_BYTES and (chunk := next(chunks, b"")):
        prefix += chunk
    return bytes(prefix)


def read_early(prefix: bytes) -> Header | None:
    """The header in a member's first bytes, None when these do not say for sure what it is.

    Raises SourceError `empty` and `not_dicom`.
    """
    if not prefix:
        raise SourceError(Reason.EMPTY, "the entry has no bytes")
    if is_packed(prefix):
        raise SourceError(Reason.NOT_DICOM, "a nested archive or compressed file, which is not opened")
    if not is_dicom(prefix):
        raise SourceError(Reason.NOT_DICOM, "neither the DICOM prefix nor a DICOM element at its start")
    try:
        header = read_header(BytesIO(prefix), len(prefix))
    except SourceError:
        return None
    return header if header.sop_class_uid else None


def find_content(candidate: Candidate, header: Header) -> Content:
    """Where a candidate's bytes are; with digests at once when they cannot be read again (a dry run's members)."""
    pixels = header.pixels
    span = (pixels.start, pixels.end) if pixels else (None, None)
    content = Content(candidate.path, *span, digest=candidate.digest)
    if candidate.path:
        return content
    return replace(content, pixels_digest=digest_pixels(content, candidate.file))


def digest_content(content: Content, file: BinaryIO | None = None) -> str:
    """SHA-256 (hex) of a whole instance, "" when it cannot be read any more."""
    return content.digest or _digest_span(content, file, 0, None)


def digest_pixels(content: Content, file: BinaryIO | None = None) -> str:
    """SHA-256 (hex) of an instance's pixel data as it is encoded, "" when it has no bytes of its own."""
    if content.pixels_digest or content.pixels_start is None:
        return content.pixels_digest
    return _digest_span(content, file, content.pixels_start, content.pixels_end)


def _digest_span(content: Content, file: BinaryIO | None, start: int, end: int | None) -> str:
    if file is not None:
        return digest_span(file, start, end)
    try:
        with open_file(content.path) as again:
            return digest_span(again, start, end)
    except (SourceError, OSError):
        return ""


def digest_span(file: BinaryIO, start: int = 0, end: int | None = None) -> str:
    """SHA-256 (hex) of a file's bytes from `start` to `end` (None: its end), read in pieces."""
    digest = hashlib.sha256()
    file.seek(start)
    left = end - start if end is not None else None
    while left is None or left > 0:
        chunk = file.read(HASH_CHUNK_BYTES if left is None else min(left, HASH_CHUNK_BYTES))
        if not chunk:
            break
        digest.update(chunk)
        left = left - len(chunk) if left is not None else None
    return digest.hexdigest()
