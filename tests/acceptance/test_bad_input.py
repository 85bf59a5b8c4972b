"""Every hazard of real exports through the real command: the right reason and status, and the rest processed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from readroom.intake import EXPECTED_REASONS
from readroom.records import Reason
from tests import exports

LIMIT_S = 180
Run = Callable[..., "subprocess.CompletedProcess[str]"]

# Its header is right; that no JPEG 2000 codestream stands behind it only a decoder can tell.
NO_CODESTREAM = "B/encapsulated.dcm"

# The reasons that docs/reasons.md gives for exports; each must be caused by some hazard below.
PROMISED = {
    "not_dicom",
    "not_image",
    "other_modality",
    "for_processing",
    "secondary_capture",
    "burned_in",
    "not_chest",
    "truncated",
    "empty",
    "duplicate",
    "uid_conflict",
    "unsafe_path",
    "too_large",
    "encrypted",
}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("READROOM_")}
    env = own | {"READROOM_HOME": str(tmp_path / "home"), "READROOM_BLIP_MODEL": "dummy"}

    def run_command(*arguments: str, status: int = 0, **changes: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([sys.executable, "-m", "readroom.cli", *arguments], capture_output=True, text=True,
                              env=env | changes, cwd=tmp_path, timeout=LIMIT_S, check=False)  # fmt: skip
        assert done.returncode == status, done.stdout + done.stderr
        assert exports.PATIENT.split("^")[0] not in done.stderr
        return done

    yield run_command
    subprocess.run([sys.executable, "-m", "readroom.cli", "down"], env=env, cwd=tmp_path, timeout=LIMIT_S, check=False)


def finish(run: Run, counts: dict[str, Any]) -> None:
    """The rest is processed: every accepted image ends with one caption, or as a dead letter when its header lied."""
    run("worker", "--drain")
    records = [json.loads(line) for line in run("results", counts["submission"]).stdout.splitlines()]
    failed = json.loads(run("failures", "list", "--submission", counts["submission"], "--json").stdout)
    assert [row["reason"] for row in failed] == ["truncated"]
    assert failed[0]["item"].endswith(NO_CODESTREAM)
    assert len(records) == counts["images"] - 1 > 0
    assert all(record["text"] for record in records)


def read_reasons(counts: dict[str, Any]) -> dict[str, str]:
    return {item["item"]: item["reason"] for item in counts["skipped"]}


def test_every_hazard_of_an_export_gets_its_reason_and_the_rest_is_captioned(run: Run, tmp_path: Path) -> None:
    expected = exports.build_export(tmp_path / "export")
    counts = json.loads(run("enqueue", "pacs", str(tmp_path / "export"), "--json", status=1).stdout)
    reasons = read_reasons(counts)
    assert {item: reason for item, reason in expected.items() if reason} == reasons
    assert counts["images"] == sum(reason is None for reason in expected.values())
    assert set(reasons.values()) <= set(Reason)
    assert len(reasons) >= 30
    finish(run, counts)


def test_all_promised_reasons_are_caused_by_some_hazard(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    expected = exports.build_export(folder)
    films = exports.good_files()
    (folder / "secret.zip").write_bytes(exports.encrypt_flags(exports.zip_bytes(dict(list(films.items())[:1]))))
    (folder / "slip.zip").write_bytes(exports.zip_bytes({"../../evil.dcm": next(iter(films.values()))}))
    counts = json.loads(run("enqueue", "pacs", str(folder), "--json", "--dry-run", status=1).stdout)
    caused = set(read_reasons(counts).values())
    assert caused >= PROMISED, PROMISED - caused
    assert len(expected) > len(PROMISED)
    assert not (tmp_path / "evil.dcm").exists()
    assert not (tmp_path.parent / "evil.dcm").exists()


def test_what_is_left_out_by_policy_leaves_the_status_0(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    bad = exports.bad_files()
    policy = {name: content for name, (content, reason) in bad.items() if reason in EXPECTED_REASONS}
    assert len(policy) >= 6
    exports.write_files(folder, policy)
    exports.write_files(folder, exports.good_files())
    counts = json.loads(run("enqueue", "pacs", str(folder), "--json").stdout)
    assert set(read_reasons(counts)) == set(policy)


@pytest.mark.parametrize("form", ["zip", "tar", "tar.gz"])
def test_archive_gives_the_same_images_as_the_folder(run: Run, tmp_path: Path, form: str) -> None:
    films = exports.good_files()
    archive = tmp_path / f"export.{form}"
    archive.write_bytes(
        exports.zip_bytes(films) if form == "zip" else exports.tar_bytes(films, "w:gz" if form == "tar.gz" else "w")
    )
    exports.write_files(tmp_path / "export", films)
    packed = json.loads(run("enqueue", "pacs", str(archive), "--json").stdout)
    unpacked = json.loads(run("enqueue", "pacs", str(tmp_path / "export"), "--json").stdout)
    assert packed["images"] == unpacked["images"] == len(films)
    # The same content is the same job, however it was packed.
    assert (unpacked["queued"], unpacked["already_done"]) == (0, packed["queued"])
    finish(run, packed)


def test_absurd_sizes_are_refused_before_decoding(run: Run, tmp_path: Path) -> None:
    films = exports.good_files()
    exports.write_files(tmp_path / "export", films)
    counts = json.loads(
        run("enqueue", "pacs", str(tmp_path / "export"), "--json", status=1, READROOM_MAX_PIXELS="100").stdout
    )
    assert set(read_reasons(counts).values()) == {"too_large"}
    assert counts["images"] == 0
