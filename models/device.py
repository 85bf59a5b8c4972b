"""Devices: which one, in which number format, and what their errors mean."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from readroom.errors import BadCall, DeviceBroken, EngineError, OutOfMemory

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What torch says when memory is short; CUDA, cuBLAS and the CPU allocator each have their own words.
MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
# After any of these the CUDA context is lost or doubtful; only a new process gets a good one.
DEVICE_WORDS = ("cuda error", "device-side assert", "cudnn", "cublas", "cuda driver", "acceleratorerror")


def pick_device(device: str) -> torch.device:
    """`auto` is CUDA when there is one, else the CPU. Raises BadCall for a device this machine has not."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise BadCall("this machine has no CUDA device that torch can use", "Say device=cpu or auto.")
    try:
        return torch.device(device)
    except RuntimeError:
        raise BadCall(f"no device is called {device!r}", "Say auto, cpu or cuda.") from None


def pick_precision(precision: str) -> torch.dtype:
    """The torch type of `float32` or `bfloat16`. Raises BadCall."""
    if precision not in PRECISIONS:
        raise BadCall(f"no precision is called {precision!r}", f"Say {' or '.join(PRECISIONS)}.")
    return PRECISIONS[precision]


@contextmanager
def translate_device_errors() -> Iterator[None]:
    """Turn torch's errors about memory and devices into OutOfMemory and DeviceBroken; let all others through."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        meant = _read_error(error)
        if meant is None:
            raise
        # An error holds the frames it went through, and they hold the tensors of the batch that did not fit.
        traceback.clear_frames(error.__traceback__)
        if isinstance(meant, OutOfMemory) and torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise meant from error


def _read_error(error: BaseException) -> EngineError | None:
    words = f"{type(error).__name__} {error}".lower()
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in words for word in MEMORY_WORDS):
        return OutOfMemory("the device had too little memory for this batch", "Lower READROOM_MAX_BATCH.")
    if any(word in words for word in DEVICE_WORDS):
        return DeviceBroken(f"the device failed ({type(error).__name__})", "Start a new worker process.")
    return None
