"""COCO folders: `annotations/captions_<split>.json` with the images of `<split>/`; Karpathy's and BLIP's files too.

Three flavours of annotation file are told apart entry by entry:
- COCO: `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`
- Karpathy: `{"images": [{"filepath", "filename", "split", "cocoid", "sentences": [{"raw"}]}]}`; `restval` is train
- BLIP: `[{"image": "val2014/COCO_val2014_....jpg", "image_id", "caption"}]`, one entry per caption
A folder without annotation file is taken as plain images.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from producer.annotations import iter_elements
from producer.images import describe_picture, look_at_picture, scan_images
from producer.index import open_temporary
from producer.pacs import Found, skip
from producer.walk import Entry, clean_item, find_source, is_inside, judge_name, open_file, real_file
from readroom.errors import BadCall, SourceError
from readroom.log import silence_quoting
from readroom.records import FoundImage, Reason, SkippedItem
from readroom.settings import Settings

COCO_FOLDERS = ("", "coco2017", "coco2014", "coco")
SCHEMA = """
    CREATE TABLE captions (image TEXT, caption TEXT);
    CREATE TABLE seen (name TEXT PRIMARY KEY) WITHOUT ROWID;
"""
LAYOUT_HELP = "Expected annotations/captions_<split>.json, dataset_coco.json, coco_karpathy_<split>.json or images."


@dataclass(frozen=True, slots=True)
class Listing:
    """An annotation file, the real folders its names are relative to, and the splits wanted of a Karpathy file."""

    annotations: Path
    folders: tuple[str, ...]
    splits: frozenset[str]


@dataclass(frozen=True, slots=True)
class Listed:
    """One entry of an annotation file. `key` joins a COCO image with its captions."""

    name: str
    source_id: str
    key: str
    split: str
    captions: tuple[str, ...]
    is_per_caption: bool


def read_coco(root: Path, settings: Settings, split: str = "val2017", karpathy: Path | None = None) -> Iterator[Found]:
    """The images of one split in the order of their annotation file, each with its captions and COCO id.

    `root` is the folder that holds `annotations`, the one above it, or an annotation file. Raises BadCall when there
    is no such thing, and, while reading, when the annotation file is malformed.
    """
    source = find_source(root)
    listing = find_listing(source, split, find_source(karpathy) if karpathy else None)
    if listing is None:
        return scan_images(find_pictures(source, split), settings)
    return _read(listing, settings)


def find_listing(source: Path, split: str, karpathy: Path | None = None) -> Listing | None:
    """The annotation file of a split; None when a folder has none."""
    splits = name_splits(split)
    if source.is_file():
        karpathy, source = source, source.parent.parent if source.parent.name == "annotations" else source.parent
    bases = [folder for name in COCO_FOLDERS if (folder := source / name).is_dir()]
    if karpathy:
        return Listing(karpathy, _image_folders(bases, split), splits)
    for base in bases:
        for file in (base / "annotations" / f"captions_{name}.json" for name in _name_files(split)):
            if file.is_file():
                return Listing(file, _image_folders([base], file.stem.removeprefix("captions_")), frozenset())
    karpathy_names = ("dataset_coco.json", f"coco_karpathy_{split.removeprefix('karpathy_')}.json")
    named = [base / folder / name for base in bases for folder in ("", "annotations") for name in karpathy_names]
    found = next((file for file in named if file.is_file()), None)
    return Listing(found, _image_folders(bases, split), splits) if found else None


def find_pictures(source: Path, split: str) -> Path:
    """The folder of a split's images, or the folder itself when images lie in it. Raises BadCall."""
    folders = [source / folder / images / split for folder in COCO_FOLDERS for images in ("", "images")]
    found = next((folder for folder in folders if folder.is_dir()), None)
    if found is None and any(child.is_file() for child in source.iterdir()):
        return source
    if found is None:
        raise BadCall("neither annotations nor images of that split are there", LAYOUT_HELP)
    return found


def name_splits(split: str) -> frozenset[str]:
    """The values of `split` in a Karpathy file that a split means: `restval` belongs to train."""
    name = split.removeprefix("karpathy_").rstrip("0123456789")
    return frozenset({"train", "restval"} if name == "train" else {name})


def _name_files(split: str) -> tuple[str, ...]:
    return (split,) if split[-1:].isdigit() else (split, f"{split}2017", f"{split}2014")


def _image_folders(bases: list[Path], split: str) -> tuple[str, ...]:
    named = (base / folder for base in bases for folder in (split, f"images/{split}", "images", ""))
    return tuple(os.path.realpath(folder) for folder in named if folder.is_dir())


def _read(listing: Listing, settings: Settings) -> Iterator[Found]:
    silence_quoting()
    with closing(open_temporary(SCHEMA)) as memory:
        collect_captions(listing, memory)
        for number, entry in enumerate(iter_entries(listing, "images")):
            listed = read_entry(entry)
            if listed is None:
                yield SkippedItem(f"images[{number}]", Reason.CORRUPT, "an entry without file name")
            elif not listing.splits or not listed.split or listed.split in listing.splits:
                yield from resolve_listed(listed, listing, memory, settings)


def iter_entries(listing: Listing, key: str) -> Iterator[dict[str, Any]]:
    """The entries of an annotation file's array. Raises BadCall when it cannot be opened or is malformed."""
    try:
        with listing.annotations.open(encoding="utf-8") as file:
            yield from iter_elements(file, key)
    except OSError:
        raise BadCall("the annotation file cannot be read") from None


def collect_captions(listing: Listing, memory: sqlite3.Connection) -> None:
    """Put all captions that stand apart from their image where they can be looked up by its key."""
    for entry in iter_entries(listing, "annotations"):
        caption, key = entry.get("caption"), entry.get("image_id", entry.get("image"))
        for text in caption if isinstance(caption, list) else [caption]:
            if isinstance(text, str):
                memory.execute("INSERT INTO captions VALUES (?, ?)", (_key(key), clean_item(text)))
    memory.execute("CREATE INDEX captions_by_image ON captions (image)")


def read_entry(entry: dict[str, Any]) -> Listed | None:
    """An entry of any flavour; None when it names no file."""
    if isinstance(name := entry.get("file_name"), str):
        return Listed(name, _key(entry.get("id")), _key(entry.get("id")), "", (), False)
    if isinstance(name := entry.get("filename"), str):
        folder, sentences = entry.get("filepath"), entry.get("sentences")
        texts = [each.get("raw") for each in sentences if isinstance(each, dict)] if isinstance(sentences, list) else []
        captions = tuple(clean_item(text) for text in texts if isinstance(text, str))
        source_id = _key(entry.get("cocoid", entry.get("imgid")))
        path = f"{folder}/{name}" if isinstance(folder, str) and folder else name
        return Listed(path, source_id, "", str(entry.get("split") or ""), captions, False)
    if isinstance(name := entry.get("image"), str):
        key = _key(entry.get("image_id", name))
        return Listed(name, key, key, "", (), True)
    return None


def _key(value: Any) -> str:
    return clean_item(str(value)) if isinstance(value, int | str) else ""


def resolve_listed(listed: Listed, listing: Listing, memory: sqlite3.Connection, settings: Settings) -> Iterator[Found]:
    """The image that an entry names, or why there is none. An image with an entry per caption is named once."""
    item = clean_item(listed.name)
    is_new = memory.execute("INSERT OR IGNORE INTO seen VALUES (?)", (item,)).rowcount
    if not is_new:
        if not listed.is_per_caption:
            yield SkippedItem(item, Reason.DUPLICATE, "listed a second time")
        return
    try:
        yield find_image(listed, listing, memory, settings)
    except SourceError as error:
        yield skip(item, error)
    except OSError:
        yield SkippedItem(item, Reason.UNREADABLE, "the file cannot be read to its end")


def find_image(listed: Listed, listing: Listing, memory: sqlite3.Connection, settings: Settings) -> FoundImage:
    """The row to be of a listed image. Raises SourceError: `unsafe_path`, `missing`, and what the picture is not."""
    path = find_file(listed.name, listing.folders)
    with open_file(path) as file:
        found = describe_picture(Entry(clean_item(listed.name), path), look_at_picture(file, settings))
    rows = memory.execute("SELECT caption FROM captions WHERE image = ? ORDER BY rowid", (listed.key,))
    captions = listed.captions or tuple(caption for (caption,) in rows if listed.key)
    return replace(found, source_id=listed.source_id or None, reference_texts=captions)


def find_file(name: str, folders: tuple[str, ...]) -> str:
    """Where a listed file is: in the first folder that has it, and really in it."""
    if judge_name(name):
        raise SourceError(Reason.UNSAFE_PATH, "a name that leads out of the data set")
    for folder in folders:
        real = real_file(f"{folder}/{name}")
        if real and not is_inside(folder, real):
            raise SourceError(Reason.UNSAFE_PATH, "a link that leads out of the data set")
        if real:
            return real
    raise SourceError(Reason.MISSING, "listed, but not there")
