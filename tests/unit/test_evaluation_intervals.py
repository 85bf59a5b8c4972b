"""Intervals: known cases, resampling by picture, and one draw for all scores."""

from __future__ import annotations

import numpy as np
import pytest

from training import intervals
from training.intervals import Tally, divide_sums, draw_weights, measure_tallies, tally_share


def share_of(hits, asked=None):
    hits = np.array(hits, dtype=float)
    return tally_share(hits, np.ones_like(hits) if asked is None else np.array(asked, dtype=float))


def test_interval_of_a_share_is_that_of_the_binomial():
    score = measure_tallies({"a": share_of([1] * 160 + [0] * 40)})["a"]
    spread = 1.96 * (0.8 * 0.2 / 200) ** 0.5
    assert score.value == 0.8 and score.n == 200
    assert (score.low, score.high) == pytest.approx((0.8 - spread, 0.8 + spread), abs=0.012)


def test_questions_of_one_picture_widen_the_interval_as_they_are_right_or_wrong_together():
    alone = share_of([1, 0] * 100)
    together = share_of([8, 0] * 12 + [4], [8] * 25)
    scores = measure_tallies({"alone": alone, "together": together})
    assert (scores["alone"].n, scores["together"].n) == (200, 200)
    widths = {name: score.high - score.low for name, score in scores.items()}
    assert widths["together"] > 2 * widths["alone"]


def test_measuring_again_gives_the_same_interval_and_same_items_the_same_draws():
    tallies = {"a": share_of([1, 0, 1, 1, 0] * 8), "b": share_of([1, 0, 1, 1, 0] * 8)}
    scores = measure_tallies(tallies)
    assert scores == measure_tallies(tallies)
    assert scores["a"] == scores["b"]


def test_draws_do_not_depend_on_the_pieces_they_are_made_in(monkeypatch):
    whole = np.concatenate(list(draw_weights(40)))
    monkeypatch.setattr(intervals, "MAX_WEIGHTS", 4000)
    pieces = list(draw_weights(40))
    assert len(pieces) == 10 and np.array_equal(np.concatenate(pieces), whole)
    assert whole.shape == (intervals.RESAMPLES, 40) and (whole.sum(axis=1) == 40).all()


def test_score_of_nothing_is_nothing():
    empty = Tally(np.zeros((0, 2)), divide_sums, 0)
    unasked = share_of([0, 0], [0, 0])
    scores = measure_tallies({"empty": empty, "unasked": unasked})
    assert [(score.value, score.n, score.high) for score in scores.values()] == [(0.0, 0, 0.0)] * 2


def test_resample_without_any_item_of_a_rare_kind_is_left_out():
    score = measure_tallies({"rare": share_of([1] + [0] * 19, [1] + [0] * 19)})["rare"]
    assert (score.value, score.n, score.low, score.high) == (1.0, 1, 1.0, 1.0)
