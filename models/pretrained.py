"""Habits of transformers' pretrained models, wherever one is loaded or saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging

# Buffers that old checkpoints carry and the classes compute.
COMPUTED_SUFFIX = "position_ids"


@contextmanager
def hide_progress() -> Iterator[None]:
    """Without transformers' progress bars, which appear on any stream, for work of a second or two."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
