"""`readroom train vlp` on data sets in their own layouts: what it learns, what it leaves, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from models.checkpoint import read_manifest, resolve_checkpoint
from models.load import load_answerer, load_captioner
from models.predict import answer_images, caption_images
from readroom.cli import main
from tests.fakes import small_vlp
from tests.unit.test_vqa import write_vqa
from training import vlp_run
from training.phantoms import write_coco
from training.vlp_trainer import Objective

QUESTION = "what is it?"
COLOURS = ("black", "red")  # answers, of the two shades of the pictures
RECIPE = """
seed = 3
workers = 0

[answers]
most = 8
least = 1

[optimiser]
batch_size = 16
forward_size = 8
learning_rate = 1e-3
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def vqa_recipe(tmp_path: Path) -> Path:
    path = tmp_path / "vqa.toml"
    path.write_text(f'{RECIPE}\n[data]\ntrain = ["train2014"]\nvalidation = ["val2014"]\n')
    return path


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """A COCO folder with one picture that is none, and one that is not there."""
    write_coco(tmp_path / "data", 24, 1, "train2017")
    write_coco(tmp_path / "data", 6, 2, "val2017")
    pictures = tmp_path / "data" / "coco2017" / "train2017"
    (pictures / "000000000003.jpg").write_bytes(b"no picture")
    (pictures / "000000000004.jpg").unlink()
    return tmp_path / "data"


def train(*arguments: Any, status: int = 0) -> Result:
    done = CliRunner().invoke(main, ["train", "vlp", "--device", "cpu", *map(str, arguments)])
    assert done.exit_code == status, done.output
    return done


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_captions_are_learned_and_served_and_bad_pictures_are_named(tmp_path: Path, coco: Path, recipe: Path) -> None:
    out = tmp_path / "run"
    done = train("--data_dir", coco, "--init", "bundled", "--config", recipe, "--epochs", 3, "--out", out, status=1)
    assert "2 pictures could not be used" in done.output
    reasons = {line["picture"].rpartition("/")[2]: line["reason"] for line in read_lines(out / "skipped.jsonl")}
    assert reasons.keys() == {"000000000003.jpg", "000000000004.jpg"}
    assert reasons["000000000004.jpg"].startswith("missing")

    epochs = [line for line in read_lines(out / "metrics.jsonl") if "validation_loss" in line]
    assert len(epochs) == 3
    assert epochs[-1]["validation_loss"] < epochs[0]["validation_loss"]
    manifest = read_manifest(out / "best")
    assert manifest.task == "caption"
    assert manifest.parent == resolve_checkpoint("bundled", "vlp").ref
    assert manifest.regions["provider"] == "grid"
    assert isinstance(manifest.training_data, dict)
    assert manifest.training_data["pictures"] == 22  # of 24
    captioner = load_captioner(str(out / "best"), device="cpu")
    picture = coco / "coco2017" / "val2017" / "000000000001.jpg"
    assert caption_images([picture], captioner)[0].text


def test_the_same_seed_trains_the_same_model(tmp_path: Path, coco: Path, recipe: Path) -> None:
    common = ("--data_dir", coco, "--init", "bundled", "--config", recipe, "--epochs", 1, "--limit", 2)
    train(*common, "--out", tmp_path / "one")
    train(*common, "--out", tmp_path / "two")
    train(*common, "--out", tmp_path / "other", "--seed", 4)
    digests = [read_manifest(tmp_path / name / "last").digest for name in ("one", "two", "other")]
    assert digests[0] == digests[1] != digests[2]


def test_a_fresh_answer_head_learns_the_questions(tmp_path: Path, vqa_recipe: Path) -> None:
    shades = [0, 250]
    pictures = [shade + step for shade in shades for step in range(4)]
    asked = [(number, number, QUESTION) for number in pictures]
    told = [(number, "other", [COLOURS[shades.index(number - number % 10)]] * 10) for number in pictures]
    for split in ("train2014", "val2014"):
        write_vqa(tmp_path / "vqa", asked, told, images=pictures, split=split)
    start = small_vlp.save_vlp(tmp_path / "start", "grid")
    captions_only = strip_answers(start, tmp_path / "captioner")
    out = tmp_path / "run"
    train("--task", "vqa", "--data_dir", tmp_path / "vqa", "--init", captions_only, "--config", vqa_recipe,
          "--epochs", 60, "--learning_rate", 0.001, "--out", out)  # fmt: skip
    manifest = read_manifest(out / "best")
    assert manifest.task == "answer"
    assert manifest.scores["validation_accuracy"] == 1.0
    answerer = load_answerer(str(out / "best"), device="cpu")
    assert answerer.parts.answers == ("<unk>", *sorted(COLOURS))  # type: ignore[attr-defined]
    files = [tmp_path / "vqa" / "val2014" / f"COCO_val2014_{number:012d}.jpg" for number in pictures]
    said = answer_images(files, [QUESTION] * len(files), answerer)
    assert [one.text for one in said] == [answers[0] for _, _, answers in told]


def strip_answers(source: Path, folder: Path) -> Path:
    """The same checkpoint without its answer head."""
    from models.vlp.captioner import load_parts
    from models.vlp.folder import save_checkpoint
    from models.vlp.network import VlpModel

    parts = load_parts(resolve_checkpoint(str(source)), "cpu", "float32", None, "caption")
    config = small_vlp.small_config(parts.provider.spec, num_answers=0)
    model = VlpModel(config)
    model.load_state_dict(parts.model.state_dict(), strict=False)
    save_checkpoint(
        folder, model, parts.provider.spec, parts.tokenizer.words, parts.provider.module(), name="captioner"
    )
    return folder


def test_precomputed_regions_are_learned_from_their_files(
    tmp_path: Path, vqa_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    regions = tmp_path / "regions"
    monkeypatch.setenv("READROOM_REGION_DIR", str(regions))
    names = [Path(name).name for name in small_vlp.NAMES]
    small_vlp.write_regions(regions)
    ids = [int(name.rpartition("_")[2].partition(".")[0]) for name in names]
    asked = [(number, number, QUESTION) for number in ids]
    told = [(number, "other", [f"thing {place % 2}"] * 10) for place, number in enumerate(ids)]
    for split in ("train2014", "val2014"):
        write_vqa(tmp_path / "vqa", asked, told, images=(), split=split)  # not one picture is there
    small_vlp.write_regions(regions, names=[name.replace("val2014", "train2014") for name in small_vlp.NAMES])
    start = small_vlp.save_vlp(tmp_path / "start", "precomputed")
    out = tmp_path / "run"
    train("--task", "vqa", "--data_dir", tmp_path / "vqa", "--init", start, "--config", vqa_recipe, "--epochs", 2,
          "--out", out)  # fmt: skip
    assert read_manifest(out / "best").regions["provider"] == "precomputed"
    assert not (out / "best" / "regions.safetensors").exists()


def test_karpathys_file_names_the_splits_and_the_released_regions(tmp_path: Path) -> None:
    told = [
        {"filepath": "val2014", "filename": name, "split": split, "cocoid": number, "sentences": [{"raw": "a cat ."}]}
        for number, (name, split) in enumerate(zip(small_vlp.NAMES, ("train", "restval", "val", "test"), strict=False))
    ]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": told, "dataset": "coco"}))
    small_vlp.write_regions(tmp_path / "regions")
    recipe = tmp_path / "recipe.toml"
    data = '[data]\nkarpathy = "dataset_coco.json"\ntrain = ["train"]\nvalidation = ["val"]\n'
    recipe.write_text(f"{RECIPE}\n{data}")
    start, out = small_vlp.save_vlp(tmp_path / "start", "precomputed"), tmp_path / "run"
    train("--data_dir", tmp_path, "--region_dir", tmp_path / "regions", "--init", start, "--config", recipe,
          "--epochs", 1, "--out", out)  # fmt: skip
    learned = read_manifest(out / "best").training_data
    assert isinstance(learned, dict)
    assert (learned["pictures"], learned["texts"]) == (2, 2)  # restval belongs to train


def test_phantoms_teach_a_fresh_model(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train("--dataset", "phantoms", "--limit", 24, "--epochs", 3, "--batch_size", 8, "--out", out)
    epochs = [line for line in read_lines(out / "metrics.jsonl") if "validation_loss" in line]
    assert epochs[-1]["validation_loss"] < epochs[0]["validation_loss"]
    assert read_manifest(out / "best").parent == resolve_checkpoint("bundled", "blip").ref


@pytest.mark.parametrize(("arguments", "words"), [
    ((), "starts from a checkpoint"),
    (("--init", "bundled"), "not said where the data set is"),
    (("--init", "bundled", "--data_dir", "nowhere"), "the folder of the data set is not there"),
    (("--init", "bundled", "--data_dir", "."), "captions_train2017.json is not in"),
    (("--init", "bundled", "--data_dir", ".", "--task", "vqa"), "v2_OpenEnded_mscoco_train2014_questions.json"),
    (("--dataset", "phantoms", "--init", "bundled:blip"), "family blip"),
    (("--dataset", "phantoms", "--init", "nothing/of/that/name"), "no checkpoint"),
    (("--dataset", "phantoms", "--init", "bundled", "--regions", "detector"), "provider grid"),
    (("--dataset", "phantoms", "--config", "missing.toml"), "no recipe"),
])  # fmt: skip
def test_what_cannot_be_trained_is_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["train", "vlp", "--limit", "2", "--out", str(tmp_path / "run"), *arguments])
    assert done.exit_code in (1, 2)
    assert words in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "run" / "best").exists()


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_epoch_before(
    tmp_path: Path, coco: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("--data_dir", coco, "--init", "bundled", "--config", recipe, "--limit", 2)  # a step an epoch
    train(*common, "--epochs", 1, "--out", tmp_path / "good")
    monkeypatch.setattr("training.vlp_trainer.linear_rate", lambda step, *_: 1.0 if step < 2 else 1e30)
    done = train(*common, "--epochs", 3, "--out", tmp_path / "run", status=1)
    assert "the validation loss is nan after epoch 2" in done.output
    kept = read_manifest(tmp_path / "run" / "last")
    assert kept.scores["epoch"] == 1
    assert kept.digest == read_manifest(tmp_path / "run" / "best").digest
    assert [path.name for path in sorted((tmp_path / "run").iterdir())] == [
        "best", "last", "metrics.jsonl", "recipe.json"]  # fmt: skip


def test_the_worst_samples_are_left_out_after_the_sixth_epoch(
    tmp_path: Path, coco: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe.write_text(f"{RECIPE}\n[objective]\ndrop_worst = 0.5\nsmoothing = 0.1\n")
    goals: list[Objective] = []
    take_step = vlp_run.take_step

    def listen(course: Any, lessons: Any, step: int, objective: Objective) -> Any:
        goals.append(objective)
        return take_step(course, lessons, step, objective)

    monkeypatch.setattr(vlp_run, "take_step", listen)
    train("--data_dir", coco, "--init", "bundled", "--config", recipe, "--epochs", 8, "--limit", 2, "--out",
          tmp_path / "run")  # fmt: skip
    assert [goal.drop_worst for goal in goals] == [0.0] * 6 + [0.5] * 2
    assert {goal.smoothing for goal in goals} == {0.1}


def test_a_run_in_bfloat16_with_other_processes_reading_learns_too(tmp_path: Path, coco: Path) -> None:
    # In a process of its own: accelerate keeps one precision for each.
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.replace("workers = 0", 'workers = 2\nprecision = "bfloat16"'))
    command = [sys.executable, "-m", "readroom.cli", "train", "vlp", "--device", "cpu", "--data_dir", coco, "--init",
               "bundled", "--config", recipe, "--epochs", 1, "--limit", 4, "--out", tmp_path / "run"]  # fmt: skip
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 1, done.stderr  # a picture cannot be read, another is not there
    assert "epoch 1 of 1: loss" in done.stdout and "000000000003.jpg: " in done.stderr
    made = read_manifest(tmp_path / "run" / "best")
    assert made.command.startswith("readroom train vlp --device cpu --data_dir")
    weights = load_file(tmp_path / "run" / "best" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_a_run_is_not_written_over_another(tmp_path: Path) -> None:
    common = ("--dataset", "phantoms", "--limit", 4, "--epochs", 1, "--batch_size", 4, "--out", tmp_path / "run")
    train(*common)
    before = read_manifest(tmp_path / "run" / "last").digest
    assert "already" in train(*common, status=2).output
    assert read_manifest(tmp_path / "run" / "last").digest == before
