"""BLIP's released files, remade with their own names, become checkpoints that say the same."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from transformers import BlipForConditionalGeneration, BlipForQuestionAnswering

from models.base import run_answerer, run_captioner
from models.blip import BlipAnswerer
from models.blip_convert import build_tokenizer, convert_released, read_config
from models.checkpoint import BLIP_ANSWER, BLIP_CAPTION, read_manifest, verify_folder
from models.convert import convert_checkpoint
from models.load import load_answerer, load_captioner
from models.released import read_weights
from readroom.errors import CheckpointBroken, CheckpointMissing
from readroom.records import GenerationSettings
from tests.fakes.small_blip import VOCABULARY, mixed_images, save_answerer, save_hub_folder, small_model

SETTINGS = GenerationSettings(3, 9, 1)
HEAD_WIDTH = 16  # the small model's 64 by 4 heads

# The other direction, written down by itself: what each tensor of a vision block is called in BLIP's models/vit.py.
RELEASED_NAMES = {
    "vision_model.embeddings.class_embedding": "visual_encoder.cls_token",
    "vision_model.embeddings.position_embedding": "visual_encoder.pos_embed",
    "vision_model.embeddings.patch_embedding.weight": "visual_encoder.patch_embed.proj.weight",
    "vision_model.embeddings.patch_embedding.bias": "visual_encoder.patch_embed.proj.bias",
    "vision_model.post_layernorm.weight": "visual_encoder.norm.weight",
    "vision_model.post_layernorm.bias": "visual_encoder.norm.bias",
}
BLOCK_NAMES = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.qkv": "attn.qkv",
    "self_attn.projection": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
for _number in range(24):
    for _ours, _theirs in BLOCK_NAMES.items():
        for _part in ("weight", "bias"):
            RELEASED_NAMES[f"vision_model.encoder.layers.{_number}.{_ours}.{_part}"] = (
                f"visual_encoder.blocks.{_number}.{_theirs}.{_part}"
            )


def release_weights(model: Any) -> dict[str, torch.Tensor]:
    """Weights under the names of BLIP's release, with the buffers its classes saved."""
    named = {RELEASED_NAMES.get(name, name): value.clone() for name, value in model.state_dict().items()}
    assert not any(name.startswith("vision_model") for name in named)
    return named | {"text_decoder.bert.embeddings.position_ids": torch.arange(40)[None]}


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n")
    return path


def write_released(path: Path, model: Any, **more: Any) -> Path:
    # The release files hold epoch, optimiser and configuration beside the weights.
    torch.save({"model": release_weights(model) | more, "epoch": 4, "config": {"lr": 1e-5}}, path)
    return path


def convert_small(path: Path, folder: Path, vocabulary: Path) -> Path:
    folder.mkdir()
    convert_released(path, read_weights(path), folder, vocabulary, head_width=HEAD_WIDTH)
    return folder


def test_a_released_captioner_says_what_its_weights_said(tmp_path: Path, vocabulary: Path) -> None:
    model = with_released_epsilon(small_model())
    expected = run_captioner(
        load_captioner(str(save_hub_folder(tmp_path / "hub", model)), "cpu"), mixed_images(), SETTINGS
    )
    converted = convert_small(write_released(tmp_path / "model_caption.pth", model), tmp_path / "out", vocabulary)
    captioner = load_captioner(str(converted), "cpu")
    assert run_captioner(captioner, mixed_images(), SETTINGS) == expected
    assert len({found.text for found in expected}) >= 5
    assert captioner.defaults == BLIP_CAPTION


def with_released_epsilon(model: Any) -> Any:
    """BLIP's vision tower normalises with 1e-6 where transformers' default is 1e-5."""
    model.config.vision_config.layer_norm_eps = 1e-6
    again = type(model)(model.config).eval()
    again.load_state_dict(model.state_dict())
    return again


def test_a_released_answerer_says_what_its_weights_said(tmp_path: Path, vocabulary: Path) -> None:
    model = with_released_epsilon(small_model(BlipForQuestionAnswering))
    converted = convert_small(write_released(tmp_path / "model_vqa.pth", model), tmp_path / "out", vocabulary)
    answerer = load_answerer(str(converted), "cpu")
    assert isinstance(answerer, BlipAnswerer)
    assert answerer.defaults == BLIP_ANSWER
    # As released, questions start with [ENC]; transformers' own road leaves [CLS] there, so it is told.
    image, encoder_token = mixed_images(1)[0], len(VOCABULARY) + 1
    batch = answerer.prepare([image], ["what is this?"])
    assert batch.questions[0][0] == encoder_token
    original = load_answerer(str(save_hub_folder(tmp_path / "hub", model)), "cpu")
    assert isinstance(original, BlipAnswerer)
    expected = original.finish(original.generate(batch, SETTINGS))
    assert run_answerer(answerer, [image], ["what is this?"], SETTINGS) == expected


def test_a_manifest_vouches_for_what_was_converted(tmp_path: Path, vocabulary: Path) -> None:
    model = small_model()
    converted = convert_small(write_released(tmp_path / "model_large.pth", model), tmp_path / "out", vocabulary)
    manifest = verify_folder(converted)
    assert (manifest.name, manifest.family, manifest.task) == ("model_large", "blip", "caption")
    assert manifest.parameters == sum(weight.numel() for weight in model.parameters())
    assert manifest.licence == "BSD-3-Clause"
    assert manifest.command == "readroom checkpoints add --convert"
    assert manifest.image_size == 48
    assert not any(name.endswith((".pth", ".bin", ".py")) for name in manifest.files)


def test_a_pretraining_checkpoint_keeps_its_captioner_only(tmp_path: Path, vocabulary: Path) -> None:
    more = {
        "itm_head.weight": torch.zeros(2, 64), "vision_proj.weight": torch.zeros(4, 64), "temp": torch.zeros(1),
        "image_queue": torch.zeros(4, 8), "visual_encoder_m.cls_token": torch.zeros(1, 1, 64),
        "text_encoder.embeddings.word_embeddings.weight": torch.zeros(3, 64),
    }  # fmt: skip
    path = write_released(tmp_path / "model_base.pth", small_model(), **more)
    assert read_manifest(convert_small(path, tmp_path / "out", vocabulary)).task == "caption"


def test_the_tokenizer_is_berts_with_two_tokens_behind(vocabulary: Path) -> None:
    tokenizer = build_tokenizer(vocabulary)
    assert tokenizer.bos_token_id == len(VOCABULARY)
    assert tokenizer.get_vocab()["[ENC]"] == len(VOCABULARY) + 1
    assert tokenizer.decode(tokenizer("What is THIS?").input_ids, skip_special_tokens=True) == "what is this?"


@pytest.mark.parametrize(("width", "depth", "heads", "side"), [(768, 12, 12, 384), (1024, 24, 16, 480)])
def test_the_released_sizes_are_read_off_their_shapes(width: int, depth: int, heads: int, side: int) -> None:
    with torch.device("meta"):
        weights = {
            "vision_model.embeddings.patch_embedding.weight": torch.zeros(width, 3, 16, 16),
            "vision_model.embeddings.position_embedding": torch.zeros(1, 1 + (side // 16) ** 2, width),
            "text_decoder.bert.embeddings.word_embeddings.weight": torch.zeros(30524, 768),
            "text_decoder.bert.embeddings.position_embeddings.weight": torch.zeros(512, 768),
        }
        for number in range(depth):
            weights[f"vision_model.encoder.layers.{number}.mlp.fc1.weight"] = torch.zeros(4 * width, width)
        for number in range(12):
            weights[f"text_decoder.bert.encoder.layer.{number}.intermediate.dense.weight"] = torch.zeros(3072, 768)

    class Tokenizer:
        bos_token_id, sep_token_id, pad_token_id = 30522, 102, 0

    config = read_config(weights, Tokenizer(), head_width=64)
    vision, text = config.vision_config, config.text_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (width, depth, heads)
    assert (vision.image_size, vision.patch_size, vision.intermediate_size) == (side, 16, 4 * width)
    # BLIP's configs/med_config.json
    assert (text.num_attention_heads, text.num_hidden_layers, text.intermediate_size) == (12, 12, 3072)
    assert (text.vocab_size, text.max_position_embeddings, text.bos_token_id) == (30524, 512, 30522)
    assert text.encoder_hidden_size == width


def test_conversion_publishes_under_the_digest(tmp_path: Path) -> None:
    source = save_hub_folder(tmp_path / "pickled", pickled=True)
    published = convert_checkpoint(source, tmp_path / "store")
    assert published.name == read_manifest(published).digest
    assert [entry.name for entry in (tmp_path / "store").iterdir()] == [published.name]


def test_a_folder_with_a_pickled_transformers_model_says_the_same_after(tmp_path: Path) -> None:
    expected = run_captioner(load_captioner(str(save_hub_folder(tmp_path / "safe")), "cpu"), mixed_images(), SETTINGS)
    published = convert_checkpoint(save_hub_folder(tmp_path / "pickled", pickled=True), tmp_path / "store")
    assert run_captioner(load_captioner(str(published), "cpu"), mixed_images(), SETTINGS) == expected
    assert (read_manifest(published).name, read_manifest(published).licence) == ("pickled", "")


def test_a_pickled_answerer_is_converted_as_one(tmp_path: Path) -> None:
    model = small_model(BlipForQuestionAnswering)
    published = convert_checkpoint(save_hub_folder(tmp_path / "pickled", model, pickled=True), tmp_path / "store")
    assert read_manifest(published).task == "answer"
    questions = ["what is this?"] * 7
    expected = run_answerer(load_answerer(str(save_answerer(tmp_path / "safe")), "cpu"), mixed_images(), questions)
    assert run_answerer(load_answerer(str(published), "cpu"), mixed_images(), questions) == expected


def test_a_pickled_hub_id_is_converted_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "hub" / "models--someone--blip" / "snapshots" / ("a" * 40)
    save_hub_folder(snapshot, pickled=True)
    reference = tmp_path / "hub" / "models--someone--blip" / "refs" / "main"
    reference.parent.mkdir()
    reference.write_text("a" * 40)
    published = convert_checkpoint("someone/blip", tmp_path / "store")
    assert read_manifest(published).name == "someone/blip"
    assert isinstance(BlipForConditionalGeneration.from_pretrained(published), BlipForConditionalGeneration)


# What is refused -----------------------------------------------------------------------------------------------------


class Intruder:
    """Unpickling it would make a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, vocabulary: Path, legacy: bool) -> None:
    path, marker = tmp_path / "model.pth", tmp_path / "ran"
    if legacy:
        path.write_bytes(pickle.dumps({"model": Intruder(marker)}))
    else:
        torch.save({"model": Intruder(marker)}, path)
    with pytest.raises(CheckpointBroken, match="more than tensors"):
        convert_checkpoint(path, tmp_path / "store", vocabulary)
    assert not marker.exists()
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04 cut off", b"\x80\x02}q\x00."])
def test_something_that_is_no_pickle_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointBroken):
        convert_checkpoint(path, tmp_path / "store", tmp_path / "vocab.txt")


@pytest.mark.parametrize("content", [[1, 2], {"model": {"a": 1}}, {"model": 3}, torch.zeros(3)])
def test_a_file_without_a_table_of_tensors_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(CheckpointBroken, match="no table of tensors"):
        read_weights(tmp_path / "model.pth")


def test_other_weights_are_refused(tmp_path: Path, vocabulary: Path) -> None:
    torch.save({"model": {"layer.weight": torch.zeros(2)}}, tmp_path / "model.pth")
    with pytest.raises(CheckpointBroken, match="no weights of a BLIP"):
        convert_checkpoint(tmp_path / "model.pth", tmp_path / "store", vocabulary)


def test_a_missing_weight_is_named(tmp_path: Path, vocabulary: Path) -> None:
    weights = release_weights(small_model())
    weights.pop("visual_encoder.norm.bias")
    torch.save({"model": weights}, tmp_path / "model.pth")
    with pytest.raises(CheckpointBroken, match=r"post_layernorm\.bias"):
        convert_small(tmp_path / "model.pth", tmp_path / "out", vocabulary)


def test_without_a_vocabulary_it_says_where_to_put_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    path = write_released(tmp_path / "model.pth", small_model())
    with pytest.raises(CheckpointMissing, match=r"vocab\.txt beside the \.pth"):
        convert_checkpoint(path, tmp_path / "store")


def test_a_name_of_nothing_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMissing, match=r"\.bin file, a folder or a hub id"):
        convert_checkpoint("./no/such/thing", tmp_path / "store")


def test_a_folder_of_safetensors_needs_no_conversion(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMissing, match=r"pytorch_model\.bin"):
        convert_checkpoint(save_hub_folder(tmp_path / "safe"), tmp_path / "store")


def test_converted_configuration_is_plain_json(tmp_path: Path, vocabulary: Path) -> None:
    converted = convert_small(write_released(tmp_path / "m.pth", small_model()), tmp_path / "out", vocabulary)
    config = json.loads((converted / "config.json").read_text())
    assert config["architectures"] == ["BlipForConditionalGeneration"]
    assert config["vision_config"]["layer_norm_eps"] == 1e-6
