"""A decoding child that does what its source's bytes say: die, hang, allocate, print, or tell about itself.

Stands in for `models.decode_child`, whose pipes, limits and signals it uses; only the rendering is replaced.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.decode_child import serve


def die_of_segv() -> str:
    os.kill(os.getpid(), signal.SIGSEGV)
    return "unreachable"


def hang_forever() -> str:
    while True:
        signal.pause()


def announce_and_hang() -> str:
    os.kill(os.getppid(), signal.SIGUSR1)
    return hang_forever()


def fill_memory() -> str:
    return str(len(bytearray(2**31)))


def print_secret() -> str:
    os.write(1, b"SECRETNAME")
    os.write(2, b"SECRETNAME")
    return "printed"


def fail_with_secret() -> str:
    raise KeyError("SECRETNAME")


BEHAVIOURS: dict[bytes, Callable[[], Any]] = {
    b"segv": die_of_segv,
    b"hang": hang_forever,
    b"announce and hang": announce_and_hang,
    b"exit": lambda: os._exit(3),
    b"memory": fill_memory,
    b"print": print_secret,
    b"bug": fail_with_secret,
    b"pid": os.getpid,
    b"environment": lambda: sorted(os.environ),
}


def behave(request: Mapping[str, Any], source: bytes) -> NDArray[np.uint8]:
    """The behaviour's answer as JSON text, as if it were a picture."""
    return np.frombuffer(json.dumps(BEHAVIOURS[source]()).encode(), dtype=np.uint8)


if __name__ == "__main__":
    serve(behave)
