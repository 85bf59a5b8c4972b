"""Reading `.zip` and `.tar[.gz|.bz2|.xz]` exports as streams: member by member, in bounded memory, trusting nothing.

A member's name is only a label: files are extracted under our own names (producer/spool.py). The standard library's
ZipFile keeps the whole directory of an archive in memory (700 bytes an entry) before anybody can count it, so the zip
directory is read here entry by entry; the format is PKWARE's APPNOTE.TXT 6.3, sections 4.3 and 4.5.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import stat
import struct
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, TypeVar

from producer.walk import judge_name
from readroom.errors import SourceError
from readroom.records import Reason, SkippedItem
from readroom.settings import MEBIBYTE, Settings

T = TypeVar("T")

CHUNK_BYTES = 256 * 1024
ZIP_SUFFIXES = (".zip",)
TAR_SUFFIXES = (".tar", ".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz")
PACKED_MAGICS = (b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"7z\xbc\xaf\x27\x1c", b"Rar!")
# Expansion is judged only beyond this size: a few kB of zeros compress 1000 times and harm nobody.
HARMLESS_BYTES = 4 * MEBIBYTE

END_RECORD, END_MAGIC = struct.Struct("<4s4H2LH"), b"PK\x05\x06"
END64_LOCATOR, END64_LOCATOR_MAGIC = struct.Struct("<4sLQL"), b"PK\x06\x07"
END64_RECORD, END64_MAGIC = struct.Struct("<4sQ2H2L4Q"), b"PK\x06\x06"
CENTRAL_HEADER, CENTRAL_MAGIC = struct.Struct("<4s6H3L5H2L"), b"PK\x01\x02"
LOCAL_HEADER, LOCAL_MAGIC = struct.Struct("<4s5H3L2H"), b"PK\x03\x04"
LONGEST_END = END_RECORD.size + 0xFFFF  # an end record and the longest comment behind it
ENCRYPTED_FLAG, UTF8_FLAG = 0x1, 0x800
STORED, DEFLATED = 0, 8


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in an archive: its name there, its size as declared, its bytes (to be read before the next)."""

    name: str
    size_bytes: int
    chunks: Iterator[bytes]


@dataclass(slots=True)
class Allowance:
    """What an archive may still expand to; shared by its members."""

    entries: int
    total_bytes: int
    entry_bytes: int
    ratio: int

    @classmethod
    def of(cls, settings: Settings) -> Allowance:
        """The whole allowance of one archive."""
        return cls(
            settings.max_archive_entries,
            settings.max_archive_mb * MEBIBYTE,
            settings.max_file_mb * MEBIBYTE,
            settings.max_archive_ratio,
        )

    def take_entry(self) -> None:
        """Count an entry. Raises SourceError `too_large` when there were too many."""
        self.entries -= 1
        if self.entries < 0:
            raise SourceError(Reason.TOO_LARGE, "the archive has more entries than READROOM_MAX_ARCHIVE_ENTRIES")

    def take_bytes(self, count: int, entry_bytes: int, packed_bytes: int) -> None:
        """Count expanded bytes of an entry that has grown to `entry_bytes` out of `packed_bytes` so far."""
        self.total_bytes -= count
        if self.total_bytes < 0:
            raise SourceError(Reason.TOO_LARGE, "the archive expands to more than READROOM_MAX_ARCHIVE_MB")
        if entry_bytes > self.entry_bytes:
            raise SourceError(Reason.TOO_LARGE, "the entry expands to more than READROOM_MAX_FILE_MB")
        self.check_ratio(entry_bytes, packed_bytes)

    def check_ratio(self, expanded_bytes: int, packed_bytes: int) -> None:
        """Raise SourceError `too_large` for an expansion that only bombs have."""
        if expanded_bytes > HARMLESS_BYTES and expanded_bytes > self.ratio * max(1, packed_bytes):
            raise SourceError(Reason.TOO_LARGE, "expands more than READROOM_MAX_ARCHIVE_RATIO times")


def is_archive(name: str) -> bool:
    """Whether a file is read as an archive: by its name, since office documents and programs are zips too."""
    return name.lower().endswith(ZIP_SUFFIXES + TAR_SUFFIXES)


def is_packed(start: bytes) -> bool:
    """Whether a file's first bytes are those of an archive or a compressed file."""
    return start.startswith(PACKED_MAGICS) or start[257:262] == b"ustar"


def read_archive(path: str, file: BinaryIO, settings: Settings) -> Iterator[Member | SkippedItem]:
    """The members of an archive, and its entries that must not be read; nested archives are members like others.

    Raises SourceError when the archive itself cannot be read (further): `empty`, `truncated`, `corrupt`, `too_large`.
    """
    if not file.seek(0, os.SEEK_END):
        raise SourceError(Reason.EMPTY, "the archive has no bytes")
    file.seek(0)
    allowance = Allowance.of(settings)
    read = read_zip if path.lower().endswith(ZIP_SUFFIXES) else read_tar
    for member in translate_damage(read(file, allowance)):
        if isinstance(member, Member):
            member = replace(member, chunks=translate_damage(member.chunks))
        yield member


def translate_damage(values: Iterator[T]) -> Iterator[T]:
    """The same values; what the standard library says of a damaged archive becomes a SourceError."""
    try:
        yield from values
    except (EOFError, struct.error):
        raise SourceError(Reason.TRUNCATED, "the archive ends early") from None
    except tarfile.ReadError as error:
        if "unexpected end of data" in str(error):
            raise SourceError(Reason.TRUNCATED, "the archive ends early") from None
        raise SourceError(Reason.CORRUPT, "the archive is damaged, or not what its name says") from None
    except (tarfile.TarError, zlib.error, lzma.LZMAError, OSError, ValueError, OverflowError):
        raise SourceError(Reason.CORRUPT, "the archive is damaged, or not what its name says") from None


# ------------------------------------------------------------------------------------------------------------- zip


@dataclass(frozen=True, slots=True)
class ZipEntry:
    """One entry of a zip's directory."""

    name: str
    is_encrypted: bool
    is_link: bool
    method: int
    crc: int
    packed_bytes: int
    size_bytes: int
    offset: int


def read_zip(file: BinaryIO, allowance: Allowance) -> Iterator[Member | SkippedItem]:
    """The entries of a zip in the order of its directory."""
    shift, position, end = find_directory(file)
    while position < end:
        entry, position = read_entry(file, position)
        if entry.name.endswith(("/", "\\")) and entry.size_bytes == 0:
            continue
        allowance.take_entry()
        yield judge_zip_entry(entry) or Member(
            entry.name, entry.size_bytes, expand_entry(file, entry, shift, allowance)
        )


def judge_zip_entry(entry: ZipEntry) -> SkippedItem | None:
    """The entry as a skipped item when it must not be read."""
    refusals = (
        (judge_name(entry.name), Reason.UNSAFE_PATH),
        ("a link" if entry.is_link else None, Reason.UNSAFE_PATH),
        ("the entry is encrypted" if entry.is_encrypted else None, Reason.ENCRYPTED),
        (
            "a compression method that is not read" if entry.method not in (STORED, DEFLATED) else None,
            Reason.UNREADABLE,
        ),
    )
    return next((SkippedItem(entry.name, reason, detail) for detail, reason in refusals if detail), None)


def find_directory(file: BinaryIO) -> tuple[int, int, int]:
    """By how much offsets are shifted (bytes before the archive), and where its directory begins and ends."""
    size = file.seek(0, os.SEEK_END)
    tail_start = max(0, size - LONGEST_END)
    file.seek(tail_start)
    tail = file.read(LONGEST_END)
    at = tail.rfind(END_MAGIC)
    if at < 0:
        file.seek(0)
        cut = file.read(4) == LOCAL_MAGIC
        raise SourceError(*(Reason.TRUNCATED, "the archive ends early") if cut else (Reason.CORRUPT, "no zip archive"))
    _, disk, *_, length, offset, _ = END_RECORD.unpack(tail[at : at + END_RECORD.size])
    end = tail_start + at
    end64 = read_end64(file, end)
    if end64:
        length, offset, end = end64
    if disk not in (0, 0xFFFF) or length > end:
        raise SourceError(Reason.CORRUPT, "one part of a split archive, or damaged")
    return end - length - offset, end - length, end


def read_end64(file: BinaryIO, end: int) -> tuple[int, int, int] | None:
    """Length, offset and end of the directory as the zip64 end record has them; None for a plain zip."""
    if end < END64_LOCATOR.size + END64_RECORD.size:
        return None
    file.seek(end - END64_LOCATOR.size - END64_RECORD.size)
    record, locator = file.read(END64_RECORD.size), file.read(END64_LOCATOR.size)
    if locator[:4] != END64_LOCATOR_MAGIC or record[:4] != END64_MAGIC:
        return None
    *_, length, offset = END64_RECORD.unpack(record)
    return length, offset, end - END64_LOCATOR.size - END64_RECORD.size


def read_entry(file: BinaryIO, position: int) -> tuple[ZipEntry, int]:
    """The directory entry at `position`, and the position of the next one."""
    file.seek(position)
    fields = CENTRAL_HEADER.unpack(file.read(CENTRAL_HEADER.size))
    magic, made_by, _, flags, method, _, _, crc, packed, size, name_len, extra_len, comment_len = fields[:13]
    attributes, offset = fields[15:]
    if magic != CENTRAL_MAGIC:
        raise SourceError(Reason.CORRUPT, "the archive's directory is damaged")
    name = file.read(name_len).decode("utf-8" if flags & UTF8_FLAG else "cp437", "backslashreplace")
    size, packed, offset = _read_zip64(file.read(extra_len), size, packed, offset)
    is_link = made_by >> 8 == 3 and stat.S_ISLNK(attributes >> 16)  # 3: made on Unix, where modes mean something
    entry = ZipEntry(name, bool(flags & ENCRYPTED_FLAG), is_link, method, crc, packed, size, offset)
    return entry, position + CENTRAL_HEADER.size + name_len + extra_len + comment_len


def _read_zip64(extra: bytes, *fields: int) -> list[int]:
    """Fields that are 0xFFFFFFFF are taken from extra field 1, in order (APPNOTE 4.5.3)."""
    wide: list[int] = []
    while len(extra) >= 4:
        kind, length = struct.unpack("<HH", extra[:4])
        if kind == 1:
            wide = [number for (number,) in struct.iter_unpack("<Q", extra[4 : 4 + length // 8 * 8])]
        extra = extra[4 + length :]
    return [wide.pop(0) if field == 0xFFFFFFFF and wide else field for field in fields]


def expand_entry(file: BinaryIO, entry: ZipEntry, shift: int, allowance: Allowance) -> Iterator[bytes]:
    """The entry's bytes. Raises SourceError `too_large`, `truncated`, `corrupt`."""
    file.seek(shift + entry.offset)
    magic, *_, name_len, extra_len = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    if magic != LOCAL_MAGIC:
        raise SourceError(Reason.CORRUPT, "the entry is not where the directory says")
    file.seek(name_len + extra_len, os.SEEK_CUR)
    packed = _read_packed(file, entry.packed_bytes)
    expanded, crc, position = 0, 0, 0
    for chunk, position in packed if entry.method == STORED else _inflate(packed):
        expanded, crc = expanded + len(chunk), zlib.crc32(chunk, crc)
        allowance.take_bytes(len(chunk), expanded, position)
        yield chunk
    if position < entry.packed_bytes:
        raise SourceError(Reason.TRUNCATED, "the entry ends early")
    if crc != entry.crc:
        raise SourceError(Reason.CORRUPT, "the entry's checksum is wrong")


def _read_packed(file: BinaryIO, packed_bytes: int) -> Iterator[tuple[bytes, int]]:
    """The next bytes of the file in chunks, each with how many have been read."""
    position = 0
    while position < packed_bytes and (chunk := file.read(min(CHUNK_BYTES, packed_bytes - position))):
        position += len(chunk)
        yield chunk, position


def _inflate(packed: Iterator[tuple[bytes, int]]) -> Iterator[tuple[bytes, int]]:
    """Inflate chunk by chunk, never more than CHUNK_BYTES at once."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    for chunk, position in packed:
        pending = chunk
        while pending and not inflater.eof:
            yield inflater.decompress(pending, CHUNK_BYTES), position
            pending = inflater.unconsumed_tail
    while not inflater.eof and (rest := inflater.decompress(b"", CHUNK_BYTES)):
        yield rest, position


# ------------------------------------------------------------------------------------------------------------- tar


class BoundedInfo(tarfile.TarInfo):
    """A tar header whose extended headers (long names, pax records) are of a size that may be read into memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> BoundedInfo:
        """Parse a header block. Raises SourceError `corrupt` for one made to exhaust memory or to loop."""
        info = super().frombuf(buf, encoding, errors)
        extended = info.type in (*tarfile.GNU_TYPES[:2], tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
        if info.size < 0 or (extended and info.size > MEBIBYTE):
            raise SourceError(Reason.CORRUPT, "a header of the archive is absurd")
        return info


class Expanding:
    """The expanded bytes of a compressed tar, held against the ratio a real export can have."""

    def __init__(self, file: BinaryIO, allowance: Allowance) -> None:
        start = file.read(6)
        file.seek(0)
        self._file, self._allowance, self._expanded_bytes = file, allowance, 0
        self._is_plain = not start.startswith(PACKED_MAGICS)
        self._stream: Any = file if self._is_plain else _decompress(start, file)

    def read(self, size: int = -1) -> bytes:
        """The next `size` bytes."""
        data: bytes = self._stream.read(size)
        self._expanded_bytes += len(data)
        if not self._is_plain:
            self._allowance.check_ratio(self._expanded_bytes, self._file.tell())
        return data


def _decompress(start: bytes, file: BinaryIO) -> Any:
    if start.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=file, mode="rb")
    if start.startswith(b"BZh"):
        return bz2.BZ2File(file)
    if start.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMAFile(file)
    raise SourceError(Reason.CORRUPT, "no tar archive")


def read_tar(file: BinaryIO, allowance: Allowance) -> Iterator[Member | SkippedItem]:
    """The entries of a tar in their order, compressed or not."""
    stream: Any = Expanding(file, allowance)
    tar: Any
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=BoundedInfo) as tar:
        while (info := tar.next()) is not None:
            tar.members.clear()  # tarfile keeps every header it has seen: 1 kB an entry
            if info.isdir():
                continue
            allowance.take_entry()
            yield judge_tar_entry(info) or Member(info.name, info.size, _read_entry(tar, info, allowance))


def judge_tar_entry(info: tarfile.TarInfo) -> SkippedItem | None:
    """The entry as a skipped item when it must not be read."""
    name = info.name.encode("utf-8", "backslashreplace").decode()
    if detail := judge_name(info.name):
        return SkippedItem(name, Reason.UNSAFE_PATH, detail)
    if not info.isreg() or info.issparse():
        return SkippedItem(name, Reason.UNSAFE_PATH, "a link, device or sparse file")
    return None


def _read_entry(tar: tarfile.TarFile, info: tarfile.TarInfo, allowance: Allowance) -> Iterator[bytes]:
    # What a tar says of a size is what it takes: refuse before reading. The ratio is watched on the whole stream.
    allowance.take_bytes(info.size, info.size, info.size)
    member, expanded = tar.extractfile(info), 0
    while member and (chunk := member.read(CHUNK_BYTES)):
        expanded += len(chunk)
        yield chunk
    if expanded < info.size:
        raise SourceError(Reason.TRUNCATED, "the entry ends early")
