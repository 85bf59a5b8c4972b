"""Images, now: the command `caption`, on the same functions as the worker and `inference.generate_caption`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from readroom.errors import ItemError, SourceError
from readroom.intake import choose_generation, name_model
from readroom.records import GeneratedText, SkippedItem
from readroom.settings import Settings


def caption_now(settings: Settings, paths: Sequence[Path], model: str | None) -> list[dict[str, Any]]:
    """One row an image: `{"image", "caption", "score", "checkpoint", "error"}`; a bad image has its error set.

    Of a folder, every picture in it is captioned. Raises CheckpointMissing when the model cannot be had.
    """
    from models.load import load_captioner
    from models.predict import caption_images

    source = name_model(settings, model)
    captioner = load_captioner(source, device=settings.device, precision=settings.precision)
    found = [image for path in paths for image in list_pictures(settings, path)]
    good = [path for path, error in found if error is None]
    texts = iter(caption_images(good, captioner, choose_generation(settings, source), errors="return"))
    return [describe_text(path, error or next(texts), captioner.checkpoint) for path, error in found]


def list_pictures(settings: Settings, path: Path) -> Iterator[tuple[Path, ItemError | None]]:
    """A file as it is; of a folder its pictures, and an error for each file that is damaged or refused."""
    from producer.images import scan_images
    from readroom.intake import damaged_items

    if not path.is_dir():
        yield path, None
        return
    for item in scan_images(path, settings):
        if not isinstance(item, SkippedItem):
            yield Path(item.ref.path), None
        elif damaged_items([item]):
            yield path / item.item, SourceError(item.reason, item.detail)


def describe_text(path: Path, text: GeneratedText | ItemError, checkpoint: str) -> dict[str, Any]:
    """The row of one image."""
    row = {"image": str(path), "caption": None, "score": None, "checkpoint": checkpoint, "error": None}
    if isinstance(text, ItemError):
        return row | {"error": str(text)}
    return row | {"caption": text.text, "score": text.score}
