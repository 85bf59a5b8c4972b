"""Plain hub folders, without a manifest of ours: what their own files say, and a copy of them with a manifest.

Knows no torch: sizes are read off the headers of the safetensors files.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

from models.checkpoint import (
    BLIP_ANSWER,
    BLIP_CAPTION,
    CLIP_MEAN,
    CLIP_STD,
    DEFAULT_PROFILE,
    HASHED_SUFFIXES,
    CheckpointSource,
    Floats,
    list_files,
    publish_files,
    read_json,
    write_manifest,
)
from readroom.errors import CheckpointBroken

# github.com/huggingface/safetensors: 8 bytes little-endian length, then a JSON header of 100 MB at most.
HEADER_LENGTH = struct.Struct("<Q")
MAX_HEADER_BYTES = 100_000_000
BLIP_IMAGE_SIZE = 384  # transformers' BlipVisionConfig where config.json says nothing
BLIP_ANSWERER = "BlipForQuestionAnswering"


def publish_plain(source: CheckpointSource, dest_root: Path | str) -> Path:
    """Copy a plain folder to `<dest_root>/<digest>` with a manifest, under the ref that it has as a plain folder.

    Files that its digest does not cover (notes, pickles beside the safetensors) stay behind. Returns the folder.
    Raises CheckpointBroken when the files cannot be described, or change meanwhile.
    """
    folder = Path(source.location)
    described = describe_folder(folder) | {"name": source.name, "family": source.family}

    def fill(staged: Path) -> None:
        for entry in list_files(folder):
            if entry.suffix in HASHED_SUFFIXES:
                shutil.copyfile(entry, staged / entry.name)
        write_manifest(staged, **described)

    return publish_files(Path(dest_root), source.ref.removeprefix("sha256:"), fill)


def describe_folder(folder: Path) -> dict[str, Any]:
    """The fields of a manifest that a plain folder's files tell; its licence is not among them."""
    config = read_json(folder / "config.json")
    vision = config.get("vision_config")
    mean, std = read_normalisation(folder)
    answers = BLIP_ANSWERER in (config.get("architectures") or [])
    generation = asdict(BLIP_ANSWER if answers else BLIP_CAPTION) if config.get("model_type") == "blip" else {}
    return {
        "task": "answer" if answers else "caption",
        "parameters": sum(count_parameters(path) for path in folder.glob("*.safetensors")),
        "image_size": vision.get("image_size", BLIP_IMAGE_SIZE) if isinstance(vision, dict) else BLIP_IMAGE_SIZE,
        "preprocess": DEFAULT_PROFILE,
        "mean": mean,
        "std": std,
        "generation": generation,
        "command": "readroom checkpoints add",
    }


def count_parameters(path: Path) -> int:
    """Numbers in the floating-point tensors of a safetensors file, by its header. Raises CheckpointBroken."""
    try:
        with path.open("rb") as stream:
            (length,) = HEADER_LENGTH.unpack(stream.read(HEADER_LENGTH.size))
            if length > MAX_HEADER_BYTES:
                raise ValueError
            header = json.loads(stream.read(length))
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        return sum(math.prod(entry["shape"]) for entry in tensors if str(entry["dtype"]).startswith(("F", "BF")))
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointBroken(f"{path.name} is no safetensors file, or is damaged", "Fetch it again.") from None


def read_normalisation(folder: Path) -> tuple[Floats, Floats]:
    """Mean and standard deviation from preprocessor_config.json, CLIP's where it says nothing."""
    config = read_json(folder / "preprocessor_config.json")
    if config.get("do_normalize", True) is False:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return _read_triple(config, "image_mean", CLIP_MEAN), _read_triple(config, "image_std", CLIP_STD)


def _read_triple(config: dict[str, Any], key: str, default: Floats) -> Floats:
    try:
        first, second, third = (float(number) for number in config.get(key, default))
    except (TypeError, ValueError):
        raise CheckpointBroken(f"preprocessor_config.json: {key} is not three numbers") from None
    return first, second, third
