from __future__ import annotations

from pathlib import Path

import pytest

from readroom.settings import load_settings
from tests.fakes.handler import FakeHandler
from worker.batcher import Batcher, BatchLimits
from worker.lifecycle import ExitCode, Lifecycle


class BrokenIntake:
    """Celery's consumer, in a state that nobody foresaw."""

    def stop_taking(self) -> None:
        raise AttributeError("hub")

    def stop_loop(self) -> None:
        """Not reached."""

    def count_waiting(self) -> int:
        return 0


class Ended(BaseException):
    """In place of the end of the process."""


@pytest.fixture
def lifecycle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lifecycle:
    def end(_self: Lifecycle, code: ExitCode, why: str) -> None:
        raise Ended(code)

    monkeypatch.setattr(Lifecycle, "end_process", end)
    handler = FakeHandler()
    settings = load_settings(home=tmp_path, batch_deadline_s=10)
    return Lifecycle(settings, Batcher(handler, BatchLimits(4, 0.0, 4)), handler, BrokenIntake())


def test_a_stop_that_fails_ends_the_process(lifecycle: Lifecycle) -> None:
    lifecycle.request_stop()

    with pytest.raises(Ended) as ended:
        lifecycle._obey()
    assert ended.value.args == (ExitCode.BUG,)


@pytest.mark.parametrize(
    ("warm_s", "prepare_s", "is_blamed"),
    [(21.0, 0.0, False), (0.0, 21.0, True), (21.0, 21.0, False), (1.0, 21.0, False)],
)
def test_what_hangs_while_getting_ready_ends_the_process_and_only_files_are_blamed(
    lifecycle: Lifecycle, monkeypatch: pytest.MonkeyPatch, warm_s: float, prepare_s: float, is_blamed: bool
) -> None:
    blamed: list[bool] = []
    monkeypatch.setattr(Batcher, "warm_seconds", warm_s)
    monkeypatch.setattr(Batcher, "prepare_seconds", prepare_s)
    monkeypatch.setattr(Batcher, "blame_prepared", lambda _self: blamed.append(True))

    with pytest.raises(Ended) as ended:
        lifecycle.check_deadline()
    assert ended.value.args == (ExitCode.HUNG,)
    assert bool(blamed) is is_blamed
