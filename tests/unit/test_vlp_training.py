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
from readroom.errors import LossNotFinite
from training import vlp
from training.vlp_publish import replace_folder

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


def test_folder_is_replaced_whole(tmp_path):
    folder = tmp_path / "out" / "vlp"
    replace_folder(folder, lambda staged: (staged / "old.txt").write_text("old"))
    replace_folder(folder, lambda staged: (staged / "new.txt").write_text("new"))
    assert [path.name for path in folder.iterdir()] == ["new.txt"]
    assert [path.name for path in folder.parent.iterdir()] == ["vlp"]


def test_folder_stays_as_it_was_when_writing_the_new_one_fails(tmp_path):
    folder = tmp_path / "vlp"
    replace_folder(folder, lambda staged: (staged / "old.txt").write_text("old"))

    def fail(staged):
        (staged / "half.txt").write_text("half")
        raise ValueError("full disk")

    with pytest.raises(ValueError, match="full disk"):
        replace_folder(folder, fail)
    assert [path.name for path in folder.iterdir()] == ["old.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["vlp"]
