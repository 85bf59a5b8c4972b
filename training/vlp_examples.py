"""Phantoms as VLP learns them: pictures, captions and a handful of questions each, all in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from training import radiographs, scenes
from training.data import fit_picture, make_film
from training.phantom_text import caption_truth
from training.questions import QUESTIONS_VERSION, Question, ask_film, ask_scene
from training.scenes import draw_scene

Example = tuple[NDArray[np.uint8], str, list[Question]]


@dataclass(frozen=True)
class Examples:
    """`pixels` uint8 [count, 3, size, size]; a caption and questions for each picture; `name` says where from."""

    pixels: torch.Tensor
    captions: list[str]
    questions: list[list[Question]]
    name: str

    def __len__(self) -> int:
        return len(self.captions)

    def digest(self) -> str:
        """sha256 over pictures, captions and questions."""
        state = hashlib.sha256(self.pixels.numpy().tobytes())
        asked = [f"{question.text} {question.answer}" for listed in self.questions for question in listed]
        state.update("\n".join([*self.captions, *asked]).encode())
        return state.hexdigest()


def make_film_example(size: int, count: int, seed: int) -> Example:
    """The film of `seed` at the model's size, its caption, and `count` questions."""
    pixels, truth = make_film(size, seed)
    return pixels, caption_truth(truth), ask_film(truth, np.random.default_rng([11, seed]), count)


def make_scene_example(size: int, count: int, seed: int) -> Example:
    """The scene of `seed` at the model's size, its canonical caption, and `count` questions."""
    scene = draw_scene(seed)
    asked = ask_scene(scene, np.random.default_rng([12, seed]), count)
    return fit_picture(Image.fromarray(scene.pixels), size), scene.captions[0], asked


def make_films(count: int, size: int, first_seed: int, questions: int, processes: int = 1) -> Examples:
    """`count` films with the seeds from `first_seed` on."""
    name = f"{radiographs.GENERATOR_VERSION}:{first_seed}+{count} {QUESTIONS_VERSION}x{questions}"
    return _make(partial(make_film_example, size, questions), range(first_seed, first_seed + count), processes, name)


def make_scenes(count: int, size: int, first_seed: int, questions: int, processes: int = 1) -> Examples:
    """`count` scenes with the seeds from `first_seed` on."""
    name = f"{scenes.GENERATOR_VERSION}:{first_seed}+{count} {QUESTIONS_VERSION}x{questions}"
    return _make(partial(make_scene_example, size, questions), range(first_seed, first_seed + count), processes, name)


def join_examples(parts: Sequence[Examples]) -> Examples:
    """One behind the other."""
    return Examples(
        torch.cat([part.pixels for part in parts]),
        [caption for part in parts for caption in part.captions],
        [asked for part in parts for asked in part.questions],
        " ".join(part.name for part in parts),
    )


def _make(make: Callable[[int], Example], seeds: range, processes: int, name: str) -> Examples:
    if processes == 1:
        made = [make(seed) for seed in seeds]
    else:
        # spawn: a forked child would inherit torch's threads in an unknown state
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            made = list(pool.map(make, seeds, chunksize=64))
    pixels, captions, questions = zip(*made, strict=True)
    return Examples(torch.from_numpy(np.stack(pixels)), list(captions), list(questions), name)
