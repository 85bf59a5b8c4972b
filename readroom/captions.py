"""One image, now: the command `caption` and `inference.generate_caption` stand on the same function."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from readroom.errors import ItemError
from readroom.settings import Settings


def caption_now(settings: Settings, images: Sequence[Path], model: str | None) -> list[dict[str, Any]]:
    """One row an image: `{"image", "caption", "score", "checkpoint", "error"}`; a bad image has its error set.

    Raises CheckpointMissing when the model cannot be had.
    """
    from models.load import load_captioner
    from models.predict import caption_images
    from readroom.intake import choose_generation, name_model

    source = name_model(settings, model)
    captioner = load_captioner(source, device=settings.device, precision=settings.precision)
    texts = caption_images(list(images), captioner, choose_generation(settings, source), errors="return")
    return [describe_text(path, text, captioner.checkpoint) for path, text in zip(images, texts, strict=True)]


def describe_text(path: Path, text: Any, checkpoint: str) -> dict[str, Any]:
    """The row of one image."""
    failed = isinstance(text, ItemError)
    return {
        "image": str(path),
        "caption": None if failed else text.text,
        "score": None if failed else text.score,
        "checkpoint": checkpoint,
        "error": str(text) if failed else None,
    }
