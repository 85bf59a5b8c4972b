"""Captioners that misbehave on demand, for the tests of the worker."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence

import numpy as np

from models.base import ItemReader, Picture
from readroom.errors import DeviceBroken, OutOfMemory
from readroom.records import GeneratedText, GenerationSettings


def paint(value: int) -> Picture:
    """A picture that is told from others by its first pixel."""
    return np.full((2, 2), value, dtype=np.uint8)


class FakeCaptioner:
    """Says the first pixel of each picture; `trouble` looks at each batch first and may raise."""

    family = "fake"
    reader: ItemReader | None = None
    profile = "dicom_voi_v1"
    image_size = 8
    defaults = GenerationSettings()

    def __init__(self, checkpoint: str = "fake", trouble: Callable[[list[int]], None] | None = None) -> None:
        self.checkpoint = checkpoint
        self.trouble = trouble or (lambda pixels: None)
        self.runs: list[list[int]] = []
        self.warmed = 0

    def prepare(self, images: Sequence[Picture]) -> list[int]:
        return [int(image.flat[0]) for image in images]

    def generate(self, batch: list[int], settings: GenerationSettings) -> list[int]:
        self.runs.append(batch)
        self.trouble(batch)
        return batch

    def finish(self, raw: list[int]) -> list[GeneratedText]:
        return [GeneratedText(f"pixel {value}", -0.5) for value in raw]

    def warm_up(self) -> None:
        self.warmed += 1


def raise_on(*culprits: int, error: Exception | None = None) -> Callable[[list[int]], None]:
    """Trouble: any batch that holds one of these pixels fails."""

    def look(pixels: list[int]) -> None:
        if set(pixels) & set(culprits):
            raise error or RuntimeError("Doe^Jane 1970 cannot be captioned")

    return look


def fit_at_most(size: int) -> Callable[[list[int]], None]:
    """Trouble: the device has memory for `size` pictures."""

    def look(pixels: list[int]) -> None:
        if len(pixels) > size:
            raise OutOfMemory("too large")

    return look


def break_device(pixels: list[int]) -> None:
    """Trouble: the device is lost."""
    raise DeviceBroken("the device is lost")


class HangingOn:
    """Trouble: the forward pass does not come back until `release` is set; `entered` tells that it hangs."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.release = threading.Event()

    def __call__(self, pixels: list[int]) -> None:
        self.entered.set()
        self.release.wait()


def kill_process(pixels: list[int]) -> None:
    """Trouble: the process is gone, as after a segmentation fault in a driver."""
    os._exit(139)
