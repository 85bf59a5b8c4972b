"""One DICOM instance: is it a chest radiograph that can be drafted? Answered from its header; pixels stay untouched.

Reading is tolerant (no preamble, no meta header, wrong VR, unknown character set) and bounded: elements that are not
asked for are skipped by seeking, a deflated data set is inflated step by step, and no element longer than 64 KiB is
read. Nothing of what pydicom says goes into an error: its texts quote the file.
"""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any, BinaryIO

from pydicom.filereader import read_dataset, read_partial
from pydicom.tag import Tag

from producer.views import View, find_view, rank_view
from readroom.errors import SourceError
from readroom.records import Reason
from readroom.settings import MEBIBYTE, Settings

MAX_ELEMENT_BYTES = 64 * 1024
MAX_TEXT = 256  # characters kept of a text; the standard's longest here is 64
MAX_INFLATED_HEADER = 16 * MEBIBYTE
PIXEL_TAGS = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})
SEQUENCE_DELIMITER, ITEM = 0xFFFEE0DD, 0xFFFEE000
UNDEFINED_LENGTH = 0xFFFFFFFF
LONG_VRS = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"UN", b"SQ", b"UC", b"UR", b"UT", b"SV", b"UV"})
SHORT_VRS = frozenset(
    {b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FL", b"FD", b"IS", b"LO", b"LT", b"PN", b"SH", b"SL", b"SS"}
    | {b"ST", b"TM", b"UI", b"UL", b"US"}
)

HEADER_KEYWORDS = [
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "AccessionNumber", "PatientID",
    "Modality", "PresentationIntentType", "StudyDescription", "SeriesDescription", "ProtocolName",
    "BodyPartExamined", "AnatomicRegionSequence", "ViewPosition", "ViewCodeSequence", "PatientOrientation",
    "AcquisitionDeviceProcessingDescription", "BurnedInAnnotation", "PhotometricInterpretation",
    "SamplesPerPixel", "NumberOfFrames", "Rows", "Columns", "BitsAllocated"
]  # fmt: skip
HEADER_TAGS: list[Any] = [Tag(keyword) for keyword in HEADER_KEYWORDS]

# PS3.4 B.5. Real exports hold DX objects whose Modality says CR, so the SOP class decides.
STORAGE = "1.2.840.10008.5.1.4.1.1."
COMPUTED_RADIOGRAPHY = STORAGE + "1"
DIGITAL_X_RAY = STORAGE + "1.1"
DIGITAL_X_RAY_RAW = STORAGE + "1.1.1"
MEDIA_DIRECTORY = "1.2.840.10008.1.3.10"
DEFLATED = "1.2.840.10008.1.2.1.99"
RADIOGRAPHS = frozenset({COMPUTED_RADIOGRAPHY, DIGITAL_X_RAY, DIGITAL_X_RAY_RAW})
RADIOGRAPH_MODALITIES = frozenset({"CR", "DX", "RG"})
# Storage classes by the number behind `STORAGE`: waveforms, presentation states, registrations and segmentations,
# measurements, structured reports and key objects, encapsulated documents, plans, inventories, radiotherapy.
NOT_IMAGE_ARCS = frozenset(
    [
        "8", "9", "10", "11", "66", "67", "68", "78", "79", "80", "81", "82", "88", "90", "91", "104", "129", "131",
        "200", "201", "481"
    ]
)  # fmt: skip
NOT_IMAGE_MODALITIES = frozenset(
    [
        "SR", "PR", "KO", "DOC", "ECG", "EPS", "HD", "AU", "SEG", "REG", "RTPLAN", "RTSTRUCT", "RTDOSE", "RTRECORD",
        "RTIMAGE", "FID", "RWV", "PLAN"
    ]
)  # fmt: skip
SECONDARY_ARC = "7"

CHEST_WORDS = ("CHEST", "THORAX", "TORAX", "TORACE", "LUNG", "CXR")
NO_REGION = frozenset({"", "UNKNOWN", "UNSPECIFIED", "OTHER", "NONE", "DEFAULT"})
OTHER_REGIONS = frozenset(
    [
        "HAND", "WRIST", "FOREARM", "ELBOW", "HUMERUS", "SHOULDER", "FINGER", "FOOT", "ANKLE", "TOE", "KNEE",
        "TIBIA", "FIBULA", "FEMUR", "HIP", "PELVIS", "SACRUM", "COCCYX", "SKULL", "SINUS", "SINUSES", "MANDIBLE",
        "ORBIT", "ORBITS", "CSPINE", "LSPINE", "CERVICAL", "LUMBAR", "ABDOMEN", "KUB", "EXTREMITY", "EXTREMETY"
    ]
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class PixelElement:
    """Where the pixel data element of a file is; `end` is where its value ends or the file does.

    `complete` says that the value is there to its end: as long as its length field says, or, when encapsulated, closed
    by its delimiter. `start` and `end` are None for a deflated file, whose bytes mean nothing alone.
    """

    start: int | None
    end: int | None
    length: int
    complete: bool


@dataclass(frozen=True, slots=True)
class Header:
    """What a header says that matters here; "" and None where it says nothing."""

    sop_class_uid: str
    sop_instance_uid: str
    study_instance_uid: str
    series_instance_uid: str
    accession_number: str
    patient_id: str
    modality: str
    presentation_intent: str
    body_part: str
    regions: tuple[str, ...]
    view: View | None
    burned_in: str
    photometric: str
    syntax: str
    samples: int
    frames: int
    rows: int | None
    columns: int | None
    bits_allocated: int | None
    pixels: PixelElement | None

    @property
    def view_rank(self) -> int:
        """0 PA, 1 AP, 2 unknown, 3 lateral, 4 other."""
        return rank_view(self.view)

    @property
    def flags(self) -> tuple[str, ...]:
        """What a reader of the draft should know is not certain."""
        doubts = (
            ("view_unknown", self.view is None),
            ("body_part_unknown", self.body_part in NO_REGION),
            ("study_unknown", not self.study_instance_uid),
        )
        return tuple(name for name, applies in doubts if applies)


def is_dicom(start: bytes) -> bool:
    """Whether a file's first bytes are DICOM's: the prefix, or a first element of group 0002 or 0008.

    Files without preamble are common enough to be read, and `force=True` on everything would read anything.
    """
    if start[128:132] == b"DICM":
        return True
    if len(start) < 8 or (start[:2] not in {b"\x02\0", b"\x08\0"} and start[:2] not in {b"\0\x02", b"\0\x08"}):
        return False
    if start[4:6] in SHORT_VRS | LONG_VRS:
        return True
    # Implicit VR is little endian only; the first elements of these groups are short.
    return start[1] == 0 and struct.unpack("<L", start[4:8])[0] <= 1024


def read_header(file: BinaryIO, size_bytes: int) -> Header:
    """Read what matters of a DICOM header, and where its pixel data is.

    `file` is seekable and `size_bytes` long. Raises SourceError: `empty`, `not_dicom`, `truncated`, `corrupt`.
    """
    if size_bytes == 0:
        raise SourceError(Reason.EMPTY, "the file has no bytes")
    file.seek(0)
    start = file.read(2048)
    if not is_dicom(start):
        raise SourceError(Reason.NOT_DICOM, "neither the DICOM prefix nor a DICOM element at its start")
    if is_cut_early(start, size_bytes):
        raise SourceError(Reason.TRUNCATED, "the file ends within its meta header")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return parse_deflated(file) if DEFLATED.encode() in start else parse_plain(file, size_bytes)
        except SourceError:
            raise
        except (EOFError, struct.error):
            raise SourceError(Reason.TRUNCATED, "the file ends within its header") from None
        except Exception:
            raise SourceError(Reason.CORRUPT, "the header cannot be parsed") from None


def is_cut_early(start: bytes, size_bytes: int) -> bool:
    """Whether a file ends within its meta header, by the length that (0002,0000) gives of it (PS3.10 7.1)."""
    if start[128:132] != b"DICM":
        return False
    if start[132:140] != b"\x02\0\0\0UL\x04\0":
        return size_bytes <= 144  # no group length where it has to be; four bytes of anything are no header either
    return len(start) < 144 or 144 + int(struct.unpack("<L", start[140:144])[0]) >= size_bytes


def parse_plain(file: BinaryIO, size_bytes: int) -> Header:
    """Parse a file whose data set is not deflated."""
    file.seek(0)
    instance = read_partial(
        file, stop_when=at_pixels, defer_size=MAX_ELEMENT_BYTES, force=True, specific_tags=HEADER_TAGS
    )
    is_implicit, is_little = instance.original_encoding
    pixels = find_pixels(file, size_bytes, bool(is_implicit), bool(is_little))
    return make_header(instance, instance.file_meta, pixels)


def parse_deflated(file: BinaryIO) -> Header:
    """Parse a file whose data set is deflated (PS3.5 A.5), keeping no more than the first 16 MiB of it."""
    file.seek(132)
    meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
    if _text(meta, "TransferSyntaxUID") != DEFLATED:
        return parse_plain(file, file.seek(0, os.SEEK_END))
    prefix, inflated_bytes, complete = inflate_prefix(file)
    data = BytesIO(prefix)
    instance = read_dataset(
        data, False, True, stop_when=at_pixels, defer_size=MAX_ELEMENT_BYTES, specific_tags=HEADER_TAGS
    )
    found = find_pixels(data, inflated_bytes, False, True)
    pixels = found and PixelElement(None, None, found.length, found.complete and complete)
    return make_header(instance, meta, pixels)


def inflate_prefix(file: BinaryIO) -> tuple[bytes, int, bool]:
    """The first 16 MiB of a deflated data set, its whole size in bytes, and whether its stream ends properly.

    Counting stops at 4 GiB: what pretends to be larger is incomplete.
    """
    inflater, kept, inflated_bytes = zlib.decompressobj(-zlib.MAX_WBITS), bytearray(), 0
    pending = file.read(MEBIBYTE)
    while pending and not inflater.eof and inflated_bytes <= UNDEFINED_LENGTH:
        piece = inflater.decompress(pending, MEBIBYTE)
        kept += piece[: MAX_INFLATED_HEADER - len(kept)]
        inflated_bytes += len(piece)
        pending = inflater.unconsumed_tail or file.read(MEBIBYTE)
    return bytes(kept), inflated_bytes, inflater.eof


def at_pixels(tag: Any, vr: str | None, length: int) -> bool:
    """Whether an element is pixel data, or lies behind where it would be."""
    return int(tag) >= 0x7FE00008


def find_pixels(file: BinaryIO, size_bytes: int, is_implicit: bool, is_little: bool) -> PixelElement | None:
    """The pixel data element at the file's position; None when there is none."""
    endian = "<" if is_little else ">"
    lead = file.read(8)
    if len(lead) < 8:
        return None
    group, element = struct.unpack(endian + "HH", lead[:4])
    if (group << 16 | element) not in PIXEL_TAGS:
        return None
    length = _read_length(file, lead, is_implicit, endian)
    start = file.tell()
    if length == UNDEFINED_LENGTH:
        end, complete = walk_fragments(file, size_bytes)
        return PixelElement(start, end, UNDEFINED_LENGTH, complete)
    return PixelElement(start, min(start + length, size_bytes), length, start + length <= size_bytes)


def _read_length(file: BinaryIO, lead: bytes, is_implicit: bool, endian: str) -> int:
    if is_implicit:
        return int(struct.unpack(endian + "L", lead[4:8])[0])
    if lead[4:6] in SHORT_VRS:
        return int(struct.unpack(endian + "H", lead[6:8])[0])
    more = file.read(4)
    return int(struct.unpack(endian + "L", more)[0]) if len(more) == 4 else 0


def walk_fragments(file: BinaryIO, size_bytes: int) -> tuple[int, bool]:
    """Where encapsulated pixel data ends and whether its delimiter is there (PS3.5 A.4), reading lengths only."""
    while len(lead := file.read(8)) == 8:
        group, element, length = struct.unpack("<HHL", lead)
        if (group << 16 | element) == SEQUENCE_DELIMITER:
            return file.tell(), True
        if (group << 16 | element) != ITEM or file.tell() + length > size_bytes:
            break
        file.seek(length, os.SEEK_CUR)
    return size_bytes, False


def make_header(instance: Any, meta: Any, pixels: PixelElement | None) -> Header:
    """Gather a parsed data set's elements as plain values."""
    codes = tuple(_codes(instance, "ViewCodeSequence"))
    texts = [_text(instance, name) for name in ("SeriesDescription", "AcquisitionDeviceProcessingDescription")]
    view = find_view(_text(instance, "ViewPosition"), codes, _texts(instance, "PatientOrientation"), texts)
    named = [meaning for _, meaning in _codes(instance, "AnatomicRegionSequence")]
    described = [_text(instance, name) for name in ("StudyDescription", "SeriesDescription", "ProtocolName")]
    return Header(
        sop_class_uid=_text(instance, "SOPClassUID") or _text(meta, "MediaStorageSOPClassUID"),
        sop_instance_uid=_text(instance, "SOPInstanceUID"),
        study_instance_uid=_text(instance, "StudyInstanceUID"),
        series_instance_uid=_text(instance, "SeriesInstanceUID"),
        accession_number=_text(instance, "AccessionNumber"),
        patient_id=_text(instance, "PatientID"),
        modality=_text(instance, "Modality").upper(),
        presentation_intent=_text(instance, "PresentationIntentType").upper(),
        body_part=_text(instance, "BodyPartExamined").upper() or " ".join(named).upper()[:MAX_TEXT],
        regions=tuple(text.upper() for text in described if text),
        view=view,
        burned_in=_text(instance, "BurnedInAnnotation").upper(),
        photometric=_text(instance, "PhotometricInterpretation").upper(),
        syntax=_text(meta, "TransferSyntaxUID"),
        samples=_number(instance, "SamplesPerPixel") or 1,
        frames=max(1, _number(instance, "NumberOfFrames") or 1),
        rows=_number(instance, "Rows"),
        columns=_number(instance, "Columns"),
        bits_allocated=_number(instance, "BitsAllocated"),
        pixels=pixels,
    )


def judge_identity(header: Header) -> tuple[Reason, str] | None:
    """Why an instance is not a chest radiograph to be drafted, as reason and detail; None when it is one.

    Order matters: what a file is comes before how it was made, that before what it shows. FOR PROCESSING data is
    always left out; the walk adds to the detail what it knows of the study.
    """
    for judge in (judge_class, judge_making, judge_region):
        verdict = judge(header)
        if verdict:
            return verdict
    return None


def judge_class(header: Header) -> tuple[Reason, str] | None:
    """Left out for its SOP class; Modality is asked where the class is missing, or contradicts it."""
    if header.sop_class_uid == MEDIA_DIRECTORY:
        return Reason.NOT_IMAGE, "the directory of a DICOM medium"
    arc = header.sop_class_uid.removeprefix(STORAGE).split(".")[0] if header.sop_class_uid.startswith(STORAGE) else ""
    if arc in NOT_IMAGE_ARCS or header.modality in NOT_IMAGE_MODALITIES:
        return Reason.NOT_IMAGE, "a DICOM object that is no picture (report, presentation state, waveform, plan)"
    if arc == SECONDARY_ARC:
        return Reason.SECONDARY_CAPTURE, "a secondary capture"
    if not header.sop_class_uid and not header.modality and header.rows is None:
        return Reason.NOT_IMAGE, "a DICOM object without a class, a modality or a picture"
    is_radiograph = header.sop_class_uid in RADIOGRAPHS or not header.sop_class_uid
    if not is_radiograph or header.modality not in RADIOGRAPH_MODALITIES | {""}:
        return Reason.OTHER_MODALITY, "neither computed nor digital radiography"
    return None


def judge_making(header: Header) -> tuple[Reason, str] | None:
    """Left out for how the picture was made: raw, coloured, or with text in it."""
    if header.sop_class_uid == DIGITAL_X_RAY_RAW or header.presentation_intent == "FOR PROCESSING":
        return Reason.FOR_PROCESSING, "raw detector data"
    if header.samples > 1 or (header.photometric and not header.photometric.startswith("MONOCHROME")):
        return Reason.SECONDARY_CAPTURE, "a colour picture in a radiograph's class"
    if header.burned_in == "YES":
        return Reason.BURNED_IN, "text is burned into the picture"
    return None


def judge_region(header: Header) -> tuple[Reason, str] | None:
    """Left out for what it shows: a body part other than the chest, or, where none is named, a description of one."""
    if any(word in header.body_part for word in CHEST_WORDS):
        return None
    if header.body_part not in NO_REGION:
        return Reason.NOT_CHEST, "another body part"
    described = " ".join(header.regions)
    if not any(word in described for word in CHEST_WORDS) and set(_words(described)) & OTHER_REGIONS:
        return Reason.NOT_CHEST, "no body part, and a description of another region"
    return None


def check_picture(header: Header, settings: Settings) -> None:
    """Hold what the header claims against the limits and against the bytes that are there, without decoding.

    Raises SourceError: `truncated`, `corrupt`, `too_large`, `multi_frame`.
    """
    if header.pixels is None:
        raise SourceError(Reason.TRUNCATED, "the file ends before its pixel data")
    if not header.rows or not header.columns or not header.bits_allocated:
        raise SourceError(Reason.CORRUPT, "the header gives no picture size")
    if header.rows * header.columns * header.frames > settings.max_pixels:
        raise SourceError(Reason.TOO_LARGE, f"more than {settings.max_pixels} pixels")
    if header.frames > 1:
        raise SourceError(Reason.MULTI_FRAME, "a radiograph of several frames")
    claimed_bits = header.rows * header.columns * header.frames * header.bits_allocated
    if not header.pixels.complete or header.pixels.length * 8 < claimed_bits:
        raise SourceError(Reason.TRUNCATED, "the header claims more pixels than the file holds")


def clean_text(text: str) -> str:
    """A text fit for a store: without NUL and padding, valid Unicode, of bounded length."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "").strip()[:MAX_TEXT]


def _text(instance: Any, keyword: str) -> str:
    return (_texts(instance, keyword) or [""])[0]


def _texts(instance: Any, keyword: str) -> list[str]:
    """An element's values as texts; where pydicom cannot convert it, its bytes as Latin-1."""
    try:
        value = instance.get(keyword)
    except Exception:
        value = instance.get_item(keyword).value
    if value is None:
        return []
    if isinstance(value, bytes):
        value = value.decode("latin-1").split("\\")
    values = [value] if isinstance(value, str) or not hasattr(value, "__iter__") else list(value)
    return [clean_text(str(each)) for each in values]


def _number(instance: Any, keyword: str) -> int | None:
    try:
        return int(_text(instance, keyword))
    except ValueError:
        return None


def _codes(instance: Any, keyword: str) -> Iterator[tuple[str, str]]:
    """(CodeValue, CodeMeaning) of a code sequence; nothing when it is not a sequence."""
    try:
        items = list(instance.get(keyword) or [])
    except Exception:
        return
    for item in items:
        if hasattr(item, "get_item"):
            yield _text(item, "CodeValue"), _text(item, "CodeMeaning")


def _words(text: str) -> list[str]:
    return "".join(c if c.isalpha() else " " for c in text).split()
