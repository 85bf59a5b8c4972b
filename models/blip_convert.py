"""BLIP's foreign weights to a checkpoint folder.

BLIP's own releases (`model_base_caption_capfilt_large.pth`, `model_base_vqa_capfilt_large.pth`) hold weights without
configuration or tokenizer; the first is read off the shapes, the second is BERT's vocabulary. Folders and hub ids that
hold a `pytorch_model.bin` in transformers' own names are converted too.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipForQuestionAnswering

from models.blip import load_tokenizer
from models.checkpoint import (
    BLIP_ANSWER,
    BLIP_CAPTION,
    CLIP_MEAN,
    CLIP_STD,
    HUB_ID,
    Floats,
    Manifest,
    read_json,
    write_manifest,
)
from models.plain import read_normalisation
from models.pretrained import COMPUTED_SUFFIX, hide_progress
from models.released import CONVERT_COMMAND, Weights, count_layers, find_vocabulary, read_weights
from readroom.errors import CheckpointBroken, CheckpointMissing

# github.com/salesforce/BLIP, LICENSE.txt: of every checkpoint released there or by Salesforce on the hub.
BLIP_LICENCE = "BSD-3-Clause"
BLIP_OWNER = "Salesforce/"
# ViT and BERT of every size BLIP was released in have heads 64 wide; shapes do not tell.
HEAD_WIDTH = 64
VIT_EPSILON = 1e-6  # models/vit.py of BLIP; BERT's is 1e-12
VOCABULARY_REPO = "google-bert/bert-base-uncased@main"
# What decoders and encoders of BLIP's vision tower are called there and in transformers. Text towers agree.
VISION_NAMES = (
    (r"^visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.norm\.", "vision_model.post_layernorm."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision_model.encoder.layers.\1.self_attn.qkv."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.projection."),
    (r"^visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision_model.encoder.layers.\1.mlp."),
)
TASK_CLASSES = {"caption": BlipForConditionalGeneration, "answer": BlipForQuestionAnswering}
TASK_DEFAULTS = {"caption": BLIP_CAPTION, "answer": BLIP_ANSWER}


def convert_released(
    path: Path, weights: Weights, folder: Path, vocabulary: Path | None = None, head_width: int = HEAD_WIDTH
) -> Manifest:
    """Convert the weights of one of BLIP's released `.pth` files into `folder`.

    `vocabulary` is bert-base-uncased's `vocab.txt`; None looks beside the file, then on the hub.
    """
    weights = rename_weights(weights)
    task = "answer" if any(name.startswith("text_encoder.") for name in weights) else "caption"
    tokenizer = build_tokenizer(vocabulary or find_vocabulary(path, VOCABULARY_REPO))
    config = read_config(weights, tokenizer, head_width)
    parameters = save_model(fill_model(TASK_CLASSES[task], config, weights), folder)
    tokenizer.save_pretrained(folder)
    return describe_checkpoint(
        folder,
        name=path.stem,
        task=task,
        parameters=parameters,
        licence=BLIP_LICENCE,
        normalisation=(CLIP_MEAN, CLIP_STD),
    )


def convert_folder(source: Path, folder: Path, name: str) -> Manifest:
    """Convert a folder in transformers' layout whose weights are `pytorch_model.bin` into `folder`."""
    weights_file = source / "pytorch_model.bin"
    if not weights_file.is_file():
        converted = any(source.glob("*.safetensors"))
        remedy = (
            "It holds safetensors: add it without --convert." if converted else "Name the .pth or .bin file itself."
        )
        raise CheckpointMissing("there is no pytorch_model.bin", remedy)
    config = BlipConfig.from_dict(read_json(source / "config.json"))
    task = "answer" if "BlipForQuestionAnswering" in (config.architectures or []) else "caption"
    parameters = save_model(fill_model(TASK_CLASSES[task], config, drop_computed(read_weights(weights_file))), folder)
    load_tokenizer(source, config.text_config.vocab_size).save_pretrained(folder)
    label = source.name if Path(name).is_dir() else name
    return describe_checkpoint(
        folder,
        name=label,
        task=task,
        parameters=parameters,
        licence=BLIP_LICENCE if label.startswith(BLIP_OWNER) else "",
        normalisation=read_normalisation(source),
    )


def rename_weights(weights: Weights) -> Weights:
    """BLIP's names to transformers'. Momentum towers, queues and projections of pre-training are left out."""
    kept = {name: value for name, value in weights.items() if re.match(r"(visual_encoder|text_(en|de)coder)\.", name)}
    if not any(name.startswith("text_decoder.") for name in kept) or "visual_encoder.pos_embed" not in kept:
        raise CheckpointBroken("these are no weights of a BLIP that writes text, nor of a VLP")
    if "itm_head.weight" in weights:
        # A pre-training checkpoint captions; its text encoder belongs to retrieval, not to questions.
        kept = {name: value for name, value in kept.items() if not name.startswith("text_encoder.")}
    return drop_computed({rename_weight(name): value for name, value in kept.items()})


def rename_weight(name: str) -> str:
    """One name of BLIP's in transformers' words."""
    for pattern, replacement in VISION_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def drop_computed(weights: Weights) -> Weights:
    """Without the buffers that the classes compute themselves."""
    return {name: value for name, value in weights.items() if not name.endswith(COMPUTED_SUFFIX)}


def read_config(weights: Weights, tokenizer: Any, head_width: int) -> BlipConfig:
    """The configuration that the shapes of released weights imply."""
    try:
        return BlipConfig(
            vision_config=read_vision(weights, head_width), text_config=read_text(weights, tokenizer, head_width)
        )
    except (KeyError, ValueError) as error:
        raise CheckpointBroken(f"the shapes of these weights are no BLIP's ({type(error).__name__})") from None


def read_vision(weights: Weights, head_width: int) -> dict[str, Any]:
    """The vision tower: patches (width, 3, P, P), positions (1, 1 + (side / P) ** 2, width)."""
    patches = weights["vision_model.embeddings.patch_embedding.weight"]
    positions = weights["vision_model.embeddings.position_embedding"]
    width, patch = patches.shape[0], patches.shape[-1]
    return {
        "hidden_size": width,
        "intermediate_size": weights["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": count_layers(weights, "vision_model.encoder.layers"),
        "num_attention_heads": max(1, width // head_width),
        "patch_size": patch,
        "image_size": round((positions.shape[1] - 1) ** 0.5) * patch,
        "layer_norm_eps": VIT_EPSILON,
    }


def read_text(weights: Weights, tokenizer: Any, head_width: int) -> dict[str, Any]:
    """The text towers, which share one configuration (BLIP's configs/med_config.json)."""
    words = weights["text_decoder.bert.embeddings.word_embeddings.weight"]
    first = "text_decoder.bert.encoder.layer.0"
    return {
        "vocab_size": words.shape[0],
        "hidden_size": words.shape[1],
        "intermediate_size": weights[f"{first}.intermediate.dense.weight"].shape[0],
        "num_hidden_layers": count_layers(weights, "text_decoder.bert.encoder.layer"),
        "num_attention_heads": max(1, words.shape[1] // head_width),
        "max_position_embeddings": weights["text_decoder.bert.embeddings.position_embeddings.weight"].shape[0],
        "bos_token_id": tokenizer.bos_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.sep_token_id,
    }


def fill_model(kind: Any, config: BlipConfig, weights: Weights) -> Any:
    """A model with exactly these weights. Raises CheckpointBroken naming what is missing or too much."""
    model = kind(config)
    try:
        missing, extra = model.load_state_dict(weights, strict=False)
    except RuntimeError:
        raise CheckpointBroken("the shapes of these weights do not fit their configuration") from None
    model.tie_weights()
    tied = set(model.all_tied_weights_keys)
    wrong = sorted({*(name for name in missing if name not in tied), *extra})
    if wrong:
        raise CheckpointBroken(f"weights do not fit {kind.__name__}: {', '.join(wrong[:5])} ({len(wrong)} in all)")
    return model.eval()


def build_tokenizer(vocabulary: Path) -> Any:
    """BERT's tokenizer with BLIP's two tokens behind its vocabulary, as models/blip.py: init_tokenizer does."""
    if not vocabulary.is_file():
        raise CheckpointMissing("the vocabulary file is not there", "Give bert-base-uncased's vocab.txt.")
    words = vocabulary.read_text(encoding="utf-8").split("\n")
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words) if word}, do_lower_case=True)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_tokens(["[ENC]"], special_tokens=True)
    return tokenizer


def fetch_pickled(name: str) -> Path:
    """The folder of a hub id with its `pytorch_model.bin`."""
    from models.hub import SAFE_PATTERNS, download_files

    if not HUB_ID.match(name):
        raise CheckpointMissing("nothing to convert is called that", "Name a .pth or .bin file, a folder or a hub id.")
    repo, _, revision = name.partition("@")
    return download_files(repo, revision or "main", [*SAFE_PATTERNS, "pytorch_model.bin"])


def save_model(model: Any, folder: Path) -> int:
    """Write configuration and safetensors, readable to whom the folder is. Returns the number of parameters."""
    with hide_progress():
        model.save_pretrained(folder)
    for entry in folder.iterdir():
        entry.chmod(0o644)  # safetensors writes for its owner alone
    return sum(weight.numel() for weight in model.parameters())


def describe_checkpoint(
    folder: Path, name: str, task: str, parameters: int, licence: str, normalisation: tuple[Floats, Floats]
) -> Manifest:
    """Write the manifest of converted weights."""
    config = read_json(folder / "config.json")
    (folder / "generation_config.json").unlink(missing_ok=True)  # the manifest says how to generate
    return write_manifest(
        folder,
        name=name,
        family="blip",
        task=task,
        parameters=parameters,
        licence=licence,
        allowed_use="research" if licence else "",
        image_size=config["vision_config"]["image_size"],
        mean=normalisation[0],
        std=normalisation[1],
        generation=asdict(TASK_DEFAULTS[task]),
        command=CONVERT_COMMAND,
    )
