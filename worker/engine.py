"""Running models: which are loaded, how large a batch may be, and whose fault it was.

One bad picture never sinks its batch: a batch that fails is halved until the culprit stands alone, so that each picture
runs at most log2(batch) + 1 times. A batch too large for the device is halved too, and the size that passed is kept.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from models.base import Captioner, Picture, run_captioner
from readroom.errors import CheckpointBroken, CheckpointError, DeviceBroken, EngineError, OutOfMemory, ReadroomError
from readroom.log import describe_error
from readroom.records import GeneratedText, GenerationSettings, Reason

logger = logging.getLogger(__name__)

LoadCaptioner = Callable[[str], Captioner]
"""From a checkpoint's ref to a model; raises CheckpointError."""

# A missing checkpoint fails a whole submission, batch after batch: it is not looked for each time.
FAILURE_MEMORY_S = 30.0


@dataclass(frozen=True, slots=True)
class ModelFailure:
    """Why a model gave no text for one picture. `retry`: another time it may."""

    reason: str
    detail: str
    retry: bool = False


class Engine:
    """The models of one worker process. Any thread may ask for a captioner; one thread runs them."""

    def __init__(self, load: LoadCaptioner, max_loaded: int = 2) -> None:
        self._load = load
        self._max_loaded = max_loaded
        self._lock = threading.Lock()
        self._loaded: OrderedDict[str, Captioner] = OrderedDict()
        self._broken: dict[str, tuple[CheckpointError, float]] = {}
        self._warm: set[str] = set()
        self._caps: dict[str, int] = {}

    def find_captioner(self, ref: str) -> Captioner:
        """The captioner of a checkpoint, loaded if need be; the one not used for longest makes room.

        Raises CheckpointError, and OutOfMemory when it does not fit even alone.
        """
        with self._lock:
            if ref in self._loaded:
                self._loaded.move_to_end(ref)
                return self._loaded[ref]
            self._refuse_broken(ref)
            return self._load_captioner(ref)

    def warm_up(self, ref: str) -> None:
        """Run a checkpoint once on nothing, before its first batch. For the thread that runs models.

        Raises DeviceBroken: a device that is lost before it saw a picture is no picture's fault.
        """
        if ref in self._warm:
            return
        try:
            self.find_captioner(ref).warm_up()
        except DeviceBroken:
            raise
        except Exception as error:  # the batch itself will tell
            logger.warning("%s: warming up failed: %s", ref, describe_error(error))
        self._warm.add(ref)

    def run_captions(
        self, ref: str, images: Sequence[Picture], settings: GenerationSettings
    ) -> list[GeneratedText | ModelFailure]:
        """One text or failure for each picture, in order.

        Raises DeviceBroken: nothing of the batch is known then, and only a new process helps.
        """
        return self._run_capped(ref, self.find_captioner(ref), images, settings)

    def _refuse_broken(self, ref: str) -> None:
        error, until = self._broken.get(ref, (None, 0.0))
        if error is not None and time.monotonic() < until:
            raise error

    def _load_captioner(self, ref: str) -> Captioner:
        self._make_room(self._max_loaded - 1)
        begin = time.monotonic()
        try:
            captioner = self._load_alone(ref)
        except CheckpointError as error:
            self._broken[ref] = error, time.monotonic() + FAILURE_MEMORY_S
            raise
        self._loaded[ref] = captioner
        logger.info("checkpoint %s loaded in %.1f s", ref, time.monotonic() - begin)
        return captioner

    def _load_alone(self, ref: str) -> Captioner:
        try:
            return self._load(ref)
        except OutOfMemory:
            if not self._loaded:
                raise
            self._make_room(0)
            return self._load(ref)
        except ReadroomError:
            raise
        except Exception as error:
            raise CheckpointBroken(f"its model cannot be built ({type(error).__name__})") from error

    def _make_room(self, keep: int) -> None:
        while len(self._loaded) > keep:
            ref, _ = self._loaded.popitem(last=False)
            self._warm.discard(ref)

    def _run_capped(
        self, ref: str, captioner: Captioner, images: Sequence[Picture], settings: GenerationSettings
    ) -> list[GeneratedText | ModelFailure]:
        """Run in pieces no larger than what is known to fit."""
        results: list[GeneratedText | ModelFailure] = []
        while len(results) < len(images):
            size = self._caps.get(ref, len(images))
            piece = images[len(results) : len(results) + size]
            results.extend(self._run_piece(ref, captioner, piece, settings))
        return results

    def _run_piece(
        self, ref: str, captioner: Captioner, images: Sequence[Picture], settings: GenerationSettings
    ) -> list[GeneratedText | ModelFailure]:
        try:
            return list(_run_once(captioner, images, settings))
        except DeviceBroken:
            raise
        except OutOfMemory:
            if len(images) == 1:
                return [ModelFailure(Reason.MODEL_FAILED, "the device has too little memory for one image", retry=True)]
            self._caps[ref] = max(1, min(self._caps.get(ref, len(images)), len(images) // 2))
            logger.warning("%s: out of memory with %d images, going on with %d", ref, len(images), self._caps[ref])
            return self._run_capped(ref, captioner, images, settings)
        except Exception as error:
            if len(images) == 1:
                logger.warning("%s: the model failed on one image (%s)", ref, describe_error(error))
                return [ModelFailure(Reason.MODEL_FAILED, type(error).__name__)]
            half = len(images) // 2
            first = self._run_piece(ref, captioner, images[:half], settings)
            return first + self._run_piece(ref, captioner, images[half:], settings)


def _run_once(captioner: Captioner, images: Sequence[Picture], settings: GenerationSettings) -> list[GeneratedText]:
    texts = run_captioner(captioner, images, settings)
    if len(texts) != len(images):
        raise EngineError(f"the model gave {len(texts)} texts for {len(images)} images")
    return texts
