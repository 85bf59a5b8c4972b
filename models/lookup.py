"""DICOM lookup tables: LUT Descriptor and LUT Data (PS3.3 C.11.1.1, C.11.2.1.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LookupTable:
    """One table: `entries[0]` answers to the input value `first`; outputs have `bits` bits.

    pydicom's own `apply_voi` wraps the index of 8-bit tables with more than 256 entries and `apply_modality_lut`
    refuses depths other than 8 and 16; both occur in files, so the look-up is done here.
    """

    first: int
    bits: int
    entries: NDArray[np.uint16]

    def map_values(self, values: FloatArray) -> FloatArray:
        """Outputs for input `values` (any shape): below the first entry gives the first, above the last the last."""
        index = np.clip(np.rint(values) - self.first, 0, self.entries.size - 1).astype(np.intp)
        return np.asarray(self.entries[index], dtype=np.float64)

    @property
    def maximum(self) -> int:
        """The largest output the depth allows."""
        return int(2**self.bits - 1)


def read_lookup(item: Any, *, signed_input: bool, little_endian: bool) -> LookupTable | None:
    """The table of a sequence item, or None when it cannot be used."""
    try:
        count, first, bits = (int(value) for value in item.LUTDescriptor)
        entries = read_entries(item["LUTData"].value, count % 65536 or 65536, little_endian)
    except Exception:  # absent, empty, of another type: pydicom raises many kinds for what a file may hold
        return None
    if entries is None or not 1 <= bits <= 16:
        return None
    if signed_input and first >= 32768:
        first -= 65536  # a negative number written as US; LUTDescriptor is "US or SS"
    return LookupTable(first, max(bits, int(entries.max()).bit_length()), entries)


def read_entries(data: Any, count: int, little_endian: bool) -> NDArray[np.uint16] | None:
    """`count` entries of LUT Data: OW bytes or US numbers, one word each, or two 8-bit entries packed in a word."""
    if isinstance(data, bytes | bytearray):
        words = np.frombuffer(data[: len(data) // 2 * 2], dtype="<u2" if little_endian else ">u2")
    else:
        words = np.atleast_1d(np.asarray(data, dtype=np.int64) & 0xFFFF)
    words = words.astype("<u2")
    if words.size >= count:
        return words[:count]
    packed = words.view(np.uint8)
    return packed[:count].astype(np.uint16) if packed.size >= count else None
