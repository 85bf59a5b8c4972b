"""The captioner this repository ships: whole, small, and right about films and scenes it never saw."""

from pathlib import Path

import pytest
import torch

from models.checkpoint import verify_folder
from models.predict import caption_images, get_captioner
from training.data import TEST_SEED, make_radiographs, make_scenes
from training.evaluation import caption_pixels, load_captioner, score_films, score_scenes
from training.phantoms import write_pacs

FOLDER = Path(__file__).parents[2] / "models/bundled/blip"
MAX_BYTES = 12 * 1024 * 1024
FLOOR = 0.9
# 160 of each keep this file under a minute on two busy cores. The seeds lie behind those of the manifest's scores.
COUNT = 160
FIRST_SEED = TEST_SEED + 100_000


@pytest.fixture(scope="module")
def captioner():
    torch.set_num_threads(2)
    return load_captioner(FOLDER)


def test_bundled_checkpoint_is_what_its_manifest_says():
    manifest = verify_folder(FOLDER)
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= manifest.files.keys()
    assert manifest.family == "blip" and manifest.task == "caption" and manifest.parent is None
    assert "training.recipe" in manifest.command


def test_bundled_checkpoint_is_small():
    assert 0 < sum(path.stat().st_size for path in FOLDER.iterdir()) <= MAX_BYTES


def test_manifest_claims_at_least_what_is_asked():
    scores = verify_folder(FOLDER).scores
    assert all(scores[name] >= FLOOR for name in ("effusion_side", "cardiomegaly", "shape", "colour"))
    assert scores["films"] >= 180 and scores["scenes"] == 200


def test_bundled_captioner_names_side_and_heart_on_films_it_never_saw(captioner):
    films = make_radiographs(COUNT, captioner.size, FIRST_SEED)
    scores = score_films(films.captions, caption_pixels(captioner, films.pixels))
    assert scores["films"] >= 0.9 * COUNT
    assert scores["effusion_side"] >= FLOOR, scores
    assert scores["cardiomegaly"] >= FLOOR, scores


def test_bundled_captioner_names_shape_and_colour_on_scenes_it_never_saw(captioner):
    scenes = make_scenes(COUNT, captioner.size, FIRST_SEED)
    scores = score_scenes(scenes.captions, caption_pixels(captioner, scenes.pixels))
    assert scores["scenes"] == COUNT
    assert scores["shape_and_colour"] >= FLOOR, scores


def test_bundled_captioner_is_as_right_through_dicom_and_the_serving_path(tmp_path):
    """Films as a PACS export writes them: windowed, inverted, 10 to 15 bits, some without any window."""
    records = [record for record in write_pacs(tmp_path, 40, seed=900) if record["expected"] == "accepted"]
    answers = caption_images([tmp_path / record["path"] for record in records], get_captioner("bundled"))
    truths, captions = [record["caption"] for record in records], [answer.text for answer in answers]
    scores = score_films(truths, captions)
    assert scores["films"] >= 40 and len(records) > scores["films"]
    assert scores["effusion_side"] >= FLOOR, scores
    assert scores["cardiomegaly"] >= FLOOR, scores
    assert scores["view"] >= FLOOR, scores
