"""Checkpoints by name, manifests field by field, and folders that are not what they say."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from models import checkpoint
from models.checkpoint import (
    BLIP_ANSWER,
    BLIP_CAPTION,
    DEFAULT_PROFILE,
    MANIFEST_NAME,
    VLP_CAPTION,
    CheckpointSource,
    adjust_settings,
    is_bundled,
    list_bundled,
    publish_folder,
    read_manifest,
    resolve_checkpoint,
    verify_folder,
    write_manifest,
)
from models.load import load_answerer, load_captioner
from models.plain import publish_plain
from readroom.errors import BadCall, CheckpointBroken, CheckpointMissing
from readroom.records import GenerationSettings

FIELDS: dict[str, Any] = {"name": "small", "family": "blip", "task": "caption", "parameters": 12}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "checkpoint"
    made.mkdir()
    (made / "model.safetensors").write_bytes(b"weights")
    (made / "config.json").write_text('{"model_type": "blip"}')
    (made / "vocab.txt").write_text("a\nb\n")
    (made / "README.md").write_text("words")
    write_manifest(made, **FIELDS, generation={"num_beams": 1, "max_new_tokens": 64})
    return made


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / MANIFEST_NAME
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not ...}))


def test_a_manifest_is_read_back_as_it_was_written(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest.name == "small"
    assert set(manifest.files) == {"model.safetensors", "config.json", "vocab.txt", "README.md"}
    assert manifest.files["model.safetensors"].sha256 == hashlib.sha256(b"weights").hexdigest()
    assert manifest.files["model.safetensors"].bytes == 7
    assert manifest.created.endswith("Z")
    assert manifest.defaults == GenerationSettings(num_beams=1, max_new_tokens=64)


def test_the_digest_is_that_of_the_canonical_table_of_files(folder: Path) -> None:
    manifest = read_manifest(folder)
    table = {name: entry.sha256 for name, entry in manifest.files.items()}
    canonical = json.dumps(table, sort_keys=True, separators=(",", ":"))
    assert manifest.digest == hashlib.sha256(canonical.encode()).hexdigest()
    assert manifest.ref == f"sha256:{manifest.digest}"


def test_a_manifest_written_twice_has_the_same_digest(folder: Path) -> None:
    first = read_manifest(folder)
    assert write_manifest(folder, **FIELDS).digest == first.digest


def test_a_sound_folder_verifies(folder: Path) -> None:
    assert verify_folder(folder) == read_manifest(folder)


def test_a_changed_file_is_named(folder: Path) -> None:
    (folder / "vocab.txt").write_text("a\nc\n")
    with pytest.raises(CheckpointBroken, match=r"vocab\.txt is not the file"):
        verify_folder(folder)


def test_a_truncated_file_is_named(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weig")
    with pytest.raises(CheckpointBroken, match=r"model\.safetensors has another size"):
        verify_folder(folder)


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointBroken, match=r"config\.json is missing"):
        verify_folder(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "extra.safetensors", "pytorch_model.bin", "code.py", "merges.txt"])
def test_a_loadable_file_the_manifest_does_not_name_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_text("{}")
    with pytest.raises(CheckpointBroken, match=f"{name} is not named"):
        verify_folder(folder)


def test_a_note_the_manifest_does_not_name_is_no_matter(folder: Path) -> None:
    (folder / "NOTES.md").write_text("words")
    verify_folder(folder)


@pytest.mark.parametrize("name", ["vocab.txt", MANIFEST_NAME])
def test_a_link_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    with pytest.raises(CheckpointBroken, match="is a link"):
        verify_folder(folder)


@pytest.mark.parametrize("name", ["../x.json", "/etc/passwd", "a/b.json", "..", "", "a\\b", ".hidden", MANIFEST_NAME])
def test_a_file_name_that_is_no_plain_name_is_refused(folder: Path, name: str) -> None:
    edit_manifest(folder, files={name: {"sha256": "0" * 64, "bytes": 1}})
    with pytest.raises(CheckpointBroken, match="files is not usable"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", ""),
        ("family", 3),
        ("parameters", "many"),
        ("parameters", True),
        ("files", {}),
        ("files", {"a.json": {"sha256": "0" * 63, "bytes": 1}}),
        ("files", {"a.json": {"sha256": "0" * 64, "bytes": -1}}),
        ("files", {"a.json": None}),
        ("files", []),
        ("mean", [0.5, 0.5]),
        ("std", [0.5, 0.0, 0.5]),
        ("std", [0.5, True, 0.5]),
        ("std", [0.5, 1e-300, 0.5]),
        ("std", [0.5, float("inf"), 0.5]),
        ("std", [0.5, 10**400, 0.5]),
        ("mean", [0.5, float("nan"), 0.5]),
        ("mean", [0.5, -(10**400), 0.5]),
        ("mean", [0.5, 1e6, 0.5]),
        ("mean", [0.5, False, 0.5]),
        ("generation", {"num_beams": "3"}),
        ("generation", {"temperature": 1}),
        ("scores", [1]),
        ("regions", ["grid"]),
        ("regions", None),
        ("parent", 1),
        ("training_data", None),
        ("licence", None),
        ("image_size", 1.5),
    ],
)
def test_a_wrong_field_is_named(folder: Path, key: str, value: Any) -> None:
    edit_manifest(folder, **{key: value})
    with pytest.raises(CheckpointBroken, match=f"manifest: {key}"):
        read_manifest(folder)


@pytest.mark.parametrize("key", ["name", "family", "task", "parameters", "files", "digest"])
def test_a_missing_field_is_named(folder: Path, key: str) -> None:
    edit_manifest(folder, **{key: ...})
    with pytest.raises(CheckpointBroken, match=f"manifest: {key} missing"):
        read_manifest(folder)


def test_a_digest_of_other_files_is_refused(folder: Path) -> None:
    edit_manifest(folder, digest="0" * 64)
    with pytest.raises(CheckpointBroken, match="digest does not belong"):
        read_manifest(folder)


def test_a_manifest_of_a_later_format_is_refused(folder: Path) -> None:
    edit_manifest(folder, format=2)
    with pytest.raises(CheckpointBroken, match="format is not 1"):
        read_manifest(folder)


def test_a_field_of_a_later_release_is_ignored(folder: Path) -> None:
    edit_manifest(folder, colour="blue")
    assert read_manifest(folder).name == "small"


@pytest.mark.parametrize("text", ["not json", "[]", "[" * 100_000, "{" + " " * 2_000_000 + "}"])
def test_a_manifest_that_is_no_json_object_is_refused(folder: Path, text: str) -> None:
    (folder / MANIFEST_NAME).write_text(text)
    with pytest.raises(CheckpointBroken, match=r"manifest\.json is"):
        read_manifest(folder)


def test_writing_an_unknown_field_is_a_bad_call(folder: Path) -> None:
    with pytest.raises(BadCall, match="colour"):
        write_manifest(folder, **FIELDS, colour="blue")


# Names ---------------------------------------------------------------------------------------------------------------


def test_a_folder_with_a_manifest_resolves_to_its_digest(folder: Path) -> None:
    found = resolve_checkpoint(str(folder))
    assert found.ref == read_manifest(folder).ref
    assert (found.family, found.name, found.location) == ("blip", "small", str(folder))
    assert found.caption_defaults.max_new_tokens == 64


def test_a_plain_hub_folder_resolves_to_a_digest_of_what_is_loaded(folder: Path) -> None:
    (folder / MANIFEST_NAME).unlink()
    first = resolve_checkpoint(str(folder))
    assert first.ref.startswith("sha256:")
    assert first.manifest is None
    assert first.caption_defaults == BLIP_CAPTION
    (folder / "README.md").write_text("other words")
    assert resolve_checkpoint(str(folder)).ref == first.ref
    (folder / "vocab.txt").write_text("b\na\n")
    assert resolve_checkpoint(str(folder)).ref != first.ref


@pytest.mark.parametrize("with_manifest", [True, False])
def test_the_place_of_a_folder_does_not_depend_on_where_one_stands(
    folder: Path, monkeypatch: pytest.MonkeyPatch, with_manifest: bool
) -> None:
    if not with_manifest:
        (folder / MANIFEST_NAME).unlink()
    monkeypatch.chdir(folder.parent)
    assert resolve_checkpoint(folder.name).location == resolve_checkpoint(f"./{folder.name}/").location == str(folder)


def test_a_folder_of_pickles_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    with pytest.raises(CheckpointBroken, match=r"readroom checkpoints add .* --convert"):
        resolve_checkpoint(str(tmp_path))


def test_a_pickle_itself_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_bytes(b"pickle")
    with pytest.raises(CheckpointBroken, match="--convert"):
        resolve_checkpoint(str(tmp_path / "model.pth"))


def test_an_empty_folder_is_missing_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMissing, match="no weights"):
        resolve_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "ref"),
    [
        ("Salesforce/blip-image-captioning-base", "hub:Salesforce/blip-image-captioning-base@main"),
        ("Salesforce/blip-vqa-base@refs/pr/7", "hub:Salesforce/blip-vqa-base@refs/pr/7"),
        ("dummy", "dummy:base_ms=0,item_ms=0"),
        ("dummy:item_ms=0.5,base_ms=5", "dummy:base_ms=5,item_ms=0.5"),
    ],
)
def test_a_name_resolves_without_looking_anywhere(name: str, ref: str) -> None:
    assert resolve_checkpoint(name).ref == ref


@pytest.mark.parametrize(
    ("name", "asked", "family"),
    [
        ("Salesforce/blip-vqa-base", "vlp", "blip"),
        ("someone/VLP-coco", "blip", "vlp"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "blip", "mistral"),
        ("someone/captions", "blip", "blip"),
        ("someone/captions", "vlp", "vlp"),
    ],
)
def test_a_hub_id_is_of_the_family_it_names_else_of_the_one_asked_for(name: str, asked: str, family: str) -> None:
    assert resolve_checkpoint(name, asked).family == family


# The bundled ones ----------------------------------------------------------------------------------------------------


@pytest.fixture
def both_bundled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a bundled checkpoint of each family."""
    root = folder.parent / "bundled"
    folder.rename(folder.parent / "blip")
    root.mkdir()
    (folder.parent / "blip").rename(root / "blip")
    (root / "vlp").mkdir()
    (root / "vlp" / "model.safetensors").write_bytes(b"others")
    write_manifest(root / "vlp", **FIELDS | {"family": "vlp", "task": "caption+answer"}, regions={"provider": "grid"})
    monkeypatch.setattr(checkpoint, "BUNDLED_DIR", root)
    return root


def test_bundled_is_the_one_of_the_family_that_is_asked_for(both_bundled: Path) -> None:
    names = {resolve_checkpoint("bundled").ref, resolve_checkpoint("bundled:blip", "vlp").ref}
    assert names == {read_manifest(both_bundled / "blip").ref}
    names = {resolve_checkpoint("bundled", "vlp").ref, resolve_checkpoint("bundled:vlp").ref}
    assert names == {read_manifest(both_bundled / "vlp").ref}
    assert [(one.family, one.name) for one in list_bundled()] == [("blip", "bundled"), ("vlp", "bundled:vlp")]
    assert resolve_checkpoint("bundled:vlp").caption_defaults == VLP_CAPTION
    assert read_manifest(both_bundled / "vlp").regions == {"provider": "grid"}
    assert read_manifest(both_bundled / "blip").regions == {}


def test_every_bundled_checkpoint_is_found_again_by_the_name_it_has(both_bundled: Path) -> None:
    for found in list_bundled():
        assert is_bundled(found.name)
        assert resolve_checkpoint(found.name) == found


def test_a_bundled_checkpoint_that_is_not_here_is_missing_and_nothing_stands_in_for_it(both_bundled: Path) -> None:
    (both_bundled / "vlp" / MANIFEST_NAME).unlink()
    with pytest.raises(CheckpointMissing, match=r"bundled vlp is not in this checkout.*models/bundled/vlp"):
        resolve_checkpoint("bundled", "vlp")
    assert [one.family for one in list_bundled()] == ["blip"]
    with pytest.raises(CheckpointMissing, match=r"no checkpoint of the family 'gpt' is bundled.*bundled:blip"):
        resolve_checkpoint("bundled:gpt")


# Tasks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "refused"),
    [("caption", "answer"), ("answer", "caption"), ("caption+answer", None), ("captions", "caption")],
)
def test_a_checkpoint_does_what_its_manifest_says_and_nothing_else(
    folder: Path, task: str, refused: str | None
) -> None:
    write_manifest(folder, **FIELDS | {"task": task})
    source = resolve_checkpoint(str(folder))
    for wanted in {"caption", "answer"} - {refused, "answer" if task == "captions" else ""}:
        source.check_task(wanted)
    if refused:
        with pytest.raises(CheckpointBroken, match=f"small {refused}s no .*: its manifest says '{task}'"):
            source.check_task(refused)


def test_a_model_is_not_loaded_for_a_task_that_is_not_its_own(folder: Path) -> None:
    with pytest.raises(CheckpointBroken, match="small answers no questions"):
        load_answerer(str(folder))
    write_manifest(folder, **FIELDS | {"task": "answer"})
    with pytest.raises(CheckpointBroken, match="small captions no images"):
        load_captioner(str(folder))


def test_a_vlp_is_told_where_features_are_and_a_blip_is_not_asked(
    both_bundled: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def load(source: CheckpointSource, device: str, precision: str, region_dir: Path | None) -> tuple[object, ...]:
        return source.name, device, precision, region_dir

    room = SimpleNamespace(load_vlp_captioner=load, load_vlp_answerer=load)
    monkeypatch.setitem(sys.modules, "models.vlp.captioner", room)
    for loader in (load_captioner, load_answerer):
        loaded = loader("bundled:vlp", "cpu", "bfloat16", region_dir=tmp_path)
        assert loaded == ("bundled:vlp", "cpu", "bfloat16", tmp_path)
    assert load_captioner("dummy", region_dir=tmp_path).family == "dummy"


def test_a_family_that_no_model_is_of_is_named(folder: Path) -> None:
    write_manifest(folder, **FIELDS | {"family": "lstm"})
    with pytest.raises(CheckpointBroken, match=r"of the family 'lstm'.*dummy, blip, vlp"):
        load_captioner(str(folder))


@pytest.mark.parametrize(
    "name", ["", "no-such-thing", "./no/folder", "/no/folder", "~/no-folder", "a/b/c", "dummy:x=1"]
)
def test_an_unknown_name_is_missing(name: str) -> None:
    with pytest.raises(CheckpointMissing):
        resolve_checkpoint(name)


def test_settings_are_adjusted_only_where_told() -> None:
    defaults = GenerationSettings(num_beams=3, max_new_tokens=16, min_new_tokens=5, prompt="x")
    assert adjust_settings(defaults, num_beams=None, max_new_tokens=None) == defaults
    shorter = adjust_settings(defaults, max_new_tokens=2)
    assert (shorter.max_new_tokens, shorter.min_new_tokens, shorter.num_beams) == (2, 2, 3)


# Publishing ----------------------------------------------------------------------------------------------------------


def test_publishing_copies_what_the_manifest_names_under_its_digest(folder: Path, tmp_path: Path) -> None:
    (folder / "NOTES.md").write_text("words")
    published = publish_folder(folder, tmp_path / "store")
    assert published == tmp_path / "store" / read_manifest(folder).digest
    assert not (published / "NOTES.md").exists()
    assert verify_folder(published).name == "small"
    assert [entry.name for entry in (tmp_path / "store").iterdir()] == [published.name]


def test_publishing_twice_at_once_gives_one_folder(folder: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        places = set(pool.map(lambda _: publish_folder(folder, tmp_path / "store"), range(8)))
    assert len(places) == 1
    assert [entry.name for entry in (tmp_path / "store").iterdir()] == [places.pop().name]


def test_publishing_replaces_a_damaged_copy(folder: Path, tmp_path: Path) -> None:
    published = publish_folder(folder, tmp_path / "store")
    (published / "vocab.txt").write_text("damaged")
    assert publish_folder(folder, tmp_path / "store") == published
    verify_folder(published)


def test_publishing_a_broken_folder_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    (folder / "vocab.txt").write_text("damaged")
    with pytest.raises(CheckpointBroken):
        publish_folder(folder, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def write_safetensors(path: Path, **shapes: tuple[str, list[int]]) -> None:
    header = {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]} for name, (dtype, shape) in shapes.items()}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)


@pytest.fixture
def plain_folder(folder: Path) -> Path:
    """As the hub has them: no manifest, notes, a pickle beside the safetensors, in two pieces."""
    (folder / MANIFEST_NAME).unlink()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    write_safetensors(folder / "model-00001-of-00002.safetensors", weight=("F32", [3, 4]), scale=("BF16", []))
    write_safetensors(folder / "model-00002-of-00002.safetensors", bias=("F16", [5]), position_ids=("I64", [1, 40]))
    processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    config = {"model_type": "blip", "architectures": ["BlipForQuestionAnswering"], "vision_config": {"image_size": 48}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_plain_folder_is_copied_with_a_manifest_under_the_ref_it_had(plain_folder: Path, tmp_path: Path) -> None:
    asked = resolve_checkpoint(str(plain_folder))
    published = publish_plain(asked, tmp_path / "store")
    manifest = verify_folder(published)
    assert manifest.ref == asked.ref == resolve_checkpoint(str(published)).ref
    assert published == tmp_path / "store" / manifest.digest
    assert (manifest.name, manifest.family, manifest.task) == (plain_folder.name, "blip", "answer")
    assert (manifest.parameters, manifest.image_size, manifest.licence) == (18, 48, "")
    assert (manifest.mean, manifest.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert manifest.defaults == BLIP_ANSWER
    assert not {"README.md", "pytorch_model.bin"} & {entry.name for entry in published.iterdir()}
    assert resolve_checkpoint(str(plain_folder)).ref == asked.ref
    assert publish_plain(asked, tmp_path / "store") == published


def test_a_plain_folder_made_of_links_is_copied_as_files(plain_folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for entry in plain_folder.iterdir():
        (snapshot / entry.name).symlink_to(entry)
    verify_folder(publish_plain(resolve_checkpoint(str(snapshot)), tmp_path / "store"))


def test_a_plain_folder_that_changes_meanwhile_is_not_published(plain_folder: Path, tmp_path: Path) -> None:
    asked = resolve_checkpoint(str(plain_folder))
    (plain_folder / "vocab.txt").write_text("other")
    with pytest.raises(CheckpointBroken, match="changed while"):
        publish_plain(asked, tmp_path / "store")
    assert list((tmp_path / "store").iterdir()) == []


@pytest.mark.parametrize(
    "content", [b"", b"weights", b"\xff" * 20, b"\x02" + bytes(7) + b"[]", b"\x02" + bytes(7) + b"{]"]
)
def test_damaged_weights_of_a_plain_folder_are_named(plain_folder: Path, tmp_path: Path, content: bytes) -> None:
    (plain_folder / "model-00001-of-00002.safetensors").write_bytes(content)
    with pytest.raises(CheckpointBroken, match="model-00001-of-00002"):
        publish_plain(resolve_checkpoint(str(plain_folder)), tmp_path / "store")


# The house -----------------------------------------------------------------------------------------------------------


def test_importing_checkpoints_loads_no_torch() -> None:
    code = "import models.plain, sys; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_default_profile_is_one_of_the_pixel_profiles() -> None:
    from models.pixels import DEFAULT_PROFILE as PIXELS_DEFAULT
    from models.pixels import PROFILES

    assert DEFAULT_PROFILE in PROFILES
    assert DEFAULT_PROFILE == PIXELS_DEFAULT


def test_a_source_says_what_it_is_without_a_manifest() -> None:
    assert CheckpointSource("dummy:", "dummy", "dummy", "dummy:").caption_defaults == GenerationSettings()
