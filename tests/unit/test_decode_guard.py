"""A decoder may die, hang or allocate without end: it costs one image."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.decode_guard import DecodeGuard, RenderRequest
from models.limits import PixelLimits
from models.pixels import render_source
from readroom.errors import BadCall, EngineError, ImageError
from tests.fakes.instances import draw_gradient, make_instance

FRAGILE = "tests.fakes.fragile_child"
HUNG_PARENT = """
import signal, threading
from models.decode_guard import DecodeGuard
guard = DecodeGuard(1, child_module="tests.fakes.fragile_child")
pid = bytes(guard.render(b"pid")).decode()
signal.signal(signal.SIGUSR1, lambda *_: print(pid, flush=True))
threading.Thread(target=guard.render, args=(b"announce and hang",)).start()
while True:
    signal.pause()
"""
LOAD_CHILD = """
import sys, models.decode_child as child
child.load_decoders()
heavy = {"torch", "transformers", "celery", "sqlalchemy", "readroom.settings"} & set(sys.modules)
sys.exit(f"loaded {heavy}" if heavy else 0)
"""


@pytest.fixture(scope="module")
def guard() -> Iterator[DecodeGuard]:
    with DecodeGuard(2) as guard:
        yield guard


@pytest.fixture(scope="module")
def fragile() -> Iterator[DecodeGuard]:
    with DecodeGuard(1, child_module=FRAGILE, item_seconds=3.0, memory_bytes=2**30) as guard:
        yield guard


def ask(guard: DecodeGuard, behaviour: bytes) -> Any:
    return json.loads(bytes(guard.render(behaviour)))


def fail(guard: DecodeGuard, behaviour: bytes) -> ImageError:
    with pytest.raises(ImageError) as caught:
        guard.render(behaviour)
    return caught.value


def test_a_guarded_picture_equals_the_direct_one(guard: DecodeGuard, tmp_path: Path) -> None:
    source = make_instance(draw_gradient())
    path = tmp_path / "a name with ünïcode"
    path.write_bytes(source)
    for size in (None, 32):
        expected = render_source(source, size=size)
        assert np.array_equal(guard.render(path, size=size), expected)
        assert np.array_equal(guard.render(source, size=size), expected)


def test_a_large_archive_member_travels_through_the_pipe(guard: DecodeGuard) -> None:
    source = make_instance(draw_gradient(1000, 900))
    assert np.array_equal(guard.render(source), render_source(source))


def test_render_many_keeps_order_and_gives_each_failure_its_place(guard: DecodeGuard) -> None:
    good = [make_instance(draw_gradient(16 + n, 16)) for n in range(6)]
    requests = [RenderRequest(source) for source in (*good[:3], b"", *good[3:], b"no picture")]
    results = guard.render_many(requests)
    assert [r.shape[0] if isinstance(r, np.ndarray) else r.reason for r in results] == [
        *(16, 17, 18),
        "empty",
        *(19, 20, 21),
        "not_image",
    ]


def test_limits_reach_the_child() -> None:
    with DecodeGuard(1, limits=PixelLimits(max_pixels=100)) as guard:
        assert fail(guard, make_instance(draw_gradient())).reason == "too_large"


def test_a_segfault_costs_one_image_and_the_next_child_works(fragile: DecodeGuard) -> None:
    before = ask(fragile, b"pid")
    error = fail(fragile, b"segv")
    assert (error.reason, error.detail) == ("decoder_crashed", "the decoding process was ended by SIGSEGV")
    assert ask(fragile, b"pid") != before


def test_an_exit_of_the_child_costs_one_image(fragile: DecodeGuard) -> None:
    error = fail(fragile, b"exit")
    assert (error.reason, error.detail) == ("decoder_crashed", "the decoding process ended with status 3")


def test_a_hang_costs_one_image_and_its_time_limit(fragile: DecodeGuard) -> None:
    before = ask(fragile, b"pid")
    assert fail(fragile, b"hang").reason == "decoder_timeout"
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)
    assert ask(fragile, b"pid") != before


def test_a_crash_among_many_costs_only_itself() -> None:
    with DecodeGuard(2, child_module=FRAGILE) as guard:
        results = guard.render_many(RenderRequest(source) for source in (b"pid", b"segv", b"pid", b"segv", b"pid"))
    failed = [result.reason if isinstance(result, ImageError) else None for result in results]
    assert failed == [None, "decoder_crashed", None, "decoder_crashed", None]


def test_memory_beyond_the_limit_is_refused_and_the_child_lives(fragile: DecodeGuard) -> None:
    before = ask(fragile, b"pid")
    assert fail(fragile, b"memory").reason == "too_large"
    assert ask(fragile, b"pid") == before


def test_what_a_decoder_prints_goes_nowhere(fragile: DecodeGuard, capfd: pytest.CaptureFixture[str]) -> None:
    assert ask(fragile, b"print") == "printed"
    assert "SECRET" not in "".join(capfd.readouterr())


def test_a_fault_of_ours_is_told_by_its_class_alone(fragile: DecodeGuard) -> None:
    error = fail(fragile, b"bug")
    assert (error.reason, error.detail) == ("bug", "KeyError")


def test_a_child_knows_no_settings_or_passwords(fragile: DecodeGuard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("READROOM_DATABASE_URL", "SECRET")
    fail(fragile, b"segv")
    names = ask(fragile, b"environment")
    assert "PYTHONPATH" in names and not {"READROOM_DATABASE_URL", "HOME", "PATH"} & set(names)


def test_a_child_outlives_the_thread_that_first_needed_it(fragile: DecodeGuard) -> None:
    fail(fragile, b"segv")
    pids: list[int] = []
    for _ in range(3):
        thread = threading.Thread(target=lambda: pids.append(ask(fragile, b"pid")))
        thread.start()
        thread.join()
    assert len(pids) == 3 and len(set(pids)) == 1


def test_a_child_ignores_the_stop_of_its_group(fragile: DecodeGuard) -> None:
    pid = ask(fragile, b"pid")
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGINT)
    assert ask(fragile, b"pid") == pid
    assert os.getsid(pid) != os.getsid(0)


def test_a_child_killed_while_idle_costs_no_image(fragile: DecodeGuard) -> None:
    pid = ask(fragile, b"pid")
    watch = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    wait_for_end(watch)
    assert ask(fragile, b"pid") != pid


def wait_for_end(pidfd: int) -> None:
    ended, _, _ = select.select([pidfd], [], [], 30)
    os.close(pidfd)
    assert ended, "the process is still there after 30 s"


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_a_hung_child_dies_with_its_killed_parent() -> None:
    with start_python(HUNG_PARENT) as parent:
        assert parent.stdout
        watch = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
        wait_for_end(watch)


def start_python(code: str) -> subprocess.Popen[str]:
    environment = {"PYTHONPATH": os.pathsep.join(folder or str(Path.cwd()) for folder in sys.path)}
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_close_ends_the_children_and_further_calls_are_refused() -> None:
    guard = DecodeGuard(1, child_module=FRAGILE)
    watch = os.pidfd_open(ask(guard, b"pid"))
    guard.close()
    wait_for_end(watch)
    guard.close()
    with pytest.raises(BadCall):
        guard.render(b"pid")


def test_a_child_that_cannot_start_blames_no_image() -> None:
    with DecodeGuard(1, child_module="tests.fakes.no_such_module") as guard, pytest.raises(EngineError):
        guard.render(b"pid")


def test_an_unknown_profile_is_a_bad_call(guard: DecodeGuard) -> None:
    with pytest.raises(BadCall):
        guard.render(b"pid", profile="no_such_profile")


def test_a_child_loads_neither_torch_nor_settings() -> None:
    with start_python(LOAD_CHILD) as process:
        _, errors = process.communicate()
    assert process.returncode == 0, errors
