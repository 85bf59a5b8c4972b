"""Train the bundled captioner from nothing: draw phantoms, one loop, publish. Read it top to bottom.

    python -m training.recipe --config training/configs/bundled_blip.toml --out models/bundled/blip

The model is transformers' BlipForConditionalGeneration (Li et al., BLIP, 2022), only small. Beside BLIP's language
loss there is one auxiliary loss, used in training only and thrown away after: a linear layer on all image
features says which pairs of neighbouring words the caption holds ("left pleural", "red circle"). It brings a direct
gradient to the vision tower, which otherwise starts slowly from random weights; the captions never see it.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import Progress
from torch import nn
from transformers import BlipConfig, BlipForConditionalGeneration, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from models.checkpoint import write_manifest
from readroom.errors import LossNotFinite
from training import radiographs, scenes
from training.data import (
    TRAIN_SEED,
    PictureSet,
    augment_pixels,
    make_radiographs,
    make_scenes,
    normalise_pixels,
)
from training.publish import write_preprocessor
from training.vocabulary import DEC, PAD, SEP, build_tokenizer

log = logging.getLogger(__name__)
Config = dict[str, Any]

# A word pair that fewer captions hold than this teaches the auxiliary layer nothing.
RAREST_PAIR = 0.003
LOG_EVERY_STEPS = 25
POSITION_STRENGTH = 0.5  # beside embedded patches of unit variance
WHITENING_FLOOR = 0.02
WHITENING_SAMPLE = 2000  # pictures
COMMAND = "python -m training.recipe --config training/configs/bundled_blip.toml --out models/bundled/blip"


def build_model(model: Config, vocabulary: int) -> BlipForConditionalGeneration:
    """A BLIP of the configured width with random weights."""
    width = model["width"]
    shared = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "projection_dim": width,
        "num_attention_heads": width // 32,
        # transformers' vision default is 1e-10: all pictures would look the same and training would stall.
        "initializer_range": 0.02,
    }
    text = {
        "vocab_size": vocabulary,
        "encoder_hidden_size": width,
        "num_hidden_layers": model["text_layers"],
        "max_position_embeddings": model["max_tokens"],
        "bos_token_id": DEC,
        "eos_token_id": SEP,
        "sep_token_id": SEP,
        "pad_token_id": PAD,
    }
    vision = {
        "num_hidden_layers": model["vision_layers"],
        "image_size": model["image_size"],
        "patch_size": model["patch_size"],
    }
    config = BlipConfig(
        text_config=shared | text, vision_config=shared | vision, projection_dim=width, image_text_hidden_size=width
    )
    return BlipForConditionalGeneration(config)


@torch.no_grad()
def set_weights(blip: BlipForConditionalGeneration, pixels: torch.Tensor) -> None:
    """Start where a small model learns at once; `pixels` float [n, 3, size, size] is a sample of what it will see.

    transformers' standard deviation of 0.02 is meant for width 768: at 128 every layer is so weak that training stands
    still for a thousand steps. So linear layers start by Glorot's rule (2010). Films are alike but for small, faint
    differences: patches are embedded as their whitened principal components, and the position embedding takes the mean
    picture away and adds 2-D sinusoids (He et al., MAE, 2022), so that what is unusual, and where, is loud from the
    first step.
    """
    for name, weight in blip.named_parameters():
        if weight.dim() == 2 and "embedding" not in name:
            nn.init.xavier_uniform_(weight)
    embeddings = blip.vision_model.embeddings
    filters, bias = whiten_patches(pixels, embeddings.patch_size, embeddings.embed_dim)
    embeddings.patch_embedding.weight.copy_(filters.view_as(embeddings.patch_embedding.weight))
    embeddings.patch_embedding.bias.copy_(bias)
    usual = embeddings.patch_embedding(pixels).mean(dim=0).flatten(1).T  # [patches, width]
    waves = make_sinusoids(round(len(usual) ** 0.5), embeddings.embed_dim)
    embeddings.position_embedding[0, 1:] = POSITION_STRENGTH * waves - usual


def whiten_patches(pixels: torch.Tensor, patch: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Filters [width, 3 * patch * patch] and bias that give patches as principal components of unit variance."""
    patches = nn.functional.unfold(pixels, patch, stride=patch).transpose(1, 2).flatten(0, 1)
    mean = patches.mean(dim=0)
    values, vectors = torch.linalg.eigh(torch.cov((patches - mean).T))
    # The floor keeps components that are little but noise from being blown up to the size of the others.
    strength = (values + WHITENING_FLOOR * values.mean()).rsqrt()
    filters = (vectors * strength).T[-width:]
    return filters, -filters @ mean


def make_sinusoids(side: int, width: int) -> torch.Tensor:
    """Positions of `side` x `side` patches, row by row: float [side * side, width], half for rows, half for columns."""
    quarter = width // 4
    frequencies = math.pi * torch.arange(1, quarter + 1) / 2 * (side / quarter)  # up to one wave over four patches
    angles = ((torch.arange(side) + 0.5) / side)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = waves[:, None].expand(side, side, 2 * quarter)
    columns = waves[None].expand(side, side, 2 * quarter)
    return torch.cat([rows, columns], dim=2).reshape(side * side, width)


class Captioner(nn.Module):
    """BLIP and the auxiliary layer under one roof, so that both are prepared and optimised together."""

    def __init__(self, blip: BlipForConditionalGeneration, pairs: int) -> None:
        super().__init__()
        self.blip = blip
        embeddings = blip.vision_model.embeddings
        self.pair_layer = nn.Linear((1 + embeddings.num_patches) * embeddings.embed_dim, pairs)

    def forward(
        self, pixels: torch.Tensor, tokens: torch.Tensor, pairs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Language loss and word-pair loss of `pixels` [b, 3, s, s], `tokens` [b, t] and `pairs` [b, p] of 0 and 1."""
        features = self.blip.vision_model(pixels).last_hidden_state
        labels = tokens.masked_fill(tokens == PAD, -100)
        loss = self.blip.text_decoder(
            input_ids=tokens,
            attention_mask=(tokens != PAD).long(),
            encoder_hidden_states=features,
            labels=labels,
            reduction="mean",
        ).loss
        seen = self.pair_layer(features.flatten(1))
        return loss, nn.functional.binary_cross_entropy_with_logits(seen, pairs, reduction="none").sum(1).mean()


def encode_captions(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> torch.Tensor:
    """Token ids [count, longest], padded; the first is [DEC], as BLIP opens a caption."""
    tokens: torch.Tensor = tokenizer(captions, padding=True, return_tensors="pt")["input_ids"]
    tokens[:, 0] = DEC
    return tokens


def mark_pairs(tokens: torch.Tensor) -> torch.Tensor:
    """For each caption which pairs of neighbouring tokens it holds: float 0/1 [count, pairs]."""
    captions = [set(pairwise(row)) for row in tokens.tolist()]
    counts = Counter(pair for caption in captions for pair in caption if PAD not in pair)
    floor, ceiling = RAREST_PAIR * len(captions), (1 - RAREST_PAIR) * len(captions)
    kept = sorted(pair for pair, count in counts.items() if floor <= count <= ceiling)
    return torch.tensor([[float(pair in caption) for pair in kept] for caption in captions])


def plan_batches(config: Config, films: int, seed: int) -> Iterator[torch.Tensor]:
    """Indices of each step's pictures; films stand first in the joined set, scenes after them."""
    generator = torch.Generator().manual_seed(seed)
    size = config["optimiser"]["batch_size"]
    film_deck = _deal(0, films, generator)
    scene_deck = _deal(films, films + config["data"]["scenes"], generator)
    for stage in config["stages"]:
        share = round(size * stage["scenes"])
        for _ in range(stage["steps"]):
            picks = [next(scene_deck) for _ in range(share)] + [next(film_deck) for _ in range(size - share)]
            yield torch.tensor(picks)


def _deal(first: int, last: int, generator: torch.Generator) -> Iterator[int]:
    """Each index once, in random order, then again."""
    while True:
        yield from (first + torch.randperm(last - first, generator=generator)).tolist()


def set_rate(optimiser: Config, step: int, steps: int) -> float:
    """Learning rate at `step`: linear warm-up, then a half cosine down to 1 % of the peak."""
    peak: float = optimiser["learning_rate"]
    warm: int = optimiser["warmup_steps"]
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


def draw_pictures(config: Config) -> tuple[PictureSet, str]:
    """Films then scenes in one set, and the id of this training data."""
    size, processes = config["model"]["image_size"], config["threads"]
    films = make_radiographs(config["data"]["radiographs"], size, TRAIN_SEED, processes)
    shapes = make_scenes(config["data"]["scenes"], size, TRAIN_SEED, processes)
    joined = PictureSet(torch.cat([films.pixels, shapes.pixels]), films.captions + shapes.captions)
    name = (
        f"{radiographs.GENERATOR_VERSION}:{TRAIN_SEED}+{len(films)}"
        f" {scenes.GENERATOR_VERSION}:{TRAIN_SEED}+{len(shapes)} sha256:{joined.digest()}"
    )
    return joined, name


def train_captioner(config: Config, metrics: TextIO) -> tuple[BlipForConditionalGeneration, str]:
    """Train from nothing; metrics as JSON lines. Returns the model in evaluation mode and its training data's id.

    Raises LossNotFinite.
    """
    torch.manual_seed(config["seed"])
    torch.set_num_threads(config["threads"])
    settings, optimiser = config["model"], config["optimiser"]
    started = time.perf_counter()
    pictures, data_id = draw_pictures(config)
    log.info("drew %d pictures in %.0f s", len(pictures), time.perf_counter() - started)

    tokenizer = build_tokenizer()
    tokens = encode_captions(tokenizer, pictures.captions)
    pairs = mark_pairs(tokens)
    accelerator = Accelerator(cpu=True)
    blip = build_model(settings, len(tokenizer))
    sample = torch.randperm(len(pictures))[:WHITENING_SAMPLE]
    set_weights(blip, normalise_pixels(pictures.pixels[sample].float() / 255, settings["mean"], settings["std"]))
    captioner = Captioner(blip, pairs.shape[1])
    adam = torch.optim.AdamW(captioner.parameters(), lr=1.0, betas=(0.9, 0.98), weight_decay=optimiser["weight_decay"])
    captioner, adam = accelerator.prepare(captioner, adam)
    steps = sum(stage["steps"] for stage in config["stages"])
    noise = torch.Generator().manual_seed(config["seed"])
    console = Console(stderr=True)
    captioner.train()
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("training", total=steps)
        for step, picks in enumerate(plan_batches(config, config["data"]["radiographs"], config["seed"])):
            for group in adam.param_groups:
                group["lr"] = set_rate(optimiser, step, steps)
            bright = augment_pixels(pictures.pixels[picks].float() / 255, noise)
            pixels = normalise_pixels(bright, settings["mean"], settings["std"])
            words = tokens[picks]
            words = words[:, : int((words != PAD).sum(1).max())]  # no columns of padding alone
            loss, aux = captioner(pixels, words, pairs[picks])
            total = loss + optimiser["aux_weight"] * aux
            if not torch.isfinite(total):
                raise LossNotFinite(f"the loss is {total.item()} at step {step}", "Lower the learning rate.")
            accelerator.backward(total)
            accelerator.clip_grad_norm_(captioner.parameters(), optimiser["clip_norm"])
            adam.step()
            adam.zero_grad(set_to_none=True)
            progress.update(bar, advance=1)
            if step % LOG_EVERY_STEPS == 0 or step == steps - 1:
                seconds = round(time.perf_counter() - started, 1)
                line = {"step": step, "loss": round(loss.item(), 4), "pair_loss": round(aux.item(), 4)}
                metrics.write(json.dumps(line | {"lr": adam.param_groups[0]["lr"], "seconds": seconds}) + "\n")
                metrics.flush()
    return accelerator.unwrap_model(captioner).blip.eval(), data_id


def publish_captioner(
    blip: BlipForConditionalGeneration, config: Config, data_id: str, folder: Path, held_out: int = 200
) -> None:
    """Write the checkpoint folder, score it as written on `held_out` films and scenes, and write its manifest."""
    from training.evaluation import score_checkpoint  # late: evaluation loads what this function has written

    settings = config["model"]
    transformers_logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    blip.generation_config.update(**config["generation"], bos_token_id=DEC, eos_token_id=SEP, pad_token_id=PAD)
    blip.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner alone
    write_preprocessor(folder, settings["image_size"], settings["mean"], settings["std"])
    described = {
        "name": "bundled-blip",
        "family": "blip",
        "task": "caption",
        "parameters": sum(weight.numel() for weight in blip.parameters()),
        "training_data": data_id,
        "licence": "Apache-2.0",
        "allowed_use": "research",
        "preprocess": "dicom_voi_v1",
        "image_size": settings["image_size"],
        "mean": settings["mean"],
        "std": settings["std"],
        "generation": config["generation"],
        "command": COMMAND,
    }
    write_manifest(folder, **described)  # which says how it is served, and so how it is scored
    write_manifest(folder, scores=score_checkpoint(folder, held_out, held_out), **described)


def main(arguments: list[str] | None = None) -> int:
    """Train and publish as a command."""
    parser = argparse.ArgumentParser(description="Train the bundled captioner on phantoms.")
    parser.add_argument("--config", type=Path, default=Path("training/configs/bundled_blip.toml"))
    parser.add_argument("--out", type=Path, default=Path("models/bundled/blip"))
    parser.add_argument("--metrics", type=Path, help="file for JSON lines; default: standard output")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    config = tomllib.loads(options.config.read_text())
    with options.metrics.open("w") if options.metrics else open(1, "w", closefd=False) as metrics:
        blip, data_id = train_captioner(config, metrics)
    publish_captioner(blip, config, data_id, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
