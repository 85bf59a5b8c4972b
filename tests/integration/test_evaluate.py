"""evaluate.py and `readroom evaluate` as processes, with the bundled checkpoints on drawn data sets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.docs.markdown import ROOT
from tests.unit.test_vqa import write_vqa
from training.phantoms import draw_scene, write_coco

LIMIT_S = 240
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a command as somebody who has set nothing; from another folder, as the root may not be the working one."""

    def run_command(*arguments: str, status: int = 0, **settings: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("READROOM_")}
        environment = {**kept, "READROOM_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", **settings}
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment,
                              cwd=tmp_path, timeout=LIMIT_S, check=False)  # fmt: skip
        assert done.returncode == status, done.stdout + done.stderr
        return done

    return run_command


def evaluate(run: Run, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return run(str(ROOT / "evaluate.py"), *arguments, **options)


def test_both_bundled_models_stand_side_by_side(run: Run) -> None:
    shown = evaluate(run, "--model", "blip", "--model", "vlp", "--limit", "6")
    lines = shown.stdout.splitlines()
    assert lines[0].split() == ["score", "n", "blip", "vlp", "floor"]
    assert {"effusion_side", "shape_and_colour", "answer_accuracy", "scene_colour"} <= {
        line.split()[0] for line in lines if line.strip()
    }
    assert len([line for line in lines if "sha256:" in line]) == 2
    assert shown.stderr == ""
    command = run("-m", "readroom.cli", "evaluate", "--model", "blip", "--model", "vlp", "--limit", "6")
    assert command.stdout == shown.stdout


def test_coco_captions_are_scored_and_saved_as_the_readme_of_the_seed_says(run: Run, tmp_path: Path) -> None:
    records = write_coco(tmp_path / "data", 12, seed=55)
    settings = {"READROOM_DATA_DIR": str(tmp_path / "data"), "READROOM_BLIP_MODEL": "bundled"}
    said = tmp_path / "said.jsonl"
    board = json.loads(
        evaluate(run, "--model", "blip", "--dataset", "coco", "--json", "--output", str(said), **settings).stdout
    )
    (model,) = board["models"]
    assert {name: score["n"] for name, score in model["scores"].items()} == dict.fromkeys(
        ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"], 12
    )
    assert all(score["low"] <= score["value"] <= score["high"] for score in model["scores"].values())
    # The bundled captioner says the first of the five captions of nearly every scene.
    assert model["scores"]["bleu_4"]["value"] > 0.9 and model["scores"]["rouge_l"]["value"] > 0.9
    lines = [json.loads(line) for line in said.read_text().splitlines()]
    assert {line["checkpoint"] for line in lines} == {model["checkpoint"]}
    right = [line["text"] == record["caption"] for line, record in zip(lines, records, strict=True)]
    assert sum(right) >= 10


def test_vqa_is_scored_by_peoples_agreement(run: Run, tmp_path: Path) -> None:
    scenes = {number: draw_scene(60_000_000 + number) for number in range(1, 13)}
    lone = {number: scene.things[0] for number, scene in scenes.items() if len(scene.things) == 1}
    assert len(lone) >= 3
    questions = [(number * 10, number, "What colour is it?") for number in lone]
    answers = [(number * 10, "other", [thing.colour] * 10) for number, thing in lone.items()]
    root = write_vqa(tmp_path / "vqa", questions, answers, images=())
    for number in lone:
        Image.fromarray(scenes[number].pixels).save(root / "val2014" / f"COCO_val2014_{number:012d}.jpg", quality=95)
    options = ["--model", "vlp", "--checkpoint", "bundled", "--dataset", "vqa", "--data_dir", str(root), "--json"]
    scores = json.loads(evaluate(run, *options).stdout)["models"][0]["scores"]
    assert scores.keys() == {"answer_accuracy", "answer:other"}
    assert scores["answer_accuracy"]["n"] == len(lone) and scores["answer_accuracy"]["value"] >= 0.6


def test_damaged_image_is_named_and_the_status_is_one(run: Run, tmp_path: Path) -> None:
    write_coco(tmp_path, 4, seed=56)
    (tmp_path / "coco2017" / "val2017" / "000000000003.jpg").unlink()
    options = ["--checkpoint", "dummy", "--dataset", "coco", "--data_dir", str(tmp_path), "--json"]
    done = evaluate(run, *options, status=1)
    assert done.stderr == "000000000003.jpg: missing\n"
    assert json.loads(done.stdout)["models"][0]["scores"]["cider"]["n"] == 3


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--dataset", "coco", "--checkpoint", "dummy"], 2, "Give --data_dir, or set READROOM_DATA_DIR"),
        (["--dataset", "nothing"], 2, "is not one of"),
        (["--model", "vlp", "--dataset", "coco", "--data_dir", "."], 1, "READROOM_VLP_MODEL"),
        (["--checkpoint", "bundled:vlp"], 2, "of the family vlp, and blip was asked for"),
        (["--markdown", "gone.md"], 2, "that page does not exist"),
        (["--output", "gone/said.jsonl"], 2, "the folder of --output does not exist"),
    ],
)
def test_call_that_cannot_be_followed_says_why(run: Run, options: list[str], status: int, said: str) -> None:
    done = evaluate(run, *options, status=status)
    assert said in done.stderr and "Traceback" not in done.stderr and done.stdout == ""
