"""The weightless captioner: the same picture always gets the same words. For queue tests and benchmarks.

It costs what its name says, `dummy:base_ms=5,item_ms=0.5`: each batch sleeps base + item x pictures milliseconds, as a
device would keep its thread waiting.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models.base import ItemReader, Picture
from models.checkpoint import DEFAULT_PROFILE, parse_dummy, resolve_checkpoint
from readroom.errors import BadCall
from readroom.records import GeneratedText, GenerationSettings, ImageRef

WORDS = ("amber", "basalt", "cedar", "dune", "ember", "fjord", "grove", "harbour", "iris", "juniper", "kelp", "lagoon",
         "meadow", "nectar", "opal", "prairie")  # fmt: skip


@dataclass(frozen=True, slots=True)
class DummyBatch:
    """The digests of the pictures, and what was asked of each ("" for a caption)."""

    digests: tuple[str, ...]
    questions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DummyRaw:
    """One digest of picture, question and settings each."""

    digests: tuple[str, ...]
    max_words: int


class DigestReader:
    """Puts an image's digest in its picture's place: no file is opened (benchmarks of the queue)."""

    def read(self, ref: ImageRef) -> Picture:
        """The digest, or where nobody has read the file its path, as a grey picture of 1 x 32."""
        content = hashlib.sha256((ref.digest or ref.path).encode(errors="surrogateescape")).digest()
        return np.frombuffer(content, dtype=np.uint8).reshape(1, -1)


class DummyModel:
    """Captions and answers without looking: it is both a Captioner and an Answerer."""

    family = "dummy"
    profile = DEFAULT_PROFILE
    defaults = GenerationSettings()

    def __init__(self, name: str = "dummy", image_size: int = 64) -> None:
        costs = parse_dummy(name)
        self.checkpoint = resolve_checkpoint(name).ref
        self.image_size = image_size
        self.base_s = costs["base_ms"] / 1000
        self.item_s = costs["item_ms"] / 1000
        self.reader: ItemReader | None = None if costs["pixels"] else DigestReader()

    def prepare(self, images: Sequence[Picture], questions: Sequence[str] | None = None) -> DummyBatch:
        """Digest the pictures; `questions` are one a picture, or None for captions. Raises BadCall."""
        asked = ("",) * len(images) if questions is None else tuple(questions)
        if len(asked) != len(images):
            raise BadCall("one question a picture is needed")
        return DummyBatch(tuple(map(digest_picture, images)), asked)

    def generate(self, batch: DummyBatch, settings: GenerationSettings) -> DummyRaw:
        """Sleep for the batch's cost, once; the words depend on picture, question and settings alone."""
        if pause := self.base_s + self.item_s * len(batch.digests):
            time.sleep(pause)
        pairs = zip(batch.digests, batch.questions, strict=True)
        asked = settings.digest  # once a batch: it costs more than all else here
        digests = tuple(_digest(f"{picture} {question} {asked}".encode()) for picture, question in pairs)
        return DummyRaw(digests, settings.max_new_tokens)

    def finish(self, raw: DummyRaw) -> list[GeneratedText]:
        """Five words a digest, at most `max_new_tokens`; the score is made of the digest too, in (-1, 0]."""
        return [GeneratedText(_say(digest, raw.max_words), -int(digest[-4:], 16) / 0x10000) for digest in raw.digests]

    def warm_up(self) -> None:
        """Nothing to warm."""


def digest_picture(image: Picture) -> str:
    """SHA-256 (hex) of a picture's shape and pixels. Raises BadCall when it is no uint8 picture."""
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise BadCall("a picture must be a uint8 array, H x W or H x W x 3")
    return _digest(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _say(digest: str, max_words: int) -> str:
    words = [WORDS[int(letter, 16)] for letter in digest[:5]]
    return " ".join(words[:max_words])
