"""A provider's network on disk: `regions.json`, transformers' config, and `regions.safetensors`, its weights.

A config is foreign input: transformers would fetch a backbone, a kernel or code that it names. Those are refused here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from models.checkpoint import read_json
from models.device import translate_device_errors
from models.pretrained import COMPUTED_SUFFIX, hide_progress
from readroom.errors import CheckpointBroken, CheckpointMissing, ReadroomError

Seen = TypeVar("Seen")

CONFIG_NAME = "regions.json"
WEIGHTS_NAME = "regions.safetensors"
# Entries of a config, at any depth, with which transformers goes and fetches something.
FETCHING = frozenset({"auto_map", "attn_implementation", "_attn_implementation", "backbone", "use_pretrained_backbone",
                      "use_timm_backbone", "quantization_config"})  # fmt: skip


def read_config(folder: Path) -> Any:
    """The network's config from regions.json. Raises CheckpointMissing, CheckpointBroken; fetches nothing."""
    if not (folder / CONFIG_NAME).is_file():
        raise CheckpointMissing(f"the checkpoint holds no {CONFIG_NAME}", "Fetch the checkpoint again.")
    document = read_json(folder / CONFIG_NAME)
    for key, value in list_entries(document):
        told = key in FETCHING and value is not None and value is not False
        # timm's networks fetch their weights while they are built
        if told or (isinstance(value, str) and value.startswith("timm_")):
            raise CheckpointBroken(f"{CONFIG_NAME}: {key} names something that is not in the checkpoint")
    kind = str(document.pop("model_type", ""))
    if kind not in CONFIG_MAPPING:
        raise CheckpointBroken(f"{CONFIG_NAME}: model_type is not one that can be run here")
    config_class = CONFIG_MAPPING[kind]
    # Without it a detector's config would look for its usual backbone on the hub.
    if "backbone_config" in config_class.sub_configs and not isinstance(document.get("backbone_config"), dict):
        raise CheckpointBroken(f"{CONFIG_NAME}: backbone_config is missing")
    try:
        return config_class(**document)
    except Exception as error:
        # each config class checks its fields in its own way
        raise CheckpointBroken(f"{CONFIG_NAME}: transformers refuses it ({type(error).__name__})") from error


def list_entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of a JSON document with its value, at any depth."""
    if isinstance(value, list):
        for item in value:
            yield from list_entries(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key), item
            yield from list_entries(item)


def drop_names(value: Any) -> Any:
    """A config's document without the folders that its parts once came from, at any depth."""
    if isinstance(value, list | tuple):
        return [drop_names(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: drop_names(item) for key, item in value.items() if key != "_name_or_path"}


def load_network(folder: Path, find_class: Callable[[Any], Any], dtype: torch.dtype) -> nn.Module:
    """The network of a checkpoint folder in evaluation mode on the host, every weight used and none left random.

    `find_class` gives transformers' class for a config, None for a config it has no use for. Raises CheckpointMissing,
    CheckpointBroken naming missing and unexpected weights.
    """
    config = read_config(folder)
    kind = find_class(config)
    if kind is None:
        raise CheckpointBroken(f"{CONFIG_NAME}: a {config.model_type} cannot be this checkpoint's provider")
    if not (folder / WEIGHTS_NAME).is_file():
        raise CheckpointMissing(f"the checkpoint holds no {WEIGHTS_NAME}", "Fetch the checkpoint again.")
    try:
        weights = load_file(folder / WEIGHTS_NAME)
        with hide_progress():
            network, found = kind.from_pretrained(
                None,
                config=config,
                state_dict=weights,
                dtype=dtype,
                ignore_mismatched_sizes=True,  # they are named below
                output_loading_info=True,
            )
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            raise
        # a class checks its config's numbers while it is built, in its own way
        raise CheckpointBroken(
            f"transformers cannot load these weights as {kind.__name__} ({type(error).__name__})",
            f"Check {CONFIG_NAME} and {WEIGHTS_NAME}.",
        ) from error
    check_keys(found, kind.__name__)
    return network.eval()  # type: ignore[no-any-return]


def check_keys(found: dict[str, Any], kind: str) -> None:
    """Raise CheckpointBroken, naming them, when weights are missing, unexpected or of another shape."""
    strange = [key for key in found["unexpected_keys"] if not key.endswith(COMPUTED_SUFFIX)]
    mismatched = [str(key) for key, *_ in found["mismatched_keys"]]
    named = {"missing": found["missing_keys"], "unexpected": strange, "of another shape": mismatched}
    wrong = [f"{word}: {', '.join(sorted(keys)[:5])} ({len(keys)} in all)" for word, keys in named.items() if keys]
    if wrong:
        raise CheckpointBroken(f"{WEIGHTS_NAME} does not fit {kind}; {'; '.join(wrong)}")


@torch.no_grad()
def probe_network(network: Any, image_size: int, run: Callable[[Tensor], Seen]) -> Seen:
    """What `run` makes of one black picture [1, 3, S, S], in evaluation mode. Raises CheckpointBroken."""
    was_training = network.training
    try:
        with translate_device_errors():
            black = torch.zeros((1, 3, image_size, image_size), device=network.device, dtype=network.dtype)
            network.eval()  # a black picture must not enter the statistics of a normalisation
            return run(black)
    except ReadroomError:
        raise
    except Exception as error:
        # each network refuses a picture of another size in its own way
        raise CheckpointBroken(
            f"the region provider cannot look at a picture of its image_size ({type(error).__name__})"
        ) from error
    finally:
        network.train(was_training)


def require_size(name: str, named: int, given: int) -> None:
    """Raise CheckpointBroken unless the size that a spec names is the one its network gives."""
    if named != given:
        raise CheckpointBroken(f"regions: {name} is {named}, and its network gives {given}")


def save_provider_files(network: Any, folder: Path) -> None:
    """Write a network's config and weights into a checkpoint folder; weights that are one tensor are written once."""
    document = drop_names(network.config.to_dict())
    (folder / CONFIG_NAME).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    weights: dict[str, torch.Tensor] = {}
    written: set[int] = set()
    for name, tensor in network.state_dict(keep_vars=True).items():
        if id(tensor) not in written and not name.endswith(COMPUTED_SUFFIX):
            written.add(id(tensor))
            weights[name] = tensor.detach().to("cpu").contiguous()
    save_file(weights, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        (folder / name).chmod(0o644)  # a worker of another user reads them
