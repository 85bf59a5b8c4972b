"""Questions and answers about phantoms, as visual question answering data with exact truth.

A question is answerable from the picture alone: films are asked for what `caption_truth` states of them, a lateral film
only for its view, and scenes for nothing that two of their things could answer. What is asked depends on the truth, so
that yes and no are near to balanced for every kind of question and cannot be guessed from its words.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from training.findings import DEVICES, EFFUSION_SIZES, SIDES, ZONES, Truth
from training.scenes import COLOURS, RELATIONS, SHAPES, Scene, Thing

QUESTIONS_VERSION = "question-1"
NUMBERS = ("none", "one", "two")
VIEWS = ("frontal", "lateral")
DISTINCT_TRIES = 40  # draws for one more question that was not asked yet; after that, one is asked again

# Share of frontal films that show it. Rare things are asked for more often than they are seen.
PREVALENCE = {
    "pleural effusion": 0.52,
    "cardiomegaly": 0.40,
    "pneumothorax": 0.15,
    "consolidation": 0.13,
    "pulmonary edema": 0.11,
    "atelectasis": 0.08,
    "nodule": 0.11,
    "pacemaker": 0.11,
    "central line": 0.10,
    "endotracheal tube": 0.09,
    "enteric tube": 0.09,
    "sternal wires": 0.09,
}
SIDED = ("pleural effusion", "pneumothorax", "consolidation", "atelectasis", "nodule")


@dataclass(frozen=True)
class Question:
    """One question and its answer, in lower case; `group` is the kind of question, for scores by kind."""

    text: str
    answer: str
    group: str


_Subject = TypeVar("_Subject", Truth, Scene)
# Ways to ask and the share of each; a way gives None where the film or scene holds nothing for it.
_Askers = dict[Callable[[_Subject, np.random.Generator], Question | None], float]

_NOUNS: dict[str, tuple[str, ...]] = {
    "pleural effusion": ("a pleural effusion", "an effusion", "pleural fluid"),
    "cardiomegaly": ("cardiomegaly", "an enlarged heart"),
    "pneumothorax": ("a pneumothorax",),
    "consolidation": ("a consolidation", "consolidation"),
    "pulmonary edema": ("pulmonary edema", "edema"),
    "atelectasis": ("atelectasis",),
    "nodule": ("a lung nodule", "a nodule"),
    "pacemaker": ("a pacemaker",),
    "central line": ("a central line", "a central venous line"),
    "endotracheal tube": ("an endotracheal tube",),
    "enteric tube": ("an enteric tube",),
    "sternal wires": ("sternal wires",),
}
_PRESENT = (
    "is there {noun}?",
    "is {noun} present?",
    "is {noun} seen?",
    "does the film show {noun}?",
    "does this patient have {noun}?",
    "can you see {noun}?",
)
_ENLARGED = ("is the heart enlarged?", "is the heart too large?", "is the cardiac silhouette enlarged?")
_NOT_ENLARGED = ("is the heart size normal?", "is the heart of normal size?", "does the heart have a normal size?")
_SIDE = (
    "on which side is the {bare}?",
    "which side is the {bare} on?",
    "which side shows the {bare}?",
    "what side is the {bare} on?",
)
_ON_SIDE = (
    "is there a {side} {bare}?",
    "is there {noun} on the {side} side?",
    "is there {noun} on the {side}?",
    "does the {side} side show {noun}?",
)
_BOTH_SIDES = (
    "are there bilateral pleural effusions?",
    "is there a bilateral pleural effusion?",
    "is there a pleural effusion on both sides?",
    "do both sides show a pleural effusion?",
)
_SIZE = (
    "how large is the pleural effusion?",
    "how big is the effusion?",
    "what size is the pleural effusion?",
    "what is the size of the effusion?",
)
_ZONE = (
    "in which zone is the consolidation?",
    "which zone shows the consolidation?",
    "which lung zone is the consolidation in?",
    "is the consolidation in the upper, middle or lower zone?",
)
_DEVICE = (
    "which device is seen?",
    "what device is present?",
    "which device does the film show?",
    "which device is it?",
)
_ANY_DEVICE = ("is there any device?", "is any device seen?", "does the film show any device?", "can you see a device?")
_VIEW = (
    "which view is this?",
    "what view is this film?",
    "is this a frontal or a lateral film?",
    "what is the view of this radiograph?",
)
_IS_VIEW = ("is this a {view} film?", "is this a {view} view?", "is this a {view} chest radiograph?")


def ask_film(truth: Truth, rng: np.random.Generator, count: int) -> list[Question]:
    """`count` questions about a film, different ones as long as they last; a lateral film is asked for its view."""
    return _collect(truth, _LATERAL_ASKERS if truth.view == "LL" else _FRONTAL_ASKERS, rng, count)


def ask_scene(scene: Scene, rng: np.random.Generator, count: int) -> list[Question]:
    """`count` questions about a scene, different ones as long as they last."""
    return _collect(scene, _SCENE_ASKERS, rng, count)


def _collect(subject: _Subject, askers: _Askers[_Subject], rng: np.random.Generator, count: int) -> list[Question]:
    """Draw askers by their shares until `count` questions came together; one that has nothing to ask is passed over."""
    ways, ends = list(askers), np.cumsum(list(askers.values()))
    asked: list[Question] = []
    tries = 0
    while len(asked) < count:
        question = ways[int(np.searchsorted(ends, rng.uniform(0, ends[-1])))](subject, rng)
        if question is None:
            continue
        tries += 1
        if question.text not in {known.text for known in asked} or tries > DISTINCT_TRIES:
            asked.append(question)
            tries = 0
    return asked


def _pick(rng: np.random.Generator, choices: Sequence[str], weights: Sequence[float] | None = None) -> str:
    """One of `choices`, evenly or by `weights` of any sum."""
    if weights is None:
        return choices[int(rng.integers(len(choices)))]
    return choices[int(rng.choice(len(choices), p=np.asarray(weights) / sum(weights)))]


def _yes(verdict: bool) -> str:
    return "yes" if verdict else "no"


def _pick_finding(truth: Truth, rng: np.random.Generator, names: Sequence[str], present: bool) -> str | None:
    """A thing that is there, or one that is not; None when there is none of the kind.

    Both are weighed so that over all films a thing is asked for about as often when present as when absent, and rare
    ones more often than they are seen. The powers are tuned on the counts of answers of some thousand films.
    """
    fitting = [name for name in names if bool(truth.find(name)) == present]
    if not fitting:
        return None
    shares = np.array([PREVALENCE[name] for name in fitting])
    weights = shares**-0.9 if present else shares**0.5 / (1 - shares)
    return _pick(rng, fitting, weights.tolist())


def _ask_presence(truth: Truth, rng: np.random.Generator) -> Question | None:
    name = _pick_finding(truth, rng, list(PREVALENCE), present=rng.random() < 0.62)
    if name is None:
        return None
    shown = truth.find(name) is not None
    if name == "cardiomegaly" and rng.random() < 0.6:
        wordings, verdict = (_ENLARGED, shown) if rng.random() < 0.5 else (_NOT_ENLARGED, not shown)
        return Question(_pick(rng, wordings), _yes(verdict), "cardiomegaly")
    text = _pick(rng, _PRESENT).format(noun=_pick(rng, _NOUNS[name]))
    if name == "sternal wires":
        text = re.sub("^is ", "are ", text)
    return Question(text, _yes(shown), _name_group(name))


def _name_group(name: str) -> str:
    if name == "cardiomegaly":
        return name
    return "device_present" if name in DEVICES else f"{_shorten(name)}_present"


def _shorten(name: str) -> str:
    """`pleural effusion` is `effusion`: the last word names the thing, as scores do."""
    return name.split()[-1]


def _ask_side(truth: Truth, rng: np.random.Generator) -> Question | None:
    """Which side; now and then of something that is not there, which is on none."""
    name = _pick_finding(truth, rng, SIDED, present=rng.random() < 0.85)
    if name is None:
        return None
    found = truth.find(name)
    text = _pick(rng, _SIDE).format(bare=_name_bare(name))
    return Question(text, found.side if found else "none", f"{_shorten(name)}_side")


def _name_bare(name: str) -> str:
    return "lung nodule" if name == "nodule" else name


def _ask_on_side(truth: Truth, rng: np.random.Generator) -> Question | None:
    """Is it on this side? The no's are mostly films that have it on the other side."""
    name = _pick_finding(truth, rng, SIDED, present=rng.random() < 0.85)
    if name is None:
        return None
    found = truth.find(name)
    group = f"{_shorten(name)}_on_side"
    # Bilateral effusions are few: a film that has them is asked for both sides often, any other one seldom.
    if name == "pleural effusion" and rng.random() < (0.5 if found and found.side == "bilateral" else 0.15):
        return Question(_pick(rng, _BOTH_SIDES), _yes(bool(found) and len(truth.sides(name)) == 2), group)
    side = found.side if found and found.side in SIDES and rng.random() < 0.3 else _pick(rng, SIDES)
    wording = _pick(rng, _ON_SIDE if name != "atelectasis" else _ON_SIDE[1:])
    text = wording.format(side=side, bare=_name_bare(name), noun=_NOUNS[name][0])
    return Question(text, _yes(side in truth.sides(name)), group)


def _ask_size(truth: Truth, rng: np.random.Generator) -> Question | None:
    effusion = truth.find("pleural effusion")
    return Question(_pick(rng, _SIZE), effusion.size, "effusion_size") if effusion else None


def _ask_zone(truth: Truth, rng: np.random.Generator) -> Question | None:
    consolidation = truth.find("consolidation")
    return Question(_pick(rng, _ZONE), consolidation.zone, "consolidation_zone") if consolidation else None


def _ask_device(truth: Truth, rng: np.random.Generator) -> Question | None:
    """Which device, when there is one, or whether there is any; three films in five have none, and are asked less."""
    devices = [name for name in DEVICES if truth.find(name)]
    if rng.random() < 0.4:
        unasked = not devices and rng.random() > 0.6
        return None if unasked else Question(_pick(rng, _ANY_DEVICE), _yes(bool(devices)), "device_present")
    if len(devices) > 1 or (not devices and rng.random() > 1 / 6):
        return None
    return Question(_pick(rng, _DEVICE), devices[0] if devices else "none", "device")


def _ask_view(truth: Truth, rng: np.random.Generator) -> Question:
    view = "lateral" if truth.view == "LL" else "frontal"
    if rng.random() < 0.5:
        return Question(_pick(rng, _VIEW), view, "view")
    named = _pick(rng, VIEWS)
    return Question(_pick(rng, _IS_VIEW).format(view=named), _yes(named == view), "view")


# Lateral films are few (training.data.LATERAL_SHARE) and asked for nothing else; frontal ones are asked as rarely, so
# that either view is answered as often.
_LATERAL_ASKERS: _Askers[Truth] = {_ask_view: 1.0}
_FRONTAL_ASKERS: _Askers[Truth] = {
    _ask_presence: 0.45,
    _ask_side: 0.18,
    _ask_on_side: 0.12,
    _ask_size: 0.12,
    _ask_zone: 0.15,
    _ask_device: 0.13,
    _ask_view: 0.04,
}

_COLOUR = ("what colour is the {shape}?", "what color is the {shape}?", "which colour does the {shape} have?")
_COLOUR_ALONE = ("what colour is the shape?", "what color is it?", "which colour does the shape have?")
_SHAPE = (
    "what shape is {colour}?",
    "which shape is {colour}?",
    "what shape is the {colour} thing?",
    "what is the {colour} thing?",
)
_SHAPE_ALONE = ("what shape is this?", "which shape is in the picture?", "what shape is it?")
_COUNT = ("how many shapes are there?", "how many things are in the picture?", "how many shapes do you see?")
_COUNT_SHAPE = (
    "how many {shape}s are there?",
    "how many {shape}s are in the picture?",
    "how many {shape}s do you see?",
)
_THERE = ("is there {thing}?", "does the picture show {thing}?", "is {thing} in the picture?", "can you see {thing}?")
_BESIDE_COLOUR = (
    "what colour is the shape {relation} {other}?",
    "what color is the shape {relation} {other}?",
    "which colour does the thing {relation} {other} have?",
)
_BESIDE_SHAPE = (
    "what shape is {relation} {other}?",
    "which shape is {relation} {other}?",
    "what shape is the thing {relation} {other}?",
)
_IS_BESIDE = ("is {one} {relation} {other}?", "do you see {one} {relation} {other}?")
# One question for each line in which two things can stand; its answer is a word of the question.
_PLACE = {
    "above": "is {one} above or below {other}?",
    "left of": "is {one} left or right of {other}?",
}
_WORDINGS = {
    "above": ("above", "over"),
    "below": ("below", "under"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
}


def _ask_colour(scene: Scene, rng: np.random.Generator) -> Question | None:
    if len(scene.things) == 1 and rng.random() < 0.3:
        return Question(_pick(rng, _COLOUR_ALONE), scene.things[0].colour, "scene_colour")
    lone = [thing for thing in scene.things if _is_lone(scene, thing)]
    if not lone:
        return None
    thing = lone[int(rng.integers(len(lone)))]
    return Question(_pick(rng, _COLOUR).format(shape=thing.shape), thing.colour, "scene_colour")


def _is_lone(scene: Scene, thing: Thing) -> bool:
    """Whether `the circle` can only mean this one."""
    return [other.shape for other in scene.things].count(thing.shape) == 1


def _ask_shape(scene: Scene, rng: np.random.Generator) -> Question:
    if len(scene.things) == 1 and rng.random() < 0.3:
        return Question(_pick(rng, _SHAPE_ALONE), scene.things[0].shape, "scene_shape")
    thing = scene.things[int(rng.integers(len(scene.things)))]
    return Question(_pick(rng, _SHAPE).format(colour=thing.colour), thing.shape, "scene_shape")


def _ask_count(scene: Scene, rng: np.random.Generator) -> Question | None:
    """How many shapes, as often one as two; or how many of one shape, mostly of one that is there."""
    if rng.random() < 0.5:
        shown = [thing.shape for thing in scene.things]
        shape = _pick(rng, SHAPES, [2.0 if shape in shown else 0.7 for shape in SHAPES])
        return Question(_pick(rng, _COUNT_SHAPE).format(shape=shape), NUMBERS[shown.count(shape)], "scene_count")
    if len(scene.things) == 2 and rng.random() > 3 / 7:  # 3 of 10 scenes show one thing
        return None
    return Question(_pick(rng, _COUNT), NUMBERS[len(scene.things)], "scene_count")


def _ask_thing(scene: Scene, rng: np.random.Generator) -> Question:
    """Is there a thing, a shape or a colour?"""
    present, kind = bool(rng.random() < 0.5), rng.random()
    colours, shapes = [thing.colour for thing in scene.things], [thing.shape for thing in scene.things]
    if kind < 0.2:
        shape = _pick(rng, shapes if present else [s for s in SHAPES if s not in shapes])
        return Question(_pick(rng, _THERE).format(thing=f"a {shape}"), _yes(present), "scene_present")
    if kind < 0.4:
        colour = _pick(rng, colours if present else [c for c in COLOURS if c not in colours])
        return Question(_pick(rng, _THERE).format(thing=f"anything {colour}"), _yes(present), "scene_present")
    things = scene.things if present else _mix_things(scene, rng)
    thing = things[int(rng.integers(len(things)))]
    return Question(_pick(rng, _THERE).format(thing=thing.words), _yes(present), "scene_thing")


def _mix_things(scene: Scene, rng: np.random.Generator) -> tuple[Thing, ...]:
    """Things that are nearly there: a colour that is seen on another shape, or a shape that is seen in another."""
    colours, shapes = [thing.colour for thing in scene.things], [thing.shape for thing in scene.things]
    if rng.random() < 0.6:
        return tuple(thing for c in colours for s in SHAPES if (thing := Thing(s, c)) not in scene.things)
    return tuple(Thing(s, c) for c in COLOURS if c not in colours for s in shapes)


def _name_thing(scene: Scene, thing: Thing, rng: np.random.Generator) -> str:
    """`the red circle`, or shorter where that means it alone."""
    kind = rng.random()
    if kind < 0.2 and _is_lone(scene, thing):
        return f"the {thing.shape}"
    return f"the {thing.colour} thing" if kind > 0.8 else f"the {thing.colour} {thing.shape}"


def _ask_beside(scene: Scene, rng: np.random.Generator) -> Question | None:
    """What stands beside a thing; only along the line of the two, for across it they drift a little.

    A third of these ask for the far side, where nothing is: else the other thing would answer without the relation.
    """
    if not scene.relation:
        return None
    place = int(rng.integers(2))
    other, reference = scene.things[place], scene.things[1 - place]
    relation = _relate(scene, place)
    empty = bool(rng.random() < 1 / 3)
    words = _pick(rng, _WORDINGS[_turn(relation) if empty else relation])
    named = _name_thing(scene, reference, rng)
    wordings, answer = (_BESIDE_COLOUR, other.colour) if rng.random() < 0.5 else (_BESIDE_SHAPE, other.shape)
    text = _pick(rng, wordings).format(relation=words, other=named)
    return Question(text, "none" if empty else answer, "scene_relation")


def _relate(scene: Scene, place: int) -> str:
    """Where the thing at `place` stands from the other one."""
    return scene.relation if place == 0 else _turn(scene.relation)


def _turn(relation: str) -> str:
    """The opposite relation."""
    opposites = {first: opposite for first, (opposite, _, _) in RELATIONS.items()}
    return opposites.get(relation) or next(first for first, second in opposites.items() if second == relation)


def _ask_place(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Is this thing on that side of the other, or on which of two sides?"""
    if not scene.relation:
        return None
    place = int(rng.integers(2))
    relation = _relate(scene, place)
    one, other = (_name_thing(scene, scene.things[i], rng) for i in (place, 1 - place))
    if rng.random() < 0.4:
        return Question(_PLACE[scene.relation].format(one=one, other=other), relation.split()[0], "scene_place")
    true = bool(rng.random() < 0.5)
    words = _pick(rng, _WORDINGS[relation if true else _turn(relation)])
    text = _pick(rng, _IS_BESIDE).format(one=one, relation=words, other=other)
    return Question(text, _yes(true), "scene_place")


_SCENE_ASKERS: _Askers[Scene] = {
    _ask_colour: 0.2,
    _ask_shape: 0.15,
    _ask_count: 0.15,
    _ask_thing: 0.25,
    _ask_beside: 0.2,
    _ask_place: 0.15,
}


def every_answer() -> list[str]:
    """All answers that can be given, sorted."""
    places = ("above", "below", "left", "right")
    known = (*SIDES, "bilateral", *EFFUSION_SIZES, *ZONES, *DEVICES, *VIEWS, *COLOURS, *SHAPES, *NUMBERS, *places)
    return sorted({"yes", "no", *known})


def every_word() -> list[str]:
    """All words that questions can hold, sorted, for a tokenizer's vocabulary."""
    film = (_PRESENT, _ENLARGED, _NOT_ENLARGED, _SIDE, _ON_SIDE, _BOTH_SIDES, _SIZE, _ZONE, _DEVICE, _ANY_DEVICE)
    scene = (_VIEW, _IS_VIEW, _COLOUR, _COLOUR_ALONE, _SHAPE, _SHAPE_ALONE, _COUNT, _COUNT_SHAPE, _THERE)
    beside = (_BESIDE_COLOUR, _BESIDE_SHAPE, _IS_BESIDE, tuple(_PLACE.values()), *_WORDINGS.values(), *_NOUNS.values())
    fillers = [*SIDES, *VIEWS, *map(_name_bare, SIDED), *COLOURS, *SHAPES, *(f"{shape}s" for shape in SHAPES)]
    wordings = [re.sub(r"\{\w+\}s?", " ", text) for group in (*film, *scene, *beside) for text in group]
    texts = [*wordings, *fillers, "are a an anything the thing"]
    return sorted({word for text in texts for word in re.findall(r"[a-z]+", text)})


def soft_scores(answers: Sequence[str], index: Mapping[str, int], size: int) -> NDArray[np.float32]:
    """Targets float32 [size] for people's `answers` to one question; `index` gives each known answer's place.

    An answer scores min(1, matches / 3), averaged over the sets that leave one of the n answers out (Antol et al.,
    VQA, ICCV 2015, and its evaluation); of ten answers, 1, 2, 3 and 4 alike score .3, .6, .9 and 1. Unknown answers are
    dropped, and place 0 ("<unk>") stays 0. Answers are compared as they are given. Where one answer is known to be
    right, give it ten times: by this rule, an answer nobody else gave of fewer than two scores 0.
    """
    scores = np.zeros(size, dtype=np.float32)
    total = len(answers)
    for answer in set(answers):
        place = index.get(answer, 0)
        if place:
            alike = answers.count(answer)
            agreement = alike * min(1, (alike - 1) / 3) + (total - alike) * min(1, alike / 3)
            scores[place] = agreement / total
    return scores
