"""What a VLP learns from: texts in arrays, answers as classes, lessons that any process makes alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.vlp.config import VlpConfig
from models.vlp.tokenizer import SPECIAL_TOKENS, CasedTokenizer
from readroom.errors import BadCall, ImageError
from readroom.records import Reason
from training.vlp_data import (
    LessonPlan,
    Lessons,
    Sample,
    choose_answers,
    find_common,
    fold_answer,
    load_lessons,
    pack_texts,
    plan_batches,
    split_samples,
)
from training.vlp_objective import MaskingPlan
from training.vlp_phantoms import PhantomPictures, list_phantoms
from training.vlp_recipe import AnswerPlan

TOKENIZER = CasedTokenizer([*SPECIAL_TOKENS, *"abcdefgh"])
SIZES = VlpConfig(vocab_size=13, hidden_size=8, num_attention_heads=2, num_regions=2, num_answers=3)
SAMPLES = [Sample(f"{place // 2}.jpg", text) for place, text in enumerate(["a b", "c", "d e f", "g", "h a", "b"])]


class NumberPictures:
    """A picture is its own number; the one called 1.jpg is broken."""

    def read(self, picture):
        if picture == "1.jpg":
            raise ImageError(Reason.TRUNCATED, "it ends early")
        return int(picture[0])

    def stack(self, pictures):
        return torch.tensor(pictures)


def make_lessons(samples=SAMPLES, answers=(), parts=None, epoch=1):
    texts = pack_texts(samples, TOKENIZER, answers)
    plan = LessonPlan(MaskingPlan(most=0), SIZES, TOKENIZER.special, len(answers), seed=5, epoch=epoch)
    return Lessons(texts, NumberPictures(), plan, parts or [np.arange(len(samples))])


def test_texts_are_packed_and_each_picture_is_held_once():
    texts = pack_texts(SAMPLES, TOKENIZER)
    assert texts.pictures.tolist() == ["0.jpg", "1.jpg", "2.jpg"]
    assert texts.about.tolist() == [0, 0, 1, 1, 2, 2]
    assert [TOKENIZER.decode(texts.tokens[number].tolist()) for number in range(6)] == [one.text for one in SAMPLES]


def test_no_texts_at_all_are_a_bad_call():
    with pytest.raises(BadCall, match="not one picture"):
        pack_texts([], TOKENIZER)


def test_answers_become_soft_scores_of_the_classes():
    samples = [
        Sample("0.jpg", "a", ("Yes",) * 4 + ("no",) * 3 + ("maybe",) * 3),
        Sample("2.jpg", "b", ("no ",) * 2 + ("perhaps",) * 8),
    ]
    texts = pack_texts(samples, TOKENIZER, ["<unk>", "yes", "no"])
    table = texts.score(np.array([1, 0]), 3)
    torch.testing.assert_close(table, torch.tensor([[0.0, 0.0, 0.6], [0.0, 1.0, 0.9]]))


@pytest.mark.parametrize(("given", "folded"), [("Yes", "yes"), ("1,000 ", "1000"), ("red  bus?", "red bus"), ("?", "")])
def test_answers_are_folded_before_they_are_counted(given, folded):
    assert fold_answer(given) == folded


def test_classes_are_the_frequent_answers_most_frequent_first():
    samples = [Sample("", "", (answer,) * 10) for answer in ["red"] * 3 + ["blue"] * 5 + ["green"] * 3 + ["rare"] * 2]
    assert choose_answers(samples, AnswerPlan(most=10, least=3)) == ["<unk>", "blue", "green", "red"]
    assert choose_answers(samples, AnswerPlan(most=3, least=3)) == ["<unk>", "blue", "green"]
    with pytest.raises(BadCall, match="no answer was given to 9 questions"):
        choose_answers(samples, AnswerPlan())


def test_a_question_counts_for_what_most_people_answered():
    assert find_common(["two", "Three", "three", "two", "three"]) == "three"


def test_pictures_that_are_kept_back_are_kept_back_with_all_their_texts():
    samples = [Sample(f"{number}.jpg", text) for number in range(20) for text in "abc"]
    learned, kept = split_samples(samples, 0.1, seed=1)
    assert len(learned) == 54 and len(kept) == 6
    assert {one.picture for one in learned} & {one.picture for one in kept} == set()
    assert split_samples(samples, 0.1, seed=1) == (learned, kept)
    assert split_samples(samples, 0.1, seed=2)[1] != kept


def test_an_epoch_goes_through_all_texts_once_each_epoch_in_another_order():
    first, second = (plan_batches(50, 16, 6, seed=1, epoch=epoch) for epoch in (1, 2))
    numbers = [int(number) for batch in first for part in batch for number in part]
    assert sorted(numbers) == list(range(50))
    assert numbers != [int(number) for batch in second for part in batch for number in part]
    assert [sum(map(len, batch)) for batch in first] == [16, 16, 16, 2]
    assert [len(part) for part in first[0]] == [6, 5, 5]


def test_lesson_reads_each_picture_once_and_leaves_out_what_cannot_be_read():
    made = make_lessons()[0]
    assert made.lesson is not None and made.lesson.captions is not None
    assert made.lesson.images.tolist() == [0, 2]
    assert made.lesson.captions.rows.tolist() == [0, 0, 1, 1]
    assert made.lesson.size == 4
    assert [(one.picture, one.reason) for one in made.skipped] == [("1.jpg", "truncated: it ends early")]


def test_lesson_without_a_readable_picture_is_none():
    made = make_lessons(parts=[np.array([2, 3])])[0]
    assert made.lesson is None
    assert len(made.skipped) == 1


def test_lessons_are_alike_in_whatever_process_they_are_made():
    samples = [Sample(f"{number % 8 + 2}.jpg", text) for number, text in enumerate("abcdefgh" * 4)]
    parts = [np.arange(32)[start : start + 4] for start in range(0, 32, 4)]
    lessons = make_lessons(samples, parts=parts)
    lessons.plan = LessonPlan(MaskingPlan(), SIZES, TOKENIZER.special, 0, seed=5, epoch=1)
    here, there = (list(load_lessons(lessons, workers)) for workers in (0, 2))
    assert len(here) == len(there) == 8
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.lesson.images, other.lesson.images)
        assert torch.equal(one.lesson.captions.texts.ids, other.lesson.captions.texts.ids)
        assert one.lesson.captions.texts.modes == other.lesson.captions.texts.modes
    again = list(load_lessons(lessons, 0))
    assert torch.equal(again[0].lesson.captions.texts.labels, here[0].lesson.captions.texts.labels)


@pytest.mark.parametrize("task", ["caption", "vqa"])
def test_phantoms_are_drawn_again_from_their_names(task):
    samples = list(list_phantoms(task, 4))
    assert {sample.picture for sample in samples} == {"scene 0", "film 1", "scene 2", "film 3"}
    assert len(samples) == (4 if task == "caption" else 32)
    reader = PhantomPictures(32)
    pictures = [reader.read(name) for name in ("film 1", "scene 2", "film 1")]
    assert reader.stack(pictures).shape == (3, 32, 32, 3)
    assert np.array_equal(pictures[0], pictures[2]) and not np.array_equal(pictures[0], pictures[1])
