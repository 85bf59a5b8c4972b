"""VQA v2 folders: questions with ten people's answers about COCO's images.

`v2_OpenEnded_mscoco_<split>_questions.json`: `{"questions": [{"image_id", "question", "question_id"}]}`
`v2_mscoco_<split>_annotations.json`: `{"annotations": [{"question_id", "answer_type", "answers": [{"answer"}]}]}`
`<split>/COCO_<split>_<image id in 12 digits>.jpg`

Both files are read element by element: parsed whole, val2014's annotations are two million small objects.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from producer.annotations import iter_elements
from producer.coco import find_file
from producer.walk import clean_item, find_source
from readroom.errors import BadCall, SourceError
from readroom.records import SkippedItem

VQA_FOLDERS = ("", "vqa", "vqa2", "coco2014", "coco")
FILE_FOLDERS = ("", "annotations", "questions", "images")


@dataclass(frozen=True, slots=True)
class FoundQuestion:
    """A question about an image file, people's answers, and the kind of answer (`yes/no`, `number`, `other`)."""

    question_id: str
    image_id: str
    text: str
    path: str
    answers: tuple[str, ...]
    kind: str


def read_vqa(
    root: Path, split: str = "val2014", limit: int | None = None, by_name: bool = False
) -> Iterator[FoundQuestion | SkippedItem]:
    """The first `limit` questions of a split in their file's order; one whose image is not there is a SkippedItem.

    With `by_name`, images need not be there, and `path` is what their file would be called in the split's folder.
    Questions that nobody answered (a test split's) are left out. Raises BadCall when there is no such layout, and,
    while reading, when a file is malformed.
    """
    source = find_source(root)
    questions = find_part(source, f"v2_OpenEnded_mscoco_{split}_questions.json")
    annotations = find_part(source, f"v2_mscoco_{split}_annotations.json")
    holding = (folder for folder in list_folders(source) if (folder / split).is_dir())
    folders = None if by_name else tuple(map(str, holding))
    asked = list(islice(_read_entries(questions, "questions"), limit))
    answered = collect_answers(annotations, {_key(entry, "question_id") for entry in asked})
    for entry in asked:
        if _key(entry, "question_id") in answered:
            yield _describe(entry, answered[_key(entry, "question_id")], split, folders)


def list_folders(source: Path) -> list[Path]:
    """Where files of the layout may lie below the folder that was given."""
    places = (source / base / folder for base in VQA_FOLDERS for folder in FILE_FOLDERS)
    return [place.resolve() for place in places if place.is_dir()]


def find_part(source: Path, name: str) -> Path:
    """A file of the layout. Raises BadCall naming it when it is nowhere."""
    found = next((folder / name for folder in list_folders(source) if (folder / name).is_file()), None)
    if found is None:
        raise BadCall(f"{name} is not in that folder", "The VQA v2 layout is expected: visualqa.org/download.html")
    return found


def collect_answers(annotations: Path, wanted: set[str]) -> dict[str, dict[str, Any]]:
    """The annotations of the wanted questions, by id; reading ends with the last of them."""
    found: dict[str, dict[str, Any]] = {}
    for entry in _read_entries(annotations, "annotations"):
        key = _key(entry, "question_id")
        if key in wanted:
            found[key] = {"kind": entry.get("answer_type"), "answers": _list_answers(entry.get("answers"))}
        if len(found) == len(wanted):
            break
    return found


def _list_answers(answers: Any) -> tuple[str, ...]:
    given = [each.get("answer") for each in answers if isinstance(each, dict)] if isinstance(answers, list) else []
    return tuple(clean_item(text) for text in given if isinstance(text, str))


def _read_entries(file: Path, key: str) -> Iterator[dict[str, Any]]:
    try:
        with file.open(encoding="utf-8") as opened:
            yield from iter_elements(opened, key)
    except OSError:
        raise BadCall(f"{file.name} cannot be read") from None


def _describe(
    entry: dict[str, Any], annotation: dict[str, Any], split: str, folders: tuple[str, ...] | None
) -> FoundQuestion | SkippedItem:
    key, image_id, text = _key(entry, "question_id"), entry.get("image_id"), entry.get("question")
    if not isinstance(image_id, int) or not isinstance(text, str) or not text.strip() or not annotation["answers"]:
        raise BadCall("a question has no text, no image or no answers", "Download the VQA v2 files again.")
    name = f"{split}/COCO_{split}_{image_id:012d}.jpg"
    try:
        path = name if folders is None else find_file(name, folders)
    except SourceError as error:
        return SkippedItem(name, error.reason, error.detail)
    kind = annotation["kind"] if isinstance(annotation["kind"], str) else ""
    return FoundQuestion(key, str(image_id), clean_item(text), path, annotation["answers"], kind)


def _key(entry: dict[str, Any], name: str) -> str:
    value = entry.get(name)
    return str(value) if isinstance(value, int | str) else ""
