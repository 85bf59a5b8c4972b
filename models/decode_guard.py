"""Rendering in child processes, so that a decoder's crash costs one image and not the worker.

Decoders are C and C++ code that reads untrusted files; they segfault, loop and allocate without end. The guard keeps a
few children (`models.decode_child`), sends each one file at a time, and replaces a child that died or took too long.
Children are started with `subprocess`, never forked from a process that has threads or a GPU context.
"""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.decode_child import LENGTHS, pack_message
from models.display import PROFILES
from models.limits import PixelLimits
from readroom.errors import BadCall, EngineError, ImageError
from readroom.records import Reason

CHILD_MODULE = "models.decode_child"
START_SECONDS = 60.0  # a child imports for about 0.6 s, on a busy machine for several
STOP_SECONDS = 2.0
START_REMEDY = "Run: readroom doctor"
MAX_HEADER_BYTES = 65536
PIPE_STEP_BYTES = 2**20


class ChildLost(Exception):
    """The child ended, or wrote what is no message."""


@dataclass(frozen=True, slots=True)
class RenderRequest:
    """One image to render: a file, or the bytes of one. See `models.pixels.render_source` for the rest."""

    source: str | PathLike[str] | bytes
    profile: str = "dicom_voi_v1"
    size: int | None = None
    frame: int = 0
    reducing_gap: float | None = None


class Spawner:
    """Starts children from one thread that lives as long as the guard.

    The kernel's parent-death signal follows the thread that started a child, not the process: started from a worker
    thread, a child would be killed when that thread ends.
    """

    def __init__(self) -> None:
        self._orders: queue.SimpleQueue[tuple[list[str], dict[str, str], Future[subprocess.Popen[bytes]]] | None]
        self._orders = queue.SimpleQueue()
        threading.Thread(target=self._run, name="decode-guard", daemon=True).start()

    def start(self, command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """A process running `command`, its standard input and output piped, in a session of its own."""
        future: Future[subprocess.Popen[bytes]] = Future()
        self._orders.put((command, environment, future))
        return future.result()

    def close(self) -> None:
        """End the thread; children still alive are killed by that."""
        self._orders.put(None)

    def _run(self) -> None:
        while (order := self._orders.get()) is not None:
            command, environment, future = order
            try:
                future.set_result(start_process(command, environment))
            except Exception as error:
                future.set_exception(error)


def start_process(command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start one child; its standard error is dropped, since decoders print what they read."""
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        start_new_session=True,  # Ctrl-C in a terminal signals the parent's group only
    )


def child_environment() -> dict[str, str]:
    """What a child needs to find our modules, and nothing else: no passwords, no settings of ours."""
    folders = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    return {"PYTHONPATH": folders, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"}


class Child:
    """One child process and the two pipes to it. Not thread-safe: the guard hands it to one caller at a time."""

    def __init__(self, spawner: Spawner, module: str, memory_bytes: int) -> None:
        """Start the process and wait until it is ready. Raises EngineError when it does not start."""
        # -P: the working folder is not searched for modules
        command = [sys.executable, "-P", "-m", module, str(os.getpid()), str(memory_bytes)]
        try:
            self.process = spawner.start(command, child_environment())
        except OSError:
            raise EngineError("the image decoding process cannot be started", START_REMEDY) from None
        assert self.process.stdin and self.process.stdout
        self._requests, self._replies = self.process.stdin, self.process.stdout
        os.set_blocking(self._requests.fileno(), False)
        os.set_blocking(self._replies.fileno(), False)
        try:
            self._read_message(time.monotonic() + START_SECONDS, 0)
        except (ChildLost, TimeoutError):
            self.kill()
            raise EngineError("the image decoding process does not start", START_REMEDY) from None

    def is_alive(self) -> bool:
        """Whether the process still runs."""
        return self.process.poll() is None

    def exchange(
        self, header: dict[str, Any], payload: bytes, seconds: float, max_bytes: int
    ) -> tuple[dict[str, Any], bytearray]:
        """Send a request, return the reply. Raises ChildLost and TimeoutError, after which the child is of no use."""
        deadline = time.monotonic() + seconds
        for part in pack_message(header, payload):
            self._write_all(memoryview(part), deadline)
        return self._read_message(deadline, max_bytes)

    def stop(self) -> None:
        """Let the child end by closing its input; kill it when it does not."""
        self._requests.close()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        self.kill()

    def kill(self) -> int:
        """End the child now; returns its exit status, negative for a signal."""
        self.process.kill()
        status = self.process.wait()
        self._requests.close()
        self._replies.close()
        return status

    def _write_all(self, view: memoryview, deadline: float) -> None:
        while view:
            wait_until_ready(self._requests.fileno(), select.POLLOUT, deadline)
            try:
                view = view[os.write(self._requests.fileno(), view[:PIPE_STEP_BYTES]) :]
            except BlockingIOError:
                continue
            except OSError:
                raise ChildLost from None

    def _read_exactly(self, count: int, deadline: float) -> bytearray:
        buffer = bytearray(count)
        view, filled = memoryview(buffer), 0
        while filled < count:
            wait_until_ready(self._replies.fileno(), select.POLLIN, deadline)
            read = os.readv(self._replies.fileno(), [view[filled:]])
            if read == 0:
                raise ChildLost
            filled += read
        return buffer

    def _read_message(self, deadline: float, max_bytes: int) -> tuple[dict[str, Any], bytearray]:
        header_bytes, payload_bytes = LENGTHS.unpack(self._read_exactly(LENGTHS.size, deadline))
        if header_bytes > MAX_HEADER_BYTES or payload_bytes > max_bytes:
            raise ChildLost  # a decoder overwrote its own process
        header = json.loads(self._read_exactly(header_bytes, deadline))
        return header, self._read_exactly(payload_bytes, deadline)


def wait_until_ready(descriptor: int, event: int, deadline: float) -> None:
    """Wait until a pipe can be read or written, or its other end is gone. Raises TimeoutError at the deadline.

    `poll`, not `select`: a worker may hold more than 1024 descriptors.
    """
    poll = select.poll()
    poll.register(descriptor, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError


class DecodeGuard:
    """A pool of child processes that render images. Thread-safe; belongs to the process that made it.

    A child starts when it is first needed. `children` defaults to the number of CPUs, 4 at most; `item_seconds` is the
    time one image may take; `memory_bytes` the address space of one child; `child_module` the module each runs.
    """

    def __init__(
        self,
        children: int | None = None,
        *,
        limits: PixelLimits | None = None,
        item_seconds: float = 60.0,
        memory_bytes: int = 4 * 2**30,
        child_module: str = CHILD_MODULE,
    ) -> None:
        self.children = children or min(4, os.cpu_count() or 1)
        self._limits = limits or PixelLimits()
        self._item_seconds = item_seconds
        self._memory_bytes = memory_bytes
        self._module = child_module
        self._owner_pid = os.getpid()
        self._closed = False
        self._spawner = Spawner()
        self._slots: queue.LifoQueue[Child | None] = queue.LifoQueue()
        for _ in range(self.children):
            self._slots.put(None)

    def render(
        self,
        source: str | PathLike[str] | bytes,
        profile: str = "dicom_voi_v1",
        size: int | None = None,
        frame: int = 0,
        reducing_gap: float | None = None,
    ) -> NDArray[np.uint8]:
        """As `models.pixels.render_source`, in a child: uint8 (rows, columns), (rows, columns, 3) or (size, size, 3).

        Raises ImageError with the same reasons and with `decoder_crashed` and `decoder_timeout`; BadCall for an unknown
        profile or a closed guard; EngineError when no child can be started.
        """
        return self._render(RenderRequest(source, profile, size, frame, reducing_gap))

    def render_many(self, requests: Iterable[RenderRequest]) -> list[NDArray[np.uint8] | ImageError]:
        """Render requests in all children at once; results in the order of the requests, an ImageError for a failure.

        Raises BadCall and EngineError as `render` does: they concern all requests.
        """
        with ThreadPoolExecutor(self.children, thread_name_prefix="decode") as threads:
            return list(threads.map(self._render_or_error, requests))

    def close(self) -> None:
        """Wait for renderings under way, then end all children. Calling it again does nothing."""
        if self._closed or os.getpid() != self._owner_pid:
            return
        self._closed = True
        for child in [self._slots.get() for _ in range(self.children)]:
            if child is not None:
                child.stop()
        self._spawner.close()
        for _ in range(self.children):
            self._slots.put(None)  # whoever still waits for a child finds the guard closed

    def __enter__(self) -> DecodeGuard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _render_or_error(self, request: RenderRequest) -> NDArray[np.uint8] | ImageError:
        try:
            return self._render(request)
        except ImageError as error:
            return error

    def _render(self, request: RenderRequest) -> NDArray[np.uint8]:
        if request.profile not in PROFILES:
            raise BadCall(f"no pixel profile of that name; there are {', '.join(PROFILES)}")
        if os.getpid() != self._owner_pid:
            raise BadCall("a DecodeGuard cannot be used in a forked process")
        child = self._slots.get()
        try:
            child = self._ready_child(child)
            header, pixels = self._exchange(child, request)
        finally:
            self._slots.put(child if child is not None and child.is_alive() else None)
        return read_reply(header, pixels)

    def _ready_child(self, child: Child | None) -> Child:
        if self._closed:
            raise BadCall("the DecodeGuard is closed")
        if child is not None and child.is_alive():
            return child
        if child is not None:
            child.kill()  # it died while idle: reap it, no image is to blame
        return Child(self._spawner, self._module, self._memory_bytes)

    def _exchange(self, child: Child, request: RenderRequest) -> tuple[dict[str, Any], bytearray]:
        header, payload = self._pack_request(request)
        max_bytes = 3 * max(self._limits.max_pixels, (request.size or 0) ** 2)
        try:
            return child.exchange(header, payload, self._item_seconds, max_bytes)
        except TimeoutError:
            child.kill()
            detail = f"decoding took longer than {self._item_seconds:g} s"
            raise ImageError(Reason.DECODER_TIMEOUT, detail) from None
        except (ChildLost, ValueError):  # ValueError: the reply is no JSON
            detail = describe_status(child.kill())
            raise ImageError(Reason.DECODER_CRASHED, detail) from None
        except BaseException:
            child.kill()  # interrupted half way: its next reply would answer the wrong request
            raise

    def _pack_request(self, request: RenderRequest) -> tuple[dict[str, Any], bytes]:
        is_bytes = isinstance(request.source, bytes)
        header = {
            "path": None if is_bytes else os.path.abspath(os.fsdecode(request.source)),  # noqa: PTH100
            "profile": request.profile,
            "size": request.size,
            "frame": request.frame,
            "reducing_gap": request.reducing_gap,
            "limits": asdict(self._limits),
        }
        return header, request.source if isinstance(request.source, bytes) else b""


def read_reply(header: dict[str, Any], pixels: bytearray) -> NDArray[np.uint8]:
    """The image of a reply. Raises the ImageError it tells of."""
    if "shape" not in header:
        raise ImageError(header["reason"], header["detail"], header["remedy"])
    return np.frombuffer(pixels, dtype=np.uint8).reshape(header["shape"])


def describe_status(status: int) -> str:
    """How a child ended, in words: the signal's name, or its exit status."""
    if status < 0:
        return f"the decoding process was ended by {signal.Signals(-status).name}"
    return f"the decoding process ended with status {status}"
