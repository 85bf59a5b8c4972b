"""What every training of a VLP shares: lessons, the losses of one, and one update from some of them.

training/vlp.py teaches the bundled VLP with it, training/vlp_run.py everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from models.device import translate_device_errors
from models.vlp.network import SeenRegions, VlpModel
from models.vlp.regions import RegionProvider, Regions, locate_regions
from readroom.errors import BadCall, LossNotFinite
from training.bert_adam import BertAdam, group_parameters, linear_rate
from training.vlp_objective import MaskedTexts, answer_accuracy, answer_logits, caption_loss, vqa_loss

T = TypeVar("T")
Look = Callable[[Any], Regions]


@dataclass(frozen=True, slots=True)
class CaptionPart:
    """Masked captions, and for each the row of its picture in the lesson."""

    texts: MaskedTexts
    rows: Tensor


@dataclass(frozen=True, slots=True)
class AnswerPart:
    """Questions, for each the row of its picture in the lesson, and the soft scores of the answers [N, A]."""

    texts: MaskedTexts
    rows: Tensor
    scores: Tensor


@dataclass(frozen=True, slots=True)
class Lesson:
    """What one forward pass teaches: pictures, or what stands in their place, and texts about them."""

    images: Any
    captions: CaptionPart | None = None
    answers: AnswerPart | None = None

    @property
    def size(self) -> int:
        """How many texts it holds."""
        return sum(len(part.rows) for part in (self.captions, self.answers) if part is not None)


@dataclass(frozen=True, slots=True)
class Objective:
    """How losses are made of a lesson: label smoothing, the share of worst samples left out, the answers' weight."""

    smoothing: float = 0.0
    drop_worst: float = 0.0
    answer_weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Losses:
    """Scalars; 0 for a part that the lesson does not have.

    `total` is what is minimised, `accuracy` the mean soft score of the likeliest answers.
    """

    captions: Tensor
    answers: Tensor
    total: Tensor
    accuracy: Tensor


class Learner(nn.Module):
    """Transformer and region network under one roof, so that both are prepared and optimised together.

    `look` makes regions of a lesson's images, None means as the provider does for a worker. A network that is not
    `taught` is only looked through.
    """

    def __init__(
        self, model: VlpModel, provider: RegionProvider, look: Look | None = None, taught: bool = True
    ) -> None:
        super().__init__()
        self.model = model
        self.backbone = provider.module()
        self.provider = provider
        self.look: Look = look or provider.compute
        self.taught = taught
        if self.backbone is not None and not taught:
            self.backbone.requires_grad_(False)

    def train(self, mode: bool = True) -> Learner:
        """As every module; a network that is not taught stays in evaluation mode."""
        super().train(mode)
        if self.backbone is not None and not self.taught:
            self.backbone.eval()
        return self

    def forward(self, lesson: Lesson, objective: Objective) -> Losses:
        """The losses of one lesson."""
        with nullcontext() if self.taught else torch.no_grad():
            regions = self.look(lesson.images)
        seen = SeenRegions(regions.features, locate_regions(regions.boxes, regions.classes))
        captions = answers = accuracy = seen.features.new_zeros(())
        if told := lesson.captions:
            about = pick_rows(seen, told.rows)
            captions = caption_loss(self.model, about, told.texts, objective.drop_worst, objective.smoothing)
        if asked := lesson.answers:
            logits = answer_logits(self.model, pick_rows(seen, asked.rows), asked.texts)
            answers, accuracy = vqa_loss(logits, asked.scores), answer_accuracy(logits, asked.scores)
        return Losses(captions, answers, captions + objective.answer_weight * answers, accuracy)


def pick_rows(seen: SeenRegions, rows: Tensor) -> SeenRegions:
    """The regions of these pictures, in this order."""
    return SeenRegions(seen.features[rows], seen.places[rows])


def move_tensors(value: T, device: torch.device) -> T:
    """A tensor, or a dataclass with all tensors in it, on a device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)  # type: ignore[return-value]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{item.name: move_tensors(getattr(value, item.name), device) for item in fields(value)})
    return value


# Steps ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Course:
    """A training that is under way: what learns, what optimises it, and the schedule of `steps` updates."""

    accelerator: Accelerator
    learner: Any  # the Learner, as accelerate wraps it
    optimiser: Any
    steps: int
    warmup: float


def open_accelerator(device: torch.device, precision: str = "float32") -> Accelerator:
    """accelerate on this device; `precision` is `float32` or `bfloat16`. Raises BadCall."""
    modes = {"float32": "no", "bfloat16": "bf16"}
    if precision not in modes:
        raise BadCall(f"no precision is called {precision!r}", f"Say {' or '.join(modes)}.")
    try:
        return Accelerator(cpu=device.type == "cpu", mixed_precision=modes[precision])
    except ValueError:  # accelerate holds its state once a process
        raise BadCall("this process has trained on another device or precision", "Start a new process.") from None


def make_optimiser(learner: Learner, optimiser: dict[str, Any]) -> BertAdam:
    """BertAdam with a rate of its own for the region network, which has learned to see already."""
    decay = optimiser["weight_decay"]
    groups = group_parameters(learner.model, decay, peak=optimiser["learning_rate"])
    if learner.backbone is not None and learner.taught:
        groups += group_parameters(learner.backbone, decay, peak=optimiser["backbone_rate"])
    betas = (optimiser["betas"][0], optimiser["betas"][1])
    return BertAdam(groups, lr=1.0, betas=betas, eps=optimiser["eps"], clip_norm=optimiser["clip_norm"])


def start_course(accelerator: Accelerator, learner: Learner, optimiser: dict[str, Any], steps: int) -> Course:
    """Everything on its device and in training mode."""
    prepared, adam = accelerator.prepare(learner, make_optimiser(learner, optimiser))
    prepared.train()
    return Course(accelerator, prepared, adam, steps, optimiser["warmup"])


def take_step(course: Course, lessons: Sequence[Lesson], step: int, objective: Objective) -> Losses:
    """One update by the mean gradient of some lessons; their mean losses.

    Several lessons stand for one batch that is too large for the device, as several devices do in the release. Raises
    LossNotFinite before anything is changed, OutOfMemory, DeviceBroken.
    """
    share = linear_rate(step + 1, course.steps + 1, course.warmup)
    for group in course.optimiser.param_groups:
        group["lr"] = share * group["peak"]
    course.optimiser.zero_grad(set_to_none=True)  # of a step that failed half way
    with translate_device_errors():
        found = [study_lesson(course, lesson, step, objective, len(lessons)) for lesson in lessons]
        course.optimiser.step()
    return mean_losses(found, [1] * len(found))


def study_lesson(course: Course, lesson: Lesson, step: int, objective: Objective, parts: int) -> Losses:
    """Add the gradient of one of `parts` lessons. Raises LossNotFinite."""
    losses: Losses = course.learner(move_tensors(lesson, course.accelerator.device), objective)
    if not torch.isfinite(losses.total):
        raise LossNotFinite(f"the loss is {losses.total.item()} at step {step}", "Lower the learning rate.")
    course.accelerator.backward(losses.total / parts)
    return losses


@torch.no_grad()
def mean_losses(losses: Sequence[Losses], weights: Sequence[int]) -> Losses:
    """The mean of several, weighted by the sizes of their lessons."""
    shares = torch.tensor(weights, dtype=torch.float32) / sum(weights)
    named = {
        item.name: (torch.stack([getattr(one, item.name).detach().float().cpu() for one in losses]) * shares).sum()
        for item in fields(Losses)
    }
    return Losses(**named)


@torch.no_grad()
def examine(course: Course, lessons: Iterable[Lesson], objective: Objective) -> Losses:
    """Mean losses over lessons without learning from them. Raises BadCall when there are none."""
    found, sizes = [], []
    course.learner.eval()
    with translate_device_errors():
        for lesson in lessons:
            found.append(course.learner(move_tensors(lesson, course.accelerator.device), objective))
            sizes.append(lesson.size)
    course.learner.train()
    if not found:
        raise BadCall("none of the examples to validate with can be used")
    return mean_losses(found, sizes)
