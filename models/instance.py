"""Reading a DICOM instance and checking its header, before any pixel is decoded."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, BinaryIO

import pydicom
from pydicom.filereader import read_dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from models.foreign import translate_errors
from models.limits import PixelLimits
from readroom.errors import ImageError
from readroom.records import Reason

PIXEL_KEYWORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
# Native encodings by (implicit VR, little endian), for files without a meta header (PS3.10 C.7.1 asks for one).
NATIVE_SYNTAXES = {
    (True, True): ImplicitVRLittleEndian,
    (False, True): ExplicitVRLittleEndian,
    (False, False): ExplicitVRBigEndian,
}
CONVERT_REMEDY = "Convert the file to Explicit VR Little Endian, for example with gdcmconv --raw"
INFLATE_STEP_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class PixelShape:
    """What the Image Pixel module claims (PS3.3 C.7.6.3); the file may hold less."""

    rows: int
    columns: int
    samples: int
    frames: int
    bits_allocated: int

    @property
    def bits(self) -> int:
        """Size of all frames in bits, decoded and unpadded."""
        return self.rows * self.columns * self.samples * self.frames * self.bits_allocated


def read_instance(stream: BinaryIO, limits: PixelLimits, frame: int = 0) -> Any:
    """Parse a DICOM stream into a pydicom Dataset whose pixels are safe to hand to a decoder.

    The file meta header is optional; a missing Transfer Syntax UID is filled in from how the data set parsed.
    Raises ImageError: corrupt, truncated, too_large, not_image, multi_frame, unsupported_syntax.
    """
    check_inflated(stream, limits)
    with translate_errors(Reason.CORRUPT, "the DICOM header cannot be parsed"):
        stream.seek(0)
        instance = pydicom.dcmread(stream, force=True)
        syntax = complete_syntax(instance)
    if not len(instance):  # pydicom gives up the whole data set when its last element is cut
        raise ImageError(Reason.TRUNCATED, "the data set ends early")
    if syntax.is_private or not syntax.is_transfer_syntax:  # not named: a UID in a file may identify
        raise ImageError(Reason.UNSUPPORTED_SYNTAX, "a transfer syntax the standard does not know", CONVERT_REMEDY)
    check_header(instance, limits, frame)
    return instance


def check_inflated(stream: BinaryIO, limits: PixelLimits) -> None:
    """Inflate a deflated data set (PS3.5 A.5) step by step, keeping nothing, to see that it stays within limits.

    pydicom inflates in one go, so a file of a few kB could otherwise ask for any amount of memory.
    """
    stream.seek(0)
    if DeflatedExplicitVRLittleEndian.encode() not in stream.read(2048):
        return
    with translate_errors(Reason.CORRUPT, "the deflated data set cannot be inflated"):
        stream.seek(132)
        meta = read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
        if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            count_inflated(stream, limits)


def count_inflated(stream: BinaryIO, limits: PixelLimits) -> None:
    """Raise ImageError `too_large` when the deflated rest of `stream` inflates to more than a file may hold."""
    inflater, inflated_bytes = zlib.decompressobj(-zlib.MAX_WBITS), 0
    pending = stream.read(INFLATE_STEP_BYTES)
    while pending:
        inflated_bytes += len(inflater.decompress(pending, INFLATE_STEP_BYTES))
        limits.check_file(inflated_bytes or 1)
        if inflater.eof:
            return
        pending = inflater.unconsumed_tail or stream.read(INFLATE_STEP_BYTES)


def complete_syntax(instance: Any) -> Any:
    """The Transfer Syntax UID; a missing one is filled in with the native encoding the data set was read with."""
    if not hasattr(instance, "file_meta"):
        instance.file_meta = pydicom.dataset.FileMetaDataset()
    if not instance.file_meta.get("TransferSyntaxUID"):
        instance.file_meta.TransferSyntaxUID = NATIVE_SYNTAXES[instance.original_encoding]
    return instance.file_meta.TransferSyntaxUID


def check_header(instance: Any, limits: PixelLimits, frame: int) -> None:
    """Hold the header's claims against `limits`, against the bytes present and against the frame asked for."""
    pixels = find_pixels(instance)
    with translate_errors(Reason.CORRUPT, "the Image Pixel module is incomplete or holds no numbers"):
        shape = read_shape(instance)
    limits.check_picture(shape.rows, shape.columns)
    limits.check_frames(shape.frames, shape.bits // 8)
    if not 0 <= frame < shape.frames:
        raise ImageError(Reason.MULTI_FRAME, f"frame {frame} was asked for, the instance has {shape.frames}")
    check_encapsulation(instance, pixels)
    if not instance.file_meta.TransferSyntaxUID.is_encapsulated:
        check_length(instance, pixels, shape)


def find_pixels(instance: Any) -> Any:
    """The pixel data element. Raises ImageError: `not_image` without one, `truncated` where an image had one."""
    keyword = next((name for name in PIXEL_KEYWORDS if name in instance), None)
    if keyword is None and "Rows" not in instance:
        raise ImageError(Reason.NOT_IMAGE, "a DICOM object without pixels")
    if keyword is None or not instance[keyword].value:
        raise ImageError(Reason.TRUNCATED, "an image header without pixel data")
    return instance[keyword]


def read_shape(instance: Any) -> PixelShape:
    """The Image Pixel module as numbers; raises whatever pydicom raises for elements missing or malformed."""
    return PixelShape(
        rows=int(instance.Rows),
        columns=int(instance.Columns),
        samples=int(instance.get("SamplesPerPixel") or 1),
        frames=max(1, int(instance.get("NumberOfFrames") or 1)),
        bits_allocated=int(instance.BitsAllocated),
    )


def check_encapsulation(instance: Any, pixels: Any) -> None:
    """Encapsulated pixel data has undefined length (PS3.5 A.4), native has not; a mix would decode to noise."""
    if instance.file_meta.TransferSyntaxUID.is_encapsulated != bool(pixels.is_undefined_length):
        raise ImageError(Reason.CORRUPT, "the pixel data is not encoded as the transfer syntax says")


def check_length(instance: Any, pixels: Any, shape: PixelShape) -> None:
    """Raise ImageError `truncated` when native pixel data is shorter than the header claims (PS3.5 8.1.1)."""
    claimed_bits = shape.bits
    if instance.get("PhotometricInterpretation") == "YBR_FULL_422":
        claimed_bits = claimed_bits * 2 // 3  # two of six samples are shared, PS3.3 C.7.6.3.1.2
    if len(pixels.value) * 8 < claimed_bits:
        raise ImageError(Reason.TRUNCATED, "the header claims more pixels than the file holds")
