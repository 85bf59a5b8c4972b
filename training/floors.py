"""What needs no look at the picture: of each group of phantom items, the text that training gives most often."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache

import numpy as np

from training.data import HEIGHT_SHARES, HEIGHTS, LATERAL_SHARE, TRAIN_SEED
from training.findings import Truth, sample_truth
from training.phantom_scores import FILM, SCENE
from training.phantom_text import caption_truth
from training.predictions import Prediction
from training.questions import Question, ask_film, ask_scene
from training.scenes import draw_scene

# Enough that every group's first answer leads its second by more than chance, or it makes no difference.
FILMS, SCENES = 3000, 1000
QUESTIONS = 8
SMALL = 16  # pixels: a scene's things do not depend on its height


@cache
def learn_floor(films: int = FILMS, scenes: int = SCENES) -> Mapping[str, str]:
    """The most frequent text of each group in the first pictures of training: captions, answers by kind of question."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    rng = np.random.default_rng(TRAIN_SEED)
    for seed in range(TRAIN_SEED, TRAIN_SEED + films):
        truth = sample_film(seed)
        _count_texts(counts, FILM, caption_truth(truth), ask_film(truth, rng, QUESTIONS))
    for seed in range(TRAIN_SEED, TRAIN_SEED + scenes):
        scene = draw_scene(seed, SMALL)
        _count_texts(counts, SCENE, scene.captions[0], ask_scene(scene, rng, QUESTIONS))
    return {group: texts.most_common(1)[0][0] for group, texts in counts.items()}


def say_floor(predictions: Sequence[Prediction], floor: Mapping[str, str]) -> list[Prediction]:
    """The same items with the floor's texts."""
    return [replace(one, text=floor.get(one.group, ""), error="") for one in predictions]


def sample_film(seed: int) -> Truth:
    """What is true of the film that `training.data.make_film` draws from this seed, without drawing it."""
    stage, rng = np.random.default_rng([3, seed]), np.random.default_rng([1, seed])
    stage.choice(HEIGHTS, p=HEIGHT_SHARES)
    if stage.random() < LATERAL_SHARE:
        return Truth(seed, "LL", sample_truth(seed, rng, "LL").ctr)
    view = str(rng.choice(["PA", "AP"], p=[0.7, 0.3]))
    return sample_truth(seed, rng, view)


def _count_texts(counts: dict[str, Counter[str]], group: str, caption: str, questions: Sequence[Question]) -> None:
    counts[group][caption] += 1
    for question in questions:
        counts[question.group][question.answer] += 1
