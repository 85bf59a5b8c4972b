"""Questions about phantoms: every answer read again from the truth, none ambiguous, yes and no in balance."""

import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from training.data import LATERAL_SHARE, VALIDATION_SEED, make_film, make_radiograph
from training.findings import DEVICES, Finding, Truth, sample_truth
from training.phantom_text import caption_truth
from training.questions import SIDED, ask_film, ask_scene, every_answer, every_word, soft_scores
from training.scenes import COLOURS, SHAPES, Scene, Thing, draw_scene

FILMS = SCENES = 2000
A_PICTURE = 6

# Words by which a question names a finding.
NAMED = {
    "pneumothorax": "pneumothorax",
    "consolidation": "consolidation",
    "edema": "pulmonary edema",
    "atelectasis": "atelectasis",
    "nodule": "nodule",
    "pacemaker": "pacemaker",
    "central": "central line",
    "endotracheal": "endotracheal tube",
    "enteric": "enteric tube",
    "wires": "sternal wires",
    "cardiomegaly": "cardiomegaly",
    "heart": "cardiomegaly",
    "cardiac": "cardiomegaly",
    "effusion": "pleural effusion",
    "fluid": "pleural effusion",
}


def sample_film(seed):
    """The truth of a film without the drawing of it."""
    rng = np.random.default_rng([1, seed])
    lateral = rng.random() < LATERAL_SHARE
    truth = sample_truth(seed, rng, "LL" if lateral else "PA")
    return Truth(seed, "LL", truth.ctr) if lateral else truth


@pytest.fixture(scope="module")
def films():
    truths = [sample_film(seed) for seed in range(FILMS)]
    return [(truth, ask_film(truth, np.random.default_rng([9, truth.seed]), A_PICTURE)) for truth in truths]


@pytest.fixture(scope="module")
def scenes():
    drawn = [draw_scene(seed, height=16) for seed in range(SCENES)]
    return [(scene, ask_scene(scene, np.random.default_rng([9, i]), A_PICTURE)) for i, scene in enumerate(drawn)]


@pytest.fixture(scope="module")
def everything(films, scenes):
    return [question for _, asked in [*films, *scenes] for question in asked]


# --- the same facts, read from the caption instead of from the truth's fields


def read_film(text, caption):
    """The answer to a question about the film of that caption, from the words of both alone."""
    words = set(re.findall("[a-z]+", text.replace("effusions", "effusion")))
    if words & {"frontal", "lateral", "view"}:
        return read_view(words, caption)
    if "device" in words:
        there = [device for device in DEVICES if device in caption]
        assert len(there) < 2 or text.startswith(("is", "does", "can"))
        return yes(there) if text.startswith(("is", "does", "can")) else (there or ["none"])[0]
    sentence = find_sentence(next(name for word, name in NAMED.items() if word in words), caption)
    if words & {"big", "large", "size"} and "heart" not in words:
        return sentence.split()[0]
    if "zone" in words:
        return re.search("upper|middle|lower", sentence).group()
    if text.startswith(("on which", "which side", "what side")):
        return (re.findall("left|right|bilateral", sentence) or ["none"])[0]
    if "normal" in words:
        return yes(not sentence)
    if words & {"bilateral", "both"}:
        return yes("bilateral" in sentence)
    side = words & {"left", "right"}
    return yes(sentence and (not side or "bilateral" in sentence or side.pop() in sentence))


def read_view(words, caption):
    view = caption.split()[0]
    if {"frontal", "lateral"} <= words or not words & {"frontal", "lateral"}:
        return view
    return yes(view in words)


def find_sentence(name, caption):
    told = (part.strip() for part in caption.split("."))
    return next((part for part in told if name in part and not part.startswith("no ")), "")


def yes(verdict):
    return "yes" if verdict else "no"


def test_every_answer_about_a_film_agrees_with_its_caption(films):
    for truth, asked in films:
        for question in asked:
            assert question.answer == read_film(question.text, caption_truth(truth)), (truth, question)


def test_lateral_film_is_asked_for_its_view_only(films):
    lateral = [asked for truth, asked in films if truth.view == "LL"]
    assert len(lateral) > 20
    assert {question.group for asked in lateral for question in asked} == {"view"}


def test_size_of_the_heart_is_never_asked_for(films):
    graded = [q for _, asked in films for q in asked if q.answer in ("small", "moderate", "large")]
    assert {question.group for question in graded} == {"effusion_size"}


def test_zone_and_size_are_asked_only_of_what_is_there(films):
    for truth, asked in films:
        groups = {question.group for question in asked}
        assert "consolidation_zone" not in groups or truth.find("consolidation")
        assert "effusion_size" not in groups or truth.find("pleural effusion")


@pytest.mark.parametrize("name", SIDED)
def test_side_of_what_is_absent_is_asked_less_often_than_of_what_is_there(films, name):
    group = f"{name.split()[-1]}_side"
    answers = Counter(q.answer for _, asked in films for q in asked if q.group == group)
    assert 0 < answers["none"] < answers["left"] + answers["right"] + answers["bilateral"]


def test_side_is_the_patients_side():
    truth = Truth(0, "PA", 0.44, (Finding("pleural effusion", side="left", size="large"),))
    asked = [q for seed in range(40) for q in ask_film(truth, np.random.default_rng(seed), 5)]
    sides = {(q.text, q.answer) for q in asked if q.group == "effusion_on_side"}
    assert {answer for text, answer in sides if "left" in text} == {"yes"}
    assert {answer for text, answer in sides if "right" in text or "both" in text} == {"no"}


# --- scenes, read from where things stand


def place_things(scene):
    """Things at (across, down): the first of two stands above or left of the second."""
    if len(scene.things) == 1:
        return {(0, 0): scene.things[0]}
    second = {"above": (0, 1), "left of": (1, 0)}[scene.relation]
    return {(0, 0): scene.things[0], second: scene.things[1]}


STEPS = {"above": (0, -1), "over": (0, -1), "below": (0, 1), "under": (0, 1), "left": (-1, 0), "right": (1, 0)}
RELATION = re.compile(r"\b(above|over|below|under|(?:to the )?left of|(?:to the )?right of)\b")


def fitting(words, things):
    """Spots of the things that a few words like `the red circle` can mean."""
    named = set(re.findall("[a-z]+", words))
    colours, shapes = named & set(COLOURS), named & set(SHAPES)
    return [s for s, t in things.items() if colours <= {t.colour} and shapes <= {t.shape}]


def only(words, things):
    """The one spot that `words` mean; a question that fits two things is broken."""
    spots = fitting(words, things)
    assert len(spots) == 1, words
    return spots[0]


def answer_of(thing, text):
    """The colour or the shape of a thing, whichever the question wants."""
    return thing.colour if re.search("colou?r", text) else thing.shape


def read_scene(text, scene):
    things = place_things(scene)
    if text.startswith("how many"):
        wanted = re.search("circle|square|triangle|", text.split()[2]).group()
        return ["none", "one", "two"][len(fitting(wanted, things))]
    if either := re.fullmatch(r"is (the .+) (above or below|left or right of) (the .+)\?", text):
        step = subtract(only(either[1], things), only(either[3], things))
        return next(w for w in either[2].split() if STEPS.get(w) == step)
    if named := RELATION.search(text):
        word = re.search("|".join(STEPS), named[0]).group()
        before, reference = text[: named.start()], only(text[named.end() :], things)
        spot = tuple(a + b for a, b in zip(reference, STEPS[word], strict=True))
        assert_on_the_line(scene, word)
        if text.startswith(("is", "do")):
            return yes(only(before, things) == spot)
        return answer_of(things[spot], text) if spot in things else "none"
    if text.startswith(("is", "does", "can")):
        return yes(fitting(text, things))
    return answer_of(things[only(text, things)], text)


def subtract(first, second):
    return tuple(a - b for a, b in zip(first, second, strict=True))


def assert_on_the_line(scene, word):
    """Whether something is also a little to the side of a thing that it is above, nobody is asked."""
    upright = word in ("above", "over", "below", "under")
    assert upright == (scene.relation == "above")


def test_every_answer_about_a_scene_agrees_with_what_stands_where(scenes):
    for scene, asked in scenes:
        for question in asked:
            assert question.answer == read_scene(question.text, scene), (scene.captions, question)


@pytest.mark.parametrize("relation", ["above", "left of"])
def test_two_circles_are_never_called_the_circle(relation):
    scene = Scene(np.zeros((2, 2, 3), np.uint8), (Thing("circle", "red"), Thing("circle", "blue")), relation, ())
    texts = [q.text for seed in range(100) for q in ask_scene(scene, np.random.default_rng(seed), 8)]
    assert len(texts) == 800
    assert not [text for text in texts if "the circle" in text]


def test_things_asked_for_in_vain_share_a_colour_or_a_shape_with_the_picture(scenes):
    for scene, asked in scenes:
        shown = {word for thing in scene.things for word in (thing.colour, thing.shape)}
        for question in asked:
            if question.group == "scene_thing" and question.answer == "no":
                assert shown & set(re.findall("[a-z]+", question.text)), question


def test_relation_cannot_be_answered_with_the_other_thing_alone(scenes):
    answers = Counter(q.answer for _, asked in scenes for q in asked if q.group == "scene_relation")
    assert 0.25 < answers["none"] / answers.total() < 0.42


# --- all of them


def test_yes_and_no_are_balanced_in_all_and_in_every_group(everything):
    groups = defaultdict(Counter)
    for question in everything:
        if question.answer in ("yes", "no"):
            groups[question.group][question.answer] += 1
    total = sum(groups.values(), Counter())
    assert 0.4 < total["yes"] / total.total() < 0.6
    assert len(groups) > 12
    shares = {name: counts["yes"] / counts.total() for name, counts in groups.items() if counts.total() > 300}
    assert all(0.38 < share < 0.62 for share in shares.values()), shares


def test_films_alone_and_scenes_alone_are_balanced(films, scenes):
    for pictures in (films, scenes):
        answers = Counter(q.answer for _, asked in pictures for q in asked)
        assert 0.4 < answers["yes"] / (answers["yes"] + answers["no"]) < 0.6


def test_words_of_a_question_do_not_give_its_answer_away(everything):
    told = defaultdict(Counter)
    for question in everything:
        told[question.text][question.answer] += 1
    often = {text: counts for text, counts in told.items() if counts.total() >= 60}
    assert len(often) > 50
    assert not {text: counts for text, counts in often.items() if max(counts.values()) / counts.total() > 0.8}


def test_answers_given_are_all_answers_there_are(everything):
    answers = every_answer()
    assert answers == sorted(set(answers))
    assert len(answers) <= 60
    assert {question.answer for question in everything} == set(answers)


def test_words_used_are_all_words_there_are(everything):
    words = every_word()
    assert words == sorted(set(words))
    assert {word for question in everything for word in re.findall(r"[^\W_]+", question.text)} == set(words)


def test_questions_are_lower_case_sentences_with_a_question_mark(everything):
    assert all(re.fullmatch(r"[a-z][a-z ,]*[a-z]\?", question.text) for question in everything)


def test_same_generator_asks_the_same_questions():
    scene, truth = draw_scene(4, 16), sample_film(4)
    for ask, subject in ((ask_film, truth), (ask_scene, scene)):
        first, second, other = (ask(subject, np.random.default_rng(seed), 7) for seed in (1, 1, 2))
        assert first == second != other


def test_questions_of_a_picture_differ_as_long_as_they_last(films, scenes):
    assert all(len({q.text for q in asked}) == A_PICTURE for _, asked in [*films, *scenes])
    lateral = Truth(0, "LL", 0.44)
    many = ask_film(lateral, np.random.default_rng(0), 60)
    assert len(many) == 60
    assert len({question.text for question in many[:8]}) == 8
    assert ask_film(lateral, np.random.default_rng(0), 0) == []


def test_film_comes_with_the_truth_that_its_caption_tells():
    for seed in range(VALIDATION_SEED, VALIDATION_SEED + 12):
        (film, truth), (radiograph, caption) = make_film(32, seed), make_radiograph(32, seed)
        assert np.array_equal(film, radiograph)
        assert truth.seed == seed
        assert caption_truth(truth) == caption


# --- soft scores


INDEX = {"<unk>": 0, "no": 1, "red": 2, "yes": 3}


@pytest.mark.parametrize(("alike", "score"), [(1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0), (10, 1.0)])
def test_soft_score_of_ten_answers_grows_with_those_alike(alike, score):
    scores = soft_scores(["yes"] * alike + [f"other {i}" for i in range(10 - alike)], INDEX, 4)
    assert scores.dtype == np.float32
    assert scores == pytest.approx([0, 0, 0, score])


def test_soft_scores_of_several_answers_stand_side_by_side():
    scores = soft_scores(["yes"] * 5 + ["no"] * 3 + ["red"] + ["<unk>"], INDEX, 6)
    assert scores == pytest.approx([0, 0.9, 0.3, 1, 0, 0])


def test_soft_scores_leave_one_out_of_any_number():
    # Of three: leaving a "yes" out leaves one of two (1/3), twice; leaving the "no" out leaves two (2/3).
    assert soft_scores(["yes", "yes", "no"], INDEX, 4) == pytest.approx([0, 2 / 9, 0, 4 / 9])
    assert soft_scores(["yes"], INDEX, 4).tolist() == [0, 0, 0, 0]
    assert soft_scores([], INDEX, 4).tolist() == [0, 0, 0, 0]


def test_known_answer_is_written_as_ten_people_agreeing():
    assert soft_scores(["red"] * 10, INDEX, 4).tolist() == [0, 0, 1, 0]
