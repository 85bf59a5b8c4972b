"""BLIP (Li et al. 2022, arXiv 2201.12086) on transformers' classes: captions and visual questions.

Pictures travel as uint8 and are normalised on the device: a quarter of the bytes. torchvision is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, BlipForConditionalGeneration, BlipForQuestionAnswering, GenerationConfig

from models.base import Picture, run_answerer, run_captioner
from models.checkpoint import (
    BLIP_ANSWER,
    BLIP_CAPTION,
    DEFAULT_PROFILE,
    CheckpointSource,
    Floats,
    Manifest,
    read_json,
)
from models.device import pick_device, pick_precision, translate_device_errors
from models.plain import read_normalisation
from models.pretrained import COMPUTED_SUFFIX, hide_progress
from models.tensors import normalise_pixels, stack_pictures
from models.verified import open_folder
from readroom.errors import BadCall, CheckpointBroken
from readroom.records import GeneratedText, GenerationSettings

MAX_QUESTION_TOKENS = 35  # as in models/blip_vqa.py


@dataclass(frozen=True, slots=True)
class BlipParts:
    """A loaded BLIP and what belongs to it; made by `load_parts`."""

    model: Any
    tokenizer: Any
    checkpoint: str
    profile: str
    image_size: int
    mean: Floats
    std: Floats
    defaults: GenerationSettings
    device: torch.device


@dataclass(frozen=True, slots=True)
class CaptionBatch:
    """Pictures (N, S, S, 3) uint8 on the host."""

    pixels: torch.Tensor


@dataclass(frozen=True, slots=True)
class AnswerBatch:
    """Pictures (N, S, S, 3) uint8 on the host, and the tokens of their questions, not padded."""

    pixels: torch.Tensor
    questions: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class BlipRaw:
    """New tokens of each text, without the prompt, and a score each."""

    tokens: tuple[list[int], ...]
    scores: tuple[float, ...]


class LoadedBlip:
    """What a captioner and an answerer both say of themselves (models/base.py, Model)."""

    family = "blip"
    reader = None

    def __init__(self, parts: BlipParts) -> None:
        self.parts = parts
        self.checkpoint = parts.checkpoint
        self.profile = parts.profile
        self.image_size = parts.image_size
        self.defaults = parts.defaults


class BlipCaptioner(LoadedBlip):
    """Captions pictures with a `BlipForConditionalGeneration`."""

    def prepare(self, images: Sequence[Picture]) -> CaptionBatch:
        """Stack pictures, sizing those that are not `image_size` square RGB yet."""
        return CaptionBatch(stack_pictures(images, self.image_size))

    def generate(self, batch: CaptionBatch, settings: GenerationSettings) -> BlipRaw:
        """Greedy or beam search from the prompt. Raises OutOfMemory, DeviceBroken, BadCall (prompt too long)."""
        prompt = start_tokens(self.parts, settings.prompt)
        options = search_options(self.parts, settings, len(prompt))
        with translate_device_errors(), torch.inference_mode():
            pixels = normalise_pixels(batch.pixels, self.parts.mean, self.parts.std, self.parts.model)
            # transformers drops the last token, which it takes for the [SEP] its tokenizer appends.
            ids = torch.tensor([[*prompt, 0]], device=self.parts.device).repeat(len(pixels), 1)
            out = self.parts.model.generate(pixels, input_ids=ids, attention_mask=torch.ones_like(ids), **options)
            return collect_tokens(out, len(prompt), end_token(self.parts))

    def finish(self, raw: BlipRaw) -> list[GeneratedText]:
        """Texts up to the end-of-sequence token, without special tokens."""
        return decode_tokens(raw, self.parts)

    def warm_up(self) -> None:
        """Caption one grey picture with two tokens."""
        grey = np.full((self.image_size, self.image_size, 3), 128, dtype=np.uint8)
        run_captioner(self, [grey], GenerationSettings(self.defaults.num_beams, 2, 1, self.defaults.prompt))


class BlipAnswerer(LoadedBlip):
    """Answers questions about pictures with a `BlipForQuestionAnswering`."""

    def prepare(self, images: Sequence[Picture], questions: Sequence[str]) -> AnswerBatch:
        """Stack pictures and tokenize their questions, one each, at most 35 tokens. Raises BadCall."""
        if len(images) != len(questions) or not all(question.strip() for question in questions):
            raise BadCall("one question a picture is needed")
        return AnswerBatch(stack_pictures(images, self.image_size), tokenize_questions(self.parts, questions))

    def generate(self, batch: AnswerBatch, settings: GenerationSettings) -> BlipRaw:
        """Beam or greedy search of the answers. Raises OutOfMemory, DeviceBroken.

        Questions run with others of their own length, without padding: transformers' cross-attention takes no notice
        of a mask (5.23, BlipTextLayer.forward), so that an answer would depend on its batch.
        """
        found: dict[int, tuple[list[int], float]] = {}
        for rows in group_lengths(batch.questions):
            raw = self._search(batch.pixels[rows], [batch.questions[row] for row in rows], settings)
            found.update(zip(rows, zip(raw.tokens, raw.scores, strict=True), strict=True))
        ordered = [found[row] for row in sorted(found)]
        return BlipRaw(tuple(tokens for tokens, _ in ordered), tuple(score for _, score in ordered))

    def _search(self, pixels: torch.Tensor, questions: list[tuple[int, ...]], settings: GenerationSettings) -> BlipRaw:
        with translate_device_errors(), torch.inference_mode():
            ids = torch.tensor(questions, device=self.parts.device)
            shades = normalise_pixels(pixels, self.parts.mean, self.parts.std, self.parts.model)
            options = search_options(self.parts, settings, 1)
            out = self.parts.model.generate(ids, shades, attention_mask=torch.ones_like(ids), **options)
            return collect_tokens(out, 1, end_token(self.parts))

    def finish(self, raw: BlipRaw) -> list[GeneratedText]:
        """Texts up to the end-of-sequence token, without special tokens."""
        return decode_tokens(raw, self.parts)

    def warm_up(self) -> None:
        """Ask one question about a grey picture."""
        grey = np.full((self.image_size, self.image_size, 3), 128, dtype=np.uint8)
        run_answerer(self, [grey], ["what is this?"], GenerationSettings(self.defaults.num_beams, 2, 1))


# Steps ---------------------------------------------------------------------------------------------------------------


def start_tokens(parts: BlipParts, prompt: str) -> list[int]:
    """The start token and the prompt's tokens."""
    ids = parts.tokenizer(replace_surrogates(prompt), add_special_tokens=False).input_ids if prompt.strip() else []
    return [parts.model.config.text_config.bos_token_id, *ids]


def replace_surrogates(text: str) -> str:
    """Unicode of a str: half a surrogate pair, as a name of undecodable bytes holds, becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


def end_token(parts: BlipParts) -> int:
    """BLIP ends a text with BERT's [SEP]."""
    return int(parts.model.config.text_config.sep_token_id)


def search_options(parts: BlipParts, settings: GenerationSettings, prompt_length: int) -> dict[str, Any]:
    """What transformers' `generate` is told.

    Lengths stop at the last position the model has: one more would be a device-side assert on CUDA.
    """
    room = int(parts.model.config.text_config.max_position_embeddings) - prompt_length
    if room < 1:
        raise BadCall("the prompt is longer than the model's texts")
    longest = min(settings.max_new_tokens, room)
    return {
        "do_sample": False,
        "num_beams": settings.num_beams,
        "max_new_tokens": longest,
        "min_new_tokens": min(settings.min_new_tokens, longest),
        "return_dict_in_generate": True,
        "output_logits": settings.num_beams == 1,
        "output_scores": settings.num_beams > 1,  # without it beams come back without their scores
    }


def tokenize_questions(parts: BlipParts, questions: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Tokens of each question; the first is [ENC] where the tokenizer knows it, as BLIP was trained.

    The hub's tokenizers do not, and transformers leaves [CLS] there (its issue 22732); we do as it does then. Raises
    BadCall for a question of special tokens only, [UNK] among them.
    """
    longest = min(MAX_QUESTION_TOKENS, int(parts.model.config.text_config.max_position_embeddings))
    asked = [replace_surrogates(question.strip()) for question in questions]
    rows = parts.tokenizer(asked, truncation=True, max_length=longest).input_ids
    if any(set(row) <= set(parts.tokenizer.all_special_ids) for row in rows):
        raise BadCall("the question holds no word this model knows", "Ask in words its vocabulary has.")
    first = parts.tokenizer.get_vocab().get("[ENC]")
    return tuple(tuple(row) if first is None else (first, *row[1:]) for row in rows)


def group_lengths(questions: Sequence[Sequence[int]]) -> list[list[int]]:
    """Row numbers of questions with equally many tokens, together."""
    groups: dict[int, list[int]] = {}
    for row, question in enumerate(questions):
        groups.setdefault(len(question), []).append(row)
    return list(groups.values())


def collect_tokens(out: Any, prompt_length: int, end: int) -> BlipRaw:
    """New tokens and scores of a search, on the host.

    A score is the mean log-probability of the new tokens, the end token included. With beams that is transformers'
    `sequences_scores` (sum over length ** 1.0); greedy search is brought to the same from its logits.
    """
    tokens = out.sequences[:, prompt_length:]
    scores = out.get("sequences_scores")
    if scores is None:
        scores = mean_logprob(tokens, out.logits, end)
    return BlipRaw(tuple(tokens.tolist()), tuple(scores.float().tolist()))


def mean_logprob(tokens: torch.Tensor, logits: Sequence[torch.Tensor], end: int) -> torch.Tensor:
    """Mean log-probability (N,) of tokens (N, T) up to and with the first `end`, from T logits (N, vocabulary)."""
    steps = [
        torch.log_softmax(step.float(), dim=-1).gather(1, tokens[:, number, None])[:, 0]
        for number, step in enumerate(logits)
    ]
    before_end = ((tokens == end).cumsum(dim=1) - (tokens == end).long()) == 0
    return (torch.stack(steps, dim=1) * before_end).sum(dim=1) / before_end.sum(dim=1)


def decode_tokens(raw: BlipRaw, parts: BlipParts) -> list[GeneratedText]:
    """Tokens up to the first end token as texts."""
    end = end_token(parts)
    rows = [row[: row.index(end)] if end in row else row for row in raw.tokens]
    texts = parts.tokenizer.batch_decode(rows, skip_special_tokens=True)
    return [GeneratedText(text.strip(), score) for text, score in zip(texts, raw.scores, strict=True)]


# Loading -------------------------------------------------------------------------------------------------------------


def load_blip_captioner(source: CheckpointSource, device: str = "auto", precision: str = "float32") -> BlipCaptioner:
    """Load a captioning BLIP. Raises CheckpointMissing, CheckpointBroken, BadCall."""
    return BlipCaptioner(load_parts(source, device, precision, BlipForConditionalGeneration, BLIP_CAPTION))


def load_blip_answerer(source: CheckpointSource, device: str = "auto", precision: str = "float32") -> BlipAnswerer:
    """Load a question answering BLIP. Raises CheckpointMissing, CheckpointBroken, BadCall."""
    return BlipAnswerer(load_parts(source, device, precision, BlipForQuestionAnswering, BLIP_ANSWER))


def load_parts(
    source: CheckpointSource, device: str, precision: str, kind: Any, defaults: GenerationSettings
) -> BlipParts:
    """Fetch, verify and load; the manifest's word counts before the hub's files, those before BLIP's own habits."""
    place, dtype = pick_device(device), pick_precision(precision)
    folder, manifest = open_folder(source)
    model = load_model(folder, kind, dtype)
    tokenizer = load_tokenizer(folder, int(model.config.text_config.vocab_size))
    mean, std = (manifest.mean, manifest.std) if manifest else read_normalisation(folder)
    with translate_device_errors():
        model = model.to(place).eval()
    return BlipParts(
        model=model,
        tokenizer=tokenizer,
        checkpoint=source.ref,
        profile=manifest.preprocess if manifest else DEFAULT_PROFILE,
        image_size=read_image_size(model, manifest),
        mean=mean,
        std=std,
        defaults=(manifest.defaults if manifest else None) or defaults,
        device=place,
    )


def load_model(folder: Path, kind: Any, dtype: torch.dtype) -> Any:
    """Weights from safetensors, every one of them used and none left random. Raises CheckpointBroken."""
    check_architecture(folder, kind)
    try:
        with hide_progress():
            model, found = kind.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, dtype=dtype, output_loading_info=True
            )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise CheckpointBroken(
            f"transformers cannot load these weights as {kind.__name__} ({type(error).__name__})",
            "Check config.json and the *.safetensors files.",
        ) from error
    strange = [key for key in found["unexpected_keys"] if not key.endswith(COMPUTED_SUFFIX)]
    wrong = sorted({*found["missing_keys"], *strange, *(str(key) for key, *_ in found["mismatched_keys"])})
    if wrong:
        raise CheckpointBroken(f"weights do not fit {kind.__name__}: {', '.join(wrong[:5])} ({len(wrong)} in all)")
    # generate() fills from here what search_options leave open; checkpoints carry penalties and lengths in it
    model.generation_config = model.text_decoder.generation_config = GenerationConfig()
    return model


def check_architecture(folder: Path, kind: Any) -> None:
    """Raise when config.json names another class: a question answerer's weights would half load as a captioner."""
    named = read_json(folder / "config.json").get("architectures") or [kind.__name__]
    if kind.__name__ not in named:
        raise CheckpointBroken(f"this checkpoint is a {named[0]}, not a {kind.__name__}")


def load_tokenizer(folder: Path, vocabulary: int) -> Any:
    """The folder's tokenizer. Raises CheckpointBroken, also when it knows tokens the weights have no row for."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # tokenizers' Rust side raises bare Exception for a malformed file
        raise CheckpointBroken(f"the tokenizer cannot be loaded ({type(error).__name__})") from error
    if max(tokenizer.get_vocab().values()) >= vocabulary:
        raise CheckpointBroken("the tokenizer knows more tokens than the weights have rows for")
    return tokenizer


def read_image_size(model: Any, manifest: Manifest | None) -> int:
    """The side of the square the vision tower was built for, pixels."""
    side = int(model.config.vision_config.image_size)
    if manifest and manifest.image_size != side:
        raise CheckpointBroken("manifest: image_size is not the one of config.json")
    return side
