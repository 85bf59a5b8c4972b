"""Phantom films as DICOM instances: stored values whose display is the drawn picture, under headers as varied as real.

The shares of photometric interpretations, bit depths, windows and missing tags follow the headers of the 7,469 images
of the Indiana University collection (Demner-Fushman et al., 2016). Attributes follow PS3.3 A.26 (DX) and A.2 (CR).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

CHEST = ("43799004", "SCT", "Chest")
VIEW_CODES = {
    "PA": ("399348003", "SCT", "postero-anterior"),
    "AP": ("399067008", "SCT", "antero-posterior"),
    "LL": ("399173006", "SCT", "left lateral"),
}
ORIENTATION = {"PA": ["L", "F"], "AP": ["L", "F"], "LL": ["A", "F"]}
FAMILY_NAMES = ("ALDER", "BIRCH", "CEDAR", "ELM", "HAZEL", "LARCH", "MAPLE", "ROWAN", "WILLOW", "YEW")
GIVEN_NAMES = ("ADA", "BEN", "CLARA", "DAN", "EVA", "FINN", "GRETA", "HUGO", "IDA", "JON")


@dataclass(frozen=True)
class Visit:
    """One study's identity; every value is invented."""

    seed: int
    patient_name: str
    patient_id: str
    birth_date: str
    sex: str
    study_date: str
    study_time: str
    accession: str
    study_uid: str


def make_uid(*parts: object) -> str:
    """A UID under the UUID root (PS3.5 B.2), the same for the same parts."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return f"2.25.{int.from_bytes(digest[:16], 'big')}"


def sample_visit(seed: int) -> Visit:
    """Invent the patient and the study of `seed`."""
    rng = np.random.default_rng([4, seed])
    year, month, day = int(rng.integers(1930, 2004)), int(rng.integers(1, 13)), int(rng.integers(1, 29))
    return Visit(
        seed=seed,
        patient_name=f"{rng.choice(FAMILY_NAMES)}^{rng.choice(GIVEN_NAMES)}",
        patient_id=f"PH{seed:09d}",
        birth_date=f"{year}{month:02d}{day:02d}",
        sex=str(rng.choice(["F", "M"])),
        study_date=f"2024{int(rng.integers(1, 13)):02d}{int(rng.integers(1, 29)):02d}",
        study_time=f"{int(rng.integers(7, 20)):02d}{int(rng.integers(60)):02d}{int(rng.integers(60)):02d}",
        accession=f"A{seed:09d}",
        study_uid=make_uid("study", seed),
    )


def make_instance(pixels: NDArray[np.uint8], visit: Visit, view: str, number: int = 1, digital: bool = False) -> bytes:
    """A DICOM file that displays as `pixels` (uint8 [height, width], white is dense), to about 2 grey levels.

    One in seven carries neither window nor VOI LUT: readers stretch those to their percentiles, up to 12 % brighter.
    `digital` forces a DX image with every tag present; otherwise the header is sampled as real ones are.
    """
    rng = np.random.default_rng([5, visit.seed, number])
    is_dx = digital or bool(rng.random() < 0.4)
    ds = Dataset()
    _set_identity(ds, visit, number, is_dx)
    if is_dx:
        _set_dx(ds, view)
    else:
        ds.PlateType = ""
    _set_acquisition(ds, rng, view, complete=digital)
    _set_pixels(ds, rng, pixels, is_dx)
    syntax = (
        ExplicitVRLittleEndian
        if digital
        else str(rng.choice([ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless], p=[0.7, 0.2, 0.1]))
    )
    return save_instance(ds, syntax)


def _set_identity(ds: Dataset, visit: Visit, number: int, is_dx: bool) -> None:
    ds.SpecificCharacterSet = "ISO_IR 100"
    ds.SOPClassUID = DigitalXRayImageStorageForPresentation if is_dx else ComputedRadiographyImageStorage
    ds.SOPInstanceUID = make_uid("instance", visit.seed, number)
    ds.StudyInstanceUID = visit.study_uid
    ds.SeriesInstanceUID = make_uid("series", visit.seed, number)
    ds.PatientName, ds.PatientID = visit.patient_name, visit.patient_id
    ds.PatientBirthDate, ds.PatientSex = visit.birth_date, visit.sex
    ds.StudyDate = ds.ContentDate = ds.AcquisitionDate = visit.study_date
    ds.StudyTime = ds.ContentTime = ds.AcquisitionTime = visit.study_time
    ds.StudyID, ds.AccessionNumber = str(visit.seed), visit.accession
    ds.ReferringPhysicianName = ""
    ds.StudyDescription = "CHEST"
    ds.Modality = "DX" if is_dx else "CR"
    ds.SeriesNumber, ds.InstanceNumber = number, 1
    ds.Manufacturer, ds.ManufacturerModelName = "Readroom", "Phantom"
    ds.ImageType = ["DERIVED", "PRIMARY"]
    ds.LossyImageCompression = "00"


def _set_dx(ds: Dataset, view: str) -> None:
    """What a DX image carries beyond a CR one."""
    ds.PresentationIntentType = "FOR PRESENTATION"
    ds.ImageLaterality = "U"
    ds.DetectorType = "SCINTILLATOR"
    ds.PositionerType = "NONE"
    ds.AcquisitionContextSequence = Sequence()
    ds.AnatomicRegionSequence = Sequence([_make_code(*CHEST)])
    code = _make_code(*VIEW_CODES[view])
    code.ViewModifierCodeSequence = Sequence()
    ds.ViewCodeSequence = Sequence([code])
    ds.PixelIntensityRelationship, ds.PixelIntensityRelationshipSign = "LOG", -1


def _make_code(value: str, scheme: str, meaning: str) -> Dataset:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, scheme, meaning
    return code


def _set_acquisition(ds: Dataset, rng: np.random.Generator, view: str, complete: bool) -> None:
    """View, body part and burned-in flag, each missing as often as in real headers."""
    present = rng.random(3) < (0.65, 0.66, 0.55) if not complete else np.ones(3, dtype=bool)
    ds.PatientOrientation = ORIENTATION[view]
    if present[0] or view == "LL":  # an unlabelled lateral would be a mislabelled film, not a missing tag
        ds.ViewPosition = view
    if present[1]:
        ds.BodyPartExamined = "CHEST"
    if present[2]:
        ds.BurnedInAnnotation = "NO"
    elif "PresentationIntentType" in ds:
        ds.BurnedInAnnotation = "NO"  # type 1 in DX


def _set_pixels(ds: Dataset, rng: np.random.Generator, pixels: NDArray[np.uint8], is_dx: bool) -> None:
    """Stored values, photometric interpretation, rescale and one of window, VOI LUT or nothing."""
    bits = int(rng.choice([12, 15, 10, 14], p=[0.74, 0.2, 0.03, 0.03]))
    dark_is_high = bool(rng.random() < 0.48)
    ds.SamplesPerPixel, ds.PixelRepresentation = 1, 0
    ds.PhotometricInterpretation = "MONOCHROME1" if dark_is_high else "MONOCHROME2"
    ds.Rows, ds.Columns = pixels.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, bits, bits - 1
    if is_dx or rng.random() < 0.16 or not dark_is_high:
        ds.PresentationLUTShape = "INVERSE" if dark_is_high else "IDENTITY"
    if is_dx or rng.random() < 0.5:
        ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "0", "1", "US"
    ds.ImagerPixelSpacing = [f"{430 / ds.Rows:.6f}"] * 2
    grey = 255 - pixels.astype(np.float64) if dark_is_high else pixels.astype(np.float64)
    # Half a grey level of dither: real detectors fill their range, and histograms without gaps test percentiles fairly.
    grey = np.clip(grey + rng.uniform(-0.5, 0.5, grey.shape), 0, 255) / 255
    voi = str(rng.choice(["window", "lut", "none"], p=[0.55, 0.3, 0.15]))
    stored = {"window": _store_windowed, "lut": _store_with_lut, "none": _store_plain}[voi](ds, rng, grey)
    ds.PixelData = stored.astype("<u2").tobytes()


def _store_windowed(ds: Dataset, rng: np.random.Generator, grey: NDArray[np.float64]) -> NDArray[np.float64]:
    """The inverse of the linear window, PS3.3 C.11.2.1.2.1."""
    top = 2**ds.BitsStored - 1
    width = round(top * rng.uniform(0.55, 0.95))
    center = round(rng.uniform(width / 2 + 1, top - width / 2))
    ds.WindowCenter, ds.WindowWidth = str(center), str(width)
    stored: NDArray[np.float64] = np.clip(np.round((grey - 0.5) * (width - 1) + center - 0.5), 0, top)
    return stored


def _store_with_lut(ds: Dataset, rng: np.random.Generator, grey: NDArray[np.float64]) -> NDArray[np.float64]:
    """A VOI LUT of every stored value to 16 bits, a power curve, and the stored values that it takes to the picture."""
    top = 2**ds.BitsStored - 1
    power = rng.uniform(0.7, 1.5)
    table = np.round((np.arange(top + 1) / top) ** power * 65535).astype("<u2")
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [top + 1, 0, 16])
    item.LUTExplanation = "NORMAL"
    item.add_new("LUTData", "OW", table.tobytes())
    ds.VOILUTSequence = Sequence([item])
    stored: NDArray[np.float64] = np.round(grey ** (1 / power) * top)
    return stored


def _store_plain(ds: Dataset, rng: np.random.Generator, grey: NDArray[np.float64]) -> NDArray[np.float64]:
    """No window: the reader must find the range itself."""
    top = 2**ds.BitsStored - 1
    low, high = top * rng.uniform(0.02, 0.2), top * rng.uniform(0.7, 0.98)
    stored: NDArray[np.float64] = np.round(low + grey * (high - low))
    return stored


def save_instance(ds: Dataset, syntax: str) -> bytes:
    """A Part 10 file of `ds` in the given transfer syntax; RLELossless is encoded here."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian if syntax == RLELossless else syntax
    file = FileDataset("", ds, file_meta=meta, preamble=b"\0" * 128)
    if syntax == RLELossless:
        file.compress(RLELossless, generate_instance_uid=False)
    content = BytesIO()
    file.save_as(content, enforce_file_format=True)
    return content.getvalue()
