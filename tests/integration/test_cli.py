"""The console command as a user meets it: real processes, real broker, real store."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from PIL import Image

from readroom.cli import main
from readroom.settings import load_settings
from readroom.stack import read_state

LIMIT_S = 120
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("READROOM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("READROOM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("READROOM_BLIP_MODEL", "dummy")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def run(home: Path) -> Iterator[Run]:
    """Run `readroom ...` as a process; the embedded broker it may have started is stopped afterwards."""

    def run_command(*arguments: str, status: int | None = 0, **changes: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([sys.executable, "-m", "readroom.cli", *arguments], capture_output=True, text=True,
                              env=os.environ | changes, timeout=LIMIT_S, check=False)  # fmt: skip
        assert status is None or done.returncode == status, done.stdout + done.stderr
        return done

    yield run_command
    run_command("down", status=None)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(5):
        Image.new("RGB", (32, 24), (number * 50, 10, 200)).save(folder / f"p{number}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def list_commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from list_commands(command, (*path, name))


def test_every_command_explains_itself() -> None:
    commands = dict(list_commands(main))
    assert len(commands) >= 26
    for path, command in commands.items():
        assert command.help, path
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, (path, parameter.name)


def test_images_become_captions_in_every_format(run: Run, pictures: Path, tmp_path: Path) -> None:
    counts = json.loads(run("enqueue", "images", str(pictures), "--json").stdout)
    assert set(counts) == {"submission", "found", "queued", "already_done", "skipped", "studies", "images"}
    assert (counts["found"], counts["queued"], counts["images"], counts["already_done"]) == (6, 5, 5, 0)
    assert [(item["item"], item["reason"]) for item in counts["skipped"]] == [("notes.txt", "not_image")]
    submission = counts["submission"]

    before = json.loads(run("status", submission, "--json").stdout)
    assert before["jobs"]["queued"] == 5
    run("worker", "--drain")
    after = json.loads(run("status", submission, "--json").stdout)
    assert after["jobs"]["succeeded"] == 5
    assert after["open"] == 0

    records = [json.loads(line) for line in run("results", submission).stdout.splitlines()]
    assert sorted(record["item"] for record in records) == [f"p{number}.png" for number in range(5)]
    assert all(record["text"] and record["checkpoint"].startswith("dummy") for record in records)
    assert len({record["text"] for record in records}) == 5

    run("results", submission, "--format", "csv", "-o", str(tmp_path / "out.csv"))
    with (tmp_path / "out.csv").open(newline="") as file:
        assert sorted(row["text"] for row in csv.DictReader(file)) == sorted(record["text"] for record in records)
    run("results", submission, "--format", "parquet", "-o", str(tmp_path / "out.parquet"))
    from pyarrow import parquet

    assert parquet.read_table(tmp_path / "out.parquet").num_rows == 5
    again = json.loads(run("enqueue", "images", str(pictures), "--json").stdout)
    assert (again["queued"], again["already_done"]) == (0, 5)
    assert len(run("results", again["submission"]).stdout.splitlines()) == 5


def test_results_go_to_a_file_for_their_owner_only_or_say_why_not(run: Run, pictures: Path, tmp_path: Path) -> None:
    submission = json.loads(run("enqueue", "images", str(pictures), "--json").stdout)["submission"]
    run("worker", "--drain")
    for form in ("jsonl", "csv", "parquet"):
        run("results", submission, "--format", form, "-o", str(tmp_path / f"out.{form}"))
        assert (tmp_path / f"out.{form}").stat().st_mode & 0o777 == 0o600
        done = run("results", submission, "--format", form, "-o", "/nowhere/out", status=2)
        assert "cannot be written" in done.stderr
    assert "No space left" in run("results", submission, "-o", "/dev/full", status=2).stderr


def test_watch_with_json_waits_and_prints_one_document(run: Run, pictures: Path) -> None:
    submission = json.loads(run("enqueue", "images", str(pictures), "--json").stdout)["submission"]
    run("worker", "--drain")
    watched = json.loads(run("status", submission, "--watch", "--json").stdout)
    assert watched["jobs"]["succeeded"] == 5


def test_home_that_cannot_be_made_is_named_by_every_door(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    home = str(tmp_path / "file" / "home")
    assert "READROOM_HOME cannot be made" in run("status", status=2, READROOM_HOME=home).stderr
    assert "READROOM_HOME" in run("up", status=2, READROOM_HOME=home).stderr
    findings = json.loads(run("doctor", "--json", status=1, READROOM_HOME=home).stdout)
    assert "home" in {finding["subject"] for finding in findings if finding["level"] == "error"}


def test_up_says_when_the_store_cannot_be_had_and_leaves_nothing_running(run: Run, home: Path) -> None:
    done = run("up", "--no-flower", status=1, READROOM_DATABASE_URL="postgresql://u:p@127.0.0.1:9/readroom")
    assert "store" in done.stderr
    assert "nothing was up" in run("down").stdout


def test_worker_that_cannot_use_its_broker_says_so_and_ends(run: Run, home: Path, pictures: Path) -> None:
    run("enqueue", "images", str(pictures))  # starts the embedded broker
    port = (home / "broker" / "port").read_text()
    refused = run("worker", "--drain", status=1, READROOM_BROKER_URL=f"redis://:hunter2@127.0.0.1:{port}/0")
    assert "refuses the password" in refused.stderr
    assert "hunter2" not in refused.stderr
    silent = run("worker", "--drain", status=1, READROOM_BROKER_URL="redis://:hunter2@127.0.0.1:9/0")
    assert "does not answer" in silent.stderr


BOTH = ("--captioner", "vlp", "--captioner", "blip")
OWN = {"READROOM_BLIP_MODEL": "dummy:item_ms=1", "READROOM_VLP_MODEL": "dummy:item_ms=2"}


def test_two_captioners_read_every_image_in_one_submission(run: Run, pictures: Path, tmp_path: Path) -> None:
    dry = json.loads(run("enqueue", "images", str(pictures), *BOTH, "--dry-run", "--json", **OWN).stdout)
    counts = json.loads(run("enqueue", "images", str(pictures), *BOTH, "--json", **OWN).stdout)
    assert (counts["images"], counts["queued"], counts["already_done"]) == (5, 10, 0)
    assert (dry["images"], dry["queued"]) == (5, 10)
    (listed,) = json.loads(run("submissions", "--json").stdout)
    assert [one["captioner"] for one in listed["plan"]["captioners"]] == ["blip", "vlp"]

    log = run("worker", "--drain", READROOM_MAX_BATCH="2").stderr
    assert log.count(" loaded in ") == 2, "each model is loaded once"
    records = [json.loads(line) for line in run("results", counts["submission"]).stdout.splitlines()]
    checkpoints = {"blip": "dummy:base_ms=0,item_ms=1", "vlp": "dummy:base_ms=0,item_ms=2"}
    assert sorted((record["item"], record["captioner"], record["checkpoint"]) for record in records) == [
        (f"p{number}.png", family, checkpoints[family]) for number in range(5) for family in ("blip", "vlp")
    ]
    run("results", counts["submission"], "--format", "csv", "-o", str(tmp_path / "out.csv"))
    with (tmp_path / "out.csv").open(newline="") as file:
        assert {row["captioner"] for row in csv.DictReader(file)} == {"blip", "vlp"}
    again = json.loads(run("enqueue", "images", str(pictures), *BOTH, "--json", **OWN).stdout)
    assert (again["queued"], again["already_done"]) == (0, 10)


def test_a_family_that_has_no_checkpoint_is_no_reason_to_take_another(run: Run, pictures: Path) -> None:
    for command in (("enqueue", "images"), ("caption",)):
        done = run(*command, str(pictures), "--captioner", "vlp", status=1)
        assert "no VLP checkpoint was chosen" in done.stderr
        assert "READROOM_VLP_MODEL" in done.stderr
    assert json.loads(run("submissions", "--json").stdout) == []


def test_one_model_for_two_captioners_is_a_bad_call(run: Run, pictures: Path) -> None:
    done = run("enqueue", "images", str(pictures), *BOTH, "--model", "someone/blip", status=2)
    assert "READROOM_BLIP_MODEL and READROOM_VLP_MODEL" in done.stderr


def test_an_image_is_asked_now_as_it_is_captioned_now(run: Run, pictures: Path) -> None:
    (row,) = json.loads(run("ask", str(pictures / "p1.png"), "what is this?", "--model", "dummy", "--json").stdout)
    assert list(row) == ["image", "question", "answer", "score", "checkpoint", "error"]
    assert (row["question"], row["error"]) == ("what is this?", None)
    assert row["checkpoint"] == "dummy:base_ms=0,item_ms=0"
    other = run("ask", str(pictures / "p1.png"), "where?", "--answerer", "vlp", READROOM_VLP_MODEL="dummy").stdout
    assert other.startswith(f"{pictures / 'p1.png'}: ")
    assert row["answer"] not in other
    (pictures / "empty.png").touch()
    rows = json.loads(run("ask", str(pictures), "what?", "--model", "dummy", "--json", status=1).stdout)
    assert [Path(row["image"]).name for row in rows if row["error"]] == ["empty.png"]
    assert len(rows) == 6


def test_a_checkpoint_that_only_captions_is_not_asked(run: Run, pictures: Path) -> None:
    done = run("ask", str(pictures / "p1.png"), "what?", "--model", "bundled", status=1)
    assert "checkpoint bundled answers no questions" in done.stderr


def test_doctor_names_a_variable_that_means_nothing(run: Run) -> None:
    findings = json.loads(run("doctor", "--json", READROOM_DATABASE_ULR="x").stdout)
    assert any("READROOM_DATABASE_ULR" in finding["text"] for finding in findings)


def test_dry_run_enqueues_nothing(run: Run, pictures: Path, home: Path) -> None:
    counts = json.loads(run("enqueue", "images", str(pictures), "--dry-run", "--json").stdout)
    assert counts["images"] == 5
    assert json.loads(run("status", "--json").stdout)["jobs"]["queued"] == 0
    assert json.loads(run("submissions", "--json").stdout) == []


def test_coco_split_and_karpathy_file_name_the_same_jobs(run: Run, tmp_path: Path) -> None:
    run("phantoms", "coco", str(tmp_path / "data"), "--count", "4", "--seed", "3")
    root = tmp_path / "data" / "coco2017"
    plain = json.loads(run("enqueue", "coco", str(root), "--split", "val2017", "--json").stdout)
    assert (plain["images"], plain["queued"], plain["skipped"]) == (4, 4, [])
    images = [
        {"filepath": "val2017", "filename": f"{number:012d}.jpg", "split": "test", "cocoid": number, "imgid": number,
         "sentids": [], "sentences": []}
        for number in (1, 2, 99)
    ]  # fmt: skip
    listing = tmp_path / "dataset_coco.json"
    listing.write_text(json.dumps({"images": images, "dataset": "coco"}))
    arguments = ("enqueue", "coco", str(root), "--split", "test", "--karpathy", str(listing), "--json")
    counts = json.loads(run(*arguments, status=1).stdout)
    assert (counts["images"], counts["queued"], counts["already_done"]) == (2, 0, 2)
    assert [item["reason"] for item in counts["skipped"]] == ["missing"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("enqueue", "pacs", "/nowhere/at/all"), "nothing stands at"),
        (("status", "nosuch"), "no submission nosuch"),
        (("results", "nosuch"), "no submission nosuch"),
        (("failures", "show", "12"), "job 12 is no dead letter"),
        (("failures", "requeue"), "say which dead letters"),
        (("checkpoints", "show", "nosuch"), "no checkpoint nosuch"),
        (("enqueue", "images", ".", "--priority", "yesterday"), "yesterday"),
        (("failures", "list", "--submission", "nosuch"), "no submission nosuch"),
        (("up", "--queue", "nosuch"), "nosuch"),
        (("up", "--workers", "0"), "--workers"),
        (("nonsense",), "No such command"),
    ],
)
def test_bad_call_ends_with_status_2_and_says_why(run: Run, arguments: tuple[str, ...], says: str) -> None:
    done = run(*arguments, status=2)
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_setting_is_named(run: Run) -> None:
    done = run("doctor", status=2, READROOM_LEASE_S="soon")
    assert "READROOM_LEASE_S" in done.stderr


def test_missing_model_is_an_error_with_a_remedy_and_never_the_bundled_one(run: Run, pictures: Path) -> None:
    done = run("caption", str(pictures / "p0.png"), "--model", "no-such-model", status=1)
    assert "no checkpoint is called" in done.stderr
    assert "folder" in done.stderr


def test_damaged_item_gives_status_1_and_is_named_while_the_rest_goes_on(run: Run, pictures: Path) -> None:
    (pictures / "empty.png").touch()
    done = run("enqueue", "images", str(pictures), status=1)
    assert "empty: empty.png" in done.stdout
    assert "queued 5" in done.stdout


def test_doctor_reports_as_json_and_says_what_is_wrong(run: Run) -> None:
    done = run("doctor", "--json", status=1, READROOM_BLIP_MODEL="no-such-model")
    findings = json.loads(done.stdout)
    wrong = [finding for finding in findings if finding["level"] == "error"]
    assert [finding["subject"] for finding in wrong] == ["model"]
    assert {"home", "broker", "store"} <= {finding["subject"] for finding in findings}


def test_failed_job_can_be_listed_shown_requeued_and_dropped(run: Run, pictures: Path) -> None:
    bad = pictures / "p0.png"
    counts = json.loads(run("enqueue", "images", str(pictures), "--json", READROOM_BLIP_MODEL="bundled").stdout)
    bad.write_bytes(bad.read_bytes()[:40])
    run("worker", "--drain", READROOM_BLIP_MODEL="bundled")
    rows: list[dict[str, Any]] = json.loads(run("failures", "list", "--json").stdout)
    assert [row["item"] for row in rows] == ["p0.png"]
    job = str(rows[0]["job"])
    assert json.loads(run("failures", "show", job).stdout)["reason"] == rows[0]["reason"]
    assert "1 jobs queued again" in run("failures", "requeue", job).stdout
    run("worker", "--drain", READROOM_BLIP_MODEL="bundled")
    assert "1 jobs cancelled" in run("failures", "drop", "--submission", counts["submission"]).stdout
    states = json.loads(run("status", counts["submission"], "--json").stdout)["jobs"]
    assert (states["succeeded"], states["cancelled"], states["failed"]) == (4, 1, 0)


def test_checkpoints_are_registered_listed_and_served(run: Run, pictures: Path, home: Path) -> None:
    run("checkpoints", "add", "bundled", "--activate")
    listed = json.loads(run("checkpoints", "list", "--json").stdout)
    assert [(row["name"], row["state"]) for row in listed] == [("bundled", "active")]
    shown = json.loads(run("checkpoints", "show", "bundled").stdout)
    assert shown["manifest"]["scores"]
    counts = json.loads(run("enqueue", "images", str(pictures), "--json", READROOM_BLIP_MODEL="").stdout)
    assert counts["queued"] == 5
    run("worker", "--drain", READROOM_BLIP_MODEL="")
    records = [json.loads(line) for line in run("results", counts["submission"]).stdout.splitlines()]
    assert {record["checkpoint"] for record in records} == {listed[0]["ref"]}


def test_each_family_has_its_own_bundled_and_its_own_active_checkpoint(run: Run, pictures: Path) -> None:
    for name in ("bundled", "bundled:vlp"):
        run("checkpoints", "add", name, "--activate")
    listed = [line.split() for line in run("checkpoints", "list").stdout.splitlines()]
    assert sorted((state, family, name) for state, family, _ref, name in listed) == [
        ("active", "blip", "bundled"), ("active", "vlp", "bundled:vlp"),
    ]  # fmt: skip
    refs = {row["family"]: row["ref"] for row in json.loads(run("checkpoints", "list", "--json").stdout)}
    now = {
        family: json.loads(run("caption", "--json", "--captioner", family, str(pictures / "p1.png"),
                               READROOM_BLIP_MODEL="").stdout)[0]
        for family in ("blip", "vlp")
    }  # fmt: skip
    assert {family: row["checkpoint"] for family, row in now.items()} == refs
    assert all(row["caption"] and row["error"] is None for row in now.values())
    asked = run("ask", "--answerer", "vlp", "--json", str(pictures / "p1.png"), "what is in the picture?")
    assert "bundled is a small model" in asked.stderr
    (row,) = json.loads(asked.stdout)
    assert (row["checkpoint"], row["error"]) == (refs["vlp"], None)
    assert row["answer"]


def test_a_known_checkpoint_takes_the_name_it_is_given_again(run: Run) -> None:
    first = run("checkpoints", "add", "bundled", "--activate").stdout
    assert run("checkpoints", "add", "bundled", "--name", "mine").stdout == first.replace(" bundled ", " mine ")
    assert json.loads(run("checkpoints", "show", "mine").stdout)["state"] == "active"
    assert "no checkpoint bundled" in run("checkpoints", "show", "bundled", status=2).stderr
    run("checkpoints", "add", "bundled")
    assert [row["name"] for row in json.loads(run("checkpoints", "list", "--json").stdout)] == ["mine"]


def test_caption_command_says_what_the_worker_says(run: Run, pictures: Path) -> None:
    counts = json.loads(run("enqueue", "images", str(pictures), "--model", "bundled", "--json").stdout)
    run("worker", "--drain")
    queued = {
        record["item"]: record["text"]
        for record in map(json.loads, run("results", counts["submission"]).stdout.splitlines())
    }
    paths = sorted(pictures.glob("*.png"))
    now = json.loads(run("caption", "--json", "--model", "bundled", *map(str, paths)).stdout)
    assert {Path(row["image"]).name: row["caption"] for row in now} == queued


def test_stack_goes_up_works_and_goes_down(run: Run, pictures: Path, home: Path) -> None:
    run("up", "--no-flower")
    state = read_state(load_settings())
    assert state is not None
    assert [service["name"] for service in state["services"]] == ["worker-1"]
    assert "already up" in run("up", status=2).stderr
    counts = json.loads(run("enqueue", "images", str(pictures), "--json").stdout)
    run("status", counts["submission"], "--watch")
    assert json.loads(run("status", counts["submission"], "--json").stdout)["jobs"]["succeeded"] == 5
    assert "the stack is down" in run("down").stdout
    assert read_state(load_settings()) is None
    assert "nothing was up" in run("down").stdout
