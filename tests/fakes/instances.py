"""Small DICOM instances for tests, written as bytes."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, generate_uid

SECRET = "SECRETNAME"


def make_dataset(pixels: NDArray[Any], bits_stored: int | None = None, **elements: Any) -> FileDataset:
    """A CR instance of `pixels` (rows, columns[, 3]) in Explicit VR Little Endian; None removes an element."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    instance = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    bits = 8 * pixels.dtype.itemsize
    stored = bits_stored or bits
    values: dict[str, Any] = {
        "SOPClassUID": ComputedRadiographyImageStorage,
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "PatientName": f"{SECRET}^PATIENT",
        "PatientID": SECRET,
        "Modality": "CR",
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "SamplesPerPixel": 3 if pixels.ndim == 3 else 1,
        "PhotometricInterpretation": "RGB" if pixels.ndim == 3 else "MONOCHROME2",
        "BitsAllocated": bits,
        "BitsStored": stored,
        "HighBit": stored - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "PlanarConfiguration": 0 if pixels.ndim == 3 else None,
        "PixelData": pixels.tobytes() + b"\0" * (pixels.nbytes % 2),
    }
    for keyword, value in (values | elements).items():
        if value is not None:
            setattr(instance, keyword, value)
    instance["PixelData"].VR = "OW" if bits > 8 else "OB"
    return instance


def add_lookup(instance: Dataset, keyword: str, first: int, bits: int, entries: NDArray[Any], words: bool) -> None:
    """Add a Modality or VOI LUT sequence of one table, its data as OW bytes (`words`) or as US numbers."""
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [entries.size % 65536, first, bits])
    data = entries.astype("<u2")
    item.add_new("LUTData", "OW" if words else "US", data.tobytes() if words else data.tolist())
    setattr(instance, keyword, [item])


def to_bytes(instance: FileDataset) -> bytes:
    """The instance as a file in the DICOM File Format."""
    buffer = io.BytesIO()
    instance.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def make_instance(pixels: NDArray[Any], bits_stored: int | None = None, **elements: Any) -> bytes:
    """`make_dataset` as the bytes of a file."""
    return to_bytes(make_dataset(pixels, bits_stored, **elements))


def draw_gradient(rows: int = 64, columns: int = 48, bits: int = 12) -> NDArray[np.uint16]:
    """A diagonal gradient over all of 0 .. 2**bits - 1."""
    ramp = np.add.outer(np.arange(rows), np.arange(columns)) / (rows + columns - 2)
    return np.rint(ramp * (2**bits - 1)).astype(np.uint16)
