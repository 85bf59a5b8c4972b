"""From a checkpoint's name to a model that runs."""

from __future__ import annotations

from models.base import Answerer, Captioner
from models.checkpoint import CheckpointSource, resolve_checkpoint
from models.dummy import DummyModel
from readroom.errors import CheckpointBroken


def load_captioner(source: CheckpointSource | str, device: str = "auto", precision: str = "float32") -> Captioner:
    """Load a captioner; digests of a folder with a manifest are verified first.

    Raises CheckpointMissing or CheckpointBroken with what to do, BadCall for an unknown device or precision.
    """
    found = resolve_checkpoint(source) if isinstance(source, str) else source
    if found.family == "dummy":
        return DummyModel(found.location)
    if found.family == "blip":
        from models.blip import load_blip_captioner

        return load_blip_captioner(found, device, precision)
    raise CheckpointBroken(f"no captioner is of the family {found.family!r}", "Name a BLIP checkpoint.")


def load_answerer(source: CheckpointSource | str, device: str = "auto", precision: str = "float32") -> Answerer:
    """Load a model for visual questions; as `load_captioner`."""
    found = resolve_checkpoint(source) if isinstance(source, str) else source
    if found.family == "dummy":
        return DummyModel(found.location)
    if found.family == "blip":
        from models.blip import load_blip_answerer

        return load_blip_answerer(found, device, precision)
    raise CheckpointBroken(f"no answerer is of the family {found.family!r}", "Name a BLIP checkpoint.")
