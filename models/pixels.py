"""From a file, an array or a PIL image to the picture a model sees.

    pixels      the door: what kind of file is it, render it, size it for a model
    instance    a DICOM header, checked against limits and against the bytes present
    decoders    one frame of an instance, by an explicit order of decoders
    display     stored values to grey levels; the named profiles
    colour      colour instances to RGB
    picture     JPEG, PNG and their like, arrays, PIL images

Decoders are C code on untrusted input: a worker renders through `models.decode_guard`, which does all this in child
processes.
"""

from __future__ import annotations

import io
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.colour import render_colour
from models.decoders import DecodedFrame, decode_frame
from models.display import PROFILES, render_gray
from models.foreign import silence_libraries, translate_errors
from models.instance import read_instance
from models.limits import PixelLimits
from models.picture import render_array, render_picture, render_pil
from readroom.errors import BadCall, ImageError
from readroom.records import Reason

__all__ = [
    "DEFAULT_PROFILE",
    "PROFILES",
    "PixelLimits",
    "render_array",
    "render_file",
    "render_pil",
    "render_source",
    "sniff_format",
    "to_model_input",
]

DEFAULT_PROFILE = "dicom_voi_v1"
HEAD_BYTES = 256
# Content type envelopedData of CMS (RFC 5652), which wraps files on DICOM secure media (PS3.15 B.8)
ENVELOPED_DATA = bytes.fromhex("06092a864886f70d010703")
DEFAULT_LIMITS = PixelLimits()


def render_file(
    path: str | PathLike[str],
    profile: str = DEFAULT_PROFILE,
    size: int | None = None,
    limits: PixelLimits = DEFAULT_LIMITS,
    *,
    frame: int = 0,
    reducing_gap: float | None = None,
) -> NDArray[np.uint8]:
    """Render one frame of a DICOM or picture file: uint8 (rows, columns) gray or (rows, columns, 3) RGB.

    With `size`, the picture for a model instead: uint8 (size, size, 3). `profile` is a name of `PROFILES` and concerns
    monochrome DICOM only. `reducing_gap` trades exactness for speed when sizing, see `to_model_input`.
    Raises ImageError with a reason of `readroom.records.Reason`, BadCall for an unknown profile.
    """
    return render_source(path, profile, size, limits, frame=frame, reducing_gap=reducing_gap)


def render_source(
    source: str | PathLike[str] | bytes,
    profile: str = DEFAULT_PROFILE,
    size: int | None = None,
    limits: PixelLimits = DEFAULT_LIMITS,
    *,
    frame: int = 0,
    reducing_gap: float | None = None,
) -> NDArray[np.uint8]:
    """As `render_file`; `source` may also be the bytes of a file, such as a member of an archive."""
    check_profile(profile)
    with open_source(source, limits) as stream:
        if sniff_stream(stream) == "dicom":
            image = render_dicom(stream, profile, limits, frame)
        else:
            draft_size = int(size * reducing_gap) if size and reducing_gap else None
            image = render_picture(stream, limits, frame, draft_size)
    return to_model_input(image, size, reducing_gap) if size else image


def check_profile(profile: str) -> None:
    """Raise BadCall for a name that is not in `PROFILES`."""
    if profile not in PROFILES:
        raise BadCall(f"no pixel profile of that name; there are {', '.join(PROFILES)}")


@contextmanager
def open_source(source: str | PathLike[str] | bytes, limits: PixelLimits) -> Iterator[BinaryIO]:
    """A binary stream on a regular file or on bytes, its length checked. Raises ImageError: missing, unreadable..."""
    if isinstance(source, bytes):
        limits.check_file(len(source))
        yield io.BytesIO(source)
        return
    with open_file(Path(source), limits) as stream:
        yield stream


def open_file(path: Path, limits: PixelLimits) -> BinaryIO:
    """Open a regular file within limits. Raises ImageError: missing, unreadable, empty, too_large."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe or device would block or never end
            raise ImageError(Reason.UNREADABLE, "not a regular file")
        limits.check_file(status.st_size)
        return path.open("rb")
    except FileNotFoundError:
        raise ImageError(Reason.MISSING, "the file is not there") from None
    except (OSError, ValueError):  # ValueError: a null byte in the name
        raise ImageError(Reason.UNREADABLE, "the file cannot be opened") from None


def sniff_stream(stream: BinaryIO) -> Literal["dicom", "other"]:
    """What the first bytes say. Raises ImageError: encrypted, unreadable."""
    with translate_errors(Reason.UNREADABLE, "the file cannot be read"):
        head = stream.read(HEAD_BYTES)
    kind = sniff_format(head)
    if kind == "encrypted":
        raise ImageError(Reason.ENCRYPTED, "a CMS envelope; decrypt the media first")
    return kind


def sniff_format(head: bytes) -> Literal["dicom", "encrypted", "other"]:
    """Recognise a file by its first bytes (132 or more), never by its name.

    DICOM has `DICM` after a preamble of 128 bytes (PS3.10 7.1), or starts with a data element of group 0002 or 0008.
    """
    if head[128:132] == b"DICM" or starts_with_element(head):
        return "dicom"
    return "encrypted" if ENVELOPED_DATA in head[:64] else "other"


def starts_with_element(head: bytes) -> bool:
    """Whether the first bytes are a data element of group 0002 or 0008 in any native encoding.

    Element numbers of these first elements are below 0x0100; then comes a VR or a 32-bit length that is small.
    """
    if len(head) < 8:
        return False
    little = head[0] in (2, 8) and head[1] == 0 and head[3] == 0
    big = head[1] in (2, 8) and head[0] == 0 and head[2] == 0
    has_vr = head[4:6].isalpha() and head[4:6].isupper()
    return (little or big) and (has_vr or (little and head[6:8] == b"\0\0"))


def render_dicom(stream: BinaryIO, profile: str, limits: PixelLimits, frame: int) -> NDArray[np.uint8]:
    """Render one frame of a DICOM stream: uint8 (rows, columns) or (rows, columns, 3). Raises ImageError."""
    silence_libraries()
    instance = read_instance(stream, limits, frame)
    decoded = decode_frame(instance, frame)
    with translate_errors(Reason.CORRUPT, "the display elements cannot be used"):
        if is_monochrome(decoded):
            return render_gray(decoded.pixels, instance, profile, frame)
        return render_colour(decoded, instance)


def is_monochrome(decoded: DecodedFrame) -> bool:
    """Whether a decoded frame has one sample per pixel that is a brightness."""
    return decoded.photometric.startswith("MONOCHROME") and decoded.pixels.ndim == 2


def to_model_input(image: NDArray[np.uint8], size: int, reducing_gap: float | None = None) -> NDArray[np.uint8]:
    """uint8 (size, size, 3) of a uint8 gray or RGB image, by antialiased BICUBIC, aspect ignored (BLIP's habit).

    `reducing_gap` 2.0 lets Pillow shrink by whole factors first: twice as fast on films, off by 0.2 grey levels in the
    mean and 2 at most. None is exact.
    """
    sized = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, reducing_gap=reducing_gap))
    return np.repeat(sized[..., None], 3, axis=2) if sized.ndim == 2 else sized
