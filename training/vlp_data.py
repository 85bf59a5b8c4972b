"""What a VLP learns from, piece by piece: texts packed in arrays, pictures read when their turn comes, lessons of both.

Hundreds of thousands of captions fit into memory, pictures do not. Lessons are made in other processes than the one
that trains; texts stand in few large arrays, because reading Python's own lists would copy them into each process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from models.pixels import render_file
from models.tensors import stack_pictures
from models.vlp.config import VlpConfig
from models.vlp.layout import SpecialIds
from models.vlp.regions import RegionSpec
from models.vlp.tokenizer import CasedTokenizer
from readroom.errors import BadCall, CheckpointMissing, ImageError
from readroom.records import ImageRef
from training.questions import soft_scores
from training.vlp_objective import MaskingPlan, mask_texts
from training.vlp_recipe import AnswerPlan
from training.vlp_trainer import AnswerPart, CaptionPart, Lesson

UNKNOWN_ANSWER = "<unk>"  # place 0 of every answer list, never given
# Of random numbers, so that no two parts of a training draw the same ones.
ORDER, MASKS, SPLIT = 1, 2, 3


@dataclass(frozen=True, slots=True)
class Sample:
    """What a PictureReader reads, and a text about it: a caption, or a question with people's answers."""

    picture: str
    text: str
    answers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Skipped:
    """A picture that could not be read, and why."""

    picture: str
    reason: str


class PictureReader(Protocol):
    """Reads a picture, or what stands in its place, and stacks some. Used in several processes."""

    def read(self, picture: str) -> Any:
        """One picture. Raises ImageError."""
        ...

    def stack(self, pictures: Sequence[Any]) -> Any:
        """What a Learner looks at."""
        ...


class FilePictures:
    """Picture files, rendered as the checkpoint's profile says."""

    def __init__(self, spec: RegionSpec, profile: str) -> None:
        self.size, self.profile = spec.image_size, profile

    def read(self, picture: str) -> Any:
        """uint8 [S, S, 3] of a file. Raises ImageError."""
        return render_file(picture, self.profile, self.size)

    def stack(self, pictures: Sequence[Any]) -> Any:
        """uint8 [N, S, S, 3]."""
        return stack_pictures(pictures, self.size)


class FeaturePictures:
    """Regions that a detector computed before, by the names of picture files that need not be there.

    HDF5 files are opened by the process that reads them: a handle must not be shared with another one.
    """

    def __init__(self, spec: RegionSpec, region_dir: Path | None) -> None:
        """Raise CheckpointMissing when there are no such features."""
        self.spec, self.region_dir = spec, region_dir
        self.provider: Any = None
        self._open()

    def read(self, picture: str) -> Any:
        """The regions of one picture. Raises ImageError."""
        self.provider = self.provider or self._open()
        return self.provider.reader.read(ImageRef(picture))

    def stack(self, pictures: Sequence[Any]) -> Any:
        """Regions on the host."""
        self.provider = self.provider or self._open()
        return self.provider.prepare(pictures)

    def _open(self) -> Any:
        try:
            from models.vlp.precomputed import open_precomputed
        except ImportError:
            raise CheckpointMissing(
                "precomputed regions are HDF5 files, and h5py is missing", "pip install 'readroom[regions]'"
            ) from None
        return open_precomputed(self.spec, torch.device("cpu"), self.region_dir)


# Texts ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ragged:
    """Many short rows of numbers in two arrays."""

    values: NDArray[Any]
    ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> NDArray[Any]:
        return self.values[self.ends[number - 1] if number else 0 : self.ends[number]]


def pack_rows(rows: Iterable[Any], kind: Any) -> Ragged:
    """Rows of numbers packed."""
    listed = [np.asarray(row, dtype=kind) for row in rows]
    lengths = [len(row) for row in listed]
    values = np.concatenate(listed) if listed else np.zeros(0, dtype=kind)
    return Ragged(values, np.cumsum(lengths, dtype=np.int64))


@dataclass(frozen=True, slots=True)
class TextSet:
    """Texts and the pictures they are about.

    `pictures` holds each picture once, `about` the picture's place for each text, `tokens` the texts; of questions,
    `places` the answers people gave and `scores` their soft scores.
    """

    pictures: NDArray[np.str_]
    about: NDArray[np.int32]
    tokens: Ragged
    places: Ragged | None = None
    scores: Ragged | None = None

    def __len__(self) -> int:
        return len(self.about)

    def score(self, numbers: NDArray[Any], classes: int) -> torch.Tensor:
        """Soft scores [N, classes] of these questions."""
        assert self.places is not None and self.scores is not None
        table = np.zeros((len(numbers), classes), dtype=np.float32)
        for row, number in enumerate(numbers):
            table[row, self.places[number]] = self.scores[number]
        return torch.from_numpy(table)


def pack_texts(samples: Sequence[Sample], tokenizer: CasedTokenizer, answers: Sequence[str] = ()) -> TextSet:
    """Samples packed; with `answers`, their soft scores too. Raises BadCall when there are none."""
    if not samples:
        raise BadCall("there is not one picture with a text to learn from", "Look at what was skipped.")
    known: dict[str, int] = {}
    about = [known.setdefault(sample.picture, len(known)) for sample in samples]
    tokens = pack_rows((tokenizer.encode(sample.text) for sample in samples), np.int32)
    packed = TextSet(np.array(list(known)), np.array(about, dtype=np.int32), tokens)
    if not answers:
        return packed
    index = {answer: place for place, answer in enumerate(answers)}
    tables = [soft_scores([fold_answer(one) for one in sample.answers], index, len(index)) for sample in samples]
    given = [np.flatnonzero(table) for table in tables]
    scores = [table[places] for table, places in zip(tables, given, strict=True)]
    return TextSet(packed.pictures, packed.about, tokens, pack_rows(given, np.int32), pack_rows(scores, np.float32))


def split_samples(samples: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Samples to learn from, and those of `share` of the pictures, at least one, to validate with."""
    pictures = sorted({sample.picture for sample in samples})
    order = np.random.default_rng([seed, SPLIT]).permutation(len(pictures))
    kept = {pictures[place] for place in order[: max(1, round(share * len(pictures)))]}
    learned = [sample for sample in samples if sample.picture not in kept]
    return learned, [sample for sample in samples if sample.picture in kept]


# Answers -------------------------------------------------------------------------------------------------------------


def fold_answer(text: str) -> str:
    """An answer as it is counted and given: lower case, no comma or question mark, single spaces.

    The release's answers went through the like (`simple_word` of Pythia); the VQA evaluation folds more than this.
    """
    return " ".join(text.lower().replace(",", "").replace("?", "").split())


def choose_answers(samples: Iterable[Sample], plan: AnswerPlan) -> list[str]:
    """The answer head's classes, the most frequent first, "<unk>" before all.

    A question counts for the answer most people gave. 3,129 classes of nine questions or more are the usual choice
    (Teney et al., Tips and Tricks for VQA, CVPR 2018, and the release's list). Raises BadCall when none is as frequent.
    """
    counts = Counter(find_common(sample.answers) for sample in samples if sample.answers)
    frequent = [answer for answer, count in counts.items() if count >= plan.least and answer]
    if not frequent:
        raise BadCall(f"no answer was given to {plan.least} questions", "Lower [answers] least in the recipe.")
    ordered = sorted(frequent, key=lambda answer: (-counts[answer], answer))
    return [UNKNOWN_ANSWER, *ordered[: plan.most - 1]]


def find_common(answers: Sequence[str]) -> str:
    """The answer most people gave; of equally frequent ones, the first."""
    return Counter(map(fold_answer, answers)).most_common(1)[0][0]


# Lessons -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LessonPlan:
    """How lessons are made of texts: `classes` of answers, 0 for captions; `seed` and `epoch` decide what is masked."""

    masking: MaskingPlan
    sizes: VlpConfig
    special: SpecialIds
    classes: int
    seed: int
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class MadeLesson:
    """A lesson, None where no picture of it could be read, and the pictures that could not."""

    lesson: Lesson | None
    skipped: tuple[Skipped, ...]


class Lessons(Dataset[MadeLesson]):
    """The lessons of one epoch; the same numbers give the same lesson in whatever process it is made."""

    def __init__(
        self, texts: TextSet, reader: PictureReader, plan: LessonPlan, parts: Sequence[NDArray[np.int64]]
    ) -> None:
        self.texts, self.reader, self.plan, self.parts = texts, reader, plan, parts

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> MadeLesson:
        if number >= len(self):
            raise IndexError
        read, skipped = self._read_pictures(self.parts[number])
        numbers = np.array([one for one in self.parts[number] if int(self.texts.about[one]) in read], dtype=np.int64)
        if not len(numbers):
            return MadeLesson(None, skipped)
        rng = np.random.default_rng([self.plan.seed, MASKS, self.plan.epoch, number])
        tokens = [self.texts.tokens[one].tolist() for one in numbers]
        masked = mask_texts(tokens, self.plan.masking, self.plan.sizes, self.plan.special, rng)
        places = {picture: row for row, picture in enumerate(read)}
        rows = torch.tensor([places[int(self.texts.about[one])] for one in numbers])
        images = self.reader.stack(list(read.values()))
        if not self.plan.classes:
            return MadeLesson(Lesson(images, captions=CaptionPart(masked, rows)), skipped)
        asked = AnswerPart(masked, rows, self.texts.score(numbers, self.plan.classes))
        return MadeLesson(Lesson(images, answers=asked), skipped)

    def _read_pictures(self, numbers: NDArray[np.int64]) -> tuple[dict[int, Any], tuple[Skipped, ...]]:
        """The pictures of these texts, each once, and those that cannot be read."""
        read, skipped = {}, []
        for place in dict.fromkeys(self.texts.about[numbers].tolist()):
            picture = str(self.texts.pictures[place])
            try:
                read[place] = self.reader.read(picture)
            except ImageError as error:
                skipped.append(Skipped(picture, str(error)))
        return read, tuple(skipped)


Batches = list[list[NDArray[np.int64]]]


def plan_batches(count: int, batch_size: int, forward_size: int, seed: int, epoch: int) -> Batches:
    """The texts of each batch of an epoch, in random order, each batch in parts that are run one after the other."""
    order = np.random.default_rng([seed, ORDER, epoch]).permutation(count)
    batches = [order[first : first + batch_size] for first in range(0, count, batch_size)]
    return [split_batch(batch, forward_size) for batch in batches]


def split_batch(numbers: NDArray[np.int64], most: int) -> list[NDArray[np.int64]]:
    """A batch in as few parts of at most `most` as there can be, all about as large."""
    return list(np.array_split(numbers, -(-len(numbers) // most)))


def load_lessons(lessons: Lessons, workers: int) -> Iterator[MadeLesson]:
    """The lessons in order, made by `workers` other processes ahead of time; 0: made here when asked for."""
    if not workers:
        return iter(lessons)
    return iter(DataLoader(lessons, batch_size=None, num_workers=workers))
