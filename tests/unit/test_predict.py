"""One door for paths, PIL images and arrays; a list gives a list; bad images are named by number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import inference
from models import predict
from models.base import run_captioner
from models.checkpoint import BUNDLED_DIR, resolve_checkpoint
from models.dummy import DummyModel
from models.predict import answer_images, caption_images, load_picture
from readroom.errors import BadCall, ImageError, ItemError
from readroom.intake import opened_store
from readroom.records import GenerationSettings, ImageRef, Reason
from readroom.registry import register_checkpoint
from readroom.settings import load_settings

PIXELS = np.arange(40 * 30 * 3, dtype=np.uint8).reshape(40, 30, 3)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(PIXELS).save(path)
    return path


@pytest.fixture
def junk(tmp_path: Path) -> Path:
    path = tmp_path / "junk.png"
    path.write_bytes(b"no picture at all")
    return path


@pytest.fixture(autouse=True)
def dummy_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("READROOM_BLIP_MODEL", "dummy")
    monkeypatch.chdir(tmp_path)


def test_a_path_a_pil_image_and_an_array_get_the_same_caption(picture: Path) -> None:
    images = [picture, str(picture), Image.open(picture), PIXELS]
    texts = {found.text for found in caption_images(images, DummyModel())}
    assert len(texts) == 1


def test_captions_come_in_order_whatever_the_batch_size() -> None:
    images = [np.full((8, 8), number, dtype=np.uint8) for number in range(7)]
    captions = [caption_images(images, DummyModel(), batch_size=size) for size in (1, 3, 7, 16)]
    assert captions.count(captions[0]) == 4
    assert len({found.text for found in captions[0]}) == 7


def test_no_images_give_no_captions() -> None:
    assert caption_images([], DummyModel()) == []


def test_bad_images_are_named_by_number_and_never_by_path(picture: Path, junk: Path) -> None:
    with pytest.raises(ItemError) as caught:
        caption_images([picture, junk, picture, junk.with_name("absent.png")], DummyModel(), batch_size=2)
    assert "2 of 4" in str(caught.value)
    assert "1 (not_image)" in str(caught.value)
    assert "3 (missing)" in str(caught.value)
    assert str(junk.parent) not in str(caught.value)


def test_bad_images_are_returned_in_place_when_asked(picture: Path, junk: Path) -> None:
    found = caption_images([junk, picture], DummyModel(), errors="return")
    assert isinstance(found[0], ImageError)
    assert not isinstance(found[1], ItemError)


def test_answers_follow_their_own_image_past_a_bad_one(picture: Path, junk: Path) -> None:
    alone = answer_images([PIXELS], ["where?"], DummyModel())
    found = answer_images([junk, picture, PIXELS], ["a?", "what?", "where?"], DummyModel(), errors="return")
    assert isinstance(found[0], ImageError)
    assert found[2] == alone[0]


def test_other_things_than_images_are_a_bad_call() -> None:
    with pytest.raises(BadCall, match="not dict"):
        load_picture({}, "dicom_voi_v1", 8)  # type: ignore[arg-type]


class NameReader:
    """Features by file name: 5.png has 5, others have none."""

    def read(self, ref: ImageRef) -> np.ndarray:
        if not Path(ref.path).stem.isdigit():
            raise ImageError(Reason.MISSING, "it has no features")
        return np.full((1, 4), int(Path(ref.path).stem), dtype=np.uint8)


def test_a_model_that_reads_features_is_given_them_by_the_files_name_and_no_file_is_opened() -> None:
    model = DummyModel()
    model.reader = NameReader()
    found = caption_images([Path("/nowhere/5.png"), "7.png", "odd.png"], model, errors="return")
    assert found[:2] == run_captioner(DummyModel(), [np.full((1, 4), number, dtype=np.uint8) for number in (5, 7)])
    assert isinstance(found[2], ImageError)
    assert found[2].reason == Reason.MISSING


@pytest.mark.parametrize("image", [PIXELS, Image.new("L", (4, 4))])
def test_a_model_that_reads_features_takes_nothing_but_paths(image: object) -> None:
    with pytest.raises(BadCall, match="region features by file name: give a path"):
        load_picture(image, "dicom_voi_v1", 8, NameReader())  # type: ignore[arg-type]


def test_settings_reach_the_captioner() -> None:
    short = caption_images([PIXELS], DummyModel(), GenerationSettings(max_new_tokens=1))
    assert len(short[0].text.split()) == 1


# inference.py --------------------------------------------------------------------------------------------------------


def test_one_image_gives_a_string_and_a_list_a_list(picture: Path) -> None:
    one = inference.generate_caption(str(picture))
    assert isinstance(one, str)
    assert inference.generate_caption([picture, PIXELS]) == [one, one]


def test_one_bad_image_raises_its_own_error(junk: Path) -> None:
    with pytest.raises(ImageError):
        inference.generate_caption(junk)


def test_a_model_argument_wins_over_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("READROOM_BLIP_MODEL", "/no/such/folder")
    assert isinstance(inference.generate_caption(PIXELS, model="dummy"), str)


def test_without_a_setting_the_published_captioner_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("READROOM_BLIP_MODEL")
    asked = note_models(monkeypatch)
    for model in (None, "blip"):
        inference.generate_caption(PIXELS, model=model)
        inference.answer_question(PIXELS, "what?", model=model)
    assert asked == ["Salesforce/blip-image-captioning-base@main", "Salesforce/blip-vqa-base@main"] * 2


def note_models(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of each model that is asked for; none is loaded."""
    asked: list[str] = []
    monkeypatch.setattr(inference, "caption", lambda image, model, **rest: asked.append(model))
    monkeypatch.setattr(inference, "answer", lambda image, question, model, **rest: asked.append(model))
    return asked


@pytest.mark.parametrize("setting", ["dummy", "bundled", str(BUNDLED_DIR / "vlp")])
@pytest.mark.filterwarnings("ignore:bundled is a small model")
def test_a_familys_name_means_its_setting(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    monkeypatch.setenv("READROOM_VLP_MODEL", setting)
    asked = note_models(monkeypatch)
    inference.generate_caption(PIXELS)
    inference.generate_caption(PIXELS, model="vlp")
    inference.answer_question(PIXELS, "what?", model="vlp")
    vlp = resolve_checkpoint(setting, "vlp").location
    assert asked == [resolve_checkpoint("dummy").location, vlp, vlp]


@pytest.mark.parametrize(("variable", "setting", "model"), [
    ("READROOM_VLP_MODEL", "bundled:blip", "vlp"), ("READROOM_BLIP_MODEL", "bundled:vlp", "blip"),
])  # fmt: skip
def test_a_setting_of_another_family_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, setting: str, model: str
) -> None:
    monkeypatch.setenv(variable, setting)
    with pytest.raises(BadCall, match="of the family"):
        inference.generate_caption(PIXELS, model=model)


def test_the_registrys_active_checkpoint_is_what_a_family_means(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("READROOM_HOME", str(tmp_path / "home"))
    settings = load_settings()
    with opened_store(settings) as store:
        for source, name in ((str(BUNDLED_DIR / "vlp"), "mine"), ("dummy:item_ms=1", "other")):
            register_checkpoint(settings, store, source, name, activate=name == "mine", convert=False)
    asked = note_models(monkeypatch)
    with pytest.warns(UserWarning, match="small model"):  # it is the bundled one's copy
        inference.generate_caption(PIXELS, model="vlp")
    assert Path(asked[0]).parent == (settings.home_dir / "checkpoints").resolve()


def test_without_a_setting_vlp_is_the_bundled_one_and_the_caller_is_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = note_models(monkeypatch)
    for ask in (inference.generate_caption, lambda image, model: inference.answer_question(image, "what?", model)):
        with pytest.warns(UserWarning, match="small model for trying things out") as caught:
            ask(PIXELS, model="vlp")
        assert [Path(warning.filename).name for warning in caught] == [Path(__file__).name]
    assert asked == [str(BUNDLED_DIR / "vlp")] * 2


def test_what_the_settings_say_reaches_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"REGION_DIR": str(tmp_path), "DEVICE": "cpu", "NUM_BEAMS": "3"}.items():
        monkeypatch.setenv(f"READROOM_{name}", value)
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(inference, "caption", lambda image, **rest: asked.append(rest))
    monkeypatch.setattr(inference, "answer", lambda image, question, **rest: asked.append(rest))
    inference.generate_caption(PIXELS, "dummy")
    inference.answer_question(PIXELS, "what?", "dummy")
    shared = {"model": "dummy", "device": "cpu", "precision": "float32", "region_dir": tmp_path}
    assert asked == [shared | {"num_beams": 3, "max_new_tokens": None}, shared]


def test_the_longest_caption_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("READROOM_MAX_NEW_TOKENS", "2")
    assert len(inference.generate_caption(PIXELS).split()) == 2


def test_questions_and_images_pair_up() -> None:
    one = inference.answer_question(PIXELS, "what?", model="dummy")
    assert isinstance(one, str)
    assert inference.answer_question([PIXELS, PIXELS], "what?", model="dummy") == [one, one]
    assert inference.answer_question(PIXELS, ["what?", "where?"], model="dummy")[0] == one
    assert len(inference.answer_question([PIXELS, PIXELS], ["what?", "where?"], model="dummy")) == 2
    with pytest.raises(BadCall):
        inference.answer_question([PIXELS] * 3, ["what?", "where?"], model="dummy")


def test_a_model_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []

    def load(name: str, device: str, precision: str, region_dir: Path | None) -> DummyModel:
        loads.append(name)
        return DummyModel(name)

    monkeypatch.setattr(predict, "load_captioner", load)
    for _ in range(3):
        predict.get_captioner("dummy:item_ms=0.001")
    assert loads == ["dummy:item_ms=0.001"]


def test_importing_the_door_loads_no_torch() -> None:
    import subprocess
    import sys

    code = "import inference, sys; print('torch' in sys.modules)"
    root = Path(inference.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "False"
