"""Caption metrics and answer accuracy: COCO's own numbers, and what the definitions say of simple cases."""

from __future__ import annotations

import pytest

from readroom.errors import BadCall
from training.metrics import normalise_answer, score_answer, score_rouge, split_words, tally_captions

CAPTIONS = [
    "A man rides a bike.",
    "two dogs playing in the snow",
    "a red bus on the street",
    "The cat's asleep",
    "a plate of food",
]
REFERENCES = [
    ("a man riding a bicycle down a street", "A man rides a bike."),
    ("two dogs play in snow", "dogs in the snow, playing"),
    ("a bus", "a big red double-decker bus on a city street"),
    ("the cat is asleep on a chair",),
    ("people skiing down a hill", "skiers on a slope"),
]
# Bleu(4), Rouge and Cider of pycocoevalcap 1.2 on the same words (blanks between them, PTBTokenizer left out).
OFFICIAL = {
    "bleu_1": 0.6549846024099868,
    "bleu_2": 0.4912384518050339,
    "bleu_3": 0.37488510151133975,
    "bleu_4": 0.3047659268125301,
    "rouge_l": 0.6867045454545453,
    "cider": 2.446292578769144,
}


def exact(captions, references):
    return {name: float(t.combine(t.parts.sum(axis=0))) for name, t in tally_captions(captions, references).items()}


def test_caption_metrics_equal_the_coco_evaluation():
    assert exact(CAPTIONS, REFERENCES) == pytest.approx(OFFICIAL, abs=1e-12)


def test_bleu_without_a_common_four_gram_is_small_and_not_zero_as_in_the_coco_evaluation():
    scores = exact(["w1 w2 w3 w4 w5"], [("w1 w2 w3 w9 w5",)])
    assert scores["bleu_4"] == pytest.approx((4 / 5 * 2 / 4 * 1 / 3 * 1e-15 / 2) ** 0.25)


def test_caption_that_is_a_reference_scores_one():
    scores = exact(["two dogs in the snow", "a red bus"], [("two dogs in the snow", "dogs"), ("a red bus",)])
    assert scores["bleu_3"] == pytest.approx(1) and scores["rouge_l"] == pytest.approx(1)
    assert scores["cider"] > 4


def test_empty_caption_scores_nothing_and_does_not_fail():
    scores = exact(["", "a bus"], [("a dog",), ("a bus",)])
    assert scores["rouge_l"] == pytest.approx(0.5)
    assert 0 < scores["bleu_1"] < 0.5


def test_caption_without_a_reference_is_a_bad_call():
    with pytest.raises(BadCall, match="one reference at least"):
        score_rouge(["a", "dog"], [])
    with pytest.raises(BadCall, match="one reference at least"):
        tally_captions(["a dog", "a bus"], [("a dog",), ()])


def test_words_are_lower_case_without_marks_and_keep_inner_hyphens():
    assert split_words("A double-decker bus; the MAN's 2 bags.") == [
        "a", "double-decker", "bus", "the", "man", "s", "2", "bags",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "plain"),
    [
        ("The  Dog.", "dog"),
        ("two", "2"),
        ("1,000", "1000"),
        ("2.5", "2.5"),
        ("black/white", "black white"),
        ("don't", "dont"),
        ("None", "0"),
    ],
)
def test_answers_are_compared_without_articles_marks_and_number_words(answer, plain):
    assert normalise_answer(answer) == plain


@pytest.mark.parametrize(("alike", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_soft_accuracy_counts_how_many_of_ten_people_agree(alike, score):
    people = ["Two."] * alike + [f"other {number}" for number in range(10 - alike)]
    assert score_answer("2", people) == pytest.approx(score)
