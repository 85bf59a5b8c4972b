"""VLP in the worker: captions and answers from regions, in the three steps of models/base.py.

A checkpoint belongs to one provider of regions (models/vlp/regions.py); its manifest names it, and no other is run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from models.base import ItemReader, Picture
from models.checkpoint import VLP_ANSWER, VLP_CAPTION, CheckpointSource, Manifest
from models.device import pick_device, pick_precision, translate_device_errors
from models.verified import open_folder
from models.vlp.decoding import SearchOptions, search_captions
from models.vlp.folder import check_parts, load_network, read_answers, read_sizes, read_tokenizer
from models.vlp.layout import lay_out
from models.vlp.network import SeenRegions, VlpModel
from models.vlp.regions import RegionProvider, Regions, RegionSpec, locate_regions, open_provider
from models.vlp.tokenizer import CasedTokenizer, join_marks
from readroom.errors import BadCall, CheckpointBroken, EngineError
from readroom.records import GeneratedText, GenerationSettings


@dataclass(frozen=True, slots=True)
class VlpParts:
    """A loaded VLP and what belongs to it; made by `load_parts`."""

    model: VlpModel
    provider: RegionProvider
    tokenizer: CasedTokenizer
    answers: tuple[str, ...]
    checkpoint: str
    profile: str
    defaults: GenerationSettings


@dataclass(frozen=True, slots=True)
class AnswerBatch:
    """The provider's batch, and the tokens of each question."""

    images: Any
    questions: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class CaptionRaw:
    """Tokens of each caption, its end included, and their mean log-probability."""

    tokens: tuple[list[int], ...]
    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class AnswerRaw:
    """The class of each answer, never 0, and its score."""

    classes: tuple[int, ...]
    scores: tuple[float, ...]


class LoadedVlp:
    """What a captioner and an answerer both say of themselves (models/base.py, Model)."""

    family = "vlp"

    def __init__(self, parts: VlpParts) -> None:
        self.parts = parts
        self.checkpoint = parts.checkpoint
        self.profile = parts.profile
        self.image_size = parts.provider.spec.image_size
        self.defaults = parts.defaults
        self.reader: ItemReader | None = parts.provider.reader


class VlpCaptioner(LoadedVlp):
    """Captions pictures, or what a detector saw of them."""

    def prepare(self, images: Sequence[Picture]) -> Any:
        """A batch of the provider's, from pictures or from what `reader` gave."""
        return self.parts.provider.prepare(images)

    def generate(self, batch: Any, settings: GenerationSettings) -> CaptionRaw:
        """Greedy or beam search. Raises BadCall (a prompt: VLP captions from none), and as `search_regions`."""
        options = search_options(self.parts, settings)
        with translate_device_errors(), torch.inference_mode():
            return search_regions(self.parts, self.parts.provider.compute(batch), options)

    def finish(self, raw: CaptionRaw) -> list[GeneratedText]:
        """Texts up to the first [SEP], their marks joined to the words."""
        pairs = zip(raw.tokens, raw.scores, strict=True)
        return [GeneratedText(join_marks(self.parts.tokenizer.decode(tokens)), score) for tokens, score in pairs]

    def warm_up(self) -> None:
        """Caption one grey picture with two tokens; the regions alone where no picture is seen."""
        options = search_options(self.parts, GenerationSettings(self.defaults.num_beams, 2, 1))
        with translate_device_errors(), torch.inference_mode():
            search_regions(self.parts, see_nothing(self.parts), options)


class VlpAnswerer(LoadedVlp):
    """Answers questions with one of the texts its checkpoint was trained to give."""

    def prepare(self, images: Sequence[Picture], questions: Sequence[str]) -> AnswerBatch:
        """The provider's batch and the questions' tokens, cut at the length trained with. Raises BadCall."""
        if len(images) != len(questions) or not all(question.strip() for question in questions):
            raise BadCall("one question a picture is needed")
        longest = self.parts.model.config.max_text_length
        asked = tuple(tuple(self.parts.tokenizer.encode(question)[:longest]) for question in questions)
        if not all(map(self.parts.tokenizer.knows_any, asked)):
            raise BadCall("the question holds no word this model knows", "Ask in words its vocabulary has.")
        return AnswerBatch(self.parts.provider.prepare(images), asked)

    def generate(self, batch: AnswerBatch, settings: GenerationSettings) -> AnswerRaw:
        """The likeliest answer of each question. Raises as `pick_answers`.

        There is nothing to search: `settings` have no say. Questions of any lengths run together, as none sees the
        padding of another.
        """
        with translate_device_errors(), torch.inference_mode():
            return pick_answers(self.parts, self.parts.provider.compute(batch.images), batch.questions)

    def finish(self, raw: AnswerRaw) -> list[GeneratedText]:
        """The texts of the classes."""
        pairs = zip(raw.classes, raw.scores, strict=True)
        return [GeneratedText(self.parts.answers[number], score) for number, score in pairs]

    def warm_up(self) -> None:
        """Ask one question about a grey picture, or about regions where no picture is seen."""
        with translate_device_errors(), torch.inference_mode():
            pick_answers(self.parts, see_nothing(self.parts), [[self.parts.tokenizer.special.unknown]])


# Steps ---------------------------------------------------------------------------------------------------------------


def search_options(parts: VlpParts, settings: GenerationSettings) -> SearchOptions:
    """How a caption is searched. Raises BadCall for a prompt.

    Lengths stop where training stopped, at the longest text and its [SEP]: later positions were never learnt.
    """
    if settings.prompt.strip():
        raise BadCall("VLP captions without a prompt", 'Say --prompt "", or leave it out.')
    longest = min(settings.max_new_tokens, parts.model.config.max_text_length + 1)
    return SearchOptions(settings.num_beams, longest, min(settings.min_new_tokens, longest))


def search_regions(parts: VlpParts, regions: Regions, options: SearchOptions) -> CaptionRaw:
    """Captions of pictures whose regions are known. Raises OutOfMemory, DeviceBroken, EngineError (no finite score)."""
    found = search_captions(parts.model, see_regions(regions), parts.tokenizer.special, options)
    check_finite(found.scores)
    return CaptionRaw(found.tokens, found.mean_scores(options))


def pick_answers(parts: VlpParts, regions: Regions, questions: Sequence[Sequence[int]]) -> AnswerRaw:
    """The class with the greatest logit but 0, "<unk>", which the release never gives (SPEC section 6).

    The head is trained by binary cross entropy, each class on its own: a score is the log of that class' probability,
    log sigmoid(logit), and scores of all classes add up to nothing in particular. Raises OutOfMemory, DeviceBroken,
    EngineError (no finite logit).
    """
    model = parts.model
    asked = lay_out(questions, "bi", model.config, parts.tokenizer.special)
    ids, types, visible = (tensor.to(model.device) for tensor in (asked.ids, asked.types, asked.visible))
    logits = model.predict_answers(model(see_regions(regions), ids, types, visible)).float()
    best = logits[:, 1:].max(dim=1)
    check_finite(best.values.tolist())
    scores = functional.logsigmoid(best.values)
    return AnswerRaw(tuple((best.indices + 1).tolist()), tuple(scores.tolist()))


def check_finite(values: Sequence[float]) -> None:
    """Raise EngineError for a batch with a score that is no number: what was chosen by it means nothing.

    Whoever runs batches finds the picture by halving (worker/engine.py).
    """
    if not all(map(math.isfinite, values)):
        raise EngineError("the model's scores are not finite", "Check the checkpoint and the region features.")


def see_regions(regions: Regions) -> SeenRegions:
    """Regions as the transformer takes them."""
    return SeenRegions(regions.features, locate_regions(regions.boxes, regions.classes))


def see_nothing(parts: VlpParts) -> Regions:
    """Regions of a grey picture; of zeros where the provider sees no pictures."""
    spec, device = parts.provider.spec, parts.model.device
    if parts.provider.reader is None:
        grey = np.full((spec.image_size, spec.image_size, 3), 128, dtype=np.uint8)
        return parts.provider.compute(parts.provider.prepare([grey]))
    widths = (spec.feature_dim, spec.class_count, 6)
    features, classes, boxes = (torch.zeros(1, spec.count, width, device=device) for width in widths)
    return Regions(features, classes, boxes)


# Loading -------------------------------------------------------------------------------------------------------------


def load_vlp_captioner(
    source: CheckpointSource, device: str = "auto", precision: str = "float32", region_dir: Path | None = None
) -> VlpCaptioner:
    """Load a captioning VLP. `region_dir` is the folder of precomputed features, for checkpoints that read them.

    Raises CheckpointMissing, CheckpointBroken, BadCall.
    """
    return VlpCaptioner(load_parts(source, device, precision, region_dir, "caption"))


def load_vlp_answerer(
    source: CheckpointSource, device: str = "auto", precision: str = "float32", region_dir: Path | None = None
) -> VlpAnswerer:
    """Load a question answering VLP; as `load_vlp_captioner`."""
    return VlpAnswerer(load_parts(source, device, precision, region_dir, "answer"))


def load_parts(source: CheckpointSource, device: str, precision: str, region_dir: Path | None, task: str) -> VlpParts:
    """Fetch, verify and load what a task ("caption" or "answer") needs."""
    place, dtype = pick_device(device), pick_precision(precision)
    folder, manifest = open_folder(source)
    if manifest is None:
        raise CheckpointBroken(
            "a VLP checkpoint has a manifest, and this folder has none",
            "Convert the original weights: readroom checkpoints add PATH --convert",
        )
    config, spec = read_sizes(folder)
    check_manifest(manifest, spec)
    replace(source, manifest=manifest).check_task(task)
    tokenizer, answers = read_tokenizer(folder), read_answers(folder, config)
    check_parts(config, spec, tokenizer, answers)
    if task == "answer" and not answers:
        raise CheckpointBroken("this checkpoint has no answer head", "Name one that was trained on questions.")
    network = load_network(folder, config, dtype)
    with translate_device_errors():
        network = network.to(place)
    return VlpParts(
        model=network,
        provider=open_provider(folder, spec, place, dtype, region_dir),
        tokenizer=tokenizer,
        answers=answers,
        checkpoint=source.ref,
        profile=manifest.preprocess,
        defaults=(manifest.defaults or VLP_CAPTION) if task == "caption" else VLP_ANSWER,
    )


def check_manifest(manifest: Manifest, spec: RegionSpec) -> None:
    """Raise CheckpointBroken unless the manifest speaks of a VLP with this provider."""
    if manifest.family != "vlp":
        raise CheckpointBroken(f"manifest: family is {manifest.family}, config.json's is vlp")
    if manifest.regions != spec.as_json():
        raise CheckpointBroken(
            "manifest: regions are not the ones of config.json",
            "A checkpoint never runs with another provider than its own: fetch it again.",
        )
    if (manifest.image_size, manifest.mean, manifest.std) != (spec.image_size, spec.mean, spec.std):
        raise CheckpointBroken("manifest: image_size, mean or std are not those of its regions")
