"""Builds PACS exports for tests: good radiographs, and every hazard of real exports with its expected reason.

Names and identifiers are invented and marked (`CANARY`), so that tests can look for them where they must not be.
"""

from __future__ import annotations

import io
import os
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
)

ROOT = "1.2.826.0.1.3680043.10.1462."
STORAGE = "1.2.840.10008.5.1.4.1.1."
CR, DX, DX_RAW, SC = STORAGE + "1", STORAGE + "1.1", STORAGE + "1.1.1", STORAGE + "7"
PATIENT = "CANARY^NAME"
ROWS, COLUMNS = 32, 24


def name_uid(*parts: object) -> str:
    """A valid UID that depends on the parts only."""
    return ROOT + str(zlib.crc32("/".join(map(str, parts)).encode()))


def make_radiograph(name: str, study: str = "", **elements: Any) -> Dataset:
    """A small valid CR chest radiograph; `elements` are set by keyword, None leaves one out."""
    instance = Dataset()
    pixels = np.random.default_rng(zlib.crc32(name.encode())).integers(0, 4096, (ROWS, COLUMNS), dtype=np.uint16)
    values: dict[str, Any] = {
        "SpecificCharacterSet": "ISO_IR 100",
        "SOPClassUID": CR,
        "SOPInstanceUID": name_uid("instance", name),
        "StudyInstanceUID": name_uid("study", study or name),
        "SeriesInstanceUID": name_uid("series", study or name),
        "AccessionNumber": "CANARY-ACC",
        "PatientID": "CANARY-ID",
        "PatientName": PATIENT,
        "Modality": "CR",
        "BodyPartExamined": "CHEST",
        "ViewPosition": "PA",
        "PhotometricInterpretation": "MONOCHROME2",
        "SamplesPerPixel": 1,
        "Rows": ROWS,
        "Columns": COLUMNS,
        "BitsAllocated": 16,
        "BitsStored": 12,
        "HighBit": 11,
        "PixelRepresentation": 0,
    }
    for keyword, value in {**values, **elements}.items():
        if value is not None:
            setattr(instance, keyword, value)
    if "PixelData" not in elements:
        instance.add_new(0x7FE00010, "OW", pixels.tobytes())
    return instance


def encode(instance: Dataset, syntax: str = ExplicitVRLittleEndian) -> bytes:
    """The bytes of an instance as a DICOM file."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = UID(syntax)
    meta.MediaStorageSOPClassUID = UID(str(instance.get("SOPClassUID", CR)))
    meta.MediaStorageSOPInstanceUID = UID(str(instance.get("SOPInstanceUID", ROOT + "0")))
    instance.file_meta = meta
    if syntax == ExplicitVRBigEndian and "PixelData" in instance:
        instance.PixelData = np.frombuffer(instance.PixelData, dtype="<u2").astype(">u2").tobytes()
    out = io.BytesIO()
    pydicom.dcmwrite(out, instance, enforce_file_format=True)
    return out.getvalue()


def encode_bare(instance: Dataset, implicit: bool) -> bytes:
    """The bytes of a data set alone, without preamble and meta header."""
    out = io.BytesIO()
    pydicom.dcmwrite(out, instance, implicit_vr=implicit, little_endian=True)
    return out.getvalue()


def encode_fragments(instance: Dataset) -> bytes:
    """The bytes of an instance with encapsulated pixel data (its content is never decoded by producers)."""
    instance["PixelData"].value = encapsulate([b"\xff\x4f\xff\x51" + bytes(600)])
    instance["PixelData"].VR = "OB"
    instance["PixelData"].is_undefined_length = True
    return encode(instance, JPEG2000Lossless)


def make_object(sop_class: str, modality: str, name: str) -> Dataset:
    """A DICOM object without pixels."""
    keep = {"SOPClassUID": sop_class, "Modality": modality}
    drop = dict.fromkeys(["Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"])
    instance = make_radiograph(name, **keep, **drop, PhotometricInterpretation=None, SamplesPerPixel=None)
    del instance[0x7FE00010]
    return instance


def good_files() -> dict[str, bytes]:
    """Files that are accepted, by item."""
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "399067008", "SCT", "lateral"
    latin = make_radiograph("utf8", SpecificCharacterSet="ISO_IR 6")
    latin.add_new(0x00100010, "PN", "CANARY^J\u00f6rg".encode())
    wrong_vr = make_radiograph("wrong-vr")
    wrong_vr.add_new(0x00280120, "SS", -1)
    odd = make_radiograph("odd", AccessionNumber=None, PatientID=None, ViewPosition="")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        odd.add_new(0x00281053, "DS", "1.00000000000000000000001")
    odd.add_new(0x00091010, "UN", b"CANARY private")
    return {
        "A/IM000001": encode(make_radiograph("first", "study-a")),
        "A/IM000002": encode(make_radiograph("second", "study-a", ViewPosition="LL")),
        "A/dx.dcm": encode(make_radiograph("dx", SOPClassUID=DX, PresentationIntentType="FOR PRESENTATION")),
        "B/ap.dcm": encode(make_radiograph("ap", Modality="DX", ViewPosition="AP", BodyPartExamined="PORTABLE CHEST")),
        "B/big-endian": encode(make_radiograph("big"), ExplicitVRBigEndian),
        "B/coded.dcm": encode(make_radiograph("coded", ViewPosition=None, ViewCodeSequence=Sequence([code]))),
        "B/deflated.dcm": encode(make_radiograph("deflated"), DeflatedExplicitVRLittleEndian),
        "B/encapsulated.dcm": encode_fragments(make_radiograph("encapsulated")),
        "B/implicit.dcm": encode(make_radiograph("implicit"), ImplicitVRLittleEndian),
        "B/japanese.dcm": encode(make_radiograph("iso2022", SpecificCharacterSet=["", "ISO 2022 IR 87"])),
        "B/no-body-part": encode(make_radiograph("no-body", BodyPartExamined=None)),
        "B/no-meta-explicit": encode_bare(make_radiograph("no-meta"), implicit=False),
        "B/no-meta-implicit": encode_bare(make_radiograph("no-meta-2"), implicit=True),
        "B/odd.dcm": encode(odd),
        "B/unknown-charset.dcm": encode(make_radiograph("charset")).replace(b"ISO_IR 100", b"ISO_IR 999"),
        "B/utf8.dcm": encode(latin),
        "B/wrong-vr.dcm": encode(wrong_vr),
    }


def bad_files() -> dict[str, tuple[bytes, str]]:
    """Files that are skipped, with their reasons, by item; none depends on another one."""
    rgb = make_radiograph("rgb", PhotometricInterpretation="RGB", SamplesPerPixel=3, PlanarConfiguration=1)
    rgb[0x7FE00010].value *= 3
    whole = encode(make_radiograph("whole"))
    fragments = encode_fragments(make_radiograph("cut-fragments"))
    objects = [("SR", "88.11"), ("PR", "11.1"), ("KO", "88.59"), ("DOC", "104.1"), ("ECG", "9.1.1"), ("SEG", "66.4")]
    images = [("CT", "2"), ("MR", "4"), ("US", "6.1"), ("NM", "20"), ("MG", "1.2"), ("PX", "1.3")]
    return {
        **{f"bad/{m}": (encode(make_object(STORAGE + arc, m, m)), "not_image") for m, arc in objects},
        "bad/RTPLAN": (encode(make_object(STORAGE + "481.5", "RTPLAN", "plan")), "not_image"),
        **{
            f"bad/{modality}.dcm": (
                encode(make_radiograph(modality, SOPClassUID=STORAGE + arc, Modality=modality)),
                "other_modality",
            )
            for modality, arc in images
        },
        "bad/CT-in-CR": (encode(make_radiograph("ct-in-cr", Modality="CT")), "other_modality"),
        "bad/preview.jpg": (b"\xff\xd8\xff\xe0" + bytes(300), "not_dicom"),
        "bad/report.pdf": (b"%PDF-1.4 CANARY", "not_dicom"),
        "bad/INDEX.HTM": (b"<html>CANARY</html>", "not_dicom"),
        "bad/Thumbs.db": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "not_dicom"),
        "bad/.DS_Store": (b"\0\0\0\x01Bud1" + bytes(200), "not_dicom"),
        "bad/AUTORUN.EXE": (b"MZ" + bytes(range(256)) * 4, "not_dicom"),
        "bad/random": (np.random.default_rng(7).bytes(4000), "not_dicom"),
        "bad/one-byte": (b"\x08", "not_dicom"),
        "bad/packed.7z": (b"7z\xbc\xaf\x27\x1c" + bytes(60), "not_dicom"),
        "bad/empty": (b"", "empty"),
        "bad/secondary": (encode(make_radiograph("sc", SOPClassUID=SC, Modality="OT")), "secondary_capture"),
        "bad/rgb": (encode(rgb), "secondary_capture"),
        "bad/burned": (encode(make_radiograph("burned", BurnedInAnnotation="YES")), "burned_in"),
        "bad/hand": (encode(make_radiograph("hand", BodyPartExamined="HAND")), "not_chest"),
        "bad/extremety": (encode(make_radiograph("extremety", BodyPartExamined="EXTREMETY")), "not_chest"),
        "bad/knee": (
            encode(make_radiograph("knee", BodyPartExamined="", StudyDescription="XR KNEE 2 views")),
            "not_chest",
        ),
        "bad/raw": (encode(make_radiograph("raw-alone", SOPClassUID=DX_RAW)), "for_processing"),
        "bad/raw-cr": (encode(make_radiograph("raw-cr", PresentationIntentType="FOR PROCESSING")), "for_processing"),
        "bad/half-pixels": (whole[: -ROWS * COLUMNS], "truncated"),
        "bad/cut-header": (whole[:600], "truncated"),
        "bad/cut-meta": (whole[:200], "truncated"),
        "bad/cut-preamble": (whole[:134], "truncated"),
        "bad/cut-fragments": (fragments[:-100], "truncated"),
        "bad/no-pixels": (encode(make_object(CR, "CR", "no-pixels")), "truncated"),
        "bad/short-native": (encode(make_radiograph("short", Rows=ROWS * 2)), "truncated"),
        "bad/huge": (encode(make_radiograph("huge", Rows=60000, Columns=60000)), "too_large"),
        "bad/frames": (encode(make_radiograph("frames", NumberOfFrames=2_000_000_000)), "too_large"),
        "bad/two-frames": (encode(make_radiograph("two", NumberOfFrames=2, Rows=ROWS // 2)), "multi_frame"),
        "bad/no-size": (encode(make_radiograph("no-size", Rows=None)), "corrupt"),
        "bad/DICOMDIR": (encode_directory([]), "not_image"),
    }


def encode_directory(references: list[list[str]]) -> bytes:
    """A small DICOMDIR that names files by their components."""
    directory = make_object("1.2.840.10008.1.3.10", "", "directory")
    for keyword in [element.keyword for element in directory if element.keyword != "SOPClassUID"]:
        delattr(directory, keyword)
    records = []
    for parts in references:
        record = Dataset()
        record.DirectoryRecordType, record.ReferencedFileID = "IMAGE", parts
        records.append(record)
    directory.DirectoryRecordSequence = Sequence(records)
    return encode(directory)


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write files under a folder."""
    for item, data in files.items():
        path = folder / item
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def build_export(folder: Path) -> dict[str, str | None]:
    """Write the whole hostile export; what becomes of each item: its reason, None when it is accepted."""
    good, bad = good_files(), bad_files()
    write_files(folder, good)
    write_files(folder, {item: data for item, (data, _) in bad.items()})
    expected: dict[str, str | None] = dict.fromkeys(good) | {item: reason for item, (_, reason) in bad.items()}
    return expected | write_related(folder) | write_links(folder)


def write_related(folder: Path) -> dict[str, str | None]:
    """Files whose disposition depends on other files of the export."""
    pair = make_radiograph("presented", "pair", SOPClassUID=DX, Modality="DX")
    other_header = make_radiograph("first", "study-a", StudyDescription="sent again")
    other_pixels = make_radiograph("first", "study-a")
    other_pixels[0x7FE00010].value = bytes(ROWS * COLUMNS * 2)
    files = {
        "C/raw": (encode(make_radiograph("raw", "pair", SOPClassUID=DX_RAW, Modality="DX")), "for_processing"),
        "C/shown": (encode(pair), None),
        "D/again": (good_files()["A/IM000001"], "duplicate"),
        "D/conflict": (encode(other_pixels), "uid_conflict"),
        "D/resent": (encode(other_header), "duplicate"),
        "disc/DICOMDIR": (encode_directory([["IMAGES", "IM1"], ["IMAGES", "IM2"]]), "not_image"),
        "disc/IMAGES/IM1": (encode(make_radiograph("disc")), None),
    }
    write_files(folder, {item: data for item, (data, _) in files.items()})
    return {item: reason for item, (_, reason) in files.items()} | {"disc/IMAGES/IM2": "missing"}


def write_links(folder: Path) -> dict[str, str | None]:
    """Links and special files; none of them may be followed out of the tree, or waited for."""
    links = folder / "links"
    links.mkdir()
    outside = folder.with_name(f"{folder.name}-outside")
    write_files(outside, {"secret.dcm": encode(make_radiograph("secret"))})
    (links / "out.dcm").symlink_to(outside / "secret.dcm")
    (links / "out-folder").symlink_to(outside)
    (links / "loop").symlink_to(folder)
    (links / "nowhere").symlink_to("not-there")
    (links / "inside").symlink_to("../A/IM000002")
    os.mkfifo(links / "pipe")
    refused = dict.fromkeys(["links/out.dcm", "links/out-folder", "links/loop", "links/nowhere"], "unsafe_path")
    return {**refused, "links/pipe": "unsafe_path", "links/inside": "duplicate"}


def write_many(folder: Path, count: int, start: int = 0) -> None:
    """Write many tiny radiographs quickly: one template with its UIDs exchanged, 1000 files a folder."""
    template = encode(make_radiograph("template", SOPInstanceUID=ROOT + "1" * 12, StudyInstanceUID=ROOT + "2" * 12))
    for number in range(start, start + count):
        data = template.replace(b"1" * 12, b"%012d" % (10**11 + number)).replace(
            b"2" * 12, b"%012d" % (2 * 10**11 + number // 2)
        )
        # Other pixels, too: equal content would be one image.
        path = folder / f"{number // 1000:03d}" / f"IM{number:06d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data[:-4] + struct.pack("<L", number & 0x0FFF0FFF | (number >> 12) << 16))


def zip_bytes(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip of files."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return out.getvalue()


def tar_bytes(
    files: dict[str, bytes], mode: str = "w", change: Callable[[tarfile.TarInfo], None] | None = None
) -> bytes:
    """A tar of files, `mode` as tarfile has it (`w`, `w:gz`, `w:bz2`, `w:xz`)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if change:
                change(info)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def encrypt_flags(archive: bytes) -> bytes:
    """The same zip with every entry marked as encrypted."""
    data = bytearray(archive)
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.find(magic)
        while at >= 0:
            data[at + offset] |= 1
            at = data.find(magic, at + 4)
    return bytes(data)
