"""VLP as a captioner and an answerer: what it says, that a batch changes nothing, and which folders it refuses."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from models.base import run_answerer, run_captioner
from models.checkpoint import VLP_ANSWER, VLP_CAPTION, read_manifest, resolve_checkpoint, write_manifest
from models.load import load_answerer, load_captioner
from models.vlp.captioner import VlpAnswerer, VlpCaptioner, see_regions
from models.vlp.folder import TIED_WEIGHT, save_checkpoint, sign_folder
from models.vlp.layout import TASK_NUMBERS, lay_out
from readroom.errors import BadCall, CheckpointBroken, CheckpointMissing, EngineError
from readroom.records import GeneratedText, GenerationSettings, Reason
from tests.fakes.small_blip import VOCABULARY, mixed_images, save_answerer
from tests.fakes.small_vlp import (
    ANSWERS,
    SPECS,
    save_vlp,
    show_images,
    small_config,
    small_model,
    small_network,
    write_regions,
)
from worker.engine import Engine, ModelFailure

GREEDY = GenerationSettings(num_beams=1, max_new_tokens=12, min_new_tokens=1)
BEAMS = GenerationSettings(num_beams=3, max_new_tokens=12, min_new_tokens=1)
QUESTIONS = ["what is this?", "where is the banar", "what", "is this a picture of the lovek?", "where?", "a", "this is"]
PROVIDERS = list(SPECS)


@pytest.fixture(scope="module")
def region_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_regions(tmp_path_factory.mktemp("regions"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {provider: save_vlp(root / provider, provider) for provider in PROVIDERS}


@pytest.fixture(scope="module", params=PROVIDERS)
def captioner(request: pytest.FixtureRequest, folders: dict[str, Path], region_dir: Path) -> VlpCaptioner:
    return as_captioner(folders[request.param], region_dir)


@pytest.fixture(scope="module", params=PROVIDERS)
def answerer(request: pytest.FixtureRequest, folders: dict[str, Path], region_dir: Path) -> VlpAnswerer:
    found = load_answerer(str(folders[request.param]), device="cpu", region_dir=region_dir)
    assert isinstance(found, VlpAnswerer)
    return found


@pytest.fixture
def own_folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(folders["grid"], tmp_path / "copy"))


def as_captioner(folder: Path, region_dir: Path | None = None, precision: str = "float32") -> VlpCaptioner:
    found = load_captioner(str(folder), device="cpu", precision=precision, region_dir=region_dir)
    assert isinstance(found, VlpCaptioner)
    return found


# What it says --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_a_score_is_the_mean_log_probability_of_its_tokens(
    captioner: VlpCaptioner, settings: GenerationSettings
) -> None:
    for image in show_images(captioner):
        batch = captioner.prepare([image])
        raw = captioner.generate(batch, settings)
        assert raw.scores[0] == pytest.approx(score_again(captioner, batch, raw.tokens[0]), abs=1e-4)


def score_again(captioner: VlpCaptioner, batch: Any, tokens: list[int]) -> float:
    """The score without a cache: each token once more, from all before it and one [MASK]."""
    parts, special = captioner.parts, captioner.parts.tokenizer.special
    with torch.inference_mode():
        seen = see_regions(parts.provider.compute(batch))
        shares = []
        for number, token in enumerate(tokens):
            asked = lay_out([[*tokens[:number], special.mask]], "s2s", parts.model.config, special)
            hidden = parts.model(seen, asked.ids, asked.types, asked.visible)
            place = parts.model.config.prefix_length + number
            logits = parts.model.predict_tokens(hidden[:, place], TASK_NUMBERS["s2s"])
            shares.append(torch.log_softmax(logits[0], dim=-1)[token])
    return float(torch.stack(shares).mean())


def test_some_texts_end_by_themselves_and_some_are_cut_off(folders: dict[str, Path], region_dir: Path) -> None:
    ended = []
    for folder in folders.values():
        captioner = as_captioner(folder, region_dir)
        raw = captioner.generate(captioner.prepare(show_images(captioner)), BEAMS)
        ended += [captioner.parts.tokenizer.special.end in tokens for tokens in raw.tokens]
    assert 0 < sum(ended) < len(ended) == 7 * len(PROVIDERS)


def test_a_score_of_an_answer_is_the_log_of_its_own_probability(answerer: VlpAnswerer) -> None:
    batch = answerer.prepare(show_images(answerer), QUESTIONS)
    raw = answerer.generate(batch, answerer.defaults)
    parts, special = answerer.parts, answerer.parts.tokenizer.special
    with torch.inference_mode():
        asked = lay_out([parts.tokenizer.encode(question) for question in QUESTIONS], "bi", parts.model.config, special)
        hidden = parts.model(see_regions(parts.provider.compute(batch.images)), asked.ids, asked.types, asked.visible)
        logits = parts.model.predict_answers(hidden)
    for row, (number, score) in enumerate(zip(raw.classes, raw.scores, strict=True)):
        assert number == max(range(1, len(ANSWERS)), key=lambda place: float(logits[row, place]))
        assert score == pytest.approx(math.log(torch.sigmoid(logits[row, number].double())), abs=1e-5)
    assert [found.text for found in answerer.finish(raw)] == [ANSWERS[number] for number in raw.classes]


def test_the_unknown_answer_is_never_given(tmp_path: Path) -> None:
    spec = SPECS["grid"]
    model = small_model(small_config(spec))
    with torch.no_grad():
        model.ans_classifier[2].bias[0] = 1e4
    save_checkpoint(tmp_path / "sure", model, spec, VOCABULARY, small_network(spec), ANSWERS, name="sure")
    answerer = load_answerer(str(tmp_path / "sure"), device="cpu")
    assert all(found.text != ANSWERS[0] for found in run_answerer(answerer, mixed_images(), QUESTIONS))


def test_regions_are_read_by_the_name_of_an_image(folders: dict[str, Path], region_dir: Path) -> None:
    assert as_captioner(folders["grid"]).reader is None
    assert as_captioner(folders["detector"]).reader is None
    captioner = as_captioner(folders["precomputed"], region_dir)
    assert captioner.reader is not None
    with pytest.raises(BadCall, match="cannot see pictures"):
        captioner.prepare(mixed_images(1))


# A batch changes nothing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_a_caption_does_not_depend_on_its_batch(captioner: VlpCaptioner, settings: GenerationSettings) -> None:
    images = show_images(captioner)
    together = captioner.generate(captioner.prepare(images), settings)
    alone = [captioner.generate(captioner.prepare([image]), settings) for image in images]
    assert list(together.tokens) == [raw.tokens[0] for raw in alone]
    assert together.scores == pytest.approx([raw.scores[0] for raw in alone], abs=1e-4)
    assert len({found.text for found in captioner.finish(together)}) >= 5


def test_an_answer_does_not_depend_on_its_batch(answerer: VlpAnswerer) -> None:
    images = show_images(answerer)
    lengths = {len(row) for row in answerer.prepare(images, QUESTIONS).questions}
    assert len(lengths) >= 4
    together = run_answerer(answerer, images, QUESTIONS)
    alone = [run_answerer(answerer, [i], [q])[0] for i, q in zip(images, QUESTIONS, strict=True)]
    assert [found.text for found in together] == [found.text for found in alone]
    assert [found.score for found in together] == pytest.approx([found.score for found in alone], abs=1e-4)
    assert len({found.text for found in together}) >= 3


@pytest.mark.parametrize("beams", [1, 3])
def test_what_the_bundled_model_says_does_not_depend_on_its_batch(beams: int) -> None:
    captioner, answerer = (load("bundled:vlp", device="cpu") for load in (load_captioner, load_answerer))
    images, settings = mixed_images(7), GenerationSettings(beams, 60, 1)
    together = captioner.generate(captioner.prepare(images), settings)
    alone = [captioner.generate(captioner.prepare([image]), settings) for image in images]
    assert list(together.tokens) == [raw.tokens[0] for raw in alone]
    assert together.scores == pytest.approx([raw.scores[0] for raw in alone], abs=1e-4)
    questions = ["Is there an effusion?", "What is this?", "no", "How many circles are there?", "Where?", "a", "Why?"]
    found = run_answerer(answerer, images, questions)
    single = [run_answerer(answerer, [image], [asked])[0] for image, asked in zip(images, questions, strict=True)]
    assert [text.text for text in found] == [text.text for text in single]
    assert [text.score for text in found] == pytest.approx([text.score for text in single], abs=1e-4)


def test_two_checkpoints_in_one_process_do_not_meet(folders: dict[str, Path], tmp_path: Path) -> None:
    first = as_captioner(folders["grid"])
    before = run_captioner(first, mixed_images(), BEAMS)
    other = as_captioner(save_vlp(tmp_path / "other", "grid", seed=1))
    assert run_captioner(other, mixed_images(), BEAMS) != before
    assert run_captioner(first, mixed_images(), BEAMS) == before
    assert run_captioner(as_captioner(folders["grid"]), mixed_images(), BEAMS) == before


# Settings ------------------------------------------------------------------------------------------------------------


def test_defaults_are_the_manifests_else_those_vlp_was_published_with(
    folders: dict[str, Path], own_folder: Path
) -> None:
    assert as_captioner(folders["grid"]).defaults == BEAMS
    sign_folder(own_folder, name="plain")
    assert as_captioner(own_folder).defaults == VLP_CAPTION
    assert load_answerer(str(own_folder), device="cpu").defaults == VLP_ANSWER


def test_a_prompt_is_a_bad_call(captioner: VlpCaptioner) -> None:
    images = show_images(captioner, 1)
    with pytest.raises(BadCall, match="without a prompt"):
        run_captioner(captioner, images, GenerationSettings(1, 5, 1, "a picture of "))
    assert run_captioner(captioner, images, GenerationSettings(1, 5, 1, " "))


def test_texts_stop_where_training_stopped(captioner: VlpCaptioner) -> None:
    longest = captioner.parts.model.config.max_text_length + 1
    raw = captioner.generate(captioner.prepare(show_images(captioner, 2)), GenerationSettings(1, 500, 500))
    assert [len(tokens) for tokens in raw.tokens] == [longest] * 2


def test_a_least_length_is_kept(captioner: VlpCaptioner) -> None:
    raw = captioner.generate(captioner.prepare(show_images(captioner)), GenerationSettings(3, 12, 9))
    assert all(len(tokens) >= 10 or captioner.parts.tokenizer.special.end not in tokens for tokens in raw.tokens)


@pytest.mark.parametrize("asked", [["  "], [""], ["what?", "where?"], []])
def test_a_question_each_is_needed(answerer: VlpAnswerer, asked: list[str]) -> None:
    with pytest.raises(BadCall):
        answerer.prepare(show_images(answerer, 1), asked)


def test_a_long_question_is_cut(answerer: VlpAnswerer) -> None:
    images = show_images(answerer, 1)
    long, cut = "what " * 100, " ".join(["what"] * answerer.parts.model.config.max_text_length)
    assert len(answerer.prepare(images, [long]).questions[0]) == answerer.parts.model.config.max_text_length
    assert run_answerer(answerer, images, [long]) == run_answerer(answerer, images, [cut])


def test_words_for_special_tokens_in_a_question_are_plain_words(answerer: VlpAnswerer) -> None:
    special = answerer.parts.tokenizer.special
    row = answerer.prepare(show_images(answerer, 1), ["[SEP] what [MASK]"]).questions[0]
    assert not {special.end, special.mask, special.start} & set(row)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_half_precision_gives_texts(folders: dict[str, Path], region_dir: Path, provider: str) -> None:
    half = as_captioner(folders[provider], region_dir, precision="bfloat16")
    assert half.parts.model.dtype == torch.bfloat16
    assert all(found.score is not None for found in run_captioner(half, show_images(half), BEAMS))
    answerer = load_answerer(str(folders[provider]), "cpu", "bfloat16", region_dir)
    assert all(found.text for found in run_answerer(answerer, show_images(answerer), QUESTIONS))


def test_floats_are_no_pictures(folders: dict[str, Path]) -> None:
    with pytest.raises(BadCall):
        as_captioner(folders["grid"]).prepare([np.zeros((48, 48, 3), dtype=np.float32)])  # type: ignore[list-item]


@pytest.mark.parametrize("shape", [(48, 48, 4), (48, 48, 1), (48, 48, 2), (48,), (0, 48, 3), (1, 48, 48, 3)])
def test_other_shapes_are_no_pictures(folders: dict[str, Path], shape: tuple[int, ...]) -> None:
    with pytest.raises(BadCall, match="H x W or H x W x 3"):
        as_captioner(folders["grid"]).prepare([*mixed_images(1), np.zeros(shape, dtype=np.uint8)])


def test_no_picture_is_a_bad_call(folders: dict[str, Path]) -> None:
    with pytest.raises(BadCall, match="at least one picture"):
        as_captioner(folders["grid"]).prepare([])


@pytest.mark.parametrize("asked", ["\u200b", "\x00", "\U0001f600", "xyzzy"])
def test_a_question_without_a_known_word_is_a_bad_call(answerer: VlpAnswerer, asked: str) -> None:
    with pytest.raises(BadCall, match="no word this model knows") as caught:
        answerer.prepare(show_images(answerer, 2), ["what?", asked])
    assert caught.value.remedy


def test_half_a_surrogate_pair_in_a_question_is_read_as_a_mark(answerer: VlpAnswerer) -> None:
    found = run_answerer(answerer, show_images(answerer, 1), ["\udcff what is this"])
    assert found == run_answerer(answerer, show_images(answerer, 1), ["? what is this"])


@pytest.mark.parametrize("asked", ["\u200b", "\x00", "\U0001f600", "xyzzy", "\udcff what is this"])
def test_blip_treats_such_questions_alike(tmp_path: Path, asked: str) -> None:
    blip = load_answerer(str(save_answerer(tmp_path / "blip")), device="cpu")
    if "what" in asked:
        assert run_answerer(blip, mixed_images(1), [asked]) == run_answerer(blip, mixed_images(1), ["? what is this"])
    else:
        with pytest.raises(BadCall, match="no word this model knows"):
            blip.prepare(mixed_images(2), ["what?", asked])


def test_a_manifest_of_a_billion_beams_asks_for_no_memory(own_folder: Path) -> None:
    sign_again(own_folder, generation={"num_beams": 10**9, "max_new_tokens": 5, "min_new_tokens": 1})
    with pytest.raises(BadCall, match="at most 64 beams"):
        run_captioner(as_captioner(own_folder), mixed_images(1))


# Numbers that are none -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [GREEDY, BEAMS], ids=["greedy", "beams"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_image_of_no_numbers_fails_alone(
    folders: dict[str, Path], region_dir: Path, settings: GenerationSettings, value: float
) -> None:
    captioner = as_captioner(folders["precomputed"], region_dir)
    images = show_images(captioner, 5)
    right = run_captioner(captioner, images, settings)
    spoilt = images[2].features.copy()
    spoilt[3, 1] = value
    broken = replace(images[2], features=spoilt)
    found = Engine(lambda _: captioner).run_captions("vlp", [*images[:2], broken, *images[3:]], settings)
    assert found[2] == ModelFailure(Reason.MODEL_FAILED, "EngineError")
    texts = [text.text for text in found if isinstance(text, GeneratedText)]
    assert texts == [text.text for row, text in enumerate(right) if row != 2]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_answer_of_no_number_is_none(answerer: VlpAnswerer, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    bias = answerer.parts.model.ans_classifier[2].bias
    spoilt = bias.detach().clone()
    spoilt[4] = value
    monkeypatch.setattr(bias, "data", spoilt)
    with pytest.raises(EngineError, match="not finite"):
        run_answerer(answerer, show_images(answerer, 1), ["what is this?"])


# Folders -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_folder_holds_what_was_saved(folders: dict[str, Path], region_dir: Path, provider: str) -> None:
    folder, spec = folders[provider], SPECS[provider]
    weights = load_file(folder / "model.safetensors")
    model, saved = as_captioner(folder, region_dir).parts.model, small_model(small_config(spec)).state_dict()
    assert set(weights) == set(saved) - {TIED_WEIGHT}
    loaded = model.state_dict()
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    regions = {"regions.json", "regions.safetensors"} if provider != "precomputed" else set()
    assert {path.name for path in folder.iterdir()} == regions | {
        "config.json", "model.safetensors", "vocab.txt", "answers.json", "manifest.json",
    }  # fmt: skip
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in folder.iterdir())


def test_a_manifest_says_what_the_folder_is(folders: dict[str, Path]) -> None:
    manifest = read_manifest(folders["detector"])
    assert (manifest.family, manifest.task, manifest.image_size) == ("vlp", "caption+answer", 48)
    assert manifest.regions == SPECS["detector"].as_json()
    model, network = small_model(small_config(SPECS["detector"])), small_network(SPECS["detector"])
    assert network is not None
    assert manifest.parameters == sum(weight.numel() for part in (model, network) for weight in part.parameters())


def test_scores_may_be_signed_later_under_the_same_ref(own_folder: Path) -> None:
    before = read_manifest(own_folder)
    after = sign_folder(own_folder, name=before.name, scores={"films": 0.5}, generation=before.generation)
    assert (after.ref, after.scores, after.regions) == (before.ref, {"films": 0.5}, before.regions)
    assert as_captioner(own_folder).defaults == BEAMS


def test_a_checkpoint_without_an_answer_head_captions_only(tmp_path: Path) -> None:
    spec = SPECS["grid"]
    model = small_model(small_config(spec, num_answers=0))
    manifest = save_checkpoint(tmp_path / "m", model, spec, VOCABULARY, small_network(spec), name="captions")
    assert manifest.task == "caption"
    assert not (tmp_path / "m" / "answers.json").exists()
    assert run_captioner(as_captioner(tmp_path / "m"), mixed_images(2))
    with pytest.raises(CheckpointBroken, match="'caption'"):
        load_answerer(str(tmp_path / "m"), device="cpu")
    sign_folder(tmp_path / "m", name="boast", task="answer")
    with pytest.raises(CheckpointBroken, match="no answer head"):
        load_answerer(str(tmp_path / "m"), device="cpu")
    with pytest.raises(CheckpointBroken, match="'answer'"):
        as_captioner(tmp_path / "m")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"words": VOCABULARY[:-1]}, r"vocab\.txt"),
        ({"answers": ANSWERS[:-1]}, r"answers\.json"),
        ({"spec": SPECS["detector"]}, "num_regions"),
        ({"provider": None}, "network"),
    ],
)
def test_parts_that_do_not_fit_are_not_saved(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    spec = SPECS["grid"]
    parts: dict[str, Any] = {
        "model": small_model(small_config(spec)), "spec": spec, "words": VOCABULARY, "provider": small_network(spec),
        "answers": ANSWERS, "name": "odd",
    }  # fmt: skip
    with pytest.raises(CheckpointBroken, match=said):
        save_checkpoint(tmp_path / "m", **(parts | change))
    assert not (tmp_path / "m").exists()


def test_precomputed_regions_need_their_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    for place in (None, tmp_path / "nowhere", tmp_path):
        with pytest.raises(CheckpointMissing, match="READROOM_REGION_DIR"):
            as_captioner(folders["precomputed"], place)


def test_a_folder_without_a_manifest_is_refused(own_folder: Path) -> None:
    (own_folder / "manifest.json").unlink()
    with pytest.raises(CheckpointBroken, match="a VLP checkpoint has a manifest"):
        as_captioner(own_folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.txt", "answers.json", "regions.json"])
def test_a_changed_file_is_found_before_anything_is_loaded(own_folder: Path, name: str) -> None:
    content = bytearray((own_folder / name).read_bytes())
    content[-2] ^= 1
    (own_folder / name).write_bytes(content)
    with pytest.raises(CheckpointBroken, match=rf"{name} is not the file its manifest names".replace(".", r"\.")):
        as_captioner(own_folder)


def test_a_folder_that_became_another_checkpoint_is_refused(own_folder: Path) -> None:
    asked = resolve_checkpoint(str(own_folder))
    (own_folder / "answers.json").write_text(json.dumps(ANSWERS[::-1]))
    sign_folder(own_folder, name="other")
    with pytest.raises(CheckpointBroken, match="another checkpoint"):
        load_captioner(asked, device="cpu")


def sign_again(folder: Path, **changes: Any) -> None:
    """A manifest that vouches for the files as they are now."""
    kept = ("name", "family", "task", "parameters", "image_size", "mean", "std", "generation", "regions")
    manifest = read_manifest(folder).as_json()
    write_manifest(folder, **({key: manifest[key] for key in kept} | changes))


@pytest.mark.parametrize("change", [{"provider": "detector"}, {"count": 8}, {"image_size": 32}, {"mean": [0, 0, 0]}])
def test_a_checkpoint_runs_with_no_other_provider_than_its_own(own_folder: Path, change: dict[str, Any]) -> None:
    sign_again(own_folder, regions=SPECS["grid"].as_json() | change)
    with pytest.raises(CheckpointBroken, match="regions are not the ones of config"):
        as_captioner(own_folder)


@pytest.mark.parametrize("change", [{"image_size": 32}, {"mean": (0.0, 0.0, 0.0)}, {"std": (1.0, 1.0, 1.0)}])
def test_a_manifest_that_sees_pictures_otherwise_is_refused(own_folder: Path, change: dict[str, Any]) -> None:
    sign_again(own_folder, **change)
    with pytest.raises(CheckpointBroken, match="those of its regions"):
        as_captioner(own_folder)


def test_a_manifest_of_another_family_is_refused(own_folder: Path) -> None:
    source = resolve_checkpoint(str(own_folder))
    sign_again(own_folder, family="blip")
    with pytest.raises(CheckpointBroken, match="family is blip"):
        load_captioner(source, device="cpu")


def spoil_weights(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return spoil


def spoil_config(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def write(name: str, content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(content)


def truncate(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:200])

    return spoil


QUERY = "bert.encoder.layer.0.attention.self.query.weight"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_weights(lambda w: w.pop(QUERY)), f"do not fit.*{QUERY}"),
        (spoil_weights(lambda w: w.update(extra=torch.zeros(1))), "do not fit.*extra"),
        (spoil_weights(lambda w: w.update({QUERY: torch.zeros(3, 3)})), f"another shape.*{QUERY}"),
        (spoil_weights(lambda w: w.update({TIED_WEIGHT: torch.zeros(1)})), f"{TIED_WEIGHT} is not expected"),
        (spoil_weights(lambda w: w[QUERY].view(-1)[7:8].fill_(math.nan)), f"not finite: {QUERY}"),
        (spoil_weights(lambda w: w[QUERY].view(-1)[7:8].fill_(-math.inf)), f"not finite: {QUERY}"),
        (spoil_weights(lambda w: w.update({QUERY: w[QUERY].to(torch.int8)})), f"{QUERY} holds no floating point"),
        (truncate("model.safetensors"), r"model\.safetensors cannot be read"),
        (truncate("regions.safetensors"), "cannot load|cannot be read"),
        (truncate("config.json"), r"config\.json is not JSON"),
        (spoil_config(model_type="blip"), "model_type is not vlp"),
        (spoil_config(hidden_size=48), "another shape"),
        (spoil_config(num_hidden_layers=3), r"do not fit.*layer\.2"),
        (spoil_config(num_hidden_layers=9_999_999), "fewer than layers"),
        (spoil_config(vocab_size=9_999_999), r"vocab\.txt holds"),
        (spoil_config(num_regions=10), "num_regions is 10"),
        (spoil_config(region_feat_dim=31), "region_feat_dim is 31"),
        (spoil_config(region_num_classes=3), "region_num_classes is 3"),
        (spoil_config(region_geometry_dim=5), "region_geometry_dim is 5"),
        (spoil_config(num_answers=1), "num_answers"),
        (spoil_config(type_vocab_size=1), "type_vocab_size"),
        (spoil_config(num_answers=24), r"answers\.json holds 25"),
        (spoil_config(regions=None), "regions: regions"),
        (spoil_config(regions=[]), "regions: regions"),
        (write("vocab.txt", "\n".join([*VOCABULARY, "more"])), r"vocab\.txt holds"),
        (write("vocab.txt", "\n".join(reversed(VOCABULARY))), r"\[PAD\] is not the first"),
        (write("answers.json", "["), r"answers\.json is not JSON"),
        (write("answers.json", '{"0": "yes"}'), "not a list of texts"),
        (write("answers.json", json.dumps([*ANSWERS[:-1], 7])), "not a list of texts"),
    ],
)
def test_a_spoiled_folder_is_refused_in_words(own_folder: Path, spoil: Callable[[Path], Any], said: str) -> None:
    spoil(own_folder)
    sign_again(own_folder)
    with pytest.raises(CheckpointBroken, match=said):
        as_captioner(own_folder)


@pytest.mark.parametrize("name", ["vocab.txt", "answers.json", "model.safetensors", "regions.json"])
def test_a_missing_file_is_named(own_folder: Path, name: str) -> None:
    (own_folder / name).unlink()
    sign_again(own_folder)
    with pytest.raises(CheckpointMissing, match=name.replace(".", r"\.")):
        as_captioner(own_folder)
