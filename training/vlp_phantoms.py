"""Phantoms as a data set that is never whole in memory: each picture is drawn from its seed when its turn comes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from models.tensors import stack_pictures
from training.data import TRAIN_SEED, VALIDATION_SEED, fit_picture, make_film
from training.phantom_text import caption_truth
from training.questions import Question, ask_film, ask_scene
from training.scenes import draw_scene
from training.vlp_data import Sample

QUESTIONS = 8  # about each picture
ALIKE_ANSWERS = 10  # one true answer counts as ten people's
SMALLEST = 16  # pixels; a picture that is drawn for its truth alone


class PhantomPictures:
    """Films and scenes by name: `film 17`, `scene 18`."""

    def __init__(self, size: int) -> None:
        self.size = size

    def read(self, picture: str) -> Any:
        """uint8 [S, S, 3], drawn."""
        kind, _, seed = picture.partition(" ")
        if kind == "film":
            pixels, _ = make_film(self.size, int(seed))
        else:
            pixels = fit_picture(Image.fromarray(draw_scene(int(seed)).pixels), self.size)
        return np.ascontiguousarray(pixels.transpose(1, 2, 0))

    def stack(self, pictures: Sequence[Any]) -> Any:
        """uint8 [N, S, S, 3]."""
        return stack_pictures(pictures, self.size)


def list_phantoms(task: Literal["caption", "vqa"], count: int, validation: bool = False) -> Iterator[Sample]:
    """Captions of, or questions about, `count` pictures, films and scenes by turns."""
    first = VALIDATION_SEED if validation else TRAIN_SEED
    for seed in range(first, first + count):
        yield from list_film(task, seed) if seed % 2 else list_scene(task, seed)


def list_film(task: str, seed: int) -> list[Sample]:
    """The samples of one film."""
    _, truth = make_film(SMALLEST, seed)
    if task == "caption":
        return [Sample(f"film {seed}", caption_truth(truth))]
    return name_questions(f"film {seed}", ask_film(truth, np.random.default_rng([11, seed]), QUESTIONS))


def list_scene(task: str, seed: int) -> list[Sample]:
    """The samples of one scene."""
    scene = draw_scene(seed)
    if task == "caption":
        return [Sample(f"scene {seed}", scene.captions[0])]
    return name_questions(f"scene {seed}", ask_scene(scene, np.random.default_rng([12, seed]), QUESTIONS))


def name_questions(picture: str, questions: Sequence[Question]) -> list[Sample]:
    """Questions as people would have answered them."""
    return [Sample(picture, question.text, (question.answer,) * ALIKE_ANSWERS) for question in questions]
