"""Images, now: the commands `caption` and `ask`, on the same functions as the worker, and what inference.py means."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from readroom.errors import CheckpointError, ItemError, SourceError
from readroom.intake import choose_checkpoint, choose_generation, existing_store, is_chosen, look_up_checkpoint
from readroom.records import FAMILIES, GeneratedText, JobKind, SkippedItem
from readroom.settings import Settings, load_settings

if TYPE_CHECKING:
    from db.session import Store
    from models.checkpoint import CheckpointSource

Run = Callable[[list[Path]], Sequence[GeneratedText | ItemError]]
"""From files to one text or error each, in order."""

TOY_NOTE = (
    "bundled is a small model for trying things out: its captions of real films mean nothing; "
    "AI drafts, not for diagnosis"
)


def choose_captioner(settings: Settings, family: str, model: str | None) -> CheckpointSource:
    """The checkpoint as `enqueue` chooses it; a store is asked when there is one, and none is made."""
    with existing_store(settings) as store:
        return choose_checkpoint(settings, store, family, model, remember=False)


def choose_answerer(settings: Settings, family: str, model: str | None) -> CheckpointSource:
    """The checkpoint that answers questions; as `choose_captioner`."""
    with existing_store(settings) as store:
        return choose_checkpoint(settings, store, family, model, remember=False, kind=JobKind.ANSWER)


def warn_captioner(source: CheckpointSource) -> str | None:
    """What to say of a checkpoint before its texts are read; None when there is nothing to say."""
    from models.checkpoint import name_bundled, resolve_checkpoint

    for family in FAMILIES:
        with suppress(CheckpointError):  # a checkout without it
            if source.ref == resolve_checkpoint(name_bundled(family)).ref:
                return TOY_NOTE
    return None


def choose_now(kind: str, model: str | None) -> dict[str, Any]:
    """What inference.py calls models/predict.py with: the checkpoint's name, and what the settings say besides.

    A family as `model` means what the commands take: the family's setting, the registry's active checkpoint, the
    published one; None means the first family. There is no VLP to be had but the bundled one: where nothing names
    another it is taken, with a warning.
    """
    settings = load_settings()
    chosen: dict[str, Any] = {
        "device": settings.device,
        "precision": settings.precision,
        "region_dir": settings.region_dir,
    }
    if kind == JobKind.CAPTION:
        chosen |= {"num_beams": settings.num_beams, "max_new_tokens": settings.max_new_tokens}
    return chosen | {"model": name_now(settings, JobKind(kind), model)}


def name_now(settings: Settings, kind: JobKind, model: str | None) -> str:
    """The checkpoint that `model` means for inference.py, by a name that no registry is needed for.

    Raises CheckpointMissing, CheckpointBroken, BadCall (another family than asked for).
    """
    if model is not None and model not in FAMILIES:
        return model
    with existing_store(settings) as store:
        source = find_now(settings, store, model or FAMILIES[0], kind)
    if warn_captioner(source):
        warnings.warn(TOY_NOTE, stacklevel=4)  # at the line that called inference.py
    return source.location


def find_now(settings: Settings, store: Store | None, family: str, kind: JobKind) -> CheckpointSource:
    """As the commands find it; the bundled one where nothing is named and nothing was published."""
    from models.checkpoint import name_bundled, resolve_checkpoint

    if is_chosen(settings, store, family):
        return look_up_checkpoint(settings, store, family, None, kind)
    return resolve_checkpoint(name_bundled(family))


def caption_now(settings: Settings, paths: Sequence[Path], source: CheckpointSource) -> list[dict[str, Any]]:
    """One row an image: `{"image", "caption", "score", "checkpoint", "error"}`; a bad image has its error set.

    Of a folder, every picture in it is captioned. Raises CheckpointMissing when the model cannot be had.
    """
    from models.load import load_captioner
    from models.predict import caption_images

    captioner = load_captioner(source, settings.device, settings.precision, settings.region_dir)
    generation = choose_generation(settings, source)
    row = {"caption": None, "score": None, "checkpoint": captioner.checkpoint, "error": None}
    return read_now(settings, paths, row, lambda good: caption_images(good, captioner, generation, errors="return"))


def answer_now(
    settings: Settings, paths: Sequence[Path], question: str, source: CheckpointSource
) -> list[dict[str, Any]]:
    """One row an image: `{"image", "question", "answer", "score", "checkpoint", "error"}`; as `caption_now`."""
    from models.load import load_answerer
    from models.predict import answer_images

    answerer = load_answerer(source, settings.device, settings.precision, settings.region_dir)
    row = {"question": question, "answer": None, "score": None, "checkpoint": answerer.checkpoint, "error": None}

    def run(good: list[Path]) -> Sequence[GeneratedText | ItemError]:
        return answer_images(good, [question] * len(good), answerer, errors="return")

    return read_now(settings, paths, row, run)


def read_now(settings: Settings, paths: Sequence[Path], row: dict[str, Any], run: Run) -> list[dict[str, Any]]:
    """A row like `row` for each picture at the paths, with what the model that `run` runs said of it."""
    found = [image for path in paths for image in list_pictures(settings, path)]
    texts = iter(run([path for _, path in found if isinstance(path, Path)]))
    return [{"image": image} | fill_row(row, next(texts) if isinstance(path, Path) else path) for image, path in found]


def list_pictures(settings: Settings, path: Path) -> Iterator[tuple[str, Path | ItemError]]:
    """What a row calls an image, and its file; of a folder each picture, or the error of one damaged or refused.

    A row calls it by the path as given, of a folder joined with the path below it, as valid Unicode.
    """
    from producer.images import scan_images
    from producer.walk import clean_item
    from readroom.intake import damaged_items

    if not path.is_dir():
        yield clean_item(str(path)), path
        return
    for item in scan_images(path, settings):
        image = clean_item(str(path / item.item))
        if not isinstance(item, SkippedItem):
            yield image, Path(item.ref.path)
        elif damaged_items([item]):
            yield image, SourceError(item.reason, item.detail)


def fill_row(row: dict[str, Any], text: GeneratedText | ItemError) -> dict[str, Any]:
    """The row with a text and its score, or with why there is none."""
    if isinstance(text, ItemError):
        return row | {"error": str(text)}
    return row | {"answer" if "answer" in row else "caption": text.text, "score": text.score}
