"""Checkpoints as folders: what they are called, what they hold, and whether they still hold it. Knows no torch.

A checkpoint folder holds `manifest.json`, `*.safetensors` and the tokenizer's files, flat. Its ref is what results
carry: `sha256:<digest>` for a folder, `hub:owner/name@commit` for a hub id, `dummy:...` for the weightless one. Here a
hub id keeps the branch it was given, `models.hub` finds its commit.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from readroom.errors import BadCall, CheckpointBroken, CheckpointMissing
from readroom.records import FAMILIES, GenerationSettings, digest_json

Floats = tuple[float, float, float]

MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = 1
MAX_MANIFEST_BYTES = 1024 * 1024
BUNDLED_DIR = Path(__file__).parent / "bundled"
BUNDLED = "bundled"
TASKS = {"caption": "captions no images", "answer": "answers no questions"}  # and what a checkpoint without it does
DEFAULT_PROFILE = "dicom_voi_v1"
# The normalisation of CLIP, which BLIP was trained with (github.com/salesforce/BLIP, data/__init__.py).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# What a foreign mean or standard deviation may be, shades as parts of white.
MAX_SHADE = 1e6
MIN_DEVIATION = 1e-6
# BLIP's configs/caption_coco.yaml: 3 beams, prompt "a picture of ", 5 to 20 tokens. Its lengths count the start token
# and the prompt's three, ours count new tokens: 20 - 4 = 16 and 5 - 4 = 1.
BLIP_CAPTION = GenerationSettings(num_beams=3, max_new_tokens=16, min_new_tokens=1, prompt="a picture of ")
# BLIP's models/blip_vqa.py: 3 beams, at most 10 tokens with the start token.
BLIP_ANSWER = GenerationSettings(num_beams=3, max_new_tokens=9, min_new_tokens=1)

# VLP's published captions: 5 beams, summed log-probabilities, no least length, 20 tokens (SPEC section 11). Its answers
# come from a classifier: one choice, no search.
VLP_CAPTION = GenerationSettings(num_beams=5, max_new_tokens=20, min_new_tokens=0)
VLP_ANSWER = GenerationSettings(num_beams=1, max_new_tokens=1, min_new_tokens=1)
PUBLISHED_CAPTIONS = {"blip": BLIP_CAPTION, "vlp": VLP_CAPTION}

# What a loader of a checkpoint folder may read. A file of these kinds that no manifest names is refused: it could be
# a tokenizer somebody slipped in, or code.
LOADABLE_SUFFIXES = frozenset({".safetensors", ".json", ".txt", ".model", ".jinja", ".py"})
PICKLE_SUFFIXES = frozenset({".bin", ".pth", ".pt", ".ckpt", ".pkl", ".pickle"})
HASHED_SUFFIXES = frozenset({".safetensors", ".json", ".txt", ".model"})
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?$")
COMMIT_ID = re.compile(r"[0-9a-f]{40}")
CONVERT_REMEDY = "Convert it once: readroom checkpoints add PATH --convert"
SHA256_HEX = re.compile(r"^[0-9a-f]{64}$")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a checkpoint: SHA-256 in hex and size in bytes."""

    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint says of itself.

    `task` is `caption`, `answer` or `caption+answer`, `parent` the ref it was trained from, `training_data` names data
    sets and seeds, `scores` metrics on held-out data, `preprocess` a profile of models/pixels.py, `generation` the
    fields of GenerationSettings it was tuned with, `regions` where a model that sees regions has them from (RegionSpec
    of models/vlp/regions.py), `command` the command that made it, `created` UTC in ISO 8601. `digest` covers the files
    and not the manifest.
    """

    name: str
    family: str
    task: str
    parameters: int
    files: dict[str, FileEntry]
    digest: str
    format: int = MANIFEST_FORMAT
    parent: str | None = None
    training_data: str | dict[str, Any] = ""
    scores: dict[str, Any] = field(default_factory=dict)
    licence: str = ""
    allowed_use: str = ""
    preprocess: str = DEFAULT_PROFILE
    image_size: int = 384
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    generation: dict[str, Any] = field(default_factory=dict)
    regions: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    readroom_version: str = ""
    created: str = ""

    @property
    def ref(self) -> str:
        """The name results carry."""
        return f"sha256:{self.digest}"

    @property
    def defaults(self) -> GenerationSettings | None:
        """The generation settings the checkpoint was made for, None where it names none."""
        return GenerationSettings(**self.generation) if self.generation else None

    def as_json(self) -> dict[str, Any]:
        """The document `manifest.json` holds."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """Where a checkpoint is: `location` is a folder, a hub id with revision, or the dummy's own ref."""

    ref: str
    family: str
    name: str
    location: str
    manifest: Manifest | None = None

    @property
    def caption_defaults(self) -> GenerationSettings:
        """How it captions unless told otherwise: its manifest's settings, else those its family was published with."""
        published = PUBLISHED_CAPTIONS.get(self.family, GenerationSettings())
        return (self.manifest.defaults if self.manifest else None) or published

    def check_task(self, task: str) -> None:
        """Raise CheckpointBroken when the manifest says that it was not made to `caption` or `answer`."""
        if self.manifest is not None and task not in self.manifest.task.split("+"):
            made = f"its manifest says {self.manifest.task!r}"
            raise CheckpointBroken(f"checkpoint {self.name} {TASKS[task]}: {made}", "Name another checkpoint.")


# Names and places ----------------------------------------------------------------------------------------------------


def resolve_checkpoint(name: str, family: str = "blip") -> CheckpointSource:
    """Find a checkpoint by name: `bundled`, `dummy[:base_ms=5,item_ms=0.5]`, a folder, or `owner/name[@revision]`.

    `family` is the one that is asked for: `bundled` means its bundled checkpoint (`bundled:vlp` names one outright), a
    hub id that does not tell is taken for it. Reads at most the manifest (or, without one, hashes the folder); touches
    no network. Raises CheckpointMissing or CheckpointBroken with what to do.
    """
    name = name.strip()
    if is_dummy(name):
        return _resolve_dummy(name)
    if is_bundled(name):
        return _resolve_bundled(name.partition(":")[2] or family)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return resolve_folder(folder.resolve())  # a worker runs in another folder
    if folder.is_file():
        raise CheckpointBroken("that name is a file; a checkpoint is a folder", CONVERT_REMEDY)
    if HUB_ID.match(name) and not name.startswith((".", "~", "/")):
        return _resolve_hub(name, family)
    raise CheckpointMissing(
        f"no checkpoint is called {name!r}",
        "Give a folder, a hub id (owner/name[@revision]), `bundled` or `dummy`.",
    )


def is_dummy(name: str) -> bool:
    """Whether a name is that of a weightless model."""
    return name == "dummy" or name.startswith("dummy:")


def is_bundled(name: str) -> bool:
    """Whether a name is `bundled` or `bundled:<family>`."""
    return name == BUNDLED or name.startswith(f"{BUNDLED}:")


def name_bundled(family: str) -> str:
    """What a family's bundled checkpoint is called in the registry: BLIP's, which was there first, just `bundled`."""
    return BUNDLED if family == FAMILIES[0] else f"{BUNDLED}:{family}"


def list_bundled() -> list[CheckpointSource]:
    """The bundled checkpoints that are in this checkout, in the order of the families."""
    return [_resolve_bundled(family) for family in FAMILIES if _has_bundled(family)]


def resolve_folder(folder: Path, name: str = "") -> CheckpointSource:
    """The checkpoint in a folder. Without a manifest (a plain hub folder) its files are hashed, ~1 s a gigabyte."""
    refuse_pickles(folder)
    if not (folder / MANIFEST_NAME).is_file():
        return _resolve_plain(folder, name)
    manifest = read_manifest(folder)
    return CheckpointSource(manifest.ref, manifest.family, name or manifest.name, str(folder), manifest)


def adjust_settings(defaults: GenerationSettings, **changes: Any) -> GenerationSettings:
    """Settings with some fields replaced; a change to None changes nothing.

    The least length gives way to a shorter greatest one.
    """
    changed = replace(defaults, **{key: value for key, value in changes.items() if value is not None})
    return replace(changed, min_new_tokens=min(changed.min_new_tokens, changed.max_new_tokens))


def parse_dummy(name: str) -> dict[str, float]:
    """The costs in a dummy's name, milliseconds: `dummy:base_ms=5,item_ms=0.5`. Raises CheckpointMissing.

    With `pixels=0` a worker spares it the decoding, so that a benchmark measures the queue alone.
    """
    costs = {"base_ms": 0.0, "item_ms": 0.0, "pixels": 1.0}
    for part in filter(None, name.partition(":")[2].split(",")):
        key, _, value = part.partition("=")
        if key not in costs or not re.fullmatch(r"\d{1,6}(\.\d{1,6})?", value):
            raise CheckpointMissing(f"no checkpoint is called {name!r}", "Say dummy:base_ms=5,item_ms=0.5")
        costs[key] = float(value)
    return costs


def refuse_pickles(folder: Path) -> None:
    """Raise when a folder's weights are pickles only; reading those can run code."""
    suffixes = {entry.suffix.lower() for entry in folder.iterdir()}
    if ".safetensors" not in suffixes:
        if suffixes & PICKLE_SUFFIXES:
            raise CheckpointBroken("this folder holds only pickled weights, which are never read", CONVERT_REMEDY)
        raise CheckpointMissing("this folder holds no weights", "A checkpoint has *.safetensors files.")


def _resolve_dummy(name: str) -> CheckpointSource:
    costs = parse_dummy(name)
    if costs["pixels"]:
        del costs["pixels"]
    ref = "dummy:" + ",".join(f"{key}={value:g}" for key, value in costs.items())
    return CheckpointSource(ref, "dummy", name, ref)


def _resolve_bundled(family: str) -> CheckpointSource:
    if family not in FAMILIES:
        known = " and ".join(f"`{BUNDLED}:{one}`" for one in FAMILIES)
        raise CheckpointMissing(f"no checkpoint of the family {family!r} is bundled", f"There are {known}.")
    if not _has_bundled(family):
        raise CheckpointMissing(f"the bundled {family} is not in this checkout", f"Fetch models/bundled/{family}.")
    return resolve_folder(BUNDLED_DIR / family, name_bundled(family))


def _has_bundled(family: str) -> bool:
    return (BUNDLED_DIR / family / MANIFEST_NAME).is_file()


def _resolve_hub(name: str, family: str) -> CheckpointSource:
    repo, _, revision = name.partition("@")
    location = f"{repo}@{revision or 'main'}"
    return CheckpointSource(f"hub:{location}", _guess_family(repo, family), name, location)


def _guess_family(repo: str, asked: str) -> str:
    # Until the files are here; the loader trusts config.json.
    return next((family for family in ("mistral", *FAMILIES) if family in repo.lower()), asked)


def _resolve_plain(folder: Path, name: str) -> CheckpointSource:
    family = str(read_json(folder / "config.json").get("model_type", ""))
    if not family:
        raise CheckpointBroken("this folder holds no config.json that names a model_type")
    files = {entry.name: hash_file(entry) for entry in list_files(folder) if entry.suffix in HASHED_SUFFIXES}
    return CheckpointSource(f"sha256:{digest_files(files)}", family, name or folder.name, str(folder))


# Manifests -----------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path | str) -> Manifest:
    """Read and check `manifest.json`, field by field; the files it names are not looked at.

    Raises CheckpointMissing when there is none, CheckpointBroken naming the wrong field.
    """
    path = Path(folder) / MANIFEST_NAME
    if not path.is_file():
        raise CheckpointMissing("this folder holds no manifest.json", "Name a folder that has one.")
    return _parse_manifest(read_json(path))


def write_manifest(folder: Path | str, **described: Any) -> Manifest:
    """Hash the files of a folder and write its manifest; `described` are fields of Manifest (`name`, `family`, ...).

    `files`, `digest`, `format`, and unless given `created` and `readroom_version`, are filled in here.
    """
    folder = Path(folder)
    _check_names(described)
    entries = [entry for entry in list_files(folder) if entry.name != MANIFEST_NAME]
    files = {entry.name: {"sha256": hash_file(entry), "bytes": entry.stat().st_size} for entry in entries}
    document = {
        "format": MANIFEST_FORMAT,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "readroom_version": _read_version(),
        **described,
        "files": files,
        "digest": digest_files({name: str(entry["sha256"]) for name, entry in files.items()}),
    }
    manifest = _parse_manifest(json.loads(json.dumps(document)))
    text = json.dumps(manifest.as_json(), indent=2, sort_keys=True) + "\n"
    _write_atomically(folder / MANIFEST_NAME, text.encode())
    return manifest


def verify_folder(folder: Path | str, allow_links: bool = False) -> Manifest:
    """Read every file a manifest names and compare size and SHA-256; refuse loadable files it does not name.

    `allow_links` is for the hub's cache, which is made of links. Raises CheckpointBroken naming the file.
    """
    folder = Path(folder)
    if not allow_links:
        _refuse_link(folder / MANIFEST_NAME)
    manifest = read_manifest(folder)
    _refuse_extra(folder, manifest)
    for name, entry in manifest.files.items():
        if not allow_links:
            _refuse_link(folder / name)
        _verify_file(folder / name, entry)
    return manifest


def publish_folder(source: Path | str, dest_root: Path | str) -> Path:
    """Copy a verified checkpoint to `<dest_root>/<digest>`; readers see all of it or nothing.

    Only the files its manifest names travel. The same digest published twice is one folder; a damaged copy that
    already stands there is moved aside. Returns the folder.
    """
    source, root = Path(source), Path(dest_root)
    manifest = verify_folder(source)
    target = root / manifest.digest
    if target.is_dir() and _is_sound(target):
        return target
    names = [*manifest.files, MANIFEST_NAME]
    return publish_files(root, manifest.digest, lambda staged: _copy_files(source, staged, names))


def publish_files(root: Path, digest: str, fill: Callable[[Path], None]) -> Path:
    """Make `<root>/<digest>` out of what `fill` puts into an empty folder; readers see all of it or nothing.

    Raises CheckpointBroken unless that is a checkpoint of this digest.
    """
    root.mkdir(parents=True, exist_ok=True)
    staged = root / f".staged-{secrets.token_hex(6)}"
    staged.mkdir(mode=0o700)
    try:
        fill(staged)
        _sync_folder(staged)
        if verify_folder(staged).digest != digest:
            raise CheckpointBroken("the checkpoint's files changed while they were copied", "Add it again.")
        return _move_in_place(staged, root / digest)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def is_triple(key: str, value: Any) -> bool:
    """Whether these can be a picture's `mean` or `std`: three finite numbers that float32 can hold and divide by."""
    # Compared before they are turned into floats: an integer of a foreign document may have hundreds of digits.
    least = -MAX_SHADE if key == "mean" else MIN_DEVIATION
    return (
        isinstance(value, list | tuple)
        and len(value) == 3
        and all(isinstance(v, int | float) and not isinstance(v, bool) and least <= v < MAX_SHADE for v in value)
    )


def digest_files(hashes: Mapping[str, str]) -> str:
    """The digest of a checkpoint: SHA-256 over the canonical JSON of `{file name: sha256}`."""
    return digest_json(dict(hashes))


def hash_file(path: Path) -> str:
    """SHA-256 (hex) of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most MAX_MANIFEST_BYTES, {} where there is no file. Raises CheckpointBroken."""
    if not path.exists():
        return {}
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise CheckpointBroken(f"{path.name} is larger than {MAX_MANIFEST_BYTES} bytes")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise CheckpointBroken(f"{path.name} is not JSON") from None
    if not isinstance(document, dict):
        raise CheckpointBroken(f"{path.name} is not a JSON object")
    return document


def list_files(folder: Path) -> list[Path]:
    """The files of a checkpoint folder by name, hidden ones left out."""
    # Links are allowed here (the hub's cache is made of them); a manifest's folder is checked in verify_folder.
    return sorted(entry for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith("."))


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise CheckpointBroken(f"{path.name} is a link; a checkpoint holds its files itself")


def _verify_file(path: Path, entry: FileEntry) -> None:
    if not path.is_file():
        raise CheckpointBroken(f"{path.name} is missing", "Fetch the checkpoint again.")
    if path.stat().st_size != entry.bytes:
        raise CheckpointBroken(f"{path.name} has another size than its manifest says", "Fetch the checkpoint again.")
    if hash_file(path) != entry.sha256:
        raise CheckpointBroken(f"{path.name} is not the file its manifest names", "Fetch the checkpoint again.")


def _refuse_extra(folder: Path, manifest: Manifest) -> None:
    for entry in folder.iterdir():
        known = entry.name in manifest.files or entry.name == MANIFEST_NAME
        if not known and entry.suffix.lower() in LOADABLE_SUFFIXES | PICKLE_SUFFIXES:
            raise CheckpointBroken(f"{entry.name} is not named by the manifest", "Remove it or write a new manifest.")


def _is_sound(folder: Path) -> bool:
    try:
        verify_folder(folder)
    except (CheckpointBroken, CheckpointMissing):
        return False
    return True


def _copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    for name in names:
        shutil.copyfile(source / name, target / name, follow_symlinks=False)


def _move_in_place(staged: Path, target: Path) -> Path:
    try:
        staged.rename(target)
    except OSError:
        # The name is taken: by another process that published the same digest meanwhile, or by a damaged copy.
        if _is_sound(target):
            return target
        target.rename(target.with_name(f".broken-{target.name}-{secrets.token_hex(4)}"))
        staged.rename(target)
    _sync(target.parent)
    return target


def _write_atomically(path: Path, content: bytes) -> None:
    staged = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    staged.write_bytes(content)
    _sync(staged)
    staged.replace(path)


def _sync_folder(folder: Path) -> None:
    for entry in folder.iterdir():
        _sync(entry)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("readroom")
    except PackageNotFoundError:
        return ""


# Checks, one a field -------------------------------------------------------------------------------------------------


def _parse_manifest(document: dict[str, Any]) -> Manifest:
    if document.get("format") != MANIFEST_FORMAT:
        raise CheckpointBroken(f"manifest: format is not {MANIFEST_FORMAT}", "Use the release that wrote it.")
    missing = sorted({"name", "family", "task", "parameters", "files", "digest"} - document.keys())
    if missing:
        raise CheckpointBroken(f"manifest: {', '.join(missing)} missing")
    known = {item.name for item in fields(Manifest)}
    checked = {key: _check_field(key, value) for key, value in document.items() if key in known}
    manifest = Manifest(**checked)
    if manifest.digest != digest_files({name: entry.sha256 for name, entry in manifest.files.items()}):
        raise CheckpointBroken("manifest: digest does not belong to its files")
    return manifest


def _check_field(key: str, value: Any) -> Any:
    if key == "files":
        return _check_files(value)
    if key in ("mean", "std"):
        return _check_triple(key, value)
    if key == "generation":
        return _check_generation(value)
    if key in ("parameters", "image_size", "format"):
        return _require(key, value, _is_count(value))
    if key in ("scores", "regions"):
        return _require(key, value, isinstance(value, dict))
    if key == "training_data":
        return _require(key, value, isinstance(value, str | dict))
    if key == "parent":
        return _require(key, value, value is None or isinstance(value, str))
    required = key in ("name", "family", "task", "digest")
    return _require(key, value, isinstance(value, str) and (bool(value) or not required))


def _check_files(value: Any) -> dict[str, FileEntry]:
    _require("files", value, isinstance(value, dict) and 0 < len(value) <= 1000)
    return {name: _check_entry(name, entry) for name, entry in value.items()}


def _check_entry(name: str, entry: Any) -> FileEntry:
    plain = name not in ("", ".", "..", MANIFEST_NAME) and not re.search(r"[/\\:\x00-\x1f]", name)
    _require("files", name, plain and not name.startswith("."))
    _require("files", name, isinstance(entry, dict) and _is_count(entry.get("bytes")))
    _require("files", name, isinstance(entry.get("sha256"), str) and bool(SHA256_HEX.match(entry["sha256"])))
    return FileEntry(entry["sha256"], entry["bytes"])


def _check_triple(key: str, value: Any) -> Floats:
    _require(key, value, is_triple(key, value))
    return float(value[0]), float(value[1]), float(value[2])


def _check_generation(value: Any) -> dict[str, Any]:
    kinds = {item.name: str if item.name == "prompt" else int for item in fields(GenerationSettings)}
    _require("generation", value, isinstance(value, dict) and value.keys() <= kinds.keys())
    for key, setting in value.items():
        sound = isinstance(setting, str) if kinds[key] is str else _is_count(setting)
        _require(f"generation.{key}", setting, sound)
    return dict(value)


def _check_names(described: Mapping[str, Any]) -> None:
    unknown = described.keys() - {item.name for item in fields(Manifest)}
    if unknown:
        raise BadCall(f"a manifest has no field {', '.join(sorted(unknown))}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _require(key: str, value: Any, sound: bool) -> Any:
    if not sound:
        raise CheckpointBroken(f"manifest: {key} is not usable")
    return value
