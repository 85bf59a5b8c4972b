"""What VLP is taught: how many words are hidden, which, behind what, and what a loss counts."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from models.vlp.config import VlpConfig
from models.vlp.layout import SpecialIds
from training.vlp_objective import (
    QUESTION_MASKING,
    MaskingPlan,
    answer_accuracy,
    mask_texts,
    masked_lm_loss,
    vqa_loss,
)

SPECIAL = SpecialIds(unknown=1, start=2, end=3, mask=4)
SIZES = VlpConfig(vocab_size=50, hidden_size=8, num_attention_heads=2, num_regions=3, max_position_embeddings=40)
PREFIX = SIZES.prefix_length
TEXT = list(range(10, 25))  # fifteen tokens


def hide(texts, plan, seed=0, **options):
    return mask_texts(texts, plan, SIZES, SPECIAL, np.random.default_rng(seed), **options)


@pytest.mark.parametrize(("length", "hidden"), [(1, 1), (9, 1), (10, 2), (13, 2), (15, 2), (17, 3), (20, 3), (29, 3)])
def test_as_many_words_are_hidden_as_the_share_says_but_one_at_least_and_three_at_most(length, hidden):
    masked = hide([list(range(10, 10 + length))], MaskingPlan())
    assert int(masked.weights.sum()) == hidden
    assert masked.places.shape == masked.labels.shape == (1, 3)
    assert (masked.places[masked.weights == 0] == 0).all() and (masked.labels[masked.weights == 0] == 0).all()


def test_labels_are_the_words_that_stood_there():
    whole = torch.tensor([*TEXT, SPECIAL.end])
    for seed in range(50):
        masked = hide([TEXT], MaskingPlan(), seed)
        kept = masked.weights[0] > 0
        places = masked.places[0][kept]
        assert len(set(places.tolist())) == len(places)
        assert torch.equal(masked.labels[0][kept], whole[places - PREFIX])
        others = [place for place in range(len(whole)) if place + PREFIX not in places]
        assert torch.equal(masked.ids[0, PREFIX:][others], whole[others])


def test_the_end_is_hidden_as_often_as_any_word_so_that_the_model_learns_to_stop():
    masked = hide([TEXT] * 3200, MaskingPlan())
    counts = Counter(masked.places[masked.weights > 0].tolist())
    assert set(counts) == {PREFIX + place for place in range(len(TEXT) + 1)}
    assert all(300 < count < 500 for count in counts.values())  # 6,400 over 16 places


def test_hidden_words_are_masks_sometimes_others_sometimes_themselves():
    masked = hide([TEXT] * 4000, MaskingPlan())
    kept = masked.weights > 0
    stand = masked.ids.gather(1, masked.places)[kept]
    shares = {
        "mask": float((stand == SPECIAL.mask).float().mean()),
        "itself": float((stand == masked.labels[kept]).float().mean()),
    }
    assert shares["mask"] == pytest.approx(0.8 + 0.1 / 50, abs=0.015)
    assert shares["itself"] == pytest.approx(0.1 + 0.1 / 50, abs=0.015)


@pytest.mark.parametrize("share", [0.0, 0.75, 1.0])
def test_both_modes_are_mixed_by_probability_and_have_their_own_masks(share):
    masked = hide([TEXT] * 800, MaskingPlan(s2s=share))
    assert masked.modes.count("s2s") / 800 == pytest.approx(share, abs=0.05)
    for mode, row, types in zip(masked.modes, masked.visible, masked.types, strict=True):
        assert bool(row[0, PREFIX]) is (mode == "bi")  # whether [CLS] sees the text
        assert int(types[0]) == (4 if mode == "s2s" else 0)


def test_one_word_of_a_question_is_hidden_and_it_is_read_both_ways():
    masked = hide([TEXT, TEXT[:2]] * 50, QUESTION_MASKING)
    assert masked.weights.tolist() == [[1.0]] * 100
    assert set(masked.modes) == {"bi"}


def test_long_texts_lose_their_tail_and_keep_their_end():
    masked = hide([list(range(10, 45))], MaskingPlan(most=0))
    assert masked.ids[0, PREFIX:].tolist() == [*range(10, 30), SPECIAL.end]


def test_loss_is_cross_entropy_of_what_counts():
    logits, labels = torch.zeros(2, 2, 8), torch.tensor([[5, 6], [7, 0]])
    loss = masked_lm_loss(logits, labels, torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
    assert float(loss) == pytest.approx(math.log(8), rel=1e-4)


def test_worst_samples_are_dropped_and_one_is_always_left():
    logits, labels = torch.zeros(4, 1, 8), torch.full((4, 1), 5)
    logits[0, 0, 5], logits[1, 0, 5] = 3.0, 1.0
    weights = torch.ones(4, 1)
    parts = [float(masked_lm_loss(logits[row : row + 1], labels[:1], weights[:1])) for row in range(4)]
    assert float(masked_lm_loss(logits, labels, weights, 0.5)) == pytest.approx(sum(parts[:2]) / 2, rel=1e-4)
    assert float(masked_lm_loss(logits, labels, weights, 0.9)) == pytest.approx(parts[0], rel=1e-4)


def test_smoothed_loss_is_the_divergence_from_the_smoothed_target():
    torch.manual_seed(0)
    logits, labels = torch.randn(1, 2, 8), torch.tensor([[5, 0]])
    target = torch.full((8,), 0.1 / 6)
    target[0], target[5] = 0.0, 0.9
    parts = target[1:] * (target[1:].log() - logits[0, 0].log_softmax(-1)[1:])
    loss = masked_lm_loss(logits, labels, torch.ones(1, 2), smoothing=0.1)
    assert float(loss) == pytest.approx(float(parts.sum()) / 2, rel=1e-4)  # the second label, 0, costs nothing


def test_answers_are_scored_softly_and_the_unknown_one_is_never_given():
    logits = torch.tensor([[9.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
    scores = torch.tensor([[0.0, 0.6, 0.3], [0.0, 1.0, 0.0]])
    assert float(answer_accuracy(logits, scores)) == pytest.approx((0.6 + 0.0) / 2)
    parts = logits.clamp(min=0) - logits * scores + torch.log1p(torch.exp(-logits.abs()))
    assert float(vqa_loss(logits, scores)) == pytest.approx(float(parts.sum()) / 2, rel=1e-5)
