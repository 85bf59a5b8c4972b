"""Scoring phantoms: what captions say, what answers are worth, what a floor reaches, and who is asked what."""

from __future__ import annotations

import numpy as np
import pytest

from models.checkpoint import resolve_checkpoint, resolve_folder
from readroom.errors import BadCall, CheckpointBroken
from readroom.records import GeneratedText
from tests.fakes.small_vlp import save_vlp, write_regions
from training.data import make_film
from training.evaluation import (
    Subject,
    draw_phantoms,
    list_phantoms,
    load_subject,
    predict_items,
    score_checkpoint,
)
from training.floors import learn_floor, sample_film, say_floor
from training.phantom_scores import (
    FINDING_WORDS,
    count_phantoms,
    parse_finding,
    parse_size,
    parse_things,
    score_phantoms,
    tidy_text,
)
from training.predictions import Item, Prediction

NORMAL = "frontal chest radiograph. normal heart size. no pleural effusion."


def score_said(group, truths, captions):
    rows = enumerate(zip(truths, captions, strict=True))
    said = [Prediction(f"{group}:{row}", f"{group}:{row}", group, "", (truth,), text) for row, (truth, text) in rows]
    return {name: score.value for name, score in score_phantoms(said).items()} | count_phantoms(said)


# Captions ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "words", "told"),
    [
        ("frontal chest radiograph. small left pleural effusion.", "pleural effusion", "left"),
        ("frontal chest radiograph. no pleural effusion.", "pleural effusion", ""),
        ("frontal chest radiograph. cardiomegaly.", "cardiomegaly", "present"),
        ("large bilateral pleural effusions.", "pleural effusion", "bilateral"),
        ("frontal chest radiograph . small left pleural  effusion .", "pleural effusion", "left"),
        ("frontal chest radiograph . no pleural effusion .", "pleural effusion", ""),
        ("Cardiomegaly .", "cardiomegaly", "present"),
    ],
)
def test_parser_reads_side_presence_and_denial(caption, words, told):
    assert parse_finding(caption, words) == told


def test_parser_reads_sizes_and_things():
    assert parse_size("moderate right pleural effusion.") == "moderate"
    assert parse_things("an orange circle above a blue square") == [("orange", "circle"), ("blue", "square")]


def test_blanks_around_marks_and_capitals_change_no_score():
    truths = [NORMAL, "lateral chest radiograph.", NORMAL.replace("no", "small left") + " sternal wires."]
    apart = [truth.replace(".", " .").capitalize() for truth in truths]
    assert tidy_text(apart[0]) == truths[0]
    assert score_said("film", truths, apart) == score_said("film", truths, truths)
    assert score_said("film", truths, apart)["whole_caption"] == 1.0


def test_scores_punish_the_wrong_side():
    truths = ["frontal chest radiograph. cardiomegaly. small left pleural effusion."] * 2
    scores = score_said("film", truths, [truths[0], truths[0].replace("left", "right")])
    assert scores["effusion_side"] == 0.5
    assert scores["cardiomegaly"] == 1.0
    assert scores["effusion_f1"] == 0.5


def test_scores_count_a_thing_that_is_not_there_as_hallucinated():
    assert score_said("film", [NORMAL], [NORMAL + " pacemaker."])["hallucination"] == 1.0
    assert score_said("film", [NORMAL], [NORMAL])["hallucination"] == 0.0


def test_scene_scores_want_colours_with_their_shapes():
    scores = score_said("scene", ["a red circle above a blue square"], ["a blue circle above a red square"])
    assert scores["shape"] == 1.0 and scores["colour"] == 0.0 and scores["shape_and_colour"] == 0.0


def test_findings_are_scored_on_frontal_films_and_the_view_on_all():
    scores = score_said("film", ["lateral chest radiograph.", NORMAL], ["lateral chest radiograph.", NORMAL])
    assert scores["films"] == 1 and scores["view"] == 1.0


# Answers -------------------------------------------------------------------------------------------------------------


def make_answer(picture, group, right, said, error=""):
    return Prediction(f"{picture}:{group}", picture, group, "what?", (right,), said, error)


def test_answers_are_scored_by_kind_of_question():
    predictions = [
        make_answer("film:1", "device", "pacemaker", "Pacemaker "),
        make_answer("film:2", "device", "none", "pacemaker"),
        make_answer("film:2", "view", "frontal", "frontal"),
        make_answer("film:3", "view", "frontal", "", error="missing"),
    ]
    scores = score_phantoms(predictions)
    assert {name: (score.value, score.n) for name, score in scores.items()} == {
        "answer_accuracy": (0.6667, 3),
        "answer:device": (0.5, 2),
        "answer:view": (1.0, 1),
    }
    assert scores["answer_accuracy"].low < 0.6667 <= scores["answer_accuracy"].high


def test_nothing_asked_gives_no_answer_scores():
    films = [Prediction("film:1", "film:1", "film", "", (NORMAL,), NORMAL)]
    assert not [name for name in score_phantoms(films) if name.startswith("answer")]
    assert count_phantoms(films) == {"films": 1}


# Floors --------------------------------------------------------------------------------------------------------------


def test_films_of_the_floor_are_those_of_training():
    views = set()
    for seed in range(60):
        _, drawn = make_film(16, seed)
        known = sample_film(seed)
        assert (known.view, known.ctr) == (drawn.view, drawn.ctr)
        assert [(f.name, f.side, f.size, f.zone) for f in known.findings] == [
            (f.name, f.side, f.size, f.zone) for f in drawn.findings
        ]
        views.add(known.view)
    assert views == {"PA", "AP", "LL"}


def test_floor_says_the_most_frequent_text_of_each_group():
    floor = learn_floor()
    assert floor["film"] == NORMAL
    assert floor["view"] == "frontal" and floor["effusion_size"] == "small"
    phantoms = draw_phantoms(16, 20, 20, 77)
    assert {item.group for item in phantoms} <= floor.keys()
    said = say_floor([make_answer("film:1", "view", "lateral", "lateral")], floor)
    assert [(one.text, one.references) for one in said] == [("frontal", ("lateral",))]


# Running -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vlp(tmp_path_factory):
    return save_vlp(tmp_path_factory.mktemp("checkpoints") / "vlp")


class Echo:
    """A captioner and answerer that names the mean brightness it sees, and remembers its batches."""

    family, checkpoint, profile, image_size, reader = "echo", "echo", "dicom_voi_v1", 8, None

    def __init__(self):
        self.batches = []

    def prepare(self, images, questions=None):
        self.batches.append(len(images))
        return [
            f"{image.mean():.0f}{question}"
            for image, question in zip(images, questions or [""] * len(images), strict=True)
        ]

    def generate(self, batch, settings):
        return batch

    def finish(self, raw):
        return [GeneratedText(text) for text in raw]

    defaults = None


def grey(shade):
    return np.full((8, 8, 3), shade, dtype=np.uint8)


def test_items_keep_their_order_and_a_lost_picture_costs_its_own_items(tmp_path):
    lost = tmp_path / "gone.png"
    items = [
        Item("1", "one", grey(1), ("x",)),
        Item("2", "lost", lost, ("x",)),
        Item("3", "three", grey(3), ("x",)),
        Item("1:0", "one", grey(1), ("x",), "g", "?"),
        Item("2:0", "lost", lost, ("x",), "g", "?"),
        Item("1:1", "one", grey(1), ("x",), "g", "!"),
    ]
    echo, heard = Echo(), []
    found = predict_items(Subject(echo, echo), items, 2, lambda done, total: heard.append((done, total)))
    assert [(one.item, one.text) for one in found] == [
        ("1", "1"), ("2", ""), ("3", "3"), ("1:0", "1?"), ("2:0", ""), ("1:1", "1!"),
    ]  # fmt: skip
    assert [one.item for one in found if one.error.startswith("missing")] == ["2", "2:0"]
    assert heard == [(2, 6), (3, 6), (5, 6), (6, 6)]
    assert echo.batches == [1, 1, 1, 1]


def test_phantoms_come_with_questions_only_for_who_answers():
    echo = Echo()
    captions = list_phantoms(Subject(echo, None), 2, 2, 5)
    assert [item.name for item in captions] == ["film:5", "film:6", "scene:5", "scene:6"]
    assert not any(item.question for item in captions)
    both = list_phantoms(Subject(echo, echo), 2, 2, 5)
    assert len(both) == 4 + 4 * 8 and captions[0].image.shape == (8, 8, 3)
    assert len([item for item in list_phantoms(Subject(None, echo), 2, 2, 5) if item.question]) == 32


def test_checkpoint_that_answers_is_scored_on_captions_answers_and_beside_the_floor(vlp):
    scores = score_checkpoint(vlp, films=4, scenes=3, first_seed=40)
    assert scores["films"] <= 4 and scores["scenes"] == 3 and scores["answers"] == 56
    assert {"effusion_side", "shape_and_colour", "answer_accuracy", "answer_floor"} <= scores.keys()
    assert scores.keys() >= {f"{name}_f1" for name in FINDING_WORDS}
    assert any(name.startswith("answer:") for name in scores)
    assert 0.2 < scores["answer_floor"] < 0.8
    assert scores == score_checkpoint(vlp, films=4, scenes=3, first_seed=40)


def test_bundled_blip_captions_and_is_asked_nothing():
    subject = load_subject(resolve_checkpoint("bundled"))
    assert subject.captioner is not None and subject.answerer is None
    with pytest.raises(CheckpointBroken, match="answers no questions"):
        load_subject(resolve_checkpoint("bundled"), tasks=("answer",))


def test_checkpoint_that_reads_features_is_not_shown_phantoms(tmp_path):
    folder, regions = save_vlp(tmp_path / "vlp", "precomputed"), write_regions(tmp_path / "regions")
    subject = load_subject(resolve_folder(folder), region_dir=regions)
    with pytest.raises(BadCall, match="reads region features"):
        list_phantoms(subject, 1, 1)
