"""A mixed submission, half BLIP and half VLP, through one stack of the real programs with the bundled checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from models.checkpoint import resolve_checkpoint
from models.load import load_captioner
from models.predict import caption_images
from tests.fakes.plant import wait_until
from training.phantoms import write_coco, write_pacs

LIMIT_S = 180
FAMILIES = ("blip", "vlp")
Run = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("READROOM_")}
    env = own | {"READROOM_HOME": str(tmp_path / "home")}

    def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([sys.executable, "-m", "readroom.cli", *arguments], capture_output=True, text=True,
                              env=env, cwd=tmp_path, timeout=LIMIT_S, check=False)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    yield run_command
    subprocess.run([sys.executable, "-m", "readroom.cli", "down"], env=env, cwd=tmp_path, timeout=LIMIT_S, check=False)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Films and scenes in one folder."""
    write_pacs(tmp_path / "pictures" / "films", count=6, seed=41, hazards=False)
    write_coco(tmp_path / "pictures" / "scenes", count=6, seed=41)
    return tmp_path / "pictures"


def caption_alone(family: str, paths: list[str]) -> dict[str, str]:
    """What a captioner says of files, one batch after the other in this process."""
    captioner = load_captioner(resolve_checkpoint("bundled", family))
    texts = caption_images(paths, captioner, captioner.defaults, batch_size=4)
    return {path: text.text for path, text in zip(paths, texts, strict=True)}


@pytest.mark.slow
def test_mixed_submission_runs_through_one_stack(run: Run, pictures: Path) -> None:
    run("up", "--no-flower")
    both = [part for family in FAMILIES for part in ("--captioner", family)]
    counts = json.loads(run("enqueue", "images", str(pictures), *both, "--model", "bundled", "--json").stdout)
    assert counts["queued"] == 2 * counts["images"] > 0

    def is_final() -> bool:
        jobs = json.loads(run("status", counts["submission"], "--json").stdout)["jobs"]
        return bool(jobs.get("succeeded", 0) + jobs.get("failed", 0) >= counts["queued"])

    wait_until(is_final, "all captions", LIMIT_S)
    lines = run("results", counts["submission"], "--format", "jsonl").stdout.splitlines()
    records = [json.loads(line) for line in lines]

    assert Counter(record["captioner"] for record in records) == dict.fromkeys(FAMILIES, counts["images"])
    for family in FAMILIES:
        mine = [record for record in records if record["captioner"] == family]
        assert {record["checkpoint"] for record in mine} == {resolve_checkpoint("bundled", family).ref}
        alone = caption_alone(family, [str(pictures / record["item"]) for record in mine])
        assert {str(pictures / record["item"]): record["text"] for record in mine} == alone
    run("down")
