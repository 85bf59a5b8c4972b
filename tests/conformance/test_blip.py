"""Our BLIP against transformers' own, and against itself in other batches."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BertTokenizer
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from models import hub
from models.base import run_answerer, run_captioner
from models.blip import BlipAnswerer, BlipCaptioner, BlipParts
from models.checkpoint import (
    BLIP_ANSWER,
    BLIP_CAPTION,
    CheckpointSource,
    resolve_checkpoint,
    write_manifest,
)
from models.load import load_answerer, load_captioner
from models.plain import publish_plain
from models.tensors import normalise_pixels, stack_pictures
from readroom.errors import BadCall, CheckpointBroken, CheckpointMissing
from readroom.records import GenerationSettings
from tests.fakes.small_blip import SIZE, VOCABULARY, mixed_images, save_answerer, save_hub_folder, small_model

GREEDY = GenerationSettings(num_beams=1, max_new_tokens=16, min_new_tokens=1, prompt="a picture of ")
BEAMS = GenerationSettings(num_beams=3, max_new_tokens=16, min_new_tokens=1, prompt="a picture of ")
QUESTIONS = ["what is this?", "where is the banar", "what", "is this a picture of the lovek?", "where?", "a", "this is"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hub_folder(tmp_path_factory.mktemp("hub") / "blip")


@pytest.fixture(scope="module")
def answer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_answerer(tmp_path_factory.mktemp("hub") / "vqa")


@pytest.fixture
def own_folder(folder: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def captioner(folder: Path) -> BlipCaptioner:
    return as_captioner(str(folder))


@pytest.fixture(scope="module")
def answerer(answer_folder: Path) -> BlipAnswerer:
    found = load_answerer(str(answer_folder), device="cpu")
    assert isinstance(found, BlipAnswerer)
    return found


def as_captioner(name: str | CheckpointSource, precision: str = "float32") -> BlipCaptioner:
    found = load_captioner(name, device="cpu", precision=precision)
    assert isinstance(found, BlipCaptioner)
    return found


def normalise(pixels: torch.Tensor, parts: BlipParts) -> torch.Tensor:
    return normalise_pixels(pixels, parts.mean, parts.std, parts.model)


# The same numbers as transformers ------------------------------------------------------------------------------------


def test_pictures_are_normalised_as_by_transformers_processor(captioner: BlipCaptioner, folder: Path) -> None:
    processor = BlipImageProcessorPil.from_pretrained(folder)
    images = [image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2) for image in mixed_images(9)]
    theirs = processor([Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]
    ours = normalise(stack_pictures(images, SIZE), captioner.parts)
    assert ours.shape == theirs.shape == (9, 3, SIZE, SIZE)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("prompt", ["", "a picture of "])
def test_captions_are_those_of_transformers_own_road(
    captioner: BlipCaptioner, folder: Path, beams: int, prompt: str
) -> None:
    processor, model = BlipImageProcessorPil.from_pretrained(folder), captioner.parts.model
    tokenizer = BertTokenizer.from_pretrained(folder)
    for image in mixed_images():
        rgb = Image.fromarray(image).convert("RGB")
        inputs = dict(processor(rgb, return_tensors="pt"))
        if prompt:
            text = tokenizer(prompt, return_tensors="pt")
            inputs |= {"input_ids": text["input_ids"], "attention_mask": text["attention_mask"]}
        tokens = model.generate(**inputs, num_beams=beams, max_new_tokens=12, min_new_tokens=1, do_sample=False)[0]
        expected = tokenizer.decode(tokens, skip_special_tokens=True).removeprefix(prompt.strip()).strip()
        settings = GenerationSettings(beams, 12, 1, prompt)
        assert run_captioner(captioner, [np.asarray(rgb)], settings)[0].text == expected


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_are_those_of_transformers_own_road(answerer: BlipAnswerer, answer_folder: Path, beams: int) -> None:
    processor, tokenizer = BlipImageProcessorPil.from_pretrained(answer_folder), answerer.parts.tokenizer
    for image, question in zip(mixed_images(), QUESTIONS, strict=True):
        rgb = Image.fromarray(image).convert("RGB")
        inputs = {**processor(rgb, return_tensors="pt"), **tokenizer(question, return_tensors="pt")}
        inputs.pop("token_type_ids", None)
        tokens = answerer.parts.model.generate(**inputs, num_beams=beams, max_new_tokens=9, min_new_tokens=1)[0]
        expected = tokenizer.decode(tokens, skip_special_tokens=True).strip()
        found = run_answerer(answerer, [np.asarray(rgb)], [question], GenerationSettings(beams, 9, 1))
        assert found[0].text == expected


@pytest.mark.parametrize("settings", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_a_score_is_the_mean_log_probability_of_its_tokens(
    captioner: BlipCaptioner, settings: GenerationSettings
) -> None:
    ends = 0
    for image in mixed_images():
        batch = captioner.prepare([image])
        raw = captioner.generate(batch, settings)
        expected, ended = score_again(captioner, batch.pixels, raw.tokens[0], settings.prompt)
        assert raw.scores[0] == pytest.approx(expected, abs=1e-4)
        ends += ended
    assert 0 < ends < 7, "both kinds of text, ended and cut off, should have been seen"


def score_again(captioner: BlipCaptioner, pixels: torch.Tensor, tokens: list[int], prompt: str) -> tuple[float, bool]:
    """The score by one forward pass over the finished text."""
    parts = captioner.parts
    end = parts.model.config.text_config.sep_token_id
    kept = tokens[: tokens.index(end) + 1] if end in tokens else tokens
    start = [parts.model.config.text_config.bos_token_id, *parts.tokenizer(prompt, add_special_tokens=False).input_ids]
    with torch.inference_mode():
        seen = parts.model.vision_model(pixel_values=normalise(pixels, parts))[0]
        ids = torch.tensor([start + kept])
        logits = parts.model.text_decoder(ids, encoder_hidden_states=seen, is_decoder=True).logits[0]
    shares = torch.log_softmax(logits[len(start) - 1 : -1], dim=-1)
    return float(shares.gather(1, torch.tensor(kept)[:, None]).mean()), end in tokens


# A batch changes nothing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_a_caption_does_not_depend_on_its_batch(captioner: BlipCaptioner, settings: GenerationSettings) -> None:
    check_batches(captioner, settings, distinct=5)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_caption_of_the_bundled_model_does_not_depend_on_its_batch(beams: int) -> None:
    check_batches(as_captioner("bundled"), GenerationSettings(beams, 40, 1), distinct=2)


def check_batches(captioner: BlipCaptioner, settings: GenerationSettings, distinct: int) -> None:
    images = mixed_images(7)
    together = captioner.generate(captioner.prepare(images), settings)
    alone = [captioner.generate(captioner.prepare([image]), settings) for image in images]
    end = captioner.parts.model.config.text_config.sep_token_id
    assert [cut(row, end) for row in together.tokens] == [cut(raw.tokens[0], end) for raw in alone]
    assert together.scores == pytest.approx([raw.scores[0] for raw in alone], abs=1e-4)
    assert len({found.text for found in captioner.finish(together)}) >= distinct


def cut(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens


@pytest.mark.parametrize("beams", [1, 3])
def test_an_answer_does_not_depend_on_its_batch(answerer: BlipAnswerer, beams: int) -> None:
    images, settings = mixed_images(7), GenerationSettings(beams, 9, 1)
    together = run_answerer(answerer, images, QUESTIONS, settings)
    alone = [run_answerer(answerer, [i], [q], settings)[0] for i, q in zip(images, QUESTIONS, strict=True)]
    assert [found.text for found in together] == [found.text for found in alone]
    assert len({found.text for found in together}) >= 5


# Settings and prompts ------------------------------------------------------------------------------------------------


def test_defaults_are_those_blip_was_published_with(captioner: BlipCaptioner, answerer: BlipAnswerer) -> None:
    assert captioner.defaults == BLIP_CAPTION
    assert answerer.defaults == BLIP_ANSWER
    # caption_coco.yaml says 20 and 5, counting [DEC] a picture of
    prompt = captioner.parts.tokenizer(BLIP_CAPTION.prompt, add_special_tokens=False).input_ids
    assert 1 + len(prompt) + BLIP_CAPTION.max_new_tokens == 20
    assert 1 + len(prompt) + BLIP_CAPTION.min_new_tokens == 5


def test_the_prompt_steers_and_is_not_part_of_the_text(captioner: BlipCaptioner) -> None:
    image = mixed_images(1)
    texts = {run_captioner(captioner, image, GenerationSettings(1, 10, 1, p))[0].text for p in ("", "lovek", "ditum a")}
    assert len(texts) == 3
    assert not any(text.startswith(("lovek", "ditum a")) for text in texts)


def test_a_checkpoints_own_generation_config_has_no_say(own_folder: Path, captioner: BlipCaptioner) -> None:
    habits = {"repetition_penalty": 9.0, "max_length": 7, "no_repeat_ngram_size": 1, "length_penalty": 3.0}
    (own_folder / "generation_config.json").write_text(json.dumps(habits))
    config = json.loads((own_folder / "config.json").read_text())
    config["text_config"] |= habits
    (own_folder / "config.json").write_text(json.dumps(config))
    images = mixed_images()
    assert run_captioner(as_captioner(str(own_folder)), images) == run_captioner(captioner, images)


def test_texts_stop_at_the_models_last_position(captioner: BlipCaptioner) -> None:
    found = run_captioner(captioner, mixed_images(2), GenerationSettings(1, 500, 500, "a picture of"))
    assert all(len(text.text) > 50 for text in found)


def test_a_prompt_longer_than_the_model_is_a_bad_call(captioner: BlipCaptioner) -> None:
    with pytest.raises(BadCall, match="prompt"):
        run_captioner(captioner, mixed_images(1), GenerationSettings(1, 5, 1, "a " * 60))


def test_an_empty_question_is_a_bad_call(answerer: BlipAnswerer) -> None:
    with pytest.raises(BadCall):
        answerer.prepare(mixed_images(1), ["  "])


def test_a_long_question_is_cut(answerer: BlipAnswerer) -> None:
    assert len(answerer.prepare(mixed_images(1), ["what " * 100]).questions[0]) == 35


def test_half_precision_gives_texts(folder: Path) -> None:
    half = as_captioner(str(folder), precision="bfloat16")
    assert half.parts.model.dtype == torch.bfloat16
    assert all(found.score is not None for found in run_captioner(half, mixed_images()))


def test_floats_are_no_pictures(captioner: BlipCaptioner) -> None:
    with pytest.raises(BadCall):
        captioner.prepare([np.zeros((SIZE, SIZE, 3), dtype=np.float32)])  # type: ignore[list-item]


# Folders -------------------------------------------------------------------------------------------------------------


def test_a_manifest_decides_over_the_hubs_files(own_folder: Path) -> None:
    write_manifest(
        own_folder, name="own", family="blip", task="caption", parameters=1, image_size=SIZE, preprocess="dicom_voi_v1",
        mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), generation={"num_beams": 2, "max_new_tokens": 9},
    )  # fmt: skip
    found = as_captioner(str(own_folder))
    assert found.parts.mean == (0.1, 0.2, 0.3)
    assert found.parts.std == (0.4, 0.5, 0.6)
    assert (found.defaults.num_beams, found.defaults.max_new_tokens) == (2, 9)
    assert found.checkpoint == resolve_checkpoint(str(own_folder)).ref


def test_a_folder_with_a_vocabulary_only_loads_the_same(own_folder: Path, captioner: BlipCaptioner) -> None:
    (own_folder / "tokenizer.json").unlink()
    images = mixed_images(2)
    assert run_captioner(as_captioner(str(own_folder)), images) == run_captioner(captioner, images)


def test_a_plain_folder_adopted_with_a_manifest_says_the_same_under_the_same_ref(
    own_folder: Path, tmp_path: Path
) -> None:
    plain = as_captioner(str(own_folder))
    adopted = as_captioner(str(publish_plain(resolve_checkpoint(str(own_folder)), tmp_path / "store")))
    manifest = resolve_checkpoint(str(next((tmp_path / "store").iterdir()))).manifest
    assert manifest is not None
    assert manifest.parameters == sum(weight.numel() for weight in plain.parts.model.parameters())
    assert (adopted.checkpoint, adopted.defaults) == (plain.checkpoint, plain.defaults)
    images = mixed_images(3)
    assert run_captioner(adopted, images) == run_captioner(plain, images)


def test_a_changed_file_is_found_before_anything_is_loaded(own_folder: Path) -> None:
    write_manifest(own_folder, name="own", family="blip", task="caption", parameters=1, image_size=SIZE)
    (own_folder / "vocab.txt").write_text("\n".join(reversed(VOCABULARY)))
    with pytest.raises(CheckpointBroken, match=r"vocab\.txt"):
        as_captioner(str(own_folder))


@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_folder_that_became_another_checkpoint_is_refused(own_folder: Path, with_manifest: bool) -> None:
    def sign() -> None:
        if with_manifest:
            write_manifest(own_folder, name="own", family="blip", task="caption", parameters=1, image_size=SIZE)

    sign()
    asked = resolve_checkpoint(str(own_folder))
    (own_folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    sign()
    with pytest.raises(CheckpointBroken, match="another checkpoint"):
        as_captioner(asked)


def spoil_weights(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def spoil_config(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def truncate(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:1000])

    return spoil


def enlarge_vocabulary(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join([*VOCABULARY, *(f"word{n}" for n in range(9))]))


QUERY = "text_decoder.bert.encoder.layer.0.attention.self.query.weight"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_weights(lambda w: w.pop(QUERY)), "do not fit.*query"),
        (spoil_weights(lambda w: w.update(extra=torch.zeros(1))), "do not fit.*extra"),
        (spoil_weights(lambda w: w.update({QUERY: torch.zeros(3, 3)})), "do(es)? not fit|cannot load"),
        (truncate("model.safetensors"), "cannot load"),
        (truncate("tokenizer.json"), "tokenizer"),
        (truncate("config.json"), r"config\.json is not JSON"),
        (enlarge_vocabulary, "more tokens than the weights"),
        (spoil_config(architectures=["BlipForImageTextRetrieval"]), "is a BlipForImageTextRetrieval"),
        (lambda folder: (folder / "preprocessor_config.json").write_text('{"image_mean": [1]}'), "image_mean"),
    ],
)
def test_a_spoiled_folder_is_refused_in_words(own_folder: Path, spoil: Callable[[Path], Any], said: str) -> None:
    spoil(own_folder)
    with pytest.raises(CheckpointBroken, match=said):
        as_captioner(str(own_folder))


def test_another_family_is_refused(own_folder: Path) -> None:
    spoil_config(model_type="mistral")(own_folder)
    with pytest.raises(CheckpointBroken, match="family 'mistral'"):
        as_captioner(str(own_folder))


def test_code_in_a_checkpoint_is_not_run(own_folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (own_folder / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Own: pass\n")
    spoil_config(auto_map={"AutoModel": "own.Own", "AutoConfig": "own.Own"})(own_folder)
    tokenizer = own_folder / "tokenizer_config.json"
    changed = json.loads(tokenizer.read_text()) | {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    tokenizer.write_text(json.dumps(changed))
    try:
        as_captioner(str(own_folder))
    except CheckpointBroken:
        pass
    assert not marker.exists()


# Hub ids, from a cache made by hand ----------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/blip-small"


def fill_cache(cache: Path, source: Path, revision: str = "main", commit: str = COMMIT) -> Path:
    """Lay a folder out as the hub cache does: refs name a commit, snapshots link to blobs."""
    repo = cache / f"models--{REPO.replace('/', '--')}"
    snapshot = repo / "snapshots" / commit
    for made in (snapshot, repo / "blobs", (repo / "refs" / revision).parent):
        made.mkdir(parents=True, exist_ok=True)
    for entry in source.iterdir():
        blob = repo / "blobs" / f"{commit[:8]}-{entry.name}"
        blob.write_bytes(entry.read_bytes())
        (snapshot / entry.name).symlink_to(os.path.relpath(blob, snapshot))
    (repo / "refs" / revision).write_text(commit)
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = tmp_path / "hub-cache"
    made.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(made))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return made


def test_a_hub_id_loads_from_the_cache(cache: Path, folder: Path, captioner: BlipCaptioner) -> None:
    fill_cache(cache, folder)
    found = as_captioner(REPO)
    assert found.checkpoint == f"hub:{REPO}@main"
    images = mixed_images(3)
    assert run_captioner(found, images) == run_captioner(captioner, images)


def test_a_revision_is_kept_apart(cache: Path, folder: Path, tmp_path: Path) -> None:
    fill_cache(cache, folder)
    fill_cache(cache, save_hub_folder(tmp_path / "v2", small_model(seed=1)), "v2", COMMIT[::-1])
    images = mixed_images(3)
    first, second = (run_captioner(as_captioner(name), images) for name in (REPO, f"{REPO}@v2"))
    assert first != second
    assert run_captioner(as_captioner(f"{REPO}@{COMMIT}"), images) == first


def test_our_own_checkpoint_on_the_hub_is_verified(cache: Path, own_folder: Path) -> None:
    write_manifest(own_folder, name="own", family="blip", task="caption", parameters=1, image_size=SIZE)
    snapshot = fill_cache(cache, own_folder)
    assert as_captioner(REPO).checkpoint == f"hub:{REPO}@main"
    (snapshot / "vocab.txt").resolve().write_text("changed")
    with pytest.raises(CheckpointBroken, match=r"vocab\.txt"):
        as_captioner(REPO)


def test_offline_and_not_cached_says_what_to_do(cache: Path) -> None:
    with pytest.raises(CheckpointMissing) as caught:
        as_captioner("Salesforce/blip-image-captioning-base")
    for word in ("HF_HOME", "folder", "READROOM_BLIP_MODEL=bundled", "hub cannot be reached"):
        assert word in str(caught.value)


def test_a_revision_that_is_not_cached_is_missing(cache: Path, folder: Path) -> None:
    fill_cache(cache, folder)
    with pytest.raises(CheckpointMissing, match=f"{REPO}@v9"):
        as_captioner(f"{REPO}@v9")


def test_pickles_on_the_hub_are_refused_naming_what_the_machine_holds(
    cache: Path, folder: Path, tmp_path: Path
) -> None:
    fill_cache(cache, save_hub_folder(tmp_path / "pickled", pickled=True))
    fill_cache(cache, folder, "refs/pr/7", COMMIT[::-1])
    with pytest.raises(CheckpointBroken) as caught:
        as_captioner(REPO)
    assert f"readroom checkpoints add {REPO} --convert" in str(caught.value)
    assert f"{REPO}@refs/pr/7" in str(caught.value)
    assert as_captioner(f"{REPO}@refs/pr/7").checkpoint == f"hub:{REPO}@refs/pr/7"


@pytest.mark.parametrize(
    ("author", "parent", "title", "taken"),
    [
        ("SFconvertbot", COMMIT, "Adding `safetensors` variant of this model", True),
        ("somebody", COMMIT, "Adding `safetensors` variant of this model", False),
        ("SFconvertbot", "f" * 40, "Adding `safetensors` variant of this model", False),
        ("SFconvertbot", COMMIT, "Better weights", False),
    ],
)
def test_the_hubs_own_conversion_is_taken_and_nobody_elses(
    cache: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    author: str, parent: str, title: str, taken: bool,
) -> None:  # fmt: skip
    fill_cache(cache, save_hub_folder(tmp_path / "pickled", pickled=True))
    fill_cache(cache, folder, "refs/pr/7", COMMIT[::-1])
    talk = SimpleNamespace(
        author=author, title=title, is_pull_request=True, status="open", git_reference="refs/pr/7", num=7
    )
    commits = [SimpleNamespace(commit_id=COMMIT[::-1]), SimpleNamespace(commit_id=parent)]
    monkeypatch.setattr(hub, "get_repo_discussions", lambda repo: iter([talk]))
    monkeypatch.setattr(hub.HfApi, "list_repo_commits", lambda self, repo, revision: commits)
    if taken:
        assert as_captioner(REPO).checkpoint == f"hub:{REPO}@main"
    else:
        with pytest.raises(CheckpointBroken, match="holds no safetensors"):
            as_captioner(REPO)


def test_the_door_reads_a_real_hub_cache_in_a_process_of_its_own(folder: Path, tmp_path: Path) -> None:
    fill_cache(tmp_path / "hub", folder)
    picture = tmp_path / "picture.png"
    Image.fromarray(mixed_images(1)[0]).save(picture)
    code = f"from inference import generate_caption; print(generate_caption({str(picture)!r}, model={REPO!r}))"
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "READROOM_DEVICE": "cpu"}
    environment.pop("HF_HUB_CACHE", None)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, cwd=root
    )
    expected = run_captioner(as_captioner(str(folder)), mixed_images(1))[0].text
    assert done.stdout.strip() == expected
