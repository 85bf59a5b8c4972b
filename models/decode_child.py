"""The child process of `models.decode_guard`: renders one file after another, and may die of it.

Started as `python -m models.decode_child PARENT_PID MEMORY_BYTES`. Requests come on standard input, replies leave on
standard output, each a message of `pack_message`. The child says `ready` once, then answers each request; it ends when
its standard input does. It never loads torch.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from models.limits import PixelLimits
from readroom.errors import ItemError
from readroom.records import Reason

Render = Callable[[Mapping[str, Any], bytes], NDArray[np.uint8]]
LENGTHS = struct.Struct(">IQ")  # bytes of the JSON header, bytes of the payload
PR_SET_PDEATHSIG = 1  # prctl(2), Linux


def pack_message(header: Mapping[str, Any], payload: bytes | memoryview = b"") -> list[bytes | memoryview]:
    """A message as the parts to write: lengths, JSON header, payload."""
    text = json.dumps(header).encode()
    return [LENGTHS.pack(len(text), len(payload)) + text, payload]


def read_message(stream: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """The next message of a blocking stream, None at its end."""
    lengths = stream.read(LENGTHS.size)
    if len(lengths) < LENGTHS.size:
        return None
    header_bytes, payload_bytes = LENGTHS.unpack(lengths)
    return json.loads(stream.read(header_bytes)), stream.read(payload_bytes)


def write_message(stream: BinaryIO, header: Mapping[str, Any], payload: bytes | memoryview = b"") -> None:
    """Write one message and flush it."""
    for part in pack_message(header, payload):
        stream.write(part)
    stream.flush()


def render_request(request: Mapping[str, Any], source: bytes) -> NDArray[np.uint8]:
    """Render what the request names: the file `path`, or the bytes `source` when there is no path."""
    from models.pixels import render_source

    return render_source(
        request["path"] or source,
        request["profile"],
        request["size"],
        PixelLimits(**request["limits"]),
        frame=request["frame"],
        reducing_gap=request["reducing_gap"],
    )


def answer_request(render: Render, request: Mapping[str, Any], source: bytes) -> tuple[dict[str, Any], NDArray[Any]]:
    """Reply header and pixels; any failure becomes a reason in words of ours."""
    nothing = np.empty(0, dtype=np.uint8)
    try:
        image = np.ascontiguousarray(render(request, source))
    except ItemError as error:
        return {"reason": error.reason, "detail": error.detail, "remedy": error.remedy}, nothing
    except MemoryError:
        return {"reason": Reason.TOO_LARGE, "detail": "not enough memory to decode", "remedy": ""}, nothing
    except Exception as error:  # a fault of ours: its class is safe to tell, its text may quote the file
        return {"reason": Reason.BUG, "detail": type(error).__name__, "remedy": ""}, nothing
    return {"shape": image.shape}, image


def take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Keep standard input and output for messages alone: C libraries print to descriptor 1 when they like."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # 2: texts of decoders quote headers
        os.dup2(null, descriptor)
    return requests, replies


def die_with_parent(parent_pid: int) -> None:
    """Be killed when the thread that started this process ends, also in the middle of a hung decode (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it ended before the line above
        os._exit(1)


def ignore_signals() -> None:
    """A stop of the whole group is the parent's to handle: it finishes its batch, then closes our input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def limit_resources(memory_bytes: int) -> None:
    """No core dumps (they hold pixels), no files written, no more address space than `memory_bytes`."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))


def load_decoders() -> None:
    """Import what rendering needs before the first clock runs."""
    import models.pixels  # noqa: F401
    from models.decoders import register_imagecodecs
    from models.foreign import silence_libraries

    silence_libraries()
    register_imagecodecs()


def serve(render: Render = render_request) -> None:
    """Answer requests with `render` until standard input ends."""
    parent_pid, memory_bytes = int(sys.argv[1]), int(sys.argv[2])
    ignore_signals()
    die_with_parent(parent_pid)
    requests, replies = take_pipes()
    load_decoders()
    limit_resources(memory_bytes)
    write_message(replies, {"ready": True})
    while (message := read_message(requests)) is not None:
        header, image = answer_request(render, *message)
        write_message(replies, header, image.data.cast("B") if image.size else b"")


if __name__ == "__main__":
    serve()
