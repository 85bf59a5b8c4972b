"""What every captioner and answerer keeps to: one suite against the double and the real things."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from models.base import Answerer, Captioner, run_answerer, run_captioner
from models.load import load_answerer, load_captioner
from models.pixels import PROFILES
from readroom.errors import BadCall
from readroom.records import FAMILIES, GeneratedText, GenerationSettings
from tests.fakes.small_blip import save_answerer, save_hub_folder
from tests.fakes.small_vlp import SPECS, save_vlp, show_images, write_regions

SMALL_ONES: dict[str, Callable[[Path], Path]] = {
    "small": save_hub_folder,
    "small-answerer": save_answerer,
    **{f"vlp-{provider}": partial(save_vlp, provider=provider) for provider in SPECS},
}
VLPS = [name for name in SMALL_ONES if name.startswith("vlp-")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    made: dict[str, str] = {}

    def find(name: str) -> str:
        if name in SMALL_ONES and name not in made:
            made[name] = str(SMALL_ONES[name](tmp_path_factory.mktemp("models") / name))
        return made.get(name, name)

    return find


@pytest.fixture(scope="module")
def region_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_regions(tmp_path_factory.mktemp("regions"))


@pytest.fixture(scope="module", params=["dummy", "small", "bundled", "bundled:vlp", *VLPS])
def captioner(request: pytest.FixtureRequest, place: Callable[[str], str], region_dir: Path) -> Captioner:
    return load_captioner(place(request.param), device="cpu", region_dir=region_dir)


@pytest.fixture(scope="module", params=["dummy", "small-answerer", "bundled:vlp", *VLPS])
def answerer(request: pytest.FixtureRequest, place: Callable[[str], str], region_dir: Path) -> Answerer:
    return load_answerer(place(request.param), device="cpu", region_dir=region_dir)


def test_it_says_what_it_is(captioner: Captioner) -> None:
    assert isinstance(captioner, Captioner)
    assert captioner.family in ("dummy", *FAMILIES)
    assert captioner.checkpoint.startswith(("sha256:", "dummy:"))
    assert captioner.profile in PROFILES
    assert captioner.defaults.max_new_tokens > 0
    # One that reads features in the place of pictures says how, and sees no size.
    assert captioner.image_size > 0 if captioner.reader is None else callable(captioner.reader.read)


def test_one_text_an_image_in_order(captioner: Captioner) -> None:
    images = show_images(captioner)
    together = run_captioner(captioner, images)
    assert len(together) == len(images)
    turned = run_captioner(captioner, images[::-1])
    assert [found.text for found in together] == [found.text for found in turned[::-1]]


def test_no_images_no_texts(captioner: Captioner) -> None:
    assert run_captioner(captioner, []) == []


def test_it_tells_images_apart(captioner: Captioner) -> None:
    assert len({found.text for found in run_captioner(captioner, show_images(captioner))}) > 1


def test_an_image_of_its_own_size_needs_no_sizing(captioner: Captioner) -> None:
    side = captioner.image_size
    if captioner.reader is not None:
        with pytest.raises(BadCall):
            captioner.prepare([np.full((48, 48, 3), 90, dtype=np.uint8)])
        return
    image = np.full((side, side, 3), 90, dtype=np.uint8)
    assert isinstance(run_captioner(captioner, [image])[0], GeneratedText)


def test_the_same_batch_gives_the_same_texts(captioner: Captioner) -> None:
    images = show_images(captioner)
    batch = captioner.prepare(images)
    first, second = (captioner.finish(captioner.generate(batch, captioner.defaults)) for _ in range(2))
    assert first == second


def test_scores_are_log_probabilities(captioner: Captioner) -> None:
    for found in run_captioner(captioner, show_images(captioner)):
        assert found.score is not None
        assert found.score <= 0


def test_a_limit_on_tokens_is_kept(captioner: Captioner) -> None:
    for found in run_captioner(captioner, show_images(captioner), GenerationSettings(max_new_tokens=2)):
        assert len(found.text.split()) <= 2


def test_it_warms_up_any_number_of_times(captioner: Captioner) -> None:
    captioner.warm_up()
    captioner.warm_up()


def test_answers_come_one_a_question_in_order(answerer: Answerer) -> None:
    images, questions = show_images(answerer, 4), ["what is this?", "where", "is this a picture of the banar?", "what"]
    together = run_answerer(answerer, images, questions)
    apart = [run_answerer(answerer, [image], [asked])[0] for image, asked in zip(images, questions, strict=True)]
    assert [found.text for found in together] == [found.text for found in apart]


def test_the_question_matters(answerer: Answerer) -> None:
    image = show_images(answerer, 1)[0]
    asked = ["what is this?", "where is the banar?", "lovek", "a picture of the gutum"]
    assert len({found.text for found in run_answerer(answerer, [image] * 4, asked)}) > 1


def test_a_question_too_few_is_a_bad_call(answerer: Answerer) -> None:
    with pytest.raises(BadCall):
        answerer.prepare(show_images(answerer, 2), ["what is this?"])


def test_an_answerer_warms_up(answerer: Answerer) -> None:
    answerer.warm_up()


def test_both_kinds_of_folder_are_told_apart(tmp_path: Path) -> None:
    from readroom.errors import CheckpointBroken

    with pytest.raises(CheckpointBroken, match="is a BlipForQuestionAnswering"):
        load_captioner(str(save_answerer(tmp_path / "vqa")), device="cpu")
    with pytest.raises(CheckpointBroken, match="is a BlipForConditionalGeneration"):
        load_answerer(str(save_hub_folder(tmp_path / "captions")), device="cpu")
    with pytest.raises(CheckpointBroken, match="captions no images"):
        load_captioner(str(save_vlp(tmp_path / "vlp", task="answer")), device="cpu")
    with pytest.raises(CheckpointBroken, match="answers no questions"):
        load_answerer(str(save_vlp(tmp_path / "vlp", task="caption")), device="cpu")
