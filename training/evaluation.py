"""Score a captioner on phantoms it never saw: generate captions, parse them, compare with the exact truth.

    python -m training.evaluation --checkpoint models/bundled/blip [--radiographs 200] [--scenes 200] [--json]

Side is the patient's side; only what a caption states counts, so a denied finding is an absent one.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import BlipForConditionalGeneration, PreTrainedTokenizerFast
from transformers.utils import logging

from training.data import TEST_SEED, make_radiographs, make_scenes, normalise_pixels

HELD_OUT = 200  # films and scenes each
BATCH = 32
GENERATION = ("num_beams", "max_new_tokens", "min_new_tokens")
Scores = dict[str, float]

FINDING_WORDS = {
    "cardiomegaly": "cardiomegaly",
    "effusion": "pleural effusion",
    "pneumothorax": "pneumothorax",
    "consolidation": "consolidation",
    "edema": "pulmonary edema",
    "atelectasis": "atelectasis",
    "nodule": "nodule",
    "pacemaker": "pacemaker",
    "central_line": "central line",
    "endotracheal_tube": "endotracheal tube",
    "enteric_tube": "enteric tube",
    "sternal_wires": "sternal wires",
}


@dataclass(frozen=True)
class Loaded:
    """A captioner ready to run, and how it wants its pictures."""

    blip: BlipForConditionalGeneration
    tokenizer: PreTrainedTokenizerFast
    size: int
    mean: list[float]
    std: list[float]
    generation: dict[str, Any]


def load_captioner(folder: Path) -> Loaded:
    """Load a checkpoint folder in float32, the weights as stored."""
    logging.disable_progress_bar()  # a bar of a hundred weights tells nothing, and --json shares the terminal
    blip = BlipForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    size, mean, std = processor["size"]["height"], processor["image_mean"], processor["image_std"]
    # Handed to every call: BLIP's text decoder does not read the settings stored beside the whole model.
    stored = json.loads((folder / "generation_config.json").read_text())
    return Loaded(blip, tokenizer, size, mean, std, {name: stored[name] for name in GENERATION if name in stored})


@torch.inference_mode()
def caption_pixels(loaded: Loaded, pixels: torch.Tensor) -> list[str]:
    """Captions of uint8 pictures [count, 3, size, size], by the checkpoint's own generation settings."""
    captions: list[str] = []
    for batch in torch.split(pixels, BATCH):
        bright = normalise_pixels(batch.float() / 255, loaded.mean, loaded.std)
        rows = loaded.blip.generate(pixel_values=bright, **loaded.generation)
        captions += loaded.tokenizer.batch_decode(rows, skip_special_tokens=True)
    return captions


def parse_finding(caption: str, words: str) -> str:
    """How a caption names a finding: "" when absent or denied, else its side, or "present" when it has none."""
    for sentence in caption.split("."):
        if words in sentence and not sentence.strip().startswith("no "):
            side = re.search(r"\b(left|right|bilateral)\b", sentence)
            return side.group(1) if side else "present"
    return ""


def parse_size(caption: str) -> str:
    """The size of the effusion a caption names, or ""."""
    named = re.search(r"(small|moderate|large) \w+ pleural effusion", caption)
    return named.group(1) if named else ""


def parse_things(caption: str) -> list[tuple[str, str]]:
    """Colour and shape of each object a scene's caption names, in its order."""
    return re.findall(r"\ban? (\w+) (circle|square|triangle)\b", caption)


def score_films(truths: list[str], captions: list[str]) -> Scores:
    """Agreement of captions with the exact truth on frontal films.

    `effusion_side` counts films whose effusion's side (none, left, right, bilateral) is named right; `<finding>_f1` is
    over present/absent, `hallucination` the share of films on which something absent is named.
    """
    frontal = [(t, c) for t, c in zip(truths, captions, strict=True) if t.startswith("frontal")]
    scores = {
        "films": float(len(frontal)),
        "effusion_side": _share(_same(t, c, "pleural effusion") for t, c in frontal),
        "effusion_size": _share(parse_size(t) == parse_size(c) for t, c in frontal if parse_size(t)),
        "cardiomegaly": _share(_same(t, c, "cardiomegaly") for t, c in frontal),
        "view": _share(t.split(".")[0] == c.split(".")[0] for t, c in zip(truths, captions, strict=True)),
        "whole_caption": _share(t == c for t, c in zip(truths, captions, strict=True)),
        "hallucination": _share(
            any(not parse_finding(t, w) and parse_finding(c, w) for w in FINDING_WORDS.values()) for t, c in frontal
        ),
    }
    return scores | {f"{name}_f1": _measure_f1(frontal, words) for name, words in FINDING_WORDS.items()}


def _same(truth: str, caption: str, words: str) -> bool:
    return parse_finding(truth, words) == parse_finding(caption, words)


def _measure_f1(pairs: list[tuple[str, str]], words: str) -> float:
    """F1 of present against absent, the side included: a finding on the wrong side is a miss and a false alarm."""
    hits = misses = alarms = 0
    for truth, caption in pairs:
        told, said = parse_finding(truth, words), parse_finding(caption, words)
        hits += bool(told) and told == said
        misses += bool(told) and told != said
        alarms += bool(said) and told != said
    return round(2 * hits / max(1, 2 * hits + misses + alarms), 4)


def score_scenes(truths: list[str], captions: list[str]) -> Scores:
    """Agreement on scenes: all shapes, all colours, both together, and the whole caption with its relation."""
    named = [(parse_things(t), parse_things(c)) for t, c in zip(truths, captions, strict=True)]
    return {
        "scenes": float(len(truths)),
        "shape": _share([shape for _, shape in t] == [shape for _, shape in c] for t, c in named),
        "colour": _share([colour for colour, _ in t] == [colour for colour, _ in c] for t, c in named),
        "shape_and_colour": _share(t == c for t, c in named),
        "scene_caption": _share(t == c for t, c in zip(truths, captions, strict=True)),
    }


def _share(verdicts: Iterator[bool]) -> float:
    listed = list(verdicts)
    return round(sum(listed) / max(1, len(listed)), 4)


def score_checkpoint(
    folder: Path, films: int = HELD_OUT, scenes: int = HELD_OUT, first_seed: int = TEST_SEED
) -> Scores:
    """Scores of a checkpoint folder on held-out phantoms from `first_seed` on."""
    loaded = load_captioner(folder)
    radiographs, shapes = make_radiographs(films, loaded.size, first_seed), make_scenes(scenes, loaded.size, first_seed)
    return score_films(radiographs.captions, caption_pixels(loaded, radiographs.pixels)) | score_scenes(
        shapes.captions, caption_pixels(loaded, shapes.pixels)
    )


def main(arguments: list[str] | None = None) -> int:
    """Print scores as a table, or as one JSON document."""
    parser = argparse.ArgumentParser(description="Score a captioner on held-out phantoms.")
    parser.add_argument("--checkpoint", type=Path, default=Path("models/bundled/blip"))
    parser.add_argument("--radiographs", type=int, default=HELD_OUT)
    parser.add_argument("--scenes", type=int, default=HELD_OUT)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    scores = score_checkpoint(options.checkpoint, options.radiographs, options.scenes)
    if options.json:
        print(json.dumps(scores))
        return 0
    table = Table("score", "value", title="held-out phantoms")
    for name, value in scores.items():
        table.add_row(name, f"{value:.0f}" if name in ("films", "scenes") else f"{value:.3f}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
