"""The bundled VLP's recipe in small: its arithmetic is pinned, and what it publishes captions and answers."""

import io
import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from models.base import run_answerer, run_captioner
from models.checkpoint import resolve_checkpoint, verify_folder
from models.load import load_answerer, load_captioner
from readroom.errors import BadCall, LossNotFinite
from training import vlp
from training.vlp_publish import replace_folder
from training.vlp_recipe import CONFIGS, read_recipe

CONFIG = Path(__file__).parents[2] / "training/configs/bundled_vlp.toml"


@pytest.fixture
def config():
    loaded = tomllib.loads(CONFIG.read_text())
    loaded["threads"] = 1
    loaded["data"] |= {"radiographs": 6, "scenes": 6, "questions": 3}
    loaded["model"] |= {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    loaded["optimiser"]["batch_size"] = 4
    loaded["stages"] = [{"steps": 2, "scenes": 1.0}, {"steps": 4, "scenes": 0.25}]
    return loaded


def test_bundled_recipe_computes_what_the_published_weights_were_trained_with(config, monkeypatch):
    monkeypatch.setattr(vlp, "LOG_EVERY_STEPS", 1)
    metrics = io.StringIO()
    learner, _, data_id, parent = vlp.train_vlp(config, metrics)
    lines = [json.loads(line) for line in metrics.getvalue().splitlines()]
    # As the first release of the recipe computed them; its weights after these steps were the same to the last bit.
    assert [line["loss"] for line in lines] == pytest.approx([5.1183, 5.0798, 5.0644, 5.0830, 5.0703, 5.0429], abs=2e-3)
    expected = [27.3019, 24.9567, 23.5219, 22.6024, 21.9211, 21.4564]
    assert [line["answer_loss"] for line in lines] == pytest.approx(expected, abs=2e-3)
    rates = [9.5238e-4, 7.9365e-4, 6.3492e-4, 4.7619e-4, 3.1746e-4, 1.5873e-4]
    assert [line["lr"] for line in lines] == pytest.approx(rates, rel=1e-4)
    assert not learner.training
    assert "radiograph-" in data_id and "sha256:" in data_id
    assert parent == resolve_checkpoint("bundled:blip").ref


def test_run_stops_with_a_named_error_when_the_loss_is_not_finite(config):
    config["optimiser"]["learning_rate"] = float("inf")
    with pytest.raises(LossNotFinite, match="at step"):
        vlp.train_vlp(config, io.StringIO())


def test_published_folder_captions_and_answers_and_carries_its_scores(config, monkeypatch, tmp_path):
    def score(folder, films, scenes):
        verify_folder(folder)  # what is scored is complete
        return {"films": float(films), "scenes": float(scenes)}

    monkeypatch.setattr("training.evaluation.score_checkpoint", score)
    trained = vlp.train_vlp(config, io.StringIO())
    folder = tmp_path / "vlp"
    manifest = vlp.publish_vlp(*trained, config, folder, held_out=2)
    assert manifest == verify_folder(folder)
    assert manifest.task == "caption+answer"
    assert manifest.scores == {"films": 2.0, "scenes": 2.0}
    assert manifest.parent == resolve_checkpoint("bundled:blip").ref
    picture = np.full((40, 30), 90, dtype=np.uint8)
    assert len(run_captioner(load_captioner(str(folder), "cpu"), [picture])) == 1
    answer = run_answerer(load_answerer(str(folder), "cpu"), [picture], ["is there a nodule?"])[0]
    assert answer.text in vlp.list_answers()[1:]


def test_published_folder_holds_the_weights_that_were_trained(config, monkeypatch, tmp_path):
    from models.vlp.folder import load_network, read_sizes

    monkeypatch.setattr("training.evaluation.score_checkpoint", lambda *_: {})
    trained = vlp.train_vlp(config, io.StringIO())
    vlp.publish_vlp(*trained, config, tmp_path / "vlp")
    loaded = load_network(tmp_path / "vlp", read_sizes(tmp_path / "vlp")[0]).state_dict()
    kept = trained[0].model.state_dict()
    assert loaded.keys() == kept.keys() and len(kept) > 20
    assert all(torch.equal(loaded[name], tensor) for name, tensor in kept.items())


def write_checkpoint(name):
    def fill(staged):
        (staged / name).write_text(name)
        (staged / "manifest.json").write_text("{}")

    return fill


def list_names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_folder_is_replaced_whole(tmp_path):
    folder = tmp_path / "out" / "vlp"
    replace_folder(folder, write_checkpoint("old.txt"))
    replace_folder(folder, write_checkpoint("new.txt"))
    assert list_names(folder) == ["manifest.json", "new.txt"]
    assert list_names(folder.parent) == ["vlp"]


def test_folder_stays_as_it_was_when_writing_the_new_one_fails(tmp_path):
    folder = tmp_path / "vlp"
    replace_folder(folder, write_checkpoint("old.txt"))

    def fail(staged):
        (staged / "half.txt").write_text("half")
        raise ValueError("full disk")

    with pytest.raises(ValueError, match="full disk"):
        replace_folder(folder, fail)
    assert list_names(folder) == ["manifest.json", "old.txt"]
    assert list_names(tmp_path) == ["vlp"]


def test_folder_stays_as_it_was_when_the_new_one_cannot_be_moved_there(tmp_path, monkeypatch):
    folder = tmp_path / "vlp"
    replace_folder(folder, write_checkpoint("old.txt"))
    move = Path.rename

    def refuse(path, target):
        if path.name.startswith(".staged-"):
            raise OSError("no space left on device")
        return move(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="no space"):
        replace_folder(folder, write_checkpoint("new.txt"))
    assert list_names(folder) == ["manifest.json", "old.txt"]
    assert list_names(tmp_path) == ["vlp"]


def test_folder_with_other_peoples_files_is_not_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("years of work")
    with pytest.raises(BadCall, match="other things than a checkpoint"):
        replace_folder(tmp_path / "thesis", write_checkpoint("new.txt"))
    assert list_names(tmp_path / "thesis") == ["thesis.txt"]


@pytest.mark.parametrize("line", [
    "epochs = 0", "seed = -1", "precision = 'int8'", "task = 'ocr'", "[objective]\nmask_most = 0",
    "[objective]\ns2s = 1.5", "[optimiser]\nlearning_rate = -1.0", "[optimiser]\nlearning_rate = nan",
    "[optimiser]\neps = 0", "[optimiser]\nbetas = [0.9]", "[data]\ntrain = []", "[optimiser]\nbatch_size = 0",
])  # fmt: skip
def test_recipe_that_cannot_be_trained_is_refused(tmp_path, line):
    path = tmp_path / "recipe.toml"
    path.write_text(line)
    with pytest.raises(BadCall, match="out of range"):
        read_recipe(path)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("vlp_*.toml")), ids=lambda path: path.stem)
def test_recipes_that_come_along_can_be_read(path):
    recipe = read_recipe(path)
    assert recipe.optimiser.clip_norm == 1.0
    assert recipe.objective.mask_most == 3
    assert recipe.seed == 42


def test_published_numbers_stand_in_the_recipes():
    coco, vqa = read_recipe(CONFIGS / "vlp_coco.toml"), read_recipe(CONFIGS / "vlp_vqa.toml")
    pretrain = read_recipe(CONFIGS / "vlp_pretrain.toml")
    assert (coco.epochs, coco.optimiser.batch_size, coco.optimiser.learning_rate) == (30, 64 * 8, 3e-5)
    assert (vqa.epochs, vqa.optimiser.batch_size, vqa.optimiser.learning_rate) == (20, 64 * 2, 2e-5)
    assert (pretrain.optimiser.learning_rate, pretrain.objective.s2s) == (1e-4, 0.75)
    assert (vqa.answers.most, vqa.answers.least, vqa.objective.s2s) == (3129, 9, 0.0)
