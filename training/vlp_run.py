"""Train a VLP by a recipe: captions, or questions and answers, epoch by epoch, with a checkpoint after each.

Zhou et al., AAAI 2020; where paper and release differ, as the release does. The folder of a run:

metrics.jsonl   a JSON object a line: losses every few steps, the validation after each epoch
recipe.json     what was asked for
skipped.jsonl   pictures that could not be read; only when there are some
last, best      checkpoint folders: of the last epoch, and of the one with the lowest validation loss
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import Progress

from models.device import pick_device
from models.vlp.folder import save_checkpoint
from readroom.errors import BadCall, LossNotFinite, OutOfMemory
from training.vlp_data import (
    FeaturePictures,
    FilePictures,
    LessonPlan,
    Lessons,
    PictureReader,
    Sample,
    Skipped,
    TextSet,
    choose_answers,
    load_lessons,
    pack_texts,
    plan_batches,
    split_batch,
    split_samples,
)
from training.vlp_objective import DROP_WORST_AFTER, QUESTION_MASKING, MaskingPlan
from training.vlp_phantoms import PhantomPictures
from training.vlp_publish import copy_folder, replace_folder
from training.vlp_recipe import Recipe
from training.vlp_start import Start, add_answers
from training.vlp_trainer import (
    Course,
    Learner,
    Lesson,
    Losses,
    Objective,
    examine,
    open_accelerator,
    start_course,
    take_step,
)

Tell = Callable[[str], None]
"""Hears a line for people: what is learned from, and what came of each epoch."""

LOG_EVERY_STEPS = 25
METRICS_NAME, RECIPE_NAME, SKIPPED_NAME = "metrics.jsonl", "recipe.json", "skipped.jsonl"
LAST, BEST = "last", "best"
# Of questions when answers are scored.
UNMASKED = MaskingPlan(share=0.0, most=0, s2s=0.0)
# What a checkpoint of a task can do. Where it has the other head too, that one was not looked after.
MANIFEST_TASKS = {"caption": "caption", "vqa": "answer"}


@dataclass(frozen=True, slots=True)
class Material:
    """Samples to learn from and to validate with; `name` says which data they are.

    Without samples to validate with, some pictures are kept back. `kind` says what a sample's picture is: a file, a
    phantom's name, or the name of a file whose regions were computed before. `skipped` could not be found.
    """

    name: str
    train: Sequence[Sample]
    validation: Sequence[Sample] = ()
    kind: str = "files"  # or phantoms, features
    skipped: tuple[Skipped, ...] = ()


@dataclass(frozen=True, slots=True)
class Epoch:
    """What came of an epoch: mean losses, and the mean soft score of answers where there are any."""

    number: int
    loss: float
    validation_loss: float
    accuracy: float | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Trained:
    """What came of a run: the folder of the best checkpoint, the epochs, and what could not be read and why."""

    folder: Path
    epochs: tuple[Epoch, ...]
    skipped: dict[str, str]

    @property
    def best(self) -> Epoch:
        """The epoch whose checkpoint is the best one."""
        return find_best(self.epochs)


@dataclass(slots=True)
class Run:
    """A run under way."""

    recipe: Recipe
    start: Start
    course: Course
    reader: PictureReader
    folder: Path
    metrics: TextIO
    described: dict[str, Any]
    skipped: dict[str, str] = field(default_factory=dict)

    def log(self, **line: Any) -> None:
        """Write a line of metrics."""
        rounded = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in line.items()}
        self.metrics.write(json.dumps(rounded) + "\n")
        self.metrics.flush()

    def skip(self, skipped: Sequence[Skipped]) -> None:
        """Write down what could not be read, each once."""
        fresh = [one for one in skipped if one.picture not in self.skipped]
        self.skipped.update({one.picture: one.reason for one in fresh})
        if fresh:
            with (self.folder / SKIPPED_NAME).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in fresh)


def train_on(
    recipe: Recipe,
    gather: Callable[[str], Material],
    open_start: Callable[[torch.device], Start],
    folder: Path,
    device: str = "auto",
    region_dir: Path | None = None,
    command: str = "",
    tell: Tell = lambda line: None,
) -> Trained:
    """Train, and write `folder`. `open_start` gives the model to begin with on a device, `gather` the data for its
    provider of regions: data sets are large, so what is wrong with the rest is said before one is read.

    Raises BadCall, CheckpointMissing, CheckpointBroken, OutOfMemory, DeviceBroken; LossNotFinite, after which the
    checkpoints of the epochs before stay as they are.
    """
    refuse_run(folder)
    accelerator = open_accelerator(pick_device(device), recipe.precision)
    torch.manual_seed(recipe.seed)
    start = open_start(accelerator.device)
    material = gather(start.provider.spec.provider)
    reader = open_reader(material, start, region_dir)
    train, validation = divide_material(material, recipe)
    if recipe.task == "vqa":
        start = add_answers(start, () if start.answers else choose_answers(train, recipe.answers))
    answers = start.answers if recipe.task == "vqa" else ()
    texts, checks = (pack_texts(samples, start.tokenizer, answers) for samples in (train, validation))
    learner = Learner(start.model, start.provider, taught=recipe.optimiser.backbone_rate > 0)
    steps = recipe.epochs * math.ceil(len(texts) / recipe.optimiser.batch_size)
    course = start_course(accelerator, learner, asdict(recipe.optimiser), steps)
    described = describe_run(recipe, material, start, folder, command)
    described["training_data"] = {"name": material.name, "texts": len(texts), "pictures": len(texts.pictures),
                                  "sha256": digest_samples(train)}  # fmt: skip
    with open_metrics(folder, recipe) as metrics:
        run = Run(recipe, start, course, reader, folder, metrics, described)
        run.skip(material.skipped)
        tell(f"{len(texts):,} texts about {len(texts.pictures):,} pictures, {steps:,} steps on {accelerator.device}")
        epochs = run_epochs(run, texts, checks, tell)
    return Trained(folder / BEST, epochs, run.skipped)


def run_epochs(run: Run, texts: TextSet, checks: TextSet, tell: Tell) -> tuple[Epoch, ...]:
    """All epochs, each with its checkpoint."""
    epochs: list[Epoch] = []
    with show_progress(run.course.steps) as advance:
        for number in range(1, run.recipe.epochs + 1):
            started = time.perf_counter()
            loss = teach_epoch(run, texts, number, advance)
            checked = check_epoch(run, checks, number)
            accuracy = checked.accuracy.item() if run.recipe.task == "vqa" else None
            epoch = Epoch(number, loss, checked.total.item(), accuracy, time.perf_counter() - started)
            epochs.append(epoch)
            is_best = find_best(epochs) is epoch
            run.log(**name_epoch(epoch), best=is_best)
            write_epoch(run, epoch, is_best)
            tell(describe_epoch(epoch, run.recipe.epochs, is_best))
    return tuple(epochs)


def name_epoch(epoch: Epoch) -> dict[str, Any]:
    """An epoch as a line of metrics, in the words of the lines of its steps."""
    line = {name: value for name, value in asdict(epoch).items() if value is not None}
    return {"epoch": line.pop("number"), **line}


def find_best(epochs: Sequence[Epoch]) -> Epoch:
    """The epoch with the lowest validation loss, of equal ones the first."""
    return min(epochs, key=lambda epoch: epoch.validation_loss)


def describe_epoch(epoch: Epoch, epochs: int, is_best: bool) -> str:
    """The line of an epoch."""
    accuracy = "" if epoch.accuracy is None else f", accuracy {epoch.accuracy:.3f}"
    losses = f"loss {epoch.loss:.3f}, validation loss {epoch.validation_loss:.3f}{accuracy}"
    return f"epoch {epoch.number} of {epochs}: {losses}, {epoch.seconds:.0f} s{', the best so far' if is_best else ''}"


# Epochs --------------------------------------------------------------------------------------------------------------


def teach_epoch(run: Run, texts: TextSet, number: int, advance: Callable[[], None]) -> float:
    """One pass over the texts; its mean loss. Raises BadCall when not one of the pictures can be read."""
    plan, goal = run.recipe.optimiser, run.recipe.objective
    batches = plan_batches(len(texts), plan.batch_size, plan.forward_size, run.recipe.seed, number)
    lessons = iterate_lessons(run, texts, [part for batch in batches for part in batch], number, is_check=False)
    objective = Objective(goal.smoothing, goal.drop_worst if number > DROP_WORST_AFTER else 0.0)
    losses: list[float] = []
    for step, batch in enumerate(batches, (number - 1) * len(batches)):
        made = [lesson for lesson in (next(lessons) for _ in batch) if lesson is not None]
        if made:
            with explain_memory(plan.forward_size):
                found = take_step(run.course, made, step, objective)
            losses.append(found.total.item())
            if step % LOG_EVERY_STEPS == 0 or step == run.course.steps - 1:
                run.log(epoch=number, step=step, loss=losses[-1], lr=run.course.optimiser.param_groups[0]["lr"])
        advance()
    if not losses:
        raise BadCall("not one of the pictures can be read", f"See {SKIPPED_NAME} in the folder of the run.")
    return sum(losses) / len(losses)


def check_epoch(run: Run, checks: TextSet, number: int) -> Losses:
    """Losses on what is kept for it, masked alike each time; questions are not masked at all, nothing is smoothed.

    Raises LossNotFinite: the last update of an epoch may have been the one that spoilt the weights.
    """
    size = run.recipe.optimiser.forward_size
    parts = split_batch(plan_batches(len(checks), len(checks), len(checks), run.recipe.seed, 0)[0][0], size)
    lessons = iterate_lessons(run, checks, parts, 0, is_check=True)
    with explain_memory(size):
        losses = examine(run.course, (lesson for lesson in lessons if lesson is not None), Objective())
    if not torch.isfinite(losses.total):
        raise LossNotFinite(
            f"the validation loss is {losses.total.item()} after epoch {number}", "Lower the learning rate."
        )
    return losses


def iterate_lessons(run: Run, texts: TextSet, parts: list[Any], epoch: int, is_check: bool) -> Iterator[Lesson | None]:
    """The lesson of each part; None where no picture of it could be read."""
    goal, is_vqa = run.recipe.objective, run.recipe.task == "vqa"
    masking = MaskingPlan(goal.mask_share, goal.mask_most, goal.s2s)
    if is_vqa:  # whatever the recipe says of captions: a worker reads questions both ways
        masking = UNMASKED if is_check else QUESTION_MASKING
    config = run.start.model.config
    classes = config.num_answers if is_vqa else 0
    plan = LessonPlan(masking, config, run.start.tokenizer.special, classes, run.recipe.seed, epoch)
    workers = min(run.recipe.workers, os.cpu_count() or 1)
    for made in load_lessons(Lessons(texts, run.reader, plan, parts), workers):
        run.skip(made.skipped)
        yield made.lesson


@contextmanager
def explain_memory(forward_size: int) -> Iterator[None]:
    """Say of too little memory what a training can do about it."""
    try:
        yield
    except OutOfMemory:
        raise OutOfMemory(
            f"the device had too little memory for {forward_size} examples at once", "Lower --forward_size."
        ) from None


@contextmanager
def show_progress(steps: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error, on a terminal only."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("training", total=steps)
        yield lambda: progress.advance(bar)


# Before and after ----------------------------------------------------------------------------------------------------


def divide_material(material: Material, recipe: Recipe) -> tuple[list[Sample], list[Sample]]:
    """Samples to learn from and to validate with."""
    most = recipe.data.validation_examples
    if material.validation:
        return list(material.train), list(material.validation[:most])
    train, validation = split_samples(material.train, recipe.data.held_out, recipe.seed)
    return train, validation[:most]


def open_reader(material: Material, start: Start, region_dir: Path | None) -> PictureReader:
    """What reads the pictures of a material for this model. Raises BadCall, CheckpointMissing."""
    spec = start.provider.spec
    if (material.kind == "features") != (spec.provider == "precomputed"):
        raise BadCall(
            f"the model's regions are {spec.provider}, and this data does not fit them",
            "A model with precomputed regions learns from the names of files, any other from pictures.",
        )
    if material.kind == "features":
        return FeaturePictures(spec, region_dir)
    return PhantomPictures(spec.image_size) if material.kind == "phantoms" else FilePictures(spec, start.profile)


def refuse_run(folder: Path) -> None:
    """Raise BadCall when a folder holds a run's checkpoints already: they would be lost."""
    if (folder / LAST).exists() or (folder / BEST).exists():
        raise BadCall("the folder of --out holds checkpoints already", "Name another one, or remove it.")


@contextmanager
def open_metrics(folder: Path, recipe: Recipe) -> Iterator[TextIO]:
    """The folder of a new run, and its file of metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SKIPPED_NAME).unlink(missing_ok=True)  # of a run that came to nothing
    (folder / RECIPE_NAME).write_text(json.dumps(asdict(recipe), indent=2) + "\n", encoding="utf-8")
    with (folder / METRICS_NAME).open("w", encoding="utf-8") as metrics:
        yield metrics


def describe_run(recipe: Recipe, material: Material, start: Start, folder: Path, command: str) -> dict[str, Any]:
    """What the manifests of all epochs say."""
    return {
        "name": folder.resolve().name,
        "task": MANIFEST_TASKS[recipe.task],
        "parent": start.parent,
        "licence": start.licence,
        "allowed_use": start.allowed_use,
        "preprocess": start.profile,
        "generation": start.generation if recipe.task == "caption" else {},
        "command": command,
    }


def digest_samples(samples: Sequence[Sample]) -> str:
    """sha256 over texts and the names of their pictures: two lists with one digest teach the same."""
    state = sha256()
    for sample in samples:
        line = [Path(sample.picture).name, sample.text, *sample.answers]
        state.update(json.dumps(line, ensure_ascii=False).encode())
    return state.hexdigest()


def write_epoch(run: Run, epoch: Epoch, is_best: bool) -> None:
    """Write the checkpoint of an epoch, whole or not at all; the best one stays."""
    scores = {"epoch": epoch.number, "validation_loss": round(epoch.validation_loss, 4)}
    if epoch.accuracy is not None:
        scores["validation_accuracy"] = round(epoch.accuracy, 4)
    learner: Learner = run.course.accelerator.unwrap_model(run.course.learner)

    def fill(staged: Path) -> None:
        words, provider = run.start.tokenizer.words, learner.provider
        described = run.described | {"scores": scores}
        save_checkpoint(staged, learner.model, provider.spec, words, provider.module(), run.start.answers, **described)

    replace_folder(run.folder / LAST, fill)
    if is_best:
        copy_folder(run.folder / LAST, run.folder / BEST)
