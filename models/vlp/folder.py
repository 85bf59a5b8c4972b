"""A VLP's checkpoint folder: what training and conversion write, and what the captioner reads.

config.json         sizes of the transformer, and under `regions` the provider it was trained with
model.safetensors   the transformer under the release's names; the LM head's copy of the word table is left out
vocab.txt           the cased vocabulary, a token a line
answers.json        texts of the answers, index = class, the first is never given; only with the answer head
regions.*           the provider's network; none for precomputed features (models/vlp/backbone.py)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.checkpoint import Manifest, read_json, write_manifest
from models.plain import count_parameters
from models.vlp.backbone import save_provider_files
from models.vlp.config import VlpConfig, parse_config
from models.vlp.network import VlpModel
from models.vlp.regions import RegionSpec
from models.vlp.tokenizer import VOCABULARY_NAME, CasedTokenizer, read_vocabulary
from readroom.errors import CheckpointBroken, CheckpointMissing

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
ANSWERS_NAME = "answers.json"
FAMILY = "vlp"
GEOMETRY_DIM = 6  # what locate_regions gives beside the classes
MAX_ANSWERS_BYTES = 16 * 1024 * 1024
TIED_WEIGHT = "cls.predictions.decoder.weight"
FETCH_AGAIN = "Fetch the checkpoint again."
READABLE = "Make it a file that this user may read."
OWN_WEIGHTS = "Use the weights as training wrote them."


# Writing -------------------------------------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path,
    model: VlpModel,
    spec: RegionSpec,
    words: Sequence[str],
    provider: nn.Module | None = None,
    answers: Sequence[str] = (),
    **described: Any,
) -> Manifest:
    """Write a whole checkpoint folder; weights keep the number format they have.

    `words` is the vocabulary in the order of ids, `provider` the network behind the regions (None for precomputed),
    `answers` the texts of the answer head's classes. `described` are fields of Manifest, as for `sign_folder`.
    Raises CheckpointBroken when the parts do not fit each other; writes nothing then.
    """
    check_parts(model.config, spec, CasedTokenizer(words), answers)
    if (provider is None) != (spec.provider == "precomputed"):
        raise CheckpointBroken("regions: a network is written for every provider but `precomputed`")
    folder.mkdir(parents=True, exist_ok=True)
    document = {**model.config.as_json(), "regions": spec.as_json()}
    write_text(folder / CONFIG_NAME, json.dumps(document, indent=2, sort_keys=True) + "\n")
    write_text(folder / VOCABULARY_NAME, "".join(f"{word}\n" for word in words))
    if answers:
        write_text(folder / ANSWERS_NAME, json.dumps(list(answers), indent=0, ensure_ascii=False) + "\n")
    if provider is not None:
        save_provider_files(provider, folder)
    weights = {name: tensor.detach().to("cpu").contiguous() for name, tensor in model.state_dict().items()}
    del weights[TIED_WEIGHT]
    save_file(weights, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    (folder / WEIGHTS_NAME).chmod(0o644)  # safetensors writes for its owner alone; a worker may be another user
    return sign_folder(folder, **described)


def sign_folder(folder: Path, **described: Any) -> Manifest:
    """Write, or write again, the manifest of a folder that is complete otherwise; scores may come later so.

    `described` are fields of Manifest: `name` is needed; `task`, `parameters`, sizes and `regions` are read off the
    folder unless given.
    """
    config, spec = read_sizes(folder)
    found = {
        "family": FAMILY,
        "task": "caption+answer" if config.num_answers else "caption",
        "parameters": sum(count_parameters(path) for path in folder.glob("*.safetensors")),
        "image_size": spec.image_size,
        "mean": spec.mean,
        "std": spec.std,
        "regions": spec.as_json(),
    }
    return write_manifest(folder, **(found | described))


def write_text(path: Path, text: str) -> None:
    """Write a file of the folder, readable to all."""
    path.write_text(text, encoding="utf-8")
    path.chmod(0o644)


# Reading -------------------------------------------------------------------------------------------------------------


def read_sizes(folder: Path) -> tuple[VlpConfig, RegionSpec]:
    """The transformer's sizes and the provider it was trained with, from config.json. Raises CheckpointBroken."""
    document = read_json(folder / CONFIG_NAME)
    config, spec = parse_config(document), RegionSpec.from_json(document.get("regions"))
    try:
        check_sizes(config, spec)
    except CheckpointBroken as error:
        raise CheckpointBroken(f"{CONFIG_NAME}: {error}") from None
    return config, spec


def load_network(folder: Path, config: VlpConfig, dtype: torch.dtype = torch.float32) -> VlpModel:
    """The transformer in evaluation mode on the host, every weight from the file and none left random.

    Raises CheckpointMissing, CheckpointBroken naming what is missing or too much.
    """
    if not (folder / WEIGHTS_NAME).is_file():
        raise CheckpointMissing(f"the checkpoint holds no {WEIGHTS_NAME}", FETCH_AGAIN)
    try:
        weights = load_file(folder / WEIGHTS_NAME)
    except (SafetensorError, OSError) as error:
        raise CheckpointBroken(f"{WEIGHTS_NAME} cannot be read ({type(error).__name__})", FETCH_AGAIN) from None
    if TIED_WEIGHT in weights:
        raise CheckpointBroken(f"{WEIGHTS_NAME}: {TIED_WEIGHT} is not expected, as it is the word table")
    return fill_network(config, weights, dtype)


def fill_network(config: VlpConfig, weights: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> VlpModel:
    """A transformer of exactly these weights, the word table being the LM head's too. Raises CheckpointBroken.

    It is built without memory and takes the tensors over, so that sizes a file does not bear out cost nothing.
    """
    if config.num_hidden_layers > len(weights):
        raise CheckpointBroken("weights do not fit this VLP: there are fewer than layers", OWN_WEIGHTS)
    check_fractions(weights)
    with torch.device("meta"):
        model = VlpModel(config)
    held = {name: tensor.to(dtype) for name, tensor in weights.items()}
    try:
        missing, extra = model.load_state_dict(held, strict=False, assign=True)
    except RuntimeError as error:
        named = [line.strip().partition(":")[0] for line in str(error).splitlines()[1:4]]
        told = "; ".join(named)
        raise CheckpointBroken(f"weights are of another shape than this VLP's: {told}", OWN_WEIGHTS) from None
    wrong = sorted({*missing, *extra} - {TIED_WEIGHT})
    if wrong:
        raise CheckpointBroken(f"weights do not fit this VLP: {name_keys(wrong)}", OWN_WEIGHTS)
    for name, tensor in held.items():
        if not bool(tensor.isfinite().all()):  # one NaN makes every caption noise
            raise CheckpointBroken(f"weights are not finite: {name} holds NaN or infinity", OWN_WEIGHTS)
    model.cls.predictions.decoder.weight = model.bert.embeddings.word_embeddings.weight
    return model.eval()


def check_fractions(weights: dict[str, Tensor]) -> None:
    """Raise CheckpointBroken for whole or complex numbers, which would lose their meaning when converted."""
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            raise CheckpointBroken(f"weights do not fit a VLP: {name} holds no floating point numbers", OWN_WEIGHTS)


def name_keys(keys: Sequence[str]) -> str:
    """The first five keys, and how many there are."""
    return f"{', '.join(sorted(keys)[:5])} ({len(keys)} in all)"


def read_answers(folder: Path, config: VlpConfig) -> tuple[str, ...]:
    """The texts of the answer head's classes, () where there is no such head. Raises CheckpointMissing/-Broken."""
    if not config.num_answers:
        return ()
    path = folder / ANSWERS_NAME
    if not path.is_file():
        raise CheckpointMissing(f"the checkpoint has an answer head and no {ANSWERS_NAME}", FETCH_AGAIN)
    return read_answer_list(path)


def read_answer_list(path: Path) -> tuple[str, ...]:
    """A JSON list of texts. Raises CheckpointBroken."""
    try:
        if path.stat().st_size > MAX_ANSWERS_BYTES:
            raise CheckpointBroken(f"{path.name} is larger than {MAX_ANSWERS_BYTES} bytes")
        texts = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointBroken(f"{path.name} cannot be read ({type(error).__name__})", READABLE) from None
    except (ValueError, RecursionError):
        raise CheckpointBroken(f"{path.name} is not JSON") from None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise CheckpointBroken(f"{path.name} is not a list of texts")
    if any("\ud800" <= sign <= "\udfff" for text in texts for sign in text):
        raise CheckpointBroken(f"{path.name} holds a text that is no Unicode", "Write it out again as UTF-8.")
    return tuple(texts)


def read_tokenizer(folder: Path) -> CasedTokenizer:
    """The vocabulary's tokenizer. Raises CheckpointMissing, CheckpointBroken."""
    if not (folder / VOCABULARY_NAME).is_file():
        raise CheckpointMissing(f"the checkpoint holds no {VOCABULARY_NAME}", FETCH_AGAIN)
    return read_vocabulary(folder / VOCABULARY_NAME)


# Checks --------------------------------------------------------------------------------------------------------------


def check_parts(config: VlpConfig, spec: RegionSpec, tokenizer: CasedTokenizer, answers: Sequence[str]) -> None:
    """Raise CheckpointBroken unless sizes, regions, vocabulary and answers belong together."""
    check_sizes(config, spec)
    if len(tokenizer.words) != config.vocab_size:
        raise CheckpointBroken(
            f"{VOCABULARY_NAME} holds {len(tokenizer.words)} tokens, the weights {config.vocab_size}",
            "Use the checkpoint's own vocabulary.",
        )
    if len(answers) != config.num_answers:
        raise CheckpointBroken(
            f"{ANSWERS_NAME} holds {len(answers)} texts, the answer head {config.num_answers}",
            "Use the answers the checkpoint was trained with.",
        )


def check_sizes(config: VlpConfig, spec: RegionSpec) -> None:
    """Raise CheckpointBroken unless the transformer takes the regions that its provider gives."""
    pairs = {
        "num_regions": (config.num_regions, spec.count),
        "region_feat_dim": (config.region_feat_dim, spec.feature_dim),
        "region_num_classes": (config.region_num_classes, spec.class_count),
        "region_geometry_dim": (config.region_geometry_dim, GEOMETRY_DIM),
    }
    for name, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise CheckpointBroken(f"{name} is {ours}, its regions give {theirs}")
    # An answer head of one class could only give what is never given; prefix and text have a type each.
    for name, size in (("num_answers", config.num_answers), ("type_vocab_size", config.type_vocab_size)):
        if size == 1:
            raise CheckpointBroken(f"{name} is out of range")
