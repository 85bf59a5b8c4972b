"""Decoding one frame with an explicit order of decoders per transfer syntax.

pydicom tries its plugins in the order they registered, whichever packages happen to be installed; two workers could
then see different pixels of the same lossy file. Here the order is a table. Only permissive licences are in it:
pylibjpeg-openjpeg, pylibjpeg-rle, pyjpegls (MIT), python-gdcm (Apache-2.0), imagecodecs (BSD-3), Pillow (HPND).
pylibjpeg-libjpeg (GPL) is never called, even where it is installed.
"""

from __future__ import annotations

import importlib.util
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import uid
from pydicom.encaps import get_frame
from pydicom.pixels import get_decoder

from models.codestream import is_cut, read_size
from models.foreign import silence_libraries, translate_errors
from models.instance import CONVERT_REMEDY
from readroom.errors import ImageError
from readroom.records import Reason

# First the fastest that is exact, then the others as fallback. Seconds for 2500 x 3000 pixels of 12 bits, one core:
# JPEG lossless imagecodecs 0.07, gdcm 0.23; JPEG-LS pyjpegls 0.24, gdcm 0.42; HTJ2K imagecodecs 0.10, pylibjpeg 0.19;
# JPEG 2000 lossless 1.1 with each, lossy pylibjpeg 0.24, pillow 0.45, gdcm 0.70; RLE pylibjpeg 0.04, pydicom 0.32.
# JPEG baseline, where colour is common, starts with Pillow: imagecodecs is asked for grayscale only.
DECODER_ORDER: dict[str, tuple[str, ...]] = {
    uid.JPEGBaseline8Bit: ("pillow", "gdcm", "imagecodecs"),
    uid.JPEGExtended12Bit: ("imagecodecs", "gdcm", "pillow"),  # only imagecodecs decodes 12 bits
    uid.JPEGLossless: ("imagecodecs", "gdcm"),
    uid.JPEGLosslessSV1: ("imagecodecs", "gdcm"),
    uid.JPEGLSLossless: ("pyjpegls", "imagecodecs", "gdcm"),
    uid.JPEGLSNearLossless: ("pyjpegls", "imagecodecs", "gdcm"),
    uid.JPEG2000Lossless: ("pylibjpeg", "imagecodecs", "gdcm", "pillow"),
    uid.JPEG2000: ("pylibjpeg", "imagecodecs", "gdcm", "pillow"),
    uid.HTJ2KLossless: ("imagecodecs", "pylibjpeg"),
    uid.HTJ2KLosslessRPCL: ("imagecodecs", "pylibjpeg"),
    uid.HTJ2K: ("imagecodecs", "pylibjpeg"),
    uid.RLELossless: ("pylibjpeg", "pydicom"),
}

# Which imagecodecs function decodes which transfer syntax.
IMAGECODECS_FUNCTIONS: dict[str, str] = {
    uid.JPEGBaseline8Bit: "jpeg8_decode",
    uid.JPEGExtended12Bit: "jpeg_decode",
    uid.JPEGLossless: "ljpeg_decode",
    uid.JPEGLosslessSV1: "ljpeg_decode",
    uid.JPEGLSLossless: "jpegls_decode",
    uid.JPEGLSNearLossless: "jpegls_decode",
    uid.JPEG2000Lossless: "jpeg2k_decode",
    uid.JPEG2000: "jpeg2k_decode",
    uid.HTJ2KLossless: "htj2k_decode",
    uid.HTJ2KLosslessRPCL: "htj2k_decode",
    uid.HTJ2K: "htj2k_decode",
}
DECODER_DEPENDENCIES = dict.fromkeys(IMAGECODECS_FUNCTIONS, ("imagecodecs",))  # pydicom's name for this table

INSTALL_REMEDY = "Install the decoders: pip install 'readroom[decoders]'"

_registration = threading.Lock()  # add_plugin is not thread-safe


@dataclass(frozen=True, slots=True)
class DecodedFrame:
    """Pixels of one frame: (rows, columns) or (rows, columns, 3), and the photometric interpretation they now have.

    Values are as pydicom gives them: signedness of the header, YBR already RGB, unused high bits not yet masked.
    """

    pixels: NDArray[Any]
    photometric: str


def is_available(syntax: str) -> bool:
    """pydicom's question to a decoding plugin: can you decode `syntax` here?"""
    return syntax in IMAGECODECS_FUNCTIONS and importlib.util.find_spec("imagecodecs") is not None


def decode_imagecodecs(codestream: bytes, runner: Any) -> bytes:
    """Decode one grayscale frame with imagecodecs; the signature is pydicom's for decoding plugins."""
    import imagecodecs

    if runner.samples_per_pixel != 1:
        raise NotImplementedError("grayscale only: colour comes back in a model that pydicom cannot know")
    decode = getattr(imagecodecs, IMAGECODECS_FUNCTIONS[runner.transfer_syntax])
    pixels: NDArray[Any] = decode(codestream)
    if pixels.shape != (runner.rows, runner.columns):
        raise ValueError("the codestream has another size than the header")
    runner.set_option("bits_allocated", 8 * pixels.dtype.itemsize)
    return pixels.tobytes()


def register_imagecodecs() -> None:
    """Add `decode_imagecodecs` to pydicom's decoders, once per process."""
    with _registration:
        for syntax in IMAGECODECS_FUNCTIONS:
            decoder = get_decoder(uid.UID(syntax))
            if "imagecodecs" not in decoder._available and "imagecodecs" not in decoder._unavailable:
                decoder.add_plugin("imagecodecs", (__name__, decode_imagecodecs.__name__))


def decode_frame(instance: Any, frame: int = 0) -> DecodedFrame:
    """Decode one frame of a checked instance (see `models.instance.read_instance`).

    Raises ImageError: truncated, corrupt, unsupported_syntax.
    """
    silence_libraries()
    syntax = instance.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated:
        with translate_errors(Reason.CORRUPT, "the pixel data does not fit its header"):
            return run_decoder(instance, frame, "", view_only=True, correct_unused_bits=False)
    plugins = list_plugins(syntax)
    check_codestream(instance, frame)
    return try_plugins(instance, frame, plugins)


def list_plugins(syntax: uid.UID) -> list[str]:
    """The installed decoders for `syntax`, best first. Raises ImageError `unsupported_syntax` when there is none."""
    order = DECODER_ORDER.get(syntax, ())
    if not order:
        raise ImageError(Reason.UNSUPPORTED_SYNTAX, f"no decoder for {syntax.name}", CONVERT_REMEDY)
    register_imagecodecs()
    installed = [name for name in order if name in get_decoder(syntax).available_plugins]
    if not installed:
        raise ImageError(Reason.UNSUPPORTED_SYNTAX, f"no decoder for {syntax.name} installed", INSTALL_REMEDY)
    return installed


def check_codestream(instance: Any, frame: int) -> None:
    """Refuse a codestream that is cut or claims another size than the header, before a decoder allocates for it."""
    if instance.file_meta.TransferSyntaxUID == uid.RLELossless:
        return  # RLE segments carry neither size nor end; decoders take both from the header
    frames = int(instance.get("NumberOfFrames") or 1)
    with translate_errors(Reason.CORRUPT, "the encapsulated pixel data cannot be split into frames"):
        codestream = get_frame(instance.PixelData, frame, number_of_frames=frames)
        size = read_size(codestream)
    if is_cut(codestream):
        raise ImageError(Reason.TRUNCATED, "the compressed frame has no end")
    if size not in (None, (instance.Rows, instance.Columns)):
        raise ImageError(Reason.CORRUPT, "the compressed frame has another size than its header")


def try_plugins(instance: Any, frame: int, plugins: list[str]) -> DecodedFrame:
    """Decode with the first plugin that succeeds. Raises ImageError when none does."""
    syntax = instance.file_meta.TransferSyntaxUID
    for name in plugins:
        try:
            return run_decoder(instance, frame, name, **list_options(syntax))
        except MemoryError:
            raise ImageError(Reason.TOO_LARGE, "not enough memory to decode") from None
        except Exception:  # noqa: S112  its text may quote the header; the next decoder may do better
            continue
    if len(plugins) < len(DECODER_ORDER[syntax]):
        detail = f"the installed decoders for {syntax.name} all failed"
        raise ImageError(Reason.UNSUPPORTED_SYNTAX, detail, INSTALL_REMEDY)
    raise ImageError(Reason.CORRUPT, f"every decoder for {syntax.name} failed")


def list_options(syntax: uid.UID) -> dict[str, bool]:
    """Decoding options: RLE keeps unused bits, as native pixel data does, since HighBit may place them below."""
    return {"correct_unused_bits": False} if syntax == uid.RLELossless else {}


def run_decoder(instance: Any, frame: int, plugin: str, **options: bool) -> DecodedFrame:
    """Decode with one pydicom plugin ("" for native encodings); raises whatever it raises."""
    decoder = get_decoder(instance.file_meta.TransferSyntaxUID)
    pixels, properties = decoder.as_array(instance, index=frame, decoding_plugin=plugin, **options)
    return DecodedFrame(to_native(pixels), str(properties["photometric_interpretation"]))


def to_native(pixels: NDArray[Any]) -> NDArray[Any]:
    """The same values in this machine's byte order."""
    return np.asarray(pixels, dtype=pixels.dtype.newbyteorder("="))
