"""Run a model on items and on held-out phantoms, through the same three steps that serve it (models/base.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

from models.base import Answerer, Captioner, Model, Picture, run_answerer, run_captioner
from models.checkpoint import CheckpointSource, resolve_folder
from models.load import load_answerer, load_captioner
from models.predict import ImageLike, load_picture
from readroom.errors import BadCall, ItemError
from readroom.records import GeneratedText, GenerationSettings
from training import vlp_examples
from training.data import TEST_SEED
from training.floors import QUESTIONS, learn_floor, say_floor
from training.phantom_scores import FILM, SCENE, count_phantoms, score_phantoms
from training.predictions import Item, Prediction, make_prediction

HELD_OUT = 200  # films and scenes each
BATCH = 32

Report = Callable[[int, int], None]
"""Hears how many of how many items are done."""


@dataclass(frozen=True, slots=True)
class Subject:
    """Who is evaluated: what a checkpoint captions and answers with, None for what it cannot do.

    `settings` are those of captions; None means the checkpoint's own.
    """

    captioner: Captioner | None
    answerer: Answerer | None
    settings: GenerationSettings | None = None

    @property
    def model(self) -> Model:
        """Either, for what they share."""
        model = self.captioner or self.answerer
        assert model is not None  # every checkpoint has a task
        return model


def load_subject(
    source: CheckpointSource,
    device: str = "auto",
    precision: str = "float32",
    region_dir: Path | None = None,
    settings: GenerationSettings | None = None,
    tasks: Sequence[str] = ("caption", "answer"),
) -> Subject:
    """Load a checkpoint for those of its `tasks` that its manifest names; without a manifest, for the first of them.

    Raises CheckpointMissing, CheckpointBroken.
    """
    does = list_tasks(source, tasks)
    return Subject(
        load_captioner(source, device, precision, region_dir) if "caption" in does else None,
        load_answerer(source, device, precision, region_dir) if "answer" in does else None,
        settings,
    )


def list_tasks(source: CheckpointSource, tasks: Sequence[str]) -> list[str]:
    """Which of `tasks` a checkpoint can do. Raises CheckpointBroken when it can do none."""
    if source.manifest is None:
        return list(tasks[:1])
    does = [task for task in tasks if task in source.manifest.task.split("+")]
    if not does:
        source.check_task(tasks[0])
    return does


# Items ---------------------------------------------------------------------------------------------------------------


def predict_items(
    subject: Subject, items: Sequence[Item], batch_size: int = BATCH, report: Report | None = None
) -> list[Prediction]:
    """What the subject says of each item, in order: items with a question are answered, the others captioned.

    A picture that cannot be had gives predictions with an error; the others go on.
    """
    found: list[Prediction] = []
    captions = [item for item in items if not item.question]
    questions = [item for item in items if item.question]
    for batch in [*cut_batches(captions, batch_size), *cut_batches(questions, batch_size)]:
        found += predict_batch(subject, batch)
        if report:
            report(len(found), len(items))
    return found


def cut_batches(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """Items in lists of at most `size`."""
    left = iter(items)
    while batch := list(islice(left, size)):
        yield batch


def predict_batch(subject: Subject, batch: Sequence[Item]) -> list[Prediction]:
    """What is said of items of one kind; each picture is loaded once."""
    pictures = {item.picture: item.image for item in batch}
    seen = {name: see_picture(subject.model, image) for name, image in pictures.items()}
    failed = {name: picture for name, picture in seen.items() if isinstance(picture, ItemError)}
    shown = {name: picture for name, picture in seen.items() if not isinstance(picture, ItemError)}
    good = [item for item in batch if item.picture in shown]
    texts = iter(run_subject(subject, good, [shown[item.picture] for item in good]))
    return [make_prediction(item, failed.get(item.picture) or next(texts).text) for item in batch]


def see_picture(model: Model, image: ImageLike) -> Picture | ItemError:
    """A picture as the model sees it, or why it cannot be had."""
    try:
        return load_picture(image, model.profile, model.image_size, model.reader)
    except ItemError as error:
        return error


def run_subject(subject: Subject, items: Sequence[Item], pictures: Sequence[Picture]) -> list[GeneratedText]:
    """One text an item; the items are all questions or all captions."""
    if not items:
        return []
    if items[0].question:
        assert subject.answerer is not None  # nobody asks who cannot answer
        return run_answerer(subject.answerer, pictures, [item.question for item in items])
    assert subject.captioner is not None
    return run_captioner(subject.captioner, pictures, subject.settings)


# Phantoms ------------------------------------------------------------------------------------------------------------


def list_phantoms(subject: Subject, films: int, scenes: int, first_seed: int = TEST_SEED) -> list[Item]:
    """Films and scenes with the seeds from `first_seed` on: a caption of each, and questions where they are answered.

    Raises BadCall for a model that does not see pixels.
    """
    if subject.model.reader is not None:
        raise BadCall(
            "phantoms are pixels, and this checkpoint reads region features",
            "Name one whose regions come from pixels, or another data set.",
        )
    drawn = draw_phantoms(subject.model.image_size, films, scenes, first_seed)
    captions = [item for item in drawn if subject.captioner and not item.question]
    return captions + [item for item in drawn if subject.answerer and item.question]


@lru_cache(maxsize=1)  # models that stand side by side see the same pictures
def draw_phantoms(size: int, films: int, scenes: int, first_seed: int) -> list[Item]:
    """All items of `films` films and `scenes` scenes, their pictures at the model's size."""
    groups = {
        FILM: (films, vlp_examples.make_film_example),
        SCENE: (scenes, vlp_examples.make_scene_example),
    }
    return [
        item
        for group, (count, make) in groups.items()
        for seed in range(first_seed, first_seed + count)
        for item in _make_items(f"{group}:{seed}", group, make(size, QUESTIONS, seed))
    ]


def _make_items(name: str, group: str, example: vlp_examples.Example) -> Iterator[Item]:
    pixels, caption, questions = example
    image = pixels.transpose(1, 2, 0)
    yield Item(name, name, image, (caption,), group)
    for number, question in enumerate(questions):
        yield Item(f"{name}:{number}", name, image, (question.answer,), question.group, question.text)


def score_checkpoint(
    folder: Path, films: int = HELD_OUT, scenes: int = HELD_OUT, first_seed: int = TEST_SEED
) -> dict[str, float]:
    """Scores of a checkpoint folder on held-out phantoms from `first_seed` on, as its manifest carries them.

    Captions always; where it answers, answers beside `answer_floor`, what the most frequent answer of each kind of
    question would score.
    """
    subject = load_subject(resolve_folder(folder.resolve()))
    predictions = predict_items(subject, list_phantoms(subject, films, scenes, first_seed))
    scores = {name: float(count) for name, count in count_phantoms(predictions).items()}
    scores |= {name: score.value for name, score in score_phantoms(predictions).items()}
    if "answers" in scores:
        floor = score_phantoms(say_floor(predictions, learn_floor()))
        scores["answer_floor"] = floor["answer_accuracy"].value
    return scores
