"""What a model is asked when it is evaluated, and what it said. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from readroom.errors import ItemError

ImageLike = Any
"""A file, or pixels: what models/predict.py takes."""


@dataclass(frozen=True, slots=True, eq=False)  # arrays have no single answer to whether they are equal
class Item:
    """One thing to be said: the caption of a picture, or, with a `question`, an answer.

    `references` are the right texts, `group` the kind of item that scores are also given for. `picture` names the
    picture: intervals resample pictures, and items of one picture that follow each other share its decoding.
    """

    name: str
    picture: str
    image: ImageLike
    references: tuple[str, ...]
    group: str = ""
    question: str = ""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What was said of an item: `text`, or why nothing could be said (`error`)."""

    item: str
    picture: str
    group: str
    question: str
    references: tuple[str, ...]
    text: str = ""
    error: str = ""


def make_prediction(item: Item, said: str | ItemError) -> Prediction:
    """An item with what was said of it."""
    text, error = ("", str(said)) if isinstance(said, ItemError) else (said, "")
    return Prediction(item.name, item.picture, item.group, item.question, item.references, text, error)


def write_predictions(predictions: Iterable[Prediction], out: TextIO, described: Mapping[str, Any]) -> None:
    """A JSON object a line, each with `described` (model, checkpoint, data set) in front."""
    for prediction in predictions:
        out.write(json.dumps({**described, **asdict(prediction)}, ensure_ascii=False) + "\n")
