"""From a checkpoint's name to a model that runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from models.base import Answerer, Captioner
from models.checkpoint import CheckpointSource, resolve_checkpoint
from models.dummy import DummyModel
from readroom.errors import CheckpointBroken

Loader = Callable[[CheckpointSource, str, str], Any]
"""From a checkpoint, a device and a precision to a captioner or an answerer."""


def load_captioner(
    source: CheckpointSource | str, device: str = "auto", precision: str = "float32", region_dir: Path | None = None
) -> Captioner:
    """Load a captioner; digests of a folder with a manifest are verified first.

    `region_dir` holds the features that a VLP with precomputed regions reads; other models take no notice of it.
    Raises CheckpointMissing or CheckpointBroken with what to do, BadCall for an unknown device or precision.
    """
    captioner: Captioner = _load_model(source, "caption", device, precision, region_dir)
    return captioner


def load_answerer(
    source: CheckpointSource | str, device: str = "auto", precision: str = "float32", region_dir: Path | None = None
) -> Answerer:
    """Load a model for visual questions; as `load_captioner`."""
    answerer: Answerer = _load_model(source, "answer", device, precision, region_dir)
    return answerer


def _load_model(source: CheckpointSource | str, task: str, device: str, precision: str, region_dir: Path | None) -> Any:
    found = resolve_checkpoint(source) if isinstance(source, str) else source
    if found.family not in LOADERS:
        raise CheckpointBroken(f"no model here is of the family {found.family!r}", f"There are: {', '.join(LOADERS)}.")
    found.check_task(task)
    return LOADERS[found.family](region_dir)[task](found, device, precision)


# Each family's own code is imported when one of its checkpoints is loaded: it costs seconds and may need packages that
# the others do not.


def _list_dummies(_region_dir: Path | None) -> dict[str, Loader]:
    def load(source: CheckpointSource, _device: str, _precision: str) -> DummyModel:
        return DummyModel(source.location)

    return {"caption": load, "answer": load}


def _list_blips(_region_dir: Path | None) -> dict[str, Loader]:
    from models.blip import load_blip_answerer, load_blip_captioner

    return {"caption": load_blip_captioner, "answer": load_blip_answerer}


def _list_vlps(region_dir: Path | None) -> dict[str, Loader]:
    from models.vlp.captioner import load_vlp_answerer, load_vlp_captioner

    return {
        "caption": partial(load_vlp_captioner, region_dir=region_dir),
        "answer": partial(load_vlp_answerer, region_dir=region_dir),
    }


LOADERS: dict[str, Callable[[Path | None], dict[str, Loader]]] = {
    "dummy": _list_dummies,
    "blip": _list_blips,
    "vlp": _list_vlps,
}
