"""VLP's released files, remade with their own names, become checkpoints that say the same."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch

from models.base import run_answerer, run_captioner
from models.checkpoint import VLP_CAPTION, read_manifest, verify_folder
from models.convert import convert_checkpoint
from models.load import load_answerer, load_captioner
from models.released import read_weights
from models.vlp.captioner import VlpAnswerer, VlpCaptioner, see_regions
from models.vlp.config import VlpConfig
from models.vlp.convert import convert_released, is_vlp
from models.vlp.decoding import SearchOptions, search_captions
from models.vlp.folder import read_answer_list
from models.vlp.network import VlpModel
from models.vlp.regions import RegionSpec
from readroom.errors import CheckpointBroken, CheckpointMissing
from readroom.records import GenerationSettings
from tests.fakes.small_blip import VOCABULARY
from tests.fakes.small_vlp import ANSWERS, show_images, small_model, write_regions

SETTINGS = GenerationSettings(3, 12, 1)
QUESTIONS = ["what is this?", "where is the banar", "what", "a picture of the lovek?", "where?", "a", "this is"]
# The release's regions and text, everything else small; one head of its 64.
SPEC = RegionSpec("precomputed", count=100, feature_dim=24, class_count=7, layout={"dataset": "coco"})
CONFIG = VlpConfig(
    vocab_size=len(VOCABULARY), hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=96,
    max_position_embeddings=130, region_feat_dim=24, region_num_classes=7,
)  # fmt: skip
WORDS = "bert.embeddings.word_embeddings.weight"
POSITIONS = "bert.embeddings.position_embeddings.weight"
TYPES = "bert.embeddings.token_type_embeddings.weight"
TRANSFORM = "cls.predictions.transform.dense.weight"


def released_names(layers: int, answers: bool) -> set[str]:
    """SPEC section 12, written down by itself."""
    modules = ["bert.embeddings.LayerNorm", "bert.pooler.dense", "vis_embed.0", "vis_embed.2", "vis_pe_embed.0"]
    modules += ["cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"]
    modules += ["ans_classifier.0", "ans_classifier.2"] if answers else []
    for number in range(layers):
        inner = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
        inner += ["attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm"]
        modules += [f"bert.encoder.layer.{number}.{name}" for name in inner]
    tables = {WORDS, POSITIONS, TYPES, "cls.predictions.bias", "cls.predictions.decoder.weight"}
    return tables | {f"{module}.{part}" for module in modules for part in ("weight", "bias")}


@pytest.fixture(scope="module")
def region_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_regions(tmp_path_factory.mktemp("regions"), SPEC)


@pytest.fixture(scope="module")
def model() -> VlpModel:
    return small_model(CONFIG)


def write_released(path: Path, weights: dict[str, torch.Tensor], **how: Any) -> Path:
    """A file as the release has it, with its vocabulary beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(weights, path, **how)
    (path.parent / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return path


def copy_weights(model: VlpModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def convert(path: Path, **more: Any) -> Path:
    folder = path.parent / "out"
    folder.mkdir()
    convert_released(path, read_weights(path), folder, **more)
    return folder


def load(folder: Path, region_dir: Path) -> VlpCaptioner:
    found = load_captioner(str(folder), "cpu", region_dir=region_dir)
    assert isinstance(found, VlpCaptioner)
    return found


def check_captions(folder: Path, model: VlpModel, region_dir: Path) -> None:
    """A checkpoint captions as a model does that holds the released tensors itself."""
    captioner = load(folder, region_dir)
    images = show_images(captioner)
    raw = captioner.generate(captioner.prepare(images), SETTINGS)
    with torch.inference_mode():
        seen = see_regions(captioner.parts.provider.compute(captioner.prepare(images)))
        found = search_captions(model, seen, captioner.parts.tokenizer.special, SearchOptions(3, 12, 1))
    assert raw.tokens == found.tokens
    assert raw.scores == pytest.approx(found.mean_scores(SearchOptions(3, 12, 1)), abs=1e-6)
    assert len(set(map(tuple, raw.tokens))) >= 4


# The release's names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("answers", "count"), [(0, 211), (3129, 215)])
def test_the_full_size_model_has_the_names_of_the_release(answers: int, count: int) -> None:
    with torch.device("meta"):
        names = set(VlpModel(VlpConfig(num_answers=answers)).state_dict())
    assert len(names) == count
    assert names == released_names(12, answers > 0)


def test_the_full_size_model_is_as_large_as_the_release() -> None:
    for answers, millions in ((0, 115.9), (3129, 121.9)):
        with torch.device("meta"):
            model = VlpModel(VlpConfig(num_answers=answers))
        assert sum(weight.numel() for weight in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_families_are_told_apart_by_names(model: VlpModel) -> None:
    assert is_vlp(model.state_dict())
    assert is_vlp({f"module.{name}": value for name, value in model.state_dict().items()})
    assert not is_vlp({"visual_encoder.cls_token": torch.zeros(1), "text_decoder.bert.x": torch.zeros(1)})


# Conversion ----------------------------------------------------------------------------------------------------------


def test_a_released_captioner_says_what_its_weights_said(tmp_path: Path, model: VlpModel, region_dir: Path) -> None:
    path = write_released(tmp_path / "coco_g8" / "model.30.bin", copy_weights(model))
    published = convert_checkpoint(path, tmp_path / "store")
    check_captions(published, model, region_dir)
    assert load(published, region_dir).defaults == VLP_CAPTION
    loaded, saved = load(published, region_dir).parts.model.state_dict(), model.state_dict()
    assert set(loaded) == released_names(2, answers=False)
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)


def test_a_manifest_vouches_for_what_was_converted(tmp_path: Path, model: VlpModel) -> None:
    path = write_released(tmp_path / "model.30.bin", copy_weights(model))
    published = convert_checkpoint(path, tmp_path / "store")
    manifest = verify_folder(published)
    assert (manifest.name, manifest.family, manifest.task) == ("model.30", "vlp", "caption")
    assert manifest.parameters == sum(weight.numel() for weight in model.parameters())
    assert manifest.regions == SPEC.as_json()
    assert (manifest.licence, manifest.allowed_use) == ("", "")
    assert manifest.command == "readroom checkpoints add --convert"
    assert set(manifest.files) == {"config.json", "model.safetensors", "vocab.txt"}


def test_a_released_answerer_says_what_its_weights_said(tmp_path: Path, region_dir: Path) -> None:
    model = small_model(replace(CONFIG, num_answers=len(ANSWERS)))
    path = write_released(tmp_path / "model.20.bin", copy_weights(model))
    (tmp_path / "trainval_label2ans.json").write_text(json.dumps(ANSWERS))
    folder = convert(path)
    answerer = load_answerer(str(folder), "cpu", region_dir=region_dir)
    assert isinstance(answerer, VlpAnswerer)
    assert read_manifest(folder).task == "answer"
    found = run_answerer(answerer, show_images(answerer), QUESTIONS)
    answerer.parts.model.load_state_dict(model.state_dict())
    assert run_answerer(answerer, show_images(answerer), QUESTIONS) == found
    assert len({text.text for text in found}) >= 2
    with pytest.raises(CheckpointBroken, match="captions no images"):
        load(folder, region_dir)


@pytest.mark.parametrize("legacy", [True, False])
def test_files_of_old_and_new_torch_are_read(tmp_path: Path, model: VlpModel, region_dir: Path, legacy: bool) -> None:
    path = write_released(tmp_path / "m.bin", copy_weights(model), _use_new_zipfile_serialization=not legacy)
    check_captions(convert(path), model, region_dir)


def rename(old: str, new: str) -> Any:
    return lambda weights: {name.replace(old, new): value for name, value in weights.items()}


def add(**more: torch.Tensor) -> Any:
    return lambda weights: weights | {name.replace("__", "."): value for name, value in more.items()}


@pytest.mark.parametrize(
    "dress",
    [
        lambda weights: rename("LayerNorm.bias", "LayerNorm.beta")(
            rename("LayerNorm.weight", "LayerNorm.gamma")(weights)
        ),
        lambda weights: {f"module.{name}": value for name, value in weights.items()},
        add(crit_mask_lm_smoothed__one_hot=torch.full((1, len(VOCABULARY)), 0.1)),
        lambda weights: weights | {"cls.predictions.decoder.bias": weights["cls.predictions.bias"].clone()},
    ],
    ids=["gamma and beta", "DataParallel", "label smoothing", "second bias"],
)
def test_other_dresses_of_the_same_weights(tmp_path: Path, model: VlpModel, region_dir: Path, dress: Any) -> None:
    dressed = dress(copy_weights(model))
    assert set(dressed) != set(model.state_dict())
    check_captions(convert(write_released(tmp_path / "m.bin", dressed)), model, region_dir)


def test_half_precision_weights_are_kept_to_the_bit(tmp_path: Path, model: VlpModel, region_dir: Path) -> None:
    weights = {name: value.half() for name, value in model.state_dict().items()}
    rounded = small_model(CONFIG)
    rounded.load_state_dict({name: value.float() for name, value in weights.items()})
    check_captions(convert(write_released(tmp_path / "m.bin", weights)), rounded, region_dir)


def test_two_token_types_become_six_and_mean_the_same(tmp_path: Path, region_dir: Path) -> None:
    # A model of two types has 0 and 1 where one of six has 4 and 5.
    model = small_model(replace(CONFIG, type_vocab_size=2))
    table = model.state_dict()[TYPES].clone()
    folder = convert(write_released(tmp_path / "m.bin", copy_weights(model)))
    check_captions(folder, model, region_dir)
    grown = load(folder, region_dir).parts.model.state_dict()[TYPES]
    assert torch.equal(grown, torch.stack([table[row] for row in (0, 1, 0, 0, 0, 1)]))


def test_too_few_positions_are_repeated(tmp_path: Path, region_dir: Path, model: VlpModel) -> None:
    weights = copy_weights(model)
    weights[POSITIONS] = weights[POSITIONS][:50]
    table = load(convert(write_released(tmp_path / "m.bin", weights)), region_dir).parts.model.state_dict()[POSITIONS]
    assert table.shape == (123, 64)  # 102 of the prefix, 20 of the text, its [SEP]
    assert all(torch.equal(table[row], weights[POSITIONS][row % 50]) for row in range(123))


def test_a_relaxed_projection_is_recognised(tmp_path: Path, region_dir: Path) -> None:
    model = small_model(replace(CONFIG, relax_projection=4))
    assert model.state_dict()[TRANSFORM].shape == (256, 64)
    folder = convert(write_released(tmp_path / "m.bin", copy_weights(model)))
    check_captions(folder, model, region_dir)
    assert load(folder, region_dir).parts.model.config.relax_projection == 4


def test_other_head_widths_can_be_told(tmp_path: Path, region_dir: Path) -> None:
    model = small_model(replace(CONFIG, num_attention_heads=4))
    folder = convert(write_released(tmp_path / "m.bin", copy_weights(model)), head_width=16)
    check_captions(folder, model, region_dir)


@pytest.mark.parametrize(
    ("folder", "dataset"),
    [("flickr30k_g8_lr3e-5", "flickr30k"), ("cc_g8_lr1e-4", "cc"), ("coco_g4", "coco"), ("mine", "coco")],
)
def test_features_are_looked_for_under_the_names_of_the_weights_data_set(
    tmp_path: Path, model: VlpModel, folder: str, dataset: str
) -> None:
    converted = convert(write_released(tmp_path / folder / "model.30.bin", copy_weights(model)))
    assert read_manifest(converted).regions["layout"] == {"dataset": dataset}


def test_a_vocabulary_may_lie_elsewhere(tmp_path: Path, model: VlpModel, region_dir: Path) -> None:
    path = write_released(tmp_path / "m.bin", copy_weights(model))
    (tmp_path / "vocab.txt").rename(tmp_path / "words.txt")
    check_captions(convert_checkpoint(path, tmp_path / "store", tmp_path / "words.txt"), model, region_dir)
    with pytest.raises(CheckpointMissing, match="bert-base-cased"):
        convert_checkpoint(path, tmp_path / "store", tmp_path / "nowhere.txt")


def test_the_vocabulary_comes_from_the_hubs_cache(
    tmp_path: Path, model: VlpModel, region_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    path = write_released(tmp_path / "m.bin", copy_weights(model))
    snapshot = tmp_path / "hub" / "models--google-bert--bert-base-cased" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "vocab.txt").rename(snapshot / "vocab.txt")
    with pytest.raises(CheckpointMissing, match=r"bert-base-cased's vocab\.txt beside the \.bin"):
        convert_checkpoint(path, tmp_path / "store")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    check_captions(convert_checkpoint(path, tmp_path / "store"), model, region_dir)


# What is refused -----------------------------------------------------------------------------------------------------


class Intruder:
    """Unpickling it would make a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, model: VlpModel, legacy: bool) -> None:
    weights: Any = copy_weights(model) | {"more": Intruder(tmp_path / "ran")}
    path = write_released(tmp_path / "m.bin", weights, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointBroken, match="more than tensors"):
        convert_checkpoint(path, tmp_path / "store")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "store").exists()


def without(name: str) -> Any:
    return lambda weights: {key: value for key, value in weights.items() if key != name}


def change(name: str, value: Any) -> Any:
    return lambda weights: weights | {name: value(weights[name]) if callable(value) else value}


QUERY = "bert.encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (without(QUERY), f"do not fit.*{QUERY}"),
        (without(WORDS), f"{WORDS}.*missing"),
        (without(TYPES), f"{TYPES}.*missing"),
        (without("vis_embed.2.bias"), r"do not fit.*vis_embed\.2\.bias"),
        (without("vis_embed.0.weight"), r"vis_embed\.0\.weight.*missing"),
        (without("cls.predictions.bias"), r"do not fit.*cls\.predictions\.bias"),
        (without("cls.predictions.decoder.weight"), r"cls\.predictions\.decoder\.weight missing"),
        (without("bert.encoder.layer.0.output.dense.bias"), r"do not fit.*layer\.0\.output\.dense\.bias"),
        (add(surplus=torch.zeros(1)), "do not fit.*surplus"),
        (add(ans_classifier__0__bias=torch.zeros(1)), r"do not fit.*ans_classifier\.0\.bias"),
        (rename("layer.1", "layer.3"), r"do not fit.*layer\.1"),
        (change("cls.predictions.decoder.weight", lambda table: table + 1), "decoder.weight is not .*word_embeddings"),
        (change("cls.predictions.decoder.weight", lambda table: table[:-1]), "decoder.weight is not .*word_embeddings"),
        (add(cls__predictions__decoder__bias=torch.ones(len(VOCABULARY))), "decoder.bias is not cls.predictions.bias"),
        (lambda weights: weights | {f"module.{QUERY}": weights[QUERY]}, "two weights have one name"),
        (change(TYPES, lambda table: table[:1]), "holds 1 types, not 2 or 6"),
        (change(TYPES, lambda table: table[:4]), "holds 4 types, not 2 or 6"),
        (change(QUERY, torch.zeros(64, 63)), f"another shape.*{QUERY}"),
        (change("vis_pe_embed.0.weight", torch.zeros(64, 5)), "region_num_classes"),
        (change("vis_pe_embed.0.weight", torch.zeros(64)), "no VLP's"),
        (change(WORDS, torch.zeros(0)), "word_embeddings.weight, which it should be"),
        (lambda weights: {"vis_embed.0.weight": torch.zeros(2, 2)}, "missing"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path: Path, model: VlpModel, spoil: Any, said: str) -> None:
    path = write_released(tmp_path / "m.bin", spoil(copy_weights(model)))
    with pytest.raises(CheckpointBroken, match=said):
        convert_checkpoint(path, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def share_numbers(table: torch.Tensor) -> torch.Tensor:
    return torch.zeros(1).expand(table.shape)


def break_one(value: float) -> Any:
    def spoil(table: torch.Tensor) -> torch.Tensor:
        table[1, 2] = value
        return table

    return spoil


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (change(POSITIONS, lambda table: table[:0]), f"{POSITIONS} has no rows"),
        (change(QUERY, torch.Tensor.to_sparse), f"{QUERY} is sparse"),
        (change(QUERY, torch.Tensor.to_sparse_csr), f"{QUERY} is sparse"),
        (change(QUERY, share_numbers), f"{QUERY} is .*larger than what the file holds"),
        (change("bert.extra", torch.zeros(1).expand(1 << 20, 1 << 20)), "bert.extra is .*larger"),
        (change(QUERY, lambda table: table.to("meta")), f"{QUERY} is .*larger"),
        (change(QUERY, lambda table: table.to(torch.complex64)), f"{QUERY} holds no floating point"),
        (change(QUERY, lambda table: table.to(torch.int8)), f"{QUERY} holds no floating point"),
        (change(WORDS, lambda table: table.to(torch.int8)), f"{WORDS} holds no floating point"),
        (change(QUERY, break_one(float("nan"))), f"{QUERY} holds NaN or infinity"),
        (change(QUERY, break_one(float("inf"))), f"{QUERY} holds NaN or infinity"),
        (change("vis_pe_embed.0.weight", torch.zeros(64, 5)), "no VLP's: region_num_classes is out of range"),
        (change(QUERY, torch.zeros(64, 63)), f"another shape than this VLP's: .*{QUERY}"),
    ],
)
def test_weights_that_are_no_sound_tensors_are_refused(tmp_path: Path, model: VlpModel, spoil: Any, said: str) -> None:
    """In words that speak of the weights, with something to do about it."""
    path = write_released(tmp_path / "m.bin", spoil(copy_weights(model)))
    with pytest.raises(CheckpointBroken, match=said) as caught:
        convert_checkpoint(path, tmp_path / "store")
    assert caught.value.remedy and "config.json" not in str(caught.value)
    assert not (tmp_path / "store").exists()


def test_a_width_that_is_no_multiple_of_a_heads_is_refused(tmp_path: Path) -> None:
    model = small_model(replace(CONFIG, hidden_size=96))
    with pytest.raises(CheckpointBroken, match="96 wide, no multiple"):
        convert(write_released(tmp_path / "m.bin", copy_weights(model)), head_width=36)


@pytest.mark.parametrize("words", [VOCABULARY[:-1], [*VOCABULARY, "more"]])
def test_a_vocabulary_of_another_size_is_refused(tmp_path: Path, model: VlpModel, words: list[str]) -> None:
    path = write_released(tmp_path / "m.bin", copy_weights(model))
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    with pytest.raises(CheckpointBroken, match=r"vocab\.txt holds"):
        convert_checkpoint(path, tmp_path / "store")


@pytest.fixture
def released_answerer(tmp_path: Path) -> Path:
    return write_released(tmp_path / "m.bin", copy_weights(small_model(replace(CONFIG, num_answers=len(ANSWERS)))))


def test_without_the_answers_it_says_what_to_put_where(released_answerer: Path, tmp_path: Path) -> None:
    (tmp_path / "trainval_label2ans.pkl").write_bytes(b"\x80\x02]q\x00.")
    with pytest.raises(CheckpointMissing) as caught:
        convert_checkpoint(released_answerer, tmp_path / "store")
    for word in ("answers.json", "trainval_label2ans.json", "never read"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (ANSWERS[:-1], "holds 24 texts"),
        ([*ANSWERS, "x"], "holds 26"),
        ({"a": 1}, "list of texts"),
        ([1] * 25, "list"),
        ([*ANSWERS[:-1], "\ud800"], "holds a text that is no Unicode"),
        ([*ANSWERS[:-2], "\ud83d", "\ude00"], "holds a text that is no Unicode"),
    ],
)
def test_other_answers_are_refused(released_answerer: Path, tmp_path: Path, answers: Any, said: str) -> None:
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    with pytest.raises(CheckpointBroken, match=said):
        convert_checkpoint(released_answerer, tmp_path / "store")


def test_answers_that_cannot_be_read_are_refused_in_words(tmp_path: Path) -> None:
    """A folder in the place of the file, as whoever runs the tests may be allowed to read everything."""
    (tmp_path / "answers.json").mkdir()
    for name in ("answers.json", "gone.json"):
        with pytest.raises(CheckpointBroken, match="cannot be read") as caught:
            read_answer_list(tmp_path / name)
        assert caught.value.remedy


def test_captions_do_not_change_when_converted_twice(tmp_path: Path, model: VlpModel, region_dir: Path) -> None:
    path = write_released(tmp_path / "m.bin", copy_weights(model))
    first = convert_checkpoint(path, tmp_path / "store")
    assert convert_checkpoint(path, tmp_path / "store") == first
    captioner = load(first, region_dir)
    assert run_captioner(captioner, show_images(captioner), SETTINGS)
