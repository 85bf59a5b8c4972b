"""Images, now: the command `caption`, on the same functions as the worker and `inference.generate_caption`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from readroom.errors import CheckpointError, ItemError, SourceError
from readroom.intake import choose_checkpoint, choose_generation, existing_store
from readroom.records import GeneratedText, SkippedItem
from readroom.settings import Settings

if TYPE_CHECKING:
    from models.checkpoint import CheckpointSource


TOY_NOTE = (
    "bundled is a small model for trying things out: its captions of real films mean nothing; "
    "AI drafts, not for diagnosis"
)


def choose_captioner(settings: Settings, model: str | None) -> CheckpointSource:
    """The checkpoint as `enqueue` chooses it; a store is asked when there is one, and none is made."""
    with existing_store(settings) as store:
        return choose_checkpoint(settings, store, "blip", model, remember=False)


def warn_captioner(source: CheckpointSource) -> str | None:
    """What to say of a checkpoint before its captions are read; None when there is nothing to say."""
    from models.checkpoint import resolve_checkpoint

    try:
        return TOY_NOTE if source.ref == resolve_checkpoint("bundled").ref else None
    except CheckpointError:  # a checkout without it
        return None


def caption_now(settings: Settings, paths: Sequence[Path], source: CheckpointSource) -> list[dict[str, Any]]:
    """One row an image: `{"image", "caption", "score", "checkpoint", "error"}`; a bad image has its error set.

    Of a folder, every picture in it is captioned. Raises CheckpointMissing when the model cannot be had.
    """
    from models.load import load_captioner
    from models.predict import caption_images

    captioner = load_captioner(source, device=settings.device, precision=settings.precision)
    found = [image for path in paths for image in list_pictures(settings, path)]
    good = [path for _, path in found if isinstance(path, Path)]
    texts = iter(caption_images(good, captioner, choose_generation(settings, source), errors="return"))
    return [
        describe_text(image, next(texts) if isinstance(path, Path) else path, captioner.checkpoint)
        for image, path in found
    ]


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


def describe_text(image: str, text: GeneratedText | ItemError, checkpoint: str) -> dict[str, Any]:
    """The row of one image."""
    row = {"image": image, "caption": None, "score": None, "checkpoint": checkpoint, "error": None}
    if isinstance(text, ItemError):
        return row | {"error": str(text)}
    return row | {"caption": text.text, "score": text.score}
