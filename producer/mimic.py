"""A MIMIC-CXR or MIMIC-CXR-JPG tree: `files/p10/p10000032/s50414267/<dicom_id>.dcm|.jpg`.

The study is known from the tree: JPG files carry no identifiers. View and split come from the CSV files beside `files`
(`mimic-cxr-2.0.0-metadata.csv.gz`, `...-split.csv.gz`) when they are there; columns are read by name.
"""

from __future__ import annotations

import csv
import gzip
import re
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path
from typing import BinaryIO, cast

from producer.images import scan_picture
from producer.index import ExportIndex, open_temporary
from producer.pacs import ExportScan, Found
from producer.spool import Spool
from producer.views import find_view, rank_view
from producer.walk import find_source, walk_tree
from readroom.errors import BadCall
from readroom.log import silence_quoting
from readroom.records import FoundImage, Reason, SkippedItem
from readroom.settings import Settings

IMAGE_PATH = re.compile(r"p\d\d/(?P<subject>p\d{8})/(?P<study>s\d{8})/(?P<dicom_id>[\w-]+)\.(dcm|jpe?g)$")
# Parts of the release that are no images: reports beside the study folders, tables, checksums, web pages.
COMPANION = re.compile(r"\.(txt|csv|csv\.gz|html|zip|md|json)$")
SCHEMA = "CREATE TABLE facts (dicom_id TEXT PRIMARY KEY, view TEXT, split TEXT) WITHOUT ROWID;"


def scan_mimic(path: Path, settings: Settings, split: str | None = None) -> Iterator[Found]:
    """The images of a MIMIC-CXR tree in a fixed order; only those of `split` (train, validate, test) when given.

    `path` holds `files`, or is one or two levels above it. Raises BadCall when there is no such folder, or when a
    split is asked for and its table is missing.
    """
    source = find_source(path)
    root = next((folder.parent for depth in ("files", "*/files", "*/*/files") for folder in _glob(source, depth)), None)
    if root is None:
        raise BadCall("no MIMIC-CXR tree is there", "Expected files/p10/p10000032/s50414267/<dicom_id>.dcm or .jpg.")
    if split and not _glob(root, "*split.csv*"):
        raise BadCall("the table of the splits is missing", "Expected mimic-cxr-2.0.0-split.csv.gz beside `files`.")
    return _scan(root, settings, split)


def _glob(root: Path, pattern: str) -> list[Path]:
    return sorted(root.glob(pattern))


def _scan(root: Path, settings: Settings, split: str | None) -> Iterator[Found]:
    silence_quoting()
    with closing(open_temporary(SCHEMA)) as facts, closing(ExportIndex()) as index:
        read_tables(root, facts)
        scan = ExportScan(settings, index, Spool(None))
        for entry in walk_tree(root / "files"):
            if isinstance(entry, SkippedItem):
                yield entry
            elif place := IMAGE_PATH.search(entry.item):
                if split in (None, find_facts(facts, place["dicom_id"])[1]):
                    yield from (name_image(found, place, facts) for found in scan_picture(entry, scan, settings))
            elif not COMPANION.search(entry.item):
                yield SkippedItem(entry.item, Reason.NOT_IMAGE, "no image of a MIMIC-CXR tree")
        yield from scan.settle_raw()


def name_image(found: Found, place: re.Match[str], facts: sqlite3.Connection) -> Found:
    """The image with what the tree and the tables say, where its own header says nothing."""
    if isinstance(found, SkippedItem):
        return found
    view_name, _ = find_facts(facts, place["dicom_id"])
    named = replace(
        found,
        source_id=place["dicom_id"],
        patient_id=found.patient_id or place["subject"],
        study_instance_uid=found.study_instance_uid or place["study"],
    )
    return named if named.view else add_view(named, view_name)


def add_view(found: FoundImage, view_name: str) -> FoundImage:
    """The image with the view that the metadata table names."""
    view = find_view(view_position=view_name)
    doubts = (flag for flag in found.flags if flag != "view_unknown")
    return replace(found, view=view, view_rank=rank_view(view), flags=(*doubts, *(() if view else ("view_unknown",))))


def find_facts(facts: sqlite3.Connection, dicom_id: str) -> tuple[str, str]:
    """ViewPosition and split of an image, "" where no table says."""
    row = facts.execute("SELECT view, split FROM facts WHERE dicom_id = ?", (dicom_id,)).fetchone()
    return (row[0] or "", row[1] or "") if row else ("", "")


def read_tables(root: Path, facts: sqlite3.Connection) -> None:
    """Read the metadata and split tables, where they are, into `facts`. Raises BadCall for damaged ones."""
    for pattern, column, name in (("*metadata.csv*", "view", "ViewPosition"), ("*split.csv*", "split", "split")):
        for path in _glob(root, pattern)[:1]:
            query = (
                f"INSERT INTO facts (dicom_id, {column}) VALUES (?, ?) "  # noqa: S608 - our own column names
                f"ON CONFLICT (dicom_id) DO UPDATE SET {column} = excluded.{column}"
            )
            facts.executemany(query, ((row.get("dicom_id"), row.get(name)) for row in read_rows(path)))


def read_rows(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a CSV table, compressed or not."""
    try:
        with path.open("rb") as raw:
            stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if path.suffix == ".gz" else raw
            yield from csv.DictReader(TextIOWrapper(stream, encoding="utf-8", newline=""))
    except (OSError, EOFError, zlib.error, csv.Error, UnicodeDecodeError):
        raise BadCall("a table of the MIMIC-CXR tree is damaged", "Download it again.") from None
