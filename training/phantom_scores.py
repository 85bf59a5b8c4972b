"""Captions and answers about phantoms against the exact truth. No torch.

Side is the patient's side; only what a caption states counts, so a denied finding is an absent one. Capitals and blanks
never count: some decoders leave marks apart from their words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

from training.intervals import Numbers, Score, Tally, divide, measure_tallies, tally_share
from training.predictions import Prediction

FILM, SCENE = "film", "scene"  # groups of items that ask for a caption; a question's group is its kind
ANSWER_PREFIX = "answer:"

FINDING_WORDS = {
    "cardiomegaly": "cardiomegaly",
    "effusion": "pleural effusion",
    "pneumothorax": "pneumothorax",
    "consolidation": "consolidation",
    "edema": "pulmonary edema",
    "atelectasis": "atelectasis",
    "nodule": "nodule",
    "pacemaker": "pacemaker",
    "central_line": "central line",
    "endotracheal_tube": "endotracheal tube",
    "enteric_tube": "enteric tube",
    "sternal_wires": "sternal wires",
}


def tidy_text(text: str) -> str:
    """Lower case, one blank between words and none before a mark."""
    return re.sub(r" ([.,;:?!])", r"\1", " ".join(text.lower().split()))


def parse_finding(caption: str, words: str) -> str:
    """How a caption names a finding: "" when absent or denied, else its side, or "present" when it has none."""
    for sentence in tidy_text(caption).split("."):
        if words in sentence and not sentence.strip().startswith("no "):
            side = re.search(r"\b(left|right|bilateral)\b", sentence)
            return side.group(1) if side else "present"
    return ""


def parse_size(caption: str) -> str:
    """The size of the effusion a caption names, or ""."""
    named = re.search(r"(small|moderate|large) \w+ pleural effusion", tidy_text(caption))
    return named.group(1) if named else ""


def parse_things(caption: str) -> list[tuple[str, str]]:
    """Colour and shape of each object a scene's caption names, in its order."""
    return re.findall(r"\ban? (\w+) (circle|square|triangle)\b", tidy_text(caption))


# Scores --------------------------------------------------------------------------------------------------------------


def score_phantoms(predictions: Sequence[Prediction]) -> dict[str, Score]:
    """Scores of everything that was said of films and scenes; what could not be said counts nowhere."""
    said = [prediction for prediction in predictions if not prediction.error]
    films, scenes = (_pair_captions(said, group) for group in (FILM, SCENE))
    tallies = tally_films(*films) if films[0] else {}
    tallies |= tally_scenes(*scenes) if scenes[0] else {}
    return measure_tallies(tallies | tally_answers([prediction for prediction in said if prediction.question]))


def count_phantoms(predictions: Sequence[Prediction]) -> dict[str, int]:
    """How many frontal films, scenes and questions there were; what was not asked is left out."""
    asked = [prediction for prediction in predictions if prediction.question]
    films, scenes = (_pair_captions(predictions, group)[0] for group in (FILM, SCENE))
    frontal = [truth for truth in films if truth.startswith("frontal")]
    counts = {"films": len(frontal), "scenes": len(scenes), "answers": len(asked)}
    return {name: count for name, count in counts.items() if count}


def _pair_captions(predictions: Sequence[Prediction], group: str) -> tuple[list[str], list[str]]:
    """Truths and captions."""
    found = [prediction for prediction in predictions if prediction.group == group and not prediction.question]
    return [prediction.references[0] for prediction in found], [prediction.text for prediction in found]


def tally_films(truths: Sequence[str], captions: Sequence[str]) -> dict[str, Tally]:
    """Agreement of captions with the exact truth on frontal films; `view` and `whole_caption` on lateral ones too.

    `effusion_side` counts films whose effusion's side (none, left, right, bilateral) is named right; `<finding>_f1` is
    over present/absent with n the films that show it, `hallucination` the share of films on which something absent is
    named.
    """
    pairs = [(tidy_text(truth), tidy_text(caption)) for truth, caption in zip(truths, captions, strict=True)]
    frontal, every = _mark(truth.startswith("frontal") for truth, _ in pairs), np.ones(len(pairs))
    sized = frontal * _mark(bool(parse_size(truth)) for truth, _ in pairs)
    same_size = _mark(parse_size(truth) == parse_size(caption) for truth, caption in pairs)
    same_view = _mark(truth.split(".")[0] == caption.split(".")[0] for truth, caption in pairs)
    invented = _mark(_invents(truth, caption) for truth, caption in pairs)
    tallies = {
        "effusion_side": tally_share(frontal * _match_finding(pairs, "pleural effusion"), frontal),
        "effusion_size": tally_share(sized * same_size, sized),
        "cardiomegaly": tally_share(frontal * _match_finding(pairs, "cardiomegaly"), frontal),
        "view": tally_share(same_view, every),
        "whole_caption": tally_share(_mark(truth == caption for truth, caption in pairs), every),
        "hallucination": tally_share(frontal * invented, frontal),
    }
    return tallies | {f"{name}_f1": _tally_f1(pairs, frontal, words) for name, words in FINDING_WORDS.items()}


def tally_scenes(truths: Sequence[str], captions: Sequence[str]) -> dict[str, Tally]:
    """Agreement on scenes: all shapes, all colours, both together, and the whole caption with its relation."""
    named = [(parse_things(truth), parse_things(caption)) for truth, caption in zip(truths, captions, strict=True)]
    whole = (tidy_text(truth) == tidy_text(caption) for truth, caption in zip(truths, captions, strict=True))
    verdicts = {
        "shape": _mark([shape for _, shape in truth] == [shape for _, shape in said] for truth, said in named),
        "colour": _mark([colour for colour, _ in truth] == [colour for colour, _ in said] for truth, said in named),
        "shape_and_colour": _mark(truth == said for truth, said in named),
        "scene_caption": _mark(whole),
    }
    return {name: tally_share(right, np.ones(len(named))) for name, right in verdicts.items()}


def tally_answers(predictions: Sequence[Prediction]) -> dict[str, Tally]:
    """`answer_accuracy` of exact answers, and `answer:<group>` of each kind of question; {} without any."""
    right = [float(tidy_text(one.text) in map(tidy_text, one.references)) for one in predictions]
    return tally_by_group(predictions, right)


def tally_by_group(predictions: Sequence[Prediction], right: Sequence[float]) -> dict[str, Tally]:
    """The mean of `right`, 0 to 1 an answer, over all answers and over those of each group; {} without any."""
    rows = {picture: row for row, picture in enumerate(dict.fromkeys(one.picture for one in predictions))}
    groups = sorted({one.group for one in predictions if one.group})
    names = ["answer_accuracy", *(f"{ANSWER_PREFIX}{group}" for group in groups)]
    sums = {name: np.zeros((2, len(rows))) for name in names}
    for prediction, value in zip(predictions, right, strict=True):
        for name in ("answer_accuracy", f"{ANSWER_PREFIX}{prediction.group}"):
            if name in sums:
                sums[name][:, rows[prediction.picture]] += (value, 1)
    return {name: tally_share(hits, asked) for name, (hits, asked) in sums.items()} if rows else {}


def _mark(verdicts: Iterable[bool]) -> Numbers:
    return np.array(list(verdicts), dtype=np.float64)


def _match_finding(pairs: Sequence[tuple[str, str]], words: str) -> Numbers:
    return _mark(parse_finding(truth, words) == parse_finding(caption, words) for truth, caption in pairs)


def _invents(truth: str, caption: str) -> bool:
    return any(parse_finding(caption, words) and not parse_finding(truth, words) for words in FINDING_WORDS.values())


def _tally_f1(pairs: Sequence[tuple[str, str]], frontal: Numbers, words: str) -> Tally:
    """F1 of present against absent, the side included: a finding on the wrong side is a miss and a false alarm."""
    parsed = [(parse_finding(truth, words), parse_finding(caption, words)) for truth, caption in pairs]
    verdicts = [(bool(t) and t == c, bool(t) and t != c, bool(c) and t != c) for t, c in parsed]
    parts = np.array(verdicts, dtype=np.float64).reshape(-1, 3) * frontal[:, None]
    return Tally(parts, _combine_f1, round(parts[:, :2].sum()))


def _combine_f1(sums: Numbers) -> Numbers:
    """F1 from hits, misses and false alarms."""
    hits, misses, alarms = sums[..., 0], sums[..., 1], sums[..., 2]
    return divide(2 * hits, 2 * hits + misses + alarms)
