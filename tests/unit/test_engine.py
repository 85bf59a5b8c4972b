from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from models.base import Captioner
from readroom.errors import CheckpointBroken, CheckpointMissing, DeviceBroken, OutOfMemory
from readroom.records import GeneratedText, GenerationSettings, Reason
from tests.fakes.models import FakeCaptioner, break_device, fit_at_most, paint, raise_on
from worker import engine as engine_module
from worker.engine import Engine, ModelFailure

SETTINGS = GenerationSettings()


def run_pixels(captioner: FakeCaptioner, pixels: range) -> list[GeneratedText | ModelFailure]:
    return Engine(lambda ref: captioner).run_captions("fake", [paint(value) for value in pixels], SETTINGS)


def count_runs(captioner: FakeCaptioner, pixel: int) -> int:
    return sum(pixel in run for run in captioner.runs)


def test_a_batch_gives_its_texts_in_order() -> None:
    captioner = FakeCaptioner()

    assert run_pixels(captioner, range(5)) == [GeneratedText(f"pixel {value}", -0.5) for value in range(5)]
    assert len(captioner.runs) == 1


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 32, 64])
@pytest.mark.parametrize("place", ["first", "last", "middle"])
def test_one_bad_picture_fails_alone_within_log2_tries(batch: int, place: str) -> None:
    culprit = {"first": 0, "last": batch - 1, "middle": batch // 2}[place]
    captioner = FakeCaptioner(trouble=raise_on(culprit))

    results = run_pixels(captioner, range(batch))

    assert [isinstance(result, ModelFailure) for result in results] == [value == culprit for value in range(batch)]
    most = math.ceil(math.log2(batch)) + 1
    assert max(count_runs(captioner, value) for value in range(batch)) <= most


def test_several_bad_pictures_all_fail_and_the_others_pass() -> None:
    results = run_pixels(FakeCaptioner(trouble=raise_on(3, 4, 17)), range(20))

    assert [i for i, result in enumerate(results) if isinstance(result, ModelFailure)] == [3, 4, 17]


def test_a_failure_names_the_class_of_the_error_and_not_its_text() -> None:
    (failure,) = run_pixels(FakeCaptioner(trouble=raise_on(0)), range(1))

    assert failure == ModelFailure(Reason.MODEL_FAILED, "RuntimeError")


def test_a_model_that_gives_too_few_texts_fails_every_picture() -> None:
    captioner = FakeCaptioner()
    captioner.finish = lambda raw: []  # type: ignore[method-assign]

    assert all(isinstance(result, ModelFailure) for result in run_pixels(captioner, range(4)))


def test_a_batch_that_does_not_fit_is_halved_and_the_size_that_fits_is_kept() -> None:
    captioner = FakeCaptioner(trouble=fit_at_most(5))
    engine = Engine(lambda ref: captioner)
    images = [paint(value) for value in range(32)]

    first = engine.run_captions("fake", images, SETTINGS)
    captioner.runs.clear()
    second = engine.run_captions("fake", images, SETTINGS)

    assert first == second == [GeneratedText(f"pixel {value}", -0.5) for value in range(32)]
    assert {len(run) for run in captioner.runs} == {4}


def test_a_picture_that_does_not_even_fit_alone_may_be_tried_another_time() -> None:
    results = run_pixels(FakeCaptioner(trouble=fit_at_most(0)), range(3))

    assert all(isinstance(result, ModelFailure) and result.retry for result in results)


def test_a_broken_device_is_not_taken_for_a_bad_picture() -> None:
    captioner = FakeCaptioner(trouble=break_device)

    with pytest.raises(DeviceBroken):
        run_pixels(captioner, range(8))
    assert len(captioner.runs) == 1


def test_the_checkpoint_not_used_for_longest_makes_room() -> None:
    loaded: list[str] = []
    engine = Engine(note_loads(loaded), max_loaded=2)

    for ref in ("a", "b", "a", "c", "a", "b"):
        engine.find_captioner(ref)

    assert loaded == ["a", "b", "c", "b"]


def test_a_model_is_warmed_once() -> None:
    captioner = FakeCaptioner()
    engine = Engine(lambda ref: captioner)

    for _ in range(3):
        engine.warm_up("fake")
        engine.run_captions("fake", [paint(1)], SETTINGS)

    assert captioner.warmed == 1


def test_a_model_that_cannot_warm_up_is_judged_by_its_first_batch() -> None:
    captioner = FakeCaptioner()
    captioner.warm_up = lambda: 1 / 0  # type: ignore[method-assign]
    engine = Engine(lambda ref: captioner)

    engine.warm_up("fake")

    assert len(engine.run_captions("fake", [paint(1)], SETTINGS)) == 1


def test_a_device_lost_while_warming_up_is_reported_before_any_batch() -> None:
    captioner = FakeCaptioner()
    captioner.warm_up = lambda: break_device([])  # type: ignore[method-assign]

    with pytest.raises(DeviceBroken):
        Engine(lambda ref: captioner).warm_up("fake")


def test_a_missing_checkpoint_is_not_looked_for_with_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def load(ref: str) -> Captioner:
        asked.append(ref)
        raise CheckpointMissing("no such checkpoint")

    engine = Engine(load)
    for _ in range(3):
        with pytest.raises(CheckpointMissing):
            engine.find_captioner("gone")
    assert asked == ["gone"]

    monkeypatch.setattr(engine_module.time, "monotonic", lambda: 1e12)
    with pytest.raises(CheckpointMissing):
        engine.find_captioner("gone")
    assert asked == ["gone", "gone"]


def test_a_foreign_error_while_loading_is_a_broken_checkpoint() -> None:
    def load(ref: str) -> Captioner:
        raise KeyError("text_decoder.bert")

    with pytest.raises(CheckpointBroken, match="KeyError"):
        Engine(load).find_captioner("odd")


def test_a_model_that_does_not_fit_is_tried_again_without_the_others() -> None:
    loaded: list[str] = []
    note = note_loads(loaded)

    def load(ref: str) -> Captioner:
        captioner = note(ref)
        if ref == "large" and loaded.count("large") == 1:
            raise OutOfMemory("too large")
        return captioner

    engine = Engine(load, max_loaded=2)
    for ref in ("small", "large", "small"):
        engine.find_captioner(ref)

    assert loaded == ["small", "large", "large", "small"]


def note_loads(loaded: list[str]) -> Callable[[str], Captioner]:
    def load(ref: str) -> Captioner:
        loaded.append(ref)
        return FakeCaptioner(ref)

    return load
