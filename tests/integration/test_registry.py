"""Checkpoints from a name on the command line into the registry, and out of it again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled
from PIL import Image

from db.checkpoints import get_checkpoint, set_active
from db.session import Store, open_store, store_url
from db.submissions import SubmissionPlan
from models import checkpoint, hub
from models.checkpoint import VLP_CAPTION, CheckpointSource, resolve_checkpoint, verify_folder, write_manifest
from readroom.captions import TOY_NOTE, choose_captioner, list_pictures, warn_captioner
from readroom.doctor import check_model, check_regions
from readroom.errors import BadCall, CheckpointBroken, CheckpointMissing, ItemError
from readroom.intake import Intake, choose_checkpoint, plan_submission
from readroom.records import FAMILIES, JobKind, Priority
from readroom.registry import register_checkpoint
from readroom.settings import Settings, load_settings
from worker.app import locate_checkpoint, make_loader

REPO = "someone/blip-small"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(home=tmp_path / "home", blip_model="")


@pytest.fixture
def plain_folder(tmp_path: Path) -> Path:
    """A folder as the hub has them, without a manifest."""
    folder = tmp_path / "work" / "plain"
    folder.mkdir(parents=True)
    header = json.dumps({"weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 0]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (folder / "config.json").write_text('{"model_type": "blip"}')
    (folder / "README.md").write_text("words")
    return folder


# Folders -------------------------------------------------------------------------------------------------------------


def test_a_plain_folder_named_relatively_is_served_after_it_is_gone(
    settings: Settings, sqlite_store: Store, plain_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plain_folder.parent)
    enqueued = choose_checkpoint(settings, sqlite_store, "blip", "plain", remember=True)
    record = register_checkpoint(settings, sqlite_store, "./plain", name=None, activate=True, convert=False)
    assert record.ref == enqueued.ref == resolve_checkpoint("plain").ref
    assert record.manifest["parameters"] == 6
    assert record.name == "plain"
    shutil.rmtree(plain_folder)
    monkeypatch.chdir("/")
    found = locate_checkpoint(settings, sqlite_store, record.ref)
    assert Path(found.location).is_relative_to(settings.home_dir)
    assert verify_folder(found.location).ref == record.ref
    assert choose_checkpoint(settings, sqlite_store, "blip", None, remember=False).ref == record.ref


def test_a_folder_used_without_adding_it_is_remembered_by_its_whole_path(
    settings: Settings, sqlite_store: Store, plain_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plain_folder.parent)
    ref = choose_checkpoint(settings, sqlite_store, "blip", "./plain", remember=True).ref
    record = get_checkpoint(sqlite_store, ref)
    assert record is not None
    assert record.location == str(plain_folder)


def test_a_registered_folder_that_became_another_checkpoint_is_refused(
    settings: Settings, sqlite_store: Store, plain_folder: Path
) -> None:
    set_active(sqlite_store, choose_checkpoint(settings, sqlite_store, "blip", str(plain_folder), remember=True).ref)
    (plain_folder / "vocab.txt").write_text("other")
    with pytest.raises(CheckpointBroken, match="holds another one"):
        choose_checkpoint(settings, sqlite_store, "blip", None, remember=False)


# Families ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def vlp_folder(tmp_path: Path) -> Path:
    """A VLP that captions and answers, as far as names and manifests go."""
    folder = tmp_path / "work" / "my-vlp"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    write_manifest(folder, name="my-vlp", family="vlp", task="caption+answer", parameters=1)
    return folder


@pytest.fixture
def both_bundled(vlp_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A checkout with a bundled checkpoint of each family."""
    root = tmp_path / "bundled"
    root.mkdir()
    (root / "blip").symlink_to(checkpoint.BUNDLED_DIR / "blip")
    shutil.copytree(vlp_folder, root / "vlp")
    monkeypatch.setattr(checkpoint, "BUNDLED_DIR", root)
    return root


def test_each_family_has_its_own_active_checkpoint(
    settings: Settings, sqlite_store: Store, plain_folder: Path, vlp_folder: Path
) -> None:
    refs = {
        family: register_checkpoint(settings, sqlite_store, str(folder), name=None, activate=True, convert=False).ref
        for family, folder in (("blip", plain_folder), ("vlp", vlp_folder))
    }
    for family, ref in refs.items():
        assert choose_checkpoint(settings, sqlite_store, family, None, remember=False).ref == ref
    assert locate_checkpoint(settings, sqlite_store, refs["vlp"]).family == "vlp"


def test_a_family_without_any_checkpoint_says_what_to_do_and_takes_no_toy(
    settings: Settings, sqlite_store: Store, both_bundled: Path
) -> None:
    for kind in (JobKind.CAPTION, JobKind.ANSWER):
        with pytest.raises(
            CheckpointMissing, match=r"READROOM_VLP_MODEL.*checkpoints add.*--activate.*--model bundled"
        ):
            choose_checkpoint(settings, sqlite_store, "vlp", None, remember=False, kind=kind)


def test_bundled_means_the_familys_own_also_when_another_one_is_registered(
    settings: Settings, sqlite_store: Store, both_bundled: Path
) -> None:
    blip = register_checkpoint(settings, sqlite_store, "bundled", name=None, activate=True, convert=False)
    chosen = choose_checkpoint(settings, sqlite_store, "vlp", "bundled", remember=True)
    assert (chosen.family, chosen.name) == ("vlp", "bundled:vlp")
    record = register_checkpoint(settings, sqlite_store, "bundled:vlp", name=None, activate=True, convert=False)
    assert (record.ref, record.name, record.state) == (chosen.ref, "bundled:vlp", "active")
    assert choose_checkpoint(settings, sqlite_store, "vlp", None, remember=False).ref == chosen.ref
    assert choose_checkpoint(settings, sqlite_store, "blip", "bundled", remember=False).ref == blip.ref
    by_setting = settings.model_copy(update={"vlp_model": "bundled"})
    assert choose_checkpoint(by_setting, sqlite_store, "vlp", None, remember=False).ref == chosen.ref
    assert list(map(warn_captioner, (chosen, resolve_checkpoint("bundled"), resolve_checkpoint("dummy")))) == [
        TOY_NOTE, TOY_NOTE, None,
    ]  # fmt: skip


def test_a_worker_finds_a_checkpoint_by_its_familys_setting_and_among_the_bundled_ones(
    settings: Settings, sqlite_store: Store, both_bundled: Path, vlp_folder: Path
) -> None:
    (vlp_folder / "model.safetensors").write_bytes(b"other weights")
    ref = write_manifest(vlp_folder, name="my-vlp", family="vlp", task="caption", parameters=1).ref
    with pytest.raises(CheckpointMissing):
        locate_checkpoint(settings, sqlite_store, ref)
    named = settings.model_copy(update={"vlp_model": str(vlp_folder)})
    assert locate_checkpoint(named, sqlite_store, ref).location == str(vlp_folder)
    for family in FAMILIES:
        ref = resolve_checkpoint("bundled", family).ref
        assert locate_checkpoint(settings, sqlite_store, ref).family == family


def test_a_worker_hands_on_the_folder_of_features(
    settings: Settings, sqlite_store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("worker.app.load_captioner", lambda source, *rest: (source.ref, *rest))
    with_folder = settings.model_copy(update={"region_dir": tmp_path, "device": "cpu"})
    ref = "dummy:base_ms=0,item_ms=0"
    assert make_loader(with_folder, sqlite_store)(ref) == (ref, "cpu", "float32", tmp_path)  # type: ignore[comparison-overlap]


@pytest.mark.parametrize(("family", "model"), [("vlp", "bundled:blip"), ("vlp", REPO), ("blip", "bundled:vlp")])
def test_a_checkpoint_of_another_family_is_refused(
    settings: Settings, sqlite_store: Store, both_bundled: Path, family: str, model: str
) -> None:
    with pytest.raises(BadCall, match=f"and {family} was asked for.*READROOM_{family.upper()}_MODEL"):
        choose_checkpoint(settings, sqlite_store, family, model, remember=True)
    by_setting = settings.model_copy(update={f"{family}_model": model})
    with pytest.raises(BadCall, match=f"and {family} was asked for"):
        choose_checkpoint(by_setting, None, family, None, remember=False)
    assert choose_checkpoint(settings, sqlite_store, family, "dummy", remember=False).family == "dummy"


def test_a_checkpoint_for_another_task_is_refused_before_anything_is_queued(
    settings: Settings, sqlite_store: Store, vlp_folder: Path
) -> None:
    write_manifest(vlp_folder, name="my-vlp", family="vlp", task="answer", parameters=1)
    with pytest.raises(CheckpointBroken, match="my-vlp captions no images"):
        choose_checkpoint(settings, sqlite_store, "vlp", str(vlp_folder), remember=True)


def test_questions_are_answered_by_what_can_answer(settings: Settings, sqlite_store: Store, vlp_folder: Path) -> None:
    def choose(family: str, chosen: Settings = settings) -> CheckpointSource:
        return choose_checkpoint(chosen, sqlite_store, family, None, remember=False, kind=JobKind.ANSWER)

    # BLIP's setting and its active checkpoint are captioners.
    register_checkpoint(settings, sqlite_store, "bundled", name=None, activate=True, convert=False)
    assert choose("blip", settings.model_copy(update={"blip_model": "bundled"})).name == "Salesforce/blip-vqa-base"
    assert choose("vlp", settings.model_copy(update={"vlp_model": str(vlp_folder)})).name == "my-vlp"
    register_checkpoint(settings, sqlite_store, str(vlp_folder), name=None, activate=True, convert=False)
    assert choose("vlp").name == "my-vlp"


def test_the_doctor_looks_at_every_family_and_at_the_features(
    settings: Settings, both_bundled: Path, vlp_folder: Path, tmp_path: Path
) -> None:
    def look(**changes: object) -> list[tuple[str, str]]:
        findings = check_model(settings.model_copy(update={"blip_model": "bundled", **changes}))
        return [(finding.level, finding.text.partition(",")[0].partition(".")[0]) for finding in findings]

    assert look() == [("ok", "BLIP: bundled"), ("note", "VLP: none is chosen")]
    assert look(vlp_model="bundled") == [("ok", "BLIP: bundled"), ("ok", "VLP: bundled:vlp")]
    assert look(blip_model="nothing", vlp_model=str(vlp_folder)) == [
        ("error", "BLIP: no checkpoint is called 'nothing'"), ("ok", "VLP: my-vlp"),
    ]  # fmt: skip
    write_manifest(vlp_folder, name="my-vlp", family="vlp", task="caption", parameters=1,
                   regions={"provider": "precomputed"})  # fmt: skip
    told = look(vlp_model=str(vlp_folder))
    assert told[1:] == [
        ("ok", "VLP: my-vlp"),
        ("error", "VLP: my-vlp reads region features that were computed beforehand"),
    ]
    assert look(vlp_model=str(vlp_folder), region_dir=tmp_path)[1:] == [("ok", "VLP: my-vlp")]
    assert list(check_regions(settings.model_copy(update={"region_dir": tmp_path}))) == []
    (finding,) = check_regions(settings.model_copy(update={"region_dir": tmp_path / "nowhere"}))
    assert (finding.level, finding.text) == ("error", "READROOM_REGION_DIR is no folder")


# Several captioners of one submission --------------------------------------------------------------------------------


def plan(settings: Settings, store: Store, *families: str, model: str | None = None) -> SubmissionPlan:
    return plan_submission(settings, store, Intake("images", Path("/in"), Priority.BULK, families, model))


def test_a_plan_has_each_familys_checkpoint_in_the_same_order_however_they_are_named(
    settings: Settings, sqlite_store: Store, both_bundled: Path
) -> None:
    named = settings.model_copy(update={"blip_model": "dummy:base_ms=1", "vlp_model": "bundled"})
    both = plan(named, sqlite_store, "vlp", "blip", "vlp")
    assert both == plan(named, sqlite_store, "blip", "vlp")
    assert [(one.captioner, one.checkpoint.partition(":")[0]) for one in both.captioners] == [
        ("blip", "dummy"), ("vlp", "sha256"),
    ]  # fmt: skip
    assert both.captioners[1].settings == VLP_CAPTION
    assert plan(named, sqlite_store, "blip").captioners == both.captioners[:1]


def test_one_model_for_several_captioners_must_fit_each(
    settings: Settings, sqlite_store: Store, both_bundled: Path
) -> None:
    both = plan(settings, sqlite_store, *FAMILIES, model="bundled")
    assert [one.checkpoint for one in both.captioners] == [resolve_checkpoint("bundled", one).ref for one in FAMILIES]
    dummies = plan(settings, sqlite_store, *FAMILIES, model="dummy:item_ms=2")
    assert {one.checkpoint for one in dummies.captioners} == {"dummy:base_ms=0,item_ms=2"}
    for model in ("bundled:vlp", REPO, "chest"):
        with pytest.raises(BadCall, match="READROOM_BLIP_MODEL and READROOM_VLP_MODEL"):
            plan(settings, sqlite_store, *FAMILIES, model=model)


# Hub ids -------------------------------------------------------------------------------------------------------------

FIRST, SECOND, CONVERTED = "1" * 40, "2" * 40, "c" * 40


class Hub:
    """The hub as far as commits go: `main` moves, and it may be away."""

    def __init__(self) -> None:
        self.commit: str | None = FIRST
        self.files = ["model.safetensors"]

    def model_info(self, _api: Any, repo: str, *, revision: str, **_named: Any) -> SimpleNamespace:
        assert (repo, revision) == (REPO, "main")
        if self.commit is None:
            raise OfflineModeIsEnabled
        return SimpleNamespace(sha=self.commit, siblings=[SimpleNamespace(rfilename=name) for name in self.files])


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    made = Hub()
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *given, **named: made.model_info(*given, **named))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return made


def fill_cache(cache: Path, folder: Path, commit: str) -> None:
    """Lay a folder out as the hub's cache does."""
    repo = cache / f"models--{REPO.replace('/', '--')}"
    shutil.copytree(folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / "main").write_text(commit)


def test_a_hub_checkpoint_is_named_by_its_commit_and_stays_there(
    settings: Settings, sqlite_store: Store, online: Hub
) -> None:
    first = choose_checkpoint(settings, sqlite_store, "blip", REPO, remember=True)
    assert first.ref == f"hub:{REPO}@{FIRST}"
    online.commit = SECOND
    assert choose_checkpoint(settings, sqlite_store, "blip", REPO, remember=True).ref == first.ref
    assert locate_checkpoint(settings, sqlite_store, first.ref).location == f"{REPO}@{FIRST}"
    record = register_checkpoint(settings, sqlite_store, REPO, name=None, activate=False, convert=False)
    assert record.ref == f"hub:{REPO}@{SECOND}"
    assert choose_checkpoint(settings, sqlite_store, "blip", REPO, remember=True).ref == record.ref


def test_a_commit_given_is_kept_and_nobody_is_asked(settings: Settings, sqlite_store: Store, online: Hub) -> None:
    found = choose_checkpoint(settings, sqlite_store, "blip", f"{REPO}@{SECOND}", remember=True)
    assert found.ref == f"hub:{REPO}@{SECOND}"


def test_offline_the_cache_tells_the_commit(
    settings: Settings, sqlite_store: Store, online: Hub, plain_folder: Path, tmp_path: Path
) -> None:
    online.commit = None
    fill_cache(tmp_path / "hub", plain_folder, SECOND)
    assert choose_checkpoint(settings, sqlite_store, "blip", REPO, remember=True).ref == f"hub:{REPO}@{SECOND}"


def test_where_nobody_knows_the_commit_the_branch_stays_and_that_is_said(
    settings: Settings, sqlite_store: Store, online: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    online.commit = None
    assert choose_checkpoint(settings, sqlite_store, "blip", REPO, remember=True).ref == f"hub:{REPO}@main"
    assert f"{REPO}@main: results name the branch" in caplog.text


def test_without_huggingface_hub_the_branch_stays(
    settings: Settings, sqlite_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "models.hub", None)
    assert choose_checkpoint(settings, sqlite_store, "blip", REPO, remember=True).ref == f"hub:{REPO}@main"
    with pytest.raises(CheckpointMissing, match="huggingface_hub"):
        register_checkpoint(settings, sqlite_store, REPO, name=None, activate=True, convert=False)


def test_the_hubs_own_conversion_is_named_by_its_commit(
    settings: Settings, sqlite_store: Store, online: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    online.files = ["pytorch_model.bin"]
    talk = SimpleNamespace(author=hub.CONVERSION_AUTHOR, title=hub.CONVERSION_TITLE, is_pull_request=True,
                           status="open", git_reference="refs/pr/7")  # fmt: skip
    commits = [SimpleNamespace(commit_id=CONVERTED), SimpleNamespace(commit_id=FIRST)]
    monkeypatch.setattr(hub, "get_repo_discussions", lambda repo: iter([talk]))
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_commits", lambda self, repo, revision: commits)
    assert choose_checkpoint(settings, sqlite_store, "blip", REPO, remember=True).ref == f"hub:{REPO}@{CONVERTED}"


def test_a_hub_checkpoint_that_cannot_be_had_is_not_activated(
    settings: Settings, sqlite_store: Store, online: Hub
) -> None:
    online.commit = None
    with pytest.raises(CheckpointMissing, match=REPO):
        register_checkpoint(settings, sqlite_store, REPO, name=None, activate=True, convert=False)
    assert choose_checkpoint(settings, sqlite_store, "blip", None, remember=False).ref.startswith("hub:Salesforce/")


def test_an_activated_hub_checkpoint_is_the_one_that_was_downloaded(
    settings: Settings, sqlite_store: Store, online: Hub, plain_folder: Path, tmp_path: Path
) -> None:
    online.commit = None
    fill_cache(tmp_path / "hub", plain_folder, SECOND)
    record = register_checkpoint(settings, sqlite_store, REPO, name="chest", activate=True, convert=False)
    assert (record.ref, record.name, record.family) == (f"hub:{REPO}@{SECOND}", "chest", "blip")
    assert choose_checkpoint(settings, sqlite_store, "blip", None, remember=False).ref == record.ref


def test_asking_for_a_commit_loads_no_torch() -> None:
    code = "import models.hub, sys; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# One image, now ------------------------------------------------------------------------------------------------------


def test_a_caption_asks_the_registry_as_enqueue_does(settings: Settings, plain_folder: Path) -> None:
    settings.home_dir.mkdir()
    store = open_store(store_url(settings))
    record = register_checkpoint(settings, store, str(plain_folder), name="chest", activate=True, convert=False)
    store.close()
    assert choose_captioner(settings, "blip", "chest").ref == choose_captioner(settings, "blip", None).ref == record.ref
    assert choose_captioner(settings, "blip", "bundled").name == "bundled"
    assert [finding.text for finding in check_model(settings)] == ["BLIP: chest", "VLP: none is chosen"]


def test_a_caption_makes_no_home_of_its_own(settings: Settings) -> None:
    assert choose_captioner(settings, "blip", "bundled").name == "bundled"
    assert not settings.home_dir.exists()


def test_rows_name_images_by_the_path_as_given_in_valid_unicode(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "films" / os.fsdecode(b"M\xfcller")
    odd.mkdir(parents=True)
    picture = odd / os.fsdecode(b"p\xe9.png")
    Image.new("L", (8, 8), 9).save(picture)
    (odd / "empty.png").touch()
    monkeypatch.chdir(tmp_path)
    rows = [row for path in (Path("films"), picture) for row in list_pictures(settings, path)]
    escaped = r"M\udcfcller/p\udce9.png"
    assert {name for name, _ in rows[:2]} == {rf"films/{escaped}", r"films/M\udcfcller/empty.png"}
    assert rows[2] == (f"{tmp_path}/films/{escaped}", picture)
    for name, found in rows:
        json.dumps(name, ensure_ascii=False).encode()
        assert isinstance(found, ItemError) == name.endswith("empty.png")
        assert isinstance(found, ItemError) or found.samefile(picture)


@pytest.mark.parametrize(("model", "times"), [("bundled", 1), ("dummy", 0)])
def test_a_caption_of_the_bundled_model_comes_with_one_warning(tmp_path: Path, model: str, times: int) -> None:
    picture = tmp_path / "p.png"
    Image.new("L", (8, 8), 9).save(picture)
    environment = os.environ | {"READROOM_HOME": str(tmp_path / "home"), "READROOM_DEVICE": "cpu"}
    command = [sys.executable, "-m", "readroom.cli", "caption", "--json", "--model", model, str(picture), str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert len(json.loads(done.stdout)) == 2
    assert done.stderr.count("bundled is a small model for trying things out") == times
    assert done.stderr.count("AI drafts, not for diagnosis") == times
