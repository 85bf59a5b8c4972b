"""A provider's network on disk: `regions.json`, transformers' config, and `regions.safetensors`, its weights.

A config is foreign input: transformers would fetch a backbone, a kernel or code that it names, and build a network of
any size. The first is refused here; the second is built without memory and compared with the weights before any is
taken.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
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
# A network has fewer parts than ten times its tensors, and some more where it has hardly any; the largest vision
# networks have a few thousand tensors.
PARTS_PER_TENSOR = 10
SPARE_PARTS = 1000
MAX_TENSORS = 20_000
# Of one number in a config: a width, a count. What a class computes of them it keeps in memory as it is built.
MAX_NUMBER = 1_000_000
# What a network may compute for itself (positions, masks), in numbers.
MAX_COMPUTED = 16 * 2**20
CONFIG_REMEDY = f"Correct {CONFIG_NAME} or fetch the checkpoint again."
SPEC_REMEDY = "Correct the regions of config.json and of the manifest, or fetch the checkpoint again."
FILES_REMEDY = f"Check that {CONFIG_NAME} and {WEIGHTS_NAME} are of one network."


class TooManyParts(Exception):
    """A network that is being built has more parts than it may have; never leaves this file."""


def read_config(folder: Path) -> Any:
    """The network's config from regions.json. Raises CheckpointMissing, CheckpointBroken; fetches nothing."""
    if not (folder / CONFIG_NAME).is_file():
        raise CheckpointMissing(f"the checkpoint holds no {CONFIG_NAME}", "Fetch the checkpoint again.")
    document = read_json(folder / CONFIG_NAME)
    try:
        entries = list(list_entries(document))
    except RecursionError:
        raise CheckpointBroken(f"{CONFIG_NAME} is nested too deeply", CONFIG_REMEDY) from None
    for key, value in entries:
        told = key in FETCHING and value is not None and value is not False
        # timm's networks fetch their weights while they are built
        if told or (isinstance(value, str) and value.startswith("timm_")):
            raise CheckpointBroken(f"{CONFIG_NAME}: {key} names something that is not in the checkpoint", CONFIG_REMEDY)
        check_numbers(key, value)
    kind = str(document.pop("model_type", ""))
    if kind not in CONFIG_MAPPING:
        raise CheckpointBroken(f"{CONFIG_NAME}: model_type is not one that can be run here", CONFIG_REMEDY)
    config_class = CONFIG_MAPPING[kind]
    # Without it a detector's config would look for its usual backbone on the hub.
    if "backbone_config" in config_class.sub_configs and not isinstance(document.get("backbone_config"), dict):
        raise CheckpointBroken(f"{CONFIG_NAME}: backbone_config is missing", CONFIG_REMEDY)
    try:
        return config_class(**document)
    except Exception as error:
        # each config class checks its fields in its own way
        what = f"{CONFIG_NAME}: transformers refuses it ({type(error).__name__})"
        raise CheckpointBroken(what, CONFIG_REMEDY) from error


def check_numbers(key: str, value: Any) -> None:
    """Raise CheckpointBroken for an integer, or one in a list, beyond any network's."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting.extend(item)
        if isinstance(item, int) and not -MAX_NUMBER <= item <= MAX_NUMBER:
            raise CheckpointBroken(f"{CONFIG_NAME}: {key} is beyond {MAX_NUMBER}", CONFIG_REMEDY)
    # RT-DETR computes a grid over a picture of this size while it is built, at any stride; without it, as it looks
    if key == "anchor_image_size" and value:
        raise CheckpointBroken(f"{CONFIG_NAME}: anchor_image_size is not usable", "Leave it out: it changes nothing.")


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
        raise CheckpointBroken(
            f"{CONFIG_NAME}: a {config.model_type} cannot be this checkpoint's provider", CONFIG_REMEDY
        )
    if not (folder / WEIGHTS_NAME).is_file():
        raise CheckpointMissing(f"the checkpoint holds no {WEIGHTS_NAME}", "Fetch the checkpoint again.")
    try:
        check_build(kind, config, read_shapes(folder))
        weights = load_file(folder / WEIGHTS_NAME)
        check_finite(weights)
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
        if isinstance(error, torch.OutOfMemoryError | MemoryError | ReadroomError):
            raise
        # a class checks its config's numbers while it is built, in its own way
        raise CheckpointBroken(
            f"transformers cannot load these weights as {kind.__name__} ({type(error).__name__})",
            FILES_REMEDY,
        ) from error
    check_keys(found, kind.__name__)
    return network.eval()  # type: ignore[no-any-return]


def read_shapes(folder: Path) -> dict[str, list[int]]:
    """The shape of each tensor in the file of weights, from its header alone."""
    with safe_open(folder / WEIGHTS_NAME, framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
    if len(shapes) > MAX_TENSORS:
        raise CheckpointBroken(f"{WEIGHTS_NAME} holds more than {MAX_TENSORS} tensors", FILES_REMEDY)
    return shapes


def check_build(kind: Any, config: Any, held: dict[str, list[int]]) -> None:
    """Raise CheckpointBroken unless a network of this config has about the weights `held`; takes no memory for them.

    What transformers itself would rename, tie or compute is left to it: this only says that it will not take more
    memory than the file, and names the weights where their shapes say that the config is of another network.
    """
    try:
        with bound_parts(PARTS_PER_TENSOR * len(held) + SPARE_PARTS), torch.device("meta"):
            network = kind(config)
    except TooManyParts:
        what = f"{CONFIG_NAME} describes a network of far more parts than {WEIGHTS_NAME} has weights for"
        raise CheckpointBroken(what, FILES_REMEDY) from None
    needed = network.state_dict(keep_vars=True)
    other = [name for name, tensor in needed.items() if name in held and list(tensor.shape) != held[name]]
    refuse_keys({"of another shape": other}, kind.__name__)
    tensors = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    given = sum(torch.Size(shape).numel() for shape in held.values())
    if sum(tensor.numel() for tensor in tensors.values()) > given + MAX_COMPUTED:
        refuse_keys({"missing": needed.keys() - held.keys()}, kind.__name__)
        raise CheckpointBroken(f"{CONFIG_NAME} describes a network that computes too much", FILES_REMEDY)


@contextmanager
def bound_parts(most: int) -> Iterator[None]:
    """Raise TooManyParts when this thread, inside the block, puts more than `most` modules into others.

    How many layers a config asks for stands under a name of each class's own; that it builds them is the same for all.
    """
    builder, count = threading.get_ident(), 0

    def count_part(*_: Any) -> None:
        nonlocal count
        if threading.get_ident() != builder:
            return
        count += 1
        if count > most:
            raise TooManyParts

    hook = register_module_module_registration_hook(count_part)
    try:
        yield
    finally:
        hook.remove()


def check_finite(weights: dict[str, Tensor]) -> None:
    """Raise CheckpointBroken, naming them, when weights are infinite or not numbers."""
    wrong = sorted(name for name, tensor in weights.items() if not tensor.isfinite().all())
    if wrong:
        named = f"{', '.join(wrong[:5])} ({len(wrong)} in all)"
        raise CheckpointBroken(f"{WEIGHTS_NAME}: infinite or not a number: {named}", "Fetch the checkpoint again.")


def check_keys(found: dict[str, Any], kind: str) -> None:
    """Raise CheckpointBroken, naming them, when weights are missing, unexpected or of another shape."""
    strange = [key for key in found["unexpected_keys"] if not key.endswith(COMPUTED_SUFFIX)]
    mismatched = [str(key) for key, *_ in found["mismatched_keys"]]
    refuse_keys({"missing": found["missing_keys"], "unexpected": strange, "of another shape": mismatched}, kind)


def refuse_keys(named: dict[str, Any], kind: str) -> None:
    """Raise CheckpointBroken unless no key of weights is named for anything."""
    wrong = [f"{word}: {', '.join(sorted(keys)[:5])} ({len(keys)} in all)" for word, keys in named.items() if keys]
    if wrong:
        raise CheckpointBroken(f"{WEIGHTS_NAME} does not fit {kind}; {'; '.join(wrong)}", FILES_REMEDY)


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
            f"the region provider cannot look at a picture of its image_size ({type(error).__name__})", SPEC_REMEDY
        ) from error
    finally:
        network.train(was_training)


def require_size(name: str, named: int, given: int) -> None:
    """Raise CheckpointBroken unless the size that a spec names is the one its network gives."""
    if named != given:
        raise CheckpointBroken(f"regions: {name} is {named}, and its network gives {given}", SPEC_REMEDY)


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
