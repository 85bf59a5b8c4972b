"""Pictures that are no DICOM: JPEG, PNG, TIFF and their like, and arrays, to 8-bit gray or RGB."""

from __future__ import annotations

from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from models.foreign import silence_libraries, translate_errors
from models.limits import PixelLimits
from readroom.errors import ImageError
from readroom.records import Reason

# Formats with a plain decoder; EPS, PDF and other formats that run programs stay out.
PICTURE_FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000", "PPM")
GRAY_MODES = frozenset({"1", "L"})
DEEP_MODES = ("I", "F")  # "I;16", "I;16B", "I" and "F"
DEPTHS = (8, 10, 12, 14, 16)  # bits per pixel of radiographs kept in 16-bit files


def render_picture(
    stream: BinaryIO, limits: PixelLimits, frame: int = 0, draft_size: int | None = None
) -> NDArray[np.uint8]:
    """uint8 (rows, columns) or (rows, columns, 3) of a picture file; animated ones give their frame `frame`.

    `draft_size`: a JPEG may be decoded at 1/2, 1/4 or 1/8 as long as both sides keep this many pixels.
    Raises ImageError: not_image, too_large, truncated, corrupt, multi_frame.
    """
    silence_libraries()
    stream.seek(0)
    image = open_picture(stream)
    with image:
        limits.check_picture(image.height, image.width)
        if draft_size:
            image.draft(None, (draft_size, draft_size))  # type: ignore[arg-type]
        load_frame(image, frame)
        with translate_errors(Reason.CORRUPT, "the picture cannot be converted"):
            return convert_image(image)


def open_picture(stream: BinaryIO) -> Image.Image:
    """Read a picture's header. Raises ImageError `not_image` when no format is recognised."""
    try:
        return Image.open(stream, formats=PICTURE_FORMATS)
    except UnidentifiedImageError:
        raise ImageError(Reason.NOT_IMAGE, "neither DICOM nor a picture format that is read") from None
    except Image.DecompressionBombError:
        raise ImageError(Reason.TOO_LARGE, "the header claims too many pixels") from None
    except Exception:
        raise ImageError(Reason.CORRUPT, "the picture's header cannot be read") from None


def load_frame(image: Image.Image, frame: int) -> None:
    """Decode one frame. Raises ImageError: multi_frame, truncated, corrupt."""
    with translate_errors(Reason.MULTI_FRAME, f"the picture has no frame {frame}"):
        if frame:
            image.seek(frame)
    try:
        image.load()
    except (OSError, EOFError):  # what Pillow raises when the data ends early
        raise ImageError(Reason.TRUNCATED, "the picture's data ends early or is damaged") from None
    except MemoryError:
        raise ImageError(Reason.TOO_LARGE, "not enough memory to decode") from None
    except Exception:
        raise ImageError(Reason.CORRUPT, "the picture cannot be decoded") from None


def convert_image(image: Image.Image) -> NDArray[np.uint8]:
    """Any loaded PIL image, turned upright by its EXIF orientation, as uint8 gray or RGB."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith(DEEP_MODES):
        return render_array(np.asarray(upright))
    if upright.has_transparency_data:
        upright = flatten_alpha(upright)
    if upright.mode in GRAY_MODES:
        return np.asarray(upright.convert("L"))
    return np.asarray(upright.convert("RGB"))


def flatten_alpha(image: Image.Image) -> Image.Image:
    """Lay a transparent image on black: where there is no picture there is nothing, as for DICOM padding."""
    is_gray = image.mode in ("LA", "La", "L")
    layers = image.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), layers)
    return flat.convert("L" if is_gray else "RGB")


def render_pil(image: Image.Image) -> NDArray[np.uint8]:
    """uint8 (rows, columns) or (rows, columns, 3) of a PIL image of any mode. Raises ImageError: truncated, corrupt."""
    silence_libraries()
    load_frame(image, 0)
    with translate_errors(Reason.CORRUPT, "the picture cannot be converted"):
        return convert_image(image)


def render_array(array: NDArray[Any]) -> NDArray[np.uint8]:
    """uint8 (rows, columns) or (rows, columns, 3) of an array (rows, columns[, 1, 3 or 4]) of numbers.

    uint8 is taken as it is, bool as black and white, integers by the smallest usual depth (8, 10, 12, 14, 16 bits)
    that holds their maximum, floats within 0..1 as fractions and other floats from minimum to maximum.
    Of floats, samples that are no number count as padding and become black; infinite ones become black and white.
    A fourth channel is alpha, laid on black. Raises ImageError: `not_image` for other shapes and types, `corrupt` for
    floats none of which is finite.
    """
    array = np.asarray(array)
    if array.dtype.kind not in "buif" or array.ndim not in (2, 3) or array.size == 0:
        raise ImageError(Reason.NOT_IMAGE, "an array of numbers (rows, columns[, channels]) is expected")
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4):
        raise ImageError(Reason.NOT_IMAGE, "1, 3 or 4 channels are expected, last")
    shades = scale_samples(array)
    if shades.ndim == 3 and shades.shape[2] == 4:
        return np.asarray(flatten_alpha(Image.fromarray(shades)))
    return shades[..., 0] if shades.ndim == 3 and shades.shape[2] == 1 else shades


def scale_samples(array: NDArray[Any]) -> NDArray[np.uint8]:
    """Samples of any numeric type as uint8, see `render_array` for the rules."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return np.asarray(array, dtype=np.uint8) * np.uint8(255)
    low, high = find_range(array)
    fractions = (np.nan_to_num(array.astype(np.float64), nan=low, posinf=high, neginf=low) - low) / ((high - low) or 1)
    return np.asarray(np.rint(np.clip(fractions, 0.0, 1.0) * 255.0), dtype=np.uint8)


def find_range(array: NDArray[Any]) -> tuple[float, float]:
    """The values that become black and white. Raises ImageError `corrupt` where none is finite."""
    finite = array[np.isfinite(array)]
    if not finite.size:
        raise ImageError(Reason.CORRUPT, "no sample of the picture is a finite number")
    low, high = float(finite.min()), float(finite.max())
    if array.dtype.kind == "f":
        return (0.0, 1.0) if low >= 0.0 and high <= 1.0 else (low, high)
    depth = next((bits for bits in DEPTHS if high < 2**bits), 0)
    return (0.0, 2.0**depth - 1) if depth and low >= 0 else (low, high)
