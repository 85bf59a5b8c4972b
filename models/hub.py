"""Checkpoints by hub id: a snapshot in the local hub cache, safetensors only, nothing executed."""

from __future__ import annotations

import logging
import sys
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

from readroom.errors import CheckpointBroken, CheckpointMissing

log = logging.getLogger(__name__)

SAFE_PATTERNS = ["*.json", "*.txt", "*.model", "*.safetensors", "*.md", "LICENSE*"]
# The hub's own bot opens a pull request with this title whose only change is the same weights as safetensors.
CONVERSION_TITLE = "Adding `safetensors` variant of this model"
CONVERSION_AUTHOR = "SFconvertbot"
NO_FALLBACK = "READROOM_BLIP_MODEL=bundled is a toy for trying Readroom out"


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
    """The pull request of the hub's bot that adds safetensors on top of `commit`; None when there is none or offline.

    Author, title and parent are all checked, as anybody may open a pull request.
    """
    try:
        return next(
            (talk.git_reference for talk in get_repo_discussions(repo) if _is_conversion(repo, talk, commit)), None
        )
    except (HfHubHTTPError, OSError):
        return None


def _is_conversion(repo: str, talk: Any, commit: str) -> bool:
    by_bot = talk.is_pull_request and talk.author == CONVERSION_AUTHOR and talk.title == CONVERSION_TITLE
    if not by_bot or talk.status != "open":
        return False
    commits = HfApi().list_repo_commits(repo, revision=talk.git_reference)
    return len(commits) > 1 and commits[1].commit_id == commit


def _explain_pickles(repo: str) -> str:
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "refs" / "refs" / "pr"
    known = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    cached = f" This machine holds {', '.join(f'{repo}@refs/pr/{number}' for number in known)}." if known else ""
    return (
        f"Convert it once: readroom checkpoints add {repo} --convert; or name a revision with safetensors.{cached} "
        "Pickled weights are never read otherwise."
    )
