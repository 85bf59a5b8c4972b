"""The edge where errors and chatter of foreign imaging libraries stop.

pydicom, Pillow and the codecs quote header values in exceptions, warnings and log lines, and a header value may be a
patient's name. So their texts go nowhere: an exception becomes an ImageError in our own words, the rest is dropped.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from readroom.errors import ImageError, ReadroomError
from readroom.records import Reason

LOGGERS = ("pydicom", "PIL", "openjpeg", "libjpeg", "rle", "pylibjpeg", "imagecodecs")
MODULES = rf"({'|'.join(LOGGERS)})(\.|$)"


def silence_libraries() -> None:
    """Drop warnings and log records of the imaging libraries, process-wide and for good.

    `warnings.catch_warnings` swaps a global list and is unsafe with threads; adding the same filter twice is a no-op.
    """
    warnings.filterwarnings("ignore", module=MODULES)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


@contextmanager
def translate_errors(reason: Reason, detail: str) -> Iterator[None]:
    """Turn any foreign exception inside the block into ImageError(reason, detail), its own text dropped.

    Errors of ours pass; running out of memory is always `too_large`.
    """
    try:
        yield
    except ReadroomError:
        raise
    except MemoryError:
        raise ImageError(Reason.TOO_LARGE, "not enough memory to decode") from None
    except Exception:
        raise ImageError(reason, detail) from None
