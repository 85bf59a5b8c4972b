"""VLP's captions a second beside BLIP's, and beside a decoder that runs everything again for each token.

    python -m benchmarks.vlp [--rounds 3] [--threads N] [--json FILE] [--quick]

Full size: random weights of the published sizes, every caption held open to 20 tokens, so that all ways write equally
many. VLP starts from ready regions (a detector's time is no part of it), BLIP from pixels. Then the bundled checkpoints
on held-out pictures, from pixels, as they stop by themselves and held open to their greatest length. The ways of a race
take turns, and the peer's tokens must be VLP's own in every round: else there are no figures. `--quick` runs tiny
models in the place of the full-size ones: it shows that the benchmark works, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.vlp_peer import caption_plainly
from models.base import Captioner, Picture
from models.blip import BlipCaptioner, BlipParts
from models.checkpoint import CLIP_MEAN, CLIP_STD, DEFAULT_PROFILE, list_bundled
from models.load import load_captioner
from models.tensors import normalise_pixels
from models.vlp.captioner import VlpCaptioner, search_options, see_regions
from models.vlp.config import VlpConfig
from models.vlp.decoding import SearchOptions, search_captions
from models.vlp.layout import SpecialIds
from models.vlp.network import VlpModel
from models.vlp.regions import Regions
from readroom.records import GenerationSettings

SEED = 1
BATCHES, BEAMS = (1, 8), (1, 3)
TOKENS = 20  # VLP's published length
BERT_SPECIAL = SpecialIds(100, 101, 102, 103)  # of bert-base-cased
BUNDLED_FAMILIES = ("vlp", "blip")
BUNDLED_PICTURES = 32
VLP, PEER, BLIP, VISION = "VLP", "VLP, everything run again", "BLIP", "BLIP's vision tower alone"
VLP_OPEN, BLIP_OPEN = "VLP, held open", "BLIP, held open"

Tokens = Sequence[list[int]]


@dataclass(frozen=True, slots=True)
class Way:
    """One way to caption a batch: `run` gives the tokens of each caption.

    `beside` names the way it is compared with, `same_as` the one whose tokens it must give.
    """

    name: str
    run: Callable[[], Tokens]
    beside: str = ""
    same_as: str = ""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the models with random weights are made of; `tokens` in each caption."""

    vlp: VlpConfig
    blip: transformers.BlipConfig
    tokens: int = TOKENS


def full_sizes() -> Sizes:
    """The published base models.

    BLIP's text decoder has 12 heads where transformers' default is 8, and the default initializer of its vision tower,
    1e-10, would make all pictures look the same.
    """
    text, vision = {"num_attention_heads": 12}, {"initializer_range": 0.02}
    return Sizes(VlpConfig(), transformers.BlipConfig(text_config=text, vision_config=vision))


def tiny_sizes() -> Sizes:
    """Both models small enough for a test."""
    widths: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 200,
    }  # fmt: skip
    vlp = VlpConfig(**widths, num_regions=9, region_feat_dim=24, region_num_classes=7)
    vision = {**widths, "image_size": 32, "patch_size": 16, "initializer_range": 0.02}
    text = {**widths, "bos_token_id": 198, "sep_token_id": 102, "eos_token_id": 102}
    return Sizes(vlp, transformers.BlipConfig(text_config=text, vision_config=vision), tokens=6)


# Random weights ------------------------------------------------------------------------------------------------------


def race_random(sizes: Sizes, rounds: int) -> list[dict[str, Any]]:
    """VLP, its peer, BLIP, and how much of BLIP is its vision tower, for every batch size and number of beams."""
    torch.manual_seed(SEED)
    vlp, blip = VlpModel(sizes.vlp).eval(), make_blip(sizes.blip)
    races = []
    for batch in BATCHES:
        regions, pictures = draw_regions(sizes.vlp, batch), draw_noise(blip.image_size, batch)
        for beams in BEAMS:
            options = SearchOptions(beams, sizes.tokens, sizes.tokens)
            settings = GenerationSettings(beams, sizes.tokens, sizes.tokens)
            ways = [
                Way(VLP, partial(caption_regions, vlp, regions, BERT_SPECIAL, options)),
                Way(PEER, partial(caption_again, vlp, regions, BERT_SPECIAL, options), VLP, same_as=VLP),
                Way(BLIP, partial(caption_pictures, blip, pictures, settings), VLP),
                Way(VISION, partial(see_pictures, blip, pictures)),
            ]
            races.append({"batch": batch, "beams": beams, **race_ways(ways, batch, rounds, sizes.tokens)})
            print(f"random weights, {describe_race(races[-1])}", file=sys.stderr)
    return races


def make_blip(config: transformers.BlipConfig) -> BlipCaptioner:
    """A captioner with random weights. Its tokenizer is never asked: there is no prompt, and no text is wanted."""
    model = transformers.BlipForConditionalGeneration(config).eval()
    model.generation_config = model.text_decoder.generation_config = transformers.GenerationConfig()
    parts = BlipParts(
        model=model, tokenizer=None, checkpoint="random", profile=DEFAULT_PROFILE,
        image_size=config.vision_config.image_size, mean=CLIP_MEAN, std=CLIP_STD, defaults=GenerationSettings(),
        device=torch.device("cpu"),
    )  # fmt: skip
    return BlipCaptioner(parts)


def draw_regions(config: VlpConfig, count: int) -> Regions:
    """Random regions such as a detector writes: features from 0 on, class probabilities, boxes, falling confidence."""
    source = torch.Generator().manual_seed(SEED)
    shape = count, config.num_regions
    features = torch.randn(*shape, config.region_feat_dim, generator=source).relu()
    classes = (4 * torch.randn(*shape, config.region_num_classes, generator=source)).softmax(dim=-1)
    corners = torch.rand(*shape, 2, 2, generator=source).sort(dim=2).values * torch.tensor([640.0, 480.0])
    confidence, best = classes[..., 1:].max(dim=-1)
    boxes = torch.cat([corners.flatten(2), torch.stack([best + 1.0, confidence], dim=-1)], dim=-1)
    order = confidence.argsort(dim=1, descending=True)[..., None]
    return Regions(*(torch.take_along_dim(tensor, order, dim=1) for tensor in (features, classes, boxes)))


def draw_noise(size: int, count: int) -> list[Picture]:
    """Noise, uint8 [size, size, 3] each."""
    source = np.random.default_rng(SEED)
    return list(source.integers(256, size=(count, size, size, 3), dtype=np.uint8))


# Ways ----------------------------------------------------------------------------------------------------------------


def caption_regions(
    model: VlpModel, regions: Regions, special: SpecialIds, options: SearchOptions, whole: bool = False
) -> Tokens:
    """VLP from ready regions; `whole` never stops before the greatest length."""
    return search_captions(model, see_regions(regions), special, options, whole=whole).tokens


def caption_again(model: VlpModel, regions: Regions, special: SpecialIds, options: SearchOptions) -> Tokens:
    """The peer, from ready regions."""
    lengths = options.max_new_tokens, options.min_new_tokens
    return caption_plainly(model, see_regions(regions), special, options.num_beams, *lengths)


def caption_pictures(captioner: Captioner, pictures: Sequence[Picture], settings: GenerationSettings) -> Tokens:
    """A captioner as the worker runs it, from pixels."""
    tokens: Tokens = captioner.generate(captioner.prepare(pictures), settings).tokens
    return tokens


def see_pictures(captioner: BlipCaptioner, pictures: Sequence[Picture]) -> Tokens:
    """BLIP's vision tower and nothing behind it."""
    parts = captioner.parts
    parts.model.vision_model(normalise_pixels(captioner.prepare(pictures).pixels, parts.mean, parts.std, parts.model))
    return []


# Bundled -------------------------------------------------------------------------------------------------------------


def race_bundled(count: int, rounds: int) -> dict[str, Any]:
    """The bundled checkpoints on held-out pictures, and which of them is missing."""
    sources = {source.family: source for source in list_bundled()}
    missing = [family for family in BUNDLED_FAMILIES if family not in sources]
    for family in missing:
        print(f"models/bundled/{family} is missing: its ways are left out", file=sys.stderr)
    captioners = [load_captioner(sources[family], "cpu") for family in BUNDLED_FAMILIES if family in sources]
    races = []
    for beams in BEAMS:
        ways = [way for captioner in captioners for way in list_bundled_ways(captioner, count, beams)]
        races.append({"batch": count, "beams": beams, **race_ways(ways, count, rounds)})
        print(f"bundled, {describe_race(races[-1])}", file=sys.stderr)
    checkpoints = {captioner.family: captioner.checkpoint for captioner in captioners}
    return {"missing": missing, "checkpoints": checkpoints, "races": races}


def list_bundled_ways(captioner: Captioner, count: int, beams: int) -> list[Way]:
    """A checkpoint by its own settings but for the beams, and held open."""
    settings = replace(captioner.defaults, num_beams=beams)
    pictures = draw_held_out(captioner.image_size, count)
    own = partial(caption_pictures, captioner, pictures, settings)
    if not isinstance(captioner, VlpCaptioner):
        longest = replace(settings, min_new_tokens=settings.max_new_tokens)
        return [Way(BLIP, own, VLP), Way(BLIP_OPEN, partial(caption_pictures, captioner, pictures, longest), BLIP)]
    return [
        Way(VLP, own),
        Way(
            VLP_OPEN,
            partial(caption_seen, captioner, pictures, settings, partial(caption_regions, whole=True)),
            VLP,
            VLP,
        ),
        Way(PEER, partial(caption_seen, captioner, pictures, settings, caption_again), VLP, VLP),
    ]


def caption_seen(
    captioner: VlpCaptioner, pictures: Sequence[Picture], settings: GenerationSettings, caption: Callable[..., Tokens]
) -> Tokens:
    """Look at pictures with a checkpoint's own provider, then caption their regions another way."""
    parts = captioner.parts
    regions = parts.provider.compute(captioner.prepare(pictures))
    return caption(parts.model, regions, parts.tokenizer.special, search_options(parts, settings))


def draw_held_out(size: int, count: int) -> list[Picture]:
    """Pictures no checkpoint was trained on, half films and half scenes, uint8 [size, size, 3]."""
    from training.data import TEST_SEED, make_radiographs, make_scenes

    films, scenes = (make(count // 2, size, TEST_SEED) for make in (make_radiographs, make_scenes))
    return [picture.permute(1, 2, 0).numpy() for picture in torch.cat([films.pixels, scenes.pixels])]


# Racing --------------------------------------------------------------------------------------------------------------


def race_ways(ways: Sequence[Way], count: int, rounds: int, length: int | None = None) -> dict[str, Any]:
    """Every way in every round, each round from another one on, so that a busy spell hits all alike."""
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    with torch.inference_mode():
        for way in ways:
            way.run()  # what is paid for once is paid for here
        for number in range(rounds):
            first = number % len(ways)
            written: dict[str, Tokens] = {}
            for way in [*ways[first:], *ways[:first]]:
                started = time.perf_counter()
                written[way.name] = way.run()
                seconds[way.name].append(time.perf_counter() - started)
            check_round(ways, written, length)
    return {
        "ways": {name: summarise([count / taken for taken in times]) for name, times in seconds.items()},
        "ratios": {
            way.name: {"beside": way.beside, **summarise(divide(seconds[way.name], seconds[way.beside]))}
            for way in ways
            if way.beside in seconds
        },
        "seconds": seconds,
    }


def check_round(ways: Sequence[Way], written: dict[str, Tokens], length: int | None) -> None:
    """Raise SystemExit unless ways that must write the same do, and all captions have `length` tokens."""
    for way in ways:
        if way.same_as and list(written[way.name]) != list(written[way.same_as]):
            raise SystemExit(f"{way.name} and {way.same_as} write different tokens: there is nothing to race")
        if length is not None and any(len(tokens) != length for tokens in written[way.name]):
            raise SystemExit(f"{way.name} does not write {length} tokens a caption")


def divide(upper: Sequence[float], lower: Sequence[float]) -> list[float]:
    """Ratios, round by round."""
    return [above / below for above, below in zip(upper, lower, strict=True)]


def summarise(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


# Telling -------------------------------------------------------------------------------------------------------------


def describe_machine(threads: int) -> str:
    """Processor, cores, threads and versions."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{processor}, {os.cpu_count()} cores, threads {threads}, Python {platform.python_version()}, {versions}"


def describe_race(race: dict[str, Any]) -> str:
    """One line."""
    rates = "; ".join(f"{name} {rate['median']:.2f}/s" for name, rate in race["ways"].items())
    return f"batch {race['batch']}, beams {race['beams']}: {rates}"


def render_markdown(summary: dict[str, Any]) -> str:
    """The tables of docs/benchmarks.md."""
    lines = [f"Machine: {summary['machine']}. Median of {summary['rounds']} rounds, lowest and highest in brackets."]
    for title, races in (("random weights", summary["random"]), ("bundled", summary["bundled"]["races"])):
        lines += ["", f"| {title}: batch | beams | way | a second | ratio |", "| --- | --- | --- | --- | --- |"]
        lines += [row for race in races for row in render_race(race)]
    return "\n".join(lines) + "\n"


def render_race(race: dict[str, Any]) -> list[str]:
    """A row for each way."""
    rows = []
    for name, rate in race["ways"].items():
        ratio = race["ratios"].get(name)
        told = f"{ratio['beside']} is {render_spread(ratio, 'x')}" if ratio else ""
        rows.append(f"| {race['batch']} | {race['beams']} | {name} | {render_spread(rate)} | {told} |")
    return rows


def render_spread(found: dict[str, float], unit: str = "") -> str:
    """A median, and between what."""
    return f"{found['median']:.2f}{unit} ({found['low']:.2f} to {found['high']:.2f})"


def main() -> None:
    """Race, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="tiny models, one round, two pictures")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes, pictures, rounds = full_sizes(), BUNDLED_PICTURES, options.rounds
    if options.quick:
        sizes, pictures, rounds = tiny_sizes(), 2, 1
    summary = {
        "machine": describe_machine(options.threads),
        "rounds": rounds,
        "tokens": sizes.tokens,
        "random": race_random(sizes, rounds),
        "bundled": race_bundled(pictures, rounds),
    }
    if options.json:
        options.json.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(render_markdown(summary))


if __name__ == "__main__":
    main()
