"""VLP's released weights (`model.30.bin`, github.com/LuoweiZhou/VLP) to a checkpoint folder.

They are a bare state dict: sizes are read off the shapes, regions are the release's precomputed ones. The rules are
those of the release's own loader (SPEC section 12), but a weight that is missing or too much is refused.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from models.checkpoint import VLP_ANSWER, VLP_CAPTION, Manifest
from models.released import CONVERT_COMMAND, Weights, count_layers, find_vocabulary
from models.vlp.config import VlpConfig
from models.vlp.folder import (
    GEOMETRY_DIM,
    OWN_WEIGHTS,
    TIED_WEIGHT,
    check_fractions,
    fill_network,
    name_keys,
    read_answer_list,
    save_checkpoint,
)
from models.vlp.regions import DATASETS, RegionSpec
from models.vlp.tokenizer import CasedTokenizer, read_vocabulary
from readroom.errors import CheckpointBroken, CheckpointMissing

# bert-base's heads, which every released VLP has; shapes do not tell.
HEAD_WIDTH = 64
VOCABULARY_REPO = "google-bert/bert-base-cased@main"
# The release's list is label2ans of trainval_label2ans.pkl, a pickle of strings; this is the same list as JSON.
ANSWER_NAMES = ("answers.json", "trainval_label2ans.json")
ANSWERS_REMEDY = (
    f"Put the list of answers as JSON beside the weights, as {ANSWER_NAMES[0]} or {ANSWER_NAMES[1]}. The release has "
    "it as a pickle, which is never read here: write it out on a machine that may run it."
)
WORDS = "bert.embeddings.word_embeddings.weight"
POSITIONS = "bert.embeddings.position_embeddings.weight"
TYPES = "bert.embeddings.token_type_embeddings.weight"
TRANSFORM = "cls.predictions.transform.dense.weight"
BIAS, SECOND_BIAS = "cls.predictions.bias", "cls.predictions.decoder.bias"
# A buffer of the loss, there when labels were smoothed in training.
SMOOTHING = "crit_mask_lm_smoothed.one_hot"
# Rows of a grown table of token types: 2 to 4 begin as 0 (first part), 5 as 1 (second part).
GROWN_TYPES = (0, 1, 0, 0, 0, 1)


def is_vlp(weights: Weights) -> bool:
    """Whether the names are those of a VLP: no other model embeds what it sees under them."""
    return any(re.match(r"(module\.)?vis_(pe_)?embed\.", name) for name in weights)


def convert_released(
    path: Path, weights: Weights, folder: Path, vocabulary: Path | None = None, head_width: int = HEAD_WIDTH
) -> Manifest:
    """Convert the weights of one of VLP's released `.bin` files into `folder`.

    `vocabulary` is bert-base-cased's `vocab.txt`; None looks beside the file, then on the hub. A checkpoint for
    questions needs the answers' texts beside it. Raises CheckpointMissing, CheckpointBroken.
    """
    check_fractions(weights)
    weights = rename_weights(weights)
    config = read_config(weights, head_width)
    answers = find_answers(path) if config.num_answers else ()
    tokenizer = open_vocabulary(vocabulary or find_vocabulary(path, VOCABULARY_REPO))
    model = fill_network(config, grow_tables(weights, config))
    task, settings = ("answer", VLP_ANSWER) if answers else ("caption", VLP_CAPTION)
    return save_checkpoint(
        folder,
        model,
        name_regions(config, path),
        tokenizer.words,
        answers=answers,
        name=path.stem,
        task=task,
        generation=asdict(settings),
        command=CONVERT_COMMAND,
    )


def rename_weights(weights: Weights) -> Weights:
    """Today's names, and each tensor once. Raises CheckpointBroken where two that should be one tensor differ."""
    named = {rename_weight(name): value for name, value in weights.items()}
    if len(named) < len(weights):
        raise CheckpointBroken("two weights have one name, apart from `module.`, gamma and beta")
    named.pop(SMOOTHING, None)
    drop_copy(named, TIED_WEIGHT, WORDS)
    if SECOND_BIAS in named:
        drop_copy(named, SECOND_BIAS, BIAS)
    return named


def rename_weight(name: str) -> str:
    """Without DataParallel's prefix; gamma and beta of a LayerNorm, as TensorFlow calls them, are weight and bias."""
    name = name.removeprefix("module.")
    return re.sub(r"\.beta$", ".bias", re.sub(r"\.gamma$", ".weight", name))


def drop_copy(weights: Weights, copy: str, original: str) -> None:
    """Take out a weight that must be another once more."""
    missing = [name for name in (copy, original) if name not in weights]
    if missing:
        raise CheckpointBroken(f"weights do not fit a VLP: {', '.join(missing)} missing")
    if not torch.equal(weights[copy], weights[original]):
        raise CheckpointBroken(f"weights do not fit a VLP: {copy} is not {original}, which it should be")
    del weights[copy]


def read_config(weights: Weights, head_width: int) -> VlpConfig:
    """The sizes that the shapes imply, for tables as they will be when grown. Raises CheckpointBroken."""
    try:
        vocabulary, width = weights[WORDS].shape
        features = weights["vis_embed.0.weight"].shape[1]
        places = weights["vis_pe_embed.0.weight"].shape[1]
        inner = weights["bert.encoder.layer.0.intermediate.dense.weight"].shape[0]
        positions, types = weights[POSITIONS].shape[0], weights[TYPES].shape[0]
        slices = weights[TRANSFORM].shape[0] // width
        answers = weights["ans_classifier.2.weight"].shape[0] if "ans_classifier.2.weight" in weights else 0
    except KeyError as error:
        raise CheckpointBroken(f"weights do not fit a VLP: {name_keys([error.args[0]])} missing") from None
    except (IndexError, ValueError, ZeroDivisionError):
        raise CheckpointBroken("the shapes of these weights are no VLP's", OWN_WEIGHTS) from None
    if not positions:
        raise CheckpointBroken(f"weights do not fit a VLP: {POSITIONS} has no rows", OWN_WEIGHTS)
    if types not in (2, len(GROWN_TYPES)):
        raise CheckpointBroken(f"weights do not fit a VLP: {TYPES} holds {types} types, not 2 or {len(GROWN_TYPES)}")
    if width % head_width:
        raise CheckpointBroken(
            f"weights do not fit a VLP: {WORDS} is {width} wide, no multiple of a head's {head_width}"
        )
    try:
        sizes = VlpConfig(num_answers=answers)  # for what no shape tells: regions, the longest text
        return VlpConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=count_layers(weights, "bert.encoder.layer"),
            num_attention_heads=width // head_width,
            intermediate_size=inner,
            max_position_embeddings=max(positions, sizes.prefix_length + sizes.max_text_length + 1),
            type_vocab_size=len(GROWN_TYPES),
            relax_projection=slices if slices > 1 else 0,
            region_feat_dim=features,
            region_num_classes=places - GEOMETRY_DIM,
            num_answers=answers,
        )
    except CheckpointBroken as error:
        raise CheckpointBroken(f"the shapes of these weights are no VLP's: {error}", OWN_WEIGHTS) from None


def grow_tables(weights: Weights, config: VlpConfig) -> Weights:
    """Tables of positions and token types as large as they are needed."""
    return weights | {
        POSITIONS: repeat_rows(weights[POSITIONS], config.max_position_embeddings),
        TYPES: grow_types(weights[TYPES]),
    }


def repeat_rows(table: Tensor, count: int) -> Tensor:
    """The rows of a table from the first on, again and again, `count` in all."""
    return table[torch.arange(count) % len(table)]


def grow_types(table: Tensor) -> Tensor:
    """Two token types become six, any other number stays."""
    return table[list(GROWN_TYPES)] if len(table) == 2 else table


def name_regions(config: VlpConfig, path: Path) -> RegionSpec:
    """The release's regions: a detector's, computed long before, under the file names of the weights' data set.

    The release's folders begin with it (`flickr30k_g8_lr3e-5_...`); COCO's names are the release's default.
    """
    told = path.absolute().parent.name.partition("_")[0]
    return RegionSpec(
        provider="precomputed",
        count=config.num_regions,
        feature_dim=config.region_feat_dim,
        class_count=config.region_num_classes,
        layout={"dataset": told if told in DATASETS else DATASETS[0]},
    )


def open_vocabulary(path: Path) -> CasedTokenizer:
    """The tokenizer of a vocabulary file."""
    if not path.is_file():
        raise CheckpointMissing("the vocabulary file is not there", "Give bert-base-cased's vocab.txt.")
    return read_vocabulary(path)


def find_answers(path: Path) -> tuple[str, ...]:
    """The answers' texts, a JSON list beside the weights. Raises CheckpointMissing, CheckpointBroken."""
    for name in ANSWER_NAMES:
        if path.with_name(name).is_file():
            return read_answer_list(path.with_name(name))
    raise CheckpointMissing(
        "this VLP answers questions, and the texts of its answers are not beside it", ANSWERS_REMEDY
    )
