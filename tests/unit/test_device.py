"""What torch's errors mean: a smaller batch, a new process, or a bug of ours."""

from __future__ import annotations

import pytest
import torch

from models.device import pick_device, pick_precision, translate_device_errors
from readroom.errors import BadCall, DeviceBroken, OutOfMemory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)
def test_short_memory_asks_for_a_smaller_batch(error: Exception) -> None:
    with pytest.raises(OutOfMemory) as caught, translate_device_errors():
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: device-side assert triggered",
        "CUDA error: an illegal memory access was encountered",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`",
        "CUDA driver error: unknown error",
    ],
)
def test_a_lost_device_asks_for_a_new_process(words: str) -> None:
    with pytest.raises(DeviceBroken), translate_device_errors():
        raise RuntimeError(words)


@pytest.mark.parametrize("error", [RuntimeError("shape '[2, 3]' is invalid"), ValueError("no"), IndexError("range")])
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, translate_device_errors():
        raise error
    assert caught.value is error


def test_a_real_allocation_that_cannot_be_is_short_memory() -> None:
    with pytest.raises(OutOfMemory), translate_device_errors():
        torch.empty(2**60, dtype=torch.uint8)


def test_memory_held_by_a_failed_batch_is_let_go() -> None:
    held: list[bool] = []

    class Tensor:
        def __del__(self) -> None:
            held.append(False)

    def run_out() -> None:
        activations = Tensor()
        assert activations
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(OutOfMemory) as caught, translate_device_errors():
        run_out()
    assert held, f"{caught.value!r} keeps the frames of the batch alive"


def test_auto_is_cuda_where_there_is_one() -> None:
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_unknown_devices_and_precisions_are_a_bad_call() -> None:
    with pytest.raises(BadCall):
        pick_precision("float8")
    with pytest.raises(BadCall):
        pick_device("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(BadCall, match="no CUDA device"):
            pick_device("cuda")
