"""Files that authors release: weights as a pickle, read as tensors only, and the vocabulary that belongs to them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from readroom.errors import CheckpointBroken, CheckpointMissing

Weights = dict[str, torch.Tensor]

CONVERT_COMMAND = "readroom checkpoints add --convert"


def read_weights(path: Path) -> Weights:
    """The tensors of a pickle, by torch's unpickler that knows tensors only. Raises CheckpointBroken."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Malformed pickles end in whatever the unpickler stumbled over: struct.error, IndexError, UnicodeDecodeError
        raise CheckpointBroken(
            f"this file holds more than tensors, or is damaged ({type(error).__name__})",
            "It is refused, as reading it could run code.",
        ) from None
    weights = content.get("model", content) if isinstance(content, Mapping) else None
    if not isinstance(weights, Mapping) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise CheckpointBroken("this file is no table of tensors")
    for name, value in weights.items():
        _check_memory(str(name), value)
    return {str(name): value for name, value in weights.items()}


def _check_memory(name: str, tensor: torch.Tensor) -> None:
    """Raise CheckpointBroken unless each number of a tensor lies in the file: a few bytes could stand for terabytes."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_nested
    if not plain or tensor.numel() > tensor.untyped_storage().nbytes() // tensor.element_size():
        raise CheckpointBroken(
            f"{name} is sparse, or larger than what the file holds of it",
            "Save the weights as plain, contiguous tensors.",
        )


def count_layers(weights: Weights, prefix: str) -> int:
    """How many numbered layers stand under a prefix."""
    found = {match[1] for name in weights if (match := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))}
    return len(found)


def find_vocabulary(path: Path, hub_name: str) -> Path:
    """`vocab.txt` beside the weights, else that of a BERT (`owner/name@revision`) on the hub."""
    beside = path.with_name("vocab.txt")
    if beside.is_file():
        return beside
    from models.hub import download_files

    repo, _, revision = hub_name.partition("@")
    bert = repo.partition("/")[2]
    try:
        return download_files(repo, revision, ["vocab.txt"]) / "vocab.txt"
    except CheckpointMissing:
        raise CheckpointMissing(
            f"a released {path.suffix} carries no tokenizer, and {bert}'s is neither beside it nor on the hub",
            f"Put {bert}'s vocab.txt beside the {path.suffix} file.",
        ) from None
