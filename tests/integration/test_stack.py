"""The local stack's supervisor: what dies is started again, what is not ours is left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from readroom import stack
from readroom.errors import BadCall, BrokerError
from readroom.settings import Settings, load_settings
from tests.fakes.plant import wait_until

LIMIT_S = 120


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    monkeypatch.setenv("READROOM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("READROOM_BLIP_MODEL", "dummy")
    monkeypatch.chdir(tmp_path)
    yield load_settings()
    readroom("down")


def readroom(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "readroom.cli", *arguments], capture_output=True, text=True,
                          timeout=LIMIT_S, check=False)  # fmt: skip


def worker_pid(settings: Settings) -> int | None:
    state = stack.read_state(settings)
    return state["services"][0]["pid"] if state else None


def test_a_killed_worker_is_started_again(settings: Settings) -> None:
    assert readroom("up", "--no-flower").returncode == 0
    first = worker_pid(settings)
    assert first is not None
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: worker_pid(settings) not in (None, first), "another worker")
    state = stack.read_state(settings)
    assert state is not None
    assert state["services"][0]["restarts"] == 1


def test_what_a_killed_supervisor_left_is_ended_by_the_next_one(settings: Settings) -> None:
    readroom("up", "--no-flower")
    state = stack.read_state(settings)
    assert state is not None
    orphan = state["services"][0]["pid"]
    os.kill(state["pid"], signal.SIGKILL)
    wait_until(lambda: stack.read_state(settings) is None, "the supervisor's end")

    assert readroom("up", "--no-flower").returncode == 0

    assert worker_pid(settings) not in (None, orphan)
    wait_until(lambda: not stack.is_ours(orphan), "the orphan's end")


def test_down_leaves_a_stranger_with_the_same_process_id_alone(settings: Settings) -> None:
    stranger = subprocess.Popen(["sleep", "60"])
    stack.state_path(settings).parent.mkdir(parents=True)
    stack.write_state(settings, {"pid": stranger.pid, "services": [{"name": "worker-1", "pid": stranger.pid}]})
    try:
        assert "nothing was up" in readroom("down").stdout
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_two_supervisors_never_share_a_home(settings: Settings) -> None:
    with stack.hold_stack(settings), pytest.raises(BadCall, match="already up"):
        stack.run_stack(settings, workers=1, queue="caption", flower=False)


def test_a_full_disk_or_a_dead_broker_does_not_end_what_still_runs(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = threading.Semaphore(0)
    monkeypatch.setattr(stack, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(stack, "CHECK_INTERVAL_S", 0.01)

    def fail_write(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def fail_broker(_: Path) -> None:
        raise BrokerError("the embedded broker does not start")

    monkeypatch.setattr(stack, "write_state", fail_write)
    monkeypatch.setattr(stack, "start_broker", fail_broker)
    service = stack.Service("idle", [], settings.home_dir / "logs" / "idle.log")
    monkeypatch.setattr(stack.Service, "check", lambda self: checked.release())
    supervisor = stack.Supervisor(settings, [service])
    thread = threading.Thread(target=supervisor.run)
    thread.start()
    for _ in range(3):
        assert checked.acquire(timeout=LIMIT_S), "the supervisor gave up"
    supervisor.stop.set()
    thread.join(LIMIT_S)
    assert not thread.is_alive()


def test_racing_readers_find_one_flower_password_and_never_an_empty_one(settings: Settings) -> None:
    with ThreadPoolExecutor(8) as threads:
        found = set(threads.map(lambda _: stack.flower_password(settings), range(64)))
    assert len(found) == 1
    assert len(found.pop()) >= 20
    path = settings.home_dir / "flower-password"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in settings.home_dir.iterdir()] == ["flower-password"]


def test_a_damaged_state_file_is_no_stack(settings: Settings) -> None:
    path = stack.state_path(settings)
    path.parent.mkdir(parents=True)
    for content in ("", "[]", json.dumps({"pid": 1})):
        path.write_text(content)
        assert stack.read_state(settings) is None
        assert not stack.end_orphans(settings)
