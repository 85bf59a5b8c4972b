"""Checkpoints by hub id: a snapshot in the local hub cache, safetensors only, nothing executed."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_repo_discussions, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

from models.checkpoint import COMMIT_ID, CheckpointSource, read_json
from readroom.errors import CheckpointBroken, CheckpointMissing

log = logging.getLogger(__name__)

SAFE_PATTERNS = ["*.json", "*.txt", "*.model", "*.safetensors", "*.md", "LICENSE*"]
# The hub's own bot opens a pull request with this title whose only change is the same weights as safetensors.
CONVERSION_TITLE = "Adding `safetensors` variant of this model"
CONVERSION_AUTHOR = "SFconvertbot"
HUB_TIMEOUT_S = 5.0
NO_FALLBACK = "READROOM_BLIP_MODEL=bundled is a toy for trying Readroom out"


def pin_source(source: CheckpointSource) -> CheckpointSource:
    """The same checkpoint by the commit its branch or tag names now, which never moves; as it was when nobody knows.

    Asks the hub, then its cache on this machine.
    """
    repo, _, revision = source.location.partition("@")
    return _name_commit(source, _ask_commit(repo, revision) or _find_cached(repo, revision) or revision)


def fetch_source(source: CheckpointSource) -> CheckpointSource:
    """Download a checkpoint, and name it by the commit and the family of what came. Errors as `fetch_snapshot`."""
    folder = fetch_snapshot(source.location)
    family = str(read_json(folder / "config.json").get("model_type") or source.family)
    return replace(_name_commit(source, folder.name), family=family)


def fetch_snapshot(location: str) -> Path:
    """The folder of `owner/name@revision` in the hub cache, downloaded when it is not there yet.

    Where a revision holds pickled weights only, the hub's own safetensors conversion of that revision is taken
    (`Salesforce/blip-image-captioning-base` is such a case). Raises CheckpointMissing or CheckpointBroken.
    """
    repo, _, revision = location.partition("@")
    folder = download_files(repo, revision, SAFE_PATTERNS)
    if any(folder.glob("*.safetensors")):
        return folder
    conversion = find_conversion(repo, folder.name)
    if conversion is None:
        raise CheckpointBroken(f"{repo}@{revision} holds no safetensors", _explain_pickles(repo))
    log.info("%s holds pickled weights only; taking the hub's conversion %s", location, conversion)
    return download_files(repo, conversion, SAFE_PATTERNS)


def download_files(repo: str, revision: str, patterns: list[str]) -> Path:
    """The files of one revision that match `patterns`, from the cache when offline. Raises CheckpointMissing."""
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except GatedRepoError:
        raise CheckpointMissing(f"{repo} is gated", "Accept its terms on the hub and set HF_TOKEN.") from None
    except RepositoryNotFoundError:
        raise CheckpointMissing(
            f"the hub knows no {repo}, or it is private", "Check the spelling, or set HF_TOKEN."
        ) from None
    except RevisionNotFoundError:
        raise CheckpointMissing(f"{repo} has no revision {revision!r}", "Name a branch, tag or commit.") from None
    except HFValidationError:
        raise CheckpointMissing(f"{repo!r} is no hub id", "Say owner/name or owner/name@revision.") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointMissing(
            f"{repo}@{revision} is not in the hub cache and the hub cannot be reached ({type(error).__name__})",
            f"Set HF_HOME to a cache that holds it, or name a folder with the checkpoint. {NO_FALLBACK}.",
        ) from None


def find_conversion(repo: str, commit: str) -> str | None:
    """The commit of the hub's bot that adds safetensors on top of `commit`; None when there is none or offline.

    Author, title and parent are all checked, as anybody may open a pull request.
    """
    try:
        found = (_read_conversion(repo, talk, commit) for talk in get_repo_discussions(repo))
        return next(filter(None, found), None)
    except Exception:  # the HTTP library's own errors, of which huggingface_hub translates only some
        return None


def _read_conversion(repo: str, talk: Any, commit: str) -> str | None:
    by_bot = talk.is_pull_request and talk.author == CONVERSION_AUTHOR and talk.title == CONVERSION_TITLE
    if not by_bot or talk.status != "open":
        return None
    commits = HfApi().list_repo_commits(repo, revision=talk.git_reference)
    return str(commits[0].commit_id) if len(commits) > 1 and commits[1].commit_id == commit else None


def _name_commit(source: CheckpointSource, revision: str) -> CheckpointSource:
    location = f"{source.location.partition('@')[0]}@{revision}"
    return replace(source, ref=f"hub:{location}", location=location)


def _ask_commit(repo: str, revision: str) -> str | None:
    """The commit whose weights `fetch_snapshot` takes; None when the hub does not say."""
    if COMMIT_ID.fullmatch(revision):
        return revision
    try:
        info = HfApi().model_info(repo, revision=revision, timeout=HUB_TIMEOUT_S)
    except Exception:  # unknown, private, offline: not known here, whatever the HTTP library calls it
        return None
    if info.sha is None or any(file.rfilename.endswith(".safetensors") for file in info.siblings or []):
        return info.sha
    return find_conversion(repo, info.sha) or info.sha


def _find_cached(repo: str, revision: str) -> str | None:
    """The commit that the cache holds for a branch or tag; None when it holds none."""
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    try:
        commit = (folder / "refs" / revision).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return commit if COMMIT_ID.fullmatch(commit) and (folder / "snapshots" / commit).is_dir() else None


def _explain_pickles(repo: str) -> str:
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "refs" / "refs" / "pr"
    known = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    cached = f" This machine holds {', '.join(f'{repo}@refs/pr/{number}' for number in known)}." if known else ""
    return (
        f"Convert it once: readroom checkpoints add {repo} --convert; or name a revision with safetensors.{cached} "
        "Pickled weights are never read otherwise."
    )
