"""The real worker program with a captioner that misbehaves: `python -m tests.fakes.worker_main [--drain]`.

`TEST_TROUBLE` names what it does: `kill:42` ends the process when a picture of pixel 42 is in the batch, `hang:42`
never comes back from it, `break:42` loses the device, `fail:42` raises, `consumer:42` breaks Celery's loop, `hold:PATH`
waits for the file at PATH before each batch, `slow:0.05` takes that many seconds for each batch. `read:42` never comes
back from the file that holds 42, `warm` never from warming up.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from kombu.asynchronous import get_event_loop

from models.base import Captioner, Picture
from models.decode_guard import RenderRequest
from readroom.errors import DeviceBroken, ImageError
from readroom.settings import load_settings
from tests.fakes.models import FakeCaptioner
from tests.fakes.store import PixelRenderer
from worker.app import run_worker

Trouble = Callable[[list[int]], None]
TROUBLE = os.environ.get("TEST_TROUBLE", "")


def make_trouble(words: str) -> Trouble:
    name, _, value = words.partition(":")
    if name == "slow":
        return lambda pixels: time.sleep(float(value))
    if name == "hold":
        return lambda pixels: wait_for_file(Path(value), pixels)
    acts: dict[str, Callable[[], object]] = {
        "": lambda: None,
        "read": lambda: None,
        "warm": lambda: None,
        "kill": lambda: os._exit(139),
        "hang": threading.Event().wait,
        "break": lose_device,
        "fail": lambda: 1 / 0,
        "consumer": break_consumer,
    }
    culprit = int(value or -1)
    return lambda pixels: acts[name]() if culprit in pixels else None  # type: ignore[return-value]


def break_consumer() -> None:
    """What kombu 5.7 does with a channel that died: an error that nobody expects, in Celery's loop."""
    get_event_loop().call_soon(getattr, None, "hostname")


def lose_device() -> None:
    raise DeviceBroken("the device is lost")


def wait_for_file(path: Path, pixels: list[int]) -> None:
    """Say that a batch is held, then wait until the test lets it go."""
    path.with_suffix(".held").write_text(",".join(map(str, pixels)))
    while not path.exists():
        time.sleep(0.005)


def load_captioner(ref: str) -> Captioner:
    captioner = FakeCaptioner(ref, make_trouble(TROUBLE))
    if TROUBLE == "warm":
        captioner.warm_up = threading.Event().wait  # type: ignore[method-assign,assignment]
    return captioner


class HangingRenderer(PixelRenderer):
    """Like a network disk that is away for one file."""

    def render_many(self, requests: Iterable[RenderRequest]) -> list[Picture | ImageError]:
        asked = list(requests)
        if any(f"read:{Path(str(request.source)).stem}" == TROUBLE for request in asked):
            threading.Event().wait()
        return super().render_many(asked)


if __name__ == "__main__":
    sys.exit(run_worker(load_settings(), drain="--drain" in sys.argv, load=load_captioner, renderer=HangingRenderer()))
