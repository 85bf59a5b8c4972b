"""The training recipe in small: its parts, one tiny run, and what it refuses to publish."""

import io
import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from readroom.errors import LossNotFinite
from training import recipe
from training.data import (
    TEST_SEED,
    TRAIN_SEED,
    VALIDATION_SEED,
    PictureSet,
    augment_pixels,
    make_radiographs,
    make_scenes,
)
from training.layouts import FIRST_SEED
from training.vocabulary import DEC, PAD, SEP, build_tokenizer

CONFIG = Path(__file__).parents[2] / "training/configs/bundled_blip.toml"


@pytest.fixture
def config():
    loaded = tomllib.loads(CONFIG.read_text())
    loaded["threads"] = 1
    loaded["data"] = {"radiographs": 6, "scenes": 6}
    loaded["model"] |= {"width": 32, "vision_layers": 1, "text_layers": 1, "image_size": 32}
    loaded["optimiser"] |= {"batch_size": 4, "warmup_steps": 1}
    loaded["stages"] = [{"steps": 2, "scenes": 1.0}, {"steps": 3, "scenes": 0.25}]
    return loaded


def test_training_and_scoring_and_demo_seeds_are_apart():
    drawn = tomllib.loads(CONFIG.read_text())["data"]
    assert TRAIN_SEED + max(drawn.values()) < VALIDATION_SEED < TEST_SEED < FIRST_SEED


def test_captions_pass_the_tokenizer_and_come_back():
    tokenizer = build_tokenizer()
    texts = make_radiographs(30, 32, VALIDATION_SEED).captions + make_scenes(30, 32, VALIDATION_SEED).captions
    tokens = recipe.encode_captions(tokenizer, texts)
    assert tokens[:, 0].eq(DEC).all()
    assert tokenizer.batch_decode(tokens, skip_special_tokens=True) == texts


def test_tokenizer_spells_words_it_does_not_know():
    tokenizer = build_tokenizer()
    ids = tokenizer("a zebra")["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a zebra"


def test_word_pairs_mark_which_captions_hold_them():
    tokens = torch.tensor([[5, 10, 11, 3], [5, 10, 12, 3], [5, 12, 3, 0]])
    pairs = recipe.mark_pairs(tokens)
    # (5,10) (5,12) (10,11) (10,12) (11,3) (12,3), in this order; padding is no word
    assert pairs.tolist() == [[1, 0, 1, 0, 1, 0], [1, 0, 0, 1, 0, 1], [0, 1, 0, 0, 0, 1]]


def test_batches_follow_the_stages_shares(config):
    batches = list(recipe.plan_batches(config, films=6, seed=1))
    scenes = [int((batch >= 6).sum()) for batch in batches]
    assert scenes == [4, 4, 1, 1, 1]


def test_learning_rate_warms_up_and_comes_down():
    optimiser = {"learning_rate": 1.0, "warmup_steps": 10}
    rates = [recipe.set_rate(optimiser, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0)
    assert rates[99] < 0.02
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_augmentation_keeps_range_and_never_mirrors():
    ramp = torch.linspace(0, 1, 64).expand(8, 3, 64, 64)
    changed = augment_pixels(ramp, torch.Generator().manual_seed(0))
    assert changed.min() >= 0 and changed.max() <= 1
    assert not torch.equal(changed, ramp)
    assert (changed[..., 48:].mean(dim=(1, 2, 3)) > changed[..., :16].mean(dim=(1, 2, 3))).all()


def test_set_digest_changes_with_pixels_and_captions():
    pixels = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    digests = {PictureSet(p, [c]).digest() for p in (pixels, pixels + 1) for c in ("a", "b")}
    assert len(digests) == 4


def test_run_trains_and_writes_metrics_as_json_lines(config):
    metrics = io.StringIO()
    blip, data_id = recipe.train_captioner(config, metrics)
    lines = [json.loads(line) for line in metrics.getvalue().splitlines()]
    assert [line["step"] for line in lines] == [0, 4]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert not blip.training
    assert "radiograph-" in data_id and "sha256:" in data_id


def test_same_seed_trains_the_same_weights(config):
    first, _ = recipe.train_captioner(config, io.StringIO())
    second, _ = recipe.train_captioner(config, io.StringIO())
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_run_stops_with_a_named_error_when_the_loss_is_not_finite(config):
    config["optimiser"] |= {"learning_rate": float("inf")}
    with pytest.raises(LossNotFinite, match="at step"):
        recipe.train_captioner(config, io.StringIO())


def test_published_folder_verifies_and_captions(config, tmp_path):
    from models.checkpoint import verify_folder
    from models.predict import caption_images, get_captioner

    blip, data_id = recipe.train_captioner(config, io.StringIO())
    recipe.publish_captioner(blip, config, data_id, tmp_path / "blip", held_out=4)
    manifest = verify_folder(tmp_path / "blip")
    assert manifest.training_data == data_id
    assert manifest.image_size == 32
    assert {"effusion_side", "shape_and_colour"} <= manifest.scores.keys() and manifest.scores["scenes"] == 4
    black = np.zeros((32, 32, 3), dtype=np.uint8)
    assert len(caption_images([black, black], get_captioner(str(tmp_path / "blip")))) == 2


def test_model_is_told_its_special_tokens(config):
    text = recipe.build_model(config["model"], 100).config.text_config
    assert (text.bos_token_id, text.eos_token_id, text.sep_token_id, text.pad_token_id) == (DEC, SEP, SEP, PAD)
    assert PAD == 0
