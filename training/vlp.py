"""Train the bundled VLP on phantoms: draw, one loop, publish. Read it top to bottom.

    python -m training.vlp --config training/configs/bundled_vlp.toml --out models/bundled/vlp

As the original starts from a detector somebody trained, this starts from the vision tower of the bundled BLIP, whose
grid cells are the regions. Captions (seq2seq and bidirectional, mixed) and questions are learned together.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import tomllib
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from models.checkpoint import DEFAULT_PROFILE, Manifest, read_manifest
from models.pretrained import hide_progress
from models.vlp.config import VlpConfig
from models.vlp.folder import save_checkpoint, sign_folder
from models.vlp.grid import GridProvider
from models.vlp.network import VlpModel
from models.vlp.regions import RegionSpec
from models.vlp.tokenizer import CasedTokenizer
from training.data import TRAIN_SEED, augment_pixels, normalise_pixels
from training.questions import every_answer, soft_scores
from training.recipe import plan_batches
from training.vlp_data import UNKNOWN_ANSWER
from training.vlp_examples import Examples, join_examples, make_films, make_scenes
from training.vlp_objective import QUESTION_MASKING, MaskingPlan, mask_texts
from training.vlp_phantoms import ALIKE_ANSWERS
from training.vlp_publish import replace_folder
from training.vlp_start import set_glorot
from training.vlp_trainer import (
    AnswerPart,
    CaptionPart,
    Learner,
    Lesson,
    Objective,
    open_accelerator,
    start_course,
    take_step,
)
from training.vlp_vocabulary import list_words

log = logging.getLogger(__name__)
Config = dict[str, Any]

LOG_EVERY_STEPS = 25
HELD_OUT = 200  # films and scenes each that score what is published
# People write "Is there a nodule" as well as "is there a nodule?"; the phantoms' questions are all of the second kind.
CAPITAL_SHARE, UNMARKED_SHARE = 0.5, 0.1
COMMAND = "python -m training.vlp --config training/configs/bundled_vlp.toml --out models/bundled/vlp"


class Teacher:
    """Makes lessons out of examples: augments pictures, masks captions, draws questions."""

    def __init__(self, examples: Examples, config: Config, sizes: VlpConfig, tokenizer: CasedTokenizer) -> None:
        self.examples, self.config, self.sizes, self.tokenizer = examples, config, sizes, tokenizer
        self.answers = {answer: place for place, answer in enumerate(list_answers())}
        self.captions = [tokenizer.encode(caption) for caption in examples.captions]
        self.noise = torch.Generator().manual_seed(config["seed"])
        self.rng = np.random.default_rng(config["seed"])
        goal = config["objective"]
        self.masking = MaskingPlan(goal["mask_share"], goal["mask_most"], goal["s2s"])

    def make_lesson(self, picks: Tensor, spec: RegionSpec) -> Lesson:
        """The lesson of these examples."""
        goal = self.config["objective"]
        bright = augment_pixels(self.examples.pixels[picks].float() / 255, self.noise)
        rows = [row for row in range(len(picks)) for _ in range(goal["maskings"])]
        texts = [self.captions[int(picks[row])] for row in rows]
        asked = [row for row in range(len(picks)) for _ in range(goal["questions"])]
        drawn = [self._draw_question(int(picks[row])) for row in asked]
        questions = [self.tokenizer.encode(self._vary_writing(question.text)) for question in drawn]
        told = mask_texts(texts, self.masking, self.sizes, self.tokenizer.special, self.rng)
        masked = mask_texts(questions, QUESTION_MASKING, self.sizes, self.tokenizer.special, self.rng)
        scores = torch.from_numpy(np.stack([self._score(question.answer) for question in drawn]))
        return Lesson(
            normalise_pixels(bright, list(spec.mean), list(spec.std)),
            CaptionPart(told, torch.tensor(rows)),
            AnswerPart(masked, torch.tensor(asked), scores),
        )

    def _draw_question(self, number: int) -> Any:
        questions = self.examples.questions[number]
        return questions[int(self.rng.integers(len(questions)))]

    def _vary_writing(self, text: str) -> str:
        capital, unmarked = self.rng.random(2) < (CAPITAL_SHARE, UNMARKED_SHARE)
        text = text[0].upper() + text[1:] if capital else text
        return text.rstrip("?") if unmarked else text

    def _score(self, answer: str) -> Any:
        return soft_scores([answer] * ALIKE_ANSWERS, self.answers, len(self.answers))


def open_backbone(config: Config) -> tuple[GridProvider, str]:
    """The vision tower to start from as a grid of regions, and the ref of the checkpoint it comes from."""
    from transformers import BlipForConditionalGeneration

    folder = Path(config["data"]["backbone"])
    manifest = read_manifest(folder)
    with hide_progress():
        tower = BlipForConditionalGeneration.from_pretrained(folder, local_files_only=True).vision_model
    side = manifest.image_size // tower.config.patch_size
    spec = RegionSpec(
        provider="grid",
        count=side * side,
        feature_dim=tower.config.hidden_size,
        class_count=0,
        image_size=manifest.image_size,
        mean=manifest.mean,
        std=manifest.std,
    )
    return GridProvider(tower, spec, torch.device("cpu")), manifest.ref


def build_model(config: Config, spec: RegionSpec, vocabulary: int, answers: int) -> VlpModel:
    """A VLP of the configured size over these regions, with weights a small model learns from.

    BERT's standard deviation of 0.02 is meant for width 768; linear layers start by Glorot's rule (2010) instead.
    """
    sizes = VlpConfig(
        vocab_size=vocabulary,
        num_regions=spec.count,
        region_feat_dim=spec.feature_dim,
        region_num_classes=spec.class_count,
        num_answers=answers,
        **config["model"],
    )
    model = VlpModel(sizes)
    set_glorot(model)
    return model


def list_answers() -> list[str]:
    """The texts of the answer head's classes."""
    return [UNKNOWN_ANSWER, *every_answer()]


def draw_examples(config: Config, size: int) -> Examples:
    """Films, then scenes."""
    data, processes = config["data"], config["threads"]
    films = make_films(data["radiographs"], size, TRAIN_SEED, data["questions"], processes)
    return join_examples([films, make_scenes(data["scenes"], size, TRAIN_SEED, data["questions"], processes)])


def train_vlp(config: Config, metrics: TextIO) -> tuple[Learner, CasedTokenizer, str, str]:
    """Train; metrics as JSON lines. The learner in evaluation mode, its tokenizer, training data id and parent.

    Raises LossNotFinite.
    """
    torch.manual_seed(config["seed"])
    torch.set_num_threads(config["threads"])
    started = time.perf_counter()
    provider, parent = open_backbone(config)
    examples = draw_examples(config, provider.spec.image_size)
    log.info("drew %d pictures in %.0f s", len(examples), time.perf_counter() - started)
    tokenizer = CasedTokenizer(list_words())
    model = build_model(config, provider.spec, len(tokenizer.words), len(list_answers()))
    teacher = Teacher(examples, config, model.config, tokenizer)
    goal = config["objective"]
    objective = Objective(goal["smoothing"], answer_weight=goal["answer_weight"])
    steps = sum(stage["steps"] for stage in config["stages"])
    accelerator = open_accelerator(torch.device("cpu"))
    course = start_course(accelerator, Learner(model, provider, provider.look), config["optimiser"], steps)
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("training", total=steps)
        for step, picks in enumerate(plan_batches(config, config["data"]["radiographs"], config["seed"])):
            losses = take_step(course, [teacher.make_lesson(picks, provider.spec)], step, objective)
            progress.update(bar, advance=1)
            if step % LOG_EVERY_STEPS == 0 or step == steps - 1:
                line = {"step": step, "loss": losses.captions.item(), "answer_loss": losses.answers.item()}
                rounded = {name: round(value, 4) for name, value in line.items()}
                seconds = round(time.perf_counter() - started, 1)
                rate = course.optimiser.param_groups[0]["lr"]
                metrics.write(json.dumps(rounded | {"lr": rate, "seconds": seconds}) + "\n")
                metrics.flush()
    learner: Learner = accelerator.unwrap_model(course.learner)
    return learner.eval(), tokenizer, f"{examples.name} sha256:{examples.digest()}", parent


def publish_vlp(
    learner: Learner,
    tokenizer: CasedTokenizer,
    data_id: str,
    parent: str,
    config: Config,
    folder: Path,
    held_out: int = HELD_OUT,
) -> Manifest:
    """Write the checkpoint folder with the scores it gets, as written, on `held_out` films and scenes.

    It replaces `folder` when it is complete. Returns its manifest.
    """
    from training.evaluation import score_checkpoint  # late: evaluation loads what this function has written

    described = {
        "name": "bundled-vlp",
        "parent": parent,
        "training_data": data_id,
        "licence": "Apache-2.0",
        "allowed_use": "research",
        "preprocess": DEFAULT_PROFILE,
        "generation": config["generation"],
        "command": COMMAND,
    }

    def fill(staged: Path) -> None:
        spec, module = learner.provider.spec, learner.provider.module()
        save_checkpoint(staged, learner.model, spec, tokenizer.words, module, list_answers(), **described)
        sign_folder(staged, scores=score_checkpoint(staged, held_out, held_out), **described)

    replace_folder(folder, fill)
    return read_manifest(folder)


def main(arguments: list[str] | None = None) -> int:
    """Train and publish as a command."""
    parser = argparse.ArgumentParser(description="Train the bundled VLP on phantoms.")
    parser.add_argument("--config", type=Path, default=Path("training/configs/bundled_vlp.toml"))
    parser.add_argument("--out", type=Path, default=Path("models/bundled/vlp"))
    parser.add_argument("--metrics", type=Path, help="file for JSON lines; default: standard output")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    config = tomllib.loads(options.config.read_text())
    with options.metrics.open("w") if options.metrics else open(1, "w", closefd=False) as metrics:
        learner, tokenizer, data_id, parent = train_vlp(config, metrics)
    publish_vlp(learner, tokenizer, data_id, parent, config, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
