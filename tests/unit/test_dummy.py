"""The weightless captioner: same picture, same words; costs what its name says."""

from __future__ import annotations

import time

import numpy as np
import pytest

from models.base import run_answerer, run_captioner
from models.dummy import DummyModel
from readroom.errors import BadCall, CheckpointMissing
from readroom.records import GenerationSettings

GREY = np.full((8, 8), 9, dtype=np.uint8)


def test_words_are_the_same_in_every_process_and_release() -> None:
    found = run_captioner(DummyModel(), [GREY], GenerationSettings())
    assert found[0].text == "meadow fjord lagoon dune juniper"


def test_one_changed_pixel_changes_the_words() -> None:
    other = GREY.copy()
    other[3, 3] += 1
    first, second = run_captioner(DummyModel(), [GREY, other])
    assert first != second


def test_settings_and_question_change_the_words() -> None:
    model = DummyModel()
    texts = {run_captioner(model, [GREY], GenerationSettings(num_beams=beams))[0].text for beams in (1, 3)}
    texts |= {found.text for found in run_answerer(model, [GREY, GREY], ["what?", "where?"])}
    assert len(texts) == 4


def test_no_more_words_than_asked() -> None:
    assert len(run_captioner(DummyModel(), [GREY], GenerationSettings(max_new_tokens=2))[0].text.split()) == 2


def test_scores_are_log_probabilities() -> None:
    scores = [found.score for found in run_captioner(DummyModel(), [np.full((4, 4), n, np.uint8) for n in range(50)])]
    assert all(score is not None and -1 < score <= 0 for score in scores)


def test_a_batch_sleeps_for_its_cost_once(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    run_captioner(DummyModel("dummy:base_ms=5,item_ms=0.5"), [GREY] * 4)
    assert slept == [pytest.approx(0.007)]


def test_a_batch_really_takes_its_time() -> None:
    started = time.perf_counter()
    run_captioner(DummyModel("dummy:base_ms=20"), [GREY])
    assert time.perf_counter() - started >= 0.02


def test_without_costs_nothing_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("slept"))
    run_captioner(DummyModel(), [GREY])


@pytest.mark.parametrize("name", ["dummy:speed=1", "dummy:base_ms=x", "dummy:base_ms=-1", "dummy:base_ms=1e9"])
def test_a_wrong_cost_is_named(name: str) -> None:
    with pytest.raises(CheckpointMissing, match="base_ms=5"):
        DummyModel(name)


def test_something_that_is_no_picture_is_a_bad_call() -> None:
    with pytest.raises(BadCall):
        DummyModel().prepare([np.zeros((4, 4), dtype=np.float32)])  # type: ignore[list-item]


def test_questions_and_pictures_must_be_as_many() -> None:
    with pytest.raises(BadCall):
        DummyModel().prepare([GREY], ["a", "b"])
