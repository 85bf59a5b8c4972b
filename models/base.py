"""What a captioner and an answerer are: three steps, so that a worker can overlap them. Knows no torch.

prepare   uint8 pictures -> a batch                     (any thread, no device)
generate  batch -> raw token sequences with scores      (the one thread that owns the device)
finish    raw -> texts                                  (any thread, no device)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from readroom.records import GeneratedText, GenerationSettings, ImageRef

Picture = npt.NDArray[np.uint8]
"""One picture: uint8, H x W (grey) or H x W x 3 (RGB). Ready as it is when H == W == image_size and RGB."""

# Each implementation has its own; nobody else looks inside.
Batch = Any
Raw = Any


class ItemReader(Protocol):
    """How a model gets what it sees when that is no picture: detector features that were computed long before."""

    def read(self, ref: ImageRef) -> Any:
        """What the model's `prepare` takes in the place of a picture. Any thread. Raises ImageError."""
        ...


class Model(Protocol):
    """What every model says of itself.

    `checkpoint` is the ref results carry, `profile` names the preprocessing of models/pixels.py it was trained with,
    `image_size` is the side in pixels of the square picture it sees, `defaults` the settings it was made for. `reader`
    is None for a model that sees pixels; else it is asked for what stands in a picture's place.
    """

    @property
    def family(self) -> str: ...  # noqa: D102
    @property
    def checkpoint(self) -> str: ...  # noqa: D102
    @property
    def profile(self) -> str: ...  # noqa: D102
    @property
    def image_size(self) -> int: ...  # noqa: D102
    @property
    def defaults(self) -> GenerationSettings: ...  # noqa: D102
    @property
    def reader(self) -> ItemReader | None: ...  # noqa: D102

    def generate(self, batch: Batch, settings: GenerationSettings) -> Raw:
        """Run the model. Raises OutOfMemory (a smaller batch may pass) or DeviceBroken (end this process)."""
        ...

    def finish(self, raw: Raw) -> list[GeneratedText]:
        """Tokens to texts, in the order of the pictures. Scores are mean token log-probabilities."""
        ...

    def warm_up(self) -> None:
        """Run once on a grey picture, so that the first real batch pays for nothing else."""
        ...


@runtime_checkable
class Captioner(Model, Protocol):
    """Says what a picture shows."""

    def prepare(self, images: Sequence[Picture]) -> Batch:
        """Make a batch of at least one picture."""
        ...


@runtime_checkable
class Answerer(Model, Protocol):
    """Answers a question about a picture."""

    def prepare(self, images: Sequence[Picture], questions: Sequence[str]) -> Batch:
        """Make a batch of pictures and their questions, one each."""
        ...


def run_captioner(
    captioner: Captioner, images: Sequence[Picture], settings: GenerationSettings | None = None
) -> list[GeneratedText]:
    """Caption one batch; `settings` None means the captioner's defaults. An empty list gives an empty list."""
    if not images:
        return []
    raw = captioner.generate(captioner.prepare(images), settings or captioner.defaults)
    return captioner.finish(raw)


def run_answerer(
    answerer: Answerer,
    images: Sequence[Picture],
    questions: Sequence[str],
    settings: GenerationSettings | None = None,
) -> list[GeneratedText]:
    """Answer one batch of questions, one a picture."""
    if not images:
        return []
    raw = answerer.generate(answerer.prepare(images, questions), settings or answerer.defaults)
    return answerer.finish(raw)
