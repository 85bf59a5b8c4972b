"""Image files: a folder or one file of JPEG, PNG, DICOM and so on. What is no picture is listed, not fatal."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from producer.dicom import is_dicom
from producer.index import ExportIndex
from producer.pacs import Candidate, ExportScan, Found, skip
from producer.spool import Spool
from producer.walk import Entry, find_source, open_file, walk_tree
from readroom.errors import SourceError
from readroom.log import silence_quoting
from readroom.records import FoundImage, ImageRef, Reason, SkippedItem
from readroom.settings import MEBIBYTE, Settings

# Pillow knows forty formats, among them ones that call other programs (EPS); these are the ones pictures come in.
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000")


def scan_images(path: Path, settings: Settings) -> Iterator[Found]:
    """Every file under `path`, in a fixed order; DICOM files are judged as in a PACS export.

    Raises BadCall when nothing is at `path`.
    """
    return _scan(find_source(path), settings)


def _scan(source: Path, settings: Settings) -> Iterator[Found]:
    silence_quoting()
    with closing(ExportIndex()) as index:
        scan = ExportScan(settings, index, Spool(None))
        for entry in walk_tree(source):
            yield from [entry] if isinstance(entry, SkippedItem) else scan_picture(entry, scan, settings)
        yield from scan.settle_raw()


def scan_picture(entry: Entry, scan: ExportScan, settings: Settings) -> Iterator[Found]:
    """One file: a DICOM instance, a picture, or neither."""
    try:
        with open_file(entry.path) as file:
            if is_dicom(file.read(132)):
                yield from scan.judge(Candidate(entry.item, entry.path, file, file.seek(0, os.SEEK_END)))
            else:
                yield describe_picture(entry, look_at_picture(file, settings))
    except SourceError as error:
        yield skip(entry.item, error)
    except OSError:
        yield SkippedItem(entry.item, Reason.UNREADABLE, "the file cannot be read to its end")


@dataclass(frozen=True, slots=True)
class Picture:
    """What a picture's header claims."""

    rows: int
    columns: int
    size_bytes: int


def describe_picture(entry: Entry, picture: Picture) -> FoundImage:
    """The row to be of a picture that is not DICOM."""
    return FoundImage(
        ref=ImageRef(entry.path),
        item=entry.item,
        rows=picture.rows,
        columns=picture.columns,
        size_bytes=picture.size_bytes,
    )


def look_at_picture(file: BinaryIO, settings: Settings) -> Picture:
    """A picture's size from its header; pixels are not decoded.

    Raises SourceError: `empty`, `not_image`, `too_large`, `corrupt`.
    """
    size_bytes = file.seek(0, os.SEEK_END)
    if size_bytes == 0:
        raise SourceError(Reason.EMPTY, "the file has no bytes")
    columns, rows = _read_size(file)
    if size_bytes > settings.max_file_mb * MEBIBYTE:
        raise SourceError(Reason.TOO_LARGE, "the file is larger than READROOM_MAX_FILE_MB")
    if rows * columns > settings.max_pixels:
        raise SourceError(Reason.TOO_LARGE, f"more than {settings.max_pixels} pixels")
    return Picture(rows, columns, size_bytes)


def _read_size(file: BinaryIO) -> tuple[int, int]:
    file.seek(0)
    try:
        with Image.open(file, formats=FORMATS) as image:
            return image.size
    except UnidentifiedImageError:
        raise SourceError(Reason.NOT_IMAGE, "no picture of a known format") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise SourceError(Reason.TOO_LARGE, "more pixels than any photograph has") from None
    except (OSError, SyntaxError, ValueError, struct.error, EOFError):
        raise SourceError(Reason.CORRUPT, "the picture's header is damaged") from None
