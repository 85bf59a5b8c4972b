"""The DICOM display pipeline: stored values to 8-bit grey, as one lookup table per image.

Every step (padding, Modality LUT, VOI LUT, inversion, rounding) maps one stored value to one grey level whatever its
neighbours are. So it is computed once for each word a pixel can hold, at most 65536 of them, and the image is indexed:
4 ms instead of about 100 ms for a chest film, and no float64 copy of the image (60 MB).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut, apply_windowing
from pydicom.uid import RLELossless

from models.lookup import FloatArray, LookupTable, read_lookup

# What the pipeline reads, and the functional groups that hold it in enhanced multi-frame objects (PS3.3 C.7.6.16.2).
DISPLAY_KEYWORDS = (
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PhotometricInterpretation",
    "PixelPaddingValue", "PixelPaddingRangeLimit", "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept",
    "VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction", "PresentationLUTShape",
)  # fmt: skip
DISPLAY_GROUPS = ("PixelValueTransformationSequence", "FrameVOILUTSequence")
WINDOW_FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")  # PS3.3 C.11.2.1.2 and C.11.2.1.3; LINEAR when absent
STRETCH_PERCENT = 0.5  # without a usable window: from this percentile to 100 minus it


class Levels:
    """The stored values that table entries stand for, and which entry each pixel takes.

    `values`: float64 (entries,), stored values in the order of the table; `index`: integers (rows, columns).
    """

    def __init__(self, values: FloatArray, index: NDArray[Any]) -> None:
        self.values = values
        self.index = index

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """How many pixels take each entry; computed only for images that need it."""
        return np.bincount(self.index.ravel(), minlength=self.values.size)


def render_gray(pixels: NDArray[Any], instance: Any, profile: str, frame: int = 0) -> NDArray[np.uint8]:
    """Display values (rows, columns) of decoded monochrome `pixels` under the named profile of `PROFILES`."""
    header = collect_header(instance, frame)
    levels = index_levels(pixels, header)
    table = PROFILES[profile](header, levels)
    return np.asarray(np.take(table, levels.index), dtype=np.uint8)


def collect_header(instance: Any, frame: int) -> Any:
    """A flat pydicom Dataset with the display elements that hold for `frame`; elements that do not parse are left out.

    Per-frame functional groups win over shared ones, and those over the root.
    """
    header = Dataset()
    header.file_meta = instance.file_meta
    for source in (instance, *list_groups(instance, frame)):
        for keyword in DISPLAY_KEYWORDS:
            copy_element(source, header, keyword)
    return header


def copy_element(source: Any, header: Any, keyword: str) -> None:
    """Copy one element if it is there, has a value and parses."""
    try:
        if keyword in source and not source[keyword].is_empty:
            header.add(source[keyword])
    except Exception:
        return  # a text where a number belongs: as good as absent


def list_groups(instance: Any, frame: int) -> list[Any]:
    """Items of the functional groups that concern display: shared first, then those of `frame`."""
    items: list[Any] = []
    for keyword, index in (("SharedFunctionalGroupsSequence", 0), ("PerFrameFunctionalGroupsSequence", frame)):
        groups = instance.get(keyword) or []
        if index < len(groups):
            items += [groups[index][name][0] for name in DISPLAY_GROUPS if groups[index].get(name)]
    return items


def read_number(header: Any, keyword: str) -> float | None:
    """First value of an element as a finite float; None when absent or no number."""
    value = header.get(keyword)
    if isinstance(value, bytes):
        value = int.from_bytes(value[:2], "little")  # a number under VR UN or OB
    elif hasattr(value, "__len__") and not isinstance(value, str):
        value = value[0] if len(value) else None
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) else None


def index_levels(pixels: NDArray[Any], header: Any) -> Levels:
    """Table entries for `pixels`: every word of 8 or 16 bits, or for wider and floating pixels the values present."""
    if pixels.dtype.kind in "iu" and pixels.dtype.itemsize <= 2:
        words = np.ascontiguousarray(pixels).view(f"u{pixels.dtype.itemsize}")
        return Levels(decode_words(8 * pixels.dtype.itemsize, header), words)
    values, index = np.unique(pixels, return_inverse=True)
    return Levels(values.astype(np.float64), index.reshape(pixels.shape))


def decode_words(word_bits: int, header: Any) -> FloatArray:
    """The stored value that each word of `word_bits` bits means (PS3.5 8.1.1), float64 (2**word_bits,).

    Bits above High Bit and below the value are dropped: old files keep overlays there.
    """
    stored_bits = min(int(read_number(header, "BitsStored") or word_bits), word_bits)
    words = np.arange(2**word_bits, dtype=np.int64) >> find_shift(header, stored_bits, word_bits)
    stored = words & (2**stored_bits - 1)
    if is_signed(header):
        stored -= (stored >> (stored_bits - 1)) << stored_bits
    return np.asarray(stored, dtype=np.float64)


def find_shift(header: Any, stored_bits: int, word_bits: int) -> int:
    """Bits below the value in its word. Codecs other than RLE give values at bit 0 whatever High Bit says."""
    syntax = header.file_meta.TransferSyntaxUID
    shift = int(read_number(header, "HighBit") or 0) + 1 - stored_bits
    in_place = not syntax.is_encapsulated or syntax == RLELossless
    return shift if in_place and 0 <= shift <= word_bits - stored_bits else 0


def is_signed(header: Any) -> bool:
    """Whether stored values are two's complement."""
    return read_number(header, "PixelRepresentation") == 1


def draw_dicom_voi(header: Any, levels: Levels) -> NDArray[np.uint8]:
    """Profile `dicom_voi_v1`: what a viewer shows by default, uint8 (entries,).

    Padding mask on stored values, Modality LUT (PS3.3 C.11.1), first VOI LUT or window (C.11.2), else the 0.5 to 99.5
    percentiles of unpadded pixels; normalised by the theoretical output range; inverted once, after all that (C.11.6,
    C.7.6.3.1.2); padding black.
    """
    padded = mask_padding(header, levels.values)
    modality = apply_modality(header, levels.values)
    shown = None if modality is None else apply_voi(header, modality)
    if shown is None:
        shown = stretch_levels(levels.values if modality is None else modality, np.where(padded, 0, levels.counts))
    if is_inverted(header):
        shown = 1.0 - shown
    return round_levels(np.where(padded, 0.0, shown))


def mask_padding(header: Any, values: FloatArray) -> NDArray[np.bool_]:
    """Which stored values are padding (PS3.3 C.7.5.1.1.2): Pixel Padding Value to Pixel Padding Range Limit."""
    first = read_padding(header, "PixelPaddingValue")
    if first is None:
        return ~np.isfinite(values)
    last = read_padding(header, "PixelPaddingRangeLimit")
    low, high = sorted((first, first if last is None else last))
    return ((values >= low) & (values <= high)) | ~np.isfinite(values)


def read_padding(header: Any, keyword: str) -> float | None:
    """A padding element as a stored value: files write -2000 as US 63536 and the reverse, so only the bits count."""
    number = read_number(header, keyword)
    bits = int(read_number(header, "BitsAllocated") or 16)
    if number is None or number != int(number) or bits > 16:
        return number
    word = int(number) % 2**bits
    return float(word - 2**bits if is_signed(header) and word >= 2 ** (bits - 1) else word)


def apply_modality(header: Any, values: FloatArray) -> FloatArray | None:
    """Stored values after the Modality LUT or rescale; None when there is a Modality LUT that cannot be used."""
    if header.get("ModalityLUTSequence"):
        table = read_table(header, "ModalityLUTSequence", is_signed(header))
        return None if table is None else table.map_values(values)
    if not read_number(header, "RescaleSlope") or read_number(header, "RescaleIntercept") is None:
        return values  # no rescale, or slope 0, which would wipe the picture
    return np.asarray(apply_modality_lut(values, pick_elements(header, "RescaleSlope", "RescaleIntercept")))


def read_table(header: Any, keyword: str, signed_input: bool) -> LookupTable | None:
    """The first lookup table of a sequence, or None when it cannot be used."""
    little_endian = header.file_meta.TransferSyntaxUID.is_little_endian
    return read_lookup(header[keyword].value[0], signed_input=signed_input, little_endian=little_endian)


def pick_elements(header: Any, *keywords: str) -> Any:
    """A Dataset with only these elements, so that a pydicom function acts on nothing else."""
    picked = Dataset()
    for keyword in keywords:
        if keyword in header:
            picked.add(header[keyword])
    return picked


def apply_voi(header: Any, modality: FloatArray) -> FloatArray | None:
    """Modality values after the first VOI LUT, else the first window, as fractions 0..1; None without a usable one."""
    if header.get("VOILUTSequence"):
        table = read_table(header, "VOILUTSequence", bool(np.nanmin(modality) < 0))
        if table is not None:
            return table.map_values(modality) / table.maximum
    return apply_window(header, modality)


def apply_window(header: Any, modality: FloatArray) -> FloatArray | None:
    """Modality values through Window Center and Width as fractions 0..1; None when absent or invalid.

    pydicom's `apply_windowing` answers in the range of a pretended unsigned 16-bit image: fractions of that range are
    what the real range would give, and its trouble with negative slopes and mixed Modality LUTs does not arise.
    """
    if read_number(header, "WindowCenter") is None or read_number(header, "WindowWidth") is None:
        return None
    window = pick_elements(header, "WindowCenter", "WindowWidth")
    function = str(header.get("VOILUTFunction") or "LINEAR").strip().upper()
    window.VOILUTFunction = function if function in WINDOW_FUNCTIONS else "LINEAR"
    window.PhotometricInterpretation, window.BitsStored, window.PixelRepresentation = "MONOCHROME2", 16, 0
    try:
        with np.errstate(over="ignore"):  # exp() of a steep sigmoid's far end
            return np.asarray(apply_windowing(modality, window)) / 65535.0
    except ValueError:
        return None  # width below 1 (LINEAR) or not positive


def stretch_levels(values: FloatArray, counts: NDArray[np.int64]) -> FloatArray:
    """Fractions 0..1 between the `STRETCH_PERCENT` percentiles of pixels with `counts` at each value.

    Percentiles are values that occur, taken alike from both ends, so that an image and its inverse stay inverses.
    """
    present = counts > 0
    if not present.any():
        return np.zeros_like(values)
    low, high = find_percentile(values[present], counts[present]), -find_percentile(-values[present], counts[present])
    if low == high:
        low, high = values[present].min(), values[present].max()
    if low == high:
        return np.full_like(values, 0.5)  # one value only: no picture, and no reason to call it black or white
    return np.asarray(np.clip((values - low) / (high - low), 0.0, 1.0))


def find_percentile(values: FloatArray, counts: NDArray[np.int64]) -> float:
    """The smallest of `values` that at least `STRETCH_PERCENT` of the pixels do not exceed."""
    return float(np.percentile(values, STRETCH_PERCENT, weights=counts, method="inverted_cdf"))


def is_inverted(header: Any) -> bool:
    """Whether low values are bright: Presentation LUT Shape INVERSE or, where it is absent, MONOCHROME1.

    84 % of real MONOCHROME1 films carry no Presentation LUT Shape.
    """
    shape = str(header.get("PresentationLUTShape") or "").strip().upper()
    if shape in ("INVERSE", "IDENTITY"):
        return shape == "INVERSE"
    return is_monochrome1(header)


def is_monochrome1(header: Any) -> bool:
    """Whether Photometric Interpretation says that the lowest value is white."""
    return str(header.get("PhotometricInterpretation")).strip() == "MONOCHROME1"


def round_levels(fractions: FloatArray) -> NDArray[np.uint8]:
    """Fractions 0..1 as grey levels 0..255. The inner rounding keeps a tie a tie on either side of an inversion."""
    levels = np.rint(np.round(np.clip(np.nan_to_num(fractions), 0.0, 1.0) * 255.0, 9))
    return np.asarray(levels, dtype=np.uint8)


def draw_mimic_jpg(header: Any, levels: Levels) -> NDArray[np.uint8]:
    """Profile `mimic_jpg_v1`: as the JPEGs of MIMIC-CXR-JPG were made, uint8 (entries,).

    Stored values without any LUT, from the image's own minimum to its maximum, truncated to 8 bits, MONOCHROME1
    inverted, then OpenCV's histogram equalisation (Johnson et al. 2019, arXiv:1901.07042, "Image conversion"). The JPEG
    compression of the data set (quality 95) is not imitated.
    """
    present = levels.values[(levels.counts > 0) & np.isfinite(levels.values)]
    low, span = (present.min(), np.ptp(present)) if present.size else (0.0, 0.0)
    shades = np.nan_to_num(np.clip((levels.values - low) / (span or 1.0), 0.0, 1.0) * 255.0).astype(np.uint8)
    if is_monochrome1(header):
        shades = 255 - shades
    return equalize_histogram(np.bincount(shades, weights=levels.counts, minlength=256))[shades]


def equalize_histogram(histogram: NDArray[Any]) -> NDArray[np.uint8]:
    """The table cv2.equalizeHist would apply to an 8-bit image with this histogram (256,): uint8 (256,).

    Cumulated counts after the first occurring shade, scaled to 255 and rounded half to even.
    """
    first = int(np.argmax(histogram > 0))
    rest = histogram.sum() - histogram[first]
    if rest <= 0:
        return np.full(256, first, dtype=np.uint8)  # one shade only: OpenCV leaves it
    cumulated = (np.cumsum(histogram) - histogram[: first + 1].sum()).astype(np.float32)
    scale = np.float32(255.0) / np.float32(rest)  # OpenCV computes in float32
    return np.asarray(np.clip(np.rint(cumulated * scale), 0, 255), dtype=np.uint8)


# Named and versioned: a checkpoint's manifest says which one its training pictures went through.
PROFILES: dict[str, Callable[[Any, Levels], NDArray[np.uint8]]] = {
    "dicom_voi_v1": draw_dicom_voi,
    "mimic_jpg_v1": draw_mimic_jpg,
}
